"""Jobs side by side: results, errors, and that nothing outlives its parent."""
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embodied_midtrain.jobs import run_parallel


def work(x, tick):
    for _ in range(x): tick()
    return x, os.environ["OMP_NUM_THREADS"]


def fail(tick): raise FloatingPointError("the loss is nan at step 3")


def die(tick): os._exit(9)


def sleep(marker, tick):
    Path(marker + ".pid").write_text(str(os.getpid()))
    time.sleep(60)


def test_run_parallel():
    assert run_parallel({str(x): (work, {"x": x}) for x in (5, 2, 3)}, workers=2, total=10) == {"5": (5, "1"), "2": (2, "1"), "3": (3, "1")}
    with pytest.raises(RuntimeError, match=r"(?s)job 'random-0' failed.*FloatingPointError: the loss is nan at step 3"):
        run_parallel({"random-0": (fail, {}), "other": (work, {"x": 1})}, workers=2)
    with pytest.raises(RuntimeError, match="job 'b' failed: its process ended with exit code 9"): run_parallel({"b": (die, {})}, workers=2)


def test_workers_die_with_their_parent(tmp_path):
    marker = str(tmp_path / "worker")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_jobs as t; t.run_parallel({{'nap': (t.sleep, {{'marker': {marker!r}}})}}, workers=2)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    until = time.time() + 60
    while not (tmp_path / "worker.pid").exists() and time.time() < until: time.sleep(0.1)
    time.sleep(0.2)
    worker = int((tmp_path / "worker.pid").read_text())
    parent.kill(); parent.wait()
    for _ in range(50):
        time.sleep(0.1)
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split(")")[1].split()[0]: return
    pytest.fail("the worker outlived its parent")
