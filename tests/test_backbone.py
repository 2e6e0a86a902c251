"""Inputs are built in one place, for every family, with and without torchvision."""
import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto import image_processing_auto as automatic

from embodied_midtrain import backbone as backbone_module
from embodied_midtrain.backbone import FAMILIES, TINY, Backbone, answer_loss, answer_nll, backbone_hash, image_tokens, load_backbone, tiny_backbone, tiny_tokenizer
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


def idefics(kind):
    "A tiny SmolVLM or Idefics3."
    from transformers import Idefics3Config, SmolVLMConfig
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
    Config, Processor = dict(smolvlm=(SmolVLMConfig, SmolVLMImageProcessorPil), idefics3=(Idefics3Config, Idefics3ImageProcessorPil))[kind]
    words = tiny_tokenizer(["point to the apple"])
    words.add_special_tokens({"additional_special_tokens": ["<image>", "<fake_token_around_image>", "<global-img>"]})
    words.chat_template = words.chat_template.replace("<IMG_CONTEXT>", "<image>")
    config = Config(text_config=dict(model_type="llama", vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64, pad_token_id=0),
                    vision_config=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64, patch_size=8),
                    image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2)
    torch.manual_seed(0)
    return Backbone(AutoModelForImageTextToText.from_config(config).eval(), words, Processor(size={"longest_edge": 128}, max_image_size={"longest_edge": 64}), f"tiny {kind}")


@pytest.fixture(scope="module")
def families(tiny): return {"internvl": tiny, "qwen3_vl": qwen3_vl(), "smolvlm": idefics("smolvlm"), "idefics3": idefics("idefics3")}


def test_every_family_is_tried(families): assert families.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_batched_equals_alone_and_loss_is_the_models_own(family, families):
    backbone = families[family]
    samples = [sample("<image>\npoint to the apple", "[(0.35, 0.50)]"), sample("<image>\npoint", "the", "to <image>", "apple apple", images=2, number=1)]
    assert backbone.model.config.model_type == family
    with torch.no_grad():
        batch = backbone.batch(samples, answers=True)
        together, alone = backbone.hidden(batch), [backbone.hidden(backbone.batch([s], answers=True)) for s in samples]
        for row, one in zip(together, alone): assert torch.allclose(row[:one.shape[1]], one[0], atol=1e-4)
        nll, rows = answer_nll(backbone, batch)
        assert torch.allclose(nll.mean(), backbone.model(**batch).loss, atol=1e-4) and set(rows.tolist()) == {0, 1}
        assert torch.allclose(answer_loss(backbone, batch), nll.mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_images_are_known_before_they_are_decoded(family, families):
    backbone = families[family]
    samples = [sample("<image>\npoint", "the"), replace(sample("<image>\n<image>", "to", images=2), images=(picture(1, 90, 120), picture(2, 130, 40))), sample("what", "the", images=0)]
    assert image_tokens(backbone, samples) == backbone.pixels(samples)[1]
    sent = backbone.pixels(samples)[0]["pixel_values"]
    assert sent.dtype == torch.uint8 and sent.numel() == backbone.batch(samples)["pixel_values"].numel()


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "idefics3"])
def test_pixels_equal_the_image_processors_to_the_bit(family, families):
    backbone = families[family]
    pictures = [picture(1, 90, 120), picture(2, 130, 40), picture(3)]
    s = replace(sample("<image><image><image>\npoint", "the", images=3), images=tuple(pictures))
    how = {} if family == "qwen3_vl" else dict(do_image_splitting=False)
    theirs = backbone.image_processor(images=[p.open() for p in pictures], return_tensors="pt", **how)["pixel_values"]
    assert torch.equal(backbone.batch([s])["pixel_values"], theirs)


def test_several_tokens_stand_around_an_image(families):
    "As SmolVLM's processor writes it: fake token, global token, the image, fake token."
    backbone = families["smolvlm"]
    ids = backbone.batch([sample("<image><image>\npoint", "the", images=2)])["input_ids"][0]
    around = ["<fake_token_around_image>", "<global-img>", *["<image>"] * 16, "<fake_token_around_image>"]
    assert backbone.tokenizer.convert_ids_to_tokens(ids.tolist())[1:1 + 2 * len(around)] == 2 * around


