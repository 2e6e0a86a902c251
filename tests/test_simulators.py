"The scripts that make the simulators' environments: what they say, and what they write without making one."
import importlib.util, subprocess, sys
from pathlib import Path

import pytest

from embodied_midtrain.benchmarks.simpler import SCENES, missing_assets

FOLDER = Path(__file__).parent / "simulators"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def run(*words, **options): return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_without_arguments_a_script_explains_itself(script):
    said = run(script)
    assert said.returncode == 2 and f"tests/simulators/{script.name} ENVIRONMENT" in said.stdout and "PYTHON:" in said.stdout


@pytest.mark.parametrize("script, more", [("calvin.sh", 2), ("libero.sh", 1), ("simpler.sh", 2)])
def test_a_wrong_folder_is_told_before_anything_is_made(script, more, tmp_path):
    said = run(FOLDER / script, tmp_path / "new" / "environment", *[tmp_path] * more)
    assert said.returncode == 1 and ("github.com" in said.stderr or "no assets of LIBERO" in said.stderr)
    assert not (tmp_path / "new" / "environment").exists()


def test_a_stand_in_is_a_shape_that_mujoco_reads(tmp_path):
    mujoco = pytest.importorskip("mujoco")
    thing = tmp_path / "thing"
    thing.mkdir()
    names = ["visual/a.msh", "b.obj", "c.png", "there.obj", "../../outside.obj"]
    xml = "".join(f'<mesh name="m{i}" file="{n}"/>' for i, n in enumerate(names[:2])) + f'<texture name="t" type="2d" file="{names[2]}"/>'
    (thing / "thing.xml").write_text(f'<mujoco><asset>{xml}</asset><worldbody><geom type="mesh" mesh="m0"/><geom type="mesh" mesh="m1"/></worldbody></mujoco>')
    (thing / "more.xml").write_text("".join(["<a>", *(f'<mesh file="{n}"/>' for n in names[3:]), "</a>"]))
    (thing / "there.obj").write_text("untouched")
    said = subprocess.run([sys.executable, FOLDER / "libero_stand_ins.py", tmp_path], capture_output=True, text=True, check=True).stdout
    model = mujoco.MjModel.from_xml_path(str(thing / "thing.xml"))
    assert said.startswith("3 stand-ins") and model.nmesh == 2 and model.ntex == 1
    assert (thing / "there.obj").read_text() == "untouched" and not (tmp_path.parent / "outside.obj").exists()


@pytest.fixture
def checkouts(tmp_path):
    "Files of the right names: all that SimplerEnv's tasks need but the tables and the eggplant's skin."
    real2sim, widowx = tmp_path / "real2sim", tmp_path / "widowx"
    data = {name.removeprefix(f"{SCENES}/").replace("stages/", "hab2_bench_assets/stages/") for name in missing_assets(tmp_path / "none") if name.startswith(SCENES)}
    wanted = [widowx / "wx250s.urdf", *(real2sim / "data" / name for name in data if "stages" not in name and "eggplant/textured" not in name)]
    for path in wanted:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n")
    return real2sim, widowx


def link(folder, checkouts, *more): return subprocess.run([sys.executable, FOLDER / "simpler_assets.py", folder, *checkouts, *more], capture_output=True, text=True)


def test_assets_are_linked_and_what_a_checkout_lacks_is_told(checkouts, tmp_path):
    said = link(tmp_path / "assets", checkouts)
    assert said.returncode == 1 and "bridge_table_1_v1.glb" in said.stderr and "eggplant/textured.dae" in said.stderr and "STAND_INS=1" in said.stderr
    assert len(missing_assets(tmp_path / "assets/data")) == 3
    for name in "bridge_table_1_v1", "bridge_table_1_v2":
        (checkouts[0] / "data/hab2_bench_assets/stages").mkdir(parents=True, exist_ok=True)
        (checkouts[0] / f"data/hab2_bench_assets/stages/{name}.glb").touch()
    downloaded = tmp_path / "assets/data" / SCENES / "custom/models/eggplant/textured.dae"
    downloaded.write_text("of the hub")
    for again in range(2): assert link(tmp_path / "assets", checkouts).returncode == 0
    assert downloaded.read_text() == "of the hub" and (tmp_path / "assets/data" / SCENES / "stages/bridge_table_1_v1.glb").resolve().is_relative_to(checkouts[0].resolve())


def test_a_stand_in_is_a_table_where_the_robot_stands(checkouts, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    before = sorted(checkouts[0].rglob("*"))
    said = link(tmp_path / "assets", checkouts, "--stand-ins")
    assert said.returncode == 0 and said.stdout.startswith("3 stand-ins") and sorted(checkouts[0].rglob("*")) == before, "the checkout stays as it is"
    table = trimesh.load(tmp_path / "assets/data" / SCENES / "stages/bridge_table_1_v1.glb", force="mesh")
    assert table.bounds[1][1] == pytest.approx(0.87)   # y points up in the file
    assert (tmp_path / "assets/data" / SCENES / "custom/models/eggplant/textured.glb").exists()
    assert link(tmp_path / "assets", checkouts).returncode == 1, "stand-ins are only there when they are asked for"


def test_the_stand_in_for_pyhash_is_fnv1():
    "Against the published value of 32-bit FNV-1 of the letter a."
    spec = importlib.util.spec_from_file_location("calvin_site", FOLDER / "calvin_site.py")
    module, before = importlib.util.module_from_spec(spec), list(sys.meta_path)
    try:
        spec.loader.exec_module(module)
        found = sys.meta_path[0].find_spec("pyhash")
    finally: sys.meta_path[:] = before
    assert found is not None and module.Stand().find_spec("numpy") is None
    pytest.importorskip("fnvhash")
    stand = module.Stand().create_module(found)
    module.Stand().exec_module(stand)
    assert stand.fnv1_32()("a") == 0x050c5d7e
