"""Ten well-known crystals, none of which ``mp20`` was trained on, predicted from formulas and set beside experiment.

``python notebooks/gallery.py`` writes ``figures/06_gallery.csv`` and ``.png``, hits and misses alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
from parameters import FIGURES, output_file
from predictions import compare_with_known
from pymatgen.core import Lattice, Structure
from pymatgen.util.string import latexify

from contsp_core import load_model
from contsp_core.app.prediction import CALIBRATED, PredictConfig, Prediction, predict
from contsp_core.checkpoints import read_settings
from contsp_core.crystals import reduce_species
from contsp_core.csp.candidates import space_group, standardise
from contsp_core.csp.figures import draw_crystals, save_figure
from contsp_core.data import load_split, parse_formula

# Space group, lattice parameters (Å), and the place of each kind of atom, as measured at room temperature (textbook
# values). Chosen before any of them was predicted.
MEASURED = {
    "CaF2": ("Fm-3m", (5.463,), {"Ca": [(0, 0, 0)], "F": [(0.25, 0.25, 0.25)]}),
    "GaAs": ("F-43m", (5.653,), {"Ga": [(0, 0, 0)], "As": [(0.25, 0.25, 0.25)]}),
    "SnO2": ("P4_2/mnm", (4.737, 3.186), {"Sn": [(0, 0, 0)], "O": [(0.306, 0.306, 0)]}),
    "ZnO": ("P6_3mc", (3.250, 5.207), {"Zn": [(1 / 3, 2 / 3, 0)], "O": [(1 / 3, 2 / 3, 0.382)]}),
    "TaAs": ("I4_1md", (3.437, 11.646), {"Ta": [(0, 0, 0)], "As": [(0, 0, 0.417)]}),
    "CuFeS2": ("I-42d", (5.289, 10.423), {"Cu": [(0, 0, 0)], "Fe": [(0, 0, 0.5)], "S": [(0.2575, 0.25, 0.125)]}),
    "ThCr2Si2": ("I4/mmm", (4.043, 10.577), {"Th": [(0, 0, 0)], "Cr": [(0, 0.5, 0.25)], "Si": [(0, 0, 0.374)]}),
    "Bi2Te3": ("R-3m", (4.385, 30.48), {"Bi": [(0, 0, 0.4)], "Te": [(0, 0, 0), (0, 0, 0.212)]}),
    "YBa2Cu3O7": (
        "Pmmm",
        (3.820, 3.885, 11.683),
        {
            "Y": [(0.5, 0.5, 0.5)],
            "Ba": [(0.5, 0.5, 0.184)],
            "Cu": [(0, 0, 0), (0, 0, 0.355)],
            "O": [(0, 0.5, 0), (0.5, 0, 0.378), (0, 0.5, 0.378), (0, 0, 0.159)],
        },
    ),
    "LiFePO4": (
        "Pnma",
        (10.334, 6.010, 4.693),
        {
            "Li": [(0, 0, 0)],
            "Fe": [(0.282, 0.25, 0.975)],
            "P": [(0.095, 0.25, 0.418)],
            "O": [(0.097, 0.25, 0.743), (0.457, 0.25, 0.206), (0.166, 0.046, 0.285)],
        },
    ),
}

GIVEN_UNITS = {"LiFePO4": (4,)}  # in the cell, which is larger than any training crystal


def measured(formula: str) -> Structure:
    """The measured crystal in its conventional cell."""
    group, lengths, sites = MEASURED[formula]
    gamma = 120 if group in ("P6_3mc", "R-3m") else 90
    a, b, c = {1: lengths * 3, 2: (lengths[0], *lengths), 3: lengths}[len(lengths)]
    pairs = [(element, place) for element, places in sites.items() for place in places]
    return Structure.from_spacegroup(group, Lattice.from_parameters(a, b, c, 90, 90, gamma), *map(list, zip(*pairs)))


def check_unknown(dataset: str) -> None:
    """A ValueError if one of the formulas is in the training data."""
    known = {tuple(reduce_species(species).items()) for species in load_split(dataset, "train").species}
    taught = [formula for formula in MEASURED if tuple(reduce_species(parse_formula(formula)).items()) in known]
    if taught:
        raise ValueError(f"{', '.join(taught)} of the gallery are among the training crystals of {dataset}")


def row(formula: str, prediction: Prediction) -> dict[str, object]:
    """What was measured, what is predicted first, and the rank of the measured crystal (empty: not found).

    Found: a normalised rms displacement below 0.1. The volume compared is that of the one found, or of the first.
    """
    compared = compare_with_known(prediction.best, {formula: measured(formula)}).loc[formula]
    is_found = compared["rms"] < 0.1
    place = int(compared["rank"]) - 1 if is_found else 0
    volumes = [s.volume / len(s) for s in (prediction.best[place], measured(formula))]
    return {
        "measured": space_group(measured(formula)),
        "predicted": prediction.table["space group"].iloc[0],
        "rank": place + 1 if is_found else None,
        "rms": compared["rms"] if is_found else None,
        "times": prediction.table["found"].iloc[place] if is_found else None,
        "candidates": prediction.n_made,
        "volume": volumes[0] / volumes[1],
    }


def main(arguments: Sequence[str]) -> None:
    """Predict, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="mp20")
    parser.add_argument("--n-samples", type=int, default=20)
    parser.add_argument("--output", type=output_file(".csv"), default=FIGURES / "06_gallery.csv")
    options = parser.parse_args(arguments)
    check_unknown(read_settings(options.checkpoint)["dataset"])
    model, rows, pictures = load_model(options.checkpoint), {}, []
    config = PredictConfig(n_samples=options.n_samples, confidence=CALIBRATED.get(options.checkpoint))
    for formula in MEASURED:
        prediction = predict(model, formula, replace(config, n_units=GIVEN_UNITS.get(formula)))
        rows[formula] = row(formula, prediction)
        print(formula, rows[formula], file=sys.stderr)
        pictures += [standardise(prediction.best[0]), measured(formula)]
    table = (
        pd.DataFrame.from_dict(rows, orient="index").rename_axis("formula").astype({"rank": "Int64", "times": "Int64"})
    )
    table.to_csv(options.output, float_format="%.3f")
    ranks = ["first" if rank == 1 else f"number {rank}" if rank else "not found" for rank in table["rank"].fillna(0)]
    titles = [(f"{latexify(formula)}, first", f"measured: {rank}") for formula, rank in zip(MEASURED, ranks)]
    made_by = {"checkpoint": options.checkpoint, **vars(config), "n_units": GIVEN_UNITS}
    figure = draw_crystals(pictures, [title for pair in titles for title in pair], n_columns=4)
    save_figure(figure, options.output.with_suffix(".png"), made_by)
    print(table.round(3).to_string())


if __name__ == "__main__":
    main(sys.argv[1:])
