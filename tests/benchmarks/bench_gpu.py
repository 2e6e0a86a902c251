"""What the real shapes cost on one GPU: features, training and acting with our code, beside a plain loop of transformers, as shares of what the card can do; and from these, the paper's whole job in hours.

    python tests/benchmarks/bench_gpu.py [--save embodied_midtrain/results/gpu-speed.json] [--models InternVL3.5-1B Qwen3-VL-2B] [--toy]

The models have random weights in the published shapes, built from their configurations on the device; the samples have the lengths of `paper_lengths`, random words, and photographs of 640 x 480 as JPEG. Everything is in bfloat16: the frozen
backbone whole, training by autocast over float32 weights, as in the profile `paper`. The plain loop is what a first script does: random order, each sample through the image processor and the tokenizer by itself, padded to the longest,
logits of every token. It is timed twice: as it is, and with its inputs ready, which leaves the device's work alone. Utilisation is what the samples need without padding, by the rate of a large bfloat16 product of matrices measured
in the same run. A batch that does not fit into the memory is halved. `--toy` is the same with tiny shapes, on whatever there is, and says nothing about speed."""
import argparse
import datetime
import io
import os
import platform
import resource
import statistics
import time
from itertools import cycle, islice

import accelerate
import numpy as np
import PIL.Image
import torch
import transformers
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLVisionConfig, Qwen3Config, Qwen3VLConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import embodied_midtrain
from embodied_midtrain.actions import ActionNormaliser
from embodied_midtrain.backbone import TEMPLATE, Backbone, answer_loss, tiny_tokenizer
from embodied_midtrain.batches import Batches, Prepared, padding, paper_lengths, token_batches
from embodied_midtrain.core import readable, write_json
from embodied_midtrain.features import extract
from embodied_midtrain.policy import Policy, finetune
from embodied_midtrain.samples import Episode, ImageRef, Sample, turn
from embodied_midtrain.speed import matmul_rate, operations, speed
from embodied_midtrain.train import train

WORDS = [a + b + c for a in "bdfgklmnprstv" for b in "aeiou" for c in "bdfgklmnprst"]
TEXT = dict(vocab_size=151_936, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128)
REAL = {  # InternVL3.5-1B has the text model of Qwen3-0.6B, Qwen3-VL-2B that of Qwen3-1.7B
    "InternVL3.5-1B": dict(family="internvl", side=448, text=TEXT | dict(hidden_size=1024, intermediate_size=3072), vision=dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)),
    "Qwen3-VL-2B": dict(family="qwen3_vl", side=512, text=TEXT | dict(hidden_size=2048, intermediate_size=6144),
                        vision=dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096, out_hidden_size=2048, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]))}
SMALL = dict(vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=128)
TOY = {"InternVL3.5-1B": dict(family="internvl", side=112, text=SMALL, vision=dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)),
       "Qwen3-VL-2B": dict(family="qwen3_vl", side=128, text=SMALL, vision=dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0]))}
AMOUNT = dict(scored=4096, learned=1024, steps=16, skip=4, frames=512, calls=20, scale=1, feature_batch=64, batch=32, matmul=None)  # 64 and 32: the profile's, the latter the paper's batch on one device
LITTLE = dict(scored=24, learned=24, steps=3, skip=1, frames=12, calls=3, scale=16, feature_batch=8, batch=4, matmul=256)
GOALS = dict(features_utilisation=.5, training_utilisation=.45, times_plain=3.0)
LR = 1e-5


# ---- models and samples

def internvl(words, shape, device, dtype):
    tokens = (shape["side"] // 28) ** 2
    text = Qwen3Config(**shape["text"], max_position_embeddings=40_960, tie_word_embeddings=True, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None)
    vision = InternVLVisionConfig(**shape["vision"], image_size=[shape["side"]] * 2, patch_size=[14, 14])
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=tokens, downsample_ratio=.5, tie_word_embeddings=True)
    return built(config, device, dtype), GotOcr2ImageProcessorPil(size=dict(height=shape["side"], width=shape["side"]), crop_to_patches=False)


