"""What do the results look like? The style of all figures, how they are saved, and crystals drawn; nothing is shown.

Lengths are in Å; the learned energy is dimensionless.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline
    from pymatgen.core import Structure

COLORS = ("#1f6f8b", "#d1603d", "#5a8f3c", "#8a5a9e", "#c99a2e", "#555555")
STYLE: dict[Any, Any] = {"axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": 10}
STYLE |= {"figure.constrained_layout.use": True, "figure.dpi": 110, "font.size": 9, "grid.alpha": 0.25}
STYLE |= {"legend.frameon": False, "lines.linewidth": 1.4}
ENERGY = "energy $E$ (dimensionless)"
BOUNDARY = 1e-2  # fractional distance to a face below which an atom is repeated on the opposite face
BOND_REACH = 1.15  # of the sum of the covalent radii
RADIUS_SCALE = 0.45  # of the covalent radius: spheres that show the arrangement without touching
SHADES = np.linspace(0.0, 1.0, 12)
HULL_OPACITY, HULL_ATOMS = 0.45, (4, 6)  # more bonds than six make hulls that hide what is near
PIECES = 12  # into which a line is cut, so that each passes before or behind the right atoms


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE), plt.ioff():
        yield


styled = _style()  # a decorator: the style holds while drawing only, the caller's own settings stay as they were


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
    index: np.ndarray  # type: ignore[assignment]  # (n_drawn,), the atom that each is an image of; hides tuple.index
    numbers: np.ndarray  # (n_drawn,), atomic numbers
    bonds: np.ndarray  # (n_bonds, 2), pairs of drawn atoms
    edges: np.ndarray  # (12, 2, 3), ends of the edges of the cell
    faces: list[tuple[int, np.ndarray]]  # of polyhedra: the drawn atom inside, and the corners (3, 3) of a triangle


def lay_out(structure: Structure, boundary: float = BOUNDARY, polyhedra: bool = False, **direction: float) -> Drawing:
    """The cell with the atoms on its boundary repeated, seen from a ``direction`` of :func:`view_rotation`.

    With ``polyhedra``, the hulls of :func:`coordination_shells`, and their corners outside the cell.
    """
    from scipy.spatial import ConvexHull

    rotated = structure.lattice.matrix @ view_rotation(structure.lattice.matrix, **direction)
    frac_coords, index = boundary_atoms(structure, boundary)
    shells = coordination_shells(structure) if polyhedra else {}
    hulls = {atom: frac_coords[atom] + shells[own][1] for atom, own in enumerate(index) if own in shells}
    drawn = [*zip(frac_coords, index), *(c for atom in hulls for c in zip(hulls[atom], shells[index[atom]][0]))]
    frac_coords, index = map(np.array, zip(*{(c[1], *np.round(c[0], 3)): c for c in drawn}.values()))  # each once
    numbers, positions = np.array(structure.atomic_numbers)[index], frac_coords @ rotated
    ends = [[np.insert(c, axis, end) for end in (0, 1)] for axis in range(3) for c in np.ndindex(2, 2)]
    triangles = {atom: ConvexHull(hull, qhull_options="QJ").simplices for atom, hull in hulls.items()}  # QJ: if flat
    faces = [(atom, corners @ rotated) for atom, hull in hulls.items() for corners in hull[triangles[atom]]]
    return Drawing(positions, index, numbers, find_bonds(positions, numbers), np.array(ends) @ rotated, faces)


def boundary_atoms(structure: Structure, boundary: float = BOUNDARY) -> tuple[np.ndarray, np.ndarray]:
    """Atoms to draw in a cell: those inside, and the images of those (nearly) on a face, an edge or a corner.

    Fractional coordinates (n_drawn, 3), and the index (n_drawn,) of the atom that each is an image of.
    """
    wrapped = structure.frac_coords % 1.0
    wrapped[wrapped > 1.0 - boundary] -= 1.0
    shifts = [itertools.product(*((0, 1) if abs(x) < boundary else (0,) for x in frac)) for frac in wrapped]
    index, images = zip(*((atom, wrapped[atom] + shift) for atom, own in enumerate(shifts) for shift in own))
    return np.array(images), np.array(index)


def find_bonds(positions: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """(n_bonds, 2) pairs of atoms nearer than 1.15 times the sum of their covalent radii.

    Beside a non-metal, two metals are not bonded: their radii are those of the bulk metal, far too large for a cation.
    """
    from ase.data import covalent_radii

    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    radii, metal = covalent_radii[numbers], is_cation(numbers)
    return np.argwhere(np.triu((distance < BOND_REACH * (radii[:, None] + radii)) & ~(metal[:, None] & metal), 1))


def is_cation(numbers: np.ndarray) -> np.ndarray:
    """Which atoms are metals beside a non-metal, (n,)."""
    from pymatgen.core import Element

    metal = np.array([Element.from_Z(number).is_metal for number in numbers])
    return metal & ~metal.all()


def coordination_shells(structure: Structure) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Of each atom with four to six bonds, all to atoms that attract electrons more, to which ones, and where they are.

    Indices (n,), and vectors from the atom (n, 3) in fractional coordinates.
    """
    from ase.data import covalent_radii
    from ase.neighborlist import primitive_neighbor_list

    numbers, cell, pbc = np.array(structure.atomic_numbers), structure.lattice.matrix, structure.pbc
    radii, cation = BOND_REACH * covalent_radii[numbers], is_cation(numbers)
    first, second, vectors = primitive_neighbor_list("ijD", pbc, cell, structure.cart_coords, radii)
    with warnings.catch_warnings(action="ignore"):  # of noble gases, which have no electronegativity
        attraction = np.array([site.specie.X for site in structure])
    shells = {}
    for atom in range(len(structure)):
        own = (first == atom) & ~(cation[first] & cation[second])
        if HULL_ATOMS[0] <= own.sum() <= HULL_ATOMS[1] and attraction[atom] < attraction[second[own]].min():
            shells[atom] = second[own], structure.lattice.get_fractional_coords(vectors[own])
    return shells


