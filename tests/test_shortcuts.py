"Shortcuts: planted ones are found, absent ones are not, correlations against direct computation, controls through the real tiny backbone."
import io, subprocess, sys
from dataclasses import replace

import numpy as np
import pandas as pd
import PIL.Image
import pytest

from embodied_midtrain.core import generator, write_table
from embodied_midtrain.samples import BadSample, ImageRef, Sample, SetAside, turn
from embodied_midtrain.shortcuts import *
from embodied_midtrain.shortcuts import CATEGORIES, CONDITIONS, EFFECTS, NUISANCES, PROBE, TOGETHER
from embodied_midtrain.sources.base import Record, Source, open_source


def sample(id="web/0", question="<image>\nwhat is this?", images=(ImageRef(array=np.full((6, 8, 3), 100, np.uint8)),), kind="vlm"):
    turns = (turn("user", question), turn("assistant", "a cup"))
    return Sample(id, id.split("/")[0], kind, images, turns if kind == "vlm" else turns[:1])


def file(kind, size=(8, 6)):
    PIL.Image.new("RGB", size, (200, 40, 40)).save(out := io.BytesIO(), kind)
    return out.getvalue()


def invented(n=80, seed=0, **columns):
    "A nuisance table of three pool sources and two robots in which nothing says anything, but for the columns given as functions of (rng, vla, source)."
    rng, source = generator(seed, "invented"), np.repeat(["a", "b", "c", "r1", "r2"], n)
    vla = np.char.startswith(source, "r")
    table = pd.DataFrame(dict(id=[f"{s}/{i}" for i, s in enumerate(source)], source=source, kind=np.where(vla, "vla", "vlm")))
    for column in sum(NUISANCES.values(), []): table[column] = rng.choice(list("abcdefgh"), len(table)) if column in CATEGORIES else rng.normal(size=len(table))
    for column, make in columns.items(): table[column] = make(rng, vla, source)
    return table if "logit" in table else table.assign(logit=rng.normal(vla, 1))


def labels_of(table, bootstrap=100):
    return label_table(table, redraws(table.source, mixture_weights(table, dict(a=100, b=50, c=10)), bootstrap)).set_index("nuisance")


# ---- what is read

class Counting(Source):
    "Ten records, the fourth of them bad, of two samples each."
    def records(self, start=0): return (Record(str(i), "file") for i in range(start, 10))
    def parse(self, record):
        if record.key == "3": raise BadSample("no good: on purpose")
        return [sample(f"{self.name}/{record.key}/{j}") for j in range(2)]


