"""The training loop: killed runs, data order, optimisers."""
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from embodied_midtrain.train import Muon, Prepared, batch_order, hidden_matrices, make_optimizers, rate, train

torch.set_num_threads(1)  # sums are split by threads: a killed process and its successor need the same number to agree to the last bit
STEPS = 30


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 16)), nn.Linear(16, 8)

    def forward(self, x): return self.head(self.body(x))


DATA = torch.randn(100, 8, generator=torch.Generator().manual_seed(1))
ORDER = batch_order(len(DATA), 10, 2 * STEPS, seed=3)


def batch(position): return DATA[ORDER[position]]


def loss(model, x): return (model(x) - x.flip(1)).square().mean()


def fit(pause=0.0, **more):
    """A short run; `pause` makes its steps slow enough to be killed between them."""
    model = Tiny()
    log = train(model, batch, loss, STEPS, **{"lr": 0.01, "optimizer": "muon", "save_every": 4, "on_step": lambda s, m: time.sleep(pause)} | more)
    return model, log.drop(columns=["data_seconds", "seconds"])


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_killed_twice_equals_uninterrupted(tmp_path):
    whole, log = fit()  # Muon and AdamW side by side, and dropout
    for step in (5, 17):  # SIGKILL after the checkpoint of this step or soon after
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_train; test_train.fit(0.05, state={str(tmp_path)!r})"
        child = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"})
        until = time.time() + 60
        while not any(int(p.name[5:]) >= step for p in tmp_path.glob("step-*")) and child.poll() is None and time.time() < until: time.sleep(0.02)
        child.kill()
        assert child.wait() == -9, "the run was over before it could be killed"
    steps = sorted(int(p.name[5:]) for p in tmp_path.glob("step-*"))
    assert 17 <= steps[-1] < STEPS and len(steps) <= 3  # two kept; a third while the newest is being put in place
    resumed, log2 = fit(state=tmp_path)
    assert same(whole, resumed) and log.equals(log2)


def test_finished_run_is_not_trained_again(tmp_path):
    model, log = fit(state=tmp_path)
    again, log2 = fit(state=tmp_path, on_step=lambda s, m: pytest.fail("trained again"))
    assert same(model, again) and log.equals(log2)


def test_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    from accelerate import Accelerator
    saved = Accelerator.save_state
    def full(self, folder):
        saved(self, folder)
        if len(list(tmp_path.glob("step-*"))) == 2: raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        with pytest.raises(OSError, match="free some space"): fit(state=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]
    assert same(fit(state=tmp_path)[0], fit()[0])


def test_accumulation_equals_the_large_batch():
    plain = lambda model, x: (model.head(model.body[0](x)) - x).square().mean()  # no dropout: its draws would differ
    double = lambda position: torch.cat([batch(2 * position), batch(2 * position + 1)])
    models = Tiny(), Tiny()
    for model, (data, accumulation) in zip(models, [(batch, 2), (double, 1)]): train(model, data, plain, 5, 0.01, accumulation=accumulation)
    for a, b in zip(models[0].parameters(), models[1].parameters()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_precision_of_one_run_does_not_bind_the_next():
    plain, log = fit()
    half, log16 = fit(precision="bf16")
    assert all(p.dtype == torch.float32 for p in half.parameters()) and not same(plain, half)
    np.testing.assert_allclose(log.loss, log16.loss, rtol=0.1)
    assert same(plain, fit()[0])


def test_gradients_are_clipped():
    seen = []
    look = lambda optimizer, *_: seen.append(torch.stack([p.grad.norm() for g in optimizer.param_groups for p in g["params"]]).norm().item())
    hook = register_optimizer_step_pre_hook(look)
    try: log = train(Tiny(), batch, lambda m, x: 1000 * loss(m, x), 2, lr=0.01, clip=0.5)
    finally: hook.remove()
    assert log.grad_norm.min() > 100 and seen == pytest.approx([0.5, 0.5], rel=1e-3)


def test_nan_names_step_and_state(tmp_path):
    bad = lambda model, x: loss(model, x) * (float("nan") if (x == DATA[ORDER[6]]).all() else 1.0)
    with pytest.raises(FloatingPointError, match=r"nan at step 7; the last good state is .*step-00000004"):
        train(Tiny(), batch, bad, STEPS, 0.01, state=tmp_path, save_every=4)


def test_infinite_gradient_leaves_the_weights():
    model = Tiny()
    with pytest.raises(FloatingPointError, match="gradient"): train(model, batch, lambda m, x: m.head.weight.sum() * 0 + torch.sqrt(m.head.bias.sum() * 0), 3, 0.01)
    assert same(model, Tiny())


@pytest.mark.parametrize("lengths", [None, np.arange(50) % 7])
def test_order_is_a_pure_function_of_seed_and_position(lengths):
    long = batch_order(50, 8, 100, seed=1, lengths=lengths)
    for batches in (0, 1, 8, 33): assert (batch_order(50, 8, batches, seed=1, lengths=lengths) == long[:batches]).all()
    assert not (batch_order(50, 8, 100, seed=2, lengths=lengths) == long).all()
    assert np.bincount(long.ravel()).min() >= 800 // 50 - 2  # every sample about as often as any other
    with pytest.raises(ValueError, match="no samples"): batch_order(0, 8, 1)


def test_small_set_fills_a_large_batch():
    assert sorted(set(batch_order(3, 8, 2).ravel())) == [0, 1, 2]


def test_muon_moves_hidden_matrices_only():
    model = Tiny()
    assert hidden_matrices(model) == {"body.0.weight", "body.3.weight", "head.weight"}
    adamw, muon = make_optimizers(model, "muon", 0.02, rates={"head": 1.0})
    assert [p.shape for g in muon.param_groups for p in g["params"]] == [(16, 8), (16, 16)]
    assert sum(p.numel() for o in (adamw, muon) for g in o.param_groups for p in g["params"]) == sum(p.numel() for p in model.parameters())


def test_muon_treats_a_matrix_like_its_transpose():
    w = torch.randn(12, 12)
    moved = []
    for flip in (False, True):
        p = nn.Parameter((w.T if flip else w).clone())
        p.grad = (w.T if flip else w).sin().clone()
        Muon([p], lr=0.1).step()
        moved.append(p.T if flip else p)
    torch.testing.assert_close(*moved, atol=1e-4, rtol=1e-4)


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="did you mean 'adamw'"): make_optimizers(Tiny(), "adam", 1e-3)
    with pytest.raises(ValueError, match="did you mean 'cosine'"): rate(0, 10, "cosin")


@pytest.mark.parametrize("answers", [True, False])
def test_prepared_equals_direct(answers):
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.samples import Sample, turn
    from embodied_midtrain.tabletop.pool import TabletopSource
    tiny = load_backbone("tiny", device="cpu")
    samples = [s for name in ("mini-vcr", "mini-refspatial") for s in TabletopSource(name, 8)] * 2
    samples.append(Sample("a/b", "a", "vlm", (), (turn("user", "what is needed to cut"), turn("assistant", "a knife"))))  # no image
    prepared, direct = Prepared(tiny, samples, answers).batch([3, 20, 32, 4]), tiny.batch([samples[i] for i in (3, 20, 32, 4)], answers)
    assert prepared.keys() == direct.keys() and all(torch.equal(v, direct[k]) for k, v in prepared.items())
