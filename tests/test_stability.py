"""Stability: overlaps against brute force, chance against drawing, the same settings give the same selection, nesting in K, joins by id."""
from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from embodied_midtrain.core import generator, write_table
from embodied_midtrain.proximity import train_probe
from embodied_midtrain.selection import top_k
from embodied_midtrain.stability import (chance_jaccard, check_same, compare_run, compare_selections, compare_settings, compare_ways, draw_stretches, extract_ways, figure_rows, findings, grade, growth, in_top,
                                         axis_text, beside_kept, k_text, other_k, own_options, plot_growth, plot_stability, scored, scores_of, seed_text, steps_to, stopping_points, train_settings, ways_to_try)
from embodied_midtrain.vectors import FeatureTable

PARAMETERS = dict(seeds=[0, 1], folds=1, compare=True, learn_from=1000, probe="linear", batch=64, stop_accuracy=0.9, lr=0.1, max_steps=2000, validation=0.1)
OPTIONS = own_options(PARAMETERS, 0)


def world(seed=0, dims=12, **sizes):
    "A pool of two sources and two robot datasets, nearer to the second source."
    sizes = sizes or dict(far=600, near=200, reach=150, push=60)
    centre, rng = dict(far=0.0, near=0.5, reach=1.0, push=1.1), generator(seed, "world")
    x = np.concatenate([rng.normal(centre[s], 1, (n, dims)) for s, n in sizes.items()]).astype(np.float32)
    kinds = np.array(["vlm" if s in ("far", "near") else "vla" for s, n in sizes.items() for _ in range(n)])
    return FeatureTable(np.array([f"{s}/{i}" for s, n in sizes.items() for i in range(n)], object), np.repeat(list(sizes), list(sizes.values())).astype(object), kinds, x)


@pytest.fixture(scope="module")
def run():
    "A table, its pool, the probe's logits, and K."
    table = world()
    pool = table.subset("vlm")
    return table, pool, train_probe(table, **OPTIONS)(pool), 120


@pytest.fixture(scope="module")
def retrained(run):
    table, pool, own, k = run
    return compare_settings(pool, own, k, scored(train_settings(table, OPTIONS, [0, 1, 2, 3], [0.5, 2], [5, 40], [0.8, 0.9, 0.9999], longest=300), pool, k) | other_k(own, k, [0.25, 0.5, 2]))


def brute(a, b, sources):
    "The same with Python's sets, sample by sample."
    a, b = ({i for i, kept in enumerate(mask) if kept} for mask in (a, b))
    share = lambda chosen, s: sum(sources[i] == s for i in chosen) / len(chosen)
    return dict(kept=len(a), kept_other=len(b), shared=len(a & b), jaccard=len(a & b) / len(a | b), overlap=len(a & b) / min(len(a), len(b)),
                mix=sum(abs(share(a, s) - share(b, s)) for s in set(sources)) / 2)


@pytest.mark.parametrize("draw", range(8))
def test_overlaps_equal_sets(draw):
    rng = generator(draw, "masks")
    n, sources = int(rng.integers(5, 60)), rng.choice(list("abc"), 60)
    a, b = (rng.permutation(n) < rng.integers(1, n + 1) for _ in range(2))
    told = compare_selections(a, b, sources[:n])
    for name, value in brute(a, b, list(sources[:n])).items(): assert np.isclose(told[name], value), name


def test_largest_is_reached_and_never_passed():
    n = 7
    for ka in range(1, n + 1):
        for kb in range(1, n + 1):
            a = np.arange(n) < ka
            found = [compare_selections(a, np.isin(np.arange(n), chosen), np.repeat("s", n)) for chosen in combinations(range(n), kb)]
            assert np.isclose(max(f["jaccard"] for f in found), found[0]["largest"])


@pytest.mark.parametrize("a, b, n", [([30], [30], [200]), ([30], [90], [200]), ([50, 4, 0], [20, 8, 6], [100, 10, 60]), ([10, 30], [10, 30], [10, 90])])
def test_chance_equals_drawing(a, b, n):
    rng = generator(0, "chance", len(a), a[0], b[0])
    def shared(): return sum(len(set(rng.choice(m, x, replace=False)) & set(rng.choice(m, y, replace=False))) for x, y, m in zip(a, b, n))
    draws = np.array([shared() for _ in range(3000)])
    values = draws / (sum(a) + sum(b) - draws)
    assert abs(values.mean() - chance_jaccard(a, b, n)) < 4 * values.std() / np.sqrt(len(values)) + 2e-4


