"""Denoising score matching on the energy, and annealed sampling from high to low noise.

A crystal at noise level σ (Å) has its atoms displaced by δ ~ N(0, σ²) and is then strained by exp(ε), with ε symmetric
Gaussian of variance (κσ)². An energy at that level is fitted so that exp(−N E(U, σ)) is the density of noisy crystals
with respect to |det L|⁻³ dL d(frac), the measure that no choice of description changes: its temperature is 1/N, since
E is an energy per atom. Training needs no chains. Sources: Vincent, Neural Computation 23 (2011) 1661; Song & Ermon
(arXiv 1907.05600); finite differences instead of second derivatives, Pang et al. (arXiv 2007.03317).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from contsp_core.crystals import Crystals
from contsp_core.energy import ContinuousCGCNN, energy_and_gradient
from contsp_core.lattice import apply_strain, niggli
from contsp_core.mala import strain_gradient, sum_atoms, uniform_atoms


@dataclass(frozen=True)
class Noised:
    """Noisy crystals with the score ∇ log q(noisy | clean): per atom (Å⁻¹), and per strain (n_systems, 3, 3)."""

    crystals: Crystals
    score_positions: Tensor
    score_strain: Tensor


def add_noise(crystals: Crystals, sigma: Tensor, strain_noise: float, rng: torch.Generator) -> Noised:
    """Draw U_σ given U, and the exact score of that draw.

    The displacement has no net translation, since the energy cannot see one. Displacing before straining keeps the
    score of the strain free of the displacements. The volume element of symmetric strains contributes the term in
    coth: with respect to the invariant measure the density of ε is N(ε) Π_{a<b} x_ab / sinh x_ab, x_ab = ε_a − ε_b.

    Args:
        crystals: clean crystals.
        sigma: (n_systems,) σ, Å.
        strain_noise: κ, Å⁻¹.
        rng: source of randomness, on the CPU.
    """
    per_atom = sigma.index_select(0, crystals.system_idx)[:, None]
    displacement = per_atom * torch.randn(crystals.positions.shape, generator=rng).to(per_atom)
    displacement = displacement - _atom_mean(crystals, displacement).index_select(0, crystals.system_idx)
    noise = torch.randn(crystals.cell.shape, generator=rng).to(per_atom)
    sigma_strain = (strain_noise * sigma)[:, None, None]
    strain = sigma_strain * (noise + noise.mT) / 2
    displaced = crystals.replace(positions=crystals.positions + displacement)
    back = torch.linalg.matrix_exp(-strain).index_select(0, crystals.system_idx)
    score_positions = -torch.einsum("ni,nij->nj", displacement, back) / per_atom**2
    score_strain = -strain / sigma_strain**2 + _volume_element_score(strain)
    return Noised(apply_strain(displaced, strain), score_positions, score_strain)


def _atom_mean(crystals: Crystals, per_atom: Tensor) -> Tensor:
    return sum_atoms(crystals, per_atom) / crystals.n_atoms[:, None]


def _volume_element_score(strain: Tensor) -> Tensor:
    """∇_ε log Π x / sinh x = Σ_a (Σ_b 1/x_ab − coth x_ab) e_a e_aᵀ; about −x/3 per pair where x is small."""
    values, vectors = torch.linalg.eigh(strain)
    x = values[:, :, None] - values[:, None, :]
    safe = torch.where(x.abs() < 1e-2, torch.ones_like(x), x)
    pairs = torch.where(x.abs() < 1e-2, -x / 3, 1 / safe - 1 / torch.tanh(safe))
    return vectors @ torch.diag_embed(pairs.sum(dim=2)) @ vectors.mT


def score(model: ContinuousCGCNN, crystals: Crystals, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """−N ∂E/∂X (n_atoms_total, 3), Å⁻¹, and −N ∂E/∂ε (n_systems, 3, 3), symmetric: the score of the noisy density."""
    _, grad_cell, grad_positions = energy_and_gradient(model, crystals, sigma)
    strain = strain_gradient(crystals, grad_cell, grad_positions)
    n_atoms = crystals.n_atoms.to(sigma.dtype)
    per_atom = n_atoms.index_select(0, crystals.system_idx)[:, None]
    return -per_atom * grad_positions, -n_atoms[:, None, None] * (strain + strain.mT) / 2


@dataclass(frozen=True)
class Residual:
    """Score minus ∇ log q of noisy crystals, its weights, and the weighted squares: 1 for a zero energy."""

    crystals: Crystals  # with noise
    positions: Tensor  # (n_atoms_total, 3), Å⁻¹
    strain: Tensor  # (n_systems, 3, 3)
    weight_positions: Tensor  # (n_systems,), σ² / 3N
    weight_strain: Tensor  # (n_systems,), (κσ)² / 6
    loss_positions: Tensor  # (n_systems,)
    loss_strain: Tensor  # (n_systems,)


def denoising_residual(model: ContinuousCGCNN, crystals: Crystals, sigma: Tensor, rng: torch.Generator) -> Residual:
    """Disturb crystals by noise of level ``sigma`` (n_systems,), Å, and compare the score with that of the noise."""
    strain_noise = model.config.strain_noise
    noised = add_noise(crystals, sigma, strain_noise, rng)
    score_positions, score_strain = score(model, noised.crystals, sigma)
    weight_positions = sigma**2 / (3 * crystals.n_atoms.to(sigma.dtype))
    weight_strain = (strain_noise * sigma) ** 2 / 6
    positions = score_positions - noised.score_positions
    strain = score_strain - noised.score_strain
    loss_positions = weight_positions * sum_atoms(crystals, positions.square().sum(dim=1))
    loss_strain = weight_strain * strain.square().sum(dim=(1, 2))
    return Residual(noised.crystals, positions, strain, weight_positions, weight_strain, loss_positions, loss_strain)


def score_matching_step(
    model: ContinuousCGCNN, crystals: Crystals, sigma: Tensor, rng: torch.Generator, step: float = 0.1
) -> dict[str, float]:
    """Accumulate in ``.grad`` the gradient of the denoising loss, without second derivatives of the network.

    With residual r = score − ∇log q and loss Σ c |r|², the gradient in θ is that of −2 N c r·∇E, a directional
    derivative of energies. It is taken as a central difference of the energies of two crystals displaced by ± a
    fraction ``step`` of the noise along r, so that only energies are differentiated in θ, as in contrastive divergence.

    Returns:
        ``loss`` (the loss per direction: 1 for a zero energy), and its parts ``loss_positions`` and ``loss_strain``.
    """
    residual = denoising_residual(model, crystals, sigma, rng)
    crystals, n_atoms = residual.crystals, crystals.n_atoms.to(sigma.dtype)
    # the direction of the move, scaled so that its largest part is `step` times the noise
    # zero where it is not finite: such a loss is for the caller to report
    positions = residual.weight_positions.index_select(0, crystals.system_idx)[:, None] * residual.positions
    positions = positions.nan_to_num(0, 0, 0)
    strain = (residual.weight_strain[:, None, None] * residual.strain).nan_to_num(0, 0, 0)
    size = (sum_atoms(crystals, positions.square().sum(dim=1)) / n_atoms).sqrt()
    size = torch.maximum(size, strain.norm(dim=(1, 2)) / model.config.strain_noise)
    scale = step * sigma / size.clamp(min=1e-30)
    pair = [_moved(crystals, positions, strain, sign * scale) for sign in (1, -1)]
    energy = model(Crystals.cat(pair), sigma.repeat(2)).unflatten(0, (2, -1))
    objective = -(n_atoms / scale * (energy[0] - energy[1])).mean()
    objective.backward()
    loss_positions, loss_strain = float(residual.loss_positions.mean()), float(residual.loss_strain.mean())
    return {
        "loss": (loss_positions + loss_strain) / 2,
        "loss_positions": loss_positions,
        "loss_strain": loss_strain,
    }


def _moved(crystals: Crystals, positions: Tensor, strain: Tensor, scale: Tensor) -> Crystals:
    """U moved along (positions, strain) by ``scale`` (n_systems,)."""
    strained = apply_strain(crystals, scale[:, None, None] * strain)
    return strained.replace(
        positions=strained.positions + scale.index_select(0, crystals.system_idx)[:, None] * positions
    )


def random_noise_levels(model: ContinuousCGCNN, n_systems: int, rng: torch.Generator) -> Tensor:
    """(n_systems,) σ, log-uniform between the model's noise levels, Å; stratified over the batch."""
    config = model.config
    strata = (torch.randperm(n_systems, generator=rng) + torch.rand(n_systems, generator=rng)) / n_systems
    return config.noise_min * (config.noise_max / config.noise_min) ** strata


