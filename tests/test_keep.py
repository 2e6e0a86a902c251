"""Ways to keep: the best K of a stream against a full sort with ties, Gumbel's draw against its law, quotas and near-duplicates against brute force, arms of perplexity."""
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st
from scipy.stats import chisquare

from embodied_midtrain.core import Stage, file_hash, generator, write_table
from embodied_midtrain.keep import (ARMS, Best, Distinct, choose, features_of, gumbel, hold_out, hyperplanes, keep_distinct, pool_centre, quota_counts, rank_by, read_ids, read_perplexity, score_blocks, select,
                                    source_sizes, top_k)
from embodied_midtrain.samples import Sample
from embodied_midtrain.vectors import feature_table


def full_sort(table, by="logit"): return table.sort_values([by, "id"], ascending=[False, True], kind="stable")


# ---- the best K of a stream

@pytest.mark.parametrize("k", [1, 37, 499, 500])
def test_top_k_equals_a_full_sort(scores, k):
    table = scores[scores.seed == 0]
    full = sorted(zip(-table.score, table.id))[:k]
    chosen = top_k(table, k)
    assert chosen.id.tolist() == [id for _, id in full] and chosen["rank"].tolist() == list(range(1, k + 1))
    assert list(chosen.columns) == ["id", "source", "score", "rank"] and chosen.source.tolist() == [i.split("/")[0] for i in chosen.id]


IDS = st.lists(st.text("ab9/_é中\U0001f600", min_size=1, max_size=4), min_size=1, max_size=60, unique=True)

@settings(max_examples=150, deadline=None)
@given(ids=IDS, data=st.data())
def test_any_sharding_and_any_order_give_the_full_sort(ids, data):
    "Few values, so that nearly all tie; ids of any letters, ordered as Python orders them; both ends."
    values = data.draw(st.lists(st.sampled_from([-np.inf, -1.0, 0.0, 0.5, 2.0]), min_size=len(ids), max_size=len(ids)))
    order, k, rows = data.draw(st.permutations(range(len(ids)))), data.draw(st.integers(1, len(ids))), data.draw(st.integers(1, 7))
    for lowest in False, True:
        best = Best(k, lowest)
        for at in range(0, len(ids), rows):
            part = order[at:at + rows]
            best.add(pa.table({"id": pa.array([ids[i] for i in part], pa.large_string())}), np.array([values[i] for i in part]))
            assert best.rows < 1.5 * k + rows
        full = [ids[i] for i in sorted(range(len(ids)), key=lambda i: ids[i])]
        full = sorted(full, key=lambda i: -values[ids.index(i)])
        assert best.ranked()["id"].to_pylist() == (full[::-1] if lowest else full)[:k]


@pytest.mark.parametrize("rows, kind", [(1, "frames"), (7, "tables"), (64, "folder"), (500, "folder")])
def test_every_kind_of_scores_gives_the_same(scores, tmp_path, rows, kind):
    shuffled = scores.sample(frac=1, random_state=rows)
    parts = [shuffled[at:at + rows] for at in range(0, len(shuffled), rows)]
    for n, part in enumerate(parts): kind == "folder" and write_table(part, tmp_path / f"part-{n:05}.parquet")
    given = {"frames": lambda: iter(parts), "tables": lambda: (pa.Table.from_pandas(p, preserve_index=False) for p in parts), "folder": lambda: tmp_path}[kind]
    never = pa.array(hold_out(scores, 20, 0).id)
    assert hold_out(given(), 20, 0).equals(hold_out(scores, 20, 0))
    arms = ["proximity", "random", "distance", "resampled"]
    one, other = (select(s, 100, arms, [0, 1], never=never, quotas={"a": 0.5}) for s in (given(), scores))
    pd.testing.assert_frame_equal(one, other)
    assert source_sizes(given(), 1).to_dict() == scores[scores.seed == 1].source.value_counts().to_dict()


def test_only_as_many_as_k_are_held():
    "Values that rise for ever: every row comes in, none stays for long."
    best = Best(1000)
    for at in range(0, 200_000, 5000):
        best.add(pa.table({"id": pa.array([f"web/{i}" for i in range(at, at + 5000)], pa.large_string())}), np.arange(at, at + 5000.0))
        assert best.rows < 6500 and sum(map(len, best.held)) == best.rows
    assert best.ranked()["id"].to_pylist()[:2] == ["web/199999", "web/199998"]


