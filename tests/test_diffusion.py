"""The score of the noise, the gradient of the denoising loss, and sampling, each against an exact result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from test_energy import NOISY, random_batch, small_model
from torch import Tensor

from contsp_core import Crystals, diffusion
from contsp_core.diffusion import (
    DiffusionConfig,
    add_noise,
    contrast_step,
    random_noise_levels,
    reverse_diffusion,
    schedule,
    score,
    score_matching_step,
)
from contsp_core.lattice import apply_strain
from contsp_core.sampler import similar_cells, start_crystals
from contsp_core.training import initial_model

STRAIN_NOISE = 0.3  # κ, Å⁻¹
UPPER = ([0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2])  # the six entries of a symmetric matrix


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_crystals() -> Crystals:
    """Two crystals, of two and three atoms, in skewed cells."""
    rng = np.random.default_rng(1)
    cells = 4 * np.eye(3) + rng.uniform(-1, 1, (2, 3, 3))
    positions = rng.uniform(0, 4, (5, 3))
    return Crystals.from_arrays(cells, positions, [[3, 9], [22, 8, 8]], torch.float64)


def levels(*sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float64)


# The score of the noise


def log_of_symmetric(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.log(values)) @ vectors.T


def log_density_of_strain(strain: np.ndarray, width: float) -> float:
    """ln of the density of ε with respect to the invariant measure, by a numerical Jacobian.

    As a lattice up to rotation, L exp(ε) is P = exp(2ε) in lattice coordinates; the measure on positive matrices
    that no change of basis alters is |det P|⁻² dP.
    """

    def stretched(entries: Tensor) -> Tensor:
        matrix = torch.zeros(3, 3, dtype=entries.dtype).index_put(tuple(map(torch.tensor, UPPER)), entries)
        matrix = matrix + matrix.mT - torch.diag(matrix.diagonal())
        return torch.linalg.matrix_exp(2 * matrix)[UPPER]

    jacobian = torch.autograd.functional.jacobian(stretched, torch.as_tensor(strain[UPPER]))
    log_volume = float(torch.linalg.det(jacobian).abs().log()) - 2 * 2 * np.trace(strain)
    return -np.sum(strain**2) / (2 * width**2) - log_volume


@pytest.mark.parametrize("sigma", [1.0, 0.02])
def test_the_strain_score_is_the_gradient_of_the_log_density(sigma):
    """Moving the noisy crystal by a further strain η, whose composition with ε is ½ ln(e^ε e^{2η} e^ε)."""
    crystals, h = small_crystals(), 1e-5
    noised, _, score_strain = add_noise(
        crystals, levels(sigma, sigma), STRAIN_NOISE * levels(sigma, sigma), generator(3)
    )
    for system in range(2):
        deformation = torch.linalg.inv(crystals.cell[system]) @ noised.cell[system]
        strain = log_of_symmetric(deformation.numpy())
        stretch = deformation.numpy()
        for row, column in zip(*UPPER):
            direction = np.zeros((3, 3))
            direction[row, column] = direction[column, row] = 1
            values = []
            for sign in (1, -1):
                further = torch.linalg.matrix_exp(torch.as_tensor(2 * sign * h * direction)).numpy()
                composed = log_of_symmetric(stretch @ further @ stretch) / 2
                values.append(log_density_of_strain(composed, STRAIN_NOISE * sigma))
            expected = (values[0] - values[1]) / (2 * h)
            found = float((score_strain[system] * torch.as_tensor(direction)).sum())
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-5 / (STRAIN_NOISE * sigma))
        assert np.abs(strain - strain.T).max() < 1e-12


def test_the_score_of_the_atoms_is_the_gradient_of_the_log_density():
    """ln q = −|x′ e^{−ε} − x|² / 2σ² at the strain drawn."""
    crystals, sigma = small_crystals(), levels(0.4, 0.9)
    noised, score_positions, _ = add_noise(crystals, sigma, STRAIN_NOISE * sigma, generator(4))
    positions = noised.positions.clone().requires_grad_()
    undone = torch.linalg.inv(noised.cell) @ crystals.cell  # e^{−ε}
    clean = torch.einsum("ni,nij->nj", positions, undone[crystals.system_idx])
    log_density = -((clean - crystals.positions).square().sum(dim=1) / (2 * sigma[crystals.system_idx] ** 2)).sum()
    (expected,) = torch.autograd.grad(log_density, positions)
    torch.testing.assert_close(score_positions, expected, rtol=1e-8, atol=1e-8)


def test_the_noise_has_the_variances_it_is_said_to_have():
    """σ² (1 − 1/N) per coordinate, no net shift; κ²σ² on the diagonal of the strain and half of it off the diagonal."""
    n_systems, sigma = 2000, 0.5
    crystals = Crystals.from_arrays(
        np.tile(5 * np.eye(3), (n_systems, 1, 1)),
        np.tile(np.eye(3), (n_systems, 1)),
        [[1, 2, 3]] * n_systems,
        torch.float64,
    )
    noised, *_ = add_noise(crystals, *(w * levels(sigma).expand(n_systems) for w in (1, STRAIN_NOISE)), generator())
    undone = torch.linalg.inv(noised.cell) @ crystals.cell
    moved = torch.einsum("ni,nij->nj", noised.positions, undone[crystals.system_idx]) - crystals.positions
    assert crystals.sum_atoms(moved).abs().max() < 1e-12
    assert float(moved.var()) == pytest.approx(sigma**2 * 2 / 3, rel=0.06)
    strain = np.stack([log_of_symmetric(matrix) for matrix in (noised.cell / 5).numpy()])
    width = STRAIN_NOISE * sigma
    assert stats.kstest(strain[:, [0, 1, 2], [0, 1, 2]].ravel() / width, "norm").pvalue > 1e-3
    assert stats.kstest(strain[:, [0, 0, 1], [1, 2, 2]].ravel() / width * math.sqrt(2), "norm").pvalue > 1e-3


def test_the_score_of_the_model_is_minus_n_times_the_gradient_of_its_energy():
    """Along a strain at fixed fractional coordinates, and along a displacement, by finite differences."""
    model, crystals, sigma, h = small_model(NOISY), small_crystals(), levels(0.3, 0.8), 1e-5
    on_atoms, on_strain = score(model, crystals, sigma)
    rng = np.random.default_rng(0)
    direction = torch.as_tensor(rng.standard_normal((2, 3, 3)))
    direction = direction + direction.mT
    ends = [model(apply_strain(crystals, sign * h * direction), sigma) for sign in (1, -1)]
    expected = -crystals.n_atoms * (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close((on_strain * direction).sum(dim=(1, 2)), expected.detach(), rtol=1e-6, atol=1e-7)
    shift = torch.as_tensor(rng.standard_normal(crystals.positions.shape))
    ends = [model(crystals.replace(positions=crystals.positions + sign * h * shift), sigma) for sign in (1, -1)]
    expected = -crystals.n_atoms * (ends[0] - ends[1]) / (2 * h)
    torch.testing.assert_close(crystals.sum_atoms(on_atoms * shift).sum(dim=1), expected.detach(), rtol=1e-6, atol=1e-7)


# The loss


def exact_loss(model, crystals: Crystals, sigma: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Loss of atoms and of strain, each the mean over the batch, differentiable in the weights."""
    kappa = model.config.strain_noise
    noised, score_positions, score_strain = add_noise(crystals, sigma, kappa * sigma, rng)
    none, positions = torch.zeros_like(noised.cell).requires_grad_(), noised.positions.requires_grad_()
    moving = apply_strain(noised.replace(positions=positions), none)
    grads = torch.autograd.grad(model(moving, sigma).sum(), (none, positions), create_graph=True)
    n_atoms, system = moving.n_atoms, moving.system_idx
    on_strain = -n_atoms[:, None, None] * (grads[0] + grads[0].mT) / 2 - score_strain
    on_atoms = -n_atoms[system][:, None] * grads[1] - score_positions
    of_atoms = sigma**2 / (3 * n_atoms) * moving.sum_atoms(on_atoms.square().sum(dim=1))
    of_strain = (kappa * sigma) ** 2 / 6 * on_strain.square().sum(dim=(1, 2))
    return of_atoms.mean(), of_strain.mean()


