"SimplerEnv-Bridge on ManiSkill3, as far as it goes without the simulator; what needs it is in the notebook's slow cell."
import asyncio, subprocess, sys, types

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from embodied_midtrain.benchmarks import simpler as module
from embodied_midtrain.benchmarks.simpler import WORLDS, SimplerBridge, make_world, to_maniskill
from embodied_midtrain.evaluate import BENCHMARKS, axis_angle


def test_it_is_imported_without_the_simulator_and_without_what_only_we_have():
    code = "import sys; sys.modules['pandas'] = sys.modules['torch'] = None; import embodied_midtrain.benchmarks.simpler; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mani_skill", "sapien", "gymnasium", "scipy", "pyarrow", "transformers"} & set(loaded)


def test_a_turn_is_the_one_that_the_other_simulator_is_told():
    rng = np.random.default_rng(0)
    for turn in np.concatenate([rng.uniform(-1.5, 1.5, (200, 3)), rng.normal(0, 0.05, (50, 3)), np.zeros((1, 3))]):
        action = np.array([0.01, -0.02, 0.03, *turn, 1])
        said = to_maniskill(action)
        about_x, about_y, about_z = (Rotation.from_euler(axis, angle) for axis, angle in zip("xyz", said[3:6]))
        assert ((about_x * about_y * about_z).inv() * Rotation.from_rotvec(axis_angle(action[None])[0, 3:6])).magnitude() < 1e-5
        assert said.dtype == np.float32 and np.allclose(said[:3], action[:3])


def test_the_gripper_is_decided():
    assert [to_maniskill(np.array([0, 0, 0, 0, 0, 0, g]))[6] for g in (-0.1, 0, 0.5, 0.51, 1, 1.2)] == [-1, -1, -1, 1, 1, 1]


class Tensor(np.ndarray):
    def cpu(self): return self
    def numpy(self): return np.asarray(self)


class World:
    "Success at some steps; writes down what it is asked."
    def __init__(self, good): self.good, self.asked, self.closed = good, [], False
    def reset(self, seed, options): self.now = 0; self.asked.append((seed, options)); return self.seen(), {}
    def seen(self): return {"sensor_data": {"3rd_view_camera": {"rgb": np.full((1, 48, 64, 3), self.now, np.uint8).view(Tensor)}}}
    def get_language_instruction(self): return ["put carrot on plate"]
    def step(self, action): self.now += 1; return self.seen(), 0, self.now in self.good, False, {"success": [self.now in self.good]}
    def close(self): self.closed = True


class Still:
    "A policy that stays where it is."
    def __init__(self): self.seen = []
    async def start_episode(self, payload): pass
    async def act(self, obs): self.seen.append(obs); return {"actions": np.float32([0, 0, 0, 0, 0, 0, 1])}
    async def end_episode(self, result): pass


@pytest.mark.parametrize("good, success", [({3, 4}, False), ({6}, True), (set(), False), ({2, 6}, True)])
def test_the_last_step_decides_in_the_harness(good, success):
    from vla_eval.runners.sync_runner import SyncEpisodeRunner
    benchmark, policy = SimplerBridge("widowx_carrot_on_plate", max_episode_steps=6), Still()
    benchmark.world = world = World(good)
    for episode in 0, 7:
        result = asyncio.run(SyncEpisodeRunner().run_episode(benchmark, benchmark.get_tasks()[0] | {"episode_idx": episode}, policy, max_steps=6))
        assert (result["metrics"]["success"], result["steps"]) == (success, 6)
    assert [(seed, options["episode_id"], options["reconfigure"]) for seed, options in world.asked] == [(0, 0, True), (0, 7, True)]
    assert {obs["task_description"] for obs in policy.seen} == {"put carrot on plate"} and [obs["images"]["primary"][0, 0, 0] for obs in policy.seen[:6]] == list(range(6))
    benchmark.cleanup()
    assert world.closed and benchmark.world is None


def test_a_world_begins_with_nothing_of_the_world_before(tmp_path, monkeypatch):
    made = []
    def make(name, **how): made.append((name, how)); return types.SimpleNamespace(unwrapped=name)
    twins, robot = type("BaseDigitalTwinEnv", (), {"_objects_to_remove_from_greenscreen": ["a spoon"], "_rgb_overlay_images": {"camera": 0}}), type("WidowX250S", (), {"disable_self_collisions": False})
    for name, more in {"gymnasium": dict(make=make), "mani_skill.envs": {}, "mani_skill.envs.tasks.digital_twins.base_env": dict(BaseDigitalTwinEnv=twins), "mani_skill.agents.robots.widowx.widowx": dict(WidowX250S=robot)}.items():
        fake = types.ModuleType(name)
        vars(fake).update(more)
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr(module, "missing_assets", lambda: [])
    assert make_world("widowx_stack_cube") == WORLDS["widowx_stack_cube"]
    assert twins._objects_to_remove_from_greenscreen == [] and twins._rgb_overlay_images == {} and robot.disable_self_collisions
    assert made[0][1] == dict(obs_mode="rgb+segmentation", num_envs=1, sim_backend="physx_cpu", render_backend="cpu")


def test_assets_that_are_missing_are_told_before_anything_is_asked_on_the_keyboard(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="wx250s.urdf.*tests/simulators/simpler.sh"): SimplerBridge().reset({"episode_idx": 0})


def test_the_entry_is_a_class_and_a_picture_that_there_are():
    entries = BENCHMARKS["simpler_bridge_ms3"].entries
    for entry in entries: assert SimplerBridge(**entry["params"]).limit == entry["max_steps"]
    assert [entry["params"]["task_name"] for entry in entries] == list(WORLDS) and SimplerBridge().get_metadata()["max_episodes_per_task"] == entries[0]["episodes_per_task"]
    assert BENCHMARKS["simpler_bridge_ms3"].translate is None and BENCHMARKS["simpler_bridge_ms3"].camera in SimplerBridge().get_observation_spec()
    with pytest.raises(ValueError, match="did you mean 'widowx_stack_cube'"): SimplerBridge("widowx_stack_cueb")
