"Exports read again: sample for sample the selection, whatever was killed, rotated, too long or too large on the way."
import io, json, os, signal, subprocess, sys, tarfile, tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow.parquet as pq
import pytest
import yaml

from embodied_midtrain.cli import main
from embodied_midtrain.core import Stage, read_json, read_table, write_table
from embodied_midtrain.export import FORMS, MAX_PIXELS, NAME, OTHER_MARKS, _image_tokens, as_file, draw, draw_all, export, read_selection, take_turns, token_counter, training_yaml
from embodied_midtrain.samples import BadSample, ImageRef, Sample, turn
from embodied_midtrain.sources.base import Record, Source, open_source, open_sources, sources_hash

DATA = Path(__file__).parent / "data"
POOL = [{"reader": "tabletop", "name": "mini-refspatial", "count": 80}, {"reader": "tabletop", "name": "mini-llava", "count": 80},
        {"reader": "llava", "name": "photos", "path": str(DATA / "llava_coco_qa/llava_demo.json"), "images": str(DATA)},
        {"reader": "messages", "name": "pairs", "path": str(DATA / "llamafactory_mllm/mllm_demo.json"), "images": str(DATA)}]


def finished_run(folder, pool, chosen, robots=()):
    "The stages of a run that an export reads, with a selection of ours."
    with Stage(folder, "features", dict(backbone="tiny", revision=None, pooling="last", text="question", pool=pool, robots=list(robots)), dict(sources=sources_hash([*pool, *robots]))) as stage:
        stage.count(prompt_hash="0123456789abcdef")
    with Stage(folder, "proximity", dict(batch=128)) as stage: stage.file("estimator.json").write_text("{}")
    with Stage(folder, "selection", dict(k=len(chosen))) as stage:
        row = lambda arm, ids: pd.DataFrame(dict(arm=arm, seed=0, id=ids, source=[i.split("/")[0] for i in ids], score=np.linspace(.9, .4, len(ids)), rank=np.arange(1, len(ids) + 1)))
        write_table(pd.concat([row("proximity", chosen), row("random", chosen[::2])]), stage.file("selection.parquet"))
    return folder


def chosen_ids():
    "Ids of all four sources: with no, one and two pictures, in an order that is not the sources' own."
    ids = [s.id for source in open_sources(POOL) for s in source]
    return [ids[i] for i in np.random.default_rng(0).permutation(len(ids))[:120]]


@pytest.fixture(scope="module")
def run(tmp_path_factory): return finished_run(tmp_path_factory.mktemp("runs") / "mixed", POOL, chosen_ids())


def plain(sample): return sample.messages, [np.asarray(i.open()).tobytes() for i in sample.images]


def selected(run, arm="proximity"):
    rows = read_selection(run, arm)
    by_name = {s.name: s for s in open_sources(POOL)}
    return {i: plain(by_name[i.split("/")[0]].fetch([i])[0]) for i in rows.id}


def read_again(to, out, facts):
    "What our own readers make of an export: id -> messages and pixels."
    spec = {"llamafactory": {"reader": "sharegpt", "path": str(out / f"{NAME}.jsonl"), "images": str(out) if facts.get("media_dir") in (".", None) else facts["media_dir"]},
            "webdataset": {"reader": "webdataset", "path": str(out)}, "hf": {"reader": "hf", "path": str(out)}}[to]
    source = open_source({"name": "again", **spec})
    samples = list(source)
    assert not source.set_aside, source.set_aside.rows
    assert len({s.meta["id"] for s in samples}) == len(samples)
    return {s.meta["id"]: plain(s) for s in samples}


def contents(folder): return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# ---- round trip

@pytest.mark.parametrize("to", FORMS)
def test_read_again_it_is_the_selection(run, tmp_path, to):
    facts = export(run, to, tmp_path / to, shard_size=50)
    wanted = selected(run)
    assert facts["exported"] == len(wanted) == 120 and facts["left_out"] == {} and facts["shards"] == 3
    assert sorted({len(pixels) for _, pixels in wanted.values()}) == [0, 1, 2]
    assert read_again(to, tmp_path / to, facts) == wanted


