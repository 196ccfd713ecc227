"""Noise levels: an energy fitted by denoising score matching, and crystals sampled from high to low noise.

A crystal at noise level σ (Å) has its atoms displaced by δ ~ N(0, σ²) and is then strained by exp(ε), with ε symmetric
Gaussian of width min(κσ, cap). An energy at that level is fitted so that exp(−N E(U, σ)) is the density of noisy
crystals with respect to |det L|⁻³ dL d(frac), the measure that no choice of basis or orientation changes: its
temperature is 1/N, since E is an energy per atom. Training needs no chains. Sources: Vincent, Neural Computation 23
(2011) 1661; Song & Ermon (arXiv 1907.05600); finite differences, Pang et al. (arXiv 2007.03317).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor

from contsp_core.crystals import Crystals, Rng, check_settings, random_rows
from contsp_core.energy import ContinuousCGCNN, EnergyConfig, energy_and_gradient
from contsp_core.lattice import apply_strain, niggli

DIFFERENCE_STEP = 0.02  # of the noise; with 0.1, sharp features go unseen, and the loss at large σ runs away
LEVEL, LEVEL_SPREAD = 0.35, 1.0  # Å, and of its logarithm: the noise levels that training draws
LARGEST_STRAIN = 0.5  # of one sampling step; a trained energy does not reach it, chains of an untrained one stay finite


@dataclass(frozen=True)
class DiffusionConfig:
    """Sampling from high to low noise; the defaults were chosen on validation crystals of Perov-5 and MP-20."""

    n_steps: int = 300  # energy gradients in all
    n_levels: int = 20  # of noise (or n_steps, if that is less); a step leads from each to the next
    noise_first: float | None = None  # Å, where to begin; the model's largest level if None
    correction_step: float = 0.25  # η, in units of σ², of the other steps: Langevin dynamics at a level
    temperature: float = 0.5  # of these; at 1 the density is the learned one

    def __post_init__(self) -> None:
        check_settings(self, temperature=(0, 1))


def strain_width(config: EnergyConfig, sigma: Tensor) -> Tensor:
    """min(κσ, cap), the width of the strain at noise level σ (Å), of any shape."""
    return (config.strain_noise * sigma).clamp(max=config.strain_cap)


def add_noise(crystals: Crystals, sigma: Tensor, sigma_strain: Tensor, rng: Rng) -> tuple[Crystals, Tensor, Tensor]:
    """Draw U_σ given U, and the exact score of that draw.

    The displacement has no net translation, since the energy cannot see one. Displacing before straining keeps the
    score of the strain free of the displacements. The volume element of symmetric strains contributes the term in
    coth: with respect to the invariant measure the density of ε is N(ε) Π_{a<b} x_ab / sinh x_ab, x_ab = ε_a − ε_b.

    ``sigma`` (n_systems,) is σ, Å, and ``sigma_strain`` (n_systems,) the width of the strain. Returned are the noisy
    crystals and the score ∇ log q(noisy | clean): per atom (Å⁻¹), and per strain (n_systems, 3, 3).
    """
    per_atom, per_cell = crystals.to_atoms(sigma)[:, None], sigma_strain[:, None, None]
    displacement = per_atom * crystals.random_atoms(rng)
    displacement = displacement - crystals.to_atoms(crystals.sum_atoms(displacement) / crystals.n_atoms[:, None])
    strain = per_cell * crystals.random_cells(rng)
    displaced = crystals.replace(positions=crystals.positions + displacement)
    back = crystals.multiply_rows(displacement, torch.linalg.matrix_exp(-strain))
    score_strain = -strain / per_cell**2 + _volume_element_score(strain)
    return apply_strain(displaced, strain), -back / per_atom**2, score_strain


def _volume_element_score(strain: Tensor) -> Tensor:
    """∇_ε log Π x / sinh x = Σ_a (Σ_b 1/x_ab − coth x_ab) e_a e_aᵀ; about −x/3 per pair where x is small."""
    values, vectors = torch.linalg.eigh(strain)
    x = values[:, :, None] - values[:, None, :]
    safe = torch.where(x.abs() < 1e-2, torch.ones_like(x), x)
    pairs = torch.where(x.abs() < 1e-2, -x / 3, 1 / safe - 1 / torch.tanh(safe))
    return vectors @ torch.diag_embed(pairs.sum(dim=2)) @ vectors.mT


def score(model: ContinuousCGCNN, crystals: Crystals, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """−N ∂E/∂X (n_atoms_total, 3), Å⁻¹, and −N ∂E/∂ε (n_systems, 3, 3), symmetric: the score of the noisy density."""
    _, strain, positions = energy_and_gradient(model, crystals, sigma)
    n_atoms = crystals.n_atoms
    return -crystals.to_atoms(n_atoms)[:, None] * positions, -n_atoms[:, None, None] * (strain + strain.mT) / 2


class Residual(NamedTuple):
    """Score minus ∇ log q of noisy crystals, weighted, and its weighted square; see :func:`score_matching_step`."""

    crystals: Crystals  # with noise
    positions: Tensor  # (n_atoms_total, 3), Å; weighted by σ² / 3N
    strain: Tensor  # (n_systems, 3, 3), weighted by (width of the strain)² / 6
    loss_positions: Tensor  # (n_systems,)
    loss_strain: Tensor  # (n_systems,)


def denoising_residual(model: ContinuousCGCNN, crystals: Crystals, sigma: Tensor, rng: Rng) -> Residual:
    """Disturb crystals by noise of level ``sigma`` (n_systems,), Å, and compare the score with that of the noise."""
    sigma_strain = strain_width(model.config, sigma)
    noised, *expected = add_noise(crystals, sigma, sigma_strain, rng)
    positions, strain = (found - right for found, right in zip(score(model, noised, sigma), expected))
    weighted = crystals.to_atoms(sigma**2 / (3 * crystals.n_atoms))[:, None] * positions
    weighted_strain = (sigma_strain**2 / 6)[:, None, None] * strain
    losses = crystals.sum_atoms((weighted * positions).sum(dim=1)), (weighted_strain * strain).sum(dim=(1, 2))
    return Residual(noised, weighted, weighted_strain, *losses)


def score_matching_step(
    model: ContinuousCGCNN, crystals: Crystals, sigma: Tensor, rng: Rng, step: float = DIFFERENCE_STEP
) -> dict[str, float]:
    """Accumulate in ``.grad`` the gradient of the denoising loss, without second derivatives of the network.

    With residual r = score − ∇log q and loss Σ c |r|², the gradient in θ is that of −2 N c r·∇E, a directional
    derivative of energies. It is taken as a central difference of the energies of two crystals displaced by ± a
    fraction ``step`` of the noise along r, so that only energies are differentiated in θ, as in contrastive divergence.

    Returns:
        ``loss_positions`` and ``loss_strain``, whose sum the gradient is of (of a zero energy, at small strains,
        1 − 1/N and 1), and ``loss``, their mean.
    """
    residual = denoising_residual(model, crystals, sigma, rng)
    crystals, n_atoms = residual.crystals, crystals.n_atoms.to(sigma.dtype)
    # the direction of the move, scaled so that its largest part is `step` times the noise
    # zero where it is not finite: such a loss is for the caller to report
    positions, strain = residual.positions.nan_to_num(0, 0, 0), residual.strain.nan_to_num(0, 0, 0)
    size = (crystals.sum_atoms(positions.square().sum(dim=1)) / n_atoms).sqrt() / sigma
    size = torch.maximum(size, strain.norm(dim=(1, 2)) / strain_width(model.config, sigma))
    scale = step / size.clamp(min=1e-30)
    strain, positions = scale[:, None, None] * strain, crystals.to_atoms(scale)[:, None] * positions
    pair = [apply_strain(crystals, sign * strain, sign * positions) for sign in (1, -1)]
    energy = model(Crystals.cat(pair), sigma.repeat(2)).unflatten(0, (2, -1))
    (n_atoms / scale * (energy[1] - energy[0])).mean().backward()
    parts = {name: float(getattr(residual, name).mean()) for name in ("loss_positions", "loss_strain")}
    return {"loss": sum(parts.values()) / 2} | parts


def contrast_step(
    model: ContinuousCGCNN, crystals: Crystals, found: Crystals, sigma: Tensor, rng: Rng, weight: float = 1.0
) -> dict[str, float]:
    """Accumulate in ``.grad`` the gradient of weight · mean log(1 + exp(N E(U) − N E(Ũ))), Ũ what chains found for U.

    Score matching does not see the relative depth of wells further apart than σ: wrong structures may lie below the
    right one. Here each pair pulls as contrastive divergence does, by the probability that it takes Ũ for the data
    (Gutmann & Hyvärinen, AISTATS 2010). Both have noise of level ``sigma`` (n_systems,), Å, or next to none (half).

    Returns:
        ``contrast``, that mean without weight (ln 2 for equal energies), and ``told_apart``, the share of right pairs.
    """
    clean = random_rows(torch.rand, [1] * len(sigma), rng, sigma.dtype, width=1)[:, 0].to(sigma.device) < 0.5
    noise = torch.where(clean, cast(float, model.config.noise_min) / 10, sigma)
    pair = [add_noise(each, noise, strain_width(model.config, noise), rng)[0] for each in (crystals, found)]
    energy = model(Crystals.cat(pair), sigma.repeat(2)).unflatten(0, (2, -1))
    difference = crystals.n_atoms * (energy[0] - energy[1])
    loss = torch.nn.functional.softplus(difference).mean()
    (weight * loss).backward()
    return {"contrast": float(loss.detach()), "told_apart": float((difference < 0).float().mean())}


def random_noise_levels(model: ContinuousCGCNN, n_systems: int, rng: torch.Generator) -> Tensor:
    """(n_systems,) σ between the model's noise levels, Å, log-normal about ``LEVEL``; stratified over the batch.

    Below 0.1 Å little is left to learn, above 1.2 Å little can be: where atoms settle is decided in between.
    """
    ends = torch.tensor([model.config.noise_min, model.config.noise_max], dtype=torch.float64)
    first, last = torch.special.ndtr((ends / LEVEL).log() / LEVEL_SPREAD)
    strata = (torch.randperm(n_systems, generator=rng) + torch.rand(n_systems, generator=rng)) / n_systems
    levels = LEVEL * torch.exp(LEVEL_SPREAD * torch.special.ndtri(first + (last - first) * strata))
    return levels.clamp(*ends.tolist()).float()


def reverse_diffusion(
    model: ContinuousCGCNN,
    crystals: Crystals,
    config: DiffusionConfig,
    rng: Rng,
    on_step: Callable[[int, Crystals], None] | None = None,
) -> Crystals:
    """Follow the noise levels down, from crystals at the largest to clean ones.

    At each level some steps of Langevin dynamics, then one to the level below: it moves along the score by the variance
    that it removes, and adds back noise of the level below (ancestral sampling, Song et al., arXiv 2011.13456, Appendix
    F); the last goes to the mean of the clean crystals. The levels alone, one gradient each, leave atoms in poor wells.
    """
    for index, (sigma, atoms, cell) in enumerate(schedule(model.config, config)):
        score_positions, score_strain = score(model, crystals, torch.full_like(crystals.cell[:, 0, 0], sigma))
        strain = cell.variance * score_strain + cell.noise * crystals.random_cells(rng)
        strain = strain * (LARGEST_STRAIN / strain.norm(dim=(1, 2), keepdim=True).clamp(min=LARGEST_STRAIN))
        shift = atoms.variance * score_positions + atoms.noise * crystals.random_atoms(rng)
        crystals = niggli(apply_strain(crystals, strain, shift))
        if on_step is not None:
            on_step(index, crystals)
    return crystals


class _Step(NamedTuple):
    """A move by ``variance`` · score + ``noise`` · (standard normal)."""

    variance: float
    noise: float


def _down(width: float, below: float) -> _Step:
    """From a level to the one below; nothing happens where both have the same width."""
    removed = width**2 - below**2
    return _Step(removed, below * math.sqrt(removed) / width if width else 0.0)


def _langevin(width: float, config: DiffusionConfig) -> _Step:
    variance = config.correction_step * width**2
    return _Step(variance, math.sqrt(2 * variance * config.temperature))


def schedule(energy: EnergyConfig, config: DiffusionConfig) -> list[tuple[float, _Step, _Step]]:
    """σ, step of the atoms (Å) and step of the strain of each move; the strain rests where its width is capped."""
    lowest, highest = cast(float, energy.noise_min), cast(float, energy.noise_max)
    if not lowest <= (begin := highest if config.noise_first is None else config.noise_first) <= highest:
        raise ValueError(f"noise_first is {begin}, expected {lowest} … {highest}, as the levels of the energy")
    n_levels, (first, last) = min(config.n_levels, config.n_steps), (math.log10(begin), math.log10(lowest))
    sigmas = torch.cat([torch.logspace(first, last, n_levels, dtype=torch.float64), torch.zeros(1)])
    widths, steps = strain_width(energy, sigmas).tolist(), []
    for level, ((sigma, below), (width, next_width)) in enumerate(zip(pairwise(sigmas.tolist()), pairwise(widths))):
        correction = (sigma, _langevin(sigma, config), _langevin(width if next_width < width else 0.0, config))
        n_corrections = len(range(level, config.n_steps, n_levels)) - 1  # as many at each, or one more
        steps += [correction] * n_corrections + [(sigma, _down(sigma, below), _down(width, next_width))]
    return steps
