"The pipeline on toy notebooks: what is checked before work, what is skipped, and what happens when a run is killed."
import os, re, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import nbformat.v4 as new
import pandas as pd
import pytest
import yaml

from embodied_midtrain.cli import main
from embodied_midtrain.core import write_json
from embodied_midtrain.pipeline import STAGES, StageFailed, fingerprint, load_profile, parameters_of, place_paths, plan, profile_files, refresh, run_jobs, stage_state, status
from test_core import contents

ROOT = Path(__file__).parent.parent
NBS = ROOT / "nbs"
PROFILES = list(profile_files())

RUN = """#| run
from embodied_midtrain.core import *
import time
stage = Stage(run, {stage!r}, dict(n=n, pool=pool), {{name: input_hash(f"{{run}}/{{name}}") for name in {needs}}})"""
WORK = """#| run
if not stage.done:
    with stage:
        for i in progress(range(n), desc="counting"):
            part = stage.file(f"part-{i}.json")
            if not part.exists():
                write_json(list(generator(0, i).random(3)), part)
                time.sleep(wait)
        assert n < 99, "n is too large"
        stage.count(kept=n)
stage"""
PARAMETERS = 'run: str = "runs/micro"  # run folder\nn: int = 3  # parts\nwait: float = 0.0  # seconds a part\nbackbone: str = "tiny"  # name or path\npool: list = []  # sources'


def toy(stage, needs=(), extra=""):
    "A notebook as the real ones are made, but with nothing to do."
    code = lambda text, **meta: new.new_code_cell(text, metadata=meta)
    return new.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, cells=[
        new.new_markdown_cell(f"# Toy {stage}\n> counts"), code(PARAMETERS + extra, tags=["parameters"]), code("print('an example before the run')"),
        new.new_markdown_cell("## Run"), code(RUN.format(stage=stage, needs=list(needs))), code(WORK)])


@pytest.fixture
def house(tmp_path, monkeypatch):
    "A folder to be in, with toy notebooks, a profile, and data."
    (tmp_path / "nbs").mkdir()
    for stage, needs, extra in ("features", (), ""), ("gap", ["features"], "\nperplexity: float = 30.0"), ("proximity", ["features"], ""):
        nbformat.write(toy(stage, needs, extra), tmp_path / "nbs" / f"{STAGES[stage]}.ipynb")
    (tmp_path / "toy.yaml").write_text("description: toys\nrun: runs/toy\nfeatures: {n: 2}\ngap: {perplexity: 5}\nproximity:\n")
    (tmp_path / "data").mkdir(), (tmp_path / "data" / "a.json").write_text("[]")
    monkeypatch.chdir(tmp_path), monkeypatch.setenv("EMT_NOTEBOOKS", str(tmp_path / "nbs")), monkeypatch.setenv("EMT_QUIET", "1")
    return tmp_path


def go(**options):
    "Run the toy profile; which stages were executed."
    lines = []
    run_jobs(plan("toy.yaml", **options), report=lines.append)
    return [line.split()[0] for line in lines if "before" not in line]


# ---- before work

