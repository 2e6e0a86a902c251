"""The training loop: killed runs, data order, optimisers."""
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from embodied_midtrain.backbone import answer_loss, load_backbone
from embodied_midtrain.batches import Batches, Prepared, ahead, batch_order, padding, paper_lengths, token_batches
from embodied_midtrain.optimizers import Muon, frozen, hidden_matrices, make_optimizers, rate
from embodied_midtrain.samples import ImageRef, Sample, turn
from embodied_midtrain.speed import matmul_rate, operations, speed
from embodied_midtrain.train import TIMES, step_weights, train

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


def forked(work):
    "Run something in a forked child and kill it, if it lives, after so many seconds; whether it was killed."
    if (child := os.fork()) == 0:
        try: work()
        finally: os._exit(0)
    return child


def test_killed_at_random_moments_equals_uninterrupted(tmp_path):
    "Checkpoints at every other step: many of the moments lie within the writing of one."
    whole, log = fit()
    moments, killed = random.Random(0), 0
    while killed < 12:
        after, armed = moments.uniform(0, 0.1), []
        def bomb(step, model):
            if not armed: armed.append(threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start())
            time.sleep(0.02)     # so no child comes further than about five steps, on however fast a machine
        child = forked(lambda: fit(state=tmp_path, save_every=2, on_step=bomb))
        if os.waitpid(child, 0)[1] == 0: break   # it was done before
        killed += 1
    resumed, log2 = fit(state=tmp_path, save_every=2)
    assert killed > 3 and same(whole, resumed) and log.equals(log2)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]   # what kills left half-written is cleared


@pytest.mark.parametrize("moment", ["before", "weights", "log", "renamed"])
def test_killed_in_the_middle_of_a_checkpoint(moment, tmp_path, monkeypatch):
    "At its third: with nothing written yet, the weights half written, all but the log, and in place with the oldest not yet dropped."
    from accelerate import Accelerator
    from embodied_midtrain import checkpoints as module
    whole, log = fit()
    saved, removed, calls = Accelerator.save_state, module._remove, []
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    def dying_save(self, folder):
        calls.append(folder)
        if len(calls) == 3 and moment == "before": die()
        saved(self, folder)
        if len(calls) == 3 and moment == "weights":
            file = Path(folder) / "model.safetensors"
            file.write_bytes(file.read_bytes()[:200])
            (Path(folder) / "optimizer.bin").unlink()
        if len(calls) == 3 and moment in ("weights", "log"): die()
    def dying_remove(path):
        if moment == "renamed" and path.name == "step-00000004": die()
        removed(path)
    def work():
        Accelerator.save_state, module._remove = dying_save, dying_remove
        fit(state=tmp_path, save_every=4)
    _, status = os.waitpid(forked(work), 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [int(p.name[5:]) for p in sorted(tmp_path.glob("step-*"))] == ([4, 8, 12] if moment == "renamed" else [4, 8])
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


def test_so_many_checkpoints_are_kept(tmp_path):
    fit(state=tmp_path, keep=3)
    assert [int(p.name[5:]) for p in sorted(tmp_path.iterdir())] == [24, 28, 30]


def test_too_little_room_is_said_before_the_first_step(tmp_path, monkeypatch):
    room = lambda free: monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 0, free))
    room(1000)
    with pytest.raises(OSError, match="free some space, keep fewer checkpoints, or choose another folder"): fit(state=tmp_path, on_step=lambda s, m: pytest.fail("it began"))
    fit(on_step=lambda s, m: None)   # without checkpoints nothing is asked
    assert not list(tmp_path.iterdir())
    room(10**9)
    with pytest.raises(OSError, match="free some space"): fit(state=tmp_path, on_step=lambda s, m: room(10**9 if s < 8 else 10))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000004"]   # the last good one


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


class Named:
    "Batches that know whose they are."
    def __call__(self, position): return batch(position)
    def ids(self, position): return [f"d/{i}" for i in ORDER[position]]


