"""Retention: readers on files in the published layouts, every rule against values worked out by hand, generation that does not mind its batch, answers from elsewhere, comparisons."""
import base64
import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from embodied_midtrain.backbone import TEMPLATE, Backbone, load_backbone, tiny_tokenizer
from embodied_midtrain.core import Stage
from embodied_midtrain.retention import (BENCHMARKS, LENGTHS, RULES, SHOWN, TabletopQuestions, answer_checkpoint, answer_questions, base_question, benchmark_spec, beside_paper, blink_answer,
                                         choose_questions, chosen_letter, compare, grade, grid_answer, judge_all, last_boxed, left_padded, map_answer, maze_answer, plot_change,
                                         pope_answer, pope_table, read_answers, retention_text, score, variant_tables, visulogic_answer, write_answers)
from embodied_midtrain.samples import BadSample, ImageRef, Sample, turn
from embodied_midtrain.sources.base import open_source, sources_hash
from embodied_midtrain.sources.benchmarks import BLINK_TASKS, BlinkSource, PopeSource, SpatialEvalSource, ThreeDSRSource, VisuLogicSource
from embodied_midtrain.tabletop.pool import TabletopSource

torch.set_num_threads(1)
POPE = "tests/data/pope"


def png(colour):
    Image.new("RGB", (40, 30), colour).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


RED, BLUE = png("red"), png("blue")


def picture(content): return {"bytes": content, "path": None}


# ---- readers: POPE's questions are real, the other files are built in the published layout

@pytest.fixture
def pope(tmp_path, request):
    folder = request.config.rootpath / POPE
    for row in map(json.loads, (folder / "coco_pope_popular.json").read_text().splitlines()): (tmp_path / row["image"]).write_bytes(RED)
    return folder, tmp_path


def test_pope_reads_real_questions(pope):
    folder, images = pope
    questions = list(PopeSource("pope", str(folder), images=str(images)))
    assert len(questions) == 72 and [q.meta["task"] for q in questions[::24]] == ["random", "popular", "adversarial"]
    first, again = questions[0], list(PopeSource("pope", str(folder / "coco_pope_random.json"), images=str(images), prompt=""))
    assert first.id == "pope/random-1" and first.meta == dict(question_id="1", task="random", group="COCO_val2014_000000310196.jpg") and first.images[0].encoded() == RED
    assert first.question[0]["content"] == "<image>\nIs there a snowboard in the image?\nAnswer the question using a single word or phrase." and first.answer == "yes"
    assert len(again) == 24 and again[0].question[0]["content"] == "<image>\nIs there a snowboard in the image?"
    assert [q.answer for q in questions].count("yes") == 36  # half of them, as POPE has it