def test_the_finite_difference_gradient_is_that_of_second_derivatives():
    model, crystals = small_model(NOISY), random_batch()
    model.use_kernels = False
    sigma = torch.logspace(-1.2, 0.1, len(crystals), dtype=torch.float64)
    row = score_matching_step(model, crystals, sigma, generator(5), step=1e-3)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    of_atoms, of_strain = exact_loss(model, crystals, sigma, generator(5))
    (of_atoms + of_strain).backward()
    expected = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]  # the last bias has none
    of_atoms, of_strain = of_atoms.detach(), of_strain.detach()
    assert row["loss_positions"] == pytest.approx(float(of_atoms), rel=1e-9)
    assert row["loss_strain"] == pytest.approx(float(of_strain), rel=1e-9)
    assert row["loss"] == pytest.approx(float(of_atoms + of_strain) / 2, rel=1e-9)
    largest = max(float(grad.abs().max()) for grad in expected)
    assert largest > 1e-3
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * largest)


def test_the_fused_path_gives_the_same_gradient_at_the_step_used_in_training():
    sigma = torch.logspace(-1.2, 0.1, 5, dtype=torch.float64)
    rows, gradients = [], []
    for fused in (True, False):
        model = small_model(NOISY)
        model.use_kernels = fused
        rows.append(score_matching_step(model, random_batch(), sigma, generator(5)))
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert rows[0] == pytest.approx(rows[1], rel=1e-8)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)


