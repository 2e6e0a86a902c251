"Run folders under stress: killed at three places, and on a disk that is full."
import errno, json, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from embodied_midtrain.core import BEGUN, MANIFEST, TEMPORARY, Stage, atomic_path, check_run, generator, input_hash, own_files, read_table, write_json, write_table

TOY = """
import os, signal, sys
from embodied_midtrain.core import *
import numpy as np, pandas as pd
run, place = sys.argv[1], sys.argv[2]

def die(here):
    if place == here: os.kill(os.getpid(), signal.SIGKILL)

with Stage(run, "toy", {"parts": 4}) as stage:
    for n in range(4):
        part = stage.file(f"part-{n:05}.parquet")
        if part.exists(): continue
        die(f"before part {n}")
        table = pd.DataFrame({"x": generator(0, "toy", n).random(1000)})
        if place == f"within part {n}":
            with atomic_path(part) as path: path.write_bytes(b"PAR1 half a file"); die(place)
        write_table(table, part)
    stage.count(kept=4000)
    write_json({"mean": 0.5}, stage.file("summary.json"))
    die("before the manifest")
"""


def toy(run, place="nowhere"):
    "Run the toy stage in a process of its own, to be killed at a place."
    return subprocess.run([sys.executable, "-c", TOY, str(run), place]).returncode


def contents(folder):
    "All files of a run but what tells time."
    told = {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    for name in told:
        if name.endswith(MANIFEST):
            manifest = json.loads(told[name])
            for key in "seconds", "finished", "environment", "speed": manifest.pop(key, None)
            told[name] = manifest
    return told


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted")
    assert toy(run) == 0
    return contents(run)


@pytest.mark.parametrize("place", ["before part 0", "within part 2", "before the manifest"])
def test_killed_stage_is_completed_by_a_rerun(tmp_path, uninterrupted, place):
    assert toy(tmp_path, place) == -signal.SIGKILL
    stage = Stage(tmp_path, "toy", {"parts": 4})
    assert not stage.done and (stage.path / BEGUN).exists()
    kept = {f: f.stat().st_mtime_ns for f in own_files(stage.path) if not f.name.startswith(TEMPORARY)}
    assert toy(tmp_path) == 0
    assert contents(tmp_path) == uninterrupted and stage.done
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items() if f.suffix == ".parquet"), "a finished part was made again"


def test_killed_at_any_moment(tmp_path, uninterrupted):
    "A parent that kills its child again and again, whenever it happens to: in the end the run is as if nothing had been."
    for delay in (0.3, 0.5, 0.6, 0.7, 0.8):
        child = subprocess.Popen([sys.executable, "-c", TOY, str(tmp_path), "nowhere"])
        time.sleep(delay)
        child.kill(), child.wait()
        manifest = tmp_path / "toy" / MANIFEST
        assert not manifest.exists() or json.loads(manifest.read_text())["files"].keys() >= {"part-00000.parquet", "summary.json"}
    assert toy(tmp_path) == 0
    assert contents(tmp_path) == uninterrupted


def full_disk(path):
    "Make the temporary file of the next write one that the system refuses to write to, as a full disk would."
    os.symlink("/dev/full", path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("write", [
    lambda path: write_table(pd.DataFrame({"x": np.arange(10_000)}), path),
    lambda path: write_json(list(range(10_000)), path),
], ids=["table", "json"])
def test_full_disk_is_told_and_resumed(tmp_path, write):
    stage = Stage(tmp_path, "toy")
    with pytest.raises(OSError, match="the disk is full.*part-1.*run the same command again") as caught, stage:
        write(stage.file("part-0"))
        full_disk(stage.file("part-1"))
        write(stage.file("part-1"))
    assert caught.value.errno == errno.ENOSPC
    assert not stage.done and [f.name for f in own_files(stage.path)] == ["part-0"]
    with stage: write(stage.file("part-1"))
    assert stage.done and stage.file("part-0").read_bytes() == stage.file("part-1").read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    "A real file system of 256 KB, where the system lets us mount one."
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], capture_output=True).returncode: pytest.skip("no right to mount")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_truly_full_disk(small_disk):
    stage, ballast = Stage(small_disk, "toy"), small_disk / "ballast"
    part = lambda n: write_table(pd.DataFrame({"x": generator(0, n).random(6_000)}), stage.file(f"part-{n}.parquet"))
    part_sizes = []
    with pytest.raises(OSError, match="the disk is full"), stage:
        ballast.write_bytes(bytes(120_000))
        for n in range(9): part(n); part_sizes.append(stage.file(f"part-{n}.parquet").stat().st_size)
    assert part_sizes and not stage.done and len(own_files(stage.path)) == len(part_sizes)
    ballast.unlink()
    with stage: part(len(part_sizes))
    assert stage.done and len(read_table(stage.path)) == 6_000 * (len(part_sizes) + 1)


