"""Outcomes of evaluations: scores of every benchmark, paired differences, the paper's rows beside ours."""
import numpy as np
import pandas as pd
import pytest

from embodied_midtrain import outcomes
from embodied_midtrain.cli import app
from embodied_midtrain.core import MANIFEST, write_json, write_table

BRIDGE = ["widowx_carrot_on_plate", "widowx_put_eggplant_in_basket", "widowx_spoon_on_towel", "widowx_stack_cube"]


def played(benchmark="simpler_bridge", tasks=BRIDGE, episodes=6, seeds=(0, 1), arms=("base", "random", "proximity"), chains=False):
    rng = np.random.default_rng(0)
    rows = pd.DataFrame([dict(benchmark=benchmark, entry=benchmark, task=task, arm=arm, seed=seed, step=9, episode=episode, start=f"{task}/{episode}", policy_hash=f"{arm}{seed}")
                         for arm in arms for seed in seeds for task in tasks for episode in range(episodes)])
    if chains: rows["completed_subtasks"] = rng.integers(0, 6, len(rows))
    return rows.assign(success=rows.completed_subtasks == 5 if chains else rng.random(len(rows)) < .5)


def chains(): return played("calvin", [f"seq_{i:04d}" for i in range(30)], 1, chains=True)


def test_calvin_counts_tasks_in_a_row():
    table, episodes = outcomes.reached(chains()), chains()
    own = table[table.arm == "random"].set_index("what")
    lengths = episodes[episodes.arm == "random"].completed_subtasks
    assert own.loc["average length", "value"] == pytest.approx(lengths.mean()) == pytest.approx(sum(own.loc[f"{k} in a row", "value"] for k in range(1, 6)))
    assert (own.low < own.value).all() and (own.value < own.high).all() and len(own) == 6


def test_every_task_counts_the_same_in_the_mean():
    episodes = played(tasks=["a", "b"], arms=["base"], seeds=[0]).assign(success=lambda t: t.task == "a")
    episodes = episodes[(episodes.task == "a") | (episodes.episode < 2)]   # fewer of b
    assert outcomes.reached(episodes).set_index("what").loc["mean of tasks", "value"] == .5


def test_differences_pair_seeds_and_states_whatever_the_order():
    episodes = played()
    for shuffled in episodes, episodes.sample(frac=1, random_state=1):
        d = outcomes.paired(shuffled, "proximity", "base")
        by_hand = [episodes[(episodes.task == task) & (episodes.arm == arm)].sort_values(["seed", "episode"]).success.to_numpy(float) for task in BRIDGE for arm in ("proximity", "base")]
        assert sorted(float(x.sum()) for x in d) == sorted(float((a - b).sum()) for a, b in zip(by_hand[::2], by_hand[1::2])) and all(x.shape == (2, 6) for x in d)
    table = outcomes.differences(episodes).set_index(["arm", "minus"])
    rate = lambda arm: episodes[episodes.arm == arm].groupby("task").success.mean().mean()
    assert table.loc[("proximity", "base"), "difference"] == pytest.approx(rate("proximity") - rate("base"))
    assert (table.low < table.difference).all() and (table.pairs == 48).all() and (table.covers == "seeds and tasks").all()


@pytest.mark.parametrize("broken, said", [
    (lambda t: t.assign(start=None), "initial states"),
    (lambda t: t.assign(start=t.start + t.arm), "initial states"),
    (lambda t: t.drop(t.index[(t.arm == "base") & (t.episode == 2)]), "same episodes"),
    (lambda t: t.assign(seed=t.seed + 5 * (t.arm == "base")), "no seed in common")])
def test_what_cannot_be_paired_is_an_error_and_is_told(broken, said):
    with pytest.raises(ValueError, match=said): outcomes.paired(broken(played()), "proximity", "base")
    told = outcomes.outcome_text("simpler_bridge", broken(played()))
    assert "No differences" in told and said in told and "| mean of tasks" in told


