"Meta-World: its actions, initial states and view, the same through vla-eval, recorded demonstrations, and the whole chain on them."
import ctypes.util, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, strategies as st

from embodied_midtrain.benchmarks import metaworld as mw
from embodied_midtrain.benchmarks.base import Expert, run_episodes
from embodied_midtrain.core import file_hash, read_table, seed_for, write_json
from embodied_midtrain.evaluate import benchmark_of, evaluate
from embodied_midtrain.pipeline import STAGES, load_profile, notebook_folder, plan, read_notebook, run_jobs, started
from embodied_midtrain.sources.lerobot import LeRobotSource
from test_benchmarks import Reflex

try: mw.choose_gl(); mw.make_simulator("reach-v3")
except (ImportError, OSError) as error: pytest.skip(str(error), allow_module_level=True)

HOW = dict(image_size=48, seed=0, noise=.1, decided=True)


# ---- tasks and actions

def test_every_task_has_a_group_a_sentence_and_an_expert():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP
    assert sorted(mw.tasks_of("mt50")) == sorted(mw.INSTRUCTIONS) == sorted(ENV_POLICY_MAP) == sorted(ALL_V3_ENVIRONMENTS)
    assert sum(map(len, mw.GROUPS.values())) == 50 and all(text[0].isupper() for text in mw.INSTRUCTIONS.values())


numbers = st.floats(-3, 3, width=32)


@given(st.lists(numbers, min_size=4, max_size=4))
def test_four_numbers_come_back_within_their_range(action):
    back = mw.to_four(mw.to_seven(np.array(action, np.float32)))
    assert np.allclose(back, np.clip(action, -1, [1, 1, 1, mw.GRIP]), atol=1e-6)


@given(st.lists(numbers, min_size=7, max_size=7))
def test_the_simulator_gets_numbers_it_takes(action):
    four = mw.to_four(np.array(action, np.float32))
    assert np.abs(four).max() <= 1 and four[3] <= mw.GRIP + 1e-6
    assert mw.to_four(np.array([*action[:3], 9, 9, 9, action[6]], np.float32)).tolist() == four.tolist()   # it cannot turn its hand


@pytest.mark.parametrize("task", ["drawer-open-v3", "pick-place-v3", "assembly-v3"])
def test_the_expert_gets_through_the_seven_numbers(task):
    "Against a loop that knows nothing of this package but the seed."
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP
    plain, policy = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-goal-observable"](seed=3), ENV_POLICY_MAP[task]()
    plain._freeze_rand_vec, plain.seeded_rand_vec = False, True
    plain.seed(seed_for(mw.test_seed(), task, 4))
    state, done, steps = plain.reset()[0], False, 0
    while not done and steps < 500: state, _, _, _, info = plain.step(policy.get_action(state)); done, steps = bool(info["success"]), steps + 1
    env = mw.Metaworld(task, [4])
    played = run_episodes(mw._Blind(env), Expert(env))
    assert done and played["success"].all() and abs(played["steps"][0] - steps) <= 10   # some press harder than 0.6


# ---- episodes

def test_initial_states_are_the_same_for_every_arm():
    one, other = mw.Metaworld("push-v3", 3), mw.Metaworld("push-v3", [7, 2])
    run_episodes(mw._Blind(other), Expert(other))
    other.restart([2, 0])
    assert (other.states[0] == one.states[2]).all() and (other.states[1] == one.states[0]).all()
    assert len({tuple(state) for state in one.states}) == 3
    assert (mw.Metaworld("push-v3", [0], seed=mw.test_seed(1)).states[0] != one.states[0]).any()


def test_the_view_is_that_of_lerobot():
    "Drawn by gymnasium at MuJoCo's own quality, both axes flipped: the same picture but for shadows and jagged edges."
    env = mw.Metaworld("hammer-v3", [0], image_size=128)
    mine = env.render()[0].astype(float)
    import gymnasium.envs.mujoco.mujoco_rendering as rendering
    model, data = env.simulators[0].model, env.simulators[0].data
    renderer = rendering.MujocoRenderer(model, data, width=128, height=128, camera_name="corner2")
    theirs = renderer.render("rgb_array")[::-1, ::-1].astype(float)
    renderer.close()
    assert np.abs(mine - theirs).mean() < 12 and np.corrcoef(mine.ravel(), theirs.ravel())[0, 1] > .95
    assert np.corrcoef(mine.ravel(), theirs[::-1].ravel())[0, 1] < .8 and np.corrcoef(mine.ravel(), theirs[:, ::-1].ravel())[0, 1] < .8


