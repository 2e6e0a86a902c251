"""Actions: the round trip through the normaliser, chunks, and statistics of sources."""
import json, shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from embodied_midtrain.actions import LIMITS, ActionNormaliser, action_statistics, chunks, statistics_of
from embodied_midtrain.core import generator
from embodied_midtrain.sources.rlds import BridgeSource, record_spans


def random_actions(rng, n=200):
    scale, shift = 10 ** rng.uniform(-4, 1, 6), rng.uniform(-1, 1, 6)
    arm = rng.standard_t(3, (n, 6)) * scale + shift * scale
    arm[:, rng.random(6) < 0.2] = rng.normal()  # numbers that never change
    return np.concatenate([arm, rng.integers(0, 2, (n, 1))], 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("mode", LIMITS)
def test_round_trip(seed, mode):
    actions = random_actions(generator(seed, "actions"))
    normaliser = ActionNormaliser.fit(actions, mode)
    low, high = np.array(normaliser.low), np.array(normaliser.high)
    inside = np.clip(actions, np.append(low, 0), np.append(high, 1)).astype(np.float32)
    encoded = normaliser.encode(inside)
    assert encoded.dtype == np.float32 and np.abs(encoded[:, :6]).max() <= 1
    span = np.append(np.maximum(high - low, np.abs(low) + np.abs(high)), 1)
    assert (np.abs(normaliser.decode(encoded) - inside) <= 1e-6 * np.maximum(span, 1)).all()
    assert (encoded[:, 6] == actions[:, 6]).all()


@pytest.mark.parametrize("mode", LIMITS)
def test_saved_is_loaded(tmp_path, mode):
    normaliser = ActionNormaliser.fit(random_actions(generator(1)), mode)
    normaliser.save(tmp_path / "n.json")
    loaded = ActionNormaliser.load(tmp_path / "n.json")
    assert loaded == normaliser and loaded.hash == normaliser.hash
    assert ActionNormaliser((0.0,) * 6, normaliser.high).hash != normaliser.hash


def test_chunks_shape_in_front():
    normaliser = ActionNormaliser((-0.65,) * 6, (0.65,) * 6)
    chunk = random_actions(generator(2)).reshape(10, 20, 7)
    assert (normaliser.encode(chunk).reshape(200, 7) == normaliser.encode(chunk.reshape(200, 7))).all()


@pytest.mark.parametrize("n", [1, 3, 10])
def test_chunks(n):
    actions = random_actions(generator(3), 6)
    chunk, mask = chunks(actions, n)
    for t in range(6):
        for k in range(n):
            assert mask[t, k] == (t + k < 6) and (chunk[t, k] == actions[min(t + k, 5)]).all()


# ---- the normaliser as a property: for any limits and any actions

NUMBERS = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)   # beyond that a float32 itself grows coarse
SIX = st.lists(NUMBERS, min_size=6, max_size=6)


@st.composite
def normalisers(draw):
    "Any limits in their order, some of them of numbers that never change."
    ends = zip(draw(SIX), draw(st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e4)), min_size=6, max_size=6)))
    low, high = zip(*((low, low + span) for low, span in ends))
    return ActionNormaliser(low, high)


def actions_like(normaliser, numbers, gripper):
    "Actions between the limits where a number is between 0 and 1, and beyond them elsewhere."
    low, high = np.array(normaliser.low), np.array(normaliser.high)
    return np.append(low + (high - low) * np.array(numbers), gripper).astype(np.float32)[None]


def scale(normaliser):
    "Range or end of it, whichever is the largest: what a float32's rounding is relative to."
    low, high = np.array(normaliser.low), np.array(normaliser.high)
    return np.max([high - low, np.abs(low), np.abs(high)], 0)


@settings(deadline=None, max_examples=300)
@given(normalisers(), st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(0, 1))
def test_decoding_undoes_encoding(normaliser, numbers, gripper):
    "Inside the limits, to 1e-7 of range or limits: below the 1e-6 that is asked for. (float32 in and out, computed in float64.)"
    actions = actions_like(normaliser, numbers, gripper)
    encoded = normaliser.encode(actions)
    back = normaliser.decode(encoded)
    assert encoded.dtype == back.dtype == np.float32 and np.abs(encoded[:, :6]).max() <= 1 and back[0, 6] == gripper
    assert (np.abs(back[:, :6].astype(float) - np.clip(actions[:, :6].astype(float), normaliser.low, normaliser.high)) <= 1e-7 * scale(normaliser)).all()


