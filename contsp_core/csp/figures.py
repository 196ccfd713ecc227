"""What do the results look like? Every function takes tables or structures and returns a figure; none shows it.

Lengths are in Å; the learned energy is dimensionless.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline
    from pymatgen.core import Structure


COLORS = ("#1f6f8b", "#d1603d", "#5a8f3c", "#8a5a9e", "#c99a2e", "#555555")
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 110,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}
ENERGY = "energy $E$ (dimensionless)"
BOUNDARY = 1e-2  # fractional distance to a face below which an atom is repeated on the opposite face
BOND_REACH = 1.15  # of the sum of the covalent radii
RADIUS_SCALE = 0.45  # of the covalent radius: spheres that show the arrangement without touching
SHADES = np.linspace(0.0, 1.0, 12)
PIECES = 24  # into which a line is cut, so that each passes before or behind the right atoms


def styled(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Apply the common style while drawing only, so that the caller's own settings stay as they were."""

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        import matplotlib.pyplot as plt

        with plt.rc_context(STYLE), plt.ioff():
            return draw(*args, **kwargs)

    return wrapper


def new_figure(
    n_rows: int = 1, n_columns: int = 1, size: tuple[float, float] = (3.4, 2.6)
) -> tuple[Figure, np.ndarray]:
    """A figure and its (n_rows, n_columns) axes; ``size`` is that of one panel in inches."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(n_rows, n_columns, figsize=(size[0] * n_columns, size[1] * n_rows), squeeze=False)
    plt.close(figure)  # forget it in pyplot: a notebook would otherwise show it twice
    return figure, axes


class Drawing(NamedTuple):
    """What a picture of a crystal holds, still or turning. Axes: right, up, towards the viewer; Å."""

    positions: np.ndarray  # (n_drawn, 3), the atoms of the cell and their images on its boundary
    index: np.ndarray  # (n_drawn,), the atom that each is an image of
    numbers: np.ndarray  # (n_drawn,), atomic numbers
    bonds: np.ndarray  # (n_bonds, 2), pairs of drawn atoms
    edges: np.ndarray  # (12, 2, 3), ends of the edges of the cell


def lay_out(structure: Structure, azimuth: float = 24.0, elevation: float = 18.0) -> Drawing:
    """The cell with the atoms on its boundary repeated, seen from a direction (degrees, see :func:`view_rotation`)."""
    rotated = structure.lattice.matrix @ view_rotation(structure.lattice.matrix, azimuth, elevation)
    frac_coords, index = boundary_atoms(structure)
    numbers, positions = np.array(structure.atomic_numbers)[index], frac_coords @ rotated
    corners = [[np.insert(c, axis, end) for end in (0, 1)] for axis in range(3) for c in np.ndindex(2, 2)]
    return Drawing(positions, index, numbers, find_bonds(positions, numbers), np.array(corners) @ rotated)


def boundary_atoms(structure: Structure) -> tuple[np.ndarray, np.ndarray]:
    """Atoms to draw in a cell: those inside, and the images of those on a face, an edge or a corner.

    Returns:
        frac_coords (n_drawn, 3), and the index (n_drawn,) of the atom that each is an image of.
    """
    wrapped = structure.frac_coords % 1.0
    wrapped[wrapped > 1.0 - BOUNDARY] -= 1.0
    frac_coords, index = [], []
    for atom, frac in enumerate(wrapped):
        for shift in itertools.product(*((0, 1) if abs(x) < BOUNDARY else (0,) for x in frac)):
            frac_coords.append(frac + shift)
            index.append(atom)
    return np.array(frac_coords), np.array(index)


def find_bonds(positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(n_bonds, 2) pairs of atoms nearer than 1.15 times the sum of their covalent radii.

    Beside a non-metal, two metals are not bonded: their radii are those of the bulk metal, far too large for a cation.
    """
    from ase.data import chemical_symbols, covalent_radii
    from pymatgen.core import Element

    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii = covalent_radii[numbers]
    metal = np.array([Element(chemical_symbols[number]).is_metal for number in numbers])
    bonded = distance < BOND_REACH * (radii[:, None] + radii)
    if not metal.all():
        bonded &= ~(metal[:, None] & metal)
    return np.argwhere(np.triu(bonded, 1))


def view_rotation(cell: np.ndarray, azimuth: float, elevation: float) -> np.ndarray:
    """Proper rotation R (3, 3) that turns Cartesian row vectors r into screen axes (right, up, towards the viewer).

    The first lattice vector starts to the right and the third one up; then the crystal turns by ``azimuth`` about
    the vertical and is seen from ``elevation`` above (degrees). Use as ``r @ R``.
    """
    x = cell[0] / np.linalg.norm(cell[0])
    z = np.cross(cell[0], cell[1]) * np.sign(np.linalg.det(cell))
    z /= np.linalg.norm(z)
    standard = np.stack([x, np.cross(z, x), z], axis=1)
    turn, tilt = np.radians([azimuth, elevation])
    spin = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    screen = np.array([[1, 0, 0], [0, np.sin(tilt), -np.cos(tilt)], [0, np.cos(tilt), np.sin(tilt)]])
    return standard @ spin @ screen


