"""Mid-training: what is learned, what is left out, and that killed arms end like others."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from embodied_midtrain.backbone import answer_loss, load_backbone, tiny_backbone, tiny_tokenizer
from embodied_midtrain.core import Stage
from embodied_midtrain.midtrain import held_out_loss, held_out_text, midtrain, midtrain_arm
from embodied_midtrain.samples import IMAGE_MARK, ImageRef, Sample, turn
from embodied_midtrain.tabletop.pool import TabletopSource


torch.set_num_threads(1)  # sums are split by threads: a killed process and its successor need the same number to agree to the last bit


def fresh(samples): return tiny_backbone(tiny_tokenizer([m["content"] for s in samples for m in s.messages]), seed=3)


def chat(i, *turns):
    image = ImageRef(array=np.full((64, 64, 3), 20 * i, np.uint8))
    said = [turn("user" if k % 2 == 0 else "assistant", (IMAGE_MARK + "\n" if k == 0 else "") + text) for k, text in enumerate(turns)]
    return Sample(f"made/{i}", "made", "vlm", (image,), tuple(said))


CHATS = [chat(i, "what is it", word, "and its colour", colour) for i, (word, colour) in enumerate([("apple", "red"), ("jar", "blue"), ("hat", "green"), ("lemon", "yellow")])]


def test_every_answer_is_learned_and_no_question():
    backbone = fresh(CHATS)
    batch = backbone.batch(CHATS, answers=True)
    for row, sample in enumerate(CHATS):
        text = backbone.tokenizer.decode(batch["labels"][row][batch["labels"][row] != -100])
        assert [w for w in text.split() if w.isalpha()] == [m["content"] for m in sample.messages if m["role"] == "assistant"]
    log, left_out = midtrain(backbone, CHATS, steps=40, lr=1e-2, batch_size=4, optimizer="muon", beta2=0.98)
    assert left_out == 0 and log.loss.iloc[-1] < 0.5 < 1 < log.loss.iloc[0]
    assert held_out_loss(backbone, CHATS).loss[0] < 0.5


def test_all_parameters_move():
    backbone = fresh(CHATS)
    before = {n: p.detach().clone() for n, p in backbone.model.named_parameters()}
    midtrain(backbone, CHATS, steps=2, lr=1e-2, batch_size=4, weight_decay=0.0, schedule="linear-tail")
    unmoved = {n for n, p in backbone.model.named_parameters() if torch.equal(p, before[n])}
    assert not unmoved - {"model.vision_tower.layernorm.weight", "model.vision_tower.layernorm.bias"}, unmoved


def test_padded_equals_unpadded():
    long, short = CHATS[0], chat(9, "what is it", "jar")
    backbone = fresh([long, short])
    backbone.model.eval()
    with torch.no_grad():
        padded = held_out_loss(backbone, [short, long]).loss[0]
        tokens = [int((backbone.batch([s], answers=True)["labels"] != -100).sum()) for s in (short, long)]
        alone = sum(n * answer_loss(backbone, backbone.batch([s], answers=True)).item() for n, s in zip(tokens, (short, long))) / sum(tokens)
    assert padded == pytest.approx(alone, abs=1e-5)


def test_long_samples_are_left_out_never_cut():
    long = chat(5, "what is it", " ".join(["apple"] * 200))
    backbone = fresh([*CHATS, long])
    seen = []
    backbone.collate = lambda encoded, pixels, collate=backbone.collate: seen.extend(len(e.ids) for e in encoded) or collate(encoded, pixels)
    _, left_out = midtrain(backbone, [*CHATS, long], steps=3, lr=1e-3, batch_size=5, sequence_length=60)
    assert left_out == 1 and max(seen) <= 60
    with pytest.raises(ValueError, match="raise sequence_length"): midtrain(backbone, [long], 1, 1e-3, 1, sequence_length=60)


def test_rises_and_falls_are_told_largest_first_over_all_seeds():
    rows = [("proximity", seed, source, 1.0, 1.0 + change) for seed in (0, 1) for source, change in (("near", -.5), ("far", 2 + seed), ("farther", 4.0))]
    table = pd.DataFrame([*rows, ("random", 0, "far", 1.0, 1.0)], columns=["arm", "seed", "source", "before", "after"])
    assert held_out_text(table) == ["proximity: fell on 1 of 3: near -0.50; rose on 2: farther +4.00, far +2.50", "random: the same on 1: far"]


PARAMETERS = dict(seed=0, steps=6, batch_size=4, accumulation=1, lr=5e-3, optimizer="muon", schedule="linear-tail", warmup=2, weight_decay=0.01, beta2=0.98, precision="no",
                  sequence_length=64, save_every=2)
POOL = [{"reader": "tabletop", "name": "mini-vcr", "count": 40}]


def arm(run, kill_at=None):
    """One arm as the stage trains it; kills itself after a step."""
    done, ids = [0], pd.DataFrame({"id": [f"mini-vcr/{i}" for i in range(20)], "source": "mini-vcr"})
    def tick(n=1):
        done[0] += n
        if done[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    stage = Stage(run, "midtrain/random-0", PARAMETERS)
    midtrain_arm(stage, "tiny", None, POOL, ids[:16], ids[16:], tick)
    return stage


def test_killed_arm_equals_an_uninterrupted_one_and_loads(tmp_path):
    whole = arm(tmp_path / "whole")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_midtrain; test_midtrain.arm({str(tmp_path / 'killed')!r}, 5)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
    killed = arm(tmp_path / "killed")
    assert whole.manifest()["files"] == killed.manifest()["files"] and not any(name.startswith("state") for name in whole.manifest()["files"])
    AutoModelForImageTextToText.from_pretrained(whole.path), AutoTokenizer.from_pretrained(whole.path)
    trained, start = load_backbone(str(whole.path), device="cpu"), load_backbone("tiny", device="cpu")
    samples = TabletopSource("mini-vcr", 4).fetch([f"mini-vcr/{i}" for i in range(4)])
    assert trained.prompt(samples[0]) == start.prompt(samples[0]) and trained.prompt_hash == start.prompt_hash
    assert not torch.equal(trained.hidden(trained.batch(samples)), start.hidden(start.batch(samples)))
    held_out = pd.read_parquet(whole.file("held_out.parquet"))
    assert list(held_out.columns) == ["source", "samples", "before", "after"] and held_out.samples.tolist() == [4]
    assert json.loads((whole.path / "manifest.json").read_text())["counts"] == {"selected": 16, "trained": 16, "longer_than_sequence_length": 0}