@settings(deadline=None, max_examples=300)
@given(normalisers(), st.lists(st.floats(-5, 6), min_size=6, max_size=6))
def test_what_lies_outside_comes_back_as_the_limit(normaliser, numbers):
    actions = actions_like(normaliser, numbers, 1)
    low, high = np.array(normaliser.low), np.array(normaliser.high)
    encoded = normaliser.encode(actions)
    back, arm = normaliser.decode(encoded)[:, :6].astype(float), actions[:, :6].astype(float)
    assert (np.abs(encoded[:, :6]) <= 1).all() and (encoded[:, :6][(arm < low) & (high > low)] == -1).all() and (encoded[:, :6][(arm > high) & (high > low)] == 1).all()
    assert (np.abs(back - np.clip(arm, low, high)) <= 1e-7 * scale(normaliser)).all()


@settings(deadline=None, max_examples=200)
@given(SIX, st.lists(NUMBERS, min_size=6, max_size=6))
def test_numbers_that_never_change_are_safe(values, asked):
    "They are encoded as 0 whatever comes in, and decoded as themselves whatever a network says: nothing is divided by zero."
    fitted = ActionNormaliser.fit(np.append(values, 1)[None].repeat(5, 0))
    with np.errstate(all="raise"):
        encoded = fitted.encode(np.append(asked, 0)[None].astype(np.float32))
        decoded = fitted.decode(np.append(np.clip(asked, -1, 1), 0)[None].astype(np.float32))
    assert (encoded[:, :6] == 0).all() and (decoded[:, :6] == np.array(values, np.float32)).all()


@settings(deadline=None, max_examples=200)
@given(normalisers(), st.integers(0, 11), st.floats(1e-3, 1), NUMBERS)
def test_saved_is_loaded_exactly_and_the_hash_tells_any_change(tmp_path_factory, normaliser, which, much, number):
    file = tmp_path_factory.mktemp("normaliser") / "n.json"
    normaliser.save(file)
    loaded = ActionNormaliser.load(file)
    assert loaded == normaliser and loaded.hash == normaliser.hash
    ends = [*normaliser.low, *normaliser.high]
    for other in (np.nextafter(ends[which], np.inf), np.nextafter(ends[which], -np.inf), number, -ends[which]):
        changed = [*ends[:which], float(other), *ends[which + 1:]]
        if changed != ends: assert ActionNormaliser(tuple(changed[:6]), tuple(changed[6:])).hash != normaliser.hash


@settings(deadline=None, max_examples=200)
@given(normalisers(), st.lists(st.floats(-0.5, 1.5), min_size=6, max_size=6), st.floats(0.05, 1))
def test_scaled_twice_is_narrower_limits(normaliser, numbers, share):
    "What VLM4VLA does to Bridge and LIBERO in two steps, both ways."
    actions, narrow = actions_like(normaliser, numbers, 1), normaliser.narrowed(share)
    middle, half = normaliser._middle_half
    once = np.clip((actions[:, :6] - middle) / np.where(half > 0, half, np.inf), -1, 1)
    twice = np.clip(once, -share, share) / share
    rounding = 1e-12 / share * np.divide(scale(normaliser), half, out=np.zeros(6), where=half > 0)   # limits far from zero, close together
    assert (np.abs(narrow.encode(actions)[:, :6] - twice) <= 1e-7 + rounding).all()
    undone = np.clip(twice * share, -1, 1) * half + middle
    assert (np.abs(narrow.decode(np.append(twice, 1)[None])[:, :6] - undone) <= 1e-7 * scale(normaliser)).all()


