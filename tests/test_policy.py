"""The policy: its query, its folder, its fine-tuning, with tiny real models of both families."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from embodied_midtrain.actions import ActionNormaliser
from embodied_midtrain.backbone import TEMPLATE, Backbone, tiny_backbone, tiny_tokenizer
from embodied_midtrain.core import Stage, generator
from embodied_midtrain.policy import HEADS, ActionHead, Frames, Policy, action_loss, finetune, finetune_arm, load_policy, query_states, save_policy
from embodied_midtrain.samples import Episode, ImageRef

torch.set_num_threads(1)  # sums are split by threads: a killed process and its successor need the same number to agree to the last bit
WORDS = ["touch the apple", "push the old jar to the left", "what action should the robotic arm take to"]
NORMALISER = ActionNormaliser((-0.1, -0.2, -0.3, -1.0, -1.0, 0.0), (0.1, 0.2, 0.3, 1.0, 1.0, 0.0))
STEPS = 8


def internvl(): return tiny_backbone(tiny_tokenizer(WORDS), seed=1)


def qwen3_vl():
    words = tiny_tokenizer(WORDS)
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]})
    words.chat_template = TEMPLATE.replace("<IMG_CONTEXT>", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {f"{name}_id": words.convert_tokens_to_ids(f"<|{token}|>") for name, token in dict(image_token="image_pad", video_token="video_pad", vision_start_token="vision_start", vision_end_token="vision_end").items()}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=64, rope_parameters=rope)
    vision = dict(hidden_size=32, depth=2, num_heads=2, intermediate_size=64, patch_size=8, spatial_merge_size=2, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[1])
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(Qwen3VLConfig(text_config=text, vision_config=vision, **ids))
    return Backbone(model, words, Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=128 * 128), "tiny Qwen3-VL")


def images(n, seed=0): return list(generator(seed, "images").integers(0, 256, (n, 64, 64, 3), dtype=np.uint8))


def episodes(n=4):
    rng = generator(0, "episodes")
    def one(i):
        arm = rng.uniform(NORMALISER.low, NORMALISER.high, (5, 6))
        return Episode(f"made/{i}", "made", tuple(ImageRef(array=x) for x in images(5, i)), WORDS[i % 2], np.concatenate([arm, rng.integers(0, 2, (5, 1))], 1).astype(np.float32))
    return [one(i) for i in range(n)]


@pytest.fixture(params=[internvl, qwen3_vl])
def policy(request): return Policy(request.param(), NORMALISER, chunk=3, hidden=32, seed=2)


def test_batched_equals_single(policy):
    pictures, texts = images(4), [WORDS[0], WORDS[1]] * 2
    together = policy.act(pictures, texts)
    alone = np.concatenate([policy.act([x], [t]) for x, t in zip(pictures, texts)])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert together.shape == (4, 3, 7) and np.abs(together[0] - together[1]).max() > 1e-6
    low, high = np.array(NORMALISER.low), np.array(NORMALISER.high)
    assert (together[..., :6] >= low - 1e-6).all() and (together[..., :6] <= high + 1e-6).all() and set(np.unique(together[..., 6])) <= {0.0, 1.0}


def test_padding_does_not_move_the_query(policy):
    inputs = policy.backbone.batch([policy.sample(ImageRef(array=images(1)[0]), WORDS[0])])
    longer = {k: torch.nn.functional.pad(v, (0, 7)) if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in inputs.items()}
    with torch.no_grad(): a, b = (query_states(policy.backbone, x, policy.query) for x in (inputs, longer))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_query_equals_a_token_behind_the_prompt(policy):
    """With a token's own embedding as query, the state is that of the token: positions, M-RoPE included, are the model's."""
    inputs = policy.backbone.batch([policy.sample(ImageRef(array=images(1)[0]), WORDS[0])])
    token = policy.backbone.tokenizer.convert_tokens_to_ids("apple")
    longer = {k: torch.nn.functional.pad(v, (0, 1), value={"input_ids": token, "attention_mask": 1}.get(k, 0)) if k in ("input_ids", "attention_mask", "mm_token_type_ids") else v for k, v in inputs.items()}
    with torch.no_grad():
        state = query_states(policy.backbone, inputs, policy.vlm.get_input_embeddings().weight[token])
        torch.testing.assert_close(state, policy.backbone.hidden(longer)[:, -1], atol=1e-5, rtol=1e-5)


def test_everything_learns(policy):
    frames = Frames(policy, episodes(2))
    batch = frames.batch(np.arange(6))
    action_loss(*policy(batch["inputs"]), batch["target"], batch["mask"]).backward()
    assert policy.query.grad.abs().max() > 0
    dead = {n for n, p in policy.named_parameters() if p.grad is None}
    assert all("lm_head" in n for n in dead), dead


def test_saved_equals_loaded(policy, tmp_path):
    save_policy(policy, tmp_path / "p")
    loaded = load_policy(tmp_path / "p", device="cpu")
    assert (loaded.act(images(3), WORDS) == policy.act(images(3), WORDS)).all() and loaded.settings == policy.settings
    save_policy(loaded, tmp_path / "q")
    for name in ("model.safetensors", "head.safetensors", "normaliser.json"): assert (tmp_path / "p" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


def test_exchanged_files_are_refused(tmp_path):
    for seed in (1, 2): save_policy(Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=seed), tmp_path / str(seed))
    (tmp_path / "1" / "head.safetensors").write_bytes((tmp_path / "2" / "head.safetensors").read_bytes())
    with pytest.raises(ValueError, match="head.safetensors is not the file"): load_policy(tmp_path / "1")
    (tmp_path / "2" / "normaliser.json").unlink()
    with pytest.raises(ValueError, match="normaliser.json is missing"): load_policy(tmp_path / "2")
    with pytest.raises(FileNotFoundError, match="no policy"): load_policy(tmp_path)


def test_act_is_what_training_saw():
    """The pictures and prompts of training are those of acting, resize and system message included."""
    policy = Policy(internvl(), NORMALISER, chunk=3, hidden=32, resize=32, system="you act")
    episode = episodes(1)[0]
    frames = Frames(policy, [episode])
    arm, gripper = policy.eval()(frames.batch(np.arange(5))["inputs"])
    acted = policy.act([np.asarray(i.array) for i in episode.images], [episode.instruction] * 5)
    decoded = NORMALISER.decode(torch.cat([arm, (gripper > 0)[..., None]], -1).detach().numpy())
    np.testing.assert_allclose(acted, decoded, atol=1e-6)
    assert frames.mask.sum() == 5 + 4 + 3


def test_masked_targets_do_not_count():
    head = ActionHead(8, 3, 16)
    arm, gripper = head(torch.randn(4, 8))
    target, mask = torch.rand(4, 3, 7), torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    before = action_loss(arm, gripper, target, mask)
    target[mask == 0] = 5
    assert torch.equal(before, action_loss(arm, gripper, target, mask))


@pytest.mark.parametrize("head", HEADS)
def test_learns_a_handful_of_frames(head):
    policy = Policy(internvl(), NORMALISER, chunk=2, head=head, hidden=64)
    log = finetune(policy, episodes(2), steps=30, lr=2e-3, batch_size=10, gripper_weight=0.1, optimizer="adamw", beta2=0.98)
    assert log.loss.tail(3).mean() < 0.6 * log.loss.head(3).mean()


PARAMETERS = dict(demos={"reader": "tabletop_robot", "name": "demo", "task": "reach", "count": 6}, normaliser="q01q99", chunk=2, head="small", hidden=16, prompt="{instruction}", system="", resize=0, seed=0,
                  checkpoints=[4], steps=STEPS, lr=1e-3, batch_size=4, head_rate=3.0, gripper_weight=0.01, accumulation=1, optimizer="adamw", schedule="cosine", warmup=0, weight_decay=0.0,
                  beta2=0.98, precision="no", save_every=2)


def arm(run, kill_at=None):
    """One fine-tuning as the stage does it; kills itself after a step."""
    done = [0]
    def tick(n=1):
        done[0] += n
        if done[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    finetune_arm(Stage(run, "policy/reach/base-0", PARAMETERS), "tiny", tick=tick)


def test_killed_arm_equals_an_uninterrupted_one(tmp_path):
    arm(tmp_path / "whole")
    for kill_at in (3, 7):
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_policy; test_policy.arm({str(tmp_path / 'killed')!r}, {kill_at})"
        assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed/policy/reach/base-0/manifest.json").exists()
    arm(tmp_path / "killed")
    whole, killed = (json.loads((tmp_path / run / "policy/reach/base-0/manifest.json").read_text()) for run in ("whole", "killed"))
    assert whole["files"] == killed["files"] and whole["counts"] == killed["counts"]
    assert {name.split("/")[0] for name in whole["files"]} == {"step-4", f"step-{STEPS}", "log.parquet"}  # and no training state left


def test_two_small_batches_equal_one_large():
    "Chunks end with their episode, so that batches hold different numbers of actions: the mean is over the actions of the step, not over batches."
    def losses(**how): return finetune(Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2), episodes(), steps=3, lr=1e-3, **how).loss
    whole, parts = losses(batch_size=10), losses(batch_size=5, accumulation=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_a_loss_that_is_not_finite_names_its_frames():
    policy = Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2)
    with torch.no_grad(): policy.query.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="made/[0-3]/[0-4]"): finetune(policy, episodes(), steps=1, lr=1e-3, batch_size=3)
