"""Figures that one notebook each shows; what is drawn comes as a table, and nothing is shown or saved here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
    ("log(1 + exp(N ΔE)) of pairs", {"contrast": "contrast"}),
    ("wrong structures told apart", {"told_apart": "share"}),
    ("acceptance rate", {"acceptance_rate": "acceptance rate"}),
    ("gradient norm", {"gradient_norm": "gradient norm"}),
)


@styled
def training_curves(history: pd.DataFrame, smooth: int = 1) -> Figure:
    """One panel for each quantity of ``TRAINING_PANELS`` in ``history``, against ``update`` (or the row index).

    Args:
        history: one row an update.
        smooth: window of the running mean, in updates; the raw curve stays visible behind it.
    """
    panels = [(title, {c: t for c, t in columns.items() if c in history}) for title, columns in TRAINING_PANELS]
    panels = [(title, columns) for title, columns in panels if columns]
    step = history.get("update", history.index)
    n_columns = min(3, len(panels))
    figure, axes = new_figure(-(-len(panels) // n_columns), n_columns, size=(3.0, 2.2))
    for ax, (title, columns) in itertools.zip_longest(axes.flat, panels, fillvalue=("", {})):
        for color, (column, label) in zip(COLORS, columns.items()):
            ax.plot(step, history[column], color=color, alpha=0.3 if smooth > 1 else 1, lw=1)
            ax.plot(step, history[column].rolling(smooth, min_periods=1).mean(), color=color, label=label)
        ax.set(xlabel="update", title=title)
        if "acceptance_rate" in columns:
            ax.set_ylim(0, 1)
        if len(columns) > 1:
            ax.margins(y=0.3)
            ax.legend(loc="upper right", ncols=len(columns), columnspacing=1, handlelength=1)
        ax.axis("on" if columns else "off")
    return figure


@styled
def match_rate_figure(curve: pd.DataFrame) -> Figure:
    """Match rate against the number of samples k.

    Args:
        curve: columns ``label`` (of a line), ``k``, ``match_rate`` (0 … 1) and its interval, ``low`` and ``high``.
    """
    figure, ((ax,),) = new_figure()
    for color, (label, part) in zip(itertools.cycle(COLORS), curve.groupby("label", sort=False)):
        ax.plot(part["k"], 100 * part["match_rate"], "o-", ms=3, color=color, label=label)
        ax.fill_between(part["k"], 100 * part["low"], 100 * part["high"], color=color, alpha=0.18, lw=0)
    ax.set(xlabel="samples per crystal $k$", ylabel="match rate (%)", ylim=(0, 103))
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    return figure


@styled
def rmse_histogram(table: pd.DataFrame, n_bins: int = 25) -> Figure:
    """Smallest normalised RMS displacement of each crystal, column ``rms_best`` (missing where nothing matched)."""
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
    reference_energy: Sequence[float], sample_energy: Sequence[float], matched: Sequence[bool]
) -> Figure:
    """Energy of a sample against that of its reference crystal; below the diagonal the model prefers the sample.

    Samples far out of the references' range are drawn at the edge.

    Args:
        reference_energy, sample_energy: (n,), dimensionless, pair by pair.
        matched: (n,), whether the sample matches the reference.
    """
    reference, sample = np.asarray(reference_energy, float), np.asarray(sample_energy, float)
    figure, ((ax,),) = new_figure(size=(3.2, 3.0))
    match = np.asarray(matched, bool)
    size = min(12, max(1.5, 6000 / len(sample)))
    low, high = np.nanmin(reference), np.nanmax(reference)
    ends = low - (room := 0.5 * (high - low) + 1), high + room
    sample = sample.clip(*ends)  # NaN stays
    for color, label, chosen in ((COLORS[1], "no match", ~match), (COLORS[0], "match", match)):  # matches on top
        if chosen.any():
            ax.scatter(reference[chosen], sample[chosen], s=size, color=color, alpha=0.6, lw=0, label=label)
    ax.plot(ends, ends, color="0.3", lw=0.8, ls="--")
    ax.set(xlabel="reference energy (dimensionless)", ylabel="sample energy (dimensionless)", ylim=ends)
    ax.legend(markerscale=math.sqrt(12 / size))
    return figure
