"""Links to the files of two checkouts where ManiSkill3 looks for them, and stand-ins for those that a checkout lacks: a slab for a table, a plain colour for the skin of a thing. Where a stand-in is used, success is not SimplerEnv's.

    python simpler_assets.py ASSETS REAL2SIM WIDOWX [--stand-ins]"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from embodied_midtrain.benchmarks.simpler import FILES, MODELS, SCENES, missing_assets

TABLE = (-0.8, -0.8, 0.77), (0.5, 0.8, 0.87)   # metres, two corners: its top is where the robot stands
PLACED = 2.0634, 2.8313                        # where ManiSkill3 puts the middle of a table's file, whose y points up
COLOURS = {"eggplant": (80, 20, 90, 255)}


def link(source, path):
    if not source.exists() or path.exists(): return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(source.resolve(), target_is_directory=source.is_dir())


def link_all(folder, real2sim, widowx):
    link(widowx, folder / "robots/widowx")
    for name in FILES:
        part = name.removeprefix(f"{SCENES}/")
        if part != name and "/models/" not in part: link(real2sim / "data" / part.replace("stages/", "hab2_bench_assets/stages/"), folder / name)
    for model in MODELS:
        for file in sorted((real2sim / "data/custom/models" / model).glob("*")): link(file, folder / SCENES / "custom/models" / model / file.name)


def painted(shape, colour):
    import trimesh
    shape.visual = trimesh.visual.TextureVisuals(material=trimesh.visual.material.PBRMaterial(baseColorFactor=colour))
    return shape


def stand_in(folder, name):
    "Make what is missing beside the assets and link it there, if it is a table or a skin; whether it was."
    import trimesh
    path, made = folder / name, (folder.parent / "stand-ins" / name).with_suffix(".glb")
    made.parent.mkdir(parents=True, exist_ok=True)
    if "/stages/" in name:
        (x, y, z), (x1, y1, z1) = TABLE
        slab = trimesh.creation.box(extents=(x1 - x, z1 - z, y1 - y))
        slab.apply_translation(((x + x1) / 2 - PLACED[0], (z + z1) / 2, PLACED[1] - (y + y1) / 2))
        painted(slab, (150, 150, 150, 255)).export(made)
    elif path.name == "textured.dae" and (path.parent / "collision.obj").exists():
        painted(trimesh.load(path.parent / "collision.obj", force="mesh"), COLOURS.get(path.parent.name, (150, 150, 150, 255))).export(made)
    else: return False
    link(made, path.with_suffix(".glb"))
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in "assets", "real2sim", "widowx": parser.add_argument(name, type=Path)
    parser.add_argument("--stand-ins", action="store_true")
    asked = parser.parse_args()
    folder = asked.assets / "data"
    for path in [path for path in folder.rglob("*") if path.is_symlink()]: path.unlink()   # of an earlier call; what was downloaded stays
    link_all(folder, asked.real2sim, asked.widowx)
    made = [name for name in missing_assets(folder) if asked.stand_ins and stand_in(folder, name)]
    if made: print(f"{len(made)} stand-ins", *made, sep="\n  ")
    if lacks := missing_assets(folder): sys.exit("\n  ".join([f"neither {asked.real2sim} nor {asked.widowx} brings", *lacks, "STAND_INS=1 replaces tables and skins, to try the plumbing"]))
