"""Perplexity: equal to the model's own loss, alone or in a batch; actions as text and back; resuming; what fine-tuning on actions does to it."""
import numpy as np
import pandas as pd
import pytest
import torch

from embodied_midtrain.backbone import load_backbone
from embodied_midtrain.midtrain import midtrain
from embodied_midtrain.perplexity import (action_chats, action_limits, action_of, action_text, answer_likelihood, by_delta, by_perplexity, choose_samples, likelihood_table,
                                          perplexity, plot_ranks, write_likelihoods)
from embodied_midtrain.samples import ImageRef, Sample
from embodied_midtrain.sources.base import Record, RobotSource
from embodied_midtrain.tabletop.pool import WRITERS, TabletopRobot, TabletopSource


@pytest.fixture(scope="module")
def tiny(): return load_backbone("tiny", device="cpu")


@pytest.fixture(scope="module")
def acting(tmp_path_factory):
    "A backbone that has learnt some actions, and its folder."
    model, folder = load_backbone("tiny", device="cpu"), str(tmp_path_factory.mktemp("acting") / "model")
    midtrain(model, action_chats(TabletopRobot("reach", count=20), 48), steps=15, lr=1e-2, batch_size=16, optimizer="muon")
    model.save(folder)
    return model, folder


@pytest.fixture(scope="module")
def mixed(): return [sample for name in WRITERS for sample in TabletopSource(name, 3)]


@torch.no_grad()
def own_loss(backbone, sample): return backbone.model(**backbone.batch([sample], answers=True)).loss.item()


def test_is_the_models_own_loss(tiny, acting, mixed):
    "Whatever the source, one turn or several: the loss that transformers computes for the sample alone."
    assert {len(s.messages) for s in mixed} >= {2, 4}
    for backbone in (tiny, acting[0]):
        nll, tokens = answer_likelihood(backbone, mixed)
        assert np.allclose(nll, [own_loss(backbone, s) for s in mixed], rtol=2e-5, atol=1e-6)
        assert tokens.tolist() == [int((backbone.batch([s], answers=True)["labels"] != -100).sum()) for s in mixed]
        assert np.allclose(perplexity(backbone, mixed), np.exp(nll))


@pytest.mark.parametrize("size", [2, 8, 64])
def test_batches_do_not_matter(acting, mixed, size):
    "Alone, in eights, all at once, in any order: the same up to the rounding of float32."
    alone = answer_likelihood(acting[0], mixed, batch_size=1)[0]
    backwards = answer_likelihood(acting[0], mixed[::-1], batch_size=size)[0][::-1]
    assert np.allclose(answer_likelihood(acting[0], mixed, batch_size=size)[0], alone, rtol=1e-5, atol=1e-6) and np.allclose(backwards, alone, rtol=1e-5, atol=1e-6)


def test_another_picture_or_question_changes_it(tiny, mixed):
    "It is conditioned on what is asked: a loss that forgot the picture would not notice."
    sample = next(s for s in mixed if s.source == "mini-refspatial")
    other = Sample(sample.id, sample.source, "vlm", (ImageRef(array=255 - sample.images[0].array),), sample.messages)
    one, two = perplexity(tiny, [sample, other])
    assert abs(one - two) > 1e-3


def test_a_sample_without_answer_has_none(tiny, mixed):
    nll, tokens = answer_likelihood(tiny, [mixed[0], mixed[1].asked()])
    assert np.isfinite(nll[0]) and np.isnan(nll[1]) and tokens[1] == 0
    assert [len(x) for x in answer_likelihood(tiny, [])] == [0, 0]


def test_high_is_near(tiny, acting):
    "Learning actions brings unseen actions nearer, and under delta perplexity they then lie in front of the pool, of which the larger part moves away."
    unseen, pool = action_chats(TabletopRobot("reach", count=20, seed=5), 12), [sample for name in WRITERS for sample in TabletopSource(name, 20)]
    after, before, delta = by_perplexity(acting[0]), by_perplexity(tiny), by_delta(acting[0], tiny)
    assert (after(unseen) > before(unseen)).all() and (after(pool) < before(pool)).mean() > 0.5
    assert delta(unseen).min() > 0 > np.median(delta(pool)) and delta(unseen).min() > delta(pool).max()


