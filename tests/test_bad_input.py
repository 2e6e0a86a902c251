"""Every kind of bad input against every reader it applies to: a bad record is set aside with file, record and reason, and the run goes on; a damaged file is named with byte, row or episode.

A reader joins by a kit: how to write a small data set of good records in its format, with one that is bad. Kits of other test files are found by themselves: any `tests/test_sources_*.py` may define `KITS`, a dict of
name -> `Chats(write, ...)` or `Robots(write, ...)`, made with `from test_bad_input import Chats, Robots`."""
import base64, importlib, io, json, os, re, shutil, struct, tarfile, zipfile, zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable

import numpy as np
import PIL.Image
import pytest

from embodied_midtrain.core import read_table
from embodied_midtrain.samples import BadSample
from embodied_midtrain.sources.base import open_source


@dataclass(frozen=True)
class Chats:
    "A format of images and text."
    write: Callable         # (folder, rows) -> spec for open_source; a row is a Row
    cannot: tuple = ()      # names of RECORDS that cannot occur in the format (say why)
    damage: dict = field(default_factory=dict)  # name -> (function(folder) that damages what was written, pattern of the error)


@dataclass(frozen=True)
class Robots:
    "A format of episodes."
    write: Callable         # (folder, episodes) -> spec for open_source; an episode is (instruction, actions (T, 7) with the gripper in 0..1, 1 = open)
    cannot: tuple = ()      # names of EPISODES that cannot occur in the format (say why)
    damage: dict = field(default_factory=dict)  # as above


@dataclass(frozen=True)
class Row:
    "One question about one picture, as a kit is asked to write it."
    key: str
    image: bytes | None     # None: it is named and not there
    question: str | bytes = "What is it?"   # bytes: not UTF-8
    answer: str = "A wall."
    marks: int = 1          # how often <image> stands in the question, where a format has marks
    name: str = None        # of the picture, if not one made of the key
    without: bool = False   # leave out the field that holds the question

    @property
    def file(self): return self.name or f"{self.key}.jpg"

    @property
    def asked(self): return "<image>\n" * self.marks + self.question


def encoded(image, format="JPEG", **options):
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def png_claiming(width, height):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


RED = PIL.Image.new("RGB", (48, 32), (200, 30, 30))
RED.paste((30, 30, 200), (0, 0, 24, 32))  # blue on the left
JPEG = encoded(RED, quality=95)
EXIF = PIL.Image.Exif()
EXIF[0x0112] = 6  # to be shown turned by 90 degrees