def test_top_k_errors(scores, tmp_path):
    for k in 0, -1, 501:
        with pytest.raises(ValueError, match="of a pool of 500"): top_k(scores[scores.seed == 0], k)
    with pytest.raises(ValueError, match="no score, the first is"): top_k(scores.assign(score=np.nan), 3)
    with pytest.raises(ValueError, match="no column 'logits'; they have: id"): top_k(scores, 3, "logits")
    with pytest.raises(FileNotFoundError, match="has the stage"): list(score_blocks(tmp_path))
    with pytest.raises(ValueError, match="one at least"): select(scores, 0, ["random"], [0])


def test_scores_that_round_to_one_are_told_apart_by_their_logits():
    table = pd.DataFrame(dict(id=["a", "b"], source="s", seed=0, score=[1.0, 1.0], logit=[40.0, 50.0], distance=0.0, random=0.5))
    assert select(table, 1, ["proximity"], [0]).id.tolist() == ["b"]


# ---- arms

def test_arms_and_seeds(scores):
    selected = select(scores, 50, ["proximity", "random", "distance"], [0, 1])
    assert list(selected.columns) == ["arm", "seed", "id", "source", "score", "rank"]
    assert (selected.groupby(["arm", "seed"]).size() == 50).all() and not selected.duplicated(["arm", "seed", "id"]).any()
    assert selected[["arm", "seed"]].drop_duplicates().apply(tuple, axis=1).tolist() == [(arm, seed) for arm in ("proximity", "random", "distance") for seed in (0, 1)]
    one = scores[scores.seed == 1].set_index("id")
    part = selected[(selected.arm == "random") & (selected.seed == 1)]
    assert set(part.id) == set(one.random.nlargest(50).index) and (part.score.to_numpy() == one.score[part.id].to_numpy()).all()
    with pytest.raises(ValueError, match="did you mean 'random'"): select(scores, 5, ["randm"], [0])
    with pytest.raises(ValueError, match="seed 9"): select(scores, 5, ["random"], [0, 9])


