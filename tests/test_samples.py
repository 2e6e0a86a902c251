"Images and records as the wild sends them: every one becomes upright RGB or a reason, never a crash."
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embodied_midtrain.core import read_table
from embodied_midtrain.samples import BadSample, ImageRef, Sample, SetAside, Unlabelled, check, turn

DATA = Path(__file__).parent / "data"
GRADIENT = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None], 48, 0)  # (48, 64), dark to light


def encoded(image, format, **options):
    image.save(file := io.BytesIO(), format, **options)
    return file.getvalue()


def opened(image, format, **options):
    return np.asarray(ImageRef(data=encoded(image, format, **options)).open())


GREY = Image.fromarray(GRADIENT)
DEEP = Image.fromarray(GRADIENT.astype(np.uint16) * 257)
UNUSUAL = {
    "grey": (GREY, "PNG", {}),
    "palette": (GREY.convert("RGB").quantize(128), "PNG", {}),
    "cmyk": (GREY.convert("CMYK"), "JPEG", {"quality": 95}),
    "16 bit": (DEEP, "PNG", {}),
    "16 bit tiff": (DEEP, "TIFF", {}),
    "float": (Image.fromarray(GRADIENT.astype(np.float32) / 7), "TIFF", {}),
    "webp": (GREY.convert("RGB"), "WEBP", {"quality": 95}),
    "animated": (GREY.convert("P"), "GIF", {"save_all": True, "append_images": [Image.new("P", GREY.size)]}),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images_become_rgb(name):
    pixels = opened(*UNUSUAL[name][:2], **UNUSUAL[name][2])
    assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels[:, 2:-2].astype(int) - GRADIENT[:, 2:-2, None]).max() < (12 if name != "float" else 20)


def test_black_and_white_and_transparent():
    assert opened(GREY.convert("1", dither=Image.Dither.NONE), "PNG")[0, [0, -1]].tolist() == [[0] * 3, [255] * 3]
    red = Image.new("RGBA", (8, 8), (255, 0, 0, 255))
    red.putpixel((0, 0), (0, 0, 0, 0))  # black, were it visible
    assert opened(red, "PNG")[0, :2].tolist() == [[255, 255, 255], [255, 0, 0]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = ImageRef(data=encoded(GREY.convert("RGB"), "JPEG", exif=exif)).open()
    assert image.size == ((64, 48) if orientation < 5 else (48, 64))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_images_give_a_reason(format):
    good = encoded(GREY.convert("RGB"), format)
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(good[:rng.integers(len(good))] if rng.random() < 0.5 else good)
        for at in rng.integers(0, max(len(bad), 1), 4):
            if bad: bad[at] ^= int(rng.integers(1, 256))
        try: assert ImageRef(data=bytes(bad)).open(max_pixels=10**6).mode == "RGB"
        except BadSample as reason: assert "image" in str(reason)


def test_program_formats_are_not_tried():
    with pytest.raises(BadSample, match="cannot be decoded"): ImageRef(data=encoded(GREY, "EPS")).open()


def test_a_limit_is_judged_before_decoding(monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadSample, match="more than 3,000 pixels: 64 x 48"): ImageRef(data=encoded_grey).open(max_pixels=3000)


encoded_grey = encoded(GREY, "PNG")


def test_image_ref_takes_exactly_one():
    for wrong in ({}, {"path": "a", "data": b""}):
        with pytest.raises(ValueError, match="exactly one"): ImageRef(**wrong)
    with pytest.raises(BadSample, match="does not exist"): ImageRef("no/where.jpg").open()
    with pytest.raises(BadSample): ImageRef(str(DATA)).open()  # a folder


GOOD = dict(id="s/1", source="s", kind="vlm", images=(ImageRef("a.jpg"),), messages=(turn("user", "<image> What?"), turn("assistant", "That.")))
WRONG = {
    "order": dict(messages=GOOD["messages"][::-1]),
    "question without answer": dict(messages=GOOD["messages"][:1]),
    "nobody": dict(messages=()),
    "unknown role": dict(messages=(turn("robot", "<image> What?"), turn("assistant", "That."))),
    "system at the end": dict(messages=(*GOOD["messages"], turn("system", "Be brief."))),
    "too many marks": dict(messages=(turn("user", "<image><image> What?"), turn("assistant", "That."))),
    "mark in the answer": dict(messages=(turn("user", "What?"), turn("assistant", "<image> That."))),
    "empty": dict(messages=(turn("user", "<image> What?"), turn("assistant", "\t"))),
    "no text": dict(messages=(turn("user", "<image> What?"), turn("assistant", None))),
    "id": dict(id="t/1"),
    "kind": dict(kind="audio"),
    "robot frame with an answer": dict(kind="vla"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_samples_are_refused(what):
    check(Sample(**GOOD))
    with pytest.raises(BadSample): check(Sample(**{**GOOD, **WRONG[what]}))


def test_system_turn_text_only_and_robot_frame_are_well():
    check(Sample(**{**GOOD, "messages": (turn("system", "Be brief."), *GOOD["messages"])}))
    check(Sample(**{**GOOD, "images": (), "messages": (turn("user", "What?"), turn("assistant", "That."))}))
    check(Sample(**{**GOOD, "kind": "vla", "messages": (turn("user", "<image>\nlift it"),)}))
    with pytest.raises(BadSample): check(Sample(**{**GOOD, "kind": "vla", "messages": (turn("user", "<image>"),)}))


def test_html_of_a_sample_is_escaped():
    shown = Sample(**{**GOOD, "messages": (turn("user", "<image> <script>alert(1)</script>"), turn("<b>", "x"))})._repr_html_()
    assert "<script>" not in shown and "does not exist" in shown


def test_five_percent(tmp_path):
    book = SetAside("web")
    for i in range(5): book.add("f.json", i, "broken: one of many")
    book.check(100)
    book.add("f.json", 6, Unlabelled("no instruction"))
    book.check(100)  # counted, but no failure
    book.add("f.json", 7, BadSample("broken: another"))
    with pytest.raises(ValueError, match=r"web: 6 of 100 records \(6%\).*6 x broken; first: f.json, record 0"): book.check(100)
    with pytest.raises(ValueError, match="no records"): SetAside().check(0)
    book.write(tmp_path / "rejected.parquet")
    assert list(read_table(tmp_path / "rejected.parquet").record) == ["0", "1", "2", "3", "4", "7"]
