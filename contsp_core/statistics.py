"""From a table of matches to scores: summary, bootstrap intervals, match rate against the number of predictions.

Every score is a mean over references, so one table (a row per reference) holds all that is needed to redo a summary.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

COUNTS = ("n_predictions", "n_missing", "n_timed_out", "n_invalid", "n_invalid_structure", "n_wrong_composition")
BLOCK = 100  # bootstrap resamples held in memory at once


def check_k_values(k_values: Sequence[int] | None, n_samples: int) -> list[int]:
    """Sorted numbers of predictions to score at; by default 1 and all."""
    chosen = sorted({1, n_samples} if k_values is None else set(k_values))
    if not chosen or chosen[0] < 1 or chosen[-1] > n_samples:
        raise ValueError(f"k_values is {k_values}, allowed are 1 … {n_samples} (the number of predictions)")
    return chosen


def summarise(
    table: pd.DataFrame, k_values: Sequence[int] | None = None, *, stol: float = 0.5, seed: int = 0
) -> dict[str, Any]:
    """Summary of a table of :func:`evaluate_csp` (or of several, concatenated).

    For each k, over the first k predictions, with N the number of references:

    - match_rate@k: share of references with a match; rmse@k: mean over these of the smallest rms displacement.
    - crmse@k: the same mean over all references, unmatched ones counting as ``stol``.
    - …_structure_valid@k, …_valid@k: match rate and RMSE if predictions that fail :func:`is_valid_structure` (without
      and with charge neutrality) are dropped; N stays. The latter follows DiffCSP, which at k = 1, but not at k = 20,
      also asks for a valid reference; references are not tested here.
    - match_rate_strict@k: match rate at ltol, stol, angle_tol = 0.2, 0.3, 5.
    - metre@k, metre_crmse@k: a reference is matched if *any* of the first k predictions made for *any* reference of
      its composition matches it, so that the order among polymorphs does not matter. NaN if it was not compared.
    - match_rate_ranked@k, rmse_ranked@k: among the k predictions of lowest energy; at k = 1 also named
      …_lowest_energy; match_rate_random@k: expected for k predictions in random order. NaN without energies.

    Further: match_rate and rmse (at the largest k); space_group_agreement: share of matched references whose best
    prediction has their space group (spglib, symprec 0.1 Å); n_references, n_samples (largest number of predictions),
    n_predictions, n_missing, n_timed_out (comparisons), n_invalid, n_invalid_structure, n_wrong_composition. Each mean
    has a 95 % bootstrap interval over references, named …_interval.

    Raises:
        ValueError: if the table is empty or k_values exceeds the number of predictions.

    Source: Jiao et al., NeurIPS 2023 (match rate, RMSE); Martirossyan et al., arXiv 2509.12178 (METRe, cRMSE).
    """
    if not len(table):
        raise ValueError("table is empty, expected at least one row")
    n_samples = int(table["n_predictions"].max())
    values: dict[str, np.ndarray] = {}
    for k in check_k_values(k_values, n_samples):
        values |= {f"{name}@{k}": per_reference for name, per_reference in _values_at(table, k, stol).items()}
        for name in ("match_rate", "rmse"):
            values[name] = values[f"{name}@{k}"]
            if k == 1:
                values[f"{name}_lowest_energy"] = values[f"{name}_ranked@1"]
    values["space_group_agreement"] = table["same_space_group"].to_numpy(float)
    summary: dict[str, Any] = {"n_references": len(table), "n_samples": n_samples}
    for name in COUNTS:
        summary[name] = int(table[name].sum())
    intervals = _bootstrap(np.column_stack(list(values.values())), seed, 1000, 0.95)
    for (name, per_reference), interval in zip(values.items(), intervals, strict=True):
        summary[name] = float(np.nanmean(per_reference)) if np.isfinite(per_reference).any() else math.nan
        summary[f"{name}_interval"] = interval
    return summary


def _values_at(table: pd.DataFrame, k: int, stol: float) -> dict[str, np.ndarray]:
    """Per reference, the numbers whose means are the scores at k; NaN where a reference does not count."""
    rms, energy = _matrix(table["rms"]), _matrix(table["energy"])
    order = np.argsort(energy, axis=1, kind="stable")  # NaN, a missing prediction, goes last
    n_energies = np.isfinite(energy).sum(1)
    has_energy = bool((n_energies == table["n_predictions"] - table["n_missing"]).all())
    ranked = np.take_along_axis(rms, order, 1) if has_energy else np.full_like(rms, math.nan)
    best = {
        "": _smallest(rms[:, :k]),
        "_structure_valid": _smallest(np.where(_matrix(table["structure_valid"]) == 1, rms, math.nan)[:, :k]),
        "_valid": _smallest(np.where(_matrix(table["valid"]) == 1, rms, math.nan)[:, :k]),
        "_ranked": _smallest(ranked[:, :k]),
    }
    values = {f"match_rate{name}": np.isfinite(smallest).astype(float) for name, smallest in best.items()}
    values |= {f"rmse{name}": smallest for name, smallest in best.items()}
    if not has_energy:
        values["match_rate_ranked"] = np.full(len(table), math.nan)
    values["match_rate_random"] = _random_order(rms, table["n_predictions"].to_numpy(), k)[0]
    values["match_rate_strict"] = (_matrix(table["strict"])[:, :k] == 1).any(1).astype(float)
    values["crmse"] = np.where(np.isfinite(best[""]), best[""], stol)
    pool = np.array([_smallest(_matrix(lists)[:, :k].reshape(1, -1))[0] for lists in table["pool_rms"]])
    compared = table.groupby("formula")["formula"].transform("size").to_numpy() == [len(x) for x in table["pool_rms"]]
    values["metre"] = np.where(compared.all(), np.isfinite(pool), math.nan)
    values["metre_crmse"] = np.where(compared.all(), np.where(np.isfinite(pool), pool, stol), math.nan)
    return values


def _matrix(lists: Sequence[Sequence[float]]) -> np.ndarray:
    """Lists of any length as rows of one array, NaN at the end."""
    matrix = np.full((len(lists), max(1, *map(len, lists))), math.nan)
    for row, values in zip(matrix, lists, strict=True):
        row[: len(values)] = values
    return matrix


def _smallest(rms: np.ndarray) -> np.ndarray:
    """Smallest number of each row, NaN if there is none."""
    smallest = np.where(np.isnan(rms), math.inf, rms).min(axis=1)
    return np.where(np.isinf(smallest), math.nan, smallest)


def bootstrap_interval(
    values: np.ndarray, seed: int | np.random.Generator = 0, n_resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of those values that are not NaN.

    It has no width if all values agree (a rate of 0 or 1), which says nothing about the uncertainty.

    Args:
        values: one number per reference; references are resampled, NaN among them.
        seed: of the resampling; the same seed resamples the same references.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), Chapter 13.
    """
    return _bootstrap(np.asarray(values, dtype=float)[:, None], seed, n_resamples, level)[0]


