"""The LeRobot reader: three versions of the format give the same episodes, any frame in any order is the right one, damage is located.

The v2.1 sample is real (cut from a published set); v2.0 and v3.0 are built from it here in their documented layouts, and so are images in the table."""
import io, json, multiprocessing, os, shutil
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embodied_midtrain.samples import BadSample
from embodied_midtrain.sources import lerobot
from embodied_midtrain.sources.base import open_source
from embodied_midtrain.sources.lerobot import LeRobotSource, Video, fill, video_frame

av = pytest.importorskip("av", reason='needs the extra: pip install "embodied-midtrain[robots]"')
DATA = Path(__file__).parent / "data/lerobot_v21_sim_pick_place"
CAMERA, FPS = "video.ego_view", 30
PICK = {"action": ["action.delta_eef_position", "action.delta_eef_rotation", "action.gripper_close"], "gripper": [1, -1]}


def info_of(folder, **change):
    info = json.loads((folder / "meta/info.json").read_text()) | change
    (folder / "meta/info.json").write_text(json.dumps(info))
    return info


def table(folder, i): return folder / f"data/chunk-000/episode_{i:06d}.parquet"


def v21(folder): return Path(shutil.copytree(DATA, folder))


def v20(folder):
    v21(folder)
    (folder / "meta/stats.json").write_text("{}")  # of all episodes, where 2.1 has episodes_stats.jsonl
    info_of(folder, codebase_version="v2.0")
    return folder


