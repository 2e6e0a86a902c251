"Evaluating policies through vla-eval: the same episodes as in process, resumed, in another Python, with everything in its rows."
import json, os, re, signal, sqlite3, subprocess, sys, sysconfig, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embodied_midtrain import evaluate as module
from embodied_midtrain.benchmarks.base import run_episodes
from embodied_midtrain.benchmarks.tabletop import TabletopBenchmark, test_episodes as fixed_episodes
from embodied_midtrain.core import folder_hash, read_json, read_table, write_json
from embodied_midtrain.evaluate import BENCHMARKS, Benchmark, Starts, axis_angle, benchmark_of, calvin_units, configuration, evaluate as evaluate_with, gripper_closes, keep_videos, need_benchmark, play, probe, same_starts, success_table, told

COUNT = 10


class Reflex:
    "A fixed random function of the picture, in chunks of three."
    def __init__(self, seed, seconds=0.0): self.weights, self.asked, self.seconds = np.random.default_rng(seed).normal(0, .03, (16 * 16 * 3, 21)), 0, seconds

    def act(self, images, instructions):
        self.asked += len(images)
        time.sleep(self.seconds)
        pixels = np.stack(images)[:, ::4, ::4].reshape(len(images), -1).astype(float)
        return np.tanh((pixels - pixels.mean(1, keepdims=True)) @ self.weights).reshape(-1, 3, 7)


def load(folder): return Reflex(json.loads((Path(folder) / "policy.json").read_text()))


def evaluate(*args, label="reflex", **how): return evaluate_with(*args, label=label, **how)


@pytest.fixture
def policy(tmp_path):
    "Makes folders of policies whose weights are a seed."
    def make(arm="base", seed=0, run=""):
        folder = tmp_path / run / f"policy/reach/{arm}-0/step-9"
        write_json(seed, folder / "policy.json")
        return folder
    return make


def tabletop(episodes=COUNT, tasks=("reach",), **params): return benchmark_of("tabletop", episodes, list(tasks), params)


def rows(stage): return read_table(stage.file("episodes.parquet"))


# ---- the same as in process

@pytest.mark.parametrize("execute", [0, 2])
def test_every_episode_ends_as_in_process(policy, tmp_path, execute):
    table = rows(evaluate(policy(), tabletop(tasks=("reach", "lift")), tmp_path, workers=2, videos=0, execute=execute, load=load))
    for task in ("reach", "lift"):
        ours = run_episodes(fixed_episodes(task, COUNT), Reflex(0), execute)
        theirs = table[table["task"] == task]
        assert theirs["episode"].tolist() == list(range(COUNT)) and theirs["success"].tolist() == ours["success"].tolist() and theirs["steps"].tolist() == ours["steps"].tolist()


def test_a_row_says_what_it_is(policy, tmp_path):
    table = rows(evaluate(policy("proximity", 1), tabletop(), tmp_path, videos=0, load=load))
    assert table.columns.tolist()[:8] == ["benchmark", "task", "arm", "seed", "step", "episode", "entry", "task_index"] and len(table) == COUNT
    first = table.iloc[0]
    assert (first["benchmark"], first["task"], first["arm"], first["seed"], first["step"]) == ("tabletop", "reach", "proximity", 0, 9)
    assert first["policy_hash"] == folder_hash(policy("proximity", 1)) and re.fullmatch("[0-9a-f]{16}", first["benchmark_hash"]) and "vla-eval 0.8" in first["versions"] and "torch" in first["policy_versions"]
    assert first["instruction"] == fixed_episodes("reach", COUNT).instructions[0] and table["start"].nunique() == COUNT


def test_arms_meet_the_same_initial_states_and_it_is_said(policy, tmp_path):
    stages = [evaluate(policy(arm, seed), tabletop(), tmp_path, videos=0, load=load) for arm, seed in (("base", 0), ("proximity", 1))]
    both = pd.concat(map(rows, stages))
    assert same_starts(both) and both["policy_hash"].nunique() == 2 and "all policies met the same initial states" in told(stages)
    other = evaluate(policy("proximity", 1), tabletop(suite="B"), tmp_path, videos=0, load=load)
    assert not same_starts(pd.concat([rows(stages[0]), rows(other)]))


# ---- told apart

