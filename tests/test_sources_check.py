"What a folder is: every format that a reader knows is told by its contents, and what nobody knows is told as well."
import base64, io, json, re, subprocess, sys, tarfile, time, tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import yaml

import test_bad_input as bad_input
from embodied_midtrain.cli import main
from embodied_midtrain.samples import Sample, turn
from embodied_midtrain.sources.base import READERS, Record, Source, _reader, open_source
from embodied_midtrain.sources.check import SIGNS, check_text, examine, image_root, profile_lines, recognise, show_text, unknown_lines

DATA = Path(__file__).parent / "data"
OWN = {"tabletop", "tabletop_robot"}  # draw their records themselves: there is no folder to recognise
EPISODES = [(f"lift block {i}", np.column_stack([np.full((6, 6), .1 + i / 100), np.ones(6)])) for i in range(3)]


def pytest_generate_tests(metafunc):
    if "kit" in metafunc.fixturenames: metafunc.parametrize("kit", (kits := bad_input.all_kits()).values(), ids=kits)


def lines_of(text): return yaml.safe_load(text.split("mine.yaml):\n")[1])


# ---- every reader

def test_every_reader_has_a_sign():
    assert {sign.reader for sign in SIGNS} | OWN | {"sharegpt"} == READERS.keys(), "sharegpt is another name of llava"


def test_what_a_reader_reads_is_recognised(kit, tmp_path):
    "Each reader's own test data, without being told what they are."
    folder = tmp_path / "some data"
    folder.mkdir()
    robots = isinstance(kit, bad_input.Robots)
    spec = kit.write(folder, EPISODES if robots else [bad_input.Row(f"k{i}", bad_input.JPEG) for i in range(12)])
    finding = recognise(folder)
    assert finding, unknown_lines(folder)
    found, wanted = _reader(finding.spec["reader"]), _reader(spec["reader"])
    assert issubclass(found, wanted) or issubclass(wanted, found) or {found.__name__, wanted.__name__} <= {"WebDatasetSource", "CaptionSource", "Laion400mSource", "Cc12mSource", "ImageFolderSource", "HfSource"}, (finding.spec, spec)
    text, good = check_text(folder)
    assert good, text
    told = lines_of(text)["features"]["robots" if robots else "pool"][0]
    assert told == finding.spec and (robots or len(list(open_source(told))) == 12), text
    assert f"{3 if robots else 12}" in re.search(r"(episodes|records) +(\d+)", text)[2]
    if robots: assert len(list(open_source({k: v for k, v in next(iter(lines_of(text)["policy"]["demos"].values())).items()}).episodes())) == 3


@pytest.mark.parametrize("path, reader", [
    ("bridge_rlds", "bridge"), ("bridge_rlds/bridge_dataset/1.0.0", "bridge"), ("calvin_sim", "calvin"), ("lerobot_v21_sim_pick_place", "lerobot"), ("llava_coco_qa", "llava"), ("llamafactory_mllm/mllm_demo.json", "messages")])
def test_real_files(path, reader):
    finding = recognise(DATA / path)
    assert finding.spec["reader"] == reader
    text, good = check_text(DATA / path)
    if reader != "lerobot":
        source = open_source(finding.spec)
        assert good and len(list(source)) and not source.set_aside
    else: assert not good and "action=" in text and "The columns are" in text, "its actions are not named as usual, and what to write is told"


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value) if not isinstance(value, str) else value)
    return path


def picture(path, color="navy"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (40, 30), color).save(path)
    return path


