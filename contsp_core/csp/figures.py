"""Figures: every function takes tables or structures, returns a figure, and neither shows nor saves it.

Lengths are in Å; the learned energy is dimensionless. Matplotlib draws what is kept as an image; plotly is used where
pointing at a mark tells more than a still picture; nglview draws crystals in a live notebook.
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
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path
    from pymatgen.core import Structure

    from contsp_core.invariance import ContinuityProfile


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
BOUNDARY = 1e-2  # fractional distance to a face below which an atom is repeated on the opposite face
SHADES = np.linspace(0.0, 1.0, 12)
EDGE_PIECES = 24
RADIUS_SCALE = 0.45  # of the covalent radius: spheres that show the arrangement without touching


class Mark(NamedTuple):
    """One stroke of a picture: a path painted after all that lie deeper (depth grows towards the viewer, Å)."""

    depth: float
    path: Path
    face: tuple[float, ...] | str
    line_width: float


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


def _formula(structure: Structure) -> str:
    """Formula of the cell's content with subscripts, as matplotlib text."""
    counts = structure.composition.get_el_amt_dict()
    return "".join(f"{symbol}$_{{{int(n)}}}$" if n != 1 else symbol for symbol, n in counts.items())


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


def view_rotation(cell: np.ndarray, azimuth: float = 20.0, elevation: float = 14.0) -> np.ndarray:
    """Proper rotation R (3, 3) that turns Cartesian row vectors r into screen axes (right, up, towards the viewer).

    The first lattice vector starts to the right and the third one up; then the crystal turns by ``azimuth`` about
    the vertical and is seen from ``elevation`` above (degrees). Use as ``r @ R``.
    """
    x = cell[0] / np.linalg.norm(cell[0])
    z = np.cross(cell[0], cell[1]) * np.sign(np.linalg.det(cell))
    z /= np.linalg.norm(z)
    y = np.cross(z, x)
    standard = np.stack([x, y, z], axis=1)
    turn, tilt = np.radians([azimuth, elevation])
    spin = np.array([[np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    screen = np.array([[1, 0, 0], [0, np.sin(tilt), -np.cos(tilt)], [0, np.cos(tilt), np.sin(tilt)]])
    return standard @ spin @ screen


def _sphere(center: np.ndarray, radius: float, color: np.ndarray) -> Iterator[Mark]:
    """A lit sphere: discs that shrink and whiten towards a highlight; ``center`` holds right, up and depth."""
    from matplotlib.path import Path

    for shade in SHADES:
        middle = center[:2] + radius * 0.32 * shade * np.array([-1.0, 1.0])
        face = np.clip(color * (0.78 + 0.22 * shade), 0, 1)
        face = face + (1 - face) * 0.65 * shade**3
        disc = Path.circle(tuple(middle), radius * (1 - 0.88 * shade))
        yield Mark(center[2] + radius, disc, tuple(face), 0.5 if shade == 0 else 0.0)


def _cell_edges(cell: np.ndarray, rotation: np.ndarray) -> Iterator[Mark]:
    """The twelve edges, cut in pieces so that each piece hides behind, or passes before, the right atoms."""
    from matplotlib.path import Path

    for axis, corner in itertools.product(range(3), itertools.product((0.0, 1.0), repeat=2)):
        ends = np.insert(corner, axis, 0.0), np.insert(corner, axis, 1.0)
        along = np.linspace(*ends, EDGE_PIECES + 1) @ cell @ rotation
        for start, stop in itertools.pairwise(along):
            yield Mark((start[2] + stop[2]) / 2, Path([start[:2], stop[:2]]), "none", 0.9)


def crystal_marks(structure: Structure, azimuth: float = 20.0, elevation: float = 14.0) -> list[Mark]:
    """What a picture of a crystal is made of, from back to front; lengths in Å, directions of view in degrees."""
    from ase.data import covalent_radii
    from ase.data.colors import jmol_colors

    cell = structure.lattice.matrix
    rotation = view_rotation(cell, azimuth, elevation)
    frac_coords, index = boundary_atoms(structure)
    marks = list(_cell_edges(cell, rotation))
    for position, number in zip(frac_coords @ cell @ rotation, np.array(structure.atomic_numbers)[index]):
        marks += _sphere(position, RADIUS_SCALE * covalent_radii[number], jmol_colors[number])
    return sorted(marks, key=lambda mark: mark.depth)


@styled
def draw_crystal(
    structure: Structure,
    ax: Axes | None = None,
    title: str | None = None,
    azimuth: float = 20.0,
    elevation: float = 14.0,
) -> Figure:
    """Still picture of a crystal: the unit cell, its atoms and their images on the boundary, in Jmol colours.

    Args:
        structure: an ordered pymatgen structure.
        ax: axes to draw into; a new figure if not given.
        title: text above the picture; the formula if not given, nothing if empty.
        azimuth, elevation: direction of view, degrees.
    """
    from ase.data.colors import jmol_colors
    from matplotlib.collections import PathCollection

    if ax is None:
        ax = new_figure(size=(3.0, 3.0))[1][0, 0]
    _, paths, faces, widths = zip(*crystal_marks(structure, azimuth, elevation))
    ax.add_collection(PathCollection(paths, facecolors=faces, edgecolors="0.3", linewidths=widths))
    symbols = {site.specie.symbol: site.specie.Z for site in structure}
    handles = [
        ax.plot([], [], "o", ms=7, mfc=jmol_colors[z], mec="0.25", mew=0.5, label=symbol)[0]
        for symbol, z in symbols.items()
    ]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=6, handletextpad=0.1, columnspacing=1
    )
    ax.set_title(_formula(structure) if title is None else title)
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
    for index, ax in enumerate(axes.flat):
        if index < len(structures):
            draw_crystal(structures[index], ax, None if titles is None else titles[index])
        else:
            ax.axis("off")
    return figure


def view_crystal(structure: Structure, size: str = "320px") -> Any:
    """Crystal to turn by hand: an nglview widget with the unit cell drawn, or the still picture without nglview.

    A widget needs a live browser and is lost on a static page: put :func:`draw_crystal` beside it.
    """
    try:
        import nglview
        from pymatgen.io.ase import AseAtomsAdaptor
    except ImportError:
        return draw_crystal(structure)
    frac_coords, index = boundary_atoms(structure)
    species = [structure[int(atom)].specie for atom in index]
    # The drawn images are atoms of their own here: nglview shows what it is given and repeats nothing.
    drawn = type(structure)(structure.lattice, species, frac_coords, validate_proximity=False)
    view = nglview.show_ase(AseAtomsAdaptor.get_atoms(drawn, msonable=False), default_representation=False)
    view.add_representation("spacefill", radiusType="covalent", radiusScale=0.5)
    view.add_unitcell()
    view.camera = "orthographic"
    view.layout.width = view.layout.height = size
    return view


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
