"""Selection: top-K against a full sort, composition, diversity against a double loop, the gallery's text."""
import numpy as np
import pandas as pd
import pytest

from embodied_midtrain.core import generator
from embodied_midtrain.samples import ImageRef, Sample
from embodied_midtrain.selection import (composition, composition_text, diversity, diversity_draws, diversity_table, diversity_text, fetch_by_id, gallery, gallery_rows, hold_out, paper_diversity,
                                         sample_text, select, top_k)


@pytest.fixture(scope="module")
def scores():
    "Scores with many ties, for two seeds."
    rng = generator(0, "scores")
    source = rng.choice(["a", "b", "c"], 500, p=[0.7, 0.25, 0.05])
    tables = [pd.DataFrame(dict(id=[f"{s}/{i}" for i, s in enumerate(source)], source=source, seed=seed, score=(rounded := rng.integers(0, 20, 500) / 20),
                                logit=rounded * 4 - 2, distance=-rng.random(500), random=rng.random(500))) for seed in (0, 1)]
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("k", [1, 37, 499, 500])
def test_top_k_equals_a_full_sort(scores, k):
    table = scores[scores.seed == 0]
    full = sorted(zip(-table.score, table.id))[:k]
    chosen = top_k(table, k)
    assert chosen.id.tolist() == [id for _, id in full] and chosen["rank"].tolist() == list(range(1, k + 1))


def test_top_k_does_not_depend_on_how_the_pool_was_cut(scores):
    table = scores[scores.seed == 0]
    shuffled = table.sample(frac=1, random_state=1)
    assert top_k(table, 100).equals(top_k(shuffled, 100))


def test_top_k_errors(scores):
    for k in 0, -1, 501:
        with pytest.raises(ValueError, match="of a pool of 500"): top_k(scores[scores.seed == 0], k)
    with pytest.raises(ValueError, match="no score"): top_k(scores.assign(score=np.nan), 3)


def test_scores_that_round_to_one_are_told_apart_by_their_logits():
    table = pd.DataFrame(dict(id=["a", "b"], source="s", seed=0, score=[1.0, 1.0], logit=[40.0, 50.0], distance=0.0, random=0.5))
    assert select(table, 1, ["proximity"], [0]).id.tolist() == ["b"]


