"Closed-loop evaluation: however episodes are played, the same things happen in them."
import asyncio, inspect, types

import numpy as np
import pandas as pd
import pytest
import vla_eval
from vla_eval import specs
from vla_eval.benchmarks import base as harness

from embodied_midtrain.benchmarks import tabletop
from embodied_midtrain.benchmarks.base import Expert, Filmed, RandomActions, StepResult, plot_films, run_episodes
from embodied_midtrain.benchmarks.tabletop import Checkpoint, TabletopBenchmark, evaluate, evaluate_all, find_policies, last_rates, only, test_episodes as fixed_episodes
from embodied_midtrain.core import Stage, file_hash, read_manifest, write_json
from embodied_midtrain.serve import policy_server
from embodied_midtrain.tabletop.tasks import TASKS, Tabletop

COUNT = 16


class Reflex:
    "A deterministic predictor: a fixed random function of picture and instruction, in chunks of three."
    def __init__(self, seed=0):
        self.weights, self.calls = np.random.default_rng(seed).normal(0, .03, (16 * 16 * 3, 21)), []

    def act(self, images, instructions):
        self.calls.append(len(images))
        pixels = np.stack(images)[:, ::4, ::4].reshape(len(images), -1).astype(float)
        words = np.array([[len(text)] for text in instructions])
        return np.tanh((pixels - pixels.mean(1, keepdims=True)) @ self.weights + .01 * words).reshape(-1, 3, 7)


def together(task, predictor, execute=0, batch_size=256):
    env = fixed_episodes(task, COUNT)
    return list(run_episodes(env, predictor(env), execute, batch_size)[["success", "steps"]].itertuples(index=False, name=None))


def one_by_one(task, predictor, execute=3):
    "Through the methods of vla-eval's StepBenchmark, as its runner calls them."
    benchmark, rows = TabletopBenchmark([task], COUNT), []
    for episode in range(COUNT):
        described = {**benchmark.get_tasks()[0], "episode_idx": episode}
        seen, plan, over = benchmark.make_obs(benchmark.reset(described), described), [], False
        while not over:
            if not plan: plan = list(predictor(benchmark.env).act([seen["images"]["camera"]], [seen["task_description"]])[0][:execute])
            result = benchmark.step({"actions": plan.pop(0)})
            seen, over = benchmark.make_obs(result.obs, described), benchmark.check_done(result)
        rows.append((benchmark.get_step_result(result)["success"], result.info["steps"]))
    return rows


# ---- the two ways of playing

@pytest.mark.parametrize("task", TASKS)
def test_both_ways_of_playing_agree_on_every_episode(task):
    assert together(task, Expert) == one_by_one(task, Expert)
    assert together(task, lambda env: Reflex()) == one_by_one(task, lambda env: Reflex())


@pytest.mark.parametrize("execute", [1, 2])
def test_both_ways_agree_when_a_chunk_is_cut_short(execute):
    assert together("reach", lambda env: Reflex(), execute) == one_by_one("reach", lambda env: Reflex(), execute)


