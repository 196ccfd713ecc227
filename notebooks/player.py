"""What does a crystal look like from all sides, on a page without network or kernel? Painted by ``player.html``.

It holds no library: what the still pictures consist of, painted from back to front in the same way.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from contsp_core.csp.figures import BOUNDARY, HULL_OPACITY, RADIUS_SCALE, lay_out
from contsp_core.csp.views import view_crystal

if TYPE_CHECKING:
    from pymatgen.core import Structure

PAGE = Path(__file__).with_name("player.html")


def player(
    structures: Sequence[Structure],
    told: list[dict],
    film: dict,
    boundary: float,
    still: str = "",
    polyhedra: bool = False,
) -> str:
    """HTML that shows crystals of the same atoms, one at a time, to turn by hand; with a slider if there are several.

    Args:
        structures: what to draw.
        told: for each ``step``, ``energy``, ``level`` and ``acceptance``, written beneath; empty for a single one.
        film: ``title`` and, for several, ``level``, the name of that quantity.
        boundary, polyhedra: see :func:`contsp_core.csp.figures.lay_out`.
        still: HTML shown in its place where scripts are not run.
    """
    from ase.data import chemical_symbols, covalent_radii
    from ase.data.colors import jmol_colors

    numbers = list(dict.fromkeys(structures[-1].atomic_numbers))
    kinds = [
        {
            "symbol": chemical_symbols[number],
            "color": (255 * jmol_colors[number]).round().tolist(),
            "radius": RADIUS_SCALE * float(covalent_radii[number]),
        }
        for number in numbers
    ]
    frames, reach = [], 0.0
    for structure, facts in zip(structures, told):
        drawing = lay_out(structure, boundary, polyhedra)
        middle = drawing.edges.mean(axis=(0, 1))
        points = (drawing.positions - middle).round(3).tolist()
        atoms = [[numbers.index(z), int(k), *xyz] for z, k, xyz in zip(drawing.numbers, drawing.index, points)]
        edges = (drawing.edges - middle).round(3).tolist()
        ends = np.linalg.norm(drawing.positions - middle, axis=1) + RADIUS_SCALE * covalent_radii[drawing.numbers]
        reach = max(reach, ends.max(), np.linalg.norm(drawing.edges - middle, axis=-1).max())
        faces = [[atom, (corners - middle).round(3).tolist()] for atom, corners in drawing.faces]
        frames.append(facts | {"atoms": atoms, "bonds": drawing.bonds.tolist(), "edges": edges, "faces": faces})
    film = film | {"kinds": kinds, "frames": frames, "reach": float(reach), "opacity": HULL_OPACITY}
    data = json.dumps(film, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.read_text(encoding="utf-8").replace("FILM", data).replace("FALLBACK", still)


@dataclass(frozen=True)
class StaticView:
    """Shows itself at the end of a cell and in the saved page: to turn by hand, or a still picture without scripts."""

    structure: Structure

    def _repr_html_(self) -> str:
        picture = base64.b64encode(view_crystal(self.structure).bundle(live=False)["image/png"]).decode()
        film = {"title": f"crystal of {self.structure.formula}"}
        still = f'<img alt="{film["title"]}" src="data:image/png;base64,{picture}">'
        return player([self.structure], [{}], film, BOUNDARY, still, polyhedra=True)


def view_static(structure: Structure) -> StaticView:
    """A crystal to turn by hand in a notebook, live or saved, and in its HTML page, without a network."""
    return StaticView(structure)
