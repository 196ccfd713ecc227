"""Pictures of crystals, and the style that all figures share.

A static picture is drawn in matplotlib without further help: atoms and cell edges are turned into view and painted
from back to front. nglview gives the one to turn by hand.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path
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
