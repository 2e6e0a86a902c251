"""Proximity: the estimator against scikit-learn and a known density ratio, the rivals against brute force, resuming."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

import embodied_midtrain.proximity as proximity
from embodied_midtrain.core import file_hash, generator, read_table, write_table
from embodied_midtrain.proximity import (MLP, CrossFit, Estimator, agreement, balanced_accuracy, by_chance, by_distance, claim, claim_text, count_sources, distance_score, draw, feature_blocks, fold_of,
                                         learning_sample, load_probe, random_score, recut, sample_blocks, scaling, score_stream, score_table, some_scores, source_draws, source_groups, source_table,
                                         split, train_estimator, train_probe, verdict)
from embodied_midtrain.samples import Sample
from embodied_midtrain.vectors import FeatureTable, feature_table, read_features

DIMS = 24


def world(seed=0, n=4000, shift=0.8):
    "A pool N(0, I) and two robot datasets around `shift` in every dimension: the log density ratio is linear in the sum of the features."
    rng = generator(seed, "world")
    robots = {"a": rng.normal(shift, 1, (n // 2, DIMS)), "b": rng.normal(shift, 1, (n // 8, DIMS))}
    return rng.normal(size=(n, DIMS)).astype(np.float32), {name: x.astype(np.float32) for name, x in robots.items()}


def as_table(pool, robots, source="s"):
    "The world as a run's features: robots come in episodes of three frames."
    ids = [f"{source}/{i}" for i in range(len(pool))] + [f"{name}/{i // 3}/{i % 3}" for name, x in robots.items() for i in range(len(x))]
    names = [source] * len(pool) + [name for name, x in robots.items() for _ in x]
    return FeatureTable(np.array(ids, object), np.array(names, object), np.repeat(["vlm", "vla"], [len(pool), len(ids) - len(pool)]), np.concatenate([pool, *robots.values()]).astype(np.float32))


@pytest.fixture(scope="module")
def trained():
    pool, robots = world()
    return pool, robots, train_estimator(pool, robots)


def test_stops_at_the_accuracy_after_tens_of_steps(trained):
    estimator = trained[2]
    assert 5 < estimator.stopped_at < 200 and len(estimator.curve) == estimator.stopped_at
    assert estimator.curve.accuracy.iloc[-1] >= 0.9 > estimator.curve.accuracy.iloc[:-1].max()


def test_density_ratio_is_recovered(trained):
    pool, _, estimator = trained
    assert spearmanr(estimator.logit(pool), pool.sum(1)).statistic > 0.95


def test_ranks_like_logistic_regression(trained):
    from sklearn.linear_model import LogisticRegression
    pool, robots, estimator = trained
    vla = np.concatenate(list(robots.values()))
    reference = LogisticRegression().fit(np.concatenate([pool, vla]), np.repeat([0, 1], [len(pool), len(vla)]))
    assert spearmanr(estimator.logit(pool), reference.decision_function(pool)).statistic > 0.97


def test_ranks_like_logistic_regression_on_the_same_batches(monkeypatch):
    "scikit-learn, with its default penalty, on the very samples that the estimator was shown up to its stop."
    from sklearn.linear_model import LogisticRegression
    pool, robots = world()
    shown, descend = [], proximity.descend
    def watched(net, batches, *rest): return descend(net, (shown.append(x) or x for x in batches), *rest)
    monkeypatch.setattr(proximity, "descend", watched)
    estimator = train_estimator(pool, robots)
    assert len(shown) == estimator.stopped_at and all(len(x) == 128 for x in shown)
    reference = LogisticRegression().fit(np.concatenate(shown), np.tile(np.repeat([0, 1], 64), len(shown)))
    folded = reference.coef_[0] / estimator_scale(pool, robots)
    assert spearmanr(estimator.logit(pool), pool @ folded).statistic > 0.99


def estimator_scale(pool, robots):
    "The scale that `train_estimator` divides by: of its training rows."
    rng, datasets = generator(0, "proximity"), [pool, *robots.values()]
    return scaling([x[split(x, 0.1, rng)[0]][:20_000] for x in datasets])[1]


@pytest.mark.parametrize("probe, least", [("linear", 0.95), ("mlp", 0.95)])
def test_two_known_gaussians_of_any_covariance(probe, least):
    "Same covariance, not round: the log density ratio is x . C^-1 m, which is not the direction of the means. Near its optimum (trained on, not stopped early) a probe recovers it."
    rng = generator(3, "gaussians")
    mix = np.linalg.qr(rng.normal(size=(8, 8)))[0] * np.linspace(0.7, 1.4, 8)
    mean = rng.normal(0, 0.45, 8)
    pool, robot = (rng.normal(size=(6000, 8)) @ mix.T + shift for shift in (0, mean))
    estimator = train_estimator(pool, {"robot": robot}, probe=probe, lr=1.0, steps=1500)
    assert spearmanr(estimator.logit(pool), pool @ np.linalg.solve(mix @ mix.T, mean)).statistic > least


def test_a_hidden_layer_recovers_a_curved_ratio():
    "Robots inside the pool: the ratio is a bowl, which a flat boundary cannot follow."
    rng = generator(0, "inside")
    pool, robots = rng.normal(size=(4000, 8)), {"robot": rng.normal(0, 0.5, (2000, 8))}
    truth = -(pool ** 2).sum(1)
    flat, bent = (train_estimator(pool, robots, probe=probe, max_steps=800) for probe in ("linear", "mlp"))
    assert abs(spearmanr(flat.logit(pool), truth).statistic) < 0.5 and spearmanr(bent.logit(pool), truth).statistic > 0.9


def test_score_is_graded(trained):
    pool, robots, estimator = trained
    score = estimator.score(pool)
    assert 0 < score.min() and score.max() < 1 and len(np.unique(score)) == len(pool)
    assert ((score > 0.2) & (score < 0.8)).mean() > 0.5 and score.mean() < 0.5 < estimator.score(robots["a"]).mean()


def test_raw_scale_of_a_feature_does_not_matter():
    "Standardising is folded into the weights: other units and offsets give the same scores."
    pool, robots = world(n=800)
    unit, offset = generator(0).uniform(0.01, 100, DIMS), generator(1).normal(0, 50, DIMS)
    plain = train_estimator(pool, robots)
    moved = train_estimator(pool * unit + offset, {name: x * unit + offset for name, x in robots.items()})
    assert moved.stopped_at == plain.stopped_at
    assert np.allclose(plain.score(pool), moved.score(pool * unit + offset), atol=1e-6)


def test_constant_features_do_no_harm():
    pool, robots = world(n=800)
    pad = lambda x: np.concatenate([x, np.full((len(x), 1), 7, np.float32)], 1)
    estimator = train_estimator(pad(pool), {name: pad(x) for name, x in robots.items()})
    assert np.isfinite(estimator.weight).all() and estimator.weight[-1] == 0


def test_deterministic_and_seeds_differ(trained):
    pool, robots, estimator = trained
    again, other = train_estimator(pool, robots), train_estimator(pool, robots, seed=1)
    assert (again.weight == estimator.weight).all() and again.bias == estimator.bias and again.curve.equals(estimator.curve)
    assert (other.weight != estimator.weight).any() and spearmanr(other.score(pool), estimator.score(pool)).statistic > 0.9


def test_score_does_not_depend_on_the_block(trained):
    pool, _, estimator = trained
    assert (estimator.logit(pool)[100:107] == estimator.logit(pool[100:107])).all()
    assert estimator.logit(pool[:0]).shape == (0,)


def test_save_and_load(trained, tmp_path):
    pool, _, estimator = trained
    estimator.save(tmp_path)
    again = Estimator.load(tmp_path)
    assert (again.score(pool) == estimator.score(pool)).all() and again.curve.equals(estimator.curve) and verdict(again) == verdict(estimator)


def test_the_two_warnings():
    pool, robots = world(n=400)
    overlapping = train_estimator(pool, {"a": pool[:200]}, max_steps=5)
    assert overlapping.stopped_at is None and "never reached in 5 steps" in verdict(overlapping)
    apart = train_estimator(pool, {"a": robots["a"] + 50})
    assert apart.stopped_at <= 3
    assert "step 1" in verdict(train_estimator(pool, {"a": robots["a"] + 50}, stop_accuracy=0.5))


def test_batches_are_balanced_over_robot_datasets():
    datasets = [(np.full((n, 1), i, float), np.arange(n)) for i, n in enumerate((1000, 10, 3))]
    shares = np.bincount(draw(datasets, 30_000, generator(0)).ravel().astype(int)) / 30_000
    assert np.allclose(shares, 1 / 3, atol=0.01)
    assert balanced_accuracy([np.array([-1.0]), np.ones(1000), -np.ones(2)]) == 0.75


def test_the_message_is_there_for_every_kind_of_probe(tmp_path):
    "Never reached, or reached at step 1: told of linear, MLP and cross-fitted probes alike, also after loading."
    pool, robots = world(n=400)
    hopeless, trivial = as_table(pool, {"a": pool[:200]}), as_table(pool, {"a": robots["a"] + 50})
    for probe in "linear", "mlp":
        for folds in 1, 3:
            never = train_probe(hopeless, folds, probe=probe, max_steps=5)
            at_once = train_probe(trivial, folds, probe=probe, stop_accuracy=0.4)
            never.save(tmp_path / f"never-{probe}-{folds}")
            assert "WARNING" in repr(never) and "never reached in 5 steps" in repr(load_probe(tmp_path / f"never-{probe}-{folds}"))
            assert "WARNING" in repr(at_once) and "threshold, not a grade" in repr(at_once)


def test_no_sample_is_both_learnt_from_and_validated_on():
    train, held = split(np.zeros((100, 1)), 0.1, generator(0))
    assert len(held) == 10 and not set(train) & set(held) and len(set(train) | set(held)) == 100
    assert [len(rows) for rows in split(np.zeros((2, 1)), 0.1, generator(0))] == [1, 1]
    with pytest.raises(ValueError, match="two at least"): split(np.zeros((1, 1)), 0.1, generator(0))
    with pytest.raises(ValueError, match="robot data"): train_estimator(np.zeros((10, 2)), {})


def test_scaling_makes_the_mixture_unit_length():
    pool, robots = world(n=400)
    centre, scale = scaling([pool, *robots.values()])
    square = [(((x - centre) / scale) ** 2).sum(1).mean() for x in (pool, *robots.values())]
    assert np.isclose(square[0] / 2 + np.mean(square[1:]) / 2, 1)


def test_distance_against_brute_force():
    pool, robots = world(n=60)
    vla = robots["a"]
    brute = [-sum(np.sqrt(((x.astype(float) - v) ** 2).sum()) for v in vla) / len(vla) for x in pool]
    assert np.allclose(distance_score(pool, vla, block=7), brute, atol=1e-10)


def test_distance_never_holds_the_whole_matrix():
    "20,000 x 2,000 distances would be 320 MB, and each of their parts as much."
    import tracemalloc
    x, vla = generator(0, "many").normal(size=(20_000, 8)), generator(1, "many").normal(size=(2000, 8))
    tracemalloc.start()
    distance_score(x, vla)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


def test_random_score_is_uniform_and_bound_to_the_id():
    ids = [f"s/{i}" for i in range(5000)]
    score = random_score(ids, 0)
    assert (random_score(ids[::-1], 0)[::-1] == score).all() and abs(spearmanr(score, random_score(ids, 1)).statistic) < 0.05
    assert abs(score.mean() - 0.5) < 0.02 and abs((score < 0.1).mean() - 0.1) < 0.02 and 0 <= score.min() and score.max() < 1


# ---- other probes

def test_mlp_keeps_what_the_linear_one_promises(tmp_path):
    "Raw units do not matter, deterministic, saved and loaded, graded, the same in any block up to rounding."
    pool, robots = world(n=800)
    plain, again = (train_estimator(pool, robots, probe="mlp") for _ in range(2))
    assert isinstance(plain, MLP) and (plain.logit(pool) == again.logit(pool)).all()
    unit, offset = generator(0).uniform(0.01, 100, DIMS), generator(1).normal(0, 50, DIMS)
    moved = train_estimator(pool * unit + offset, {name: x * unit + offset for name, x in robots.items()}, probe="mlp")
    assert moved.stopped_at == plain.stopped_at and np.allclose(plain.score(pool), moved.score(pool * unit + offset), atol=1e-6)
    plain.save(tmp_path)
    loaded = load_probe(tmp_path)
    assert isinstance(loaded, MLP) and (loaded.logit(pool) == plain.logit(pool)).all() and repr(loaded) == repr(plain)
    assert np.allclose(plain.logit(pool)[100:107], plain.logit(pool[100:107]), atol=1e-12) and plain.logit(pool[:0]).shape == (0,)
    assert 0 < plain.score(pool).min() and plain.score(pool).max() < 1 and len(np.unique(plain.score(pool))) == len(pool)


def test_mlp_learns_by_the_gradient_of_its_loss():
    "Every weight against a difference quotient of the mean cross-entropy."
    rng = generator(0, "gradient")
    net, x, y = proximity.MLPProbe(5, rng, 7), rng.normal(size=(12, 5)), np.repeat([0, 1], 6)
    net.w, net.b = rng.normal(size=7), 0.3
    loss = lambda: float(np.mean(np.logaddexp(0, net.logits(x)) - y * net.logits(x)))
    def slope(name, at):
        kept, step = getattr(net, name), 1e-6
        values = []
        for sign in (1, -1):
            moved = np.array(kept, float)
            moved[at] += sign * step
            setattr(net, name, moved)
            values.append(loss())
        setattr(net, name, kept)
        return (values[0] - values[1]) / (2 * step)
    wanted = {(name, at): slope(name, at) for name, ats in dict(w=[(0,), (6,)], b=[()], v=[(0, 0), (4, 6), (2, 3)], c=[(1,), (5,)]).items() for at in ats}
    before = {name: np.array(getattr(net, name), float) for name in "wbvc"}
    net.learn(x, (1 / (1 + np.exp(-net.logits(x))) - y) / len(x), lr=1.0)
    for (name, at), value in wanted.items(): assert np.isclose(before[name][at] - np.array(getattr(net, name), float)[at], value, atol=1e-7)


@pytest.mark.parametrize("probe", ["linear", "mlp"])
def test_cross_fitting_never_scores_what_it_was_trained_on(probe, monkeypatch):
    "Samples that are spoiled in one fold change the scores of the others and not their own probe."
    pool, robots = world(n=600)
    table = as_table(pool, robots)
    fold = fold_of(table.ids, 3)
    seen, train = [], proximity.train_estimator
    monkeypatch.setattr(proximity, "train_estimator", lambda vlm, vla, **how: seen.append((len(vlm), {n: len(x) for n, x in vla.items()})) or train(vlm, vla, **how))
    crossed = train_probe(table, 3, probe=probe)
    in_pool, names = table.kinds == "vlm", table.sources
    assert seen == [(int((in_pool & keep).sum()), {n: int(((names == n) & keep).sum()) for n in robots}) for keep in [np.ones(len(table), bool), *(fold != j for j in range(3))]]
    spoiled = FeatureTable(table.ids, table.sources, table.kinds, np.where((fold == 1)[:, None], -30 + table.x, table.x))
    other = train_probe(spoiled, 3, probe=probe, max_steps=150)
    assert crossed.whole.stopped_at and len(other.parts[1].curve) == other.whole.curve.step.iloc[-1]
    same = train(table.where(fold != 1).subset("vlm").x, table.where(fold != 1).subset("vla").groups(), probe=probe, steps=int(other.whole.curve.step.iloc[-1]))
    assert (other.parts[1].logit(table.x) == same.logit(table.x)).all()  # not a trace of fold 1
    assert (other.parts[0].logit(table.x) != crossed.parts[0].logit(table.x)).any()


def test_cross_fitted_probe_is_saved_and_scores_any_order(tmp_path):
    pool, robots = world(n=600)
    table = as_table(pool, robots)
    crossed = train_probe(table, 12)
    crossed.save(tmp_path)
    loaded = load_probe(tmp_path)
    assert isinstance(loaded, CrossFit) and len(loaded.parts) == 12 and (loaded(table) == crossed(table)).all() and repr(loaded) == repr(crossed)
    order = generator(0).permutation(len(table))
    assert (crossed(table.where(order)) == crossed(table)[order]).all() and len(crossed(table.where([]))) == 0
    assert load_probe(tmp_path).whole.logit(pool).shape == (600,) and isinstance(Estimator.load(tmp_path), Estimator)


def test_folds_are_even_and_keep_episodes_together():
    ids = [f"s/{i}" for i in range(6000)]
    assert np.allclose(np.bincount(fold_of(ids, 5)) / 6000, 0.2, atol=0.02) and (fold_of(ids[::-1], 5)[::-1] == fold_of(ids, 5)).all()
    assert len(set(fold_of([f"robot/7/{t}" for t in range(50)], 5))) == 1


def test_probes_agree_where_the_truth_is_flat(trained):
    "And cross-fitting is no noisier than another seed."
    pool, robots, _ = trained
    table = as_table(pool, robots)
    probes = {"linear": train_probe(table), "seed": train_probe(table, seed=1), "folds": train_probe(table, 5), "mlp": train_probe(table, probe="mlp")}
    told = agreement(probes, table.subset("vlm")).set_index("probe")
    truth = [spearmanr(probe(table.subset("vlm")), pool.sum(1)).statistic for probe in probes.values()]
    assert (told.spearman[["seed", "folds"]] > 0.98).all() and told.spearman["mlp"] > 0.9 and min(truth) > 0.9
    top = lambda name: set(np.argsort(-probes[name](table.subset("vlm")))[:400])
    assert told.kept_alike["linear"] == 1 and np.isclose(told.kept_alike["mlp"], len(top("linear") & top("mlp")) / 400)
    with pytest.raises(ValueError, match="did you mean 'mlp'"): train_probe(table, probe="mpl")


# ---- streams

@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    "A run's features on disk, in parts of several sources, kinds and sizes."
    folder, (pool, robots) = tmp_path_factory.mktemp("features"), world(n=4000)
    table = as_table(pool, robots)
    for n, (start, stop) in enumerate([(0, 1700), (1700, 1701), (1701, 3900), (3900, 4100), (4100, len(table))]):  # the fourth holds both kinds
        rows = table.where(slice(start, stop))
        write_table(feature_table([Sample(i, s, k, (), ()) for i, s, k in zip(rows.ids, rows.sources, rows.kinds)], rows.x), folder / f"part-{n:02}-00000.parquet")
    return folder, read_features(folder)


@pytest.mark.parametrize("kind", [None, "vlm", "vla"])
@pytest.mark.parametrize("start, size", [(0, 8192), (0, 100), (1, 333), (1700, 64), (1701, 999), (3950, 7), (4000, 100), (99_999, 10)])
def test_blocks_are_the_table_from_any_row_on(stored, kind, start, size):
    folder, whole = stored
    rows = (whole.subset(kind) if kind else whole).where(slice(start, None))
    blocks = list(feature_blocks(folder, kind, start, size))
    assert [i for b in blocks for i in b.ids] == rows.ids.tolist() and all(0 < len(b) <= size for b in blocks)
    if blocks: assert (np.concatenate([b.x for b in blocks]) == rows.x).all() and [s for b in blocks for s in b.sources] == rows.sources.tolist()
    cut = list(recut(blocks, 500))
    assert [len(t) for t in cut[:-1]] == [500] * (len(cut) - 1) and [i for t in cut for i in t.ids] == rows.ids.tolist()


def test_no_features_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the features stage first"): next(feature_blocks(tmp_path))


def functions(estimator, robots): return {seed: {"logit": estimator, "distance": by_distance(robots["b"]), "random": by_chance(seed)} for seed in (0, 1)}


def test_stream_equals_the_whole_table(stored, trained, tmp_path):
    "Part by part from disk: the logits to the bit, distances up to the rounding of a matrix product."
    folder, whole = stored
    _, robots, estimator = trained
    score_stream(lambda start: feature_blocks(folder, "vlm", start, size=300), functions(estimator, robots), tmp_path, part_size=900)
    wanted = score_table(whole.subset("vlm"), functions(estimator, robots)).sort_values(["seed", "id"], ignore_index=True)
    found = read_table(tmp_path).sort_values(["seed", "id"], ignore_index=True)
    assert [len(read_table(tmp_path / f"part-{n:05}.parquet")) for n in range(5)] == [1800] * 4 + [800]
    assert found.drop(columns="distance").equals(wanted.drop(columns="distance")) and np.allclose(found.distance, wanted.distance, rtol=1e-12)


@pytest.mark.parametrize("lost", [[1], [0], [4], [1, 3], [0, 1, 2, 3, 4], []])
@pytest.mark.parametrize("how", ["stored", "made on the way"])
def test_resumed_scoring_equals_uninterrupted(stored, trained, tmp_path, lost, how):
    "To the byte, whichever parts are missing, with features on disk or made from samples; parts that are there are not touched."
    folder, whole = stored
    _, robots, estimator = trained
    pool = whole.subset("vlm")
    row, asked = dict(zip(pool.ids, pool.x)), []
    def samples(start):
        asked.append(start)
        return iter([Sample(i, "s", "vlm", (), ()) for i in pool.ids[start:]])
    streams = {"stored": lambda start: feature_blocks(folder, "vlm", start, size=300), "made on the way": lambda start: sample_blocks(samples, lambda block: np.stack([row[s.id] for s in block]), start, size=300)}
    def write(name): score_stream(streams[how], functions(estimator, robots), tmp_path / name, part_size=900)
    write("whole")
    write("cut")
    for n in lost: (tmp_path / "cut" / f"part-{n:05}.parquet").unlink()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").iterdir()}
    write("cut")
    one, two = ({path.name: file_hash(path) for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert one == two and len(one) == 5 and all(path.stat().st_mtime_ns == time for path, time in times.items())
    if how != "stored": assert asked[-1] == 900 * min(lost, default=5)  # nothing before the first missing part is made again


def test_stream_dies_and_goes_on(stored, trained, tmp_path):
    "A features function that fails in the middle leaves whole parts behind."
    folder, whole = stored
    _, robots, estimator = trained
    def failing(start):
        for n, block in enumerate(feature_blocks(folder, "vlm", start, size=300)):
            if n == 5: raise KeyboardInterrupt
            yield block
    with pytest.raises(KeyboardInterrupt): score_stream(failing, functions(estimator, robots), tmp_path, part_size=900)
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000.parquet"]
    score_stream(lambda start: feature_blocks(folder, "vlm", start), functions(estimator, robots), tmp_path, part_size=900)
    assert len(read_table(tmp_path)) == 2 * len(whole.subset("vlm"))


def test_learning_sample_is_fair_and_bounded(stored):
    folder, whole = stored
    assert count_sources(folder) == {("vlm", "s"): 4000, ("vla", "a"): 2000, ("vla", "b"): 500}
    everything = learning_sample(folder, 10**6)
    assert (everything.ids == whole.ids).all() and (everything.x == whole.x).all()
    few = learning_sample(folder, 1000)
    assert {s: int((few.sources == s).sum()) for s in "sab"} == {"s": 1000, "a": 1000, "b": 500} and len(set(few.ids)) == 2500
    row = {i: x for i, x in zip(whole.ids, whole.x)}
    assert all((x == row[i]).all() for i, x in zip(few.ids, few.x))
    drawn = np.concatenate([[int(i.split("/")[1]) for i in learning_sample(folder, 200, seed).ids if i.startswith("s/")] for seed in range(20)])
    assert abs(drawn.mean() / 2000 - 1) < 0.05 and len(set(drawn)) > 2000  # from everywhere, another draw for another seed


def test_estimator_from_a_draw_ranks_like_one_from_everything(stored):
    folder, whole = stored
    assert spearmanr(train_probe(learning_sample(folder, 400))(whole), train_probe(whole)(whole)).statistic > 0.97


def test_some_scores_are_the_same_ids_for_all_seeds(stored, trained, tmp_path):
    folder, _ = stored
    _, robots, estimator = trained
    score_stream(lambda start: feature_blocks(folder, "vlm", start), functions(estimator, robots), tmp_path, part_size=900)
    assert some_scores(tmp_path, 4000).equals(read_table(tmp_path))
    some = some_scores(tmp_path, 500)
    zero, one = (set(some[some.seed == seed].id) for seed in (0, 1))
    assert zero == one and abs(len(zero) - 500) < 80 and abs(some.score.mean() - read_table(tmp_path).score.mean()) < 0.02


GROUPS = {"points": "embodied", "captions": "general", "words": "general"}


@pytest.fixture(scope="module")
def scores():
    rng = generator(0, "scores")
    rows = [pd.DataFrame(dict(id=[f"{source}/{i}" for i in range(n)], source=source, seed=seed, score=np.clip(rng.normal(mean, 0.1, n), 0, 1)))
            for source, n, mean in (("points", 50, 0.6), ("captions", 400, 0.4), ("words", 100, 0.2)) for seed in (0, 1)]
    return pd.concat(rows, ignore_index=True)


def test_source_means_and_claim(scores):
    draws = source_draws(scores, 200)
    table = source_table(draws, GROUPS, scores.source.value_counts() // 2)
    assert table.source.tolist() == ["points", "captions", "words"] and table.samples.tolist() == [50, 400, 100]
    assert np.allclose(table.score, [scores[scores.source == s].score.mean() for s in table.source]) and (table.low < table.score).all() and (table.score < table.high).all()
    told = claim(draws, GROUPS)
    assert np.isclose(told["difference"][0], table.score[0] - table.score[1:].mean()) and "YES" in claim_text(told)
    assert "NO:" in claim_text(claim(draws, {"points": "general", "words": "embodied"}))
    assert "No answer" in claim_text(claim(draws, {"points": "embodied"}))


def test_groups_of_the_tabletop_and_of_others():
    groups = source_groups({"mine": "embodied"})
    assert groups["mini-laion"] == "general" and groups["mini-refspatial"] == groups["mine"] == "embodied" and len(groups) == 9
    with pytest.raises(ValueError, match="'spatial'"): source_groups({"mine": "spatial"})


def test_score_table_has_a_row_for_each_id_and_seed(trained):
    pool, robots, estimator = trained
    calls = []
    far = lambda rows: calls.append(len(rows)) or distance_score(rows.x, robots["b"])
    table = score_table(as_table(pool[:2], {}), {seed: {"logit": estimator, "distance": far, "random": by_chance(seed)} for seed in (0, 5)})
    assert calls == [2]  # what seeds share is computed once
    assert list(table.columns) == ["id", "source", "seed", "score", "logit", "distance", "random"] and table.seed.tolist() == [0, 0, 5, 5]
    assert (table.score[:2].to_numpy() == table.score[2:].to_numpy()).all() and (table.random[:2].to_numpy() != table.random[2:].to_numpy()).all()
