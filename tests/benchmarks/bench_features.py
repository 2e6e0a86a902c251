"""Features against the naive way: one sample at a time through the full model, logits and all.

    python tests/benchmarks/bench_features.py

Both ways run in turn, several times, in one process with one thread; printed are medians, their ratio, and the share of the time that the forward pass alone takes: the work's own limit."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import statistics
import time

import torch

from embodied_midtrain.backbone import load_backbone
from embodied_midtrain.features import extract
from embodied_midtrain.tabletop.pool import tabletop_pool
from embodied_midtrain.sources.base import open_sources

COUNT, ROUNDS = 512, 5


@torch.inference_mode()
def naive(backbone, samples):
    "What a first script does."
    return [backbone.model(**backbone.batch([s]), output_hidden_states=True).hidden_states[-1][0, -1] for s in samples]


@torch.inference_mode()
def forward_alone(backbone, samples):
    "The model's part of the work, on inputs that are ready."
    batches = [backbone.batch(samples[i:i + 128]) for i in range(0, len(samples), 128)]
    start = time.perf_counter()
    for batch in batches: backbone.hidden(batch)
    return time.perf_counter() - start


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main():
    backbone = load_backbone("tiny", device="cpu")
    samples = [s for source in open_sources(tabletop_pool(COUNT)) for s in source]
    extract(backbone, samples[:128]), naive(backbone, samples[:8])   # warm
    rounds = [(seconds(lambda: extract(backbone, samples)), seconds(lambda: naive(backbone, samples)), forward_alone(backbone, samples)) for _ in range(ROUNDS)]
    ours, plain, model = (statistics.median(column) for column in zip(*rounds))
    print(f"{len(samples)} samples, one thread, median of {ROUNDS}: extract {len(samples) / ours:.0f}/s, naive {len(samples) / plain:.0f}/s, "
          f"ratio {plain / ours:.1f} (each round: {', '.join(f'{b / a:.1f}' for a, b, _ in rounds)}); the forward pass alone is {model / ours:.0%} of extract")


if __name__ == "__main__": main()
