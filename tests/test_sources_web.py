"Readers of web data on files built in exactly the published layouts: webdataset, what img2dataset writes, BLIP's captions, Hugging Face sets, image folders."
import csv, io, json, os, pickle, tarfile
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied_midtrain.samples import BadSample, turn
from embodied_midtrain.sources import web
from embodied_midtrain.sources.base import open_source

datasets.disable_progress_bars()
READER = "embodied_midtrain.sources.web:"


def jpeg(i, size=(40, 30)):
    "A picture of its own for every number."
    PIL.Image.new("RGB", size, (i * 37 % 256, i * 91 % 256, i % 256)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def pack(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            if content is None: info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            else: info.size = len(content)
            tar.addfile(info, io.BytesIO(content or b""))
    return path


def img2dataset(folder, layout="webdataset", shards=3, rows=8, dead=lambda n: n % 4 == 1):
    "What img2dataset writes; key = five digits of the shard, four of the row. Every fourth link is dead."
    folder.mkdir()
    for shard in range(shards):
        table, files = [], []
        for row in range(rows):
            n, key = shard * rows + row, f"{shard:05}{row:04}"
            gone = dead(n)
            table.append({"url": f"x.org/{n}", "caption": f"caption {n}", "key": key, "status": "failed_to_download" if gone else "success", "error_message": "HTTP Error 404" if gone else None, "width": 40, "height": 30, "sha256": "0"})
            if not gone: files += [(f"{key}.jpg", jpeg(n)), (f"{key}.txt", f"caption {n}".encode()), (f"{key}.json", json.dumps(table[-1], indent=4).encode())]
            if layout == "parquet": table[-1] |= {"jpg": None if gone else jpeg(n), "txt": None if gone else f"caption {n}"}
        pd.DataFrame(table).to_parquet(folder / f"{shard:05}.parquet", row_group_size=3)
        (folder / f"{shard:05}_stats.json").write_text(json.dumps({"count": rows, "successes": len(files) // 3}))
        if layout == "webdataset": pack(folder / f"{shard:05}.tar", files)
        if layout == "files":
            (folder / f"{shard:05}").mkdir()
            for name, content in files: (folder / f"{shard:05}" / name).write_bytes(content)
    return folder


def table(folder, rows=30, group=7, **more):
    folder.mkdir(exist_ok=True)
    columns = {"id": [f"q{i}" for i in range(rows)], "question": [f"What is {i}?" for i in range(rows)], "answer": [f"It is {i}." for i in range(rows)], "image": [{"bytes": jpeg(i), "path": None} for i in range(rows)]} | more
    pq.write_table(pa.table({k: v if not k.startswith("image") else pa.array(v, pa.struct({"bytes": pa.binary(), "path": pa.string()}) if not isinstance(v[0], list) else None) for k, v in columns.items()}),
                   folder / "train-00000-of-00001.parquet", row_group_size=group)
    return folder


def saved(folder):
    rows = datasets.Dataset.from_dict({"question": [f"What is {i}?" for i in range(30)], "answer": [f"It is {i}." for i in range(30)], "image": [{"bytes": jpeg(i), "path": None} for i in range(30)]},
                                      features=datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}))
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(folder)
    return folder


def chats(folder):
    folder.mkdir()
    pack(folder / "a.tar", [f for i in range(9) for f in ((f"{i}.jpg", jpeg(i)), (f"{i}.json", json.dumps({"conversations": [{"from": "human", "value": f"<image>\nWhat is {i}?"}, {"from": "gpt", "value": f"It is {i}."}]}).encode()))])
    return folder


def image_folder(folder, kind):
    folder.mkdir()
    (folder / "sub").mkdir()
    names = [f"sub/{i:02}.jpg" if i % 2 else f"{i:02}.jpg" for i in range(12)]
    for i, name in enumerate(names): (folder / name).write_bytes(jpeg(i))
    rows = [{"file_name": name, "text": f"caption {i}, \"quoted\"\nand broken"} for i, name in enumerate(names)]
    if kind == "txt":
        for row in rows: (folder / row["file_name"]).with_suffix(".txt").write_text(row["text"])
    elif kind == "jsonl": (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else: pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False) if kind == "csv" else pd.DataFrame(rows).to_parquet(folder / "metadata.parquet")
    return folder


MAKE = {  # what -> (how it is built, reader, parameters, samples)
    "img2dataset tars": (lambda f: img2dataset(f), "Laion400mSource", {}, 18),
    "img2dataset tars as webdataset": (lambda f: img2dataset(f), "WebDatasetSource", {}, 18),
    "img2dataset files": (lambda f: img2dataset(f, "files"), "Cc12mSource", {}, 18),
    "img2dataset parquet": (lambda f: img2dataset(f, "parquet"), "Laion400mSource", {}, 18),
    "chats in a tar": (chats, "WebDatasetSource", {}, 9),
    "parquet": (table, "HfSource", {}, 30),
    "saved to disk": (saved, "HfSource", {}, 30),
    "streamed": (table, "HfSource", {"streaming": True}, 30),
    "images with txt": (lambda f: image_folder(f, "txt"), "ImageFolderSource", {}, 12),
    "images with jsonl": (lambda f: image_folder(f, "jsonl"), "ImageFolderSource", {}, 12),
    "images with csv": (lambda f: image_folder(f, "csv"), "ImageFolderSource", {}, 12),
    "images with parquet": (lambda f: image_folder(f, "parquet"), "ImageFolderSource", {}, 12),
}


@pytest.fixture(params=MAKE)
def made(request, tmp_path):
    build, reader, parameters, count = MAKE[request.param]
    return {"reader": READER + reader, "name": "pool", "path": str(build(tmp_path / "set")), **parameters}, count


def plain(sample): return sample.id, sample.messages, [image.encoded() for image in sample.images], sample.meta


def test_order_resume_shards_and_fetch(made):
    spec, count = made
    source = open_source(spec)
    samples = [plain(s) for s in source]
    ids = [s[0] for s in samples]
    assert len(set(ids)) == count == len(ids) and not source.set_aside
    for start in (0, 1, count - 1, count + 5): assert [plain(s) for s in open_source(spec).samples(start)] == samples[start:]
    keys = [r.key for r in source.records()]
    for start in (1, 8, len(keys) - 1, len(keys) + 3): assert [r.key for r in open_source(spec).records(start)] == keys[start:]
    assert sorted(s.id for i in range(3) for s in source.samples(shard=(i, 3))) == sorted(ids)
    assert [plain(s) for s in open_source(spec).fetch(ids[::-3])] == samples[::-3] and source.fetch([]) == []
    for unknown in ("other/1", "pool/99999", "pool/000000001x", "pool/..%2F1", "pool/-1", "pool/", "pool/01"):
        with pytest.raises(KeyError, match="no sample"): source.fetch([ids[0], unknown])
    assert open_source(spec).fingerprint() == source.fingerprint()


def test_pictures_are_those_of_their_text_and_opened_late(made, monkeypatch):
    spec, count = made
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", lambda *_, **__: pytest.fail("opened an image"))
        samples = list(open_source(spec))
    for sample in samples:
        number = int("".join(c for c in sample.answer.split(",")[0] if c.isdigit()))
        assert sample.images[0].encoded() == jpeg(number) and sample.images[0].open().size == (40, 30)
        assert pickle.loads(pickle.dumps(sample.images[0])).encoded() == jpeg(number), "it must be readable in another process"


# ---- webdataset

def test_what_a_shard_may_hold(tmp_path):
    link, escape = [("l.jpg", None), ("l.txt", b"linked")], [("../up.jpg", jpeg(1)), ("../up.txt", b"up"), ("/abs.jpg", jpeg(1))]
    good = [f for i in range(80) for f in ((f"./set/{i:03}.JPG", jpeg(i)), (f"./set/{i:03}.txt", b"caption"))]
    pack(tmp_path / "a.tar", [("README", b"hello"), ("._000.jpg", b"?")] + good + link + escape)
    source = web.WebDatasetSource("w", str(tmp_path))
    samples = list(source)
    assert [s.id for s in samples[:2]] == ["w/set%2F000", "w/set%2F001"] and len(samples) == 80
    assert [(file, record) for file, record, _ in source.set_aside.rows] == [("a.tar", "l"), ("a.tar", "..%2Fup"), ("a.tar", "%2Fabs")]  # the files of one name are one record
    assert source.set_aside.reasons() == {"archive member is a link": 1, "image path leaves its folder": 2}


def test_several_pictures_and_bare_chats(tmp_path):
    chat = {"id": "pool/9", "messages": [turn("user", "<image> and <image>  "), turn("assistant", "Two.\n")]}
    many = [(f"a.{i}.png", jpeg(i)) for i in range(11)] + [("a.json", json.dumps({"messages": [turn("user", "<image>" * 11), turn("assistant", "Eleven.")]}).encode())]
    pack(tmp_path / "a.tar", many + [("b.0.jpg", jpeg(0)), ("b.1.png", jpeg(1)), ("b.json", json.dumps(chat).encode()), ("c.json", json.dumps({"question": "Why?", "answer": "So."}).encode()), ("d.json", json.dumps({"messages": [turn("user", "Hi"), turn("assistant", "Ho")]}).encode())])
    source = web.WebDatasetSource("w", str(tmp_path / "a.tar"))
    samples = list(source)
    assert [len(s.images) for s in samples] == [11, 2, 0] and [i.encoded() for i in samples[0].images] == [jpeg(i) for i in range(11)]
    assert samples[1].messages == tuple(chat["messages"]) and samples[1].meta == {"id": "pool/9"}
    assert [plain(s) for s in source.fetch([s.id for s in samples])] == [plain(s) for s in samples]


def test_keys_that_repeat_from_shard_to_shard(tmp_path):
    for shard in "ab": pack(tmp_path / f"{shard}.tar", [f for i in range(5) for f in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", f"{shard}{i}".encode()))])
    with pytest.raises(ValueError, match="duplicate id: w/0"): list(web.WebDatasetSource("w", str(tmp_path)))
    source = web.WebDatasetSource("w", [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], by_shard=True)
    assert [s.id for s in source][4:6] == ["w/a:4", "w/b:0"] and [s.answer for s in source.fetch(["w/b:3", "w/a:3"])] == ["b3", "a3"]
    with pytest.raises(KeyError): source.fetch(["w/c:3"])


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_large_texts_long_names_and_compression_do_not_matter(mode, tmp_path):
    names = [f"{'folder ' * 20}/{'long ' * 40}{i}" for i in range(6)]
    pack(tmp_path / f"a.tar{mode[1:].replace(':', '.')}", [f for i, n in enumerate(names) for f in ((f"{n}.json", json.dumps({"pad": "x" * 5000 * i}).encode()), (f"{n}.txt", f"caption {i}".encode()), (f"{n}.jpg", jpeg(i)))], mode)
    source = web.WebDatasetSource("w", str(tmp_path))
    samples = list(source)
    assert [s.answer for s in samples] == [f"caption {i}" for i in range(6)] and [s.images[0].encoded() for s in samples] == [jpeg(i) for i in range(6)]
    assert [s.answer for s in source.fetch([samples[4].id])] == ["caption 4"]


def test_a_cut_shard_names_the_byte(tmp_path):
    files = [f for i in range(20) for f in ((f"{i}.jpg", jpeg(i)), (f"{i}.txt", b"caption"))]
    whole = pack(tmp_path / "a.tar", files).read_bytes()
    for end in (len(whole) // 2, len(whole) // 2 + 700, 20_480):
        (tmp_path / "a.tar").write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"a\.tar: cut short.*byte [\d,]+"): list(web.WebDatasetSource("w", str(tmp_path)))


# ---- captions

@pytest.mark.parametrize("layout", ["webdataset", "files", "parquet"])
def test_dead_links_are_absent_and_no_failure(layout, tmp_path):
    folder = img2dataset(tmp_path / "laion", layout)
    source = web.Laion400mSource("laion", str(folder))
    assert [s.answer for s in source] == [f"caption {n}" for n in range(24) if n % 4 != 1] and not source.set_aside
    assert source.set_aside.unlabelled == ({"no picture: it was not downloaded": 6} if layout == "parquet" else {})
    assert web.downloads(folder) == {"success": 18, "failed_to_download": 6}
    assert len(source) == (24 if layout == "parquet" else 18)
    ids = {s.id for s in source}
    assert ids == ({f"laion/{n}" for n in range(24) if n % 4 != 1} if layout == "parquet" else {f"laion/{n // 8:05}{n % 8:04}" for n in range(24) if n % 4 != 1})


def test_captions_of_blip_are_joined_by_url(tmp_path):
    folder = img2dataset(tmp_path / "cc")
    pairs = [{"url": f"x.org/{n}", "caption": f"better {n}"} for n in reversed(range(20))] + [{"url": f"y.org/{n}", "caption": "of a picture that is not here"} for n in range(5000)]
    (tmp_path / "ccs.json").write_text(json.dumps(pairs + [{"url": "x.org/23"}, "?", {"url": 7, "caption": "x"}]))
    source = web.Cc12mSource("cc", str(folder), captions=str(tmp_path / "ccs.json"))
    samples = list(source)
    assert [s.answer for s in samples] == [f"better {n}" for n in range(20) if n % 4 != 1] and source.set_aside.unlabelled == {"no caption for this picture": 3} and not source.set_aside
    assert source.fetch(["cc/000010004"])[0].answer == "better 12" and samples[3].meta == {"url": "x.org/4"}
    before = source.fingerprint()
    (tmp_path / "ccs.json").write_text(json.dumps(pairs[:-1]))
    assert web.Cc12mSource("cc", str(folder), captions=str(tmp_path / "ccs.json")).fingerprint() != before
    for text, message in (("[]", "no record in it has a 'url' and a 'caption'"), (json.dumps(pairs)[:-9], r"ccs\.json: .*byte [\d,]+")):
        (tmp_path / "ccs.json").write_text(text)
        with pytest.raises(ValueError, match=message): list(web.Cc12mSource("cc", str(folder), captions=str(tmp_path / "ccs.json")))


def test_a_table_beside_a_folder_of_pictures(tmp_path):
    "As LAION's own metadata, in capitals, with the key by which img2dataset saved the picture as a file."
    img2dataset(tmp_path / "laion", "files", shards=1)
    rows = pd.read_parquet(tmp_path / "laion/00000.parquet").rename(columns={"url": "URL", "caption": "TEXT"})
    rows.to_parquet(tmp_path / "laion/00000.parquet")
    source = web.Laion400mSource("laion", str(tmp_path / "laion/00000.parquet"))
    assert [s.answer for s in source] == [f"caption {n}" for n in range(8) if n % 4 != 1] and source.set_aside.unlabelled == {"no picture: it was not downloaded": 2} and len(source) == 8
    assert source.fetch(["laion/6"])[0].images[0].encoded() == jpeg(6)


def test_a_wrong_folder_of_pictures_is_no_dead_link(tmp_path):
    (tmp_path / "cc.json").write_text(json.dumps([{"image": f"{i}.jpg", "caption": f"caption {i}"} for i in range(3000)]))
    source = web.Cc12mSource("cc", str(tmp_path / "cc.json"))
    with pytest.raises(ValueError, match="of the first 1,000 pictures not one is in .*check 'images'"): list(source)
    (tmp_path / "2500.jpg").write_bytes(jpeg(1))
    with pytest.raises(ValueError, match="not one"): list(source)
    (tmp_path / "7.jpg").write_bytes(jpeg(1))
    assert [s.id for s in source] == ["cc/7", "cc/2500"] and source.set_aside.unlabelled == {"no picture: it was not downloaded": 2998}


def test_empty_captions_are_set_aside(tmp_path):
    files = [f for i in range(60) for f in ((f"{i:02}.jpg", jpeg(i)), (f"{i:02}.txt", b" \n" if i == 7 else b"\xff\xfe" if i == 9 else b"fine"))]
    pack(tmp_path / "a.tar", files)
    source = web.Laion400mSource("l", str(tmp_path))
    assert len(list(source)) == 58 and source.set_aside.rows == [("a.tar", "07", "empty caption"), ("a.tar", "09", "text is not UTF-8: txt")]


# ---- Hugging Face sets

CHAT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]


def test_columns_are_stated_or_guessed(tmp_path):
    folder = table(tmp_path / "t", conversations=[CHAT] * 30)
    assert web.HfSource("t", str(folder)).columns == {"messages": "conversations", "question": "question", "answer": "answer", "images": ["image"], "id": "id"}
    first = lambda **columns: next(iter(web.HfSource("t", str(folder), columns)))
    assert first(messages="conversations", images="image").messages == (turn("user", "<image>\nWhat?"), turn("assistant", "This."))
    assert first(question="id", answer="answer", images=["image", "image"]).messages[0]["content"] == "<image>\n<image>\nq0"
    assert first(answer="question").images == () and first(answer="answer", images="image").messages[0]["content"] == "<image>\nDescribe the image."
    for columns, message in (({"answer": "anwser"}, "did you mean 'answer'"), ({"images": "image"}, "no column of chats or answers"), ({"answr": "answer"}, "did you mean 'answer'")):
        with pytest.raises(ValueError, match=message): list(web.HfSource("t", str(folder), columns))


def test_our_own_export_is_read_as_it_was(tmp_path):
    rows = [{"id": f"pool/{i}", "source": "pool", "score": 0.5, "rank": i, "messages": [turn("user", "  <image>\nThis\n<image>and that?"), turn("assistant", "Yes. ")], "images": [{"bytes": jpeg(i), "path": "a.jpg"}, {"bytes": jpeg(i + 1), "path": "b.png"}]} for i in range(10)]
    (tmp_path / "data").mkdir()
    for part in (0, 1): pq.write_table(pa.Table.from_pylist(rows[part::2]), tmp_path / f"data/train-{part:05}-of-00002.parquet", row_group_size=2)
    (tmp_path / "README.md").write_text("a card")
    samples = list(web.HfSource("again", str(tmp_path)))
    assert [(s.meta["id"], s.messages, [i.encoded() for i in s.images]) for s in samples] == [(r["id"], tuple(r["messages"]), [i["bytes"] for i in r["images"]]) for r in rows[::2] + rows[1::2]]


def test_splits_are_kept_apart(tmp_path):
    table(tmp_path / "t")
    os.rename(tmp_path / "t/train-00000-of-00001.parquet", tmp_path / "t/test-00000-of-00001.parquet")
    table(tmp_path / "t", rows=4)
    assert len(web.HfSource("t", str(tmp_path / "t"))) == 4 and len(web.HfSource("t", str(tmp_path / "t"), split="test")) == 30
    with pytest.raises(ValueError, match="unknown split 'validation'"): web.HfSource("t", str(tmp_path / "t"), split="validation")
    assert len(web.HfSource("s", str(saved(tmp_path / "s")), split="test")) == 3
    with pytest.raises(ValueError, match="unknown split 'val'"): list(web.HfSource("s", str(tmp_path / "s"), split="val"))


def test_pictures_wait_in_the_file(tmp_path, monkeypatch):
    "Text alone is read without the pictures; neighbours share one read; nothing is kept by the samples."
    folder = table(tmp_path / "t", rows=300, group=100)
    reads, read = [], web._pictures.__wrapped__
    monkeypatch.setattr(web, "_pictures", web.lru_cache(maxsize=4)(lambda *what: reads.append(what[2:]) or read(*what)))
    samples = list(web.HfSource("t", str(folder)))
    assert len(samples) == 300 and not reads
    assert [s.images[0].encoded() for s in samples] == [jpeg(i) for i in range(300)] and reads == [(0, "image"), (1, "image"), (2, "image")]
    assert max(len(pickle.dumps(s)) for s in samples) < 2000


@pytest.mark.parametrize("kind", ["bytes", "list", "named", "missing"])
def test_pictures_in_a_table_in_every_form(kind, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t/pics").mkdir()
    for i in range(6): (tmp_path / f"t/pics/{i}.jpg").write_bytes(jpeg(i))
    cells = {"bytes": lambda i: jpeg(i), "list": lambda i: [{"bytes": jpeg(i), "path": None}] * (i % 3), "named": lambda i: {"bytes": None, "path": f"pics/{i}.jpg"}, "missing": lambda i: {"bytes": jpeg(i), "path": None} if i % 2 else None}[kind]
    pq.write_table(pa.Table.from_pylist([{"question": f"{i}?", "answer": str(i), "image": cells(i)} for i in range(6)]), tmp_path / "t/train.parquet", row_group_size=4)
    counts = {"list": [0, 1, 2, 0, 1, 2], "missing": [0, 1] * 3}.get(kind, [1] * 6)
    source = web.HfSource("t", str(tmp_path / "t"))
    samples = list(source)
    assert [len(s.images) for s in samples] == counts and all(i.encoded() == jpeg(n) for n, s in enumerate(samples) for i in s.images)
    assert [plain(s) for s in source.fetch(["t/5", "t/2"])] == [plain(samples[5]), plain(samples[2])]


def test_a_name_in_a_table_may_not_leave_its_folder(tmp_path):
    (tmp_path / "secret.jpg").write_bytes(jpeg(1))
    (tmp_path / "t").mkdir()
    names = ["../secret.jpg", str(tmp_path / "secret.jpg"), f"{tmp_path}/t/../secret.jpg"]
    pq.write_table(pa.Table.from_pylist([{"answer": "x", "image": {"bytes": None, "path": name}} for name in names]), tmp_path / "t/train.parquet")
    source = web.HfSource("t", str(tmp_path / "t"))
    for record in source.records():
        with pytest.raises(BadSample, match="leaves its folder"): source.parse(record)


def test_damage_in_the_middle_of_a_parquet_file_is_named(tmp_path):
    folder = table(tmp_path / "t", rows=30, group=10)
    file = folder / "train-00000-of-00001.parquet"
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(1)
    content = bytearray(file.read_bytes())
    at = chunk.dictionary_page_offset or chunk.data_page_offset
    content[at:at + 40] = b"\xff" * 40
    file.write_bytes(content)
    samples = web.HfSource("t", str(folder)).samples()
    assert len(list(islice(samples, 10))) == 10
    with pytest.raises(ValueError, match=r"train-00000-of-00001\.parquet: rows 10 to 19, from byte [\d,]+ on, cannot be read"): next(samples)


def test_a_damaged_picture_column_is_the_pictures_failure(tmp_path):
    folder = table(tmp_path / "t", rows=30, group=10)
    file = folder / "train-00000-of-00001.parquet"
    groups = pq.ParquetFile(file).metadata
    chunk = next(c for c in map(groups.row_group(1).column, range(groups.num_columns)) if c.path_in_schema == "image.bytes")
    content = bytearray(file.read_bytes())
    at = chunk.dictionary_page_offset or chunk.data_page_offset
    content[at:at + 40] = b"\xff" * 40
    file.write_bytes(content)
    samples = list(web.HfSource("t", str(folder)))
    assert samples[9].images[0].encoded() == jpeg(9) and samples[20].images[0].encoded() == jpeg(20)
    with pytest.raises(BadSample, match="row 12, image"): samples[12].images[0].open()


def test_a_file_written_anew_is_read_anew(tmp_path):
    folder = table(tmp_path / "t", rows=5)
    assert list(web.HfSource("t", str(folder)))[0].answer == "It is 0."
    table(folder, rows=5, answer=["new"] * 5)
    os.utime(folder / "train-00000-of-00001.parquet", ns=(1, 1))
    assert [s.answer for s in web.HfSource("t", str(folder))] == ["new"] * 5


@pytest.mark.parametrize("kind", ["jsonl", "csv", "imagefolder"])
@pytest.mark.parametrize("streaming", [True, False])
def test_what_the_library_opens_by_a_folder(kind, streaming, tmp_path, monkeypatch):
    "The way of a hub id, on a folder of this machine."
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if kind == "imagefolder": image_folder(tmp_path / "set", "jsonl")
    else:
        (tmp_path / "set").mkdir()
        rows = [{"question": f"{i}?", "answer": f"{i}!"} for i in range(12)]
        if kind == "jsonl": (tmp_path / "set/train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        else: pd.DataFrame(rows).to_csv(tmp_path / "set/train.csv", index=False)
    source = web.HfSource("s", str(tmp_path / "set"), streaming=streaming)
    samples = list(source)
    assert len(samples) == 12 and [plain(s) for s in source.fetch(["s/7", "s/3"])] == [plain(samples[7]), plain(samples[3])]
    if kind == "imagefolder": assert samples[3].images[0].open().size == (40, 30) and samples[3].images[0].encoded() == jpeg(int(samples[3].answer.split(",")[0].split()[1]))
    if streaming:
        with pytest.raises(TypeError, match="not known"): len(source)
    else: assert len(source) == 12


def test_what_cannot_be_opened_is_told_with_the_cure(tmp_path, monkeypatch):
    for path in ("gone.parquet", "data/gone.json", "../gone", str(tmp_path / "gone")):
        with pytest.raises(FileNotFoundError, match="does not exist"): web.HfSource("t", path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, *_, **options: (_ for _ in ()).throw(ConnectionError(f"offline: {path} {options['revision']}")))
    with pytest.raises(ValueError, match="user/set: the datasets library cannot open it: ConnectionError: offline: user/set abc"): list(web.HfSource("t", "user/set", revision="abc"))


# ---- image folders

def test_an_image_folder_that_lacks_a_picture_or_a_text(tmp_path):
    folder = image_folder(tmp_path / "f", "jsonl")
    with open(folder / "metadata.jsonl", "a") as file: file.write("".join("\n" + json.dumps(row) for row in [{"file_name": f"{i:02}.jpg", "text": "again"} for i in range(0, 12, 2)] * 10 + [{"file_name": "gone.jpg", "text": "x"}, {"file_name": "00.jpg"}, {"text": "x"}]))
    source = web.ImageFolderSource("f", str(folder))
    assert len(list(source)) == 72 and list(source.set_aside.reasons()) == ["image file does not exist", "record without text", "no picture is named"]
    with pytest.raises(ValueError, match="is no folder"): web.ImageFolderSource("f", str(folder / "metadata.jsonl"))


def test_a_caption_of_a_megabyte_is_one_bad_record_of_a_csv(tmp_path):
    folder = image_folder(tmp_path / "f", "csv")
    with open(folder / "metadata.csv", "a", newline="") as file: csv.writer(file).writerows([["00.jpg", "fine"]] * 30 + [["00.jpg", "ha " * 350_000]] + [["00.jpg", "fine"]] * 5)
    source = web.ImageFolderSource("f", str(folder))
    assert len(list(source)) == 47 and [record for _, record, _ in source.set_aside.rows] == ["42"] and "100,000 characters" in source.set_aside.rows[0][2]
