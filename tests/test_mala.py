"""MALA leaves exp(−E / T) invariant: exact laws, an independent acceptance ratio, and coupled chains (P9).

Most tests start many independent chains from the exact law and ask whether, some steps later, the end points still
follow it: the end points are independent draws, so a Kolmogorov–Smirnov test has its textbook p-value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from test_energy import small_model
from torch import Tensor

from contsp_core import Crystals, mala
from contsp_core.diffusion import DiffusionConfig
from contsp_core.lattice import deform, niggli, niggli_reduce
from contsp_core.mala import AnnealConfig, Move, anneal, mala_init, mala_step
from contsp_core.sampler import random_crystals
from contsp_core.transformations import change_basis, permute, random_rotations, shift_images

LOG_VOLUME = math.log(30.0)  # ln(Å³), centre of the volume energies
WIDTH = 0.3  # of ln V
STIFFNESS = 40.0  # k, Å⁻²
TRICLINIC = np.array([[3.0, 0.2, 0.3], [0.4, 3.6, 0.5], [0.6, 0.7, 4.3]])  # Niggli-reduced, far from any other cell
FROZEN = 1e-20  # step size of a coordinate that is not to move


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch_of(cells: np.ndarray, frac_coords: np.ndarray, n_atoms: int) -> Crystals:
    """One crystal of ``n_atoms`` different atoms per cell (n, 3, 3), frac_coords (n, n_atoms, 3)."""
    positions = np.einsum("snj,sjk->snk", frac_coords, cells).reshape(-1, 3)
    return Crystals.from_arrays(cells, positions, [list(range(1, n_atoms + 1))] * len(cells), torch.float64)


def volume_energy(crystals: Crystals) -> Tensor:
    """(ln V − ln V₀)² / 2s²."""
    return (crystals.volume.log() - LOG_VOLUME) ** 2 / (2 * WIDTH**2)


def harmonic(sites: Tensor) -> Callable[[Crystals], Tensor]:
    """k/2 Σ |x_i − s_i|², to the nearest image: a harmonic crystal about ``sites`` (n_atoms, 3)."""

    def energy(crystals: Crystals) -> Tensor:
        offset = crystals.positions - sites.repeat(len(crystals), 1)
        inverse = torch.linalg.inv(crystals.cell.detach())[crystals.system_idx]
        images = torch.einsum("ni,nij->nj", offset.detach(), inverse).round()
        offset = offset - torch.einsum("ni,nij->nj", images, crystals.cell[crystals.system_idx])
        return crystals.sum_atoms(STIFFNESS / 2 * offset.square().sum(dim=1))

    return energy


def confined(crystals: Crystals) -> Tensor:
    """A function of ln V, of the shape L / V^{1/3} and of the fractional coordinates, one term for each."""
    shape = crystals.cell / crystals.volume[:, None, None] ** (1 / 3)
    target = torch.as_tensor(TRICLINIC / np.linalg.det(TRICLINIC) ** (1 / 3))
    atoms = crystals.sum_atoms((crystals.frac_coords - 0.5).square().sum(dim=1))
    return volume_energy(crystals) + 2000 * (shape - target).square().sum(dim=(1, 2)) + 200 * atoms


def run(energy, crystals: Crystals, n_steps: int, cell_step: float, atom_step: float, temperature=1.0, **options):
    """A chain at constant step sizes and temperature (a number, or one per system)."""
    steps = torch.tensor([cell_step, atom_step], dtype=torch.float64).repeat(len(crystals), 1)
    temperature = torch.as_tensor(temperature, dtype=torch.float64).expand(len(crystals))
    rng = generator(1)
    state, n_accepted = mala_init(energy, crystals), 0.0
    for _ in range(n_steps):
        state = mala_step(energy, state, steps, temperature, rng, **options)
        n_accepted += float(state.accepted.double().mean())
    return state, n_accepted / n_steps


# Exact laws


def harmonic_chains(proposal: str, temperature, n_steps: int = 8, n_systems: int = 1000, spread: float = 1.0):
    """End points (n_systems, 6), in units of √(T/k), of chains that start ``spread`` times as wide as the exact law."""
    rng = np.random.default_rng(0)
    sites = np.array([[0.5, 2.0, 1.0], [3.0, 3.5, 4.0]])
    scale = np.sqrt(np.broadcast_to(temperature, n_systems) / STIFFNESS)[:, None, None]
    cells = np.tile(np.diag([5.0, 5.3, 5.7]), (n_systems, 1, 1))
    positions = sites + spread * scale * rng.standard_normal((n_systems, 2, 3))
    crystals = Crystals.from_arrays(cells, positions.reshape(-1, 3), [[3, 9]] * n_systems, torch.float64)
    energy = harmonic(torch.as_tensor(sites))
    step = 0.25 * float(np.min(temperature)) / STIFFNESS
    state, acceptance = run(energy, crystals, n_steps, FROZEN, step, temperature, proposal=proposal)
    lengths = torch.as_tensor([5.0, 5.3, 5.7], dtype=torch.float64)
    offset = state.crystals.positions.view(n_systems, 2, 3) - torch.as_tensor(sites)
    offset = offset - (offset / lengths).round() * lengths
    return (offset.numpy() / scale).reshape(n_systems, 6), acceptance


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
def test_the_atoms_of_a_harmonic_crystal_keep_their_gaussian_law(proposal):
    """x_i − s_i ~ N(0, T/k): E = k/2 Σ |x_i − s_i|², at a cell that does not move."""
    offsets, acceptance = harmonic_chains(proposal, temperature=0.8)
    assert 0.5 < acceptance < 0.995  # rejections matter, moves happen
    assert stats.kstest(offsets.ravel(), "norm").pvalue > 1e-3
    assert offsets.var() == pytest.approx(1, abs=4 * math.sqrt(2 / offsets.size))
    assert np.abs(offsets.mean(axis=0)).max() < 4 / math.sqrt(len(offsets))


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
def test_chains_from_afar_reach_the_gaussian_law(proposal):
    offsets, _ = harmonic_chains(proposal, temperature=0.8, n_steps=80, n_systems=500, spread=2.5)
    assert stats.kstest(offsets.ravel(), "norm").pvalue > 1e-3


def test_each_chain_of_a_batch_has_the_law_of_its_own_temperature():
    temperature = np.where(np.arange(1500) % 3 == 0, 0.4, np.where(np.arange(1500) % 3 == 1, 1.0, 2.5))
    offsets, _ = harmonic_chains("strain", temperature, n_systems=1500)
    for chosen in (temperature == value for value in (0.4, 1.0, 2.5)):
        assert stats.kstest(offsets[chosen].ravel(), "norm").pvalue > 1e-3


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
def test_the_wrong_sign_of_the_drift_in_the_ratio_is_caught(proposal, monkeypatch):
    right = mala.log_move_density

    def wrong(move: Move, mean: Move, step: Tensor, crystals: Crystals) -> Tensor:
        return right(move, Move(-mean.cell, -mean.positions), step, crystals)

    monkeypatch.setattr(mala, "log_move_density", wrong)
    offsets, _ = harmonic_chains(proposal, temperature=0.8)
    assert stats.kstest(offsets.ravel(), "norm").pvalue < 1e-6
    assert offsets.var() < 0.8


def volume_law(measure: str, n_atoms: int, temperature: float = 1.0) -> tuple[float, float]:
    """Mean and standard deviation of ln V under exp(−E/T).

    |det L|⁻³ dL d(frac) = d(ln V) dμ(shape) d(frac): there ln V is Gaussian with the mean and variance T s² of its
    energy. dL dX has |det L|^{N+3} more, which moves the mean of a Gaussian by (N + 3) T s².
    """
    variance = temperature * WIDTH**2
    return LOG_VOLUME + (n_atoms + 3) * variance * (measure == "cartesian"), math.sqrt(variance)


def standard_log_volumes(state, measure: str, n_atoms: int, temperature: float) -> np.ndarray:
    mean, deviation = volume_law(measure, n_atoms, temperature)
    return (state.crystals.volume.log().numpy() - mean) / deviation


def free_crystals(measure: str, n_atoms: int, n_systems: int, temperature: float, spread: float = 1.0) -> Crystals:
    """Random cells with atoms anywhere in them; ln V has its exact law, or a wider one."""
    rng = np.random.default_rng(2)
    mean, deviation = volume_law(measure, n_atoms, temperature)
    log_volume = rng.normal(mean, spread * deviation, n_systems)
    cells = rng.standard_normal((n_systems, 3, 3)) + 2 * np.eye(3)
    cells *= np.exp((log_volume - np.log(np.abs(np.linalg.det(cells)))) / 3)[:, None, None]
    return batch_of(cells, rng.random((n_systems, n_atoms, 3)), n_atoms)


def strain_chains(measure: str, n_atoms: int, n_steps: int, n_systems: int, spread: float = 1.0):
    options = {"temperature": 0.7, "proposal": "strain", "measure": measure}
    start = free_crystals(measure, n_atoms, n_systems, 0.7, spread)
    state, acceptance = run(volume_energy, start, n_steps, 0.012, 0.05, **options)
    assert 0.3 < acceptance < 0.99
    return state


@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
@pytest.mark.parametrize("n_atoms", [1, 3])
def test_the_volume_keeps_its_law_while_shape_and_atoms_are_free(measure, n_atoms):
    """Any law of shapes will do here: a strain move changes ln V by the trace of ε, whatever the cell."""
    state = strain_chains(measure, n_atoms, n_steps=10, n_systems=1500)
    assert stats.kstest(standard_log_volumes(state, measure, n_atoms, 0.7), "norm").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
def test_the_volume_reaches_its_law_from_afar(measure):
    state = strain_chains(measure, n_atoms=2, n_steps=150, n_systems=600, spread=4.0)
    assert stats.kstest(standard_log_volumes(state, measure, 2, 0.7), "norm").pvalue > 1e-3


def volumes_after_cartesian_moves(measure: str, n_systems: int = 1000) -> np.ndarray:
    """Standardised ln V, when shapes have found their law by strain moves and then the paper's moves take over."""
    start = strain_chains(measure, n_atoms=2, n_steps=80, n_systems=n_systems).crystals
    options = {"temperature": 0.7, "proposal": "cartesian", "measure": measure}
    state, acceptance = run(volume_energy, start, 30, 0.05, 0.05, **options)
    assert 0.1 < acceptance < 0.99
    return standard_log_volumes(state, measure, 2, 0.7)


