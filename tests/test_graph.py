"""The graph equals the neighbour list of an independent library, for any cell and any placement of the atoms."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from ase.neighborlist import primitive_neighbor_list
from hypothesis import given
from hypothesis import strategies as st
from strategies import crystals

from contsp_core import Crystals, graph
from contsp_core.graph import Graph, build_graph, cutoff_radius, edge_vectors
from contsp_core.kernels import build_edges

multiples = st.sampled_from((0.6, 1.5, 2.5))


def by_torch(crystals: Crystals, cutoff: torch.Tensor) -> Graph:
    return build_graph(crystals, cutoff)


def by_kernel(crystals: Crystals, cutoff: torch.Tensor) -> Graph:
    return build_edges(crystals, cutoff).graph


BUILDERS = pytest.mark.parametrize("build", [by_torch, by_kernel])


def edge_set(graph: Graph) -> Counter:
    rows = torch.cat([graph.source[:, None], graph.target[:, None], graph.image.long()], dim=1)
    return Counter(map(tuple, rows.tolist()))


def neighbours_of_ase(batch: Crystals, cutoff: torch.Tensor) -> Counter:
    """(i, j, k): directed edges of a batch, system by system."""
    edges, first = Counter(), 0
    for system, numbers in enumerate(batch.species):
        single = batch[system]
        i, j, images = primitive_neighbor_list(
            "ijS", [True] * 3, single.cell[0].numpy(), single.positions.numpy(), float(cutoff[system])
        )
        edges.update((first + a, first + b, *map(int, image)) for a, b, image in zip(i, j, images))
        first += len(numbers)
    return edges


@BUILDERS
@given(crystal=crystals(densities=(0.05,)), multiple=multiples, seed=st.integers(0, 9))
def test_directed_edges_are_those_of_ase(build, crystal, multiple, seed):
    """Atoms lie on faces, and are moved several cells away."""
    images = torch.as_tensor(np.random.default_rng(seed).integers(-3, 4, (len(crystal.positions), 3)))
    crystal = crystal.replace(positions=crystal.positions + images.double() @ crystal.cell[0])
    cutoff = cutoff_radius(crystal, multiple) * 1.000123  # off the symmetric distances, where rounding would decide
    assert edge_set(build(crystal, cutoff).directed()) == neighbours_of_ase(crystal, cutoff)


@BUILDERS
@pytest.mark.parametrize("n_systems", [1, 5])
def test_a_batch_holds_the_edges_of_its_crystals(build, n_systems, monkeypatch):
    monkeypatch.setattr(graph, "CANDIDATES_PER_CHUNK", 1000)  # several chunks
    rng = np.random.default_rng(n_systems)
    counts = rng.integers(1, 9, n_systems)
    cells = np.eye(3) * 5 + rng.uniform(-3, 3, (n_systems, 3, 3))
    positions = np.concatenate([rng.uniform(-2, 2, (n, 3)) @ cell for n, cell in zip(counts, cells)])
    batch = Crystals.from_arrays(cells, positions, [[6] * n for n in counts], torch.float64)
    cutoff = cutoff_radius(batch, 2.2) * torch.linspace(0.8, 1.1, n_systems, dtype=torch.float64)
    found = build(batch, cutoff)
    assert edge_set(found.directed()) == neighbours_of_ase(batch, cutoff)
    assert (torch.diff(batch.system_idx[found.source]) >= 0).all()  # grouped by system


@BUILDERS
@given(crystal=crystals(densities=(0.05,)))
def test_each_pair_of_opposite_edges_is_held_once(build, crystal):
    once = build(crystal, cutoff_radius(crystal, 2.0))
    both = once.directed()
    assert len(both.source) == 2 * len(once.source)
    edges = edge_set(both)
    assert max(edges.values(), default=1) == 1
    assert edges == Counter((j, i, -x, -y, -z) for i, j, x, y, z in edges)
    assert not any(i == j and (x, y, z) == (0, 0, 0) for i, j, x, y, z in edges)


@BUILDERS
@given(crystal=crystals(densities=(0.05,)), seed=st.integers(0, 9))
def test_shifting_atoms_by_lattice_vectors_changes_images_only(build, crystal, seed):
    images = torch.as_tensor(np.random.default_rng(seed).integers(-4, 5, (len(crystal.positions), 3)))
    shifted = crystal.replace(positions=crystal.positions + images.double() @ crystal.cell[0])
    cutoff = cutoff_radius(crystal, 2.0) * 1.000123
    edges = build(crystal, cutoff).directed()
    moved = Graph(edges.source, edges.target, edges.image + (images[edges.source] - images[edges.target]).int())
    assert edge_set(build(shifted, cutoff).directed()) == edge_set(moved)


@BUILDERS
def test_one_atom_has_its_images_as_neighbours(build):
    """Simple cubic: 6 neighbours at 1, 12 at √2, 8 at √3, 6 at 2, in units of the cell edge."""
    crystal = Crystals.from_arrays(3 * np.eye(3)[None], np.array([[7.0, -20.0, 1.0]]), [[84]], torch.float64)
    for multiple, count in ((0.9, 0), (1.1, 6), (1.5, 18), (1.8, 26), (2.1, 32)):
        cutoff = cutoff_radius(crystal, multiple)
        assert len(build(crystal, cutoff).directed().source) == count


@BUILDERS
@pytest.mark.parametrize("flat", [[[4.0, 0, 0], [4000, 4, 0], [1e6, 5e5, 4]], np.diag([1e-5, 1e-5, 1e5])])
def test_a_cell_with_too_many_images_is_refused_before_memory_is_taken(build, flat):
    crystals = Crystals.from_arrays(np.stack([np.eye(3) * 4, flat]), np.zeros((3, 3)), [[1], [2, 3]], torch.float64)
    with pytest.raises(ValueError, match=r"crystal 1 has .* candidate pairs for R = .* Å, expected ≤ 5e\+07") as error:
        build(crystals, cutoff_radius(crystals))
    assert "\n" not in str(error.value)


@BUILDERS
def test_a_thousand_atoms_and_a_plate_are_not_too_many(build):
    rng = np.random.default_rng(0)
    cells = [np.eye(3) * 27, np.diag([30, 30, 0.01])]
    positions = np.concatenate([rng.random((n, 3)) @ cell for n, cell in zip((1000, 2), cells)])
    crystals = Crystals.from_arrays(np.stack(cells), positions, [[1] * 1000, [2, 3]], torch.float64)
    cutoff = cutoff_radius(crystals, 1.0)
    assert edge_set(build(crystals, cutoff).directed()) == neighbours_of_ase(crystals, cutoff)


@BUILDERS
def test_an_atom_that_is_nowhere_keeps_its_edges(build):
    """Dropped, they would leave a finite energy."""
    crystals = Crystals.from_arrays(np.stack([np.eye(3) * 4] * 2), np.zeros((3, 3)), [[1, 1], [1]], torch.float64)
    positions = crystals.positions.clone()
    positions[0] = torch.nan
    lost = crystals.replace(positions=positions)
    found = build(lost, cutoff_radius(crystals, 0.9))
    assert len(found.source) > 0 and (crystals.system_idx[found.source] == 0).all()
    assert edge_vectors(lost, found).isnan().all()


@BUILDERS
def test_two_atoms_at_one_point_are_neighbours(build):
    """The self term is left out by index, not by distance."""
    crystal = Crystals.from_arrays(9 * np.eye(3)[None], np.zeros((2, 3)), [[1, 1]], torch.float64)
    assert edge_set(build(crystal, torch.tensor([1.0], dtype=torch.float64))) == {(0, 1, 0, 0, 0): 1}


@given(crystal=crystals(), n_cells=st.integers(1, 3))
def test_the_cutoff_is_intensive(crystal, n_cells):
    """R = m (V / N)^{1/3} is the same for a supercell."""
    copies = [crystal.positions + n * crystal.cell[0, 0] for n in range(n_cells)]
    cell = crystal.cell.clone()
    cell[:, 0] *= n_cells
    larger = Crystals.from_arrays(
        cell.numpy(), torch.cat(copies).numpy(), [crystal.species[0] * n_cells], torch.float64
    )
    torch.testing.assert_close(cutoff_radius(larger), cutoff_radius(crystal))
    torch.testing.assert_close(cutoff_radius(crystal, 2.5), 2.5 * (crystal.volume / crystal.n_atoms) ** (1 / 3))
