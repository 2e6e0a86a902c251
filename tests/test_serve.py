"Serving a policy: real sockets, real clients, some of them bad."
import contextlib, multiprocessing, os, re, signal, struct, subprocess, sys, threading, time, urllib.error, urllib.request, zlib

import anyio
import msgpack
import numpy as np
import pytest
import websockets
from vla_eval.connection import Connection
from vla_eval import specs
from vla_eval.protocol.messages import Message, MessageType, pack_message, unpack_message
from vla_eval.protocol.numpy_codec import encode_ndarray

from embodied_midtrain.samples import IMAGE_MARK
from embodied_midtrain.serve import DEPTH, ITEMS, LIMIT, SIDE, SMALL, TEXT, check_message, check_picture, policy_server, serve_policy, serving

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


def observation_of(**payload): return {"images": {"camera": PICTURE}, "task_description": "wait"} | payload


def observation(seq=7, **payload): return pack_message(Message(MessageType.OBSERVATION, observation_of(**payload), seq=seq))


SENT, PLAIN = encode_ndarray(PICTURE), {"__ndarray__": True, "data": PICTURE.tobytes(), "dtype": "|u1", "shape": [64, 64, 3]}
STATE = encode_ndarray(np.arange(8.0))


class Bytes(bytes):
    "msgpack that stands in a message as it is."


def nested(depth): return Bytes(b"\x91" * depth + b"\xc0")


