"""Episodes per second on the tabletop, four ways with one policy, in one run:  python tests/benchmarks/bench_tabletop.py [file.json]

The policy is the tiny backbone with a fresh head of the micro profile's size, chunks of four: its episodes mostly run to the end of their steps. On one thread, and on as many as torch takes by itself. `together`: all episodes stepped
together, one batched forward pass (`run_episodes`). `loop`: one environment as simulators are, whose every step gives a picture, and one forward pass a chunk. `one by one`: `run_episodes` on one episode after the other, which draws
only the pictures that the policy asks for. `vla-eval`: served over a socket, played by vla-eval in a process of its own, recorded, without videos (its start, some seconds, counts). Only the episodes of `loop` and `vla-eval` are made
while the clock runs. Seconds are medians over the rounds: by the clock, and of the processor (with those of processes started), which other work on the machine changes less. `times_loop` is by the clock. `forward`: the share of the
processor's seconds in the model's own forward pass. Every way has to end every episode alike, or the figures are not written."""
import datetime
import os
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
from embodied_midtrain.benchmarks.tabletop import TabletopBenchmark, only, test_episodes
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


class Forward:
    "Seconds of the processor inside the model."
    def __init__(self, model):
        self.seconds = 0.
        model.register_forward_pre_hook(lambda *_: setattr(self, "seconds", self.seconds - time.process_time()))
        model.register_forward_hook(lambda *_: setattr(self, "seconds", self.seconds + time.process_time()))


def together(policy, task):
    env = test_episodes(task, EPISODES)
    return timed(lambda: run_episodes(env, policy)[["success", "steps"]].values.tolist())


def one_by_one(policy, task):
    whole = test_episodes(task, EPISODES)
    alone = [only(whole, [i]) for i in range(ALONE)]
    return timed(lambda: [run_episodes(env, policy)[["success", "steps"]].values.tolist()[0] for env in alone])


def play(env, policy, task, episode):
    "One episode, as simulators are played."
    seen, actions = env.make_obs(env.reset({"name": task, "episode_idx": episode}), {}), []
    while True:
        actions = actions or list(policy.act([seen["images"]["camera"]], [seen["task_description"]])[0])
        result = env.step({"actions": actions.pop(0)})
        if env.check_done(result): return [env.get_step_result(result)["success"], result.info["steps"]]
        seen = env.make_obs(result.obs, {})


def loop(policy, task):
    env = TabletopBenchmark([task], EPISODES)
    env.reset({"name": task})   # makes all test episodes
    return timed(lambda: [play(env, policy, task, i) for i in range(ALONE)])


def through_vla_eval(policy, task, folder):
    benchmark = benchmark_of("tabletop", HARNESS, [task])
    with tempfile.TemporaryDirectory() as run:
        stage, clock, cpu = timed(lambda: evaluate(folder, benchmark, run, workers=1, videos=0, load=lambda folder: policy, label="loaded"))
        return read_table(stage.file("episodes.parquet"))[["success", "steps"]].values.tolist(), clock, cpu


def measure(policy, task, folder, forward, threads):
    torch.set_num_threads(threads)
    ways = {"together": (EPISODES, lambda: together(policy, task)), "loop": (ALONE, lambda: loop(policy, task)), "one by one": (ALONE, lambda: one_by_one(policy, task)), "vla-eval": (HARNESS, lambda: through_vla_eval(policy, task, folder))}
    found, rows = {}, {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, (count, way) in ways.items():
            forward.seconds = 0.
            found[name], clock, cpu = way()
            rows[name].append((clock / count, cpu / count, forward.seconds / count))
    for name in "loop", "one by one": assert found[name] == found["together"][:ALONE], f"an episode ends otherwise in {name} than in company"
    assert found["vla-eval"] == run_episodes(test_episodes(task, HARNESS), policy)[["success", "steps"]].values.tolist(), "an episode ends otherwise in the harness"
    median = {name: [statistics.median(part) for part in zip(*rows[name])] for name in ways}
    return [dict(threads=threads, task=task, way=name, episodes=ways[name][0], episodes_per_second=1 / clock, episodes_per_processor_second=1 / cpu, forward=inside / cpu, steps=float(np.mean([steps for _, steps in found[name]])),
                 times_loop=median["loop"][0] / clock) for name, (clock, cpu, inside) in median.items()]


def main(file=None):
    policy = Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=4, head="small", hidden=256).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_policy(policy, f"{folder}/policy")
        forward = Forward(policy.vlm.base_model)
        together(policy, "reach")   # warm
        rows = [row for threads in sorted({1, torch.get_num_threads()}) for task in TASKS for row in measure(policy, task, f"{folder}/policy", forward, threads)]
    for row in rows: print("{threads} threads {task:6} {way:11} {episodes_per_second:8.1f} episodes/s, {episodes_per_processor_second:8.1f} per second of the processor ({forward:.0%} in the model), {times_loop:.1f} x the loop".format(**row))
    if file: write_json(dict(date=datetime.date.today().isoformat(), device="CPU", policy="tiny backbone, fresh head, chunks of 4", rounds=ROUNDS, torch=torch.__version__, ways=rows), file)


if __name__ == "__main__": main(*sys.argv[1:])
