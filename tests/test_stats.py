"Intervals and tests that hold what they promise."
import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy.stats import binomtest

from embodied_midtrain import stats
from embodied_midtrain.core import generator


# ---- intervals and tests

@pytest.mark.parametrize("k, n, low, high", [(0, 10, 0, .2775), (5, 10, .2366, .7634), (10, 10, .7225, 1)])
def test_wilson_equals_published_values(k, n, low, high):
    assert stats.wilson(k, n) == pytest.approx((low, high), abs=1e-4)


def test_a_proportion_has_wilsons_interval_by_its_formula():
    share, low, high = stats.proportion(8, 10)
    z, n, p = 1.959964, 10, .8
    centre, half = (p + z * z / 2 / n) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / 4 / n / n) / (1 + z * z / n)
    assert np.allclose([share, low, high], [p, centre - half, centre + half], atol=1e-6)
    assert np.isnan(stats.proportion(0, 0)).all()


def test_the_mean_of_shares_covers_the_mean():
    hits, chances = 0, np.array([.2, .5, .9])
    for trial in range(300):
        right = generator(trial, "mean of shares").binomial([40, 80, 20], chances)
        _, low, high = stats.mean_of([stats.proportion(k, n) for k, n in zip(right, (40, 80, 20))])
        hits += low <= chances.mean() <= high
    assert 272 < hits  # 95 % promised; fewer would be a 1 in 300 accident


def test_mcnemar_equals_statsmodels():
    from statsmodels.stats.contingency_tables import mcnemar
    d = np.array([1] * 9 + [-1] * 3 + [0] * 20)
    assert stats.mcnemar(d) == pytest.approx(mcnemar([[10, 9], [3, 10]], exact=True).pvalue)


def test_interval_is_antisymmetric_and_does_not_see_the_order():
    d = generator(1, "d").integers(-1, 2, (4, 30))
    low, high = stats.paired_interval(d)
    assert stats.paired_interval(-d) == pytest.approx((-high, -low))
    assert stats.paired_interval(d[::-1, ::-1]) == pytest.approx((low, high))


@pytest.mark.parametrize("value", [-1, 0, 1])
@pytest.mark.parametrize("seeds", [1, 3])
def test_no_variation_is_not_certainty(value, seeds):
    low, high = stats.paired_interval(np.full((seeds, 20), value))
    assert -1 <= low <= value <= high <= 1 and high - low > .01


def test_one_far_seed_widens_the_interval():
    rng = generator(2, "far")
    near = (rng.random((3, 100)) < .5).astype(int)
    far = (rng.random((3, 100)) < np.array([[.1], [.5], [.9]])).astype(int)
    width = [np.subtract(*stats.paired_interval(d)) for d in (far, near)]
    assert width[0] < 3 * width[1] < 0


@pytest.mark.parametrize("seeds, spread", [(1, 0), (3, .1), (5, .05)])
def test_interval_covers_the_truth(seeds, spread):
    hits = 0
    for trial in range(200):
        rng = generator(trial, "coverage", seeds)
        chance = .3 + rng.normal(0, spread, (seeds, 1)) + rng.normal(0, .1, (1, 80))
        low, high = stats.paired_interval((rng.random((seeds, 80)) < chance).astype(int))
        hits += low <= .3 <= high
    assert hits > 180  # 95 % promised; fewer than 181 of 200 would be a 1 in 300 accident


def test_more_episodes_for_smaller_differences():
    needed = [stats.episodes_needed(.5 + gap, .5) for gap in (.05, .1, .2)]
    assert needed == sorted(needed, reverse=True)


# ---- whole groups

def by_enumeration(d, group):
    "The p-value of `swap_test` from all ways to exchange."
    sums = pd.Series(d).groupby(np.asarray(group)).sum().to_numpy()
    every = [abs(np.dot(signs, sums)) for signs in itertools.product([-1, 1], repeat=len(sums))]
    return np.mean(np.array(every) >= abs(sums.sum()))


@settings(deadline=None, max_examples=60)
@given(some.lists(some.tuples(some.sampled_from([-1, 0, 1]), some.integers(0, 9)), min_size=1, max_size=40))
def test_the_swap_test_is_that_of_all_ways_to_exchange(rows):
    d, group = map(np.array, zip(*rows))
    p = stats.swap_test(d, group)
    assert p == pytest.approx(by_enumeration(d, group)) and p == pytest.approx(stats.swap_test(-d, group))
    shuffled = generator(0, "shuffled").permutation(len(d))
    assert p == pytest.approx(stats.swap_test(d[shuffled], group[shuffled]))


