"""The audit finds what is known of analytic energies, and nothing against ours on random crystals (P3, P4, P7, P8)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from cgcnn import CGCNN
from displacement import continuity_profile, describe_response, displacement_scan
from hypothesis import given, settings
from pymatgen.core import Lattice, Structure
from strategies import crystals, generators

from contsp_core import Crystals
from contsp_core.energy import ContinuousCGCNN, EnergyConfig
from contsp_core.graph import build_graph, cutoff_radius, edge_vectors, nearest_neighbors
from contsp_core.invariance import (
    MAX_ATOMS,
    PROBES,
    as_energy,
    audit,
    cross_cutoff,
    enlarge,
    graph_cutoff,
    overlap,
    rounding_noise,
    swap_neighbors,
    thin_cell,
)
from contsp_core.transformations import TRANSFORMATIONS, supercell

INVARIANCES = sorted(TRANSFORMATIONS)


def make_model(dtype: torch.dtype = torch.float64) -> ContinuousCGCNN:
    """A small continuous energy with random weights, by the plain torch path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ContinuousCGCNN(EnergyConfig(width=8, n_conv=2, n_basis=8))
    model.use_kernels = False
    return model.to(dtype).eval()


MODELS = {dtype: make_model(dtype) for dtype in (torch.float32, torch.float64)}


