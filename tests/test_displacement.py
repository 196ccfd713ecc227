"""One atom moved: exact on energies with a known form, and named after the right behaviour."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure

from contsp_core.crystals import Crystals
from contsp_core.data import load_split
from contsp_core.invariance import (
    describe_response,
    displaced,
    displacement_scan,
    response_table,
    share_below_disturbed,
    stable_crystals,
)

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


@pytest.fixture
def crystal() -> Crystals:
    """Rock salt, primitive cell."""
    return Crystals.from_structures([ROCK_SALT.get_primitive_structure()], dtype=torch.float64)


def of_displacement(crystal: Crystals, atom: int, function):
    """An energy that is a function of the displacement (n, 3) of one atom."""
    start = crystal.positions[atom]
    return lambda moved: function(moved.positions.reshape(moved.n_systems, -1, 3)[:, atom] - start)


def test_one_atom_moves_as_pymatgen_moves_it(crystal):
    vectors = torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.4, 0.0]], dtype=torch.float64)
    moved = displaced(crystal, 1, vectors).to_structures()
    for structure, vector in zip(moved, vectors.tolist()):
        expected = crystal.to_structures()[0]
        expected.translate_sites(1, vector, frac_coords=False)
        assert expected.distance_matrix == pytest.approx(structure.distance_matrix, abs=1e-12)
        np.testing.assert_array_equal(structure.lattice.matrix, expected.lattice.matrix)


def test_scan_of_a_spring_is_the_parabola_and_starts_at_rest(crystal):
    spring = of_displacement(crystal, 0, lambda d: 3 + 2 * d.square().sum(dim=1))
    scan = displacement_scan(spring, crystal, 0, n_draws=200, seed=5)
    np.testing.assert_allclose(scan["energy"], 3 + 2 * scan["displacement"] ** 2, rtol=1e-12)
    assert scan["displacement"].iloc[0] == 0
    assert len(scan) == 201


def test_draws_have_the_width_asked_for(crystal):
    scan = displacement_scan(lambda moved: moved.volume, crystal, 0, n_draws=4000, sigma=0.05, seed=1)
    variance = (scan["displacement"].iloc[1:] ** 2).mean() / 3
    assert variance == pytest.approx(0.05**2, rel=4 * np.sqrt(2 / 12000))  # four standard errors


def test_same_seed_same_draws(crystal):
    energy = of_displacement(crystal, 0, lambda d: d[:, 0])
    first, again, other = (displacement_scan(energy, crystal, 0, 20, seed=seed) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize(
    ("behaviour", "share", "function"),
    [
        ("only rises", 1.0, lambda d: d.square().sum(dim=1)),
        ("only rises", 1.0, lambda d: d**2 @ torch.tensor([1.0, 0.1, 0.01], dtype=d.dtype)),
        ("only falls", 0.0, lambda d: -d.square().sum(dim=1)),
        ("rises and falls", 0.5, lambda d: d[:, 0]),
        ("rises and falls", 0.5, lambda d: d[:, 0] * d[:, 1]),
        ("rises and falls", 1.0, lambda d: torch.sin(30 * d.norm(dim=1)) + 1 - (d.norm(dim=1) == 0).to(d)),
    ],
)
def test_behaviour_of_a_known_function_is_named(crystal, behaviour, share, function):
    scan = displacement_scan(of_displacement(crystal, 0, function), crystal, 0, seed=3)
    found = describe_response(scan)
    assert found["behaviour"] == behaviour
    assert found["share_above"] == pytest.approx(share, abs=0.07)
    assert found["range"] == pytest.approx(scan["energy"].max() - scan["energy"].min())


def test_table_scans_every_crystal_at_its_own_rest(crystal):
    crystals = Crystals.cat([crystal, crystal])
    scans, rows = response_table(lambda c: c.volume, crystals, ["first", "second"], n_draws=10)
    assert [name.split(",")[0] for name in rows["material"]] == ["first", "second"]
    assert scans.groupby("material", sort=False)["displacement"].first().tolist() == [0, 0]
    np.testing.assert_allclose(scans["energy"], float(crystal.volume))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: displaced(c, 2, torch.zeros(1, 3)), "atom is 2, expected 0 … 1"),
        (lambda c: displaced(Crystals.cat([c, c]), 0, torch.zeros(1, 3)), "batch of 2, expected one"),
        (lambda c: displacement_scan(lambda x: x.volume, c, 0, n_draws=0), "n_draws is 0"),
        (lambda c: displacement_scan(lambda x: x.volume, c, 0, sigma=0.0), "sigma is 0.0"),
        (lambda c: describe_response(displacement_scan(lambda x: x.volume, c, 0, n_draws=3)), "has 3 draws"),
    ],
)
def test_wrong_argument_is_named(crystal, call, message):
    with pytest.raises(ValueError, match=message):
        call(crystal)


def test_lone_atom_is_refused():
    lone = Crystals.from_structures([Structure(Lattice.cubic(3.0), ["Fe"], [[0, 0, 0]])])
    with pytest.raises(ValueError, match="1 atom, expected at least 2"):
        displacement_scan(lambda c: c.volume, lone, 0)


def test_stable_crystals_pass_the_column_of_their_data_set_and_have_two_atoms():
    split = load_split("prototypes", "test")
    above_hull = np.where(np.arange(len(split)) % 3 == 0, 0.0, 0.1)
    marked = replace(split, columns=split.columns | {"e_above_hull": above_hull})
    expected = {name for row, name in enumerate(split.material_ids) if row % 3 == 0 and len(split[row]) > 1}
    assert set(stable_crystals(marked).material_ids) == expected
    assert len(stable_crystals(split, 4, seed=1)) == 4
    with pytest.raises(ValueError, match="no stable crystal"):
        stable_crystals(replace(split, columns={"heat_all": above_hull + 1}))


def test_share_below_disturbed_is_one_for_a_distance_to_the_crystal_and_zero_for_its_negative():
    crystals = load_split("prototypes", "val").crystals[:10]

    def distance(other: Crystals):
        moved = (other.positions - crystals.positions).square().sum(dim=1)
        return (
            moved.new_zeros(other.n_systems).index_add(0, other.system_idx, moved) + (other.cell != crystals.cell).any()
        )

    for sign, share in ((1, 1.0), (-1, 0.0)):
        found = share_below_disturbed(lambda c, sign=sign: sign * distance(c), crystals, (0.01, 0.1))
        assert found.to_dict() == {0.01: share, 0.1: share}