@pytest.mark.parametrize("accumulation, step, named", [(1, 7, [6]), (2, 4, [6])])
def test_nan_names_the_samples_of_its_batch(accumulation, step, named):
    bad = lambda model, x: loss(model, x) * (float("nan") if (x == DATA[ORDER[6]]).all() else 1.0)
    with pytest.raises(FloatingPointError) as error: train(Tiny(), Named(), bad, 10, 0.01, accumulation=accumulation)
    assert f"nan at step {step}, samples {', '.join(f'd/{i}' for p in named for i in ORDER[p])};" in str(error.value)


def test_an_infinite_gradient_names_all_samples_of_its_step():
    "Which of the batches it came from is not known any more."
    bad = lambda model, x: loss(model, x) + (torch.sqrt(model.head.bias.sum() * 0) if (x == DATA[ORDER[6]]).all() else 0)
    model = Tiny()
    with pytest.raises(FloatingPointError, match="gradient is nan at step 4") as error: train(model, Named(), bad, 10, 0.01, accumulation=2)
    assert all(f"d/{i}" in str(error.value) for p in (6, 7) for i in ORDER[p])
    assert all(torch.isfinite(p).all() for p in model.parameters())
    again = train(model, batch, loss, 3, 0.01)   # and it can be trained on: what the run left of gradients does not count
    assert np.isfinite(again.loss).all()


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


# ---- a real, if tiny, model

