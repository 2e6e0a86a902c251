"Readers on real and on damaged files: same order each time, found again by id, bad records set aside, bad files named."
import json, shutil, struct, tracemalloc
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from embodied_midtrain.samples import BadSample
from embodied_midtrain.sources import chat, rlds as bridge
from embodied_midtrain.sources.base import open_source, open_sources, sources_hash

DATA = Path(__file__).parent / "data"
BRIDGE = DATA / "bridge_rlds/bridge_dataset/1.0.0"
SPECS = {
    "llava": {"reader": "llava", "name": "llava-demo", "path": str(DATA / "llava_coco_qa/llava_demo.json"), "images": str(DATA)},
    "messages": {"reader": "messages", "name": "chat-demo", "path": str(DATA / "llamafactory_mllm/mllm_demo.json"), "images": str(DATA)},
    "bridge": {"reader": "bridge", "name": "bridge", "path": str(BRIDGE)},
    "bridge-strided": {"reader": "bridge", "name": "bridge", "path": str(BRIDGE), "stride": 4},
}


def plain(sample): return sample.id, sample.messages, [(i.path, i.data) for i in sample.images]


@pytest.mark.parametrize("reader", SPECS)
def test_order_resume_and_fetch(reader):
    source = open_source(SPECS[reader])
    samples = [plain(s) for s in source]
    ids = [s[0] for s in samples]
    assert len(set(ids)) == len(ids) and all(i.startswith(source.name + "/") for i in ids)
    for start in (0, 1, len(ids) - 1, len(ids), len(ids) + 5): assert [plain(s) for s in open_source(SPECS[reader]).samples(start)] == samples[start:]
    some = ids[::-3]
    assert [plain(s) for s in source.fetch(some)] == [samples[ids.index(i)] for i in some] and source.fetch([]) == []
    for unknown in ("other/1", f"{source.name}/99999", f"{source.name}/0/99", "x"):
        with pytest.raises(KeyError, match="no sample"): source.fetch([ids[0], unknown])


@pytest.mark.parametrize("reader", SPECS)
def test_no_image_is_opened_while_reading(reader, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", lambda *_, **__: pytest.fail("opened an image"))
        samples = list(open_source(SPECS[reader]))
    for sample in samples[:3] + samples[-3:]:
        for image in sample.images: assert image.open().mode == "RGB"


def test_wrong_specs_are_told_before_reading():
    for change, message in [({"reader": "lava"}, "did you mean 'llava'"), ({"image": "x"}, "did you mean 'images'"), ({"name": "a/b"}, "without '/'")]:
        with pytest.raises(ValueError, match=message): open_source({**SPECS["llava"], **change})
    for change in ({"path": "gone.json"}, {"images": "gone"}):
        with pytest.raises(FileNotFoundError, match="gone.*does not exist"): open_source({**SPECS["llava"], **change})
    with pytest.raises(ValueError, match="needs path"): open_source({"reader": "bridge"})
    with pytest.raises(ValueError, match="more than one source is named bridge"): open_sources([SPECS["bridge"], SPECS["bridge-strided"]])
    for change, message in [({"split": "test"}, "known: train"), ({"camera": "image0"}, "did you mean 'image_0'"), ({"path": str(DATA)}, "holds no"), ({"stride": 0}, "at least 1")]:
        with pytest.raises(ValueError, match=message): open_source({**SPECS["bridge"], **change})


def test_hash_follows_content_not_place(tmp_path):
    spec = lambda folder: {"reader": "bridge", "name": "bridge", "path": str(folder)}
    shutil.copytree(BRIDGE, tmp_path / "1.0.0")
    a, b = open_source(spec(BRIDGE)), open_source(spec(tmp_path / "1.0.0"))
    assert a.fingerprint() == b.fingerprint() and sources_hash([SPECS["bridge"]]) != sources_hash([SPECS["bridge-strided"]])
    flip(b.files[0], 500_000)
    assert a.fingerprint() != b.fingerprint()


# ---- image chats

def flip(file, at):
    "Damage one bit."
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def write(path, records, lines=False, ascii=True):
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1, ensure_ascii=ascii), encoding="utf-8")
    return path


