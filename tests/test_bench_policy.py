"""The benchmark of acting: what it compares does the same, and what it says adds up."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import bench_policy

from embodied_midtrain.actions import ActionNormaliser
from embodied_midtrain.backbone import load_backbone
from embodied_midtrain.policy import Policy


@pytest.fixture(scope="module")
def policy(): return Policy(load_backbone("tiny", device="cpu"), ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=3, hidden=32)


def test_the_obvious_way_is_obvious_and_says_the_same(policy):
    "One pass a picture with the logits of every token, where ours makes one pass for all without any."
    logits, (pictures, texts) = [], bench_policy.seen(3, 48)
    hook = policy.vlm.get_output_embeddings().register_forward_hook(lambda module, args, made: logits.append(tuple(made.shape)))
    theirs, counted = bench_policy.obvious(policy, pictures, texts), len(logits)
    ours = policy.act(pictures, texts)
    hook.remove()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert counted == len(logits) == 3 and all(shape[0] == 1 and shape[1] > 16 for shape in logits) and pictures[0].shape == (48, 48, 3)


def test_phases_are_those_of_one_call(policy):
    "Telling them apart leaves the policy as it was, and they make up the whole."
    made = bench_policy.round_of(policy, *bench_policy.seen(2, 64))
    assert "batch" not in vars(policy.backbone) and "forward" not in vars(policy)
    assert (sum(made[phase] for phase in bench_policy.PHASES) == pytest.approx(made["whole"])) and all((made[phase] >= 0).all() for phase in ("preparing", "forward"))


def test_it_takes_a_folder_and_writes_its_figures(tmp_path, capsys):
    load_backbone("tiny", device="cpu").save(tmp_path / "vlm")
    threads = torch.get_num_threads()
    try: bench_policy.main(["--backbone", str(tmp_path / "vlm"), "--rounds", "1", "--batches", "1", "2", "--head", "vlm4vla", "--hidden", "16", "--out", str(tmp_path / "f.json")])
    finally: torch.set_num_threads(threads)
    found = json.loads((tmp_path / "f.json").read_text())
    assert capsys.readouterr().out.count("times (rounds") == 4 and found["shapes"]["backbone"] == "internvl" and str(tmp_path) not in json.dumps(found)
    for name, batch in ("batch 1", 1), ("batch 2", 2):
        figures = found[name]["by_clock"]
        assert figures["ratios"][0] <= figures["ratio"] <= figures["ratios"][1] and figures["chunks_per_second"] == pytest.approx(batch / figures["seconds"])
