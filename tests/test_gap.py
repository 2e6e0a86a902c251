"""The gap: MMD against a triple loop and a closed form, intervals, tables; all on small arrays."""
from functools import partial
from math import comb

import numpy as np
import pytest

from embodied_midtrain.core import generator
from embodied_midtrain.gap import (bootstrap_weights, count_units, draw_moved, draw_weights, equal_groups, exact_sums, fourier_error, fourier_sums, gaussian_kernel, group_means, in_units,
                                   interval, median_bandwidth, mmd2, mmd_matrix, mmd_pairs, mmd_table, permutation_signs, plot_spectrum, project, project_groups, robot_distance,
                                   robot_reach, spectrum, spectrum_table, sq_distances, unit_of, unit_sums)


def cloud(name, n=20, dims=5, shift=0.0):
    return shift + generator(0, "test", name).normal(size=(n, dims))


def mmd2_by_loops(x, y, sigma, unbiased):
    "Equation 1, pair by pair."
    def mean(a, b, skip):
        total = count = 0.0
        for i in range(len(a)):
            for j in range(len(b)):
                if skip and i == j: continue
                square = 0.0
                for d in range(a.shape[1]): square += (a[i, d] - b[j, d]) ** 2
                total, count = total + np.exp(-square / (2 * sigma**2)), count + 1
        return total / count
    return mean(x, x, unbiased) + mean(y, y, unbiased) - 2 * mean(x, y, False)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_equals_the_triple_loop(unbiased):
    x, y = cloud("x"), cloud("y", 13, shift=0.5)
    assert abs(mmd2(x, y, 1.7, unbiased) - mmd2_by_loops(x, y, 1.7, unbiased)) < 1e-10


def test_mmd_does_not_depend_on_order_and_is_symmetric():
    x, y, rng = cloud("x"), cloud("y", 13), generator(1)
    assert abs(mmd2(x, y, 2.0) - mmd2(rng.permutation(x), rng.permutation(y), 2.0)) < 1e-12
    assert abs(mmd2(x, y, 2.0) - mmd2(y, x, 2.0)) < 1e-12


def test_unbiased_is_zero_on_average_between_equal_distributions_and_biased_is_not():
    draws = [(cloud(f"a{i}", 30), cloud(f"b{i}", 30)) for i in range(300)]
    unbiased, biased = ([mmd2(x, y, 3.0, u) for x, y in draws] for u in (True, False))
    assert abs(np.mean(unbiased)) < 3 * np.std(unbiased) / np.sqrt(300) and np.min(unbiased) < 0
    assert np.min(biased) >= 0 and np.mean(biased) > 10 * abs(np.mean(unbiased))


def test_two_gaussians_in_closed_form():
    dims, sigma, a, b, shift = 4, 2.0, 1.0, 0.5, 0.8
    def expected(distance, u, v):
        s2 = sigma**2 + u**2 + v**2
        return (sigma**2 / s2) ** (dims / 2) * np.exp(-distance**2 / (2 * s2))
    truth = expected(0, a, a) + expected(0, b, b) - 2 * expected(shift * np.sqrt(dims), a, b)
    found = [mmd2(a * cloud(f"x{i}", 200, dims), b * cloud(f"y{i}", 200, dims) + shift, sigma) for i in range(20)]
    assert abs(np.mean(found) - truth) < 4 * np.std(found) / np.sqrt(20)


def test_median_bandwidth():
    x = cloud("x", 50)
    pairs = [np.linalg.norm(x[i] - x[j]) for i in range(50) for j in range(i)]
    assert np.isclose(median_bandwidth(x), np.median(pairs))
    assert median_bandwidth(cloud("x", 500), seed=3, limit=100) == median_bandwidth(cloud("x", 500), seed=3, limit=100)
    for broken in np.ones((9, 2)), np.full((9, 2), np.nan):
        with pytest.raises(ValueError, match="median distance"): median_bandwidth(broken)


def test_float16_and_large_features_keep_their_precision():
    x = (100 * cloud("x")).astype(np.float16)
    exact = ((x[:, None].astype(np.float64) - x) ** 2).sum(-1)
    assert np.allclose(sq_distances(x, x), exact, atol=1e-9)