def test_some_of_every_source_are_held_out(scores):
    pool = scores[scores.seed == 0]
    apart, size = hold_out(pool, 20), pool.source.value_counts()
    assert apart.source.value_counts().to_dict() == {s: min(20, n // 10) for s, n in size.items() if n >= 10} and set(apart.id) < set(pool.id)
    assert apart.equals(hold_out(pool.sample(frac=1, random_state=3), 20)) and set(hold_out(pool, 5).id) < set(apart.id) and len(hold_out(pool, 0)) == 0


def test_excluded_samples_are_never_kept(scores, tmp_path):
    write_table(scores[scores.seed == 0].nlargest(30, "logit")[["id", "source"]], tmp_path / "leak.parquet")
    never = read_ids(str(tmp_path / "leak.parquet"))
    kept = select(scores, 400, ["proximity", "random"], [0, 1], never=never)
    assert len(never) == 30 and not set(kept.id) & set(never.to_pylist()) and (kept.groupby(["arm", "seed"]).size() == 400).all()
    with pytest.raises(ValueError, match="pool of 470 samples"): select(scores, 471, ["random"], [0], never=never)
    with pytest.raises(FileNotFoundError, match="no Parquet file"): read_ids(str(tmp_path / "lost.parquet"))
    write_table(pd.DataFrame(dict(name=["x"])), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="no column id"): read_ids(str(tmp_path / "other.parquet"))


def test_another_k_reads_the_same_scores(scores, tmp_path):
    "Nothing is scored anew: the stage's key of the scores does not know K, and the smaller selection is the beginning of the larger, for every arm."
    write_table(scores, tmp_path / "part-00000.parquet")
    before = file_hash(tmp_path / "part-00000.parquet")
    perplexity = scores[scores.seed == 0][["id"]].assign(vla_perplexity=scores.random, delta_perplexity=scores.distance)
    small, large = (select(tmp_path, k, ARMS, [0, 1], perplexity=perplexity) for k in (30, 200))
    pd.testing.assert_frame_equal(small, large[large["rank"] <= 30].reset_index(drop=True))
    assert file_hash(tmp_path / "part-00000.parquet") == before


# ---- resampled

def test_gumbel_draws_with_chances_of_softmax():
    "The first of a draw falls on a sample as often as its softmax weight says; the second as often as without replacement."
    logit = np.array([0.0, 0.5, 1.0, 2.0, -1.0])
    table, ids = pa.table({"id": (ids := [f"web/{i}" for i in range(5)]), "logit": logit}), ids
    for temperature in 1.0, 2.5:
        weight = np.exp(logit / temperature) / np.exp(logit / temperature).sum()
        draws = np.array([np.argsort(-rank_by("resampled", seed, temperature)(table))[:2] for seed in range(6000)])
        assert chisquare(np.bincount(draws[:, 0], minlength=5), 6000 * weight).pvalue > 1e-3
        second = [sum(weight[i] * weight[j] / (1 - weight[i]) for i in range(5) if i != j) for j in range(5)]
        assert chisquare(np.bincount(draws[:, 1], minlength=5), 6000 * np.array(second)).pvalue > 1e-3
        assert chisquare(np.bincount(draws[:, 0], minlength=5), np.full(5, 1200)).pvalue < 1e-9  # the test would notice


def test_resampling_reweights_a_pool():
    "Two sources of 20,000 with logits 0 and log 3: a small draw takes three times as many of the second, a low temperature nothing else."
    n = 20_000
    table = pd.DataFrame(dict(id=[f"{s}/{i}" for s in "ab" for i in range(n)], source=np.repeat(["a", "b"], n), seed=0, score=0.5, logit=np.repeat([0, np.log(3)], n)))
    drawn = select(table, 1000, ["resampled"], [0])
    assert 690 < (drawn.source == "b").sum() < 810
    assert (select(table, 1000, ["resampled"], [0], temperature=0.01).source == "b").all()
    assert set(drawn.id) != set(select(table.assign(seed=1), 1000, ["resampled"], [1]).id)
    with pytest.raises(ValueError, match="temperature"): select(table, 5, ["resampled"], [0], temperature=0.0)


def test_noise_belongs_to_the_id():
    ids = [f"web/{i}" for i in range(100)]
    assert (gumbel(ids[::-1], 3)[::-1] == gumbel(ids, 3)).all() and np.isfinite(gumbel(ids, 3)).all() and abs(np.corrcoef(gumbel(ids, 3), gumbel(ids, 4))[0, 1]) < 0.4


# ---- quotas

def by_hand(table, k, caps, by="logit"):
    "Down the ranking, one after the other."
    kept, taken = [], Counter()
    for row in full_sort(table, by).itertuples():
        if len(kept) < k and taken[row.source] < caps.get(row.source, k): kept.append(row.id); taken[row.source] += 1
    return kept


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 120), a=st.integers(0, 130), b=st.integers(0, 130), rows=st.integers(20, 400))
def test_quotas_equal_going_down_the_ranking(scores, k, a, b, rows):
    table, caps = scores[scores.seed == 1], {"a": a, "b": b}
    want = by_hand(table, k, caps, "distance")
    parts = [table[at:at + rows] for at in range(0, len(table), rows)]
    if len(want) == k: assert select(iter(parts), k, ["distance"], [1], quotas=caps).id.tolist() == want
    else:
        with pytest.raises(ValueError, match=f"room for {len(want)} samples of the {k} to keep"): select(iter(parts), k, ["distance"], [1], quotas=caps)


def test_quotas_as_shares_and_counts(scores):
    assert quota_counts({"a": 0.29, "b": 100, "c": 1.0, "d": 0}, 100) == {"a": 29, "b": 100, "c": 100, "d": 0}
    for wrong in -1, 1.5, "half", True, None:
        with pytest.raises(ValueError, match="quota of a"): quota_counts({"a": wrong}, 100)
    with pytest.raises(ValueError, match="quota for source 'z', of which the pool has nothing"): select(scores, 10, ["random"], [0], quotas={"z": 0.5})


# ---- near-duplicates