RECORDS = [{"id": f"é{i}", "conversations": [{"from": "human", "value": f"Wörter \"{i}\" [,]{{}}\\"}, {"from": "gpt", "value": "答" * (i % 7 + 1)}]} for i in range(40)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 17, 256, 2**20])
def test_a_list_reads_the_same_through_any_window(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "CHUNK", chunk)
    path = write(tmp_path / "list.json", RECORDS, ascii=False)
    assert list(chat.json_list(path)) == RECORDS
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    assert list(chat.json_list(path)) == RECORDS
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"list\.json: .*cut short.* at byte [\d,]+"): list(chat.json_list(path))


def test_damage_is_located_to_the_byte(tmp_path, monkeypatch):
    path = write(tmp_path / "list.json", RECORDS, ascii=False)
    content = path.read_bytes()
    at = content.index(b'"gpt"', 2000)
    for chunk in (16, 2**20):
        monkeypatch.setattr(chat, "CHUNK", chunk)
        path.write_bytes(content[:at] + b"?" + content[at + 1:])
        with pytest.raises(ValueError, match=f"at byte {at:,}$"): list(chat.json_list(path))
        path.write_bytes(content[:at] + b"\xff" + content[at + 1:])
        with pytest.raises(ValueError, match=f"not UTF-8 at byte {at:,}$"): list(chat.json_list(path))


def test_any_cut_is_noticed(tmp_path):
    content = write(tmp_path / "list.json", RECORDS[:2], ascii=False).read_bytes()
    for end in range(len(content) - 1):
        (tmp_path / "cut.json").write_bytes(content[:end])
        with pytest.raises(ValueError): list(chat.json_list(tmp_path / "cut.json"))


def test_a_large_list_needs_little_memory(tmp_path):
    path = write(tmp_path / "large.json", [{"conversations": ["x" * 1000] * 10}] * 1500)
    tracemalloc.start()
    try:
        assert sum(1 for _ in chat.json_list(path)) == 1500
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert path.stat().st_size > 15e6 and peak < 6e6


BAD = {
    "missing image": ({"image": "gone.jpg"}, "image file does not exist"),
    "parent": ({"image": "../secret.jpg"}, "image path leaves its folder"),
    "absolute": ({"image": str(DATA.resolve() / "robopoint/sink.jpg")}, "image path leaves its folder"),
    "url": ({"image": "http://x.org/a.jpg"}, "image file does not exist"),
    "long": ({"image": "a" * 5000}, "image file does not exist"),
    "nul": ({"image": "a\0b"}, "image file does not exist"),
    "folder": ({"image": "robopoint"}, "image file does not exist"),
    "too few marks": ({"image": ["robopoint/sink.jpg"] * 2}, "<image> marks and images differ in number"),
    "missing key": ({"conversations": None}, "no list 'conversations' in it"),
    "turns": ({"conversations": ["hello"]}, "a turn without 'from' or 'value'"),
    "speaker": ({"conversations": [{"from": ["human"], "value": "hi"}]}, "unknown speaker"),
    "empty": ({"conversations": [{"from": "human", "value": "<image> a"}, {"from": "gpt", "value": " "}]}, "empty turn"),
    "number": ({"conversations": [{"from": "human", "value": 7}]}, "a turn that is not text"),
    "surrogate": ({"conversations": [{"from": "human", "value": "<image>\ud800"}, {"from": "gpt", "value": "b"}]}, "text is not valid Unicode"),
}
GOOD = {"image": "robopoint/sink.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A sink."}]}


@pytest.mark.parametrize("lines", [False, True])
def test_bad_records_are_set_aside_one_by_one(lines, tmp_path):
    records = [GOOD] * 100 + [{**GOOD, **change} for change, _ in BAD.values()] + [17, None, "text"] + [GOOD] * 300
    source = chat.LlavaSource("pool", write(tmp_path / "pool.json", records, lines), images=[str(tmp_path), str(DATA)])
    assert len(list(source)) == 400 and source.read == len(records)
    assert set(source.set_aside.reasons()) == {reason for _, reason in BAD.values()} | {"not a JSON object"}
    assert {file for file, *_ in source.set_aside.rows} == {"pool.json"} and source.set_aside.rows[0][1] == "100"