def test_policies_of_two_runs_keep_their_own_results(policy, tmp_path):
    "Of the same arm, seed and step, in one folder of results."
    one, other = [evaluate(policy(seed=seed, run=f"run{seed}"), tabletop(), tmp_path, videos=0, load=load) for seed in (0, 1)]
    assert one.done and other.done and one.path != other.path and rows(one)["policy_hash"][0] != rows(other)["policy_hash"][0]
    table = success_table(pd.concat([rows(one), rows(other)]))
    assert table["episodes"].tolist() == [COUNT, COUNT] and [re.search("run[01]", name)[0] for name in table["policy"]] == ["run0", "run1"]
    assert table["success"].tolist() == [100 * rows(stage)["success"].mean() for stage in (one, other)]


def test_a_quick_look_leaves_the_finished_result_where_it_is(policy, tmp_path):
    whole = evaluate(policy(), tabletop(), tmp_path, videos=0, load=load)
    quick = evaluate(policy(), tabletop(4), tmp_path, videos=0, load=load)
    assert whole.done and quick.done and (len(rows(whole)), len(rows(quick))) == (COUNT, 4)


def test_a_policy_named_twice_counts_once(policy, tmp_path):
    stage = evaluate(policy(), tabletop(4), tmp_path, videos=0, load=load)
    assert told([stage, stage]) == told([stage])


def test_policies_that_differ_in_one_thing_are_told_apart_by_it():
    row = dict(arm="a", seed=0, step=3, policy="x", label="", execute=4, policy_hash="h", task="t", success=True)
    def names(**other): return success_table(pd.DataFrame([row, row | other]))["policy"].tolist()
    assert names() == ["a-0 step 3"] and names(seed=1) == ["a-0 step 3", "a-1 step 3"]
    assert names(policy="y", policy_hash="i") == ["a-0 step 3, policy x", "a-0 step 3, policy y"]
    assert names(policy_hash="i") == ["a-0 step 3, hash h", "a-0 step 3, hash i"] and names(execute=2) == ["a-0 step 3, execute 4", "a-0 step 3, execute 2"]
    assert names(label="bfloat16") == ["a-0 step 3, label ", "a-0 step 3, label bfloat16"]


def test_what_load_makes_is_part_of_what_was_asked(policy, tmp_path):
    with pytest.raises(ValueError, match="wants a label"): evaluate_with(policy(), tabletop(4), tmp_path, load=load)
    half = lambda folder: Reflex(1)
    one, other = evaluate(policy(), tabletop(), tmp_path, videos=0, load=load), evaluate(policy(), tabletop(), tmp_path, videos=0, load=half, label="half")
    assert one.path != other.path and rows(other)["label"].unique().tolist() == ["half"] and rows(other)["steps"].tolist() == run_episodes(fixed_episodes("reach", COUNT), Reflex(1))["steps"].tolist()


def test_actions_really_carried_out_stand_in_the_rows(policy, tmp_path):
    "Chunks of three, of which two, all, or ten are asked for; the last cannot be, and it is said."
    stages = {execute: evaluate(policy(), tabletop(4), tmp_path, videos=0, execute=execute, load=load) for execute in (2, 0, 10)}
    assert {execute: rows(stage)["execute"].unique().tolist() for execute, stage in stages.items()} == {2: [2], 0: [3], 10: [3]}
    assert ["NOT the protocol" in told([stage]) for stage in stages.values()] == [False, False, True] and "10 actions of each chunk, but its chunks have 3" in told([stages[10]])


def test_initial_states_that_are_not_known_are_not_the_same():
    table = pd.DataFrame(dict(entry="e", task="t", episode=[0, 1, 0, 1], start=["a", "b", "a", "b"], arm=["base", "base", "mine", "mine"]))
    assert same_starts(table) and not same_starts(table.assign(start=None)) and not same_starts(table.assign(start=["a", None, "a", None])) and not same_starts(table[:3])
    assert not same_starts(table.assign(episode=range(4)))   # no episode in common