def test_calvins_limits_know_no_data():
    "CALVIN's relative actions: clipped at +-0.65 on all six, whatever was seen."
    for seed in range(3):
        fitted = ActionNormaliser.fit(random_actions(generator(seed)), "calvin")
        assert fitted.low == (-0.65,) * 6 and fitted.high == (0.65,) * 6
    action = np.array([[0.65, -0.65, 0.325, 1.0, -0.7, 0.0, 1.0]], np.float32)
    np.testing.assert_allclose(fitted.encode(action), [[1, -1, 0.5, 1, -1, 0, 1]], atol=1e-7)
    np.testing.assert_allclose(fitted.decode(fitted.encode(action)), np.clip(action, -0.65, [[0.65] * 6 + [1]]), atol=1e-7)


def test_unknown_mode():
    with pytest.raises(ValueError, match="did you mean 'minmax'"): ActionNormaliser.fit(np.zeros((2, 7)), "min-max")


# ---- statistics

BRIDGE = Path(__file__).parent / "data/bridge_rlds/bridge_dataset/1.0.0"


class Robot:
    "A robot source of given actions."
    def __init__(self, episodes, files="a"): self.episodes, self.files, self.passes = episodes, files, 0
    def fingerprint(self): return self.files
    def actions(self):
        self.passes += 1
        return iter(self.episodes)


def test_statistics_are_exact():
    episodes = [random_actions(generator(i), 50 + i) for i in range(9)]
    together, statistics = np.concatenate(episodes).astype(np.float64), statistics_of(episodes)
    for name, wanted in {"mean": together.mean(0), "std": together.std(0), "min": together.min(0), "max": together.max(0), "q01": np.quantile(together, 0.01, axis=0), "q99": np.quantile(together, 0.99, axis=0)}.items():
        assert statistics["action"][name] == wanted.tolist()
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (len(together), 9)
    for mode in ("q01q99", "minmax"): assert ActionNormaliser.from_statistics(statistics, mode) == ActionNormaliser.fit(np.concatenate(episodes), mode)
    with pytest.raises(ValueError, match="known: minmax, q01q99"): ActionNormaliser.from_statistics(statistics, "identity")


def test_statistics_of_bridge_have_the_published_form():
    published = json.loads((BRIDGE.parents[2] / "bridge_stats/dataset_statistics_bridge.json").read_text())
    ours = action_statistics(BridgeSource("bridge", BRIDGE))
    shape = lambda x: {k: shape(v) for k, v in x.items()} if isinstance(x, dict) else [type(i) for i in x] if isinstance(x, list) else type(x)
    assert shape({k: v for k, v in ours.items() if k != "hash"}) == shape(published) and ours["num_trajectories"] == 8
    for name in ("q01", "q99"): assert (np.abs(ours["action"][name]) < 3 * np.abs(published["action"][name]) + 0.02).all()  # the same units
    assert ActionNormaliser.from_statistics(published).low == tuple(published["action"]["q01"][:6])


def test_statistics_are_cached_by_content(tmp_path):
    cache, robot = tmp_path / "statistics.json", Robot([random_actions(generator(1))])
    first = action_statistics(robot, cache)
    assert action_statistics(robot, cache) == first == json.loads(cache.read_text()) and robot.passes == 1
    other = Robot([random_actions(generator(2))], files="b")
    assert action_statistics(other, cache) != first and other.passes == 1 and json.loads(cache.read_text())["hash"] != first["hash"]
    for broken in ("", "{", "[1]", '{"action": {}}'):
        cache.write_text(broken)
        assert action_statistics(robot, cache) == first
    assert robot.passes == 5


def test_a_changed_shard_is_read_anew(tmp_path):
    folder = tmp_path / "1.0.0"
    shutil.copytree(BRIDGE, folder)
    first = action_statistics(BridgeSource("bridge", folder), tmp_path / "s.json")
    shard = next(folder.glob("*.tfrecord-*"))
    shard.write_bytes(shard.read_bytes()[:next(s for s in record_spans(shard))[1] + 16])  # the first episode alone
    second = action_statistics(BridgeSource("bridge", folder), tmp_path / "s.json")
    assert (first["num_trajectories"], second["num_trajectories"]) == (8, 1)


def test_statistics_of_nothing():
    with pytest.raises(ValueError, match="no actions"): action_statistics(Robot([]))
