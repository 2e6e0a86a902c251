"""Inputs are built in one place, for every family, with and without torchvision."""
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from embodied_midtrain.backbone import FAMILIES, TINY, Backbone, answer_loss, answer_nll, backbone_hash, load_backbone, tiny_backbone, tiny_tokenizer
from embodied_midtrain.samples import BadSample, ImageRef, Sample, turn
from embodied_midtrain.tabletop.pool import TabletopSource


def picture(seed=0, height=64, width=64):
    return ImageRef(array=np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def sample(*turns, images=1, number=0):
    roles = ("user", "assistant") * len(turns)
    return Sample(f"t/{number}", "t", "vlm", tuple(picture(i) for i in range(images)), tuple(turn(r, t) for r, t in zip(roles, turns)))


@pytest.fixture(scope="module")
def tiny(): return load_backbone("tiny", device="cpu")


def qwen3_vl():
    from transformers import Qwen3VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    words = tiny_tokenizer(["point to the apple"])
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]})
    words.chat_template = words.chat_template.replace("<IMG_CONTEXT>", "<|vision_start|><|image_pad|><|vision_end|>")
    names = dict(image_token_id="image_pad", video_token_id="video_pad", vision_start_token_id="vision_start", vision_end_token_id="vision_end")
    config = Qwen3VLConfig(
        text_config=dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=64,
                         rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}),
        vision_config=dict(hidden_size=32, depth=3, num_heads=2, intermediate_size=64, patch_size=8, spatial_merge_size=2, out_hidden_size=32,
                           num_position_embeddings=64, deepstack_visual_indexes=[1]), **{k: words.convert_tokens_to_ids(f"<|{v}|>") for k, v in names.items()})
    torch.manual_seed(0)
    processor = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=128 * 128)
    return Backbone(AutoModelForImageTextToText.from_config(config).eval(), words, processor, "tiny Qwen3-VL")


@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_batched_equals_alone_and_loss_is_the_models_own(family, tiny):
    backbone = tiny if family == "internvl" else qwen3_vl()
    samples = [sample("<image>\npoint to the apple", "[(0.35, 0.50)]"), sample("<image>\npoint", "the", "to <image>", "apple apple", images=2, number=1)]
    assert backbone.model.config.model_type == family
    with torch.no_grad():
        batch = backbone.batch(samples, answers=True)
        together, alone = backbone.hidden(batch), [backbone.hidden(backbone.batch([s], answers=True)) for s in samples]
        for row, one in zip(together, alone): assert torch.allclose(row[:one.shape[1]], one[0], atol=1e-4)
        nll, rows = answer_nll(backbone, batch)
        assert torch.allclose(nll.mean(), backbone.model(**batch).loss, atol=1e-4) and set(rows.tolist()) == {0, 1}
        assert torch.allclose(answer_loss(backbone, batch), nll.mean())


def test_a_saved_qwen3_vl_loads_through_the_same_code(tmp_path):
    backbone = qwen3_vl()
    backbone.save(tmp_path)
    again = load_backbone(str(tmp_path), device="cpu")
    batch = [sample("<image>\npoint to the apple", "the", images=1)]
    with torch.no_grad(): assert torch.allclose(again.hidden(again.batch(batch)), backbone.hidden(backbone.batch(batch)), atol=1e-5)


def test_labels_are_the_answers_and_nothing_else(tiny):
    s = sample("<image>\npoint to the apple", "[(0.35, 0.50)]", "where is the cup", "[(0.10, 0.20)]")
    batch = tiny.batch([s], answers=True)
    said = tiny.tokenizer.convert_ids_to_tokens(batch["labels"][batch["labels"] != -100].tolist())
    assert said == ["[(0.3", "5", ", 0.5", "0)]", "<eos>", "[(0.1", "0", ", 0.2", "0)]", "<eos>"]
    asked = tiny.batch([s])
    assert (asked["labels"] == -100).all() and asked["input_ids"].shape[1] < batch["input_ids"].shape[1]


def test_text_alone_and_texts_beside_images(tiny):
    samples = [sample("what is one plus two", "3", images=0), sample("<image>\npoint to the apple", "[(0.35, 0.50)]", number=1)]
    with torch.no_grad():
        assert torch.allclose(tiny.hidden(tiny.batch(samples))[1], tiny.hidden(tiny.batch(samples[1:]))[0], atol=1e-5)
        assert tiny.hidden(tiny.batch(samples[:1])).shape[0] == 1


def test_a_placeholder_in_the_text_is_refused(tiny):
    with pytest.raises(BadSample, match="2 image placeholders in the text but 1 images"):
        tiny.batch([sample("<image>\npoint <IMG_CONTEXT> to", "the apple")])


def test_tiny_loads_with_plain_transformers():
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    assert model.config.model_type == "internvl" and tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 4e6


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="AutoProcessor needs torchvision for these families")
@pytest.mark.parametrize("family", ["internvl", "qwen3_vl"])
def test_our_inputs_equal_autoprocessors(family, tiny, tmp_path):
    "Token for token and pixel for pixel; where a picture is resized, up to the rounding in which torchvision and PIL differ: one step of 255, on noise."
    from transformers import AutoProcessor
    backbone = tiny if family == "internvl" else qwen3_vl()
    backbone.save(tmp_path)
    processor, one_tile = AutoProcessor.from_pretrained(tmp_path), dict(crop_to_patches=False) if family == "internvl" else {}
    plain, two = sample("<image>\npoint to the apple", "the"), sample("<image>\npoint to <image>", "the", images=2)
    for s, steps in ((plain, 0.01), (two, 0.01), (replace(plain, images=(picture(height=90, width=120),)), 1.1)):
        ours, theirs = backbone.batch([s]), processor(images=[image.open() for image in s.images], text=backbone.prompt(s), return_tensors="pt", **one_tile)
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() * max(backbone.image_processor.image_std) * 255 < steps


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such/folder"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match="no backbone at"): load_backbone(name)


def test_the_hash_of_a_backbone_is_of_its_content_or_of_its_name_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, content in ("a", "1"), ("b", "1"), ("c", "2"):
        (tmp_path / "models" / folder).mkdir(parents=True)
        (tmp_path / "models" / folder / "config.json").write_text(content)
    a, b, c = (backbone_hash(name) for name in ("models/a", str(tmp_path / "models" / "b"), "models/c"))
    assert a == b != c and backbone_hash("tiny") == backbone_hash(str(TINY))
    assert backbone_hash("models/other", "v1") == "models/other@v1" != backbone_hash("models/other", "v2")   # owner/name: of a hub, where it is no folder
    for missing in "run/midtrain/random-0", str(tmp_path / "x"), "x":
        with pytest.raises(FileNotFoundError, match="does not exist"): backbone_hash(missing)


def test_unknown_family_names_the_known(tiny):
    class Config: model_type = "paligemma"
    class Model: config = Config()
    with pytest.raises(ValueError, match=", ".join(FAMILIES)): Backbone(Model(), tiny.tokenizer, tiny.image_processor, "x")
