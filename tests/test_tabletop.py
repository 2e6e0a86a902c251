"""The embedded world: deterministic, solvable by its experts, and worded unlike the pool."""
import numpy as np
import pytest

from embodied_midtrain.sources.base import open_sources
from embodied_midtrain.tabletop.pool import EMBODIED, GENERAL, WRITERS, TabletopRobot, TabletopSource, tabletop_pool
from embodied_midtrain.tabletop.tasks import TASKS, Tabletop, demonstrate
from embodied_midtrain.tabletop.world import NAMES


@pytest.mark.parametrize("task", TASKS)
def test_experts_succeed_with_noise_in_every_suite(task):
    for suite in "ABC":
        assert np.mean([demo.success for demo in demonstrate(task, 11, 150, suite)]) > .95


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_episodes(task):
    one, two, other = (Tabletop(task, seed, 20) for seed in (3, 3, 4))
    for env in (one, two):
        for _ in range(6): env.step(env.expert())
    assert one.instructions == two.instructions and (one.render() == two.render()).all()
    assert (one.render() != other.render()).any()


def test_doing_nothing_never_succeeds():
    for task in TASKS:
        env = Tabletop(task, 5, 100)
        for _ in range(env.task.steps): env.step(np.tile(np.float32([0, 0, 0, 0, 0, 0, 1]), (100, 1)))
        assert not env.done.any() and not env.live.any()


def test_the_named_thing_is_on_the_table_once_and_may_be_any():
    env = Tabletop("reach", 0, 500)
    assert ((env.scene.kind == env.scene.kind[:, :1]).sum(1) == 1).all()
    assert {i.split()[-1] for i in env.instructions} == set(NAMES)
    put = Tabletop("put", 0, 500)
    assert all(((row[row >= 0] == k).sum() == 1) for row in put.scene.kind for k in row[:2])


def test_rotations_have_no_effect_and_actions_are_clipped():
    one, two = Tabletop("reach", 1, 5), Tabletop("reach", 1, 5)
    action = np.float32([[1, 0, 0, 0, 0, 0, 1]] * 5)
    one.step(action); two.step(action * [9, 1, 1, 1, 1, 1, 1] + np.float32([0, 0, 0, 1, 1, 1, 0]))
    assert np.array_equal(one.scene.gripper, two.scene.gripper)


@pytest.mark.parametrize("name", WRITERS)
def test_sources_repeat_themselves_and_find_records_again(name):
    source = TabletopSource(name, 300, seed=2)
    samples = list(source)
    assert len(samples) == len(source) == 300 and not source.set_aside.rows
    again = source.fetch([samples[299].id, samples[0].id])
    assert [s.messages for s in again] == [samples[299].messages, samples[0].messages]
    assert (again[0].images[0].array == samples[299].images[0].array).all()


def test_an_id_beyond_the_count_is_not_there():
    source = TabletopSource("mini-vcr", 10)
    assert source.fetch(["mini-vcr/9"])[0].id == "mini-vcr/9"
    with pytest.raises(KeyError): source.fetch(["mini-vcr/10"])   # of the same block that drew the tenth


def test_captions_dominate_and_robots_speak_other_words():
    sources = {s.name: s for s in open_sources(tabletop_pool(2000))}
    assert sum(len(sources[n]) for n in GENERAL) > 2 * sum(len(sources[n]) for n in EMBODIED)
    asked = {" ".join(m["content"].split()[1:3]) for s in sources.values() for x in s for m in x.messages if m["role"] == "user"}
    told = {" ".join(e.instruction.split()[:2]) for task in TASKS for e in TabletopRobot(task, task, 20).episodes()}
    assert not asked & told


def test_points_are_where_the_things_are():
    for sample in TabletopSource("mini-refspatial", 20):
        for turn in sample.messages[1::2]:
            x, y = eval(turn["content"])[0]
            assert 0 <= x < 1 and 0 <= y < 1
