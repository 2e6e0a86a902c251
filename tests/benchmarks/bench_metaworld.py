"""Meta-World: environment steps a second with and without pictures, in one process and in as many as there are cores, what the policy takes of an episode, and what the fifty experts reach.

    python tests/benchmarks/bench_metaworld.py [--only rates policy experts] [--save embodied_midtrain/results/metaworld-speed.json]

Rates are medians of several rounds on the mean of four tasks, one of each group, played by their experts; each process plays all tasks. The policy is the tiny backbone with an untrained head, a picture for every chunk of four actions. The experts
play five test episodes of every task: as they are, and with a gripper that is only open or closed."""
import argparse
import datetime
import json
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LP_NUM_THREADS", "1")   # Mesa's threads
import statistics
import time

import pandas as pd

from embodied_midtrain.benchmarks.base import versions
from embodied_midtrain.benchmarks.metaworld import GROUPS, Metaworld, choose_gl, evaluate_bounds, tasks_of
from embodied_midtrain.core import read_json, write_json
from embodied_midtrain.jobs import run_parallel

TASKS = ("drawer-open-v3", "hammer-v3", "assembly-v3", "stick-pull-v3")
STEPS, ROUNDS = 40, 5


def rate(size, tick=None):
    "Steps a second of the four tasks, a picture of `size` after each; 0: none. Making the simulators and the first picture are not counted."
    envs = [Metaworld(task, 1, size or 16) for task in TASKS]
    spent = []
    for env in envs:
        if size: env.render()
        start = time.perf_counter()
        for _ in range(STEPS):
            env.step(env.expert())
            if size: env.render()
        spent.append(time.perf_counter() - start)
        env.close()
    return STEPS * len(envs) / sum(spent)


def rates(size, workers):
    "Median over the rounds of the sum over processes that run at the same time."
    rounds = [sum(run_parallel({f"{size}-{i}": (rate, dict(size=size)) for i in range(workers)}, workers).values()) for _ in range(ROUNDS)]
    return {"median": statistics.median(rounds), "rounds": [min(rounds), max(rounds)]}


def share(size):
    "Seconds that simulator, pictures and policy take of an episode of 40 steps, chunks of four."
    from embodied_midtrain.actions import ActionNormaliser
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.policy import Policy   # here: the processes of the other parts need no torch
    policy = Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1,) * 6, (1,) * 6), chunk=4, head="small", hidden=256)
    env, spent = Metaworld(TASKS[0], 1, size), dict.fromkeys(("simulator", "pictures", "policy"), 0.)
    policy.act(list(env.render()), env.instructions)
    def timed(what, call):
        start = time.perf_counter()
        out = call()
        spent[what] += time.perf_counter() - start
        return out
    for _ in range(STEPS // 4):
        image = timed("pictures", env.render)
        for action in timed("policy", lambda: policy.act(list(image), env.instructions))[0]: timed("simulator", lambda: env.step(action[None]))
    env.close()
    return {what: seconds / sum(spent.values()) for what, seconds in spent.items()} | {"milliseconds": 1000 * sum(spent.values()) / STEPS}


def experts(workers):
    "Success of the experts on all tasks; random actions are left out."
    jobs = {task: (evaluate_bounds, dict(task=task, episodes=5, predictors=("expert", "decided gripper"))) for task in tasks_of("mt50")}
    table = pd.concat(run_parallel(jobs, workers, 10 * len(jobs), "experts").values())
    wide = table.groupby(["task", "predictor"])["success"].mean().unstack()
    return {predictor: {"all": wide[predictor].mean(), **{group: wide.loc[list(tasks), predictor].mean() for group, tasks in GROUPS.items()}, "below": wide[predictor][wide[predictor] < 1].to_dict()} for predictor in wide}


if __name__ == "__main__":
    parts = {"rates": lambda cores: {str(size): {str(workers): rates(size, workers) for workers in dict.fromkeys((1, cores))} for size in (0, 64, 224)},
             "policy": lambda cores: {str(size): share(size) for size in (64, 224)}, "experts": experts}
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="the other figures stay as the file has them")
    parser.add_argument("--save", help="write the figures into this JSON file")
    arguments, cores = parser.parse_args(), len(os.sched_getaffinity(0))
    found = read_json(arguments.save) if arguments.save and os.path.exists(arguments.save) else {}
    about = {"date": datetime.date.today().isoformat(), "cores": cores, "gl": choose_gl(), "versions": versions("metaworld", "mujoco", "numpy")}
    for part in arguments.only: found[part] = about | {"figures": parts[part](cores)}
    print(json.dumps(found, indent=1))
    if arguments.save: write_json(found, arguments.save)