@dataclass(frozen=True)
class DiffusionConfig:
    """Sampling from high to low noise; the defaults were chosen on Perov-5 validation crystals."""

    n_steps: int = 100  # energy gradients in all
    noise_scale: float = 0.5  # share of the noise added back; 1 is ancestral sampling, 0 deterministic
    noise_first: float | None = None  # Å, where to begin; the model's largest level if None
    anneal_share: float = 0.0  # of the steps, spent cooling the energy at the model's default level
    anneal_step: float = 0.3  # of Langevin dynamics, in units of σ²
    temperature_last: float = 0.1  # cooled from 1, at which the density is the learned one


def initial_crystals(model: ContinuousCGCNN, species: Sequence[Sequence[int]], rng: torch.Generator) -> Crystals:
    """The start at the largest noise level: atoms uniform in a strained cell of the expected volume.

    The shape is that of a random training crystal with as many atoms (or with the nearest number).
    """
    cells, bank = model.start_cells.cpu().float(), model.start_n_atoms.cpu()
    shapes = []
    for numbers in species:
        distance = (bank - len(numbers)).abs()
        candidates = torch.nonzero(distance == distance.min())[:, 0]
        chosen = cells[candidates[torch.randint(len(candidates), (), generator=rng)]]
        shapes.append(chosen * model.atomic_volume[list(numbers)].sum().cpu().float() ** (1 / 3))
    cell = torch.stack(shapes)
    noise = torch.randn(cell.shape, generator=rng)
    strain = model.config.strain_noise * model.config.noise_max * (noise + noise.mT) / 2
    return uniform_atoms(cell @ torch.linalg.matrix_exp(strain), species, rng)


