"""What the evaluation notebook shows of its scores: curves, ranking, and tables beside published numbers.

``python notebooks/results.py figures/04_results_*.csv`` prints the tables of figures/README.md; given ``summary.json``
of an evaluation, its row.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from contsp_core.csp.metrics import COUNTS, CRITERIA, LISTS, bootstrap_interval, matching_rms, random_order, summarise
from contsp_core.data import DATA_DIR

PUBLISHED = DATA_DIR / "published.csv"


def match_rate_curve(table: pd.DataFrame, criterion: str = "loose") -> pd.DataFrame:
    """Match rate and RMSE against the number of predictions k: the exact mean over all subsets of k predictions.

    Of n predictions of which m match, the i-th best match is the best one of a subset of k with probability
    C(n−i, k−1) / C(n, k); their sum over i ≤ m is the probability of a match. RMSE is the mean over references weighted
    by the latter. A reference with n < k predictions counts with all it has.

    Args:
        table: from :func:`evaluate_csp`, or pooled.
        criterion: "loose", "strict" or "good".

    Returns:
        columns k, match_rate, rmse, and low and high: the 95 % bootstrap interval of the match rate.
    """
    rms, rows, shares = matching_rms(table, criterion), [], []
    for k in range(1, int(table["n_predictions"].max()) + 1):
        matched, expected = random_order(rms, table["n_predictions"], k)
        shares.append(matched)
        rows.append((k, matched.mean(), expected.sum() / matched.sum() if matched.any() else math.nan))
    curve = pd.DataFrame(rows, columns=["k", "match_rate", "rmse"])
    return curve.assign(**dict(zip(("low", "high"), bootstrap_interval(np.column_stack(shares)), strict=True)))


def pool_candidates(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of :func:`evaluate_csp` for the same references joined: the candidates of the first one come first."""
    if any(not table.index.equals(tables[0].index) for table in tables):
        raise ValueError("tables have different material ids, expected the same in each")
    pooled = tables[0][["formula", "n_atoms"]].copy()
    for name in COUNTS:
        pooled[name] = sum(table[name] for table in tables)
    for name in (*LISTS, "pool_rms"):
        pooled[name] = [list(chain(*lists)) for lists in zip(*(table[name] for table in tables), strict=True)]
    return pooled


def ranking_table(table: pd.DataFrame) -> pd.DataFrame:
    """One answer per composition: does the energy choose better among the candidates than chance?

    Args:
        table: from :func:`evaluate_csp`, or pooled; its candidates carry energies.

    Returns:
        A row for each criterion (loose, strict, good) with the match rates of the candidate given first, of a random
        one, of the one of lowest energy (with its 95 % interval, low and high), and of the best of all n.
    """
    scores, rows = summarise(table), []
    for criterion, suffix in CRITERIA.items():
        names = [f"match_rate{suffix}{end}" for end in ("@1", "_random@1", "_lowest_energy", "")]
        first, random, lowest, best = (scores[name] for name in names)
        rows.append((criterion, scores["n_samples"], first, random, lowest, *scores[f"{names[2]}_interval"], best))
    return pd.DataFrame(rows, columns=["match", "n", "first", "random", "lowest_energy", "low", "high", "best_of_n"])


def results_table(summaries: Sequence[str | Path | dict[str, Any]], published: bool = True) -> pd.DataFrame:
    """Our scores and the published ones as numbers, a row for each method and number k of answers.

    A summary gives a row at k = 1, one at its number of samples, and, if its samples carry energies, one for the
    single answer that the energy chose among them.

    Args:
        summaries: ``summary.json`` files, or their content.
        published: add the published numbers for the data sets that occur.

    Returns:
        Columns dataset, method, k, chosen_from (number of samples among which the energy chose; else 0),
        match_rate with its 95 % interval low and high, strict, good (shares of test crystals), rmse, n_crystals,
        n_steps (energy gradients a sample), filter ("none": invalid samples are kept), and remarks: every difference
        from the published numbers in protocol or data, or their source.
    """
    read = [item if isinstance(item, dict) else json.loads(Path(item).read_text()) for item in summaries]
    ours = pd.DataFrame([row for summary in read for row in _own_rows(summary)])
    if not published:
        return ours
    theirs = pd.read_csv(PUBLISHED).rename(columns={"source": "remarks"})
    theirs = theirs.assign(chosen_from=0, match_rate=theirs["match_rate_percent"] / 100)
    theirs = theirs[theirs["dataset"].isin(ours["dataset"])]
    return pd.DataFrame([*ours.to_dict("records"), *theirs.to_dict("records")], columns=ours.columns)