def v30(folder):
    "Both episodes in one table and one video, metadata as Parquet."
    source, tables = v21(folder.with_suffix(".v21")), []
    (folder / "data/chunk-000").mkdir(parents=True), (folder / "meta/episodes/chunk-000").mkdir(parents=True)
    (video := folder / f"videos/{CAMERA}/chunk-000/file-000.mp4").parent.mkdir(parents=True)
    pq.write_table(pa.concat_tables([pq.read_table(table(source, i)) for i in (0, 1)]), folder / "data/chunk-000/file-000.parquet", row_group_size=10)
    copy_packets([source / f"videos/chunk-000/{CAMERA}/episode_{i:06d}.mp4" for i in (0, 1)], video)
    tasks = [json.loads(line) for line in (source / "meta/tasks.jsonl").read_text().splitlines()]
    pd.DataFrame({"task_index": [t["task_index"] for t in tasks]}, index=[t["task"] for t in tasks]).to_parquet(folder / "meta/tasks.parquet")
    assert pq.read_schema(folder / "meta/tasks.parquet").names == ["task_index", "__index_level_0__"]
    episodes = [json.loads(line) for line in (source / "meta/episodes.jsonl").read_text().splitlines()]
    rows = [{**e, "data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": 16 * i, "dataset_to_index": 16 * i + 16, f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": 0,
             f"videos/{CAMERA}/from_timestamp": i * 16 / FPS, f"videos/{CAMERA}/to_timestamp": (i + 1) * 16 / FPS, "stats/action/min": [0.0]} for i, e in enumerate(episodes)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "meta/episodes/chunk-000/file-000.parquet")
    shutil.copy(source / "meta/info.json", folder / "meta")
    info_of(folder, codebase_version="v3.0", data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet", video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    return folder


def copy_packets(files, target, **options):
    with av.open(str(target), "w", options=options) as out:
        stream, at = None, 0
        for file in files:
            with av.open(str(file)) as container:
                video = container.streams.video[0]
                stream = stream or out.add_stream_from_template(video, opaque=True)
                for packet in container.demux(video):
                    if packet.pts is None: continue
                    packet.pts, packet.dts, packet.stream = packet.pts + at, packet.dts + at, stream
                    out.mux(packet)
                at += video.frames * 512


@cache
def pngs(i): return [(PIL.Image.fromarray(pixels).save(file := io.BytesIO(), "PNG", compress_level=1), file.getvalue())[1] for pixels in plain(i)]


def with_images(folder):
    "A camera that is a column of encoded images, in groups of five rows."
    v21(folder)
    for i in (0, 1):
        cells = pa.array([{"bytes": f, "path": f"frame_{t:06d}.png"} for t, f in enumerate(pngs(i))], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        pq.write_table(pq.read_table(table(folder, i)).append_column(CAMERA, cells), table(folder, i), row_group_size=5)
    info = info_of(folder)
    info["features"][CAMERA]["dtype"] = "image"
    info_of(folder, **info)
    shutil.rmtree(folder / "videos")
    return folder


MADE = {"v2.0": v20, "v2.1": v21, "v3.0": v30, "images": with_images}


@pytest.fixture(params=MADE)
def folder(request, tmp_path): return MADE[request.param](tmp_path / "set")


def reader(folder, **more): return open_source({"reader": "embodied_midtrain.sources.lerobot:LeRobotSource", "name": "r", "path": str(folder), **PICK, **more})


@cache
def plain(i):
    with av.open(str(DATA / f"videos/chunk-000/{CAMERA}/episode_{i:06d}.mp4")) as file: return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


# ---- what every version must do

def test_all_versions_give_the_same(folder):
    episodes = list((source := reader(folder)).episodes())
    assert [e.instruction for e in episodes] == ["Move the potato to the top of the cooking utensils.", "Move the vintage polaroid instant camera to the top of the books."] and not source.set_aside
    for i, episode in enumerate(episodes):
        rows = pq.read_table(table(DATA, i)).to_pylist()
        wanted = np.array([[*r["action.delta_eef_position"], *r["action.delta_eef_rotation"], (1 - r["action.gripper_close"][0]) / 2] for r in rows], np.float32)
        assert (episode.actions == wanted).all() and set(wanted[:, 6]) == {0, 1}
        for t in (0, 9, 15, 3): assert (np.asarray(episode.images[t].open()) == plain(i)[t]).all()


def test_order_resume_shards_and_access(folder):
    source = reader(folder, stride=5)
    samples = [s.id for s in source]
    assert samples == [f"r/{e}/{t}" for e in (0, 1) for t in (0, 5, 10, 15)] and len(source) == 2
    assert [r.key for r in source.records(1)] == ["1"] and source.find("1") == next(source.records(1)) and list(source.records(2)) == []
    assert [s.id for s in source.samples(3)] == samples[3:] and [s.id for s in source.fetch(samples[::-3])] == samples[::-3]
    assert sorted(s.id for part in (0, 1) for s in source.samples(shard=(part, 2))) == sorted(samples)
    for key in ("2", "x", "-1", ""):
        with pytest.raises(KeyError): source.find(key)
    with pytest.raises(KeyError, match="no sample"): source.fetch(["r/0/3"])  # not at this stride


def test_actions_and_samples_need_no_picture(folder, monkeypatch):
    source = reader(folder)
    wanted = [e.actions for e in source.episodes()]
    for owner, name in ((PIL.Image, "open"), (lerobot, "Video"), (lerobot, "video_frame"), (lerobot, "table_image"), (lerobot, "_cells")): monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("looked at a picture"))
    assert all((a == b).all() for a, b in zip(source.actions(), wanted, strict=True))
    assert len(list(source)) == 32
    shutil.rmtree(folder / "videos", ignore_errors=True)
    assert [a.shape for a in reader(folder).actions()] == [(16, 7)] * 2


def test_only_the_wanted_columns_are_read(folder):
    reader(folder)
    assert set(lerobot.read_columns(next((folder / "data").rglob("*.parquet")), ("timestamp", "action.joints")).column_names) == {"timestamp", "action.joints"}


def test_another_gripper_or_column_is_another_hash(folder):
    assert len({reader(folder).fingerprint(), reader(folder, gripper=[-1, 1]).fingerprint(), reader(folder, action=PICK["action"][:2] + ["action.joints[0]"], gripper=[-9, 9]).fingerprint()}) == 3


# ---- choices are told

def test_the_error_lists_what_there_is():
    spec = {"reader": "embodied_midtrain.sources.lerobot:LeRobotSource", "name": "r", "path": str(DATA)}
    for change, parts in [
        ({}, ["no column 'action'", "action.delta_eef_position (3)", "action.joints (7)"]),
        ({"action": "action.gripper_width"}, ["has 6", "pick 7", "action.delta_eef_rotation (3)"]),
        ({"action": ["action.delta_joints[2:9]"]}, ["no part", "has 7 numbers"]),
        ({"action": ["action.joints[3:3]"]}, ["no part"]),
        ({"action": PICK["action"]}, ["gripper=[closed, open] is needed", "number 0 of action.gripper_close", "from -1 to 1"]),
        ({**PICK, "gripper": [1]}, ["gripper=[closed, open] is needed"]), ({**PICK, "gripper": "open"}, ["gripper=[closed, open] is needed"]),
        ({**PICK, "camera": "video.ego"}, ["did you mean 'video.ego_view'"]),
        ({**PICK, "stride": 0}, ["at least 1"]),
    ]:
        with pytest.raises(ValueError) as error: open_source({**spec, **change})
        assert all(part in str(error.value) for part in parts), error.value


def test_names_of_numbers_are_listed(tmp_path):
    info = json.loads((v21(tmp_path / "set") / "meta/info.json").read_text())
    info["features"] |= {"action": {"dtype": "float32", "shape": [14], "names": ["left_waist", "left_elbow"]}, "other_camera": {"dtype": "video", "shape": [4, 4, 3]}}
    info_of(tmp_path / "set", **info)
    with pytest.raises(ValueError, match=r"several cameras: give one as camera=, of video.ego_view, other_camera"): LeRobotSource("r", tmp_path / "set")
    with pytest.raises(ValueError, match=r"has 14: pick 7.*action \(14: left_waist, left_elbow\)"): LeRobotSource("r", tmp_path / "set", camera=CAMERA)


def test_an_action_of_one_column(tmp_path):
    folder = v21(tmp_path / "set")
    for i in (0, 1):
        t = pq.read_table(table(folder, i))
        pq.write_table(t.append_column("action", pa.array(np.full((16, 7), 0.5, np.float32).tolist(), pa.list_(pa.float32(), 7))), table(folder, i))
    info = info_of(folder)
    info["features"]["action"] = {"dtype": "float32", "shape": [7], "names": None}
    info_of(folder, **info)
    assert all((a == 0.5).all() for a in LeRobotSource("r", folder, gripper=[0, 1]).actions())


@pytest.mark.parametrize("content, message", [(None, "holds no meta/info.json"), ("{", "not the description"), ("[]", "not the description"), ('{"codebase_version": "v2.1"}', "KeyError"), ('{"codebase_version": "v2.1", "fps": 0, "features": {}}', "not the description"),
    ('{"codebase_version": "v1.6", "fps": 30, "features": {}}', "version v1.6, where 2.0, 2.1 and 3.0"), ('{"codebase_version": "v4.0", "fps": 30, "features": {}}', "version v4.0"), ('{"codebase_version": "v2.1", "fps": 30, "features": {}}', "no camera")])
def test_other_folders(content, message, tmp_path):
    (tmp_path / "meta").mkdir()
    if content: (tmp_path / "meta/info.json").write_text(content)
    with pytest.raises(ValueError, match=message): LeRobotSource("r", tmp_path)


@pytest.mark.parametrize("pattern", ["/etc/{episode_index}.parquet", "../{episode_index}.parquet", "data/../../x", "{episode_index.real}", "{episode_index!r}", "{episode_index:9999999999d}", "{0}", "a\\..\\b"])
def test_paths_stay_in_the_folder(pattern, tmp_path):
    with pytest.raises(ValueError): fill(pattern, episode_index=7)
    folder = v21(tmp_path / "set")
    info_of(folder, data_path=pattern)
    with pytest.raises(ValueError, match="100%.*broken metadata of an episode"): list(reader(folder).episodes())


# ---- damage

def rewritten(folder, i, **columns):
    t = pq.read_table(table(folder, i))
    for name, values in columns.items():
        name = name.replace("__", ".")
        t = t.drop([name]) if values is None else t.set_column(t.column_names.index(name), name, pa.array(values(t[name].to_pylist())))
    pq.write_table(t, table(folder, i))


def changed(at, value):
    return lambda rows: [value if t == at else row for t, row in enumerate(rows)]

def cut(path, share): path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])

