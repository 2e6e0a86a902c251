"How the house is built: rooms in order, light doors, notebooks and library in step."
import ast, filecmp, importlib, inspect, json, re, shutil, subprocess, sys, tempfile, tomllib
from pathlib import Path

import pytest

from embodied_midtrain.pipeline import STAGES, parameters_of

ROOT = Path(__file__).parent.parent
PACKAGE = "embodied_midtrain"
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
BIN = Path(sys.executable).parent


def cells(notebook): return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def module_of(notebook):
    "The module that a notebook generates, by its default_exp."
    found = [m[1] for c in cells(notebook) if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))]
    assert len(found) == 1, f"{notebook.name} has {len(found)} cells with default_exp"
    return found[0]


MODULES = {module_of(n): i for i, n in enumerate(NOTEBOOKS)}  # module -> its place in the order of the notebooks


def file_of(module): return ROOT / PACKAGE / f"{module.replace('.', '/')}.py"


def imports(module):
    "All modules that a module imports, at any depth of its code, as absolute names."
    here = f"{PACKAGE}.{module}".split(".")
    for node in ast.walk(ast.parse(file_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[:len(here) - node.level] if node.level else []
            name = ".".join(base + [node.module] * bool(node.module))
            yield name
            yield from (f"{name}.{a.name}" for a in node.names)


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_numbers(module):
    "Data flows one way, and so do imports."
    own = {i.removeprefix(f"{PACKAGE}.") for i in imports(module) if i.startswith(f"{PACKAGE}.")} & MODULES.keys()
    assert not (wrong := [m for m in own if MODULES[m] >= MODULES[module]]), f"{module} imports {wrong}, which come later"


def test_rooms_that_never_meet():
    assert not any(i.startswith(f"{PACKAGE}.midtrain") for i in imports("policy")), "a checkpoint folder is the interface"
    stages = {f"{PACKAGE}.{m}" for m in ("features", "gap", "proximity", "perplexity", "selection", "shortcuts", "stability", "leakage", "midtrain", "policy", "benchmarks.tabletop", "retention", "results")}
    for module in "pipeline", "cli": assert not stages & set(imports(module)), "the pipeline imports no stage"


def test_every_module_has_a_notebook():
    exported = {p.relative_to(ROOT / PACKAGE).with_suffix("").as_posix().replace("/", ".") for p in (ROOT / PACKAGE).rglob("*.py")}
    assert {m for m in exported if not m.split(".")[-1].startswith("_")} == MODULES.keys()


def loaded_by(*modules):
    "What a fresh process has loaded after importing modules."
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_import_is_light():
    "Looking at a package, a run folder or the help of the command must not cost seconds."
    heavy = {"torch", "matplotlib", "seaborn", "sklearn", "umap", "transformers", "papermill", "nbdev", "fastcore"}
    assert not heavy & loaded_by(PACKAGE, f"{PACKAGE}.core", f"{PACKAGE}.pipeline", f"{PACKAGE}.cli")


def test_rooms_of_arrays_and_tables_know_no_model():
    rooms = [f"{PACKAGE}.{m}" for m in MODULES if m.split(".")[0] in ("samples", "sources", "tabletop", "vectors", "gap", "selection", "actions", "stats", "results")]
    assert not {"torch", "transformers", "matplotlib"} & loaded_by(*rooms)


INSTALLED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "umap-learn": "umap"}
COMES_ALONG = {"matplotlib": "seaborn", "nbformat": "nbconvert", "nbclient": "papermill", "huggingface_hub": "transformers", "tokenizers": "transformers", "packaging": "transformers", "IPython": "jupyterlab", "uvicorn": "embedding_atlas", **dict.fromkeys(("anyio", "msgpack", "websockets"), "vla_eval")}


def declared(*extras):
    "The modules of the packages that pyproject.toml promises to install."
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [d for extra in extras for d in project["optional-dependencies"][extra]]
    names = [re.match(r"[\w-]+", d)[0].lower() for d in wanted]
    return {INSTALLED_AS.get(name, name.replace("-", "_")) for name in names}


EXTRAS = ("archives", "benchmarks", "explore", "metaworld", "robots")


def test_third_party_imports_are_declared():
    "What the library imports is what pyproject.toml promises to install; development tools are not among it."
    wanted = declared(*EXTRAS)
    for module in MODULES:
        for name in {i.split(".")[0] for i in imports(module)} - set(sys.stdlib_module_names) - {PACKAGE}:
            assert name in wanted or COMES_ALONG.get(name) in wanted, f"{module} imports {name}"


def test_extras_are_asked_for_when_needed():
    "Without an extra, every module can be imported."
    extras = declared(*EXTRAS) - declared() - {"packaging"}   # which comes with transformers, too
    assert extras == {"anywidget", "av", "embedding_atlas", "gymnasium", "h5py", "indexed_gzip", "metaworld", "mujoco", "vla_eval"}
    assert not extras & loaded_by(*(f"{PACKAGE}.{m}" for m in MODULES))


# ---- notebooks

def exports(cell): return cell["cell_type"] == "code" and re.search(r"^#\|\s*export\b", source(cell), re.M)


def public_definitions(text): return [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_pieces_are_small_and_shown_at_once(notebook):
    "No exported cell is over 50 lines; each public definition is followed within three cells by an example, a picture or an assertion."
    every, wrong = [c for c in cells(notebook) if c["cell_type"] == "code"], []
    for i, cell in enumerate(every):
        if not exports(cell): continue
        if len(source(cell).splitlines()) > 50: wrong.append(f"too long: {source(cell)[:60]}")
        if all(exports(c) for c in every[i + 1:i + 4]): wrong += [f"{d.name} is followed by no example" for d in public_definitions(source(cell))]
    assert not wrong, wrong


INNER = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)  # names in these are their own


def assigned(node):
    "The names that code gives a value in the notebook's own namespace."
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store): yield node.id
    for child in ast.iter_child_nodes(node): yield from () if isinstance(child, INNER) else assigned(child)