@pytest.mark.slow
@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
def test_both_proposals_have_the_same_law_of_volumes(measure):
    """The cells are reduced on the way, and the law of a Cartesian move depends on the basis."""
    assert stats.kstest(volumes_after_cartesian_moves(measure), "norm").pvalue > 1e-3


def test_a_way_back_that_ignores_the_reduction_is_caught(monkeypatch):
    """−(ΔL, ΔX) is the way back in the basis before the reduction; its density is another one."""
    monkeypatch.setattr(mala, "reverse_move", lambda old, moved, new, move, _: Move(-move.cell, -move.positions))
    start = free_crystals("cartesian", 2, 400, 0.7)
    state, _ = run(volume_energy, start, 20, 0.05, 0.05, temperature=0.7)
    assert stats.kstest(standard_log_volumes(state, "cartesian", 2, 0.7), "norm").pvalue < 1e-6


@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
@pytest.mark.parametrize(("proposal", "steps"), [("cartesian", (8e-4, 2e-3)), ("strain", (1e-4, 2e-3))])
def test_the_volume_of_a_confined_crystal_keeps_its_law(proposal, steps, measure):
    """The cell stays near a reduced one and the atoms near its middle, so that no reduction interferes."""
    n_systems, n_atoms, rng = 1200, 2, np.random.default_rng(3)
    mean, deviation = volume_law(measure, n_atoms)
    # shape and atoms start at rest: they are independent of the volume under the target, but not under the moves
    cells = (
        TRICLINIC
        * np.exp((rng.normal(mean, deviation, n_systems) - np.log(np.linalg.det(TRICLINIC))) / 3)[:, None, None]
    )
    start = batch_of(cells, np.full((n_systems, n_atoms, 3), 0.5), n_atoms)
    options = {"proposal": proposal, "measure": measure}
    warm, _ = run(confined, start, 60, *steps, **options)
    # re-draw the volume at the shapes and fractional coordinates that the chains have found
    log_volume = torch.as_tensor(rng.normal(mean, deviation, n_systems))
    scale = ((log_volume - warm.crystals.volume.log()) / 3).exp()
    atoms = scale[warm.crystals.system_idx][:, None]
    exact = warm.crystals.replace(
        cell=warm.crystals.cell * scale[:, None, None], positions=warm.crystals.positions * atoms
    )
    state, acceptance = run(confined, exact, 15, *steps, **options)
    assert 0.4 < acceptance < 0.99
    assert (state.crystals.frac_coords - 0.5).abs().max() < 0.5
    assert stats.kstest(standard_log_volumes(state, measure, n_atoms, 1.0), "norm").pvalue > 1e-3


