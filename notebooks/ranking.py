"""Which of the crystals found for a formula is right? Two energies at several levels, how many chains agree, and both.

``python notebooks/ranking.py --dataset mp20`` samples validation crystals, fits the confidence of ``app.prediction``
to half of them, tests it on the other half, and writes ``figures/04_confidence_mp20.csv`` and ``.png``. With
``--source templates_relaxed`` it ranks known crystals with their elements exchanged. Cells have the right number of
formula units, or with ``--choose-units`` those that ``contsp predict`` would try.
"""

from __future__ import annotations

import argparse
import itertools
from collections import deque
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from matplotlib.figure import Figure
from parameters import FIGURES, output_file
from pymatgen.core import Structure
from scipy.optimize import minimize
from tqdm import tqdm

from contsp_core import Crystals, load_model
from contsp_core.app.files import identify
from contsp_core.app.prediction import CALIBRATED, PredictConfig, confidence, plan
from contsp_core.csp.candidates import N_DESCENT, SOURCES, descend, rank_distinct, with_energies
from contsp_core.csp.evaluation import EvaluationConfig, compare_settings, evaluate_checkpoint, write_text
from contsp_core.csp.figures import COLORS, new_figure, save_figure, styled
from contsp_core.csp.metrics import run_with_time_limit, score_pair
from contsp_core.data import choose, load_split
from contsp_core.energy import ContinuousCGCNN, portable
from contsp_core.sampler import sample_structures

