"""The project as a whole: layout, pins, package, notebooks, links, docstrings, and an import that does nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from nbval.plugin import get_sanitize_patterns
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from contsp_core import Crystals, load_model
from contsp_core.data import load_split

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "contsp_core").rglob("*.py"))
CORE = ["crystals", "lattice", "data", "graph", "energy", "kernels", "mala", "diffusion", "sampler"]
CORE += ["checkpoints", "training", "transformations", "invariance"]
CSP = ["metrics", "candidates", "evaluation", "figures", "views"]
APP = ["calculators", "powder", "prediction", "files", "cli"]
# from the bottom to the top; each may import those before it
LAYERS = [*CORE, *(f"csp.{name}" for name in CSP), *(f"app.{name}" for name in APP)]
DRAWING = ("csp.figures", "csp.views")
NEEDED = ["filelock", "fsspec", "functorch", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "torchgen"]
NEEDED += ["typing_extensions", "safetensors"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = [path for pattern in ("*.md", "data/**/*.md", "figures/*.md") for path in sorted(ROOT.glob(pattern))]
FIGURES = sorted((ROOT / "figures").glob("*.png"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp)/\w")
PROGRESS_BAR = re.compile(r"\d+%\|")
BY_GPU_WHEELS = ("nvidia-", "cuda-", "triton")  # what a CUDA build of torch pins by itself
SILENCED = re.compile("# ?" + "noqa")
DEFINITION = ast.FunctionDef | ast.ClassDef
TORCH_METHODS = ("forward", "backward", "setup_context")  # torch documents these
UNPINNED = ("all", "potential")  # a name for others; for users, imported nowhere
LINTERS = ("ruff check", "ruff format --check", "mypy")
IMPORT_ALL = """
import pathlib, pkgutil, importlib, numpy, torch
before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), torch.get_num_threads(), torch.get_default_dtype()
import contsp_core
for module in pkgutil.walk_packages(contsp_core.__path__, "contsp_core."):
    importlib.import_module(module.name)
assert torch.equal(before[0], torch.get_rng_state()), "random state of torch"
assert before[1] == numpy.random.get_state()[1].tolist(), "random state of numpy"
assert before[2:] == (torch.get_num_threads(), torch.get_default_dtype()), "settings of torch"
"""
# Found by every interpreter that has this file first on its path: it hides all but the packages named.
HIDE_THE_REST = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

allowed = {*sys.stdlib_module_names, "torch", "numpy", "contsp_core", *ALLOWED}

class Allowed:
    def find_spec(name, path=None, target=None):
        known = name.split(".")[0] in allowed or name.startswith("_sysconfigdata")
        return PathFinder.find_spec(name, path, target) if known else None

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Allowed]
"""
USE_INSTALLED = """
import sys
import pandas
import contsp_core
from contsp_core import load_model
from contsp_core.data import DATA_DIR, load_split
assert contsp_core.__file__.startswith(sys.argv[1]), contsp_core.__file__
assert str(DATA_DIR).startswith(sys.argv[1]), DATA_DIR
assert len(pandas.read_csv(DATA_DIR / "published.csv")) > 0
crystals = load_split("prototypes", "test").crystals[:3]
print(load_model("prototypes").double()(crystals).tolist())
"""


def pins(lines: list[str]) -> dict[str, str]:
    """{canonical name: version} of the lines of a requirements file; every line must be an exact pin."""
    found = {}
    for line in lines:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"{line!r} is not of the form name==version"
        found[canonicalize_name(match[1])] = match[2]
    return found


@pytest.fixture(scope="module")
def requirements() -> dict[str, str]:
    """Pins of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    return pins([line for line in lines if line and not line.startswith("#")])


@pytest.fixture(scope="module")
def direct() -> dict[str, Requirement]:
    """Direct dependencies in pyproject.toml, with those that build the package."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = content["project"]["optional-dependencies"]
    lines = [*content["project"]["dependencies"], *content["build-system"]["requires"]]
    lines += [line for name, extra in extras.items() if name not in UNPINNED for line in extra]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def lines_of(paths: list[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


@pytest.mark.parametrize(
    ("folder", "max_modules", "max_lines"),
    [("contsp_core", 14, 3600), ("contsp_core/csp", 5, 1500), ("contsp_core/app", 5, 1000)],
)
def test_package_can_be_read_in_one_sitting(folder, max_modules, max_lines):
    paths = sorted((ROOT / folder).glob("*.py"))
    modules = [path.stem for path in paths if path.stem != "__init__"]
    assert len(modules) <= max_modules, modules
    assert lines_of(paths) <= max_lines


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "contsp_core").with_suffix("").parts)


