"""Two selections side by side: against sets, full rankings and scipy; what cannot be compared; the command."""
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from embodied_midtrain.cli import main
from embodied_midtrain.compare import check_pools, compare, differing, found_text, id_hashes, jaccard, open_side, places, rank_correlations, shared_table
from embodied_midtrain.core import Stage, generator, write_table
from embodied_midtrain.keep import choose, hold_out

SIZES = {"mini-laion": 300, "mini-vcr": 150, "mini-refspatial": 50}


def a_run(run, noise=0.0, sizes=SIZES, seeds=(0, 3), k=60, rules={}, parts=130):
    "A run with scores and selections of four arms, its parts cut as asked."
    n = sum(sizes.values())
    logit = {s: generator(0, "logit", s).normal(size=n) + generator(0, str(run)).normal(0, noise, n) for s in seeds}
    ids, source = [f"{s}/{i}" for s, m in sizes.items() for i in range(m)], np.repeat(list(sizes), list(sizes.values()))
    scores = pd.concat([pd.DataFrame(dict(id=ids, source=source, seed=s, score=1 / (1 + np.exp(-z)), logit=z, distance=z.round(1), random=generator(s, "r").random(n))) for s, z in logit.items()], ignore_index=True)
    scores = scores.sample(frac=1, random_state=parts)
    with Stage(run, "features", dict(pool=[dict(reader="tabletop", name=s, count=m) for s, m in sizes.items()])): pass
    with Stage(run, "proximity") as stage:
        for i, at in enumerate(range(0, len(scores), parts)): write_table(scores[at:at + parts], stage.file(f"scores/part-{i:05}.parquet"))
    with Stage(run, "perplexity") as stage: write_table(pd.DataFrame(dict(id=ids[::2], vla_perplexity=logit[seeds[0]][::2] ** 3)), stage.file("scores/part-00-00000.parquet"))
    with Stage(run, "selection", dict(seeds=list(seeds), k=k, temperature=2.0)) as stage:
        write_table(apart := hold_out(scores, 4, seeds[0]), stage.file("held_out.parquet"))
        never = apart.id.to_list()
        perplexity = pd.DataFrame(dict(id=ids[::2], vla_perplexity=logit[seeds[0]][::2] ** 3))
        import pyarrow as pa
        chosen = choose(scores, k, ["proximity", "random", "resampled", "vla_perplexity"], list(seeds), never=pa.array(never), perplexity=perplexity, temperature=2.0, **rules)
        write_table(chosen.selected, stage.file("selection.parquet"))
    return run, scores


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return a_run(folder / "a"), a_run(folder / "b", noise=0.7, k=80, parts=77)


def test_what_is_shared_equals_sets(runs):
    (run_a, scores), (run_b, _) = runs
    a, b = open_side(run_a), open_side(run_b)
    one, other = set(a.kept.id), set(b.kept.id)
    table = shared_table(a, b, check_pools(a, b)).set_index("source")
    for source, n in SIZES.items():
        of = lambda ids: sum(i.startswith(source + "/") for i in ids)
        assert table.loc[source].tolist() == [n, n - 4, of(one & other), of(one - other), of(other - one)]
    told = jaccard(table)
    assert np.isclose(told["jaccard"], len(one & other) / len(one | other)) and told["largest"] == 60 / 80
    draws = generator(0, "chance")
    free = [i for i in sorted(set(scores.id)) if i not in set(a.apart.id)]
    simulated = np.mean([len(x & y) / len(x | y) for x, y in ((set(draws.choice(free, 60, False)), set(draws.choice(free, 80, False))) for _ in range(800))])
    assert abs(told["chance"] - simulated) < 0.006 < told["jaccard"] - told["chance"]


@pytest.mark.parametrize("arm, column", [("proximity", "logit"), ("random", "random")])
@pytest.mark.parametrize("seed", [0, 3])
def test_places_and_correlations_equal_full_rankings(runs, arm, column, seed):
    (run_a, one), (run_b, other) = runs
    a, b = open_side(run_a, arm, seed), open_side(run_b, arm, seed)
    one, other = (t[t.seed == seed].set_index("id")[column] for t in (one, other))
    asked = b.kept.id
    assert np.allclose(places(a, asked), [(one > one[i]).mean() for i in asked])
    told = rank_correlations(a, b, 500)
    assert np.isclose(told["pool"], spearmanr(one, other[one.index]).statistic) and told["pool_samples"] == 500
    both = a.kept.merge(b.kept, on="id")
    assert np.isclose(told["shared"], spearmanr(one[both.id], other[both.id]).statistic)


