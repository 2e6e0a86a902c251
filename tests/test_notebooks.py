"Every notebook runs: its examples under nbdev_test, and every stage through papermill on next to nothing."
import os, re, signal, subprocess, sys, time
from pathlib import Path

import pytest

from embodied_midtrain.core import read_table
from embodied_midtrain.pipeline import load_profile, plan, run_jobs, started, status
from test_core import contents
from test_pipeline import children

ROOT = Path(__file__).parent.parent
LEAN = os.environ | {"OMP_NUM_THREADS": "1", "EMT_QUIET": "1"}


def test_examples():
    "All cells but those flagged run, slow, gpu or net."
    done = subprocess.run([Path(sys.executable).parent / "nbdev_test", "--path", "nbs", "--n_workers", "2"], cwd=ROOT, env=LEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]


def emt(*words, **options): return subprocess.run([sys.executable, "-c", "import sys; from embodied_midtrain.cli import main; sys.exit(main())", *words], env=LEAN, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "A run of all stages on profile smoke, started from a folder that is not the repository."
    folder = tmp_path_factory.mktemp("smoke")
    done = emt("run", "--profile", "smoke", cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    return folder, done.stdout


def test_every_stage(smoke):
    folder, said = smoke
    assert {row["stage"]: row["state"] for row in started(folder / "runs" / "smoke")} == dict.fromkeys(load_profile("smoke")["stages"], "done")
    assert (folder / "runs/smoke/results/tables/summary.md").read_text().strip() in said
    assert "runs/smoke/notebooks" in said and (folder / "runs/smoke/report.html").stat().st_size > 100_000
    episodes = read_table(folder / "runs/smoke/benchmarks/episodes.parquet")
    assert set(episodes["arm"]) == {"base", "random", "proximity"}
    shown = (folder / "runs/smoke/notebooks/12_results.ipynb").read_text()
    assert "| tabletop (synthetic) | is it there | proximity-0 " in re.sub(r" +", " ", shown) and "paper: InternVL3.5-1B" in shown


def test_second_run_does_nothing(smoke):
    folder, _ = smoke
    before = (folder / "runs/smoke/report.html").stat().st_mtime_ns
    again = emt("run", "--profile", "smoke", cwd=folder)
    assert again.returncode == 0 and again.stdout.count("done before") == len(load_profile("smoke")["stages"]) and "nothing to do" in again.stdout
    assert (folder / "runs/smoke/report.html").stat().st_mtime_ns == before


def kill_when(there, folder):
    "Run profile smoke until a file appears, then kill the command and all its processes."
    run = subprocess.Popen([sys.executable, "-c", "import sys; from embodied_midtrain.cli import main; sys.exit(main())", "run", "--profile", "smoke"], cwd=folder, env=LEAN, stdout=subprocess.DEVNULL)
    while not any(folder.glob(there)):
        assert run.poll() is None, f"the run ended before {there} appeared"
        time.sleep(0.01)
    for pid in [run.pid, *children(run.pid)]:
        try: os.kill(pid, signal.SIGKILL)
        except ProcessLookupError: pass
    run.wait()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_at_three_places(smoke, tmp_path):
    "While features are extracted, while the VLM is trained, while the policy is: the rerun equals the uninterrupted run."
    for there in "features/part-*", "midtrain/*/[!b]*", "policy/*/*/[!b]*": kill_when(f"runs/smoke/{there}", tmp_path)
    assert emt("run", "--profile", "smoke", cwd=tmp_path).returncode == 0
    results = lambda folder: {k: v for k, v in contents(folder / "runs/smoke").items() if not k.startswith("notebooks") and k != "report.html"}
    killed, whole = results(tmp_path), results(smoke[0])
    assert killed.keys() == whole.keys()
    assert not (different := [k for k in whole if killed[k] != whole[k]]), different


def test_real_sample(tmp_path, monkeypatch):
    "Real robot frames, photographs and chats go through; from the files in tests/data where the larger ones are not there."
    monkeypatch.chdir(ROOT), monkeypatch.setenv("EMT_QUIET", "1"), monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_jobs(plan("real-sample", run=tmp_path), report=lambda line: None)
    assert all(row["state"] == "done" for row in status(tmp_path) if row["stage"] in load_profile("real-sample")["stages"])