def llava(image, answer="Blue."): return {"id": "x", "image": image, "conversations": [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": answer}]}


def packed(folder, suffixes, shard="00000", **columns):
    "A tar of three samples and, beside it, the table of img2dataset."
    folder.mkdir(parents=True, exist_ok=True)
    content = {"jpg": bad_input.JPEG, "txt": b"a wall", "json": json.dumps({"caption": "a wall", "url": "x.org"}).encode()}
    with tarfile.open(folder / f"{shard}.tar", "w") as tar:
        for key in range(3):
            for suffix in suffixes:
                (member := tarfile.TarInfo(f"{shard}{key:04}.{suffix}")).size = len(content[suffix])
                tar.addfile(member, io.BytesIO(content[suffix]))
    if columns: pd.DataFrame({"url": ["x.org"] * 3, "caption": "a wall", "key": [f"{shard}{i:04}" for i in range(3)], "status": "success", **columns}).to_parquet(folder / f"{shard}.parquet")


def table(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame({"image": [{"bytes": bad_input.JPEG, "path": None}] * 3, "question": "Which colour?", **columns}).to_parquet(path)


def vcr(folder):
    row = {"objects": ["person"], "img_fn": "a/x.jpg", "metadata_fn": "a/x.json", "question": ["Who", "?"], "answer_choices": [["Him"], ["Her"]], "answer_label": 0, "rationale_choices": [["It", "shows"], ["So"]], "rationale_label": 1}
    picture(folder / "vcr1images/a/x.jpg"), write(folder / "train.jsonl", "\n".join([json.dumps(row)] * 3))
    write(folder / "test.jsonl", json.dumps({k: v for k, v in row.items() if "label" not in k}))


def saved(folder):
    import datasets
    datasets.Dataset.from_dict({"question": ["Which?"] * 3, "answer": ["This."] * 3}).save_to_disk(folder)


EMBSPATIAL = {"question": "Where is the cup?", "relation": "left", "answer_options": ["left", "right", "above", "under"], "answer": 0, "objects": [], "image": base64.b64encode(bad_input.JPEG).decode()}
BUILT = {  # built in the layouts that are published: how, and the reader
    "vcr": (vcr, "vcr"), "embspatial": (lambda f: write(f / "embspatial_bench.json", [EMBSPATIAL] * 3), "embspatial"),
    "embspatial sft": (lambda f: write(f / "sft.json", [{**{k: v for k, v in EMBSPATIAL.items() if k != "answer_options"}, "question": ["Where?"] * 5, "answer": "Left."}] * 3), "embspatial"),
    "robo2vlm": (lambda f: table(f / "data/train-00000-of-00001.parquet", choices="['Red', 'Blue']", correct_answer=1), "robo2vlm"), "parquet": (lambda f: table(f / "data/train-00000-of-00001.parquet", answer="Blue"), "hf"),
    "saved": (saved, "hf"), "laion": (lambda f: packed(f, ["jpg", "txt", "json"], similarity=.3), "laion400m"), "cc12m": (lambda f: packed(f / "cc12m", ["jpg", "txt", "json"], error_message=""), "cc12m"),
    "coyo": (lambda f: packed(f, ["jpg", "txt", "json"], error_message=""), "webdataset"), "tar": (lambda f: packed(f, ["jpg", "json"]), "webdataset"),
    "captions": (lambda f: [picture(f / "images/x.jpg"), write(f / "captions.json", [{"image": "x.jpg", "caption": "a wall"}] * 3)], "cc12m"),
    "folder": (lambda f: [picture(f / f"{i}.png") and write(f / f"{i}.txt", "a wall") for i in range(3)], "imagefolder"),
    "listed": (lambda f: [*(picture(f / f"train/{i}.png") for i in range(3)), write(f / "metadata.csv", "file_name,text\n" + "".join(f"train/{i}.png,a wall\n" for i in range(3)))], "imagefolder"),
    "refspatial": (lambda f: [picture(f / "2D/image/x.jpg"), write(f / "2D/choice_qa.json", [llava("x.jpg")] * 3)], "refspatial"),
    "665k": (lambda f: [picture(f / "data/coco/train2017/x.jpg"), write(f / "llava_v1_5_mix665k.json", [llava("coco/train2017/x.jpg")] * 3)], "llava665k"),
    "robopoint": (lambda f: [picture(f / "images/x.jpg"), write(f / "robopoint_1432k.json", [llava("x.jpg", "[(0.4, 0.5)]")] * 3)], "robopoint")}


@pytest.mark.parametrize("what", BUILT)
def test_published_layouts(tmp_path, what):
    make, reader = BUILT[what]
    (folder := tmp_path / "set").mkdir()
    if what == "saved": pytest.importorskip("datasets")
    make(folder)
    finding = recognise(folder)
    assert finding and finding.spec["reader"] == reader, finding or unknown_lines(folder)
    text, good = check_text(folder)
    assert good and "records        3" in text and "give 3 good samples" in text, text
    assert len(list(open_source(lines_of(text)["features"]["pool"][0]))) == 3


# ---- where pictures lie

@pytest.mark.parametrize("json_at, picture_at, name, root", [
    ("a/list.json", "a/x.jpg", "x.jpg", "a"), ("a/list.json", "a/images/x.jpg", "x.jpg", "a/images"), ("a/list.json", "a/images/x.jpg", "images/x.jpg", "a"), ("a/annotations/list.json", "a/images/x.jpg", "x.jpg", "a/images"),
    ("a/annotations/list.json", "a/coco/train/x.jpg", "coco/train/x.jpg", "a"), ("a/list.json", "elsewhere/deep/x.jpg", "x.jpg", None)])
def test_pictures_are_found_near_their_list(tmp_path, json_at, picture_at, name, root):
    rows = [llava(name)] * 3
    write(tmp_path / json_at, rows), picture(tmp_path / picture_at)
    assert image_root(tmp_path / json_at, rows) == (tmp_path / root if root else None)
    text, good = check_text(tmp_path / json_at)
    assert good == bool(root) and ("name theirs as images" in text) != bool(root)


def test_names_in_a_list_cannot_reach_out(tmp_path):
    write(tmp_path / "a/list.json", [llava("../secret.jpg")] * 3), picture(tmp_path / "secret.jpg")
    text, good = check_text(tmp_path / "a")
    assert not good and "leaves its folder" in text


# ---- several, none, unknown

def test_several_in_one_folder(tmp_path):
    write(tmp_path / "big.json", [llava("x.jpg", "Blue. " * 50)] * 9), write(tmp_path / "small.json", [llava("x.jpg")] * 2), picture(tmp_path / "x.jpg")
    finding = recognise(tmp_path)
    assert finding.spec["path"].endswith("big.json") and [(reader, Path(place).name) for reader, place in finding.others] == [("llava", "small.json")]
    assert "also there:    llava" in check_text(tmp_path)[0]


@pytest.mark.parametrize("make, told", [
    (lambda f: picture(f / "x.jpg"), ["1 .jpg", "nearest        imagefolder", "metadata.jsonl"]),
    (lambda f: write(f / "x.json", [{"url": "x.org", "caption": "a sink"}]), ["a record has   url, caption", "give the reader this file as captions"]),
    (lambda f: write(f / "x.json", [{"q": "?", "a": "!"}]), ["a record has   q, a", "neither conversations nor messages"]),
    (lambda f: write(f / "x.json", '{"broken": '), ["1 .json"]), (lambda f: write(f / "notes.md", "# Notes"), ["1 .md", "looked for"]), (lambda f: f.mkdir(exist_ok=True), ["it holds       nothing"]),
    (lambda f: write(f / "episode_0000001.npz", "x"), ["nearest        calvin", "ep_start_end_ids.npy is missing"]), (lambda f: write(f / "a.mp4", "x"), ["nearest        lerobot, but meta/info.json is missing"]),
    (lambda f: write(f / "d-train.tfrecord-00000-of-00001", "x"), ["nearest        bridge, but features.json"])])
def test_what_nobody_knows(tmp_path, capsys, make, told):
    make(tmp_path / "odd")
    assert main(["sources", "check", str(tmp_path / "odd")]) == 1
    said = capsys.readouterr().out
    for text in told + ["no reader knows this", "lerobot", "02_sources"]: assert text in said, said


def test_commands(tmp_path, capsys):
    assert main(["sources", "list"]) == 0
    said = capsys.readouterr().out
    for reader in READERS: assert f"| {reader} " in said
    assert main(["sources", "check", str(DATA / "llava_coco_qa"), "--first", "5"]) == 0
    assert "the first 5, which give 5 good samples" in capsys.readouterr().out
    assert main(["sources", "show", str(DATA / "bridge_rlds"), "--count", "2"]) == 0
    assert capsys.readouterr().out.count("pictures   64 x 64") == 2
    assert main(["sources", "show", "{reader: tabletop, name: mini-vcr, count: 3}"]) == 0 and capsys.readouterr().out.count("pictures") == 3
    assert main(["sources", "show", "{reader: lava}"]) == 2 and "did you mean 'llava'" in capsys.readouterr().err
    for what in "check", "show": assert main(["sources", what, str(tmp_path / "gone")]) == 2 and "does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["sources", "show", str(tmp_path / "empty")]) == 2 and "no reader knows this" in capsys.readouterr().err


# ---- what is bad

def test_bad_records_are_counted_with_their_reasons(tmp_path):
    rows = [llava("x.jpg")] * 94 + [llava("gone.jpg")] * 2 + [llava("cut.jpg")] * 2 + [llava("x.jpg", " ")] + [{**llava("x.jpg"), "conversations": None}]
    write(tmp_path / "list.json", rows), picture(tmp_path / "x.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:300])
    text, good = check_text(tmp_path)
    assert not good and "bad            6 (6.0%; a run stops at more than 5 %)" in text
    for line in "2 x image file does not exist; first: list.json, record 94", "2 x image cannot be decoded; first: list.json, record 96", "1 x empty turn", "1 x no list 'conversations'": assert line in text, text
    write(tmp_path / "list.json", rows[:94] * 2 + rows[94:])
    text, good = check_text(tmp_path)
    assert good and "bad            6 (3.1%)" in text and "stops at" not in text


def test_a_file_cut_short_is_told(tmp_path):
    write(tmp_path / "list.json", json.dumps([llava("x.jpg")] * 30)[:-500]), picture(tmp_path / "x.jpg")
    text, good = check_text(tmp_path)
    assert not good and re.search(r"stops +.*list\.json: .*cut short.*at byte [\d,]+", text)
    assert 20 < int(re.search(r"looked at +the first (\d+)", text)[1]) < 30 and "records        ?" in text


class Endless(Source):
    "A source without length, with records for hours."
    def records(self, start=0):
        for i in range(start, 10**9): yield Record(str(i), "made here")
    def parse(self, record): return [Sample(f"{self.name}/{record.key}", self.name, "vlm", (), (turn("user", "What?"), turn("assistant", "That.")))]


def test_a_look_takes_no_longer_than_asked():
    began = time.perf_counter()
    result = examine(Endless("x"), first=50, seconds=.3)
    assert result.read == result.samples == 50 and not result.counted and result.records > 50 and time.perf_counter() - began < 3


def test_duplicate_keys_are_bad():
    class Twice(Endless):
        def records(self, start=0): return (Record(str(i % 5), "made here") for i in range(start, 10))
    result = examine(Twice("x"))
    assert result.aside.reasons() == {"duplicate id": 5} and (result.samples, result.records, result.counted) == (5, 10, True)


def test_only_a_glance_before_the_first_record(tmp_path):
    "A list of 200 MB is recognised without being read through."
    row = json.dumps(llava("x.jpg", "word " * 4000))
    with open(tmp_path / "list.json", "w") as file: file.write("[" + ",".join([row] * 10_000) + "]")
    picture(tmp_path / "x.jpg")
    began = time.perf_counter()
    assert recognise(tmp_path).spec["reader"] == "llava" and time.perf_counter() - began < 3


def test_large_folders_and_files_are_only_looked_at(tmp_path):
    "A list among ten thousand pictures; annotations that are one object of 60 MB; an archive whose index would take a walk."
    for i in range(10_000): (tmp_path / f"{i:06}.jpg").touch()
    picture(tmp_path / "000000.jpg"), write(tmp_path / "list.json", [llava("000000.jpg")] * 3)
    (tmp_path / "instances.json").write_text('{"annotations": [' + "1, " * 20_000_000 + "1]}")
    began = time.perf_counter()
    tracemalloc.start()
    assert recognise(tmp_path).spec["path"].endswith("list.json")
    assert tracemalloc.get_traced_memory()[1] < 30e6 and time.perf_counter() - began < 15
    tracemalloc.stop()
    (tmp_path / "odd").mkdir()
    for i in range(300): (tmp_path / "odd" / f"{i}.png").touch()
    assert "200 or more .png" in unknown_lines(tmp_path / "odd")


def test_pictures_in_an_archive_beside_the_list(tmp_path):
    (folder := tmp_path / "set").mkdir()
    with tarfile.open(folder / "pictures.tar", "w") as tar: tar.add(picture(tmp_path / "x.jpg"), "train/x.jpg")
    write(folder / "list.json", [llava("train/x.jpg")] * 3)
    text, good = check_text(folder)
    assert good and lines_of(text)["features"]["pool"][0]["images"] == str(folder / "pictures.tar")


def test_profile_lines_are_yaml_whatever_the_path():
    for name in "a b", "ünï", "x: y", "#1", "it's", '"quoted"', "C:\\data", "*":
        for kind in "vlm", "vla":
            told = yaml.safe_load(profile_lines({"reader": "llava", "name": "x", "path": name, "gripper": [0, 1]}, kind))
            assert told["features"]["pool" if kind == "vlm" else "robots"][0]["path"] == name


def test_import_is_light():
    code = "import sys\nimport embodied_midtrain.sources.check as c\nc.list_text()\nassert not {'torch', 'transformers', 'matplotlib', 'datasets', 'av', 'h5py'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
