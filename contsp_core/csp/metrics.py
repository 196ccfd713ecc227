"""How good are predicted crystals: match rate (loose, strict, good), RMSE, METRe, cRMSE, validity, and their intervals.

Top to bottom: validity, the comparison of two crystals, work spread over cores or a cluster and its time limit, scores.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import warnings
from collections import defaultdict
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from functools import cache, partial
from itertools import chain, repeat, zip_longest
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from joblib import Parallel, delayed, effective_n_jobs
from joblib.parallel import get_active_backend
from pymatgen.core import Composition, Structure
from pymatgen.core.structure_matcher import ElementComparator, StructureMatcher
from tqdm import tqdm

from contsp_core.crystals import pack

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

MIN_DISTANCE = 0.5  # Å, CDVAE
MIN_VOLUME = 0.1  # Å³, CDVAE
LOOSE: dict[str, Any] = {"ltol": 0.3, "stol": 0.5, "angle_tol": 10.0}  # tolerances of the field: relative, and degrees
STRICT: dict[str, Any] = {"ltol": 0.2, "stol": 0.3, "angle_tol": 5.0}  # pymatgen's defaults
LOOSE["comparator"] = STRICT["comparator"] = ElementComparator()  # whether or not sites carry oxidation states
GOOD = 0.1  # a loose match of smaller rms displacement is called good
MAX_POOL = 50  # references of one composition for which METRe is computed: the comparisons grow with its square
SCORES = {"match_rate": "match rate, loose", "match_rate_strict": "match rate, strict"}  # names and labels
SCORES |= {"match_rate_good": "match rate, good", "match_rate_random": "loose, in random order"}
SCORES |= {"match_rate_valid": "loose, valid samples only", "rmse": "RMSE", "rmse_valid": "RMSE, valid samples only"}
SCORES |= {"metre": "METRe", "metre_good": "METRe, good", "crmse": "cRMSE", "metre_crmse": "cRMSE of METRe"}
CRITERIA = {"loose": "", "strict": "_strict", "good": "_good"}  # and how the scores are named
COUNTS = ["n_predictions", "n_missing", "n_timed_out", "n_invalid", "n_wrong_composition"]
LISTS = ["rms", "strict", "valid", "energy"]  # columns with an entry per prediction
START = "fork" if sys.platform == "linux" else "spawn"  # takes milliseconds, but is not safe elsewhere
BATCH = 64 if START == "fork" else 1024  # comparisons that share a process, at most
_starting = Lock()  # of the thread that starts a process


@cache
def is_charge_neutral(formula: str) -> bool:
    """Whether a composition can be charge neutral, by the rule of CDVAE, with SMACT's oxidation states of 2014.

    Single elements and compounds of metals only are valid. Otherwise every element takes one of its oxidation states:
    some choice must sum to zero with every cation less electronegative than every anion.

    Source: Xie et al., ICLR 2022 (CDVAE), evaluation metrics; Davies et al., Chem 1, 617 (2016) (SMACT).
    """
    from smact import Element, metals  # reads tables

    counts: dict[Any, int] = {Element(name): round(n) for name, n in Composition(formula).get_el_amt_dict().items()}
    if len(counts) == 1 or all(element.symbol in metals for element in counts):
        return True
    if any(element.pauling_eneg is None for element in counts):
        return False
    elements = sorted(counts, key=lambda element: element.pauling_eneg)
    for n_cations in range(1, len(elements)):
        cation, anion = elements[n_cations - 1 : n_cations + 1]
        totals = {0} if cation.pauling_eneg < anion.pauling_eneg else set()
        for rank, element in enumerate(elements):
            states = [state for state in element.oxidation_states_smact14 if (state > 0) == (rank < n_cations)]
            totals = {total + counts[element] * state for total in totals for state in states}
        if 0 in totals:
            return True
    return False


def _has_volume(structure: Structure) -> bool:
    return bool(np.isfinite(structure.frac_coords).all() and structure.volume >= MIN_VOLUME)  # a NaN volume fails


def is_valid_structure(structure: Structure, charge_neutrality: bool = True) -> bool:
    """Validity as in CDVAE: finite, at least 0.1 Å³, charge neutral, and sites more than 0.5 Å apart.

    Nearest images are compared, a site and its own images are not. DiffCSP also calls a crystal invalid for which no
    CrystalNN fingerprint can be computed; that is left out here.
    """
    if not _has_volume(structure) or not structure.is_valid(MIN_DISTANCE):
        return False
    return not charge_neutrality or is_charge_neutral(structure.formula)


class PairScore(NamedTuple):
    """One comparison; the defaults say "no match"."""

    rms: float = math.nan  # RMS displacement over (volume per atom)^(1/3), unitless; NaN: no match at LOOSE
    strict: bool = False  # whether they match at STRICT too
    valid: bool = False  # whether the prediction is valid but for its charge


def score_pair(prediction: Structure | None, reference: Structure) -> PairScore:
    """Compare one prediction with one reference.

    Both cells are LLL-reduced first: the same solids, but pymatgen's Niggli reduction then takes milliseconds where
    it takes seconds for a skewed cell. A missing prediction, a different composition or a volume below 0.1 Å³ is no
    match, and an error inside the matcher is none either.
    """
    if prediction is None or not _has_volume(prediction):
        return PairScore()
    try:
        first, second = (structure.get_reduced_structure("LLL") for structure in (prediction, reference))
        valid = is_valid_structure(first, charge_neutrality=False)
        if prediction.composition.reduced_formula != reference.composition.reduced_formula:
            return PairScore(valid=valid)
        match = StructureMatcher(**LOOSE).get_rms_dist(first, second)
        strict = match is not None and StructureMatcher(**STRICT).get_rms_dist(first, second) is not None
        return PairScore(math.nan if match is None else float(match[0]), strict, valid)
    except Exception:  # a distorted cell makes spglib, numpy and pymatgen fail in many ways
        return PairScore()


def check_limits(n_jobs: int, time_limit_s: float = 1.0) -> None:
    """A ValueError unless ``n_jobs`` is −1 (all cores) or an integer ≥ 1, and the time limit positive."""
    if not isinstance(n_jobs, int) or (n_jobs < 1 and n_jobs != -1):
        raise ValueError(f"n_jobs is {n_jobs!r}, expected -1 (all cores) or an integer ≥ 1")
    if not 0 < time_limit_s < math.inf:
        raise ValueError(f"time_limit_s is {time_limit_s}, expected a positive number of seconds")


def spread(function: Callable, items: Sequence, sizes: list[int], limit: int, n_jobs: int, **options: Any) -> Generator:
    """All entries of ``function(part)``, where the sizes of the items in a part sum to at most ``limit``.

    joblib, which gets the options, runs them in ``n_jobs`` processes (1: in this one), or where
    ``joblib.parallel_config`` says, such as on a Dask cluster. Each worker has four parts or more, but none that would
    be smaller than a 16th of the limit. A local worker that dies is a RuntimeError; Dask gives its part to another one.
    """
    _mend_dask()
    total = sum(sizes)
    n_workers = min(effective_n_jobs(n_jobs), 16 * total // limit)
    share = limit if n_workers < 2 else max(total // (4 * n_workers), limit // 16)
    parts = [items[part] for part in pack(sizes, min(limit, share))]
    parallel = Parallel(max(1, min(n_workers, len(parts))), batch_size=1, **options)
    results = parallel(delayed(function)(part) for part in parts)
    try:
        yield from chain.from_iterable(results)
    except BrokenProcessPool:
        raise RuntimeError("a worker process died (killed, or out of memory); what was finished is kept") from None
    finally:
        with warnings.catch_warnings(action="ignore"):  # joblib warns of tasks that an error elsewhere leaves undone
            results.close()


def _mend_dask() -> None:
    """joblib (1.6) waits for ever for what Dask gives up, and does itself what a single worker should do: no longer."""
    backend = get_active_backend()[0]
    if hasattr(backend, "client"):
        backend.submit = partial(_submit_and_tell, backend)
        backend.effective_n_jobs = lambda n_jobs: max(2, type(backend).effective_n_jobs(backend, n_jobs))


def _submit_and_tell(backend: Any, call: Callable, callback: Callable) -> Any:
    future = type(backend).submit(backend, call, callback)
    future.add_done_callback(lambda done: done.exception() and callback(done.exception()))
    return future


def run_with_time_limit(
    function: Callable,
    tasks: Sequence[tuple],
    n_jobs: int = -1,
    time_limit_s: float = 10.0,
    description: str = "",
    progress: bool = True,
) -> list[Any]:
    """``function(*task)`` for every task, in processes that die when a call exceeds the limit; ``n_jobs`` work at once.

    One result per task, in order; None where a task exceeded the limit or killed its process. Raised are a ValueError
    on a wrong limit or ``n_jobs``, and whatever ``function`` raises.
    """
    check_limits(n_jobs, time_limit_s)
    answer, sizes = partial(_answer_all, function, time_limit_s), [1] * len(tasks)
    results = spread(answer, tasks, sizes, BATCH, n_jobs, return_as="generator", prefer="threads")
    return list(tqdm(results, description, len(tasks), disable=None if progress else True))


def _answer_all(function: Callable, time_limit_s: float, tasks: Sequence[tuple]) -> list[Any]:
    context, results = multiprocessing.get_context(START), list[Any]()
    process: Any = multiprocessing.current_process()
    process._config["daemon"] = False  # a Dask worker is one, and those may have no children
    while rest := tasks[len(results) :]:
        with ProcessPoolExecutor(1, context, _start_child) as pool:
            with _starting:  # else a child of another thread keeps pipes open whose end tells of a death
                answers = pool.map(_answer, repeat(function), repeat(time_limit_s), rest)
            try:
                for answer in answers:
                    results.append(answer)
            except BrokenProcessPool:  # of which the first without an answer was the last to be called
                results.append(None)
    return results


def _start_child() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    parent: Any = multiprocessing.parent_process()
    Thread(target=lambda: parent.join() or os._exit(1), daemon=True).start()  # no orphans


def _answer(function: Callable, time_limit_s: float, task: tuple) -> Any:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends a loop in compiled code too, which no Python handler can
    signal.setitimer(signal.ITIMER_REAL, time_limit_s)
    try:
        with warnings.catch_warnings(action="ignore"):
            return function(*task)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def evaluate_csp(
    references: Sequence[Structure],
    predictions: Sequence[Sequence[Structure | None]],
    n_jobs: int = -1,
    *,
    material_ids: Sequence[str] | None = None,
    time_limit_s: float = 10.0,
    metre: bool = True,
    progress: bool = True,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Score predicted crystals against their references.

    Args:
        references: one crystal per entry; entries may repeat.
        predictions: for each reference its predictions, in the order that "the first k" refers to; if all carry
            ``properties["energy"]`` (lower is better), one is also chosen by it. Their number may vary. None is a
            missing one: it keeps its place in the order, matches nothing and is not valid.
        n_jobs: worker processes (-1: all cores); the scores do not depend on it.
        material_ids: label of each row of the table, all different; by default 0, 1, ….
        time_limit_s: limit of one comparison, s; beyond it there is no match, and the sample counts as invalid.
        metre: compare each reference with the predictions for all others of its composition too, up to ``MAX_POOL``.
        progress: show a progress bar where standard error is a terminal.

    Returns:
        The summary of :func:`summarise`, and a table with a row per reference: formula, n_atoms, the counts that the
        summary adds up, rms_best (NaN: no match), best_index (-1: no match); lists with an entry per prediction: rms,
        strict, valid, energy; and pool_rms, one such list of rms for each reference of the same composition.

    Inputs that are empty or differ in length or type, and material ids missing or repeated, are a ValueError.
    """
    references, predictions = list(references), [list(candidates) for candidates in predictions]
    index = pd.Index(range(len(references)) if material_ids is None else list(material_ids), name="material_id")
    _check_input(references, predictions, index)
    groups = defaultdict(list)
    for row, reference in enumerate(references):
        groups[reference.composition.reduced_formula].append(row)
    metre = metre and max(map(len, groups.values())) <= MAX_POOL
    pairs = []  # (reference, whose prediction, its number), own predictions first
    for row, reference in enumerate(references):
        others = [other for other in groups[reference.composition.reduced_formula] if metre and other != row]
        pairs += [(row, owner, number) for owner in (row, *others) for number in range(len(predictions[owner]))]
    tasks = [(predictions[owner][number], references[row]) for row, owner, number in pairs]
    pools: list[dict[int, list]] = [{row: []} for row in range(len(references))]
    results = run_with_time_limit(score_pair, tasks, n_jobs, time_limit_s, "matching", progress)
    for (row, owner, _), result in zip(pairs, results, strict=True):
        pools[row].setdefault(owner, []).append(result)
    rows = [_row(*entry) for entry in zip(references, predictions, map(list, map(dict.values, pools)), strict=True)]
    table = pd.DataFrame(rows, index=index)
    return summarise(table), table