def test_a_constant_energy_has_a_loss_of_one():
    """The score of the noise has the variance 1/σ² per direction, less the 3 of 3N directions that are translations."""
    model = small_model(NOISY)
    torch.nn.init.zeros_(model.fc_final.weight)
    model.config = replace(model.config, density_weight=0.0)
    n_systems, n_atoms = 600, 4
    crystals = Crystals.from_arrays(
        np.tile(5 * np.eye(3), (n_systems, 1, 1)),
        np.random.default_rng(0).random((n_systems * n_atoms, 3)) * 5,
        [[1, 2, 3, 4]] * n_systems,
        torch.float64,
    )
    row = score_matching_step(model, crystals, torch.full((n_systems,), 0.05, dtype=torch.float64), generator())
    assert row["loss_positions"] == pytest.approx(1 - 1 / n_atoms, abs=0.05)
    assert row["loss_strain"] == pytest.approx(1, abs=0.07)


def test_noise_levels_are_log_normal_between_their_limits_and_stratified():
    model = small_model(NOISY)
    sigma = random_noise_levels(model, 1000, generator()).double()
    law = stats.truncnorm(*(math.log(end / 0.35) for end in (NOISY.noise_min, NOISY.noise_max)))
    share = np.sort(law.cdf(torch.log(sigma / 0.35).numpy()))
    stratum = np.arange(1000) / 1000  # one level in each
    assert (share > stratum - 1e-5).all() and (share < stratum + 0.001 + 1e-5).all()
    assert not torch.equal(sigma, sigma.sort().values)


# Sampling


def known_model(
    log_density: Callable[[Crystals, float], Tensor], strain_noise: float, noise_max: float, strain_cap: float = 1.0
):
    """E with exp(−N E(U, σ)) a known density; it has what the sampler reads of a model."""

    def energy(crystals: Crystals, sigma: Tensor) -> Tensor:
        return -log_density(crystals, float(sigma[0])) / crystals.n_atoms

    energy.config = SimpleNamespace(
        noise_max=noise_max, noise_min=0.02, noise_default=0.1, strain_noise=strain_noise, strain_cap=strain_cap
    )
    return energy