def _bootstrap(
    columns: np.ndarray, seed: int | np.random.Generator, n_resamples: int, level: float
) -> list[tuple[float, float]]:
    """The same for each column; all see the same resampled references."""
    rng, n_references = np.random.default_rng(seed), len(columns)
    numbers = np.hstack([np.nan_to_num(columns), np.isfinite(columns)])
    chances, totals = np.full(n_references, 1 / n_references), []
    for size in np.diff(np.r_[0:n_resamples:BLOCK, n_resamples]):
        totals.append(rng.multinomial(n_references, chances, size=size).astype(float) @ numbers)  # times each is drawn
    sums, counted = np.hsplit(np.concatenate(totals), 2)
    tails, intervals = [(1 - level) / 2, (1 + level) / 2], []
    for total, n in zip(sums.T, counted.T, strict=True):
        low, high = np.quantile(total[n > 0] / n[n > 0], tails) if n.any() else (math.nan, math.nan)
        intervals.append((float(low), float(high)))
    return intervals


def match_rate_curve(table: pd.DataFrame, order: str = "random", seed: int = 0) -> pd.DataFrame:
    """Match rate and RMSE against the number of predictions k.

    In random order this is the exact mean over all subsets of size k: of n predictions of which m match, a subset
    holds a match with probability 1 − C(n−m, k) / C(n, k), and the i-th best match is the best one of the subset with
    probability C(n−i, k−1) / C(n, k). RMSE is the mean over references weighted by the former probability.
    A reference with n < k predictions counts with all it has.

    Args:
        table: from :func:`evaluate_csp`.
        order: "random", "given" (the order of the predictions), or "energy" (lowest first).
        seed: of the bootstrap.

    Returns:
        columns k, match_rate, rmse, and low and high: the 95 % bootstrap interval of the match rate.

    Raises:
        ValueError: on an unknown order, or if predictions without energy are to be ordered by it.
    """
    if order not in ("random", "given", "energy"):
        raise ValueError(f"order is {order!r}, allowed are 'random', 'given', 'energy'")
    rms, energy, n_predictions = _matrix(table["rms"]), _matrix(table["energy"]), table["n_predictions"].to_numpy()
    if order == "energy":
        if (np.isfinite(energy).sum(1) != n_predictions - table["n_missing"]).any():
            raise ValueError("order is 'energy', but some predictions have no energy; allowed are 'random', 'given'")
        rms = np.take_along_axis(rms, np.argsort(energy, axis=1, kind="stable"), 1)
    rows, shares = [], []
    for k in range(1, int(n_predictions.max()) + 1):
        if order == "random":
            matched, expected = _random_order(rms, n_predictions, k)
        else:
            matched, expected = np.isfinite(_smallest(rms[:, :k])), np.nan_to_num(_smallest(rms[:, :k]))
        shares.append(matched)
        rows.append((k, matched.mean(), expected.sum() / matched.sum() if matched.any() else math.nan))
    curve = pd.DataFrame(rows, columns=["k", "match_rate", "rmse"])
    curve[["low", "high"]] = _bootstrap(np.column_stack(shares).astype(float), seed, 1000, 0.95)
    return curve