def imported_modules(tree: ast.AST, package: str = "contsp_core.") -> set[str]:
    """Modules of this package imported anywhere in a file, also inside functions and for type checkers only."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix(package) for name in names if name.removeprefix(package) in LAYERS}


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "__init__"], ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    assert name in LAYERS, f"{name} is no module of the layout"
    below = set(LAYERS[: LAYERS.index(name)])
    if name == "energy":
        below.add("kernels")  # when they are there: kernels do not know the energy
    if name == "kernels":
        below.remove("energy")
    if name in DRAWING:
        below -= {"csp.candidates", "csp.evaluation"}
    assert imported_modules(ast.parse(path.read_text())) <= below


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda path: path.stem)
def test_no_linter_is_silenced_and_no_signature_is_too_long(path):
    text = path.read_text()
    assert SILENCED.findall(text) == []
    for node in ast.walk(ast.parse(text)):
        compiled = "jit" in " ".join(map(ast.unparse, getattr(node, "decorator_list", [])))
        if isinstance(node, ast.FunctionDef) and not compiled:  # compiled loops take each array by itself
            arguments = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            arguments = [name for name in arguments if name not in ("self", "cls")]
            assert len(arguments) <= 8, f"{node.name} has {len(arguments)} arguments, expected ≤ 8"


@pytest.mark.parametrize("command", LINTERS)
def test_linter_has_nothing_to_say(command):
    program, *options = command.split()
    pytest.importorskip(program, reason=f"{program} is not installed")
    command = [sys.executable, "-m", program, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_lint_runs_each_linter():
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe[1] == "".join(f"\t$(BIN)/{command}\n" for command in LINTERS)


def test_conda_environment_has_the_pins_of_the_direct_dependencies(requirements, direct):
    text = (ROOT / "environment.yml").read_text()
    listed = pins(re.findall(r"^ {6}- (.*)$", text, re.MULTILINE))
    assert listed == {name: requirements[name] for name in direct}
    assert "- python=3.11" in text


def test_pins_satisfy_the_ranges_of_the_project(requirements, direct):
    for name, requirement in direct.items():
        assert requirement.specifier.contains(requirements[name]), f"{requirement} excludes {requirements[name]}"


def test_each_package_that_a_pinned_one_needs_is_pinned(requirements):
    for name in requirements:
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": ""}):
                continue
            other = canonicalize_name(needed.name)
            assert other in requirements or other.startswith(BY_GPU_WHEELS), f"{name} needs {other}: not pinned"


def test_package_imports_only_direct_dependencies(direct):
    known = {"contsp_core", *map(str.lower, sys.stdlib_module_names), *(name.replace("-", "_") for name in direct)}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0].lower() in known, f"{path.name} imports {name}, missing in pyproject.toml"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_executed_with_one_checked_parameters_cell(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    tagged = [index for index, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells are tagged 'parameters', expected one"
    assert not any("injected-parameters" in cell.metadata.get("tags", []) for cell in code)
    assert "check_parameters(" in code[tagged[0] + 1].source, "the next cell must call check_parameters"
    assert all(cell.source.strip() for cell in code), "a code cell is empty"
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), f"not run once from top to bottom: {counts}"
    outputs = [output for cell in code for output in cell.outputs]
    assert not any(output.output_type == "error" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs), "no static picture"
    assert all(len(cell.source.splitlines()) <= 30 for cell in code), "a code cell is longer than 30 lines"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_shows_nothing_that_only_a_live_kernel_could_draw(path):
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    texts = [output.get("text", "") for output in outputs]
    texts += [str(value) for output in outputs for kind, value in output.get("data", {}).items() if "text" in kind]
    for text in texts:
        assert "NGLWidget(" not in text
        assert not PROGRESS_BAR.search(text), text
    for output in outputs:
        kinds = set(output.get("data", {}))
        assert not kinds or kinds & {"image/png", "text/html", "text/markdown", "text/plain"}, kinds
        assert "application/vnd.jupyter.widget-view+json" not in kinds or "image/png" in kinds, "a widget alone"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_writes_where_it_is_told_and_ends_with_checks(path):
    cells = nbformat.read(path, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "output_folder(" in code
    assert not re.search(r"Path\(output_dir|mkdir\(", code)
    headings = [line for cell in cells if cell.cell_type == "markdown" for line in cell.source.splitlines()]
    headings = [line for line in headings if re.match("#+ ", line)]
    assert re.match(r"#+ .*Checks", headings[-1]), headings[-1]
    last = next(cell.source for cell in reversed(cells) if cell.cell_type == "code")
    assert "assert " in last


@pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *DOCUMENTS, *sorted((ROOT / "figures").glob("*.json"))], ids=lambda path: path.name
)
def test_no_path_of_one_machine_is_committed(path):
    assert MACHINE_PATH.findall(path.read_text()) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_each_link_and_picture_exists(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(<?([^)#>\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"#]+)", text)
    targets = [target for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in targets if not (path.parent / target).exists()]
    assert missing == []
    for target, anchor in re.findall(r"\]\(((?!\w+:)[^)#\s]*)#([^)\s]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", (path.parent / target if target else path).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    named = re.findall(r"(?:notebooks|figures|tests|contsp_core)/[\w/.-]+\.(?:ipynb|png|csv|json|py)", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "target",
    sorted(set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(path.read_text() for path in DOCUMENTS)))),
)
def test_each_make_target_in_the_documents_exists(target):
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.name)
def test_each_figure_has_the_parameters_that_made_it(path):
    assert path.with_suffix(".json").is_file()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_module_is_documented_and_raises_instead_of_asserting(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "module"
    public = [node for node in tree.body if isinstance(node, DEFINITION) and not node.name.startswith("_")]
    methods = [node for owner in public if isinstance(owner, ast.ClassDef) for node in owner.body]
    for node in [*public, *methods]:
        if isinstance(node, DEFINITION) and not node.name.startswith("_") and node.name not in TORCH_METHODS:
            assert ast.get_docstring(node), f"{node.name}, line {node.lineno}"
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), "assert belongs to tests"


SAME = [  # what two machines or two runs may print
    ("torch 2.13.0+cpu, seed 0", "torch 2.14.1, seed 0"),
    ("spglib 2.8.0, seed 0; NaCl", "spglib 2.9.0, seed 0; NaCl"),
    ("<Styler at 0x7fa1171395d0>", "<Styler at 0x7fa125ebffd0>"),
    ('<style id="T_a1b2c">#T_a1b2c_row0', '<style id="T_99999">#T_99999_row0'),
    ("full step 22.6 ms, 2 threads", "full step 19 ms, 16 threads"),
    ("trained 39 s", "trained 1.2e+02 s"),
    ("peak 12.5 MB", "peak 13 MB"),
    ("/home/me/runs/01_NaCl.cif", "/tmp/pytest-0/runs/01_NaCl.cif"),
    ("max |ΔE| = 2.7e-15", "max |ΔE| = 1.1e-14"),
    ("../runs/04/x.csv", "/tmp/x/runs/04/x.csv"),
    ("2026-11-25 00:32", "2027-01-01 10:00"),
]
DIFFERENT = [  # results
    ("match rate 0.40", "match rate 0.41"),
    ("torch 2.13.0, seed 0", "torch 2.13.0, seed 1"),
    ("max |ΔE| = 2.7e-15", "max |ΔE| = 1.7e-03"),
    ("max |ΔE| = 2.7e-15", "max |ΔE| = nan"),
    ("12 crystals, 5 samples each", "12 crystals, 6 samples each"),
    ("energy -1.20", "energy 1.20"),
    ("Fm-3m (225)", "Pm-3m (221)"),
    ("runs/01_NaCl.cif", "runs/02_NaCl.cif"),
    ("1/2", "1/3"),
    ("share 50 %", "share 60 %"),
    ("a = 5.64 Å", "a = 5.46 Å"),
    ("slope 1.00", "slope 1.01"),
]


@pytest.mark.parametrize(("first", "second", "equal"), [(*p, True) for p in SAME] + [(*p, False) for p in DIFFERENT])
def test_sanitiser_hides_the_machine_and_no_result(first, second, equal):
    patterns = get_sanitize_patterns((ROOT / "tests" / "nbval_sanitize.cfg").read_text())
    cleaned = []
    for text in (first, second):
        for regex, replacement in patterns:
            text = re.sub(regex, replacement, text)
        cleaned.append(text)
    assert (cleaned[0] == cleaned[1]) is equal, cleaned


def run_python(arguments: list[str], folder: Path, path: str | Path = ROOT, **variables: str) -> str:
    """What a fresh interpreter prints whose home and working folder is ``folder``; its last words if it fails."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    env = kept | {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=folder, env=env | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_writes_no_file_and_changes_no_setting(tmp_path):
    assert run_python(["-c", IMPORT_ALL], tmp_path) == ""
    assert list(tmp_path.rglob("*")) == []