def exact_moments(start: tuple[float, float], width: float, gain: float, noise_max: float, config: DiffusionConfig):
    """Mean and variance after all steps of y ← y − g (σ² − σ′²) y / (c² + gσ²) + σ′ √(g (σ² − σ′²)) ξ / σ.

    Before each of these, Langevin steps y ← y − g ησ² y / (c² + gσ²) + √(2 g ησ² T) ξ.
    """
    sigmas = [*np.geomspace(noise_max, 0.02, config.n_levels), 0.0]
    mean, variance = start
    for sigma, below in pairwise(sigmas):
        for _ in range(config.n_steps // config.n_levels - 1):
            moved = config.correction_step * sigma**2
            factor = 1 - gain * moved / (width**2 + gain * sigma**2)
            mean, variance = factor * mean, factor**2 * variance + 2 * gain * moved * config.temperature
        removed = sigma**2 - below**2
        factor = 1 - gain * removed / (width**2 + gain * sigma**2)
        added = gain * removed * below**2 / sigma**2
        mean, variance = factor * mean, factor**2 * variance + added
    return mean, variance


def assert_gaussian(values: np.ndarray, mean: float, variance: float) -> None:
    assert stats.kstest((values - mean).ravel() / math.sqrt(variance), "norm").pvalue > 1e-3


@pytest.mark.parametrize(("n_levels", "temperature"), [(60, 1.0), (15, 1.0), (15, 0.5)])
def test_sampling_a_gaussian_pair_of_atoms_gives_its_mean_and_variance(n_levels, temperature):
    """x₂ − x₁ ~ N(r, c² + 2σ²) at level σ, in a cell that does not move; N(r, c²) if all noise is added back."""
    n_systems, width, noise_max, n_steps, offset = 500, 0.2, 0.4, 60, 0.3
    config = DiffusionConfig(n_steps, n_levels, temperature=temperature)
    bond = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)

    def deviation(crystals: Crystals) -> Tensor:
        pair = crystals.positions.view(-1, 2, 3)
        apart = pair[:, 1] - pair[:, 0] - bond
        return apart - 8 * (apart / 8).round().detach()

    def log_density(crystals: Crystals, sigma: float) -> Tensor:
        return -deviation(crystals).square().sum(dim=1) / (2 * (width**2 + 2 * sigma**2))

    rng = np.random.default_rng(0)
    first = rng.uniform(0, 8, (n_systems, 1, 3))
    variance = width**2 + 2 * noise_max**2
    second = first + bond.numpy() + offset + math.sqrt(variance) * rng.standard_normal(first.shape)
    positions = np.concatenate([first, second], axis=1).reshape(-1, 3)
    crystals = Crystals.from_arrays(
        np.tile(8 * np.eye(3), (n_systems, 1, 1)), positions, [[3, 9]] * n_systems, torch.float64
    )
    seen: list[int] = []
    model = known_model(log_density, 0.0, noise_max)
    found = reverse_diffusion(model, crystals, config, generator(), lambda i, _: seen.append(i))
    mean, expected = exact_moments((offset, variance), width, 2, noise_max, config)
    assert seen == list(range(n_steps))
    assert_gaussian(deviation(found).numpy(), mean, expected)
    if n_levels == n_steps:  # the steps are nearly fine enough
        assert expected == pytest.approx(width**2, rel=0.15) and abs(mean) < 0.3 * width


def test_sampling_a_gaussian_volume_gives_its_mean_and_variance():
    """ln V ~ N(v, c² + 3κ²σ²) at level σ: the trace of the strain noise has three times the variance of an entry."""
    n_systems, width, noise_max, n_steps, kappa, centre = 600, 0.1, 1.0, 60, 0.06, math.log(40)

    def log_density(crystals: Crystals, sigma: float) -> Tensor:
        return -((crystals.volume.log() - centre) ** 2) / (2 * (width**2 + 3 * kappa**2 * sigma**2))

    rng = np.random.default_rng(0)
    variance = width**2 + 3 * kappa**2 * noise_max**2
    log_volume = centre + math.sqrt(variance) * rng.standard_normal(n_systems)
    cells = (
        np.array([[1, 0, 0], [0.1, 1.1, 0], [0.2, 0.3, 1.3]]) / 1.43 ** (1 / 3) * np.exp(log_volume / 3)[:, None, None]
    )
    crystals = Crystals.from_arrays(cells, np.zeros((n_systems, 3)), [[1]] * n_systems, torch.float64)
    model, config = known_model(log_density, kappa, noise_max), DiffusionConfig(n_steps, n_steps)
    found = reverse_diffusion(model, crystals, config, generator())
    _, expected = exact_moments((0.0, variance), width, 3 * kappa**2, noise_max, config)
    assert_gaussian(found.volume.log().numpy() - centre, 0.0, expected)
    assert expected == pytest.approx(width**2, rel=0.1)