def test_broken_lines_are_bad_records(tmp_path):
    lines = [json.dumps(GOOD)] * 99
    (tmp_path / "pool.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"image": "rob\n\n')
    source = chat.LlavaSource("pool", tmp_path / "pool.jsonl", images=str(DATA))
    assert len(list(source)) == 99 and source.set_aside.reasons() == {"not JSON": 1}
    (tmp_path / "pool.jsonl").write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode())
    assert len(list(source)) == 99


def test_too_many_bad_records_stop_the_pass(tmp_path):
    source = chat.LlavaSource("pool", write(tmp_path / "pool.json", [GOOD] * 9 + [{**GOOD, "image": "gone.jpg"}]), images=str(DATA))
    with pytest.raises(ValueError, match=r"pool: 1 of 10 records \(10%\).*image file does not exist: gone.jpg"): list(source)
    empty = chat.LlavaSource("pool", write(tmp_path / "empty.json", []), images=str(DATA))
    with pytest.raises(ValueError, match="no records"): list(empty)


def test_a_wrong_image_folder_shows_early(tmp_path):
    path = write(tmp_path / "pool.jsonl", [GOOD] * 30_000, lines=True)
    source = chat.LlavaSource("pool", path, images=str(tmp_path))
    with pytest.raises(ValueError, match="100%"): list(source)
    assert source.read == 10_000


def test_chats_with_several_images():
    source = open_source(SPECS["messages"])
    samples = list(source)
    assert max(len(s.images) for s in samples) == 2
    for s in samples: assert len(s.asked().images) == s.asked().question[-1]["content"].count("<image>") <= len(s.images)


# ---- Bridge

def message(number, kind, body):
    "One field of a protocol buffer, written independently of the reader."
    tag = bytes([number << 3 | kind])
    return tag + varint(len(body)) + body if kind == 2 else tag + body


def varint(n):
    n, out = n % 2**64, b""
    while n > 0x7F: out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


def tf_example(features, packed=True):
    entries = b""
    for name, values in features.items():
        if isinstance(values[0], bytes): kind, body = 1, b"".join(message(1, 2, v) for v in values)
        elif isinstance(values[0], float): kind, body = 2, message(1, 2, struct.pack(f"<{len(values)}f", *values)) if packed else b"".join(message(1, 5, struct.pack("<f", v)) for v in values)
        else: kind, body = 3, message(1, 2, b"".join(map(varint, values))) if packed else b"".join(message(1, 0, varint(v)) for v in values)
        entries += message(1, 2, message(1, 2, name.encode()) + message(2, 2, message(kind, 2, body)))
    return message(1, 2, entries)


@pytest.mark.parametrize("packed", [True, False])
def test_examples_are_read_packed_or_not(packed):
    features = {"a/b": [b"", b"\x00\xff" * 300], "f": [0.5, -1.25, 3e30], "i": [0, 1, -1, 2**40, -2**63], "ü": [7]}
    read = bridge.parse_example(tf_example(features, packed))
    assert {k: list(v) for k, v in read.items()} == features


def test_damaged_examples_give_a_reason():
    good, rng = tf_example({"a": [b"xyz"] * 3, "f": [0.5] * 9, "i": [300, -5]}), np.random.default_rng(0)
    for _ in range(2000):
        bad = bytearray(good[:rng.integers(1, len(good) + 1)])
        bad[rng.integers(len(bad))] = rng.integers(256)
        try: bridge.parse_example(bytes(bad))
        except BadSample: pass


def tfrecord(path, *records):
    frame = lambda d: (n := struct.pack("<Q", len(d))) + struct.pack("<I", bridge.masked_crc(n)) + d + struct.pack("<I", bridge.masked_crc(d))
    path.write_bytes(b"".join(map(frame, records)))