def test_an_interval_is_never_of_no_width():
    nothing = [np.zeros((1, 24))]
    low, high = outcomes.interval(nothing)
    assert low < -.05 and high > .05 and outcomes.bootstrap(nothing) == (0, 0) and outcomes.pairs_needed(nothing[0]) == np.inf
    assert outcomes.interval([np.zeros((1, 1))])[1] > .5


def test_interval_of_one_task_is_that_of_results():
    "Of the tabletop's table the same arms give the same interval, whichever page reads them."
    from embodied_midtrain.stats import paired_interval
    d = np.random.default_rng(0).integers(-1, 2, (3, 200))
    assert outcomes.interval([d.astype(float)]) == pytest.approx(paired_interval(d))


def test_pairs_needed_find_the_difference_four_times_in_five():
    rng, won, lost = np.random.default_rng(0), .3, .2
    needed = int(outcomes.pairs_needed(np.repeat([1, -1, 0], [30, 20, 50])))
    d = rng.choice([1, -1, 0], (2000, needed), p=[won, lost, 1 - won - lost])
    assert np.mean(np.abs(d.mean(1)) > 1.96 * d.std(1) / np.sqrt(needed)) == pytest.approx(.8, abs=.04)


def test_the_papers_rows_are_those_of_its_tables():
    calvin, simpler, libero = (outcomes.paper_cells(name) for name in ("calvin", "simpler_bridge", "libero_10"))
    assert calvin.loc["1 in a row"].tolist()[::2] == pytest.approx([90.9, 93.5]) and np.isnan(calvin.loc["1 in a row", "random"])
    assert simpler.loc["widowx_stack_cube", "proximity"] == 41.7 and simpler[["base", "proximity"]].iloc[:4].mean().tolist() == pytest.approx(simpler.loc["mean of tasks", ["base", "proximity"]].tolist(), abs=.06)
    assert libero.loc["mean of tasks"].tolist() == [39, 48.4, 54.2] and outcomes.paper_cells("metaworld").empty


def test_whose_figures_are_whose_is_said_in_every_column():
    table = outcomes.beside_paper("calvin", outcomes.reached(chains()))
    assert all(c.startswith(("ours: ", "paper: ")) for c in table.columns[1:]) and table["paper: + random selection"].tolist() == ["-"] * 5 + ["3.398"]
    assert not any(c.startswith("paper") for c in outcomes.beside_paper("metaworld", outcomes.reached(played())).columns)


def test_a_run_is_read_with_the_larger_of_two_evaluations(tmp_path):
    from typer.testing import CliRunner
    whole = played()
    for i, part in enumerate((whole[whole.episode < 2], whole[whole.arm != "random"], whole[whole.arm == "random"], whole)):
        write_table(part, tmp_path / f"evaluate/simpler_bridge/{i}/episodes.parquet")
        if i < 3: write_json({}, tmp_path / f"evaluate/simpler_bridge/{i}/{MANIFEST}")   # the last one was killed
    found = outcomes.evaluations(tmp_path)["simpler_bridge"]
    assert len(found) == len(whole) and len(found.drop_duplicates(["arm", "seed", "task", "episode"])) == len(whole)
    said = CliRunner().invoke(app, ["outcomes", str(tmp_path)]).output
    assert "## simpler_bridge" in said and "proximity - base" in said and "paper: + proximity selection" in said
    with pytest.raises(FileNotFoundError, match="emt evaluate"): outcomes.evaluations(tmp_path / "elsewhere")


def test_other_benchmarks_of_a_run_change_nothing():
    "CALVIN's lengths are no columns of the others, and rows that lack what others have are not lost."
    one, other = played().assign(setting="execute 4"), chains()
    groups = outcomes.apart(pd.concat([one, other], ignore_index=True).assign(evaluation="e"))
    assert sorted(map(len, groups.values())) == sorted(map(len, (one, other)))
    told = [outcomes.outcome_text(part["benchmark"].iloc[0], part) for part in groups.values()]
    assert "| mean of tasks" in told[0] and "in a row" not in told[0] and "| average length" in told[1] and not any("No differences" in text for text in told)