@pytest.fixture(scope="module")
def near(tmp_path_factory):
    "A pool of 900, a third of it copies with noise, and its features on disk."
    rng, folder = generator(0, "near"), tmp_path_factory.mktemp("features")
    x = rng.normal(size=(600, 12)) + 3
    x = np.concatenate([x, x[rng.integers(600, size=300)] + rng.normal(0, 0.03, (300, 12))]).astype(np.float16)
    source = np.array(["a", "b"])[np.arange(900) % 2]
    table = pd.DataFrame(dict(id=[f"{s}/{i}" for i, s in enumerate(source)], source=source, seed=0, score=0.5, logit=rng.normal(size=900), distance=rng.integers(0, 9, 900) / 1, random=rng.random(900)))
    samples = [Sample(i, s, "vlm", (), ()) for i, s in zip(table.id, table.source)] + [Sample("robot/0/0", "robot", "vla", (), ())]
    x = np.concatenate([x, np.full((1, 12), 99, np.float16)])  # a robot frame, which has no part in the centre
    for n, at in enumerate(range(0, 901, 400)): write_table(feature_table(samples[at:at + 400], x[at:at + 400]), folder / f"part-00-{n:05}.parquet")
    return table, x[:900].astype(np.float64), folder


def brute_force(table, x, k, threshold, by="logit", caps={}):
    "Every candidate against all that were kept, in float64."
    u = x - x.mean(0)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    row, kept, taken, passed = dict(zip(table.id, range(len(table)))), [], Counter(), []
    for item in full_sort(table, by).itertuples():
        if len(kept) == k: break
        if taken[item.source] >= caps.get(item.source, k): continue
        if kept and (u[[row[i] for i in kept]] @ u[row[item.id]]).max() >= threshold: passed.append(item.id); continue
        kept.append(item.id); taken[item.source] += 1
    return kept, passed


@pytest.mark.parametrize("k, caps", [(50, {}), (400, {}), (590, {}), (300, {"a": 60}), (300, {"a": 290, "b": 20})])
@pytest.mark.parametrize("by, arm", [("logit", "proximity"), ("distance", "distance")])
def test_near_duplicates_equal_brute_force(near, k, caps, by, arm):
    table, x, folder = near
    distinct = Distinct(lambda ids: features_of(folder, ids), pool_centre(folder), 0.995)
    kept, passed = brute_force(table, x, k, 0.995, by, caps)
    if len(kept) < k:
        with pytest.raises(ValueError, match=f"only {len(kept)} samples|leave room"): choose(table, k, [arm], [0], distinct=distinct, quotas=caps)
        return
    chosen = choose(table, k, [arm], [0], distinct=distinct, quotas=caps)
    assert chosen.selected.id.tolist() == kept and chosen.alike.id.tolist() == passed and chosen.counts.passed_over.tolist() == [len(passed)]
    u = x - x.mean(0)
    u /= np.linalg.norm(u, axis=1, keepdims=True)
    row = dict(zip(table.id, range(len(table))))
    true = [u[row[a]] @ u[row[b]] for a, b in zip(chosen.alike.id, chosen.alike.like)]
    assert np.allclose(true, chosen.alike.similarity, atol=1e-5) and set(chosen.alike.like) <= set(kept)


def test_more_candidates_are_taken_when_most_are_copies(near, tmp_path):
    "The 300 best are one and the same: the candidates at hand run out, and more are read."
    x = np.concatenate([np.ones((300, 4)), generator(0, "rest").normal(size=(300, 4))])
    table = pd.DataFrame(dict(id=[f"s/{i:03}" for i in range(600)], source="s", seed=0, score=0.5, logit=-np.arange(600.0)))
    asked = []
    def features(ids): asked.append(len(ids)); return x[[int(i.split("/")[1]) for i in ids]]
    chosen = choose(table, 40, ["proximity"], [0], distinct=Distinct(features, np.zeros(4), 0.9999))
    assert chosen.selected.id.tolist() == ["s/000", *(f"s/{i}" for i in range(300, 339))] and chosen.counts.passed_over.tolist() == [299] and asked == [50, 100, 200, 400]
    assert (chosen.alike.like == "s/000").all()


