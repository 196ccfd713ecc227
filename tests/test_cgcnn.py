"""CGCNN baselines: invariant as the theory says, and discontinuous exactly where it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.neighborlist import neighbor_list
from cgcnn import CGCNN
from displacement import continuity_profile
from hypothesis import given, settings
from strategies import crystals

from contsp_core import Crystals
from contsp_core.graph import edge_vectors, nearest_neighbors
from contsp_core.invariance import audit

CUTOFF = 4.0  # Å, short so that the tests are


def small(neighbors: str, n_neighbors: int = 12) -> CGCNN:
    return CGCNN(neighbors, cutoff=CUTOFF, n_neighbors=n_neighbors, n_features=8)


def disordered(n_systems: int = 6, n_atoms: int = 7, seed: int = 0) -> Crystals:
    """Random crystals without symmetry, so that no two neighbours are equally far."""
    rng = np.random.default_rng(seed)
    cells = np.eye(3) * (n_atoms / 0.05) ** (1 / 3) + 0.3 * rng.standard_normal((n_systems, 3, 3))
    positions = rng.random((n_systems, n_atoms, 3)) @ cells
    return Crystals.from_arrays(
        cells, positions.reshape(-1, 3), rng.integers(1, 100, (n_systems, n_atoms)).tolist(), torch.float64
    )


def test_radius_graph_is_invariant_and_jumps_at_its_cutoff() -> None:
    table = audit(small("radius"), disordered(), progress=False).set_index("check")
    assert (table.loc[table["kind"] != "continuity", "verdict"] == "invariant").all()
    jumping = ["atom crosses the cutoff", "two atoms approach", "strain", "volume", "thin cell", "search along a path"]
    assert (table.loc[jumping, "verdict"] == "jump").all()
    assert (table.loc[jumping, "max_change"] > 1e-5).all() and (table.loc[jumping, "exponent"].abs() < 0.01).all()
    # these events do not change the set of edges
    assert (table.loc[["two atoms overlap", "neighbours swap order"], "verdict"] == "continuous").all()


def test_nearest_neighbour_graph_is_invariant_without_ties_and_jumps_when_neighbours_swap() -> None:
    table = audit(small("nearest"), disordered(), progress=False).set_index("check")
    assert (table.loc[table["kind"] != "continuity", "verdict"] == "invariant").all()
    swap = table.loc["neighbours swap order"]
    assert swap["verdict"] == "jump" and swap["max_change"] > 1e-4 and abs(swap["exponent"]) < 0.01


def test_nearest_neighbour_graph_depends_on_the_description_where_neighbours_tie() -> None:
    # in this square planar arrangement one neighbour of the atom at the origin has to be chosen among two species
    cell, positions = np.diag([4.0, 4.0, 20.0]), np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0]], dtype=float)
    unit = Crystals.from_arrays(cell[None], positions, [[22, 8, 16]], torch.float64)
    listed_otherwise = Crystals(unit.cell, unit.positions[[0, 2, 1]], unit.atomic_numbers[[0, 2, 1]], unit.system_idx)
    model = small("nearest", n_neighbors=1).double()
    with torch.no_grad():
        assert abs(float(model(unit) - model(listed_otherwise))) > 1e-4


def test_jump_is_the_same_from_a_tenth_to_the_eighth_decimal() -> None:
    deltas = 10.0 ** -np.arange(5, 9)
    steps = continuity_profile(small("radius"), disordered(1), np.concatenate([deltas, -deltas]))
    outside, inside = np.split(steps["energy"].to_numpy(), 2)
    np.testing.assert_allclose(inside - outside, (inside - outside)[-1], rtol=0.05)
    assert abs((inside - outside)[-1]) > 1e-6


@settings(max_examples=30)
@given(unit=crystals(densities=(1e-3, 0.05, 1.0)))
def test_nearest_neighbours_are_those_that_ase_finds(unit: Crystals) -> None:
    graph = nearest_neighbors(unit, 12)
    ours = edge_vectors(unit, graph).norm(dim=1).reshape(-1, 12).numpy()
    atoms = Atoms(unit.species[0], unit.positions.numpy(), cell=unit.cell[0].numpy(), pbc=True)
    source, distance = neighbor_list("id", atoms, ours.max() * 1.001)
    for atom in range(len(atoms)):
        np.testing.assert_allclose(ours[atom], np.sort(distance[source == atom])[:12], atol=1e-9)


def test_weights_follow_from_the_seed_alone() -> None:
    first, second, other = CGCNN(seed=3), CGCNN(seed=3), CGCNN(seed=4)
    assert torch.equal(first.readout.weight, second.readout.weight)
    assert not torch.equal(first.readout.weight, other.readout.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighbors": "voronoi"}, "neighbors is 'voronoi', expected 'radius' or 'nearest'"),
        ({"cutoff": 0.0}, "cutoff=0.0"),
        ({"n_neighbors": 0}, "n_neighbors=0"),
    ],
)
def test_wrong_settings_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CGCNN(**arguments)


def test_forces_are_derivatives_between_jumps() -> None:
    unit, model = disordered(1, 4), small("radius").double()
    positions = unit.positions.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(unit.replace(positions=positions)).sum(), positions)
    step = torch.zeros_like(unit.positions)
    step[1, 2] = 1e-6
    with torch.no_grad():
        after, before = (model(unit.replace(positions=unit.positions + sign * step)) for sign in (1, -1))
    torch.testing.assert_close((after - before)[0] / 2e-6, gradient[1, 2], rtol=1e-5, atol=1e-8)
