"""What does a crystal look like from all sides? In a live notebook a view to turn by hand, elsewhere a still one."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from contsp_core.csp.figures import HULL_OPACITY, RADIUS_SCALE, draw_crystal, lay_out

if TYPE_CHECKING:
    from pymatgen.core import Structure

WIDGET = "application/vnd.jupyter.widget-view+json"
BOND_RADIUS, EDGE_RADIUS = 0.10, 0.04  # Å
FIELD_OF_VIEW = 40.0  # of NGL's camera, degrees
TO_NGL = np.array([-1.0, 1.0, -1.0])  # NGL's camera looks along +z: its x axis points left, its z axis away


def extension_version() -> str | None:
    """Version of the nglview extension that JupyterLab loads in this environment; None if there is none."""
    from jupyter_core.paths import jupyter_path

    packages = (Path(folder) / "package.json" for folder in jupyter_path("labextensions", "nglview-js-widgets"))
    found = next(filter(Path.is_file, packages), None)
    return json.loads(found.read_text())["version"] if found else None


def import_nglview() -> ModuleType:
    """nglview, made to ask the browser for the extension that is installed.

    The package 4.0.1 asks for version 4.0 and ships 3.1.5: JupyterLab would look for a module that is not there.
    """
    from IPython.utils.capture import capture_output

    version = extension_version()
    if "nglview" not in sys.modules and version is not None:
        frontend: Any = ModuleType("nglview._frontend")  # holds the version only; read where widgets are defined
        frontend.__frontend_version__ = version
        sys.modules[frontend.__name__] = frontend
    with capture_output():  # it displays an empty widget on its first import
        import nglview

    return nglview


def crystal_shapes(structure: Structure) -> tuple[list[tuple], list[tuple], float]:
    """What NGL is to draw, centred: spheres for the atoms, cylinders for bonds and the edges of the cell.

    Returns:
        Tuples of shape, place (Å), colour, radius (Å) and the label shown by the mouse; a mesh for the hull of each of
        :func:`coordination_shells`, with corners and colours in a row each, and a label; the radius of the first, Å.
    """
    from ase.data import chemical_symbols, covalent_radii
    from ase.data.colors import jmol_colors

    drawing = lay_out(structure, polyhedra=True)
    center = drawing.edges.mean(axis=(0, 1))
    points, colors = (drawing.positions - center) * TO_NGL, jmol_colors[drawing.numbers].tolist()
    radii = RADIUS_SCALE * covalent_radii[drawing.numbers]
    names = [f"{chemical_symbols[number]} (atom {index})" for number, index in zip(drawing.numbers, drawing.index)]
    shapes: list[tuple] = [("sphere", *sphere) for sphere in zip(points.tolist(), colors, radii.tolist(), names)]
    for first, second in drawing.bonds:
        middle = ((points[first] + points[second]) / 2).tolist()
        name = f"{names[first]} – {names[second]}: {np.linalg.norm(points[first] - points[second]):.2f} Å"
        shapes += [("cylinder", points[i].tolist(), middle, colors[i], BOND_RADIUS, name) for i in (first, second)]
    for start, stop in (drawing.edges - center) * TO_NGL:
        name = f"cell: {np.linalg.norm(stop - start):.2f} Å"
        shapes.append(("cylinder", start.tolist(), stop.tolist(), [0.25] * 3, EDGE_RADIUS, name))
    corners = np.linalg.norm(drawing.edges - center, axis=-1).max()
    hulls = list[tuple]()
    for atom, faces in groupby(drawing.faces, itemgetter(0)):
        mesh = np.array([face for _, face in faces])
        reach = np.linalg.norm(np.unique(mesh.reshape(-1, 3), axis=0) - drawing.positions[atom], axis=1)
        name = f"{names[atom]}, {len(reach)} corners at {reach.min():.2f} – {reach.max():.2f} Å"
        places, shades = ((mesh - center) * TO_NGL).ravel().tolist(), np.tile(colors[atom], 3 * len(mesh)).tolist()
        hulls.append(("mesh", places, shades, list(range(3 * len(mesh))), [], name))  # normals are found by NGL
    return shapes, hulls, float(max(corners, (np.linalg.norm(points, axis=1) + radii).max()))


def crystal_widget(structure: Structure, size: str = "420px") -> Any:
    """An nglview widget filled by a crystal, which is seen as in the still picture."""
    view = import_nglview().NGLWidget()
    shapes, hulls, radius = crystal_shapes(structure)
    view._add_shape(shapes, name=structure.composition.reduced_formula)
    if hulls:
        view._add_shape(hulls, name="polyhedron")
        view.update_representation(component=1, opacity=HULL_OPACITY, side="double")
    view.stage.set_parameters(clip_dist=0, fog_near=60)
    distance = 1.08 * radius / math.sin(math.radians(FIELD_OF_VIEW / 2))  # a sphere of this radius just fits
    view._remote_call("distance", target="viewerControls", args=[-distance])
    view.layout.width = view.layout.height = size
    return view


def is_live() -> bool:
    """Whether someone sits at the notebook: a run by nbconvert, papermill or nbval cannot answer questions."""
    from IPython import get_ipython

    request: dict[str, Any] = getattr(get_ipython(), "get_parent", dict)()
    return bool(request.get("content", {}).get("allow_stdin"))


@dataclass(frozen=True)
class CrystalView:
    """Shows itself at the end of a cell: the still picture, and in a live notebook the widget in its place."""

    structure: Structure
    size: str = "420px"

    def bundle(self, live: bool) -> dict[str, Any]:
        """The same crystal by MIME type; a browser shows the first that it can."""
        picture = io.BytesIO()
        draw_crystal(self.structure, polyhedra=True).savefig(picture, format="png", metadata={"Software": None})
        bundle: dict[str, Any] = {"image/png": picture.getvalue(), "text/plain": f"crystal of {self.structure.formula}"}
        if live and importlib.util.find_spec("nglview"):
            bundle[WIDGET] = crystal_widget(self.structure, self.size)._repr_mimebundle_()[WIDGET]
        return bundle

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.bundle(is_live()), raw=True)


def view_crystal(structure: Structure, size: str = "420px") -> CrystalView:
    """A crystal to turn by hand in a live notebook, elsewhere a still picture; ``size`` is that of a side, in CSS."""
    return CrystalView(structure, size)
