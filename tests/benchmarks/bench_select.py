"""The nearest K of a stream of scores against a full sort of the table, and near-duplicates by all pairs against random hyperplanes.

    python tests/benchmarks/bench_select.py [rows] [k]

The scores (100 million by default, K = 1.2 million) are invented block by block and stored nowhere; rounded, so that many tie. Each way runs in a process of its own with one thread, so that its peak memory is its own; that is
measured beyond what was in use after the imports and the first block. A full sort needs the whole table: it runs at a twentieth of the size, with a twentieth of K, beside the stream at that size, and both must keep the same samples
in the same order. Order `rising` is the worst for a stream: every row is better than all before it."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["EMT_QUIET"] = "1"
import hashlib
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embodied_midtrain.core import generator
from embodied_midtrain.keep import Distinct, hyperplanes, keep_distinct, top_k

BLOCK = 500_000


def blocks(rows, order):
    "Scores as they would come from disk, block by block."
    for at in range(0, rows, BLOCK):
        number = np.arange(at, min(at + BLOCK, rows))
        logit = number * 1e-6 if order == "rising" else generator(0, "bench", at).standard_normal(len(number)).round(4)
        ids = pc.binary_join_element_wise("web/shard-", pc.utf8_lpad(pc.cast(pa.array(number // 10_000), pa.string()), 5, "0"), "/", pc.cast(pa.array(number), pa.string()), "")
        yield pa.table({"id": pc.cast(ids, pa.large_string()), "source": pa.DictionaryArray.from_arrays(pa.array(number % 8, pa.int8()), [f"web-{i}" for i in range(8)]), "score": logit, "logit": logit})


def none(rows, k, order):
    "Only the input."
    for _ in blocks(rows, order): pass

def stream(rows, k, order): return top_k(blocks(rows, order), k, "logit")

def full_sort(rows, k, order):
    table = pa.concat_tables(blocks(rows, order)).to_pandas()
    return table.sort_values(["logit", "id"], ascending=[False, True]).head(k)


def memory(which): return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024  # Linux


def child(way, rows, k, order):
    next(blocks(BLOCK, order))
    before, start = memory("VmRSS"), time.process_time()
    kept = globals()[way](int(rows), int(k), order)
    print(time.process_time() - start, memory("VmHWM") - before, hashlib.sha256("\n".join(kept.id).encode()).hexdigest() if kept is not None else "-")


def measured(way, rows, k, order="shuffled"):
    done = subprocess.run([sys.executable, __file__, "child", way, str(rows), str(k), order], capture_output=True, text=True, check=True).stdout.split()
    print(f"{rows:>11,} rows, K {k:>9,}, {order:>8}, {way.replace('_', ' '):>9}: {float(done[0]):>6.1f} s of CPU, {float(done[1]):>6,.0f} MB beyond the imports and a block", flush=True)
    return float(done[0]), float(done[1]), done[2]


def bench_top_k(rows, k):
    (fast, small, ours), (slow, large, sorted_) = measured("stream", rows // 20, k // 20), measured("full_sort", rows // 20, k // 20)
    measured("none", rows // 20, k // 20)
    assert ours == sorted_, "the stream keeps other samples than the full sort"
    print(f"the same samples in the same order; the full sort takes {slow / fast:.1f} times as long (with the input, which both read), and {large / small:.1f} times the memory\n")
    for order in "shuffled", "rising":
        for way in "none", "stream": measured(way, rows, k, order)


def bench_distinct(k=20_000, dims=256, similarity=0.95):
    "Half of the candidates are copies of others, with noise."
    rng = generator(0, "distinct")
    x = rng.standard_normal((k, dims)).astype(np.float32)
    x = np.concatenate([x, x[rng.integers(k, size=k // 4)] + 0.2 * rng.standard_normal((k // 4, dims))])[rng.permutation(k + k // 4)].astype(np.float16)
    passed_over = {}
    for recall in 1, 0.95:
        start = time.process_time()
        _, alike, _ = keep_distinct(x, ["web"] * len(x), len(x), Distinct(None, np.zeros(dims), similarity, recall))
        passed_over[recall] = len(alike)
        how = "all pairs" if recall == 1 else "{} hyperplanes in {} tables, recall {:.3f} at the threshold".format(*hyperplanes(similarity, recall, len(x)))
        print(f"{len(x):,} candidates x {dims}, similarity {similarity}, {how}: {time.process_time() - start:.1f} s of CPU, {len(alike):,} passed over", flush=True)
    print(f"of those that all pairs find, hyperplanes find {passed_over[0.95] / passed_over[1]:.3f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]: child(*sys.argv[2:])
    else:
        bench_top_k(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000_000, int(sys.argv[2]) if len(sys.argv) > 2 else 1_200_000)
        bench_distinct()
