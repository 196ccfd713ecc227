"""Transformations: re-descriptions keep the solid atom by atom, congruences keep all distances."""

from __future__ import annotations

import numpy as np
import pytest
import spglib
import torch
from ase import Atoms
from ase.build import make_supercell
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from pymatgen.core import Lattice, Structure
from strategies import crystals, generators

from contsp_core import Crystals
from contsp_core.lattice import niggli
from contsp_core.transformations import (
    TRANSFORMATIONS,
    change_basis,
    primitive,
    random_redescription,
    random_rotations,
    random_supercell,
    random_unimodular,
    supercell,
)

ORDINARY = (0.05,)
REDESCRIPTIONS = sorted(name for name, entry in TRANSFORMATIONS.items() if entry.kind == "re-description")
CONGRUENCES = sorted(name for name, entry in TRANSFORMATIONS.items() if entry.kind == "congruent")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contains(fine: Crystals, coarse: Crystals) -> bool:
    """Whether ``coarse`` is a supercell description of the solid of ``fine``: same atoms, a sublattice."""
    cell, larger = fine.cell[0].numpy(), coarse.cell[0].numpy()
    multiple = larger @ np.linalg.inv(cell)
    n_cells = abs(np.linalg.det(multiple))
    if abs(multiple - multiple.round()).max() > 1e-6 or round(n_cells) * fine.n_atoms[0] != coarse.n_atoms[0]:
        return False
    offsets = coarse.positions.numpy()[:, None] - fine.positions.numpy()[None]
    frac = offsets @ np.linalg.inv(cell)
    distance = np.linalg.norm((frac - frac.round()) @ cell, axis=2)
    same = (distance < 1e-6) & (coarse.atomic_numbers[:, None] == fine.atomic_numbers[None]).numpy()
    # each atom of the finer description appears once for every cell that the coarser one joins, at distinct points
    frac_coarse = coarse.positions.numpy() @ np.linalg.inv(larger)
    gap = frac_coarse[:, None] - frac_coarse[None]
    coincident = np.linalg.norm((gap - gap.round()) @ larger, axis=2) < 1e-6
    once = (same.sum(axis=1) == 1).all() and (same.sum(axis=0) == round(n_cells)).all()
    return bool(once and coincident.sum() == len(coincident))


def same_solid(a: Crystals, b: Crystals) -> bool:
    return contains(a, b) or contains(b, a)


def environment(unit: Crystals, radius: float) -> np.ndarray:
    """All interatomic distances below a radius, sorted, each once per atom of the unit (from ASE)."""
    atoms = Atoms(unit.species[0], unit.positions.numpy(), cell=unit.cell[0].numpy(), pbc=True)
    return np.sort(neighbor_list("d", atoms, radius))


@pytest.mark.parametrize("name", REDESCRIPTIONS)
@settings(max_examples=25)
@given(unit=crystals(densities=ORDINARY), source=generators())
def test_redescription_is_the_same_solid(name: str, unit: Crystals, source: torch.Generator) -> None:
    assert same_solid(unit, TRANSFORMATIONS[name].function(unit, source))


@settings(max_examples=25)
@given(unit=crystals(densities=ORDINARY), source=generators())
def test_random_composition_is_the_same_solid(unit: Crystals, source: torch.Generator) -> None:
    # both may be supercells of a third description, so the primitive cells are compared
    assert same_solid(primitive(unit, 1e-7), primitive(random_redescription(unit, source), 1e-7))


def test_the_oracle_tells_different_solids_apart() -> None:
    unit = Crystals.from_arrays(np.eye(3)[None] * 4, np.array([[0, 0, 0], [1, 2, 2]]), [[11, 17]], torch.float64)
    moved = unit.replace(positions=unit.positions + torch.tensor([[0.0, 0, 0], [1e-3, 0, 0]]))
    other = Crystals(unit.cell, unit.positions, torch.tensor([11, 19]), unit.system_idx)
    assert same_solid(unit, unit) and not same_solid(unit, moved) and not same_solid(unit, other)


