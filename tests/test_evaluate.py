"Evaluating policies through vla-eval: the same episodes as in process, resumed, in another Python, with everything in its rows."
import json, os, re, signal, sqlite3, subprocess, sys, sysconfig, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embodied_midtrain import evaluate as module
from embodied_midtrain.benchmarks.base import run_episodes
from embodied_midtrain.benchmarks.tabletop import TabletopBenchmark, test_episodes as fixed_episodes
from embodied_midtrain.core import folder_hash, read_table, write_json
from embodied_midtrain.evaluate import BENCHMARKS, Benchmark, axis_angle, benchmark_of, calvin_units, evaluate, gripper_closes, need_benchmark, probe, same_starts, success_table, told

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


@pytest.fixture
def policy(tmp_path):
    "Makes folders of policies whose weights are a seed."
    def make(arm="base", seed=0):
        folder = tmp_path / f"policy/reach/{arm}-0/step-9"
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


# ---- interrupted

def test_what_was_played_is_not_played_again(policy, tmp_path):
    stage = evaluate(policy(), tabletop(), tmp_path, videos=0, load=load)
    assert evaluate(policy(), tabletop(), tmp_path, videos=0, load=None).manifest() == stage.manifest()


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


def test_a_task_that_there_is_not_is_told(policy, tmp_path):
    with pytest.raises(RuntimeError, match="has the benchmark a task of that name"): evaluate(policy(), tabletop(tasks=["raech"]), tmp_path, videos=0, load=load)


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


@pytest.mark.parametrize("name", ["calvin", "libero_10", "simpler_bridge"])
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
    assert {e["params"]["task_name"].removeprefix("widowx_"): e["max_steps"] for e in BENCHMARKS["simpler_bridge"].entries} == {"spoon_on_towel": 60, "carrot_on_plate": 60, "stack_cube": 60, "put_eggplant_in_basket": 120}
    assert [BENCHMARKS[name].execute for name in ("calvin", "libero_10", "simpler_bridge")] == [10, 4, 4]


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
    assert "mine" in printed and "Wilson" in printed and (tmp_path / "run/evaluate/tabletop/mine/episodes.parquet").exists()
    together = run_episodes(fixed_episodes("reach", 6), fresh)
    assert read_table(tmp_path / "run/evaluate/tabletop/mine/episodes.parquet")[["success", "steps"]].values.tolist() == together[["success", "steps"]].values.tolist()


def test_mistakes_are_told_by_the_command(tmp_path, capsys):
    from embodied_midtrain.cli import main
    for words, message in ((["--benchmark", "tabletop"], "no policy in"), (["--benchmark", "tabletop", "--param", "suite"], "expected name=value")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main(["evaluate", str(tmp_path / "empty"), *words]) == 2 and message in capsys.readouterr().err