def test_table_holds_what_the_scores_are_made_of(tiny, acting, mixed):
    table = likelihood_table(mixed, acting[0], tiny)
    assert np.allclose(table.vla_perplexity, -np.exp(table.nll_vla)) and np.allclose(table.delta_perplexity, np.exp(table.nll_base) - np.exp(table.nll_vla))
    assert np.allclose(table.delta_perplexity, by_delta(acting[0], tiny)(mixed)) and table.id.tolist() == [s.id for s in mixed]


def test_actions_as_text_and_back():
    rng = np.random.default_rng(0)
    actions = np.concatenate([rng.normal(0, [1, 2, 3, 0.1, 1e-3, 5], (500, 6)), rng.integers(0, 2, (500, 1))], 1)
    actions[:, 4] = 0.25  # a number that never changes
    limits = action_limits([actions[:100], actions[100:]])
    assert np.allclose(limits, np.quantile(actions, [0.01, 0.99], axis=0))
    for bins in (256, 16):
        texts = [action_text(a, limits, bins) for a in actions]
        assert all(len(t.split()) == 7 and 0 <= int(n) < bins for t in texts for n in t.split())
        back = np.array([action_of(t, limits, bins) for t in texts])
        assert (np.abs(back - np.clip(actions, *limits)) <= (limits[1] - limits[0]) / bins / 2 + 1e-9).all()
    assert action_text(limits[0], limits).split()[:4] == ["0"] * 4 and action_text(limits[1] * 9, limits).split()[0] == "255"
    for wrong in ("1 2 3", "1 2 3 4 5 6 256", "a b c d e f g", "1 2 3 4 5 6 -7"):
        with pytest.raises(ValueError, match="not 7 numbers from 0 to 255"): action_of(wrong, limits)
    with pytest.raises(ValueError, match="no episode"): action_limits([])


class Kept(RobotSource):
    "Episodes that were drawn once."
    shortest = 1
    def __init__(self, name, stride=1):
        super().__init__(name, stride)
        self.kept = list(TabletopRobot(name, count=10).episodes())
    def records(self, start=0): return (Record(str(i), "kept", e) for i, e in enumerate(self.kept[start:], start))
    def episode(self, record): return record.value


def test_chats_are_drawn_from_the_frames_and_end_in_the_action():
    robot = Kept("reach", stride=3)
    limits, episodes = action_limits(robot.actions()), {e.id: e for e in robot.episodes()}
    chats = action_chats(robot, 10_000)
    assert {c.id for c in chats} == {s.id for s in robot}  # the frames that features see
    for chat in chats:
        episode, t = episodes[chat.id.rsplit("/", 1)[0]], int(chat.id.rsplit("/", 1)[1])
        assert chat.answer == action_text(episode.actions[t], limits) and chat.messages[:1] == episode.frame(t).messages
    assert [c.id for c in action_chats(robot, 7)] == [c.id for c in chats[:7]] != [c.id for c in action_chats(robot, 7, seed=1)]


HOW = dict(base="tiny", revision=None, dtype="float32", batch_size=8, part_size=12)


def test_resumed_equals_uninterrupted_to_the_byte(acting, tmp_path):
    specs = [(0, {"reader": "tabletop", "name": "mini-laion", "count": 30}, None), (3, {"reader": "tabletop", "name": "mini-vcr", "count": 30}, [f"mini-vcr/{i}" for i in (2, 3, 5, 29)])]
    for name in ("whole", "cut"): write_likelihoods(specs, folder=str(tmp_path / name), vla=acting[1], **HOW)
    (tmp_path / "cut" / "part-00-00001.parquet").unlink()
    kept = (tmp_path / "cut" / "part-00-00002.parquet").stat().st_mtime_ns
    write_likelihoods(specs, folder=str(tmp_path / "cut"), vla=acting[1], **HOW)
    whole, cut = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert whole == cut and sorted(whole) == ["part-00-00000.parquet", "part-00-00001.parquet", "part-00-00002.parquet", "part-03-00000.parquet"]
    assert (tmp_path / "cut" / "part-00-00002.parquet").stat().st_mtime_ns == kept
    assert pd.read_parquet(tmp_path / "whole" / "part-03-00000.parquet").id.tolist() == [f"mini-vcr/{i}" for i in (2, 3, 5, 29)]


