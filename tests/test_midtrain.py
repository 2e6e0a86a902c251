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
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

import embodied_midtrain.midtrain as midtrain_module
from embodied_midtrain.backbone import answer_loss, backbone_hash, load_backbone, tiny_backbone, tiny_tokenizer
from embodied_midtrain.core import Stage, file_hash, readable, stable_hash
from embodied_midtrain.jobs import run_parallel
from embodied_midtrain.midtrain import held_out_loss, held_out_text, midtrain, midtrain_arm, model_card
from embodied_midtrain.samples import IMAGE_MARK, ImageRef, Sample, turn
from embodied_midtrain.tabletop.pool import TabletopSource
from embodied_midtrain.processes import processes


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
    backbone.collate = lambda encoded, pixels, collate=backbone.collate: seen.extend(map(len, encoded)) or collate(encoded, pixels)
    _, left_out = midtrain(backbone, [*CHATS, long], steps=3, lr=1e-3, batch_size=5, sequence_length=60)
    assert left_out == 1 and max(seen) <= 60
    with pytest.raises(ValueError, match="raise sequence_length"): midtrain(backbone, [long], 1, 1e-3, 1, sequence_length=60)


def test_rises_and_falls_are_told_largest_first_over_all_seeds():
    rows = [("proximity", seed, source, 1.0, 1.0 + change) for seed in (0, 1) for source, change in (("near", -.5), ("far", 2 + seed), ("farther", 4.0))]
    table = pd.DataFrame([*rows, ("random", 0, "far", 1.0, 1.0)], columns=["arm", "seed", "source", "before", "after"])
    assert held_out_text(table) == ["proximity: fell on 1 of 3: near -0.50; rose on 2: farther +4.00, far +2.50", "random: the same on 1: far"]


PARAMETERS = dict(seed=0, steps=6, batch_size=4, tokens=0, window=8, accumulation=1, lr=5e-3, optimizer="muon", schedule="linear-tail", warmup=2, weight_decay=0.01, beta2=0.98, precision="no",
                  freeze=[], sequence_length=64, save_every=2)
POOL = [{"reader": "tabletop", "name": "mini-vcr", "count": 40}]


IDS = pd.DataFrame({"id": [f"mini-vcr/{i}" for i in range(20)], "source": "mini-vcr"})


def arm(run, kill_at=None, parameters={}, **how):
    """One arm as the stage trains it; kills itself after a step."""
    done = [0]
    def tick(n=1):
        done[0] += n
        if done[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    stage = Stage(run, "midtrain/random-0", PARAMETERS | parameters)
    midtrain_arm(stage, "tiny", None, POOL, IDS[:16], IDS[16:], tick, **how)
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


# ---- the model card

def cells_of(card, head):
    "The rows of the table with this head."
    lines = card.split(head, 1)[1].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:lines.index("") if "" in lines else None]]


def test_card_tells_what_the_folder_is_and_how_to_load_it(tmp_path):
    stage = arm(tmp_path, parameters={"sequence_length": 38})
    card, manifest = ModelCard.load(stage.file("README.md")), stage.manifest()
    assert card.data.to_dict() == {"pipeline_tag": "image-text-to-text", "library_name": "transformers", "tags": ["embodied-midtrain", "synthetic-data"]}   # 'tiny' is no model of the hub; a licence is not ours to give
    counts = manifest["counts"]
    assert 0 < counts["longer_than_sequence_length"] < 16
    assert f"hash `{backbone_hash('tiny')}`" in card.text and f"hash of their ids `{stable_hash(list(IDS.id[:16]))}`" in card.text
    assert f"Trained on: {counts['trained']}." in card.text and f"more than 38 tokens: {counts['longer_than_sequence_length']}." in card.text and "tabletop of embodied-midtrain): mini-vcr." in card.text
    assert cells_of(card.text, "| source | selected | share |") == [["mini-vcr", "16", "100.0%"]]
    assert dict(cells_of(card.text, "| parameter | value |")) == {k: readable(v) for k, v in manifest["parameters"].items()} | {"processes": "1"}
    told = pd.read_parquet(stage.file("held_out.parquet"))
    assert cells_of(card.text, "| source | samples | before | after |") == [[r.source, str(r.samples), f"{r.before:.4f}", f"{r.after:.4f}"] for r in told.itertuples()]
    assert str(tmp_path) not in card.content and manifest["files"]["README.md"] == file_hash(stage.file("README.md"))
    lines = card.text.split("```python\n")[1].split("```")[0].replace('"random-0"', repr(str(stage.path)))
    loaded = {}
    exec(lines, loaded)   # as a reader would
    trained, batch = load_backbone(str(stage.path), device="cpu"), load_backbone("tiny", device="cpu").batch(TabletopSource("mini-vcr", 4).fetch(["mini-vcr/1"]))
    assert len(lines.splitlines()) == 3 and torch.equal(loaded["model"](**batch).logits, trained.model(**batch).logits) and loaded["tokenizer"].get_vocab() == trained.tokenizer.get_vocab()


