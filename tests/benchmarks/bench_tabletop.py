"""Episodes per second on the tabletop, three ways with one policy, in one run:  python tests/benchmarks/bench_tabletop.py [file.json]

The policy is the tiny backbone with a fresh head of the micro profile's size, chunks of four: its episodes mostly run to the end of their steps. One thread each. `together`: all episodes stepped together, one batched forward
pass (`run_episodes`). `one by one`: the same function on one environment after the other. `vla-eval`: served over a socket, played by vla-eval in a process of its own, recorded, without videos (its start, some seconds, counts).
In the first two the episodes are made before the clock starts. Seconds are medians over the rounds: by the clock, and of the processor (with those of processes started), which other work on the machine changes less.
Every way has to end every episode alike, or the figures are not written."""
import datetime
import os
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["EMT_QUIET"] = "1"
import statistics
import sys
import tempfile
import time

import numpy as np
import torch

from embodied_midtrain.actions import ActionNormaliser
from embodied_midtrain.backbone import load_backbone
from embodied_midtrain.benchmarks.base import run_episodes
from embodied_midtrain.benchmarks.tabletop import only, test_episodes
from embodied_midtrain.core import read_table, write_json
from embodied_midtrain.evaluate import benchmark_of, evaluate
from embodied_midtrain.policy import Policy, save_policy

EPISODES, ALONE, HARNESS, ROUNDS, TASKS = 300, 40, 60, 5, ("reach", "put")


def processor(): return sum(os.times()[:4])


def timed(play):
    "Result, seconds by the clock, seconds of the processor."
    clock, cpu = time.perf_counter(), processor()
    played = play()
    return played, time.perf_counter() - clock, processor() - cpu


def together(policy, task):
    env = test_episodes(task, EPISODES)
    return timed(lambda: run_episodes(env, policy)[["success", "steps"]].values.tolist())


def one_by_one(policy, task):
    whole = test_episodes(task, EPISODES)
    alone = [only(whole, [i]) for i in range(ALONE)]
    return timed(lambda: [run_episodes(env, policy)[["success", "steps"]].values.tolist()[0] for env in alone])


def through_vla_eval(policy, task, folder):
    benchmark = benchmark_of("tabletop", HARNESS, [task])
    with tempfile.TemporaryDirectory() as run:
        stage, clock, cpu = timed(lambda: evaluate(folder, benchmark, run, workers=1, videos=0, load=lambda folder: policy))
        return read_table(stage.file("episodes.parquet"))[["success", "steps"]].values.tolist(), clock, cpu


def measure(policy, task, folder):
    ways = {"together": (EPISODES, lambda: together(policy, task)), "one by one": (ALONE, lambda: one_by_one(policy, task)), "vla-eval": (HARNESS, lambda: through_vla_eval(policy, task, folder))}
    found, rows = {}, {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (count, way) in ways.items():
            found[name], clock, cpu = way()
            rows[name].append((clock / count, cpu / count))
    assert found["one by one"] == found["together"][:ALONE], "an episode ends otherwise alone than in company"
    assert found["vla-eval"] == run_episodes(test_episodes(task, HARNESS), policy)[["success", "steps"]].values.tolist(), "an episode ends otherwise in the harness"
    return [dict(task=task, way=name, episodes=ways[name][0], **dict(zip(("episodes_per_second", "episodes_per_processor_second"), (1 / statistics.median(part) for part in zip(*rows[name])))),
                 steps=float(np.mean([steps for _, steps in found[name]]))) for name in ways]


def main(file=None):
    torch.set_num_threads(1)
    policy = Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=4, head="small", hidden=256).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, f"{folder}/policy")
        together(policy, "reach")   # warm
        rows = [row for task in TASKS for row in measure(policy, task, f"{folder}/policy")]
    for task in TASKS:
        part = {row["way"]: row for row in rows if row["task"] == task}
        for row in part.values(): row["times_one_by_one"] = row["episodes_per_processor_second"] / part["one by one"]["episodes_per_processor_second"]
    for row in rows: print("{task:6} {way:11} {episodes_per_second:8.1f} episodes/s, {episodes_per_processor_second:8.1f} per second of the processor, {times_one_by_one:.1f} x one by one".format(**row))
    if file: write_json(dict(date=datetime.date.today().isoformat(), device="one thread of a CPU", policy="tiny backbone, fresh head, chunks of 4", rounds=ROUNDS, torch=torch.__version__, ways=rows), file)


if __name__ == "__main__": main(*sys.argv[1:])
