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
    strain_noise = model.config.strain_noise
    noised = add_noise(crystals, sigma, strain_noise, rng)
    crystals = noised.crystals
    score_positions, score_strain = score(model, crystals, sigma)
    n_atoms = crystals.n_atoms.to(sigma.dtype)
    weight_positions = sigma**2 / (3 * n_atoms)
    weight_strain = (strain_noise * sigma) ** 2 / 6
    residual_positions = score_positions - noised.score_positions
    residual_strain = score_strain - noised.score_strain
    loss_positions = weight_positions * sum_atoms(crystals, residual_positions.square().sum(dim=1))
    loss_strain = weight_strain * residual_strain.square().sum(dim=(1, 2))
    # the direction of the move, scaled so that its largest part is `step` times the noise
    # zero where it is not finite: such a loss is for the caller to report
    direction_positions = weight_positions.index_select(0, crystals.system_idx)[:, None] * residual_positions
    direction_positions = direction_positions.nan_to_num(0, 0, 0)
    direction_strain = (weight_strain[:, None, None] * residual_strain).nan_to_num(0, 0, 0)
    size = (sum_atoms(crystals, direction_positions.square().sum(dim=1)) / n_atoms).sqrt()
    size = torch.maximum(size, direction_strain.norm(dim=(1, 2)) / strain_noise)
    scale = step * sigma / size.clamp(min=1e-30)
    pair = [_moved(crystals, direction_positions, direction_strain, sign * scale) for sign in (1, -1)]
    energy = model(Crystals.cat(pair), sigma.repeat(2)).unflatten(0, (2, -1))
    objective = -(n_atoms / scale * (energy[0] - energy[1])).mean()
    objective.backward()
    loss = loss_positions + loss_strain
    return {
        "loss": float(loss.mean()) / 2,
        "loss_positions": float(loss_positions.mean()),
        "loss_strain": float(loss_strain.mean()),
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

    n_steps: int = 100
    noise_scale: float = 0.5  # share of the noise added back; 1 is ancestral sampling, 0 deterministic
    noise_first: float | None = None  # Å, where to begin; the model's largest level if None


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
    """
    first = model.config.noise_max if config.noise_first is None else config.noise_first
    sigmas = torch.logspace(math.log10(first), math.log10(model.config.noise_min), config.n_steps).tolist()
    for index, sigma in enumerate(sigmas):
        below = sigmas[index + 1] if index + 1 < len(sigmas) else 0.0
        score_positions, score_strain = score(model, crystals, torch.full_like(crystals.cell[:, 0, 0], sigma))
        removed = sigma**2 - below**2
        added = config.noise_scale * below * math.sqrt(removed) / sigma
        noise = torch.randn(score_strain.shape, generator=rng).to(score_strain)
        strain_noise = model.config.strain_noise
        strain = strain_noise**2 * removed * score_strain + strain_noise * added * (noise + noise.mT) / 2
        # a bound that a trained energy does not reach; it keeps chains of an untrained one finite
        strain = strain * (0.5 / strain.norm(dim=(1, 2), keepdim=True).clamp(min=0.5))
        strained = apply_strain(crystals, strain)
        shift = removed * score_positions + added * torch.randn(score_positions.shape, generator=rng).to(
            score_positions
        )
        crystals = niggli(strained.replace(positions=strained.positions + shift))
        if on_step is not None:
            on_step(index, crystals)
    return crystals
