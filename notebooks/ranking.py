"""Which of the crystals found for a formula is right? Two energies at several levels, how many chains agree, and both.

``python notebooks/ranking.py --dataset mp20`` samples validation crystals, fits the confidence of ``app.prediction``
to half of them, tests it on the other half, and writes ``figures/04_confidence_mp20.csv`` and ``.png``. With
``--source templates_relaxed`` it ranks known crystals with their elements exchanged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from parameters import output_file
from pymatgen.core import Structure
from scipy.optimize import minimize

from contsp_core import Crystals, load_model
from contsp_core.app.prediction import confidence
from contsp_core.csp.candidates import N_DESCENT, SOURCES, descend, rank_distinct, with_energies
from contsp_core.csp.evaluation import EvaluationConfig, evaluate_checkpoint
from contsp_core.csp.figures import COLORS, new_figure, save_figure, styled
from contsp_core.csp.metrics import run_with_time_limit, score_pair
from contsp_core.energy import ContinuousCGCNN

LEVELS = (0.1, 0.15, 0.2, 0.3, 0.4)  # Å
LEVEL_NAMES = [f"{energy} {sigma} Å" for energy in ("E", "judge") for sigma in LEVELS]
REFERENCE_NAMES = [f"reference {name}" for name in LEVEL_NAMES]
BINS = np.array([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])


def rank_all(model: ContinuousCGCNN, references: list[Structure], samples: list[list[Structure]]) -> pd.DataFrame:
    """A row a crystal found: ``formula`` (its number), ``share`` of the candidates, energies, whether it is right.

    ``first`` is the place of the first of its candidates.
    """
    rows, known = [], dict(zip(REFERENCE_NAMES, at_levels(model, references)))
    for number, (reference, drawn) in enumerate(zip(references, samples, strict=True)):
        settled = with_energies(model.judge, descend(model, [s for s in drawn if s is not None], N_DESCENT))
        for place, structure in enumerate(settled):
            structure.properties["place"] = place
        groups = rank_distinct(settled) if settled else []
        if not groups:  # a formula without an answer
            rows.append(
                {"formula": number, "share": 1.0, "first": 0, "energy": 0.0, "right": False}
                | dict.fromkeys(LEVEL_NAMES, np.inf)
            )
            continue
        best = [group[0] for group in groups]
        scores = run_with_time_limit(score_pair, [(s, reference) for s in best], 1, progress=False)
        levels = dict(zip(LEVEL_NAMES, at_levels(model, best)))
        for place, (group, score) in enumerate(zip(groups, scores, strict=True)):
            right = score is not None and score.strict
            row = {"formula": number, "share": len(group) / len(settled), "energy": group[0].properties["energy"]}
            row |= {"first": min(structure.properties["place"] for structure in group)}
            rows.append(row | {name: values[place] for name, values in levels.items()} | {"right": right})
    table = pd.DataFrame(rows)
    return table.assign(**{name: np.array(values)[table["formula"]] for name, values in known.items()})


def at_levels(model: ContinuousCGCNN, structures: list[Structure]) -> list[list[float]]:
    """Their energies by the model and by its judge, at each of ``LEVELS``."""
    crystals, levels = Crystals.from_structures(structures), [torch.full((len(structures),), x) for x in LEVELS]
    with torch.no_grad():
        return [energy(crystals, level).tolist() for energy in (model, model.judge) for level in levels]


def wrong_below(table: pd.DataFrame) -> pd.Series:
    """Share of the formulas for which a wrong crystal, descended, lies below the right one as measured, by level."""
    wrong = table[~table["right"]]
    below = {
        name: (wrong[name] < wrong[reference]).groupby(wrong["formula"]).any().sum()
        for name, reference in zip(LEVEL_NAMES, REFERENCE_NAMES)
    }
    return pd.Series(below) / table["formula"].nunique()


def fit(table: pd.DataFrame) -> np.ndarray:
    """(a, b, c) of :func:`confidence` with the largest likelihood; a right crystal found twice counts as one."""
    columns = ["energy", "share", "right"]
    groups = [[part[name].to_numpy() for name in columns] for _, part in table.groupby("formula")]

    def loss(parameters: np.ndarray) -> float:
        total = 1e-3 * float(np.square(parameters).sum())
        for energy, share, right in groups:
            chances = confidence(energy, share, tuple(parameters))
            found = chances[right].sum() if right.any() else 1 - chances.sum()
            total -= np.log(max(found, 1e-9))
        return total

    return minimize(loss, np.array([1.0, 3.0, 0.0]), method="Nelder-Mead").x


def first_is_right(table: pd.DataFrame, score: pd.Series) -> float:
    """Share of all formulas where the crystal of the highest score is right."""
    best = score.groupby(table["formula"]).idxmax()
    return float(table.loc[best, "right"].mean())


def verdict(table: pd.DataFrame) -> pd.DataFrame:
    """What the judge adds to the energy that made the crystals, both at 0.15 Å: shares of the formulas."""
    own, judge = "E 0.15 Å", "judge 0.15 Å"
    scores = {"the first given": -table["first"], "the energy": -table[own], "its judge": -table[judge]}
    rows = {name: first_is_right(table, score) for name, score in scores.items()}
    rows["the best of all"] = first_is_right(table, table["right"].astype(float))
    below = wrong_below(table)
    below = pd.Series({"the energy": below[own], "its judge": below[judge]})
    return pd.DataFrame({"first is right": rows, "a wrong one lies below": below}).loc[list(rows)]


def compare(table: pd.DataFrame, parameters: tuple[float, ...]) -> pd.Series:
    """How often the first answer is right (strict), by what it is chosen."""
    parts = [part for _, part in table.groupby("formula")]
    chances = [confidence(part["energy"].to_numpy(), part["share"].to_numpy(), parameters) for part in parts]
    table = pd.concat(parts).assign(confidence=np.concatenate(chances))
    scores = {"energy": -table["energy"], "share of the chains": table["share"] - 1e-6 * table["energy"]}
    scores |= {name: -table[name] for name in LEVEL_NAMES} | {"first given": -table["first"]}
    scores |= {"confidence": table["confidence"], "any (ceiling)": table["right"].astype(float)}
    return pd.Series({name: first_is_right(table, score) for name, score in scores.items()})


@styled
def plot_reliability(chances: np.ndarray, right: np.ndarray, title: str) -> Figure:
    """Observed share of right crystals against the confidence, with binomial standard errors; below, how many."""
    figure, axes = new_figure(1, 1, size=(3.6, 3.2))
    ax, places = axes[0, 0], np.digitize(chances, BINS[1:-1])
    ax.plot([0, 1], [0, 1], color="0.6", lw=0.8)
    for place in np.unique(places):
        inside = places == place
        n, mean, rate = inside.sum(), chances[inside].mean(), right[inside].mean()
        ax.errorbar(mean, rate, np.sqrt(max(rate * (1 - rate), 0.25 / n) / n), fmt="o", color=COLORS[0])
        ax.annotate(str(n), (mean, rate), textcoords="offset points", xytext=(5, 4), fontsize=7)
    ax.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(-0.1, 1.1), title=title)
    return figure


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mp20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--source", default="chains", choices=SOURCES)
    parser.add_argument("--n-structures", type=int, default=150)
    parser.add_argument("--n-samples", type=int, default=20)
    parser.add_argument("--samples", type=Path, help="folder of the samples (default runs/ranking_<dataset>)")
    parser.add_argument(
        "--output", type=output_file(".csv"), help="a .csv (default figures/04_confidence_<dataset>.csv)"
    )
    options = parser.parse_args()
    name = options.dataset if options.source == "chains" else f"{options.dataset}_{options.source}"
    output = options.output or Path(__file__).parent.parent / "figures" / f"04_confidence_{name}.csv"
    settings = {"n_structures": options.n_structures, "n_samples": options.n_samples}
    settings = EvaluationConfig(options.source, "val", **settings)
    checkpoint = options.checkpoint or options.dataset
    folder = options.samples or Path(__file__).parent.parent / "runs" / f"ranking_{name}"
    found = evaluate_checkpoint(checkpoint, options.dataset, folder, settings)
    table = rank_all(load_model(checkpoint), found.references.structures, found.predictions)
    table.to_csv(output, index=False, float_format="%.5g")
    even = table["formula"] % 2 == 0
    report(table[even], table[~even], output, options)


def report(training: pd.DataFrame, testing: pd.DataFrame, output: Path, options: Any) -> None:
    """Print the fit on one half and what it is worth on the other; write the figure."""
    parameters = tuple(fit(training).round(3).tolist())
    sizes = [part["formula"].nunique() for part in (training, testing)]
    print(f"{sizes[0]} formulas to fit, {sizes[1]} to test; a, b, c = {parameters}")
    both = {"all": pd.concat([training, testing]), "to test": testing}
    rates = {f"first is right, {name}": compare(part, parameters) for name, part in both.items()}
    columns = pd.DataFrame(rates | {"a wrong one lies below, all": wrong_below(both["all"])})
    print((100 * columns).round(1).to_string(na_rep=""))
    parts = [part for _, part in testing.groupby("formula")]
    chances = [confidence(part["energy"].to_numpy(), part["share"].to_numpy(), parameters) for part in parts]
    first = np.array([chance.max() for chance in chances])
    right = np.array([part["right"].to_numpy()[chance.argmax()] for part, chance in zip(parts, chances)])
    print(
        f"first answers: confidence {first.mean():.3f} in the mean, right {right.mean():.3f}; "
        f"Brier score {np.square(first - right).mean():.3f}, of their mean alone {right.var():.3f}"
    )
    every = np.concatenate(chances), np.concatenate([part["right"].to_numpy() for part in parts])
    save_figure(
        plot_reliability(*every, options.dataset),
        output.with_suffix(".png"),
        {name: getattr(options, name) for name in ("dataset", "checkpoint", "n_structures", "n_samples")},
    )


if __name__ == "__main__":
    main()