def test_chance_against_all_pairs():
    "Every selection of 3 of 8 beside every selection of 4: nothing is drawn."
    pairs = [(len(set(x) & set(y)), 7) for x in combinations(range(8), 3) for y in combinations(range(8), 4)]
    assert abs(chance_jaccard(3, 4, 8) - np.mean([m / (total - m) for m, total in pairs])) < 0.01
    assert np.isclose(chance_jaccard(8, 8, 8), 1) and chance_jaccard(0, 5, 9) == 0 and np.isclose(chance_jaccard([4, 0], [4, 0], [4, 5]), 1)


def test_ties_are_broken_as_in_the_selection():
    rng = generator(0, "ties")
    ids, logits = np.array([f"s/{i}" for i in range(300)], object), rng.integers(0, 5, 300).astype(float)
    kept = top_k(pd.DataFrame(dict(id=ids, source="s", score=logits)), 77).id
    assert set(ids[in_top(ids, logits, 77)]) == set(kept)
    for k in 0, 301:
        with pytest.raises(ValueError, match="of a pool of 300"): in_top(ids, logits, k)
    shuffled = rng.permutation(300)
    assert set(ids[shuffled][in_top(ids[shuffled], logits[shuffled], 77)]) == set(kept)


def test_the_same_settings_give_the_same_selection(retrained):
    again = retrained[retrained.axis == "as it is"].iloc[0]
    assert again.jaccard == again.overlap == 1 and again.shared == again.kept and np.isclose(again.spearman, 1)


def test_other_seeds_move_it_a_little(retrained, run):
    seeds = retrained[retrained.axis == "seed"]
    assert list(seeds.setting) == ["1", "2", "3"] and seeds.jaccard.min() < 1 and (seeds.spearman < 1).all()
    assert (seeds.jaccard > 3 * seeds.chance).all() and (seeds.spearman > 0.9).all() and (seeds.samples == 800).all()
    table, pool, own, k = run
    other = train_probe(table, **OPTIONS | {"seed": 2})(pool)
    shared = len({*np.argsort(-own)[:k]} & {*np.argsort(-other)[:k]})
    assert seeds.shared.iloc[1] == shared and np.isclose(seeds.spearman.iloc[1], pd.Series(own).corr(pd.Series(other), method="spearman"))


def test_one_long_training_tells_where_others_stop(run):
    "A probe that was told the steps is the very probe that stopped there."
    table, pool, *_ = run
    curve = train_probe(table, **OPTIONS | dict(stop_accuracy=np.inf, max_steps=400)).curve
    for accuracy, steps in steps_to(curve, [0.75, 0.85, 0.9]).items():
        stopped = train_probe(table, **OPTIONS | dict(stop_accuracy=accuracy))
        assert stopped.stopped_at == steps and (train_probe(table, **OPTIONS, steps=steps)(pool) == stopped(pool)).all()


def test_stopping_points(retrained):
    curve = pd.DataFrame(dict(step=[1, 2, 3], accuracy=[0.7, 0.9, 0.8]))
    assert steps_to(curve, [0.7, 0.8, 0.95]) == {0.7: 1, 0.8: 2, 0.95: None}
    assert stopping_points(curve, [7], [0.8, 0.95]) == {("fixed steps", "7 steps"): 7, ("stop at accuracy", "80%"): 2, ("stop at accuracy", "95%, not reached"): 3, ("stop at accuracy", "never"): 3}
    at = retrained.set_index(["axis", "setting"])
    assert at.jaccard["stop at accuracy", "90%"] == 1 and at.steps["fixed steps", "40 steps"] == 40 and at.steps["stop at accuracy", "99.99%, not reached"] == 300
    assert at.shared["stop at accuracy", "99.99%, not reached"] == at.shared["stop at accuracy", "never"]


def test_the_runs_own_options_are_used():
    assert own_options(PARAMETERS, 1) == dict(seed=1, folds=1, probe="linear", batch=64, stop_accuracy=0.9, lr=0.1, max_steps=2000, validation=0.1)


