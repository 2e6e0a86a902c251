"""README.md is index.ipynb as Markdown: its text, and the outputs that stand in it.

python tests/make_readme.py            convert
python tests/make_readme.py --execute  run the notebook first, so that pictures and tables are new
"""
import re, subprocess, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
INDEX, IMAGES = ROOT / "nbs" / "index.ipynb", "nbs/images"


def alternative_texts(notebook):
    "What a picture shows, from the `#| fig-alt:` line of its cell, in the order of the pictures."
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}): yield re.search(r"#\| fig-alt: (.*)", cell.source)[1]


def convert():
    "The text of README.md, and its pictures: path -> bytes."
    notebook = nbformat.read(INDEX, as_version=4)
    exporter = MarkdownExporter(exclude_input=True)
    text, resources = exporter.from_notebook_node(notebook, resources={"output_files_dir": IMAGES, "unique_key": "index"})
    texts = alternative_texts(notebook)
    text = re.sub(r"!\[[^]]*\](?=\(nbs/images)", lambda _: f"![{next(texts)}]", text)
    text = re.sub(r"\]\((?=\w+\.ipynb\))", "](nbs/", text)  # the notebook's neighbours
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.strip().splitlines())) + "\n"
    return text, dict(resources["outputs"])


def main():
    if "--execute" in sys.argv:
        for tool in (["jupyter", "nbconvert", "--to", "notebook", "--execute", "--inplace"], ["nbdev_clean", "--fname"]):
            subprocess.run([Path(sys.executable).parent / tool[0], *tool[1:], str(INDEX)], check=True, cwd=ROOT)
    text, pictures = convert()
    for old in (ROOT / IMAGES).glob("index_*.png"): old.unlink()
    for path, content in pictures.items():
        (ROOT / path).parent.mkdir(exist_ok=True)
        (ROOT / path).write_bytes(content)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__": main()