def one_by_one(task, episodes, predictor, execute):
    "Through the StepBenchmark, as vla-eval's runner calls it."
    benchmark, rows = mw.MetaworldBenchmark([task], image_size=64, limit=12), []
    for episode in range(episodes):
        described = {**benchmark.get_tasks()[0], "episode_idx": episode}
        seen, plan, over = benchmark.make_obs(benchmark.reset(described), described), [], False
        while not over:
            if not plan: plan = list(predictor(benchmark.env).act([seen["images"]["camera"]], [seen["task_description"]])[0][:execute])
            result = benchmark.step({"actions": plan.pop(0)})
            seen, over = benchmark.make_obs(result.obs, described), benchmark.check_done(result)
        rows.append((benchmark.get_step_result(result)["success"], result.info["steps"], benchmark.env.states[0].tolist()))
    benchmark.cleanup()
    return rows


@pytest.mark.parametrize("predictor", [Expert, lambda env: Reflex()])
def test_both_ways_of_playing_agree_on_every_episode(predictor):
    pytest.importorskip("vla_eval")
    env = mw.Metaworld("handle-press-v3", 3, image_size=64, limit=12)
    played = run_episodes(env, predictor(env), execute=2)
    assert [(s, n, state.tolist()) for s, n, state in zip(played["success"], played["steps"], env.states)] == one_by_one("handle-press-v3", 3, predictor, 2)


def test_success_at_any_step_ends_the_episode():
    env = mw.Metaworld("reach-v3", 1)
    while env.live.any(): env.step(env.expert())
    steps, state = env.steps[0], env.states[0].copy()
    env.step(env.expert())
    assert env.done[0] and 0 < env.steps[0] == steps < 500 and (env.states[0] == state).all()


def test_through_the_harness(tmp_path):
    vla_eval = pytest.importorskip("vla_eval")
    from vla_eval.model_servers.predict import PredictModelServer

    class Lower(PredictModelServer):
        def __init__(self): super().__init__(chunk_size=2)
        def predict(self, obs, ctx): return {"actions": np.tile([0, 0, -1, 0, 0, 0, 1.], (2, 1))}
        def get_action_spec(self): return mw.action_specs()[0]
        def get_observation_spec(self): return mw.action_specs()[1]

    config = {"benchmarks": [{"benchmark": "embodied_midtrain.benchmarks.metaworld:MetaworldBenchmark", "name": "mw", "episodes_per_task": 2, "max_steps": 15, "params": {"tasks": ["reach-v3", "push-v3"], "image_size": 32}}],
              "output_dir": str(tmp_path), "render": "cpu"}
    told = vla_eval.evaluate(Lower(), config, docker=False)
    tasks = told[0]["tasks"]
    assert {task["task"] for task in tasks} == {"reach-v3", "push-v3"} and all(episode["steps"] == 15 for task in tasks for episode in task["episodes"])


# ---- drawing

def test_a_machine_that_cannot_draw_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(OSError, match="libosmesa6"): mw.choose_gl({})
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: name if name == "OSMesa" else None)
    environ = {}
    assert mw.choose_gl(environ) == environ["MUJOCO_GL"] == environ["PYOPENGL_PLATFORM"] == "osmesa"
    assert mw.choose_gl({"MUJOCO_GL": "egl"}) == "egl"


# ---- demonstrations

def contents(folder): return {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json"}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demos") / "two"
    return mw.record(folder, ["push-v3", "push-back-v3"], 1, 48), folder


def test_what_is_recorded_is_what_is_read(recorded):
    stage, folder = recorded
    source = LeRobotSource("demos", folder, **mw.READ)
    episodes, info = list(source.episodes()), json.loads((folder / "meta/info.json").read_text())
    assert len(episodes) == info["total_episodes"] == stage.counts["kept"] == 2 and info["total_frames"] == stage.counts["frames"] == sum(map(len, episodes))
    for i, episode in enumerate(episodes):
        attempt = mw._recorded(folder / mw.episode_path(i))["attempt"]
        demo = mw.demonstrate(mw.Metaworld(["push-v3", "push-back-v3"][i], [attempt], 48, seed_for(0, "metaworld-demos")))
        assert demo.success and (episode.actions == demo.actions).all() and set(np.unique(demo.actions[:, 6])) <= {0, 1}
        assert all((np.asarray(ref.open()) == image).all() for ref, image in zip(episode.images, demo.images, strict=True))
        assert episode.instruction == "Push the puck to a goal"