def test_pictures_that_stay_where_they_are(run, tmp_path):
    facts = export(run, "llamafactory", tmp_path / "out", images="path")
    assert read_again("llamafactory", tmp_path / "out", facts) == selected(run)
    rows = [json.loads(line) for line in (tmp_path / "out" / f"{NAME}.jsonl").read_text().splitlines()]
    there = {os.path.normpath(os.path.join(facts["media_dir"], name)) for row in rows for name in row["images"]}
    assert str(DATA / "robopoint/sink.jpg") in there and not any(row["images"] and os.path.isabs(row["images"][0]) for row in rows)
    for name in "internvl3_5-1b", "qwen3-vl-2b": assert yaml.safe_load((tmp_path / "out" / f"{name}.yaml").read_text())["media_dir"] == facts["media_dir"]
    copied = export(run, "llamafactory", tmp_path / "copied")
    assert copied["media_dir"] == "." and len(list((tmp_path / "copied").rglob("*.jpg"))) > len(list((tmp_path / "out").rglob("*.jpg"))) == 0


def test_other_arm_and_the_libraries_own_readers(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    facts = export(run, "hf", tmp_path / "hf", arm="random")
    table = datasets.load_dataset(str(tmp_path / "hf"), split="train", cache_dir=str(tmp_path / "cache"))
    wanted = selected(run, "random")
    assert facts["exported"] == len(table) == len(wanted) == 60
    assert {row["id"]: (tuple(row["messages"]), [np.asarray(i.convert("RGB")).tobytes() for i in row["images"]]) for row in table} == wanted
    assert pq.read_metadata(next((tmp_path / "hf" / "data").iterdir())).num_rows == 60
    assert "drawn at random" in (tmp_path / "hf" / "README.md").read_text()
    rows = datasets.load_dataset("json", data_files=str(export(run, "llamafactory", tmp_path / "lf") and tmp_path / "lf" / f"{NAME}.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["images"] == datasets.List(datasets.Value("string")) and len(rows) == 120 and rows[0]["images"]


def test_shards_are_plain_tar_archives(run, tmp_path):
    export(run, "webdataset", tmp_path / "out", shard_size=50)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [s.name for s in shards] == [f"{NAME}-{i:06d}.tar" for i in range(3)]
    names = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.isfile() and (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                names.append(member.name)
    keys = [name.split(".")[0] for name in names]
    assert len(set(names)) == len(names) and len(set(keys)) == 120
    assert len([i for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]) == 120, "the files of a sample lie side by side"


# ---- the same each time

@pytest.mark.parametrize("to", FORMS)
def test_same_bytes_each_time_and_finished_work_is_kept(run, tmp_path, to):
    one, two = tmp_path / "one", tmp_path / "two"
    facts = export(run, to, one)
    export(run, to, two)
    assert contents(one) == contents(two)
    before = {f: f.stat().st_mtime_ns for f in one.rglob("*")}
    assert export(run, to, one) == facts and before == {f: f.stat().st_mtime_ns for f in one.rglob("*")}


KILL = """
import os, signal, sys
from pathlib import Path
import embodied_midtrain.export as e
run, to, out, after = sys.argv[1:]
write, calls = e.FORMS[to].write, []

def dying(self, number, of, items):
    def some():
        for i, item in enumerate(items):
            if number == int(after) and i == 5: os.kill(os.getpid(), signal.SIGKILL)
            yield item
    return write(self, number, of, some())

e.FORMS[to].write = dying
e.export(run, to, out, shard_size=25)
"""


@pytest.mark.parametrize("to, shard", [("llamafactory", 0), ("llamafactory", 3), ("webdataset", 2), ("hf", 4)])
def test_killed_in_the_middle_of_a_shard(run, tmp_path, to, shard):
    assert subprocess.run([sys.executable, "-c", KILL, str(run), to, str(tmp_path / "killed"), str(shard)], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "export.json").exists() and len(list((tmp_path / "killed" / ".work").glob("book-*"))) == shard
    export(run, to, tmp_path / "killed", shard_size=25)
    export(run, to, tmp_path / "whole", shard_size=25)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


# ---- what is drawn, and how much of it is held

class Heavy(Source):
    "Two hundred pictures of 3 MB, made when their record is parsed; walked through, never looked up."
    walks, size = 0, 200
    def records(self, start=0):
        Heavy.walks += 1
        return (Record(str(i), "made here") for i in range(start, self.size))
    def parse(self, record):
        image = np.full((1000, 1000, 3), int(record.key), np.uint8)
        return [Sample(f"{self.name}/{record.key}", self.name, "vlm", (ImageRef(array=image),), (turn("user", "<image> How bright?"), turn("assistant", record.key)))]


@pytest.mark.parametrize("to", FORMS)
def test_samples_are_written_as_they_are_read(tmp_path, to):
    pool = [{"reader": f"{__name__}:Heavy", "name": "heavy"}]
    run = finished_run(tmp_path / "run", pool, [f"heavy/{i}" for i in range(198, 0, -2)])
    Heavy.walks = 0
    tracemalloc.start()
    facts = export(run, to, tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts["exported"] == 99 and Heavy.walks == 1
    assert peak < 60e6, f"{peak / 1e6:.0f} MB at once, of 297 MB in all"


class Counted(Heavy):
    "Small, and looked up as well as walked through."
    looked_up, size = 0, 5000
    def find(self, key):
        Counted.looked_up += 1
        return Record(key, "made here")
    def parse(self, record): return [Sample(f"{self.name}/{record.key}", self.name, "vlm", (), (turn("user", "What?"), turn("assistant", record.key)))]


@pytest.mark.parametrize("few, walks", [(1000, 0), (1001, 1)])
def test_few_are_looked_up_and_many_met_in_one_walk(few, walks):
    Heavy.walks = Counted.looked_up = 0
    ids = [f"counted/{i}" for i in np.random.default_rng(0).permutation(5000)[:few]]
    assert sorted(s.id for s in draw(Counted("counted"), ids)) == sorted(ids)
    assert (Heavy.walks, Counted.looked_up) == (walks, few * (1 - walks))


def test_sources_take_turns_and_can_be_entered_anywhere(run):
    turns = take_turns({"a": 700, "b": 200, "c": 100})
    for start in range(0, 1000, 100): assert [(turns[start:start + 100] == s).sum() for s in "abc"] == [70, 20, 10]
    rows, whole = read_selection(run), [s.id for s in draw_all(read_selection(run), open_sources(POOL))]
    assert sorted(whole) == sorted(rows.id)
    for start in 0, 1, 57, 119, 120: assert [s.id for s in draw_all(rows, open_sources(POOL), start)] == whole[start:]
    with pytest.raises(ValueError, match="unknown source 'mini-refspatial'"): next(draw_all(rows, open_sources(POOL[1:])))
    with pytest.raises(KeyError, match="no sample 'photos/999'"): list(draw_all(pd.DataFrame(dict(id=["photos/999"], source="photos")), open_sources(POOL)))


# ---- pictures

def encoded(image, form, **how):
    image.save(file := io.BytesIO(), form, **how)
    return file.getvalue()


def gradient(mode="RGB"): return PIL.Image.fromarray(np.linspace(0, 255, 40 * 20 * 3).reshape(20, 40, 3).astype(np.uint8)).convert(mode)


def lying():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    return encoded(gradient(), "JPEG", exif=exif)


@pytest.mark.parametrize("data, kept", [
    (encoded(gradient(), "JPEG"), True), (encoded(gradient(), "PNG"), True), (encoded(gradient("L"), "JPEG"), True), (encoded(gradient("P"), "PNG"), True), (lying(), False),
    (encoded(gradient("CMYK"), "JPEG"), False), (encoded(gradient("RGBA"), "PNG"), False), (encoded(gradient(), "WEBP"), False), (encoded(gradient(), "GIF"), False), (encoded(gradient(), "BMP"), False),
    (encoded(PIL.Image.fromarray(np.arange(800, dtype=np.uint16).reshape(20, 40) * 80), "PNG"), False)])
def test_a_picture_looks_the_same_to_a_trainer(data, kept):
    image = ImageRef(data=data)
    picture = as_file(image)
    assert (picture.read() == data) == kept
    theirs = PIL.Image.open(io.BytesIO(picture.read())).convert("RGB")  # as LLaMA-Factory, datasets and webdataset open it
    assert theirs.tobytes() == image.open().tobytes() and theirs.size == picture.size and picture.ext == ("jpg" if kept and data[:2] == b"\xff\xd8" else "png")


def test_bombs_and_ruins_are_refused(tmp_path):
    import struct, zlib
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    for image in ImageRef(data=bomb), ImageRef(data=b""), ImageRef(str(tmp_path / "gone.jpg")), ImageRef(data=b"%!PS-Adobe"):
        for in_place in True, False:
            with pytest.raises(BadSample): as_file(image, in_place)


# ---- what is left out

def chats(folder, rows):
    "A pool of chats about one photograph; each row: question, answer, picture."
    folder.mkdir(exist_ok=True)
    (folder / "sink.jpg").write_bytes((DATA / "robopoint/sink.jpg").read_bytes())
    (folder / "fleeting.jpg").write_bytes((DATA / "robopoint/stair.jpg").read_bytes())
    (folder / "chats.json").write_text(json.dumps([{"image": image, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a, image in rows]))
    return [{"reader": "llava", "name": "chats", "path": str(folder / "chats.json")}]


def test_left_out_and_told(tmp_path, capsys):
    rows = [("<image> What?", "A sink.", "sink.jpg")] * 6 + [("<image> What?", "sink " * 300, "sink.jpg"), ("<image> And?", "Stairs.", "fleeting.jpg"), ("<image> Is <video> a mark?", "No.", "sink.jpg"),
                                                                   ("<image> What?", "<|im_end|>", "sink.jpg"), ("<image> What?", "say <IMG_CONTEXT>", "sink.jpg")]
    run = finished_run(tmp_path / "run", chats(tmp_path / "chats", rows), [f"chats/{i}" for i in range(11)])
    (tmp_path / "chats" / "fleeting.jpg").write_bytes(b"")
    assert main(["export", str(run), "--to", "llamafactory", "--out", str(tmp_path / "out"), "--sequence-length", "200", "--licence", "chats=CC BY 4.0"]) == 0
    facts = read_json(tmp_path / "out" / "export.json")
    assert facts["exported"] == 6 and sum(facts["left_out"].values()) == 5
    assert facts["left_out"] == {"more than 200 tokens": 1, "image cannot be decoded": 1, "text that a trainer would take for its own mark": 3}
    left_out = read_table(tmp_path / "out" / "left_out.parquet")
    assert set(left_out.id) == {f"chats/{i}" for i in range(6, 11)} and set(left_out.columns) == {"id", "source", "reason"}
    assert facts["sources"]["chats"] == dict(selected=11, exported=6, licence="CC BY 4.0") and facts["run_hash"] and facts["backbone"] == "tiny"
    said, readme = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    assert "6 of 11 selected samples" in said and "more than 200 tokens 1" in said and "counted by tiny" in said
    for word in "CC BY 4.0", facts["run_hash"], facts["estimator"]["hash"], "K = 11", "more than 200 tokens": assert word in readme
    assert len(read_again("llamafactory", tmp_path / "out", facts)) == 6
    webdataset = export(run, "webdataset", tmp_path / "tars")
    assert webdataset["exported"] == 10 and webdataset["counted_by"] is None, "other forms keep what only LLaMA-Factory stumbles over"


def test_nothing_left_is_an_error(tmp_path):
    run = finished_run(tmp_path / "run", chats(tmp_path / "chats", [("<image> What?", "A sink.", "sink.jpg")]), ["chats/0"])
    with pytest.raises(ValueError, match="no sample is left of 1: more than 5 tokens"): export(run, "llamafactory", tmp_path / "out", sequence_length=5)
    assert not (tmp_path / "out" / "export.json").exists()


def test_only_text_is_fine(tmp_path):
    pool = chats(tmp_path / "chats", [("What?", "A sink.", None)] * 3 + [("<image> What?", "A sink.", "sink.jpg")])
    run = finished_run(tmp_path / "run", pool, [f"chats/{i}" for i in range(4)])
    export(run, "llamafactory", tmp_path / "out", shard_size=1)
    rows = [json.loads(line) for line in (tmp_path / "out" / f"{NAME}.jsonl").read_text().splitlines()]
    assert [bool(row["images"]) for row in rows] == [True, False, False, False], "who reads it guesses the type of a column from its beginning"
    run = finished_run(tmp_path / "text", pool, [f"chats/{i}" for i in range(3)])
    assert export(run, "llamafactory", tmp_path / "text only")["exported"] == 3 and not list((tmp_path / "text only" / "images").iterdir())


# ---- tokens

def test_tokens_of_pictures_by_size():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    processor = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=256 * 256, max_pixels=4096 * 4096)
    backbone = SimpleNamespace(config=None, model=SimpleNamespace(config=SimpleNamespace(model_type="qwen3_vl")), image_processor=processor)
    for size in (640, 480), (4000, 3000), (100, 900), (30, 31), (512, 512), (777, 333):
        most = MAX_PIXELS["qwen3_vl"]
        shrink = min(1, (most / (size[0] * size[1])) ** .5)  # LLaMA-Factory's `image_max_pixels`
        picture = PIL.Image.new("RGB", (int(size[0] * shrink), int(size[1] * shrink)))
        assert _image_tokens(backbone, size) == int(processor(images=[picture], return_tensors="np")["image_grid_thw"].prod()) // 4 <= 300, size
    internvl = SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(model_type="internvl", image_seq_length=256)), image_processor=None)
    assert _image_tokens(internvl, (9000, 10)) == 256


def test_tokens_are_those_of_the_backbone():
    from embodied_midtrain.backbone import load_backbone
    tiny, count = load_backbone("tiny", device="cpu"), token_counter("tiny")
    for source in open_sources(POOL):
        for sample in list(source)[:12]:
            tokens = len(tiny.encode([sample], tiny.pixels([sample])[1], answers=True)[0])
            assert count(sample, [i.open().size for i in sample.images]) == tokens + len(sample.images)


# ---- training files

@pytest.mark.parametrize("name, template", [("internvl3_5-1b", "intern_vl"), ("qwen3-vl-2b", "qwen3_vl_nothink")])
def test_training_files_are_the_papers_recipe(name, template):
    told = yaml.safe_load(training_yaml(name, 1024, ".", 1_200_000))
    wanted = dict(stage="sft", finetuning_type="full", freeze_vision_tower=False, freeze_multi_modal_projector=False, freeze_language_model=False, template=template, default_system="", cutoff_len=1024, packing=False,
                  crop_to_patches=False, learning_rate=5e-5, lr_scheduler_type="cosine", warmup_steps=500, max_steps=5000, bf16=True, pure_bf16=False, dataset=NAME, adam_epsilon=1e-8, mask_history=False, train_on_prompt=False, val_size=0.0)
    assert {key: told[key] for key in wanted} == wanted and "warmup_ratio" not in told and "num_train_epochs" not in told
    assert told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] * 4 == 256 and "1.07 passes" in training_yaml(name, 1024, ".", 1_200_000)
    assert all(isinstance(told[key], float) for key in ("learning_rate", "adam_epsilon", "adam_beta1", "max_grad_norm"))


# ---- mistakes

def test_mistakes_are_told_before_anything_is_written(run, tmp_path, capsys):
    for words, told in [(["--to", "llama"], "unknown form 'llama'; did you mean 'llamafactory'"), (["--to", "hf", "--arm", "proxmity"], "did you mean 'proximity'"), (["--to", "hf", "--seed", "7"], "unknown seed"),
                        (["--to", "hf", "--images", "path"], "is for llamafactory"), (["--to", "hf", "--images", "link"], "unknown way with images"), (["--to", "hf", "--licence", "photo=MIT"], "did you mean 'photos'"),
                        (["--to", "hf", "--licence", "MIT"], "expected source=licence"), (["--to", "hf", "--backbone", "no/such/place"], "no backbone at")]:
        assert main(["export", str(run), *words, "--out", str(tmp_path / "out")]) == 2
        assert told in " ".join(capsys.readouterr().err.split()), told
        assert not (tmp_path / "out").exists(), words
    assert main(["export", str(tmp_path / "nowhere"), "--to", "hf"]) == 2 and "not finished" in capsys.readouterr().err


def test_folders_of_others_are_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"): export(run, "hf", tmp_path / "mine")
    export(run, "hf", tmp_path / "out")
    before = contents(tmp_path / "out")
    for how in dict(to="webdataset"), dict(to="hf", arm="random"), dict(to="hf", shard_size=7):
        with pytest.raises(FileExistsError, match="another export"): export(run, out=tmp_path / "out", **how)
    assert contents(tmp_path / "out") == before and contents(tmp_path / "mine") == {"thesis.tex": b"years of work"}


def test_changed_sources_are_noticed(tmp_path):
    pool = chats(tmp_path / "chats", [("<image> What?", "A sink.", "sink.jpg")] * 3)
    run = finished_run(tmp_path / "run", pool, ["chats/1"], robots=[{"reader": "bridge", "name": "bridge", "path": str(DATA / "bridge_rlds/bridge_dataset/1.0.0")}])
    export(run, "hf", tmp_path / "before")
    chats(tmp_path / "chats", [("<image> Who?", "Nobody.", "sink.jpg")] * 3)
    with pytest.raises(ValueError, match="sources have changed since"): export(run, "hf", tmp_path / "after")
    assert not (tmp_path / "after").exists()


def test_help_is_light():
    code = "import sys\nimport embodied_midtrain.export, embodied_midtrain.cli\nassert embodied_midtrain.cli.main(['export', '--help']) == 0\nassert not {'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
