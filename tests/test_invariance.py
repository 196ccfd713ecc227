"""The audit finds what is known of analytic energies, and nothing against ours on random crystals (P3, P4, P8)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from ase.calculators.lj import LennardJones
from hypothesis import given, settings
from pymatgen.core import Lattice, Structure
from strategies import crystals, generators

from contsp_core import Crystals
from contsp_core.data import load_split
from contsp_core.energy import ContinuousCGCNN, EnergyConfig
from contsp_core.graph import build_graph, cutoff_radius, edge_vectors
from contsp_core.invariance import (
    PROBES,
    as_energy,
    audit,
    continuity_profile,
    cross_cutoff,
    evaluate_in_chunks,
    overlap,
    swap_neighbors,
    thin_cell,
)
from contsp_core.lattice import niggli
from contsp_core.mala import AnnealConfig
from contsp_core.training import TrainConfig, contrastive_divergence_step, initial_model
from contsp_core.transformations import TRANSFORMATIONS, change_basis, random_redescription, supercell

INVARIANCES = sorted(TRANSFORMATIONS)


def make_model(dtype: torch.dtype = torch.float64) -> ContinuousCGCNN:
    """A small continuous energy with random weights, by the plain torch path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ContinuousCGCNN(EnergyConfig(width=8, n_conv=2, n_basis=8))
    model.use_kernels = False
    return model.to(dtype).eval()


MODELS = {dtype: make_model(dtype) for dtype in (torch.float32, torch.float64)}


def pair_energy(crystals: Crystals, smooth: bool, radius: float = 4.0) -> torch.Tensor:
    """Per-atom energy of a pair potential exp(−d²/4), cut at a radius, smoothly or not."""
    graph = build_graph(crystals, torch.full_like(crystals.volume, radius))
    distance = edge_vectors(crystals, graph).norm(dim=1)
    value = torch.exp(-(distance**2) / 4)
    if smooth:
        value = value * (1 + torch.cos(math.pi * distance / radius)) / 2
    system = crystals.system_idx[graph.source]
    return torch.zeros_like(crystals.volume).index_add(0, system, value) / crystals.n_atoms


def smooth_energy(crystals: Crystals) -> torch.Tensor:
    return pair_energy(crystals, smooth=True)


def hard_energy(crystals: Crystals) -> torch.Tensor:
    return pair_energy(crystals, smooth=False)


