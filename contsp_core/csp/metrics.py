"""Scores of crystal structure prediction: match rate, RMSE, METRe, cRMSE, validity, ranking, with intervals.

All pairs of prediction and reference are compared (``matching``) in worker processes (``workers``), tabulated here, and
summarised (``statistics``).
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections import defaultdict, deque
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from joblib import effective_n_jobs
from pymatgen.core import Composition, Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from tqdm.auto import tqdm


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


START_LIMIT_S = 120.0  # a worker that has not said hello by then never will


def _serve(connection: Any, function: Callable, tasks: Sequence[tuple]) -> None:
    """Life of a worker: receive task numbers, send (number, result) one by one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    warnings.simplefilter("ignore")
    parent = os.getppid()
    connection.send("ready")
    while True:
        while not connection.poll(5.0):
            if os.getppid() != parent:  # the parent was killed: do not wait for ever
                return
        try:
            for number in connection.recv():
                try:
                    result = function(*tasks[number])
                except Exception as error:  # raised again in the parent
                    result = error
                connection.send((number, result))
        except (EOFError, OSError):
            return


class _Worker:
    """One process and the numbers of its unanswered tasks; the first of them is in progress since ``since``."""

    def __init__(self, function: Callable, tasks: Sequence[tuple]) -> None:
        # fork starts in milliseconds and needs no importable __main__; elsewhere than on Linux it is not safe
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.connection, child = context.Pipe()
        self.process = context.Process(target=_serve, args=(child, function, tasks), daemon=True)
        self.process.start()
        child.close()  # so that the death of the worker is seen as the end of the stream
        self.pending: deque[int] = deque()
        self.ready = False

    def give(self, numbers: Sequence[int]) -> None:
        if not self.ready and not self.connection.poll(START_LIMIT_S):
            raise RuntimeError(f"a worker process did not start within {START_LIMIT_S} s")
        with suppress(OSError, EOFError):  # a dead worker is noticed when its answer is read
            self.ready = self.ready or bool(self.connection.recv())
            self.connection.send(list(numbers))
        self.pending.extend(numbers)
        self.since = time.monotonic()

    def answers(self) -> list[tuple[int, Any]]:
        """All answers that have arrived; raises EOFError or OSError if the worker is dead and has none left."""
        received = [self.connection.recv()]
        with suppress(EOFError, OSError):
            while self.connection.poll():
                received.append(self.connection.recv())
        for _ in received:
            self.pending.popleft()
        self.since = time.monotonic()
        return received

    def kill(self) -> None:
        self.process.kill()  # SIGKILL: also ends a loop in compiled code, which no Python signal handler can
        self.process.join()
        self.connection.close()