class Mark(NamedTuple):
    """One stroke of a picture: a path painted after all that lie deeper (depth grows towards the viewer, Å)."""

    depth: float
    path: Outline
    face: Any
    edge: Any
    line_width: float


def _sphere(center: np.ndarray, radius: float, color: np.ndarray) -> Iterator[Mark]:
    """A lit sphere: discs that shrink and whiten towards a highlight; ``center`` holds right, up and depth."""
    from matplotlib.path import Path as Outline

    for shade in SHADES:
        middle = center[:2] + radius * 0.32 * shade * np.array([-1.0, 1.0])
        face = np.clip(color * (0.78 + 0.22 * shade), 0, 1)
        face = face + (1 - face) * 0.65 * shade**3
        disc = Outline.circle(tuple(middle), radius * (1 - 0.88 * shade))
        yield Mark(center[2] + radius, disc, tuple(face), "0.3", 0.5 if shade == 0 else 0.0)


def _line(start: np.ndarray, stop: np.ndarray, color: Any, width: float) -> Iterator[Mark]:
    from matplotlib.path import Path as Outline

    for first, second in itertools.pairwise(np.linspace(start, stop, PIECES + 1)):
        yield Mark((first[2] + second[2]) / 2, Outline([first[:2], second[:2]]), "none", color, width)


def crystal_marks(drawing: Drawing) -> list[Mark]:
    """What a still picture of a crystal is made of, from back to front."""
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors

    marks = [mark for ends in drawing.edges for mark in _line(*ends, "0.3", 0.9)]
    for first, second in drawing.bonds:
        ends = drawing.positions[[first, second]]
        for atom, end in zip((first, second), ends):
            marks += _line(end, ends.mean(axis=0), tuple(0.85 * jmol_colors[drawing.numbers[atom]]), 2.5)
    for position, number in zip(drawing.positions, drawing.numbers):
        marks += _sphere(position, RADIUS_SCALE * covalent_radii[number], jmol_colors[number])
    return sorted(marks, key=lambda mark: mark.depth)


@styled
def draw_crystal(structure: Structure, ax: Axes | None = None, title: str | None = None, **direction: float) -> Figure:
    """Still picture of a crystal: the cell, its atoms and their images on the boundary in Jmol's colours, and bonds.

    Args:
        structure: an ordered pymatgen structure.
        ax: axes to draw into; a new figure if not given.
        title: text above the picture; the formula if not given, nothing if empty.
        direction: ``azimuth`` and ``elevation`` of the view, degrees.
    """
    from ase.data.colors import jmol_colors
    from matplotlib.collections import PathCollection

    if ax is None:
        ax = new_figure(size=(3.0, 3.0))[1][0, 0]
    _, paths, faces, edges, widths = zip(*crystal_marks(lay_out(structure, **direction)))
    strokes = PathCollection(paths, facecolors=faces, edgecolors=edges, linewidths=widths, capstyle="round")
    ax.add_collection(strokes)
    marker = {"marker": "o", "ls": "none", "ms": 7, "mec": "0.25", "mew": 0.5}
    for symbol, number in {site.specie.symbol: site.specie.Z for site in structure}.items():
        ax.plot([], [], mfc=jmol_colors[number], label=symbol, **marker)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncols": 6}
    ax.legend(handletextpad=0.1, columnspacing=1, **below)
    counts = structure.composition.get_el_amt_dict()
    formula = "".join(f"{symbol}$_{{{n:g}}}$" if n != 1 else symbol for symbol, n in counts.items())
    ax.set_title(formula if title is None else title)
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    ax.axis("off")
    return ax.figure


@styled
def draw_crystals(structures: Sequence[Structure], titles: Sequence[str] | None = None, n_columns: int = 4) -> Figure:
    """Still pictures of several crystals on a grid; ``titles`` replace the formulas."""
    if not len(structures):
        raise ValueError("structures is empty, expected at least one structure")
    if titles is not None and len(titles) != len(structures):
        raise ValueError(f"titles has {len(titles)} entries, expected one for each of the {len(structures)} structures")
    n_columns = min(n_columns, len(structures))
    figure, axes = new_figure(-(-len(structures) // n_columns), n_columns, size=(2.5, 2.7))
    for ax, structure, title in itertools.zip_longest(axes.flat, structures, titles or []):
        draw_crystal(structure, ax, title) if structure else ax.axis("off")
    return figure


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


def save_figure(figure: Figure, path: str | Path, parameters: dict[str, Any]) -> Path:
    """Write a figure as PNG, and beside it a JSON file with the parameters that made it.

    Args:
        figure: a matplotlib figure.
        path: where to; must end in ``.png``. Folders are made.
        parameters: what is needed to make it again; values that JSON does not know are written as text.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})  # no version stamp: same picture, same bytes
    path.with_suffix(".json").write_text(json.dumps(parameters, indent=2, sort_keys=True, default=str) + "\n")
    return path