def qwen3_vl(words, shape, device, dtype):
    names = dict(image_token_id="image_pad", video_token_id="video_pad", vision_start_token_id="vision_start", vision_end_token_id="vision_end")
    words.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in names.values()]})
    words.chat_template = TEMPLATE.replace("<IMG_CONTEXT>", "<|vision_start|><|image_pad|><|vision_end|>")
    half = shape["text"]["head_dim"] // 2
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [half - 2 * (half * 5 // 16), half * 5 // 16, half * 5 // 16], "mrope_interleaved": True}   # 24, 20, 20 of 64
    config = Qwen3VLConfig(text_config=shape["text"] | dict(rope_parameters=rope, max_position_embeddings=262_144), vision_config=shape["vision"] | dict(patch_size=16, spatial_merge_size=2, temporal_patch_size=2),
                           tie_word_embeddings=True, **{key: words.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()})
    return built(config, device, dtype), Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, min_pixels=32 * 32, max_pixels=shape["side"] ** 2)


def built(config, device, dtype):
    torch.manual_seed(0)
    with torch.device(device): return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def backbone(name, shape, device, dtype):
    words = tiny_tokenizer([" ".join(WORDS)])
    model, processor = dict(internvl=internvl, qwen3_vl=qwen3_vl)[shape["family"]](words, shape, device, dtype)
    return Backbone(model, words, processor, f"{name}, random weights")


def samples(model, count, scale):
    "A third of a text is the question, the rest the answer. 64 photographs serve all."
    rng = np.random.default_rng(0)
    def jpeg():
        small = PIL.Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        small.resize((640, 480)).save(file := io.BytesIO(), "JPEG", quality=90)
        return ImageRef(data=file.getvalue())
    photographs, made = cycle([jpeg() for _ in range(min(64, count))]), []
    for i, row in paper_lengths(count).iterrows():
        words = max(3, (row.tokens - 256 * row.image) // scale)
        text = lambda n: " ".join(rng.choice(WORDS, n))
        said = turn("user", "<image>\n" * row.image + text(max(1, words // 3))), turn("assistant", text(max(1, words - words // 3)))
        made.append(Sample(f"{row.source}/{i}", row.source, "vlm", (next(photographs),) if row.image else (), said))
    return made


def needed(model, prepared):
    "Operations that the samples need without padding: forward alone where nothing is trained."
    lengths, answers = torch.from_numpy(prepared.lengths), torch.from_numpy(prepared.answers)
    at = torch.arange(int(lengths.max()) + 1)[None]
    labels = torch.where((at > 0) & (at <= answers[:, None]), 1, -100)
    batch = dict(attention_mask=(at[:, :-1] < lengths[:, None]).long(), labels=labels)
    pictured = [i for i, sample in enumerate(prepared.samples) for _ in sample.images]
    one, _ = model.pixels([prepared.samples[pictured[0]]])
    if "image_grid_thw" in one: batch["image_grid_thw"] = one["image_grid_thw"].repeat(len(pictured), 1)
    else: batch["pixel_values"] = torch.empty(len(pictured), 3, *one["pixel_values"].shape[1:3], device="meta")   # they come as (N, H, W, 3)
    return operations(model.model)(batch)


# ---- the clock and the memory

def wait(device):
    if device.type == "cuda": torch.cuda.synchronize(device)


def seconds(device, work):
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def measured(device, work, batch):
    "What some work on batches of that size returns, with the peak of memory; the batch is halved until it fits."
    while True:
        if device.type == "cuda": torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(device)
        try: found = work(batch)
        except torch.OutOfMemoryError:
            if batch == 1: raise
            batch //= 2
            continue
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024   # of the whole process until now
        return found | dict(batch=batch, peak_memory=peak)


# ---- the plain loop

def plain_inputs(model, which, answers):
    "Each sample through the image processor and the tokenizer by itself, then padded."
    rows, pixels, family = [], {}, model.model.config.model_type
    for sample in which if answers else [sample.asked() for sample in which]:
        counts = []
        for image in sample.images:
            made = model.image_processor(images=[image.open()], return_tensors="pt", **(dict(crop_to_patches=False) if family == "internvl" else {}))
            for key in ("pixel_values", "image_grid_thw"):
                if key in made: pixels.setdefault(key, []).append(made[key])
            counts.append(model.model.config.image_seq_length if family == "internvl" else int(made["image_grid_thw"].prod()) // model.image_processor.merge_size ** 2)
        rows += model.encode([sample], [counts], answers)
    pad = lambda part, value: torch.nn.utils.rnn.pad_sequence([torch.from_numpy(getattr(row, part)) for row in rows], batch_first=True, padding_value=value)
    ids, lengths = pad("ids", model.tokenizer.pad_token_id), torch.tensor([len(row.ids) for row in rows])
    batch = dict(input_ids=ids, labels=pad("labels", -100), attention_mask=(torch.arange(ids.shape[1])[None] < lengths[:, None]).long()) | {key: torch.cat(parts) for key, parts in pixels.items()}
    if family == "qwen3_vl": batch["mm_token_type_ids"] = (ids == model.model.config.image_token_id).long()
    return {key: value.to(model.device) for key, value in batch.items()}


def random_batches(count, size): return np.array_split(np.random.default_rng(0).permutation(count), max(1, count // size))


@torch.inference_mode()
def plain_features(model, made, size, batches):
    "Samples a second, as it is and with its inputs ready."
    order, making, working = random_batches(len(made), size)[:batches + 1], [], []
    def work():
        labels = inputs.pop("labels")
        out = model.model(**inputs, output_hidden_states=True).hidden_states[-1]
        return out[torch.arange(len(labels), device=out.device), inputs["attention_mask"].sum(1) - 1].float().cpu()
    for which in order:
        def make(): nonlocal inputs; inputs = plain_inputs(model, [made[i] for i in which], False)
        inputs = None
        making.append(seconds(model.device, make))
        working.append(seconds(model.device, work))
    return plain_rates(order, making, working, 1)


def plain_training(model, made, size, steps, skip):
    order, making, working = list(islice(cycle(random_batches(len(made), size)), steps)), [], []
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=LR)
    model.model.train()
    def work():
        with torch.autocast(model.device.type, torch.bfloat16): loss = model.model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    try:
        for which in order:
            def make(): nonlocal inputs; inputs = plain_inputs(model, [made[i] for i in which], True)
            inputs = None
            making.append(seconds(model.device, make))
            working.append(seconds(model.device, work))
    finally:
        model.model.zero_grad()
        model.model.eval()
    return plain_rates(order, making, working, skip)


def plain_rates(order, making, working, skip):
    "Without the first ones, which warm up, where there are more."
    skip = skip if len(order) > skip else 0
    done = sum(map(len, order[skip:]))
    return dict(samples_per_second=done / sum(making[skip:] + working[skip:]), ready_samples_per_second=done / sum(working[skip:]))


# ---- ours

def features(model, made, size, threads):
    extract(model, made[:2 * size], batch_size=size, threads=threads)   # warms up
    return dict(samples_per_second=len(made) / seconds(model.device, lambda: extract(model, made, batch_size=size, threads=threads)), threads=threads)


def training(model, made, size, amount, threads, prepared):
    order = token_batches(prepared.lengths, max(int(size * prepared.lengths.mean()), prepared.lengths.max()), amount["steps"])
    log = train(model.model, Batches(prepared, order), lambda _, batch: answer_loss(model, batch), len(order), LR, threads=threads, precision="bf16", detail=True)
    model.model.eval()
    return learned(log, list(map(len, order)), amount["skip"]) | dict(threads=threads, padding=padding(order, prepared.lengths))


def finetuning(policy, episodes, size, amount, threads):
    log = finetune(policy, episodes, amount["steps"], LR, size, optimizer="adamw", precision="bf16", threads=threads, detail=True)
    policy.eval()
    return learned(log, [size] * len(log), amount["skip"]) | dict(threads=threads)


def learned(log, sizes, skip):
    rates = speed(log, skip=skip)
    return dict(samples_per_second=sum(sizes[skip:]) / log.seconds.iloc[skip:].sum()) | {key: rates[key] for key in ("tokens_per_second", "waiting", "forward", "backward", "optimizer", "flops")}


def episodes(count, steps=16):
    rng = np.random.default_rng(1)
    picture = lambda: ImageRef(array=rng.integers(0, 255, (256, 256, 3), dtype=np.uint8))
    actions = lambda: np.concatenate([rng.uniform(-.02, .02, (steps, 6)), rng.integers(0, 2, (steps, 1))], 1).astype(np.float32)
    return [Episode(f"invented/{i}", "invented", tuple(picture() for _ in range(steps)), "put the spoon on the towel", actions()) for i in range(-(-count // steps))]


def latency(policy, size, calls):
    "Median seconds of one call to act, from pictures to actions, for so many robots at once."
    pictures, words = list(np.random.default_rng(2).integers(0, 255, (size, 256, 256, 3), dtype=np.uint8)), ["put the spoon on the towel"] * size
    times = [seconds(policy.vlm.device, lambda: policy.act(pictures, words)) for _ in range(calls + 2)]
    return statistics.median(times[2:])


# ---- all of it

def hours(found):
    "The paper's job on one such device: 10 million samples to score, 5,000 and 16,000 steps of 256 samples."
    job = dict(scoring=(10_000_000, "features"), midtraining=(5_000 * 256, "training"), finetuning=(16_000 * 256, "finetuning"))
    return {name: count / found[part]["samples_per_second"] / 3600 for name, (count, part) in job.items()}


def ratios(found):
    return {part: {which: found[part]["samples_per_second"] / found[f"plain_{part}"][f"{which}samples_per_second"] for which in ("", "ready_")} for part in ("features", "training")}


def one_model(name, shape, device, a, threads):
    rate, found = matmul_rate(device, "bf16", a["matmul"]), {}
    model = backbone(name, shape, device, torch.bfloat16)
    model.model.requires_grad_(False)
    made = samples(model, a["scored"], a["scale"])
    asked = Prepared(model, made, answers=False)
    found["shapes"] = dict(text=shape["text"], vision=shape["vision"], parameters=sum(p.numel() for p in model.model.parameters()), image_tokens=model.pixels([next(s for s in made if s.images)])[1][0][0])
    found["features"] = measured(device, lambda size: features(model, made, size, threads), a["feature_batch"])
    found["features"] |= dict(operations_per_sample=needed(model, asked) / len(made), tokens_per_sample=float(asked.lengths.mean()), samples=len(made))
    found["plain_features"] = measured(device, lambda size: plain_features(model, made, size, 8), a["feature_batch"])
    policy = Policy(model, ActionNormaliser((-.05,) * 6, (.05,) * 6), chunk=4, resize=224)
    found["latency"] = {str(size): latency(policy, size, a["calls"]) for size in (1, 32)}
    del policy, model
    model = backbone(name, shape, device, torch.float32)
    made = made[:a["learned"]]
    prepared = Prepared(model, made)
    found["training"] = measured(device, lambda size: training(model, made, size, a, threads, prepared), a["batch"])
    found["training"] |= dict(operations_per_sample=needed(model, prepared) / len(made), tokens_per_sample=float(prepared.lengths.mean()))
    found["plain_training"] = measured(device, lambda size: plain_training(model, made, size, a["steps"], a["skip"]), a["batch"])
    policy = Policy(model, ActionNormaliser((-.05,) * 6, (.05,) * 6), chunk=4, resize=224)
    found["finetuning"] = measured(device, lambda size: finetuning(policy, episodes(a["frames"]), size, a, threads), a["batch"])
    rate = max(rate, matmul_rate(device, "bf16", a["matmul"]))
    for part in ("features", "plain_features", "training", "plain_training"):
        per_sample = found[part.removeprefix("plain_")]["operations_per_sample"]
        found[part]["utilisation"] = found[part]["samples_per_second"] * per_sample / rate
    found["finetuning"]["utilisation"] = found["finetuning"]["flops"] / rate
    return found | dict(matmul_rate=rate, times_plain=ratios(found), hours=hours(found))


def machine(device):
    known = dict(device=torch.cuda.get_device_name(device), memory=torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else dict(device=f"CPU ({platform.machine()})", memory=None)
    return known | dict(cpus=len(os.sched_getaffinity(0)), versions=dict(python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda, transformers=transformers.__version__, accelerate=accelerate.__version__,
                                                                         embodied_midtrain=embodied_midtrain.__version__))


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="where the figures go, as JSON; they are written after each model")
    parser.add_argument("--models", nargs="+", choices=REAL, default=list(REAL))
    parser.add_argument("--threads", type=int, default=min(12, len(os.sched_getaffinity(0))), help="that decode pictures")
    parser.add_argument("--toy", action="store_true", help="tiny shapes: shows that it runs, no more")
    asked = parser.parse_args(words)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu" and not asked.toy: parser.error("there is no GPU here: --toy runs the same code with tiny shapes")
    shapes, amount, start = TOY if asked.toy else REAL, LITTLE if asked.toy else AMOUNT, time.perf_counter()
    found = dict(date=datetime.date.today().isoformat(), toy=asked.toy, goals=GOALS, amounts=amount) | machine(device) | dict(models={})
    for name in asked.models:
        found["models"][name] = part = one_model(name, shapes[name], device, amount, asked.threads)
        found["seconds"] = time.perf_counter() - start
        print(f"{name}: {readable({key: part[key] for key in ('matmul_rate', 'times_plain', 'latency', 'hours')})}")
        for way in ("features", "plain_features", "training", "plain_training", "finetuning"): print(f"  {way}: {readable({k: v for k, v in part[way].items() if k != 'operations_per_sample'})}")
        if asked.save: write_json(found, asked.save)
    return found


if __name__ == "__main__": main()
