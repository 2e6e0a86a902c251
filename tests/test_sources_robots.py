"""Robot readers for RLDS, CALVIN and LIBERO: conventions, random access, damage.

CALVIN's frames are real files of its simulator; LIBERO's, both as RLDS and as HDF5, are built here in exactly the documented layout."""
import io, json, os, pickle, shutil, zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from embodied_midtrain.samples import BadSample
from embodied_midtrain.sources import robots
from embodied_midtrain.sources.rlds import BridgeSource, LiberoRLDSSource
from embodied_midtrain.sources.robots import CalvinSource, LiberoHDF5Source, pickled_npy
from test_sources import flip, tf_example, tfrecord

h5py = pytest.importorskip("h5py", reason='needs the extra: pip install "embodied-midtrain[robots]"')
DATA = Path(__file__).parent / "data"
RLDS = DATA / "bridge_rlds/bridge_dataset/1.0.0"


def png(value): return (PIL.Image.new("RGB", (8, 8), (value, 0, 0)).save(file := io.BytesIO(), "PNG"), file.getvalue())[1]


def arm(T, gripper=-1.0):
    "Actions (T, 7) that differ from step to step."
    return np.column_stack([np.linspace(0.01, 0.5, 6 * T).reshape(T, 6), np.full(T, gripper)])


# ---- one built data set of each kind: write(folder, episodes) with (instruction, actions) or something broken, and the reader that opens it

def write_bridge_orig(folder, episodes):
    "BridgeData V2 under OpenVLA's name for it."
    folder = folder / "bridge_orig/1.0.0"
    folder.mkdir(parents=True)
    shutil.copy(RLDS / "features.json", folder)
    tfrecord(folder / "bridge_dataset-train.tfrecord-00000-of-00001", *[e if isinstance(e, bytes) else rlds_episode(*e, camera="image_0") for e in episodes])
    return folder


def rlds_episode(text, actions, camera="image", **change):
    example = {"steps/action": np.asarray(actions).ravel().tolist(), "steps/language_instruction": [text.encode()] * len(actions), f"steps/observation/{camera}": [png(t) for t in range(len(actions))]}
    return tf_example({k: v for k, v in {**example, **change}.items() if v})


