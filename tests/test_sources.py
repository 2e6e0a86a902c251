"Readers on real and on damaged files: same order each time, found again by id, bad records set aside, bad files named."
import base64, json, shutil, struct, tarfile, tracemalloc, zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from embodied_midtrain.samples import BadSample, Sample, turn
from embodied_midtrain.sources import chat, rlds as bridge
from embodied_midtrain.sources.base import Record, Source, _key_hash, _Seen, open_source, open_sources, sources_hash

DATA = Path(__file__).parent / "data"
BRIDGE = DATA / "bridge_rlds/bridge_dataset/1.0.0"
SPECS = {
    "llava": {"reader": "llava", "name": "llava-demo", "path": str(DATA / "llava_coco_qa/llava_demo.json"), "images": str(DATA)},
    "messages": {"reader": "messages", "name": "chat-demo", "path": str(DATA / "llamafactory_mllm/mllm_demo.json"), "images": str(DATA)},
    "bridge": {"reader": "bridge", "name": "bridge", "path": str(BRIDGE)},
    "bridge-strided": {"reader": "bridge", "name": "bridge", "path": str(BRIDGE), "stride": 4},
}


def plain(sample): return sample.id, sample.messages, [(i.path, i.data) for i in sample.images]


def own_key(source, id): return id.removeprefix(f"{source.name}/").split("/")[0]


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
def test_records_seek_and_shards_add_up(reader):
    source = open_source(SPECS[reader])
    keys = [r.key for r in source.records()]
    for start in (0, 1, 3, len(keys) - 1, len(keys), len(keys) + 5):
        assert [r.key for r in source.records(start)] == [r.key for r in open_source(SPECS[reader]).records(start)] == keys[start:]
    samples, read = [plain(s) for s in source], source.read
    for n in (1, 2, 3, 50):
        parts, sources = [], [open_source(SPECS[reader]) for _ in range(n)]
        for i, part in enumerate(sources): parts.append([plain(s) for s in part.samples(shard=(i, n))])
        assert sorted(sum(parts, []), key=str) == sorted(samples, key=str) and sum(part.read for part in sources) == read
        for part in parts: assert part == [s for s in samples if s in part], "each part keeps the order"
        assert len({own_key(source, s[0]) for s in samples}) == sum(len({own_key(source, s[0]) for s in part}) for part in parts), "a record is in one part"
        assert [plain(s) for s in source.samples(1, (n - 1, n))] == parts[-1][1:]
    for wrong in ((1, 1), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="shard"): list(source.samples(shard=wrong))


class Named(Source):
    "Records of any keys; those called bad cannot be parsed."
    def __init__(self, keys): self.keys = keys; super().__init__("named")
    def records(self, start=0): return (Record(key, "imagined", n) for n, key in enumerate(self.keys[start:], start))
    def parse(self, record):
        if record.key.startswith("bad"): raise BadSample("bad: it says so")
        return [Sample(f"named/{record.key}", "named", "vlm", (), (turn("user", "Which?"), turn("assistant", str(record.value))))]


def test_the_first_of_two_records_of_one_key_is_kept():
    keys = [f"k{i}" for i in range(500)] + ["k7", "k7", "k490"]
    source = Named(keys)
    assert [s.id for s in source] == [f"named/k{i}" for i in range(500)]
    assert source.set_aside.rows == [("imagined", k, f"duplicate id: named/{k}") for k in ("k7", "k7", "k490")] and source.read == 503
    parts = [Named(keys) for _ in range(4)]
    assert sorted(s.answer for i, part in enumerate(parts) for s in part.samples(shard=(i, 4))) == sorted(map(str, range(500)))
    assert sum((part.set_aside.rows for part in parts), []).__len__() == 3, "two of one key meet in one part"
    assert source.fetch(["named/k7"])[0].answer == "7"
    with pytest.raises(ValueError, match="duplicate id"): list(Named([f"k{i % 50}" for i in range(100)]))
    with pytest.raises(ValueError, match="key with '/'"): list(Named(["a/b"]))