@pytest.mark.parametrize("words, told", [
    (["--profile", "mcro"], "unknown profile 'mcro'; did you mean 'micro'"),
    (["--profile", "mine/lost.yaml"], "profile mine/lost.yaml does not exist"),
    (["--stages", "gapp"], "unknown stage 'gapp'; did you mean 'gap'"),
    (["--stages", "results"], "the profile has no stage 'results'; it has: features, gap, proximity"),
    (["--stages", "gap"], "stage gap needs features, which is not finished .* run --stages features,gap"),
    (["--set", "gap.perplexty=3"], "unknown gap parameter 'perplexty'; did you mean 'perplexity'"),
    (["--set", "perplexty=3"], "unknown parameter 'perplexty'; did you mean 'perplexity'"),
    (["--set", "gapp.n=3"], "unknown stage 'gapp'; did you mean 'gap'"),
    (["--set", "n=3"], "several stages, say which: features.n, gap.n, proximity.n"),
    (["--set", "gap.n=many"], "gap.n takes int, not 'many'"),
    (["--set", "gap.n=2.5"], "gap.n takes int, not 2.5"),
    (["--set", "gap.pool=3"], "gap.pool takes list, not 3"),
    (["--set", "gap.run=x"], "use --run"),
    (["--set", "gap.n"], "expected name=value"),
    (["--set", "features.backbone=./models/lost"], "features.backbone: ./models/lost does not exist"),
    (["--set", "features.backbone=/lost/model"], "features.backbone: /lost/model does not exist"),
    (["--set", "features.pool=[{reader: llava, path: lost.json}]"], r"features.pool\[0\].path: lost.json does not exist"),
    (["--set", "features.pool=[{reader: llava, exclude: lost.parquet}]"], r"features.pool\[0\].exclude: lost.parquet does not exist"),
])
def test_mistakes_are_told_before_anything_runs(house, capsys, words, told):
    if "--profile" not in words: words = ["--profile", "toy.yaml", *words]
    assert main(["run", *words]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(told, said), said
    assert not (house / "runs").exists()


@pytest.mark.parametrize("text, told", [
    ("featurs: {}", "unknown stage in profile .* 'featurs'; did you mean 'features'"), ("gap: {perplexty: 3}", "unknown gap parameter 'perplexty'"),
    ("gap: {n: many}", "gap.n takes int"), ("gap: 3", "gap is not a mapping"), ("- gap", "not a mapping of stages"), ("gap: {", "not valid YAML"),
    ("data: [lost]\ngap: {pool: [{path: '{data}/a.json'}]}", "none of the profile's data folders exists: lost")])
def test_mistakes_in_a_profile(house, text, told):
    (house / "mine.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=told): plan("mine.yaml")


def test_run_folder_of_another_version(house, capsys):
    write_json({"format": 99, "version": "9.9"}, house / "runs" / "toy" / "run.json")
    assert main(["run", "--profile", "toy.yaml"]) == 2 and "choose another run folder" in capsys.readouterr().err


def test_changes_and_paths(house):
    [features] = plan("toy.yaml", stages="features", changes=["features.n=7", "features.wait=1e-3", "features.pool=[{reader: llava, path: data/a.json, images: data/no/images}]"])
    assert features.parameters == {"n": 7, "wait": 0.001, "pool": [{"reader": "llava", "path": str(house / "data" / "a.json"), "images": "data/no/images"}]}
    assert features.run == house / "runs" / "toy"
    [gap] = [j for j in plan("toy.yaml", changes=["perplexity=20"]) if j.stage == "gap"]
    assert gap.parameters == {"perplexity": 20.0} and gap.needs == ("features",)
    assert place_paths("owner/name", "", [house], "backbone") == "owner/name"


# ---- work

def test_run_skip_change_and_heal(house):
    assert go() == ["features", "gap", "proximity"]
    before = time.perf_counter()
    assert go() == [] and time.perf_counter() - before < 2
    assert [s["state"] for s in status("runs/toy")][:4] == ["done", "done", "done", "not started"]
    assert go(changes=["perplexity=7"]) == ["gap"]
    assert go(changes=["perplexity=7", "features.n=4"]) == ["features", "gap", "proximity"]
    (house / "runs/toy/gap/part-1.json").unlink()
    assert go(changes=["perplexity=7", "features.n=4"]) == ["gap"]
    page = (house / "runs/toy/report.html").read_text()
    assert "Toy gap" in page and "an example before the run" not in page and "if not stage.done" not in page
    assert (house / "runs/toy/notebooks/06_gap.ipynb").exists()


def test_changed_data_are_noticed(house):
    pool = ["features.pool=[{path: data/a.json}]"]
    assert "features" in go(changes=pool) and go(changes=pool) == []
    (house / "data" / "a.json").write_text("[{}]")
    assert go(changes=pool) == ["features"], "the notebook is asked; the toy does not look at its content"


def test_stages_of_a_finished_run(house):
    assert go(stages="features") == ["features"]
    assert go(stages="gap") == ["gap"] and stage_state("runs/toy", "proximity") == "not started"


def test_failure_says_where_and_how_to_go_on(house, capsys):
    words = ["run", "--profile", "toy.yaml", "--set", "gap.n=100"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "stage gap failed: AssertionError: n is too large" in said.err and "runs/toy/notebooks/06_gap.ipynb" in said.err
    assert "to go on from here: emt run --profile toy.yaml --set gap.n=100" in said.err
    assert nbformat.read("runs/toy/notebooks/06_gap.ipynb", 4).cells[-1].outputs
    assert stage_state("runs/toy", "features") == "done" and stage_state("runs/toy", "gap") == "begun"
    assert go() == ["gap", "proximity"]


def test_a_kernel_that_dies(house):
    book = nbformat.read("nbs/06_gap.ipynb", 4)
    book.cells[-1].source = "#| run\nimport os; os.kill(os.getpid(), 9)"
    nbformat.write(book, "nbs/06_gap.ipynb")
    with pytest.raises(StageFailed, match="stage gap failed: its process was killed"): go()


def children(pid):
    "All processes below one, on Linux."
    found = [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]
    return found + [below for child in found for below in children(child)]


def emt(*words): return subprocess.Popen([sys.executable, "-c", "import sys; from embodied_midtrain.cli import main; sys.exit(main())", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_killed_run_is_completed_by_the_same_command(house):
    "SIGKILL for the command and its kernel in the midst of three stages; the rerun equals an uninterrupted run."
    options = ["--profile", "toy.yaml", *(w for s in ("features", "gap", "proximity") for w in ("--set", f"{s}.wait=0.3"))]
    for stage, part in ("features", 1), ("gap", 0), ("proximity", 2):
        run = emt("run", *options)
        wait_for(house / "runs/toy" / stage / f"part-{part}.json")
        for pid in [run.pid, *children(run.pid)]: os.kill(pid, signal.SIGKILL)
        run.wait()
        assert stage_state("runs/toy", stage) == "begun"
    assert emt("run", *options).wait() == 0
    assert emt("run", *options, "--run", "runs/calm").wait() == 0
    results = lambda folder: {k: v for k, v in contents(house / folder).items() if not k.startswith("notebooks") and k != "report.html"}
    assert results("runs/toy") == results("runs/calm") and any("proximity/part-2" in k for k in results("runs/toy"))


def test_refreshed_notebooks_are_clean(house):
    "Outputs come back by cell id, without machine paths, and nbdev_clean finds nothing to do."
    book = nbformat.read("nbs/05_features.ipynb", 4)
    book.cells.append(new.new_code_cell("#| run\nimport sys\nprint(stage.path); print('bar', file=sys.stderr)\nobject()"))
    nbformat.write(book, "nbs/05_features.ipynb")
    nbformat.write(new.new_notebook(cells=[new.new_markdown_cell("# Plain\n> no stage"), new.new_code_cell("6 * 7"), new.new_code_cell("#| slow\n1 / 0")], metadata=book.metadata), "nbs/00_plain.ipynb")
    go(), refresh("runs/toy", report=lambda line: None)
    text = (house / "nbs/05_features.ipynb").read_text()
    assert "runs/toy/features" in text and str(house) not in text and "injected" not in text and '"bar' not in text and " at 0x" not in text
    assert nbformat.read("nbs/00_plain.ipynb", 4).cells[1].outputs[0].data["text/plain"] == "42"
    (house / "settings.ini").write_text((ROOT / "settings.ini").read_text()), (house / "embodied_midtrain").mkdir()
    before = {f: f.read_bytes() for f in (house / "nbs").glob("*.ipynb")}
    subprocess.run([Path(sys.executable).parent / "nbdev_clean"], check=True, capture_output=True)
    assert before == {f: f.read_bytes() for f in before}
    assert go() == [], "outputs are no source: nothing is to be executed again"


# ---- the real notebooks and the shipped profiles

def test_parameters_are_those_that_papermill_sees():
    import papermill
    for name in STAGES.values(): assert {"run", *parameters_of(NBS / f"{name}.ipynb")} == papermill.inspect_notebook(NBS / f"{name}.ipynb").keys(), name


def paths_in(value):
    "All texts in a profile that speak of the data folder."
    if isinstance(value, dict): return [p for v in value.values() for p in paths_in(v)]
    if isinstance(value, list): return [p for v in value for p in paths_in(v)]
    return [value] if isinstance(value, str) and "{data}" in value else []


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_fit_the_notebooks(name, tmp_path, monkeypatch):
    "Every name, type and path of a shipped profile. Data that a user has to bring are missing at first, and that is told."
    monkeypatch.chdir(tmp_path)
    profile = load_profile(name)
    if name in ("paper", "mine", "metaworld"):
        with pytest.raises(FileNotFoundError, match="none of the profile's data folders exists"): plan(name)
        for path in paths_in(profile["stages"]): Path(path.replace("{data}", profile["data"][0])).mkdir(parents=True, exist_ok=True)
    assert [job.stage for job in plan(name)] == list(profile["stages"])


def test_the_paper_profile_says_which_benchmark_is_missing(tmp_path, monkeypatch):
    "Before anything runs, not when retention is reached some days later. Both stages ask the five of the paper's table 7."
    monkeypatch.chdir(tmp_path)
    stages = load_profile("paper")["stages"]
    asked = [spec["name"] for spec in stages["retention"]["benchmarks"]]
    assert stages["leakage"]["benchmarks"] == stages["retention"]["benchmarks"] and asked == pd.read_csv(ROOT / "embodied_midtrain/tables/table7_retention.csv").columns.drop("model").tolist()
    for path in paths_in(stages): Path(path.replace("{data}", "data/paper")).mkdir(parents=True, exist_ok=True)
    plan("paper")
    for i, folder in enumerate(("POPE", "BLINK", "VisuLogic", "3DSRBench", "SpatialEval")):
        (tmp_path / "data/paper" / folder).rmdir()
        with pytest.raises(FileNotFoundError, match=rf"leakage.benchmarks\[{i}\].path: .*{folder} does not exist"): plan("paper")
        with pytest.raises(FileNotFoundError, match=rf"retention.benchmarks\[{i}\].path: .*{folder} does not exist"): plan("paper", stages="features,gap,proximity,selection,midtrain,retention")
        (tmp_path / "data/paper" / folder).mkdir()


def test_results_do_not_wait_for_retention(tmp_path, monkeypatch):
    "They are made again when it is done; until then they say that it was not run."
    monkeypatch.chdir(tmp_path)
    for stage in "policy", "benchmarks": write_json({"key": "y", "files": []}, tmp_path / f"runs/smoke/{stage}/manifest.json")
    job, = plan("smoke", stages="results")
    before = fingerprint(job)
    write_json({"key": "x", "files": []}, tmp_path / "runs/smoke/retention/manifest.json")
    assert job.needs == ("benchmarks", "retention") and fingerprint(job) != before


def test_what_the_template_offers_in_comments_is_a_profile(tmp_path, monkeypatch):
    "`mine` with the comments before its stages and lists taken away."
    monkeypatch.chdir(tmp_path)
    text = re.sub(r"(?m)^# ((leakage|retention):|  )", r"\1", profile_files()["mine"].read_text())
    Path("mine.yaml").write_text(text)
    stages = load_profile("mine.yaml")["stages"]
    assert {"leakage", "retention"} <= stages.keys() and [spec["reader"] for spec in stages["retention"]["benchmarks"]][:2] == ["pope", "blink"]
    for path in paths_in(stages): Path(path.replace("{data}", "data/mine")).mkdir(parents=True, exist_ok=True)
    assert [job.stage for job in plan("mine.yaml")] == list(stages)


def test_micro_is_what_the_notebooks_show():
    "Opened by hand a notebook runs the micro profile: the profile names no parameter with another value."
    for stage, values in load_profile("micro")["stages"].items():
        known = parameters_of(NBS / f"{STAGES[stage]}.ipynb")
        assert {k: known[k].default for k in values} == values


def test_paper_profile_has_the_papers_hyperparameters():
    paper = yaml.safe_load((ROOT / "embodied_midtrain/tables/hyperparameters.yaml").read_text())
    ours, known = load_profile("paper")["stages"], {s: parameters_of(NBS / f"{n}.ipynb") for s, n in STAGES.items()}
    value = lambda stage, name: ours[stage].get(name, known[stage][name].default)
    assert value("features", "backbone") == paper["features"]["backbone"] and value("gap", "projections") == ["tsne"]
    assert value("proximity", "batch") == paper["proximity"]["batch_size"] and f"{value('proximity', 'stop_accuracy'):.2f}" in paper["proximity"]["early_stopping"]
    assert value("selection", "k") == paper["selection"]["top_k"]
    assert value("midtrain", "sequence_length") == paper["midtrain"]["sequence_length"] and value("midtrain", "warmup") == paper["midtrain"]["warmup_ratio"]
    assert value("policy", "warmup") == paper["finetune"]["warmup_steps"] and value("policy", "resize") == 224
    assert value("policy", "chunk") == paper["finetune"]["action_chunk"]["simpler_bridge"] and value("policy", "gripper_weight") == 0.01
    for stage, theirs in ("midtrain", paper["midtrain"]), ("policy", paper["finetune"]):
        assert value(stage, "steps") == theirs["steps"] and value(stage, "lr") == theirs["peak_learning_rate"] and value(stage, "schedule") == theirs["schedule"] == "cosine"
        assert value(stage, "batch_size") == theirs["per_device_batch_size"] and value(stage, "batch_size") * value(stage, "accumulation") == theirs["global_batch_size"]
        assert value(stage, "optimizer") == theirs["optimizer"].lower() == "adamw" and value(stage, "precision") == "bf16" and theirs["precision"] == "bfloat16"