def write_libero_rlds(folder, episodes):
    folder = folder / "libero_10_no_noops/1.0.0"
    folder.mkdir(parents=True)
    tensor = lambda n: {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor", "tensor": {"shape": {"dimensions": [str(n)]}, "dtype": "float32", "encoding": "none"}}
    image = {"image": {"shape": {"dimensions": ["256", "256", "3"]}, "dtype": "uint8", "encodingFormat": "jpeg"}}
    step = {"action": tensor(7), "language_instruction": {"text": {}}, "observation": {"featuresDict": {"features": {"image": image, "wrist_image": image, "state": tensor(8), "joint_state": tensor(7)}}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": {"sequence": {"feature": {"featuresDict": {"features": step}}, "length": "-1"}}}}}))
    records = [e if isinstance(e, bytes) else rlds_episode(*e) for e in episodes]
    for shard in range(2): tfrecord(folder / f"liber_o10-train.tfrecord-{shard:05}-of-00002", *records[len(records) * shard // 2:len(records) * (shard + 1) // 2])
    return folder


def write_calvin(folder, episodes):
    folder, at, spans = folder / "task_ABC_D", 100, []
    (folder / "training/lang_annotations").mkdir(parents=True)
    for _, actions in episodes:
        for t, row in enumerate(actions): np.savez_compressed(folder / f"training/episode_{at + t:07d}.npz", rel_actions=row, rgb_static=np.full((20, 20, 3), t, np.uint8), rgb_gripper=np.full((8, 8, 3), t, np.uint8))
        spans.append((at, at + len(actions) - 1))
        at += len(actions)
    np.save(folder / "training/ep_start_end_ids.npy", np.array([[100, at - 1]]))
    np.save(folder / "training/lang_annotations/auto_lang_ann.npy", np.array({"language": {"ann": [text for text, _ in episodes], "task": ["x"] * len(episodes)}, "info": {"indx": spans, "episodes": []}}, object))
    return folder


def write_hdf5(folder, episodes):
    folder.mkdir(exist_ok=True)
    for n, (text, actions) in enumerate(episodes):  # a task an episode; the rest of its demonstrations are in another file
        with h5py.File(folder / f"SCENE{n:03}_task_demo.hdf5", "w") as file:
            group = file.create_group("data")
            group.attrs["problem_info"] = json.dumps({"language_instruction": text})
            demo = group.create_group("demo_0")
            demo["actions"] = np.asarray(actions)
            pixels = np.zeros((len(actions), 16, 16, 3), np.uint8)
            pixels[:, 0, 0] = 255  # the lower right corner of the upright picture
            demo["obs/agentview_rgb"], demo["obs/eye_in_hand_rgb"] = pixels, pixels
    return folder


KINDS = {  # write, reader, gripper value for open
    "bridge": (write_bridge_orig, BridgeSource, 1.0),
    "libero_rlds": (write_libero_rlds, LiberoRLDSSource, -1.0),
    "calvin": (write_calvin, CalvinSource, 1.0),
    "libero_hdf5": (write_hdf5, LiberoHDF5Source, -1.0),
}


@pytest.fixture(params=KINDS)
def kind(request): return request.param


def made(kind, folder, episodes, **more):
    write, reader, _ = KINDS[kind]
    folder.mkdir(exist_ok=True)
    return reader("r", write(folder, episodes), **more)


def opened(kind): return KINDS[kind][2]


# ---- what all of them must do

def test_order_resume_shards_and_access(kind, tmp_path):
    source = made(kind, tmp_path, [(f"task {i}", arm(2 + i, opened(kind))) for i in range(6)])
    records = list(source.records())
    assert len(source) == len(records) == 6 and len({r.key for r in records}) == 6 and not any("/" in r.key for r in records)
    for start in (0, 1, 5, 6, 9): assert [r.key for r in source.records(start)] == [r.key for r in records[start:]]
    for record in records: assert (found := source.find(record.key)).key == record.key and found.value == record.value
    for key in ("nowhere", "-1", "6", "06", "²", "", "9" * 40):
        with pytest.raises(KeyError): source.find(key)
    samples = list(source)
    assert [s.id for part in range(3) for s in source.samples(shard=(part, 3))] != [] and sorted(s.id for part in range(3) for s in source.samples(shard=(part, 3))) == sorted(s.id for s in samples)
    ids = [s.id for s in samples][::-4]
    assert [s.id for s in source.fetch(ids)] == ids and [s.messages[0]["content"] for s in source.fetch(ids[:1])] == ["<image>\ntask 5"]


def test_conventions(kind, tmp_path):
    "Seven numbers, float32, the gripper 1 where it is open, and upright pictures, one a step."
    grips = [arm(3, opened(kind)), arm(3, 0.0 if kind == "bridge" else -opened(kind))]
    source = made(kind, tmp_path, [("open", grips[0]), ("close", grips[1])])
    episodes = list(source.episodes())
    for episode, raw, share in zip(episodes, grips, (1, 0)):
        assert episode.actions.dtype == np.float32 and episode.actions.shape == (3, 7) and len(episode.images) == 3
        assert (episode.actions[:, :6] == raw[:, :6].astype(np.float32)).all() and (episode.actions[:, 6] == share).all()
    picture = np.asarray(episodes[0].images[2].open())
    if kind == "libero_hdf5": assert picture[-1, -1].tolist() == [255] * 3 and picture[0, 0].tolist() == [0] * 3
    else: assert picture[0, 0, 0] == 2


def test_actions_need_no_pictures(kind, tmp_path, monkeypatch):
    source = made(kind, tmp_path, [(f"task {i}", arm(4, opened(kind))) for i in range(3)])
    wanted = [e.actions for e in source.episodes()]
    def refuse(*_, **__): pytest.fail("looked at a picture")
    monkeypatch.setattr(PIL.Image, "open", refuse)
    monkeypatch.setattr(robots, "npz_picture", refuse)
    monkeypatch.setattr(robots, "hdf5_picture", refuse)
    array, asked = robots.npz_array, []
    monkeypatch.setattr(robots, "npz_array", lambda path, name: asked.append(name) or array(path, name))
    assert all((a == b).all() for a, b in zip(source.actions(), wanted, strict=True)) and set(asked) <= {"rel_actions"}
    list(source)


def nan(a): return np.where(np.arange(a.size).reshape(a.shape) == 9, np.nan, a)
def inf(a): return np.where(np.arange(a.size).reshape(a.shape) == 9, np.inf, a)
def wild(a): return np.where(np.arange(7) == 6, 255, a)

BAD = {"not a number": (nan, "actions that are not finite"), "infinite": (inf, "actions that are not finite"), "gripper": (wild, "gripper outside"), "gripper not a number": (lambda a: np.where(np.arange(7) == 6, np.nan, a), "actions that are not finite")}


@pytest.mark.parametrize("what", BAD)
def test_bad_actions_are_set_aside(kind, what, tmp_path):
    change, reason = BAD[what]
    good = arm(2, opened(kind))
    source = made(kind, tmp_path, [("t", good)] * 10 + [("t", change(good))] + [("t", good)] * 15)
    assert len(list(source.episodes())) == 25 == len(list(source.actions())) and [r.split(":")[0].split(" -1")[0].split(" 0.")[0] for *_, r in source.set_aside.rows][0].startswith(reason)
    assert source.set_aside.rows[0][1] == [r.key for r in source.records()][10]


def test_short_episodes(kind, tmp_path):
    "None of no step or of one."
    source = made(kind, tmp_path, [("t", arm(2, opened(kind)))] * 40 + [("t", arm(1, opened(kind))), ("t", arm(0))])
    assert [len(e) for e in source.episodes()] == [2] * 40 and len(source.set_aside) == 2


def test_without_instruction(kind, tmp_path):
    source = made(kind, tmp_path, [("t", arm(2, opened(kind))), (" ", arm(2, opened(kind)))])
    assert len(list(source.episodes())) == 1 and source.set_aside.unlabelled == {"no instruction": 1} and not source.set_aside


def test_stride_and_camera(kind, tmp_path):
    source = made(kind, tmp_path, [("t", arm(5, opened(kind)))], stride=2)
    assert [s.id.rsplit("/", 1)[1] for s in source] == ["0", "2", "4"]
    with pytest.raises(ValueError, match="unknown camera 'fisheye'.*known: "): made(kind, tmp_path / "2", [("t", arm(2, opened(kind)))], camera="fisheye")


def test_hash_follows_content(kind, tmp_path):
    a, b, c = (made(kind, tmp_path / n, [("t", arm(3, opened(kind)) * x)]) for n, x in (("a", 1), ("b", 1), ("c", np.where(np.arange(7) == 6, 1, 0.5))))
    if kind in ("bridge", "libero_rlds"): assert a.fingerprint() == b.fingerprint()  # the other two bear the time of their making
    assert a.fingerprint() != c.fingerprint()


# ---- RLDS

def test_libero_shards_and_wrist(tmp_path):
    episodes = [rlds_episode("t", arm(3), **{"steps/observation/wrist_image": [b"w0", b"w1", b"w2"]}) for _ in range(5)]
    source = made("libero_rlds", tmp_path, episodes, camera="wrist_image")
    assert [r.file for r in source.records()] == ["liber_o10-train.tfrecord-00000-of-00002"] * 2 + ["liber_o10-train.tfrecord-00001-of-00002"] * 3
    assert [i.data for i in next(source.episodes()).images] == [b"w0", b"w1", b"w2"]


def test_libero_gripper_as_openvla_transforms_it(tmp_path):
    "1 - clip(gripper, 0, 1)."
    raw = arm(5)
    raw[:, 6] = [-1, -0.5, 0, 0.25, 1]
    for kind in ("libero_rlds", "libero_hdf5"): assert next(made(kind, tmp_path / kind, [("t", raw)]).episodes()).actions[:, 6].tolist() == [1, 1, 1, 0.75, 0]


@pytest.mark.parametrize("kind", ["bridge", "libero_rlds"])
def test_wrong_types_in_a_record(kind, tmp_path):
    camera = "image_0" if kind == "bridge" else "image"
    bad = [{"steps/action": [b"x"] * 3}, {"steps/language_instruction": [1, 2, 3]}, {f"steps/observation/{camera}": [0.5] * 3}, {f"steps/observation/{camera}": None}, {"steps/action": [0.5] * 20}]
    good = rlds_episode("t", arm(3, opened(kind)), camera)
    source = made(kind, tmp_path, [good] * 100 + [rlds_episode("t", arm(3, opened(kind)), camera, **b) for b in bad])
    assert len(list(source.episodes())) == 100 and len(source.set_aside) == 5


@pytest.mark.parametrize("kind", ["bridge", "libero_rlds"])
def test_damaged_shards(kind, tmp_path):
    source = made(kind, tmp_path, [("t", arm(3, opened(kind)))] * 40)
    file = source.files[-1]
    whole = file.read_bytes()
    flip(file, len(whole) - 40)
    assert len(list(source.episodes())) == 39 and source.set_aside.rows[0][:2] == (file.name, "39") and "does not match its checksum" in source.set_aside.rows[0][2]
    file.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"{file.name}: cut short: .* at byte [\d,]+.*ends at {len(whole) - 7:,}"): list(source.episodes())


# ---- CALVIN

CALVIN = DATA / "calvin_sim"


def test_real_frames():
    source = CalvinSource("calvin", CALVIN)
    first, second = source.episodes()
    assert first.instruction == "lift the red block" and first.meta == {"task": "lift_red_block_table"} and [s.id for s in source] == [f"calvin/{e}/{t}" for e in (0, 1) for t in (0, 1, 2)]
    with np.load(CALVIN / "training/episode_0001023.npz") as frame:
        assert np.allclose(second.actions[1, :6], frame["rel_actions"][:6]) and second.actions[1, 6] == (frame["rel_actions"][6] + 1) / 2
        assert (np.asarray(second.images[1].open()) == frame["rgb_static"]).all()
    assert CalvinSource("calvin", CALVIN, camera="rgb_gripper").fetch(["calvin/0/1"])[0].images[0].open().size == (84, 84)


class Command:
    def __init__(self, function, *arguments): self.call = function, arguments
    def __reduce__(self): return self.call


def annotation(value, protocol=4):
    "A .npy file of one object, as np.save writes it."
    held = np.empty((), object)
    held[()] = value
    np.save(file := io.BytesIO(), np.empty((), object))
    return file.getvalue()[:file.getvalue().index(b"\n") + 1] + pickle.dumps(held, protocol)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("where", ["instead", "inside", "in an array"])
def test_a_pickle_that_runs_code_is_refused(protocol, where, tmp_path):
    marker = tmp_path / "attacked"
    for command in (Command(exec, f"open({str(marker)!r}, 'w')"), Command(os.mkdir, str(marker)), Command(eval, "1"), Command(getattr, np.ndarray, "tofile"), Command(np.fromfile, "/etc/passwd", np.uint8), Command(np.memmap, str(marker), "u1", "w+", 0, (4,))):
        value = {"instead": command, "inside": {"language": {"ann": [command]}, "info": {"indx": [(0, 1)]}}, "in an array": {"language": {"ann": np.array([command, "x"], object)}}}[where]
        (tmp_path / "auto_lang_ann.npy").write_bytes(annotation(value, protocol))
        with pytest.raises(ValueError, match=r"auto_lang_ann\.npy: refused: it asks for .*, which could run code"): pickled_npy(tmp_path / "auto_lang_ann.npy")
    assert not marker.exists()


def test_raw_opcodes_get_no_further():
    "Programs that no pickler writes."
    for program in (b"cos\nsystem\n(S'touch attacked'\ntR.", b"(S'touch attacked'\nios\nsystem\n.", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", b"cnumpy\nndarray.__init__\n.", b"cnumpy\ndtype\n(tR}(S'__class__'\nNdb.", b"P7\n.", b"\x82\x01."):
        with pytest.raises(Exception) as caught: robots._plain(robots._Inspector(io.BytesIO(program)).load())
        assert not isinstance(caught.value, SystemExit)
    assert not Path("attacked").exists()


@pytest.mark.parametrize("protocol", range(3, 6))
def test_plain_annotations_of_any_protocol_and_numpy(protocol, tmp_path):
    "Sentences and spans as lists, tuples, arrays, and NumPy's own numbers and texts, as either generation of NumPy pickles them."
    path = tmp_path / "auto_lang_ann.npy"
    wanted = [(5, 9, "lift", "a"), (9, 12, "drop", "b")]
    for spans in ([(5, 9), (9, 12)], np.array([[5, 9], [9, 12]]), [(np.int64(5), np.int64(9)), (np.int32(9), np.int32(12))], np.array([[5, 9], [9, 12]], ">i4"), np.asfortranarray([[5, 9], [9, 12]])):
        for texts in (["lift", "drop"], np.array(["lift", "drop"]), np.array(["lift", "drop"], object), [np.str_("lift"), np.str_("drop")]):
            content = annotation({"language": {"ann": texts, "task": ["a", "b"], "emb": np.ones((2, 1, 384), np.float32)}, "info": {"indx": spans, "episodes": []}}, protocol)
            for old in ((content, content.replace(b"numpy._core", b"numpy.core")) if protocol == 3 else (content,)):
                path.write_bytes(old)
                assert robots.calvin_annotations(path) == wanted


@pytest.mark.parametrize("cut", [0, 5, 60, 140, 200, 300, -1])
def test_annotations_cut_short(cut, tmp_path):
    (tmp_path / "a.npy").write_bytes((CALVIN / "training/lang_annotations/auto_lang_ann.npy").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a\.npy: refused: .*byte [\d,]+"): pickled_npy(tmp_path / "a.npy")


@pytest.mark.parametrize("content", [7, {}, {"language": []}, {"language": {"ann": ["a"]}, "info": {"indx": []}}, {"language": {"ann": ["a"]}, "info": {"indx": [(1, 2, 3)]}}, {"language": {"ann": ["a"]}, "info": {"indx": [("x", "y")]}}, {"language": {}, "info": {}}])
def test_other_dictionaries_are_no_annotations(content, tmp_path):
    (tmp_path / "a.npy").write_bytes(annotation(content))
    with pytest.raises(ValueError, match=r"a\.npy: not CALVIN's annotations"): robots.calvin_annotations(tmp_path / "a.npy")


def break_frame(what, file):
    whole = file.read_bytes()
    if what == "missing": file.unlink()
    elif what == "empty": file.write_bytes(b"")
    elif what == "cut": file.write_bytes(whole[:-30])
    elif what == "cut early": file.write_bytes(whole[:100])
    elif what == "no actions": np.savez(file, rgb_static=np.zeros((4, 4, 3), np.uint8))
    elif what == "six numbers": np.savez(file, rel_actions=np.zeros(6))
    elif what == "texts": np.savez(file, rel_actions=np.array(["a"] * 7))
    elif what == "code": np.savez(file, rel_actions=np.array([Command(os.mkdir, str(file.parent / "attacked"))] * 7, object))
    elif what == "flipped":
        at = whole.index(b"rel_actions.npy") + 40
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:])
    elif what == "huge":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("rel_actions.npy", "w") as member:
            for _ in range(300): member.write(bytes(2**20))


@pytest.mark.parametrize("what", ["missing", "empty", "cut", "cut early", "no actions", "six numbers", "texts", "code", "flipped", "huge"])
def test_a_broken_frame_costs_its_episode(what, tmp_path):
    source = made("calvin", tmp_path, [("t", arm(3))] * 40)
    break_frame(what, source.folder / "episode_0000110.npz")
    assert len(list(source.episodes())) == 39 and [row[:2] for row in source.set_aside.rows] == [("auto_lang_ann.npy", "3")] and not (source.folder / "attacked").exists()
    assert "episode_0000110.npz" in source.set_aside.rows[0][2]


def test_a_broken_picture_is_told_when_it_is_opened(tmp_path):
    source = made("calvin", tmp_path, [("t", arm(2))])
    np.savez(source.folder / "episode_0000101.npz", rel_actions=arm(1)[0], rgb_static=np.zeros((4, 4), np.float32))
    good, bad = next(source.episodes()).images
    assert good.open().size == (20, 20)
    with pytest.raises(BadSample, match="not a picture: rgb_static in episode_0000101.npz"): bad.open()


def test_float32_and_float64_give_the_same(tmp_path):
    a, b = (next(made("calvin", tmp_path / n, [("t", arm(3, 1.0).astype(t))]).actions()) for n, t in (("a", np.float32), ("b", np.float64)))
    assert (a == b).all() and a.dtype == np.float32


def test_annotations_outside_of_the_episodes(tmp_path):
    source = made("calvin", tmp_path, [("t", arm(2))] * 60)
    np.save(source.folder / "ep_start_end_ids.npy", np.array([[100, 140], [142, 219]]))
    source = CalvinSource("r", tmp_path / "task_ABC_D")
    assert len(list(source.episodes())) == 59 and source.set_aside.rows == [("auto_lang_ann.npy", "20", "annotation of frames outside of every episode: 140 to 141")]


def test_calvin_mistakes_are_told_at_once(tmp_path):
    folder = made("calvin", tmp_path, [("t", arm(2))]).folder
    with pytest.raises(ValueError, match="did you mean 'training'"): CalvinSource("r", folder.parent, split="trainig")
    with pytest.raises(ValueError, match="the folder that holds training/"): CalvinSource("r", folder)
    with pytest.raises(FileNotFoundError, match="lang_clip"): CalvinSource("r", folder.parent, language="lang_clip")
    (folder / "ep_start_end_ids.npy").write_bytes((folder / "ep_start_end_ids.npy").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"ep_start_end_ids\.npy: not pairs of frame numbers, or cut short"): CalvinSource("r", folder.parent)


# ---- LIBERO in HDF5

def edit(source, change):
    with h5py.File(source.files[0], "a") as file: change(file["data/demo_0"], file)


def external(demo, file):
    "The actions lie in another file."
    actions = demo["actions"][()]
    del demo["actions"]
    other = Path(file.filename).with_suffix(".other")
    with h5py.File(other, "w") as f: f["actions"] = actions
    demo["actions"] = h5py.ExternalLink(str(other), "actions")


def replaced(name, value):
    def change(demo, file):
        del demo[name]
        if value is not None: demo[name] = value
    return change


HDF5 = {
    "no actions": (replaced("actions", None), "no member 'actions'"),
    "no camera": (replaced("obs/agentview_rgb", None), "no member 'agentview_rgb'"),
    "six numbers": (replaced("actions", np.zeros((3, 6))), "actions not of shape"),
    "text": (replaced("actions", b"none"), "actions not of shape"),
    "whole numbers": (replaced("actions", np.zeros((3, 7), int)), "actions not of shape"),
    "fewer pictures": (replaced("obs/agentview_rgb", np.zeros((2, 8, 8, 3), np.uint8)), "actions and images differ in number"),
    "a group instead": (lambda demo, file: (replaced("actions", None)(demo, file), demo.create_group("actions")), "demonstration cannot be read"),
    "external link": (external, "a link instead of data"),
    "not JSON": (lambda demo, file: file["data"].attrs.__setitem__("problem_info", "{"), "problem_info is not a JSON object"),
    "a number": (lambda demo, file: file["data"].attrs.__setitem__("problem_info", '{"language_instruction": 7}'), "instruction is not text"),
}


@pytest.mark.parametrize("what", HDF5)
def test_broken_demonstrations_are_set_aside(what, tmp_path):
    source = made("libero_hdf5", tmp_path, [("t", arm(3))] * 30)
    change, reason = HDF5[what]
    edit(source, change)
    assert len(list(source.episodes())) == 29 and source.set_aside.rows[0][:2] == ("SCENE000_task_demo.hdf5", "SCENE000_task.demo_0") and source.set_aside.rows[0][2].startswith(reason)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_hdf5_cut_short(share, tmp_path):
    source = made("libero_hdf5", tmp_path, [("t", arm(3))] * 3)
    content = (file := source.files[1]).read_bytes()
    file.write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match=rf"SCENE001_task_demo\.hdf5: no HDF5 file, or cut short at byte {int(share * len(content)):,}"): list(source.episodes())


def test_hdf5_files_of_something_else(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file: file["x"] = 1
    with pytest.raises(ValueError, match="not a file of LIBERO's demonstrations: no member 'data'"): LiberoHDF5Source("r", tmp_path)
    with pytest.raises(ValueError, match="holds no"): LiberoHDF5Source("r", DATA)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/a.hdf5").write_text("text")
    with pytest.raises(ValueError, match="no HDF5 file"): LiberoHDF5Source("r", tmp_path / "b/a.hdf5")


def test_many_demonstrations_in_their_order(tmp_path):
    source = made("libero_hdf5", tmp_path, [("t", arm(3))] * 2)
    edit(source, lambda demo, file: [file.copy("data/demo_0", f"data/demo_{i}") for i in (1, 2, 10)])
    assert [r.key for r in source.records()] == [f"SCENE000_task.demo_{i}" for i in (0, 1, 2, 10)] + ["SCENE001_task.demo_0"] and len(source) == 5
    assert [r.key for r in source.records(4)] == ["SCENE001_task.demo_0"]


def test_without_h5py_the_cure_is_told(tmp_path, monkeypatch):
    folder = write_hdf5(tmp_path / "x", [("t", arm(3))])
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(ImportError, match=r'pip install "embodied-midtrain\[robots\]"'): LiberoHDF5Source("r", folder)