def uneven(count, longest=20):
    "Samples of different lengths, every fifth without a picture, some with two."
    rng, words = np.random.default_rng(0), "point to the apple red cup left of blue jar".split()
    text = lambda n: " ".join(rng.choice(words, n))
    picture = lambda: ImageRef(array=rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    images = [tuple(picture() for _ in range(0 if i % 5 == 4 else 2 if i % 7 == 0 else 1)) for i in range(count)]
    return [Sample(f"u/{i}", "u", "vlm", x, (turn("user", "<image>\n" * len(x) + text(rng.integers(2, longest))), turn("assistant", text(rng.integers(1, longest))))) for i, x in enumerate(images)]


def tuned(samples=None, order=None, steps=4, **how):
    "The tiny backbone after a few steps, and the log."
    tiny = load_backbone("tiny", device="cpu")
    prepared = Prepared(tiny, samples or uneven(24))
    order = batch_order(24, 4, steps * how.get("accumulation", 1), lengths=prepared.lengths) if order is None else order
    log = train(tiny.model, Batches(prepared, order), lambda model, batch: answer_loss(tiny, batch), steps, 2e-3, **{"detail": True} | how)
    return tiny, log


def test_packed_by_tokens_equals_each_sample_alone():
    "Loss and gradients of batches by tokens are those of the same samples, unpadded, one by one."
    tiny, samples = load_backbone("tiny", device="cpu"), uneven(24)
    prepared = Prepared(tiny, samples)
    gradients = lambda: [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
    for which in token_batches(prepared.lengths, 220, 3):
        tiny.model.zero_grad()
        together = answer_loss(tiny, prepared.batch(which))
        together.backward()
        batched = gradients()
        tiny.model.zero_grad()
        alone = 0
        for i in which:
            part = answer_loss(tiny, tiny.batch([samples[i]], answers=True)) * prepared.answers[i] / prepared.answers[which].sum()
            part.backward()
            alone += part.item()
        assert len(which) > 1 and together.item() == pytest.approx(alone, abs=1e-5)
        for a, b in zip(batched, gradients(), strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_small_batches_of_a_step_equal_the_large_one():
    "Means of batches with few and with many answer tokens are not averaged: every token of the step counts the same."
    samples, order = uneven(24), batch_order(24, 4, 4)
    (one, log), (many, log2) = tuned(samples, order), tuned(samples, [[i] for batch in order for i in batch], accumulation=4)
    np.testing.assert_allclose(log.loss, log2.loss, atol=1e-5)
    for a, b in zip(one.model.parameters(), many.model.parameters()): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_batches_by_tokens_are_a_pure_function_and_keep_the_budget():
    lengths = paper_lengths(3000).tokens.to_numpy()
    long = token_batches(lengths, 12_000, 300, seed=1)
    for batches in (1, 50, 101): assert all((a == b).all() for a, b in zip(token_batches(lengths, 12_000, batches, seed=1), long, strict=False))
    assert all(len(b) * lengths[b].max() <= 12_000 for b in long) and padding(long, lengths) < 0.10
    drawn = np.bincount(np.concatenate(long), minlength=3000)
    assert drawn.min() >= drawn.max() - 2   # whole epochs, apart from the windows at both ends
    assert padding(batch_order(3000, 32, 90), lengths) > 0.3   # what it is good for
    with pytest.raises(ValueError, match="raise the budget"): token_batches([5, 9], 8, 1)
    with pytest.raises(ValueError, match="no samples"): token_batches([], 8, 1)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads):
    (plain, log), (threaded, log2) = tuned(), tuned(threads=threads)
    assert same(plain.model, threaded.model) and log.drop(columns=TIMES).equals(log2.drop(columns=TIMES))


def test_an_error_in_a_worker_is_raised_and_its_threads_end():
    import threading
    def broken(position):
        if position == 5: raise OSError("no such picture")
        return batch(position)
    for threads in (0, 2):
        with pytest.raises(OSError, match="no such picture"): train(Tiny(), broken, loss, 10, 0.01, threads=threads)
    assert not [t for t in threading.enumerate() if t.name.startswith("batches")]
    assert list(ahead(str, range(5), 2, depth=1)) == list("01234")


def test_data_is_made_while_the_step_runs():
    "Data that takes half as long as a step: waited for without threads, hardly with one."
    def slow(position): time.sleep(0.02); return batch(position)
    def loss_of_a_slow_model(model, x): time.sleep(0.04); return loss(model, x)
    waiting = [speed(train(Tiny(), slow, loss_of_a_slow_model, 20, 0.01, threads=threads, detail=True))["waiting"] for threads in (0, 1)]
    assert waiting[0] > 0.25 and waiting[1] < waiting[0] / 2


def test_frozen_parts_stay_and_are_free_again():
    start = load_backbone("tiny", device="cpu").model
    tiny, _ = tuned(freeze=["vision_tower", "language_model.layers.0"])
    moved = {n for (n, p), q in zip(tiny.model.named_parameters(), start.parameters()) if not torch.equal(p, q)}
    assert not {n for n in moved if "vision_tower" in n or "layers.0." in n} and "model.language_model.layers.1.mlp.up_proj.weight" in moved
    assert all(p.requires_grad for p in tiny.model.parameters())
    with pytest.raises(ValueError, match="did you mean"): tuned(freeze=["vision_towr"])


def test_checkpointing_of_activations_changes_nothing():
    (plain, log), (again, log2) = tuned(), tuned(checkpointing=True)
    assert not any(getattr(m, "gradient_checkpointing", False) for m in again.model.modules())
    np.testing.assert_allclose(log.loss, log2.loss, atol=1e-6)
    for a, b in zip(plain.model.parameters(), again.model.parameters()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_belongs_to_its_samples(tmp_path):
    "The same settings with other samples, or with the same in another order, are another run."
    tuned(steps=2, state=tmp_path)
    for more in dict(samples=uneven(48)[24:]), dict(order=batch_order(24, 4, 2, seed=1)):
        with pytest.raises(ValueError, match="other settings .data"): tuned(steps=2, state=tmp_path, **more)


def test_a_batch_without_answers_weighs_nothing():
    samples = uneven(24)
    samples[3] = replace(samples[3], messages=samples[3].messages[:1])
    beside, log = tuned(samples, order=[[3], [0, 1], [2, 4], [3]], steps=2, accumulation=2)
    alone, _ = tuned(samples, order=[[0, 1], [2, 4]], steps=2)
    assert np.isfinite(log.loss).all()
    for a, b in zip(beside.model.parameters(), alone.model.parameters()): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "fp8", "float16"])
def test_only_precisions_that_the_loop_understands(precision):
    with pytest.raises(ValueError, match=f"unknown precision '{precision}'"): tuned(precision=precision)


def test_a_tracker_gets_every_row():
    from accelerate.tracking import GeneralTracker
    rows, told = [], {}
    class Own(GeneralTracker):
        name, requires_logging_directory, tracker = "own", False, None
        def store_init_configuration(self, values): told.update(values)
        def log(self, values, step=None, **more): rows.append((step, values))
        def finish(self): told["finished"] = True
    _, log = tuned(tracker=Own())
    assert [step for step, _ in rows] == [1, 2, 3, 4] and [row["loss"] for _, row in rows] == log.loss.tolist()
    assert told["lr"] == 2e-3 and told["finished"] and rows[0][1].keys() >= set(log.columns) - {"step"}
    assert all(row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]) and 0 < row["utilisation"] < 1.5 for _, row in rows)
    with pytest.raises(ImportError, match="'nothing' is not installed"): tuned(tracker="nothing")