@pytest.mark.parametrize("stage", STAGES.values())
def test_examples_leave_the_parameters_alone(stage):
    "A stage's examples run before its Run part, in one namespace: a loop variable named like a parameter would quietly replace what the profile says."
    notebook = ROOT / f"nbs/{stage}.ipynb"
    code = [c for c in cells(notebook) if c["cell_type"] == "code" and "parameters" not in c["metadata"].get("tags", [])]
    taken = {name for c in code for name in assigned(ast.parse(source(c)))} & {"run", *parameters_of(notebook)}
    assert not taken, f"{stage} assigns to its parameters {taken}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda n: n.stem)
def test_notebook_begins_with_title_and_subtitle(notebook):
    assert re.match(r"# \S.*\n+> \S", source(cells(notebook)[0])), "the first cell is a title and a one-line subtitle"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_are_documented(module):
    "A docstring on every public name; comments behind most parameters of a function that has more than two."
    text = file_of(module).read_text(encoding="utf-8")
    for defined in public_definitions(text):
        assert ast.get_docstring(defined), f"{module}.{defined.name} has no docstring"
        if isinstance(defined, ast.ClassDef): continue
        head = "\n".join(text.splitlines()[defined.lineno - 1:defined.body[0].lineno - 1])
        arguments = [a.arg for a in [*defined.args.args, *defined.args.kwonlyargs]]
        told = [a for a in arguments if re.search(rf"\b{a}\b[^#\n]*(#|help=)", head)]
        assert len(arguments) <= 2 or len(told) >= len(arguments) / 2, f"{module}.{defined.name}: comments only for {told}"


def test_no_path_of_this_machine():
    "What is committed tells nothing of the machine it was made on."
    tell = {str(ROOT), sys.prefix, str(Path.home())} - {"/", "/root", "/usr"}
    for folder, pattern in ("nbs", "*.ipynb"), (PACKAGE, "*.py"), (PACKAGE, "*.yaml"), (PACKAGE, "*.json"), ("tests", "*.py"), (".", "*.*"):
        for file in (ROOT / folder).glob(pattern) if folder == "." else (ROOT / folder).rglob(pattern):
            if file.is_file():
                text = file.read_text(encoding="utf-8", errors="ignore")
                assert not [t for t in tell if t in text], file


@pytest.fixture(scope="module")
def copied_tree(tmp_path_factory):
    "The parts of the tree that nbdev reads and writes."
    tree = tmp_path_factory.mktemp("tree")
    for name in "settings.ini", "pyproject.toml", "README.md": shutil.copy(ROOT / name, tree)
    for name in "nbs", PACKAGE: shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "runs"))
    return tree


@pytest.mark.parametrize("command", ["nbdev_clean", "nbdev_export"])
def test_notebooks_are_clean_and_in_step_with_the_library(copied_tree, command):
    subprocess.run([BIN / command], cwd=copied_tree, check=True, capture_output=True)
    changed = [f for name in ("nbs", PACKAGE) for f in sorted((copied_tree / name).rglob("*")) if f.is_file() and f.suffix in (".ipynb", ".py")
               and not ((old := ROOT / f.relative_to(copied_tree)).exists() and filecmp.cmp(f, old, shallow=False))]
    assert not changed, f"run {command}: it changes {[f.name for f in changed]}"
