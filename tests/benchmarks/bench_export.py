"""How fast a selection is exported, in each form, against the least that could be done: copying its pictures.

    python tests/benchmarks/bench_export.py

First a pool of photographs (JPEG files, copied as they are), then the tabletop's (drawn, and encoded as PNG). Samples per second of one process; `copy` reads the pictures and writes them into a folder, without asking for
the disk to have them. LLaMA-Factory's form counts tokens as well."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["EMT_QUIET"] = "1"
import json, sys, tempfile, time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_export import finished_run

from embodied_midtrain.export import draw_all, export, read_selection, token_counter
from embodied_midtrain.sources.base import open_sources

PHOTO = (Path(__file__).parent.parent / "data/llava_coco_qa/extreme_ironing.jpg").read_bytes()


def photos(folder, count=4000):
    (folder / "images").mkdir()
    for i in range(count): (folder / "images" / f"{i}.jpg").write_bytes(PHOTO)
    turns = [{"from": "human", "value": "<image>\nWhat does the man on the car do, and where?"}, {"from": "gpt", "value": "He irons a shirt at the back of a taxi. " * 8}]
    (folder / "chats.json").write_text(json.dumps([{"image": f"images/{i}.jpg", "conversations": turns} for i in range(count)]))
    return [{"reader": "llava", "name": "photos", "path": str(folder / "chats.json")}], [f"photos/{i}" for i in np.random.default_rng(0).permutation(count)[:count * 3 // 4]]


def tabletop(folder, count=4000):
    names = ["mini-laion", "mini-llava", "mini-refspatial", "mini-robopoint"]
    return [{"reader": "tabletop", "name": name, "count": count // 4} for name in names], [f"{name}/{i}" for name in names for i in range(count // 4) if i % 4]


def copy(rows, pool, out):
    out.mkdir()
    for i, sample in enumerate(draw_all(rows, open_sources(pool))):
        for image in sample.images: (out / str(i)).write_bytes(image.encoded())


def timed(work):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main():
    token_counter("tiny")  # imports what takes seconds
    for make in photos, tabletop:
        with tempfile.TemporaryDirectory() as folder:
            pool, chosen = make(Path(folder))
            rows = read_selection(run := finished_run(Path(folder) / "run", pool, chosen))
            base = timed(lambda: copy(rows, pool, Path(folder) / "copy"))
            print(f"{make.__name__}: copy {len(rows) / base:,.0f} samples/s")
            for to, how in ("llamafactory", {}), ("llamafactory", {"images": "path"}), ("webdataset", {}), ("hf", {}):
                seconds = timed(lambda: export(run, to, Path(folder) / f"{to}{len(how)}", **how))
                print(f"  {to:<12} {'in place' if how else '':<9} {len(rows) / seconds:>6,.0f} samples/s, {base / seconds:.2f} x")


if __name__ == "__main__": main()
