"""What was selected: composition, diversity against a double loop, the gallery's text."""
import numpy as np
import pandas as pd
import pytest

from embodied_midtrain.core import generator, write_table
from embodied_midtrain.keep import ARMS, select, source_sizes, top_k
from embodied_midtrain.samples import ImageRef, Sample
from embodied_midtrain.selection import (ARM_COLOUR, composition, composition_text, diversity, diversity_draws, diversity_table, diversity_text, drawn_features, drawn_scores, fetch_by_id, gallery,
                                         gallery_rows, near_pairs, near_text, paper_diversity, plot_composition, plot_shift, sample_text)
from embodied_midtrain.vectors import feature_table, read_features


def test_composition(scores):
    selected, pool = select(scores, 60, ["proximity", "random"], [0]), scores[scores.seed == 0]
    made_of = composition(selected, source_sizes(pool))
    assert np.allclose(made_of.groupby("arm")[["pool_share", "share"]].sum(), 1) and (made_of.groupby("arm").kept.sum() == 60).all()
    row = made_of[(made_of.arm == "random") & (made_of.source == "b")].iloc[0]
    assert np.isclose(row.retention, (selected[selected.arm == "random"].source == "b").sum() / (pool.source == "b").sum())
    assert composition(selected[selected.source != "c"], source_sizes(pool)).query("source == 'c'").kept.tolist() == [0, 0]


def test_a_composition_in_words():
    pool = pd.DataFrame(dict(source=["a"] * 80 + ["b"] * 20))
    selected = pd.DataFrame(dict(arm=["proximity"] * 10 + ["random"] * 10, seed=0, source=["b"] * 10 + ["a"] * 8 + ["b"] * 2))
    assert composition_text(composition(selected, source_sizes(pool.assign(seed=0)))) == ["proximity: 100.0% b (50% of that source); nothing of a", "random: 80.0% a (10% of that source), 20.0% b (10% of that source)"]


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
    table = diversity_table({("pool", 0): x, ("one", 0): x[:1]}, 50)
    assert table.samples.tolist() == [200, 1] and np.isnan(table.diversity[1])


def test_the_papers_values_are_those_of_its_table():
    assert paper_diversity().to_dict() == {"pool": 1.85, "general": 1.96, "embodied": 1.62, "VLA": 1.26, "selected: proximity": 1.93}


def test_features_are_drawn_as_from_the_whole_table(tmp_path):
    "The draw of every subset is that of a permutation of the subset in its order, read in blocks or at once."
    rng = generator(0, "features")
    source = rng.choice(["a", "b", "c", "robot"], 3000, p=[0.4, 0.3, 0.1, 0.2])
    samples = [Sample(f"{s}/{i}", s, "vla" if s == "robot" else "vlm", (), ()) for i, s in enumerate(source)]
    x = rng.normal(size=(3000, 5)).astype(np.float16)
    for n, at in enumerate(range(0, 3000, 700)): write_table(feature_table(samples[at:at + 700], x[at:at + 700]), tmp_path / f"part-00-{n:05}.parquet")
    table, groups = read_features(tmp_path), {"a": "general", "b": "embodied"}
    pool = table.subset("vlm")
    selected = pd.DataFrame(dict(arm="proximity", seed=1, id=rng.permutation(pool.ids)[:400]))
    wanted = {("pool", 0): pool.x, ("general", 0): pool.x[pool.sources == "a"], ("embodied", 0): pool.x[pool.sources == "b"], ("VLA", 0): table.subset("vla").x,
              ("selected: proximity", 1): table.x[pd.Index(table.ids).get_indexer(selected.id)]}
    for samples in 90, 10_000:
        drawn = drawn_features(tmp_path, groups, selected, samples, seed=3)
        assert drawn.keys() == wanted.keys()
        for (name, s), x in drawn.items(): assert (x == wanted[name, s][generator(3, "diversity", name, s).permutation(len(wanted[name, s]))[:samples]]).all()
    assert ("general", 0) not in drawn_features(tmp_path, {}, selected, 90)
    with pytest.raises(ValueError, match="proximity, seed 1: some samples have no features"): drawn_features(tmp_path, groups, selected.assign(id="elsewhere/" + selected.id), 90)


def test_figures_of_all_arms(scores, tmp_path):
    "Every arm has a colour of its own, and the figures grow with the arms."
    assert {*ARMS, "base"} == ARM_COLOUR.keys() and len(set(ARM_COLOUR.values())) == len(ARM_COLOUR)
    selected = pd.concat([top_k(scores, 40, "random", seed=i % 2).assign(arm=arm, seed=0) for i, arm in enumerate(ARMS)])
    few, many = (plot_composition(composition(table, source_sizes(scores, 0))) for table in (selected[selected.arm.isin(ARMS[:2])], selected))
    assert many.get_size_inches()[1] > few.get_size_inches()[1]
    plot_shift(drawn_scores(scores, 0, 500), selected).savefig(tmp_path / "shift.png")
    drawn = drawn_scores(scores, 0, 500, 100)
    assert set(drawn.id) == set(scores[(scores.seed == 0) & (scores.random < 0.2)].id)


def test_near_duplicates_to_look_at(scores):
    kept = select(scores, 50, ["proximity"], [0])
    alike = pd.DataFrame(dict(arm="proximity", seed=0, id=[f"x/{i}" for i in range(9)], source=["a"] * 6 + ["b"] * 3, like=kept.id[:9].tolist(), similarity=np.linspace(0.99, 0.999, 9)))
    rows = near_pairs(alike, kept, 4)
    assert rows.place.tolist() == ["kept"] * 4 + ["passed over"] * 4 and (rows.similarity[:4].to_numpy() == rows.similarity[4:].to_numpy()).all() and rows.similarity[:4].is_monotonic_increasing
    assert dict(zip(rows.id[4:], rows.id[:4])).items() <= dict(zip(alike.id, alike.like)).items() and len(near_pairs(alike, kept, 50)) == 18
    assert near_text(alike, pd.DataFrame(dict(arm=["proximity", "random"], seed=0))) == ["proximity, seed 0: 9 near-duplicates passed over: a 6, b 3", "random, seed 0: 0 near-duplicates passed over"]


@pytest.mark.parametrize("k, n", [(100, 4), (2, 5), (499, 4), (500, 7)])
def test_gallery_rows_are_those_of_a_full_sort(scores, k, n):
    table, gone = scores[scores.seed == 0], ["a/1", "c/3"]
    full = table[~table.id.isin(gone)].sort_values(["logit", "id"], ascending=[False, True])
    places = [*range(n), *range(first := max(0, min(k - n // 2, len(full) - n)), first + n), *range(len(full) - n, len(full))]
    rows = gallery_rows(scores, k, n, seed=0, never=gone)
    assert rows["rank"].tolist() == [p + 1 for p in places] and rows.id.tolist() == full.id.iloc[places].tolist() and (rows.score.to_numpy() == full.score.iloc[places].to_numpy()).all()


def test_gallery_of_a_small_pool(scores): assert len(gallery_rows(scores[scores.seed == 0].head(3), k=2, n=5)) == 9


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