def test_full_disk_in_other_libraries(small_disk):
    "What safetensors and torch raise on a full disk becomes the same clear error."
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    tensors = {"w": torch.zeros(100_000)}
    for name, write in {"weights.safetensors": lambda p: safetensors.save_file(tensors, p), "state.pt": lambda p: torch.save(tensors, p)}.items():
        with pytest.raises(OSError, match="the disk is full"), atomic_path(small_disk / name) as path: write(path)
        assert not list(small_disk.iterdir())


def test_run_folder_of_another_version(tmp_path):
    with Stage(tmp_path, "toy"): pass
    write_json({"format": 99, "version": "9.9"}, tmp_path / "run.json")
    with pytest.raises(ValueError, match="format 99 .*9.9.*choose another run folder"): Stage(tmp_path, "toy")


def test_stages_in_stages(tmp_path):
    "A stage that is cleared leaves those in its sub-folders alone; their hash is part of the folder's."
    with Stage(tmp_path, "midtrain", {"lr": 1}) as outer: write_json(1, outer.file("log.json"))
    with Stage(tmp_path, "midtrain/random-0", {"lr": 1}) as inner: write_json(1, inner.file("weights.json"))
    with Stage(tmp_path, "midtrain", {"lr": 2}) as outer: assert not outer.file("log.json").exists()
    assert inner.done and list(outer.manifest()["files"]) == []
    before = input_hash(inner.path)
    with Stage(tmp_path, "midtrain/random-0", {"lr": 2}) as inner: write_json(2, inner.file("weights.json"))
    assert input_hash(inner.path) != before


def test_unfinished_input_is_an_error(tmp_path):
    with pytest.raises(RuntimeError), Stage(tmp_path, "features"): raise RuntimeError
    with pytest.raises(FileNotFoundError, match="'features' .* is not finished: run it first"): input_hash(tmp_path / "features")


def test_seconds_add_up_over_a_resumed_run(tmp_path):
    stage = Stage(tmp_path, "toy")
    with pytest.raises(KeyboardInterrupt), stage:
        time.sleep(0.2); raise KeyboardInterrupt
    with stage: pass
    assert stage.manifest()["seconds"] >= 0.2


def test_streams_do_not_depend_on_the_process():
    code = "from embodied_midtrain.core import *; print(generator(3, 'a', 1).integers(2**40), stable_hash({'b': 1.5, 'a': None}))"
    assert len({subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": str(h)}).stdout for h in (1, 2)}) == 1
    draws = {generator(0, name, n).integers(2**60) for name in ("a", "b") for n in range(100)}
    assert len(draws) == 200


def test_check_run_of_a_new_folder(tmp_path): check_run(tmp_path / "new")


def test_another_key_leaves_no_empty_folders_behind(tmp_path):
    "A checkpoint folder of other parameters, emptied but still there, would be taken for a checkpoint."
    for step in (150, 120):
        with Stage(tmp_path, "policy/reach/base-0", {"step": step}) as stage:
            with atomic_path(stage.file(f"step-{step}")) as folder: folder.mkdir(exist_ok=True); (folder / "policy.json").write_text("{}")
    assert [p.name for p in stage.path.glob("step-*")] == ["step-120"]


def test_checkpoints_stay_until_the_manifest_is_written(tmp_path, monkeypatch):
    "Hashing large files takes a while, in which a run may be killed: what it trained must not be lost then."
    from embodied_midtrain import core
    def train(): (stage.path / core.STATE / "step-9").mkdir(parents=True, exist_ok=True); stage.file("weights").write_text("w")
    stage, hashed = core.Stage(tmp_path, "midtrain/a-0", dict(steps=9)), core.file_hash
    def killed(path): raise KeyboardInterrupt
    monkeypatch.setattr(core, "file_hash", killed)
    with pytest.raises(KeyboardInterrupt), stage: train()
    assert not stage.done and stage.begun and (stage.path / core.STATE / "step-9").is_dir()
    monkeypatch.setattr(core, "file_hash", hashed)
    with stage: pass
    assert stage.done and list(stage.manifest()["files"]) == ["weights"] and not (stage.path / core.STATE).exists()
    monkeypatch.setattr(core, "file_hash", killed)
    again = core.Stage(tmp_path, "midtrain/a-0", dict(steps=10))
    assert not again.begun
    with pytest.raises(KeyboardInterrupt), again:
        (again.path / core.STATE).mkdir()
        again.file("weights").write_text("w")
    with core.Stage(tmp_path, "midtrain/a-0", dict(steps=11)) as third: assert list(third.path.iterdir()) == [third.path / core.BEGUN]   # checkpoints of another key are no use