def _check_input(references: Sequence, predictions: Sequence[Sequence], index: pd.Index) -> None:
    if not references:
        raise ValueError("references is empty, expected at least one structure")
    for name, given in (("predictions", predictions), ("material_ids", index)):
        if len(given) != len(references):
            raise ValueError(f"{name} has {len(given)} entries, expected one per reference: {len(references)}")
    if index.hasnans or "" in index:
        raise ValueError("material_ids has a missing entry, expected a name for each reference")
    if not index.is_unique:
        raise ValueError(f"material_ids has {index[index.duplicated()][0]!r} more than once, expected different names")
    if not any(predictions):
        raise ValueError("predictions holds no structure, expected at least one")
    for structure in chain(references, (s for candidates in predictions for s in candidates if s is not None)):
        if not isinstance(structure, Structure):
            raise ValueError(f"found a {type(structure).__name__}, expected a pymatgen Structure")


def _row(reference: Structure, candidates: Sequence[Structure | None], pool: list[list]) -> dict[str, Any]:
    own = [result or PairScore() for result in pool[0]]
    rms, formula = np.array([score.rms for score in own]), reference.composition.reduced_formula
    valid = [c is not None and s.valid and is_charge_neutral(c.formula) for c, s in zip(candidates, own, strict=True)]
    present = [candidate for candidate in candidates if candidate is not None]
    best = int(np.nanargmin(rms)) if np.isfinite(rms).any() else -1
    row: dict[str, Any] = {"formula": formula, "n_atoms": len(reference), "n_predictions": len(candidates)}
    row |= {"n_missing": len(candidates) - len(present)}
    row |= {"n_timed_out": sum(result is None for results in pool for result in results)}
    row |= {"n_invalid": len(valid) - sum(valid)}
    row |= {"n_wrong_composition": sum(candidate.composition.reduced_formula != formula for candidate in present)}
    row |= {"rms_best": rms[best] if best >= 0 else math.nan, "best_index": best, "rms": rms.tolist()}
    row |= {"strict": [score.strict for score in own], "valid": valid}
    row |= {"energy": [math.nan if c is None else float(c.properties.get("energy", math.nan)) for c in candidates]}
    return row | {"pool_rms": [[math.nan if result is None else result.rms for result in results] for results in pool]}


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Scores of a table of :func:`evaluate_csp` (or of several, concatenated or pooled).

    For k = 1 and k = n_samples (the largest number of predictions), over the first k of each of N references:

    - match_rate@k: share of references with a match; rmse@k: mean over these of the smallest rms displacement;
      crmse@k: the same mean over all N, unmatched ones counting 0.5 (the tolerance).
    - match_rate_strict@k: match at ltol, stol, angle_tol = 0.2, 0.3, 5; match_rate_good@k: a match with rms < 0.1.
    - match_rate_valid@k, rmse_valid@k: if predictions that fail :func:`is_valid_structure` are dropped; N stays.
      DiffCSP at k = 1, but not at k = 20, also asks for a valid reference; references are not tested here.
    - metre@k, metre_good@k, metre_crmse@k: a reference is matched if *any* of the first k predictions made for *any*
      reference of its composition matches it. NaN if these were not compared.
    - match_rate…_random@k: expected for k predictions in random order.

    Of the prediction of lowest energy: match_rate…_lowest_energy, rmse_lowest_energy; NaN without energies. At k =
    n_samples also without "@k": match_rate, match_rate_strict, match_rate_good, rmse. Counts: n_references, n_samples,
    n_predictions, n_missing, n_timed_out (comparisons), n_invalid, n_wrong_composition. Each mean has a 95 % bootstrap
    interval over references, named …_interval. An empty table is a ValueError.

    Source: Jiao et al., NeurIPS 2023 (match rate, RMSE); Martirossyan et al., arXiv 2509.12178 (METRe, cRMSE).
    """
    if not len(table):
        raise ValueError("table is empty, expected at least one row")
    n_samples = int(table["n_predictions"].max())
    values = _columns(table, 1) | _columns(table, n_samples)
    values |= {name: values[f"{name}@{n_samples}"] for name in ("match_rate", "match_rate_strict", "match_rate_good")}
    values["rmse"] = values[f"rmse@{n_samples}"]
    columns = np.column_stack(list(values.values())).astype(float)
    intervals = zip(*map(np.ndarray.tolist, bootstrap_interval(columns)), strict=True)
    summary: dict[str, Any] = {"n_references": len(table), "n_samples": n_samples}
    summary |= {name: int(table[name].sum()) for name in COUNTS}
    for name, column, interval in zip(values, columns.T, intervals, strict=True):
        summary[name] = float(np.nanmean(column)) if np.isfinite(column).any() else math.nan
        summary[f"{name}_interval"] = interval
    return summary


def score_table(scores: dict[str, Any]) -> pd.DataFrame:
    """Scores of :func:`summarise` as texts with their intervals: a row each, a column for k = 1 and for all samples."""

    def text(name: str) -> str:
        (low, high), value = scores[f"{name}_interval"], scores[name]
        return "–" if value is None or math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"

    k_values = sorted({1, scores["n_samples"]})
    return pd.DataFrame({f"k = {k}": {SCORES[name]: text(f"{name}@{k}") for name in SCORES} for k in k_values})


def _columns(table: pd.DataFrame, k: int) -> dict[str, np.ndarray]:
    """Per reference, the numbers whose means are the scores at k; NaN where a reference does not count."""
    rms, energy, stol = matching_rms(table), _matrix(table["energy"]), LOOSE["stol"]
    has_energy = (np.isfinite(energy).sum(1) == table["n_predictions"] - table["n_missing"]).all()
    lowest = np.nan_to_num(energy, nan=math.inf).argmin(1)[:, None]
    best = np.fmin.reduce(rms[:, :k], axis=1)  # NaN only where all are
    valid = np.fmin.reduce(np.where(_matrix(table["valid"])[:, :k] == 1, rms[:, :k], math.nan), axis=1)
    values = {f"rmse@{k}": best, f"crmse@{k}": np.where(np.isnan(best), stol, best)}
    values |= {f"match_rate_valid@{k}": np.isfinite(valid), f"rmse_valid@{k}": valid}
    values["rmse_lowest_energy"] = np.where(has_energy, np.take_along_axis(rms, lowest, 1)[:, 0], math.nan)
    for criterion, suffix in CRITERIA.items():
        matching = matching_rms(table, criterion)
        chosen = np.isfinite(np.take_along_axis(matching, lowest, 1)[:, 0])
        values[f"match_rate{suffix}@{k}"] = np.isfinite(matching[:, :k]).any(1)
        values[f"match_rate{suffix}_random@{k}"] = random_order(matching, table["n_predictions"], k)[0]
        values[f"match_rate{suffix}_lowest_energy"] = np.where(has_energy, chosen, math.nan)
    pool = np.array([np.fmin.reduce(_matrix(lists)[:, :k], axis=None) for lists in table["pool_rms"]])
    metre = {"metre": np.isfinite(pool), "metre_good": pool < GOOD, "metre_crmse": np.where(np.isnan(pool), stol, pool)}
    compared = table.groupby("formula")["formula"].transform("size").to_numpy() == [len(x) for x in table["pool_rms"]]
    return values | {f"{n}@{k}": np.where(compared.all(), column, math.nan) for n, column in metre.items()}


def matching_rms(table: pd.DataFrame, criterion: str = "loose") -> np.ndarray:
    """(references, predictions) rms displacements, NaN where the criterion (loose, strict, good) is not met."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion is {criterion!r}, allowed are {', '.join(CRITERIA)}")
    rms = _matrix(table["rms"])
    met = {"loose": np.isfinite(rms), "strict": _matrix(table["strict"]) == 1, "good": rms < GOOD}
    return np.where(met[criterion], rms, math.nan)