def test_remembering_keys_takes_little_memory():
    tracemalloc.start()
    try:
        seen = _Seen()
        new = [seen.add(_key_hash(f"{i:012}.jpg")) for i in range(60_000)]
        again = [seen.add(_key_hash(f"{i:012}.jpg")) for i in range(0, 60_000, 7)]
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert all(new) and not any(again) and len(seen.table) * 8 <= 40 * 60_000 and peak < 4e6


def test_a_part_is_not_judged_alone():
    "One of 98 is bad; in the part that has it, it may be all there is."
    source, bad = Named([f"k{i}" for i in range(97)] + ["bad"]), 0
    for i in range(60): list(source.samples(shard=(i, 60))); bad += len(source.set_aside)
    assert bad == 1
    with pytest.raises(ValueError, match="there are no records"): list(Named([]))


@pytest.mark.parametrize("reader", ["bridge", "bridge-strided"])
def test_actions_are_those_of_the_episodes(reader):
    source = open_source(SPECS[reader])
    for actions, episode in zip(source.actions(), list(open_source(SPECS[reader]).episodes()), strict=True): np.testing.assert_array_equal(actions, episode.actions)


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


@pytest.mark.parametrize("lines", [False, True])
def test_a_record_is_read_by_its_number(lines, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "CHUNK", 64)
    path = write(tmp_path / "x.json", RECORDS, lines, ascii=False)
    if lines: path.write_bytes(b"\n \n" + path.read_bytes().replace(b"\n", b"\r\n\n"))
    value = (lambda v: json.loads(v)) if lines else (lambda v: v)
    for order in (range(40), range(39, -1, -1), [17, 3, 17, 39]):
        file = chat.JsonFile(path)
        assert [value(file[i]) for i in order] == [RECORDS[i] for i in order]
        for start in (38, 0, 5, 40): assert list(map(value, file.walk(start))) == RECORDS[start:]
    for number in (40, 10**9):
        with pytest.raises(KeyError): file[number]
    half, other = chat.JsonFile(path), chat.JsonFile(path).walk()
    assert value(half[5]) == RECORDS[5] and len(half.starts) == 6, "no further than needed"
    first, second = half.walk(), half.walk(3)
    assert [value(next(w)) for w in (first, second, first, second)] == [RECORDS[i] for i in (0, 3, 1, 4)] and [*map(value, second)] == RECORDS[5:] and [*map(value, first)] == RECORDS[2:]


def test_a_fetch_parses_only_what_it_is_asked_for(tmp_path, monkeypatch):
    source = chat.LlavaSource("pool", write(tmp_path / "pool.json", RECORDS), images=str(DATA))
    list(source)
    monkeypatch.setattr(chat.JsonFile, "walk", lambda *_: pytest.fail("walked"))
    assert [s.id for s in source.fetch(["pool/31", "pool/2"])] == ["pool/31", "pool/2"]
    for key in ("40", "-1", "01", "x", "a-1", "٣", ""):
        with pytest.raises(KeyError): source.find(key)


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
    "url": ({"image": "http://x.org/a.jpg"}, "image is on the web and not here"),
    "data address": ({"image": "data:image/png;base64,!"}, "image is not base64"),
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


# ---- published sets of chats, built in their layouts

