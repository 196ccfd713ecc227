"""Where are crystals found: among formulas like those of the training crystals, or beyond?

``python notebooks/covered.py FOLDER…`` reads evaluations, made by ``contsp evaluate``. It prints how often their
samples match the crystals that ``mp20`` covers (elements, stoichiometry and number of atoms are those of training
crystals), and how often the others.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from contsp_core import load_model
from contsp_core.app.prediction import DEFAULTS, PredictConfig, plan
from contsp_core.crystals import reduce_species
from contsp_core.csp.evaluation import TABLE
from contsp_core.data import parse_formula, retold
from contsp_core.energy import ContinuousCGCNN


def is_covered(model: ContinuousCGCNN, formula: str, n_atoms: int) -> bool:
    """Whether the training crystals of a model raise no doubts about a formula in cells of so many atoms."""
    n_units = n_atoms // sum(reduce_species(parse_formula(formula)).values())
    return not plan(model, formula, PredictConfig(n_units=(n_units,)))[1]


def rates(table: pd.DataFrame) -> dict[str, float]:
    """Match rates (%) of one sample, and of any, in a table of :func:`contsp_core.csp.metrics.evaluate_csp`."""
    loose = np.array([[rms is not None for rms in json.loads(row)] for row in table["rms"]])
    strict = np.array([json.loads(row) for row in table["strict"]])
    found = {"sample": loose.mean(), "strict sample": strict.mean()}
    found |= {"any": loose.any(axis=1).mean(), "strict any": strict.any(axis=1).mean()}
    return {"crystals": len(table), "samples": loose.shape[1]} | {name: 100 * rate for name, rate in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="made by contsp evaluate")
    parser.add_argument(
        "--checkpoint", default=DEFAULTS[0], help=f"whose training crystals count (default {DEFAULTS[0]})"
    )
    options = parser.parse_args(arguments)
    model, rows = load_model(options.checkpoint), []
    for folder in options.folders:
        with retold(f"folder {str(folder)!r} holds no evaluation", OSError, ValueError):
            table = pd.read_csv(folder / TABLE)
        known = np.array([is_covered(model, *row) for row in zip(table["formula"], table["n_atoms"], strict=True)])
        for label, part in {"covered": table[known], "beyond": table[~known]}.items():
            rows += [{"evaluation": folder.name, "formulas": label} | rates(part)] if len(part) else []
    print(pd.DataFrame(rows).round(1).to_string(index=False))


if __name__ == "__main__":
    main()
