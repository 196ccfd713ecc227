"""The project as a whole: pins, notebooks, links, docstrings, and an import that does nothing."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "contsp_core").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = [path for pattern in ("*.md", "data/**/*.md", "figures/*.md") for path in sorted(ROOT.glob(pattern))]
FIGURES = sorted((ROOT / "figures").glob("*.png"))
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users|tmp)/\w")
BY_GPU_WHEELS = ("nvidia-", "cuda-", "triton")  # what a CUDA build of torch pins by itself
DEFINITION = ast.FunctionDef | ast.ClassDef
TORCH_METHODS = ("forward", "backward", "setup_context")  # torch documents these
IMPORT_ALL = """
import pathlib, pkgutil, importlib, numpy, torch
before = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), torch.get_num_threads(), torch.get_default_dtype()
import contsp_core
for module in pkgutil.iter_modules(contsp_core.__path__):
    importlib.import_module("contsp_core." + module.name)
assert torch.equal(before[0], torch.get_rng_state()), "random state of torch"
assert before[1] == numpy.random.get_state()[1].tolist(), "random state of numpy"
assert before[2:] == (torch.get_num_threads(), torch.get_default_dtype()), "settings of torch"
"""
IMPORT_TRAINING = """
import sys
for name in ("ase", "joblib", "matplotlib", "numba", "pandas", "plotly", "pymatgen", "safetensors", "scipy", "tqdm"):
    sys.modules[name] = None
import importlib
for name in ("crystals", "lattice", "graph", "energy", "sampler", "data", "training"):
    try:
        importlib.import_module(f"contsp_core.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"contsp_core.{name}":
            raise
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
    lines += [line for name, extra in extras.items() if name != "all" for line in extra]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def test_torch_is_pinned_as_agreed(requirements):
    assert requirements["torch"] == "2.13.0"


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
    known = {"contsp_core", *sys.stdlib_module_names, *(name.replace("-", "_") for name in direct)}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in known, f"{path.name} imports {name}, missing in pyproject.toml"


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
    named = re.findall(r"(?:notebooks|figures|tests|contsp_core)/[\w/.-]+\.(?:ipynb|png|csv|json|py)", path.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "target",
    sorted(
        set(
            re.findall(
                r"\bmake ([a-z][\w-]*)", "\n".join(path.read_text() for path in DOCUMENTS if path.parent == ROOT)
            )
        )
    ),
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


def run_python(code: str, folder: Path) -> None:
    """Run code in a fresh interpreter whose home and working folder is ``folder``; fail with its last words."""
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LD_LIBRARY_PATH")}
    env = kept | {"HOME": str(folder), "TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_import_writes_no_file_and_changes_no_setting(tmp_path):
    run_python(IMPORT_ALL, tmp_path)
    assert list(tmp_path.rglob("*")) == []


def test_training_needs_torch_and_numpy_only(tmp_path):
    run_python(IMPORT_TRAINING, tmp_path)