def chat_record(question="<image>\nWhat?", answer="A sink.", **more): return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def packed(path, names, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name in names: tar.add(DATA / "robopoint/sink.jpg", name)
    return path


def test_llava665k_finds_its_five_sets(tmp_path):
    names = ["coco/train2017/1.jpg", "gqa/images/2.jpg", "ocr_vqa/images/3.jpg", "textvqa/train_images/4.jpg", "vg/VG_100K/5.jpg", "vg/VG_100K_2/6.jpg"]
    records = [chat_record(id=str(i), image=name) for i, name in enumerate(names)] + [chat_record("Hello?", id="text"), {"id": "cut", "conversations": [{"from": "gpt", "value": "so"}, *chat_record("Go on.")["conversations"]]}]
    path = write(tmp_path / "llava_v1_5_mix665k.json", records)
    for name in names[:4]:
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(DATA / "robopoint/sink.jpg", tmp_path / name)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as one: one.write(DATA / "robopoint/sink.jpg", "VG_100K/5.jpg")
    with zipfile.ZipFile(tmp_path / "images2.zip", "w") as two: two.write(DATA / "robopoint/sink.jpg", "VG_100K_2/6.jpg")
    places = {name: str(tmp_path / name) for name in ("coco", "gqa", "ocr_vqa", "textvqa")} | {"vg": [str(tmp_path / "images.zip"), str(tmp_path / "images2.zip")]}
    samples = list(open_source({"reader": "llava665k", "name": "mix", "path": str(path), "images": places}))
    assert [s.meta["part"] for s in samples] == ["coco", "gqa", "ocr_vqa", "textvqa", "vg", "vg", "text", "text"] and samples[-1].messages[0]["content"] == "Go on."
    assert {i.open().size for s in samples for i in s.images} == {PIL.Image.open(DATA / "robopoint/sink.jpg").size}
    whole = open_source({"reader": "llava665k", "path": str(path), "name": "mix"})  # the JSON file's own folder
    with pytest.raises(ValueError, match="2 of 8 records .*vg/VG_100K/5.jpg"): list(whole)
    with pytest.raises(ValueError, match="none of the image folders coco"): open_source({"reader": "llava665k", "path": str(path), "images": str(DATA)})
    with pytest.raises(FileNotFoundError, match="gone does not exist"): open_source({"reader": "llava665k", "path": str(path), "images": {"coco": str(tmp_path / "gone")}})


def test_refspatial_reads_all_its_files(tmp_path):
    for folder in ("2D/image", "3D/image_multi_view", "3D/image", "Simulator"): (tmp_path / folder).mkdir(parents=True)
    packed(tmp_path / "whole", ["RefSpatial/2D/image/1.jpg"], "w:gz")
    content = (tmp_path / "whole").read_bytes()
    for n, s in enumerate("abc"): (tmp_path / f"2D/image/image.tar.gz.part_{s}").write_bytes(content[n * 15_000:(n + 1) * 15_000 if n < 2 else None])
    packed(tmp_path / "3D/image_multi_view/image_multi_view.tar", ["3D/image_multi_view/2.jpg", "3D/image_multi_view/3.jpg"])
    shutil.copy(DATA / "robopoint/stair.jpg", tmp_path / "3D/image/4.jpg")
    packed(tmp_path / "Simulator/image.tar.gz", ["image/5.jpg"], "w:gz")
    write(tmp_path / "2D/choice_qa.json", [chat_record(image="1.jpg", depth="1.png", id=7), chat_record("No mark?", image=["1.jpg"], depth=["1.png"])])
    write(tmp_path / "3D/multi_view_qa.json", [chat_record("<image>\n<image>\nBoth?", image=["2.jpg", "3.jpg"]), chat_record("No marks?", image=["2.jpg", "3.jpg"])])
    write(tmp_path / "3D/vacant_qa.json", [{**chat_record(image=["4.jpg"]), "conversations": chat_record()["conversations"] + chat_record("And?", "[(0.1, 0.2)]")["conversations"]}])
    write(tmp_path / "Simulator/metadata.json", [chat_record(image=["5.jpg"])])
    source = open_source({"reader": "refspatial", "name": "ref", "path": str(tmp_path)})
    samples = list(source)
    keys = ["2D-choice_qa-0", "2D-choice_qa-1", "3D-multi_view_qa-0", "3D-multi_view_qa-1", "3D-vacant_qa-0", "Simulator-metadata-0"]
    assert [s.id for s in samples] == [f"ref/{k}" for k in keys] and [len(s.images) for s in samples] == [1, 1, 2, 2, 1, 1]
    assert [s.messages[0]["content"] for s in samples[1:4:2]] == ["<image>\nNo mark?", "<image>\n<image>\nNo marks?"] and len(samples[4].messages) == 4
    assert [s.meta.get("depth") for s in samples[:3]] == ["1.png", ["1.png"], []] and [s.meta["part"] for s in samples] == ["2D", "2D", "3D", "3D", "3D", "Simulator"]
    for s in samples:
        for image in s.images: assert image.open().width
    assert [r.key for r in source.records(3)] == keys[3:] and [s.id for s in source.fetch(["ref/Simulator-metadata-0", "ref/2D-choice_qa-1"])] == ["ref/Simulator-metadata-0", "ref/2D-choice_qa-1"]
    assert [s.meta["part"] for s in open_source({"reader": "refspatial", "path": str(tmp_path), "parts": ["Simulator"]})] == ["Simulator"]
    with pytest.raises(ValueError, match=r"has no 2D/\*.json"): open_source({"reader": "refspatial", "path": str(DATA)})
    write(tmp_path / "3D/visual_choice_qa.json", [chat_record(image="1.jpg")])
    with pytest.raises(ValueError, match="visual_choice_qa.json: its images should lie in"): open_source({"reader": "refspatial", "path": str(tmp_path)})


def test_robopoint_has_points_boxes_and_texts(tmp_path):
    (tmp_path / "images").mkdir()
    packed(tmp_path / "images/region_ref.tar", ["region_ref/1.png"])
    packed(tmp_path / "object_ref.tar.gz", ["images/object_ref/2.png"], "w:gz")
    answers = ["[(0.461, 0.527), (0.498, 0.521)]", "[(0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.1, 0.1)]", "A cat (1, 2).", "[maybe]", "[(0.1, 0.2), (0.1, 0.2, 0.3)]"]
    records = [chat_record(answer=a, image="region_ref/1.png" if i else "object_ref/2.png", id=str(i)) for i, a in enumerate(answers)]
    samples = list(open_source({"reader": "robopoint", "name": "r", "path": str(write(tmp_path / "robopoint_1432k.json", records))}))
    assert [s.meta["answer"] for s in samples] == ["points", "boxes", "text", "text", "text"]
    assert chat.places(samples[0].answer).tolist() == [[0.461, 0.527], [0.498, 0.521]] and chat.places(samples[1].answer).shape == (2, 4)
    assert all(i.open().width for s in samples for i in s.images)


def test_contents_in_parts(tmp_path):
    "OpenAI's way, LLaMA-Factory's, and marks whose names stand in the record's list."
    inline = "data:image/jpeg;base64," + base64.b64encode((DATA / "robopoint/sink.jpg").read_bytes()).decode()
    sink, text = "robopoint/sink.jpg", lambda t: {"type": "text", "text": t}
    chats = [
        [[{"type": "image_url", "image_url": {"url": sink}}, text("Where?")], "<image>\nWhere?", None],
        [[{"type": "image_url", "image_url": {"url": inline}}, text("Where?")], "<image>\nWhere?", None],
        [[{"type": "text", "value": "Who?"}, {"type": "image_url", "value": sink}], "Who?\n<image>", None],
        [[{"type": "image"}, {"type": "image"}, "Both?"], "<image>\n<image>\nBoth?", [sink, "robopoint/stair.jpg"]],
        [[{"type": "image", "image": sink}, text("Named twice?")], "<image>\nNamed twice?", [sink]],
        ["<image>As ever?", "<image>As ever?", sink],
    ]
    records = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": c}, {"role": "assistant", "content": [text("So.")]}], **({"images": i} if i else {})} for c, _, i in chats]
    samples = list(chat.MessagesSource("m", write(tmp_path / "m.jsonl", records, lines=True), images=str(DATA)))
    assert [s.messages[1]["content"] for s in samples] == [t for _, t, _ in chats] and all(s.answer == "So." for s in samples)
    assert [len(s.images) for s in samples] == [1, 1, 1, 2, 1, 1] and samples[1].images[0].open() == samples[0].images[0].open()
    bad = [[{"type": "audio", "audio": "x"}], [{"type": "image", "image": "https://x.org/a.jpg"}], [{"type": "text"}], [7], []]
    for content in bad:
        with pytest.raises(ValueError, match="1 of 1"): list(chat.MessagesSource("m", write(tmp_path / "bad.json", [{"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}]), images=str(DATA)))


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