LEVELS = (0.1, 0.15, 0.2, 0.3, 0.4)  # Å
LEVEL_NAMES = [f"{energy} {sigma} Å" for energy in ("E", "judge") for sigma in LEVELS]
REFERENCE_NAMES = [f"reference {name}" for name in LEVEL_NAMES]
BINS = np.array([0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
Found = tuple[list[list[Structure]], int]  # the crystals of one formula, and of how many candidates


def settle(model: ContinuousCGCNN, drawn: list[Structure]) -> Found:
    """What samples of one formula end in; each knows its place among them."""
    settled = with_energies(model.judge, descend(model, [s for s in drawn if s is not None], N_DESCENT))
    for place, structure in enumerate(settled):
        structure.properties["place"] = place
    return rank_distinct(settled) if settled else [], len(settled)


def rank(model: ContinuousCGCNN, reference: Structure, groups: list[list[Structure]], n_made: int) -> pd.DataFrame:
    """A row a crystal found: ``share`` of the candidates, ``energy``, whether it is ``right``, energies by level.

    ``first`` is the place of the first of its candidates.
    """
    known = dict(zip(REFERENCE_NAMES, (level[0] for level in at_levels(model, [reference]))))
    if not groups:  # a formula without an answer
        none = {"share": 1.0, "first": 0, "energy": 0.0, "right": False}
        return pd.DataFrame([none | dict.fromkeys(LEVEL_NAMES, np.inf) | known])
    best, shares = [group[0] for group in groups], [len(group) / n_made for group in groups]
    scores = run_with_time_limit(score_pair, [(s, reference) for s in best], 1, progress=False)
    table = pd.DataFrame({"share": shares, "energy": [s.properties["energy"] for s in best]})
    table["first"] = [min(structure.properties["place"] for structure in group) for group in groups]
    table["right"] = [score is not None and score.strict for score in scores]
    return table.assign(**dict(zip(LEVEL_NAMES, at_levels(model, best))), **known)


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


def chances(table: pd.DataFrame, parameters: tuple[float, ...]) -> pd.Series:
    """The confidence of every crystal of a table."""
    parts = [part for _, part in table.groupby("formula")]
    return pd.concat([confidence(part["energy"], part["share"], parameters) for part in parts])


def compare(table: pd.DataFrame, parameters: tuple[float, ...]) -> pd.Series:
    """How often the first answer is right (strict), by what it is chosen."""
    scores = {"energy": -table["energy"], "share of the chains": table["share"] - 1e-6 * table["energy"]}
    scores |= {name: -table[name] for name in LEVEL_NAMES} | {"first given": -table["first"]}
    scores |= {"confidence": chances(table, parameters), "any (ceiling)": table["right"].astype(float)}
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


def sample_all(options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """The rows of :func:`rank` of all formulas, numbered in ``formula``, from samples in cells of the right size."""
    settings = EvaluationConfig(options.source, "val", options.n_structures, options.n_samples)
    found = evaluate_checkpoint(options.checkpoint, options.dataset, folder, settings)
    model, pairs = load_model(options.checkpoint), zip(found.references.structures, found.predictions, strict=True)
    return numbered(rank(model, reference, *settle(model, drawn)) for reference, drawn in pairs)


def predict_all(options: argparse.Namespace, folder: Path) -> pd.DataFrame:
    """The same as ``contsp predict`` finds them; what is in the folder already is not made again."""
    model, split = load_model(options.checkpoint), load_split(options.dataset, "val")
    settings = {"dataset": options.dataset, "data": split.source.blob_id, "n_structures": options.n_structures}
    compare_settings(folder, identify(options.checkpoint) | settings | {"n_samples": options.n_samples})
    chosen = split.select(choose(range(len(split)), options.n_structures))
    paths = [folder / f"{number:05}.csv" for number in range(len(chosen))]
    missing = [pair for pair in zip(paths, chosen.structures, strict=True) if not pair[0].is_file()]
    missing.sort(key=lambda pair: -len(pair[1]))  # the slowest first
    work = delayed(partial(predict_one, portable(model), options.n_samples))
    made = Parallel(-1, return_as="generator_unordered")(work(*pair) for pair in missing)
    deque(tqdm(made, "formulas", len(missing)), maxlen=0)
    return numbered(map(pd.read_csv, paths))


def predict_one(model: ContinuousCGCNN, n_samples: int, path: Path, reference: Structure) -> None:
    """Write the rows of one formula, in cells of the sizes that :func:`plan` chooses."""
    torch.set_num_threads(1)
    species, _ = plan(model, reference.composition.reduced_formula, PredictConfig())
    drawn = list(itertools.chain.from_iterable(sample_structures(model, species, n_samples)))
    write_text(path, rank(model, reference, *settle(model, drawn)).to_csv(index=False))


def numbered(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """One table, with the number of the formula in its first column."""
    return pd.concat(dict(enumerate(tables)), names=["formula", None]).reset_index("formula").reset_index(drop=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mp20")
    parser.add_argument("--checkpoint", help="default: that of the data set's name")
    parser.add_argument("--source", default="chains", choices=SOURCES)
    parser.add_argument("--choose-units", action="store_true", help="cells of the sizes that contsp predict would try")
    parser.add_argument("--n-structures", type=int, default=150)
    parser.add_argument("--n-samples", type=int, default=20)
    parser.add_argument("--samples", type=Path, help="folder of the samples (default runs/ranking_<dataset>)")
    parser.add_argument(
        "--output", type=output_file(".csv"), help="a .csv (default figures/04_confidence_<dataset>.csv)"
    )
    options = parser.parse_args()
    options.checkpoint = options.checkpoint or options.dataset
    name = options.dataset if options.source == "chains" else f"{options.dataset}_{options.source}"
    name += "_predicted" if options.choose_units else ""
    output = options.output or FIGURES / f"04_confidence_{name}.csv"
    if options.choose_units and options.source != "chains":
        parser.error("--choose-units is for --source chains")
    folder = options.samples or Path(__file__).parent.parent / "runs" / f"ranking_{name}"
    table = (predict_all if options.choose_units else sample_all)(options, folder)
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
    for name, given in {"of contsp predict": CALIBRATED.get(options.checkpoint), "fitted here": parameters}.items():
        if given is not None:
            testing = testing.assign(confidence=chances(testing, given))
            best = testing.loc[testing.groupby("formula")["confidence"].idxmax()]
            first, right = best["confidence"], best["right"].astype(float)
            print(
                f"first answers, a, b, c {name}: confidence {first.mean():.3f} in the mean, right {right.mean():.3f}; "
                f"Brier score {np.square(first - right).mean():.3f}, of their mean alone {right.var(ddof=0):.3f}"
            )
    save_figure(
        plot_reliability(testing["confidence"].to_numpy(), testing["right"].to_numpy(), options.dataset),
        output.with_suffix(".png"),
        {name: getattr(options, name) for name in ("dataset", "checkpoint", "n_structures", "n_samples")},
    )


if __name__ == "__main__":
    main()