@pytest.fixture
def structures() -> list[Structure]:
    rock_salt = Structure(Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    perovskite = Structure(
        Lattice.cubic(4.0),
        ["Ba", "Ti", "O", "O", "O"],
        [[0, 0, 0], [0.5] * 3, [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]],
    )
    copper = Structure(Lattice.hexagonal(2.5, 4.1), ["Cu"], [[0.1, 0.2, 0.3]])
    for name, structure in {"MgO": rock_salt, "BaTiO3": perovskite, "Cu": copper}.items():
        structure.properties["material_id"] = name
    return [rock_salt, perovskite, copper]


# Our energy


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"])
@settings(max_examples=10)
@given(unit=crystals(), source=generators())
def test_p3_energy_is_invariant(dtype: torch.dtype, tolerance: float, unit: Crystals, source: torch.Generator) -> None:
    transformed = Crystals.cat([TRANSFORMATIONS[name].function(unit, source) for name in INVARIANCES])
    with torch.no_grad():
        expected = MODELS[dtype](unit.to(dtype))
        energies = MODELS[dtype](transformed.to(dtype))
    for name, energy in zip(INVARIANCES, energies):
        torch.testing.assert_close(
            energy, expected[0], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@settings(max_examples=10)
@given(unit=crystals())
def test_p4_energy_is_continuous(unit: Crystals) -> None:
    table = audit(MODELS[torch.float64], unit, transformations=[], deltas=(1e-4, 1e-6, 1e-8), progress=False)
    tried = table.dropna(subset="max_change")
    assert len(tried) >= len(PROBES) - 1  # neighbours cannot always be swapped
    assert (tried["max_change"] <= 1e-6).all(), table.to_string()


@settings(max_examples=40)
@given(unit=crystals(), source=generators())
def test_p8_niggli_form_is_canonical_and_keeps_the_energy(unit: Crystals, source: torch.Generator) -> None:
    energy = MODELS[torch.float64]
    reduced = niggli(unit)
    from_other_basis = niggli(change_basis(unit, source))
    again = niggli(reduced)
    assert torch.equal(again.cell, reduced.cell)
    metrics = [batch.cell[0] @ batch.cell[0].T for batch in (from_other_basis, reduced)]
    torch.testing.assert_close(*metrics, rtol=1e-9, atol=1e-9 * float(metrics[1].abs().max()))
    assert torch.det(unit.cell[0]) * torch.det(reduced.cell[0]) > 0
    with torch.no_grad():
        torch.testing.assert_close(energy(reduced), energy(unit), rtol=1e-9, atol=1e-9)


def test_compiled_energy_passes_the_audit(structures: list[Structure]) -> None:
    model = make_model()
    model.use_kernels = True
    table = audit(model, structures, progress=False).set_index("kind")
    assert (table["max_change"].drop("continuity") <= 1e-9).all()
    assert (table.loc["continuity", "max_change"] <= 1e-6).all()


# The audit itself, on energies with known answers


def test_smooth_pair_energy_passes(structures: list[Structure]) -> None:
    table = audit(smooth_energy, structures, cutoff=4.0, progress=False).set_index("kind")
    assert (table["max_change"].drop("continuity") < 1e-12).all()
    assert (table.loc["continuity", "max_change"] < 1e-6).all()
    assert (table.loc["continuity", "exponent"] > 0.9).all()


def test_hard_cutoff_jumps_by_the_pair_energy(structures: list[Structure]) -> None:
    table = audit(hard_energy, structures, cutoff=4.0, progress=False).set_index("check")
    invariance = table[table["kind"] != "continuity"]
    # pairs that sit exactly at the cutoff (4 Å in the perovskite) are counted or not by rounding
    assert (invariance["max_change"] > 1e-3).any()
    jump = table.loc["atom crosses the cutoff", "max_change"] * 4 / math.exp(-4)  # in pair energies, for up to 5 atoms
    assert 0.7 < jump < 20
    assert table.loc["search along a path", "exponent"] < 0.01


def test_jump_of_one_pair_is_exact() -> None:
    unit = Crystals.from_arrays(
        np.diag([7.9, 9.1, 9.7])[None], np.array([[0, 0, 0], [2.1, 2.2, 2.3]]), [[1, 1]], torch.float64
    )
    unit = supercell(unit, torch.diag(torch.tensor([1, 2, 1])))
    steps = continuity_profile(hard_energy, unit, [1e-8, -1e-8], cutoff=4.0)
    assert steps.energy[1] - steps.energy[0] == pytest.approx(math.exp(-4) / 4, rel=1e-6)  # one pair, four atoms


def test_energy_of_the_description_is_found_out(structures: list[Structure]) -> None:
    table = audit(lambda c: c.cell.norm(dim=(1, 2)), structures, probes=[], progress=False).set_index("check")
    changed = set(table.index[table["max_change"] > 1e-9])
    same = {"translation", "rotation", "reflection", "permutation", "lattice images", "Niggli cell"}
    assert changed == set(TRANSFORMATIONS) - same


def test_extensive_energy_is_told_apart_by_supercells(structures: list[Structure]) -> None:
    def count(crystals: Crystals) -> torch.Tensor:
        return crystals.n_atoms.double()

    choice = {"transformations": ["supercell"], "probes": [], "progress": False}
    assert audit(count, structures, **choice)["max_change"].item() >= 1
    assert audit(count, structures, extensive=True, **choice)["max_change"].item() == 0


def test_ase_calculator_is_audited_per_atom(structures: list[Structure]) -> None:
    table = audit(LennardJones(sigma=2.0, rc=5.0), structures, probes=["two atoms overlap"], progress=False)
    table = table.set_index("check")
    assert (table["max_change"].drop("two atoms overlap") < 1e-9).all()
    assert table.loc["two atoms overlap", "max_change"] == np.inf


def test_table_names_the_crystal(structures: list[Structure]) -> None:
    def only_copper(crystals: Crystals) -> torch.Tensor:
        copper = torch.tensor([29 in species for species in crystals.species])
        return torch.where(copper, crystals.positions.new_tensor(1.0) * crystals.cell[:, 0, 0], 0.0)

    table = audit(only_copper, structures, transformations=["rotation"], probes=[], progress=False)
    assert table["material_id"].tolist() == ["Cu"] and table["index"].tolist() == [2] and table["n_checked"].item() == 3


def test_same_seed_same_table(structures: list[Structure]) -> None:
    first, second, other = (audit(smooth_energy, structures, seed, progress=False) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(other)
    assert first.attrs["seed"] == 0 and first.attrs["energy_std"] > 0


def test_memory_is_bounded_by_the_atoms_at_a_time(structures: list[Structure]) -> None:
    batch = Crystals.from_structures(structures * 20, dtype=torch.float64)
    seen = []

    def energy(crystals: Crystals) -> torch.Tensor:
        seen.append((len(crystals.positions), crystals.n_systems))
        return crystals.density

    audit(energy, batch, max_atoms=30, progress=False)
    assert all(n_atoms <= 30 or n_systems == 1 for n_atoms, n_systems in seen)
    seen.clear()
    values = evaluate_in_chunks(energy, batch, max_atoms=30)
    torch.testing.assert_close(values, batch.density)
    assert len(seen) > 5


def test_progress_goes_to_stderr(structures: list[Structure], capfd: pytest.CaptureFixture) -> None:
    audit(lambda c: c.density, structures, probes=[])
    out, err = capfd.readouterr()
    assert out == "" and "30/30" in err


def test_model_is_left_as_it_was(structures: list[Structure]) -> None:
    model = make_model(torch.float32).train()
    audit(model, structures, transformations=["rotation"], probes=[], progress=False)
    assert model.training and model.fc_final.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transformations": ["rotations"]}, "transformations holds 'rotations', expected names among"),
        ({"probes": ["pressure"]}, "probes holds 'pressure', expected names among"),
    ],
)
def test_unknown_checks_are_named(structures: list[Structure], arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit(smooth_energy, structures, progress=False, **arguments)


def test_energy_of_wrong_shape_is_refused(structures: list[Structure]) -> None:
    with pytest.raises(ValueError, match=r"energy returned shape \(8,\), expected \(3,\)"):
        as_energy(lambda c: c.positions[:, 0])(Crystals.from_structures(structures))


# The events that the probes set up


@settings(max_examples=30)
@given(unit=crystals(), source=generators())
def test_probes_meet_their_events(unit: Crystals, source: torch.Generator) -> None:
    delta = 1e-3 * float(cutoff_radius(unit)[0])

    def has_distance(batch: Crystals, distance: float) -> bool:
        graph = build_graph(batch, torch.full_like(batch.volume, distance * 1.01 + 1e-9))
        lengths = edge_vectors(batch, graph).norm(dim=1)
        return bool((lengths - distance).abs().min() < 1e-9 * float(cutoff_radius(unit)[0]))

    radius = float(cutoff_radius(unit)[0])
    for sign in (-1, 1):
        assert has_distance(cross_cutoff(unit, cutoff_radius, 12, source).at(sign * delta), radius + sign * delta)
        assert has_distance(thin_cell(unit, cutoff_radius, 12, source).at(sign * delta), radius + sign * delta)
        assert has_distance(overlap(unit, cutoff_radius, 12, source).at(sign * delta), delta)
    thin = thin_cell(unit, cutoff_radius, 12, source).at(0.0)
    torch.testing.assert_close(thin.volume, unit.volume)


def test_swapped_neighbours_tie_at_zero(structures: list[Structure]) -> None:
    unit = Crystals.from_structures(structures[1:2], dtype=torch.float64)
    path = swap_neighbors(unit, cutoff_radius, 12, torch.Generator().manual_seed(0))
    assert path.possible.all()
    graph = build_graph(path.at(0.0), cutoff_radius(unit)).directed()
    distance = edge_vectors(path.at(0.0), graph).norm(dim=1)
    sorted_distances = [distance[graph.source == atom].sort()[0] for atom in range(5)]
    assert min(float(d[12] - d[11]) for d in sorted_distances) < 1e-12


def test_profile_is_symmetric_in_what_it_returns(structures: list[Structure]) -> None:
    profile = continuity_profile(smooth_energy, structures[0], np.linspace(-0.1, 0.1, 5), cutoff=4.0)
    assert profile.delta.shape == profile.energy.shape == profile.change.shape == (5,)
    assert profile.change[2] == 0
    with pytest.raises(ValueError, match="expected one"):
        continuity_profile(smooth_energy, Crystals.from_structures(structures), [0.1])


# The training map


@pytest.mark.parametrize("dataset", ["prototypes", "perov5"])
def test_p7_training_does_not_see_the_description(dataset: str, request: pytest.FixtureRequest) -> None:
    if dataset != "prototypes":
        request.getfixturevalue("data_dir")
    split = load_split(dataset, "train", n_jobs=1)
    crystals = split[:64].crystals
    source = torch.Generator().manual_seed(1)
    units = [random_redescription(crystals[index], source) for index in range(len(crystals))]
    assert len({len(unit.positions) / n_atoms for unit, n_atoms in zip(units, crystals.n_atoms.tolist())}) > 1
    config = TrainConfig(chain=AnnealConfig(n_steps=2), max_atoms=20)
    losses, gradients = [], []
    for batch in (crystals, Crystals.cat(units)):
        model = initial_model(crystals, EnergyConfig(width=8, n_conv=2, n_basis=8), seed=0).double()
        row = contrastive_divergence_step(model, batch, config, torch.Generator().manual_seed(0))
        losses.append(row["loss"])
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert gradients[0].abs().max() > 0.01
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