@pytest.mark.parametrize("name", CONGRUENCES[1:])
@settings(max_examples=10)
@given(unit=crystals(densities=ORDINARY), source=generators())
def test_congruence_keeps_every_distance_but_moves_the_solid(
    name: str, unit: Crystals, source: torch.Generator
) -> None:
    moved = TRANSFORMATIONS[name].function(unit, source)
    before, after = environment(unit, 4.0), environment(moved, 4.0)
    # a distance of exactly 4 Å may fall on either side; compare what both have
    np.testing.assert_allclose(after[after < 3.99], before[before < 3.99], atol=1e-9)
    assert not torch.equal(unit.positions, moved.positions)


def test_rotations_are_proper_and_isotropic() -> None:
    rotations = random_rotations(20_000, seeded())
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(rotations @ rotations.mT, identity.expand(20_000, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(20_000, dtype=torch.float64))
    # the mean of a uniform rotation is 0, with standard error 1/sqrt(3 n) per entry
    assert rotations.mean(dim=0).abs().max() < 5 / (3 * 20_000) ** 0.5


def test_random_integer_matrices_have_the_determinants_announced() -> None:
    unimodular = torch.linalg.det(random_unimodular(500, seeded()).double())
    atom = Crystals.from_arrays(np.eye(3)[None] * 3, np.zeros((1, 3)), [[29]], torch.float64)
    n_cells = random_supercell(atom[[0] * 500], seeded()).n_atoms
    torch.testing.assert_close(unimodular.abs(), torch.ones_like(unimodular))
    assert set(unimodular.round().tolist()) == {-1.0, 1.0}
    assert set(n_cells.tolist()) == {1, 2, 3, 4}


@settings(max_examples=40)
@given(source=generators(), unit=crystals(densities=ORDINARY))
def test_supercell_agrees_with_ase(source: torch.Generator, unit: Crystals) -> None:
    matrix = torch.randint(-2, 3, (3, 3), generator=source)
    n_cells = round(float(torch.linalg.det(matrix.double())))
    if n_cells < 1 or n_cells * unit.n_atoms[0] > 100:
        matrix, n_cells = torch.tensor([[1, 1, 0], [-1, 1, 0], [0, 0, 1]]), 2
    ours = supercell(unit, matrix)
    atoms = Atoms(unit.species[0], unit.positions.numpy(), cell=unit.cell[0].numpy(), pbc=True)
    theirs = make_supercell(atoms, matrix.numpy())
    reference = Crystals.from_arrays(
        theirs.cell.array[None], theirs.positions, [theirs.numbers.tolist()], torch.float64
    )
    assert int(ours.n_atoms[0]) == len(theirs) == n_cells * int(unit.n_atoms[0])
    assert contains(reference, ours) and contains(ours, reference)


def test_supercell_of_a_batch_takes_one_matrix_each() -> None:
    unit = Crystals.from_arrays(np.eye(3)[None] * 3, np.zeros((1, 3)), [[29]], torch.float64)
    batch = supercell(
        Crystals.cat([unit, unit]), torch.stack([torch.eye(3).long(), torch.diag(torch.tensor([2, 1, 3]))])
    )
    assert batch.n_atoms.tolist() == [1, 6]
    assert same_solid(unit, batch[1])


@pytest.mark.parametrize(
    ("matrices", "message"),
    [
        (torch.diag(torch.tensor([1, 1, -1])), "determinant -1, expected ≥ 1"),
        (torch.zeros(3, 3, dtype=torch.int64), "determinant 0, expected ≥ 1"),
        (torch.eye(3), "expected integers"),
        (torch.ones(3, dtype=torch.int64), "expected integers of shape"),
    ],
)
def test_supercell_refuses_what_is_no_supercell(matrices: torch.Tensor, message: str) -> None:
    unit = Crystals.from_arrays(np.eye(3)[None], np.zeros((1, 3)), [[1]], torch.float64)
    with pytest.raises(ValueError, match=message):
        supercell(unit, matrices)


@pytest.mark.filterwarnings("ignore:Set OLD_ERROR_HANDLING")  # spglib's own, on every call
@settings(max_examples=40)
@given(unit=crystals(densities=ORDINARY), source=generators())
def test_primitive_cell_has_as_few_atoms_as_spglib_finds(unit: Crystals, source: torch.Generator) -> None:
    distance = environment(unit, 0.2)
    if len(distance):
        return  # spglib refuses atoms that lie on top of each other
    larger = niggli(random_supercell(unit, source))
    cell = (larger.cell[0].numpy(), larger.frac_coords.numpy(), larger.atomic_numbers.numpy())
    ours = primitive(larger)
    assert len(ours.positions) == len(spglib.find_primitive(cell, symprec=1e-5)[2])
    assert contains(ours, larger)
    assert torch.det(ours.cell[0]) * torch.det(larger.cell[0]) > 0


def test_primitive_cell_of_rock_salt_has_two_atoms() -> None:
    conventional = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    batch = Crystals.from_structures([conventional, conventional * (2, 1, 3)], dtype=torch.float64)
    reduced = primitive(batch)
    assert reduced.n_atoms.tolist() == [2, 2]
    torch.testing.assert_close(reduced.volume / reduced.n_atoms, batch.volume / batch.n_atoms)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_primitive_cell_keeps_atoms_that_differ_by_more_than_rounding(dtype: torch.dtype, tolerance: float) -> None:
    unit = Crystals.from_arrays(np.eye(3)[None] * 3, np.zeros((1, 3)), [[29]], dtype)
    double = supercell(unit, torch.diag(torch.tensor([1, 1, 2])))
    moved = double.replace(positions=double.positions + torch.tensor([[0, 0, 0], [10 * tolerance, 0, 0]], dtype=dtype))
    assert primitive(double).n_atoms.tolist() == [1]
    assert primitive(moved).n_atoms.tolist() == [2]


def test_coincident_atoms_are_not_taken_for_lattice_translations() -> None:
    unit = Crystals.from_arrays(np.eye(3)[None] * 3, np.ones((2, 3)), [[29, 29]], torch.float64)
    assert primitive(unit).n_atoms.tolist() == [2]


def test_a_loose_tolerance_that_accepts_a_translation_but_not_its_multiple_changes_nothing() -> None:
    chain = np.array([[0, 0, 0], [1, 0, 0], [2.04, 0, 0]])  # a step of 1 misses by 0.04 Å, one of 2.04 by 0.08 Å
    unit = Crystals.from_arrays(np.diag([3.0, 4, 4])[None], chain, [[29] * 3], torch.float64)
    assert primitive(unit, 0.05).n_atoms.tolist() == [3]
    assert primitive(unit, 0.09).n_atoms.tolist() == [1]


@settings(max_examples=40)
@given(unit=crystals(), source=generators())
def test_niggli_form_does_not_depend_on_the_description(unit: Crystals, source: torch.Generator) -> None:
    reduced = niggli(unit)
    other = niggli(change_basis(unit, source))
    metric = [batch.cell[0] @ batch.cell[0].T for batch in (reduced, other, niggli(reduced))]
    for again in metric[1:]:
        torch.testing.assert_close(again, metric[0], rtol=1e-9, atol=1e-9 * float(metric[0].abs().max()))
    assert same_solid(unit, reduced)
    assert torch.det(unit.cell[0]) * torch.det(reduced.cell[0]) > 0  # handedness


def test_a_seed_gives_the_same_transformation_again() -> None:
    unit = Crystals.from_arrays(np.eye(3)[None] * 3, np.array([[0, 0, 0], [1, 1, 1]]), [[29, 8]], torch.float64)
    for name, (function, _) in TRANSFORMATIONS.items():
        first, second = function(unit, seeded(5)), function(unit, seeded(5))
        assert torch.equal(first.cell, second.cell) and torch.equal(first.positions, second.positions), name
