"Intervals that hold what they promise, tables computed from episodes alone, the paper kept apart."
import itertools

import numpy as np
import pandas as pd
import pytest

from embodied_midtrain import results
from embodied_midtrain.core import Stage, generator, write_table


def episodes(seeds=2, count=40, arms=("base", "random", "proximity"), tasks=("reach", "push"), steps=(100, 200)):
    "Invented episodes, later arms better."
    rng, rows = generator(0, "test results"), []
    for task, step, (a, arm), seed in itertools.product(tasks, steps, enumerate(arms), range(seeds)):
        rows += [("tabletop", task, arm, seed, step, e, bool(rng.random() < .2 + .25 * a), 5) for e in range(count)]
    return pd.DataFrame(rows, columns=results.KEPT_COLUMNS)


# ---- tables

def test_success_pools_seeds_and_shows_their_range():
    table = results.success_table(episodes())
    cell = table.query("task == 'reach' and step == 200 and arm == 'proximity'").iloc[0]
    own = episodes().query("task == 'reach' and step == 200 and arm == 'proximity'")
    assert (cell["seeds"], cell["episodes"], cell["success"]) == (2, 80, own["success"].mean())
    assert [cell["lowest_seed"], cell["highest_seed"]] == sorted(own.groupby("seed")["success"].mean())
    assert table["task"].drop_duplicates().tolist() == ["reach", "push"]  # the order of the episodes, not of the alphabet


def test_tables_do_not_see_the_order_of_rows():
    whole = episodes()
    shuffled = whole.sample(frac=1, random_state=0)
    by = ["task", "step", "arm"]
    a, b = (results.success_table(e).sort_values(by, ignore_index=True) for e in (whole, shuffled))
    pd.testing.assert_frame_equal(a, b)


def test_differences_pair_the_same_episodes():
    rows = results.difference_table(episodes())
    assert len(rows) == 2 * 2 * 3 and rows["covers"].eq("seeds and episodes").all() and rows["pairs"].eq(80).all()
    first = episodes().query("task == 'reach' and step == 100")
    a, b = (first[first["arm"] == arm].sort_values(["seed", "episode"])["success"].to_numpy(int) for arm in ("proximity", "base"))
    assert rows.iloc[0][["arm", "minus", "difference"]].tolist() == ["proximity", "base", (a - b).mean()]


def test_arms_that_met_other_episodes_are_refused():
    table = episodes()
    with pytest.raises(ValueError, match="same test episodes"):
        results.difference_table(table[(table["arm"] != "base") | (table["episode"] > 3)])


def test_an_arm_that_was_not_run_is_left_out():
    two = episodes(arms=("base", "proximity"))
    assert set(results.difference_table(two)["minus"]) == {"base"}
    assert results.difference_table(episodes(arms=("base",))).empty
    assert "+ random selection" in results.summary(two)  # the paper's row stands, ours is a dash
    results.summary(episodes(arms=("base",)))


def test_one_seed_is_said_to_be_one():
    text = results.summary(episodes(seeds=1))
    assert "One seed" in text and "episodes only" in text and "seeds and episodes" not in text
    assert "One seed" not in results.summary(episodes(seeds=3))


# ---- the paper

def test_the_paper_is_named_in_every_one_of_its_columns():
    table = results.beside_paper(results.checkpoint(results.success_table(episodes())))
    assert all(column.startswith(("ours: synthetic", "paper: ")) for column in table.columns[1:])
    assert table.filter(like="paper: ").shape == (3, 3) and table.filter(like="ours: ").shape == (3, 2)


def test_the_papers_rows_are_those_of_its_tables():
    rows = results.paper_rows()
    assert rows.loc["proximity"].tolist() == [3.714, 56.3, 54.2] and rows.loc["base"].tolist() == [3.173, 36.5, 39.0]
    ablation = results.paper_table("table2_ablation").set_index("selection")
    assert rows.loc["proximity"].tolist() == ablation.loc["proximity"].tolist()  # table 2 repeats a row of table 1
    assert rows.loc["random"].tolist() == ablation.loc["random"].tolist()


# ---- what the VLM keeps

def retention_run(folder, checkpoints=("base", "random-0", "proximity-0")):
    "A run whose stage `retention` is done: what it writes, with invented figures."
    metrics = pd.DataFrame([("POPE", c, task, metric, .9 - i / 10, .85 - i / 10, .95 - i / 10) for i, c in enumerate(checkpoints) for task in ("random", "popular", "all") for metric in ("accuracy", "recall")],
                           columns=["benchmark", "checkpoint", "task", "metric", "value", "low", "high"])
    columns = ["benchmark", "checkpoint", "task", "difference", "low", "high", "won", "lost", "questions", "groups", "p"]
    differences = pd.DataFrame([("POPE", c, task, -i / 10, -i / 10 - .02, -i / 10 + .02, 5, 5 + i * 300, 3000, 500, .0123) for i, c in enumerate(checkpoints) if i for task in ("random", "popular", "all")], columns=columns)
    with Stage(folder, "retention", {"level": .9}) as stage:
        for name, table in dict(metrics=metrics, differences=differences, beside_paper=pd.DataFrame({"accuracy, %": ["POPE"], "ours: base": ["90.0"], "paper: InternVL3.5-1B": ["86.33"]})).items(): write_table(table, stage.file(f"{name}.parquet"))
    return metrics, differences


