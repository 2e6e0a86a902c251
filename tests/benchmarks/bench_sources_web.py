"""Our readers of parquet and webdataset against the `datasets` library on the same files, in turn, in one process.

    python tests/benchmarks/bench_sources_web.py

Every way gives question or caption and the picture's encoded bytes of each sample ("bytes"), or the decoded picture ("pixels"); ours also checks each sample and gives it an id. Printed are medians of several
rounds and their ratio: above 1, ours is the quicker; in brackets the ratio of processor time, which a busy machine disturbs less. Pictures are random patches of the test data's, saved as JPEG."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import io
import json
import statistics
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from embodied_midtrain.sources.web import HfSource, WebDatasetSource

COUNT, ROUNDS, PATCH = 4000, 5, 256
PICTURES = Path(__file__).parent.parent / "data"


def jpegs(count):
    "Encoded patches, all different."
    rng, whole = np.random.default_rng(0), [PIL.Image.open(PICTURES / name) for name in ("robopoint/sink.jpg", "robopoint/stair.jpg", "llava_coco_qa/waterview.jpg")]
    for i in range(count):
        image = whole[i % 3]
        x, y = rng.integers(image.width - PATCH), rng.integers(image.height - PATCH)
        image.crop((x, y, x + PATCH, y + PATCH)).save(file := io.BytesIO(), "JPEG", quality=90)
        yield file.getvalue()


def write_parquet(folder, pictures):
    "Rows as Robo2VLM has them, 100 in a group, as the `datasets` library writes pictures."
    rows = {"question": [f"What is in picture {i}?" for i in range(len(pictures))], "answer": [f"Answer {i}." for i in range(len(pictures))],
            "image": pa.array([{"bytes": p, "path": None} for p in pictures], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    schema = pa.schema([("question", pa.string()), ("answer", pa.string()), ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))],
                       metadata={"huggingface": json.dumps({"info": {"features": datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}).to_dict()}})})
    pq.write_table(pa.table(rows, schema=schema), folder / "train-00000-of-00001.parquet", row_group_size=100)


def write_shards(folder, pictures):
    "Shards as img2dataset writes them."
    for shard in range(4):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for i, picture in enumerate(pictures[shard::4]):
                key = f"{shard:05}{i:04}"
                for name, content in (("jpg", picture), ("txt", f"caption {i}".encode()), ("json", json.dumps({"key": key, "url": f"x.org/{i}", "caption": f"caption {i}", "status": "success"}, indent=4).encode())):
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def ours(open_source, decode):
    "Samples with their picture."
    for sample in open_source():
        picture = sample.images[0].open() if decode else sample.images[0].encoded()
        yield sample.messages[0]["content"], sample.answer, picture


def theirs(kind, files, decode, streaming=True, anew=False):
    "The same by the `datasets` library, which copies a table to its own form before the first reading, unless it streams."
    rows = datasets.load_dataset(kind, data_files=list(map(str, files)), split="train", streaming=streaming, cache_dir=tempfile.mkdtemp(dir=files[0].parent.parent) if anew else None)
    image = "image" if kind == "parquet" else "jpg"
    rows = rows.cast_column(image, datasets.Image(decode=False)) if not streaming else rows.decode(False)
    for row in rows:
        picture = PIL.Image.open(io.BytesIO(row[image]["bytes"])).convert("RGB") if decode else row[image]["bytes"]
        yield (row["question"], row["answer"], picture) if kind == "parquet" else ("", row["txt"], picture)


def seconds(samples):
    "Read all; returns the time and a sum over the pictures, by which both are known to have read the same."
    start, work, total, count = time.perf_counter(), time.process_time(), 0, 0
    for _, _, picture in samples:
        total, count = total + (len(picture) if isinstance(picture, bytes) else picture.width), count + 1
    return time.perf_counter() - start, time.process_time() - work, (count, total)


def compare(name, mine, library):
    rounds = [(seconds(mine()), seconds(library())) for _ in range(ROUNDS)]
    assert len({total for pair in rounds for *_, total in pair}) == 1, "both must read the same"
    (a, b), (x, y) = ([statistics.median(pair[i][clock] for pair in rounds) for i in (0, 1)] for clock in (0, 1))
    print(f"{name:26} ours {COUNT / a:6.0f}/s, datasets {COUNT / b:6.0f}/s, ratio {b / a:.2f} [{y / x:.2f}] (each round: {', '.join(f'{theirs[0] / mine[0]:.2f}' for mine, theirs in rounds)})", flush=True)


def main():
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as scratch:
        folder, pictures = Path(scratch), list(jpegs(COUNT))
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        (folder / "parquet").mkdir(), (folder / "shards").mkdir()
        write_parquet(folder / "parquet", pictures), write_shards(folder / "shards", pictures)
        table, shards = sorted((folder / "parquet").iterdir()), sorted((folder / "shards").iterdir())
        hf, web = lambda: HfSource("t", str(folder / "parquet")), lambda: WebDatasetSource("w", str(folder / "shards"))
        print(f"{COUNT} samples of {sum(map(len, pictures)) / COUNT / 1024:.0f} KB, median of {ROUNDS} rounds")
        list(islice(ours(hf, False), 10)), list(islice(theirs("parquet", table, False, streaming=False), 10))  # warm, and the library's copy is made
        compare("parquet, bytes, streamed", lambda: ours(hf, False), lambda: theirs("parquet", table, False))
        compare("parquet, bytes, first time", lambda: ours(hf, False), lambda: theirs("parquet", table, False, streaming=False, anew=True))
        compare("parquet, bytes, its copy", lambda: ours(hf, False), lambda: theirs("parquet", table, False, streaming=False))
        compare("parquet, pixels, streamed", lambda: ours(hf, True), lambda: theirs("parquet", table, True))
        compare("webdataset, bytes", lambda: ours(web, False), lambda: theirs("webdataset", shards, False))
        compare("webdataset, pixels", lambda: ours(web, True), lambda: theirs("webdataset", shards, True))


if __name__ == "__main__": main()
