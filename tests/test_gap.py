"""The gap: MMD against a triple loop and a closed form, intervals, tables; all on small arrays."""
import numpy as np
import pytest

from embodied_midtrain.core import generator
from embodied_midtrain.gap import (equal_groups, group_means, median_bandwidth, mmd2, mmd_matrix, mmd_replicates, mmd_table, project, project_groups,
                                   sq_distances)


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
    replicates = mmd_replicates(groups, 2.0, bootstrap=400)
    assert (replicates == mmd_replicates(groups, 2.0, bootstrap=400)).all()
    assert np.allclose(replicates[0], mmd_matrix(groups, 2.0))
    off = ~np.eye(4, dtype=bool)
    assert np.allclose(replicates[1:].mean(0)[off], replicates[0][off], atol=5 * (replicates[1:].std(0) / 20).max())


def test_bootstrap_interval_covers_the_truth():
    "Between different distributions a 95 % interval holds the large-sample value about as often as it says."
    truth = mmd2(cloud("X", 2000), cloud("Y", 2000, shift=0.7), 2.5)
    hits = 0
    for i in range(60):
        pair = {"x": cloud(f"x{i}", 60), "y": cloud(f"y{i}", 60, shift=0.7)}
        row = mmd_table(mmd_replicates(pair, 2.5, 200), {"x": "vlm", "y": "vla"}).set_index("relation").loc["across"]
        hits += row.low <= truth <= row.high
    assert hits >= 51  # 85 %


def test_table_and_group_means(groups):
    replicates = mmd_replicates(groups, 2.0, 50)
    table, means = mmd_table(replicates, KINDS), group_means(replicates, KINDS).set_index("relation")
    assert table.relation.value_counts().to_dict() == {"across": 4, "split-half": 4, "within VLM": 1, "within VLA": 1}
    assert np.isclose(means.mmd2["across"], table[table.relation == "across"].mmd2.mean())
    assert means.ratio["across"] == 1 and np.isclose(means.ratio["within VLM"], means.mmd2["across"] / means.mmd2["within VLM"])
    assert table.normalised.max() == 1 and (means.low <= means.mmd2).all() and (means.mmd2 <= means.high).all()


def test_negative_estimates_are_shown_as_they_are():
    same = {"a": cloud("a", 200), "b": cloud("b", 200), "c": cloud("c", 200)}
    table = mmd_table(mmd_replicates(same, 3.0), dict.fromkeys(same, "vlm"))
    assert (table.mmd2 < 0).any() and table.low.isna().all()


def test_one_robot_dataset_has_no_distance_within(groups):
    three = {name: groups[name] for name in list(groups)[:3]}
    means = group_means(mmd_replicates(three, 2.0, 10), {name: KINDS[name] for name in three})
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
