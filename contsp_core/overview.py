"""A data set at a glance: counts, distributions, and the elements it holds on the periodic table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from contsp_core.crystals import MAX_ATOMIC_NUMBER, reduce_species
from contsp_core.drawing import COLORS, new_figure, styled
from contsp_core.split import Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def split_counts(splits: Mapping[str, Split]) -> pd.DataFrame:
    """One row a split: rows in the file, bad rows left out, crystals kept, and how many share a composition.

    Returns:
        Columns ``rows``, ``skipped``, ``crystals``, ``compositions``, ``polymorphs`` (crystals whose composition occurs
        more than once), ``elements``, ``atoms (max)``, ``official`` (whether the file is the published one).
    """
    rows = {}
    for name, split in splits.items():
        compositions = pd.Series([tuple(reduce_species(numbers).items()) for numbers in split.species])
        rows[name] = {
            "rows": len(split) + len(split.skipped),
            "skipped": len(split.skipped),
            "crystals": len(split),
            "compositions": compositions.nunique(),
            "polymorphs": int(compositions.duplicated(keep=False).sum()),
            "elements": len(np.unique(split.atomic_numbers)),
            "atoms (max)": int(split.n_atoms.max()),
            "official": "yes" if split.source.official else "no",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("split")


def crystal_table(split: Split) -> pd.DataFrame:
    """One row a crystal: ``n_atoms``, ``n_elements``, ``volume_per_atom`` (Å³), ``shape`` (longest edge / shortest)."""
    edges = np.linalg.norm(split.cell, axis=2)
    return pd.DataFrame(
        {
            "n_atoms": split.n_atoms,
            "n_elements": [len(set(numbers)) for numbers in split.species],
            "volume_per_atom": np.abs(np.linalg.det(split.cell)) / split.n_atoms,
            "shape": edges.max(axis=1) / edges.min(axis=1),
        }
    )


def element_counts(split: Split) -> np.ndarray:
    """(101,) number of crystals that hold each element, indexed by atomic number."""
    return np.bincount(np.concatenate([list(set(n)) for n in split.species]), minlength=MAX_ATOMIC_NUMBER + 1)


@styled
def distribution_figure(table: pd.DataFrame) -> Figure:
    """Histograms of a table of :func:`crystal_table`."""
    labels = {
        "n_atoms": "atoms per cell",
        "n_elements": "elements per crystal",
        "volume_per_atom": "volume per atom (Å³)",
        "shape": "longest / shortest cell edge",
    }
    figure, axes = new_figure(1, len(labels), size=(2.3, 2.1))
    for ax, color, (column, label) in zip(axes[0], COLORS, labels.items()):
        values = table[column]
        whole = column in ("n_atoms", "n_elements")
        bins = np.arange(0.5, values.max() + 1) if whole else np.linspace(values.min(), values.quantile(0.995), 31)
        ax.hist(np.clip(values, None, bins[-1]), bins, color=color, edgecolor="white", lw=0.4)
        ax.set(xlabel=label)
        ax.xaxis.get_major_locator().set_params(integer=whole)
    axes[0, 0].set_ylabel("crystals")
    return figure


@styled
def periodic_table_figure(counts: np.ndarray) -> Figure:
    """How many crystals hold each element, on the periodic table, on a logarithmic scale.

    Args:
        counts: (101,), from :func:`element_counts`.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle
    from pymatgen.core import Element

    figure, axes = new_figure(size=(8.2, 4.2))
    ax = axes[0, 0]
    norm, colors = LogNorm(1, max(2, counts.max())), colormaps["YlGnBu"]
    for number in range(1, MAX_ATOMIC_NUMBER + 1):
        element = Element.from_Z(number)
        column, row = element.group, element.row
        if 57 <= number <= 71 or number >= 89:  # lanthanoids and actinoids below the table
            column, row = 3 + (number - 57) % 32, 8.4 + (number >= 89)
        shade = float(norm(counts[number])) if counts[number] else 0.0
        face = colors(shade) if counts[number] else "0.96"
        ax.add_patch(Rectangle((column, -row), 0.94, 0.94, facecolor=face, edgecolor="0.8", lw=0.5))
        ink = "white" if shade > 0.6 else ("0.1" if counts[number] else "0.6")
        ax.text(column + 0.47, 0.58 - row, element.symbol, ha="center", va="center", color=ink, fontsize=8.5)
        if counts[number]:
            ax.text(column + 0.47, 0.22 - row, f"{counts[number]}", ha="center", va="center", color=ink, fontsize=5.5)
    ax.set(xlim=(0.9, 19.1), ylim=(-9.6, 0.1), aspect="equal")
    ax.axis("off")
    figure.colorbar(ScalarMappable(norm, colors), ax=ax, shrink=0.6, pad=0.01, label="crystals with the element")
    return figure
