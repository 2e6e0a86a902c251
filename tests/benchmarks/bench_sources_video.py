"""Frames of a LeRobot video: 16 evenly spaced ones against decoding the episode, and all of them in their order against the same.

    python tests/benchmarks/bench_sources_video.py [folder of a LeRobotDataset 2.x with AV1 videos]

Without a folder, the 16 real frames of the test data are repeated to an episode of 400 (copied packets, nothing is encoded anew). All ways run in turn, several times, in one process; printed are medians and their ratios,
by the clock and by the processor's time of all threads (PyAV's own decoding uses every core; ours none but one, for the sake of forked workers). Both ways end in RGB arrays."""
import os
os.environ.setdefault("OMP_NUM_THREADS", "1")
import statistics, sys, tempfile, time
from functools import partial
from pathlib import Path

import av

from embodied_midtrain.samples import ImageRef
from embodied_midtrain.sources.lerobot import VIDEOS, video_frame

ROUNDS, FEW, FPS = 7, 16, 30
SAMPLE = Path(__file__).parents[1] / "data/lerobot_v21_sim_pick_place/videos/chunk-000/video.ego_view/episode_000000.mp4"


def repeated(times, target):
    "The sample's packets, one copy after the other."
    with av.open(str(target), "w") as out:
        stream = None
        for n in range(times):
            with av.open(str(SAMPLE)) as file:
                video = file.streams.video[0]
                stream = stream or out.add_stream_from_template(video, opaque=True)
                step = video.frames * 512
                for packet in file.demux(video):
                    if packet.pts is None: continue
                    packet.pts, packet.dts, packet.stream = packet.pts + n * step, packet.dts + n * step, stream
                    out.mux(packet)
    return target


def decode_all(path):
    "What a first script does."
    with av.open(str(path)) as file: return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def ours(path, frames):
    "The frames as a reader gives them, from a closed file on."
    VIDEOS.__init__(4)
    return [ImageRef(load=partial(video_frame, str(path), t / FPS, 0.25 / FPS)).open() for t in frames]


def seconds(function):
    "By the clock, and of the processor."
    start = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def main():
    with tempfile.TemporaryDirectory() as folder:
        path = next(Path(sys.argv[1]).glob("videos/*/*/*.mp4")) if len(sys.argv) > 1 else repeated(25, Path(folder) / "episode.mp4")
        count = len(decode_all(path))
        few = [i * count // FEW for i in range(FEW)]
        rounds = [(seconds(lambda: decode_all(path)), seconds(lambda: ours(path, few)), seconds(lambda: ours(path, range(count)))) for _ in range(ROUNDS)]
    for kind, name in enumerate(("clock", "processor")):
        plain, spaced, each = (statistics.median(times[kind] for times in column) for column in zip(*rounds))
        print(f"{name}: {count} frames, median of {ROUNDS}: decode all {plain * 1000:.0f} ms; {FEW} evenly spaced {spaced * 1000:.0f} ms, ratio {plain / spaced:.1f} (each round: "
              f"{', '.join(f'{a[kind] / b[kind]:.1f}' for a, b, _ in rounds)}); all in order, one by one, {each * 1000:.0f} ms, ratio {plain / each:.2f}")



if __name__ == "__main__": main()
