"""What the prediction notebook adds: candidates beside known crystals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from pymatgen.core import Structure

from contsp_core.crystals import reduce_species
from contsp_core.csp.candidates import space_group
from contsp_core.csp.metrics import run_with_time_limit, score_pair
from contsp_core.data import SPLITS, load_split, parse_formula


def known_crystals(dataset: str, formula: str) -> dict[str, Structure]:
    """Crystals of a data set with this composition, in any of its splits, by ``"material_id (split)"``."""
    composition = reduce_species(parse_formula(formula))
    known = {}
    for part in SPLITS:
        split = load_split(dataset, part)
        rows = [row for row, numbers in enumerate(split.species) if reduce_species(numbers) == composition]
        known |= {f"{split.material_ids[row]} ({part})": split[row] for row in rows}
    return known


def compare_with_known(structures: Sequence[Structure], known: Mapping[str, Structure]) -> pd.DataFrame:
    """Which candidate is closest to each known crystal, at the tolerances of the field's benchmarks (0.3, 0.5, 10°).

    Args:
        structures: candidates, best first.
        known: crystals by name.

    Returns:
        One row for each known crystal: ``space group``; ``rank`` (from 1) of the matching candidate with the smallest
        normalised RMS displacement ``rms`` (unitless); both missing if none matches.
    """
    rows = {}
    for name, reference in known.items():
        scores = run_with_time_limit(score_pair, [(s, reference) for s in structures], 1, 10.0, progress=False)
        rms = pd.Series([math.nan if score is None else score.rms for score in scores], range(1, len(scores) + 1))
        rank = None if rms.isna().all() else rms.idxmin()
        rows[name] = {"space group": space_group(reference), "rank": rank, "rms": rms.min()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["space group", "rank", "rms"])
    return table.astype({"rank": "Int64", "rms": float}).rename_axis("known crystal")
