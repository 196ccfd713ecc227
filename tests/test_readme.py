"""What README and figures/README say is there: examples run as printed, tables are those of the files they cite."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from results import overview_table, to_markdown

from contsp_core.data import DATASETS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "figures" / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FIGURES = sorted(set(re.findall(r"\]\(figures/([^)]+\.png)\)", TEXT)))


def markdown_tables(text: str) -> list[list[list[str]]]:
    """Tables, each a list of rows of cells, the rule below the header left out."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()] for block in blocks]
    return [[row for row in table if not re.fullmatch("[-: ]+", "".join(row))] for table in rows]


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_comes_from_a_notebook_that_is_named(figure):
    (notebook,) = ROOT.glob(f"notebooks/{figure[:2]}_*.ipynb")
    assert f"](notebooks/{notebook.name})" in TEXT
    source = notebook.read_text(encoding="utf-8")
    stem = re.sub("_(all|" + "|".join(DATASETS) + r"|(?:[A-Z][a-z]?\d*)+)$", "", Path(figure).stem)
    assert stem.removeprefix("04_") in source, f"{notebook.name} does not save {stem}"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_example_runs_as_printed(tmp_path, example):
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", example]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout
    if "the cubic perovskite comes first" in example:
        assert re.search(r"^1 .*Pm-3m \(221\)", done.stdout, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}  # where the text says that results go


def test_every_module_and_every_notebook_is_listed():
    table = TEXT[TEXT.index("## How to read the code") :]
    modules = [path.stem for path in ROOT.glob("contsp_core/**/*.py") if path.stem != "__init__"]
    assert [name for name in modules if not re.search(rf"`((csp|app)[./])?{name}(\.py)?`", table)] == []
    for name in re.findall(r"^\| `([\w./]*\w)`", table, re.MULTILINE):
        stem = re.split(r"[./]", name.removesuffix(".py"))[-1]
        assert stem in [*modules, "csp"], f"{name} is listed, but there is no such module"
    notebooks = [path.name for path in ROOT.glob("notebooks/*.ipynb")]
    assert [name for name in notebooks if f"](notebooks/{name})" not in TEXT] == []


def test_the_results_are_those_of_the_executed_notebooks():
    files = [ROOT / "figures" / f"04_results_{name}.csv" for name in ("perov5", "mp20", "mpts52")]
    results = pd.concat([pd.read_csv(path) for path in files])
    full = to_markdown(overview_table(results)).strip()
    assert full in RESULTS
    (shown,) = [block for block in re.findall(r"(?:^\|.*\|\n)+", TEXT, re.MULTILINE) if "| k = 1 (%) |" in block]
    assert shown.startswith("\n".join(full.splitlines()[:2]))
    assert set(shown.splitlines()) <= set(full.splitlines())


def test_the_audit_is_that_of_the_file_it_cites():
    (name,) = set(re.findall(r"01_audit_(?!others)\w+\.csv", RESULTS))
    written = pd.read_csv(ROOT / "figures" / name)
    (shown,) = [table for table in markdown_tables(RESULTS) if table[0][0] == "check"]
    rows = {row[0]: row[1:] for row in shown[1:]}
    values = written.drop(columns="kind").set_index("check")
    assert set(rows) == set(values.index)
    for check, cells in rows.items():
        expected = values.loc[check].tolist()
        for cell, change, verdict in zip(cells, expected[::2], expected[1::2], strict=True):
            number, word = cell.split(maxsplit=1)
            assert word == verdict, check
            assert float(number) == pytest.approx(change, rel=0.051, abs=0), check
