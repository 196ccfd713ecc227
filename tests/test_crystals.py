"""The batched state refuses bad input in one line, and Reduce, Expand and the volumes of elements are what they say."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Composition, Element, Lattice, Structure
from scipy import stats
from strategies import crystals

from contsp_core import Crystals
from contsp_core.crystals import (
    expand_composition,
    fit_atomic_volumes,
    keyed_rng,
    pack,
    ragged_arange,
    reduce_species,
)

species_lists = st.lists(st.integers(1, 100), min_size=1, max_size=12)


def rock_salt() -> Structure:
    return Structure(Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def rutile() -> Structure:
    return Structure.from_spacegroup(136, Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]])


def fields(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Arguments of a valid batch of two crystals with one and two atoms, with changes."""
    valid = {
        "cell": 4 * torch.eye(3).repeat(2, 1, 1),
        "positions": torch.tensor([[0.0, 0, 0], [1, 1, 1], [2, 3, 2]]),
        "atomic_numbers": torch.tensor([26, 11, 17]),
        "system_idx": torch.tensor([0, 1, 1]),
    }
    return valid | changes


def flat_cell() -> torch.Tensor:
    cell = 4 * torch.eye(3).repeat(2, 1, 1)
    cell[1, 2] = cell[1, 0] + cell[1, 1]
    return cell


