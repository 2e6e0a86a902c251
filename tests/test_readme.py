"README.md is the index notebook, and promises what there is."
import re
from pathlib import Path

from make_readme import ROOT, convert

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_is_the_index_notebook():
    "If this fails: python tests/make_readme.py"
    text, pictures = convert()
    assert text == README
    for path, content in pictures.items(): assert (ROOT / path).read_bytes() == content, path


def test_pictures_and_links_lead_somewhere():
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README): assert (ROOT / path).exists(), path


def test_pictures_have_alternative_texts():
    assert all(len(text) > 30 for text in re.findall(r"!\[([^]]*)\]", README))


def test_each_of_the_two_commands_is_one_line():
    fences = [f.strip().splitlines() for f in re.findall(r"```bash\n(.*?)```", README, re.S)]
    commands = [lines[0] for lines in fences if len(lines) == 1]
    assert [c.split()[-1] for c in commands] == ["micro", ".venv/bin/pytest"]


def test_profiles_named_in_the_readme_exist():
    shipped = {p.stem for p in (ROOT / "embodied_midtrain" / "profiles").glob("*.yaml")}
    named = set(re.findall(r"--profile (\w[\w-]*)", README)) | {Path(p).stem for p in re.findall(r"profiles/(\S+\.yaml)", README)}
    assert named <= shipped, named - shipped


def test_every_notebook_has_its_line():
    for path in (ROOT / "nbs").glob("[0-9]*.ipynb"): assert f"  {path.name}" in README, f"{path.name}: python tests/make_readme.py --execute"
