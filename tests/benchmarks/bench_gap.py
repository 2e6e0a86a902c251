"""The 11 x 11 matrix of squared MMD against the naive way: for every pair, stack both sets and compute their full kernel block in float64.

    python tests/benchmarks/bench_gap.py [--samples 2000] [--dims 1024] [--rounds 3]

Both ways run in turn, several times, in one process with one thread, on the same float32 features and bandwidth; printed are medians, by the clock and in processor time (which others at work on the machine disturb less), their ratios,
and the largest difference of the matrices. Then, once: the same matrix with 200
bootstrap draws and 500 permutations, by sample and with episodes of three to seven samples drawn and shuffled whole, and by random Fourier features with its error. Peak extra memory is what NumPy and Python allocate beyond the features (tracemalloc), in rounds of their own, since tracing costs time."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import argparse, statistics, time, tracemalloc
from functools import partial

import numpy as np

from embodied_midtrain.core import generator
from embodied_midtrain.gap import exact_sums, fourier_sums, median_bandwidth, mmd_matrix, mmd_pairs


def features(samples, dims):
    "Eleven clouds with means of their own and a common offset, float32."
    offset = 10 * generator(0, "bench", "offset").normal(size=dims)
    return {f"dataset {i}": (offset + i / 20 + generator(0, "bench", i).normal(size=(samples, dims))).astype(np.float32) for i in range(11)}


def naive(groups, sigma):
    "What a first script does."
    names = list(groups)
    matrix = np.zeros((len(names), len(names)))
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            n, both = len(groups[a]), np.concatenate([groups[a], groups[b]]).astype(np.float64)
            norms = (both**2).sum(1)
            k = np.exp(-np.maximum(norms[:, None] + norms - 2 * both @ both.T, 0) / (2 * sigma**2))
            aa, bb, ab = k[:n, :n], k[n:, n:], k[:n, n:]
            matrix[i, j] = matrix[j, i] = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (n * (n - 1)) - 2 * ab.mean()
    return matrix


def timed(function):
    "Seconds by the clock, seconds of processor time, and what came out."
    start = time.perf_counter(), time.process_time()
    result = function()
    return time.perf_counter() - start[0], time.process_time() - start[1], result


def peak(function):
    "Megabytes allocated at most while it runs, beyond what was there."
    tracemalloc.start()
    function()
    extra = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return extra


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in ("samples", 2000), ("dims", 1024), ("rounds", 3): parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    groups = features(options.samples, options.dims)
    sigma = median_bandwidth(np.concatenate(list(groups.values())))
    on_cpu = partial(exact_sums, xp=np)  # with a GPU it would not be a comparison of two ways on one machine
    ours = lambda: mmd_matrix(groups, sigma, sums=on_cpu)
    full = lambda: mmd_pairs(groups, sigma, 200, 500, sums=on_cpu)
    fourier = partial(mmd_matrix, groups, sigma, sums=partial(fourier_sums, frequencies=2048))
    rounds = [(timed(ours), timed(partial(naive, groups, sigma))) for _ in range(options.rounds)]
    matrix, by_hand, off = rounds[0][0][2].to_numpy(), rounds[0][1][2], ~np.eye(11, dtype=bool)
    print(f"11 x {options.samples} samples of {options.dims} dimensions, float32, one thread, median of {options.rounds}; largest difference {np.abs(matrix - by_hand)[off].max():.0e} of {matrix.max():.2f}")
    for i, measure in enumerate(("by the clock", "processor time")):
        fast, slow = (statistics.median(r[way][i] for r in rounds) for way in (0, 1))
        print(f"{measure}: ours {fast:.2f} s, naive {slow:.2f} s, ratio {slow / fast:.1f} (each round: {', '.join(f'{b[i] / a[i]:.1f}' for a, b in rounds)})")
    episodes = {name: np.repeat(np.arange(options.samples), 3 + generator(0, name).integers(5, size=options.samples))[:options.samples] for name in list(groups)[-3:]}
    for way, units in {"by sample": None, "three datasets in episodes": episodes}.items():
        clock, seconds, _ = timed(partial(mmd_pairs, groups, sigma, 200, 500, sums=on_cpu, units=units))
        print(f"with 200 bootstrap draws and 500 permutations, {way}: {clock:.2f} s, processor time {seconds:.2f} s")
    clock, seconds, estimate = timed(fourier)
    print(f"2,048 Fourier frequencies: {clock:.2f} s, processor time {seconds:.2f} s, largest error {np.abs(estimate.to_numpy() - matrix)[off].max():.0e}")
    print(f"peak extra memory beyond {sum(x.nbytes for x in groups.values()) / 1e6:.0f} MB of features: ours {peak(ours):.0f} MB, with draws and permutations {peak(full):.0f} MB, Fourier {peak(fourier):.0f} MB")


if __name__ == "__main__": main()