BAD_FIELDS = {
    "no crystal": (
        {"cell": torch.zeros(0, 3, 3), "positions": torch.zeros(0, 3)},
        "empty batch: Crystals needs at least one crystal",
    ),
    "shape of cell": ({"cell": torch.eye(3)}, r"cell has shape \(3, 3\), expected \(3, 3, 3\)"),
    "shape of positions": ({"positions": torch.zeros(3, 2)}, r"positions has shape \(3, 2\), expected \(3, 3\)"),
    "count of species": ({"atomic_numbers": torch.tensor([26])}, r"atomic_numbers has shape \(1,\), expected \(3,\)"),
    "count of systems": ({"system_idx": torch.tensor([0, 1])}, r"system_idx has shape \(2,\), expected \(3,\)"),
    "half precision": ({"cell": 4 * torch.eye(3).repeat(2, 1, 1).half()}, "cell is torch.float16, expected float32 or"),
    "mixed precision": ({"positions": torch.zeros(3, 3).double()}, "positions is torch.float64, .* the same for both"),
    "integer type": (
        {"atomic_numbers": torch.tensor([26.0, 11, 17])},
        "atomic_numbers is torch.float32, expected torch.int64",
    ),
    "device": ({"positions": torch.zeros(3, 3, device="meta")}, "positions is on meta, but cell is on cpu"),
    "unsorted": ({"system_idx": torch.tensor([1, 0, 1])}, "system_idx must list every system 0 … 1 in order"),
    "a crystal without atoms": ({"system_idx": torch.tensor([0, 0, 0])}, "system_idx must list every system 0 … 1"),
    "a system too many": ({"system_idx": torch.tensor([0, 1, 2])}, "system_idx must list every system 0 … 1"),
    "a negative system": ({"system_idx": torch.tensor([-1, 0, 1])}, "system_idx must list every system 0 … 1"),
    "element 101": ({"atomic_numbers": torch.tensor([26, 101, 17])}, "atomic_numbers holds 101, expected 1 … 100"),
    "element 0": ({"atomic_numbers": torch.tensor([26, 11, 0])}, "atomic_numbers holds 0, expected 1 … 100"),
    "NaN": ({"positions": torch.full((3, 3), math.nan)}, "must be finite numbers in Å; found NaN or infinity"),
    "infinity": ({"cell": torch.full((2, 3, 3), math.inf)}, "must be finite numbers in Å; found NaN or infinity"),
    "flat cell": ({"cell": flat_cell()}, "cell of system 1 has volume 0 Å³, expected ≥ 1e-06 Å³"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_bad_fields_are_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        Crystals(**fields(**changes))
    assert "\n" not in str(error.value)


def test_bad_structures_are_refused_with_their_index():
    disordered = Structure(Lattice.cubic(4), [{"Mg": 0.5, "Ca": 0.5}], [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"structure 1 \(.*\) has a disordered site, expected full occupancy"):
        Crystals.from_structures([rock_salt(), disordered])
    with pytest.raises(ValueError, match=r"empty batch: Crystals\.from_structures needs at least one structure"):
        Crystals.from_structures([])
    with pytest.raises(ValueError, match="empty batch: nothing to join"):
        Crystals.cat([])
    heavy = Structure(Lattice.cubic(4), ["Md"], [[0, 0, 0]])  # Z = 101
    with pytest.raises(ValueError, match="atomic_numbers holds 101"):
        Crystals.from_structures([heavy])


def test_derived_quantities_are_those_of_pymatgen():
    structures = [rock_salt(), rutile()]
    batch = Crystals.from_structures(structures, dtype=torch.float64)
    assert len(batch) == 2 and batch.n_atoms.tolist() == [2, 6]
    np.testing.assert_allclose(batch.volume, [structure.volume for structure in structures])
    np.testing.assert_allclose(batch.frac_coords, np.concatenate([s.frac_coords for s in structures]), atol=1e-12)
    assert batch.species == [list(structure.atomic_numbers) for structure in structures]
    assert Crystals.from_structures(structures).cell.dtype == torch.float32


@given(crystals(densities=(0.05,)))
def test_the_way_to_pymatgen_and_back_keeps_the_solid(crystal):
    (structure,) = crystal.to_structures()
    again = Crystals.from_structures([structure], dtype=torch.float64)
    hand = torch.linalg.det(crystal.cell).sign()
    torch.testing.assert_close(again.cell, hand * crystal.cell)  # the same lattice, right-handed
    torch.testing.assert_close(torch.linalg.det(again.cell), crystal.volume)
    assert again.species == crystal.species
    shift = again.frac_coords - hand * crystal.frac_coords
    torch.testing.assert_close(shift, shift.round(), rtol=0, atol=1e-9)
    assert (structure.frac_coords >= -1e-9).all() and (structure.frac_coords <= 1 + 1e-9).all()


def random_batch(n_systems: int = 5) -> Crystals:
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, n_systems)
    species = [rng.integers(1, 101, n).tolist() for n in counts]
    cells = 4 * np.eye(3) + rng.uniform(-1, 1, (n_systems, 3, 3))
    return Crystals.from_arrays(cells, rng.uniform(-5, 5, (counts.sum(), 3)), species, torch.float64)


@pytest.mark.parametrize(
    "chosen",
    [2, -1, np.int64(2), torch.tensor(3), [0, 3, 3, 1], slice(1, 4), slice(None, None, 2), torch.tensor([4, 0])],
)
def test_selecting_systems_gives_the_same_crystals(chosen):
    batch = random_batch()
    singles = [batch[index] for index in range(len(batch))]
    numbers = np.arange(5)[chosen.numpy() if isinstance(chosen, torch.Tensor) else chosen]
    expected = [singles[index] for index in np.atleast_1d(numbers)]
    assert_equal(batch[chosen], Crystals.cat(expected))


def assert_equal(one: Crystals, other: Crystals) -> None:
    for name in ("cell", "positions", "atomic_numbers", "system_idx"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_mask_selects_systems():
    batch = random_batch()
    assert_equal(batch[batch.n_atoms > 2], batch[torch.nonzero(batch.n_atoms > 2)[:, 0]])


def test_joining_undoes_splitting():
    batch = random_batch()
    assert_equal(Crystals.cat([batch[:2], batch[2], batch[3:]]), batch)


def test_nothing_selected_is_an_empty_batch():
    for nothing in (slice(5, None), [], np.array([])):
        with pytest.raises(ValueError, match="empty batch"):
            random_batch()[nothing]
    with pytest.raises(ValueError, match="empty batch"):
        Crystals.from_arrays(np.zeros((0, 3, 3)), np.zeros((0, 3)), [])


def test_conversion_keeps_types_of_integers_and_replacing_keeps_the_atoms():
    batch = random_batch()
    single = batch.to(torch.float32)
    assert single.cell.dtype == single.positions.dtype == torch.float32
    assert single.atomic_numbers.dtype == single.system_idx.dtype == torch.int64
    assert batch.to("meta").atomic_numbers.device.type == "meta"
    moved = batch.replace(positions=batch.positions * math.nan)  # a proposal may be anything: the sampler rejects it
    assert moved.cell is batch.cell and moved.species == batch.species
    with pytest.raises(ValueError, match=r"positions has shape \(1, 3\), expected"):
        batch.replace(positions=batch.positions[:1])
    with pytest.raises(TypeError):
        batch.replace(frac_coords=batch.frac_coords)


def test_a_batch_does_not_share_the_memory_of_its_arrays():
    cells, positions = np.eye(3)[None] * 4, np.zeros((1, 3))
    crystals = Crystals.from_arrays(cells, positions, [[26]], torch.float64)
    cells[:], positions[:] = 0, 1
    assert crystals.volume.item() == 64 and not crystals.positions.any()


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 4)), max_size=8))
def test_ragged_arange_joins_ranges(ranges):
    starts, counts = (torch.tensor([pair[column] for pair in ranges], dtype=torch.int64) for column in (0, 1))
    expected = [value for start, count in ranges for value in range(start, start + count)]
    assert ragged_arange(starts, counts).tolist() == expected


