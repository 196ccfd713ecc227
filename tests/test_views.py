"""Views to turn by hand: the browser finds its module, and what it is sent is the crystal that the still shows."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from contsp_core.csp import views
from contsp_core.csp.figures import RADIUS_SCALE

PEROVSKITE = Structure(
    Lattice.cubic(3.905),
    ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
)


def test_the_browser_is_asked_for_the_module_that_is_installed():
    version = views.extension_version()
    assert version is not None
    state = views.crystal_widget(PEROVSKITE).get_state()
    assert state["_view_module_version"] == state["_model_module_version"] == version


def test_the_versions_agree_in_a_new_process_even_if_nglview_says_otherwise():
    code = (
        "import sys; from contsp_core.csp.views import import_nglview, extension_version as v; n = import_nglview();"
        "from nglview.color import ColormakerRegistry as c;"
        "sys.exit({n.NGLWidget()._view_module_version, c._model_module_version} != {v()})"
    )
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_shapes_are_the_atoms_bonds_and_edges_with_labels():
    shapes, hulls, radius = views.crystal_shapes(PEROVSKITE)
    spheres = [shape for shape in shapes if shape[0] == "sphere"]
    assert len(spheres) == 8 + 1 + 6
    assert {shape[-1] for shape in spheres} == {"Sr (atom 0)", "Ti (atom 1)", *(f"O (atom {n})" for n in (2, 3, 4))}
    bonds = [shape[-1] for shape in shapes if "–" in shape[-1]]
    assert sum("Ti" in label for label in bonds) == 2 * 6  # an octahedron, each bond in two halves
    assert not any("Sr" in label and "Ti" in label for label in bonds)
    assert all(label.endswith("1.95 Å") for label in bonds if "Ti" in label)
    edges = [shape for shape in shapes if shape[-1].startswith("cell")]
    assert len(edges) == 12
    assert all(np.linalg.norm(np.subtract(edge[1], edge[2])) == pytest.approx(3.905) for edge in edges)
    oxygen = {tuple(np.round(sphere[1], 6)) for sphere in spheres if sphere[-1].startswith("O")}
    assert {tuple(corner) for corner in np.round(np.reshape(hulls[0][1], (-1, 3)), 6)} == oxygen  # the octahedron
    titanium = next(sphere[2] for sphere in spheres if sphere[-1].startswith("Ti"))
    np.testing.assert_array_equal(np.reshape(hulls[0][2], (-1, 3)), [titanium] * 8 * 3)  # a colour for each corner
    assert [hull[-1] for hull in hulls] == ["Ti (atom 1), 6 corners at 1.95 – 1.95 Å"]
    reach = max(np.linalg.norm(shape[1]) + shape[3] for shape in spheres)
    assert radius == pytest.approx(reach) == pytest.approx(3.905 * 3**0.5 / 2 + RADIUS_SCALE * 1.95, rel=1e-3)


def test_what_is_sent_is_a_rotated_copy_and_no_mirror_image():
    chiral = Structure(Lattice([[3, 0, 0], [0, 4, 0], [0, 0, 5]]), ["O"] * 3, np.diag([0.2, 0.3, 0.4]) + 0.1)
    shapes, hulls, _ = views.crystal_shapes(chiral)
    assert not hulls  # no cation
    sent = np.array([shape[1] for shape in shapes if shape[0] == "sphere"])[:3]
    given = chiral.cart_coords - chiral.lattice.matrix.sum(0) / 2
    rotation = np.linalg.solve(given, sent)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1)


@pytest.mark.parametrize("answers", [True, False])
def test_the_still_picture_is_always_there_and_the_widget_only_where_it_lives(answers, monkeypatch):
    class Shell:
        def get_parent(self):
            return {"content": {"allow_stdin": answers}}

    monkeypatch.setattr("IPython.get_ipython", Shell)
    live = views.is_live()
    monkeypatch.undo()
    assert live is answers
    bundle = views.view_crystal(PEROVSKITE).bundle(live)
    assert set(bundle) == {"image/png", "text/plain"} | ({views.WIDGET} if answers else set())
    assert bundle["image/png"][:4] == b"\x89PNG"
    assert "NGLWidget" not in bundle["text/plain"]


def test_outside_a_notebook_nobody_turns_a_crystal():
    assert not views.is_live()


def test_without_nglview_there_is_the_still_picture(monkeypatch):
    monkeypatch.setattr(views.importlib.util, "find_spec", {}.get)
    assert set(views.view_crystal(PEROVSKITE).bundle(live=True)) == {"image/png", "text/plain"}
