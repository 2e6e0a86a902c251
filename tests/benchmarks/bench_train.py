"""Training against the obvious ways: a plain loop and the Trainer of transformers, both in random order, padded to the longest, with logits of every token.

    python tests/benchmarks/bench_train.py [--save embodied_midtrain/results/training-speed.json]

A small InternVL with random weights, whose vision tower costs about as large a part of a step as that of InternVL3.5-1B does (both parts are printed); samples with the paper-like lengths of `paper_lengths` at a quarter of their size
(64 image tokens, texts a quarter as long), pictures as JPEG. All ways see the same samples, in turn, several times, in one process with one thread; ours makes its batches in one more. Printed are medians of samples a second
by the clock, and by the seconds of the processor, which other work on the machine does not change. Last, the share of the time that a step of the tiny backbone waits for its data."""
import argparse
import contextlib
import datetime
import io
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import statistics
import tempfile
import time

import numpy as np
import PIL.Image
import torch
from transformers import AutoModelForImageTextToText, InternVLConfig, InternVLVisionConfig, Qwen3Config, Trainer, TrainingArguments
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from embodied_midtrain.backbone import Backbone, answer_loss, load_backbone, tiny_tokenizer
from embodied_midtrain.batches import Batches, Prepared, batch_order, padding, paper_lengths, token_batches
from embodied_midtrain.core import readable, write_json
from embodied_midtrain.samples import ImageRef, Sample, turn
from embodied_midtrain.speed import matmul_rate, operations, speed
from embodied_midtrain.tabletop.pool import TabletopSource
from embodied_midtrain.train import train

COUNT, BATCH, ROUNDS, SCALE, LR = 128, 32, 5, 4, 1e-4   # 32: the paper's batch on one device
WORDS = [a + b + c for a in "bdfgklmnprstv" for b in "aeiou" for c in "bdfgklmnprst"] * 3


def backbone():
    tokenizer = tiny_tokenizer([" ".join(w + s for w in WORDS[:780] for s in ("", "a", "o"))])
    vision = InternVLVisionConfig(hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384, image_size=[224, 224], patch_size=[14, 14], layer_scale_init_value=1.0)
    text = Qwen3Config(vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=384, max_position_embeddings=2048,
                       tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=64, downsample_ratio=.5, tie_word_embeddings=True)
    torch.manual_seed(0)
    processor = GotOcr2ImageProcessorPil(size={"height": 224, "width": 224}, crop_to_patches=False, image_mean=[.5] * 3, image_std=[.25] * 3)
    return Backbone(AutoModelForImageTextToText.from_config(config), tokenizer, processor, "small InternVL, random weights")


def vision_share(model, lengths, pictures, pixels, answers):
    "The vision tower's part of the operations of a step without padding, for samples of such lengths."
    count, mask = operations(model), torch.arange(int(max(lengths)))[None] < torch.tensor(lengths)[:, None]
    labels = torch.where(torch.arange(mask.numel()).view(mask.shape) % round(sum(lengths) / answers) == 0, 1, -100).masked_fill(~mask, -100)
    text = dict(attention_mask=mask, labels=labels)
    return 1 - count(text) / count(text | dict(pixel_values=torch.empty(pictures, 3, pixels, pixels, device="meta")))


def shares(made):
    "Of the small model here, and of InternVL3.5-1B on the same mixture in full size."
    vision = InternVLVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, image_size=[448, 448], patch_size=[14, 14])
    text = Qwen3Config(vocab_size=151936, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128, intermediate_size=3072, tie_word_embeddings=True)
    with torch.device("meta"): real = AutoModelForImageTextToText.from_config(InternVLConfig(vision_config=vision, text_config=text, image_seq_length=256, tie_word_embeddings=True))
    small, mixture = backbone(), paper_lengths(COUNT)
    prepared, pictures = Prepared(small, made), sum(len(s.images) for s in made)
    part = prepared.answers.sum() / prepared.lengths.sum()
    return dict(small=vision_share(small.model, prepared.lengths.tolist(), pictures, 224, prepared.answers.sum()), internvl3_5_1b=vision_share(real, mixture.tokens.tolist(), int(mixture.image.sum()), 448, part * mixture.tokens.sum()))


