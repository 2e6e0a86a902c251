"""Jobs side by side: results, errors, and that nothing outlives its parent."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from embodied_midtrain.jobs import launch_facts, run_parallel


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


# ---- started by accelerate

LAUNCH = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"   # on a CPU with ACCELERATE_USE_CPU


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def together(x, tick):
    "What the processes have between them."
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object
    state = PartialState(cpu=True)
    for _ in range(x): tick()
    return state.process_index, gather_object([10 * state.process_index + x]), int(torch.distributed.get_world_size())


def second_fails(marker, tick):
    from accelerate import PartialState
    state = PartialState(cpu=True)
    Path(f"{marker}.{state.process_index}.pid").write_text(str(os.getpid()))
    state.wait_for_everyone()
    if state.process_index == 1: raise FloatingPointError("the loss is nan at step 3")
    state.wait_for_everyone()


def both_sleep(marker, tick):
    Path(f"{marker}.{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    time.sleep(120)


def gone(pid): return not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def all_gone(folder):
    "Whether all processes that left their number in a folder end within some seconds."
    pids = [int(f.read_text()) for f in Path(folder).glob("*.pid")]
    for _ in range(100):
        if all(map(gone, pids)): return len(pids)
        time.sleep(0.1)


def test_launched_jobs_run_on_all_processes_one_after_the_other(on_cpu, capsys):
    assert run_parallel({str(x): (together, {"x": x}) for x in (2, 3)}, workers=2, total=5, desc="both", launch=LAUNCH) == {str(x): (0, [x, 10 + x], 2) for x in (2, 3)}
    assert "both: 100%" in capsys.readouterr().err   # the first process's ticks alone


def test_an_error_in_one_process_ends_all_and_names_it(on_cpu, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)job 'random-0' failed in process 1 of 2: Traceback.*second_fails.*FloatingPointError: the loss is nan at step 3"):
        run_parallel({"random-0": (second_fails, {"marker": str(tmp_path / "w")}), "never": (together, {"x": 1})}, launch=LAUNCH)
    assert all_gone(tmp_path) == 2


def test_a_killed_process_and_a_wrong_launch_say_what_happened(on_cpu):
    with pytest.raises(RuntimeError, match=r"(?s)job 'b' failed: accelerate launch ended with exit code 1.*exitcode.*: 9"): run_parallel({"b": (die, {})}, launch=LAUNCH)
    with pytest.raises(RuntimeError, match=r"(?s)job 'b' failed: accelerate launch ended with exit code 2.*unrecognized arguments.*--num_proceses"): run_parallel({"b": (die, {})}, launch="--num_proceses 2")


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_launched_processes_die_with_their_parent(on_cpu, tmp_path, how):
    marker = str(tmp_path / "worker")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_jobs as t; t.run_parallel({{'nap': (t.both_sleep, {{'marker': {marker!r}}})}}, launch=t.LAUNCH)"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(tmp_path)})
    until = time.time() + 120
    while len(list(tmp_path.glob("*.pid"))) < 2 and time.time() < until: time.sleep(0.1)
    time.sleep(0.5)
    parent.kill() if how == "killed" else parent.send_signal(signal.SIGINT)
    error = parent.communicate()[1]
    assert all_gone(tmp_path) == 2
    if how == "interrupted": assert "KeyboardInterrupt" in error and not list(tmp_path.glob("emt-*"))   # and nothing is left behind


def test_what_a_launch_decides(tmp_path):
    "Another configuration under the same name is another launch, another port is not."
    (config := tmp_path / "fsdp.yaml").write_text("num_processes: 2")
    before = launch_facts(f"--config_file {config}")
    assert before == launch_facts(f"--config_file={config} --main_process_port=29501")
    config.write_text("num_processes: 8")
    assert before != launch_facts(f"--config_file {config}") and str(tmp_path) not in str(before)
    with pytest.raises(ValueError, match="how many processes"): launch_facts("--multi_gpu")
    with pytest.raises(FileNotFoundError, match="lost.yaml"): launch_facts("--config_file /lost.yaml")