RECORDS = {  # what is wrong -> how a good row becomes bad, and the reason it must get
    "a missing key": (lambda r: replace(r, without=True), r"\w"),
    "an image path that does not exist": (lambda r: replace(r, image=None), "does not exist|no picture|not base64: None|marks and images differ"),
    "an image path that escapes": (lambda r: replace(r, name="../../escape.jpg"), "leaves its folder|duplicate id: .*escape"),
    "an empty text": (lambda r: replace(r, answer=" \n"), "empty"),
    "a text that is not UTF-8": (lambda r: replace(r, question=b"caf\xe9 \xff\xfe"), "UTF-8|Unicode|utf-8|JSON"),
    "a text of 1 MB": (lambda r: replace(r, answer="ha " * 350_000), "100,000 characters|choices are no list"),
    "more marks than images": (lambda r: replace(r, marks=2), "marks and images differ"),
    "a duplicate id": (lambda r: replace(r, key="k3"), "duplicate id"),
}
PICTURES = {  # found when the picture is opened
    "a zero-byte JPEG": (b"", "cannot be decoded|is empty"),
    "a corrupt JPEG": (JPEG[:len(JPEG) // 2], "cannot be decoded"),
    "a PNG bomb": (png_claiming(50_000, 50_000), "cannot be decoded.*Bomb|more than"),
    "no picture": (b"<html>404</html>", "cannot be decoded"),
}
UNUSUAL = {  # converted: the picture, its size when upright, and whether it keeps its colours
    "CMYK": (encoded(RED.convert("CMYK"), quality=95), (48, 32), True),
    "16 bit": (encoded(PIL.Image.fromarray(np.linspace(0, 65535, 32 * 48).reshape(32, 48).astype(np.uint16)), "PNG"), (48, 32), False),
    "palette": (encoded(RED.quantize(8), "PNG"), (48, 32), True),
    "animated": (encoded(RED, "GIF", save_all=True, append_images=[PIL.Image.new("RGB", RED.size)]), (48, 32), True),
    "EXIF rotation": (encoded(RED, quality=95, exif=EXIF), (32, 48), False),
}


# ---- kits of the chat readers

def put(folder, row):
    if row.image is not None and ".." not in row.file:
        (folder / row.file).parent.mkdir(parents=True, exist_ok=True)
        (folder / row.file).write_bytes(row.image)


def dumped(value):
    "JSON of a value in which bytes are text that is not UTF-8."
    if isinstance(value, dict): return b"{" + b", ".join(json.dumps(k).encode() + b": " + dumped(v) for k, v in value.items()) + b"}"
    if isinstance(value, list): return b"[" + b", ".join(map(dumped, value)) + b"]"
    if isinstance(value, bytes): return b'"' + value + b'"'
    return json.dumps(value).encode()


def asked(row): return row.question if isinstance(row.question, bytes) else row.asked


def llava_value(row, image=None):
    turns = [{"from": "human", "value": asked(row)}, {"from": "gpt", "value": row.answer}]
    return {"id": row.key, "image": image or row.file} | ({} if row.without else {"conversations": turns})


def messages_value(row):
    turns = [{"role": "user", "content": asked(row)}, {"role": "assistant", "content": row.answer}]
    return {"images": [row.file]} | ({} if row.without else {"messages": turns})


def parts_value(row):
    parts = [{"type": "image", "image": row.file}] * row.marks + [{"type": "text", "text": row.question}]
    return {} if row.without else {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": row.answer}]}


def write_json(reader, value, lines=False, folder_of=lambda folder: folder, name="list.json"):
    def write(folder, rows):
        for row in rows: put(folder_of(folder), row)
        values = [dumped(value(row)) for row in rows]
        (folder / name).write_bytes(b"\n".join(values) if lines else b"[" + b",\n".join(values) + b"]")
        return {"reader": reader, "name": "x", "path": str(folder / name)}
    return write


def write_665k(folder, rows):
    spec = write_json("llava665k", lambda row: llava_value(row, f"coco/{row.file}"), lines=True, folder_of=lambda folder: folder / "coco")(folder, rows)
    (folder / "coco").mkdir(exist_ok=True)
    return spec


def write_archived(kind):
    "Pictures in an archive beside a JSON file."
    def write(folder, rows):
        content = {row.file: row.image for row in rows if row.image is not None}
        if kind == "zip":
            with zipfile.ZipFile(archive := folder / "images.zip", "w") as packed:
                for name, image in content.items(): packed.writestr(name, image)
        else: archive = tarred(folder / f"images.{kind}", content.items(), "w:gz" if kind == "tar.gz" else "w")
        write_json("llava", llava_value, lines=True, folder_of=lambda folder: folder / "unused")(folder, rows)
        shutil.rmtree(folder / "unused", ignore_errors=True)
        return {"reader": "llava", "name": "x", "path": str(folder / "list.json"), "images": str(archive)}
    return write


def write_refspatial(folder, rows):
    (folder / "2D/image").mkdir(parents=True)
    write_json("refspatial", llava_value, lines=True, folder_of=lambda folder: folder / "image", name="choice_qa.json")(folder / "2D", rows)
    return {"reader": "refspatial", "name": "x", "path": str(folder)}


def cut(*names, at=0.6):
    "A file that ends too early."
    def damage(folder):
        file = next(f for name in names for f in sorted(folder.rglob(name)))
        file.write_bytes(file.read_bytes()[:int(file.stat().st_size * at)])
    return damage


def spoil(name, old, new):
    def damage(folder):
        file = next(iter(sorted(folder.rglob(name))))
        content = file.read_bytes()
        assert old in content
        file.write_bytes(content.replace(old, new, 1))
    return damage


PLACE = ("a duplicate id",)  # a record's key is its place in the file, so no two are the same
LIST = PLACE + ("a text that is not UTF-8",)  # a JSON list with it is damaged as a whole, below
LIST_DAMAGE = {
    "cut short": (cut("*.json"), r"list\.json: .*cut short.*byte [\d,]+"),
    "not JSON": (spoil("*.json", b'"id": "k7"', b'"id" "k7"'), r"list\.json: .*byte [\d,]+"),
    "not UTF-8": (spoil("*.json", b"What is it?", b"caf\xe9 \xff"), r"list\.json: not UTF-8 at byte [\d,]+"),
}
KITS = {
    "llava": Chats(write_json("llava", llava_value), LIST, LIST_DAMAGE),
    "llava lines": Chats(write_json("llava", llava_value, lines=True), PLACE),
    "messages": Chats(write_json("messages", messages_value, lines=True), PLACE),
    "messages in parts": Chats(write_json("messages", parts_value, lines=True), PLACE + ("more marks than images",)),  # an image is its own mark
    "llava665k": Chats(write_665k, PLACE),
    "refspatial": Chats(write_refspatial, PLACE),
    "robopoint": Chats(write_json("robopoint", llava_value, name="robopoint_1432k.json"), LIST, {"cut short": (cut("*.json"), r"robopoint_1432k\.json: .*byte [\d,]+")}),
    "pictures in a tar": Chats(write_archived("tar"), PLACE, {"a tar cut short": (cut("*.tar"), r"images\.tar: cut short.*byte [\d,]+"), "no tar": (spoil("*.tar", b"k0.jpg", b"k?.jpg"), r"images\.tar: no header of a tar at byte 0")}),
    "pictures in a tar.gz": Chats(write_archived("tar.gz"), PLACE, {"a tar.gz cut short": (cut("*.tar.gz"), r"images\.tar\.gz: .*byte [\d,]+")}),
    "pictures in a zip": Chats(write_archived("zip"), PLACE, {"a zip cut short": (cut("*.zip"), r"images\.zip: .*byte [\d,]+")}),
}


# ---- kits of the readers of web data and of questions

def caption(row): return row.question if isinstance(row.question, bytes) else row.answer


def tarred(path, files, mode="w"):
    with tarfile.open(path, mode) as packed:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return path


def write_webdataset(folder, rows):
    "KEY.jpg and KEY.json, of which a name that escapes is one for both."
    files = []
    for row in rows:
        stem = row.file.removesuffix(".jpg") if row.name else row.key
        value = {} if row.without else {"conversations": llava_value(row)["conversations"]}
        files += [(f"{stem}.jpg", row.image)] * (row.image is not None) + [(f"{stem}.json", dumped(value))]
    tarred(folder / "00000.tar", files)
    return {"reader": "webdataset", "name": "x", "path": str(folder / "00000.tar")}


def write_img2dataset(folder, rows):
    "KEY.jpg, KEY.txt, KEY.json in a tar."
    files = []
    for row in rows:
        stem = row.file.removesuffix(".jpg") if row.name else row.key
        files += [(f"{stem}.jpg", row.image)] * (row.image is not None) + [(f"{stem}.json", b'{"url": "x.org", "status": "success"}')] + ([] if row.without else [(f"{stem}.txt", caption(row) if isinstance(caption(row), bytes) else caption(row).encode())])
    tarred(folder / "00000.tar", files)
    return {"reader": "laion400m", "name": "x", "path": str(folder / "00000.tar")}


def listed(reader, path=lambda folder: folder / "metadata.jsonl"):
    "Lines of picture and caption, beside the pictures."
    def write(folder, rows):
        for row in rows: put(folder, row)
        (folder / "metadata.jsonl").write_bytes(b"\n".join(dumped({"file_name": row.file} | ({} if row.without else {"text": caption(row)})) for row in rows))
        return {"reader": reader, "name": "x", "path": str(path(folder))}
    return write


def parquet(reader, name, row_of):
    def write(folder, rows):
        import pyarrow as pa, pyarrow.parquet as pq
        (folder / "data").mkdir()
        pq.write_table(pa.Table.from_pylist(list(map(row_of, rows))), folder / "data" / name, row_group_size=16)
        return {"reader": reader, "name": "x", "path": str(folder / "data")}
    return write


def cell(row): return None if row.image is None else {"bytes": row.image, "path": None}
def hf_row(row): return {"id": row.key, "question": None if row.without else asked(row), "answer": row.answer, "image": cell(row)}
def robo2vlm_row(row): return {"id": row.key, "question": None if row.without else row.question, "choices": repr([row.answer, "No."]), "correct_answer": 0, "image": cell(row)}


def write_vcr(folder, rows):
    for row in rows: put(folder / "vcr1images", row)
    value = lambda row: {"objects": ["person"], "img_fn": row.file, "metadata_fn": "x.json", "annot_id": row.key, "answer_choices": [["No"], row.answer.split(" ") if row.answer.strip() else [row.answer]], "answer_label": 1,
        "rationale_choices": [["So", "."]], "rationale_label": 0} | ({} if row.without else {"question": [row.question, [0], "?"]})
    (folder / "train.jsonl").write_bytes(b"\n".join(dumped(value(row)) for row in rows))
    return {"reader": "vcr", "name": "x", "path": str(folder / "train.jsonl")}


def embspatial_value(row):
    image = {} if row.image is None else {"image": base64.b64encode(row.image).decode()}
    return {"question_id": row.key, "answer": row.answer, **image} | ({} if row.without else {"question": [row.question] * 5})


MARKS, INSIDE = ("more marks than images",), ("an image path that escapes",)  # no marks in the text, and pictures that have no names
GONE = ("an image path that does not exist",)  # of a caption whose download failed: counted as absent, no failure
CELLS = PLACE + INSIDE + ("a text that is not UTF-8",)  # Parquet holds no such text
PARQUET = {"a parquet file cut short": (cut("*.parquet"), r"\.parquet: .*(byte|row) [\d,]+")}
TAR = {"a tar cut short": (cut("*.tar"), r"00000\.tar: .*byte [\d,]+")}
KITS |= {
    "webdataset": Chats(write_webdataset, GONE, TAR),
    "laion400m": Chats(write_img2dataset, MARKS + GONE, TAR),
    "imagefolder": Chats(listed("imagefolder", lambda folder: folder), MARKS + PLACE),
    "cc12m": Chats(listed("cc12m"), MARKS + PLACE + GONE),
    "hf": Chats(parquet("hf", "train-00000-of-00001.parquet", hf_row), CELLS, PARQUET),
    "robo2vlm": Chats(parquet("robo2vlm", "train-00000-of-00001.parquet", robo2vlm_row), CELLS + MARKS + ("an empty text",), PARQUET),  # an answer has at least its letter
    "vcr": Chats(write_vcr, MARKS + PLACE),
    "embspatial": Chats(write_json("embspatial", embspatial_value, folder_of=lambda folder: folder / "unused"), MARKS + INSIDE + LIST, {"cut short": LIST_DAMAGE["cut short"]}),
}


# ---- kits of the robot readers that have their builders in their own test files

def robot_kits():
    try: from test_sources_robots import KINDS
    except pytest.skip.Exception: return {"lerobot": Robots(write_lerobot)}
    def write(kind):
        def write(folder, episodes):
            make, reader, opened = KINDS[kind]
            own = [(text, np.column_stack([a[:, :6], a[:, 6] if kind == "bridge" else opened * (2 * a[:, 6] - 1)])) for text, a in episodes]
            return {"reader": f"{reader.__module__}:{reader.__name__}", "name": "x", "path": str(make(folder, own))}
        return write
    records = {"a tfrecord cut short": (cut("*.tfrecord-*"), r"tfrecord.*cut short.*byte [\d,]+"), "a tfrecord's length": (flip_byte("*.tfrecord-*", 9), r"tfrecord.*no TFRecord at byte 0")}
    damage = {
        "bridge": records | {"every checksum": (flip_all, "12 of 12 records .*does not match its checksum: bytes")},
        "libero_rlds": records,
        "calvin": {"a pickle that runs code": (evil_pickle, r"auto_lang_ann\.npy: refused: .*could run code"), "a pickle cut short": (cut("auto_lang_ann.npy"), r"auto_lang_ann\.npy: .*byte [\d,]+")},
        "libero_hdf5": {"an HDF5 file cut short": (cut("*.hdf5"), r"_demo\.hdf5: no HDF5 file, or cut short at byte [\d,]+")},
    }
    return {kind: Robots(write(kind), damage=damage[kind]) for kind in KINDS} | {"lerobot": Robots(write_lerobot)}


def write_lerobot(folder, episodes):
    "Version 2.1 in its documented layout, with the camera as images in the table."
    import pyarrow as pa, pyarrow.parquet as pq
    features = {"action": {"dtype": "float32", "shape": [7]}, "front": {"dtype": "image", "shape": [32, 48, 3]}, "timestamp": {"dtype": "float32", "shape": [1]}}
    (folder / "meta").mkdir(), (folder / "data/chunk-000").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps({"codebase_version": "v2.1", "fps": 10, "chunks_size": 1000, "features": features, "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet", "video_path": None}))
    (folder / "meta/tasks.jsonl").write_text("\n".join(json.dumps({"task_index": i, "task": text}) for i, (text, _) in enumerate(episodes)))
    (folder / "meta/episodes.jsonl").write_text("\n".join(json.dumps({"episode_index": i, "tasks": [text], "length": len(a)}) for i, (text, a) in enumerate(episodes)))
    for i, (_, actions) in enumerate(episodes):
        T = len(actions)
        columns = {"action": pa.FixedSizeListArray.from_arrays(pa.array(actions.astype(np.float32).ravel()), 7), "front": pa.array([{"bytes": JPEG, "path": "x.jpg"}] * T, pa.struct({"bytes": pa.binary(), "path": pa.string()})),
                   "timestamp": pa.array(np.arange(T, dtype=np.float32) / 10), "episode_index": pa.array([i] * T, pa.int64()), "task_index": pa.array([i] * T, pa.int64()), "frame_index": pa.array(range(T), pa.int64())}
        pq.write_table(pa.table(columns), folder / f"data/chunk-000/episode_{i:06d}.parquet")
    return {"reader": "lerobot", "name": "x", "path": str(folder), "gripper": [0, 1]}


def flip_byte(name, at):
    def damage(folder):
        file = next(iter(sorted(folder.rglob(name))))
        content = bytearray(file.read_bytes())
        content[at] ^= 1
        file.write_bytes(content)
    return damage


def flip_all(folder):
    "One bit in the bytes of every record of a tfrecord file."
    from embodied_midtrain.sources.rlds import record_spans
    file = next(folder.rglob("*.tfrecord-*"))
    content = bytearray(file.read_bytes())
    for at, length in record_spans(file): content[at + length // 2] ^= 1
    file.write_bytes(content)


class Evil:
    "What makes a folder named ran when it is loaded by a plain pickle."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder / "ran"),)


def evil_pickle(folder): np.save(next(folder.rglob("auto_lang_ann.npy")), np.array({"language": Evil(folder)}, object), allow_pickle=True)


def all_kits():
    kits = KITS | robot_kits()
    for file in sorted(Path(__file__).parent.glob("test_sources_*.py")):
        try: kits |= getattr(importlib.import_module(file.stem), "KITS", {})
        except pytest.skip.Exception: pass
    return kits


def pytest_generate_tests(metafunc):
    kinds = {"chats": (Chats, RECORDS), "pictures": (Chats, PICTURES), "unusual": (Chats, UNUSUAL), "robots": (Robots, EPISODES)}
    for argument, (kind, faults) in kinds.items():
        if argument in metafunc.fixturenames:
            cases = [(kit, fault) for name, kit in all_kits().items() for fault in faults if isinstance(kit, kind) and fault not in kit.cannot]
            names = [f"{name}-{fault}" for name, kit in all_kits().items() for fault in faults if isinstance(kit, kind) and fault not in kit.cannot]
            metafunc.parametrize(argument, cases, ids=names)
    if "damaged" in metafunc.fixturenames:
        cases = {f"{name}-{what}": (kit, *how) for name, kit in all_kits().items() for what, how in kit.damage.items()}
        metafunc.parametrize("damaged", cases.values(), ids=cases)


def rows(bad=lambda row: row, at=30, count=80):
    "Good rows with one that is changed."
    good = [Row(f"k{i}", JPEG) for i in range(count)]
    return good[:at] + [bad(good[at])] + good[at + 1:]


# ---- the tests

def new(folder): return folder.mkdir() or folder


def test_a_bad_record_is_set_aside(chats, tmp_path):
    kit, fault = chats
    change, reason = RECORDS[fault]
    source = open_source(kit.write(tmp_path, rows(change)))
    samples = list(source)
    assert len(samples) == 79 and [s.images[0].open().size for s in samples[::30]] == [(48, 32)] * 3
    source.set_aside.write(tmp_path / "rejected.parquet")
    aside = list(read_table(tmp_path / "rejected.parquet").itertuples(index=False))
    assert len(aside) == source.read - 79 >= 1 and sum(source.set_aside.reasons().values()) == len(aside)
    for file, record, why in aside: assert re.search(reason, why) and record and Path(file).suffix and len(why) < 400
    few = open_source(kit.write(new(tmp_path / "few"), rows(change, at=5, count=8)))
    with pytest.raises(ValueError, match=r"\d of \d+ records \(\d\d%\) cannot be used, more than 5%"): list(few)


def test_a_bad_picture_is_told(pictures, tmp_path):
    "When it is opened, or by a reader that looks at its bytes before."
    kit, fault = pictures
    content, reason = PICTURES[fault]
    source = open_source(kit.write(tmp_path, rows(lambda r: replace(r, image=content))))
    told = [why for s in source if (why := unopened(s))] + [why for *_, why in source.set_aside.rows]
    assert len(told) == 1 and re.search(reason, told[0], re.S) and source.read == 80


def unopened(sample):
    try: assert sample.images[0].open().size == (48, 32)
    except BadSample as reason: return str(reason)


def test_unusual_pictures_are_converted(unusual, tmp_path):
    kit, kind = unusual
    content, size, coloured = UNUSUAL[kind]
    pictures = [s.images[0].open() for s in open_source(kit.write(tmp_path, rows(lambda r: replace(r, image=content))))]
    (picture,) = [p for p in pictures if p.tobytes() != pictures[0].tobytes()] or [pictures[30]]
    assert len(pictures) == 80 and picture.mode == "RGB" and picture.size == size
    if coloured: assert np.abs(np.asarray(picture, int)[:, ::40] - np.asarray(RED, int)[:, ::40]).max() < 40
    if kind == "16 bit": assert np.ptp(np.asarray(picture)) > 250
    if kind == "EXIF rotation": assert np.asarray(picture)[2, 16, 2] > 150 > np.asarray(picture)[-3, 16, 2], "what was left is above"


def arm(T): return np.column_stack([np.linspace(0.01, 0.5, 6 * T).reshape(T, 6), np.ones(T)])


def with_value(value): return lambda: ("lift the spoon", np.where(np.arange(28).reshape(4, 7) == 9, value, arm(4)))


EPISODES = {  # what is wrong -> the bad episode, and the reason it must get; None: counted as without instruction
    "an action that is not a number": (with_value(np.nan), "not finite"),
    "an infinite action": (with_value(np.inf), "not finite"),
    "an episode of length 0": (lambda: ("lift the spoon", arm(0)), "step|frame|empty"),
    "an episode of length 1": (lambda: ("lift the spoon", arm(1)), "fewer than 2 steps"),
    "an instruction of 1 MB": (lambda: ("lift " * 200_000, arm(4)), "100,000 characters"),
    "an empty instruction": (lambda: (" ", arm(4)), None),
}


def test_a_bad_episode_is_set_aside(robots, tmp_path):
    kit, fault = robots
    bad, reason = EPISODES[fault]
    source = open_source(kit.write(tmp_path, [("lift the spoon", arm(3))] * 30 + [bad()] + [("lift the spoon", arm(3))] * 9))
    lengths = [3] * 39
    assert [len(e) for e in source.episodes()] == lengths == [len(a) for a in source.actions()] and len(list(source)) == sum(lengths)
    if not reason:
        assert source.set_aside.unlabelled == {"no instruction": 1} and not source.set_aside
        return
    (file, record, why), = source.set_aside.rows
    assert re.search(reason, why) and file and record and len(why) < 400


def test_a_damaged_file_is_named(damaged, tmp_path):
    kit, damage, pattern = damaged
    good = [Row(f"k{i}", JPEG) for i in range(40)] if isinstance(kit, Chats) else [("lift the spoon", arm(3))] * 12
    spec = kit.write(tmp_path, good)
    damage(tmp_path)
    with pytest.raises(ValueError, match=pattern): list(open_source(spec))
    assert not (tmp_path / "ran").exists()