def test_a_probe_that_gives_up_is_marked(run):
    table, pool, own, k = run
    options = OPTIONS | dict(stop_accuracy=0.9999, max_steps=15)
    told = compare_settings(pool, own, k, scored(train_settings(table, options, fixed=[5]), pool, k)).set_index("setting")
    assert told.steps["trained again"] == 15 and not told.stopped["trained again"] and told.stopped["5 steps"]


def test_cross_fitted_and_bent_probes_can_be_asked_too(run):
    table, pool, *_ = run
    options = own_options(PARAMETERS | dict(folds=3), 0)
    folded = compare_settings(pool, train_probe(table, **options)(pool), 120, scored(train_settings(table, options, [1], fixed=[20]), pool, 120))
    assert folded.jaccard[0] == 1 and folded.steps.iloc[2] == 20
    bent = own_options(PARAMETERS | dict(probe="mlp", max_steps=60), 0)
    assert dict(train_settings(table, bent))["as it is", "trained again"].hidden.shape == (12, 256)


# ---- K

def test_nesting_is_exact(retrained, run):
    table, pool, own, k = run
    rows = retrained[retrained.axis == "K"]
    assert rows.kept_other.tolist() == [30, 60, 240] and rows.setting.tolist() == ["x 0.25 = 30", "x 0.5 = 60", "x 2 = 240"]
    assert (rows.overlap == 1).all() and (rows.jaccard == rows.largest).all() and (rows.shared == np.minimum(rows.kept, rows.kept_other)).all()
    masks = [in_top(pool.ids, own, n) for n in (30, 60, 120, 240)]
    assert all((small <= large).all() for small, large in zip(masks, masks[1:]))


def test_k_that_does_not_fit_is_left_out(run):
    *_, own, k = run
    assert [name for _, name in other_k(own, k, [0.001, 0.5, 100], run_k=12_000)] == ["x 0.5 = 6,000"]


def test_growth_by_hand(run):
    _, pool, own, k = run
    grown = growth(pool, own, k, [0.5, 2], run_k=1200)
    order = pool.sources[np.argsort(-own, kind="stable")]
    for (low, high), told in zip([(0, 60), (60, 120), (120, 240), (240, 800)], [600, 1200, 2400, 8000]):
        rows = grown[grown.k == told].set_index("source")
        assert np.isclose(rows.share["near"], (order[:high] == "near").mean()) and np.isclose(rows.entering["near"], (order[low:high] == "near").mean())
        assert np.isclose(rows.retention["near"], (order[:high] == "near").sum() / 200)
    assert growth(pool, own, len(own), [0.5, 2]).k.nunique() == 2  # K may be the whole pool


# ---- other features

def test_stretches_are_of_neighbours_and_sized_by_the_source():
    table = world(far=600, near=200, reach=150, push=3)
    few = draw_stretches(table, 80, seed=1)
    assert {s: len(x) for s, x in few.groups().items()} == {"far": 60, "near": 20, "reach": 8, "push": 3}
    for source in few.kind_of:
        numbers = [int(i.split("/")[1]) for i in few.ids[few.sources == source]]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert draw_stretches(table, 80, seed=1).ids.tolist() == few.ids.tolist() != draw_stretches(table, 80, seed=2).ids.tolist()
    assert len(draw_stretches(table, 10**6)) == len(table)


def test_features_made_in_other_ways_are_those_of_extract():
    from embodied_midtrain.backbone import load_backbone
    from embodied_midtrain.features import extract
    from embodied_midtrain.tabletop.pool import TabletopSource
    backbone, samples = load_backbone("tiny"), list(TabletopSource("mini-refspatial", 9))
    depth = backbone.model.config.get_text_config().num_hidden_layers
    made = extract_ways(backbone, samples, [(p, depth) for p in ("last", "mean", "image")] + [("last", 1)], batch_size=4)
    for pooling in "last", "mean", "image": assert np.allclose(made[pooling, depth], extract(backbone, samples, pooling).astype(np.float32), atol=1e-2)
    full = extract_ways(backbone, samples, [("last", depth)], "full", 9)["last", depth]
    assert np.allclose(full, extract(backbone, samples, text="full").astype(np.float32), atol=1e-2) and not np.allclose(full, made["last", depth], atol=0.1)
    assert not np.allclose(made["last", 1], made["last", depth], atol=0.1)