def run_with_time_limit(
    function: Callable,
    tasks: Sequence[tuple],
    n_jobs: int = -1,
    time_limit_s: float = 10.0,
    description: str = "",
    progress: bool = True,
) -> list[Any]:
    """``function(*task)`` for every task, in worker processes, each call under a hard time limit.

    A worker that exceeds the limit, or dies, is replaced; its other tasks go back to the queue.

    Args:
        n_jobs: number of processes, as in joblib (-1: all cores).
        time_limit_s: wall-clock limit of one call, s.
        description: label of the progress bar on standard error; ``progress=False`` hides it.

    Returns:
        one result per task, in order; None where the worker was killed or died (so ``function`` must not return None).

    Raises:
        ValueError: if the limit is not positive.
        Exception: the first one raised by ``function``.
    """
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s is {time_limit_s}, expected a positive number of seconds")
    results: list[Any] = [None] * len(tasks)
    queue = deque(range(len(tasks)))
    n_workers = max(1, min(effective_n_jobs(n_jobs), len(tasks)))
    batch_size = max(1, min(32, len(tasks) // (4 * n_workers)))
    workers = [_Worker(function, tasks) for _ in range(n_workers)]
    try:
        with tqdm(total=len(tasks), desc=description, disable=not progress) as bar:
            while queue or any(worker.pending for worker in workers):
                _hand_out(queue, workers, batch_size)
                busy = [worker for worker in workers if worker.pending]
                first_deadline = min(worker.since for worker in busy) + time_limit_s
                arrived = wait([worker.connection for worker in busy], max(0.0, first_deadline - time.monotonic()))
                for worker in busy:
                    answers = _collect(worker, worker.connection in arrived, time_limit_s)
                    if answers is None:  # replace the worker: its first task is lost, the others wait for another one
                        worker.kill()
                        queue.extendleft(reversed(list(worker.pending)[1:]))
                        workers[workers.index(worker)] = _Worker(function, tasks)
                    for number, result in answers or []:
                        if isinstance(result, Exception):
                            raise result
                        results[number] = result
                    bar.update(1 if answers is None else len(answers))
    finally:
        for worker in workers:
            worker.kill()
    return results


def _hand_out(queue: deque[int], workers: Sequence[_Worker], batch_size: int) -> None:
    for worker in workers:
        if queue and not worker.pending:
            worker.give([queue.popleft() for _ in range(min(batch_size, len(queue)))])


def _collect(worker: _Worker, has_arrived: bool, time_limit_s: float) -> list[tuple[int, Any]] | None:
    """Answers of a worker, or None if it is dead or out of time."""
    if not has_arrived:
        return None if time.monotonic() - worker.since > time_limit_s else []
    try:
        return worker.answers()
    except (EOFError, OSError):
        return None


MIN_DISTANCE = 0.5  # Å, CDVAE
MIN_VOLUME = 0.1  # Å³, CDVAE
STRICT = {"ltol": 0.2, "stol": 0.3, "angle_tol": 5.0}  # pymatgen's defaults
SYMPREC = 0.1  # Å


@cache
def is_charge_neutral(formula: str) -> bool:
    """Whether a composition can be charge neutral, by the rule of CDVAE.

    Single elements and compounds of metals only are valid. Otherwise every element takes one of its known oxidation
    states (``Element.oxidation_states`` of pymatgen, zero excluded; the shorter list of *common* states would reject
    two thirds of Perov-5): some choice must sum to zero with every cation less electronegative than every anion.
    CDVAE reads the states from the smact package, whose list differs: the two verdicts agree for 99 % of the
    compositions of the Perov-5 test set and for 97 % of MP-20's and MPTS-52's.

    Args:
        formula: anything that ``Composition`` parses.

    Source: Xie et al., ICLR 2022 (CDVAE), evaluation metrics; Davies et al., Chem 1, 617 (2016) (SMACT).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each noble gas, which has no electronegativity
        counts = {el: round(n) for el, n in Composition(formula).element_composition.reduced_composition.items()}
        electronegativity = {el: math.inf if math.isnan(el.X) else el.X for el in counts}
    elements = sorted(counts, key=electronegativity.get)
    if len(elements) == 1 or all(element.is_metal for element in elements):
        return True
    for n_cations in range(1, len(elements)):
        cation, anion = elements[n_cations - 1 : n_cations + 1]
        totals = {0} if electronegativity[cation] < electronegativity[anion] else set()
        for rank, element in enumerate(elements):
            states = [state for state in element.oxidation_states if (state > 0) == (rank < n_cations) and state]
            totals = {total + counts[element] * state for total in totals for state in states}
        if 0 in totals:
            return True
    return False


def _has_volume(structure: Structure) -> bool:
    return bool(np.isfinite(structure.frac_coords).all() and structure.volume >= MIN_VOLUME)  # a NaN volume fails


def is_valid_structure(structure: Structure, charge_neutrality: bool = True) -> bool:
    """Validity as in CDVAE and DiffCSP.

    Coordinates are finite, the volume is at least 0.1 Å³, the shortest distance between two sites (nearest images; a
    site and its own images are not compared) exceeds 0.5 Å, and, unless ``charge_neutrality`` is False, the
    composition passes :func:`is_charge_neutral`. DiffCSP also calls a crystal invalid for which no CrystalNN
    fingerprint can be computed; that is left out here.
    """
    if not _has_volume(structure):
        return False
    distances = structure.distance_matrix[np.triu_indices(len(structure), 1)]
    return bool((distances > MIN_DISTANCE).all()) and (not charge_neutrality or is_charge_neutral(structure.formula))


def score_pair(
    prediction: Structure | None, reference: Structure, ltol: float = 0.3, stol: float = 0.5, angle_tol: float = 10.0
) -> tuple[float, bool, bool]:
    """Compare one prediction with one reference.

    Both cells are LLL-reduced first: the same solids, but pymatgen's Niggli reduction then takes milliseconds where
    it takes seconds for a skewed cell. A missing prediction, a different composition or a volume below 0.1 Å³ is no
    match, and an error inside the matcher is none either.

    Returns:
        normalised RMS displacement (NaN: no match), whether they match at the strict tolerances 0.2 / 0.3 / 5, and
        whether the prediction is valid but for its charge.
    """
    nothing = (math.nan, False, False)
    if prediction is None or not _has_volume(prediction):
        return nothing
    try:
        first, second = (structure.get_reduced_structure("LLL") for structure in (prediction, reference))
        valid = is_valid_structure(first, charge_neutrality=False)
        if prediction.composition.reduced_formula != reference.composition.reduced_formula:
            return math.nan, False, valid
        match = StructureMatcher(ltol=ltol, stol=stol, angle_tol=angle_tol).get_rms_dist(first, second)
        strict = match is not None and StructureMatcher(**STRICT).get_rms_dist(first, second) is not None
        return (math.nan if match is None else float(match[0])), strict, valid
    except Exception:  # a distorted cell makes spglib, numpy and pymatgen fail in many ways
        return nothing


def same_space_group(prediction: Structure, reference: Structure) -> bool:
    """Whether spglib finds the same space group for both, at a tolerance of 0.1 Å; False if it finds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # spglib announces a new way to report failure
            first, second = (
                SpacegroupAnalyzer(s, symprec=SYMPREC).get_space_group_number() for s in (prediction, reference)
            )
    except Exception:  # spglib finds no space group
        return False
    return first == second


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