def test_pope_from_a_table_as_on_the_hub(tmp_path):
    rows = [dict(id=str(i), question_id=str(i // 3 + 1), question=f"Is there a dog {i}?", answer=["yes", "no"][i % 2], image_source=f"COCO_{i // 6}", image=picture(BLUE), category=c) for i in range(12) for c in [PopeSource.splits[i % 3]]]
    (tmp_path / "data").mkdir()
    pd.DataFrame(rows).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    questions = list(PopeSource("pope", str(tmp_path)))
    assert [q.id for q in questions[:4]] == ["pope/random-1", "pope/popular-1", "pope/adversarial-1", "pope/random-2"] and questions[7].images[0].encoded() == BLUE and questions[7].meta["group"] == "COCO_1"


def test_pope_sets_bad_lines_aside_and_refuses_other_files(tmp_path, pope):
    lines = (pope[0] / "coco_pope_random.json").read_text().splitlines()
    bad = ["{", json.dumps(json.loads(lines[1]) | {"label": "maybe", "question_id": 900}), json.dumps(json.loads(lines[2]) | {"image": "../x.jpg", "question_id": 901})]
    (tmp_path / "my_pope_random.json").write_text("\n".join(lines * 3 + bad))
    source = PopeSource("pope", str(tmp_path / "my_pope_random.json"), images=str(pope[1]))
    with pytest.raises(ValueError, match="duplicate id"): list(source)  # the same lines three times
    numbered = [json.dumps(json.loads(line) | {"question_id": i}) for i, line in enumerate(lines * 3)]
    (tmp_path / "my_pope_random.json").write_text("\n".join(numbered + bad))
    assert len(list(source)) == 72 and [reason.split(":")[0] for *_, reason in source.set_aside.rows] == ["not JSON", "neither yes nor no in one of the splits", "image path leaves its folder"]
    with pytest.raises(ValueError, match="no file of POPE"): PopeSource("pope", str(pope[0].parent))
    with pytest.raises(ValueError, match="one of the two"): PopeSource("pope")
    with pytest.raises(FileNotFoundError): PopeSource("pope", str(tmp_path / "nowhere"))


def write_blink(folder, tasks=("Counting", "Jigsaw")):
    for task in tasks:
        (folder / task).mkdir(parents=True)
        rows = [dict(idx=f"val_{task}_{i}", sub_task=task, question="Which?", choices=["one", "two", "three"][:2 + i % 2], answer="(B)", prompt="Which?\nSelect from the following choices.\n(A) one\n(B) two", image_1=picture(RED),
                     image_2=picture(BLUE) if i % 2 else None, image_3=None, image_4=None, explanation="") for i in range(1, 25)]
        rows[-1]["answer"] = "hidden" if task == "Counting" else "(B)"
        pd.DataFrame(rows).to_parquet(folder / task / "val-00000-of-00001.parquet")
        pd.DataFrame(rows).to_parquet(folder / task / "test-00000-of-00001.parquet")


def test_blink_reads_its_tasks(tmp_path):
    write_blink(tmp_path)
    source = BlinkSource("blink", str(tmp_path))
    questions = list(source)
    assert source.tasks == ["Counting", "Jigsaw"] and len(questions) == 47 and source.set_aside.reasons() == {"answer is none of the 2 choices": 1} and len(source.files) == 2
    q = questions[0]
    assert (q.id, q.answer, q.meta["task"], q.meta["choices"]) == ("blink/val_Counting_1", "(B)", "Counting", {"A": "one", "B": "two", "C": "three"})
    assert q.question[0]["content"].startswith("<image>\n<image>\nWhich?") and [i.encoded() for i in q.images] == [RED, BLUE] and [i.encoded() for i in questions[1].images] == [RED]
    assert [q.id for q in BlinkSource("blink", str(tmp_path), tasks=["Jigsaw"])] == [f"blink/val_Jigsaw_{i}" for i in range(1, 25)]
    assert [r.key for r in source.records(30)] == [f"val_Jigsaw_{i}" for i in range(7, 25)]
    with pytest.raises(ValueError, match="did you mean 'Jigsaw'"): BlinkSource("blink", str(tmp_path), tasks=["Jigsw"])
    with pytest.raises(FileNotFoundError, match="IQ_Test"): BlinkSource("blink", str(tmp_path), tasks=["IQ_Test"])
    assert len(BLINK_TASKS) == 14


def test_visulogic_reads_folder_and_zip(tmp_path):
    import zipfile
    rows = [dict(image_path=f"images/{i:05d}.png", label="ABCD"[i % 4], question="Choose.", tag=["Spatial Reasoning", "Other"][i % 2], id=f"{i:05d}") for i in range(30)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive: [archive.writestr(row["image_path"], RED) for row in rows[:29]]
    source = VisuLogicSource("visulogic", str(tmp_path))
    questions = list(source)
    assert len(questions) == 29 and source.set_aside.reasons() == {"image file does not exist": 1} and questions[5].images[0].encoded() == RED
    assert questions[5].answer == "B" and questions[5].meta["task"] == "Other" and questions[5].question[0]["content"].endswith("Answer: \\boxed{$LETTER}.")
    (tmp_path / "images").mkdir()
    for row in rows: (tmp_path / row["image_path"]).write_bytes(BLUE)
    assert [q.images[0].encoded() for q in VisuLogicSource("visulogic", str(tmp_path), prompt="")] == [BLUE] * 30


def write_3dsr(path, many=12):
    rows = []
    for g in range(many):
        for k, variant in enumerate(("", "-1", "-flip", "-flip-1")):
            turned = variant.endswith("-1")
            rows.append(dict(index=len(rows), qid=f"QID{g:05d}{variant}", question='Which is "higher"?', A="two\nlines" if turned else "tap", B="tap" if turned else "two\nlines", C=np.nan, D=np.nan, answer="B" if turned else "A",
                             category=["height_higher", "location_above"][g % 2], image=base64.b64encode((RED, BLUE)[k // 2] * (300 if g == 0 else 1)).decode() if not turned else len(rows) - 1))
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)


def test_3dsrbench_reads_variants_and_shared_pictures(tmp_path):
    write_3dsr(tmp_path / "3dsrbench_v1_vlmevalkit_circular.tsv")
    source = ThreeDSRSource("3dsr", str(tmp_path))
    questions = list(source)
    assert len(questions) == 48 and [q.meta["group"] for q in questions[:5]] == ["QID00000"] * 4 + ["QID00001"]
    assert [q.images[0].encoded() for q in questions[4:8]] == [RED, RED, BLUE, BLUE] and len(questions[0].images[0].encoded()) == 300 * len(RED)  # beyond csv's own limit
    assert questions[5].meta["choices"] == {"A": "two\nlines", "B": "tap"} and questions[5].answer == "B"
    assert questions[4].question[0]["content"] == '<image>\nQuestion: Which is "higher"?\nOptions:\nA. tap\nB. two\nlines\nPlease select the correct answer from the options above.'
    assert [s.id for s in source.fetch(["3dsr/QID00003-flip"])] == ["3dsr/QID00003-flip"]
    (tmp_path / "bad.tsv").write_text("index\tquestion\tA\tB\tanswer\timage\n" + "1\twhat\n" + "".join(f"{i}\twhat\ta\tb\tA\t{base64.b64encode(RED).decode() if i == 2 else i - 1}\n" for i in range(2, 40)) + "99\twhat\ta\tb\tC\t2\n")
    broken = ThreeDSRSource("3dsr", str(tmp_path / "bad.tsv"))
    assert len(list(broken)) == 38 and sorted(broken.set_aside.reasons()) == ["answer is none of the 2 choices", "not a row of the table"]
    with pytest.raises(BadSample, match="not base64"): list(broken)[3].images[0].encoded()  # it points to a row that points on
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match="no column .*answer"): ThreeDSRSource("3dsr", str(tmp_path / "other.tsv"))


def write_spatialeval(folder, mode="vqa"):
    (folder / mode).mkdir(parents=True)
    tasks = {"spatialmap": ["Southwest", "Oz's Oddities", "2"], "mazenav": ["2", "3", "Yes"], "spatialgrid": ["3", "dog", "cat"]}
    rows = [dict(id=f"{task}.{mode}.{i}.{n}", text=f"Question {n}? A. x B. y", oracle_answer=right, oracle_option="B", oracle_full_answer=f"B. {right}") | ({} if mode == "tqa" else {"image": picture(RED)})
            for task, answers in tasks.items() for i in range(3) for n, right in enumerate(answers)]
    pd.DataFrame(rows).to_parquet(folder / mode / "test-00000-of-00001.parquet")


def test_spatialeval_reads_words_and_pictures(tmp_path):
    for mode in ("tqa", "vqa"): write_spatialeval(tmp_path, mode)
    words, pictures = (list(SpatialEvalSource("s", str(tmp_path), mode=mode)) for mode in ("tqa", "vqa"))
    assert len(words) == len(pictures) == 27 and not words[0].images and pictures[0].images[0].encoded() == RED
    q = pictures[4]
    assert (q.id, q.answer, q.meta["task"], q.meta["group"], q.meta["number"]) == ("s/spatialmap.vqa.1.1", "Oz's Oddities", "spatialmap", "spatialmap.vqa.1", 1)
    assert words[0].question[0]["content"].startswith("Question 0?") and "First, provide a concise answer in one sentence." in q.question[0]["content"]
    with pytest.raises(FileNotFoundError, match="vtqa"): SpatialEvalSource("s", str(tmp_path), mode="vtqa")


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch):
    import huggingface_hub
    def refuse(*_, **__): raise OSError("no route")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    for reader, hub in ((VisuLogicSource, "VisuLogic/VisuLogic"), (ThreeDSRSource, "ccvl/3DSRBench")):
        with pytest.raises(ValueError, match=f"{hub}: cannot fetch .* no route"): reader("x", hub=hub)


def test_the_same_reader_takes_files_that_the_hub_gave(tmp_path, monkeypatch):
    import huggingface_hub
    write_3dsr(tmp_path / "3dsrbench_v1_vlmevalkit_circular.tsv")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda hub, file, repo_type, revision: str(tmp_path / file))
    here, there = (list(ThreeDSRSource("3dsr", **place)) for place in (dict(path=str(tmp_path)), dict(hub="ccvl/3DSRBench", revision="main")))
    assert [(q.id, q.messages) for q in here] == [(q.id, q.messages) for q in there]


def test_rows_of_the_datasets_library(tmp_path, monkeypatch):
    "What a hub id opens (`load_rows`), here from folders on this disk."
    import datasets

    from embodied_midtrain.sources import benchmarks, web
    write_blink(tmp_path / "blink", ("Counting",))
    write_spatialeval(tmp_path / "spatial")
    local = {"BLINK-Benchmark/BLINK": lambda config, split: str(tmp_path / "blink" / config / f"{split}-00000-of-00001.parquet"), "MilaWang/SpatialEval": lambda config, split: str(tmp_path / "spatial" / config / f"{split}-00000-of-00001.parquet")}
    def rows(hub, split, config=None, revision=None): return web.DatasetRows(datasets.load_dataset("parquet", data_files=local[hub](config, split), split="train", cache_dir=str(tmp_path / "cache")), hub)
    monkeypatch.setattr(benchmarks, "load_rows", rows)
    for reader, hub, path, more in ((BlinkSource, "BLINK-Benchmark/BLINK", "blink", dict(tasks=["Counting"])), (SpatialEvalSource, "MilaWang/SpatialEval", "spatial", {})):
        here, there = (list(reader("x", **place, **more)) for place in (dict(path=str(tmp_path / path)), dict(hub=hub, revision="main")))
        assert [(q.id, q.messages, [i.encoded() for i in q.images]) for q in here] == [(q.id, q.messages, [i.encoded() for i in q.images]) for q in there] and here


# ---- rules, by hand

@pytest.mark.parametrize("text, answer", [("Yes, there is.", "yes"), ("No", "no"), ("no, it is not there", "no"), ("There is not", "no"), ("NO", "yes"), ("Nope", "yes"), ("No\n", "yes"), ("", "yes"), ("cannot say", "yes"), ("Yes. No.", "yes"), ("I see no, dog", "no")])
def test_pope_rule(text, answer): assert pope_answer(text) == answer


def test_pope_figures_by_hand():
    graded = pd.DataFrame(dict(task=["random"] * 8 + ["popular"] * 4, parsed=["yes"] * 5 + ["no"] * 3 + ["no"] * 4, right=["yes"] * 3 + ["no"] * 2 + ["yes"] + ["no"] * 2 + ["yes", "no"] * 2)).assign(
        group=lambda t: t.index, id=lambda t: t.index, correct=lambda t: t.parsed == t.right)
    table = score(graded, "pope").set_index(["task", "metric"])
    assert [table.value["random", m] for m in ("accuracy", "precision", "recall", "F1", "yes ratio")] == [5 / 8, 3 / 5, 3 / 4, 6 / 9, 5 / 8]
    assert table.value["popular", "recall"] == table.value["popular", "F1"] == 0 and np.isnan(table.value["popular", "precision"])  # never a yes: where the official script divides by zero
    assert table.value["all", "accuracy"] == (5 / 8 + 2 / 4) / 2 and np.isnan(table.low["random", "F1"])


def test_letters():
    choices = {"A": "left of the dog", "B": "right of the dog", "C": "Point C"}
    cases = {"B": "B", "B.": "B", "(B) because": "B", "The answer is B, not C": None, "a": None, "It is right of the dog": "B", "LEFT OF THE DOG": "A", "left of the dog, not right of the dog": None, "A dog": "A", "": None, "point c!": "C"}
    assert {text: chosen_letter(text, choices) for text in cases} == cases
    assert chosen_letter("I believe that it is right of the dog " + "for many reasons " * 9, choices) is None  # too long for its words to count


def test_blink_rule():
    choices = {"A": "one", "B": "two"}
    cases = {"A": ("(A)", "rule"), "(B)": ("(B)", "rule"), "so (B) then": ("(B)", "rule"), "(A) or (B)?\n\nthe choice is (A) I say": ("(A)", "rule"), "(B) first\n\nthat is it": ("(B)", "rule"), "(A) and (B)": (None, "none"), "(B).": ("(B)", "words"),
             "two": ("(B)", "words"), "D": ("(D)", "rule"), "(C) it is": (None, "none"), "": (None, "none")}
    assert {text: blink_answer(text, choices) for text in cases} == cases


def test_visulogic_rule():
    cases = {r"\boxed{C}": "C", r"\boxed{\text{C}}": "C", r"\boxed{\mathbf{C}}": "C", r"$\boxed{$C$}$": "C", r"\boxed{A}...\boxed{D}": "D", "C": "C", "c": None, "The answer is C": "C", "the correct answer is: d.": "D", "Answer: B\nsince": "B", "So it is C.": "C",
             "D\nbecause": "D", r"\boxed{A or B}": None, r"\boxed{$LETTER}": None, "": None, "So (C).": "C"}
    assert {text: visulogic_answer(text)[0] for text in cases} == cases
    assert visulogic_answer(r"I think \boxed{B.}") == ("B", "words") and visulogic_answer(r"\boxed{B}")[1] == "rule"
    assert last_boxed(r"\boxed{\frac{1}{2}} and \boxed{}") == r"\frac{1" and last_boxed("nothing") == ""


def test_spatialeval_rules():
    maps = {("A. northeast.", 0): "northeast", ("Northwest it is", 0): "Northwest", ("left", 0): None, ("B. The **Shop** is in the East.", 1): "The Shop", ("Mike's Diner is located to the Southeast of", 1): "Mike's Diner", ("C. 4 objects", 2): 4, ("there are no objects", 2): 0, ("", 1): None}
    assert {key: map_answer(*key) for key in maps} == maps
    mazes = {("There are 5 right turns.", 0): 5, ("There is no doubt: 5 right turns", 0): 0, ("the answer is 4", 1): 4, ("**Answer:** 7 turns", 1): 7, ("3", 0): 3, ("none", 0): None, ("No, it is the shortest path", 2): "Yes", ("It is not", 2): "No", ("north", 2): None}
    assert {key: maze_answer(*key) for key in mazes} == mazes
    assert grid_answer("I see a rabbit and a dog", 2) == "rabbit" and grid_answer("nothing", 1) is None and grid_answer("12 blocks", 0) == 12
    def judge(answer, task, number, right): return RULES["spatialeval"](Sample("s/x", "s", "vlm", (), (turn("user", "?"), turn("assistant", right)), dict(task=task, number=number, option="B")), answer)[2]
    assert judge("It is 12", "spatialgrid", 0, "2") and judge("perhaps", "mazenav", 2, "No") and not judge("perhaps", "mazenav", 2, "Yes")  # "2" is part of "12", "no" of "none"
    assert judge("southwest of it", "spatialmap", 0, "Southwest") and not judge("west", "spatialmap", 0, "Southwest") and not judge("1", "mazenav", 5, "1")
    assert judge("B. three of them", "spatialreal", 0, "three") and not judge("A. three of them", "spatialreal", 0, "three") and judge("I count three", "spatialreal", 0, "three")


def test_3dsrbench_counts_groups():
    ids = [f"3d/QID0000{g}{v}" for g in range(2) for v in ("", "-1", "-flip", "-flip-1")] + ["3d/QID00002"]
    graded = pd.DataFrame(dict(id=ids, task=["height_higher"] * 8 + ["location_above"], group="", correct=[True, True, True, False, True, True, True, True, False]))
    table = score(graded, "3dsrbench").set_index(["metric", "task"]).value
    assert table["accuracy", "all"] == 7 / 9 and table["circular", "all"] == 3 / 5 and table["flip", "all"] == 3 / 5 and table["circular + flip", "all"] == 1 / 3
    assert table["circular", "height_higher"] == 3 / 4 and table["circular + flip", "height_higher"] == 1 / 2 and table["circular + flip", "location_above"] == 0
    assert [base_question(q) for q in ("ABCDEFGH", "ABCDEFGH-3", "ABCDEFGH-flip", "ABCDEFGH-flip-2", "A-B")] == ["ABCDEFGH"] * 4 + ["A-B"]


def test_headlines():
    graded = pd.DataFrame(dict(id=range(12), task=["x"] * 10 + ["y"] * 2, group=range(12), correct=[True] * 5 + [False] * 5 + [True] * 2))
    assert score(graded, "blink").iloc[-1].value == (.5 + 1) / 2 and score(graded, "visulogic").iloc[-1].value == 7 / 12


# ---- answers from elsewhere

def questions_of(n=6): return [Sample(f"b/{split}-{i}", "b", "vlm", (), (turn("user", "?"), turn("assistant", "yes")), dict(question_id=str(i), task=split, group=str(i))) for split in ("x", "y") for i in range(n // 2)]


def write_lines(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_answers_from_elsewhere(tmp_path, capsys):
    path, questions = tmp_path / "answers.jsonl", questions_of()
    def write(*rows): write_lines(path, *rows)
    good = [dict(id=q.id, answer="yes") for q in questions]
    write(*good)
    assert read_answers(path, questions) == {q.id: "yes" for q in questions}
    write(*[dict(question_id=q.id.partition("/")[2], text="no") for q in questions[::-1]])
    assert list(read_answers(path, questions).items()) == [(q.id, "no") for q in questions]
    path.write_text(json.dumps([dict(qid=int(q.meta["question_id"]), prediction="no") for q in questions[:3]], indent=1))  # a JSON list, and the benchmark's own ids, where they tell the questions apart
    assert read_answers(path, questions[:3]) == {q.id: "no" for q in questions[:3]}
    with pytest.raises(ValueError, match="line 1: there is a question '0' in each of x, y: .* a file of its own, such as b_x.jsonl, or say in a field 'category'"): read_answers(path, questions)
    with pytest.raises(ValueError, match="in each of x, y"): read_answers(path, questions[:3], questions)  # also where only those of x were asked
    for rows, message in ((good + good[:1], "line 7 is the second answer to question b/x-0"), (good[1:], "1 of 6 questions have no answer, such as 'b/x-0'"), (good + [dict(id="b/z", answer="")], "1 answers to questions that were not asked, such as 'b/z'"),
                          ([dict(question_text="?", answer="yes")], "line 1 has no id"), ([dict(id="b/x-0", said="yes")], "line 1 has no answer"), (["yes"], "line 1 is not a JSON object"), ([dict(id="b/x-0", answer=["yes"])], "line 1: its answer is not a text")):
        write(*rows)
        with pytest.raises(ValueError, match=message): read_answers(path, questions)
    path.write_text("{'id': 1}")
    with pytest.raises(ValueError, match="line 1 is not JSON"): read_answers(path, questions)
    write(*good[1:])
    graded = grade(questions, read_answers(path, questions, missing="wrong"), "tabletop")
    assert graded.correct.tolist() == [False] + [True] * 5 and "1 of 6 questions have no answer and count as wrong" in capsys.readouterr().out
    with pytest.raises(ValueError, match="did you mean 'wrong'"): read_answers(path, questions, missing="wrng")


def test_the_right_answer_is_not_taken_for_the_models(tmp_path):
    "Tables of VLMEvalKit's form hold both; others repeat the question as `text`."
    questions = questions_of()
    path = write_lines(tmp_path / "table.jsonl", *[dict(id=q.id, answer=q.answer, prediction="no") for q in questions])
    with pytest.raises(ValueError, match=r"table.jsonl, line 1 has several fields that may be the model's answer, answer, prediction; name .* field='prediction', or `fields` in a run"): read_answers(path, questions)
    assert set(read_answers(path, questions, field="prediction").values()) == {"no"}
    with pytest.raises(ValueError, match="line 1 has no said: its fields are id, answer, prediction"): read_answers(path, questions, field="said")
    ask = [Sample(q.id, "b", "vlm", (), (turn("user", "<image>\nIs there a dog?\nAnswer with a word."), turn("assistant", "no")), q.meta) for q in questions]
    write_lines(path, *[dict(id=q.id, text="Is there a dog?", response="no") for q in ask])
    with pytest.raises(ValueError, match="answer, text, response; name"): read_answers(path, ask)
    write_lines(path, *[dict(id=q.id, text="Is there a dog?", said="no") for q in ask])
    with pytest.raises(ValueError, match="line 1: its text is the question and not an answer"): read_answers(path, ask)
    assert set(read_answers(path, ask, field="said").values()) == {"no"}


@pytest.mark.parametrize("kind, right", [("pope", "yes"), ("spatialeval", "No"), ("spatialeval", ""), ("tabletop", "")])
def test_no_answer_is_wrong_whatever_the_rules(tmp_path, kind, right, capsys):
    "An empty text is a yes to POPE, 'No' is part of SpatialEval's 'None', and nothing is part of everything."
    questions = [Sample(f"b/{i}", "b", "vlm", (), (turn("user", "?"), turn("assistant", right)), dict(task="mazenav", number=2, option="B")) for i in range(4)]
    path = write_lines(tmp_path / "a.jsonl", dict(id="b/0", answer=""), dict(id="b/1", answer=None), dict(id="b/2", answer=float("nan")))
    with pytest.raises(ValueError, match="3 of 4 questions have no answer, such as 'b/1'"): read_answers(path, questions)
    table = grade(questions, read_answers(path, questions, missing="wrong"), kind)
    assert table.correct.tolist() == [True] + [False] * 3 and table.by.tolist()[1:] == ["absent"] * 3 and "3 of 4 questions have no answer and count as wrong" in capsys.readouterr().out
    assert score(table, kind).set_index(["task", "metric"]).of["all", "accuracy"] == 4


def test_no_answer_is_neither_yes_nor_no():
    questions = [Sample(f"pope/{i}", "pope", "vlm", (), (turn("user", "?"), turn("assistant", right)), dict(task="random")) for i, right in enumerate(["yes", "yes", "no", "no"])]
    value = score(grade(questions, {"pope/0": "yes", "pope/1": None, "pope/2": "yes", "pope/3": None}, "pope"), "pope").set_index(["task", "metric"]).value["random"]
    assert value.to_dict() == {"accuracy": 1 / 4, "precision": 1 / 2, "recall": 1 / 2, "yes ratio": 2 / 4, "F1": 1 / 2}


def test_a_line_ends_where_json_ends_it(tmp_path, tiny, monkeypatch):
    "Not at a line separator within an answer."
    from embodied_midtrain import retention
    said = "yes\u2028no\x85\nno"
    monkeypatch.setattr(retention, "answer_questions", lambda backbone, questions, **how: ([said] * len(questions), [False] * len(questions)))
    questions = list(TabletopQuestions("tabletop", 1))
    write_answers(tiny, questions, tmp_path / "a.jsonl", 3)
    assert set(read_answers(tmp_path / "a.jsonl", questions).values()) == {said}


# ---- a published model, on POPE's own questions

SPLITS = ("random", "popular", "adversarial")


@pytest.fixture
def published(tmp_path, request):
    "POPE's questions, read without pictures; its rows; a folder for answers, of a model that always says yes."
    folder = request.config.rootpath / POPE
    rows = {split: [json.loads(line) for line in (folder / f"coco_pope_{split}.json").read_text().splitlines()] for split in SPLITS}
    (tmp_path / "model").mkdir()
    return {"reader": "pope", "path": str(folder), "images": False}, rows, tmp_path / "model"


def accuracies(spec, folder, count=0, **how):
    metrics = judge_all([spec], {}, count, elsewhere={"model": folder}, **how)[1]
    return metrics[metrics.metric == "accuracy"].set_index("task").value.to_dict()


FORMS = {  # row of POPE, what was said -> row of answers
    "POPE's own": lambda row, said: dict(question=row["text"].lower(), answer=said),  # without ids, in the order of the questions
    "LLaVA's fields": lambda row, said: dict(question_id=row["question_id"], prompt=row["text"], text=said, answer_id="x", model_id="y", metadata={}),
    "with ids": lambda row, said: dict(question_id=row["question_id"], question=row["text"], answer=said)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["coco_pope_{}.json", "pope_{}.jsonl"])
def test_published_ids_begin_anew_in_each_split(published, form, name):
    spec, rows, folder = published
    for split in SPLITS: write_lines(folder / name.format(split), *[FORMS[form](row, {"random": row["label"], "popular": "Yes", "adversarial": "No, there is not."}[split]) for row in rows[split]])
    assert accuracies(spec, folder) == {"random": 1, "popular": .5, "adversarial": .5, "all": 2 / 3}
    lost = (folder / name.format("popular")).read_text().splitlines()
    (folder / name.format("popular")).write_text("\n".join(lost[1:]))
    with pytest.raises(ValueError, match="is there a dining table.* in the order of the questions" if form == "POPE's own" else "1 of 72 questions have no answer, such as 'pope/popular-1'"): accuracies(spec, folder)


def test_one_file_of_all_splits_says_which(published):
    spec, rows, folder = published
    every = [dict(question_id=row["question_id"], category=split, text=row["label"]) for split in SPLITS[::-1] for row in rows[split]]
    write_lines(folder / "pope.jsonl", *every)
    assert accuracies(spec, folder)["all"] == 1
    write_lines(folder / "pope.jsonl", *[dict(row, id=str(i)) for i, row in enumerate(every)])  # as on the hub, whose `id` is the number of the row
    assert accuracies(spec, folder)["all"] == 1
    write_lines(folder / "pope.jsonl", *[dict(question_id=row["question_id"], text=row["text"]) for row in every])
    with pytest.raises(ValueError, match=r"pope.jsonl, line 1: there is a question '1' in each of random, popular, adversarial: .*pope_random.jsonl, or say in a field 'category'"): accuracies(spec, folder)
    (folder / "pope.jsonl").unlink()
    for split in SPLITS: write_lines(folder / f"coco_pope_{split}.json", *rows[split])
    with pytest.raises(ValueError, match="coco_pope_random.json, line 1: its text is the question"): accuracies(spec, folder)  # the questions, not the answers
    write_lines(folder / "a_pope_random.json", *rows["random"])
    with pytest.raises(ValueError, match="several files of a task, a_pope_random.json, coco_pope_random.json"): accuracies(spec, folder)


def test_an_id_of_one_split_is_not_taken_for_another(published, tmp_path):
    "An older random file is shorter; answers to it have no business with what popular has under that number."
    spec, rows, folder = published
    (shorter := tmp_path / "shorter").mkdir()
    write_lines(shorter / "coco_pope_random.json", *rows["random"][:-1]), write_lines(shorter / "coco_pope_popular.json", *rows["popular"])
    for split in SPLITS[:2]: write_lines(folder / f"pope_{split}.jsonl", *[dict(question_id=row["question_id"], answer="no") for row in rows[split][:24 if split == "random" else 23]])
    with pytest.raises(ValueError, match="1 answers to questions that were not asked, such as '24'"): accuracies(dict(spec, path=str(shorter)), folder, missing="wrong")


def test_a_complete_file_does_for_some_of_the_questions(published):
    "For a draw, for one split, and where a record was set aside."
    spec, rows, folder = published
    for split in SPLITS: write_lines(folder / f"pope_{split}.jsonl", *[dict(question_id=row["question_id"], answer=row["label"]) for row in rows[split]])
    few = judge_all([spec], {}, 10, elsewhere={"model": folder})[0]
    assert 10 <= len(few) < 20 and few.correct.all()
    assert accuracies(dict(spec, path=f"{spec['path']}/coco_pope_popular.json"), folder / "pope_popular.jsonl") == {"popular": 1, "all": 1}
    (aside := folder.parent / "aside").mkdir()
    for split in SPLITS: write_lines(aside / f"coco_pope_{split}.json", *[dict(row, label="maybe") if (split, row["question_id"]) == ("popular", 3) else row for row in rows[split]])
    graded = judge_all([dict(spec, path=str(aside))], {}, elsewhere={"model": folder})[0]
    assert len(graded) == 71 and graded.correct.all()
    one = judge_all([dict(spec, path=str(aside / "coco_pope_popular.json"))], {}, elsewhere={"model": folder / "pope_popular.jsonl"})[0]
    assert len(one) == 23 and one.correct.all()


def test_a_picture_that_cannot_be_decoded_is_told(tmp_path, tiny):
    questions = list(TabletopQuestions("tabletop", 3))
    questions[2] = Sample(questions[2].id, "tabletop", "vlm", (ImageRef(data=b"no picture"),), questions[2].messages, questions[2].meta)
    assert write_answers(tiny, questions, tmp_path / "a.jsonl", 4, max_new_tokens=8) == dict(cut_off=0, not_decoded=1)
    row = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[2])
    assert row["answer"] is None and "cannot be decoded" in row["reason"]


def test_what_a_checkpoint_could_not_see_counts_for_nobody(published, pope, tiny):
    spec, rows, folder = published
    (pope[1] / rows["random"][0]["image"]).write_bytes(b"no picture")
    seen = dict(spec, images=str(pope[1]))
    def asked(spec):
        write_answers(tiny, list(open_source(benchmark_spec(spec))), folder.parent / "base/pope.jsonl", max_new_tokens=3)
        return {"base": folder.parent / "base"}
    for split in SPLITS: write_lines(folder / f"pope_{split}.jsonl", *[dict(question_id=row["question_id"], answer=row["label"]) for row in rows[split]])
    graded, _, differences = judge_all([seen], asked(seen), elsewhere={"model": folder})
    lost = sum(row["image"] == rows["random"][0]["image"] for split in SPLITS for row in rows[split])
    assert lost > 1 and graded.groupby("checkpoint").size().to_dict() == {"base": 72 - lost, "model": 72 - lost} and (differences.questions.iloc[-1], differences.lost.iloc[-1]) == (72 - lost, 0)
    (folder.parent / "base/pope.jsonl").unlink()
    with pytest.raises(ValueError, match="pope: no question is left to judge"): judge_all([seen], asked(spec))  # a checkpoint cannot be asked without pictures


def test_answers_from_elsewhere_need_not_cover_all_benchmarks(published, tmp_path, tiny, capsys):
    spec, rows, folder = published
    tabletop = {"reader": "tabletop", "count": 3}
    write_answers(tiny, list(TabletopQuestions("tabletop", 3)), tmp_path / "base/tabletop.jsonl", max_new_tokens=8)
    write_answers(tiny, [], tmp_path / "base/pope.jsonl")
    write_lines(folder / "tabletop.jsonl", *[dict(question_id=q.meta["question_id"], answer="right is not", prediction=q.answer) for q in TabletopQuestions("tabletop", 3)][1:])
    how = dict(elsewhere={"model": folder}, fields={"model": "prediction"}, missing="wrong")
    graded, metrics, differences = judge_all([tabletop, spec], {}, **how)
    assert set(metrics.benchmark) == {SHOWN["tabletop"]} and graded.correct.tolist() == [False] + [True] * 11 and f"model: no answers to pope in {folder}" in capsys.readouterr().out
    assert beside_paper(metrics)["ours: model"].tolist()[1:] == ["-"] * 5
    table = judge_all([tabletop], {"base": tmp_path / "base"}, **how)[2].set_index("task")
    assert table.questions["all"] == 12 and set(table.checkpoint) == {"model"}
    with pytest.raises(ValueError, match="several fields .*answer, prediction"): judge_all([tabletop], {}, elsewhere={"model": folder})
    with pytest.raises(ValueError, match="'base' is a checkpoint of this run"): judge_all([tabletop], {"base": tmp_path / "base"}, elsewhere={"base": folder})
    with pytest.raises(ValueError, match="unknown name of answers from elsewhere 'modl'; did you mean 'model'"): judge_all([tabletop], {}, elsewhere={"model": folder}, fields={"modl": "x"})
    with pytest.raises(FileNotFoundError, match="has no answers of model: a file"): judge_all([tabletop, spec], {}, elsewhere={"model": tmp_path / "nowhere"})


# ---- generation

@pytest.fixture(scope="module")
def tiny(): return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="module")
def qwen():
    "The tiny Qwen3-VL of the backbone's notebook, with its positions by row and column."
    from transformers import AutoModelForImageTextToText, Qwen3VLConfig
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    words = tiny_tokenizer(["point to the apple is there a cup yes no"])
    words.add_special_tokens({"additional_special_tokens": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]})
    words.chat_template = TEMPLATE.replace("<IMG_CONTEXT>", "<|vision_start|><|image_pad|><|vision_end|>")
    ids = {name: words.convert_tokens_to_ids(f"<|{token}|>") for name, token in dict(image_token_id="image_pad", video_token_id="video_pad", vision_start_token_id="vision_start", vision_end_token_id="vision_end").items()}
    config = Qwen3VLConfig(text_config=dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=16, intermediate_size=64, initializer_range=.2,
                                            rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}),
                           vision_config=dict(hidden_size=32, depth=3, num_heads=2, intermediate_size=64, patch_size=8, spatial_merge_size=2, out_hidden_size=32, num_position_embeddings=64, deepstack_visual_indexes=[1], initializer_range=.2), **ids)
    torch.manual_seed(1)
    return Backbone(AutoModelForImageTextToText.from_config(config).eval(), words, Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, min_pixels=32 * 32, max_pixels=128 * 128), "tiny Qwen3-VL")


@pytest.fixture(scope="module")
def asked():
    "Questions of several lengths, with pictures of several sizes, with two pictures and with none."
    rng, questions = np.random.default_rng(0), list(TabletopQuestions("tabletop", 3))
    pictures = [ImageRef(array=rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((48, 96), (64, 64), (120, 70))]
    ask = lambda i, images, text: Sample(f"q/{i}", "q", "vlm", tuple(images), (turn("user", "<image>\n" * len(images) + text), turn("assistant", "yes")))
    return questions + [ask(0, pictures[:1], "point to the apple"), ask(1, pictures[1:], "is there a cup and an apple in one of the two pictures or is there none"), ask(2, [], "what is needed to cut"), ask(3, pictures[2:], "is there a cup")]


@torch.no_grad()
def one_token_at_a_time(backbone, question, n):
    "Greedy decoding the obvious way: the whole forward pass again for each token, no cache, no padding."
    batch = backbone.batch([question])
    ids, written = batch["input_ids"], []
    while len(written) < n:
        more = {k: v for k, v in batch.items() if k not in ("labels", "input_ids", "attention_mask", "mm_token_type_ids")}
        if "mm_token_type_ids" in batch: more["mm_token_type_ids"] = (ids == backbone.model.config.image_token_id).long()
        token = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0, -1].argmax()
        ids = torch.cat([ids, token.view(1, 1)], 1)
        written.append(int(token))
        if written[-1] == backbone.tokenizer.eos_token_id: break
    return backbone.tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["tiny", "qwen"])