def pairs(crystals: Crystals, radius: float = 4.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source, target, vector and system of every pair within a radius."""
    graph = build_graph(crystals, torch.full_like(crystals.volume, radius))
    return graph.source, graph.target, edge_vectors(crystals, graph), crystals.system_idx[graph.source]


def per_atom(crystals: Crystals, system: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(n_systems,) sum of what each pair contributes, divided by the number of atoms."""
    return torch.zeros_like(crystals.volume).index_add(0, system, value.to(crystals.cell)) / crystals.n_atoms


def hard_energy(crystals: Crystals) -> torch.Tensor:
    """exp(−d²/4) of all pairs within 4 Å."""
    _, _, vector, system = pairs(crystals)
    return per_atom(crystals, system, torch.exp(-vector.square().sum(dim=1) / 4))


def smooth_energy(crystals: Crystals) -> torch.Tensor:
    """The same, cut with zero value and slope."""
    _, _, vector, system = pairs(crystals)
    distance = vector.norm(dim=1)
    window = (1 + torch.cos(math.pi * distance / 4)) / 2
    return per_atom(crystals, system, torch.exp(-(distance**2) / 4) * window)


def disordered(n_systems: int = 6, n_atoms: int = 7, seed: int = 0) -> Crystals:
    """Random crystals of random species, without symmetry."""
    rng = np.random.default_rng(seed)
    cells = np.eye(3) * (n_atoms / 0.05) ** (1 / 3) + 0.3 * rng.standard_normal((n_systems, 3, 3))
    positions = (rng.random((n_systems, n_atoms, 3)) @ cells).reshape(-1, 3)
    return Crystals.from_arrays(cells, positions, rng.integers(1, 100, (n_systems, n_atoms)).tolist(), torch.float64)


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


@settings(max_examples=6)
@given(unit=crystals())
def test_p4_energy_is_continuous(unit: Crystals) -> None:
    model = make_model()
    model.use_kernels = True
    table = audit(model, unit, checks=list(PROBES), progress=False).set_index("check")
    table = table[table["verdict"] != "impossible"]  # neighbours cannot always be swapped
    assert len(table) >= len(PROBES) - 1 and table["verdict"].isin(["continuous", "below rounding"]).all()
    assert (table["exponent"].dropna() > 0.9).all(), table.to_string()


def test_compiled_energy_passes_the_audit(structures: list[Structure]) -> None:
    model = make_model()
    model.use_kernels = True
    table = audit(model, structures, progress=False).set_index("kind")
    assert (table["verdict"].drop("continuity") == "invariant").all()
    assert (table["max_change"].drop("continuity") <= 1e-9).all()
    assert (table.loc["continuity", "verdict"] == "continuous").all()
    assert (table.loc["continuity", "max_change"] <= 1e-6).all()


# The audit itself, on energies with known answers


def test_smooth_pair_energy_passes(structures: list[Structure]) -> None:
    table = audit(smooth_energy, structures, cutoff=4.0, progress=False).set_index("kind")
    assert (table["max_change"].drop("continuity") < 1e-12).all()
    assert (table["verdict"].drop("continuity") == "invariant").all()
    assert (table.loc["continuity", "max_change"] < 1e-6).all()
    assert (table.loc["continuity", "exponent"] > 0.9).all()
    assert (table.loc["continuity", "lipschitz"] < 10).all()


def spread(crystals: Crystals) -> torch.Tensor:
    return crystals.sum_atoms(crystals.positions.square().sum(dim=1))


def anisotropic(crystals: Crystals) -> torch.Tensor:
    _, _, vector, system = pairs(crystals)
    return per_atom(crystals, system, torch.exp(-vector.square().sum(dim=1)) * vector[:, 0] ** 2)


def first_listed(crystals: Crystals) -> torch.Tensor:
    return crystals.atomic_numbers[torch.cumsum(crystals.n_atoms, 0) - crystals.n_atoms].double()


def cell_length(crystals: Crystals) -> torch.Tensor:
    return crystals.cell.norm(dim=(1, 2))


def count_atoms(crystals: Crystals) -> torch.Tensor:
    return crystals.n_atoms.double()


@pytest.mark.parametrize(
    ("check", "extra"),
    [
        ("translation", spread),
        ("rotation", anisotropic),
        ("reflection", anisotropic),
        ("permutation", first_listed),
        ("lattice images", spread),
        ("basis change", cell_length),
        ("supercell", count_atoms),
        ("primitive cell", count_atoms),
        ("Niggli cell", cell_length),
        ("all re-descriptions + congruence", count_atoms),
    ],
)
def test_each_invariance_that_is_broken_is_found(check: str, extra: Callable[[Crystals], torch.Tensor]) -> None:
    batch = supercell(disordered(3), torch.tensor([[2, 1, 0], [0, 1, 3], [0, 0, 1]]))  # neither primitive nor reduced

    def broken(crystals: Crystals) -> torch.Tensor:
        return smooth_energy(crystals) + 1e-6 * extra(crystals)

    assert audit(smooth_energy, batch, checks=[check], progress=False)["verdict"].item() == "invariant"
    found = audit(broken, batch, checks=[check], progress=False)
    assert found["verdict"].item() == "changes" and found["max_change"].item() > 1e-8


def below(radius: float) -> Callable[[Crystals], torch.Tensor]:
    """Pairs per atom closer than a radius."""

    def count(crystals: Crystals) -> torch.Tensor:
        _, _, vector, system = pairs(crystals, radius)
        return per_atom(crystals, system, torch.ones(len(vector)))

    return count


def own_images(crystals: Crystals) -> torch.Tensor:
    source, target, _, system = pairs(crystals)
    return per_atom(crystals, system, source == target)


def species_of_twelve(crystals: Crystals) -> torch.Tensor:
    graph = nearest_neighbors(crystals, 12)
    return per_atom(crystals, crystals.system_idx[graph.source], crystals.atomic_numbers[graph.target])


@pytest.mark.parametrize(
    ("check", "jump"),
    [
        ("atom crosses the cutoff", below(4.0)),
        ("two atoms overlap", below(1e-10)),
        ("two atoms approach", below(0.01)),
        ("two atoms approach", below(3e-6)),
        ("strain", below(4.0)),
        ("volume", lambda crystals: crystals.n_atoms / crystals.volume < 0.06),
        ("volume", lambda crystals: crystals.n_atoms / crystals.volume < 0.03),
        ("thin cell", own_images),
        ("neighbours swap order", species_of_twelve),
        ("search along a path", below(3.3)),
    ],
)
@pytest.mark.parametrize("height", [0.5, 0.01])
def test_each_jump_is_found(check: str, jump: Callable[[Crystals], torch.Tensor], height: float) -> None:
    batch, choice = disordered(), {"cutoff": 4.0, "checks": [check], "progress": False}
    assert audit(smooth_energy, batch, **choice)["verdict"].item() == "continuous"
    found = audit(lambda crystals: smooth_energy(crystals) + height * jump(crystals), batch, **choice)
    assert found["verdict"].item() == "jump" and found["max_change"].item() > height / 50
    assert abs(found["exponent"].item()) < 0.05


def test_jump_of_one_pair_is_exact() -> None:
    unit = Crystals.from_arrays(
        np.diag([7.9, 9.1, 9.7])[None], np.array([[0, 0, 0], [2.1, 2.2, 2.3]]), [[1, 1]], torch.float64
    )
    unit = supercell(unit, torch.diag(torch.tensor([1, 2, 1])))
    steps = continuity_profile(hard_energy, unit, [1e-8, -1e-8], cutoff=4.0)
    assert steps.energy[1] - steps.energy[0] == pytest.approx(math.exp(-4) / 4, rel=1e-6)  # one pair, four atoms


def test_energy_of_the_description_is_found_out(structures: list[Structure]) -> None:
    table = audit(cell_length, structures, checks=list(TRANSFORMATIONS), progress=False).set_index("check")
    changed = set(table.index[table["verdict"] == "changes"])
    same = {"translation", "rotation", "reflection", "permutation", "lattice images", "Niggli cell"}
    assert changed == set(TRANSFORMATIONS) - same


def test_ase_calculator_is_audited_per_atom(structures: list[Structure]) -> None:
    choice = [*TRANSFORMATIONS, "two atoms overlap", "two atoms approach"]
    table = audit(LennardJones(sigma=2.0, rc=5.0), structures, checks=choice, progress=False).set_index("check")
    assert (table.loc[list(TRANSFORMATIONS), "max_change"] < 1e-9).all()
    assert table.loc["two atoms overlap", "verdict"] == "infinite"
    assert table.loc["two atoms overlap", "lipschitz"] == np.inf


def test_cutoff_is_the_one_given_then_that_of_the_energy_then_ours() -> None:
    batch = disordered(2)
    known = [(LennardJones(rc=5.0), 5.0), (SinglePrecision(), 4.0), (CGCNN(cutoff=6.0), 6.0)]
    for energy, radius in known:
        assert graph_cutoff(energy, batch).tolist() == [radius, radius]
        assert graph_cutoff(energy, batch, 2.5).tolist() == [2.5, 2.5]
    spacing = (batch.volume / batch.n_atoms) ** (1 / 3)
    torch.testing.assert_close(graph_cutoff(smooth_energy, batch), 3 * spacing)
    for radius, told in ((np.float32(4), torch.full_like(spacing, 4)), ("smooth", 3 * spacing)):
        energy = LennardJones()
        energy.parameters = {"cutoff": radius}
        torch.testing.assert_close(graph_cutoff(energy, batch), told)
    for multiple in (2.5, 3.0):
        model = ContinuousCGCNN(EnergyConfig(width=8, cutoff_multiple=multiple))
        torch.testing.assert_close(graph_cutoff(model, batch), multiple * spacing)


class SinglePrecision(Calculator):
    """A potential like those of machine learning: float32, and forces by differentiation whenever it is asked."""

    implemented_properties = ("energy", "forces")

    def __init__(self, height: float = 0.0) -> None:
        super().__init__(cutoff=4.0)
        self.height = height

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        arrays = (self.atoms.cell.array[None], self.atoms.positions, [self.atoms.numbers.tolist()])
        unit = Crystals.from_arrays(*arrays, torch.float32)
        positions = unit.positions.clone().requires_grad_()
        energy = smooth_energy(unit.replace(positions=positions)).sum()
        (gradient,) = torch.autograd.grad(energy, positions)
        value = float(energy.detach()) + self.height * float(unit.n_atoms / unit.volume < 0.06)
        self.results = {"energy": value * len(atoms), "forces": -gradient.numpy()}


def test_calculator_that_differentiates_in_float32_is_audited_down_to_its_rounding() -> None:
    batch = disordered(2)
    with torch.no_grad():
        table = audit(SinglePrecision(), batch, seed=1, progress=False).set_index("kind")
    assert (table["verdict"].drop("continuity") == "invariant").all(), table.to_string()
    assert table.loc["continuity", "verdict"].isin(["continuous", "below rounding"]).all(), table.to_string()
    assert table.loc["continuity", "exponent"].dropna().between(0.7, 3).all()
    assert table["floor"].between(1e-8, 1e-4).all()
    jump = audit(SinglePrecision(height=0.1), batch, checks=["volume"], progress=False)
    assert jump["verdict"].item() == "jump" and jump["max_change"].item() == pytest.approx(0.1, abs=1e-5)


def test_changes_that_are_noise_are_called_that() -> None:
    def noisy(crystals: Crystals) -> torch.Tensor:
        return (1 + 1e-9 * smooth_energy(crystals)).float()

    table = audit(noisy, disordered(2), cutoff=4.0, progress=False)
    assert (table["verdict"] == np.where(table["kind"] == "continuity", "below rounding", "invariant")).all()


def test_rounding_noise_is_that_which_was_added() -> None:
    batch = disordered(1)[[0] * 200]
    rng, own = (torch.Generator().manual_seed(seed) for seed in (0, 1))

    def energy(crystals: Crystals) -> torch.Tensor:
        noise = torch.randn(len(crystals), generator=own, dtype=torch.float64)
        return smooth_energy(crystals) + 1e-6 * noise

    # the smaller of two estimates from eight correlated differences each is a little low
    assert rounding_noise(energy, batch, rng).median() == pytest.approx(0.75e-6, rel=0.25)
    exact = rounding_noise(smooth_energy, batch, rng)
    assert (exact < 1e-14).all() and (exact >= 2.0**-53 * smooth_energy(batch)).all()


def test_table_names_the_crystal(structures: list[Structure]) -> None:
    def only_copper(crystals: Crystals) -> torch.Tensor:
        copper = torch.tensor([29 in species for species in crystals.species])
        return torch.where(copper, crystals.positions.new_tensor(1.0) * crystals.cell[:, 0, 0], 0.0)

    table = audit(only_copper, structures, checks=["rotation"], progress=False)
    assert table["material_id"].tolist() == ["Cu"] and table["index"].tolist() == [2] and table["n_checked"].item() == 3


def test_the_worst_verdict_comes_before_the_largest_change() -> None:
    batch = disordered(2)
    steep = batch[0]

    def energy(crystals: Crystals) -> torch.Tensor:
        is_first = crystals.sum_atoms(crystals.atomic_numbers) == int(steep.atomic_numbers.sum())
        density = crystals.n_atoms / crystals.volume
        return torch.where(is_first, 1e9 * density, 0.1 * (density < 0.05))

    row = audit(energy, batch, checks=["volume"], progress=False).iloc[0]
    assert row["verdict"] == "jump" and row["index"] == 1 and row["max_change"] == pytest.approx(0.1)


def test_same_seed_same_table(structures: list[Structure]) -> None:
    first, second, other = (audit(smooth_energy, structures, seed, progress=False) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first, second)
    assert not first.equals(other)
    assert first.attrs["seed"] == 0 and first.attrs["energy_std"] > 0


def test_memory_is_bounded_by_the_atoms_at_a_time() -> None:
    batch, seen = disordered(1, 40)[[0] * 60], []

    def energy(crystals: Crystals) -> torch.Tensor:
        seen.append(len(crystals.positions))
        return crystals.n_atoms / crystals.volume

    audit(energy, batch, progress=False)
    assert max(seen) <= MAX_ATOMS < sum(seen)
    torch.testing.assert_close(as_energy(energy)(batch), batch.n_atoms / batch.volume)


def test_progress_goes_to_stderr(structures: list[Structure], capfd: pytest.CaptureFixture) -> None:
    audit(lambda crystals: crystals.n_atoms / crystals.volume, structures, checks=["rotation", "volume"])
    out, err = capfd.readouterr()
    assert out == "" and "6/6" in err


def test_model_is_left_as_it_was(structures: list[Structure]) -> None:
    model = make_model(torch.float32).train()
    audit(model, structures, checks=["rotation"], progress=False)
    assert model.training and all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_wrong_arguments_are_named(structures: list[Structure]) -> None:
    with pytest.raises(ValueError, match="checks holds 'rotations', expected names among"):
        audit(smooth_energy, structures, checks=["rotations"], progress=False)
    with pytest.raises(ValueError, match="probe is 'pressure', expected one of"):
        continuity_profile(smooth_energy, disordered(1), [0.1], "pressure")
    with pytest.raises(ValueError, match="crystal holds 3 crystals, expected one"):
        continuity_profile(smooth_energy, disordered(3), [0.1])
    with pytest.raises(ValueError, match=r"energy is 1\.0, expected a function"):
        as_energy(1.0)
    with pytest.raises(ValueError, match=r"energy returned shape \(8,\), expected \(3,\)"):
        as_energy(lambda c: c.positions[:, 0])(Crystals.from_structures(structures))


def test_one_structure_is_a_list_of_one(structures: list[Structure]) -> None:
    one, listed = (audit(smooth_energy, given, progress=False) for given in (structures[0], structures[:1]))
    pd.testing.assert_frame_equal(one, listed)


# The events that the probes set up


@settings(max_examples=30)
@given(unit=crystals(), source=generators())
def test_probes_meet_their_events(unit: Crystals, source: torch.Generator) -> None:
    unit = enlarge(unit)
    cutoff = cutoff_radius(unit)
    radius, delta = float(cutoff), 1e-3 * float(cutoff)

    def has_distance(batch: Crystals, distance: float) -> bool:
        _, _, vector, _ = pairs(batch, distance * 1.01 + 1e-9)
        return bool((vector.norm(dim=1) - distance).abs().min() < 1e-9 * radius)

    for sign in (-1, 1):
        step = sign * delta * torch.ones(1, dtype=torch.float64)
        assert has_distance(cross_cutoff(unit, cutoff, 12, source).at(step), radius + sign * delta)
        assert has_distance(thin_cell(unit, cutoff, 12, source).at(step), radius + sign * delta)
        assert has_distance(overlap(unit, cutoff, 12, source).at(step), delta)
    torch.testing.assert_close(thin_cell(unit, cutoff, 12, source).start.volume, unit.volume)


def test_coincident_atoms_have_no_direction_and_others_are_moved() -> None:
    sites = np.array([[0, 0, 0], [0, 0, 0], [1.0, 2.0, 2.0]])
    unit = Crystals.from_arrays(np.eye(3)[None] * 9, sites, [[1, 1, 1]], torch.float64)
    for seed in range(8):
        path = overlap(unit, cutoff_radius(unit), 12, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(path.positions.norm(), torch.tensor(1.0, dtype=torch.float64))


def test_swapped_neighbours_tie_at_zero(structures: list[Structure]) -> None:
    unit = Crystals.from_structures(structures[1:2], dtype=torch.float64)
    path = swap_neighbors(unit, cutoff_radius(unit), 12, torch.Generator().manual_seed(0))
    assert path.possible.all()
    graph = build_graph(path.start, cutoff_radius(unit)).directed()
    distance = edge_vectors(path.start, graph).norm(dim=1)
    sorted_distances = [distance[graph.source == atom].sort()[0] for atom in range(5)]
    assert min(float(d[12] - d[11]) for d in sorted_distances) < 1e-12


def test_profiles_of_the_worst_crystals_lead_to_their_rows() -> None:
    table = audit(hard_energy, disordered(3), checks=["rotation", "strain", "volume"], cutoff=4.0, progress=False)
    profiles = table.attrs["profiles"]
    assert list(profiles) == ["strain", "volume"]
    for row in table[1:].itertuples():
        steps, changes = profiles[row.check]
        assert len(steps) == len(changes) == 8 and (np.diff(steps) < 0).all()
        assert changes[-1] == row.max_change and row.lipschitz == max(np.divide(changes, steps))


def test_profile_goes_through_the_event(structures: list[Structure]) -> None:
    unit = Crystals.from_structures(structures[:1])
    profile = continuity_profile(smooth_energy, unit, np.linspace(-0.1, 0.1, 5), cutoff=4.0)
    assert list(profile.columns) == ["delta", "energy", "change"] and len(profile) == 5
    assert profile["change"][2] == 0 and (profile["change"][[0, 4]] > 0).all()


# The training map


# One atom moved


@pytest.fixture
def rock_salt() -> Crystals:
    """Rock salt, primitive cell."""
    unit = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    return Crystals.from_structures([unit.get_primitive_structure()], dtype=torch.float64)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_displacement(crystal: Crystals, atom: int, function: Callable[[torch.Tensor], torch.Tensor]):
    """An energy that is a function of the displacement (n, 3) of one atom."""
    start = crystal.positions[atom]
    return lambda moved: function(moved.positions.reshape(len(moved), -1, 3)[:, atom] - start)


def test_scan_of_a_spring_is_the_parabola_and_starts_at_rest(rock_salt: Crystals) -> None:
    spring = of_displacement(rock_salt, 1, lambda d: 3 + 2 * d.square().sum(dim=1))
    scan = displacement_scan(spring, rock_salt, 1, seeded(5), n_draws=200)
    np.testing.assert_allclose(scan["energy"], 3 + 2 * scan["displacement"] ** 2, rtol=1e-12)
    assert scan["displacement"].iloc[0] == 0 and len(scan) == 201
    rest = displacement_scan(of_displacement(rock_salt, 0, lambda d: d.norm(dim=1)), rock_salt, 1, seeded(5))
    assert (rest["energy"] == 0).all()  # no other atom moves


def test_draws_have_the_width_asked_for(rock_salt: Crystals) -> None:
    scan = displacement_scan(lambda moved: moved.volume, rock_salt, 0, seeded(1), n_draws=4000, sigma=0.05)
    variance = (scan["displacement"].iloc[1:] ** 2).mean() / 3
    assert variance == pytest.approx(0.05**2, rel=4 * np.sqrt(2 / 12000))  # four standard errors


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
def test_behaviour_of_a_known_function_is_named(
    rock_salt: Crystals, behaviour: str, share: float, function: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    scan = displacement_scan(of_displacement(rock_salt, 0, function), rock_salt, 0, seeded(3))
    found = describe_response(scan)
    assert found["behaviour"] == behaviour
    assert found["share_above"] == pytest.approx(share, abs=0.07)
    assert found["range"] == pytest.approx(scan["energy"].max() - scan["energy"].min())


@pytest.mark.parametrize(
    ("crystals_and_atom", "options", "message"),
    [
        (lambda c: (c, 2), {}, "atom is 2, expected 0 … 1"),
        (lambda c: (Crystals.cat([c, c]), 0), {}, "crystal is 2 crystals of 4 atoms, expected 1 of at least 2"),
        (lambda c: (Crystals(c.cell, c.positions[:1], c.atomic_numbers[:1], c.system_idx[:1]), 0), {}, "1 atoms"),
        (lambda c: (c, 0), {"n_draws": 0}, "n_draws is 0"),
        (lambda c: (c, 0), {"sigma": 0.0}, "sigma is 0.0"),
        (lambda c: (c, 0), {"n_draws": 3}, "has 3 draws, expected at least 5"),
    ],
)
def test_wrong_argument_of_a_scan_is_named(
    rock_salt: Crystals, crystals_and_atom: Callable, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe_response(displacement_scan(lambda c: c.volume, *crystals_and_atom(rock_salt), seeded(0), **options))