@pytest.mark.parametrize("chunk", [1, 40, 10**9])
def test_loss_in_chunks_is_the_loss(chunk, tiny, monkeypatch):
    samples, vocabulary = [sample("<image>\npoint to the apple", "[(0.35, 0.50)]", number=i) for i in range(5)], tiny.model.config.get_text_config().vocab_size
    def measured(size):
        monkeypatch.setattr(backbone_module, "CHUNK", size)
        tiny.model.zero_grad()
        loss = answer_loss(tiny, tiny.batch(samples, answers=True))
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in tiny.model.parameters() if p.grad is not None]
    (whole, gradients), (parts, others) = measured(10**9), measured(chunk * vocabulary)
    tiny.model.zero_grad()
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    for a, b in zip(gradients, others, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_no_more_logits_than_a_chunk_stand_in_memory(tiny, monkeypatch):
    seen, vocabulary = [], tiny.model.config.get_text_config().vocab_size
    monkeypatch.setattr(backbone_module, "CHUNK", 7 * vocabulary)
    look = tiny.model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(len(out)))
    try: answer_loss(tiny, tiny.batch([sample("<image>\npoint to the apple", "[(0.35, 0.50)]", number=i) for i in range(5)], answers=True)).backward()
    finally: look.remove()
    tiny.model.zero_grad()
    assert max(seen) == 7 and sum(seen) == 2 * 25   # 5 answers of 5 tokens; each chunk once forward and once more for its gradient


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm", "idefics3"])
def test_a_saved_backbone_loads_through_the_same_code(family, families, tmp_path):
    backbone = families[family]
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
    with pytest.raises(BadSample, match="<IMG_CONTEXT>, which this model takes for a picture"):
        tiny.batch([sample("<image>\npoint <IMG_CONTEXT> to", "the apple")])


def test_tiny_loads_with_plain_transformers():
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    assert model.config.model_type == "internvl" and tokenizer.context_image_token == "<IMG_CONTEXT>"
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 4e6


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_prepared_by_pil_even_where_torchvision_is(family, families, tmp_path, monkeypatch):
    "Classes that take tensors only stand in for torchvision's, which transformers prefers; `load_backbone` leaves them alone."
    backbone, named = families[family], automatic.get_image_processor_class_from_name
    backbone.save(tmp_path)
    class Torchvision(type(backbone.image_processor)):
        def normalize(self, image, *args, **how): raise TypeError(f"tensors are wanted, not {type(image)}")
    monkeypatch.setattr(automatic, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(automatic, "DEFAULT_TO_PIL_BACKEND_IMAGE_PROCESSORS", [])   # as of torchvision 0.27
    monkeypatch.setattr(automatic, "get_image_processor_class_from_name", lambda name: named(name) if name.endswith("Pil") else Torchvision)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is Torchvision
    again, one = load_backbone(str(tmp_path), device="cpu"), [sample("<image>\npoint to the apple", "the")]
    assert type(again.image_processor) is type(backbone.image_processor) and torch.equal(again.batch(one)["pixel_values"], backbone.batch(one)["pixel_values"])


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="AutoProcessor needs torchvision for these families")
@pytest.mark.parametrize("family", FAMILIES)
def test_our_inputs_equal_autoprocessors(family, families, tmp_path):
    """Token for token and pixel for pixel, but where a picture is resized: torch's weights have 16 bits and PIL's 22, so some sums are rounded to the neighbouring number. Of noise, which is the worst, one value in 25 at most,
    by one step of 255. SmolVLM and Idefics3 resize every picture, and twice: to the longest edge, then to the square. (No tall pictures here: PIL 13 resizes many of them in another order.)"""
    from transformers import AutoProcessor
    if family == "smolvlm": pytest.importorskip("num2words", reason="SmolVLM's processor wants num2words, to tell of videos")
    backbone = families[family]
    backbone.save(tmp_path)
    processor, one_tile = AutoProcessor.from_pretrained(tmp_path), dict(internvl=dict(crop_to_patches=False), qwen3_vl={}).get(family, dict(do_image_splitting=False))
    plain, two = sample("<image>\npoint to the apple", "the"), sample("<image>\npoint to <image>", "the", images=2)
    twice = family in ("smolvlm", "idefics3")
    for s, resized in ((plain, twice), (two, twice), (replace(plain, images=(picture(height=90, width=120),)), True)):
        ours, theirs = backbone.batch([s]), processor(images=[image.open() for image in s.images], text=backbone.prompt(s), return_tensors="pt", **one_tile)
        assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
        steps = (ours["pixel_values"] - theirs["pixel_values"]).abs() * max(backbone.image_processor.image_std) * 255
        assert steps.max() < (1.1 if resized else .01) and (steps > .01).float().mean() < .04


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