def test_training_needs_torch_and_numpy_only(tmp_path):
    load_split("prototypes", "train").save(tmp_path / "data" / "prototypes" / "train.npz")
    (tmp_path / "sitecustomize.py").write_text(HIDE_THE_REST.replace("ALLOWED", str(NEEDED)))
    arguments = ["-m", "contsp_core.training", "--dataset", "prototypes"]
    arguments += ["--n-updates", "3", "--output", "x.safetensors"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with pytest.raises(AssertionError, match="No module named 'pandas'"):  # the rest is hidden indeed
        run_python(["-c", "import pandas"], tmp_path, path)
    run_python(arguments, tmp_path, path, CONTSP_DATA_DIR=str(tmp_path / "data"), OMP_NUM_THREADS="1")
    structures = load_split("prototypes", "test").structures[:3]
    assert load_model(tmp_path / "x.safetensors")(Crystals.from_structures(structures)).isfinite().all()


def test_installed_package_works_without_the_checkout(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("contsp_core", "data"):  # copied, since a build leaves folders behind
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "cache"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)], check=True)
    shutil.rmtree(source)
    printed = run_python(["-c", USE_INSTALLED, str(target)], tmp_path, target)
    expected = load_model("prototypes").double()(load_split("prototypes", "test").crystals[:3])
    assert json.loads(printed) == pytest.approx(expected.tolist(), rel=1e-9)