def test_what_the_vlm_keeps_is_shown(tmp_path):
    metrics, differences = retention_run(tmp_path)
    table = results.readable_retention(metrics, differences, .9)
    assert table[["task", "checkpoint"]].values.tolist() == [[task, c] for task in ("random", "popular", "all") for c in ("base", "random-0", "proximity-0")]  # side by side, recall left out
    assert table.iloc[0].tolist() == ["POPE", "random", "base", "90.0", "85.0 to 95.0", "-", "-", "-", "-"] and table.iloc[8].tolist() == ["POPE", "all", "proximity-0", "70.0", "65.0 to 75.0", "-20.0", "-22.0 to -18.0", "5 : 605", "0.012"]
    text = results.retention_summary(tmp_path)
    assert all(said in text for said in ("90% interval", "5 : 305", "86.33", "paper: InternVL3.5-1B", "11b_retention.ipynb"))


def test_what_the_vlm_keeps_without_anything_to_compare_with(tmp_path):
    metrics, differences = retention_run(tmp_path, ("published",))
    assert differences.empty and results.readable_retention(metrics, differences).iloc[:, 5:].eq("-").all(axis=None) and "86.33" in results.retention_summary(tmp_path)


def test_a_run_without_retention_says_so(tmp_path):
    assert "was not run" in results.retention_summary(tmp_path)
    (tmp_path / "retention/base").mkdir(parents=True)  # begun, not finished
    assert "was not run" in results.retention_summary(tmp_path)


# ---- files

def test_written_tables_are_the_computed_ones(tmp_path):
    results.write_results(tmp_path, episodes())
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "tables" / "success.parquet"), results.success_table(episodes()))
    assert (tmp_path / "tables" / "summary.md").read_text() == results.summary(episodes())
    assert (tmp_path / "dynamics.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("floor", [0, .2])
def test_no_label_lies_on_a_line(floor):
    "Floor and ceiling run where the arms run: their names stand in the legend, which stands below the panels."
    bounds = pd.DataFrame([("tabletop", task, predictor, rate) for task in ("reach", "push") for predictor, rate in (("expert", 1), ("random actions", floor))], columns=["benchmark", "task", "predictor", "success"])
    figure = results.plot_dynamics(episodes(), bounds=bounds)
    figure.canvas.draw()
    [legend] = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*results.ARMS.values(), "expert", "random actions"]
    assert not any(ax.texts for ax in figure.axes) and legend.get_window_extent().y1 < min(ax.get_tightbbox().y0 for ax in figure.axes)
    assert 0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= figure.bbox.x1


def test_kept_results_are_enough_to_make_all_tables_again(tmp_path):
    bounds = pd.DataFrame({"benchmark": "tabletop", "task": "reach", "predictor": ["expert", "random actions"] * 20, "success": [True, False] * 20})
    with Stage(tmp_path / "run", "benchmarks", {"episodes": 40}) as stage:
        write_table(episodes().assign(policy_hash="x", versions="y"), stage.file("episodes.parquet"))
        write_table(bounds, stage.file("bounds.parquet"))
    with Stage(tmp_path / "run", "policy/reach/base-0"): pass
    results.commit_results(tmp_path / "run", "emt run --profile micro-seeds", "kept", tmp_path)
    kept, facts = results.kept_results(tmp_path)["kept"]
    assert results.summary(kept, bounds=pd.DataFrame(facts["bounds"])) == results.summary(episodes(), bounds=bounds)
    assert facts["parameters"] == {"benchmarks": {"episodes": 40}}
    assert facts["command"] and facts["finished"] and facts["machine"]["cpus"] and set(facts["seconds"]) == {"benchmarks", "policy"}


def test_an_unfinished_run_is_not_kept(tmp_path):
    with pytest.raises(FileNotFoundError): results.commit_results(tmp_path, "emt run", "kept", tmp_path)


def test_losses_stand_below_the_success_of_the_same_task(tmp_path):
    "Of the policies that the stage names, and of no other folder."
    from embodied_midtrain.core import write_json, write_table
    names = [f"policy/{task}/{arm}-{seed}" for task in ("reach", "lift") for arm in ("base", "proximity") for seed in (0, 1)]
    for i, name in enumerate([*names, "policy/reach/left-over-0"]): write_table(pd.DataFrame(dict(step=range(1, 31), loss=.1 + i, lr=0.)), tmp_path / name / "log.parquet")
    write_json(dict(inputs=dict.fromkeys(names, "key")), tmp_path / "policy" / "manifest.json")
    losses = results.training_losses(tmp_path)
    assert losses.groupby(["task", "arm", "seed"]).size().tolist() == [30] * 8 and losses[(losses.task == "lift") & (losses.arm == "base")].groupby("seed").loss.first().tolist() == [4.1, 5.1]
    figure = results.plot_dynamics(episodes(), losses=losses)
    below = figure.axes[len(figure.axes) // 2:]
    lines = below[0].get_lines()
    assert len(figure.axes) == 2 * len(below) and len(lines) == 2 and lines[0].get_ydata()[-1] == pytest.approx(.6) and lines[1].get_ydata()[-1] == pytest.approx(2.6)
