"""Scores of crystal structure prediction: match rate, RMSE, METRe, cRMSE, validity, ranking, with intervals.

All pairs of prediction and reference are compared (``matching``) in worker processes (``workers``), tabulated here, and
summarised (``statistics``).
"""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pymatgen.core import Structure

from contsp_core.matching import is_charge_neutral, is_valid_structure, same_space_group, score_pair
from contsp_core.statistics import bootstrap_interval, check_k_values, match_rate_curve, summarise
from contsp_core.templates import random_structures
from contsp_core.workers import run_with_time_limit

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "bootstrap_interval",
    "evaluate_csp",
    "is_charge_neutral",
    "is_valid_structure",
    "match_rate_curve",
    "random_structures",
    "run_with_time_limit",
    "score_pair",
    "summarise",
]


def evaluate_csp(
    references: Sequence[Structure],
    predictions: Sequence[Sequence[Structure | None]],
    *,
    material_ids: Sequence[str] | None = None,
    k_values: Sequence[int] | None = None,
    n_jobs: int = -1,
    time_limit_s: float = 10.0,
    seed: int = 0,
    ltol: float = 0.3,
    stol: float = 0.5,
    angle_tol: float = 10.0,
    metre: bool = True,
    progress: bool = True,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score predicted crystals against their references.

    A pair that exceeds the time limit is no match, and the sample then counts as invalid; ``n_timed_out`` counts them.

    Args:
        references: one crystal per entry.
        predictions: for each reference its predictions, in the order that "the first k" refers to; if all carry
            ``properties["energy"]`` (lower is better), they are also ranked by it. Their number may vary. None is a
            missing one: it keeps its place in the order, matches nothing and is not valid.
        material_ids: label of each row of the table, by default 0, 1, ….
        k_values: numbers of predictions to score at, by default 1 and the largest number given.
        n_jobs: worker processes (-1: all cores).
        time_limit_s: limit of one comparison, s.
        seed: of the bootstrap.
        ltol, stol, angle_tol: tolerances of ``StructureMatcher`` (fraction, fraction, degrees).
        metre: compare each reference with the predictions for all others of its composition too. The number of
            comparisons grows with the square of the number of such references.

    Returns:
        ``(summary, table)``: see :func:`summarise` for the summary. The table has a row per reference: formula,
        n_atoms, n_predictions, n_missing, rms_best, best_index (-1: no match), matched@k, same_space_group, n_invalid,
        n_timed_out, and lists with an entry per prediction: rms (NaN: no match), strict, structure_valid, valid,
        energy; pool_rms holds the rms of all predictions of the same composition, one list per reference of the pool.

    Raises:
        ValueError: if the inputs are empty, differ in length, or hold something else than structures.
    """
    references, predictions = list(references), [list(candidates) for candidates in predictions]
    _check_input(references, predictions, material_ids)
    k_values = check_k_values(k_values, max(map(len, predictions)))
    pairs = _pairs(references, predictions, metre)
    results = run_with_time_limit(
        partial(score_pair, ltol=ltol, stol=stol, angle_tol=angle_tol),
        [(predictions[owner][sample], references[row]) for row, owner, sample in pairs],
        n_jobs,
        time_limit_s,
        "matching",
        progress,
    )
    table = _tabulate(references, predictions, pairs, results, k_values)
    table.index = pd.Index(range(len(table)) if material_ids is None else material_ids, name="material_id")
    rows = [row for row, best in enumerate(table["best_index"]) if best >= 0]
    best_pairs = [(predictions[row][table["best_index"].iloc[row]], references[row]) for row in rows]
    agreement = run_with_time_limit(same_space_group, best_pairs, n_jobs, time_limit_s, "space groups", progress)
    table["same_space_group"] = np.nan
    table.iloc[rows, table.columns.get_loc("same_space_group")] = [float(bool(same)) for same in agreement]
    return summarise(table, k_values, stol=stol, seed=seed), table


def _check_input(references: list, predictions: list[list], material_ids: Sequence[str] | None) -> None:
    if not references:
        raise ValueError("references is empty, expected at least one structure")
    if len(predictions) != len(references):
        raise ValueError(f"predictions has {len(predictions)} lists, expected one per reference: {len(references)}")
    if not any(predictions):
        raise ValueError("predictions holds no structure, expected at least one")
    if material_ids is not None and len(material_ids) != len(references):
        raise ValueError(f"material_ids has {len(material_ids)} entries, expected one per reference: {len(references)}")
    given = (candidate for candidates in predictions for candidate in candidates if candidate is not None)
    for structure in (*references, *given):
        if not isinstance(structure, Structure):
            raise ValueError(f"found a {type(structure).__name__}, expected a pymatgen Structure")


def _pairs(references: list[Structure], predictions: list[list], metre: bool) -> list[tuple[int, int, int]]:
    """(reference, owner of the prediction, index of the prediction), own predictions first within a reference."""
    groups = defaultdict(list)
    for row, reference in enumerate(references):
        groups[reference.composition.reduced_formula].append(row)
    pairs = []
    for row, reference in enumerate(references):
        others = [other for other in groups[reference.composition.reduced_formula] if other != row] if metre else []
        pairs += [(row, owner, sample) for owner in (row, *others) for sample in range(len(predictions[owner]))]
    return pairs


def _tabulate(
    references: list[Structure], predictions: list[list[Structure]], pairs: list, results: list, k_values: list[int]
) -> pd.DataFrame:
    pools: list[dict[int, list]] = [defaultdict(list) for _ in references]
    for (row, owner, _), result in zip(pairs, results, strict=True):
        pools[row][owner].append(result)
    return pd.DataFrame(
        [
            _row(reference, candidates, pool[row], list(pool.values()), k_values)
            for row, (reference, candidates, pool) in enumerate(zip(references, predictions, pools, strict=True))
        ]
    )


def _row(
    reference: Structure, candidates: list[Structure], own: list, pool: list[list], k_values: list[int]
) -> dict[str, Any]:
    columns = np.array([(math.nan, False, False) if result is None else result for result in own]).reshape(-1, 3)
    rms, strict, structure_valid = columns[:, 0].tolist(), *columns[:, 1:].T.astype(bool).tolist()
    valid = [
        ok and is_charge_neutral(candidate.formula) for ok, candidate in zip(structure_valid, candidates, strict=True)
    ]
    formula = reference.composition.reduced_formula
    present = [candidate for candidate in candidates if candidate is not None]
    best = int(np.nanargmin(rms)) if np.isfinite(rms).any() else -1
    return {
        "formula": formula,
        "n_atoms": len(reference),
        "n_predictions": len(candidates),
        "n_missing": sum(candidate is None for candidate in candidates),
        "rms_best": rms[best] if best >= 0 else math.nan,
        "best_index": best,
        **{f"matched@{k}": bool(np.isfinite(rms[:k]).any()) for k in k_values},
        "n_invalid": len(valid) - sum(valid),
        "n_invalid_structure": len(valid) - sum(structure_valid),
        "n_wrong_composition": sum(candidate.composition.reduced_formula != formula for candidate in present),
        "n_timed_out": sum(result is None for results in pool for result in results),
        "rms": rms,
        "strict": strict,
        "structure_valid": structure_valid,
        "valid": valid,
        "energy": [math.nan if c is None else float(c.properties.get("energy", math.nan)) for c in candidates],
        "pool_rms": [[math.nan if result is None else result[0] for result in results] for results in pool],
    }
