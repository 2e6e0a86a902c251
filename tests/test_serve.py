"Serving a policy: real sockets, real clients, some of them bad."
import contextlib, multiprocessing, os, re, signal, struct, subprocess, sys, threading, time, urllib.error, urllib.request, zlib

import anyio
import numpy as np
import pytest
import websockets
from vla_eval.connection import Connection
from vla_eval.protocol.messages import Message, MessageType, pack_message, unpack_message

from embodied_midtrain.serve import LIMIT, SIDE, check_message, check_picture, policy_server, serve_policy, serving

PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


class Echo:
    "Chunks of three: how many actions ago it was asked, and the mean of the picture. Counts its batches; a forward pass takes `seconds`."
    def __init__(self, seconds=0.0): self.batches, self.seconds = [], seconds

    def act(self, images, instructions):
        time.sleep(self.seconds)
        self.batches.append(len(images))
        chunk = np.zeros((len(images), 3, 7), np.float32)
        chunk[:, :, 0] = np.arange(3)
        chunk[:, :, 1] = np.array([image.mean() for image in images])[:, None]
        return chunk


def play(address, steps=6, picture=PICTURE, pause=None, **extra):
    "One episode's actions (steps, 7)."
    async def talk():
        async with Connection(address, max_retries=1, timeout=20) as connection:
            await connection.start_episode({"task": {"name": "wait"}})
            got = []
            for _ in range(steps):
                got.append((await connection.act({"images": {"camera": picture}, "task_description": "wait"} | extra))["actions"])
                if pause: await anyio.sleep(pause)
            return np.stack(got)
    return anyio.run(talk)


def raw(address, *messages, **how):
    "The answers to messages as they are."
    async def talk():
        async with websockets.connect(address, max_size=None, **how) as socket:
            answers = []
            for message in messages:
                await socket.send(message)
                with anyio.fail_after(10): answers.append(unpack_message(await socket.recv()))
            return answers
    return anyio.run(talk)


def observation(seq=7, **payload): return pack_message(Message(MessageType.OBSERVATION, {"images": {"camera": PICTURE}, "task_description": "wait"} | payload, seq=seq))


# ---- acting

@pytest.mark.parametrize("execute", [0, 1, 2])
def test_a_chunk_is_carried_out_before_the_policy_is_asked_again(execute):
    echo = Echo()
    with serving(policy_server(echo, execute=execute)) as address: actions = play(address, 6)
    assert actions.shape == (6, 7) and actions[:, 0].tolist() == (np.arange(6) % (execute or 3)).tolist() and len(echo.batches) == 6 / (execute or 3)
    assert np.allclose(actions[:, 1], PICTURE.mean())


def test_a_new_instruction_lets_go_of_the_old_chunk():
    echo = Echo()
    async def talk():
        async with Connection(address, max_retries=1) as connection:
            await connection.start_episode({})
            seen = {"images": {"camera": PICTURE}, "task_description": "wait"}
            return [(await connection.act(seen | more))["actions"][0] for more in ({}, {"episode_restart": True}, {}, {"episode_restart": False})]
    with serving(policy_server(echo)) as address: assert anyio.run(talk) == [0, 0, 1, 2]


def test_actions_are_told_in_the_words_of_the_simulator():
    with serving(policy_server(Echo(), translate=lambda actions: actions[:, :4] * 10)) as address: assert play(address, 3)[:, 0].tolist() == [0, 10, 20]


def test_an_episode_is_announced_once():
    told = []
    with serving(policy_server(Echo(), on_start=lambda *what: told.append(what))) as address:
        for _ in range(2): play(address, 4)
    assert len(told) == 2 and told[0][0] != told[1][0] and (told[0][1] == PICTURE).all() and told[0][2] == "wait"