def test_a_capped_strain_does_not_move_the_cell_until_the_levels_fall_below_the_cap():
    """ln V ~ N(v, c² + 3 min(κσ, cap)²): above the cap the marginals are equal, so a step there changes nothing."""
    n_systems, width, kappa, cap, centre = 400, 0.05, 0.1, 0.03, math.log(40)

    def log_density(crystals: Crystals, sigma: float) -> Tensor:
        return -((crystals.volume.log() - centre) ** 2) / (2 * (width**2 + 3 * min(kappa * sigma, cap) ** 2))

    start = centre + math.sqrt(width**2 + 3 * cap**2) * np.random.default_rng(0).standard_normal(n_systems)
    cells = np.eye(3) * np.exp(start / 3)[:, None, None]
    crystals = Crystals.from_arrays(cells, np.zeros((n_systems, 3)), [[1]] * n_systems, torch.float64)
    model, config = known_model(log_density, kappa, 1.0, cap), DiffusionConfig(80, 80)
    volumes: list[np.ndarray] = []
    reverse_diffusion(model, crystals, config, generator(), lambda _, c: volumes.append(c.volume.log().numpy()))
    sigmas = np.geomspace(1.0, 0.02, 80)
    frozen = int((sigmas[1:] * kappa >= cap).sum())
    np.testing.assert_allclose(volumes[frozen - 1], start, atol=1e-9)
    assert np.abs(volumes[frozen + 2] - start).max() > 1e-3
    assert_gaussian(volumes[-1] - centre, 0.0, width**2)


@pytest.mark.parametrize(("noise_first", "expected"), [(None, 1.0), (0.3, 0.3)])
def test_sampling_goes_through_the_noise_levels_from_the_first_one(noise_first, expected):
    seen: list[float] = []

    def log_density(crystals: Crystals, sigma: float) -> Tensor:
        seen.append(sigma)
        return crystals.volume * 0

    config = DiffusionConfig(5, noise_first=noise_first)
    reverse_diffusion(known_model(log_density, 0.1, 1.0), small_crystals(), config, generator())
    np.testing.assert_allclose(seen, np.geomspace(expected, 0.02, 5), rtol=1e-5)


def test_sampling_does_not_begin_below_the_last_level():
    for level in (0.001, 15.0):
        with pytest.raises(ValueError, match=rf"noise_first is {level}, expected 0\.02 … 2\.0, as the levels"):
            schedule(NOISY, DiffusionConfig(noise_first=level))


@pytest.mark.parametrize(("n_steps", "steps_each"), [(12, (4, 4, 4)), (11, (4, 4, 3)), (2, (1, 1))])
def test_at_each_level_corrections_come_before_the_step_down(n_steps, steps_each):
    seen: list[float] = []

    def log_density(crystals: Crystals, sigma: float) -> Tensor:
        seen.append(sigma)
        return crystals.volume * 0

    model = known_model(log_density, 0.1, 1.0)
    reverse_diffusion(model, small_crystals(), DiffusionConfig(n_steps, 3), generator())
    np.testing.assert_allclose(seen, np.repeat(np.geomspace(1.0, 0.02, len(steps_each)), steps_each), rtol=1e-5)


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_a_chain_however_short_ends_with_a_step_to_clean_crystals(n_steps):
    seen: list[float] = []

    def log_density(crystals: Crystals, sigma: float) -> Tensor:
        seen.append(sigma)
        return crystals.volume * 0

    model = known_model(log_density, 0.1, 1.0)
    reverse_diffusion(model, small_crystals(), DiffusionConfig(n_steps, n_steps), generator())
    assert len(seen) == n_steps and seen[0] == 1
    assert n_steps == 1 or seen[-1] == pytest.approx(0.02)