def view_rotation(cell: np.ndarray, azimuth: float = 24.0, elevation: float = 18.0) -> np.ndarray:
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
    from matplotlib.path import Path as Outline

    marks = [mark for start, stop in drawing.edges for mark in _line(start, stop, "0.3", 0.9)]
    for atom, corners in drawing.faces:
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        color = (0.5 + 0.5 * abs(normal[2]) / np.linalg.norm(normal)) * jmol_colors[drawing.numbers[atom]]
        outline = Outline(corners[[0, 1, 2, 0], :2])
        marks.append(Mark(corners[:, 2].mean(), outline, (*color, HULL_OPACITY), "none", 0.0))
    for first, second in drawing.bonds:
        ends = drawing.positions[[first, second]]
        for atom, end in zip((first, second), ends):
            marks += _line(end, ends.mean(axis=0), tuple(0.85 * jmol_colors[drawing.numbers[atom]]), 2.5)
    for position, number in zip(drawing.positions, drawing.numbers):
        marks += _sphere(position, RADIUS_SCALE * covalent_radii[number], jmol_colors[number])
    return sorted(marks, key=lambda mark: mark.depth)


@styled
def draw_crystal(
    structure: Structure, ax: Axes | None = None, title: str | None = None, polyhedra: bool = False, **direction: float
) -> Figure:
    """Still picture of a crystal: the cell, its atoms and their images on the boundary in Jmol's colours, and bonds.

    Args:
        structure: an ordered pymatgen structure.
        ax: axes to draw into; a new figure if not given.
        title: text above the picture; the formula if not given, nothing if empty.
        polyhedra: fill coordination polyhedra, with their corners outside the cell.
        direction: ``azimuth`` and ``elevation`` of the view, degrees; ``boundary`` of :func:`lay_out`.
    """
    from ase.data.colors import jmol_colors
    from matplotlib.collections import PathCollection

    ax, drawing = ax or new_figure(size=(3.0, 3.0))[1][0, 0], lay_out(structure, polyhedra=polyhedra, **direction)
    _, paths, faces, edges, widths = zip(*crystal_marks(drawing))
    strokes = PathCollection(paths, facecolors=faces, edgecolors=edges, linewidths=widths, capstyle="round")
    ax.add_collection(strokes)
    marker: dict[str, Any] = {"marker": "o", "ls": "none", "ms": 7, "mec": "0.25", "mew": 0.5}
    for symbol, number in {site.specie.symbol: site.specie.Z for site in structure}.items():
        ax.plot([], [], mfc=jmol_colors[number], label=symbol, **marker)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=6, handletextpad=0.1, columnspacing=1)
    counts = structure.composition.get_el_amt_dict()
    formula = "".join(f"{symbol}$_{{{n:g}}}$" if n != 1 else symbol for symbol, n in counts.items())
    ax.set_title(formula if title is None else title)
    ax.set_aspect("equal", adjustable="datalim")
    ax.autoscale_view()
    ax.axis("off")
    return cast("Figure", ax.figure)


@styled
def draw_crystals(
    structures: Sequence[Structure], titles: Sequence[str] | None = None, n_columns: int = 4, polyhedra: bool = False
) -> Figure:
    """Still pictures of several crystals on a grid; ``titles`` replace the formulas."""
    if not len(structures):
        raise ValueError("structures is empty, expected at least one structure")
    if titles is not None and len(titles) != len(structures):
        raise ValueError(f"titles has {len(titles)} entries, expected one for each of the {len(structures)} structures")
    n_columns = min(n_columns, len(structures))
    figure, axes = new_figure(-(-len(structures) // n_columns), n_columns, size=(2.5, 2.7))
    for ax, structure, title in itertools.zip_longest(axes.flat, structures, titles or []):
        draw_crystal(structure, ax, title, polyhedra) if structure else ax.axis("off")
    return figure


def save_figure(figure: Figure, path: str | Path, parameters: dict[str, Any]) -> Path:
    """Write a figure to a path that ends in ``.png`` (folders are made), and its parameters beside it as JSON."""
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})  # no version stamp: same picture, same bytes
    path.with_suffix(".json").write_text(json.dumps(parameters, indent=2, sort_keys=True, default=str) + "\n")
    return path