def test_greedy_answers_do_not_mind_their_batch(family, asked, request):
    backbone = request.getfixturevalue(family)
    alone = answer_questions(backbone, asked, 10, batch_size=1)
    assert alone == answer_questions(backbone, asked, 10, batch_size=3) == answer_questions(backbone, asked, 10, batch_size=64)
    backwards = answer_questions(backbone, asked[::-1], 10, batch_size=4)
    assert [part[::-1] for part in backwards] == list(alone)
    assert alone[0] == [one_token_at_a_time(backbone, q, 10) for q in asked]
    assert len(set(alone[0])) > 2  # not the same to all, which would prove nothing
    assert answer_questions(backbone, [], 10) == ([], [])


def test_what_a_checkpoint_says_about_sampling_is_overruled(tiny, asked):
    plain = answer_questions(tiny, asked, 8)
    before = tiny.model.generation_config.to_dict()
    try:
        tiny.model.generation_config.update(do_sample=True, temperature=9.0, top_k=50, top_p=.9, repetition_penalty=5.0)
        assert answer_questions(tiny, asked, 8) == plain
    finally: tiny.model.generation_config.update(**before)


def test_padding_moves_to_the_left(qwen, asked):
    batch = qwen.batch(asked)
    left = left_padded(batch)
    for row, (ids, mask) in enumerate(zip(left["input_ids"], left["attention_mask"])):
        n = int(mask.sum())
        assert mask[-n:].all() and (ids[-n:] == batch["input_ids"][row, :n]).all() and (ids[:-n] == qwen.tokenizer.pad_token_id).all()
    assert torch.equal(left["mm_token_type_ids"], (left["input_ids"] == qwen.model.config.image_token_id).long()) and torch.equal(left["pixel_values"], batch["pixel_values"])