def test_a_broken_picture_is_left_out(acting, tmp_path):
    import json
    records = [{"id": str(i), "image": f"{i}.png", "conversations": [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cup"}]} for i in range(30)]
    for i in range(30): (tmp_path / f"{i}.png").write_bytes(b"no picture") if i == 4 else ImageRef(array=np.full((20, 20, 3), i, np.uint8)).open().save(tmp_path / f"{i}.png")
    (tmp_path / "data.json").write_text(json.dumps(records))
    write_likelihoods([(0, {"reader": "llava", "name": "photos", "path": str(tmp_path / "data.json"), "images": str(tmp_path)}, None)], folder=str(tmp_path / "scores"), vla=acting[1], **HOW)
    ids = [i for part in sorted((tmp_path / "scores").iterdir()) for i in pd.read_parquet(part).id]
    assert ids == [f"photos/{i}" for i in range(30) if i != 4]


def test_a_part_of_the_pool_is_drawn_per_source():
    pool = pd.DataFrame({"id": [f"{s}/{i}" for s, n in (("a", 300), ("b", 20)) for i in range(n)], "source": ["a"] * 300 + ["b"] * 20})
    chosen = choose_samples(pool, 50)
    assert {s: len(ids) for s, ids in chosen.items()} == {"a": 50, "b": 20} and chosen["b"] == [f"b/{i}" for i in range(20)]
    assert sorted(chosen["a"], key=lambda i: int(i[2:])) == chosen["a"] and chosen != choose_samples(pool, 50, seed=1)
    assert set(chosen["a"]) == set(choose_samples(pool[::-1], 50)["a"])  # whatever the order


def test_figure_shows_the_scores_that_are_there(acting, tiny, mixed):
    axes = plot_ranks(likelihood_table(mixed, acting[0], tiny)).axes[0]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["VLA perplexity", "delta perplexity"] and len(axes.get_yticklabels()) == len(WRITERS)


def test_a_pool_is_scored_without_storing_its_features(tiny, tmp_path):
    "Samples to features to scores on the way: the scores of features that were stored first, up to the rounding of float16."
    from functools import partial
    from embodied_midtrain.core import read_table
    from embodied_midtrain.features import extract, write_features
    from embodied_midtrain.proximity import Estimator, by_chance, feature_blocks, sample_blocks, score_stream
    weight = np.random.default_rng(0).normal(size=tiny.hidden_size)
    functions = {0: {"logit": Estimator(weight, 0.0, pd.DataFrame(dict(step=[9], loss=[0.5], accuracy=[0.9])), 0.9, 9), "random": by_chance(0)}}
    spec = {"reader": "tabletop", "name": "mini-refspatial", "count": 90}
    write_features([(0, spec)], folder=str(tmp_path), backbone="tiny", revision=None, dtype="float32", pooling="last", text="question", batch_size=32, part_size=64)
    score_stream(partial(feature_blocks, str(tmp_path), "vlm"), functions, tmp_path / "stored", part_size=40)
    score_stream(partial(sample_blocks, TabletopSource("mini-refspatial", 90).samples, partial(extract, tiny)), functions, tmp_path / "way", part_size=40)
    stored, way = (read_table(tmp_path / name) for name in ("stored", "way"))
    assert stored.id.equals(way.id) and len(list((tmp_path / "way").iterdir())) == 3
    assert np.allclose(stored.logit, way.logit, atol=0.02 * stored.logit.std()) and (stored.random == way.random).all()
