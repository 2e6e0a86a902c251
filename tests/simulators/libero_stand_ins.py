"""Stand-ins for pictures and shapes of LIBERO that a checkout lacks: a grey picture, a small box. What a policy sees then differs from LIBERO: such a run shows that the plumbing holds, and its success is not LIBERO's.

    python libero_stand_ins.py ASSETS"""
import re
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

CORNERS = [(x, y, z) for x in (-.02, .02) for y in (-.02, .02) for z in (-.02, .02)]
FACES = [(0, 1, 3), (0, 3, 2), (4, 7, 5), (4, 6, 7), (0, 5, 1), (0, 4, 5), (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 5, 7), (1, 7, 3)]


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        from PIL import Image
        Image.new("RGB", (64, 64), (150, 150, 150)).save(path)
    elif path.suffix == ".obj":
        path.write_text("".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS) + "".join(f"f {a + 1} {b + 1} {c + 1}\n" for a, b, c in FACES))
    elif path.suffix == ".msh":   # MuJoCo's own: four counts, then vertices, normals, texture coordinates, faces
        normals, places = [(0., 0., 1.)] * 8, [(0., 0.)] * 8
        path.write_bytes(struct.pack("4i", 8, 8, 8, 12) + b"".join(struct.pack(f"{len(row)}f", *row) for part in (CORNERS, normals, places) for row in part) + b"".join(struct.pack("3i", *face) for face in FACES))
    else: return False
    return True


if __name__ == "__main__":
    assets, made = Path(sys.argv[1]), []
    for xml in sorted(assets.rglob("*.xml")):
        try: root = ElementTree.parse(xml).getroot()
        except ElementTree.ParseError: continue
        for name in {element.get("file") for element in root.iter() if element.get("file")}:
            path = (xml.parent / name).resolve()
            if re.search(r"\.(png|obj|msh)$", name) and path.is_relative_to(assets.resolve()) and not path.exists() and write(path): made.append(path.relative_to(assets.resolve()))
    print(f"{len(made)} stand-ins", *map(str, made), sep="\n  ")
