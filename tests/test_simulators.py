"The scripts that make the simulators' environments: what they say, and what they write without making one."
import importlib.util, subprocess, sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "simulators"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def run(*words, **options): return subprocess.run(["bash", *map(str, words)], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.stem)
def test_without_arguments_a_script_explains_itself(script):
    said = run(script)
    assert said.returncode == 2 and f"tests/simulators/{script.name} ENVIRONMENT" in said.stdout and "PYTHON:" in said.stdout


@pytest.mark.parametrize("script, more", [("calvin.sh", 2), ("libero.sh", 1)])
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
