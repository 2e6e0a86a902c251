"The benchmark of the real shapes, with tiny ones: it runs, both ways compute the same, and its file has what the notebook shows."
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from embodied_midtrain.backbone import answer_loss
from embodied_midtrain.batches import Prepared
from embodied_midtrain.features import extract
from embodied_midtrain.speed import gpu_table

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench_gpu

torch.set_num_threads(1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=list(bench_gpu.TOY))
def model(request): return bench_gpu.backbone(request.param, bench_gpu.TOY[request.param], CPU, torch.float32)


@pytest.fixture(scope="module")
def made(model): return bench_gpu.samples(model, 12, 16)


def test_the_toy_writes_every_figure(tmp_path, capsys):
    found = bench_gpu.main(["--toy", "--threads", "1", "--save", str(tmp_path / "gpu.json")])
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept == json.loads(json.dumps(found)) and kept["toy"] and kept["models"].keys() == bench_gpu.REAL.keys() and kept["versions"]["torch"] == torch.__version__
    for m in kept["models"].values():
        for part in ("features", "plain_features", "training", "plain_training", "finetuning"):
            assert m[part]["samples_per_second"] > 0 and 0 < m[part]["utilisation"] < 1 and m[part]["peak_memory"] > 1e6 and m[part]["batch"] > 0, part
        assert set(m["latency"]) == {"1", "32"} and m["matmul_rate"] > 1e8 and m["training"]["tokens_per_second"] > 0
        assert np.isclose(m["hours"]["midtraining"], 5000 * 256 / m["training"]["samples_per_second"] / 3600) and m["hours"].keys() == {"scoring", "midtraining", "finetuning"}
        assert np.isclose(m["times_plain"]["features"][""], m["features"]["samples_per_second"] / m["plain_features"]["samples_per_second"])
        assert all(m[f"plain_{part}"]["ready_samples_per_second"] > m[f"plain_{part}"]["samples_per_second"] for part in ("features", "training"))
    table = gpu_table(kept)
    assert list(table.columns) == list(kept["models"]) and not table.isna().any(axis=None) and "hours" in capsys.readouterr().out


def test_real_shapes_are_those_that_are_published():
    "Parameters of InternVL3.5-1B with tied embeddings (304 M vision, 5 M between, 596 M text) and of Qwen3-VL-2B (2.13 B); nothing is allocated."
    sizes = {name: sum(p.numel() for p in bench_gpu.backbone(name, shape, torch.device("meta"), torch.bfloat16).model.parameters()) for name, shape in bench_gpu.REAL.items()}
    assert abs(sizes["InternVL3.5-1B"] - 905e6) < 1e6 and abs(sizes["Qwen3-VL-2B"] - 2.13e9) < 5e6


def test_the_plain_loop_computes_the_same(model, made):
    "Otherwise it would be no comparison: the same vectors, the same loss."
    ours, order = extract(model, made, batch_size=5), bench_gpu.random_batches(len(made), 4)
    with torch.no_grad():
        for which in order:
            inputs = bench_gpu.plain_inputs(model, [made[i] for i in which], False)
            inputs.pop("labels")
            theirs = model.model(**inputs, output_hidden_states=True).hidden_states[-1]
            last = theirs[torch.arange(len(which)), inputs["attention_mask"].sum(1) - 1]
            assert np.allclose(last, ours[which].astype(np.float32), atol=2e-2, rtol=2e-2)
            inputs = bench_gpu.plain_inputs(model, [made[i] for i in which], True)
            assert torch.allclose(model.model(**inputs).loss, answer_loss(model, model.batch([made[i] for i in which], answers=True)), atol=1e-4)


def test_needed_operations_are_those_that_run(model, made):
    one = [next(s for s in made if s.images)]   # alone, it has no padding
    for trained in (True, False):
        model.model.requires_grad_(trained)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:   # it sees attention only where that is made of plain products
            if trained: answer_loss(model, model.batch(one, answers=True)).backward()
            else: model.hidden(model.batch(one))
        assert .95 < bench_gpu.needed(model, Prepared(model, one, answers=trained)) / counter.get_total_flops() < 1.15
    model.model.requires_grad_(True).zero_grad()


def test_a_batch_that_does_not_fit_is_halved():
    tried = []
    def work(batch):
        tried.append(batch)
        if batch > 8: raise torch.OutOfMemoryError
        return dict(done=True)
    found = bench_gpu.measured(CPU, work, 32)
    assert tried == [32, 16, 8] and found["done"] and found["batch"] == 8
    with pytest.raises(torch.OutOfMemoryError): bench_gpu.measured(CPU, lambda batch: work(99), 4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_real_shapes_want_a_gpu(capsys):
    with pytest.raises(SystemExit): bench_gpu.main([])
    assert "there is no GPU here: --toy" in capsys.readouterr().err
