"""Contrastive divergence: lower the energy of real crystals and raise that of sampled ones (paper, Figure 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from contsp_core.crystals import Crystals, expand_composition, reduce_species
from contsp_core.diffusion import DiffusionConfig
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import anneal, random_crystals
from contsp_core.sampler import sample_crystals

if TYPE_CHECKING:
    from contsp_core.training import TrainConfig


class ReplayBuffer:
    """The last sample of each species list, where persistent chains start."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, ...], tuple[Crystals, int]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def get(self, species: list[int]) -> tuple[Crystals, int] | None:
        """The sample and the update that made it."""
        return self._samples.get(tuple(species))

    def put(self, crystals: Crystals, update: int) -> None:
        """Remember every crystal of a batch."""
        for system, species in enumerate(crystals.species):
            self._samples[tuple(species)] = (crystals[system], update)


def contrastive_divergence_step(
    model: ContinuousCGCNN,
    crystals: Crystals,
    config: TrainConfig,
    rng: torch.Generator,
    buffer: ReplayBuffer | None = None,
    update: int = 0,
) -> dict[str, float]:
    """Accumulate in ``.grad`` the gradient of mean(E(U) − E(Ũ)) + α (mean E(U)² + mean E(Ũ)²) (Figure 1).

    Ũ is sampled under the current θ, for Expand(Reduce(species)) of every training crystal: the description of a
    crystal enters through E alone, which is why the training map is strongly re-description invariant.

    Samples come from annealed MALA chains, or, if ``config.chain`` is a ``DiffusionConfig``, down the noise levels.

    Returns:
        The loss and what the log shows: energies, gap, and of chains acceptance rate, share and age of buffered starts.
    """
    species = [
        expand_composition(reduce_species(numbers), rng, config.expand_p, config.max_atoms)
        for numbers in crystals.species
    ]
    was_training = model.training
    model.eval().requires_grad_(False)
    if isinstance(config.chain, DiffusionConfig):
        samples, row = sample_crystals(model, species, config.chain, rng), {}
    else:
        samples, row = _persistent_chains(model, crystals, species, config, rng, buffer, update)
    model.train(was_training).requires_grad_(True)
    real, sampled = model(crystals), model(samples)
    penalty = config.energy_penalty * (real.square().mean() + sampled.square().mean())
    loss = (real.mean() - sampled.mean()) + penalty
    loss.backward()
    return {
        "loss": float(loss.detach()),
        "energy_real": float(real.detach().mean()),
        "energy_sample": float(sampled.detach().mean()),
        "gap": float((real.mean() - sampled.mean()).detach()),
    } | row


def _persistent_chains(
    model: ContinuousCGCNN,
    crystals: Crystals,
    species: list[list[int]],
    config: TrainConfig,
    rng: torch.Generator,
    buffer: ReplayBuffer | None,
    update: int,
) -> tuple[Crystals, dict[str, float]]:
    """Annealed MALA from fresh starts and from the buffer, which keeps the result; and what the log shows of it."""
    initial, start, ages = _chain_starts(species, config, rng, buffer, update)
    accepted: list[Tensor] = []
    record = lambda _, state: accepted.append(state.accepted.float().mean())  # noqa: E731
    initial = initial.to(crystals.cell.device).to(crystals.cell.dtype)
    state = anneal(model, initial, config.chain, rng, record, start)
    if buffer is not None:
        buffer.put(state.crystals.to("cpu"), update)  # where fresh starts are drawn
    return state.crystals, {
        "acceptance_rate": float(torch.stack(accepted).mean()),
        "buffer_share": len(ages) / len(species),
        "buffer_age": float(np.mean(ages)) if ages else 0.0,
        "n_nonfinite": int(state.n_nonfinite.sum()),
    }


def _chain_starts(
    species: list[list[int]], config: TrainConfig, rng: torch.Generator, buffer: ReplayBuffer | None, update: int
) -> tuple[Crystals, Tensor, list[int]]:
    """Fresh or buffered starts, where on its schedules each begins, and the ages (updates) of the buffered ones."""
    starts = random_crystals(species, rng)
    persistent = torch.rand(len(species), generator=rng) < config.buffer_share
    start = torch.zeros(len(species))
    parts, ages = [], []
    for system, numbers in enumerate(species):
        found = buffer.get(numbers) if buffer is not None and persistent[system] else None
        if found is not None:
            start[system] = config.buffer_start
            ages.append(update - found[1])
        parts.append(starts[system] if found is None else found[0])
    return Crystals.cat(parts), start, ages