def steps(T=5, text=b"lift the spoon", first=0.0, **change):
    action = np.tile([0.01, 0, 0, 0, 0, 0.02, 1], (T, 1))
    action[0, :6] = first
    example = {"steps/action": action.ravel().tolist(), "steps/language_instruction": [text] * T, "steps/observation/image_0": [b"jpeg %d" % t for t in range(T)]}
    return tf_example({k: v for k, v in {**example, **change}.items() if v})


@pytest.fixture
def made(tmp_path):
    "Write episodes as a small Bridge; returns its source."
    folder = tmp_path / "1.0.0"
    folder.mkdir()
    shutil.copy(BRIDGE / "features.json", folder)
    def make(*records, shards=1):
        for n in range(shards): tfrecord(folder / f"b-train.tfrecord-{n:05}-of-{shards:05}", *records[n::shards])
        return open_source({"reader": "bridge", "name": "b", "path": str(folder)})
    return make


def test_real_episodes():
    episodes = list(open_source(SPECS["bridge"]).episodes())
    assert [len(e) for e in episodes] == [9] * 8 and len({e.instruction for e in episodes}) == 4
    for e in episodes:
        assert e.actions.shape == (9, 7) and e.actions.dtype == np.float32 and set(e.actions[:, 6]) <= {0, 1}
        assert (np.abs(e.actions[:, :6]).max(1) > 1e-5).all()
        assert e.images[0].open().size == (64, 64)


def test_first_step_goes_with_its_image(made):
    source = made(steps(), steps(first=0.03))
    standing, moving = source.episodes()
    assert [i.data for i in standing.images] == [b"jpeg 1", b"jpeg 2", b"jpeg 3", b"jpeg 4"] and len(moving) == 5
    assert [s.id for s in source][:5] == ["b/0/0", "b/0/1", "b/0/2", "b/0/3", "b/1/0"]


BROKEN = {
    "checksum": None,
    "no image": steps(**{"steps/observation/image_0": None}),
    "image short": steps(**{"steps/observation/image_0": [b"x"] * 3}),
    "action short": steps(**{"steps/action": [0.0] * 8}),
    "not finite": steps(**{"steps/action": [float("nan")] * 35}),
    "gripper": steps(**{"steps/action": [-1.0] * 35}),
    "text": steps(text=b"\xff\xfe"),
    "garbage": b"\x0a\xff\xff\xff garbage",
    "one step": steps(T=1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_episodes_are_set_aside(what, made):
    source = made(*[steps()] * 10, BROKEN[what] or steps(), *[steps()] * 29)
    if what == "checksum": flip(source.files[0], 10 * (len(steps()) + 16) + 40)
    assert len(list(source.episodes())) == 39
    assert [(file, record) for file, record, _ in source.set_aside.rows] == [("b-train.tfrecord-00000-of-00001", "10")]
    assert len(list(source)) == 39 * 4 and "b/11/0" in {s.id for s in source}


def test_episodes_without_instruction_are_counted_not_failed(made):
    source = made(*[steps(), steps(text=b" ")] * 10)
    assert len(list(source.episodes())) == 10 and source.set_aside.unlabelled == {"no instruction": 10}


def test_shards_are_one_row(made):
    source = made(*[steps(text=b"task %d" % i) for i in range(6)], shards=3)
    assert [e.instruction for e in source.episodes()] == ["task 0", "task 3", "task 1", "task 4", "task 2", "task 5"]
    assert source.fetch(["b/3/1"])[0].messages[0]["content"] == "<image>\ntask 4"


def test_lost_frames_name_file_and_byte(made):
    source = made(*[steps()] * 4)
    length, content = len(steps()) + 16, source.files[0].read_bytes()
    for damaged in (content[:2 * length + 5], content[:3 * length - 1], content[:2 * length] + b"?" + content[2 * length + 1:]):
        source.files[0].write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"b-train.*at byte {2 * length:,}"): list(source)
        assert len(list(islice(source.episodes(), 2))) == 2