def test_hyperplanes_have_the_recall_they_state():
    "Pairs right at the threshold, by chance as often found as stated; and what is dropped is never further apart than the threshold."
    rng, found, dims = generator(0, "pairs"), [], 24
    for trial in range(6):
        a = rng.normal(size=(400, dims))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        side = rng.normal(size=a.shape)
        side -= (side * a).sum(1, keepdims=True) * a
        b = 0.951 * a + np.sqrt(1 - 0.951**2) * side / np.linalg.norm(side, axis=1, keepdims=True)
        _, alike, _ = keep_distinct(np.concatenate([a, b]).astype(np.float32), ["s"] * 800, 800, Distinct(None, np.zeros(dims), 0.95, 0.8, seed=trial), block=400)
        assert all(similarity >= 0.95 for *_, similarity in alike)
        found.append(len(alike) / 400)
    _, _, stated = hyperplanes(0.95, 0.8, 800)
    assert 0.8 <= stated < 0.95 and abs(np.mean(found) - stated) < 0.04


def test_recall_of_one_is_exact_and_less_is_stated():
    for similarity in 0.5, 0.9, 0.95, 0.99, 0.9999, 1.0:
        for recall in 0.5, 0.9, 0.99:
            b, tables, stated = hyperplanes(similarity, recall, 100_000)
            assert 1 <= b <= 62 and tables >= 1 and stated >= recall - 1e-9
    for wrong in dict(similarity=0.0), dict(similarity=1.5), dict(recall=0.0), dict(recall=1.1):
        with pytest.raises(ValueError): Distinct(None, np.zeros(2), **dict(similarity=0.9) | wrong)


# ---- perplexities

def test_perplexities_are_joined_by_id(scores):
    "High is near, as the stage writes them; a sample without one is never chosen, nor one without an answer."
    rng = generator(0, "perplexity")
    table = scores[scores.seed == 0].sample(200, random_state=0)
    perplexity = pd.DataFrame(dict(id=[*table.id, "elsewhere/1"], vla_perplexity=[*-np.exp(rng.normal(size=200)), -0.001], delta_perplexity=rng.normal(size=201)))
    perplexity.loc[:9, "vla_perplexity"] = np.nan
    chosen = choose(scores, 60, ["vla_perplexity", "delta_perplexity", "random"], [0, 1], perplexity=perplexity)
    known = perplexity.set_index("id").drop("elsewhere/1")
    for arm in "vla_perplexity", "delta_perplexity":
        part = chosen.selected[(chosen.selected.arm == arm) & (chosen.selected.seed == 1)]
        assert part.id.tolist() == known[arm].nlargest(60).index.tolist()
        assert (part.score.to_numpy() == scores[scores.seed == 1].set_index("id").score[part.id].to_numpy()).all()
    assert chosen.counts.set_index(["arm", "seed"]).could_not.to_dict() == {("vla_perplexity", 0): 310, ("vla_perplexity", 1): 310, ("delta_perplexity", 0): 300, ("delta_perplexity", 1): 300, ("random", 0): 0, ("random", 1): 0}
    with pytest.raises(ValueError, match="pool of 190 samples; 310 more have no vla_perplexity"): select(scores, 191, ["vla_perplexity"], [0], perplexity=perplexity)


def test_perplexity_stage_must_have_been_run(tmp_path, scores):
    assert read_perplexity(tmp_path, ["proximity", "random"]) is None
    with pytest.raises(FileNotFoundError, match="arm delta_perplexity .* is not finished in .*: add `perplexity:`"): read_perplexity(tmp_path, ["proximity", "delta_perplexity"])
    with Stage(tmp_path, "perplexity") as stage:
        for n in range(2): write_table(pd.DataFrame(dict(id=[f"a/{n}"], tokens=3, vla_perplexity=-1.5, delta_perplexity=0.1)), stage.file(f"scores/part-00-{n:05}.parquet"))
    assert read_perplexity(tmp_path, ["vla_perplexity"]).to_dict("list") == {"id": ["a/0", "a/1"], "vla_perplexity": [-1.5, -1.5]}
    with pytest.raises(ValueError, match="perplexity stage"): select(scores, 5, ["vla_perplexity"], [0])


def test_exact_copies_are_near_duplicates_at_a_similarity_of_one():
    "Rounding must not hide a copy."
    x = generator(0, "copies").normal(size=(250, 64)).astype(np.float32)
    both = np.concatenate([x, x])
    for recall in 1.0, .95:
        kept, alike, _ = keep_distinct(both, ["s"] * 500, 500, Distinct(None, np.zeros(64, np.float32), 1.0, recall))
        assert len(kept) == len(alike) == 250, recall