def test_the_log_tells_where_time_and_tokens_went():
    prepared = Prepared(load_backbone("tiny", device="cpu"), uneven(24))
    order = batch_order(24, 4, 4, lengths=prepared.lengths)
    tiny, log = tuned()
    assert log.tokens.tolist() == [prepared.lengths[b].sum() for b in order] and log.padded.tolist() == [4 * prepared.lengths[b].max() for b in order]
    assert (log[TIMES[:-1]].sum(axis=1) <= log.seconds).all() and (log[["data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds"]] > 0).all(axis=None)
    found = speed(log, peak=matmul_rate("cpu", size=256, rounds=2))
    assert 0 < found["utilisation"] < 1.5 and found["padding"] == pytest.approx(1 - log.tokens[2:].sum() / log.padded[2:].sum())
    assert sum(found[k] for k in ("waiting", "forward", "backward", "optimizer")) <= 1
    assert list(tuned(detail=False)[1].columns) == ["step", "loss", "lr", "grad_norm", "data_seconds", "seconds"]


def test_operations_of_what_is_frozen_count_less():
    tiny = load_backbone("tiny", device="cpu")
    batch = tiny.batch(uneven(4), answers=True)
    whole = operations(tiny.model)(batch)
    for p in frozen(tiny.model, ["vision_tower"]): p.requires_grad_(False)
    without_vision = operations(tiny.model)(batch)
    for p in tiny.model.parameters(): p.requires_grad_(False)
    assert operations(tiny.model)(batch) < without_vision < whole and operations(nn.Linear(2, 2))(batch) == 0


@pytest.mark.parametrize("answers", [True, False])
def test_prepared_equals_direct(answers):
    from embodied_midtrain.tabletop.pool import TabletopSource
    tiny = load_backbone("tiny", device="cpu")
    samples = [s for name in ("mini-vcr", "mini-refspatial") for s in TabletopSource(name, 8)] * 2
    samples.append(Sample("a/b", "a", "vlm", (), (turn("user", "what is needed to cut"), turn("assistant", "a knife"))))  # no image
    prepared, direct = Prepared(tiny, samples, answers).batch([3, 20, 32, 4]), tiny.batch([samples[i] for i in (3, 20, 32, 4)], answers)
    assert prepared.keys() == direct.keys() and all(torch.equal(v, direct[k]) for k, v in prepared.items())


def test_a_part_is_a_part_and_not_a_beginning():
    "The rate of `head` is not that of `header`; a frozen part may have a rate; a step without anything to learn says so."
    model = nn.ModuleDict(dict(head=nn.Linear(2, 2), header=nn.Linear(2, 2)))
    rate = {id(p): group["lr"] for optimizer in make_optimizers(model, "adamw", 1.0, rates={"head": .1}) for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(model["head"].weight)] == .1 and rate[id(model["header"].weight)] == 1.0
    model["head"].requires_grad_(False)
    assert make_optimizers(model, "adamw", 1.0, rates={"head": .1})
    class Empty:
        def weight(self, position): return 0
        def ids(self, position): return [f"chats/{position}"]
    with pytest.raises(ValueError, match="answer to learn from, samples chats/0, chats/1"): step_weights(Empty(), range(2))
