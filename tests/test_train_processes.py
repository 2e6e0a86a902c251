"""Two processes learn what one does: the loop under `accelerate launch`, on the CPU with gloo."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from embodied_midtrain.backbone import answer_loss, load_backbone
from embodied_midtrain.batches import Batches, Prepared, batch_order
from embodied_midtrain.samples import ImageRef, Sample, turn
from embodied_midtrain.processes import batches_needed, in_pieces, processes
from embodied_midtrain.train import train

STEPS = 5


def uneven(count):
    "Samples whose answers have one word or many, every fifth without a picture."
    rng, words = np.random.default_rng(0), "point to the apple red cup left of blue jar".split()
    text = lambda n: " ".join(rng.choice(words, n))
    picture = lambda: ImageRef(array=rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    images = [() if i % 5 == 4 else (picture(),) for i in range(count)]
    return [Sample(f"u/{i}", "u", "vlm", x, (turn("user", "<image>\n" * len(x) + text(6)), turn("assistant", text(1 if i % 2 else 12)))) for i, x in enumerate(images)]


def fit(accumulation=1, state=None, stop=None, spoiled=None, optimizer="muon", cut=False, **how):
    "A short training of the tiny backbone on however many processes there are, and the weights of each (of the main one, where the model was cut into pieces)."
    if cut: processes()._shared_state["distributed_type"] = DistributedType.MULTI_GPU   # accelerate offers FSDP to other devices only; torch's own works with CPUs
    tiny = load_backbone("tiny", device="cpu")
    prepared = Prepared(tiny, uneven(40))
    batches = Batches(prepared, batch_order(40, 3, batches_needed(STEPS, accumulation), lengths=prepared.lengths), pictured=in_pieces())
    spoilt = batches(spoiled)["input_ids"] if spoiled else None
    loss = lambda model, batch: answer_loss(tiny, batch) * (float("nan") if spoiled and torch.equal(batch["input_ids"], spoilt) else 1.0)
    def on_step(step, model):
        if step == stop: os._exit(9)   # only the main process is told of steps
    log = train(tiny.model, batches, loss, STEPS, 2e-3, accumulation=accumulation, optimizer=optimizer, state=state, save_every=2, **{"on_step": on_step} | how, detail=True)
    return log, {n: p.detach().clone() for n, p in tiny.model.named_parameters()} if not cut or processes().is_main_process else {}


SCRIPT = """
import sys; sys.path.insert(0, {tests!r})
import torch; torch.set_num_threads(1)
from accelerate import PartialState
from accelerate.utils import DistributedType
{before}
from safetensors.torch import save_file
from test_train_processes import fit
log, weights = fit(**{how!r})
assert PartialState().num_processes == 2
save_file({{n: w.contiguous() for n, w in weights.items()}}, {folder!r} + f"/rank{{PartialState().process_index}}.safetensors")
if PartialState().is_main_process: log.to_parquet({folder!r} + "/log.parquet")
"""


def launched(folder, *more, before="", env={"ACCELERATE_USE_CPU": "true"}, **how):
    "The same on two processes."
    script = folder / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), how=how, folder=str(folder), before=before))
    command = [sys.executable, "-m", "accelerate.commands.launch", *(more or ["--multi_gpu"]), "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    return subprocess.run([*command, script], env=os.environ | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, timeout=600)


def learned(folder): return pd.read_parquet(folder / "log.parquet"), *(load_file(folder / f"rank{rank}.safetensors") for rank in range(2))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare(folder, accumulation):
    "What two processes learned with what one does that takes as many batches a step."
    (log, first, second), (alone, weights) = learned(folder), fit(2 * accumulation)
    np.testing.assert_allclose(log.loss, alone.loss, atol=1e-5)
    np.testing.assert_allclose(log.grad_norm, alone.grad_norm, rtol=1e-3)
    assert log.tokens.tolist() == alone.tokens.tolist() and log.padded.tolist() == alone.padded.tolist()
    assert first.keys() == weights.keys() and all(torch.equal(first[n], second[n]) for n in first)
    for name in first: torch.testing.assert_close(first[name], weights[name], atol=2e-4, rtol=1e-3)   # Muon makes much of a difference in the last bit of a small gradient


def test_two_processes_equal_one(tmp_path):
    "Answers of one word beside answers of twelve, batches with and without pictures: the mean is over all tokens of the step."
    ended = launched(tmp_path, accumulation=2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    compare(tmp_path, accumulation=2)


def test_killed_processes_resume_exactly(tmp_path):
    for name in "whole", "killed": (tmp_path / name).mkdir()
    assert launched(tmp_path / "whole", state=str(tmp_path / "whole" / "state")).returncode == 0
    assert launched(tmp_path / "killed", state=str(tmp_path / "killed" / "state"), stop=3).returncode != 0   # its main process is gone after step 3, the other waits and is ended
    assert [p.name for p in (tmp_path / "killed" / "state").glob("step-*")] == ["step-00000002"]
    ended = launched(tmp_path / "killed", state=str(tmp_path / "killed" / "state"))
    assert ended.returncode == 0, ended.stderr[-3000:]
    compare(tmp_path / "whole", accumulation=1)
    whole, resumed = learned(tmp_path / "whole"), learned(tmp_path / "killed")
    assert whole[0].loss.tolist() == resumed[0].loss.tolist() and all(torch.equal(whole[1][n], resumed[1][n]) for n in whole[1])
    with pytest.raises(ValueError, match="processes 2 instead of None"): fit(state=str(tmp_path / "whole" / "state"))   # other batches would make up a step


def test_a_loss_that_is_not_finite_ends_every_process_and_is_named(tmp_path):
    "The fourth batch is the second process's, of step 2."
    ended = launched(tmp_path, spoiled=3)
    which = batch_order(40, 3, 8, lengths=Prepared(load_backbone("tiny", device="cpu"), uneven(40)).lengths)[3]
    assert ended.returncode != 0 and f"at step 2, samples {', '.join(f'u/{i}' for i in which)}; the last good state is none" in ended.stderr


def test_accumulation_of_accelerate_must_be_ours(monkeypatch):
    "Its launcher for DeepSpeed puts its own number into the environment, and that overrules the one we ask for."
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(ValueError, match="gradient_accumulation_steps 1, and this training has accumulation 2"): fit(2)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert len(fit(2)[0]) == STEPS


FSDP = "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"


@pytest.mark.parametrize("loading", ["true", "false"])
def test_a_model_in_pieces_learns_what_a_whole_one_does(tmp_path, loading):
    "FSDP2, its pieces on two processes; batches without a picture among others, and weights that are tied; killed and resumed. At the end the main process has the whole model."
    how, state = dict(optimizer="adamw", cut=True), str(tmp_path / "state")
    if loading == "true":   # which is the default; then the other processes never hold a whole model
        assert launched(tmp_path, *FSDP, "--fsdp_cpu_ram_efficient_loading", loading, state=state, stop=3, **how).returncode != 0
        assert [p.name for p in (tmp_path / "state").glob("step-*")] == ["step-00000002"]
    ended = launched(tmp_path, *FSDP, "--fsdp_cpu_ram_efficient_loading", loading, state=state, **how)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (log, first, second), (alone, weights) = learned(tmp_path), fit(2, optimizer="adamw")
    np.testing.assert_allclose(log.loss, alone.loss, atol=1e-5)
    np.testing.assert_allclose(log.grad_norm, alone.grad_norm, rtol=1e-5)
    assert first.keys() == weights.keys() and not second
    for name in first: torch.testing.assert_close(first[name], weights[name], atol=2e-4 if name.endswith("k_proj.bias") else 1e-5, rtol=0)   # attention does not depend on a bias of the keys: its gradient is rounding, and AdamW makes steps of that


@pytest.mark.parametrize("stage, close", [("2", 1e-5), ("3", 5e-4)])
def test_deepspeed_learns_what_one_process_does(tmp_path, stage, close):
    "Our clipping, which bites here, and our accumulation; killed and resumed; at the end the main process has the whole model."
    pytest.importorskip("deepspeed")
    on_cpus = 'PartialState._prepare_backend = lambda self, *a, **k: ("gloo", DistributedType.MULTI_CPU)   # accelerate offers DeepSpeed to other devices only'
    config = tmp_path / "deepspeed.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": int(stage), "stage3_param_persistence_threshold": 0}, "zero_allow_untested_optimizer": True}))   # 0: or a model as small as this one stays whole
    go = lambda **how: launched(tmp_path, "--use_deepspeed", "--deepspeed_config_file", str(config), before=on_cpus, env={"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
                                accumulation=2, optimizer="adamw", clip=15, state=str(tmp_path / "state"), **how)
    assert go(stop=3).returncode != 0 and [p.name for p in (tmp_path / "state").glob("step-*")] == ["step-00000002"]
    ended = go()
    assert ended.returncode == 0, ended.stderr[-3000:]
    (log, first, _), (alone, weights) = learned(tmp_path), fit(4, optimizer="adamw", clip=15)
    np.testing.assert_allclose(log.loss, alone.loss, atol=close)
    assert first.keys() == weights.keys()
    for name in first: torch.testing.assert_close(first[name], weights[name], atol=close if not name.endswith("k_proj.bias") else 1e-2, rtol=0)
