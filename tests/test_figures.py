"""Figures: what is drawn is what was given. No pixel is compared; positions, counts and labels are."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import plots
import pytest
from pymatgen.core import Lattice, Structure

from contsp_core.csp import figures
from contsp_core.csp.figures import (
    PIECES,
    SHADES,
    boundary_atoms,
    crystal_marks,
    find_bonds,
    lay_out,
    view_rotation,
)

PEROVSKITE = Structure(
    Lattice.cubic(3.905),
    ["Sr", "Ti", "O", "O", "O"],
    [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
)
ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def displacement_table() -> pd.DataFrame:
    rows = [("perov5", "BaTiO3"), ("perov5", "SrTiO3"), ("mp20", "NaCl")]
    parts = [pd.DataFrame({"displacement": [0.0, 0.1], "energy": [-1.0, -0.9]}) for _ in rows]
    return pd.concat([part.assign(dataset=d, material=m) for part, (d, m) in zip(parts, rows)])


@pytest.mark.parametrize(("structure", "counts"), [(PEROVSKITE, [8, 1, 6]), (ROCK_SALT, [14, 13])])
def test_boundary_atoms_complete_the_textbook_cell(structure, counts):
    frac_coords, index = boundary_atoms(structure)
    numbers = np.array(structure.atomic_numbers)
    assert [(numbers[index] == z).sum() for z in dict.fromkeys(numbers)] == counts
    shift = frac_coords - structure.frac_coords[index]
    np.testing.assert_allclose(shift, np.round(shift), atol=1e-12)


def test_boundary_atoms_do_not_depend_on_the_image_or_on_rounding():
    noise = np.array([[1e-9, -1e-9, 3 - 1e-9]])
    shifted = Structure(PEROVSKITE.lattice, PEROVSKITE.species, PEROVSKITE.frac_coords + noise)
    assert len(boundary_atoms(shifted)[0]) == 15


@pytest.mark.parametrize("sign", [1, -1])
def test_view_is_a_proper_rotation_so_that_handedness_is_shown(sign):
    cell = np.random.default_rng(0).normal(size=(3, 3))
    cell[2] *= sign * np.sign(np.linalg.det(cell))
    rotation = view_rotation(cell, 24, 18)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) == pytest.approx(1)
    assert (cell @ rotation)[2, 1] > 0  # the third lattice vector points up


def test_crystal_picture_has_a_sphere_for_each_drawn_atom_all_bonds_and_twelve_edges():
    marks = crystal_marks(lay_out(PEROVSKITE))
    bonds = 6 + 8 * 3  # Ti–O; and for each corner the oxygen atoms of the three faces that meet there
    assert sum(mark.face == "none" for mark in marks) == (12 + 2 * bonds) * PIECES
    assert sum(mark.face != "none" for mark in marks) == 15 * len(SHADES)
    ax = figures.draw_crystal(PEROVSKITE).axes[0]
    assert len(ax.collections[0].get_paths()) == len(marks)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Sr", "Ti", "O"]
    assert ax.get_title() == "SrTiO$_{3}$"


RUTILE = Structure.from_spacegroup(
    "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
)
SHIFTED = Structure(PEROVSKITE.lattice, PEROVSKITE.species, PEROVSKITE.frac_coords + 0.5)
DIAMOND = Structure.from_spacegroup("Fd-3m", Lattice.cubic(3.57), ["C"], [[0, 0, 0]])
SULPHATE = Structure(  # anhydrite's tetrahedron alone, with an ion far away
    Lattice.cubic(8.0), ["Ca", "S", "O", "O", "O", "O"],
    [[0, 0, 0], [0.5] * 3, *(0.5 + 0.107 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]))],
)  # fmt: skip
SQUARE = Structure(Lattice.tetragonal(3.9, 6), ["Pd", "O", "O"], [[0.5, 0.5, 0.5], [0, 0.5, 0.5], [0.5, 0, 0.5]])


@pytest.mark.parametrize(
    ("structure", "n_triangles"),
    # an octahedron inside the cell, and those around its corners, but no cuboctahedra; a sulphate, with nothing
    # about its cation; no ions; a square from above and from below
    [(PEROVSKITE, 8), (RUTILE, 9 * 8), (SHIFTED, 8 * 8), (SULPHATE, 4), (DIAMOND, 0), (SQUARE, 4)],
)
def test_polyhedra_are_the_hulls_of_whole_coordination_shells(structure, n_triangles):
    cell, drawing = lay_out(structure), lay_out(structure, polyhedra=True)
    assert len(drawing.faces) == n_triangles
    corners = {tuple(np.round(corner, 6)) for _, face in drawing.faces for corner in face}
    outside = {tuple(position) for position in np.round(drawing.positions[len(cell.positions) :], 6)}
    assert outside <= corners <= {tuple(np.round(position, 6)) for position in drawing.positions[drawing.numbers == 8]}
    for atom, face in drawing.faces:
        assert drawing.numbers[atom] != 8
        site, bonds = structure[int(drawing.index[atom])], np.linalg.norm(face - drawing.positions[atom], axis=1)
        near = [neighbour.nn_distance for neighbour in structure.get_neighbors(site, 3.0)]  # another search
        assert set(np.round(bonds, 6)) <= set(np.round(near, 6))
    np.testing.assert_allclose(drawing.positions[: len(cell.positions)], cell.positions, atol=1e-9)
    plain, filled = (figures.draw_crystal(structure, polyhedra=x).axes[0].collections[0] for x in (False, True))
    assert sum(0 < color[3] < 1 for color in filled.get_facecolors()) == n_triangles
    assert not any(0 < color[3] < 1 for color in plain.get_facecolors())


def test_crystal_picture_is_painted_from_back_to_front():
    marks = crystal_marks(lay_out(PEROVSKITE, azimuth=0, elevation=0))  # seen along +b
    depths = [mark.depth for mark in marks]
    assert depths == sorted(depths)
    spheres = [mark for mark in marks if mark.line_width == 0.5]
    strontium = max(mark.path.get_extents().width for mark in spheres)
    corners = [mark.depth for mark in spheres if mark.path.get_extents().width > 0.99 * strontium]
    np.testing.assert_allclose(np.diff(corners), [0, 0, 0, 3.905, 0, 0, 0], atol=1e-9)


def coordination(structure: Structure) -> dict[str, list[int]]:
    """Number of bonds of each atom of the middle cell of a 3×3×3 supercell, by element."""
    block = structure.make_supercell([3, 3, 3], in_place=False)
    numbers, center = np.array(block.atomic_numbers), block.lattice.matrix.sum(axis=0) / 2
    bonds = find_bonds(block.cart_coords, numbers)
    middle = np.argsort(np.linalg.norm(block.cart_coords - center, axis=1))[: len(structure)]
    counts = np.bincount(bonds.ravel(), minlength=len(block))
    return {symbol: [int(counts[i]) for i in middle if block[int(i)].specie.symbol == symbol] for symbol in SYMBOLS}


SYMBOLS = ("Na", "Cl", "C", "Ti", "O")


@pytest.mark.parametrize(
    ("structure", "expected"),
    [
        (ROCK_SALT, {"Na": 6, "Cl": 6}),
        (Structure.from_spacegroup("Fd-3m", Lattice.cubic(3.57), ["C"], [[0, 0, 0]]), {"C": 4}),
        (
            Structure.from_spacegroup(
                "P4_2/mnm", Lattice.tetragonal(4.594, 2.959), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
            ),
            {"Ti": 6, "O": 3},
        ),
    ],
)
def test_bonds_join_true_neighbours_only(structure, expected):
    found = coordination(structure)
    for symbol, count in expected.items():
        assert found[symbol]
        assert set(found[symbol]) == {count}


def test_metals_are_bonded_where_there_is_nothing_else():
    iron = Structure(Lattice.cubic(2.866), ["Fe"] * 2, [[0, 0, 0], [0.5, 0.5, 0.5]])
    assert len(find_bonds(iron.cart_coords, np.array(iron.atomic_numbers))) == 1
    pair = np.array([[0, 0, 0], [0, 0, 3.46]])  # Ba and Ti of BaTiO3 are nearer than their metallic radii
    assert len(find_bonds(pair, np.array([56, 22]))) == 1
    assert len(find_bonds(np.vstack([pair, [9, 9, 9]]), np.array([56, 22, 8]))) == 0


def test_grid_of_crystals_draws_each_one():
    figure = figures.draw_crystals([PEROVSKITE, ROCK_SALT] * 3, titles=list("abcdef"), n_columns=4)
    assert [ax.get_title() for ax in figure.axes if ax.collections] == list("abcdef")
    with pytest.raises(ValueError, match="titles has 1 entries"):
        figures.draw_crystals([PEROVSKITE, ROCK_SALT], titles=["a"])
    with pytest.raises(ValueError, match="structures is empty"):
        figures.draw_crystals([])


def test_training_curves_draw_the_quantities_that_are_there():
    history = pd.DataFrame({"update": [0, 1], "energy_real": [1, 0], "energy_sample": [1, 0.5], "loss": [0, -0.5]})
    figure = plots.training_curves(history)
    drawn = [ax for ax in figure.axes if ax.lines]
    assert len(drawn) == 2
    np.testing.assert_array_equal(drawn[1].lines[-1].get_ydata(), history["loss"])


def test_match_rate_is_drawn_in_percent_with_its_interval():
    curve = pd.DataFrame({"k": [1, 2], "match_rate": [0.2, 0.4], "low": [0.1, 0.3], "high": [0.3, 0.5], "label": "a"})
    ax = plots.match_rate_figure(curve).axes[0]
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [20, 40])
    assert len(ax.collections) == 1


def test_rmse_histogram_counts_each_matched_crystal_once():
    ax = plots.rmse_histogram(pd.DataFrame({"rms_best": [0.1, 0.2, np.nan, 0.7]})).axes[0]
    assert sum(patch.get_height() for patch in ax.patches) == 3
    assert ax.get_title() == "3 of 4 matched"
    assert plots.rmse_histogram(pd.DataFrame({"rms_best": [np.nan]})).axes[0].get_title() == "0 of 1 matched"


def test_energy_comparison_separates_matches():
    ax = plots.energy_comparison([0, 1, 2], [0.5, 1, 1], matched=[True, False, True]).axes[0]
    assert {part.get_label(): len(part.get_offsets()) for part in ax.collections} == {"match": 2, "no match": 1}


def test_saved_figure_has_its_parameters_beside_it_and_the_same_bytes_twice(tmp_path):
    parameters = {"dataset": "prototypes", "seed": 0}
    table = pd.DataFrame({"rms_best": [0.1, 0.2]})
    paths = [figures.save_figure(plots.rmse_histogram(table), tmp_path / n / "a.png", parameters) for n in "xy"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert json.loads(paths[0].with_suffix(".json").read_text()) == parameters
    with pytest.raises(ValueError, match=r"ends in \.png"):
        figures.save_figure(plots.rmse_histogram(table), tmp_path / "a.pdf", parameters)


def test_drawing_leaves_no_open_figure_and_no_changed_setting():
    before = dict(plt.rcParams)
    plots.rmse_histogram(pd.DataFrame({"rms_best": [0.1]}))
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before