def test_many_clients_are_served_in_batches():
    echo, got = Echo(0.02), {}
    with serving(policy_server(echo, batch=8)) as address:
        threads = [threading.Thread(target=lambda i=i: got.update({i: play(address, 9, np.full_like(PICTURE, i))})) for i in range(12)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    assert all((got[i][:, 1] == i).all() and got[i][:, 0].tolist() == [0, 1, 2] * 3 for i in range(12)), "everyone got the answers to their own pictures"
    assert sum(echo.batches) == 12 * 3 and 4 <= max(echo.batches) <= 8


def _play_for_ever(address): play(address, 10**6, pause=0.01)


def test_a_client_that_is_killed_in_mid_episode_harms_no_other():
    echo, context = Echo(0.01), multiprocessing.get_context("spawn")
    with serving(server := policy_server(echo)) as address:
        doomed = context.Process(target=_play_for_ever, args=(address,))
        doomed.start()
        while not echo.batches: time.sleep(0.05)
        got = []
        other = threading.Thread(target=lambda: got.append(play(address, 30, pause=0.02)))
        other.start()
        os.kill(doomed.pid, signal.SIGKILL)
        doomed.join()
        other.join()
        assert got[0][:, 0].tolist() == [0, 1, 2] * 10
        assert play(address, 3).shape == (3, 7)
        for _ in range(50):
            if not server._chunk_buffers: break
            time.sleep(0.05)
        assert not server._chunk_buffers, "what the dead client left is let go"


def test_a_client_that_leaves_while_the_policy_thinks_harms_no_other():
    echo = Echo(0.3)
    async def leave():
        async with websockets.connect(address) as socket:
            await socket.send(observation())
            await anyio.sleep(0.1)
    with serving(policy_server(echo)) as address:
        anyio.run(leave)
        assert play(address, 3).shape == (3, 7)


# ---- refusing

@pytest.mark.parametrize("payload, message", [
    (dict(imagse={}), "unknown field of the observation 'imagse'; did you mean 'images'?"),
    (dict(images={}), "no mapping from camera to picture"),
    (dict(images={"camera": [1, 2]}), "image 'camera' is list, not an array"),
    (dict(images={"camera": np.zeros((64, 64), np.uint8)}), r"shape \(64, 64\)"),
    (dict(images={"camera": np.zeros((64, 64, 4), np.uint8)}), r"shape \(64, 64, 4\)"),
    (dict(images={"camera": np.zeros((2, 64, 64, 3), np.uint8)}), r"shape \(2, 64, 64, 3\)"),
    (dict(images={"camera": np.zeros((1, SIDE + 1, 3), np.uint8)}), f"at most {SIDE}"),
    (dict(images={"camera": np.zeros((64, 64, 3), np.float32)}), "uint8 is wanted"),
    (dict(task_description=None), "task_description is NoneType"),
    (dict(images={"left": PICTURE, "right": PICTURE}), "pictures of left, right: say which one"),
])
def test_bad_observations_are_told_and_the_conversation_goes_on(payload, message):
    with serving(policy_server(Echo())) as address:
        bad, good = raw(address, observation(3, **payload), observation(4))
    assert bad.type == MessageType.ERROR and bad.seq == 3 and re.search(message, bad.payload["error"]), bad.payload
    assert good.type == MessageType.ACTION and good.seq == 4


@pytest.mark.parametrize("message, problem", [(b"\xc1\xc1", "not msgpack"), ("text", "bytes, not text"), (b"\x01", "message is int"), (pack_message(Message(MessageType.OBSERVATION, {}, 5))[:-3], "not msgpack")])
def test_what_is_no_message_is_told(message, problem):
    with serving(policy_server(Echo())) as address: bad, good = raw(address, message, observation())
    assert bad.type == MessageType.ERROR and problem in bad.payload["error"] and good.type == MessageType.ACTION


@pytest.mark.parametrize("side, told", [(50000, "no PNG or JPEG"), (5000, "5000 x 5000 pixels")])
def test_a_picture_that_would_unfold_to_gigabytes_is_not_opened(side, told):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=told): check_picture("camera", {"__image__": True, "format": "png", "data": bomb, "shape": [64, 64, 3]})
    with pytest.raises(ValueError, match="at most"): check_picture("camera", {"__image__": True, "format": "png", "data": bomb, "shape": [side, side, 3]})


def test_a_message_over_the_limit_closes_the_connection_and_says_why():
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    with serving(policy_server(Echo()), limit=2**16) as address:
        with pytest.raises(websockets.ConnectionClosedError, match="1009.*65536"): raw(address, observation(images={"camera": noise}))
        assert play(address, 2).shape == (2, 7)
    assert len(observation(images={"camera": noise})) < LIMIT


def test_pages_of_a_browser_are_refused():
    with serving(policy_server(Echo())) as address:
        with pytest.raises(websockets.InvalidStatus, match="403"): raw(address, observation(), origin="http://evil.example")
        with pytest.raises(urllib.error.HTTPError): urllib.request.urlopen(address.replace("ws", "http") + "/config?max_batch_size=1")
        assert urllib.request.urlopen(address.replace("ws", "http") + "/health").status == 200


def test_a_policy_that_loses_its_numbers_is_told_to_the_client():
    class Broken:
        def act(self, images, instructions): return np.full((len(images), 1, 7), np.nan)
    with serving(policy_server(Broken())) as address, pytest.raises(RuntimeError, match="predicted actions that are not finite"): play(address, 1)


def test_a_good_message_is_good(): assert check_message(observation(9, state=np.zeros(8))) == (9, None)


# ---- the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A fresh tiny policy in a folder."
    import torch
    from embodied_midtrain.actions import ActionNormaliser
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.policy import Policy, save_policy
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("policy") / "step-1"
    save_policy(Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=3), path)
    return path


@contextlib.contextmanager
def emt_serve(*words):
    "The command in a process of its own; yields process and address."
    command = [sys.executable, "-c", "import sys; from embodied_midtrain.cli import main; sys.exit(main())", "serve", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    try:
        line = process.stdout.readline()
        assert "ws://" in line, process.stderr.read()
        yield process, re.search(r"ws://\S+", line)[0]
    finally:
        process.kill()
        process.wait()


def test_emt_serve_answers_as_the_policy_does_and_ends_at_an_interrupt(folder):
    from embodied_midtrain.policy import load_policy
    with emt_serve(folder, "--port", 0, "--execute", 2) as (process, address):
        assert address.startswith("ws://127.0.0.1:")
        served = play(address, 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0, process.stderr.read()
    assert np.allclose(served, load_policy(folder, device="cpu").act([PICTURE], ["wait"])[0, :2], atol=1e-6)


def test_emt_serve_speaks_the_actions_of_a_benchmark(folder):
    "LIBERO: -1 is open, 1 closed; four actions of a chunk, of which this policy's has three."
    from embodied_midtrain.policy import load_policy
    with emt_serve(folder, "--port", 0, "--benchmark", "libero_10", "--camera", "camera") as (_, address): served = play(address, 3)
    acted = load_policy(folder, device="cpu").act([PICTURE], ["wait"])[0]
    assert np.allclose(np.array(served)[:, :6], acted[:, :6], atol=1e-6) and (np.array(served)[:, 6] == 1 - 2 * acted[:, 6]).all()


def test_a_port_that_is_taken_is_an_error(folder):
    with serving(policy_server(Echo())) as address, pytest.raises(OSError, match="in use"):
        serve_policy("anywhere", port=int(address.rsplit(":", 1)[1]), load=lambda folder: Echo())
