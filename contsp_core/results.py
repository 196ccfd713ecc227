"""Scores as tables, and what they are to be compared with: published numbers, and the ceiling that polymorphs set.

``python -m contsp_core.results figures/04_results_*.csv`` prints the table of the README.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pymatgen.core.structure_matcher import StructureMatcher

from contsp_core.data import DATA_DIR, load_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pymatgen.core import Structure

    from contsp_core.evaluation import Evaluation
    from contsp_core.split import Split

PUBLISHED = DATA_DIR / "published.csv"
COLUMNS = ["dataset", "k", "method", "match rate (%)", "95 % interval", "RMSE", "test crystals", "remarks"]
SCORES = {
    "match_rate": "match rate",
    "rmse": "RMSE",
    "match_rate_valid": "match rate, valid samples only",
    "rmse_valid": "RMSE, valid samples only",
    "match_rate_strict": "match rate, strict tolerances",
    "match_rate_random": "match rate, samples in random order",
    "match_rate_ranked": "match rate, samples ranked by energy",
    "crmse": "cRMSE",
    "metre": "METRe",
    "metre_crmse": "cRMSE of METRe",
}
MISSING = "nan"
MAX_POLYMORPHS = 4  # more than so many share the last row of the count


def results_table(summaries: Sequence[str | Path | dict[str, Any]], published: bool = True) -> pd.DataFrame:
    """Our scores beside the published ones, a row for each method and number k of answers.

    Match at ltol, stol, angle_tol = 0.3, 0.5, 10, invalid samples included. A summary gives a row at k = 1, one at its
    number of samples, and, if its samples carry energies, one for the best-ranked of them.

    Args:
        summaries: ``summary.json`` files, or their content.
        published: add the published numbers for the data sets that occur.

    Returns:
        Columns dataset, k, method, match rate (%), 95 % interval, RMSE, test crystals, remarks; k = "1 of n" is the one
        of lowest energy among n. Every difference in protocol or data from the published numbers is in the remarks.
    """
    read = [item if isinstance(item, dict) else json.loads(Path(item).read_text()) for item in summaries]
    rows = [row for summary in read for row in _own_rows(summary)]
    if published:
        datasets = {row["dataset"] for row in rows}
        numbers = pd.read_csv(PUBLISHED)
        rows += [_published_row(row) for _, row in numbers[numbers["dataset"].isin(datasets)].iterrows()]
    rows.sort(key=lambda row: (row["dataset"], "of" in str(row["k"]), int(str(row["k"]).split()[-1])))
    return pd.DataFrame(rows, columns=COLUMNS)


def _own_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    settings, scores = summary["settings"], summary["scores"]
    n = settings["n_samples"]
    keys = {1: ("match_rate@1", "rmse@1"), n: (f"match_rate@{n}", f"rmse@{n}")}
    if _number(scores.get("match_rate_lowest_energy")) != MISSING and n > 1:
        keys[f"1 of {n}"] = ("match_rate_lowest_energy", "rmse_lowest_energy")
    rows = []
    for k, (rate, rmse) in keys.items():
        low, high = scores[f"{rate}_interval"]
        values = (f"{100 * scores[rate]:.2f}", f"{100 * low:.1f} – {100 * high:.1f}", _number(scores[rmse]))
        ranked = ["best of n by energy"] if "of" in str(k) else []
        remarks = "; ".join(_remarks(summary) + ranked)
        rows.append(
            dict(zip(COLUMNS, (settings["dataset"], k, settings["method"], *values, scores["n_references"], remarks)))
        )
    return rows


def _remarks(summary: dict[str, Any]) -> list[str]:
    settings, data = summary["settings"], summary["data"]
    remarks = [f"{settings['n_steps']} energy gradients per sample"] if settings.get("n_steps") else []
    if settings["split"] != "test":
        remarks.append(f"on the {settings['split']} split")
    if settings["n_structures"] < data["n_crystals"]:
        remarks.append(
            f"{settings['n_structures']} of {data['n_crystals']} crystals, chosen by seed {settings['seed']}"
        )
    if settings["dataset"] == "prototypes":
        remarks.append("textbook crystals bundled here, no published numbers")
    elif not data["official"]:
        trained_on = summary["trained_on"].get("n_structures")
        remarks.append("not the official split" + (f", trained on {trained_on} crystals" if trained_on else ""))
    n_missing = summary["scores"]["n_missing"]
    return remarks + ([f"{n_missing} samples missing: no match"] if n_missing else [])


def _published_row(row: pd.Series) -> dict[str, Any]:
    values = (f"{row['match_rate_percent']:.2f}", "", _number(row["rmse"]), "", f"published: {row['source']}")
    return dict(zip(COLUMNS, (row["dataset"], row["k"], row["method"], *values)))


def overview_table(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`results_table`, read as texts, with all k of a method side by side.

    Returns:
        A row for each data set and method; for each k the match rate (%) with its interval, and the RMSE.
    """
    counts = sorted(results["k"].unique(), key=lambda k: ("of" in k, int(k.split()[-1])))
    columns = ["data set", "method"]
    for k in counts:
        columns += [f"lowest energy of {k.split()[-1]} (%)" if "of" in k else f"k = {k} (%)", "RMSE"]
    rows = []
    for (dataset, method), group in results.groupby(["dataset", "method"], sort=False):
        found = group.set_index("k")
        rows.append([dataset, method, *(cell for k in counts for cell in _cells(found, k))])
    return pd.DataFrame(rows, columns=columns)


