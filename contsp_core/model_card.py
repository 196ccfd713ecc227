"""The card of a checkpoint: what it was trained on, how, how long, and how it scores, as Markdown beside it."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from contsp_core.checkpoints import find_checkpoint, read_settings

CURVE_POINTS = 8
PROTOCOL = ("dataset", "split", "n_steps", "seed", "test_data")
SHOWN = re.compile(
    r"(n_references|n_samples|n_timed_out|((match_rate|rmse)(_ranked|_strict|_valid)?|crmse|metre)@\d+)(_interval)?"
)
CHAINS = re.compile(r"chain\.|buffer_|energy_penalty$|expand_p$|max_atoms$")  # of contrastive divergence only
HIDDEN = {"training", "energy", "data", "last_row", "sampling", "scores", "dataset", "machine", "elapsed_s"}


def write_model_card(
    checkpoint: str | Path, scores: str | Path | None = None, history: str | Path | None = None
) -> Path:
    """Write ``<name>.md`` beside a checkpoint.

    Args:
        checkpoint: a bundled one by data set name, or a path.
        scores: ``summary.json`` of an evaluation, or another JSON object of names and numbers, in which a name may
            have a partner ``…_interval``; ``<name>.scores.json`` beside the checkpoint by default.
        history: CSV log of the training, by default ``<name>.csv`` beside the checkpoint.

    Returns:
        The path of the card.

    Raises:
        ValueError: if the checkpoint, or a file that was named, is missing or cannot be read.
    """
    path = find_checkpoint(checkpoint)
    score_path = _optional("scores", scores, path.with_suffix(".scores.json"))
    log_path = _optional("history", history, path.with_suffix(".csv"))
    card = model_card(
        path.stem,
        read_settings(path),
        _read_scores(score_path) if score_path else None,
        _read_log(log_path) if log_path else None,
    )
    target = path.with_suffix(".md")
    target.write_text(card, encoding="utf-8")
    return target


def model_card(
    name: str,
    settings: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, str]] | None = None,
) -> str:
    """The text of a card.

    Args:
        name: of the checkpoint.
        settings: from :func:`contsp_core.checkpoints.read_settings`.
        scores: names and numbers; None says that it was not scored.
        history: rows of the training log.
    """
    data, training = settings.get("data", {}), settings.get("training", {})
    official = "the official file" if data.get("official") else "**not** the official file"
    trained = {
        "data": f"`{settings.get('dataset', '?')}`, {settings.get('n_structures', '?')} crystals, {official}",
        "file": f"`{data.get('path', '?')}`, git blob `{data.get('blob_id', '?')}`",
        "objective": training.get("objective", "?"),
        "seed": training.get("seed", "?"),
        "updates": settings.get("n_updates", "?"),
        "time": f"{settings['elapsed_s'] / 60:.1f} min" if "elapsed_s" in settings else "?",
        "machine": settings.get("machine", "?"),
    } | {key: value for key, value in settings.items() if key not in HIDDEN | {"n_structures", "n_updates"}}
    parts = [
        f"# Checkpoint `{name}`",
        f'Load it with `contsp_core.load_model("{name}")`. The energy is dimensionless: it ranks crystals of one'
        " composition, and is not an energy in eV.",
        _table(("training", ""), trained),
        "## Scores",
        _table(("score", "value"), _with_intervals(scores)) if scores else "Not scored.",
        "## Settings",
        _table(("energy", "value"), settings.get("energy", {})),
        _table(("training", "value"), used_settings(training)),
    ]
    if settings.get("sampling"):
        parts.append(_table(("sampling", "value"), flatten_settings(settings["sampling"])))
    if history:
        parts += ["## Training log", _curve(history)]
    return "\n\n".join(parts) + "\n"


def _optional(argument: str, given: str | Path | None, default: Path) -> Path | None:
    if given is None:
        return default if default.is_file() else None
    if not Path(given).is_file():
        raise ValueError(f"{argument} is {str(given)!r}, expected an existing file")
    return Path(given)


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"scores {str(path)!r} is no JSON: {error}") from None
    if not isinstance(scores, dict):
        raise ValueError(
            f"scores {str(path)!r} holds a {type(scores).__name__}, expected an object of names and numbers"
        )
    if "scores" not in scores:
        return scores
    protocol = {name: value for name, value in scores.get("settings", {}).items() if name in PROTOCOL}
    shown = {name: value for name, value in scores["scores"].items() if SHOWN.fullmatch(name)}
    return protocol | shown


def used_settings(training: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a training run on one level, without those of Markov chains where the objective runs none."""
    flat = flatten_settings(training)
    if training.get("objective") != "score_matching":
        return flat
    return {name: value for name, value in flat.items() if not CHAINS.match(name)}


def _read_log(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _table(head: tuple[str, str], rows: Mapping[str, Any]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {name} | {_text(value)} |" for name, value in rows.items()])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def flatten_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings on one level: {"chain": {"n_steps": 3}} gives {"chain.n_steps": 3}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= (
            {f"{name}.{key}": v for key, v in flatten_settings(value).items()}
            if isinstance(value, Mapping)
            else {name: value}
        )
    return flat


def _with_intervals(scores: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    for name, value in scores.items():
        if name.endswith("_interval"):
            continue
        interval = scores.get(f"{name}_interval")
        rows[name] = _text(value) + (f" ({_text(interval[0])} … {_text(interval[1])})" if interval else "")
    return rows


def _curve(history: Sequence[Mapping[str, str]]) -> str:
    """The log at a few updates: those with a validation score if there are any, else evenly spread windows' means."""
    validated = [row for row in history if row.get("validation")]
    if validated:
        lines = ["| update | validation |", "| --- | --- |"]
        return "\n".join(lines + [f"| {row['update']} | {float(row['validation']):.4g} |" for row in validated])
    lines = ["| updates | mean loss |", "| --- | --- |"]
    size = max(1, math.ceil(len(history) / CURVE_POINTS))
    for first in range(0, len(history), size):
        part = history[first : first + size]
        mean = sum(float(row["loss"]) for row in part) / len(part)
        lines.append(f"| {part[0]['update']} – {part[-1]['update']} | {mean:.4g} |")
    return "\n".join(lines)