def samples():
    "A third of a text is the question, the rest the answer."
    rng, made = np.random.default_rng(0), []
    def jpeg():
        small = PIL.Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        small.resize((640, 480)).save(file := io.BytesIO(), "JPEG", quality=90)
        return ImageRef(data=file.getvalue())
    for i, row in paper_lengths(COUNT).iterrows():
        words = max(3, (row.tokens - 256 * row.image) // SCALE)
        text = lambda n: " ".join(rng.choice(WORDS[:780], n))
        said = turn("user", "<image>\n" * row.image + text(max(1, words // 3))), turn("assistant", text(max(1, words - words // 3)))
        made.append(Sample(f"{row.source}/{i}", row.source, "vlm", (jpeg(),) if row.image else (), said))
    return made


def timed(work):
    "Samples, by the clock and by the processor: (samples, seconds, seconds)."
    wall, processor = time.perf_counter(), time.process_time()
    done = work()
    return done, time.perf_counter() - wall, time.process_time() - processor


def plain(made):
    model = backbone()
    optimizer, order = torch.optim.AdamW(model.model.parameters(), lr=LR), np.random.default_rng(0).permutation(COUNT).reshape(-1, BATCH)
    model.model.train()
    def work():
        for which in order:
            model.model(**model.batch([made[i] for i in which], answers=True)).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return COUNT
    return timed(work)


def trainer(made):
    model = backbone()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LR, report_to="none", save_strategy="no", logging_strategy="no", remove_unused_columns=False,
                                      use_cpu=True, disable_tqdm=True)
        whole = Trainer(model.model, arguments, train_dataset=made, data_collator=lambda part: model.batch(part, answers=True))
        return timed(lambda: whole.train() and COUNT)


def ours(made):
    model = backbone()
    def work():
        prepared = Prepared(model, made)
        order = token_batches(prepared.lengths, int(BATCH * prepared.lengths.mean()), COUNT // BATCH)
        ours.log = train(model.model, Batches(prepared, order), lambda _, batch: answer_loss(model, batch), len(order), LR, threads=1, detail=True)
        ours.padding = padding(order, prepared.lengths)
        return sum(map(len, order))
    return timed(work)


def waiting(threads):
    "The share of waiting of the tiny backbone on the tabletop's pictures, as JPEG."
    def jpeg(image):
        image.open().save(file := io.BytesIO(), "JPEG")
        return ImageRef(data=file.getvalue())
    tiny, questions = load_backbone("tiny", device="cpu"), list(TabletopSource("mini-vcr", 256))
    prepared = Prepared(tiny, [Sample(s.id, s.source, s.kind, tuple(map(jpeg, s.images)), s.messages) for s in questions])
    log = train(tiny.model, Batches(prepared, batch_order(256, 64, 12, lengths=prepared.lengths)), lambda _, batch: answer_loss(tiny, batch), 12, LR, threads=threads, detail=True)
    return speed(log)["waiting"]


def main(save):
    torch.set_num_threads(1)
    made, ways = samples(), dict(plain=plain, trainer=trainer, ours=ours)
    rounds = [{name: way(made) for name, way in ways.items()} for _ in range(ROUNDS + 1)][1:]   # the first one warms up
    rate = lambda name, by: [round_[name][0] / round_[name][by] for round_ in rounds]
    found = {name: dict(samples_per_second=statistics.median(rate(name, 1)), per_processor_second=statistics.median(rate(name, 2))) for name in ways}
    ratios = {name: [[a / b for a, b in zip(rate("ours", by), rate(name, by))] for by in (1, 2)] for name in ("plain", "trainer")}
    for name, (clock, processor) in ratios.items():
        found[name] |= dict(ratio=statistics.median(clock), ratio_by_processor=statistics.median(processor), rounds=[round(r, 2) for r in clock], rounds_by_processor=[round(r, 2) for r in processor])
    model = backbone()
    prepared = Prepared(model, made)
    found["padding"] = dict(ours=ours.padding, random=padding(batch_order(COUNT, BATCH, COUNT // BATCH), prepared.lengths))
    whole = operations(model.model)(prepared.batch(range(32)))
    found |= dict(ours_speed=speed(ours.log, matmul_rate("cpu")), waiting={f"{threads} threads": waiting(threads) for threads in (0, 1)},
                  vision_share=shares(made), shapes=dict(parameters=sum(p.numel() for p in model.model.parameters()), samples=COUNT, operations_per_sample=whole / 32, cpus=len(os.sched_getaffinity(0))),
                  date=datetime.date.today().isoformat())
    for name in ways: print(f"{name}: {found[name]['samples_per_second']:.2f} samples/s, {found[name]['per_processor_second']:.2f} per second of the processor")
    for name in ratios: print(f"ours against {name}: {found[name]['ratio']:.2f} by the clock (rounds {found[name]['rounds']}), {found[name]['ratio_by_processor']:.2f} by the processor (rounds {found[name]['rounds_by_processor']})")
    print(f"padding: ours {found['padding']['ours']:.1%}, random order {found['padding']['random']:.1%}")
    for key in ("vision_share", "waiting", "ours_speed"): print(f"{key.replace('_', ' ')}: {readable(found[key])}")
    if save: write_json(found, save)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", help="where the figures go, as JSON")
    main(parser.parse_args().save)
