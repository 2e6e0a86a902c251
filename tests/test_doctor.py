"The doctor: what it finds is what is there, and its exit code tells only of a package that cannot work."
import importlib.util, json, re, subprocess, sys, tomllib
from pathlib import Path

import pytest

from embodied_midtrain import doctor as module
from embodied_midtrain.cli import main
from embodied_midtrain.doctor import EXTRAS, doctor, findings_table, look_at_benchmarks, look_at_core, look_at_data, look_at_extras, look_at_machine
from embodied_midtrain.evaluate import BENCHMARKS, benchmark_of
from embodied_midtrain.pipeline import load_profile

ROOT = Path(__file__).parent.parent


def named(findings): return {finding.what: finding for finding in findings}


def test_this_environment_is_whole():
    "The tests run in the environment of CI, which has the core."
    assert not [finding for finding in look_at_core() if finding.state == "broken"]


def test_requirements_that_are_not_met_are_broken_and_say_the_command(tmp_path):
    found = named(look_at_core(["numpy>=99", "no-such-package>=1", "pandas>=1", 'nbdev>=99; extra == "dev"'], tmp_path / "none"))
    assert set(found) == {"Python", "numpy", "no-such-package"}
    assert (found["numpy"].state, found["numpy"].mend, found["no-such-package"].found) == ("broken", 'pip install "numpy>=99"', "not installed")


def test_versions_that_were_not_tested_are_told(tmp_path):
    (tmp_path / "constraints.txt").write_text("# tested\nnumpy==0.1\nnot-installed==1\n")
    found = look_at_core([], tmp_path / "constraints.txt")[-1]
    assert found.state == "missing" and re.fullmatch(r"numpy \S+ \(tested: 0.1\)", found.found)
    import numpy
    (tmp_path / "constraints.txt").write_text(f"numpy=={numpy.__version__}\n")
    assert look_at_core([], tmp_path / "constraints.txt")[-1].state == "ok"


def test_the_machine_is_told_as_it_is(tmp_path):
    import shutil, torch
    from embodied_midtrain.benchmarks.metaworld import egl_devices
    found = named(look_at_machine(tmp_path))
    assert (found["GPU"].state == "ok") == torch.cuda.is_available() and (found["EGL"].state == "ok") == (egl_devices() > 0)
    assert (found["disk"].state == "ok") == (shutil.disk_usage(tmp_path).free > 1e10)


def test_a_bare_machine_is_told_what_to_install(monkeypatch):
    "Where the real thing cannot be taken away: finders that find nothing, a disk that is full, a torch that does not load."
    monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 10**9}))
    monkeypatch.setitem(sys.modules, "torch", None)
    found = named(look_at_machine())
    assert found["torch"].state == "broken" and {finding.state for what, finding in found.items() if what != "torch"} == {"missing"}
    assert "libegl1" in found["EGL"].mend and "libosmesa6" in found["OSMesa"].mend and "mesa-vulkan-drivers" in found["Vulkan"].mend and "chromium" in found["browser"].mend and found["disk"].found == "1 GB free"


def test_extras_are_those_of_the_package():
    "Each extra of pyproject.toml that a user may want, and modules that it really brings."
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(wanted) - {"dev"}
    for extra, modules in EXTRAS.items():
        assert {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in wanted[extra]} == set(modules)


def test_an_extra_that_is_missing_says_the_command(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name, *rest: None if name == "h5py" else real(name, *rest))
    found = named(look_at_extras())["robots"]
    assert (found.state, found.found, found.mend) == ("missing", "lacks h5py", 'pip install "embodied-midtrain[robots]"')


def test_benchmarks_are_told_where_they_live(tmp_path):
    found = named(look_at_benchmarks())
    assert set(found) == set(BENCHMARKS) and found["tabletop"].state == "ok" and "vla-eval" in found["tabletop"].found
    for name in "calvin", "libero_10", "simpler_bridge", "simpler_bridge_ms3": assert found[name].state == "ok" or found[name].mend
    with pytest.raises(ValueError, match="path of an interpreter"): look_at_benchmarks(str(tmp_path / "python"))