def test_card_names_a_hub_model_as_base():
    rows = dict(chosen=pd.DataFrame({"id": ["a|b/1"], "source": ["a|b"]}), counts=dict(trained=1, longer_than_sequence_length=0), held_out=pd.DataFrame(dict(source=["a|b"], samples=[1], before=[1.0], after=[.5])))
    card = ModelCard(model_card("random-0", {"sequence_length": 9}, "OpenGVLab/InternVL3_5-1B-HF", "abc", **rows))
    assert card.data.base_model == "OpenGVLab/InternVL3_5-1B-HF" and "revision abc; hash `OpenGVLab/InternVL3_5-1B-HF@abc`" in card.text and "Synthetic" not in card.text
    assert "| a\\|b | 1 | 100.0% |" in card.text


# ---- parameters

def test_batches_by_tokens_threads_and_recomputed_activations(tmp_path):
    how = {"tokens": 200, "steps": 4}
    plain, ahead = arm(tmp_path / "plain", parameters=how), arm(tmp_path / "ahead", parameters=how, threads=2, checkpointing=True)
    assert plain.manifest()["files"] == ahead.manifest()["files"]   # who makes a batch, and whether activations are kept, changes nothing
    log = pd.read_parquet(plain.file("log.parquet"))
    assert log.padded.max() <= 200 and (log.tokens <= log.padded).all() and not {"seconds", "data_seconds"} & set(log.columns)
    with pytest.raises(ValueError, match="a batch may hold 30"): arm(tmp_path / "small", parameters={"tokens": 30})


def test_frozen_parts_stay_as_they_are(tmp_path):
    before, after = load_backbone("tiny", device="cpu").model.state_dict(), load_backbone(str(arm(tmp_path, parameters={"freeze": ["vision_tower"], "steps": 2}).path), device="cpu").model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and not any("vision_tower" in name for name in moved)


# ---- several processes

LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"   # on a CPU with ACCELERATE_USE_CPU


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def arm_of_several(run, parameters, tick, kill_at=None, fail=None, cut=False):
    "What each process does; one of them may die or fail at a step."
    torch.set_num_threads(1)
    state = processes()
    if cut: state._shared_state["distributed_type"] = DistributedType.MULTI_GPU   # accelerate offers FSDP to other devices only; torch's own works with CPUs
    if state.process_index == fail: midtrain_module.answer_loss = lambda backbone, batch: 1 / 0
    arm(run, kill_at if state.is_main_process else None, parameters)


def launched(run, parameters, launch=LAUNCH, **how): return run_parallel({"random-0": (arm_of_several, dict(run=run, parameters=parameters, **how))}, launch=launch)


def folder_of(run): return Stage(run, "midtrain/random-0")


def same_weights(one, other, atol):
    one, other = (load_file(folder_of(run).file("model.safetensors")) for run in (one, other))
    assert one.keys() == other.keys()
    for name in one: torch.testing.assert_close(one[name], other[name], atol=atol, rtol=0)


ADAMW = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 3}


def test_an_arm_on_two_processes_equals_one_and_resumes(on_cpu, tmp_path):
    arm(tmp_path / "one", parameters=ADAMW | {"accumulation": 2})
    launched(tmp_path / "two", ADAMW)
    with pytest.raises(RuntimeError, match="job 'random-0' failed"): launched(tmp_path / "killed", ADAMW, kill_at=5)
    left = folder_of(tmp_path / "killed")
    assert sorted(f.name for f in left.file("state").glob("step-*")) == ["step-00000002", "step-00000004"] and not left.file("manifest.json").exists() and not left.file("model.safetensors").exists()
    launched(tmp_path / "killed", ADAMW)
    same_weights(tmp_path / "one", tmp_path / "two", 1e-5)
    same_weights(tmp_path / "two", tmp_path / "killed", 0)
    made = folder_of(tmp_path / "two").manifest()
    assert made["files"] == folder_of(tmp_path / "killed").manifest()["files"] and made["counts"]["processes"] == 2
    assert made["files"].keys() == folder_of(tmp_path / "one").manifest()["files"].keys() and "| processes | 2 |" in folder_of(tmp_path / "two").file("README.md").read_text()
    one, two = (pd.read_parquet(folder_of(tmp_path / name).file("held_out.parquet")) for name in ("one", "two"))
    np.testing.assert_allclose(one[["before", "after"]], two[["before", "after"]], atol=1e-4)


def test_an_arm_cut_into_pieces_equals_a_whole_one(on_cpu, tmp_path):
    "FSDP2: every process holds a part of each matrix; what is measured and saved is whole."
    arm(tmp_path / "one", parameters=ADAMW | {"accumulation": 2})
    fsdp = LAUNCH.replace("--multi_gpu", "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP")
    launched(tmp_path / "cut", ADAMW, launch=fsdp, cut=True)
    same_weights(tmp_path / "one", tmp_path / "cut", 1e-5)
    AutoModelForImageTextToText.from_pretrained(folder_of(tmp_path / "cut").path)


def test_an_error_in_one_process_is_named(on_cpu, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)job 'random-0' failed in process 1 of 2: Traceback.*ZeroDivisionError"): launched(tmp_path, ADAMW, fail=1)
    assert not folder_of(tmp_path).file("manifest.json").exists()
