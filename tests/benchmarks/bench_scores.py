"""Scores of a pool as a stream against the naive way (the whole table in memory), and perplexity in batches against one sample at a time.

    python tests/benchmarks/bench_scores.py [rows]

Features (rows x 96, two million by default) are written to a temporary folder in parts. Each way runs in a process of its own with one thread, so that its peak memory is its own: a small pool
and the large one, with the probe, the distance to 1,500 robot frames, and the random score. `on the way` makes the features instead of reading them. Naive scores the table at once, as one `score_table`."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["EMT_QUIET"] = "1"
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from embodied_midtrain.core import generator, write_table
from embodied_midtrain.proximity import Estimator, by_chance, by_distance, feature_blocks, score_stream, score_table
from embodied_midtrain.vectors import FeatureTable, read_features

WIDTH, PART, ROUNDS = 96, 50_000, 3


def made(part):
    "One part of the features."
    x = generator(0, "bench", part).standard_normal((PART, WIDTH), np.float32)
    return [f"web/{part * PART + i:09}" for i in range(PART)], x


def write_pool(folder, rows):
    for part in range(rows // PART):
        ids, x = made(part)
        feature = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), WIDTH)
        write_table(pa.table({"id": ids, "source": ["web"] * PART, "kind": ["vlm"] * PART, "feature": feature}), Path(folder) / f"part-00-{part:05}.parquet")


def functions(distance=True):
    estimator = Estimator(np.ones(WIDTH), -3.0, pd.DataFrame(dict(step=[9], loss=[0.5], accuracy=[0.9])), 0.9, 9)
    robots = 1 + generator(0, "robots").standard_normal((1500, WIDTH))
    return {0: {"logit": estimator, **({"distance": by_distance(robots)} if distance else {}), "random": by_chance(0)}}


def stream(pool, out, rows, scores): score_stream(partial(feature_blocks, pool, "vlm"), scores, out, PART)


def on_the_way(pool, out, rows, scores):
    def blocks(start):
        for part in range(start // PART, rows // PART):
            ids, x = made(part)
            yield FeatureTable(np.array(ids, object), np.full(PART, "web", object), np.full(PART, "vlm"), x)
    score_stream(blocks, scores, out, PART)


def naive(pool, out, rows, scores): write_table(score_table(read_features(pool).subset("vlm"), scores), Path(out) / "scores.parquet")


WAYS = {"stream": stream, "on the way": on_the_way, "naive": naive}


def memory(which): return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # Linux; the peak that `resource` tells is at least that of the parent


def child(way, pool, rows, distance):
    "One way in this process: seconds, and peak memory beyond what was in use after the imports."
    scores, before, start = functions(distance == "distance"), memory("VmRSS"), time.perf_counter()
    with tempfile.TemporaryDirectory() as out: WAYS[way](pool, out, int(rows), scores)
    print(time.perf_counter() - start, memory("VmHWM") - before)


def measured(way, pool, rows, distance):
    done = subprocess.run([sys.executable, __file__, "child", way, str(pool), str(rows), distance], capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


def bench_streams(rows):
    for size in (rows // 8 // PART * PART, rows):
        with tempfile.TemporaryDirectory() as pool:
            write_pool(pool, size)
            for distance in ("none", "distance"):
                for way in WAYS:
                    if distance == "distance" and way != "stream": continue  # it costs the same everywhere
                    seconds, memory = measured(way, pool, size, distance)
                    print(f"{size:>9,} x {WIDTH}, {'probe, random and distance' if distance == 'distance' else 'probe and random'}, {way:>10}: {size / seconds:>9,.0f}/s, {memory:>6,.0f} MB beyond the imports", flush=True)


def bench_perplexity(count=256):
    import torch
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.perplexity import answer_likelihood
    from embodied_midtrain.sources.base import open_sources
    from embodied_midtrain.tabletop.pool import tabletop_pool
    backbone, samples = load_backbone("tiny", device="cpu"), [s for source in open_sources(tabletop_pool(count)) for s in source]

    @torch.inference_mode()
    def one_by_one(): return [backbone.model(**backbone.batch([s], answers=True)).loss.item() for s in samples]
    def seconds(work):
        start = time.perf_counter()
        return work(), time.perf_counter() - start
    answer_likelihood(backbone, samples[:64]), backbone.model(**backbone.batch(samples[:1], answers=True))  # warm
    rounds = [(seconds(lambda: answer_likelihood(backbone, samples)[0]), seconds(one_by_one)) for _ in range(ROUNDS)]
    ours, plain = (statistics.median(t for _, t in column) for column in zip(*rounds))
    apart = max(abs(a - b) / b for (x, _), (y, _) in rounds for a, b in zip(x, y) if b > 1e-3)
    print(f"perplexity of {len(samples)} samples, one model, one thread, median of {ROUNDS}: {len(samples) / ours:.0f}/s, one at a time with the model's own loss {len(samples) / plain:.0f}/s, "
          f"ratio {plain / ours:.1f}; largest relative difference {apart:.0e}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]: child(*sys.argv[2:])
    else:
        bench_streams(int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000)
        bench_perplexity()
