"""Leakage: how fast pictures are hashed, and a search of 100,000 x 10,000 hashes against the ways a first script would take.

    python tests/benchmarks/bench_leakage.py

One process, one thread, all ways in one run, in processor time (which others at work on the machine disturb less), medians of three rounds. Hashing: pictures a second, all of it (file, pixels, look), beside the decoding alone, which nobody can do without. Searching: `distance_blocks` behind `near_pairs`, as it is and
mirrored; a loop over Python integers, timed on a part and scaled; one NumPy line a question; and, on a part again, the whole table at once as a product of bits. Peak extra memory by tracemalloc, in a round of its own."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import io, statistics, time, tracemalloc
from pathlib import Path

import numpy as np

from embodied_midtrain.core import generator
from embodied_midtrain.leakage import MIRROR, near_pairs, picture_hashes
from embodied_midtrain.samples import ImageRef
from embodied_midtrain.sources.base import open_source

DATA, ROUNDS, SELECTED, QUESTIONS, TOLERANCE = Path(__file__).parent.parent / "data", 3, 100_000, 10_000, 8


def timed(work):
    start = time.process_time()
    return work(), time.process_time() - start


def bench_hashing():
    photo = ImageRef((DATA / "llava_coco_qa/extreme_ironing.jpg").as_posix())
    photo.open().resize((480, 360)).save(file := io.BytesIO(), "JPEG", quality=85)
    kinds = {"photographs of 480 x 360": [ImageRef(data=file.getvalue())] * 200, "pictures of the tabletop (pixels)": [s.images[0] for s in open_source(dict(reader="tabletop", name="mini-refspatial", count=512))]}
    for name, images in kinds.items():
        rounds = [(timed(lambda: [picture_hashes(image) for image in images])[1], timed(lambda: [image.open() for image in images])[1]) for _ in range(ROUNDS)]
        ours, decoding = (statistics.median(column) for column in zip(*rounds))
        print(f"{name}: {len(images) / ours:,.0f}/s hashed, {len(images) / decoding:,.0f}/s decoded alone ({ours / decoding:.2f} x its time)")


def codes(*shape, name): return generator(0, "bench", name).integers(0, 2**64, (*shape, 2), np.uint64)


def ours(a, b): return sum(len(i) for kind, i, *_ in near_pairs(a, b, TOLERANCE) if kind == "near")


def python_loop(a, b):
    "What the usual hash libraries make one write: each with each."
    left, right = ([int(high) << 64 | int(low) for high, low in x] for x in (a, b))
    return sum((p ^ q).bit_count() <= TOLERANCE for p in left for q in right)


def line_by_line(a, b): return sum(int((np.bitwise_count(code ^ a).sum(1) <= TOLERANCE).sum()) for code in b)


def whole_table(a, b):
    left, right = (np.where(np.unpackbits(x.view(np.uint8), axis=1), 1, -1).astype(np.float32) for x in (a, b))
    return int(((128 - left @ right.T) / 2 <= TOLERANCE).sum())


def bench_search():
    a, b = codes(SELECTED, name="selected"), codes(QUESTIONS, name="questions")
    b[::100] = a[:QUESTIONS // 100] ^ np.uint64(5)     # planted: four bits apart
    ways = {"near_pairs, and mirrored": (ours, 1), "the same, straight and mirrored, line by line": (lambda a, b: [line_by_line(a, b), line_by_line(a, b ^ MIRROR)][0], 10), "whole table by bits": (whole_table, 20), "loop over Python integers": (python_loop, 2000)}
    times = {}
    for name, (work, part) in ways.items():
        some = a[:len(a) // part]
        rounds = [timed(lambda: work(some, b)) for _ in range(ROUNDS)]
        assert rounds[0][0] == min(len(some), QUESTIONS // 100), (name, rounds[0][0])
        times[name] = statistics.median(seconds for _, seconds in rounds) * part
        tracemalloc.start()
        work(a[:max(1, len(some) // 10)], b)
        memory = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        print(f"{SELECTED:,} x {QUESTIONS:,}, {name}: {times[name]:,.1f} s{f' (from 1/{part} of it)' if part > 1 else ''}, {times[name] / times['near_pairs, and mirrored']:,.1f} x; peak {memory:,.0f} MB for {max(1, len(some) // 10):,} rows", flush=True)


if __name__ == "__main__":
    bench_hashing()
    bench_search()