def _matrix(lists: Sequence[Sequence[float]]) -> np.ndarray:
    """Lists of any length as rows of one array, NaN at the end."""
    return np.array([*zip_longest(*lists, [math.nan], fillvalue=math.nan)], dtype=float).T[:-1]  # of ≥ 1 column


def bootstrap_interval(values: np.ndarray, seed: int = 0, n_resamples: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap interval of the mean of those values that are not NaN: lower and upper end.

    It has no width if all values agree (a rate of 0 or 1), which says nothing about the uncertainty. Resampled are the
    references of ``values`` (references,) or (references, columns), the same ones in all columns.

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), Chapter 13.
    """
    values = np.asarray(values, dtype=float)
    rng, chances = np.random.default_rng(seed), np.full(len(values), 1 / len(values))
    numbers = np.stack([np.nan_to_num(values), np.isfinite(values)], axis=1).reshape(len(values), -1)
    # one resample is how often each reference is drawn
    totals = np.array([rng.multinomial(len(values), chances) @ numbers for _ in range(n_resamples)])
    total, counted = np.moveaxis(totals.reshape(n_resamples, 2, *values.shape[1:]), 1, 0)
    means = np.divide(total, counted, out=np.full_like(total, math.nan), where=counted > 0)
    with warnings.catch_warnings(action="ignore"):  # numpy warns of a column of NaN, whose interval is NaN
        return tuple(np.nanquantile(means, [0.025, 0.975], axis=0))


def random_order(rms: np.ndarray, n_predictions: Sequence[int], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Per reference: probability that k of its predictions hold a match, and expected (best rms) · [there is one]."""
    matched, expected = np.zeros(len(rms)), np.zeros(len(rms))
    for row, n in enumerate(n_predictions):
        size, matches = min(k, n), np.sort(rms[row][np.isfinite(rms[row])])
        is_best = [math.comb(n - i, size - 1) / math.comb(n, size) for i in range(1, len(matches) + 1)]
        matched[row], expected[row] = sum(is_best), np.dot(is_best, matches)
    return matched, expected