def test_the_files_are_a_lerobot_dataset(recorded):
    "As LeRobot opens one: with the package datasets; frames are numbered through, statistics are those of the columns."
    import datasets
    stage, folder = recorded
    table = datasets.load_dataset("parquet", data_dir=str(folder / "data"), split="train", cache_dir=str(folder.parent / "cache"))
    assert isinstance(table[0]["observation.image"], PIL.Image.Image) and table[0]["observation.image"].size == (48, 48)
    assert table["index"][:] == list(range(len(table))) and set(table["task_index"]) == {0} and len(table[0]["action"]) == 4
    assert np.allclose(mw.to_seven(np.array(table["action"][:])), table["embodied.action"][:], atol=1e-6)
    lines = [json.loads(line) for line in (folder / "meta/episodes_stats.jsonl").read_text().splitlines()]
    last = table.filter(lambda row: row["episode_index"] == 1)
    assert np.allclose(lines[1]["stats"]["action"]["mean"], np.mean(last["action"][:], 0), atol=1e-6) and lines[1]["stats"]["index"]["max"] == [len(table) - 1]
    assert np.shape(lines[0]["stats"]["observation.image"]["mean"]) == (3, 1, 1) and lines[0]["stats"]["timestamp"]["count"] == [json.loads((folder / "meta/episodes.jsonl").read_text().splitlines()[0])["length"]]


def test_a_killed_recording_ends_with_the_same_files(tmp_path):
    whole = mw.record(tmp_path / "whole/demos", ["reach-v3"], 3, 48)
    command = [sys.executable, "-m", "embodied_midtrain.benchmarks.metaworld", str(tmp_path / "cut/demos"), "--tasks", "reach-v3", "--episodes", "3", "--image-size", "48"]
    process, second = subprocess.Popen(command, stderr=subprocess.DEVNULL), tmp_path / "cut/demos" / mw.episode_path(0)
    while process.poll() is None and not second.exists(): time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and '"kept": 3' in done.stdout, done.stderr[-2000:]
    assert contents(tmp_path / "cut/demos") == contents(tmp_path / "whole/demos") and mw.record(tmp_path / "cut/demos", ["reach-v3"], 3, 48).done and whole.done


def test_several_processes_record_the_same(recorded, tmp_path):
    stage, folder = recorded
    mw.record(tmp_path / "demos", ["push-v3", "push-back-v3"], 1, 48, workers=2)
    assert contents(tmp_path / "demos") == contents(folder)


def test_failures_are_counted_not_kept(tmp_path):
    shaken = mw.record(tmp_path / "demos", "handle-press-v3", 1, 32, noise=3)
    assert sum(shaken.counts["failed"].values()) > 0 and len(list(LeRobotSource("demos", tmp_path / "demos", **mw.READ).episodes())) == 1


def test_an_expert_that_cannot_is_said(tmp_path):
    with pytest.raises(ValueError, match="pick-out-of-hole-v3: record with less noise, or without decided"): mw.record(tmp_path / "demos", "pick-out-of-hole-v3", 1, 32)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds other files"): mw.record(tmp_path / "mine", "reach-v3", 1, 32)
    write_json({"key": "of another recording"}, tmp_path / "recorded" / "manifest.json")
    with pytest.raises(ValueError, match="asked for otherwise"): mw.record(tmp_path / "recorded", "reach-v3", 2, 32)
    assert (tmp_path / "recorded" / "manifest.json").exists()
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


# ---- the whole chain

TOY = dict(line.split("=", 1) for line in """
features.pool=[{reader: tabletop, name: mini-llava, count: 40}, {reader: tabletop, name: mini-robopoint, count: 40}]
features.robots=[{reader: lerobot, name: metaworld-plate-slide, path: data/metaworld/plate-slide-v3, action: embodied.action, gripper: [0, 1], stride: 4}]
gap.per_dataset=20
gap.bootstrap=10
gap.permutations=10
gap.projections=[tsne]
gap.projection_per_dataset=20
proximity.seeds=[0]
proximity.max_steps=20
proximity.distance_per_robot=20
proximity.bootstrap=10
selection.seeds=[0]
selection.k=20
selection.held_out=4
selection.diversity_samples=20
selection.bootstrap=10
midtrain.steps=2
midtrain.batch_size=8
policy.seeds=[0]
policy.demos={plate-slide-v3: {reader: lerobot, name: plate-slide-demos, path: data/metaworld/plate-slide-v3, action: embodied.action, gripper: [0, 1]}}
policy.steps=2
policy.checkpoints=[2]
policy.batch_size=8
metaworld.episodes=2
metaworld.limit=12""".strip().splitlines())