def test_at_temperature_zero_only_the_steps_down_are_random():
    """Of one level there is one step down, to the mean of the clean crystals."""
    model, crystals = small_model(NOISY), small_crystals()
    still = DiffusionConfig(4, 1, temperature=0.0)
    results = [reverse_diffusion(model, crystals, still, generator(s)) for s in (0, 1)]
    assert torch.equal(results[0].positions, results[1].positions)
    different = [reverse_diffusion(model, crystals, DiffusionConfig(4), generator(s)) for s in (0, 1)]
    assert not torch.equal(different[0].positions, different[1].positions)


def test_contrast_prefers_data_to_what_chains_found():
    """Descending the loss, the energies of wrong crystals rise above those of the data."""
    model, crystals = small_model(replace(NOISY, spectral_norm=False, form="residual")), small_crystals()
    found = crystals.replace(positions=crystals.positions + crystals.random_atoms(generator(5)))
    sigma = torch.full((len(crystals),), 0.2, dtype=crystals.cell.dtype)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    rows = []
    for step in range(300):
        optimiser.zero_grad()
        rows.append(contrast_step(model, crystals, found, sigma, generator(step)))
        optimiser.step()
    assert np.mean([row["contrast"] for row in rows[-20:]]) < 0.6 * math.log(2)
    assert np.mean([row["told_apart"] for row in rows[-20:]]) > 0.8
    with torch.no_grad():
        assert (model(found, sigma) > model(crystals, sigma)).all()


def test_contrast_is_the_logistic_loss_of_energies_of_whole_crystals(monkeypatch):
    """Where both are the same crystal it is ln 2 but for the noise; without noise, ln(1 + exp(N ΔE)) exactly.

    Half of the pairs have no noise, and all are told apart at their level.
    """
    model, crystals = small_model(NOISY), small_crystals()
    sigma = torch.full((len(crystals),), 0.3, dtype=crystals.cell.dtype)
    same = [contrast_step(model, crystals, crystals, sigma, generator(s))["contrast"] for s in range(40)]
    assert np.mean(same) >= math.log(2) - 0.02  # convex: never better than chance
    quiet = replace(model.config, noise_min=1e-7)
    found = crystals.replace(positions=crystals.positions + 0.3 * crystals.random_atoms(generator(1)))
    model.config, clean = quiet, torch.full_like(sigma, 1e-8)
    with torch.no_grad():
        difference = crystals.n_atoms * (model(crystals, clean) - model(found, clean))
    expected = torch.nn.functional.softplus(difference).mean()
    model.zero_grad()
    row = contrast_step(model, crystals, found, clean, generator(0), weight=2.0)
    assert row["contrast"] == pytest.approx(float(expected), rel=1e-4)
    gradient = model.fc_final.weight.grad.clone()
    model.zero_grad()
    difference = crystals.n_atoms * (model(crystals, clean) - model(found, clean))
    (2 * torch.nn.functional.softplus(difference).mean()).backward()
    torch.testing.assert_close(gradient, model.fc_final.weight.grad, rtol=1e-3, atol=1e-6)
    levels: list[Tensor] = []
    monkeypatch.setattr(diffusion, "add_noise", lambda crystals, level, *_: [levels.append(level) or crystals])
    with torch.no_grad():
        difference = crystals.n_atoms * (model(crystals, sigma) - model(found, sigma))
    rows = [contrast_step(model, crystals, found, sigma, generator(s)) for s in range(40)]
    expected = float(torch.nn.functional.softplus(difference).mean())
    assert [row["contrast"] for row in rows] == pytest.approx([expected] * 40, rel=1e-6)
    assert 0.3 < float((torch.cat(levels) == 0.3).double().mean()) < 0.7
    assert set(torch.cat(levels).tolist()) == {0.3, quiet.noise_min / 10}