ROWS = {
    "not a number": (dict(action__delta_eef_position=changed(4, [0.0, float("nan"), 0.0])), "actions that are not finite: step 4"),
    "infinite": (dict(action__delta_eef_rotation=changed(0, [0.0, 0.0, float("inf")])), "actions that are not finite: step 0"),
    "null": (dict(action__delta_eef_rotation=changed(7, [0.0, None, 0.0])), "actions that are not finite: step 7"),
    "null row": (dict(action__delta_eef_rotation=changed(7, None)), "rows that are not of 3 numbers"),
    "ragged": (dict(action__delta_eef_position=changed(2, [0.0, 0.0])), "rows that are not of 3 numbers"),
    "another gripper": (dict(action__gripper_close=changed(2, [255.0])), "gripper outside -1..1"),
    "no column": (dict(action__gripper_close=None), "no column action.gripper_close in episode_000003.parquet"),
    "no time": (dict(timestamp=None), "no column timestamp"),
    "time not a number": (dict(timestamp=changed(3, float("nan"))), "time stamps that are not finite"),
    "another episode": (dict(episode_index=lambda rows: [0] * len(rows)), "rows and metadata differ in number: 0 rows of episode 3"),
    "unknown task": (dict(task_index=lambda rows: [99] * len(rows)), "no text for the task of the episode"),
    "two tasks": (dict(task_index=changed(3, 0)), "several instructions in one episode"),
    "texts": (dict(action__delta_eef_position=lambda rows: [["a", "b", "c"]] * len(rows)), "rows that are not of 3 numbers"),
}


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    "Forty episodes, copies of the two."
    folder = v21(tmp_path_factory.mktemp("forty") / "set")
    lines = [json.loads(line) for line in (folder / "meta/episodes.jsonl").read_text().splitlines()]
    for i in range(2, 40):
        shutil.copy(table(folder, 1), table(folder, i)), shutil.copy(folder / f"videos/chunk-000/{CAMERA}/episode_000001.mp4", folder / f"videos/chunk-000/{CAMERA}/episode_{i:06d}.mp4")
        rewritten(folder, i, episode_index=lambda rows: [i] * len(rows))
        lines.append({**lines[1], "episode_index": i})
    (folder / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def many(forty, tmp_path):
    "Forty episodes, of which the fourth is to be broken."
    return Path(shutil.copytree(forty, tmp_path / "many"))


@pytest.mark.parametrize("what", ROWS)
def test_a_broken_table_costs_its_episode(what, many):
    columns, reason = ROWS[what]
    rewritten(many, 3, **columns)
    source = reader(many)
    assert len(list(source.episodes())) == 39 and [row[:2] for row in source.set_aside.rows] == [("data/chunk-000/episode_000003.parquet", "3")]
    assert source.set_aside.rows[0][2].startswith(reason)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_table_cut_short(share, many):
    cut(table(many, 3), share)
    source = reader(many)
    assert len(list(source.episodes())) == 39 == len(list(source.actions()))
    assert source.set_aside.rows[0][2].startswith(f"data file cannot be read: episode_000003.parquet, perhaps cut short at byte {table(many, 3).stat().st_size:,}")


def test_missing_files(many):
    table(many, 3).unlink()
    source = reader(many)
    assert len(list(source.episodes())) == 39 and source.set_aside.reasons() == {"data file does not exist": 1}
    (many / f"videos/chunk-000/{CAMERA}/episode_000004.mp4").unlink()
    assert len(list(source.episodes())) == 38 and source.set_aside.reasons() == {"data file does not exist": 1, "video file does not exist": 1}


def test_broken_metadata_of_an_episode(many):
    lines = (many / "meta/episodes.jsonl").read_text().splitlines()
    lines[3] = lines[3][:-9]
    (many / "meta/episodes.jsonl").write_text("\n".join(lines))
    source = reader(many)
    assert len(list(source.episodes())) == 39 and source.set_aside.rows[0][2].startswith("broken metadata of an episode: line 4")
    lines[3] = json.dumps({**json.loads(lines[2]), "length": 0, "episode_index": 3})
    (many / "meta/episodes.jsonl").write_text("\n".join(lines))
    assert len(list((source := reader(many)).episodes())) == 39 and "rows and metadata differ in number" in source.set_aside.rows[0][2]


def test_episodes_of_no_and_one_step(many):
    lines = [json.loads(line) for line in (many / "meta/episodes.jsonl").read_text().splitlines()]
    for i, length in ((3, 0), (4, 1)):
        pq.write_table(pq.read_table(table(many, i)).slice(0, length), table(many, i))
        lines[i]["length"] = length
    (many / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = reader(many)
    assert [len(e) for e in source.episodes()] == [16] * 38 == [len(a) for a in source.actions()], source.set_aside.rows
    assert source.set_aside.reasons() == {"an episode without steps": 1, "an episode of fewer than 2 steps": 1}


def test_without_instruction(many):
    text = (many / "meta/tasks.jsonl").read_text()
    (many / "meta/tasks.jsonl").write_text(text.replace("Move the potato to the top of the cooking utensils.", " "))
    source = reader(many)
    assert len(list(source.episodes())) == 39 and source.set_aside.unlabelled == {"no instruction": 1}
    (many / "meta/tasks.jsonl").write_text(text[:-30])
    with pytest.raises(ValueError, match=r"tasks\.jsonl: line 4 is no object"): list(reader(many).episodes())
    (many / "meta/tasks.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"tasks\.jsonl does not exist"): list(reader(many).episodes())


@pytest.mark.parametrize("name", ["meta/episodes/chunk-000/file-000.parquet", "meta/tasks.parquet"])
def test_metadata_of_version_3_cut_short(name, tmp_path):
    folder = v30(tmp_path / "set")
    cut(folder / name, 0.9)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read, perhaps cut short at byte {(folder / name).stat().st_size:,}"): list(reader(folder).episodes())


def test_version_3_without_its_metadata(tmp_path):
    folder = v30(tmp_path / "set")
    pq.write_table(pa.table({"episode_index": [0]}), folder / "meta/episodes/chunk-000/file-000.parquet")
    with pytest.raises(ValueError, match="no column length, data/chunk_index"): list(reader(folder).episodes())
    shutil.rmtree(folder / "meta/episodes")
    with pytest.raises(ValueError, match="holds no meta/episodes"): list(reader(folder).episodes())


def test_an_image_missing_in_the_table(tmp_path):
    folder = with_images(tmp_path / "set")
    t = pq.read_table(table(folder, 0))
    cells = t[CAMERA].to_pylist()
    cells[3], cells[4], cells[5] = None, {"bytes": None, "path": "../../x.png"}, {"bytes": cells[5]["bytes"][:500], "path": None}
    pq.write_table(t.set_column(t.column_names.index(CAMERA), CAMERA, pa.array(cells)), table(folder, 0))
    images = next(reader(folder).episodes()).images
    for i, reason in ((3, "no image in row 3"), (4, "no image in row 4"), (5, "image cannot be decoded")):
        with pytest.raises(BadSample, match=reason): images[i].open()
    assert images[6].open().size == (640, 480)


# ---- video

def encoded(path, codec, count=60, **options):
    "A video of frames that differ, and its frames as a plain decoding gives them."
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream(codec, rate=FPS, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(count):
            picture = np.full((48, 64, 3), t * 4, np.uint8)
            picture[:, t] = rng.integers(0, 255, (48, 3))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    with av.open(str(path)) as file: return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


CODECS = {"h264, every 12th, with B-frames": ("libx264", dict(g=12, bf=3)), "h264, one keyframe": ("libx264", dict(g=1000, bf=2)), "h264, all keyframes": ("libx264", dict(g=1)), "mpeg4": ("mpeg4", dict(g=10)), "av1": ("libsvtav1", dict(g=2, preset=12))}


@pytest.mark.parametrize("what", CODECS)
def test_any_frame_in_any_order(what, tmp_path):
    codec, options = CODECS[what]
    if codec not in av.codecs_available: pytest.skip(f"this PyAV cannot encode with {codec}")
    frames = encoded(tmp_path / "a.mp4", codec, **options)
    order = [*range(60), *range(59, -1, -7), *np.random.default_rng(1).integers(0, 60, 60).tolist(), 5, 5, 6]
    for t in order: assert (video_frame(str(tmp_path / "a.mp4"), t / FPS, 0.25 / FPS) == frames[t]).all(), t
    for time in (-0.5, 0.5 / FPS, 60 / FPS, 1e6):
        with pytest.raises(BadSample): video_frame(str(tmp_path / "a.mp4"), time, 0.25 / FPS)
    assert (video_frame(str(tmp_path / "a.mp4"), 7 / FPS, 0.25 / FPS) == frames[7]).all()


def decoded_in(path, times):
    "How many frames are decoded for these times."
    count, video = [0], Video(path)
    seek = video._seek
    def counted(time):
        seek(time)
        frames = video.frames
        video.frames = (count.__setitem__(0, count[0] + 1) or frame for frame in frames)
    video._seek = counted
    for t in times: video.at(t / FPS, 0.25 / FPS)
    return count[0]


def test_nothing_is_decoded_twice_in_order(tmp_path):
    encoded(tmp_path / "a.mp4", "mpeg4", g=10)
    assert decoded_in(tmp_path / "a.mp4", range(60)) == 60
    assert decoded_in(tmp_path / "a.mp4", [1, 11, 21, 41]) <= 8
    assert decoded_in(tmp_path / "a.mp4", [55]) <= 7


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9])
def test_a_video_cut_short_tells_when_it_is_opened(share, tmp_path):
    folder = v21(tmp_path / "set")
    video = folder / f"videos/chunk-000/{CAMERA}/episode_000000.mp4"
    cut(video, share)
    broken, whole = list(reader(folder).episodes())
    with pytest.raises(BadSample, match=r"(video cannot be read: episode_000000\.mp4, perhaps cut short at byte [\d,]+)"): broken.images[0].open()
    assert whole.images[0].open().size == (640, 480)


def test_what_is_there_of_a_video_is_read(tmp_path):
    "When the table of contents comes first, the frames before the cut are whole."
    frames = encoded(tmp_path / "a.mp4", "mpeg4", g=5)
    cut(tmp_path / "a.mp4", 0.6)
    assert (video_frame(str(tmp_path / "a.mp4"), 10 / FPS, 0.01) == frames[10]).all()
    with pytest.raises(BadSample, match=r"a\.mp4"): video_frame(str(tmp_path / "a.mp4"), 59 / FPS, 0.01)
    assert (video_frame(str(tmp_path / "a.mp4"), 3 / FPS, 0.01) == frames[3]).all()


def test_a_video_of_another_rate_is_told(tmp_path):
    folder = v21(tmp_path / "set")
    info_of(folder, fps=30)
    rewritten(folder, 0, timestamp=lambda rows: [t / 25 for t in range(len(rows))])
    images = next(reader(folder).episodes()).images
    images[0].open()
    with pytest.raises(BadSample, match=r"no frame at 0\.080 s"): images[2].open()


def test_other_files_are_no_video(tmp_path):
    for name, content in (("list.mp4", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/hostname\n"), ("concat.mp4", "ffconcat version 1.0\nfile a.mp4\n"), ("text.mp4", "nothing")):
        (tmp_path / name).write_text(content)
        with pytest.raises(BadSample, match="video cannot be read"): video_frame(str(tmp_path / name), 0, 0.1)


def test_few_videos_stay_open():
    lerobot.VIDEOS.__init__(2)
    for i in (0, 1, 0): video_frame(str(DATA / f"videos/chunk-000/{CAMERA}/episode_{i:06d}.mp4"), 0, 0.01)
    assert [path[-5] for path, _ in lerobot.VIDEOS.videos] == ["1", "0"]
    lerobot.VIDEOS.__init__(4)


def test_a_changed_file_is_read_anew(tmp_path):
    first, second = encoded(tmp_path / "b.mp4", "mpeg4", g=5), plain(0)
    assert (video_frame(str(tmp_path / "b.mp4"), 0, 0.01) == first[0]).all()
    shutil.copy(DATA / f"videos/chunk-000/{CAMERA}/episode_000000.mp4", tmp_path / "b.mp4")
    os.utime(tmp_path / "b.mp4", ns=(1, 1))
    assert (video_frame(str(tmp_path / "b.mp4"), 0, 0.01) == second[0]).all()


def _sum(image): return int(np.asarray(image.open()).sum())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same_frames(method):
    lerobot.VIDEOS.__init__(1)
    images = [e.images[t] for t in range(3) for e in reader(DATA).episodes()]  # of two videos, of which one stays open
    wanted = [_sum(i) for i in images]  # the parent has the video open
    with multiprocessing.get_context(method).Pool(2) as pool: assert pool.map_async(_sum, images, chunksize=1).get(timeout=60) == wanted
    lerobot.VIDEOS.__init__(4)


def test_without_av_the_cure_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "embodied-midtrain\[robots\]"'): reader(DATA)
