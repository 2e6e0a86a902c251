"""Actions: the round trip through the normaliser, and chunks."""
import numpy as np
import pytest

from embodied_midtrain.actions import LIMITS, ActionNormaliser, chunks
from embodied_midtrain.core import generator


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


def test_unknown_mode():
    with pytest.raises(ValueError, match="did you mean 'minmax'"): ActionNormaliser.fit(np.zeros((2, 7)), "min-max")