@pytest.fixture(scope="module")
def groups():
    return {"near": cloud("near", 60, shift=0.8), "far": cloud("far", 60), "robot": 0.5 * cloud("robot", 60, shift=1.5), "robot 2": 0.5 * cloud("robot2", 60, shift=1.6)}


KINDS = {"near": "vlm", "far": "vlm", "robot": "vla", "robot 2": "vla"}


def test_matrix_equals_pairs_and_diagonal_is_about_zero(groups):
    matrix = mmd_matrix(groups, 2.0)
    for a in groups:
        for b in groups:
            if a != b: assert np.isclose(matrix.loc[a, b], mmd2(groups[a], groups[b], 2.0), atol=1e-12)
    assert np.abs(np.diag(matrix)).max() < 0.05 < matrix.loc["far", "robot"]


def test_replicates_are_deterministic_and_centred_on_the_estimate(groups):
    replicates, _ = mmd_pairs(groups, 2.0, bootstrap=400)
    assert (replicates == mmd_pairs(groups, 2.0, bootstrap=400)[0]).all()
    assert np.allclose(replicates[0], mmd_matrix(groups, 2.0))
    off = ~np.eye(4, dtype=bool)
    assert np.allclose(replicates[1:].mean(0)[off], replicates[0][off], atol=5 * (replicates[1:].std(0) / 20).max())


def test_bootstrap_interval_covers_the_truth():
    "Between different distributions a 95 % interval holds the large-sample value about as often as it says."
    truth = mmd2(cloud("X", 2000), cloud("Y", 2000, shift=0.7), 2.5)
    hits = 0
    for i in range(60):
        pair = {"x": cloud(f"x{i}", 60), "y": cloud(f"y{i}", 60, shift=0.7)}
        row = mmd_table(mmd_pairs(pair, 2.5, 200)[0], {"x": "vlm", "y": "vla"}).set_index("relation").loc["across"]
        hits += row.low <= truth <= row.high
    assert hits >= 51  # 85 %


def test_table_and_group_means(groups):
    replicates, _ = mmd_pairs(groups, 2.0, 50)
    table, means = mmd_table(replicates, KINDS), group_means(replicates, KINDS).set_index("relation")
    assert table.relation.value_counts().to_dict() == {"across": 4, "split-half": 4, "within VLM": 1, "within VLA": 1}
    assert np.isclose(means.mmd2["across"], table[table.relation == "across"].mmd2.mean())
    assert means.ratio["across"] == 1 and np.isclose(means.ratio["within VLM"], means.mmd2["across"] / means.mmd2["within VLM"])
    assert table.normalised.max() == 1 and (means.low <= means.mmd2).all() and (means.mmd2 <= means.high).all()


def test_negative_estimates_are_shown_as_they_are():
    same = {"a": cloud("a", 200), "b": cloud("b", 200), "c": cloud("c", 200)}
    table = mmd_table(mmd_pairs(same, 3.0)[0], dict.fromkeys(same, "vlm"))
    assert (table.mmd2 < 0).any() and table.low.isna().all()


def test_one_robot_dataset_has_no_distance_within(groups):
    three = {name: groups[name] for name in list(groups)[:3]}
    means = group_means(mmd_pairs(three, 2.0, 10)[0], {name: KINDS[name] for name in three})
    assert means.pairs.tolist() == [1, 0, 2] and np.isnan(means.mmd2[1]) and not np.isnan(means.ratio[0])


def test_equal_groups(groups):
    few = equal_groups({**groups, "small": cloud("small", 7)}, 40)
    assert {len(x) for x in few.values()} == {7}
    assert (equal_groups(groups, 10)["near"] == equal_groups({"near": groups["near"]}, 10)["near"]).all()  # whoever else is there
    with pytest.raises(ValueError, match="'tiny'"): equal_groups({**groups, "tiny": cloud("tiny", 3)}, 40)


