"VCR, EmbSpatial-Bench and Robo2VLM-1, on files built in exactly their published layouts (the fields and forms of formats seen in the published files and loaders; the words and pictures are ours)."
import base64, io, json, pickle, tracemalloc, zipfile
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied_midtrain.samples import BadSample
from embodied_midtrain.sources import vqa
from embodied_midtrain.sources.base import open_source

DATA = Path(__file__).parent / "data"
READER = "embodied_midtrain.sources.vqa:"


def jpeg(i, size=(40, 30)):
    PIL.Image.new("RGB", size, (i * 37 % 256, i * 91 % 256, i % 256)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def vcr_record(i, **change):
    record = {"movie": "0_film", "objects": ["person", "person", "person", "car"], "interesting_scores": [0], "answer_likelihood": "possible", "img_fn": f"film/{i}@0.jpg", "metadata_fn": f"film/{i}@0.json",
        "question": ["Is", [2], "near", [0, 1], "?"], "answer_choices": [["Yes", "."], ["No", ",", [2], "is", "n't", "."], ["Perhaps", "."], [[3], "is", "."]], "answer_label": 1,
        "rationale_choices": [["So", "."], [[0], ",", [1], "and", [3], "stand", "apart", f"{i}", "."], ["No", "."], ["It", "'s", "late", "."]], "rationale_label": 1, "img_id": f"train-{i}", "annot_id": f"train-{i}", "match_fold": "train-0"}
    return {k: v for k, v in (record | change).items() if v is not ...}


def vcr(folder, records, meta={}):
    (folder / "vcr1images/film").mkdir(parents=True)
    for i, _ in enumerate(records):
        (folder / f"vcr1images/film/{i}@0.jpg").write_bytes(jpeg(i))
        (folder / f"vcr1images/film/{i}@0.json").write_text(json.dumps({"boxes": [[0, 0, 10, 30, 0.9], [10, 0, 20, 30, 0.9], [20, 6, 30, 30, 0.9], [0, 0, 40, 30, 0.5]], "segms": [[]] * 4, "names": ["person"] * 3 + ["car"], "width": 40, "height": 30} | meta))
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "train.jsonl"


def embspatial_record(i, tuning=False, **change):
    things = [{"name": "cup", "bbox": [1, 2, 10, 10]}, {"name": "plate", "bbox": [20, 5, 15, 15]}]
    record = {"data_source": "ours", "scene_id": "kitchen", "question_id": f"ours_{i}", "relation": "left", "image": base64.b64encode(jpeg(i)).decode(), "objects": things}
    record |= {"question": [f"Wording {n} of {i}?" for n in range(5)], "answer": f"The cup is left of plate {i}."} if tuning else {"question": f"Where is cup {i}?", "answer_options": ["Left.", "Right.", "Above.", f"Under {i}."], "answer": i % 4}
    return {k: v for k, v in (record | change).items() if v is not ...}


def embspatial(folder, records):
    (folder / "embspatial_bench.json").write_text(json.dumps(records))
    return folder / "embspatial_bench.json"


def robo2vlm(folder, rows=20, choices=lambda i: ["Yes", "No", f"Maybe {i}"], answer=lambda i: i % 3, group=6):
    "The text of each question tells its number, by which its picture is known."
    folder.mkdir(exist_ok=True)
    table = {"id": [f"droid_{i}_q{i % 5}" for i in range(rows)], "question": [f"Is gripper {i} open?" for i in range(rows)], "choices": [choices(i) for i in range(rows)], "correct_answer": [answer(i) for i in range(rows)],
             "image": pa.array([{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(rows)], pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    pq.write_table(pa.table(table), folder / "train-00000-of-00001.parquet", row_group_size=group)
    return folder


MAKE = {
    "vcr": (lambda f: vcr(f, [vcr_record(i) for i in range(20)]), "VcrSource", {"boxes": True}),
    "embspatial": (lambda f: embspatial(f, [embspatial_record(i, tuning=i % 2 == 1) for i in range(20)]), "EmbSpatialSource", {}),
    "robo2vlm": (robo2vlm, "Robo2VlmSource", {}),
}


@pytest.fixture(params=MAKE)
def spec(request, tmp_path):
    build, reader, parameters = MAKE[request.param]
    return {"reader": READER + reader, "name": "pool", "path": str(build(tmp_path)), **parameters}


def plain(sample): return sample.id, sample.messages, [image.encoded() for image in sample.images], sample.meta


def test_order_resume_shards_and_fetch(spec, monkeypatch):
    source = open_source(spec)
    with monkeypatch.context() as patch:
        patch.setattr(PIL.Image, "open", lambda *_, **__: pytest.fail("opened an image"))
        samples = [plain(s) for s in source]
    ids = [s[0] for s in samples]
    assert ids == [f"pool/{i}" for i in range(20)] and not source.set_aside and [s[2] for s in samples] == [[jpeg(i)] for i in range(20)]
    for start in (0, 1, 19, 25):
        assert [plain(s) for s in open_source(spec).samples(start)] == samples[start:]
        assert [r.key for r in open_source(spec).records(start)] == [str(i) for i in range(start, 20)]
    assert sorted(s.id for i in range(3) for s in source.samples(shard=(i, 3))) == sorted(ids)
    assert [plain(s) for s in open_source(spec).fetch(ids[::-3])] == samples[::-3]
    for unknown in ("other/1", "pool/20", "pool/01", "pool/-1", "pool/x"):
        with pytest.raises(KeyError, match="no sample"): source.fetch([ids[0], unknown])
    picture = next(iter(source)).images[0]
    assert pickle.loads(pickle.dumps(picture)).open().size == (40, 30)


# ---- VCR

def test_people_and_things_are_named(tmp_path):
    (sample,) = vqa.VcrSource("v", str(vcr(tmp_path, [vcr_record(0)])))
    assert [m["content"] for m in sample.messages] == ["<image>\nIs person 3 near person 1 and person 2?", "No, person 3 isn't.", "Why?", "person 1, person 2 and car 4 stand apart 0."]
    assert sample.meta == {"id": "train-0"}
    (boxed,) = vqa.VcrSource("v", str(tmp_path / "train.jsonl"), boxes=True, why="How do you know?")
    assert boxed.messages[0]["content"] == "<image>\nperson 1 is at [0.0, 0.0, 0.25, 1.0].\nperson 2 is at [0.25, 0.0, 0.5, 1.0].\nperson 3 is at [0.5, 0.2, 0.75, 1.0].\nIs person 3 near person 1 and person 2?"
    assert boxed.messages[2]["content"] == "How do you know?"


def test_the_test_split_has_no_labels(tmp_path):
    source = vqa.VcrSource("v", str(vcr(tmp_path, [vcr_record(i, answer_label=..., rationale_label=...) for i in range(9)] + [vcr_record(9)])))
    assert len(list(source)) == 1 and source.set_aside.unlabelled == {"no labels, as in the test split": 9} and not source.set_aside


VCR_BAD = {
    "a place that is not there": (dict(question=["Is", [9], "?"]), "a mention of what is not among the 4 objects"),
    "a negative place": (dict(question=["Is", [-1], "?"]), "a mention of what is not among the 4 objects"),
    "no place": (dict(question=["Is", [], "?"]), "a mention of what is not among the 4 objects"),
    "a place that is no number": (dict(question=["Is", ["2"], "?"]), "a mention of what is not among the 4 objects"),
    "a token that is no word": (dict(question=["Is", 2, "?"]), "not text"),
    "a question as text": (dict(question="Is it?"), "no list of tokens"),
    "no question": (dict(question=...), "no 'question' in the record"),
    "no objects": (dict(objects=...), "no 'objects' in the record"),
    "objects that are no names": (dict(objects=[1, 2, 3, 4]), "objects are no list of names"),
    "a label beyond the choices": (dict(answer_label=4), "answer is none of the 4 choices"),
    "a label that is text": (dict(answer_label="1"), "answer is none of the 4 choices"),
    "no rationale's label": (dict(rationale_label=...), "answer is none of the 4 choices"),
    "no choices": (dict(rationale_choices=...), "no list 'rationale_choices' in it"),
    "a picture outside": (dict(img_fn="../../secret.jpg"), "image path leaves its folder"),
    "metadata outside": (dict(metadata_fn="../train.jsonl"), "image path leaves its folder"),
    "no metadata": (dict(metadata_fn="film/none.json"), "image file does not exist"),
}


def test_bad_records_of_vcr_are_set_aside(tmp_path):
    records = [vcr_record(i) for i in range(400)]
    for at, (change, _) in enumerate(VCR_BAD.values(), 100): records[at] = vcr_record(at, **change)
    source = vqa.VcrSource("v", str(vcr(tmp_path, records)), boxes=True)
    assert len(list(source)) == 400 - len(VCR_BAD) and [(int(record), reason.split(":")[0]) for _, record, reason in source.set_aside.rows] == [(at, reason) for at, (_, reason) in enumerate(VCR_BAD.values(), 100)]


@pytest.mark.parametrize("meta", [{"boxes": [[0, 0, 9, 9, 1]]}, {"width": 0}, {"boxes": "none"}, {"boxes": [["a"] * 5] * 4}, {"boxes": [[0, 0, 900, 9, 1]] * 4}, {"width": None}])
def test_metadata_that_cannot_be_is_told(meta, tmp_path):
    source = vqa.VcrSource("v", str(vcr(tmp_path, [vcr_record(0)], meta)), boxes=True)
    (record,) = source.records()
    with pytest.raises(BadSample, match="metadata without boxes"): source.parse(record)


def test_pictures_of_vcr_may_lie_in_their_zip(tmp_path):
    path = vcr(tmp_path / "all", [vcr_record(i) for i in range(5)])
    with zipfile.ZipFile(tmp_path / "vcr1images.zip", "w") as packed:
        for file in sorted((tmp_path / "all/vcr1images").rglob("*.*")): packed.write(file, file.relative_to(tmp_path / "all"))
    source = vqa.VcrSource("v", str(path), images=str(tmp_path / "vcr1images.zip"), boxes=True)
    assert [s.images[0].encoded() for s in source] == [jpeg(i) for i in range(5)]


# ---- EmbSpatial-Bench

def test_both_files_of_embspatial(tmp_path):
    bench, *tuning = vqa.EmbSpatialSource("e", str(embspatial(tmp_path, [embspatial_record(2)] + [embspatial_record(i, tuning=True) for i in range(1, 8)])))
    assert bench.messages[0]["content"] == "<image>\nWhere is cup 2?\nChoices:\nA. Left.\nB. Right.\nC. Above.\nD. Under 2." and bench.answer == "C. Above."
    assert bench.meta["question_id"] == "ours_2" and bench.meta["relation"] == "left" and len(bench.meta["objects"]) == 2
    assert [s.messages[0]["content"] for s in tuning] == [f"<image>\nWording {i % 5} of {i}?" for i in range(1, 8)] and tuning[0].answer == "The cup is left of plate 1."


EMBSPATIAL_BAD = {
    "an elided picture, as the README has it": (dict(image="/9j/4AAQ..."), "image is not base64"),
    "no picture": (dict(image=...), "image is not base64"),
    "an empty picture": (dict(image=""), "image is empty"),
    "no question": (dict(question=...), "no 'question' in the record"),
    "no wording": (dict(question=[]), "question has no wording"),
    "a wording that is no text": (dict(question=[7] * 5), "not text"),
    "no answer": (dict(answer=...), "no 'answer' in the record"),
    "an answer beyond the options": (dict(answer=4), "answer is none of the 4 choices"),
    "an answer from behind": (dict(answer=-1), "answer is none of the 4 choices"),
    "options as text": (dict(answer_options="Left or right"), "answer_options are no list"),
    "one option": (dict(answer_options=["Left."], answer=0), "choices are not 2 to 26"),
    "an option that is no text": (dict(answer_options=["Left.", 7, "Up", "x"]), "not text"),
    "no object": (None, "not a JSON object"),
}


def test_bad_records_of_embspatial_are_set_aside(tmp_path):
    records = [embspatial_record(i) for i in range(400)]
    for at, (change, _) in enumerate(EMBSPATIAL_BAD.values(), 100): records[at] = embspatial_record(at, **change) if change is not None else [at]
    source = vqa.EmbSpatialSource("e", str(embspatial(tmp_path, records)))
    assert len(list(source)) == 400 - len(EMBSPATIAL_BAD) and [(int(record), reason.split(":")[0]) for _, record, reason in source.set_aside.rows] == [(at, reason) for at, (_, reason) in enumerate(EMBSPATIAL_BAD.values(), 100)]


def test_a_large_file_of_embspatial_needs_little_memory(tmp_path):
    "All samples are kept, none of their pictures."
    noise = base64.b64encode((DATA / "llava_coco_qa/waterview.jpg").read_bytes()).decode()
    path = embspatial(tmp_path, [embspatial_record(i, image=noise) for i in range(300)])
    tracemalloc.start()
    try:
        samples = list(vqa.EmbSpatialSource("e", str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert path.stat().st_size > 35e6 and len(samples) == 300 and peak < 9e6
    assert samples[250].images[0].open().size == PIL.Image.open(DATA / "llava_coco_qa/waterview.jpg").size


# ---- Robo2VLM-1

FORMS = {
    "a list": lambda i: ["Yes", "No", f"Maybe {i}"],
    "the text of a list": lambda i: str(["Yes", "No", f"Maybe {i}"]),
    "a list in a list": lambda i: [["Yes", "No", f"Maybe {i}"]],
    "lists of one": lambda i: [["Yes"], ["No"], [f"Maybe {i}"]],
    "the text of a list in a list": lambda i: [str(["Yes", "No", f"Maybe {i}"])],
}


@pytest.mark.parametrize("answer", [lambda i: i % 3, lambda i: "ABC"[i % 3]], ids=["number", "letter"])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_choices_and_answers(form, answer, tmp_path):
    source = vqa.Robo2VlmSource("r", str(robo2vlm(tmp_path / "data", choices=FORMS[form], answer=answer)))
    samples = list(source)
    assert len(samples) == len(source) == 20
    assert samples[4].messages[0]["content"] == "<image>\nIs gripper 4 open?\nChoices:\nA. Yes\nB. No\nC. Maybe 4" and [s.answer for s in samples[3:6]] == ["A. Yes", "B. No", "C. Maybe 5"]
    assert samples[7].meta == {"id": "droid_7_q2"} and samples[7].images[0].encoded() == jpeg(7)


def test_train_and_test_lie_in_one_folder(tmp_path):
    robo2vlm(tmp_path / "data", rows=3)
    (tmp_path / "data/train-00000-of-00001.parquet").rename(tmp_path / "data/test-00000-of-00001.parquet")
    robo2vlm(tmp_path / "data", rows=9)
    assert len(vqa.Robo2VlmSource("r", str(tmp_path))) == 9 and len(vqa.Robo2VlmSource("r", str(tmp_path), split="test")) == 3


ROBO_BAD = {
    "code": ("[__import__('os').mkdir('ran')]", 0, "choices are no list"),
    "no list": ("Yes or no", 0, "choices are no list"),
    "an array's text": ("['Yes' 'No' 'Maybe']", 0, "choices are not 2 to 26"),
    "a broken list": ("['Yes', 'No'", 0, "choices are no list"),
    "a list that never ends": ("[" * 9000, 0, "choices are no list"),
    "a very long text": (str(["ha" * 10_000] * 3), 0, "choices are no list"),
    "a number beyond": ("['Yes', 'No']", 2, "answer is none of the 2 choices"),
    "a number from behind": ("['Yes', 'No']", -1, "answer is none of the 2 choices"),
    "no choices": (None, 0, "choices are no list"),
}


def test_bad_rows_of_robo2vlm_are_set_aside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = dict(enumerate(ROBO_BAD.values(), 100))
    folder = robo2vlm(tmp_path / "data", rows=300, choices=lambda i: bad[i][0] if i in bad else "['Yes', 'No']", answer=lambda i: bad[i][1] if i in bad else None if i == 50 else 1)
    source = vqa.Robo2VlmSource("r", str(folder))
    assert len(list(source)) == 299 - len(bad) and source.set_aside.unlabelled == {"no answer": 1} and not (tmp_path / "ran").exists()
    assert [(int(record), reason.split(":")[0]) for _, record, reason in source.set_aside.rows] == [(at, reason) for at, (*_, reason) in bad.items()]


def test_another_table_is_told(tmp_path):
    pq.write_table(pa.table({"question": ["?"], "correct_answer": [0], "image": [b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="no column 'choices', only question, correct_answer, image"): vqa.Robo2VlmSource("r", str(tmp_path / "x.parquet"))
    pq.write_table(pa.table({"prompt": ["?"], "choices": ["[]"], "image": [b"x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="unknown column"): list(vqa.Robo2VlmSource("r", str(tmp_path / "x.parquet")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .parquet files"): vqa.Robo2VlmSource("r", str(tmp_path / "empty"))