@pytest.mark.parametrize("name", ["tabletop", "metaworld"])
def test_a_renderer_that_changes_nothing_is_not_asked_about(name, policy, tmp_path, monkeypatch):
    "What is done with one is not done again with the other."
    played = []
    def noted(config, *args): played.append((config.parent, json.loads(config.read_text())["render"])); raise RuntimeError("enough")
    monkeypatch.setattr(module, "play", noted)
    monkeypatch.setattr(module, "need_benchmark", lambda *args: {})
    for render in ("cpu", "gpu"):
        with pytest.raises(RuntimeError, match="enough"): evaluate(policy(), BENCHMARKS[name], tmp_path, render=render, load=load)
    assert played[0] == played[1] and played[0][1] == "cpu"


# ---- interrupted

def test_notes_of_a_killed_run_are_read_after_it_went_on(tmp_path):
    starts, picture = Starts(tmp_path / "starts.jsonl"), np.zeros((4, 4, 3), np.uint8)
    starts("before", picture, "wait")
    starts("cut", picture, "wait")
    starts.path.write_bytes(starts.path.read_bytes().rstrip()[:-9])
    assert list(starts.read()) == ["before"]
    starts("after", picture, "wait")
    starts("last", picture, "wait")
    assert list(starts.read()) == ["before", "after", "last"] and starts.read()["after"] == starts.read()["before"]


def test_what_was_played_is_not_played_again(policy, tmp_path):
    stage = evaluate(policy(), tabletop(), tmp_path, videos=0, load=load)
    assert evaluate(policy(), tabletop(), tmp_path, videos=0, load=None).manifest() == stage.manifest()   # it is not even loaded