def test_swapping_the_two_measures_is_caught():
    """The volume test has the power to tell dL dX from the invariant measure."""
    rng = np.random.default_rng(2)
    mean, deviation = volume_law("cartesian", 2)
    cells = np.eye(3) * np.exp(rng.normal(mean, deviation, 800) / 3)[:, None, None]
    crystals = batch_of(cells, rng.random((800, 2, 3)), 2)
    state, _ = run(volume_energy, crystals, 10, 0.012, 0.05, proposal="strain", measure="invariant")
    assert stats.kstest(standard_log_volumes(state, "cartesian", 2, 1.0), "norm").pvalue < 1e-6


# The acceptance ratio, recomputed


def symmetric(entries: np.ndarray) -> np.ndarray:
    """(6,) xx, yy, zz, xy, xz, yz -> (3, 3)."""
    xx, yy, zz, xy, xz, yz = entries
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def coordinates(cell: np.ndarray, proposal: str) -> np.ndarray:
    return cell[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] if proposal == "strain" else cell.ravel()


def numerical_gradient(function: Callable[[np.ndarray], float], x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        shift = np.zeros_like(x)
        shift[index] = h
        grad[index] = (function(x + shift) - function(x - shift)) / (2 * h)
    return grad


BOX = np.array(list(product(range(-3, 4), repeat=3)), dtype=float)


def energy_of(cell: np.ndarray, positions: np.ndarray) -> float:
    """2 ln²(V/30) and exp(−r²/2) summed over all pairs of atoms and images, written with numpy."""
    vectors = positions[:, None, None] - positions[None, :, None] + BOX @ cell
    return 2 * math.log(abs(np.linalg.det(cell)) / 30) ** 2 + np.exp(-np.sum(vectors**2, axis=-1) / 2).sum()


def energy_in_torch(crystals: Crystals) -> Tensor:
    """The same for a batch of crystals with equally many atoms."""
    positions = crystals.positions.view(len(crystals), -1, 3)
    pairs = positions[:, :, None] - positions[:, None]
    vectors = pairs[:, :, :, None] + (torch.as_tensor(BOX) @ crystals.cell)[:, None, None]
    return 2 * (crystals.volume / 30).log() ** 2 + torch.exp(-vectors.square().sum(dim=-1) / 2).sum(dim=(1, 2, 3))


def expm_symmetric(strain: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(strain)
    return vectors @ np.diag(np.exp(values)) @ vectors.T


def drift(cell: np.ndarray, positions: np.ndarray, proposal: str, step, temperature: float):
    """Means of the moves of cell (in independent coordinates) and atoms, by numerical differentiation."""
    if proposal == "strain":

        def strained(entries: np.ndarray) -> float:
            stretch = expm_symmetric(symmetric(entries))
            return energy_of(cell @ stretch, positions @ stretch)

        # along xy the two entries of ε move together; the gradient in the entries of a symmetric matrix is half of it
        on_cell = numerical_gradient(strained, np.zeros(6)) / np.array([1, 1, 1, 2, 2, 2])
    else:
        on_cell = numerical_gradient(lambda c: energy_of(c, positions), cell).ravel()
    on_atoms = numerical_gradient(lambda x: energy_of(cell, x), positions)
    return -step[0] * on_cell / temperature, -step[1] * on_atoms.ravel() / temperature


def log_density(cell_move, atom_move, mean, proposal: str, step) -> float:
    """Gaussian densities of independent coordinates; an off-diagonal of a symmetric strain has half the variance."""
    cell_scale = np.sqrt(2 * step[0] * (np.array([1, 1, 1, 0.5, 0.5, 0.5]) if proposal == "strain" else np.ones(9)))
    cell = stats.norm.logpdf(cell_move, mean[0], cell_scale).sum()
    return cell + stats.norm.logpdf(atom_move.ravel(), mean[1], math.sqrt(2 * step[1])).sum()


def log_accept_ratio(cell, positions, cell_noise, atom_noise, proposal, measure, step, temperature) -> float:
    """ln of π(U′) q(U | U′) |J| / π(U) q(U′ | U), from standard normal draws, all with numpy and scipy."""
    n_atoms = len(positions)
    mean = drift(cell, positions, proposal, step, temperature)
    noise = (cell_noise + cell_noise.T) / 2 if proposal == "strain" else cell_noise
    cell_move = mean[0] + math.sqrt(2 * step[0]) * coordinates(noise, proposal)
    atom_move = mean[1].reshape(-1, 3) + math.sqrt(2 * step[1]) * atom_noise
    if proposal == "strain":
        stretch = expm_symmetric(symmetric(cell_move))
        new_cell, new_positions = cell @ stretch, positions @ stretch + atom_move
        back = -cell_move, -atom_move @ np.linalg.inv(stretch)
        # (L, X, ε, δ) -> (L′, X′, −ε, −δ e^{−ε}) has the Jacobian (det L′ / det L)³ with respect to dL dX dε dδ
        log_jacobian = 3 * math.log(abs(np.linalg.det(new_cell) / np.linalg.det(cell)))
    else:
        # the way back starts at the reduced description, and leads to the old crystal in that basis and those images
        moved_cell, moved = cell + cell_move.reshape(3, 3), positions + atom_move
        basis_change = niggli_reduce(torch.as_tensor(moved_cell[None]))[1][0].numpy()
        new_cell = basis_change @ moved_cell
        images = -np.floor(moved @ np.linalg.inv(new_cell))
        new_positions = moved + images @ new_cell
        old_cell, old_positions = basis_change @ cell, positions + images @ basis_change @ cell
        back, log_jacobian = ((old_cell - new_cell).ravel(), old_positions - new_positions), 0.0
    new_mean = drift(new_cell, new_positions, proposal, step, temperature)
    backward = log_density(*back, new_mean, proposal, step)
    forward = log_density(cell_move, atom_move, mean, proposal, step)
    growth = math.log(abs(np.linalg.det(new_cell) / np.linalg.det(cell)))
    base = 0.0 if measure == "cartesian" else -(n_atoms + 3) * growth
    fall = energy_of(cell, positions) - energy_of(new_cell, new_positions)
    return fall / temperature + backward - forward + log_jacobian + base


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
def test_a_step_accepts_what_an_independent_ratio_accepts(proposal, measure, monkeypatch):
    n_systems, n_atoms, rng = 24, 2, np.random.default_rng(5)
    cells = TRICLINIC + 0.3 * rng.standard_normal((n_systems, 3, 3))
    state = mala_init(energy_in_torch, batch_of(cells, rng.random((n_systems, n_atoms, 3)), n_atoms))
    scale = 1 if proposal == "strain" else 8
    step = scale * np.stack([rng.uniform(2e-3, 2e-2, n_systems), rng.uniform(1e-2, 1e-1, n_systems)], axis=1)
    temperature = rng.uniform(0.3, 1.5, n_systems)
    ratios: list[Tensor] = []
    accept = mala.metropolis
    monkeypatch.setattr(mala, "metropolis", lambda ratio, rng: ratios.append(ratio) or accept(ratio, rng))
    new = mala_step(
        energy_in_torch, state, torch.as_tensor(step), torch.as_tensor(temperature), generator(7), proposal, measure
    )
    draws = generator(7)
    cell_noise = torch.randn(n_systems, 3, 3, generator=draws, dtype=torch.float64).numpy()
    atom_noise = torch.randn(n_systems, n_atoms, 3, generator=draws, dtype=torch.float64).numpy()
    uniform = torch.rand(n_systems, generator=draws, dtype=torch.float64).numpy()
    cells, positions = state.crystals.cell.numpy(), state.crystals.positions.view(-1, n_atoms, 3).numpy()
    expected = np.array(
        [
            log_accept_ratio(
                cells[s], positions[s], cell_noise[s], atom_noise[s], proposal, measure, step[s], temperature[s]
            )
            for s in range(n_systems)
        ]
    )
    np.testing.assert_allclose(ratios[0].numpy(), expected, rtol=1e-5, atol=1e-5)
    assert (new.accepted.numpy() == (np.log(uniform) < expected)).all()
    assert 0 < new.accepted.sum() < n_systems


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
def test_the_measure_factor_is_the_jacobian_of_move_and_return(proposal, measure):
    """|∂(U′, back) / ∂(U, move)| in the coordinates of dL dX dε dδ, by automatic differentiation.

    A Cartesian move ends in another basis and with other images, as after a reduction.
    """
    n_atoms, rng = 2, np.random.default_rng(1)
    n_cell = 6 if proposal == "strain" else 9
    basis_change = torch.tensor([[1, 1, 0], [0, 1, -2], [0, 0, 1.0]], dtype=torch.float64)
    images = torch.tensor([[1, 0, -1], [0, 2, 0.0]], dtype=torch.float64)
    start = batch_of(TRICLINIC[None], rng.random((1, n_atoms, 3)), n_atoms)
    entries = torch.tensor([[0, 3, 4], [3, 1, 5], [4, 5, 2]])

    def unpack(cell_move: Tensor) -> Tensor:
        return (cell_move[entries] if proposal == "strain" else cell_move.view(3, 3))[None]

    def there_and_back(x: Tensor) -> Tensor:
        cell, positions, cell_move, atom_move = x.split([9, 3 * n_atoms, n_cell, 3 * n_atoms])
        old = start.replace(cell=cell.view(1, 3, 3), positions=positions.view(-1, 3))
        move = Move(unpack(cell_move), atom_move.view(-1, 3))
        moved = mala.apply_move(old, move, proposal)
        new = moved.replace(cell=basis_change @ moved.cell)
        new = new.replace(positions=moved.positions + images @ new.cell[0])
        back = mala.reverse_move(old, moved, new, move, proposal)
        back_cell = back.cell[0][[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]] if proposal == "strain" else back.cell.view(-1)
        return torch.cat([new.cell.view(-1), new.positions.reshape(-1), back_cell, back.positions.reshape(-1)])

    move = torch.as_tensor(0.2 * rng.standard_normal(n_cell + 3 * n_atoms))
    x = torch.cat([start.cell.view(-1), start.positions.view(-1), move])
    jacobian = torch.autograd.functional.jacobian(there_and_back, x)
    new_cell = there_and_back(x)[:9].view(1, 3, 3)
    new = start.replace(cell=new_cell)
    expected = torch.linalg.det(jacobian).abs().log()
    if measure == "invariant":  # the target has the density V^{−N−3} with respect to dL dX
        expected = expected - (n_atoms + 3) * (new.volume / start.volume).log()[0]
    torch.testing.assert_close(mala.log_measure_ratio(start, new, proposal, measure)[0], expected)


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
def test_a_move_and_its_reverse_lead_back(proposal):
    """Through reductions: the steps are so large that bases and images change."""
    crystals = random_crystals([[1], [2, 3], [4] * 5], generator()).to(torch.float64)
    state = mala_init(energy_in_torch_any, crystals)
    step = torch.full((3, 2), 0.5, dtype=torch.float64)
    move = mala.draw_move(state, proposal, step, torch.ones(3, dtype=torch.float64), generator(3))
    moved = mala.apply_move(state.crystals, move, proposal)
    there = niggli(moved)
    assert (there.cell != moved.cell).flatten(1).any(dim=1).all()
    back = mala.reverse_move(state.crystals, moved, there, move, proposal)
    again = niggli(mala.apply_move(there, back, proposal))
    assert_same_solid(state.crystals, again, 1e-9)
    if proposal == "strain":
        torch.testing.assert_close(move.cell, move.cell.mT)


def energy_in_torch_any(crystals: Crystals) -> Tensor:
    return volume_energy(crystals) + crystals.sum_atoms(crystals.frac_coords.sin().square().sum(dim=1))


def test_the_gradient_in_the_cell_is_recovered_from_the_strain_gradient():
    """Also after the cell was reduced and the atoms were wrapped: then it is that of the new description."""
    model = small_model()
    crystals = random_crystals([[8, 22], [26]], generator(4)).to(torch.float64)
    state = mala_init(model, change_basis(crystals, generator()))
    moving = state.crystals.replace(cell=state.crystals.cell.clone().requires_grad_())
    (expected,) = torch.autograd.grad(model(moving).sum(), moving.cell)
    torch.testing.assert_close(mala.cell_gradient(state), expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(state.grad_strain, state.grad_strain.mT, rtol=1e-8, atol=1e-10)


def test_metropolis_accepts_with_the_probability_of_the_ratio():
    ratio = torch.tensor([-math.inf, math.nan, 0.0, 3.0, math.log(0.3)], dtype=torch.float64).repeat(4000)
    rate = mala.metropolis(ratio, generator()).double().view(-1, 5).mean(dim=0)
    assert rate[:4].tolist() == [0, 0, 1, 1]
    assert float(rate[4]) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))


# Coupled chains


def coupled_draw(rotation: Tensor, order: Tensor) -> Callable[..., Move]:
    """``draw_move`` whose noise is rotated, and handed to atoms in another order."""
    draw, mean_of = mala.draw_move, mala.mean_move

    def draw_transformed(state, proposal, step, temperature, rng) -> Move:
        move, mean = draw(state, proposal, step, temperature, rng), mean_of(state, proposal, step, temperature)
        cell = rotation.mT @ (move.cell - mean.cell) @ rotation
        positions = torch.einsum(
            "ni,nij->nj", (move.positions - mean.positions)[order], rotation[state.crystals.system_idx]
        )
        return Move(mean.cell + cell, mean.positions + positions)

    return draw_transformed


def path(crystals: Crystals, proposal: str, measure: str, n_steps: int = 40) -> list:
    model, rng = small_model(), generator(9)
    step = torch.tensor([2e-3, 2e-2], dtype=torch.float64).repeat(len(crystals), 1)
    temperature = torch.linspace(0.05, 0.5, len(crystals), dtype=torch.float64)
    states = [mala_init(model, crystals)]
    for _ in range(n_steps):
        states.append(mala_step(model, states[-1], step, temperature, rng, proposal, measure))
    return states


def assert_same_solid(one: Crystals, other: Crystals, tolerance: float = 1e-6) -> None:
    """Equal lattices, and atom i of one is a lattice image of atom i of the other."""
    basis_change = other.cell @ torch.linalg.inv(one.cell)
    assert (basis_change - basis_change.round()).abs().max() < tolerance
    torch.testing.assert_close(torch.linalg.det(basis_change).abs(), torch.ones(len(one), dtype=torch.float64))
    offset = other.replace(positions=other.positions - one.positions).frac_coords
    assert (offset - offset.round()).abs().max() < tolerance
    assert (one.atomic_numbers == other.atomic_numbers).all()


@pytest.mark.parametrize("measure", ["cartesian", "invariant"])
def test_strain_chains_of_one_solid_stay_one_solid(measure, monkeypatch):
    """Re-based, shifted by lattice vectors, permuted and rotated, with the noise transformed in the same way."""
    crystals = random_crystals([[8, 8, 22], [26], [11, 17] * 3], generator(2)).to(torch.float64)
    rng = generator(6)
    order = permute(crystals.replace(positions=torch.arange(10.0).double()[:, None].repeat(1, 3)), rng).positions
    order = order[:, 0].long()
    rotation = random_rotations(len(crystals), rng)
    redescribed = shift_images(change_basis(crystals, rng), rng)
    redescribed = Crystals(
        redescribed.cell, redescribed.positions[order], redescribed.atomic_numbers[order], redescribed.system_idx
    )
    reference = path(crystals, "strain", measure)
    monkeypatch.setattr(mala, "draw_move", coupled_draw(rotation, order))
    coupled = path(deform(redescribed, rotation), "strain", measure)
    accepted = torch.stack([state.accepted for state in reference[1:]])
    assert 0.2 < accepted.double().mean() < 1
    for one, other in zip(reference, coupled, strict=True):
        assert torch.equal(one.accepted, other.accepted)
        torch.testing.assert_close(one.energy, other.energy, rtol=1e-8, atol=1e-8)
        rotated = deform(one.crystals, rotation)
        permuted = Crystals(rotated.cell, rotated.positions[order], rotated.atomic_numbers[order], rotated.system_idx)
        assert_same_solid(permuted, other.crystals)


# Robustness and schedules


def test_proposals_with_a_non_finite_energy_are_rejected_and_counted():
    """The energy is NaN or infinite, or its gradient is, in part of the space."""

    def energy(crystals: Crystals) -> Tensor:
        value = volume_energy(crystals)
        bad = torch.tensor([math.nan, -math.inf, math.nan], dtype=value.dtype).repeat(len(value) // 3)
        return torch.where(crystals.volume.log() > LOG_VOLUME, bad, value)

    cells = np.tile(TRICLINIC * (25 / np.linalg.det(TRICLINIC)) ** (1 / 3), (30, 1, 1))
    crystals = batch_of(cells, np.full((30, 1, 3), 0.5), 1)
    state = mala_init(energy, crystals)
    step = torch.tensor([0.02, 0.1], dtype=torch.float64).repeat(30, 1)
    rng, n_proposed_outside = generator(), 0
    for _ in range(40):
        state = mala_step(energy, state, step, torch.ones(30, dtype=torch.float64), rng, "strain")
        assert (state.crystals.volume.log() <= LOG_VOLUME).all()
        for tensor in (
            state.energy,
            state.grad_strain,
            state.grad_positions,
            state.crystals.cell,
            state.crystals.positions,
        ):
            assert torch.isfinite(tensor).all()
        n_proposed_outside = int(state.n_nonfinite.sum())
    assert 100 < n_proposed_outside < 40 * 30 - 100
    assert state.accepted.any()


def test_a_gradient_that_is_not_finite_rejects_the_proposal():
    """E = √(V − 20): its value is finite where its gradient is not (V = 20), which a real chain hardly meets."""
    crystals = batch_of(np.eye(3)[None] * 3.0, np.zeros((1, 1, 3)), 1)
    state = mala_init(volume_energy, crystals)
    step = torch.full((1, 2), 1e-3, dtype=torch.float64)

    def spoiled(crystals: Crystals) -> Tensor:
        return volume_energy(crystals) + (crystals.positions.sum() * 0).sqrt()

    new = mala_step(spoiled, state, step, torch.ones(1, dtype=torch.float64), generator(), "strain")
    assert not new.accepted.any() and int(new.n_nonfinite) == 1
    assert torch.equal(new.energy, state.energy) and torch.equal(new.crystals.cell, state.crystals.cell)


def impossible_moves() -> dict[str, Tensor]:
    cell = torch.as_tensor(TRICLINIC)
    flat = torch.zeros(3, 3, dtype=torch.float64)
    flat[2] = cell[0] + cell[1] - cell[2]
    return {
        "flat": flat,
        "nearly flat": flat * (1 - 1e-14),
        "a point": -cell,
        "tiny": -0.95 * cell,
        "a needle": cell @ torch.diag(torch.tensor([14.0, -7, -7], dtype=torch.float64).exp())
        - cell,  # volume as before
        "a plate": cell @ torch.diag(torch.tensor([7.0, 7, -14], dtype=torch.float64).exp()) - cell,
        "NaN": torch.full_like(cell, math.nan),
        "infinite": torch.full_like(cell, math.inf),
        "huge": torch.full_like(cell, 1e200),
    }


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("kind", impossible_moves())
def test_a_proposal_that_is_no_crystal_is_rejected(kind, fused, monkeypatch):
    """The other chain of the batch goes on."""
    model = small_model()
    model.use_kernels = fused
    state = mala_init(model, batch_of(np.stack([TRICLINIC] * 2), np.array([[[0.1, 0.2, 0.3]]] * 2), 1))
    draw = mala.draw_move

    def impossible(*arguments) -> Move:
        move = draw(*arguments)
        return Move(torch.stack([impossible_moves()[kind], move.cell[1]]), move.positions)

    monkeypatch.setattr(mala, "draw_move", impossible)
    step, temperature = torch.full((2, 2), 1e-8, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    new = mala_step(model, state, step, temperature, generator())
    assert new.accepted.tolist() == [False, True] and new.n_nonfinite.tolist() == [1, 0]
    assert torch.equal(new.crystals.cell[0], state.crystals.cell[0])
    assert all(torch.isfinite(tensor).all() for tensor in (new.energy, new.grad_strain, new.grad_positions))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("where", [math.nan, math.inf, 1e300])
def test_a_proposal_with_an_atom_nowhere_is_rejected(where, fused, monkeypatch):
    model = small_model()
    model.use_kernels = fused
    state = mala_init(model, batch_of(np.stack([TRICLINIC] * 2), np.array([[[0.1, 0.2, 0.3], [0.5, 0.6, 0.7]]] * 2), 2))
    draw = mala.draw_move

    def impossible(*arguments) -> Move:
        move = draw(*arguments)
        return Move(move.cell, torch.cat([torch.full((1, 3), where, dtype=torch.float64), move.positions[1:]]))

    monkeypatch.setattr(mala, "draw_move", impossible)
    step, temperature = torch.full((2, 2), 1e-8, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    new = mala_step(model, state, step, temperature, generator())
    assert new.accepted.tolist() == [False, True] and new.n_nonfinite.tolist() == [1, 0]
    assert torch.equal(new.crystals.positions[:2], state.crystals.positions[:2])


def test_a_step_does_not_change_its_input_and_repeats_with_its_generator():
    model = small_model()
    state = mala_init(model, random_crystals([[8, 22], [26]], generator(4)).to(torch.float64))
    kept = [tensor.clone() for tensor in (state.crystals.cell, state.crystals.positions, state.energy)]
    step, temperature = torch.full((2, 2), 1e-3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    results = [mala_step(model, state, step, temperature, generator(seed)) for seed in (1, 1, 2)]
    assert all(torch.equal(a, b) for a, b in zip(kept, (state.crystals.cell, state.crystals.positions, state.energy)))
    assert torch.equal(results[0].crystals.positions, results[1].crystals.positions)
    assert not torch.equal(results[0].crystals.positions, results[2].crystals.positions)


def test_the_state_stays_reduced_and_its_energy_is_that_of_its_crystals():
    model = small_model()
    crystals = random_crystals([[8, 22], [26], [1, 6, 8, 8]], generator(4)).to(torch.float64)
    config = AnnealConfig(n_steps=25, step_first=0.1, proposal="strain", cell_step_ratio=0.1)
    state = anneal(model, crystals, config, generator())
    torch.testing.assert_close(model(state.crystals).detach(), state.energy, rtol=1e-9, atol=1e-9)
    again = niggli(state.crystals)
    assert torch.equal(again.cell, state.crystals.cell) and torch.equal(again.positions, state.crystals.positions)


def test_annealing_follows_geometric_schedules_that_a_start_shortens(monkeypatch):
    seen: list[tuple[Tensor, Tensor]] = []

    def record(energy, state, step, temperature, *_):
        seen.append((step, temperature))
        return state

    monkeypatch.setattr(mala, "mala_step", record)
    config = AnnealConfig(n_steps=5, cell_step_ratio=0.5)
    crystals = batch_of(np.eye(3)[None].repeat(2, 0) * 3, np.zeros((2, 1, 3)), 1)
    anneal(volume_energy, crystals, config, generator(), start=torch.tensor([0.0, 0.5]))
    steps, temperatures = (torch.stack(column).numpy() for column in zip(*seen))
    np.testing.assert_allclose(steps[:, 0, 1], np.geomspace(0.5, 5e-4, 5))
    np.testing.assert_allclose(temperatures[:, 0], np.geomspace(1, 1e-3, 5))
    np.testing.assert_allclose(temperatures[:, 1], np.geomspace(1e-3**0.5, 1e-3, 5))
    np.testing.assert_allclose(steps[..., 0], 0.5 * steps[..., 1])


def test_annealing_lowers_the_energy_of_a_harmonic_crystal():
    sites = torch.tensor([[0.5, 2.0, 1.0], [3.0, 3.5, 4.0]], dtype=torch.float64)
    crystals = batch_of(np.diag([5.0, 5.3, 5.7])[None].repeat(20, 0), np.random.default_rng(0).random((20, 2, 3)), 2)
    config = AnnealConfig(n_steps=300, step_first=0.01, step_last=1e-5, proposal="strain", cell_step_ratio=FROZEN)
    energies: list[float] = []
    state = anneal(harmonic(sites), crystals, config, generator(), lambda _, s: energies.append(float(s.energy.mean())))
    assert len(energies) == 300
    assert float(state.energy.mean()) < 0.05 * energies[0]


def test_random_crystals_have_gaussian_cells_and_uniform_atoms():
    """Cell entries N(0, s²), s = (N / (2 √(2/π)) / ρ₀)^{1/3}; a density of 1/8 and four atoms."""
    crystals = random_crystals([[1, 2, 3, 4]] * 500, generator(), reference_density=0.125)
    scale = (4 / (2 * math.sqrt(2 / math.pi)) / 0.125) ** (1 / 3)
    assert stats.kstest(crystals.cell.numpy().ravel() / scale, "norm").pvalue > 1e-3
    frac_coords = crystals.to(torch.float64).frac_coords.numpy().ravel()
    assert stats.kstest(frac_coords, "uniform").pvalue > 1e-3
    assert crystals.species[0] == [1, 2, 3, 4]


def test_an_unknown_proposal_is_refused():
    state = mala_init(volume_energy, batch_of(np.eye(3)[None] * 3, np.zeros((1, 1, 3)), 1))
    with pytest.raises(ValueError, match="proposal is 'langevin', expected 'cartesian' or 'strain'"):
        mala_step(volume_energy, state, torch.ones(1, 2), torch.ones(1), generator(), "langevin")
    with pytest.raises(ValueError, match="measure is 'invarient', expected one of cartesian, invariant"):
        mala_step(volume_energy, state, torch.ones(1, 2), torch.ones(1), generator(), measure="invarient")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AnnealConfig, {"n_steps": 0}, "n_steps is 0, expected an integer ≥ 1"),
        (AnnealConfig, {"n_steps": 2.5}, "n_steps is 2.5, expected an integer"),
        (AnnealConfig, {"step_last": math.nan}, "step_last is nan, expected a positive number"),
        (AnnealConfig, {"temperature_first": -1.0}, "temperature_first is -1.0"),
        (AnnealConfig, {"proposal": "langevin"}, "proposal is 'langevin', expected one of cartesian, strain"),
        (DiffusionConfig, {"n_steps": True}, "n_steps is True"),
        (DiffusionConfig, {"temperature": 1.5}, "temperature is 1.5, expected a number from 0 to 1"),
        (DiffusionConfig, {"noise_first": 0.0}, "noise_first is 0.0"),
    ],
)
def test_settings_without_sense_are_refused_in_one_line(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)