def test_assets_are_looked_for_where_the_scripts_put_them(tmp_path, monkeypatch):
    "Beside the interpreter that is named; what is missing says the script with that environment."
    python = str(tmp_path / "bin" / "python")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    for name, said in ("calvin", "merged_config.yaml"), ("libero_10", "keyboard"):
        found, mend = module.ASSETS[name](BENCHMARKS[name], python)
        assert said in found and f"tests/simulators/{name.split('_')[0]}.sh {tmp_path}" in mend
    (tmp_path / "scene_D/.hydra").mkdir(parents=True)
    (tmp_path / "scene_D/.hydra/merged_config.yaml").touch()
    (tmp_path / "libero_config").mkdir()
    for nothing in "", "datasets: here\n", "assets: [\n", "3":
        (tmp_path / "libero_config/config.yaml").write_text(nothing)
        assert "does not say where the assets are" in module.ASSETS["libero_10"](BENCHMARKS["libero_10"], python)[0]
    (tmp_path / "libero_config/config.yaml").write_text(f"assets: {tmp_path}/assets\n")
    assert module.ASSETS["calvin"](BENCHMARKS["calvin"], python) is None and "holds no assets" in module.ASSETS["libero_10"](BENCHMARKS["libero_10"], python)[0]
    (tmp_path / "assets/stable_scanned_objects").mkdir(parents=True)
    monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: None)
    assert "libosmesa6" in module.ASSETS["libero_10"](BENCHMARKS["libero_10"], python)[1]
    assert module.look_at_assets(BENCHMARKS["libero_10"], python, render="gpu") is None
    monkeypatch.setattr(module.ctypes.util, "find_library", lambda name: name)
    assert module.ASSETS["libero_10"](BENCHMARKS["libero_10"], python) is None


def test_a_scene_beside_the_interpreter_has_to_be_named_when_it_is_played(tmp_path):
    python = str(tmp_path / "bin" / "python")
    (tmp_path / "scene_D/.hydra").mkdir(parents=True)
    (tmp_path / "scene_D/.hydra/merged_config.yaml").touch()
    assert module.look_at_assets(BENCHMARKS["calvin"], python) is None and module.look_at_assets(BENCHMARKS["tabletop"], python) is None
    assert module.look_at_assets(BENCHMARKS["calvin"], python, asked=True)[1] == f"emt evaluate ... --param dataset_path={tmp_path}/scene_D"
    named = benchmark_of("calvin", 1, params=dict(dataset_path=str(tmp_path / "scene_D")))
    assert module.look_at_assets(named, python, asked=True) is None


def test_metaworld_without_anything_that_draws_is_told(monkeypatch):
    import embodied_midtrain.benchmarks.metaworld as mw
    for name in "MUJOCO_GL", "DISPLAY": monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mw, "egl_devices", lambda: 0)
    monkeypatch.setattr(mw.ctypes.util, "find_library", lambda name: None)
    found, mend = module.ASSETS["metaworld"](BENCHMARKS["metaworld"], None)
    assert "nothing here can draw" in found and "libegl1" in mend


def test_what_a_world_of_maniskill3_lacks_is_told_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "assets"))
    monkeypatch.setenv("SIMPLER_LAVAPIPE_ICD", str(tmp_path / "none.json"))   # so that no driver of this machine is found
    found, mend = module.ASSETS["simpler_bridge_ms3"](BENCHMARKS["simpler_bridge_ms3"], None)
    assert f"assets are not in {tmp_path / 'assets'}" in found and "vulkan: " in found and "lavapipe" in found
    assert "tests/simulators/simpler.sh" in mend and "mesa-vulkan-drivers" in mend
    (tmp_path / "python").write_text("#!/bin/sh\necho Segmentation fault >&2; exit 139\n")
    (tmp_path / "python").chmod(0o755)
    found, mend = module.ASSETS["simpler_bridge_ms3"](BENCHMARKS["simpler_bridge_ms3"], str(tmp_path / "python"))
    assert found.startswith("vulkan: ") and "Segmentation fault" in found and "mesa-vulkan-drivers" in mend
    (tmp_path / "python").write_text("#!/bin/sh\necho words of a simulator; echo '{\"assets\": \"\", \"vulkan\": \"\"}'\n")
    assert module.ASSETS["simpler_bridge_ms3"](BENCHMARKS["simpler_bridge_ms3"], str(tmp_path / "python")) is None