SLOW = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_evaluate import Reflex, evaluate, tabletop
evaluate(Path(sys.argv[1]), tabletop(), sys.argv[2], workers=2, videos=0, load=lambda folder: Reflex(0, 0.05))
"""


def test_an_evaluation_that_is_killed_goes_on_and_equals_a_whole_one(policy, tmp_path):
    command = [sys.executable, "-c", SLOW.format(tests=str(Path(__file__).parent)), str(policy()), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    def played():
        found = list((tmp_path / "killed").rglob("recording-*.sqlite"))
        return module._progress(found[0])[0] if found else 0
    while played() < 3: assert process.poll() is None; time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before, asked = played(), []
    def counting(folder): asked.append(load(folder)); return asked[0]
    resumed = rows(evaluate(policy(), tabletop(), tmp_path / "killed", workers=2, videos=0, load=counting))
    whole = rows(evaluate(policy(), tabletop(), tmp_path / "whole", videos=0, load=load))
    same = ["task", "episode", "success", "steps", "start", "instruction"]
    assert 3 <= before < COUNT and resumed[same].equals(whole[same])
    assert asked[0].asked <= np.ceil(whole["steps"] / 3).nlargest(COUNT - before + 2).sum(), "only what was missing is played (the harness may have finished an episode after the count)"


class Fragile(TabletopBenchmark):
    "The tabletop, whose simulator breaks in episode 3: once or always, as a file says."
    def __init__(self, mark, **params):
        super().__init__(**params)
        self.mark = Path(mark)

    def reset(self, task):
        if task["episode_idx"] == 3 and self.mark.exists():
            if self.mark.read_text() == "once": self.mark.unlink()
            raise RuntimeError("the arm fell off")
        return super().reset(task)


def fragile(tmp_path, how):
    mark = tmp_path / "broken"
    mark.write_text(how)
    return Benchmark("fragile", (dict(benchmark="test_evaluate:Fragile", episodes_per_task=5, params=dict(mark=str(mark), episodes=5)),))


def test_an_episode_that_broke_is_played_again_and_is_no_failure_of_the_policy(policy, tmp_path):
    table = rows(evaluate(policy(), fragile(tmp_path, "once"), tmp_path, videos=0, load=load))
    assert table["success"].tolist() == run_episodes(fixed_episodes("reach", 5), Reflex(0))["success"].tolist() and table["start"].notna().all()


def test_an_episode_that_breaks_again_and_again_is_an_error_that_shows_why(policy, tmp_path):
    with pytest.raises(RuntimeError, match="1 episodes could not be played: .*the arm fell off"): evaluate(policy(), fragile(tmp_path, "always"), tmp_path, videos=0, load=load)
    assert not list(tmp_path.rglob("episodes.parquet"))
    (tmp_path / "broken").unlink()
    assert len(rows(evaluate(policy(), fragile(tmp_path, "once"), tmp_path, videos=0, load=load))) == 5


def test_a_benchmark_that_does_not_start_is_an_error_that_shows_why(policy, tmp_path):
    with pytest.raises(RuntimeError, match="(?s)could not be started.*unknown suite 'Z'"): evaluate(policy(), tabletop(suite="Z"), tmp_path, videos=0, load=load)


class Ours(TabletopBenchmark):
    "A benchmark that this package knows nothing of."


def foreign(*tasks): return benchmark_of("test_evaluate:Ours", 2, list(tasks), dict(tasks=["reach", "lift"], episodes=2))


def test_a_task_that_there_is_not_is_told(policy, tmp_path):
    with pytest.raises(RuntimeError, match="has the benchmark a task of that name"): evaluate(policy(), foreign("raech"), tmp_path, videos=0, load=load)


def test_a_task_that_is_misspelled_among_good_ones_is_told(policy, tmp_path):
    "A simulator plays the good ones and is silent about the other."
    with pytest.raises(ValueError, match="unknown task 'lfit'; did you mean 'lift'"): evaluate(policy(), foreign("reach", "lfit", "lift"), tmp_path, videos=0, load=load)
    assert not list(tmp_path.rglob("episodes.parquet"))
    assert len(rows(evaluate(policy(), foreign("tabletop"), tmp_path, videos=0, load=load))) == 4, "a suite's name is its tasks'"


@pytest.mark.parametrize("name, good, wrong", [("tabletop", "reach", "lfit"), ("metaworld", "reach-v3", "raech-v3"), ("simpler_bridge", "widowx_stack_cube", "widowx_stack_cueb"), ("simpler_bridge_ms3", "widowx_stack_cube", "widowx_stack_cueb")])
def test_tasks_of_benchmarks_that_are_known_are_checked_before_anything_is_loaded(name, good, wrong):
    with pytest.raises(ValueError, match=f"unknown task '{wrong}'; did you mean"): benchmark_of(name, tasks=[good, wrong])
    assert all(entry["tasks"] == [good] for entry in benchmark_of(name, tasks=[good]).entries)


def test_a_policy_that_fails_is_an_error_that_shows_why(policy, tmp_path):
    class Broken:
        def act(self, images, instructions): raise ValueError("weights of another model")
    with pytest.raises(RuntimeError, match="weights of another model"): evaluate(policy(), tabletop(4), tmp_path, videos=0, load=lambda folder: Broken())


# ---- videos

def test_first_episodes_and_first_failures_are_filmed(policy, tmp_path):
    import imageio.v3
    stage = evaluate(policy(), tabletop(6), tmp_path, videos=1, load=load)
    table = rows(stage)
    first_failure = table.index[~table["success"]][0]
    assert table.index[table["video"].notna()].tolist() == sorted({0, first_failure})
    assert sorted(path.relative_to(stage.path).as_posix() for path in stage.path.rglob("*.mp4")) == sorted(table["video"].dropna())
    film = imageio.v3.imread(stage.file(table["video"][0]))
    assert film.shape[1:] == (64, 64, 3) and len(film) == table["steps"][0] + 1
    assert np.abs(film[0].astype(int) - fixed_episodes("reach", 6).render()[0]).mean() < 12, "the film begins as the episode does, but for the codec"


# ---- in another environment

@pytest.fixture(scope="module")
def simulator(tmp_path_factory):
    "A Python of its own, that has our packages but not this one."
    import venv
    folder = tmp_path_factory.mktemp("simulator")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    place = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True).stdout.strip())
    (place / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    assert subprocess.run([python, "-I", "-c", "import vla_eval"]).returncode == 0
    assert subprocess.run([python, "-I", "-c", "import embodied_midtrain"], capture_output=True).returncode == 1
    return python


def test_a_benchmark_in_another_python_gives_the_same_episodes(policy, tmp_path, simulator, monkeypatch):
    here = rows(evaluate(policy(), tabletop(), tmp_path / "here", videos=0, load=load))
    monkeypatch.chdir(simulator.parent.parent)
    there = evaluate(policy(), tabletop(), tmp_path / "there", python="bin/python", workers=2, videos=0, load=load)
    assert rows(there).drop(columns=["seconds", "versions"]).equals(here.drop(columns=["seconds", "versions"]))
    assert "vla-eval" in rows(there)["versions"][0]


def test_a_python_that_is_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="path of an interpreter"): probe(BENCHMARKS["tabletop"], str(tmp_path / "python"))
    (tmp_path / "python").write_text("#!/bin/sh\necho no >&2; exit 3\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ValueError, match="is no Python that works: no"): probe(BENCHMARKS["tabletop"], str(tmp_path / "python"))


def test_a_python_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.5, raising=False)
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(ValueError, match="python did not answer within 0.5 seconds"): probe(BENCHMARKS["tabletop"], str(tmp_path / "python"))


def test_a_folder_of_a_package_s_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "simulator_of_mine").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = Benchmark("mine", ({"benchmark": "simulator_of_mine.benchmark:Mine"},), needs=("simulator_of_mine",))
    assert probe(asked)["missing"] == ["simulator_of_mine"]
    (tmp_path / "simulator_of_mine/__init__.py").touch()
    assert probe(asked)["missing"] == []


@pytest.mark.parametrize("name", ["calvin", "libero_10", "simpler_bridge", "simpler_bridge_ms3"])
def test_a_simulator_that_is_missing_is_told_before_anything_is_loaded(name, policy, tmp_path):
    missing = probe(BENCHMARKS[name])["missing"]
    if not missing: pytest.skip(f"{name} is installed")
    with pytest.raises(ImportError, match=f"benchmark {name} needs .*{missing[0]}.*emt doctor"): evaluate(policy(), BENCHMARKS[name], tmp_path, load=None)
    assert not (tmp_path / "evaluate").exists()


# ---- the protocols

@pytest.mark.parametrize("name", BENCHMARKS)
def test_protocols_name_classes_and_parameters_that_there_are(name):
    "Against the installed vla-eval: a parameter that it renamed would only show after minutes of simulator."
    import inspect
    from vla_eval.config import EvalConfig
    from vla_eval.registry import resolve_import_string
    for entry in BENCHMARKS[name].entries:
        assert EvalConfig.from_dict(entry).episodes_per_task == entry["episodes_per_task"] and not set(entry) - set(EvalConfig.__dataclass_fields__)
        if name == "metaworld": continue   # its simulator is an extra
        accepted = inspect.signature(resolve_import_string(entry["benchmark"]).__init__).parameters
        assert not set(entry.get("params", {})) - set(accepted)


def test_the_papers_protocol():
    episodes = {name: sum(e["episodes_per_task"] for e in BENCHMARKS[name].entries) for name in BENCHMARKS}
    assert BENCHMARKS["calvin"].entries[0]["params"]["num_sequences"] == 1000 and BENCHMARKS["calvin"].entries[0]["max_steps"] == 5 * 360
    assert (episodes["libero_10"], BENCHMARKS["libero_10"].entries[0]["max_steps"], episodes["simpler_bridge"]) == (50, 520, 4 * 24)
    for name in "simpler_bridge", "simpler_bridge_ms3":
        lengths = {e["params"]["task_name"].removeprefix("widowx_"): e["max_steps"] for e in BENCHMARKS[name].entries}
        assert episodes[name] == 4 * 24 and lengths == {"spoon_on_towel": 60, "carrot_on_plate": 60, "stack_cube": 60, "put_eggplant_in_basket": 120}
        assert all(e["params"]["max_episode_steps"] == e["max_steps"] for e in BENCHMARKS[name].entries)
    assert [BENCHMARKS[name].execute for name in ("calvin", "libero_10", "simpler_bridge", "simpler_bridge_ms3")] == [10, 4, 4, 4]


def test_names_nobody_knows_are_told():
    with pytest.raises(ValueError, match="did you mean 'tabletop'"): benchmark_of("tabeltop")
    assert benchmark_of("my.module:Mine", 3).entries == (dict(benchmark="my.module:Mine", episodes_per_task=3, params={}),)


def test_actions_are_translated_into_what_the_adapters_take():
    opened, closed = np.eye(7)[6:], np.zeros((1, 7))
    assert (gripper_closes(opened)[0, 6], gripper_closes(closed)[0, 6]) == (-1, 1)      # LIBERO's adapter: below 0 is open
    assert (calvin_units(opened)[0, 6], calvin_units(closed)[0, 6]) == (1, -1)          # CALVIN's: above 0 is open
    assert (axis_angle(opened)[0, 6], axis_angle(closed)[0, 6]) == (1, 0)               # SimplerEnv's: above 0.5 is open
    from vla_eval.rotation import axisangle_to_matrix, matrix_to_euler_xyz
    turned = np.array([[0, 0, 0, 0.3, -0.2, 0.1, 1]])
    assert np.allclose(matrix_to_euler_xyz(axisangle_to_matrix(axis_angle(turned)[0, 3:6].astype(np.float32))), turned[0, 3:6], atol=1e-5)


def test_the_table_has_wilsons_interval():
    from statsmodels.stats.proportion import proportion_confint
    table = pd.DataFrame(dict(arm="a", seed=0, step=0, task=["x"] * 4 + ["y"] * 4, success=[True] * 3 + [False] * 5, completed_subtasks=range(8)))
    found = success_table(table).set_index("task")
    assert found["success"].tolist() == [75, 0, 37.5] and found["completed_subtasks"].tolist() == [1.5, 5.5, 3.5]
    assert found.loc["all", ["low", "high"]].tolist() == pytest.approx(100 * np.array(proportion_confint(3, 8, method="wilson")), abs=0.05)


# ---- the command

def test_emt_evaluate_prints_the_table(tmp_path, capsys):
    import torch
    from embodied_midtrain.actions import ActionNormaliser
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.cli import main
    from embodied_midtrain.policy import Policy, save_policy
    torch.manual_seed(0)
    fresh = Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=3).eval()
    save_policy(fresh, tmp_path / "mine")
    assert main(["evaluate", str(tmp_path / "mine"), "--benchmark", "tabletop", "--tasks", "reach", "--episodes", "6", "--run", str(tmp_path / "run"), "--videos", "0"]) == 0
    printed = capsys.readouterr().out
    found, = tmp_path.glob("run/evaluate/tabletop/mine-*/episodes.parquet")
    assert "mine" in printed and "Wilson" in printed and str(found) in printed
    together = run_episodes(fixed_episodes("reach", 6), fresh)
    assert read_table(found)[["success", "steps"]].values.tolist() == together[["success", "steps"]].values.tolist() and read_table(found)["execute"].unique().tolist() == [3]
    again = ["evaluate", str(tmp_path / "mine"), str(tmp_path / "run/../mine"), "--benchmark", "tabletop", "--tasks", "reach", "--episodes", "6", "--run", str(tmp_path / "run"), "--videos", "0"]
    assert main(again) == 0 and capsys.readouterr().out == printed, "a folder named twice is one policy"


def test_mistakes_are_told_by_the_command(tmp_path, capsys):
    from embodied_midtrain.cli import main
    for words, message in ((["--benchmark", "tabletop"], "no policy in"), (["--benchmark", "tabletop", "--param", "suite"], "expected name=value")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["evaluate", str(tmp_path / "empty"), *words]) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("how, said", [(dict(workers=0), "workers is 0"), (dict(execute=-1), "execute is -1"), (dict(batch=0), "batch is 0"), (dict(videos=-1), "videos is -1")])
def test_numbers_that_make_no_sense_are_judged_before_anything_starts(tmp_path, how, said):
    write_json(0, tmp_path / "policy.json")
    with pytest.raises(ValueError, match=said): evaluate(tmp_path, benchmark_of("tabletop", 2), tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()
    for episodes in 0, -2:
        with pytest.raises(ValueError, match="one or more"): benchmark_of("tabletop", episodes)


def test_a_parameter_that_the_benchmark_lacks_is_judged_before_anything_starts():
    with pytest.raises(ValueError, match="unknown parameter of TabletopBenchmark 'siute'.*suite"): benchmark_of("tabletop", 2, params={"siute": "B"})
    assert benchmark_of("calvin", params={"whatever": 1}).entries[0]["params"]["whatever"] == 1   # known to another Python


def test_another_simulator_is_another_folder_and_another_row(tmp_path, monkeypatch):
    "The same policy, asked the same: what was played before stays, and is not taken for what is played now."
    import embodied_midtrain.evaluate as module
    from embodied_midtrain.outcomes import evaluations
    write_json(0, tmp_path / "policy/reach/base-0/step-9/policy.json")
    real, stages = module.need_benchmark, []
    for version in "1", "2":
        monkeypatch.setattr(module, "need_benchmark", lambda *given: real(*given) | {"files": {"simulator": version}})
        stages.append(evaluate(tmp_path / "policy/reach/base-0/step-9", benchmark_of("tabletop", 2, ["reach"]), tmp_path, load=lambda folder: Reflex(0), label="reflex"))
    assert stages[0].path != stages[1].path and all(stage.done for stage in stages)
    assert read_table(stages[0].file("episodes.parquet"))["benchmark_hash"][0] != read_table(stages[1].file("episodes.parquet"))["benchmark_hash"][0]
    assert len(evaluations(tmp_path)) == 2


def test_a_change_of_the_simulators_files_changes_its_hash(tmp_path):
    "Of texts what they hold, of others their size; caches do not count, links to folders above do not lead round and round."
    from dataclasses import replace
    package = tmp_path / "toysim"
    (package / "assets").mkdir(parents=True)
    for name, text in {"__init__.py": "", "world.py": "steps = 12", "assets/cup.stl": "solid"}.items(): (package / name).write_text(text)
    for name in "up", "again": (package / "assets" / name).symlink_to(package, target_is_directory=True)
    toy = replace(benchmark_of("tabletop", 2), hashed=("toysim",))
    sys.path.insert(0, str(tmp_path))
    try:
        hashes = [probe(toy)["files"]["toysim"]]
        for name, text in {"world.py": "steps = 2", "assets/cup.stl": "solid cup", "__pycache__/world.pyc": "compiled"}.items():
            (package / name).parent.mkdir(exist_ok=True)
            (package / name).write_text(text)
            hashes.append(probe(toy)["files"]["toysim"])
    finally: sys.path.remove(str(tmp_path))
    assert len(set(hashes)) == 3 and hashes[2] == hashes[3]


def test_of_a_thousand_chains_two_videos_are_kept(tmp_path):
    table = pd.DataFrame(dict(entry="calvin", task=[f"seq_{i:04d}" for i in range(20)], success=False, completed_subtasks=0, video=[f"{i}.mp4" for i in range(20)]))
    table.loc[:4, "success"] = True
    for video in table["video"]: (tmp_path / video).touch()
    keep_videos(table, tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.mp4", "1.mp4", "5.mp4", "6.mp4"]


def test_a_container_is_pulled_without_a_question_and_sees_what_it_is_told(tmp_path):
    "A harness in the place of the real one that writes down how it was called: nobody is there to answer."
    config = tmp_path / "config.json"
    write_json(configuration(benchmark_of("calvin", 2), "ws://127.0.0.1:1", tmp_path, docker="image:1", volumes=("/data/calvin:/data/calvin",)), config)
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho \"$@\" > {tmp_path}/called\n")
    fake.chmod(0o755)
    with pytest.raises(RuntimeError): play(config, tmp_path / "recording-x.sqlite", str(fake), docker=True)
    assert "--yes" in (tmp_path / "called").read_text().split() and read_json(config)["docker"] == {"image": "image:1", "volumes": ["/data/calvin:/data/calvin"]}


def test_a_setting_tells_what_was_asked_for_and_not_which_tasks():
    said = lambda name, **asked: module._setting(benchmark_of(name, **asked), 4, "", None, "cpu")
    whole = said("simpler_bridge")
    assert whole == said("simpler_bridge", tasks=["widowx_stack_cube"]) == said("simpler_bridge", tasks=["widowx_put_eggplant_in_basket"]) and "max_episode_steps" not in whole
    assert "max_episode_steps 60" in said("simpler_bridge", params=dict(max_episode_steps=60)) and "num_sequences 1,000" in said("calvin")


def test_all_tasks_of_metaworld_have_a_name():
    pytest.importorskip("metaworld")
    assert len(benchmark_of("metaworld", tasks=["mt50", "reach-v3"]).entries[0]["tasks"]) == 50


def test_folders_of_a_container_without_a_container_are_refused(policy, tmp_path):
    with pytest.raises(ValueError, match="/data/A:/data/calvin are what a container sees"): evaluate(policy(), tabletop(4), tmp_path, volumes=("/data/A:/data/calvin",), load=load)