def test_answers_that_are_cut_off_are_told(tiny, asked, tmp_path):
    answered = asked[:9]
    assert all(answer_questions(tiny, answered, 1)[1]) and not any(answer_questions(tiny, answered, 16)[1])
    assert write_answers(tiny, answered, tmp_path / "cut.jsonl", 100, max_new_tokens=1) == dict(cut_off=9, not_decoded=0)
    assert all(json.loads(line)["cut"] for line in (tmp_path / "cut.jsonl").read_text().splitlines())


def test_resumed_equals_uninterrupted_to_the_byte(tiny, asked, tmp_path, monkeypatch):
    from embodied_midtrain import retention
    write_answers(tiny, asked, tmp_path / "whole.jsonl", 4, max_new_tokens=8, batch_size=3)
    calls, real = [], retention.answer_questions
    def dies(backbone, questions, **how):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(len(questions))
        return real(backbone, questions, **how)
    with monkeypatch.context() as patch:
        patch.setattr(retention, "answer_questions", dies)
        with pytest.raises(KeyboardInterrupt): write_answers(tiny, asked, tmp_path / "cut.jsonl", 4, max_new_tokens=8, batch_size=3)
    assert sorted(p.name for p in tmp_path.glob("cut*")) == ["cut-00000.part", "cut-00001.part"]
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(retention, "answer_questions", lambda backbone, questions, **how: done.append(len(questions)) or real(backbone, questions, **how))
        write_answers(tiny, asked, tmp_path / "cut.jsonl", 4, max_new_tokens=8, batch_size=3)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and done == [4] * ((len(asked) - 8) // 4) + [len(asked) % 4] * (len(asked) % 4 > 0)
    assert not list(tmp_path.glob("*.part"))


# ---- comparisons

def graded(correct, task="x", group=None): return pd.DataFrame(dict(id=range(len(correct)), task=task, group=group if group is not None else range(len(correct)), correct=np.array(correct, bool)))


def test_test_and_difference_by_hand():
    before, after = graded([1, 1, 1, 1, 0, 0, 0, 0, 0, 1]), graded([1, 1, 0, 1, 1, 1, 1, 1, 1, 1])
    table = compare(after, before, False).set_index("task").loc["all"]
    assert (table.won, table.lost, table.questions) == (5, 1, 10) and np.isclose(table.difference, .4) and np.isclose(table.p, 2 * (1 + 6) / 2**6) and np.isclose(table.p, binomtest(1, 6).pvalue)
    assert table.low < .4 < table.high
    same = compare(before, before, False).iloc[0]
    assert same.difference == 0 and same.p == 1 and same.low == -same.high < 0  # nothing differs, and still it is not certain
    with pytest.raises(ValueError, match="1 questions were answered by one of them only"): compare(after[1:], before, False)
    shuffled = compare(after.sample(frac=1, random_state=0), before, False).set_index("task").loc["all"]
    assert shuffled.difference == table.difference and shuffled.won == table.won


def test_interval_covers_what_it_promises():
    "Of 60 invented comparisons with questions in groups of four, the 95 % interval holds the true difference in nearly all."
    hits = 0
    for trial in range(60):
        rng = np.random.default_rng(trial)
        groups, shared = np.repeat(range(60), 4), np.repeat(rng.normal(0, .15, 60), 4)
        after, before = (graded(rng.random(240) < p + shared, group=groups) for p in (.6, .5))
        row = compare(after, before, False).iloc[-1]
        hits += row.low <= .1 <= row.high
    assert 53 <= hits


def test_variants_of_a_question_are_one_piece_of_evidence():
    "Copies change neither the p-value of a task nor that of the whole; groups that span tasks are one in the whole."
    before, after = graded([0] * 20), graded([1] * 8 + [0] * 12)
    copies = [pd.concat([t] * 5, ignore_index=True).assign(id=range(100), task=np.repeat(list("abcde"), 20)) for t in (after, before)]
    once, many = compare(after, before, False), compare(*copies, False).set_index("task")
    assert np.allclose(once.p, 2 * .5**8) and np.allclose(many.p, 2 * .5**8) and many.groups.tolist() == [20] * 6 and many.questions.tolist() == [20] * 5 + [100] and many.won["all"] == 40


def test_the_headline_and_its_p_speak_of_the_same():
    "A small task rises, a large one falls: the mean of the two stands still where the questions, pooled, have fallen."
    def task(name, n, won, lost): return pd.DataFrame(dict(id=[f"{name}{i}" for i in range(n)], task=name, group=[f"{name}{i}" for i in range(n)], a=np.arange(n) < won, b=(won <= np.arange(n)) & (np.arange(n) < won + lost)))
    def change(*tasks):
        rows = pd.concat(tasks, ignore_index=True)
        return [compare(rows.assign(correct=rows.a), rows.assign(correct=rows.b), mean).iloc[-1] for mean in (True, False)]
    mean, pooled = change(task("small", 20, 5, 0), task("big", 400, 0, 100))
    assert mean.difference == 0 and np.isclose(mean.p, 1) and pooled.difference < 0 and pooled.p < 1e-9 and (mean.won, mean.lost) == (pooled.won, pooled.lost) == (5, 100)
    mean, pooled = change(task("small", 21, 15, 0), task("big", 400, 15, 15))  # weights that are no whole numbers
    assert mean.low > 0 and mean.p < .01 and pooled.p > mean.p
    mean, pooled = change(task("x", 30, 9, 2), task("y", 30, 4, 3))            # tasks of one size: McNemar's exact test
    assert mean.p == pooled.p and np.isclose(mean.p, binomtest(13, 18).pvalue)


def test_nothing_changed_is_as_uncertain_as_the_headline():
    "A mean over a small and a large task is less certain than all questions taken together."
    same = pd.DataFrame(dict(id=range(420), task=["small"] * 20 + ["big"] * 400, group=range(420), correct=True))
    mean, pooled = (compare(same, same, by_task).iloc[-1] for by_task in (True, False))
    assert mean.difference == pooled.difference == 0 and mean.high > 3 * pooled.high > 0


def test_3dsrbench_is_compared_by_things_and_not_by_variants(tmp_path):
    "48 rows are 12 things; two things known in all their four variants are two pieces of evidence and not eight."
    write_3dsr(tmp_path / "3dsrbench_v1_vlmevalkit_circular.tsv")
    spec, folders = {"reader": "3dsrbench", "path": str(tmp_path)}, {"base": tmp_path / "a", "after": tmp_path / "b"}
    questions = list(open_source(benchmark_spec(spec)))
    for name, folder in folders.items():
        folder.mkdir()
        knows = lambda q: name == "after" and q.meta["group"] in ("QID00000", "QID00002")
        (folder / "3dsrbench.jsonl").write_text("".join(json.dumps(dict(id=q.id, answer=q.answer if knows(q) else "none")) + "\n" for q in questions))
    row = judge_all([spec], folders)[2].set_index("task").loc["all"]
    assert (row.questions, row.groups, row.won, row.lost) == (48, 12, 8, 0) and np.isclose(row.p, 2 * .5**2) and row.low == 0


def test_words_and_figure_tell_the_same():
    before, better, worse = graded([0] * 30 + [1] * 70), graded([0] * 10 + [1] * 90), graded([0] * 60 + [1] * 40)
    tables = {"base": before, "random-0": better, "proximity-0": worse, "same": before}
    metrics = pd.concat([score(t).assign(benchmark="POPE", checkpoint=name) for name, t in tables.items()])
    differences = pd.concat([compare(t, before, False).assign(benchmark="POPE", checkpoint=name) for name, t in tables.items() if name != "base"])
    line, = retention_text(metrics, differences)
    assert line.startswith("POPE: base answers 70.0 % right; random-0 90.0 % (+20.0 points,") and "): better;" in line and "p <" not in line and "proximity-0 40.0 % (-30.0 points," in line and ": worse;" in line and "same 70.0 % (+0.0 points," in line and line.endswith("no difference that the questions can tell.")
    figure = plot_change(differences)
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["x", "POPE"] and [t.get_text() for t in axis.get_legend().get_texts()] == ["random-0", "proximity-0", "same"]
    table = beside_paper(metrics).set_index("accuracy, %")
    assert table.loc["POPE"].tolist() == ["70.0 (60.4 to 78.1)", "90.0 (82.6 to 94.5)", "40.0 (30.9 to 49.8)", "70.0 (60.4 to 78.1)", "86.33", "86.29"] and table.loc["BLINK"].tolist() == ["-"] * 4 + ["43.45", "40.45"]
    assert all(column.startswith(("ours: ", "paper: ")) for column in table.columns)


# ---- the stage's parts

def test_synthetic_questions_are_new_to_all():
    questions = list(TabletopQuestions("tabletop", 30))
    assert len(questions) == 120 == len({q.id for q in questions}) and all(len(q.images) == 1 and len(q.messages) == 2 for q in questions)
    pool = {s.images[0].array.tobytes() for seed in (0, 1, 2) for name in ("mini-llava", "mini-embspatial", "mini-vcr") for s in TabletopSource(name, 300, seed)}
    assert not {q.images[0].array.tobytes() for q in questions} & pool
    assert [q.id for q in TabletopQuestions("tabletop", 30).fetch([questions[50].id])] == [questions[50].id]


def test_draws_keep_variants_together(tmp_path):
    write_3dsr(tmp_path / "3dsrbench_v1_vlmevalkit_circular.tsv")
    questions = list(ThreeDSRSource("3dsr", str(tmp_path)))
    chosen = choose_questions(questions, 10)
    assert len(chosen) == 12 and pd.Series([q.meta["group"] for q in chosen]).value_counts().eq(4).all()
    assert chosen == choose_questions(questions, 10) != choose_questions(questions, 10, seed=1) and choose_questions(questions, 10)[0].id == min((q.id for q in chosen), key=[q.id for q in questions].index)


def test_names(pope):
    assert BENCHMARKS.keys() == RULES.keys() == LENGTHS.keys() == SHOWN.keys()
    spec = benchmark_spec({"reader": "pope", "path": str(pope[0]), "images": str(pope[1])})
    assert open_source(spec).benchmark == "pope" and spec["name"] == "pope" and len(sources_hash([spec])) == 16
    assert benchmark_spec({"reader": "my.module:Class", "name": "x"})["reader"] == "my.module:Class"
    with pytest.raises(ValueError, match="did you mean 'blink'"): benchmark_spec({"reader": "blnk"})


def test_five_benchmarks_from_question_to_table(tmp_path, tiny, pope):
    "The tiny backbone knows nothing of these, but all the way from readers to figures is real."
    write_blink(tmp_path / "blink")
    write_spatialeval(tmp_path / "spatial")
    write_3dsr(tmp_path / "3dsrbench_v1_vlmevalkit_circular.tsv", many=3)
    (tmp_path / "visulogic/images").mkdir(parents=True)
    (tmp_path / "visulogic/images/0.png").write_bytes(RED)
    (tmp_path / "visulogic/data.jsonl").write_text("\n".join(json.dumps(dict(image_path="images/0.png", label="A", question="Choose.", tag="Other", id=str(i))) for i in range(5)))
    specs = [dict(reader="pope", path=str(pope[0]), images=str(pope[1])), dict(reader="blink", path=str(tmp_path / "blink"), tasks=["Jigsaw"]), dict(reader="visulogic", path=str(tmp_path / "visulogic")),
             dict(reader="3dsrbench", path=str(tmp_path)), dict(reader="spatialeval", path=str(tmp_path / "spatial"))]
    stage = Stage(tmp_path / "run", "retention/base", dict(benchmarks=specs, samples=9, max_new_tokens=3, batch_size=16, part_size=8))
    answer_checkpoint(stage, "tiny", None, "float32")
    assert stage.done and sorted(stage.manifest()["files"]) == sorted(f"{name}.jsonl" for name in ("pope", "blink", "visulogic", "3dsrbench", "spatialeval"))
    (tmp_path / "perfect").mkdir()
    for spec in specs:
        chosen = choose_questions(list(open_source(benchmark_spec(spec))), 9)
        (tmp_path / f"perfect/{spec['reader']}.jsonl").write_text("\n".join(json.dumps(dict(question_id=q.id, text=q.answer)) for q in chosen))
    judged, metrics, differences = judge_all(specs, {"base": stage.path}, 9, elsewhere={"perfect": tmp_path / "perfect"})
    assert (metrics[(metrics.checkpoint == "perfect") & (metrics.metric != "yes ratio") & metrics.value.notna()].value == 1).all()
    assert set(metrics.benchmark) == {"POPE", "BLINK", "VisuLogic", "3DSRBench", "SpatialEval"} and len(retention_text(metrics, differences)) == 5
    assert set(metrics[metrics.benchmark == "3DSRBench"].metric) == {"accuracy", "circular", "flip", "circular + flip"} and (judged.groupby(["benchmark", "checkpoint"]).size().unstack().nunique(axis=1) == 1).all()
    assert plot_change(differences).axes[0].get_xlabel() and beside_paper(metrics).shape == (5, 5)


def test_rows_are_read_by_threads():
    "csv's limit of a field is the whole process's: one thread must not take it back while another reads."
    from concurrent.futures import ThreadPoolExecutor
    from embodied_midtrain.sources.benchmarks import _tsv_row
    line, before = b"1\t" + b"a" * 200_000, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads: assert all(len(row) == 2 for row in threads.map(_tsv_row, [line] * 1500))
    finally: sys.setswitchinterval(before)
