"""Films: the recorded chain is the sample's, one description is kept, and files hold what was recorded."""

from __future__ import annotations

import itertools
import json
import re

import movies
import numpy as np
import player
import pytest
import torch
from movies import record_chain
from PIL import Image
from pymatgen.core import Lattice, Structure

from contsp_core import diffusion, load_model, mala
from contsp_core.csp.figures import lay_out
from contsp_core.energy import ContinuousCGCNN, EnergyConfig
from contsp_core.mala import AnnealConfig
from contsp_core.sampler import sample_structures

FORMULA, NUMBER, SEED, N_STEPS = "Ti2O4", 2, 1, 60
CELL = Structure(Lattice.orthorhombic(3, 4, 5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
SITES = [[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5]]
PEROVSKITE = Structure(Lattice.cubic(3.9), ["Sr", "Ti", "O", "O", "O"], SITES)  # an octahedron at each corner


@pytest.fixture(scope="module")
def model() -> ContinuousCGCNN:
    return load_model("mp20")


@pytest.fixture(scope="module")
def recorded(model):
    """Every step of a chain; the crystals before each step and after it, not yet reduced; and the noise levels used."""
    before, after, levels = [], [], []

    def spy(crystals):
        after.append(crystals)
        before.append(diffusion.wrap(crystals))
        return before[-1]

    def score(energy, crystals, sigma):
        levels.append(float(sigma))
        return diffusion.given(energy, crystals, sigma)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion, "wrap", diffusion.niggli, raising=False)
        patch.setattr(diffusion, "given", diffusion.score, raising=False)
        patch.setattr(diffusion, "niggli", spy)
        patch.setattr(diffusion, "score", score)
        frames = record_chain(model, FORMULA, NUMBER, SEED, N_STEPS + 1, N_STEPS)
    return frames, before[:-1], after[1:], levels


def test_the_chain_is_that_of_the_sample(model, recorded):
    sample = sample_structures(model, [FORMULA], n_samples=NUMBER + 1, n_steps=N_STEPS, seed=SEED)[0][NUMBER]
    frames = recorded[0]
    assert [frame.step for frame in frames] == list(range(N_STEPS + 1))
    last = frames[-1].structure
    np.testing.assert_allclose(last.lattice.matrix, sample.lattice.matrix, atol=1e-4)
    assert last.species == sample.species
    np.testing.assert_allclose(last.cart_coords, sample.cart_coords, atol=1e-4)
    assert frames[-1].energy == pytest.approx(sample.properties["energy"], abs=1e-4)


def test_levels_are_those_of_the_steps(recorded):
    frames, _, _, levels = recorded
    assert [frame.level for frame in frames[1:]] == pytest.approx(levels)
    assert frames[0].level == frames[1].level == pytest.approx(1.5)
    assert {(frame.level_name, frame.acceptance) for frame in frames} == {("noise level σ (Å)", None)}


def test_each_frame_is_the_chain_in_another_description(recorded):
    frames, before, _, _ = recorded
    changes = 0
    for frame, crystals in zip(frames[1:-1], before, strict=True):
        raw, cell = crystals.cell[0].double().numpy(), frame.structure.lattice.matrix
        basis = cell @ np.linalg.inv(raw)
        np.testing.assert_allclose(basis, basis.round(), atol=1e-4)
        assert round(np.linalg.det(basis)) == 1
        changes += not np.array_equal(basis.round(), np.eye(3))
        shift = (frame.structure.cart_coords - crystals.positions.double().numpy()) @ np.linalg.inv(raw)
        shift -= shift[0]
        np.testing.assert_allclose(shift, shift.round(), atol=1e-4)  # lattice vectors, and one origin for all
    assert changes > 5  # there was something to undo


def test_cell_and_atoms_move_from_frame_to_frame_as_the_steps_moved_them(recorded):
    frames, before, after, _ = recorded
    exact = 0
    for (first, second), old, new in zip(itertools.pairwise(frames[1:]), before, after, strict=True):
        stretch = np.linalg.solve(old.cell[0].double().numpy(), new.cell[0].double().numpy())
        shown = np.linalg.solve(first.structure.lattice.matrix, second.structure.lattice.matrix)
        np.testing.assert_allclose(shown, stretch, atol=1e-4)  # no turn, no other basis: the strain of the step
        moved = new.positions.double().numpy() - old.positions.double().numpy() @ stretch
        seen = second.structure.cart_coords - first.structure.cart_coords @ shown
        assert np.linalg.norm(seen) <= np.linalg.norm(moved) + 1e-4
        exact += np.allclose(seen, moved - moved.mean(axis=0), atol=1e-4)
    assert exact > 0.9 * len(after)  # all but some wild steps at the start


def test_lattices_with_nothing_in_common_are_a_leap_and_no_error():
    other = Structure(Lattice.cubic(50), CELL.species, CELL.frac_coords)
    first, last = movies.describe_alike([other, CELL])
    assert first.lattice == other.lattice and last == CELL


def test_annealed_chain_has_temperatures_and_acceptance(monkeypatch):
    torch.manual_seed(0)
    energy = ContinuousCGCNN(EnergyConfig(width=8, n_conv=1), AnnealConfig(n_steps=12, step_first=0.05))
    temperatures, accepted, step = [], [], mala.mala_step

    def spy(model, state, size, temperature, *rest):
        state = step(model, state, size, temperature, *rest)
        temperatures.append(float(temperature))
        accepted.append(bool(state.accepted))
        return state

    monkeypatch.setattr(mala, "mala_step", spy)
    frames = record_chain(energy, "NaCl", 1, n_frames=13)
    monkeypatch.undo()
    assert [frame.level for frame in frames[1:]] == pytest.approx(temperatures, rel=1e-5)
    assert [frame.acceptance for frame in frames[1:]] == pytest.approx(np.cumsum(accepted) / np.arange(1, 13))
    assert len(set(accepted)) == 2 and frames[0].level_name == "temperature T"
    sample = sample_structures(energy, ["NaCl"], 2)[0][1]
    np.testing.assert_allclose(frames[-1].structure.cart_coords, sample.cart_coords, atol=1e-4)


@pytest.mark.parametrize("given", [{"number": -1}, {"seed": 0.5}, {"n_frames": 1}, {"n_steps": True}, {"n_steps": 0}])
def test_bad_numbers_are_named(model, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} is .*, expected an integer ≥ "):
        record_chain(model, "NaCl", **given)


def test_bad_formula_name_and_frames_are_told(model, recorded, tmp_path):
    with pytest.raises(ValueError, match="formula 'Xx2'"):
        record_chain(model, "Xx2")
    for write, suffix in ((movies.write_gif, ".gif"), (movies.write_slider, ".html")):
        with pytest.raises(ValueError, match=f"path is 'film.mp4', expected a name that ends in {suffix}"):
            write(recorded[0], "film.mp4")
        with pytest.raises(ValueError, match="frames is empty"):
            write([], f"film{suffix}")


def test_animation_has_a_picture_a_frame_and_holds_the_last(recorded, tmp_path):
    frames = recorded[0][::20]
    path = movies.write_gif(frames, tmp_path / "new" / "film.gif")
    with Image.open(path) as film:
        assert film.n_frames == len(frames) == 4
        durations, pictures = [], []
        for index in range(film.n_frames):
            film.seek(index)
            durations.append(film.info["duration"])
            pictures.append(np.asarray(film.convert("L"), dtype=float))
    assert durations[:-1] == [80] * 3 and durations[-1] > 75 * movies.HOLD
    assert all(np.abs(first - second).max() > 100 for first, second in itertools.pairwise(pictures))
    for picture in pictures:  # nothing is cut off
        assert min(picture[:, :2].min(), picture[:, -2:].min(), picture[:2].min()) > 250
    assert path.stat().st_size / len(frames) < 3e6 / 60
    assert list(path.parent.iterdir()) == [path]


def test_a_film_that_fails_leaves_the_old_file(recorded, tmp_path, monkeypatch):
    path = tmp_path / "film.gif"
    path.write_text("old")
    monkeypatch.setattr(movies, "draw_crystal", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        movies.write_gif(recorded[0][-2:], path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def content(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])


def test_slider_page_holds_the_frames_and_asks_for_nothing_else(recorded, tmp_path):
    frames = recorded[0][-3:]
    page = movies.write_slider(frames, tmp_path / "film.html").read_text()
    assert re.findall(r"""https?:|src=|href=|@import|url\(|fetch|import\(""", page) == []
    film = content(page)
    assert [frame["energy"] for frame in film["frames"]] == [frame.energy for frame in frames]
    assert [kind["symbol"] for kind in film["kinds"]] == ["O", "Ti"]
    titanium = [atom for atom in film["frames"][-1]["atoms"] if film["kinds"][atom[0]]["symbol"] == "Ti"]
    corner = film["frames"][-1]["edges"][0][0]
    assert any(np.allclose(atom[2:], corner, atol=2e-3) for atom in titanium)  # at the origin


@pytest.mark.parametrize(("cell", "n_faces"), [(CELL, 0), (PEROVSKITE, 8 * 8)])
def test_static_view_draws_what_the_still_draws_and_has_it_for_pages_without_scripts(cell, n_faces):
    page = player.view_static(cell)._repr_html_()
    assert page == player.view_static(cell)._repr_html_()  # the same bytes in each run
    assert page.count(f'<img alt="crystal of {cell.formula}" src="data:image/png;base64,iVBOR') == 1
    assert re.findall(r"https?:|href=", page) == []
    film, drawing = content(page), lay_out(cell, polyhedra=True)
    (frame,) = film["frames"]
    middle = drawing.edges.mean(axis=(0, 1))
    np.testing.assert_allclose([atom[2:] for atom in frame["atoms"]], drawing.positions - middle, atol=1e-3)
    np.testing.assert_allclose(frame["edges"], drawing.edges - middle, atol=1e-3)
    assert frame["bonds"] == drawing.bonds.tolist()
    assert len(frame["faces"]) == n_faces
    for (atom, corners), (inside, expected) in zip(frame["faces"], drawing.faces, strict=True):
        assert atom == inside
        np.testing.assert_allclose(corners, expected - middle, atol=1e-3)
    radii = np.array([film["kinds"][atom[0]]["radius"] for atom in frame["atoms"]])
    assert film["reach"] == pytest.approx((np.linalg.norm(drawing.positions - middle, axis=1) + radii).max())


def test_text_of_a_page_cannot_end_its_data():
    page = player.player([CELL], [{}], {"title": "</script><b>"}, 0.01)
    assert content(page)["title"] == "</script><b>"