def _random_order(rms: np.ndarray, n_predictions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Per reference: probability that k of its predictions hold a match, and expected (best rms) · [there is one]."""
    matched, expected = np.zeros(len(rms)), np.zeros(len(rms))
    for row, n in enumerate(n_predictions):
        size = min(k, int(n))
        matches = np.sort(rms[row][np.isfinite(rms[row])])
        is_best = [math.comb(n - i, size - 1) / math.comb(n, size) for i in range(1, len(matches) + 1)] if size else []
        matched[row], expected[row] = sum(is_best), np.dot(is_best, matches) if len(matches) else 0.0
    return matched, expected


def pool_candidates(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of :func:`evaluate_csp` for the same references joined: the candidates of the first one come first."""
    pooled = tables[0].copy()
    for name in ("rms", "energy"):
        pooled[name] = [list(chain(*lists)) for lists in zip(*(table[name] for table in tables), strict=True)]
    return pooled


def ranking_table(table: pd.DataFrame, n_values: Sequence[int], seed: int = 0) -> pd.DataFrame:
    """One answer per composition, chosen among n candidates: does the energy choose better than chance?

    Args:
        table: from :func:`evaluate_csp`, or pooled.
        n_values: numbers n of candidates to choose from: the first n in the order given.
        seed: of the bootstrap.

    Returns:
        A row for each n, with the match rates of the candidate given first, of a random one of the n, of the one of
        lowest energy (with its 95 % interval, low and high), and of the best of the n.

    Raises:
        ValueError: if a candidate that matches has no energy.
    """
    rms, energy, rows = _matrix(table["rms"]), _matrix(table["energy"]), []
    if (np.isfinite(rms) & np.isnan(energy)).any():
        raise ValueError("table holds candidates without energy, expected one for each")
    for n in n_values:
        matched, chosen = np.isfinite(rms[:, :n]), np.nan_to_num(energy[:, :n], nan=math.inf).argmin(1)
        present = np.isfinite(energy[:, :n]).sum(1).clip(min=1)
        lowest = matched[np.arange(len(matched)), chosen]
        low, high = bootstrap_interval(lowest, seed)
        rows.append((n, matched[:, 0].mean(), (matched.sum(1) / present).mean(), lowest.mean(), low, high))
        rows[-1] += (matched.any(1).mean(),)
    return pd.DataFrame(rows, columns=["n", "first", "random", "lowest_energy", "low", "high", "best_of_n"])