def test_ways_to_try_change_one_thing_each():
    ways = ways_to_try("mean", "full", 3, [0.3, 0.34, 0.99])
    own = ways.pop(("as it is", "drawn part"))
    assert own == ("mean", 3, "full") and all(sum(a != b for a, b in zip(own, way)) == 1 for way in ways.values())
    assert [name for axis, name in ways if axis == "layer"] == ["1 of 3", "2 of 3"] and {axis for axis, _ in ways} == {"pooling", "layer", "text"}


def test_features_that_are_no_longer_the_runs_are_refused():
    x = generator(0, "x").normal(size=(50, 8))
    check_same(x * 1.01, x)
    with pytest.raises(ValueError, match="100% of the 50 drawn samples.*Run the features stage again"): check_same(x[::-1], x)


def test_ways_are_judged_among_the_drawn_samples(run):
    table = run[0]
    own = ("as it is", "drawn part")
    rows = compare_ways(table, {own: table.x, ("pooling", "the same"): table.x.copy(), ("layer", "noise"): generator(0, "noise").normal(size=table.x.shape).astype(np.float32)}, 0.15, OPTIONS, [0, 1])
    assert list(rows.axis) == ["pooling", "layer", "seed"] and (rows.kept == 120).all() and (rows.samples == 800).all()
    assert rows.jaccard[0] == 1 and rows.jaccard[1] < rows.jaccard[2] and abs(rows.jaccard[1] - rows.chance[1]) < 0.08


# ---- another run

def store(folder, ids, logits, seed=0):
    for n, part in enumerate(np.array_split(np.arange(len(ids)), 3)):
        write_table(pd.DataFrame(dict(id=ids[part], seed=seed, logit=logits[part])), folder / f"proximity/scores/part-{n:05}.parquet")


def test_another_run_is_joined_by_id(tmp_path, run):
    _, pool, own, k = run
    order = generator(0, "order").permutation(800)
    store(tmp_path, pool.ids[order], own[order])
    same = compare_run(pool, own, k, scores_of(pool.ids, tmp_path), "other").iloc[0]
    assert same.jaccard == 1 and same.samples == 800 and same.setting == "other"


def test_another_run_with_a_part_of_the_pool(tmp_path, run):
    _, pool, own, k = run
    strangers = np.array([f"web/{i}" for i in range(100)], object)
    store(tmp_path, np.concatenate([strangers, pool.ids[200:]]), np.concatenate([np.full(100, 9.0), own[200:]]))
    logits = scores_of(pool.ids, tmp_path)
    assert np.isnan(logits[:200]).all() and (logits[200:] == own[200:]).all()
    row = compare_run(pool, own, k, logits, "other").iloc[0]
    assert row.setting == "other (600 in both)" and row.samples == 600 and row.kept == 90 and row.jaccard == 1


def test_another_run_with_other_ids_is_refused(tmp_path, run):
    pool = run[1]
    store(tmp_path / "theirs", np.array(["web/7", "web/8", "web/9"], object), np.zeros(3))
    with pytest.raises(ValueError, match="theirs shares no sample with this one: its ids look like 'web/7', ours like 'far/0'"): scores_of(pool.ids, tmp_path / "theirs")
    with pytest.raises(ValueError, match="no scores of seed 5"): scores_of(pool.ids, tmp_path / "theirs", seed=5)
    with pytest.raises(ValueError, match="it has no scores"): scores_of(pool.ids, tmp_path / "nowhere")


# ---- words and figures

def made_up(**kept):
    "A table of settings that share so much of 100, of 1,000 samples."
    rows = [dict(axis=axis, setting=f"{axis} {n}", samples=1000, steps=n, stopped=True, kept=100, kept_other=100, shared=shared, jaccard=shared / (200 - shared), overlap=shared / 100, chance=0.053,
                 chance_in_sources=0.2, largest=1.0, mix=0.01, spearman=0.9) for axis, each in kept.items() for n, shared in enumerate(each, 1)]
    return pd.DataFrame(rows).astype({"steps": "Int64"})


def test_grades():
    assert grade([0.0, 0.03, 0.04, 0.1, 0.101], 0.03).tolist() == [0, 0, 1, 1, 2]
    assert grade([0.2, 0.4, 0.41], 0.2).tolist() == [0, 1, 2] and grade(0.5, 0.0).item() == 2


