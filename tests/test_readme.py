"""The example in the README runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from contsp_core.checkpoints import CHECKPOINTS
from contsp_core.csp.evaluation import overview_table, to_markdown

README = Path(__file__).parents[1] / "README.md"


def test_python_example_runs_and_predicts_the_formula_asked_for(capsys):
    if not (CHECKPOINTS / "prototypes.safetensors").is_file():
        pytest.skip("the bundled checkpoint of prototypes is missing")
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict = {}
    exec(compile(snippet, "README.md", "exec"), namespace)
    assert {structure.composition.reduced_formula for structure in namespace["candidates"]} == {"NaCl"}
    assert "space group" in capsys.readouterr().out


def test_every_module_and_every_notebook_is_listed():
    text = README.read_text(encoding="utf-8")
    table = text[text.index("## How to read the code") :]
    modules = [path.stem for path in README.parent.glob("contsp_core/*.py") if path.stem != "__init__"]
    assert [name for name in modules if f"`{name}`" not in table] == []
    notebooks = [path.name for path in README.parent.glob("notebooks/*.ipynb")]
    assert [name for name in notebooks if f"](notebooks/{name})" not in text] == []


def test_the_results_are_those_of_the_executed_notebooks():
    files = [README.parent / "figures" / f"04_results_{name}.csv" for name in ("perov5", "mp20", "mpts52")]
    results = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False) for path in files])
    assert to_markdown(overview_table(results)) in README.read_text(encoding="utf-8")
