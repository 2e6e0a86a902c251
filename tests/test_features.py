"""Features: resumable part by part, broken images set aside, one vector a sample."""
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from embodied_midtrain.backbone import load_backbone
from embodied_midtrain.features import extract, share_out, write_features
from embodied_midtrain.pipeline import notebook_folder, parameters_of
from embodied_midtrain.samples import ImageRef, SetAside
from embodied_midtrain.vectors import read_features
from embodied_midtrain.tabletop.pool import TabletopSource, tabletop_pool

HOW = dict(backbone="tiny", revision=None, dtype="float32", pooling="last", text="question", batch_size=32, part_size=16)


def llava(folder, count, broken=()):
    records = []
    for i, sample in enumerate(TabletopSource("mini-refspatial", count)):
        (folder / f"{i}.png").write_bytes(b"not a picture") if i in broken else sample.images[0].open().save(folder / f"{i}.png")
        turns = [{"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]} for m in sample.messages]
        records.append({"id": str(i), "image": f"{i}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return {"reader": "llava", "name": "photos", "path": str(folder / "data.json"), "images": str(folder)}


def test_a_corrupt_image_is_set_aside_counted_and_listed(tmp_path):
    spec, out = llava(tmp_path, 40, broken={7}), tmp_path / "out"
    out.mkdir()
    (told,) = write_features([(0, spec)], folder=str(out), **HOW)
    assert (told["read"], told["kept"], len(told["aside"])) == (40, 39, 1)
    row = told["aside"].iloc[0]
    assert row.file.endswith("7.png") and row.record == "photos/7" and "cannot be decoded" in row.reason
    table = read_features(out)
    assert len(table) == 39 and "photos/7" not in table.ids


def test_a_text_with_the_models_own_mark_is_set_aside(tmp_path):
    "The answer too: mid-training would show it later."
    spec, out = llava(tmp_path, 40), tmp_path / "out"
    records = json.loads((tmp_path / "data.json").read_text())
    records[5]["conversations"][0]["value"] += " <IMG_CONTEXT>"
    records[9]["conversations"][1]["value"] = "write <IMG_CONTEXT> there"
    (tmp_path / "data.json").write_text(json.dumps(records))
    out.mkdir()
    (told,) = write_features([(0, spec)], folder=str(out), **HOW | {"part_size": 40})
    assert (told["read"], told["kept"]) == (40, 38) and told["aside"].record.tolist() == ["photos/5", "photos/9"]
    assert told["aside"].reason.str.contains("holds <IMG_CONTEXT>").all()


def test_threads_write_the_same_bytes(tmp_path):
    "Broken images among them: the book keeps the order of the samples, whoever came first."
    spec, folders = llava(tmp_path, 60, broken={3, 31}), [tmp_path / "alone", tmp_path / "threads"]
    for folder, threads in zip(folders, (0, 4)): folder.mkdir(); write_features([(0, spec)], folder=str(folder), **HOW | dict(part_size=40, batch_size=4), threads=threads)
    alone, threaded = ({f.name: f.read_bytes() for f in folder.iterdir()} for folder in folders)
    assert alone == threaded
    assert read_features(folders[1]).ids.tolist() == [f"photos/{i}" for i in range(60) if i not in (3, 31)]


@pytest.mark.parametrize("threads", [0, 2])
def test_pictures_are_decoded_when_their_batch_comes(threads):
    "However large a part is, no more pictures are in memory than a few batches hold."
    tiny, samples, opened, most = load_backbone("tiny", device="cpu"), list(TabletopSource("mini-llava", 120)), [], []
    def seen(sample):
        image = sample.images[0].open()
        return replace(sample, images=(ImageRef(load=lambda: opened.append(1) or np.asarray(image), where="here"),))
    done = []
    extract(tiny, list(map(seen, samples)), batch_size=4, threads=threads, aside=SetAside(), tick=lambda n: done.append(n) or most.append(len(opened) - sum(done)))
    assert len(opened) == 120 and max(most) <= 4 * (2 * threads + threads)


def test_too_many_broken_images_stop_the_run(tmp_path):
    spec, out = llava(tmp_path, 40, broken=range(10)), tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match=r"10 of 40 records \(25%\) cannot be used"): write_features([(0, spec)], folder=str(out), **HOW)


def test_resumed_equals_uninterrupted(tmp_path):
    spec = {"reader": "tabletop", "name": "mini-laion", "count": 50}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut): folder.mkdir(); write_features([(3, spec)], folder=str(folder), **HOW)
    (cut / "part-03-00002.parquet").unlink()
    kept = (cut / "part-03-00001.parquet").stat().st_mtime_ns
    write_features([(3, spec)], folder=str(cut), **HOW)
    assert {f.name: f.read_bytes() for f in whole.iterdir()} == {f.name: f.read_bytes() for f in cut.iterdir()}
    assert (cut / "part-03-00001.parquet").stat().st_mtime_ns == kept


def test_order_and_batches_do_not_matter():
    tiny, samples = load_backbone("tiny", device="cpu"), list(TabletopSource("mini-llava", 20))
    x = extract(tiny, samples, batch_size=7)
    assert np.allclose(x[::-1].astype(float), extract(tiny, samples[::-1], batch_size=20).astype(float), atol=5e-3)


def test_the_notebooks_pool_is_the_tabletops():
    "The parameters cell spells it out for the reader; here it is held to the shares."
    pool = parameters_of(notebook_folder() / "05_features.ipynb")["pool"].default
    assert [{**spec, "seed": 0} for spec in pool] == tabletop_pool(60_000)


def test_sources_are_shared_out_once():
    shares = share_out([5, 3, 8, 1, 1], 2)
    assert sorted(i for share in shares for i in share) == list(range(5)) and len(share_out([4], 3)) == 1