def test_one_arm_that_cannot_be_paired_leaves_the_others():
    table = outcomes.differences(played().query("arm != 'proximity' or episode < 3"))
    assert table[["arm", "minus"]].values.tolist() == [["random", "base"]] and len(table.attrs["refused"]) == 2


def test_arms_are_compared_at_the_last_step_that_all_have():
    both = pd.concat([played().assign(step=4), played()], ignore_index=True)
    assert set(outcomes.finals(both).step) == {9}
    for unfinished in "arm != 'base' or step == 4", "arm != 'base' or seed != 1 or step == 4":   # an arm, or one of its seeds
        ends = outcomes.finals(both.query(unfinished))
        assert set(ends.step) == {4} and len(ends) == len(played())
    mine = played(arms=["mine"], seeds=[0]).assign(step=0)
    assert set(outcomes.finals(pd.concat([both, mine])).groupby("arm").step.unique().map(list).map(tuple).items()) == {("mine", (0,))} | {(arm, (9,)) for arm in ("base", "random", "proximity")}
    never = outcomes.outcome_text("simpler_bridge", both.query("(arm == 'base') == (step == 9)"))
    assert all(said in never for said in ("no step in common", "base stands at 9", "random stands at 4", "proximity stands at 4"))


def test_policies_of_one_name_from_two_runs_are_two_arms():
    runs = pd.concat([played(arms=["base"]).assign(policy=lambda t: f"{run}/policy/bridge/base-" + t.seed.astype(str) + "/step-9", policy_hash=lambda t: run + t.seed.astype(str), evaluation=run) for run in "AB"])
    part = outcomes.apart(runs)["simpler_bridge"]
    assert set(part.arm) == {"base of A/policy/bridge", "base of B/policy/bridge"}
    assert outcomes.differences(part).pairs.tolist() == [48]
    seeds = runs[(runs.seed == 0) == (runs.evaluation == "A")]   # one seed in each run: still one arm
    assert set(outcomes.apart(seeds)["simpler_bridge"].arm) == {"base"}


def test_one_policy_under_two_spellings_is_one_arm():
    spelled = lambda before: played(tasks=["a"] if before else ["b"]).assign(policy=lambda t: f"{before}x/policy/bridge/" + t.arm + "-" + t.seed.astype(str) + "/step-9", evaluation=before)
    part = outcomes.apart(pd.concat([spelled("/data/"), spelled("")]))["simpler_bridge"]
    assert set(part.arm) == {"base", "random", "proximity"} and len(outcomes.differences(part)) == 3
    for policy in "step-9", ".": assert len(outcomes.apart(played().assign(policy=policy, evaluation="e"))["simpler_bridge"]) == len(played())


def test_starts_that_nobody_knows_are_told_of_a_run_too():
    part = outcomes.apart(played().assign(start=None, evaluation="e"))["simpler_bridge"]
    assert "No differences" in outcomes.outcome_text("simpler_bridge", part)


def test_an_interval_stays_within_what_can_be():
    "Satterthwaite's degrees of freedom fall below one where seeds and tasks agree by chance: intervals of a thousand points were the outcome."
    rng = np.random.default_rng(0)
    for seeds in 2, 3:
        found = [outcomes.interval([rng.integers(-1, 2, (seeds, 24)).astype(float) for _ in range(4)]) for _ in range(200)]
        assert all(-1 <= low < high <= 1 for low, high in found)
        assert seeds == 2 or all(high - low < 1 for low, high in found)
    low, high = outcomes.interval([np.array([[5., -5.]])], bound=5)
    assert (low, high) == (-5, 5)