def test_the_samples_that_differ_most(runs):
    (run_a, one), (run_b, other) = runs
    a, b = open_side(run_a), open_side(run_b)
    table, other = differing(a, b, 4), other[other.seed == 0].set_index("id").logit
    only = [i for i in a.kept.id if i not in set(b.kept.id)]
    one = one[one.seed == 0].set_index("id").logit
    gap = {i: abs((one > one[i]).mean() - (other > other[i]).mean()) for i in only}
    assert table.kept_by.tolist() == ["A"] * 4 + ["B"] * 4 and table.id[:4].tolist() == sorted(only, key=lambda i: (-gap[i], i))[:4]
    assert np.allclose(table.place_b[:4], [(other > other[i]).mean() for i in table.id[:4]])


def test_arms_with_noise_or_without_some_scores(runs):
    "The draw of `resampled` is made again as it was, with the run's own temperature; what the perplexity stage has not seen is not ranked."
    (run_a, _), _ = runs
    resampled, perplexity = open_side(run_a, "resampled"), open_side(run_a, "vla_perplexity")
    assert (places(resampled, resampled.kept.id) < 75 / 500).all()
    text = compare(run_a, run_a, "resampled", "vla_perplexity", samples=100)[3]
    assert "not ranked" in set(text["place in B"]) and "not ranked" not in set(text["place in A"])
    assert rank_correlations(resampled, perplexity, 500)["pool_samples"] == 250


def test_what_cannot_be_compared(runs, tmp_path):
    (run_a, _), _ = runs
    with pytest.raises(FileNotFoundError, match="has no finished selection"): compare(run_a, tmp_path)
    for wrong, words in (dict(arm_b="randm"), "did you mean .random."), (dict(seed_a=7), "unknown seed"):
        with pytest.raises(ValueError, match=words): compare(run_a, run_a, **wrong)
    other, _ = a_run(tmp_path / "other", sizes={"mini-laion": 320, "mini-vcr": 100, "mini-llava": 60})
    with pytest.raises(ValueError, match=r"a has 500 samples, .*other 480, and 400 ids are common"): compare(run_a, other)


def test_older_runs_have_no_held_out(runs, tmp_path):
    run, _ = a_run(tmp_path / "old")
    (run / "selection" / "held_out.parquet").unlink()
    a = open_side(run)
    assert shared_table(a, a, check_pools(a, a)).free.sum() == 500 and compare(run, run)[-1] == "The two selections are the same."


def test_found_in_words():
    told = lambda j, c, s: found_text(dict(jaccard=j, chance=c, chance_in_sources=s))
    assert "no more than chance" in told(0.1, 0.1, 0.2) and "mostly because" in told(0.4, 0.1, 0.35) and "in part" in told(0.4, 0.1, 0.2) and "hardly" in told(0.4, 0.1, 0.1)


def test_hashes_tell_ids_apart():
    ids = [f"web/{i}" for i in range(200_000)]
    assert len(np.unique(id_hashes(ids))) == 200_000 and (id_hashes(pd.Series(ids[:5])) == id_hashes(ids[:5])).all()


def test_the_command(runs, capsys):
    (run_a, _), (run_b, _) = runs
    assert main(["compare", str(run_a), str(run_b), "--samples", "2"]) == 0
    said = capsys.readouterr().out
    assert "both keep" in said and "| mini-laion " in said and said.count("Q: ") == 4 and "rank correlation" in said
    assert main(["compare", str(run_a), str(run_b), "--arm-b", "random"]) == 0
    assert main(["compare", str(run_a), "nowhere"]) == 2 and "no finished selection" in capsys.readouterr().err


def test_what_both_excluded_could_not_be_shared_by_chance(tmp_path):
    "Excluded samples are not there to choose from; of a source that is excluded as a whole nothing is."
    gone = pd.DataFrame([dict(id=f"{source}/{i}", source=source) for source, n in (("mini-refspatial", 50), ("mini-laion", 200)) for i in range(n)])
    sides = []
    for name in "ab":
        run, _ = a_run(tmp_path / name, noise=0.5)
        kept = pd.read_parquet(run / "selection" / "selection.parquet")
        write_table(kept[~kept.id.isin(gone.id)], run / "selection" / "selection.parquet")
        write_table(gone, run / "selection" / "excluded.parquet")
        sides.append(open_side(run))
    table = shared_table(*sides, check_pools(*sides)).set_index("source")
    held_out = pd.read_parquet(tmp_path / "a" / "selection" / "held_out.parquet")
    left = {source: n - len({*gone.id[gone.source == source], *held_out.id[held_out.source == source]}) for source, n in SIZES.items()}
    assert table.free.to_dict() == left and left["mini-refspatial"] == 0 and np.isfinite(jaccard(table.reset_index())["chance_in_sources"])