def test_a_vla_plays_the_same_alone_and_together():
    "Padding and company do not change what a policy does: the tiny backbone with a fresh head."
    import torch
    from embodied_midtrain.actions import ActionNormaliser
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.policy import Policy
    torch.manual_seed(0)
    policy = Policy(load_backbone("tiny"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=3).eval()
    assert together("reach", lambda env: policy) == one_by_one("reach", lambda env: policy)


def test_batch_size_changes_nothing():
    assert together("reach", lambda env: Reflex(), batch_size=5) == together("reach", lambda env: Reflex())


def test_only_live_episodes_are_paid_for():
    reflex = Reflex()
    env = fixed_episodes("reach", COUNT)
    played = run_episodes(env, reflex, execute=1)
    assert reflex.calls[0] == COUNT and sum(reflex.calls) == played["steps"].sum()
    assert len(reflex.calls) == TASKS["reach"].steps == played.loc[~played["success"], "steps"].unique()


# ---- the episodes

def test_test_episodes_are_fixed_and_nobody_trains_on_them():
    a, b = fixed_episodes("reach", COUNT).render(), fixed_episodes("reach", COUNT).render()
    assert (a == b).all()
    seen = {image.tobytes() for seed in range(20) for image in Tabletop("reach", seed, COUNT).render()}
    assert not seen & {image.tobytes() for image in a}


def test_some_episodes_are_a_world_of_their_own():
    env = fixed_episodes("push", COUNT)
    before, part = env.render(), only(env, [5, 2])
    assert part.instructions == [env.instructions[i] for i in (5, 2)]
    run_episodes(part, Expert(part))
    assert part.done.all() and not env.steps.any() and (env.render() == before).all()


def test_expert_is_a_ceiling_and_random_actions_are_a_floor():
    for task in TASKS:
        expert, chance = (pd.DataFrame(together(task, p)).iloc[:, 0].mean() for p in (Expert, lambda env: RandomActions()))
        assert expert > .95 > .5 > chance


# ---- a benchmark of vla-eval like any other

def through_vla_eval(tasks, predictor, folder, execute=0, batch=32):
    "task -> [(success, steps)] as its harness plays them, against a served predictor."
    entry = dict(benchmark="embodied_midtrain.benchmarks.tabletop:TabletopBenchmark", name="tabletop", episodes_per_task=COUNT, params=dict(tasks=list(tasks), episodes=COUNT))
    results = vla_eval.evaluate(policy_server(predictor, execute=execute, batch=batch), dict(benchmarks=[entry], render="cpu"), output_dir=folder, docker=False)
    return {task["task"]: [(episode["metrics"]["success"], episode["steps"]) for episode in sorted(task["episodes"], key=lambda e: e["episode_id"])] for task in results[0]["tasks"]}


class Memory:
    """Does what the expert did when it saw the same picture, in two of three episodes; in the others, and before pictures it never saw, it keeps still."""
    def __init__(self):
        self.done = {}
        for task in TASKS:
            env = fixed_episodes(task, COUNT)
            while env.live.any():
                actions, live = env.expert(), np.flatnonzero(env.live)
                for i, image in zip(live, env.render(live)):
                    if i % 3: self.done[image.tobytes(), env.instructions[i]] = actions[i]
                env.step(actions)

    def act(self, images, instructions):
        return np.stack([self.done.get((image.tobytes(), text), np.float32([0, 0, 0, 0, 0, 0, 1])) for image, text in zip(images, instructions)])[:, None]


def test_the_harness_tells_success_from_failure_on_every_task(tmp_path):
    "A third of the episodes fails, the others succeed: each of them, on both ways."
    memory = Memory()
    played = through_vla_eval(TASKS, memory, tmp_path)
    assert played == {task: together(task, lambda env: memory) for task in TASKS}
    for task, episodes in played.items(): assert [success for success, _ in episodes] == [bool(i % 3) for i in range(COUNT)], task


@pytest.mark.parametrize("execute", [0, 2])
def test_the_harness_gives_the_same_success_for_every_episode(execute, tmp_path):
    played = through_vla_eval(TASKS, Reflex(), tmp_path, execute)
    assert played == {task: together(task, lambda env: Reflex(), execute) for task in TASKS}


def test_the_harness_gives_a_vla_the_same_success_for_every_episode(tmp_path):
    "The trained weights' shape, not their skill: the tiny backbone with a fresh head, asked for one picture at a time by the harness."
    import torch
    from embodied_midtrain.actions import ActionNormaliser
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.policy import Policy
    torch.manual_seed(0)
    policy = Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=3).eval()
    assert through_vla_eval(["reach"], policy, tmp_path) == {"reach": together("reach", lambda env: policy)}


def public(cls): return {name for name, value in vars(cls).items() if callable(value) or isinstance(value, classmethod) if not name.startswith("_")}


def test_methods_are_those_of_vla_eval():
    "It asks for methods, not for a base class: all of them are there, with the parameters that it hands over."
    for name in public(harness.Benchmark) | public(harness.StepBenchmark):
        theirs, ours = (list(inspect.signature(getattr(c, name)).parameters) for c in (harness.StepBenchmark, TabletopBenchmark))
        assert ours == theirs, name
        assert inspect.iscoroutinefunction(getattr(harness.StepBenchmark, name)) == inspect.iscoroutinefunction(getattr(TabletopBenchmark, name)), name
    assert {f for f in StepResult.__dataclass_fields__} == {f for f in harness.StepResult.__dataclass_fields__}


def test_specs_are_readable_by_vla_eval():
    read = {name: specs.DimSpec.from_dict(spec) for name, spec in TabletopBenchmark().get_action_spec().items()}
    assert not specs.check_specs(read, {"position": specs.POSITION_DELTA, "rotation": specs.ROTATION_EULER, "gripper": specs.GRIPPER_01}, {}, {})


def test_vla_evals_own_bridge_plays_an_episode():
    "Mixed with its StepBenchmark, the class is one of its benchmarks by name too; what it films is every picture of the episode."
    class Bridged(TabletopBenchmark, harness.StepBenchmark): pass

    class Recorder:
        frames = []
        def record_video(self, frame): self.frames.append(frame)

    async def play(benchmark):
        await benchmark.start_episode({**benchmark.get_tasks()[0], "episode_idx": 3}, Recorder())
        while not await benchmark.is_done():
            assert set(await benchmark.get_observation()) == {"images", "task_description"}
            await benchmark.apply_action({"actions": benchmark.env.expert()[0]})
        return await benchmark.get_result(), int(benchmark.env.steps[0])

    result, steps = asyncio.run(play(Bridged(["reach"], COUNT)))
    assert result == {"success": True} and len(Recorder.frames) == steps + 1 and (Recorder.frames[0] == fixed_episodes("reach", COUNT).render()[3]).all()


# ---- bad input

