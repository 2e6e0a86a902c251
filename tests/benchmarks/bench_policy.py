"""How long a policy takes to act, at batch 1 and 32, against the obvious way.

    python tests/benchmarks/bench_policy.py [--backbone FOLDER] [--device cuda] [--dtype bfloat16] [--out FILE.json]

Ours is `Policy.act`: the inputs of all pictures together, one forward pass without logits, actions decoded. Its seconds are told apart: preparing inputs, forward pass, decoding. The obvious way takes the pictures one after the other and calls
the whole model with `output_hidden_states`, which keeps every layer's states and computes the logits of every token; the head and the normaliser are the same. Both are asked the same in turn, several rounds in one process, after a warm-up;
printed are medians, by the clock and, on a CPU, by the seconds of the processor, which other work on the machine changes little; the ratio is the median of the rounds' ratios. That both say the same is looked at first. Weights of query and head are random: they cost what trained ones do."""
import argparse
import datetime
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import platform
import statistics
import time
from contextlib import contextmanager

import numpy as np
import PIL.Image
import torch

from embodied_midtrain.actions import ActionNormaliser
from embodied_midtrain.backbone import load_backbone
from embodied_midtrain.core import write_json
from embodied_midtrain.policy import HEADS, Policy, with_query_slot
from embodied_midtrain.samples import ImageRef
from embodied_midtrain.tabletop.tasks import Tabletop

BATCHES, ROUNDS = (1, 32), 30
PHASES = ("preparing", "forward", "decoding")


def seconds(device, work):
    "What work gives, and how long it took, by the clock and by the processor; a GPU is waited for."
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda *_: None
    wait()
    clock, processor = time.perf_counter(), time.process_time()
    made = work()
    wait()
    return made, np.array([time.perf_counter() - clock, time.process_time() - processor])


@contextmanager
def told_apart(policy, spent):
    "While this holds, `act` notes the seconds of its three phases."
    def timed(name, work):
        def inner(*args, **more):
            made, took = seconds(policy.backbone.device, lambda: work(*args, **more))
            spent[name] = spent[name] + took
            return made
        return inner
    policy.backbone.batch, policy.forward = timed("preparing", policy.backbone.batch), timed("forward", policy.forward)
    try: yield
    finally: del policy.backbone.batch, policy.forward   # the class's own are seen again


@torch.inference_mode()
def obvious(policy, pictures, texts):
    "One sample at a time, the whole model with all its hidden states and logits."
    def one(picture, text):
        inputs, slot = with_query_slot(policy.backbone.batch([policy.sample(ImageRef(array=picture), text, acting=True)]))
        place = lambda module, args, embedded: embedded.index_put(slot, policy.query.to(embedded.dtype))
        hook = policy.vlm.get_input_embeddings().register_forward_hook(place)
        try: states = policy.vlm(**inputs, output_hidden_states=True, use_cache=False).hidden_states[-1]
        finally: hook.remove()
        arm, gripper = policy.head(states[slot].float())
        return policy.normaliser.decode(torch.cat([arm, (gripper > 0)[..., None]], -1).cpu().numpy())
    return np.concatenate([one(*pair) for pair in zip(pictures, texts)])


def seen(batch, pixels):
    "Pictures of the tabletop, of so many pixels a side, and instructions."
    env = Tabletop("reach", seed=5, episodes=batch)
    return [np.asarray(PIL.Image.fromarray(x).resize((pixels, pixels))) for x in env.render()], list(env.instructions)


def round_of(policy, pictures, texts, number=0):
    "One call each, who begins changes from round to round: seconds of ours and of the obvious way, and of our phases."
    device, spent = policy.backbone.device, dict.fromkeys(PHASES, np.zeros(2))
    ways = [lambda: policy.act(pictures, texts), lambda: obvious(policy, pictures, texts)]
    took = {i: seconds(device, ways[i])[1] for i in ((0, 1), (1, 0))[number % 2]}
    ours, theirs = took[0], took[1]
    with told_apart(policy, spent): _, whole = seconds(device, lambda: policy.act(pictures, texts))
    return dict(ours=ours, obvious=theirs, ratio=theirs / ours, whole=whole, **spent | dict(decoding=whole - spent["preparing"] - spent["forward"]))