def test_projection_is_deterministic_and_keeps_clusters_apart(groups):
    map_ = project_groups({name: groups[name][:20] for name in groups}, KINDS, ["tsne"])
    again = project_groups({name: groups[name][:20] for name in groups}, KINDS, ["tsne"])
    assert map_.equals(again) and len(map_) == 80
    with pytest.raises(ValueError, match="did you mean 'umap'"): project(groups["near"], "umpa")


# ---- precision and blocks

UNITS = {"robot": np.arange(60) // 3, "robot 2": np.repeat(np.arange(10), [1, 2, 3, 4, 5, 6, 7, 8, 9, 15])}  # units in order, so that codes are as np.unique has them


def sums_of(a, b): return [*zip((a.within, a.within_ones, a.cross, a.cross_ones), (b.within, b.within_ones, b.cross, b.cross_ones)), *zip(a.own, b.own)]


def test_single_precision_far_from_the_origin():
    "Features with a large common offset, as language models have them: float32 blocks agree with float64."
    x, y = (cloud(n, 50, 64).astype(np.float32) + np.float32(300) * np.arange(64, dtype=np.float32) for n in "xy")
    exact = np.exp(-sq_distances(x, y) / (2 * 10.0**2))
    k = gaussian_kernel(x, y, 10.0)
    assert k.dtype == np.float32 and np.abs(k - exact).max() < 1e-6
    own = gaussian_kernel(x, x, 10.0)
    assert (own.diagonal() == 1).all() and own.max() <= 1 and np.allclose(own, own.T, atol=1e-6)
    assert abs(mmd2(x, y, 10.0) - mmd2(x.astype(np.float64), y.astype(np.float64), 10.0)) < 1e-6


def test_blocks_are_computed_once(groups, monkeypatch):
    from embodied_midtrain import gap
    seen = []
    monkeypatch.setattr(gap, "gaussian_kernel", lambda x, y, *rest: (seen.append((id(x), id(y))), gaussian_kernel(x, y, *rest))[1])
    mmd_pairs(groups, 2.0, bootstrap=3, permutations=3)
    assert len(seen) == 10 == len({frozenset(pair) for pair in seen})  # 4 datasets: 6 pairs and 4 with themselves


def test_torch_gives_the_same_sums(groups):
    "The lines that run on a GPU, run by torch on the CPU."
    torch = pytest.importorskip("torch")
    for kind, tolerance in (np.float64, 1e-11), (np.float32, 1e-6):
        features, sizes = in_units({name: x.astype(kind) for name, x in groups.items()}, UNITS)
        ours, theirs = (exact_sums(features, sizes, *draw_weights(sizes, 20, 20, 0), 2.0, *way) for way in ((np,), (torch, "cpu")))
        for a, b in sums_of(ours, theirs): assert np.abs(a - b).max() < tolerance * 60**2


def mmd2_of_units(x, y, of_x, of_y, unbiased=True):
    "Equation 1 with sigma 2, all pairs of one unit left out; repeated samples are of the same unit."
    def k(u, v): return np.exp(-sq_distances(u, v) / 8)
    def within(u, of): return k(u, u)[(np.asarray(of)[:, None] != np.asarray(of)) | (not unbiased)].mean()
    return within(x, of_x) + within(y, of_y) - 2 * k(x, y).mean()


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("units", [None, UNITS], ids=["samples", "units"])
def test_draws_equal_means_over_the_drawn_samples(groups, unbiased, units):
    "A bootstrap draw, done by hand: repeat each drawn unit's samples, and leave out the pairs within a unit and with its copies; so for the halves."
    replicates, _ = mmd_pairs(groups, 2.0, bootstrap=3, unbiased=unbiased, seed=5, units=units)
    drawn = {}
    for name in ("far", "robot"):
        _, of = np.unique((units or {}).get(name, np.arange(60)), return_inverse=True)
        times = bootstrap_weights(of.max() + 1, 3, generator(5, "gap", "bootstrap", name))[2].astype(int)
        drawn[name] = (i := np.repeat(np.arange(60), times[of])), of[i]
        half = (generator(5, "gap", "halves", name).permutation(of.max() + 1) < (of.max() + 1) // 2)[of[i]]
        by_hand = mmd2_of_units(groups[name][i[half]], groups[name][i[~half]], of[i[half]], of[i[~half]], unbiased)
        assert np.isclose(replicates[2, list(groups).index(name), list(groups).index(name)], by_hand, atol=1e-12)
    (i, of_i), (j, of_j) = drawn.values()
    assert np.isclose(replicates[2, 1, 2], mmd2_of_units(groups["far"][i], groups["robot"][j], of_i, of_j, unbiased), atol=1e-12)


# ---- p-values

@pytest.mark.parametrize("sizes", [([1] * 12, [1] * 12), ([2, 2, 3, 1, 4], [1, 5, 2, 4]), ([1] * 12, [3, 4, 5])], ids=["samples", "units", "samples against units"])
def test_p_equals_shuffling_by_hand(sizes):
    "Every row of signs, carried out: whole units change sides, the MMD is computed anew from the samples that are then on each side, and counted."
    pair, seed, shuffles = {"a": cloud("a", 12), "b": cloud("b", 12, shift=0.4)}, 3, 60
    m = {name: len(c) for name, c in zip("ab", sizes)}
    of = [np.repeat(np.arange(len(c)), c) for c in sizes]
    moved = draw_moved(m["a"], m["b"], shuffles, seed)
    s, r = (permutation_signs(m[name], moved, generator(seed, "gap", "permutation", name, m[other]))[:, units] for name, other, units in zip("ab", "ba", of))
    pooled, unit, labels = np.concatenate(list(pair.values())), np.concatenate([of[0], m["a"] + of[1]]), np.concatenate([s, -r], axis=1) > 0
    assert all(len(set(unit[row])) == m["a"] and not set(unit[row]) & set(unit[~row]) for row in labels)
    def distance(row): return mmd2_of_units(pooled[row], pooled[~row], unit[row], unit[~row])
    larger = sum(distance(row) >= distance(np.arange(24) < 12) - 1e-10 for row in labels)
    p = mmd_pairs(pair, 2.0, 0, shuffles, seed=seed, units=dict(zip("ab", of)))[1][0, 1]
    assert np.isclose(p, (1 + larger) / (1 + shuffles)) and 0 < larger < shuffles
    if sizes[0] == sizes[1]: assert p == mmd_pairs(pair, 2.0, 0, shuffles, False, seed)[1][0, 1]  # without units, and whatever the estimate


@pytest.mark.parametrize("m_a, m_b", [(2, 2), (2, 3), (4, 1)])
def test_signs_draw_every_labelling_alike(m_a, m_b):
    "Of few units: every way to label m_a of them is as likely."
    moved = draw_moved(m_a, m_b, 6000, 0)
    labels = np.concatenate([permutation_signs(m_a, moved, generator(1)), -permutation_signs(m_b, moved, generator(2))], axis=1)
    kinds, counts = np.unique(labels, axis=0, return_counts=True)
    ways = comb(m_a + m_b, m_a)
    assert len(kinds) == ways and ((kinds > 0).sum(1) == m_a).all() and np.abs(counts - 6000 / ways).max() < 5 * np.sqrt(6000 / ways)


def test_p_is_uniform_under_the_null_and_small_under_a_shift():
    null = np.array([mmd_pairs({"a": cloud(f"a{i}", 25), "b": cloud(f"b{i}", 25)}, 3.0, 0, 99, seed=i)[1][0, 1] for i in range(400)])
    assert null.min() >= 0.01 and all(abs((null <= level).mean() - level) < 3 * np.sqrt(level * (1 - level) / 400) for level in (0.05, 0.25, 0.5, 0.75))
    shifted = [mmd_pairs({"a": cloud(f"a{i}", 25), "b": cloud(f"b{i}", 25, shift=1)}, 3.0, 0, 99, seed=i)[1][0, 1] for i in range(20)]
    assert np.max(shifted) == 0.01  # the smallest there is


def test_p_of_equal_samples_is_one_and_sizes_must_agree(groups):
    x = cloud("x")
    replicates, p = mmd_pairs({"a": x, "b": x.copy(), "c": x + 5}, 2.0, 0, 50)
    assert p[0, 1] == 1 and p[0, 2] == 1 / 51 and np.isnan(np.diag(p)).all() and (p[0, 1:] == p[1:, 0]).all()
    with pytest.raises(ValueError, match="equal size"): mmd_pairs({"a": x, "b": x[:9]}, 2.0, 0, 50)
    table = mmd_table(replicates, dict(a="vlm", b="vlm", c="vla"), p).set_index(["a", "b"])
    assert table.p["a", "c"] == 1 / 51 and np.isnan(table.p["a", "a"])
    assert np.isnan(mmd_pairs({"a": x, "b": x + 1}, 2.0, 5)[1]).all()  # without shuffles


# ---- units: frames of one episode depend on each other

def robot(*name, sizes=(2, 8), episodes=12, n=40, spread=0.3, shift=0.0, dims=5):
    "Frames that hardly differ within an episode, n of them drawn at random, and the episode of each; over all episodes each frame is N(shift, 1)."
    rng = generator(0, "robot", *name)
    of = np.repeat(np.arange(episodes), rng.integers(sizes[0], sizes[1] + 1, episodes))
    x = shift + np.sqrt(1 - spread**2) * rng.normal(size=(episodes, dims))[of] + spread * rng.normal(size=(len(of), dims))
    keep = rng.permutation(len(of))[:n]
    return x[keep], of[keep]


def null_share(make_a, make_b, by_unit, repeats=300):
    "How often two datasets drawn alike come out with p at or below 0.05."
    def p(i):
        (x, of_x), (y, of_y) = make_a("a", i), make_b("b", i)
        return mmd_pairs({"a": x, "b": y}, 3.0, 0, 99, seed=i, units={"a": of_x, "b": of_y} if by_unit else None)[1][0, 1]
    return np.mean([p(i) <= 0.05 for i in range(repeats)])


NOISE = 3 * np.sqrt(0.05 * 0.95 / 300)  # of a share of 300; a test that keeps its word stays below 0.05 + NOISE, one in seven hundred excepted


def test_false_positives_keep_their_word_by_unit_and_not_by_sample():
    by_unit, by_sample = (null_share(robot, robot, way) for way in (True, False))
    assert abs(by_unit - 0.05) < NOISE and by_sample > 0.5, (by_unit, by_sample)


@pytest.mark.parametrize("other", [partial(robot, sizes=(1, 1), episodes=40), partial(robot, sizes=(10, 10), episodes=5)], ids=["no episodes", "few long ones"])
def test_units_that_differ_in_number_and_size_err_to_the_careful_side(other):
    "Frames alike, episodes not: the labels of units are not quite arbitrary then, but a small p stays rare."
    assert null_share(partial(robot, sizes=(4, 4), episodes=10), other, True) < 0.05 + NOISE


def test_by_unit_a_real_shift_is_found():
    found = [mmd_pairs({"a": x, "b": y}, 3.0, 0, 99, seed=i, units={"a": of_x, "b": of_y})[1][0, 1] for i in range(20) for (x, of_x), (y, of_y) in [(robot("a", i), robot("b", i, shift=1.5))]]
    assert np.mean(np.array(found) <= 0.05) > 0.9


def test_interval_by_unit_covers_the_truth_and_by_sample_it_does_not():
    truth, hits = mmd2(robot("A", sizes=(1, 1), episodes=2000, n=2000)[0], robot("B", sizes=(1, 1), episodes=2000, n=2000, shift=0.8)[0], 3.0), np.zeros(2)
    for i in range(80):
        (x, of_x), (y, of_y) = robot("a", i, episodes=30, n=120), robot("b", i, episodes=30, n=120, shift=0.8)
        for way, units in enumerate((None, {"a": of_x, "b": of_y})):
            low, high = interval(mmd_pairs({"a": x, "b": y}, 3.0, 200, units=units)[0][1:, 0, 1])
            hits[way] += low <= truth <= high
    assert hits[1] >= 68 > 56 > hits[0], hits  # 85 %, 70 %


def test_unbiased_by_unit_and_too_large_by_sample():
    "Pairs within an episode are near: left in, two robots drawn alike seem to differ."
    draws = [(robot("a", i), robot("b", i)) for i in range(300)]
    by_unit, by_sample = (np.array([mmd_pairs({"a": x, "b": y}, 3.0, units=u and {"a": of_x, "b": of_y})[0][0, 0, 1] for (x, of_x), (y, of_y) in draws]) for u in (True, None))
    assert abs(by_unit.mean()) < 3 * by_unit.std() / np.sqrt(300) and by_sample.mean() > 10 * by_sample.std() / np.sqrt(300)
    halves = np.array([mmd_pairs({"a": x}, 3.0, units={"a": of})[0][0, 0, 0] for (x, of), _ in draws])
    assert abs(halves.mean()) < 3 * halves.std() / np.sqrt(300)


def test_units_of_single_samples_change_nothing_and_order_does_not_matter(groups):
    plain, single = mmd_pairs(groups, 2.0, 5, 20), mmd_pairs(groups, 2.0, 5, 20, units={name: unit_of([f"{name}/{i}" for i in range(60)], "vlm") for name in groups})
    for a, b in zip(plain, single): assert np.array_equal(a, b, equal_nan=True)
    order, off = generator(0).permutation(60), ~np.eye(4, dtype=bool)
    turned = mmd_pairs(groups | {"robot 2": groups["robot 2"][order]}, 2.0, units=UNITS | {"robot 2": UNITS["robot 2"][order]})[0]
    assert np.allclose(turned[0][off], mmd_pairs(groups, 2.0, units=UNITS)[0][0][off], atol=1e-12)


def test_a_pair_does_not_depend_on_who_else_is_there(groups):
    every, two = (mmd_pairs({name: groups[name] for name in names}, 2.0, 10, 50, units=UNITS) for names in (groups, ("far", "robot")))
    assert np.allclose(every[0][:, [1, 2]][:, :, [1, 2]], two[0], atol=1e-12) and every[1][1, 2] == two[1][0, 1]


def test_units_are_named_counted_and_checked(groups):
    ids = {"robot": [f"robot/{i // 3}/{i % 3}" for i in range(60)], "far": [f"far/{i}" for i in range(60)]}
    assert count_units({"robot": unit_of(ids["robot"], "vla"), "far": unit_of(ids["far"], "vlm")}) == {"robot": 20, "far": 60}
    assert count_units({"robot": unit_of(ids["robot"], "vla", "sample")}) == {"robot": 60}
    with pytest.raises(ValueError, match="did you mean 'episode'"): unit_of(ids["far"], "vlm", "episodes")
    with pytest.raises(ValueError, match="all samples of dataset 'robot' are of one episode"): mmd_pairs(groups, 2.0, units={"robot": ["x"] * 60})
    with pytest.raises(ValueError, match="60 samples, but units are given for 59"): mmd_pairs(groups, 2.0, units={"robot": range(59)})
    replicates, p = mmd_pairs(groups, 2.0, 40, 20, units={"robot": np.arange(60) // 30, "robot 2": np.arange(60) // 20})  # two and three units: no halves, but no failure
    table = mmd_table(replicates, KINDS, p, {"near": 60, "far": 60, "robot": 2, "robot 2": 3}).set_index(["a", "b"])
    assert np.isnan(table.mmd2["robot", "robot"]) and table.mmd2.drop([("robot", "robot"), ("robot 2", "robot 2")]).notna().all()
    assert (table.units_a["far", "robot"], table.units_b["far", "robot"]) == (60, 2) and table.p["robot", "robot 2"] >= 1 / comb(5, 2) / 2


def test_sums_over_units_equal_sums_over_samples(groups):
    x, sizes = in_units(groups, UNITS)
    k = gaussian_kernel(x["robot 2"], x["robot"], 2.0)
    added = unit_sums(unit_sums(k, sizes["robot 2"]).T, sizes["robot"]).T
    assert added.shape == (10, 20) and np.allclose(added, [[k[np.ix_(UNITS["robot 2"] == a, UNITS["robot"] == b)].sum() for b in range(20)] for a in range(10)])


# ---- Fourier

@pytest.mark.parametrize("units", [None, UNITS], ids=["samples", "units"])
def test_fourier_is_near_the_exact_one_and_error_falls_with_frequencies(groups, units):
    exact = mmd_pairs(groups, 2.0, 20, 100, units=units)
    fourier = mmd_pairs(groups, 2.0, 20, 100, sums=partial(fourier_sums, frequencies=8192), units=units)
    assert np.nanmax(np.abs(fourier[0] - exact[0])) < 0.02 < np.nanmax(exact[0]) / 10  # estimates and bootstrap draws
    assert np.nanmax(np.abs(fourier[1] - exact[1])) < 0.1
    errors = [np.mean([fourier_error(groups, 2.0, m, seed, units=units) for seed in range(5)]) for m in (64, 1024)]
    assert errors[0] / errors[1] > 2  # 4 by theory


def test_fourier_is_unbiased_over_frequencies():
    pair = {"a": cloud("a", 40), "b": cloud("b", 40, shift=0.5)}
    exact = mmd_matrix(pair, 2.0).loc["a", "b"]
    draws = [mmd_matrix(pair, 2.0, sums=partial(fourier_sums, frequencies=50, seed=i)).loc["a", "b"] for i in range(200)]
    assert abs(np.mean(draws) - exact) < 3.5 * np.std(draws) / np.sqrt(200)


def test_fourier_does_not_depend_on_chunks(groups):
    x, sizes = in_units(groups, UNITS)
    for a, b in sums_of(*(fourier_sums(x, sizes, *draw_weights(sizes, 2, 1, 0), 2.0, 200, chunk=chunk) for chunk in (7, 1000))): assert np.allclose(a, b, rtol=1e-9, atol=1e-9)


# ---- spectrum

def test_robot_distance_equals_brute_force_without_the_own_episode():
    x, robots = cloud("x", 30), cloud("r", 24, shift=0.3)
    episode, of_robot = np.arange(30) // 3, np.arange(24) // 4
    distance, nearest = robot_distance(x, robots, episode, of_robot, neighbours=3, chunk=7)
    for i in range(30):
        others = sorted((np.linalg.norm(x[i] - robots[j]), j) for j in range(24) if of_robot[j] != episode[i])
        assert np.isclose(distance[i], np.mean([d for d, _ in others[:3]])) and nearest[i] == others[0][1]


def test_spectrum_leaves_out_the_episode_and_says_where_it_cannot(groups):
    ids = {name: [f"{name}/{i // 10}/{i % 10}" for i in range(60)] for name in groups}
    table = spectrum(groups, ids, KINDS, 2.0)
    assert len(table) == 240 and table.distance.notna().all() and set(table.nearest) <= {"robot", "robot 2"}
    copies = dict(groups, robot=np.repeat(groups["robot"][::10], 10, axis=0))  # frames of an episode that are all the same
    assert (spectrum(copies, ids, KINDS, 2.0).query("source == 'robot'").distance > 0.1).all()
    short = spectrum_table(table).set_index("source")
    assert short.index[-1] == "far" and short["as_near"]["robot"] > 0.8 > 0.2 > short["as_near"]["far"]
    assert np.isclose((table.distance[table.kind == "vla"] <= robot_reach(table)).mean(), 0.95, atol=0.01)
    one = {name: groups[name] for name in ("near", "robot")}  # a single robot dataset of a single episode
    alone = spectrum(one, dict(ids, robot=[f"robot/0/{i}" for i in range(60)]), KINDS, 2.0)
    assert alone.distance[alone.kind == "vla"].isna().all() and alone.distance[alone.kind == "vlm"].notna().all()
    assert np.isnan(spectrum_table(alone).as_near).all() and plot_spectrum(alone).axes
    with pytest.raises(ValueError, match="no robot dataset"): spectrum({"near": groups["near"]}, ids, KINDS, 2.0)
