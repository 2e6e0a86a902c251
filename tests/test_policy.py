"""The policy: its query, its folder, its fine-tuning, with tiny real models of both families."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from transformers import AutoModelForImageTextToText, Qwen3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from embodied_midtrain.actions import ActionNormaliser
from embodied_midtrain.backbone import TEMPLATE, Backbone, load_backbone, tiny_backbone, tiny_tokenizer
from embodied_midtrain.core import Stage, file_hash, generator, read_json, read_table, write_json
from embodied_midtrain.jobs import run_parallel
from embodied_midtrain.policy import AUGMENT, HEADS, RECIPES, WHY, ActionHead, Changing, Frames, Policy, action_loss, cropped, differences, finetune, finetune_arm, fit_normaliser, jittered, load_policy, query_states, save_policy, shifted
from embodied_midtrain.samples import Episode, ImageRef
from embodied_midtrain.processes import processes

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


def test_another_normaliser_is_refused(tmp_path):
    "Even with the hashes of files in order, the numbers that scale actions must be those of the training."
    save_policy(Policy(internvl(), NORMALISER, chunk=3, hidden=32), tmp_path)
    made = read_json(tmp_path / "policy.json")
    assert made["normaliser"] == NORMALISER.hash
    NORMALISER.narrowed(0.65).save(tmp_path / "normaliser.json")
    made["files"]["normaliser.json"] = file_hash(tmp_path / "normaliser.json")
    write_json(made, tmp_path / "policy.json")
    with pytest.raises(ValueError, match="normaliser.json scales actions otherwise .* copy the whole folder again, or fine-tune it again"): load_policy(tmp_path)
    del made["normaliser"]
    write_json(made, tmp_path / "policy.json")
    with pytest.raises(ValueError, match="not recorded"): load_policy(tmp_path)


ACT = """
import sys
import numpy as np, torch
torch.set_num_threads(1)
from embodied_midtrain.policy import load_policy
seen = np.load(sys.argv[2])
np.save(sys.argv[3], load_policy(sys.argv[1], device="cpu").act(list(seen["pictures"]), list(seen["texts"])))
"""


@pytest.mark.parametrize("made", [internvl, qwen3_vl])
def test_the_folder_alone_is_enough_to_act(made, tmp_path):
    "Copied elsewhere, read by another process without network or home: pictures and instructions in, actions in the robot's units out, to the bit."
    policy, pictures, texts = Policy(made(), NORMALISER, chunk=3, hidden=32, seed=2, resize=48, system="you act", augment="crop", recipe="vlm4vla"), images(3), WORDS
    save_policy(policy, tmp_path / "here/policy")
    shutil.move(tmp_path / "here/policy", tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "here")
    for name in "home", "cwd": (tmp_path / name).mkdir()
    np.savez(tmp_path / "seen.npz", pictures=np.stack(pictures), texts=np.array(texts))
    alone = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ACT, "../elsewhere", "../seen.npz", "../acted.npy"], cwd=tmp_path / "cwd", env=alone, check=True)
    acted, low, high = np.load(tmp_path / "acted.npy"), np.array(NORMALISER.low), np.array(NORMALISER.high)
    assert acted.shape == (3, 3, 7) and (acted == policy.act(pictures, texts)).all()
    assert (acted[..., :6] >= low - 1e-6).all() and (acted[..., :6] <= high + 1e-6).all() and (np.abs(acted[..., 0]) > 1e-5).any()


def test_one_forward_pass_and_no_logits(policy):
    "However many pictures and actions: the model runs once, its vision tower once, and the vocabulary is never written out."
    passes = {"text": 0, "vision": 0, "logits": 0, "model": 0}
    def count(name): return lambda *_: passes.update({name: passes[name] + 1})
    base = policy.vlm.base_model
    for name, part in ("text", base.language_model), ("vision", getattr(base, "vision_tower", None) or base.visual), ("logits", policy.vlm.get_output_embeddings()), ("model", base): part.register_forward_hook(count(name))
    assert policy.act(images(4), [WORDS[0], WORDS[1]] * 2).shape == (4, 3, 7)
    assert passes == {"text": 1, "vision": 1, "logits": 0, "model": 1}
    with torch.no_grad(): policy.vlm(**policy.backbone.batch([policy.sample(ImageRef(array=images(1)[0]), WORDS[0])]))
    assert passes["logits"] == 1   # and it would have been noticed


# ---- recipes

def company(policy):
    "States of a short prompt in training, alone and beside a longer one; and of the same when acting."
    short, long_ = (policy.sample(ImageRef(array=images(1)[0]), text) for text in (WORDS[0], WORDS[2] + " " + WORDS[1]))
    def state(samples):
        seen = []
        hook = policy.head.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        with torch.no_grad(): policy(policy.backbone.batch(samples))
        hook.remove()
        return seen[0][0]
    trained = [policy.train() and state(samples) for samples in ([short], [short, long_])]
    acting = [policy.eval() and state(samples) for samples in ([short], [short, long_])]
    return (*trained, *acting)


@pytest.mark.parametrize("made", [internvl, qwen3_vl])
def test_padding_moves_the_query_of_vlm4vla_in_training_only(made):
    away = lambda a, b: ((a - b).norm() / a.norm()).item()
    fixed, faithful = (company(Policy(made(), NORMALISER, chunk=3, hidden=32, seed=2, recipe=name)) for name in ("fixed", "vlm4vla"))
    assert max(away(fixed[0], other) for other in fixed[1:]) < 1e-5               # whatever the company, in training and when acting
    assert away(faithful[0], faithful[1]) > 1e-3                                   # the quirk
    assert max(away(faithful[0], other) for other in faithful[2:]) < 1e-5          # alone there is no padding; acting puts it behind the prompt


def test_positions_are_counted_for_qwen_alone():
    "M-RoPE gives a picture's tokens rows and columns; VLM4VLA counts them. InternVL counts anyhow."
    for made, differ in (internvl, False), (qwen3_vl, True):
        policy = Policy(made(), NORMALISER, chunk=3, hidden=32)
        inputs = policy.backbone.batch([policy.sample(ImageRef(array=images(1)[0]), WORDS[0])])
        with torch.no_grad(): own, counted = (query_states(policy.backbone, inputs, policy.query, positions=positions) for positions in ("model", "count"))
        assert torch.equal(own, counted) != differ


def test_a_query_from_zero_has_a_gradient_out_of_proportion():
    def first(name):
        policy = Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2, recipe=name).train()
        batch = Frames(policy, episodes(2)).batch(np.arange(6))
        action_loss(*policy(batch["inputs"]), batch["target"], batch["mask"]).backward()
        return policy.query, policy.head.state_dict()
    (drawn, heads), (zeros, same) = first("fixed"), first("vlm4vla")
    assert (zeros == 0).all() and (drawn != 0).any() and zeros.grad.norm() > 10 * drawn.grad.norm()
    assert all(torch.equal(heads[name], same[name]) for name in heads)             # what else is drawn is the same


def test_clipping_is_off_in_vlm4vla():
    "One step of Adam hardly depends on the gradient's size, so the sums it keeps are looked at: here, the gradient itself after clipping."
    def gradient(name):
        policy, norms = Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2, recipe="fixed"), []
        policy.recipe, step = RECIPES[name], torch.optim.AdamW.step
        def look(optimizer, *args, **more):
            norms.append(math.sqrt(sum(p.grad.square().sum().item() for group in optimizer.param_groups for p in group["params"] if p.grad is not None)))
            return step(optimizer, *args, **more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", look)
            log = finetune(policy, episodes(2), steps=1, lr=1e-3, batch_size=8, gripper_weight=1000.0)
        return norms[0], log.grad_norm[0]
    for name, clipped in ("fixed", True), ("vlm4vla", False):
        used, logged = gradient(name)
        assert logged > 10 and used == pytest.approx(1.0 if clipped else logged, rel=1e-3)


def test_vlm4vla_scales_twice_where_quantiles_are_the_limits():
    made = episodes(6)
    for mode in ("q01q99", "calvin", "minmax"):
        once, twice = (fit_normaliser(made, mode, name) for name in ("fixed", "vlm4vla"))
        span = lambda normaliser: np.subtract(normaliser.high, normaliser.low)
        np.testing.assert_allclose(span(twice), span(once) * (0.65 if mode == "q01q99" else 1.0), rtol=1e-12)
    actions = made[0].actions
    once, twice = (fit_normaliser(made, "q01q99", name).encode(actions)[:, :6] for name in ("fixed", "vlm4vla"))
    np.testing.assert_allclose(twice, np.clip(once, -0.65, 0.65) / 0.65, atol=1e-6)
    with pytest.raises(ValueError, match="did you mean 'fixed'"): fit_normaliser(made, "q01q99", "fixd")


def test_both_recipes_go_through_a_whole_fine_tuning(tmp_path):
    ends = {name: load_policy(arm(tmp_path / name, recipe=name).file(f"step-{STEPS}"), device="cpu") for name in RECIPES}
    assert [policy.settings["recipe"] for policy in ends.values()] == list(RECIPES) and ends["vlm4vla"].recipe == RECIPES["vlm4vla"]
    vlm4vla, fixed = (np.subtract(ends[name].normaliser.high, ends[name].normaliser.low) for name in ("vlm4vla", "fixed"))
    np.testing.assert_allclose(vlm4vla, 0.65 * fixed, rtol=1e-12)


def test_every_choice_has_its_reason():
    table = differences()
    assert list(table.columns) == ["vlm4vla", "fixed", "why"] and set(table.index) == set(WHY) == set(vars(RECIPES["fixed"]))
    assert (table.vlm4vla != table.fixed).all() and table.why.str.len().min() > 30


@pytest.mark.parametrize("wrong", [dict(recipe="vlm4vla2"), dict(augment="shft"), dict(head="smal")])
def test_unknown_names_are_refused(wrong):
    with pytest.raises(ValueError, match="did you mean"): Policy(internvl(), NORMALISER, chunk=3, **wrong)


# ---- the head

@pytest.mark.parametrize("chunk, count", [(10, 4_479_558), (4, 4_468_764)])
def test_the_head_has_vlm4vlas_parameters(chunk, count):
    "Layer by layer as its facts say: trunk 1024, 512, 1024; two branches 1024, 1024, 512, 256 and 6n or n."
    linear = lambda *widths: sum(a * b + b for a, b in zip(widths, widths[1:]))
    branch = lambda outputs: linear(1024, 1024, 512, 256, outputs)
    assert sum(p.numel() for p in ActionHead(1024, chunk).parameters()) == count == linear(1024, 512, 1024) + branch(6 * chunk) + branch(chunk)


# ---- pictures changed

def test_shifts_move_pictures_and_lose_nothing_inside():
    picture = images(1)[0]
    seen = {tuple(place) for i in range(300) for place in np.argwhere((shifted(picture, generator(i), 2) == picture[31, 32]).all(-1))} & {(31 + y, 32 + x) for x in range(-2, 3) for y in range(-2, 3)}
    assert len(seen) == 25                                                          # every shift of up to two pixels occurs
    corner = shifted(picture, generator(0), 10)
    assert corner.shape == picture.shape and {tuple(p) for p in corner.reshape(-1, 3)} <= {tuple(p) for p in picture.reshape(-1, 3)}


def test_crops_show_nine_tenths_of_the_area():
    "A picture of its own coordinates tells what is shown: the middle when acting, any place in training."
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)
    picture = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.zeros((64, 64), np.uint8)], -1)
    sides = [np.ptp(cropped(picture, rng)[..., channel].astype(float)) / 255 for rng in (None, generator(1), generator(2)) for channel in (0, 1)]
    np.testing.assert_allclose(sides, 0.9 ** 0.5, atol=0.02)
    middle = cropped(picture)
    assert abs(middle[..., 0].mean() - 127.5) < 1 and abs(middle[..., 1].mean() - 127.5) < 1
    places = np.array([cropped(picture, generator(i))[..., 0].mean() for i in range(200)])
    assert places.min() < 123 and places.max() > 132 and abs(places.mean() - 127.5) < 1


def test_colours_change_within_their_bounds():
    grey = np.full((8, 8, 3), 128, np.uint8)
    levels = np.array([jittered(grey, generator(i)).mean() for i in range(300)])
    assert levels.min() < 128 - 45 and levels.max() > 128 + 45 and np.abs(levels - 128).max() <= 0.2 * 255 + 2
    assert max(np.ptp(jittered(grey, generator(i)), axis=2).max() for i in range(50)) <= 1   # grey has no colour to change
    red = np.full((8, 8, 3), (200, 40, 40), np.uint8)
    hues = np.array([np.subtract(*jittered(red, generator(i))[0, 0, 1:].astype(int)) for i in range(200)])
    assert hues.min() < -10 and hues.max() > 10                                     # towards yellow, towards violet


@pytest.mark.parametrize("augment", AUGMENT)
def test_what_is_drawn_depends_on_seed_and_position_alone(augment):
    policy = Policy(internvl(), NORMALISER, chunk=3, hidden=32, augment=augment)
    frames = Frames(policy, episodes(2))
    order = [np.arange(4), np.arange(4)]
    make = lambda seed: Changing(frames, order, seed=seed)
    pixels = lambda batches, position: batches(position)["inputs"]["pixel_values"]
    batches, plain = make(3), frames.batch(order[0])["inputs"]["pixel_values"]
    later, first = pixels(batches, 1), pixels(batches, 0)                            # asked in another order
    assert torch.equal(first, pixels(make(3), 0)) and torch.equal(later, pixels(make(3), 1))
    if augment == "none": assert torch.equal(first, plain) and torch.equal(first, later)
    else: assert not torch.equal(first, later) and not torch.equal(first, pixels(make(4), 0)) and first.shape == plain.shape


def test_who_learned_from_crops_acts_on_the_middle():
    picture = images(1)[0]
    policy = Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2, augment="crop")
    plain = Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2)
    assert (policy.act([picture], WORDS[:1]) == plain.act([cropped(picture)], WORDS[:1])).all() and (policy.act([picture], WORDS[:1]) != plain.act([picture], WORDS[:1])).any()


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_pictures_stay_closed_until_their_batch(family):
    "Demonstrations of weeks do not fit into memory: a picture is read, and resized, when its batch is made."
    opened = []
    def load(i): return lambda: opened.append(i) or images(1, i)[0]
    episode = Episode("e/0", "e", tuple(ImageRef(load=load(i)) for i in range(5)), WORDS[0], episodes(1)[0].actions)
    frames = Frames(Policy(globals()[family](), NORMALISER, chunk=3, hidden=32, resize=32), [episode])
    assert opened == []
    frames.batch(np.array([1, 3]))
    assert opened == [1, 3]


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


PARAMETERS = dict(demos={"reader": "tabletop_robot", "name": "demo", "task": "reach", "count": 6}, normaliser="q01q99", chunk=2, head="small", hidden=16, prompt="{instruction}", system="", resize=0, recipe="fixed", augment="none", seed=0,
                  freeze=[], checkpoints=[4], steps=STEPS, lr=1e-3, batch_size=4, head_rate=3.0, gripper_weight=0.01, accumulation=1, optimizer="adamw", schedule="cosine", warmup=0, weight_decay=0.0,
                  beta2=0.98, precision="no", save_every=2)


def arm(run, kill_at=None, how={}, **parameters):
    """One fine-tuning as the stage does it; kills itself after a step."""
    done = [0]
    def tick(n=1):
        done[0] += n
        if done[0] == kill_at: os.kill(os.getpid(), signal.SIGKILL)
    stage = Stage(run, "policy/reach/base-0", PARAMETERS | parameters)
    finetune_arm(stage, "tiny", tick=tick, **how)
    return stage


@pytest.mark.parametrize("augment, kills", [("none", (3, 7)), ("crop", (5,))])
def test_killed_arm_equals_an_uninterrupted_one(tmp_path, augment, kills):
    arm(tmp_path / "whole", augment=augment)
    for kill_at in kills:
        code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_policy; test_policy.arm({str(tmp_path / 'killed')!r}, {kill_at}, augment={augment!r})"
        assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed/policy/reach/base-0/manifest.json").exists()
    arm(tmp_path / "killed", augment=augment)
    whole, killed = (json.loads((tmp_path / run / "policy/reach/base-0/manifest.json").read_text()) for run in ("whole", "killed"))
    assert whole["files"] == killed["files"] and whole["counts"] == killed["counts"]
    assert {name.split("/")[0] for name in whole["files"]} == {"step-4", f"step-{STEPS}", "log.parquet"}  # and no training state left


def test_threads_and_checkpointing_change_nothing(tmp_path):
    "How batches are made and where activations come from is no part of what is learned: to the bit, and the log holds no times."
    plain, other = arm(tmp_path / "plain"), arm(tmp_path / "other", how=dict(threads=2, checkpointing=True))
    assert plain.key == other.key and plain.manifest()["files"] == other.manifest()["files"]
    log = read_table(plain.file("log.parquet"))
    assert {"loss", "tokens", "padded"} <= set(log.columns) and not [c for c in log.columns if "seconds" in c] and (log.tokens <= log.padded).all()


def test_a_frozen_part_stays_as_it_was(tmp_path):
    start, stage = tiny_weights(), arm(tmp_path, freeze=["vision_tower"])
    ends = load_policy(stage.file(f"step-{STEPS}"), device="cpu").vlm.state_dict()
    moved = {"vision_tower" in name for name, weight in ends.items() if not torch.equal(weight, start[name])}
    assert moved == {False}


def tiny_weights(): return load_backbone("tiny", device="cpu").model.state_dict()


def test_an_unknown_tracker_is_named(tmp_path):
    with pytest.raises(ImportError, match="'no-such-tracker' is not installed"): arm(tmp_path, how=dict(tracker="no-such-tracker"))


def test_two_small_batches_equal_one_large():
    "Chunks end with their episode, so that batches hold different numbers of actions: the mean is over the actions of the step, not over batches."
    def losses(**how): return finetune(Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2), episodes(), steps=3, lr=1e-3, **how).loss
    whole, parts = losses(batch_size=10), losses(batch_size=5, accumulation=2)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_a_loss_that_is_not_finite_names_its_frames():
    policy = Policy(internvl(), NORMALISER, chunk=3, hidden=32, seed=2)
    with torch.no_grad(): policy.query.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="made/[0-3]/[0-4]"): finetune(policy, episodes(), steps=1, lr=1e-3, batch_size=3)


# ---- several processes

LAUNCH = "{} --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"   # on a CPU with ACCELERATE_USE_CPU
WAYS = {"side by side": "--multi_gpu", "in pieces": "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"}


def arm_of_several(run, cut, tick):
    "What each process does."
    torch.set_num_threads(1)
    if cut: processes()._shared_state["distributed_type"] = DistributedType.MULTI_GPU   # accelerate offers FSDP to other devices only; torch's own works with CPUs
    arm(run)


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_of_two_processes_equals_that_of_one(tmp_path, monkeypatch, way):
    "Policies are kept on the way and at the end, whole, and by one process."
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true"), monkeypatch.setenv("OMP_NUM_THREADS", "1")
    one, two = (Stage(tmp_path / name, "policy/reach/base-0") for name in ("one", "two"))
    arm(one.run, accumulation=2)
    run_parallel({"base-0": (arm_of_several, dict(run=two.run, cut=way == "in pieces"))}, launch=LAUNCH.format(WAYS[way]))
    assert two.manifest()["counts"] == one.manifest()["counts"] | {"processes": 2} and two.manifest()["files"].keys() == one.manifest()["files"].keys()
    assert np.allclose(*(read_table(stage.file("log.parquet")).loss for stage in (one, two)), atol=1e-5)
    for step in sorted(p.name for p in one.path.glob("step-*")):
        ours, theirs = (load_policy(stage.file(step), device="cpu").state_dict() for stage in (one, two))
        assert ours.keys() == theirs.keys()
        for name in ours: torch.testing.assert_close(ours[name], theirs[name], atol=2e-4 if name.endswith("k_proj.bias") else 1e-5, rtol=0)   # the gradient of a key's bias is rounding, and AdamW makes steps of that
