"""Checks for the parameters of a notebook, so that a wrong one stops it before any work.

papermill only warns about a parameter that the notebook does not have, and takes any value. The cell after the
``parameters`` cell therefore reads::

    from parameters import check_parameters

    parameters = check_parameters(globals(), "dataset", "seed", "n_steps", "output_dir")

and any other parameter of the notebook is declared with what it allows: ``device=("cpu", "cuda")``, ``cutoff=float``.
Files are written below ``output_folder(output_dir)``; scripts take the name of theirs as :func:`output_file` checks it.
"""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from contsp_core.data import CHECKPOINTS, DATASETS, retold

INJECTED = "# Parameters\n"  # first line of the cell that papermill adds
FIGURES = Path(__file__).parents[1] / "figures"  # where scripts write

Rule = type | tuple[Any, ...] | Callable[[Any], str | None]


def _integer_from(low: int, value: Any) -> str | None:
    right = isinstance(value, int) and not isinstance(value, bool) and value >= low
    return None if right else f"an integer ≥ {low}"


_positive = partial(_integer_from, 1)


def _minutes(value: Any) -> str | None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
    return None if right else "a number of minutes > 0"


def _checkpoint(value: Any) -> str | None:
    bundled = sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors"))
    if value in bundled or (isinstance(value, str | Path) and Path(value).is_file()):
        return None
    return f"a file that exists, or a bundled checkpoint ({', '.join(bundled) or 'none here'})"


def _folder(value: Any) -> str | None:
    right = isinstance(value, str | Path) and str(value) and not Path(value).is_file()
    return None if right else "a folder (made if missing)"


def optional(rule: Rule) -> Rule:
    """The rule that also allows None: a notebook says what None means there."""

    def check(value: Any) -> str | None:
        expected = None if value is None else _expected(rule, value)
        return expected and f"{expected}, or None"

    return check


# What each shared parameter allows: a tuple of values, or a function that returns what is expected of a wrong value.
RULES: dict[str, Rule] = {
    "dataset": DATASETS,
    "seed": partial(_integer_from, 0),
    "checkpoint": _checkpoint,
    "n_structures": optional(_positive),
    "n_samples": _positive,
    "n_steps": optional(_positive),
    "n_updates": optional(_positive),
    "n_processes": _positive,
    "minutes": optional(_minutes),
    "resume": bool,
    "output_dir": _folder,
}


def _expected(rule: Rule, value: Any) -> str | None:
    """What is expected in place of ``value``; None if the value is right."""
    if isinstance(rule, tuple):
        # 1 == True in Python: compare the type too
        right = any(value == allowed and type(value) is type(allowed) for allowed in rule)
        return None if right else "one of " + ", ".join(str(allowed) for allowed in rule)
    if isinstance(rule, type):
        accepted = (int, float) if rule is float else rule
        right = isinstance(value, accepted) and (rule is bool or not isinstance(value, bool))
        return None if right else f"a value of type {rule.__name__}"
    return rule(value)


def injected_names(cells: Sequence[str]) -> list[str]:
    """Names set by the cells that papermill added, among the sources of the cells run so far."""
    bodies = [ast.parse(cell).body for cell in cells if cell.startswith(INJECTED)]
    targets = [target for body in bodies for line in body if isinstance(line, ast.Assign) for target in line.targets]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def check_parameters(namespace: Mapping[str, Any], *names: str, **rules: Rule) -> dict[str, Any]:
    """Check the parameters of a notebook before any work starts.

    Args:
        namespace: ``globals()`` in a notebook, where parameters injected by papermill are found too; or a plain
            dictionary of parameters, in which every key must be known.
        names: the shared parameters that this notebook has (keys of ``RULES``).
        rules: its other parameters, each with a tuple of allowed values, a type, or a function that returns None for a
            right value and a text of what is expected for a wrong one.

    Returns:
        The parameters, to be saved beside what they made.

    Raises:
        ValueError: in one line, on an unknown parameter (with those the notebook has) or a wrong value (with what is
            allowed).
    """
    undefined = [name for name in names if name not in RULES]
    if undefined:
        raise ValueError(
            f"names holds {undefined[0]!r}, expected any of {', '.join(RULES)}; declare others as name=rule"
        )
    known = {name: RULES[name] for name in names} | rules
    given = injected_names(namespace["In"]) if "In" in namespace else list(namespace)
    for name in given:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}, expected any of {', '.join(known)}")
    for name, rule in known.items():
        if name not in namespace:
            raise ValueError(f"parameter {name!r} is missing, expected it in the parameters cell")
        expected = _expected(rule, namespace[name])
        if expected:
            raise ValueError(f"{name}={namespace[name]!r}, expected {expected}")
    return {name: namespace[name] for name in known}


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """Of an option of argparse: a name that ends so, whose folder is made before the work that ends in the file."""

    def check(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes or path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r}, expected a name that ends in {' or '.join(suffixes)}")
        with retold(f"folder of {text!r} cannot be made", OSError, kind=argparse.ArgumentTypeError):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    return check


def output_folder(output_dir: str | Path) -> Path:
    """The folder for what a notebook writes, made if missing.

    With ``$CONTSP_OUTPUT_DIR`` set it lies below that folder instead (``../runs/04`` as ``runs/04``): tests execute the
    notebooks so, without touching the files of the repository.
    """
    folder = Path(output_dir)
    redirected = os.environ.get("CONTSP_OUTPUT_DIR")
    if redirected:
        folder = Path(redirected, *(part for part in folder.parts if part not in ("..", folder.anchor)))
    with retold(f"output_dir={str(output_dir)!r} cannot be made", OSError, kind=OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder
