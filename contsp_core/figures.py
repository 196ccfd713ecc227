"""Figures: every function takes tables or structures, returns a figure, and neither shows nor saves it.

Lengths are in Å; the learned energy is dimensionless. Matplotlib draws what is kept as an image; plotly is used where
pointing at a mark tells more than a still picture; nglview draws crystals in a live notebook.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from contsp_core.drawing import COLORS, draw_crystal, draw_crystals, new_figure, styled, view_crystal

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

    from contsp_core.invariance import ContinuityProfile

__all__ = [
    "continuity_figure",
    "displacement_energy",
    "displacement_energy_plotly",
    "draw_crystal",
    "draw_crystals",
    "energy_comparison",
    "energy_profile",
    "match_rate_figure",
    "rmse_histogram",
    "save_figure",
    "training_curves",
    "view_crystal",
]
ENERGY = "energy $E$ (dimensionless)"

# One row per panel of the training figure: title, then the columns drawn in it with their legend labels.
TRAINING_PANELS = (
    (ENERGY, {"energy_real": "training crystals", "energy_sample": "samples"}),
    ("gap: real − sample energy", {"gap": "gap"}),
    ("loss (dimensionless)", {"loss": "total", "loss_positions": "positions", "loss_strain": "strain"}),
    ("acceptance rate", {"acceptance_rate": "acceptance rate"}),
    ("buffer age (updates)", {"buffer_age": "buffer age"}),
    ("gradient norm", {"gradient_norm": "gradient norm"}),
)


def _require(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"table has columns {list(table)}, expected also {missing}")
    if table.empty:
        raise ValueError("table is empty, expected at least one row")


@styled
def training_curves(history: pd.DataFrame, smooth: int = 1) -> Figure:
    """Progress of a training run, one panel for each quantity found in ``history``.

    Args:
        history: one row an update, column ``update`` (or the row index) and any of ``energy_real``, ``energy_sample``,
            ``gap``, ``loss``, ``acceptance_rate``, ``buffer_age``, ``gradient_norm``.
        smooth: window of the running mean, in updates; the raw curve stays visible behind it.
    """
    panels = [(title, {c: t for c, t in columns.items() if c in history}) for title, columns in TRAINING_PANELS]
    panels = [(title, columns) for title, columns in panels if columns]
    if not panels:
        known = [column for _, columns in TRAINING_PANELS for column in columns]
        raise ValueError(f"history has columns {list(history)}, expected any of {known}")
    step = history.get("update", history.index)
    n_columns = min(3, len(panels))
    figure, axes = new_figure(-(-len(panels) // n_columns), n_columns, size=(3.0, 2.2))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    for ax, (title, columns) in zip(axes.flat, panels):
        for color, (column, label) in zip(COLORS, columns.items()):
            ax.plot(step, history[column], color=color, alpha=0.3 if smooth > 1 else 1, lw=1)
            ax.plot(step, history[column].rolling(smooth, min_periods=1).mean(), color=color, label=label)
        ax.set(xlabel="update", title=title)
        if len(columns) > 1:
            ax.legend()
        if "acceptance_rate" in columns:
            ax.set_ylim(0, 1)
    return figure


def displacement_panels(table: pd.DataFrame) -> list[tuple[str, list[tuple[str, pd.DataFrame]]]]:
    """Rows of Figure 2: for each data set, its crystals with their part of ``table``, in order of appearance."""
    _require(table, "dataset", "material", "displacement", "energy")
    rows = table.groupby("dataset", sort=False)
    return [(str(name), [(str(m), part) for m, part in row.groupby("material", sort=False)]) for name, row in rows]


@styled
def displacement_energy(table: pd.DataFrame) -> Figure:
    """Energy against the displacement of one atom of a stable crystal (paper, Figure 2): one row a data set.

    Args:
        table: columns ``dataset``, ``material`` (one panel each), ``displacement`` (its length, Å), ``energy``; a row
            with displacement 0 marks the undisturbed crystal.
    """
    rows = displacement_panels(table)
    figure, axes = new_figure(len(rows), max(len(crystals) for _, crystals in rows), size=(2.5, 2.1))
    for ax in axes.flat:
        ax.axis("off")
    for (dataset, crystals), row, color in zip(rows, axes, itertools.cycle(COLORS)):
        for (material, part), ax in zip(crystals, row):
            ax.axis("on")
            ax.scatter(part["displacement"], part["energy"], s=5, color=color, alpha=0.45, lw=0, rasterized=True)
            for energy in part.loc[part["displacement"] == 0, "energy"].head(1):
                ax.axhline(energy, color="0.3", lw=0.8, ls="--")
            ax.set(title=material, xlim=(0, None), xlabel="|displacement| (Å)")
            ax.ticklabel_format(axis="y", useOffset=False)
        row[0].set_ylabel(f"{dataset}\n{ENERGY}")
    return figure


def displacement_energy_plotly(table: pd.DataFrame) -> go.Figure:
    """Interactive :func:`displacement_energy`: pointing at a mark gives its displacement and energy."""
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    rows = displacement_panels(table)
    n_columns = max(len(crystals) for _, crystals in rows)
    titles = [
        f"{name}: {crystals[i][0]}" if i < len(crystals) else "" for name, crystals in rows for i in range(n_columns)
    ]
    figure = make_subplots(len(rows), n_columns, subplot_titles=titles)
    hover = "%{customdata}<br>|displacement| %{x:.3f} Å<br>energy %{y:.5f}<extra></extra>"
    for row, ((_, crystals), color) in enumerate(zip(rows, itertools.cycle(COLORS)), start=1):
        for column, (material, part) in enumerate(crystals, start=1):
            marks = {"size": 4, "color": color, "opacity": 0.5}
            names = [material] * len(part)
            x, y = part["displacement"], part["energy"]
            trace = go.Scattergl(x=x, y=y, mode="markers", marker=marks, customdata=names, hovertemplate=hover)
            figure.add_trace(trace, row, column)
    figure.update_xaxes(title_text="|displacement| (Å)").update_yaxes(title_text="energy (dimensionless)", col=1)
    return figure.update_layout(template="simple_white", showlegend=False, height=300 * len(rows))


@styled
def match_rate_figure(curve: pd.DataFrame) -> Figure:
    """Match rate against the number of samples k.

    Args:
        curve: columns ``k``, ``match_rate`` (0 … 1); optionally ``low`` and ``high`` (interval) and ``label`` (one line
            each).
    """
    _require(curve, "k", "match_rate")
    figure, axes = new_figure()
    ax = axes[0, 0]
    labels = curve["label"] if "label" in curve else ["match rate"] * len(curve)
    for color, (label, part) in zip(itertools.cycle(COLORS), curve.groupby(np.asarray(labels), sort=False)):
        ax.plot(part["k"], 100 * part["match_rate"], "o-", ms=3, color=color, label=label)
        if {"low", "high"} <= set(part):
            ax.fill_between(part["k"], 100 * part["low"], 100 * part["high"], color=color, alpha=0.18, lw=0)
    ax.set(xlabel="samples per crystal $k$", ylabel="match rate (%)", ylim=(0, 103))
    ax.xaxis.get_major_locator().set_params(integer=True)
    if "label" in curve:
        ax.legend()
    return figure


@styled
def rmse_histogram(table: pd.DataFrame, n_bins: int = 25) -> Figure:
    """Distribution of the smallest normalised RMS displacement of the matched crystals (unitless).

    Args:
        table: one row a crystal, column ``rms_best`` (missing where nothing matched).
        n_bins: number of bins.
    """
    _require(table, "rms_best")
    rmse = table["rms_best"].dropna()
    figure, axes = new_figure()
    ax = axes[0, 0]
    ax.hist(rmse, bins=n_bins, range=(0, max(0.5, rmse.max() if len(rmse) else 0)), color=COLORS[0], edgecolor="white")
    if len(rmse):
        ax.axvline(rmse.mean(), color=COLORS[1], label=f"mean {rmse.mean():.3f}")
        ax.legend()
    ax.set(
        xlabel="normalised RMS displacement (unitless)", ylabel="crystals", title=f"{len(rmse)} of {len(table)} matched"
    )
    return figure


@styled
def energy_comparison(
    reference_energy: Sequence[float], sample_energy: Sequence[float], matched: Sequence[bool] | None = None
) -> Figure:
    """Energy of a sample against that of its reference crystal; below the diagonal the model prefers the sample.

    Args:
        reference_energy, sample_energy: (n,), dimensionless, pair by pair.
        matched: (n,), whether the sample matches the reference.
    """
    reference, sample = np.asarray(reference_energy, float), np.asarray(sample_energy, float)
    if reference.shape != sample.shape or not reference.size:
        raise ValueError(f"sample_energy has shape {sample.shape}, expected that of reference_energy {reference.shape}")
    figure, axes = new_figure(size=(3.2, 3.0))
    ax = axes[0, 0]
    groups = {"samples": np.ones(len(sample), bool)}
    if matched is not None:
        groups = {"match": np.asarray(matched, bool), "no match": ~np.asarray(matched, bool)}
    size = min(12, max(1.5, 6000 / len(sample)))
    for color, (label, chosen) in reversed(list(zip(COLORS, groups.items()))):  # matches on top: mostly the fewer
        ax.scatter(reference[chosen], sample[chosen], s=size, color=color, alpha=0.6, lw=0, label=label)
    ends = np.nanmin([reference, sample]), np.nanmax([reference, sample])
    ax.plot(ends, ends, color="0.3", lw=0.8, ls="--")
    ax.set(xlabel="reference energy (dimensionless)", ylabel="sample energy (dimensionless)")
    if matched is not None:
        ax.legend(markerscale=math.sqrt(12 / size))
    return figure


@styled
def continuity_figure(profiles: Mapping[str, ContinuityProfile]) -> Figure:
    """Largest energy change against the size δ of a displacement, log-log: a continuous energy falls, a jump stays.

    Args:
        profiles: for each line its label, and arrays ``.delta`` (Å; only its size is drawn) and ``.change`` (|ΔE|).
    """
    figure, axes = new_figure(size=(3.8, 2.9))
    ax = axes[0, 0]
    for color, (label, profile) in zip(itertools.cycle(COLORS), profiles.items()):
        delta, change = np.abs(profile.delta), np.asarray(profile.change)
        order = np.argsort(delta)
        order = order[change[order] > 0]  # a change of exactly 0 has no place on a log axis
        ax.loglog(delta[order], change[order], "o-", ms=3, color=color, label=label)
    ax.set(xlabel="displacement δ (Å)", ylabel="max |ΔE| (dimensionless)")
    ax.legend()
    return figure


@styled
def energy_profile(profiles: Mapping[str, ContinuityProfile]) -> Figure:
    """Energy along a path through δ = 0, one panel each: a jump at 0 shows as a broken curve.

    Args:
        profiles: for each panel its title, and arrays ``.delta`` (Å) and ``.energy``.
    """
    figure, axes = new_figure(1, len(profiles), size=(2.9, 2.4))
    for ax, color, (title, profile) in zip(axes[0], itertools.cycle(COLORS), profiles.items()):
        delta, energy = np.asarray(profile.delta), np.asarray(profile.energy)
        for side in (delta < 0, delta > 0):
            ax.plot(delta[side], energy[side], ".-", ms=3, color=color)
        ax.axvline(0, color="0.3", lw=0.8, ls="--")
        ax.set(title=title, xlabel="displacement δ (Å)")
        ax.ticklabel_format(axis="y", useOffset=False)
    axes[0, 0].set_ylabel(ENERGY)
    return figure


def save_figure(figure: Figure, path: str | Path, parameters: dict[str, Any]) -> Path:
    """Write a figure as PNG, and beside it a JSON file with the parameters that made it.

    Args:
        figure: a matplotlib figure.
        path: where to; must end in ``.png``. Folders are made.
        parameters: what a reader needs to make it again (data set, seed, checkpoint, …); values that JSON does not
            know are written as text.

    Returns:
        The path of the picture.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})  # no version stamp: same picture, same bytes
    path.with_suffix(".json").write_text(json.dumps(parameters, indent=2, sort_keys=True, default=str) + "\n")
    return path
