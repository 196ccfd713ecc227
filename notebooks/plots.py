"""Figures that one notebook each shows; what is drawn comes as a table, and nothing is shown or saved here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from contsp_core.csp.figures import COLORS, ENERGY, new_figure, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


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
    """One panel for each quantity of ``TRAINING_PANELS`` in ``history``, against ``update`` (or the row index).

    Args:
        history: one row an update.
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
    for ax, (title, columns) in itertools.zip_longest(axes.flat, panels, fillvalue=("", {})):
        for color, (column, label) in zip(COLORS, columns.items()):
            ax.plot(step, history[column], color=color, alpha=0.3 if smooth > 1 else 1, lw=1)
            ax.plot(step, history[column].rolling(smooth, min_periods=1).mean(), color=color, label=label)
        ax.set(xlabel="update", title=title, ylim=(0, 1) if "acceptance_rate" in columns else None)
        if len(columns) > 1:
            ax.legend()
        ax.axis("on" if columns else "off")
    return figure


@styled
def displacement_energy(table: pd.DataFrame) -> Figure:
    """Energy against the displacement of one atom of a stable crystal (paper, Figure 2): one row a data set.

    Args:
        table: columns ``dataset``, ``material`` (one panel each), ``displacement`` (its length, Å), ``energy``; a row
            with displacement 0 marks the undisturbed crystal.
    """
    _require(table, "dataset", "material", "displacement", "energy")
    rows = [(name, list(part.groupby("material", sort=False))) for name, part in table.groupby("dataset", sort=False)]
    figure, axes = new_figure(len(rows), max(len(crystals) for _, crystals in rows), size=(2.5, 2.1))
    for (dataset, crystals), row, color in zip(rows, axes, itertools.cycle(COLORS)):
        for (material, part), ax in zip(crystals, row):
            ax.scatter(part["displacement"], part["energy"], s=5, color=color, alpha=0.45, lw=0, rasterized=True)
            for energy in part.loc[part["displacement"] == 0, "energy"].head(1):
                ax.axhline(energy, color="0.3", lw=0.8, ls="--")
            ax.set(title=material, xlim=(0, None), xlabel="|displacement| (Å)")
            ax.ticklabel_format(axis="y", useOffset=False)
        for ax in row[len(crystals) :]:
            ax.axis("off")
        row[0].set_ylabel(f"{dataset}\n{ENERGY}")
    return figure


@styled
def match_rate_figure(curve: pd.DataFrame) -> Figure:
    """Match rate against the number of samples k.

    Args:
        curve: columns ``k``, ``match_rate`` (0 … 1); optionally ``low``, ``high`` (interval), ``label`` (of a line).
    """
    _require(curve, "k", "match_rate")
    figure, ((ax,),) = new_figure()
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
    """Smallest normalised RMS displacement of each crystal, column ``rms_best`` (missing where nothing matched)."""
    _require(table, "rms_best")
    rmse = table["rms_best"].dropna()
    figure, ((ax,),) = new_figure()
    ax.hist(rmse, bins=n_bins, range=(0, max([0.5, *rmse])), color=COLORS[0], edgecolor="white")
    if len(rmse):
        ax.axvline(rmse.mean(), color=COLORS[1], label=f"mean {rmse.mean():.3f}")
        ax.legend()
    ax.set(xlabel="normalised RMS displacement (unitless)", ylabel="crystals")
    ax.set_title(f"{len(rmse)} of {len(table)} matched")
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
    figure, ((ax,),) = new_figure(size=(3.2, 3.0))
    match = np.ones(len(sample), bool) if matched is None else np.asarray(matched, bool)
    size = min(12, max(1.5, 6000 / len(sample)))
    for color, label, chosen in ((COLORS[1], "no match", ~match), (COLORS[0], "match", match)):  # matches on top
        if chosen.any():
            ax.scatter(reference[chosen], sample[chosen], s=size, color=color, alpha=0.6, lw=0, label=label)
    ends = np.nanmin([reference, sample]), np.nanmax([reference, sample])
    ax.plot(ends, ends, color="0.3", lw=0.8, ls="--")
    ax.set(xlabel="reference energy (dimensionless)", ylabel="sample energy (dimensionless)")
    if matched is not None:
        ax.legend(markerscale=math.sqrt(12 / size))
    return figure


@styled
def continuity_figure(profiles: Mapping[str, pd.DataFrame]) -> Figure:
    """Largest energy change against the size δ of a displacement, log-log: a continuous energy falls, a jump stays.

    Args:
        profiles: for each line its label, and arrays ``.delta`` (Å; only its size is drawn) and ``.change`` (|ΔE|).
    """
    figure, ((ax,),) = new_figure(size=(3.8, 2.9))
    for color, (label, profile) in zip(itertools.cycle(COLORS), profiles.items()):
        delta, change = np.abs(profile.delta), np.asarray(profile.change)
        order = np.argsort(delta)
        order = order[change[order] > 0]  # a change of exactly 0 has no place on a log axis
        ax.loglog(delta[order], change[order], "o-", ms=3, color=color, label=label)
    ax.set(xlabel="displacement δ (Å)", ylabel="max |ΔE| (dimensionless)")
    ax.legend()
    return figure


@styled
def energy_profile(profiles: Mapping[str, pd.DataFrame]) -> Figure:
    """Energy along a path through δ = 0, one panel for each title: a jump at 0 shows as a broken curve."""
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