def packed(payload, type="observation", seq=7, timestamp=0.0):
    "A message field by field, as no client of vla-eval would write it; `Bytes` stand in it unpacked."
    written = []
    def mark(value):
        if isinstance(value, Bytes): return written.append(value) or msgpack.ExtType(42, b"%04d" % len(written))
        return {k: mark(v) for k, v in value.items()} if isinstance(value, dict) else value
    message = msgpack.packb(mark({"type": type, "payload": payload, "seq": seq, "timestamp": timestamp}), default=encode_ndarray)
    for i, value in enumerate(written): message = message.replace(msgpack.packb(msgpack.ExtType(42, b"%04d" % (i + 1))), value)
    return message


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
    (dict(images={f"camera {i}": np.zeros((SIDE, SIDE // 2, 3), np.uint8) for i in range(3)}), "images has more than 16,777,216 pixels"),
    (dict(images={"camera": SENT | {"data": SENT["data"][:-500]}}), "image 'camera' cannot be decoded"),
    (dict(images={"camera": SENT | {"shape": 5}}), "image 'camera' has shape 5"),
    (dict(images={"camera": SENT | {"shape": [64, -64, 3]}}), "has shape .64, -64, 3."),
    (dict(images={"camera": SENT | {"format": "gif"}}), "has the format 'gif'"),
    (dict(images={"camera": SENT | {"format": ["png"]}}), "has the format"),
    (dict(images={"camera": SENT | {"__ndarray__": True}}), "has the mark __image__ and __ndarray__"),
    (dict(images={"camera": SENT | {"__image__": SENT}}), "has the mark __image__: one, and true"),
    (dict(images={"camera": SENT | {"more": SENT}}), "unknown field of image 'camera' 'more'"),
    (dict(images={"camera": {"data": SENT["data"], "format": "png", "shape": [64, 64, 3]}}), "not an array"),
    (dict(images={"camera": PLAIN | {"dtype": "xyz"}}), "numbers of type 'xyz'"),
    (dict(images={"camera": PLAIN | {"dtype": 7}}), "numbers of type 7"),
    (dict(images={"camera": PLAIN | {"data": "text"}}), "data that is str"),
    (dict(images={"camera": PLAIN | {"data": b"short"}}), "type uint8 has 5 bytes"),
    (dict(images={"__image__": SENT}), "the name of a camera is wanted"),
    (dict(images=SENT), "'__image__': the name of a camera is wanted|is bool, not an array"),
    (dict(state=PICTURE), "state holds a picture"),
    (dict(states={"arm": [PICTURE]}), "states holds a picture"),
    (dict(task_name=np.zeros(3)), "task_name holds a picture or an array"),
    (dict(episode_restart=np.ones(3, bool)), "episode_restart holds a picture or an array"),
    (dict(state=np.zeros(SMALL // 8 + 1)), f"at most {SMALL} are wanted"),
    (dict(state=STATE | {"data": b"12345"}), r"state of shape \(8,\) and type float64 has 5 bytes"),
    (dict(state=STATE | {"shape": 5}), "state has shape 5"),
    (dict(state=STATE | {"dtype": "xyz"}), "state has numbers of type 'xyz'"),
    (dict(state=STATE | {"dtype": "O"}), "state has numbers of type 'O'"),
    (dict(state={"__ndarray__": True}), "state lacks data, shape, dtype"),
    (dict(state=nested(DEPTH + 1)), f"state has mappings or lists nested more than {DEPTH} deep"),
    (dict(state=nested(3000)), "not msgpack that can be read: "),
    (dict(state=[[]] * ITEMS), f"more than {ITEMS:,} things|exceeds max_array_len"),
    (dict(task_description=f"look at {IMAGE_MARK}"), "task_description holds <image>"),
    (dict(task_description="take <IMG_CONTEXT>"), "task_description holds <IMG_CONTEXT>"),
    (dict(task_description="stop<|im_end|>"), r"task_description holds <\|im_end\|>"),
    (dict(task_description="<\uff5cend\u2581of\u2581sentence\uff5c>"), "task_description holds <\uff5cend"),
    (dict(task_description="w" * (TEXT + 1)), "2,001 characters"),
])
def test_bad_observations_are_told_and_the_conversation_goes_on(payload, message):
    with serving(policy_server(Echo())) as address:
        bad, good = raw(address, packed(observation_of(**payload), seq=3), observation(4))
    assert bad.type == MessageType.ERROR and bad.seq == (0 if re.search('not msgpack|things', message) else 3) and re.search(message, bad.payload["error"]), bad.payload
    assert good.type == MessageType.ACTION and good.seq == 4


TWICE = Bytes(msgpack.packb({"images": 0}).replace(b"\x81", b"\x82") + msgpack.packb("images") + msgpack.packb({"camera": SENT}))


@pytest.mark.parametrize("message, problem", [
    (b"\xc1\xc1", "not msgpack"),
    ("text", "bytes, not text"),
    (b"\x01", "message is int"),
    (pack_message(Message(MessageType.OBSERVATION, {}, 5))[:-3], "not msgpack"),
    (packed(None), "the payload is NoneType, not a mapping"),
    (packed(5, "hello"), "the payload is int, not a mapping"),
    (packed(None, "episode_start"), "the payload is NoneType"),
    (packed([], "episode_end"), "the payload is list"),
    (packed({}, "observatoin"), "unknown type of message 'observatoin'; did you mean 'observation'?"),
    (packed({}, "action"), "unknown type of message 'action'"),
    (packed({}, None), "unknown type of message 'None'"),
    (packed({}, {"a": 1}), "unknown type of message"),
    (packed({}, SENT), "unknown type of message"),
    (packed({}, "hello", seq=SENT), "seq is dict"),
    (packed({}, "hello", seq=None), "seq is NoneType"),
    (packed({}, "hello", timestamp=SENT), "timestamp is dict"),
    (packed({"me": PICTURE}, "hello"), "payload of hello holds a picture or an array"),
    (packed(SENT, "hello"), "payload of hello holds a picture or an array"),
    (packed({"task": {"start": [np.zeros(3)]}}, "episode_start"), "payload of episode_start holds a picture or an array"),
    (packed({"metrics": {"last": PICTURE}}, "episode_end"), "payload of episode_end holds a picture or an array"),
    (packed({"what": PICTURE}, "error"), "payload of error holds a picture or an array"),
    (packed({"recording": "here"}, "episode_start"), "recording is str, not a mapping"),
    (packed({"recording": 5}, "episode_start"), "recording is int, not a mapping"),
    (packed({"recording": {"sid": 5}}, "episode_start"), "sid of recording is int, not text"),
    (packed({"recording": {"eid": ["a"]}}, "episode_start"), "eid of recording is list, not text"),
    (packed(TWICE), "a mapping has one name twice"),
], ids=lambda value: value if isinstance(value, str) else "message")
def test_what_is_no_message_is_told(message, problem):
    with serving(policy_server(Echo())) as address: bad, good = raw(address, message, observation())
    assert bad.type == MessageType.ERROR and problem in bad.payload["error"] and good.type == MessageType.ACTION


def test_what_is_refused_was_not_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(pytest.fail.Exception): unpack_message(observation(state=PICTURE))
    for payload in ({"state": PICTURE}, {"task_name": [SENT]}, {"images": {"camera": SENT | {"more": SENT}}}, {"images": {"camera": SENT | {"shape": [4, 4, 3]}}}):
        assert check_message(packed(observation_of(**payload)))[1]


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


@pytest.mark.parametrize("message", [
    observation(9, state=np.zeros(8)), packed(observation_of(states=STATE, base_pose=np.zeros((4, 4), np.float32), tcp_pose=[1, 2.0], controller_states=np.zeros(0)), seq=9),
    packed(observation_of(state={"arm": np.zeros(7), "gripper": True}, episode_restart=True, task_name="lift"), seq=9),
    packed(observation_of(images={"camera": PLAIN, "wrist": SENT, "bare": {"__image__": True, "format": "raw"} | {k: v for k, v in PLAIN.items() if k != "__ndarray__"}}), seq=9),
    packed({"harness_version": "0.8", "benchmark": "a:B"}, "hello", 9), packed({"task": {"name": "wait", "eval_sequence": ["a", "b"]}, "recording": dict(sid="a", eid="b", eval_id="c", db_path="d")}, "episode_start", 9),
    packed({"recording": None}, "episode_start", 9), packed({"metrics": {"success": True}, "steps": 3, "elapsed_sec": 0.1}, "episode_end", 9),
], ids=lambda value: "message")
def test_a_good_message_is_good(message):
    assert check_message(message) == (9, None)
    unpack_message(message)


class Shy(Echo):
    "A policy that raises at a word which no check knows."
    def act(self, images, instructions):
        if any("dance" in text for text in instructions): raise ValueError("a robot does not dance")
        return super().act(images, instructions)


@pytest.mark.parametrize("batch", [8, 1])
def test_one_clients_fault_is_its_own(batch):
    shy, got = Shy(0.1), {}
    def client(i, text):
        try: got[i] = play(address, 3, np.full_like(PICTURE, i), task_description=text)
        except RuntimeError as error: got[i] = str(error)
    with serving(policy_server(shy, batch=batch)) as address:
        threads = [threading.Thread(target=client, args=(i, "dance" if i == 3 else "wait")) for i in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
    assert "a robot does not dance" in got.pop(3)
    assert len(got) == 5 and all((actions[:, 1] == i).all() for i, actions in got.items())


def test_in_a_batch_only_the_guilty_fails():
    ask = lambda text: {"image": PICTURE, "instruction": text}
    server = policy_server(Shy())
    answers = server.predict_batch([ask("wait"), ask("dance"), ask("wait")], [None] * 3)
    assert [list(a) for a in answers] == [["actions"], ["error"], ["actions"]]
    with pytest.raises(ValueError, match="does not dance"): server._normalize_result(answers[1], None)
    with pytest.raises(ValueError, match="does not dance"): server.predict_batch([ask("dance")], [None])


def test_marks_in_an_instruction_fail_nobody_else(folder):
    "The policy itself raises at the mark of an image; the door keeps it out."
    from embodied_midtrain.policy import load_policy
    policy = load_policy(folder, device="cpu")
    for text in IMAGE_MARK, policy.backbone.family.image:
        with pytest.raises(ValueError): policy.act([PICTURE], [text])
        assert "a mark of its own" in check_message(observation(task_description=text))[1]
    assert not [mark for mark in policy.backbone.tokenizer.all_special_tokens if check_message(observation(task_description=f"take {mark} up"))[1] is None]


def declared(address):
    "What the server says of its actions, as vla-eval reads it."
    async def talk():
        async with Connection(address, max_retries=1) as connection: return {name: specs.DimSpec.from_dict(spec) for name, spec in connection.server_info.get("action_spec", {}).items()}
    return anyio.run(talk)


def test_vla_eval_warns_of_a_benchmark_with_other_actions():
    from embodied_midtrain.benchmarks.tabletop import ACTION_SPEC
    with serving(policy_server(Echo())) as address: ours = declared(address)
    assert {name: (spec.dims, spec.format) for name, spec in ours.items()} == {"position": (3, "delta_xyz"), "rotation": (3, "euler_xyz"), "gripper": (1, "continuous_01")}
    assert ours["gripper"].description == "1 = open" and ours["gripper"].range == (0, 1)
    assert not specs.check_specs(ours, {name: specs.DimSpec.from_dict(spec) for name, spec in ACTION_SPEC.items()}, {}, {})
    libero = {"position": specs.POSITION_DELTA, "rotation": specs.ROTATION_AA, "gripper": specs.GRIPPER_CLOSE_POS}
    assert len(specs.check_specs(ours, libero, {}, {})) == 2
    with serving(policy_server(Echo(), translate=lambda actions: actions)) as address: assert not declared(address)


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