def test_words_follow_the_table():
    table = made_up(seed=[97, 95], layer=[96, 95], pooling=[96, 92], text=[96, 40, 10])
    assert axis_text(table, "layer").startswith("layer: matters no more than the seed; no more is replaced than by another seed: layer 1 (1 step) keeps 96.0%")
    assert axis_text(table, "pooling").startswith("pooling: matters little; more is replaced than by another seed, less than twice as much: pooling 2 (2 steps) keeps 92.0%")
    text = axis_text(table, "text")
    assert text.startswith("text: MATTERS; far more is replaced than by another seed: text 2") and "text 3 (3 steps) keeps 10.0% (Jaccard 0.05, no more than chance)" in text and text.index("text 1 ") > text.index("text 3 ")
    assert seed_text(made_up(seed=[97, 89])).startswith("seed: MATTERS") and "keeps 89" not in seed_text(table)
    assert axis_text(table.assign(stopped=table.setting != "layer 2"), "layer").endswith("layer 2 (2 steps, gave up) keeps 95.0% (Jaccard 0.90)")
    assert "seed: matters little; 2 other seeds of the probe keep 95.0% to 97.0%" in seed_text(table) and "random selections 0.05" in seed_text(table)


def test_words_without_a_yardstick(retrained, run):
    _, pool, own, k = run
    table, grown = retrained[retrained.axis != "seed"], growth(pool, own, k, [0.25, 0.5, 2])
    lines = findings(table, grown, k)
    assert "no other seed was trained" in seed_text(table) and sum("no yardstick" in line for line in lines) == 4
    assert k_text(table[table.axis != "K"], grown, k) == "K: no other K was asked for"


def test_drawn_samples_have_their_own_yardstick():
    drawn = made_up(seed=[70], pooling=[75]).assign(samples=100, kept=10)
    table = pd.concat([made_up(seed=[97]), drawn])
    assert axis_text(table, "pooling").startswith("pooling (of 100 drawn samples, 10 kept; another seed keeps 70.0%): matters no more than the seed")
    assert [title for title, _ in figure_rows(table)] == ["seed", "seed (100 samples)", "pooling (100 samples)"]


def test_a_probe_that_cannot_be_repeated_is_told(retrained, run):
    _, pool, own, k = run
    grown = growth(pool, own, k, [2])
    assert findings(retrained, grown, k)[0] == "trained again as it was: the same selection"
    changed = retrained.assign(jaccard=retrained.jaccard.where(retrained.axis != "as it is", 0.9))
    assert findings(changed, grown, k)[0].startswith("WARNING: trained again")
    assert len(findings(retrained, grown, k)) == 6


def test_a_selection_that_is_not_the_nearest_k_is_told(retrained, run):
    _, pool, own, k = run
    grown, order = growth(pool, own, k, [2]), pool.ids[np.argsort(-own)]
    plain, passed_over = (beside_kept(pool, own, k, ids) for ids in (order[:120], order[30:150]))
    assert plain.jaccard[0] == 1 and passed_over.shared[0] == 90 and passed_over.kept_other[0] == 120
    assert len(findings(pd.concat([retrained, plain]), grown, k)) == 6
    assert "holds 75.0% of its nearest K" in findings(pd.concat([retrained, passed_over]), grown, k)[1]


def test_every_axis_finds_its_place_in_the_figure(tmp_path, retrained, run):
    _, pool, own, k = run
    drawn = made_up(seed=[70], pooling=[75], layer=[60], text=[80]).assign(samples=100)
    other = made_up(**{"other run": [50]}).assign(samples=640, steps=None)
    table = pd.concat([retrained, drawn, other], ignore_index=True)
    titles = [title for title, _ in figure_rows(table)]
    assert titles == ["seed", "fixed steps", "stop at accuracy", "step size", "K", "other run", "seed (100 samples)", "pooling (100 samples)", "layer (100 samples)", "text (100 samples)"]
    figure = plot_stability(table)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == (table.axis != "as it is").sum() and "40 steps" in labels and "x 2 = 240" in labels and "pooling 1 (1 step)" in labels
    for name, made in dict(stability=figure, alone=plot_stability(retrained[retrained.axis == "K"]), growth=plot_growth(growth(pool, own, k, [0.5, 2]), k)).items():
        made.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