@pytest.mark.parametrize("n, stretches", [(4, 1), (4, 2), (7, 3), (10, 1), (10, 4), (50, 1), (50, 7), (1, 1), (2, 5)])
def test_records_are_different_ones_of_the_source(n, stretches):
    for s in range(5):
        keys = [int(record.key) for record in some_records(Counting("counting"), 10, n, stretches, generator(s))]
        assert len(keys) == (10 if n >= 10 else n // min(n, stretches) * min(n, stretches)) == len(set(keys)) and keys == sorted(keys) and keys[-1] < 10


def test_one_sample_of_each_record_and_the_bad_ones_noted():
    aside = SetAside()
    found = some_samples(Counting("counting"), 10, 10, 1, aside)
    assert [s.id.split("/")[1] for s in found] == [str(i) for i in range(10) if i != 3] and {s.id[-1] for s in found} == {"0", "1"}
    assert aside.rows == [("file", "3", "no good: on purpose")]
    assert [s.id for s in found] == [s.id for s in some_samples(Counting("counting"), 10, 10, 1, SetAside())]


def test_logits_are_those_of_the_seed_asked_for(tmp_path):
    write_table(pd.DataFrame(dict(id=["a/0", "a/1"] * 2, seed=[0, 0, 1, 1], logit=[1., 2, 3, 4])), tmp_path / "scores/part-00000.parquet")
    write_table(pd.DataFrame(dict(id=["r/0"] * 2, seed=[0, 1], logit=[5., 6])), tmp_path / "robots.parquet")
    assert stored_logits([tmp_path / "scores", tmp_path / "robots.parquet"], ["a/1", "r/0", "gone"], 1).to_dict() == {"a/1": 4, "r/0": 6}


# ---- nuisances

def test_file_types(tmp_path):
    (tmp_path / "a.jpg").write_bytes(file("PNG"))  # by content, not by name
    kinds = {"PNG": ImageRef(str(tmp_path / "a.jpg")), "WEBP": ImageRef(data=file("WEBP")), "JPEG": ImageRef(load=lambda: file("JPEG")), "pixels": ImageRef(load=lambda: np.zeros((6, 8, 3), np.uint8))}
    for kind, image in kinds.items():
        found, opened = file_type(image)
        assert found == kind and opened.open().size == (8, 6)


def fails(): raise KeyError("no such member")


@pytest.mark.parametrize("image", [ImageRef("nowhere.png"), ImageRef(data=b""), ImageRef(data=b"no picture"), ImageRef(load=fails), ImageRef(data=file("PNG", (90, 90))[:60])])
def test_a_broken_picture_is_left_out_and_counted(image):
    aside = SetAside()
    table = nuisance_table([sample(), sample("web/1", images=(image,)), sample("web/2")], aside)
    assert list(table.id) == ["web/0", "web/2"] and len(aside) == 1 and aside.rows[0][1] == "web/1"


def test_what_is_measured():
    chat = Sample("web/0", "web", "vlm", (ImageRef(data=file("JPEG")), ImageRef("never opened.png")),
                  (turn("user", "<image>\nWhat IS this, in red?"), turn("assistant", "a wall"), turn("user", "<image>\nand this?"), turn("assistant", "another")))
    row = nuisances(shown(chat))
    assert (row["width"], row["height"], row["images"], row["file_type"], row["template"], row["tokens"]) == (8, 6, 1, "JPEG", "what is this,", 5)
    assert row["aspect"] == 8 / 6 and abs(row["red"] - 200) < 3 and abs(row["green"] - 40) < 3 and row["characters"] == len("What IS this, in red?")
    assert nuisances(shown(chat), tokens=len)["tokens"] == len("What IS this, in red?")
    whole = nuisances(shown(chat, "full"))
    assert whole["images"] == 2 and whole["characters"] == len("What IS this, in red?\na wall\nand this?\nanother")
    assert row.keys() == set(sum(NUISANCES.values(), []))


def test_a_sample_without_a_picture_has_no_size():
    row = nuisances(shown(sample(question="only words", images=())))
    assert np.isnan(row["width"]) and row["file_type"] == "none" and row["images"] == 0 and row["template"] == "only words"


def test_an_empty_table_has_its_columns():
    assert {"id", "kind", "width", "template"} <= set(nuisance_table([], SetAside()).columns)


# ---- how well they tell the label

def test_weights_are_the_mixture_of_the_probe():
    table = invented(20).iloc[5:]
    weights = mixture_weights(table, dict(a=100, b=50, c=50))
    assert np.allclose(pd.Series(weights).groupby(table.source.to_numpy()).sum()[["a", "b", "c", "r1", "r2"]], [.25, .125, .125, .25, .25])
    drawn = redraws(table.source, weights, 50)
    assert np.allclose(drawn.sum(1), 1) and np.allclose(drawn[:, table.source == "a"].sum(1), .25) and (drawn[1:] != weights).any(1).all()


def test_auc_equals_scikit_learns():
    from sklearn.metrics import roc_auc_score
    rng = generator(0, "auc")
    value, vla, weights = rng.integers(0, 12, 300) / 7, rng.random(300) < .3, rng.integers(0, 4, (20, 300)) * rng.random(300)
    assert np.allclose(auc_draws(value, vla, weights), [roc_auc_score(vla, value, sample_weight=w) for w in weights], atol=1e-12)
    assert auc_draws(np.zeros(300), vla, weights[:1])[0] == .5


@pytest.mark.parametrize("planted, name", [
    (dict(width=lambda rng, vla, source: np.where(vla, 640, rng.integers(200, 600, len(vla)))), "image size"),
    (dict(aspect=lambda rng, vla, source: np.where(vla, 1.33, 1.33 + rng.choice([-1, 1], len(vla)) * rng.uniform(.1, 1, len(vla)))), "aspect"),  # in the middle of the pool's
    (dict(file_type=lambda rng, vla, source: np.where(vla, "pixels", "JPEG")), "file type"),
    (dict(template=lambda rng, vla, source: np.where(vla, rng.choice(["pick up the", "push the red"], len(vla)), [f"caption {i}" for i in range(len(vla))])), "template")])
def test_a_planted_shortcut_is_found_and_nothing_else(planted, name):
    found = labels_of(invented(**planted))
    assert found.auc[name] > .97 and found.index[0] == name and found.auc[TOGETHER] > .97 and found.low[name] > found.high[PROBE] and found.behind_high[name] < 0
    assert (found.auc.drop([name, TOGETHER, PROBE]) < .6).all()
    assert f"better than the probe: {name} (AUC" in label_text(found.reset_index())


def test_what_means_nothing_is_about_a_guess():
    "Over several worlds, intervals of meaningless nuisances hold one half about as often as they promise (not quite: they do not re-draw the models)."
    tables = pd.concat([labels_of(invented(60, seed=s)).drop([TOGETHER, PROBE]) for s in range(5)])
    assert ((tables.low <= .5) & (tables.high >= .5)).mean() > .8 and abs(tables.auc.mean() - .5) < .02


def test_a_category_seen_once_says_nothing():
    unique = invented(template=lambda rng, vla, source: [f"words number {i}" for i in range(len(vla))])
    assert labels_of(unique).auc["template"] == .5


def test_folds_hold_out_whole_records():
    "Frames of one episode share a fold, so a picture's peculiar colour is never learnt from its neighbour."
    from embodied_midtrain.proximity import fold_of
    fold = fold_of([f"r/{i // 10}/{i}" for i in range(300)], 5)
    value = pd.DataFrame({"template": [f"episode {i // 10}" for i in range(300)]})
    assert (predict_label(value, np.arange(300) % 20 < 10, fold, np.ones(300)) == .5).all()


def test_constant_columns_and_missing_pictures_do_not_crash(tmp_path):
    constant = {column: (lambda rng, vla, source, value=("x" if column in CATEGORIES else 3.): np.full(len(vla), value)) for column in sum(NUISANCES.values(), [])}
    table = invented(40, **constant)
    labels, pool = labels_of(table), table[table.kind == "vlm"]
    assert labels.constant.drop([PROBE]).all() and (labels.auc.drop(PROBE) == .5).all() and "no single nuisance does better" in label_text(labels.reset_index())
    depends = dependence_table(pool, np.ones((5, len(pool))))
    assert depends[["raw", "partial"]].isna().all(axis=None) and "goes with none" in dependence_text(depends, source_share(pool, np.ones((5, len(pool)))))
    for figure in plot_label(labels.reset_index()), plot_dependence(depends): figure.savefig(tmp_path / "figure.png")
    missing = invented(40, width=lambda rng, vla, source: np.where(source == "a", np.nan, rng.normal(size=len(vla))), height=lambda rng, vla, source: np.full(len(vla), np.nan))
    assert labels_of(missing).auc["image size"] > .5  # having a picture or not says something
    depends = dependence_table(missing[missing.kind == "vlm"], np.ones((3, 120))).set_index("column")
    assert np.isfinite(depends.partial["width"]) and np.isnan(depends.partial["height"])


def test_an_estimate_outside_its_interval_can_be_drawn(tmp_path):
    pool = invented(20).query("kind == 'vlm'")
    labels, depends = label_table(t := invented(20), np.full((1, len(t)), 1 / len(t))), dependence_table(pool, np.ones((1, len(pool))))
    outside = dict(low=lambda t: t[t.columns[t.columns.isin(["auc", "partial"])][0]] + 1e-9, high=lambda t: t.low + 1e-9)
    for figure in plot_label(labels.assign(**outside)), plot_dependence(depends.assign(**outside)), plot_dependence(depends): figure.savefig(tmp_path / "figure.png")
    figure = plot_controls(pd.DataFrame(dict(picture=["robot", "none"], words=["none", "pool"], pairs=2, logit=[1., 2], low=[1.1, 2.1], high=[1.2, 2.2])))
    figure.savefig(tmp_path / "figure.png")


# ---- how much the score depends on them

def test_partial_correlation_equals_that_of_residuals():
    "Against least squares on dummies of the source, with weights."
    rng = generator(0, "partial")
    group, weights = rng.integers(0, 4, 300), rng.random((6, 300)) * rng.integers(0, 3, (6, 300))
    x, y = rng.normal(group, 1), rng.normal(2. * group, 1)
    y += .4 * x
    dummies = np.eye(4)[group]
    for w, found in zip(weights, correlation_draws(x, y, group, weights)):
        root = np.sqrt(w)[:, None]
        rest = [v - dummies @ np.linalg.lstsq(root * dummies, root[:, 0] * v, rcond=None)[0] for v in (x, y)]
        assert abs(found - (w * rest[0] * rest[1]).sum() / np.sqrt((w * rest[0] ** 2).sum() * (w * rest[1] ** 2).sum())) < 1e-10
    holes = np.where(group == 2, np.nan, x)
    assert np.isclose(correlation_draws(holes, y, group, weights)[0], correlation_draws(x[group != 2], y[group != 2], group[group != 2], weights[:, group != 2])[0])
    assert np.isnan(correlation_draws(1e6 + group / 3, y, group, weights)).all()  # varies between sources only


def test_what_differs_between_sources_only_is_not_held_against_the_score():
    "Simpson's paradox: over the pool, width and template go with the score; inside each source, nothing does."
    place = dict(a=0., b=3., c=6.)
    table = invented(300, width=lambda rng, vla, source: [place.get(s, 0) + e for s, e in zip(source, rng.normal(size=len(vla)))], template=lambda rng, vla, source: [f"{s} {i}" for s, i in zip(source, rng.integers(0, 4, len(vla)))],
                     logit=lambda rng, vla, source: [place.get(s, 9) + e for s, e in zip(source, rng.normal(size=len(vla)))])
    pool = table[table.kind == "vlm"]
    drawn = redraws(pool.source, np.ones(len(pool)), 200)
    found = dependence_table(pool, drawn).set_index("column")
    assert found.raw["width"] > .7 and found.raw["template"] > .8 and found.low["width"] < 0 < found.high["width"] and found.low["template"] < 0
    share, low, high = source_share(pool, drawn)
    assert low < share < high and abs(share - 6 / 7) < .04


def test_what_the_score_uses_is_found_inside_the_sources():
    table = invented(200, logit=lambda rng, vla, source: rng.normal(size=len(vla)))
    table["logit"] += .8 * table.characters + 1. * (table.file_type == "a")
    pool = table[table.kind == "vlm"]
    depends = dependence_table(pool, redraws(pool.source, np.ones(len(pool)), 200))
    found = depends.set_index("column")
    alone = np.corrcoef(pool.logit, pool.file_type == "a")[0, 1]
    assert found.low["characters"] > .4 and found.low["file_type"] > .1 and abs(found.partial["file_type"] - alone) < .1
    assert (found.drop(index=["characters", "file_type"]).low < .05).all()
    words = dependence_text(depends, [.1, .05, .2])
    assert words.startswith("Inside a source the score goes most with characters (+0.") and ", then file type (+0." in words and "explains 10% (5% to 20%)" in words


def test_a_category_without_meaning_has_no_effect():
    found = [dependence_table(t := invented(60, seed=s).query("kind == 'vlm'"), np.ones((1, len(t)))).set_index("column")[["raw", "partial"]].loc[list(CATEGORIES)] for s in range(20)]
    assert -.1 < pd.concat(found).to_numpy().mean() < .02


# ---- controls

@pytest.fixture(scope="module")
def tiny():
    from embodied_midtrain.backbone import load_backbone
    return load_backbone("tiny")


@pytest.fixture(scope="module")
def pairs():
    robots = list(open_source(dict(reader="tabletop_robot", name="tabletop-reach", count=6)))[:6]
    pool = [s.asked() for s in open_source(dict(reader="tabletop", name="mini-refspatial", count=6))]
    return list(zip(robots, pool))


def test_controls_through_the_real_backbone(tiny, pairs):
    from embodied_midtrain.features import extract
    direction = generator(0, "direction").normal(size=tiny.hidden_size)
    logits = lambda samples: extract(tiny, samples).astype(float) @ direction
    found = control_logits(pairs, logits)
    assert np.isfinite(found.drop(columns=["robot", "pool"])).all(axis=None) and list(found.robot) == [a.id for a, _ in pairs]
    same = lambda column, samples: np.allclose(found[column], logits(samples), atol=.15)  # float16, and other neighbours in the batch
    robots, pool = map(list, zip(*pairs))
    assert same("robot+robot", robots) and same("pool+pool", pool)
    assert same("robot+pool", [replace(b, images=a.images) for a, b in pairs]) and same("pool+robot", [replace(a, images=b.images) for a, b in pairs])
    assert same("none+pool", [replace(b, images=(), messages=(turn("user", b.messages[0]["content"].removeprefix("<image>\n")),)) for b in pool])
    assert same("robot+none", [replace(a, messages=(turn("user", "<image>"),)) for a in robots])
    assert not same("robot+pool", robots) and not same("none+pool", pool) and not same("grey+robot", robots) and not same("robot+none", robots)
    assert found["robot+none"].std() > 0 and np.ptp([found["none+robot"][i] for i in range(6) if robots[i].messages == robots[0].messages]) < .15  # without its picture, a sample is its words


def test_effects_add_up():
    rng = generator(0, "effects")
    found = pd.DataFrame({"robot": "r", "pool": "p"} | {"+".join(c): rng.normal(i, .5, 60) for i, c in enumerate(reversed(CONDITIONS))})
    effects = effect_table(found, 200).set_index("effect")
    gap, words, picture = (effects.logit[name] for name in list(EFFECTS)[:3])
    assert np.isclose(gap, words + picture) and np.isclose(effects.share[list(EFFECTS)[1]] + effects.share[list(EFFECTS)[2]], 1) and (effects.low < effects.logit).all() and (effects.logit < effects.high).all()
    differences = found["robot+robot"] - found["pool+pool"]
    assert np.isclose(gap, differences.mean()) and abs((effects.high - effects.low)[list(EFFECTS)[0]] / (2 * 1.96 * differences.std() / 60 ** .5) - 1) < .25  # paired
    assert effect_table(found, 200).equals(effect_table(found, 200))


def test_a_condition_left_out_takes_its_effects_with_it(pairs, tmp_path):
    found = control_logits(pairs, lambda samples: [len(s.images) + len(plain_text(s)) / 100 for s in samples], [c for c in CONDITIONS if c[0] != "none"])
    effects, means = effect_table(found, 50), control_table(found, 50)
    assert "words alone, no picture" not in set(effects.effect) and len(effects) == len(EFFECTS) - 1 and len(means) == 8
    plot_controls(means).savefig(tmp_path / "figure.png")
    assert "no picture" not in effect_text(effects)


def test_effects_in_words():
    names = list(EFFECTS)
    def said(gap_low, low, high): return effect_text(pd.DataFrame(dict(effect=names, logit=1., low=gap_low, high=2., share=.5, share_low=low, share_high=high)))
    assert "the words move the score more" in said(.5, .6, .9) and "the picture moves the score more" in said(.5, .1, .4) and "about alike" in said(.5, .4, .6) and "nothing to divide" in said(-.1, .6, .9)


def test_pairs_are_drawn_in_the_shares_of_the_mixture():
    table = invented(100, images=lambda rng, vla, source: np.where(source == "b", 2, 1), characters=lambda rng, vla, source: np.where((source == "c") & (rng.random(len(vla)) < .5), 0, 9))
    weights = mixture_weights(table, dict(a=300, b=500, c=100))
    chosen = choose_pairs(table, weights, 60)
    assert len(chosen) == 60 == len(set(chosen)) and pd.Series([robot[:2] for robot, _ in chosen]).value_counts().tolist() == [30, 30]
    counts = pd.Series([pool[0] for _, pool in chosen]).value_counts()
    assert counts.to_dict() == {"a": 51, "c": 9}  # b has two pictures; of c, about half have words
    assert (table.set_index("id").characters[[pool for _, pool in chosen]] > 0).all()
    assert chosen == choose_pairs(table, weights, 60) != choose_pairs(table, weights, 60, seed=1)
    assert choose_pairs(table[table.source.isin(["b", "r1"])], weights[table.source.isin(["b", "r1"])], 60) == []  # nobody to pair with


def test_a_broken_picture_takes_its_pair_out():
    by_id = {"r/0": sample("r/0", kind="vla"), "a/0": sample("a/0", images=(ImageRef(data=file("JPEG")[:40]),)), "a/1": sample("a/1")}
    aside = SetAside()
    assert [b.id for _, b in decoded_pairs([("r/0", "a/0"), ("r/0", "a/1")], by_id, aside)] == ["a/1"] and len(aside) == 1


def test_other_logits_than_the_stored_ones_are_told():
    stored = pd.Series(np.linspace(-2, 2, 41), [f"a/{i}" for i in range(41)])
    assert repeat_text(stored.iloc[:9] + .001, stored).startswith("The 9 samples")
    assert repeat_text(stored.iloc[:9] + np.eye(9)[0], stored).startswith("WARNING: 1 of 9 samples")


def test_no_model_is_loaded_to_look_at_tables():
    code = "import sys, embodied_midtrain.shortcuts\nprint(*({'torch', 'transformers', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
