"""Leakage: planted copies are found and strangers are not; every search against its plain twin; what is drawn, counted and said."""
import io, json, subprocess, sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pytest
from statsmodels.stats.proportion import proportion_confint

from embodied_midtrain.core import generator, read_table
from embodied_midtrain.leakage import (BITS, KINDS, MIRROR, Tally, about, blocks, compare, counts, distance_blocks, drawn, drawn_share, equal_pairs, found_pairs, gallery_table, joined, leakage_text, leaking, look, look_at,
                                       looks, near_pairs, nearest, picture_hashes, plot_nearest, plot_pairs, read_looks, runs, shared_exchange, split_words, template_text, text_pairs, text_runs, write_looks)
from embodied_midtrain.samples import BadSample, ImageRef, Sample, SetAside, turn
from embodied_midtrain.sources.base import Record, Source, open_source

DATA = Path(__file__).parent / "data"
PHOTOS = [DATA / name for name in ("llava_coco_qa/waterview.jpg", "llava_coco_qa/extreme_ironing.jpg", "robopoint/sink.jpg", "robopoint/stair.jpg")]
FLIP = PIL.Image.Transpose.FLIP_LEFT_RIGHT


def saved(picture, kind, **how):
    picture.save(file := io.BytesIO(), kind, **how)
    return ImageRef(data=file.getvalue())


def pixels_of(picture): return ImageRef(array=np.asarray(picture))


def chat(id, question, answer="Yes.", images=()):
    return Sample(f"s/{id}", "s", "vlm", tuple(images), (turn("user", "<image>" * len(images) + question), turn("assistant", answer)))


def tabletop(name, count, **more): return list(open_source(dict(reader="tabletop", name=name, count=count, **more)))


def bits(a, b): return int(np.bitwise_count(a ^ b).sum())


# ---- pictures

