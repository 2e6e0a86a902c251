"""The gap: MMD against a triple loop and a closed form, intervals, tables; all on small arrays."""
from functools import partial

import numpy as np
import pytest

from embodied_midtrain.core import generator
from embodied_midtrain.gap import (bootstrap_weights, equal_groups, exact_sums, fourier_error, fourier_sums, gaussian_kernel, group_means, median_bandwidth, mmd2, mmd_matrix,
                                   mmd_pairs, mmd_table, pair_weights, permutation_signs, plot_spectrum, project, project_groups, robot_distance, robot_reach, spectrum,
                                   spectrum_table, sq_distances)


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
    single = {name: x.astype(np.float32) for name, x in groups.items()}
    weights = {name: pair_weights(60, 20, np.full(20, 30), 0, name) for name in groups}
    for features, tolerance in (groups, 1e-11), (single, 1e-6):
        ours, theirs = exact_sums(features, weights, 41, 2.0, np), exact_sums(features, weights, 41, 2.0, torch, "cpu")
        for a, b in zip(ours, theirs): assert np.abs(a - b).max() < tolerance * 60**2


@pytest.mark.parametrize("unbiased", [True, False])
def test_draws_equal_means_over_the_drawn_samples(groups, unbiased):
    "A bootstrap draw, done by hand: repeat the samples, and leave out the pairs of a sample with its own copies."
    replicates, _ = mmd_pairs(groups, 2.0, bootstrap=3, unbiased=unbiased, seed=5)
    a, b = "far", "robot"
    rows = {n: bootstrap_weights(60, 3, generator(5, "gap", "bootstrap", n))[2].astype(int) for n in (a, b)}
    (i, j), k = (np.repeat(np.arange(60), rows[n]) for n in (a, b)), lambda u, v: np.exp(-sq_distances(u, v) / 8)
    def within(x, drawn): return k(x[drawn], x[drawn])[(drawn[:, None] != drawn) | (not unbiased)].mean()
    by_hand = within(groups[a], i) + within(groups[b], j) - 2 * k(groups[a][i], groups[b][j]).mean()
    assert np.isclose(replicates[2, 1, 2], by_hand, atol=1e-12)


# ---- p-values

@pytest.mark.parametrize("unbiased", [True, False])
def test_p_equals_shuffling_by_hand(unbiased):
    "Every row of signs, carried out: relabel the samples, compute the MMD anew, count."
    pair, seed, shuffles = {"a": cloud("a", 12), "b": cloud("b", 12, shift=0.4)}, 3, 60
    plus = generator(seed, "gap", "plus").hypergeometric(12, 12, 12, size=shuffles)
    s, r = (permutation_signs(12, plus, generator(seed, "gap", "permutation", name)) for name in pair)
    pooled, labels = np.concatenate(list(pair.values())), np.concatenate([s, -r], axis=1) > 0
    assert (labels.sum(1) == 12).all()
    true = mmd2(pair["a"], pair["b"], 2.0, unbiased)
    larger = sum(mmd2(pooled[row], pooled[~row], 2.0, unbiased) >= true - 1e-12 for row in labels)
    assert np.isclose(mmd_pairs(pair, 2.0, 0, shuffles, unbiased, seed)[1][0, 1], (1 + larger) / (1 + shuffles)) and 0 < larger < shuffles


def test_signs_draw_every_labelling_alike():
    "Two datasets of two: six labellings with two of each, all as likely."
    plus = generator(0).hypergeometric(2, 2, 2, size=6000)
    labels = np.concatenate([permutation_signs(2, plus, generator(1)), -permutation_signs(2, plus, generator(2))], axis=1)
    kinds, counts = np.unique(labels, axis=0, return_counts=True)
    assert len(kinds) == 6 and np.abs(counts - 1000).max() < 150


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


# ---- Fourier

def test_fourier_is_near_the_exact_one_and_error_falls_with_frequencies(groups):
    exact = mmd_pairs(groups, 2.0, 20, 100)
    fourier = mmd_pairs(groups, 2.0, 20, 100, sums=partial(fourier_sums, frequencies=8192))
    assert np.abs(fourier[0] - exact[0]).max() < 0.02 < exact[0].max() / 10  # estimates and bootstrap draws
    assert np.nanmax(np.abs(fourier[1] - exact[1])) < 0.1
    errors = [np.mean([fourier_error(groups, 2.0, m, seed) for seed in range(5)]) for m in (64, 1024)]
    assert errors[0] / errors[1] > 2  # 4 by theory


def test_fourier_is_unbiased_over_frequencies():
    pair = {"a": cloud("a", 40), "b": cloud("b", 40, shift=0.5)}
    exact = mmd_matrix(pair, 2.0).loc["a", "b"]
    draws = [mmd_matrix(pair, 2.0, sums=partial(fourier_sums, frequencies=50, seed=i)).loc["a", "b"] for i in range(200)]
    assert abs(np.mean(draws) - exact) < 3.5 * np.std(draws) / np.sqrt(200)


def test_fourier_does_not_depend_on_chunks(groups):
    weights = {name: pair_weights(60, 2, [30], 0, name) for name in groups}
    for a, b in zip(*(fourier_sums(groups, weights, 4, 2.0, 200, chunk=chunk) for chunk in (7, 1000))): assert np.allclose(a, b, rtol=1e-12)


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