def _own_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    settings, scores = summary["settings"], summary["scores"]
    n, rows = scores["n_samples"], []
    for k, chosen_from, end in ((1, 0, "@1"), (n, 0, f"@{n}"), (1, n, "_lowest_energy"))[: 3 if n > 1 else 1]:
        if scores[f"match_rate{end}"] is None or math.isnan(scores[f"match_rate{end}"]):
            continue  # no energies
        low, high = scores[f"match_rate{end}_interval"]
        row = {"dataset": settings["dataset"], "method": settings["method"], "k": k, "chosen_from": chosen_from}
        row |= {"match_rate": scores[f"match_rate{end}"], "low": low, "high": high}
        row |= {name: scores.get(f"match_rate{CRITERIA[name]}{end}") for name in ("strict", "good")}
        row |= {"rmse": scores[f"rmse{end}"], "n_crystals": scores["n_references"], "n_steps": settings["n_steps"]}
        row["n_steps"] = row["n_steps"] and row["n_steps"] * settings.get("best_of", 1)
        rows.append(row | {"filter": "none", "remarks": "; ".join(_remarks(summary))})
    return rows


def _remarks(summary: dict[str, Any]) -> list[str]:
    settings, data, remarks = summary["settings"], summary["data"], []
    if settings["split"] != "test":
        remarks.append(f"on the {settings['split']} split")
    if settings["n_structures"] < data["n_crystals"]:
        part = f"{settings['n_structures']} of {data['n_crystals']} crystals"
        remarks.append(f"{part}, chosen by seed {settings['seed']}")
    if settings["dataset"] == "prototypes":
        remarks.append("textbook crystals bundled here, no published numbers")
    elif not data["official"]:
        remarks.append("not the official split")
    if settings["trained_on"].get("n_structures"):
        remarks.append(f"trained on {settings['trained_on']['n_structures']} crystals")
    if n_seen := data.get("n_seen"):
        remarks.append(f"{n_seen} have the formula of a training crystal")
    n_missing = summary["scores"]["n_missing"]
    return remarks + ([f"{n_missing} samples missing or unreadable: no match"] if n_missing else [])


def overview_table(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`results_table` as texts, with all k of a method side by side.

    Returns:
        A row for each data set, method and filter; for each k the match rate (%) with its interval, the strict and the
        good one, and the RMSE.

    Raises:
        ValueError: if two different rows have the same name.
    """
    row_keys, column_keys, rows = ["dataset", "method", "filter"], ["chosen_from", "k"], []
    results = results.drop_duplicates()
    if results.duplicated([*row_keys, *column_keys]).any():
        twice = results[results.duplicated([*row_keys, *column_keys])].iloc[0]
        raise ValueError(f"results has {twice['method']!r} on {twice['dataset']!r} twice, expected different names")
    answers = sorted(set(results[column_keys].itertuples(index=False, name=None)))
    for names, group in results.groupby(row_keys, sort=False):
        found = {(row.chosen_from, row.k): row for row in group.itertuples()}
        rows.append([*names, *(cell for answer in answers for cell in _cells(found.get(answer)))])
    columns = ["data set", "method", "filter"]
    for n, k in answers:
        columns += [f"lowest energy of {n} (%)" if n else f"k = {k} (%)", "strict / good", "RMSE"]
    return pd.DataFrame(rows, columns=columns)


def _cells(row: Any) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    interval = "" if pd.isna(row.low) else f" [{100 * row.low:.1f}, {100 * row.high:.1f}]"
    rate = f"{100 * row.match_rate:.1f}{interval}" if interval else f"{100 * row.match_rate:.2f}"
    others = "" if pd.isna(row.strict) else f"{100 * row.strict:.1f} / {100 * row.good:.1f}"
    return rate, others, "–" if pd.isna(row.rmse) else f"{row.rmse:.4f}"


def to_markdown(table: pd.DataFrame) -> str:
    """A table of texts and numbers in Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the overview of results files."""
    parser = argparse.ArgumentParser(prog="python notebooks/results.py", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="04_results_*.csv or summary.json of evaluations")
    files = parser.parse_args(arguments).files
    for path in files:
        if not path.is_file():
            parser.error(f"{path} is no file, expected a CSV of results")
    tables = [results_table([path], False) if path.suffix == ".json" else pd.read_csv(path) for path in files]
    print(to_markdown(overview_table(pd.concat(tables))), end="")


if __name__ == "__main__":
    main()