@pytest.mark.parametrize("won, lost", [(0, 0), (1, 0), (5, 1), (9, 9), (300, 240)])
def test_the_swap_test_of_single_questions_is_mcnemars(won, lost):
    d = np.array([1] * won + [-1] * lost + [0] * 7)
    assert stats.swap_test(d, np.arange(len(d))) == pytest.approx(stats.mcnemar(d)) == pytest.approx(binomtest(won, won + lost).pvalue if won + lost else 1)


def test_the_swap_test_of_weighed_questions_is_that_of_all_ways_to_exchange():
    "As in a mean over tasks of 7, 4 and 3 questions; one group spans two tasks."
    d, group, weight = np.array([1, 1, 0, -1, 0, 1, 1, -1, -1, 0, -1, 1, 1, 0]), np.r_[0, np.arange(13)], 7 / np.repeat([7, 4, 3], [7, 4, 3])
    for weights in weight, 7 / np.repeat([7, 2, 5], [7, 2, 5]):
        assert stats.swap_test(d * weights, group) == pytest.approx(by_enumeration((d * weights).round(9), group), abs=.02)
    assert stats.swap_test(d * weight, group) == stats.swap_test(-d * weight, group) and stats.swap_test(np.ones(60) * 1.7, np.arange(60)) == 1 / (1 + stats.TOSSES)


def test_copies_are_no_evidence():
    d = np.array([1] * 9 + [-1] * 3 + [0] * 20)
    assert stats.swap_test(np.repeat(d, 6), np.repeat(range(len(d)), 6)) == pytest.approx(stats.mcnemar(d))


@pytest.mark.parametrize("variants, unequal", [(1, False), (6, False), (6, True)])
def test_a_difference_that_is_none_is_found_as_often_as_promised(variants, unequal):
    "Two models that know as many things, each in all its variants; also where things have different numbers of variants."
    found, found_alone, trials = 0, 0, 1000
    for trial in range(trials):
        rng = generator(trial, "nothing", variants, unequal)
        group = np.repeat(range(60), rng.integers(1, 2 * variants, 60) if unequal else variants)
        right = rng.random((2, len(group))) < np.where(rng.random((2, 60)) < .6, .9, .2)[:, group]
        d = right[0].astype(int) - right[1]
        found += stats.swap_test(d, group) <= .05
        found_alone += stats.mcnemar(d) <= .05
    assert found <= 72 and (found >= 20 if variants == 1 else found >= 30)  # 50 promised at most; more than 72 would be a 1 in 1000 accident. Few sums are possible where each thing is asked once
    assert found_alone == found if variants == 1 else found_alone > 150


def test_a_difference_that_is_there_is_found():
    "With groups it takes more, and not much more, than the interval says: both find about the same."
    found = np.zeros(2)
    for trial in range(100):
        rng = generator(trial, "something")
        group, knows = np.repeat(range(100), 6), rng.random((2, 100)) < np.array([[.75], [.5]])
        right = rng.random((2, 600)) < np.where(knows, .9, .2)[:, group]
        d = right[0].astype(int) - right[1]
        draws = stats.bootstrap_differences(pd.DataFrame(dict(task="x", group=group, difference=d)), False, rng, 500)["all"]
        found += stats.swap_test(d, group) <= .05, draws.quantile(.025) > 0
    assert (found > 80).all() and abs(found[0] - found[1]) <= 6


def test_bootstrap_draws_groups():
    "Copies of one answer are no evidence: ten copies of each question give the interval of the questions."
    rng = lambda: np.random.default_rng(0)
    d = rng().choice([-1, 0, 1], 60, p=[.1, .5, .4])
    once = stats.bootstrap_differences(pd.DataFrame(dict(task="x", group=range(60), difference=d)), False, rng())["all"]
    copies = stats.bootstrap_differences(pd.DataFrame(dict(task="x", group=np.repeat(range(60), 10), difference=np.repeat(d, 10))), False, rng())["all"]
    assert np.isclose(once.std(), copies.std(), rtol=.1) and np.isclose(once.std(), d.std() / 60**.5, rtol=.1)
    mixed = pd.DataFrame(dict(task=["x"] * 50 + ["y"] * 10, group=range(60), difference=d))
    whole, mean = stats.bootstrap_differences(mixed, False, rng()), stats.bootstrap_differences(mixed, True, rng())
    assert np.isclose(mean["all"].mean(), (d[:50].mean() + d[50:].mean()) / 2, atol=.02) and np.isclose(whole["all"].mean(), d.mean(), atol=.02) and list(mean.columns) == ["x", "y", "all"]
    assert mean["all"].equals(mixed.pipe(stats.bootstrap_differences, True, rng())["all"])  # the same draws each time