def test_debian_12_is_sent_to_its_backports(monkeypatch):
    def command(**release):
        monkeypatch.setattr(module.platform, "freedesktop_os_release", lambda: release)
        return module._mesa()
    assert "-t bookworm-backports" in command(VERSION_CODENAME="bookworm") and "backports" not in command(VERSION_CODENAME="trixie") + command()
    def none(): raise OSError
    monkeypatch.setattr(module.platform, "freedesktop_os_release", none)
    assert module._mesa().endswith("libvulkan1 mesa-vulkan-drivers")


def test_backports_that_apt_does_not_know_are_made_known_first(monkeypatch, tmp_path):
    "The command is really run on a copy of Debian's file, as far as apt."
    monkeypatch.setattr(module.platform, "freedesktop_os_release", lambda: {"VERSION_CODENAME": "bookworm"})
    monkeypatch.setattr(module, "APT_SOURCES", tmp_path)
    file = tmp_path / "sources.list.d/debian.sources"
    file.parent.mkdir()
    file.write_text("Types: deb\nSuites: bookworm bookworm-updates\n\nTypes: deb\nSuites: bookworm-security\n")
    first = module._mesa().split(" && ")
    assert first[1] == "apt-get update" and first[2].startswith("apt-get install")
    subprocess.run(first[0], shell=True, check=True)
    assert file.read_text() == "Types: deb\nSuites: bookworm bookworm-updates bookworm-backports\n\nTypes: deb\nSuites: bookworm-security\n"
    assert module._mesa() == first[2]
    file.write_text("# deb bookworm-backports\n")
    assert module._mesa().startswith("sed")
    file.unlink()
    assert module._mesa().startswith("add bookworm-backports")


def test_data_of_a_profile_are_looked_for(tmp_path):
    (tmp_path / "chats.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    sources = [{"reader": "llava", "path": "{data}/chats.json"}, {"reader": "cc12m", "path": "{data}/empty"}, {"reader": "cc12m", "path": "{data}/gone"}, {"reader": "tabletop", "name": "mini-vcr"}]
    found = named(look_at_data({"data": [str(tmp_path / "no"), str(tmp_path)], "stages": {"features": {"pool": sources, "demos": {"a": sources[0]}}}}))
    assert {what: finding.state for what, finding in found.items()} == {"{data}/chats.json": "ok", "{data}/empty": "missing", "{data}/gone": "missing"}
    assert str(tmp_path / "gone") in found["{data}/gone"].mend


def test_data_of_the_shipped_profiles_are_all_found_in_their_parameters():
    assert len(look_at_data(load_profile("paper"))) > 10 and look_at_data(load_profile("micro")) == []


def test_the_command_prints_a_table_or_json_and_fails_only_for_a_broken_core(capsys, monkeypatch):
    assert main(["doctor", "--profile", "paper"]) == 0
    printed = capsys.readouterr().out
    assert "| core" in printed and "| benchmarks" in printed and "{data}/cc12m" in printed
    assert main(["doctor", "--json"]) == 0
    assert {"part", "what", "state", "found", "mend"} == set(json.loads(capsys.readouterr().out)[0])
    monkeypatch.setattr(module, "look_at_core", lambda: look_at_core(["numpy>=99"]))
    assert main(["doctor"]) == 1 and 'pip install "numpy>=99"' in capsys.readouterr().out


def test_everything_that_is_not_there_can_be_mended():
    table = findings_table(doctor())
    absent = table[(table["state"] != "ok") & (table["what"] != "GPU")]
    assert (absent["mend"] != "").all()