@pytest.mark.parametrize("path", PHOTOS, ids=lambda p: p.stem)
def test_copies_of_a_photograph_are_known_again(path):
    photo, image = ImageRef(str(path)).open(), ImageRef(str(path))
    w, h = photo.size
    file, pixels, code, plain = picture_hashes(image)
    assert not plain and picture_hashes(ImageRef(data=path.read_bytes()))[:2] == (file, pixels)          # the same bytes, given otherwise
    png = picture_hashes(saved(photo, "PNG"))
    assert png[0] != file and png[1] == pixels == picture_hashes(pixels_of(photo))[1] and picture_hashes(pixels_of(photo))[0] == 0
    for copy in saved(photo, "JPEG", quality=40).open(), photo.resize((w // 2, h // 2)), photo.resize((336, 336)), saved(photo.resize((w // 3, h // 3)), "WEBP", quality=60).open(), photo.point(lambda v: min(255, v * 1.1)):
        assert bits(look(copy)[0], code) <= 8 and picture_hashes(pixels_of(copy))[1] != pixels
    assert bits(look(photo.transpose(FLIP))[0] ^ MIRROR, code) <= 2 and bits(look(photo.transpose(FLIP))[0], code) > 20
    assert bits(look(photo.crop((w // 5, h // 5, w, h)))[0], code) > 8                                     # a crop is not found, as the notebook says
    assert bits(look(photo.rotate(90, expand=True))[0], code) > 20
    assert all(bits(look(ImageRef(str(other)).open())[0], code) > 40 for other in PHOTOS if other != path)


def test_turned_by_its_exif_note_is_the_same_picture():
    photo = ImageRef(str(PHOTOS[0])).open()
    exif = PIL.Image.Exif()
    exif[0x0112] = 6                                                                                     # to be turned by 90 degrees to the right
    lying = saved(photo.rotate(90, expand=True), "PNG", exif=exif)
    assert picture_hashes(lying)[1] == picture_hashes(pixels_of(photo))[1]


def test_pictures_with_nothing_on_them_have_no_look():
    ramp = np.tile(np.linspace(40, 200, 64).astype(np.uint8)[:, None], (64, 1, 3))
    for empty in (np.full((64, 64, 3), 90, np.uint8), ramp, ramp.transpose(1, 0, 2)[::-1].copy()): assert look(PIL.Image.fromarray(np.broadcast_to(empty, (64, 64, 3)).copy()))[1]
    assert not any(look(s.images[0].open())[1] for s in tabletop("mini-refspatial", 60))


@pytest.mark.parametrize("name, few", [("mini-refspatial", 0), ("mini-robo2vlm", 0), ("mini-llava", 3), ("mini-cc12m", 6)])
def test_strangers_on_the_tabletop_are_not_found(name, few):
    "The default distance on pictures that look much alike: 300 x 512 pairs, of which on clip art a few do look the same."
    a, b = (looks(tabletop(name, count, seed=seed), 8) for count, seed in ((300, 999), (512, 0)))
    found = sum(len(i) for _, i, *_ in near_pairs(a.code[~a.plain], b.code[~b.plain], 8))
    assert found <= few, f"{found} of {len(a) * len(b):,} pairs"
    assert not sum(len(i) for i, _ in equal_pairs(a.pixels, b.pixels)) or name == "mini-vcr"


def test_broken_pictures_are_set_aside_and_the_rest_stays():
    aside = SetAside("exam")
    seen = looks([chat(0, "What is this?", images=[ImageRef("nowhere.jpg"), ImageRef(str(PHOTOS[0]))]), chat(1, "And this?", images=[ImageRef(data=b"none", where="a.tar: 1.jpg")])], 8, aside, threads=2)
    assert seen.owner.tolist() == [0] and seen.runs.tolist() == [1, 1] and len(aside) == 2
    assert {row[:2] for row in aside.rows} == {("nowhere.jpg", "s/0"), ("a.tar: 1.jpg", "s/1")}
    with pytest.raises(BadSample): picture_hashes(ImageRef(data=b"\xff\xd8 cut short"))


def test_threads_see_the_same():
    samples = tabletop("mini-llava", 80) + [chat(i, f"What is it, number {i}?", images=[ImageRef(str(p)) for p in PHOTOS[:i]]) for i in range(4)]
    one, three = looks(samples, 8), looks(samples, 8, threads=3)
    assert all(np.array_equal(getattr(one, f), getattr(three, f)) for f in one.__dataclass_fields__)


def test_hashes_are_the_same_in_every_process():
    code = f"from embodied_midtrain.leakage import *; from embodied_midtrain.samples import ImageRef; f, p, c, _ = picture_hashes(ImageRef({str(PHOTOS[2])!r})); print(f, p, *c, *runs(list('abc'), 2))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "5"}).stdout.split()
    file, pixels, code, _ = picture_hashes(ImageRef(str(PHOTOS[2])))
    assert there == [str(int(x)) for x in (file, pixels, *code, *runs(list("abc"), 2))]


# ---- searches against their plain twins

def test_distances_equal_those_of_single_bits():
    a, b = (generator(0, "codes", n).integers(0, 2**64, (n, 2), np.uint64) for n in (150, 77))
    spread = lambda x: np.unpackbits(x.view(np.uint8), axis=1).astype(int)
    plain = np.abs(spread(a)[:, None] - spread(b)).sum(2)
    turned = np.abs(spread(a ^ MIRROR)[:, None] - spread(b)).sum(2)
    straight, mirrored = np.full((2, 150, 77), -1)
    for i, j, s, m in distance_blocks(a, b, 64, 50): straight[i:i + 64, j:j + 50], mirrored[i:i + 64, j:j + 50] = s, m
    assert (straight == plain).all() and (mirrored == turned).all()
    for tolerance in 0, 48, 55:
        found = {(kind, i, j, d) for kind, at, to, off in near_pairs(a, b, tolerance) for i, j, d in zip(at.tolist(), to.tolist(), off.tolist())}
        near = {("near", i, j, plain[i, j]) for i, j in np.argwhere(plain <= tolerance).tolist()}
        assert found == near | {("mirrored", i, j, turned[i, j]) for i, j in np.argwhere((turned <= tolerance) & (plain > tolerance)).tolist()}
    assert near


@pytest.mark.parametrize("limit", [1, 7, 10**6])
def test_equal_pairs_equal_a_double_loop(limit):
    rng = generator(1, "equal")
    a, b = rng.integers(0, 12, 60).astype(np.uint64), rng.integers(0, 12, 45).astype(np.uint64)
    found = sorted((int(i), int(j)) for at in equal_pairs(a, b, limit) for i, j in zip(*at))
    assert found == sorted((i, j) for i in range(60) for j in range(45) if a[i] == b[j] and a[i])
    assert not list(equal_pairs(a[:0], b)) and not list(equal_pairs(a, b[:0]))


def sentences(count, rng, longest=14): return [" ".join(rng.choice(list("abcdef"), rng.integers(0, longest))) for _ in range(count)]


def plain_runs(sample, n):
    "Runs of words as tuples in a set."
    found = set()
    for message in sample.messages:
        words = split_words(message["content"])
        if len(words) >= n: found |= {tuple(words[i:i + n]) for i in range(len(words) - n + 1)}
        elif words and message["role"] == "user": found.add(tuple(words))
    return found


@pytest.mark.parametrize("n, share, limit", [(3, .7, 10**6), (3, .7, 40), (4, .3, 1), (13, 1, 10**6)])
def test_runs_of_words_equal_plain_sets(n, share, limit):
    rng = generator(2, "words")
    left, right = ([chat(i, q, a) for i, (q, a) in enumerate(zip(sentences(count, rng), sentences(count, rng)))] for count in (50, 40))
    found = {(i, j): d for at in text_pairs(looks(left, n), looks(right, n), share, limit) for i, j, d in zip(*at)}
    plain = {}
    for i, one in enumerate(left):
        for j, other in enumerate(right):
            a, b = plain_runs(one, n), plain_runs(other, n)
            if a & b and len(a & b) / min(len(a), len(b)) >= share: plain[i, j] = 1 - len(a & b) / min(len(a), len(b))
    assert found.keys() == plain.keys() and all(np.isclose(found[key], plain[key]) for key in found) and found
    assert {len(text_runs(s, n)) for s in left} == {len(plain_runs(s, n)) for s in left}


def test_words_are_compared_and_not_their_dress():
    assert split_words("Is there a FORK?\n<image>") == split_words("is there  a fork") and split_words("<image>") == split_words(" ... ") == []
    assert split_words("Stra\u00dfe") == split_words("STRASSE") and split_words("这是a猫") == ["这", "是", "a", "猫"]
    assert len(text_runs(chat(0, "what is it", "yes"), 8)) == 1                                              # a short answer is not compared
    system = replace(chat(0, "what is it"), messages=(turn("system", "you are a very helpful assistant who answers all that is asked"), *chat(0, "what is it").messages))
    assert np.array_equal(text_runs(system, 8), text_runs(chat(0, "what is it"), 8))


# ---- both together

@cache
def planted():
    "An exam of four photographs, and a pool with copies of the first, strangers between them."
    photo = ImageRef(str(PHOTOS[0])).open()
    w, h = photo.size
    exam = looks([chat(f"q{i}", f"What do you see when you look at picture {i} here?", images=[ImageRef(str(p))]) for i, p in enumerate(PHOTOS)], 8)
    copies = {"file": ImageRef(str(PHOTOS[0])), "png": saved(photo, "PNG"), "jpeg": saved(photo, "JPEG", quality=50), "small": pixels_of(photo.resize((w // 2, h // 2))), "crop": pixels_of(photo.crop((w // 4, 0, w, h))),
              "flipped": saved(photo.transpose(FLIP), "JPEG", quality=80)}
    pool = [chat(name, "What do you see when you look at picture 0 here?" if name == "jpeg" else "Describe it.", images=[image]) for name, image in copies.items()]
    return exam, pool + [chat(s.id.replace("/", "-"), "Describe it.", images=s.images) for name in ("mini-llava", "mini-robopoint") for s in tabletop(name, 100)]


def in_common(a, b, tolerance=8, share=.7):
    found = {}
    for kind, i, j, distance in compare(a, b, tolerance, share):
        for key in zip(np.full(len(i), kind), a.ids[i], b.ids[j], distance): found[key[:3]] = min(key[3], found.get(key[:3], np.inf))
    return found


def test_what_was_planted_is_found_and_nothing_else():
    exam, pool = planted()
    found = in_common(exam, looks(pool, 8))
    assert {question for _, question, _ in found if "text" != _} == {"s/q0"}
    by_copy = {copy: {kind for kind, _, id in found if id == f"s/{copy}"} for copy in ("file", "png", "jpeg", "small", "crop", "flipped")}
    assert by_copy == {"file": {"file", "pixels", "near", "picture"}, "png": {"pixels", "near", "picture"}, "jpeg": {"near", "picture", "text", "both"}, "small": {"near", "picture"}, "crop": set(), "flipped": {"mirrored", "picture"}}
    assert {id for _, _, id in found} == {f"s/{name}" for name, kinds in by_copy.items() if kinds}


def test_sides_and_order_make_no_difference():
    exam, pool = planted()
    samples, rng = looks(pool, 8), generator(3, "order")
    straight = in_common(exam, samples)
    assert straight == {(kind, j, i): d for (kind, i, j), d in in_common(samples, exam).items()}
    assert straight == in_common(exam, looks([pool[i] for i in rng.permutation(len(pool))], 8))


def test_samples_of_several_pictures_and_of_none():
    two, none = chat("two", "Compare them.", images=[ImageRef(str(PHOTOS[1])), ImageRef(str(PHOTOS[0]))]), chat("none", "What is the capital of the country that lies west of Spain?")
    found = in_common(looks([two, none], 8), looks([chat("x", "Tell me.", images=[ImageRef(str(PHOTOS[0]))] * 2), none], 8))
    assert {(kind, i, j) for kind, i, j in found} == {(kind, "s/two", "s/x") for kind in ("file", "pixels", "near", "picture")} | {("text", "s/none", "s/none")}


# ---- drawing and counting

def pool_table(**sizes): return pd.DataFrame(dict(id=[f"{s}/{i}" for s, n in sizes.items() for i in range(n)], source=[s for s, n in sizes.items() for _ in range(n)]))


def test_draws_follow_the_sources_and_the_seed():
    pool = pool_table(a=4000, b=900, c=100)
    chosen = [f"b/{i}" for i in range(0, 900, 3)] + ["c/5"]
    rows = drawn(pool, chosen, 60, 500, 50)
    assert rows[rows.pool].source.value_counts().to_dict() == {"a": 400, "b": 100, "c": 50}                  # quotas 400, 90, 10: whole stretches
    mine = rows[rows.selected]
    assert set(mine.id) <= set(chosen) and (mine.source == "c").sum() == 1 and 60 <= (mine.source == "b").sum() < 60 + 17
    assert (mine.selected_of == mine.source.map({"b": 300, "c": 1})).all() and (rows.pool_of == rows.source.map({"a": 4000, "b": 900, "c": 100})).all()
    assert rows.equals(drawn(pool, chosen[::-1], 60, 500, 50)) and not rows.id.equals(drawn(pool, chosen, 60, 500, 50, seed=1).id)
    assert drawn(pool, chosen, 0, 10, 50).selected.sum() == len(chosen) and drawn(pool, chosen, 60, 0, 50).pool.sum() == 0
    assert len(drawn(pool, chosen, 10**9, 10**9, 50)) == len(pool)


def test_single_draws_have_wilsons_interval():
    hit = np.arange(300) % 30 == 0
    share, low, high = drawn_share(hit, np.arange(300), np.full(300, "a"), np.full(300, 5000))
    assert share == hit.mean() and np.allclose((low, high), proportion_confint(10, 300, method="wilson"), atol=1e-3)
    none = drawn_share(np.zeros(200, bool), np.arange(200) // 10, np.full(200, "a"), np.full(200, 900))
    assert none[:2] == (0, 0) and np.isclose(none[2], proportion_confint(0, 200, method="wilson")[1], atol=1e-4)
    assert np.isnan(drawn_share(hit[:0], hit[:0], hit[:0], hit[:0])).all()


def test_the_interval_of_a_draw_of_stretches_holds_what_it_promises():
    "Stretches that are hit as wholes, in three sources of unequal size: the truth is inside nine times in ten, where counting each sample for itself would fail."
    pool = pool_table(a=2400, b=1200, c=400)
    place, source = pool.groupby("source").cumcount().to_numpy() // 10, pool.source.to_numpy()
    truth = generator(4, "truth").random((3, 240)) < .3
    hit = truth[pd.factorize(source)[0], place]
    inside, naive = [], []
    for seed in range(100):
        rows = drawn(pool, ["a/0"], 1, 400, 10, seed)
        rows = rows[rows.pool]
        mine = hit[pool.id.isin(rows.id).to_numpy()]
        _, low, high = drawn_share(mine, rows.stretch.to_numpy(), rows.source.to_numpy(), rows.pool_of.to_numpy())
        inside.append(low <= hit.mean() <= high)
        low, high = proportion_confint(mine.sum(), len(mine), method="wilson")
        naive.append(low <= hit.mean() <= high)
    assert np.mean(inside) >= .9 and np.mean(naive) < .7


def tally_of(samples, exam, block=50, partners=5, **sides):
    rows = pd.DataFrame(dict(id=[s.id for s in samples], source="s", stretch=np.arange(len(samples)), selected=True, pool=True, selected_of=len(samples), pool_of=len(samples)) | sides)
    tally = Tally("exam", exam, rows, 8, .7, partners)
    for at in range(0, len(samples), block): tally.add(looks(samples[at:at + block], 8))
    return tally


def test_counts_and_pairs_do_not_depend_on_blocks_and_order():
    exam, pool = planted()
    one, other = tally_of(pool, exam), tally_of(pool[::-1], exam, block=7)
    pd.testing.assert_frame_equal(counts(one, True), counts(other, True))  # up to the order of the sums
    assert found_pairs(one).equals(found_pairs(other)) and nearest(one).equals(nearest(other))
    table = counts(one, True).set_index("kind")
    assert table.selected_hit.to_dict() == dict(file=1, pixels=2, near=4, mirrored=1, picture=5, text=1, both=1) and (table.selected_questions == 1).all() and (table.selected_low == table.selected_share).all()
    assert leaking([one], ["file", "mirrored"]).to_dict("list") == {"id": ["s/file", "s/flipped"], "source": ["s", "s"], "kinds": ["file", "mirrored"], "benchmarks": ["exam", "exam"]}


def test_nearest_equals_the_whole_table_of_distances():
    exam, pool = planted()
    tally, seen = tally_of(pool, exam, block=40), looks(pool, 8)
    plain = np.minimum(*(np.bitwise_count((exam.code ^ turned)[:, None] ^ seen.code[~seen.plain]).sum(2) for turned in (np.uint64(0), MIRROR)))
    ids = seen.ids[seen.owner[~seen.plain]]
    table = nearest(tally).query("side == 'selected'")
    for row, distances in zip(table.itertuples(), plain): assert (row.bits, row.id) == min(zip(distances.tolist(), ids))
    assert len(table) == 4 and table.bits.iloc[1:].min() > 8


def test_a_template_that_all_share_fills_no_memory(monkeypatch):
    monkeypatch.setattr("embodied_midtrain.leakage.BATCH", 500)
    exam, pool = looks([chat(f"q{i}", "is there a cat in the picture") for i in range(30)], 8), [chat(i, "is there a cat in the picture") for i in range(200)]
    tally = tally_of(pool, exam, block=20, partners=3)
    assert len(tally.pairs) <= 500 + 30 * 20
    assert found_pairs(tally).groupby("question").id.agg(list).map(tuple).unique().tolist() == [("s/0", "s/1", "s/10")]  # of equally near ones those of the lowest ids
    assert counts(tally, True).set_index("kind").selected_hit["text"] == 200


def test_both_sides_are_counted_apart():
    exam, pool = planted()
    mine = np.array([s.id in ("s/file", "s/jpeg") for s in pool])
    table = counts(tally_of(pool, exam, selected=mine, pool=~mine), False).set_index("kind")
    assert table.selected_hit["picture"] == 2 and table.pool_hit["picture"] == 3 and table.pool_hit["text"] == 0 and table.selected_questions["both"] == 1


# ---- reading

class Shelf(Source):
    "Chats about photographs, found by walking; some of the pictures may be missing."
    def __init__(self, name, count=40, missing=()): super().__init__(name); self.count, self.missing, self.parsed = count, missing, 0
    def records(self, start=0): return (Record(str(i), "shelf") for i in range(start, self.count))
    def parse(self, record):
        self.parsed += 1
        i = int(record.key)
        return [Sample(f"{self.name}/{i}", self.name, "vlm", (ImageRef("nowhere.jpg" if i in self.missing else str(PHOTOS[i % 4])),), chat(0, f"<image> What is this, number {i}?").messages)]


@pytest.mark.parametrize("ids", [None, [f"shelf/{i}" for i in range(39, 0, -2)]])
def test_a_killed_look_goes_on(tmp_path, ids):
    whole = joined(look_at(Shelf("shelf"), tmp_path / "whole", 8, ids, size=6))
    for _, seen in zip(range(3), look_at(Shelf("shelf"), tmp_path / "cut", 8, ids, size=6)): pass
    stamps = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "cut").iterdir())}
    assert len(stamps) == 6
    again = joined(look_at(Shelf("shelf"), tmp_path / "cut", 8, ids, size=6))
    assert all(np.array_equal(getattr(whole, f), getattr(again, f)) for f in whole.__dataclass_fields__) and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert sorted(whole.ids) == sorted(ids or [f"shelf/{i}" for i in range(40)])


def test_few_broken_pictures_are_listed_and_many_stop(tmp_path):
    seen = joined(look_at(Shelf("shelf", missing=(5,)), tmp_path / "few", 8, size=16))
    assert len(seen) == 40 and len(seen.owner) == 39 and read_table(tmp_path / "few/aside-00000.parquet").record.tolist() == ["shelf/5"]
    with pytest.raises(ValueError, match="3 of 40 records .* image file does not exist"): list(look_at(Shelf("shelf", missing=(1, 2, 3)), tmp_path / "many", 8, size=16))


def test_blocks_of_any_source(tmp_path):
    for source in Shelf("shelf", 10), open_source(dict(reader="tabletop", name="mini-vcr", count=10)):
        assert [len(block) for block in blocks(source, size=4)] == [4, 4, 2] == [len(block) for block in blocks(source, [f"{source.name}/{i}" for i in range(10)], 4)]
    with pytest.raises(KeyError): list(blocks(Shelf("shelf", 10), ["shelf/3000"]))


def test_looks_on_disk(tmp_path):
    samples = tabletop("mini-llava", 20) + [chat("none", "What is it?"), chat("many", "Which?", images=[ImageRef(str(p)) for p in PHOTOS])]
    for some in samples, samples[-2:-1], []:
        write_looks(seen := looks(some, 8), tmp_path / "seen.parquet")
        back = read_looks(tmp_path / "seen.parquet")
        assert all(np.array_equal(getattr(seen, f), getattr(back, f)) for f in seen.__dataclass_fields__) and len(back) == len(some)


@pytest.mark.parametrize("layout", ["pope", "blink"])
def test_benchmarks_in_their_published_layout(tmp_path, layout):
    if layout == "pope":
        for split in "random", "popular", "adversarial":
            lines = [{"question_id": i + 1, "image": path.name, "text": f"Is there a {thing} in the image?", "label": "yes"} for i, (path, thing) in enumerate((p, t) for p in PHOTOS[:2] for t in ("man", split))]
            (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(map(json.dumps, lines)))
        spec, count = dict(path=str(tmp_path), images=str(DATA / "llava_coco_qa"), columns=dict(question="text", answer="label", images="image")), 12
    else:
        rows = [dict(idx=f"val_{i}", prompt=f"Which of these is the same as the first one in the row, number {i}?", answer="(A)", **{f"image_{k + 1}": dict(bytes=path.read_bytes(), path=None) if k <= i else None for k, path in enumerate(PHOTOS)}) for i in range(4)]
        (tmp_path / "Counting").mkdir()
        pd.DataFrame(rows).to_parquet(tmp_path / "Counting/val-00000-of-00001.parquet")
        spec, count = dict(path=str(tmp_path), split="val", columns=dict(question="prompt", answer="answer", images=[f"image_{k}" for k in range(1, 5)])), 4
    test = looks(list(open_source(dict(reader="hf", name=layout, **spec))), 8)
    assert len(test) == count and (test.file > 0).all()
    found = in_common(test, looks([chat("copy", "Is there a man in the image", images=[ImageRef(str(PHOTOS[0]))])], 8))
    assert sum(kind == "file" for kind, *_ in found) == (6 if layout == "pope" else 4) and sum(kind == "both" for kind, *_ in found) == (3 if layout == "pope" else 0)


# ---- what is said and shown

@pytest.fixture(scope="module")
def tally(): return tally_of(planted()[1], planted()[0])


def test_what_is_said(tally):
    exam, pool = planted()
    told = leakage_text(counts(tally, True), about(tally, 2), len(pool), 8, 8)
    assert told.startswith("exam: of 4 questions with 4 pictures, 1 shares a picture with the 206 selected samples (1 by file, 1 by pixels, 1 by perceptual hash within 8 of 128 bits, 1 by that of the mirror image; 2 set aside as unusable); 1 shares words")
    assert "a picture is shared by 2.4% of the selection" in told and told.endswith("of the pool.")
    rest = tally_of(pool[6:], exam)
    told = leakage_text(counts(rest, False), about(rest, 0), 5000, 8, 8)
    assert "none shares a picture with the 200 drawn of 5,000 selected samples (searched by file, by pixels, by perceptual hash within 8 of 128 bits, by that of the mirror image); none shares words" in told and "%" not in told
    assert template_text(counts(rest, False)).startswith("No question") and template_text(counts(tally, True)).startswith("No question")  # its words come with its picture
    words = counts(tally, True).assign(selected_questions=lambda t: t.kind.map(dict(text=9, both=2)).fillna(0), pool_hit=0)
    assert template_text(words).startswith("7 questions share words") and "one by one" in template_text(words) and "phrases" in template_text(words.assign(pool_hit=4))


def test_the_gallery_shows_pairs_and_the_nearest_that_was_not_found(tmp_path, tally):
    exam, pool = planted()
    shown = gallery_table(found_pairs(tally), nearest(tally), ["exam", "other"], 3)
    assert shown.kind.tolist() == ["file", "not found"] and shown.question.tolist()[0] == "s/q0"
    questions, samples = {("exam", id): chat(0, "$5 \\frac?", images=[ImageRef(str(PHOTOS[0]))]) for id in exam.ids}, {s.id: s for s in pool}
    for table in shown, shown.head(0): plot_pairs(table, questions, samples).savefig(tmp_path / "pairs.png")
    for table in nearest(tally), nearest(tally).head(0): plot_nearest(table, counts(tally, True), 8).savefig(tmp_path / "nearest.png")
    assert (tmp_path / "pairs.png").stat().st_size > 1000


def test_the_shown_exchange_is_the_shared_one():
    one = replace(chat(0, "first question", "an answer"), messages=(*chat(0, "first question").messages, turn("user", "where is the red mug"), turn("assistant", "here")))
    other = chat(1, "Where is the red mug?", "there")
    a, b = shared_exchange(one, other, 8)
    assert [m["content"] for m in a.messages] == ["where is the red mug", "here"] and b.messages == other.messages
    told = chat(2, "Tell me.", "one two three four five six seven eight nine")
    assert shared_exchange(told, chat(3, "x", "zero one two three four five six seven eight"), 8)[0].messages == told.messages


def test_leaking_kinds_are_checked():
    with pytest.raises(ValueError, match="did you mean 'picture'"): leaking([], ["pictures"])
    assert leaking([], list(KINDS)).empty and list(leaking([], []).columns) == ["id", "source", "kinds", "benchmarks"] and BITS == 128