def reverse_diffusion(
    model: ContinuousCGCNN,
    crystals: Crystals,
    config: DiffusionConfig,
    rng: torch.Generator,
    on_step: Callable[[int, Crystals], None] | None = None,
) -> Crystals:
    """Follow the noise levels down, from crystals at the largest to clean ones.

    Each step moves along the score by the variance that it removes, and adds back the noise of the level below
    (ancestral sampling, Song et al., arXiv 2011.13456, Appendix F); the last goes to the mean of the clean crystals.
    On the way, where the noise falls below the model's default level, the energy of that level is cooled by Langevin
    dynamics for a share of the steps: the levels alone leave the atoms in wells that the energy itself thinks poor.
    """
    first = model.config.noise_max if config.noise_first is None else config.noise_first
    n_anneal = round(config.anneal_share * config.n_steps) if first > model.config.noise_default else 0
    n_anneal = max(0, min(n_anneal, config.n_steps - 2))  # a chain always begins at the first level and ends clean
    n_levels = config.n_steps - n_anneal
    sigmas = torch.logspace(math.log10(first), math.log10(model.config.noise_min), n_levels).tolist()
    moves = []  # σ, variance along the score, standard deviation of the noise added
    for sigma, below in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        removed = sigma**2 - below**2
        moves.append((sigma, removed, config.noise_scale * below * math.sqrt(removed) / sigma))
        if below < model.config.noise_default <= sigma:
            moves += _cooling(model.config.noise_default, n_anneal, config)
    for index, (sigma, removed, added) in enumerate(moves):
        crystals = _move_along_score(model, crystals, sigma, removed, added, rng)
        if on_step is not None:
            on_step(index, crystals)
    return crystals


def _cooling(sigma: float, n_steps: int, config: DiffusionConfig) -> list[tuple[float, float, float]]:
    """Langevin dynamics at one level, its temperature falling geometrically from 1."""
    variance = config.anneal_step * sigma**2
    temperatures = torch.logspace(0, math.log10(config.temperature_last), n_steps).tolist()
    return [(sigma, variance, math.sqrt(2 * variance * temperature)) for temperature in temperatures]


def _move_along_score(
    model: ContinuousCGCNN, crystals: Crystals, sigma: float, removed: float, added: float, rng: torch.Generator
) -> Crystals:
    """Atoms move by removed · score + added · noise, the cell by the same in strain, both in units of κ."""
    score_positions, score_strain = score(model, crystals, torch.full_like(crystals.cell[:, 0, 0], sigma))
    noise = torch.randn(score_strain.shape, generator=rng).to(score_strain)
    strain_noise = model.config.strain_noise
    strain = strain_noise**2 * removed * score_strain + strain_noise * added * (noise + noise.mT) / 2
    # a bound that a trained energy does not reach; it keeps chains of an untrained one finite
    strain = strain * (0.5 / strain.norm(dim=(1, 2), keepdim=True).clamp(min=0.5))
    strained = apply_strain(crystals, strain)
    shift = removed * score_positions + added * torch.randn(score_positions.shape, generator=rng).to(score_positions)
    return niggli(strained.replace(positions=strained.positions + shift))