def model_with_cells(*crystals: tuple[list[int], list[float]]):
    """A model that knows these training crystals: atomic numbers, and edges of an orthorhombic cell."""
    model = small_model(replace(NOISY, n_start_cells=len(crystals), strain_noise=1e-9))
    model.atomic_volume.copy_(torch.arange(101.0))
    for row, (numbers, edges) in enumerate(crystals):
        model.start_cells[row] = torch.diag(torch.tensor(edges))
        model.start_counts[row] = torch.bincount(torch.tensor(numbers), minlength=101).to(torch.uint8)
    return model


def test_the_start_has_the_mean_of_two_volumes_the_shape_of_a_training_cell_and_uniform_atoms():
    """V₀ = Σ atomic volumes, and V₁ = V V₀ / (Σ of the training crystal): 100 and 10 · 100 / 18 of the first, say."""
    model = model_with_cells(([3], [1, 1, 1]), ([3, 4, 5, 6], [1, 2, 5]))
    crystals = start_crystals(model, [[10, 20, 30, 40]] * 400 + [[5]], generator())
    volume = 100 * (10 / 18) ** 0.5
    assert crystals.volume[:400].numpy() == pytest.approx(np.full(400, volume), rel=1e-5)
    shape = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)) * (volume / 10) ** (1 / 3)
    torch.testing.assert_close(crystals.cell[0], shape, rtol=1e-6, atol=1e-6)
    cube = torch.eye(3, dtype=torch.float64) * (5 * (1 / 3) ** 0.5) ** (1 / 3)
    torch.testing.assert_close(crystals.cell[400], cube, rtol=1e-6, atol=1e-6)
    assert stats.kstest(crystals.frac_coords.numpy().ravel(), "uniform").pvalue > 1e-3


def test_cells_come_from_like_crystals_nearest_elements_first():
    model = model_with_cells(
        ([55, 17], [1, 1, 1]),  # CsCl, far from NaF
        ([11, 17], [1, 1, 2]),  # NaCl, near
        ([9, 19], [1, 2, 2]),  # as near; if potassium becomes sodium
        ([22, 8, 8], [1, 1, 3]),  # TiO₂
        ([16, 40, 40], [1, 1, 4]),  # SZr₂, another with two of one and one of the other
        ([12, 12, 8, 8], [3, 1, 1]),  # the stoichiometry, another number of atoms
    )
    order = similar_cells(model, [9, 11]).tolist()
    assert sorted(order[:2]) == [1, 2] and order[2:] == [0]
    assert similar_cells(model, [40, 16, 16]).tolist() == similar_cells(model, [40, 8, 8]).tolist()
    assert similar_cells(model, [8, 8, 40]).tolist()[0] == 3
    assert similar_cells(model, [22, 8, 8]).tolist() == [4]  # not of the composition itself
    assert similar_cells(model, [12, 8, 12, 8]).tolist() == [3, 4]  # none of four atoms is left
    assert similar_cells(model, [1] * 5).tolist() == [5]  # nothing of one element: the nearest number of atoms
    starts = start_crystals(model, [[9, 11]] * 4, generator(), [0, 1, 2, 3])
    edges = starts.cell.diagonal(dim1=1, dim2=2) / starts.volume[:, None] ** (1 / 3)
    torch.testing.assert_close(edges[0], edges[3], rtol=1e-6, atol=1e-6)  # after the third it begins again
    torch.testing.assert_close(edges[2], torch.ones(3, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        start_crystals(model, [[9, 11]] * 4, generator(), [0])


def test_a_training_crystal_of_more_atoms_than_a_byte_counts_is_not_taken_for_a_smaller_one():
    species = [[6] * 300, [14] * 44]  # 300 = 256 + 44
    cells = torch.eye(3).repeat(2, 1, 1) * torch.tensor([15.0, 9.0])[:, None, None]
    crystals = Crystals.from_arrays(cells, torch.rand(344, 3, generator=generator()), species, torch.float32)
    model = initial_model(crystals, NOISY, 0)
    assert similar_cells(model, [32] * 44).tolist() == [1]
