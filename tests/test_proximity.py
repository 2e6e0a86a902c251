"""Proximity: the estimator against scikit-learn and a known density ratio, the rivals against brute force, resuming."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from embodied_midtrain.core import file_hash, generator
from embodied_midtrain.proximity import (Estimator, balanced_accuracy, claim, claim_text, distance_score, draw, random_score, scaling, score_table,
                                         source_draws, source_groups, source_table, split, train_estimator, verdict, write_scores)

DIMS = 24


def world(seed=0, n=4000, shift=0.8):
    "A pool N(0, I) and two robot datasets around `shift` in every dimension: the log density ratio is linear in the sum of the features."
    rng = generator(seed, "world")
    robots = {"a": rng.normal(shift, 1, (n // 2, DIMS)), "b": rng.normal(shift, 1, (n // 8, DIMS))}
    return rng.normal(size=(n, DIMS)).astype(np.float32), {name: x.astype(np.float32) for name, x in robots.items()}


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


def test_random_score_is_uniform_and_bound_to_the_id():
    ids = [f"s/{i}" for i in range(5000)]
    score = random_score(ids, 0)
    assert (random_score(ids[::-1], 0)[::-1] == score).all() and abs(spearmanr(score, random_score(ids, 1)).statistic) < 0.05
    assert abs(score.mean() - 0.5) < 0.02 and abs((score < 0.1).mean() - 0.1) < 0.02 and 0 <= score.min() and score.max() < 1


def test_resumed_scoring_equals_uninterrupted(trained, tmp_path):
    pool, robots, estimator = trained
    ids, sources = np.array([f"s/{i}" for i in range(len(pool))]), np.repeat("s", len(pool))
    def write(folder): write_scores(folder, ids, sources, pool, {0: estimator, 1: estimator}, robots["b"], part_size=1500)
    write(tmp_path / "whole")
    write(tmp_path / "cut")
    (tmp_path / "cut" / "part-00001.parquet").unlink()
    before = (tmp_path / "cut" / "part-00000.parquet").stat().st_mtime_ns
    write(tmp_path / "cut")
    whole, cut = ({path.name: file_hash(path) for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert whole == cut and len(whole) == 3 and (tmp_path / "cut" / "part-00000.parquet").stat().st_mtime_ns == before


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
    table = score_table(np.array(["s/0", "s/1"]), np.array(["s", "s"]), pool[:2], {0: estimator, 5: estimator}, robots["b"])
    assert list(table.columns) == ["id", "source", "seed", "score", "logit", "distance", "random"] and table.seed.tolist() == [0, 0, 5, 5]
    assert (table.score[:2].to_numpy() == table.score[2:].to_numpy()).all() and (table.random[:2].to_numpy() != table.random[2:].to_numpy()).all()