@given(species_lists, st.integers(1, 6), st.randoms(use_true_random=False))
def test_reduce_ignores_order_and_multiples(species, multiple, random):
    """It is the reduced formula of pymatgen."""
    repeated = species * multiple
    random.shuffle(repeated)
    composition = reduce_species(repeated)
    assert composition == reduce_species(species)
    assert list(composition) == sorted(composition)
    with warnings.catch_warnings(action="ignore"):  # of elements without electronegativity
        known = Composition(Counter(map(Element.from_Z, repeated))).get_reduced_composition_and_factor()[0]
    if len(composition) > 1:  # pymatgen writes O2, not O
        assert composition == {element.Z: count for element, count in known.items()}
    else:
        assert list(composition.values()) == [1]


def test_reduce_needs_an_atom():
    with pytest.raises(ValueError, match="species is empty"):
        reduce_species([])


@pytest.mark.parametrize("p", [0.5, 0.8])
def test_the_number_of_formula_units_is_geometric(p):
    """Chi-square of 4000 draws against P(m) = p (1 − p)^{m − 1}, the tail from 8 on taken together."""
    rng = torch.Generator().manual_seed(0)
    draws = [len(expand_composition({8: 2, 22: 1}, rng, p)) // 3 for _ in range(4000)]
    observed = np.bincount(np.minimum(draws, 8), minlength=9)[1:]
    expected = p * (1 - p) ** np.arange(8)
    expected[-1] = (1 - p) ** 7
    keep = 4000 * expected >= 5
    observed = np.append(observed[keep], observed[~keep].sum())
    expected = np.append(expected[keep], expected[~keep].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert stats.chisquare(observed, 4000 * expected).pvalue > 1e-3


@given(species_lists, st.integers(0, 1000))
def test_expanding_keeps_the_composition(species, seed):
    composition = reduce_species(species)
    expanded = expand_composition(composition, torch.Generator().manual_seed(seed))
    assert reduce_species(expanded) == composition


def test_expanding_is_bounded_if_asked_and_repeats_with_its_generator():
    composition = {8: 3, 22: 1, 56: 1}
    sizes = {
        len(expand_composition(composition, torch.Generator().manual_seed(s), 0.1, max_atoms=12)) for s in range(50)
    }
    assert sizes == {5, 10}
    assert len(expand_composition(composition, torch.Generator(), max_atoms=1)) == 5  # one unit at least
    assert expand_composition(composition, torch.Generator(), p=1.0) == [8, 8, 8, 22, 56]
    a, b = (expand_composition(composition, torch.Generator().manual_seed(3), 0.1) for _ in range(2))
    assert a == b


def of_volumes(species: list[list[int]], volumes: list[float]) -> Crystals:
    cells = np.eye(3) * np.cbrt(volumes)[:, None, None]
    return Crystals.from_arrays(cells, np.zeros((sum(map(len, species)), 3)), species, torch.float64)


def test_volumes_of_elements_are_recovered_from_exact_sums():
    true = np.linspace(8, 40, 101)
    rng = np.random.default_rng(0)
    species = [rng.integers(1, 101, rng.integers(1, 5)).tolist() for _ in range(3000)]
    fitted = fit_atomic_volumes(of_volumes(species, [true[numbers].sum() for numbers in species]), ridge=1e-8)
    np.testing.assert_allclose(fitted[1:], true[1:], rtol=1e-6)


def test_an_element_never_seen_has_the_mean_volume_and_none_is_tiny():
    volumes = fit_atomic_volumes(of_volumes([[1], [1], [8, 8]], [30.0, 30.0, 1.0]), ridge=1e-9)
    mean = (30 + 30 + 0.5) / 3
    assert float(volumes[79]) == float(volumes[0]) == pytest.approx(mean)
    assert float(volumes[1]) == pytest.approx(30) and float(volumes[8]) == pytest.approx(0.1 * mean)


def test_a_strong_ridge_pulls_to_the_mean():
    volumes = fit_atomic_volumes(of_volumes([[1], [8]], [10.0, 20.0]), ridge=1e9)
    np.testing.assert_allclose(volumes, 15, rtol=1e-6)


# Random numbers and batches


def test_numbers_of_a_crystal_do_not_depend_on_the_batch_it_is_in():
    batch = three_crystals()
    rngs = [keyed_rng("a", system) for system in range(len(batch))]
    together = (batch.random_atoms(rngs), batch.random_cells(rngs))
    for system in range(len(batch)):
        alone = keyed_rng("a", system)
        crystal = batch[system]
        assert torch.equal(crystal.random_atoms(alone), together[0][batch.system_idx == system])
        assert torch.equal(crystal.random_cells([alone])[0], together[1][system])


def three_crystals() -> Crystals:
    cells = np.stack([a * np.eye(3) for a in (3.0, 4.0, 5.0)])
    return Crystals.from_arrays(cells, np.random.default_rng(0).random((6, 3)), [[1], [2, 3], [4, 5, 6]], torch.float64)


def test_keys_that_differ_give_different_numbers_and_equal_keys_equal_ones():
    keys = [(0, 1), (1, 0), ("0", 1), (0, (1,)), (0, 1, 0)]
    draws = [float(torch.rand((), generator=keyed_rng(*key), dtype=torch.float64)) for key in keys]
    assert len(set(draws)) == len(keys)
    assert float(torch.rand((), generator=keyed_rng(0, 1), dtype=torch.float64)) == draws[0]


def test_symmetric_random_cells_have_the_density_they_say():
    """exp(−|ε|²/2) on symmetric matrices: variance 1 on the diagonal, 1/2 off it."""
    one = Crystals.from_arrays(np.eye(3)[None], np.zeros((1, 3)), [[1]], torch.float64)
    cells = one[[0] * 20_000].random_cells(torch.Generator().manual_seed(0))
    assert torch.equal(cells, cells.mT)
    variance = cells.var(dim=0)
    torch.testing.assert_close(variance, (torch.eye(3) + 1).double() / 2, rtol=0.05, atol=0.01)


@given(st.lists(st.integers(1, 30)), st.integers(1, 40))
def test_packing_keeps_the_order_fills_greedily_and_respects_the_limit(sizes, limit):
    runs = pack(sizes, limit)
    assert [i for run in runs for i in range(len(sizes))[run]] == list(range(len(sizes)))
    for run, following in pairwise(runs):
        assert sum(sizes[run]) + sizes[following.start] > limit  # the next one did not fit
    assert all(sum(sizes[run]) <= limit or run.stop - run.start == 1 for run in runs)


@given(unit=crystals(), seed=st.integers(0, 99))
def test_helpers_of_atoms_and_systems_agree_with_loops(unit, seed):
    batch = Crystals.cat([unit, unit[[0, 0]]])
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(len(batch.positions), 2, generator=rng, dtype=torch.float64)
    sums = torch.stack([values[batch.system_idx == system].sum(dim=0) for system in range(3)])
    torch.testing.assert_close(batch.sum_atoms(values), sums)
    assert torch.equal(batch.to_atoms(sums), sums[batch.system_idx])
    rows = torch.stack([x @ batch.cell[s] for x, s in zip(batch.positions, batch.system_idx)])
    torch.testing.assert_close(batch.multiply_rows(batch.positions, batch.cell), rows)