def test_unknown_tasks_are_named():
    with pytest.raises(ValueError, match="did you mean 'reach'"): TabletopBenchmark(["raech"])
    with pytest.raises(ValueError, match="did you mean 'reach'"): fixed_episodes("raech")
    with pytest.raises(ValueError, match="unknown suite 'Z'"): TabletopBenchmark(suite="Z")


@pytest.mark.parametrize("actions, message", [(np.zeros((COUNT, 7)), "shape"), (np.zeros((COUNT, 1, 6)), "shape"), (np.full((COUNT, 1, 7), np.nan), "not finite")])
def test_broken_predictors_are_told(actions, message):
    with pytest.raises(ValueError, match=message):
        run_episodes(fixed_episodes("reach", COUNT), types.SimpleNamespace(act=lambda images, instructions: actions))


# ---- the stage

@pytest.fixture
def run(tmp_path):
    "A run with two trained policies; their weights are a seed, their policy a Reflex."
    with Stage(tmp_path, "policy", {"demos": {"reach": {}}, "arms": ["base", "proximity"], "seeds": [0]}) as stage:
        for arm, seed in (("base", 0), ("proximity", 1), ("left over", 2)): write_json(seed, stage.path / f"reach/{arm}-0/step-100/weights.json")
    loaded = []
    def load_policy(folder):
        loaded.append(folder.parent.name)
        return Reflex(int((folder / "weights.json").read_text()))
    return types.SimpleNamespace(path=tmp_path, loaded=loaded, play=lambda: evaluate_all(find_policies(tmp_path / "policy"), tmp_path, {"episodes": COUNT}, workers=1, load=load_policy))


def test_every_row_says_where_it_comes_from(run):
    table = run.play()
    assert table.columns.tolist() == ["benchmark", "task", "arm", "seed", "step", "episode", "success", "steps", "policy_hash", "versions"]
    assert len(table) == 2 * COUNT and table["policy_hash"].nunique() == 2 and table["versions"].str.contains("embodied-midtrain").all()


def test_what_was_played_is_not_played_again(run):
    first = run.play()
    assert run.play().equals(first) and run.loaded == ["base-0", "proximity-0"]


def test_retrained_weights_are_played_again(run):
    first = run.play()
    write_json(2, run.path / "policy/reach/base-0/step-100/weights.json")
    assert not run.play().equals(first) and run.loaded == ["base-0", "proximity-0", "base-0"]


def test_an_interrupted_evaluation_resumes_and_equals_a_whole_one(run, monkeypatch):
    def interrupted(checkpoint, *rest, **how):
        if checkpoint.arm == "proximity": raise KeyboardInterrupt
        return evaluate(checkpoint, *rest, **how)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(tabletop, "evaluate", interrupted)
        run.play()
    done = run.path / "benchmarks/reach/base-0/step-100/episodes.parquet"
    before = file_hash(done)
    table = run.play()
    assert len(table) == 2 * COUNT and file_hash(done) == before and run.loaded.count("base-0") == 1
    assert read_manifest(run.path / "benchmarks/reach/proximity-0/step-100")["counts"]["episodes"] == COUNT


def test_an_untrained_policy_is_an_error(run):
    (run.path / "policy/manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="policy.*not finished"): find_policies(run.path / "policy")


def test_policies_for_other_robots_are_not_for_the_tabletop(run):
    with Stage(run.path, "policy", {"demos": {"bridge": {}}, "arms": ["base"], "seeds": [0]}): pass
    with pytest.raises(FileNotFoundError, match="run for bridge"): find_policies(run.path / "policy")


def test_films_show_a_success_and_a_failure():
    played = evaluate(Checkpoint("reach", "base", 0, 1, None), Reflex(), episodes=COUNT)
    assert played["success"].nunique() == 2
    filmed = tabletop.film_policy(Reflex(), played)
    assert sorted(filmed.done) == [False, True]
    figure = plot_films([(filmed, "reflex")])
    assert [ax.get_title(loc="left") for ax in figure.axes[::7]] == filmed.instructions
    assert isinstance(filmed, Filmed)


def test_a_short_episode_is_shown_once_and_the_rest_of_its_row_is_empty():
    env = Filmed(only(fixed_episodes("reach", COUNT), [0]), [0])
    run_episodes(env, Expert(env))
    assert 0 < env.steps[0] < 20
    row = plot_films([(env, "expert")], columns=20).axes
    assert [ax.get_xlabel() for ax in row if ax.axison] == [f"step {t}" for t in range(env.steps[0] + 1)]


def test_the_last_checkpoint_is_told_beside_floor_and_ceiling():
    table = pd.DataFrame([("reach", arm, step, step == 2 and i < hits) for arm, hits in (("base", 1), ("proximity", 3)) for step in (1, 2) for i in range(4)], columns=["task", "arm", "step", "success"])
    bounds = pd.DataFrame(dict(task="reach", predictor=["expert"] * 2 + ["random actions"] * 2, success=[True, True, True, False]))
    assert last_rates(table, bounds) == ["reach at step 2: base 25.0%, proximity 75.0%, expert 100.0%, random actions 50.0%; below random actions: base"]
