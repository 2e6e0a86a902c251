"Archives read in place: the walk agrees with the standard library's, damage is named to the byte, nothing escapes, and a picture is found in any packaging."
import io, multiprocessing, os, pickle, random, sys, tarfile, tracemalloc, zipfile

import pytest

from embodied_midtrain import archives
from embodied_midtrain.archives import Archive, Joined, Member, archive_parts, find_image, open_roots, tar_members
from embodied_midtrain.samples import BadSample

RANDOM = random.Random(0)
FILES = {f"set/{'deep/' * (i % 3)}{i}{'é' * (i % 2)}.jpg": RANDOM.randbytes(RANDOM.choice([0, 1, 511, 512, 513, 5000])) for i in range(40)} | {"set/" + "long/" * 60 + "name.jpg": b"long", "set/empty": b""}


def tar_bytes(files, mode="w", **options):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode=mode, **options) as tar:
        for name, content in files.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(content, bytes): info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return file.getvalue()


def special(name, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def walk(content, size=None): return list(tar_members(lambda at, length: content[at:at + length], "x.tar", size))


def zip_bytes(files, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as packed:
        for name, content in files.items(): packed.writestr(name, content)
    return file.getvalue()


def split(content, parts, folder, stem):
    step = -(-len(content) // len(parts))
    for i, part in enumerate(parts): (folder / f"{stem}{part}").write_bytes(content[i * step:(i + 1) * step])
    return folder / stem


# ---- tars

@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_walk_agrees_with_the_standard_library(format):
    folder = tarfile.TarInfo("set/folder")
    folder.type = tarfile.DIRTYPE
    content = tar_bytes(FILES | {"set/folder": folder, "set/link": special("set/link", tarfile.SYMTYPE), "z": b"last", "set/hard": special("h" * 300, tarfile.LNKTYPE)}, format=format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar: expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    members = walk(content, len(content))
    assert [m[:3] for m in members if not m.refused] == expected and len(expected) == len(FILES) + 1
    assert {m.name: content[m.at:m.at + m.length] for m in members if not m.refused} == FILES | {"z": b"last"}
    assert len([m for m in members if m.refused]) == 2


@pytest.mark.parametrize("name, kind", [("../a.jpg", None), ("a/../../b.jpg", None), ("/abs.jpg", None), ("C:\\a.jpg", None), ("..\\a.jpg", None),
    ("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("c", tarfile.CHRTYPE), ("b", tarfile.BLKTYPE), ("f", tarfile.FIFOTYPE)])
def test_members_that_escape_are_refused(name, kind, tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_bytes({"good.jpg": b"good", name: special(name, kind) if kind else b"evil", "after.jpg": b"after"}))
    archive = Archive(tmp_path / "x.tar")
    refused = [m for m in archive.members() if m.refused]
    assert len(refused) == 1 and archive.index["refused"].tolist() == [refused[0].refused]
    with pytest.raises(BadSample): archive.read(refused[0])
    assert archive.find("good.jpg").encoded() == b"good" and archive.find("after.jpg").encoded() == b"after" and len(archive.index["table"]) == 2
    try: assert archive.find(name) is None
    except BadSample: pass


def test_any_cut_of_a_tar_is_noticed():
    content = tar_bytes(dict(list(FILES.items())[:6]))
    members = walk(content)
    end = members[-1].at + -(-members[-1].length // 512) * 512  # where the end mark begins
    for cut in range(0, end + 512, 61):
        with pytest.raises(ValueError, match=r"x\.tar: cut short.*byte"): walk(content[:cut], cut)
        with pytest.raises(ValueError, match=r"x\.tar: cut short.*byte"): walk(content[:cut])
    assert walk(content[:end + 512]) == members


def test_a_damaged_header_names_its_byte():
    content = bytearray(tar_bytes(FILES, format=tarfile.GNU_FORMAT))
    at = walk(content)[7].at - 512
    content[at + 3] ^= 1
    with pytest.raises(ValueError, match=f"no header of a tar at byte {at:,}"): walk(content)


def test_no_damage_crashes_or_hangs():
    content = tar_bytes(dict(list(FILES.items())[:8]) | {"n" * 200: b"x"})
    for _ in range(3000):
        block = RANDOM.randrange(len(content) // 512) * 512
        header = bytearray(content[block:block + 512])
        header[RANDOM.randrange(160)] = RANDOM.randrange(256)
        if RANDOM.random() < .7:  # with a right checksum, so that the damage gets further
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        bad = content[:block] + bytes(header) + content[block + 512:]
        try: assert len(walk(bad, len(bad))) < 100
        except ValueError as error: assert "byte" in str(error)


def test_negative_sizes_are_refused():
    header = bytearray(tar_bytes({"a": b"b"})[:512])
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(ValueError, match="byte 0"): walk(bytes(header) + bytes(1024))
    evil = tarfile.TarInfo("a")
    evil.pax_headers = {"size": "-512"}
    with pytest.raises(ValueError, match="byte 0"): walk(tar_bytes({"a": evil}, format=tarfile.PAX_FORMAT))


# ---- compressed and split

PACKAGINGS = {
    "tar": lambda folder: split(tar_bytes(FILES), [""], folder, "x.tar"),
    "tar in parts": lambda folder: split(tar_bytes(FILES), [".part_aa", ".part_ab", ".part_ac"], folder, "x.tar"),
    "tar.gz": lambda folder: split(tar_bytes(FILES, "w:gz"), [""], folder, "x.tar.gz"),
    "tar.gz in parts": lambda folder: split(tar_bytes(FILES, "w:gz"), [".part_a", ".part_b"], folder, "x.tar.gz"),
    "tgz in numbered parts": lambda folder: split(tar_bytes(FILES, "w:gz"), [".001", ".002", ".003"], folder, "x.tgz"),
    "zip": lambda folder: split(zip_bytes(FILES), [""], folder, "x.zip"),
    "zip stored, in parts": lambda folder: split(zip_bytes(FILES, zipfile.ZIP_STORED), [".00", ".01"], folder, "x.zip"),
}


def contents(archive): return {name: archive.find(name).encoded() for name in reversed(FILES)}


def read_one(image): return image.encoded()


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_a_picture_is_found_in_any_packaging(packaging, tmp_path):
    archive = Archive(PACKAGINGS[packaging](tmp_path))
    assert contents(archive) == FILES and archive.find("set/nothing") is None
    assert archive.find("0.jpg").encoded() == FILES["set/0.jpg"]   # the folder that all share may be left out
    assert {m.name: archive.read(m) for m in archive.members()} == FILES
    image = archive.find("set/1é.jpg" if "set/1é.jpg" in FILES else "set/deep/1é.jpg")
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool: assert pool.map(read_one, [image, pickle.loads(pickle.dumps(image))]) == [image.encoded()] * 2


def test_without_the_extra_a_compressed_tar_is_read_in_order(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "indexed_gzip", None)
    with pytest.warns(UserWarning, match=r"embodied-midtrain\[archives\]"): assert contents(Archive(PACKAGINGS["tar.gz in parts"](tmp_path))) == FILES


@pytest.mark.parametrize("extra", [True, False])
def test_any_cut_of_a_compressed_tar_is_noticed(extra, tmp_path, monkeypatch, recwarn):
    if not extra: monkeypatch.setitem(sys.modules, "indexed_gzip", None)
    content = tar_bytes(FILES, "w:gz")
    for n, cut in enumerate(range(0, len(content) - 100, 9001)):
        (tmp_path / f"{n}.tar.gz").write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"{n}\.tar\.gz: .*byte"): Archive(tmp_path / f"{n}.tar.gz").index
    (tmp_path / "text.tar.gz").write_bytes(b"\x1f\x8b but no gzip")
    with pytest.raises(ValueError, match=r"text\.tar\.gz: .*byte"): Archive(tmp_path / "text.tar.gz").index


def test_parts_that_are_missing_are_told(tmp_path):
    PACKAGINGS["tar in parts"](tmp_path)
    assert archive_parts(tmp_path / "x.tar") == archive_parts(tmp_path / "x.tar.part_ab") == tuple(tmp_path / f"x.tar.part_{s}" for s in ("aa", "ab", "ac"))
    (tmp_path / "x.tar.part_aa").unlink()
    with pytest.raises(ValueError, match=r"x\.tar: .* part 1 is missing"): Archive(tmp_path / "x.tar")
    with pytest.raises(FileNotFoundError, match="y.tar does not exist"): Archive(tmp_path / "y.tar")
    (tmp_path / "z.tar.part_aa").write_bytes(tar_bytes(FILES)[:5000])  # the last part is missing, which only reading can tell
    with pytest.raises(ValueError, match=r"z\.tar\.part_aa: cut short.*byte"): Archive(tmp_path / "z.tar").index
    for name in ("a.tar.gz", "b.tgz", "c.zip", "d.tar.xz"):
        (tmp_path / name).write_bytes(b"x")
        assert archive_parts(tmp_path / name) == (tmp_path / name,)


def test_of_two_members_of_one_name_the_last_is_taken(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for content in (b"old", b"new!"):
            info = tarfile.TarInfo("./a.jpg")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert Archive(tmp_path / "x.tar").find("a.jpg").encoded() == b"new!"


@pytest.mark.parametrize("packaging", ["tar", "tar.gz in parts", "zip"])
def test_a_kept_index_is_used_until_the_archive_changes(packaging, tmp_path, monkeypatch):
    path, kept = PACKAGINGS[packaging](tmp_path), tmp_path / "kept"
    assert contents(Archive(path, kept)) == FILES
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "members", lambda self: pytest.fail("walked again"))
        archives._unzipped.cache_clear()  # as in another process
        assert contents(Archive(path, kept)) == FILES
    os.utime(archive_parts(path)[0], (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Archive, "members", lambda self: iter([Member("other", 0, 1)]))
        assert Archive(path, kept).find("set/0.jpg") is None
    assert not list(tmp_path.glob("*.npz")), "nothing is written beside the archive"


def test_an_index_is_small():
    members = (Member(f"RefSpatial/2D/image/{i:012}.jpg", i * 40_000, 39_000) for i in range(100_000))
    tracemalloc.start()
    try: index, peak = archives._index(members), tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert index["table"].nbytes == 2_400_000 and peak < 12e6 and str(index["folder"]) == "RefSpatial/2D/image"


# ---- zips

def test_what_a_zip_may_not_hold(tmp_path, monkeypatch):
    link = zipfile.ZipInfo("link.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as packed:
        packed.writestr(link, "/etc/passwd")
        packed.writestr("../up.jpg", b"x")
        packed.writestr("rare.jpg", b"x" * 99, zipfile.ZIP_LZMA)
        packed.writestr("folder/", b"")
        packed.writestr("bomb.jpg", bytes(10**6), zipfile.ZIP_DEFLATED)
    archive = Archive(tmp_path / "x.zip")
    assert [bool(m.refused) for m in archive.members()] == [True, True, True, False] and archive.find("rare.jpg") is None
    assert len(archive.find("bomb.jpg").encoded()) == 10**6
    monkeypatch.setattr(archives, "LARGEST", 10**5)
    with pytest.raises(BadSample, match="larger than"): archive.find("bomb.jpg").encoded()


def test_damaged_zips(tmp_path):
    content = zip_bytes(FILES)
    for n, cut in enumerate((0, 3, 100, len(content) // 2, len(content) - 30)):
        (tmp_path / f"{n}.zip").write_bytes(content[:cut] if cut > 3 else b"PK\3\4")
        with pytest.raises(ValueError, match=rf"{n}\.zip: .*byte"): Archive(tmp_path / f"{n}.zip").index
    for _ in range(300):
        bad = bytearray(content)
        bad[RANDOM.randrange(len(bad))] ^= 1 << RANDOM.randrange(8)
        (tmp_path / "bad.zip").write_bytes(bad)
        try: members = list((archive := Archive(tmp_path / "bad.zip")).members())
        except ValueError: continue
        for member in members:
            try: archive.read(member)
            except BadSample: pass


def test_other_packings_are_told(tmp_path):
    for mode in ("w:xz", "w:bz2"):
        (tmp_path / "x.tar").write_bytes(tar_bytes(FILES, mode))
        with pytest.raises(ValueError, match="pack it again"): Archive(tmp_path / "x.tar")


# ---- roots

def test_prefixes_lists_and_order(tmp_path):
    for name, content in (("one", b"1"), ("two", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(content)
    (tmp_path / "two/b.jpg").write_bytes(b"b")
    (tmp_path / "x.tar").write_bytes(tar_bytes({"train/a.jpg": b"tar"}))
    one, two, tar = (str(tmp_path / n) for n in ("one", "two", "x.tar"))
    assert [find_image("a.jpg", open_roots(roots)).encoded() for roots in (one, [two, one], [tar, one])] == [b"1", b"2", b"tar"]
    roots = open_roots({"coco": tar, "own/": [one, two]})
    assert find_image("coco/train/a.jpg", roots).encoded() == b"tar" and find_image("own/b.jpg", roots).encoded() == b"b"
    for name in ("a.jpg", "coco/b.jpg", "cocoa/train/a.jpg"):
        with pytest.raises(BadSample, match="does not exist"): find_image(name, roots)
    for wrong in (str(tmp_path / "gone"), {"coco": str(tmp_path / "gone.tar")}):
        with pytest.raises(FileNotFoundError, match="gone.*does not exist"): open_roots(wrong)


def test_joined_reads_like_one_file(tmp_path):
    content = RANDOM.randbytes(10_000)
    paths = tuple(tmp_path / str(i) for i in range(7))
    for i, path in enumerate(paths): path.write_bytes(content[i * 1500:(i + 1) * 1500])
    file, same = io.BufferedReader(Joined(paths), 64), io.BytesIO(content)
    for _ in range(500):
        at, length = RANDOM.randrange(11_000), RANDOM.randrange(4000)
        assert (file.seek(at), file.read(length)) == (same.seek(at), same.read(length))