def test_some_of_every_source_are_held_out(scores):
    pool = scores[scores.seed == 0]
    apart, size = hold_out(pool, 20), pool.source.value_counts()
    assert apart.source.value_counts().to_dict() == {s: min(20, n // 10) for s, n in size.items() if n >= 10} and set(apart.id) < set(pool.id)
    assert apart.equals(hold_out(pool.sample(frac=1, random_state=3), 20)) and set(hold_out(pool, 5).id) < set(apart.id) and len(hold_out(pool, 0)) == 0


def test_arms_and_seeds(scores):
    selected = select(scores, 50, ["proximity", "random", "distance"], [0, 1])
    assert list(selected.columns) == ["arm", "seed", "id", "source", "score", "rank"]
    assert (selected.groupby(["arm", "seed"]).size() == 50).all() and not selected.duplicated(["arm", "seed", "id"]).any()
    one = scores[scores.seed == 1].set_index("id")
    part = selected[(selected.arm == "random") & (selected.seed == 1)]
    assert set(part.id) == set(one.random.nlargest(50).index) and (part.score.to_numpy() == one.score[part.id].to_numpy()).all()
    assert selected.equals(select(scores, 50, ["proximity", "random", "distance"], [0, 1]))
    with pytest.raises(ValueError, match="did you mean 'random'"): select(scores, 5, ["randm"], [0])
    with pytest.raises(ValueError, match="seed 9"): select(scores, 5, ["random"], [0, 9])


def test_composition(scores):
    selected, pool = select(scores, 60, ["proximity", "random"], [0]), scores[scores.seed == 0]
    made_of = composition(selected, pool)
    assert np.allclose(made_of.groupby("arm")[["pool_share", "share"]].sum(), 1) and (made_of.groupby("arm").kept.sum() == 60).all()
    row = made_of[(made_of.arm == "random") & (made_of.source == "b")].iloc[0]
    assert np.isclose(row.retention, (selected[selected.arm == "random"].source == "b").sum() / (pool.source == "b").sum())
    assert composition(selected[selected.source != "c"], pool).query("source == 'c'").kept.tolist() == [0, 0]


def test_a_composition_in_words():
    pool = pd.DataFrame(dict(source=["a"] * 80 + ["b"] * 20))
    selected = pd.DataFrame(dict(arm=["proximity"] * 10 + ["random"] * 10, seed=0, source=["b"] * 10 + ["a"] * 8 + ["b"] * 2))
    assert composition_text(composition(selected, pool)) == ["proximity: 100.0% b (50% of that source); nothing of a", "random: 80.0% a (10% of that source), 20.0% b (10% of that source)"]


def test_diversities_in_words():
    rows = [("pool", 0, 7.4, 7.0, 7.7), ("selected: proximity", 0, 1.4, 1.3, 1.5), ("selected: random", 0, 7.0, 6.7, 7.4), ("selected: distance", 1, 7.8, 7.6, 8.0), ("selected: random", 1, 6.0, 5.5, 6.5)]
    near, distance, paper = diversity_text(pd.DataFrame(rows, columns=["subset", "seed", "diversity", "low", "high"]))
    assert near.startswith("seed 0: selected: proximity 1.40 (1.30 to 1.50): narrower than pool 7.40") and "narrower than selected: random 7.00" in near
    assert "not told apart from pool 7.40" in distance and "broader than selected: random 6.00" in distance and "1.93" in paper


def test_diversity_equals_the_double_loop():
    x = generator(0, "x").normal(size=(25, 6))
    u = [row / np.sqrt((row**2).sum()) for row in x]
    pairs = [np.exp(-2 * ((u[i] - u[j]) ** 2).sum()) for i in range(25) for j in range(25) if i != j]
    assert abs(diversity(x) - 1 / np.mean(pairs)) < 1e-10
    assert np.isclose(diversity(x), diversity(100 * x)) and np.isclose(diversity(np.ones((4, 3))), 1)  # length does not matter
    with pytest.raises(ValueError, match="1 samples"): diversity(x[:1])


def test_diversity_draws_surround_the_estimate():
    x = generator(0, "x").normal(size=(200, 6))
    draws = diversity_draws(x, bootstrap=300)
    assert abs(draws[1:].mean() - draws[0]) < draws[1:].std() / 2 and (draws == diversity_draws(x, bootstrap=300)).all()
    table = diversity_table({("pool", 0): x, ("one", 0): x[:1]}, 100, 50)
    assert table.samples.tolist() == [100, 1] and np.isnan(table.diversity[1])


def test_the_papers_values_are_those_of_its_table():
    assert paper_diversity().to_dict() == {"pool": 1.85, "general": 1.96, "embodied": 1.62, "VLA": 1.26, "selected: proximity": 1.93}


def test_gallery_rows(scores):
    rows = gallery_rows(scores[scores.seed == 0], k=100, n=4)
    assert rows["rank"].tolist() == [1, 2, 3, 4, 99, 100, 101, 102, 497, 498, 499, 500]
    assert len(gallery_rows(scores[scores.seed == 0].head(3), k=2, n=5)) == 9  # fewer samples than asked for


def chat(question, answer="yes", images=(), id="s/0"):
    return Sample(id, "s", "vlm", images, ({"role": "user", "content": question}, {"role": "assistant", "content": answer}))


def test_gallery_takes_any_sample(tmp_path):
    picture = ImageRef(array=np.zeros((8, 30, 3), np.uint8))
    samples = {"s/0": chat("<image>\ncosts $5 and $6 \\frac", images=(picture,)), "s/1": chat("no picture, two\nlines"),
               "s/2": chat("<image>", images=(ImageRef(data=b"broken"),)), "s/3": chat("<image> <image> which?", images=(picture, picture))}
    rows = pd.DataFrame(dict(place=["highest"] * 3 + ["lowest"], id=list(samples), source="s", score=0.5, rank=[1, 2, 3, 4]))
    gallery(rows, samples).savefig(tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 1000


def test_sample_text_is_cut():
    lines = sample_text(chat("<image>\n" + "word " * 100, "a " * 100), width=20, lines=2).split("\n")
    assert len(lines) == 4 and max(map(len, lines)) <= 20 and lines[1].endswith("...") and lines[2].startswith("A: a")
    assert sample_text(chat("<image>", "only an answer")) == "A: only an answer"


def test_samples_are_fetched_from_their_own_source():
    class Stub:
        def __init__(self, name): self.name = name
        def fetch(self, ids): return [chat("?", id=id) for id in ids]
    rows = pd.DataFrame(dict(id=["a/1", "b/1", "a/1"], source=["a", "b", "a"]))
    assert set(fetch_by_id(rows, [Stub("a"), Stub("b")])) == {"a/1", "b/1"}
    with pytest.raises(ValueError, match="unknown source 'b'"): fetch_by_id(rows, [Stub("a")])