def measure(policy, batch, pixels, rounds):
    pictures, texts = seen(batch, pixels)
    apart = float(np.abs(policy.act(pictures, texts)[..., :6] - obvious(policy, pictures, texts)[..., :6]).max())
    if next(policy.vlm.parameters()).dtype == torch.float32: assert apart < 1e-4, f"the two ways differ by {apart:.2g}"
    made = [round_of(policy, pictures, texts, number) for number in range(rounds + 2)][2:]   # the first ones warm up
    found = {"by_clock": summary(made, 0, batch)} | ({"by_processor": summary(made, 1, batch)} if policy.backbone.device.type == "cpu" else {}) | dict(largest_difference=apart)
    if policy.backbone.device.type == "cuda": found["peak_bytes"] = {name: peak(work) for name, work in dict(ours=lambda: policy.act(pictures, texts), obvious=lambda: obvious(policy, pictures, texts)).items()}
    return found


def summary(made, by, batch):
    "Medians over rounds, by the clock (0) or the processor (1)."
    median = statistics.median
    ratios = [r["ratio"][by] for r in made]
    return dict(seconds=median(r["ours"][by] for r in made), obvious_seconds=median(r["obvious"][by] for r in made), ratio=median(ratios), ratios=[min(ratios), max(ratios)],
                chunks_per_second=batch / median(r["ours"][by] for r in made), shares={phase: median(r[phase][by] / r["whole"][by] for r in made) for phase in PHASES})


def peak(work):
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated()


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tiny", help="a folder, or tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--head", default="small", choices=list(HEADS))
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=4)
    parser.add_argument("--pixels", type=int, default=64, help="of a picture's side, as the camera gives it")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", help="where the figures go, as JSON")
    return parser.parse_args(words)


def main(words=None):
    given = parse(words)
    if given.device == "cpu": torch.set_num_threads(1)
    backbone = load_backbone(given.backbone, dtype=given.dtype, device=given.device)
    policy = Policy(backbone, ActionNormaliser((-1.0,) * 6, (1.0,) * 6), chunk=given.chunk, head=given.head, hidden=given.hidden)
    found = {f"batch {batch}": measure(policy, batch, given.pixels, given.rounds) for batch in given.batches}
    for (name, f), by in [(pair, by) for pair in found.items() for by in ("by_clock", "by_processor") if by in pair[1]]:
        shares = ", ".join(f"{phase} {share:.0%}" for phase, share in f[by]["shares"].items())
        print(f"{name}, {by.replace('_', ' the ')}: {1000 * f[by]['seconds']:.1f} ms a call, {f[by]['chunks_per_second']:.1f} chunks a second ({shares}); "
              f"the obvious way {1000 * f[by]['obvious_seconds']:.1f} ms, {f[by]['ratio']:.2f} times (rounds {f[by]['ratios'][0]:.2f} to {f[by]['ratios'][1]:.2f})")
    shapes = dict(backbone="tiny" if given.backbone == "tiny" else backbone.model.config.model_type, parameters=sum(p.numel() for p in policy.parameters()), dtype=given.dtype, pixels=given.pixels, chunk=given.chunk, head=given.head, hidden=given.hidden,
                  device=torch.cuda.get_device_name() if backbone.device.type == "cuda" else platform.machine(), threads=torch.get_num_threads(), rounds=given.rounds, torch=torch.__version__)
    if given.out: write_json(found | dict(shapes=shapes, date=datetime.date.today().isoformat()), given.out)


if __name__ == "__main__": main()