def _cells(found: pd.DataFrame, k: str) -> tuple[str, str]:
    if k not in found.index:
        return "", ""
    rate, interval = found.loc[k, "match rate (%)"], found.loc[k, "95 % interval"]
    text = f"{float(rate):.1f} [{interval.replace(' – ', ', ')}]" if interval else rate
    return text, found.loc[k, "RMSE"].replace(MISSING, "–")


def _number(value: float | None) -> str:
    return MISSING if value is None or np.isnan(value) else f"{value:.4f}"


def score_table(scores: dict[str, Any]) -> pd.DataFrame:
    """Scores at k = 1 and k = n_samples side by side: a row for each score, each with its 95 % interval.

    Args:
        scores: of :func:`contsp_core.metrics.summarise`.
    """
    rows = {}
    for k in sorted({1, scores["n_samples"]}):
        for name, label in SCORES.items():
            value = scores.get(f"{name}@{k}")
            text = _number(value)
            if text != MISSING:
                low, high = scores[f"{name}@{k}_interval"]
                text = f"{value:.3f} [{low:.3f}, {high:.3f}]"
            rows.setdefault(label, {})[f"k = {k}"] = text
    return pd.DataFrame.from_dict(rows, orient="index")


def extreme_cases(result: Evaluation, n: int = 2) -> tuple[list[Structure], list[str]]:
    """Best and worst predictions, each after its reference, with titles: n of smallest rms, n of largest or no match.

    A matching sample is shown in the cell of its reference; a crystal without match by its first sample. Cells of one
    atom, where there is nothing to place, are left out if there are others.
    """
    rms_best, n_atoms = (result.table[name].to_numpy() for name in ("rms_best", "n_atoms"))
    order = np.nan_to_num(rms_best, nan=np.inf).argsort(kind="stable")
    order = order[n_atoms[order] > 1] if (n_atoms > 1).any() else order
    structures, titles = [], []
    for row in dict.fromkeys([*order[:n], *order[-n:]]):
        reference, best = result.references.structures[row], int(result.table["best_index"].iloc[row])
        sample = result.predictions[row][max(best, 0)]
        if sample is None:
            continue
        structures += [reference, _in_cell_of(reference, sample)]
        titles += [
            f"{result.references.material_ids[row]}",
            "no match" if best < 0 else f"sample, rms {rms_best[row]:.3f}",
        ]
    return structures, titles


def _in_cell_of(reference: Structure, sample: Structure) -> Structure:
    """The sample described like the reference, if they match cell by cell; else in its reduced cell."""
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10, primitive_cell=False)
    return matcher.get_s2_like_s1(reference, sample) or sample.get_reduced_structure()


def to_markdown(table: pd.DataFrame) -> str:
    """A table of texts and numbers in Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def polymorph_counts(references: Split) -> pd.Series:
    """For each crystal, how many crystals of its composition the whole data set has (all splits, itself included)."""
    splits = [load_split(references.name, split) for split in ("train", "val", "test")]
    counts = pd.Series([_formula(numbers) for split in splits for numbers in split.species]).value_counts()
    found = [int(counts[_formula(numbers)]) for numbers in references.species]
    return pd.Series(found, index=pd.Index(references.material_ids, name="material_id"), name="polymorphs")


def _formula(species: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Composition in lowest terms, as something that can be counted."""
    numbers, counts = np.unique(species, return_counts=True)
    return tuple(zip(numbers.tolist(), (counts // np.gcd.reduce(counts)).tolist(), strict=True))


def single_answer_ceiling(counts: pd.Series) -> tuple[float, pd.DataFrame]:
    """Match rate at k = 1 of one who knows all crystals of a composition, but not which of them is asked for.

    An answer drawn evenly from m polymorphs is right with probability 1/m. (More, where two of them match each other.)

    Args:
        counts: from :func:`polymorph_counts`.

    Returns:
        The ceiling, and a table of the share of crystals with 1, 2, … polymorphs.
    """
    labels = counts.clip(upper=MAX_POLYMORPHS).map(lambda m: f"{m}" if m < MAX_POLYMORPHS else f"≥ {m}")
    shares = labels.value_counts(sort=False, normalize=True).sort_index()
    return float((1 / counts).mean()), shares.rename_axis("crystals of the composition").rename("share").reset_index()


if __name__ == "__main__":
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in sys.argv[1:]]
    print(to_markdown(overview_table(pd.concat(tables))), end="")