@pytest.fixture
def lean_notebooks(tmp_path):
    "The stage notebooks without their examples, which run elsewhere."
    (tmp_path / "nbs").mkdir()
    for name in STAGES.values():
        book = read_notebook(notebook_folder() / f"{name}.ipynb")
        run = next(i for i, c in enumerate(book.cells) if re.match(r"## Run\b", c.source))
        book.cells = [c for i, c in enumerate(book.cells) if i > run or "#| export" in c.source or c.metadata.get("tags")]
        nbformat.write(book, tmp_path / "nbs" / f"{name}.ipynb")
    return tmp_path / "nbs"


def test_the_chain_of_the_profile(tmp_path, monkeypatch, lean_notebooks):
    "From recorded demonstrations to paired differences, at toy size; what the stage says of an episode is what vla-eval says."
    pytest.importorskip("vla_eval")
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("EMT_QUIET", "1"), monkeypatch.setenv("OMP_NUM_THREADS", "1")
    mw.record("data/metaworld/plate-slide-v3", "plate-slide-v3", 2, 64)
    run_jobs(plan("metaworld", changes=[f"{name}={value}" for name, value in TOY.items()], notebooks=lean_notebooks), report=lambda line: None)
    run = tmp_path / "runs/metaworld"
    assert {row["stage"]: row["state"] for row in started(run)} == dict.fromkeys(load_profile("metaworld")["stages"], "done")
    episodes, bounds = (read_table(run / f"metaworld/{name}.parquet") for name in ("episodes", "bounds"))
    assert episodes.groupby("arm")["episode"].apply(list).to_dict() == dict.fromkeys(("base", "proximity", "random"), [0, 1]) and episodes["steps"].le(12).all()
    assert set(bounds["predictor"]) == {"expert", "decided gripper", "random actions"} and (run / "metaworld/films-plate-slide-v3.png").exists()
    assert "Meta-World simulator" in (run / "results/tables/summary.md").read_text()
    again = evaluate(run / "policy/plate-slide-v3/base-0/step-2", benchmark_of("metaworld", 2, ["plate-slide-v3"], dict(image_size=64, limit=12)), run, videos=0)
    alike = ["episode", "success", "steps"]
    assert read_table(again.file("episodes.parquet"))[alike].sort_values("episode").to_numpy().tolist() == episodes[episodes["arm"] == "base"][alike].to_numpy().tolist()


def test_of_a_group_the_tasks_that_cannot_be_decided_are_left_out_and_told(tmp_path, monkeypatch):
    monkeypatch.setitem(mw.GROUPS, "two", ("reach-v3", "pick-out-of-hole-v3"))
    decided = mw.record(tmp_path / "decided", ["two"], 1, 32)
    assert decided.counts["kept"] == 1 and decided.counts["left_out"] == ["pick-out-of-hole-v3"] and decided.parameters["tasks"] == ["reach-v3"]
    efforts = mw.record(tmp_path / "efforts", ["two"], 1, 32, decided=False)
    assert efforts.counts["kept"] == 2 and "left_out" not in efforts.counts


def test_groups_are_those_of_lerobots_evaluation():
    "A task of each whose place is not obvious, and none in two."
    assert all(task in mw.GROUPS[group] for task, group in {"peg-unplug-side-v3": "easy", "reach-wall-v3": "easy", "hammer-v3": "medium", "push-wall-v3": "medium", "push-v3": "hard", "assembly-v3": "hard", "shelf-place-v3": "very hard", "stick-push-v3": "very hard"}.items())
    assert sum(map(len, mw.GROUPS.values())) == len(set().union(*mw.GROUPS.values())) == len(mw.INSTRUCTIONS) == 50


def test_a_group_may_be_asked_for_by_its_name():
    from embodied_midtrain.evaluate import benchmark_of
    assert benchmark_of("metaworld", 1, ["very hard", "reach-v3"]).entries[0]["tasks"] == [*mw.GROUPS["very hard"], "reach-v3"]
    with pytest.raises(ValueError, match="unknown task 'hrad'"): benchmark_of("metaworld", 1, ["hrad"])
