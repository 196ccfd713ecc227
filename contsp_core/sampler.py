"""From compositions to crystals: draw structures from a trained energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from contsp_core.crystals import Crystals
from contsp_core.diffusion import DiffusionConfig, initial_crystals, reverse_diffusion
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import AnnealConfig, anneal, random_crystals

if TYPE_CHECKING:
    from pymatgen.core import Structure

BYTES_PER_EDGE = 120  # of the graph and its gradients on the fused path, measured
EDGES_PER_ATOM = 60  # undirected edges within a radius of 3 (V/N)^{1/3}: half of (4π/3)·27


def sampling_config(model: ContinuousCGCNN) -> DiffusionConfig | AnnealConfig:
    """How to sample this model: as its checkpoint says, else by noise levels if it has them, else by annealed MALA."""
    settings = getattr(model, "settings", {}).get("sampling", {})
    kind = AnnealConfig if model.noise_features is None else DiffusionConfig
    return kind(**settings)


def sample_crystals(
    model: ContinuousCGCNN,
    species: Sequence[Sequence[int]],
    config: DiffusionConfig | AnnealConfig,
    rng: torch.Generator,
    on_step: Callable[[int, object], None] | None = None,
) -> Crystals:
    """One crystal for each list of atomic numbers, from a random start."""
    device = next(model.parameters()).device
    if isinstance(config, DiffusionConfig):
        return reverse_diffusion(model, initial_crystals(model, species, rng).to(device), config, rng, on_step)
    return anneal(model, random_crystals(species, rng).to(device), config, rng, on_step).crystals


def sample_structures(
    model: ContinuousCGCNN,
    species: Sequence[str | Sequence[int]],
    n_samples: int = 20,
    n_steps: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    *,
    max_bytes: int = 64 << 20,
    progress: bool = False,
) -> list[list[Structure]]:
    """Draw crystals of given species from a trained energy.

    Args:
        model: from :func:`contsp_core.load_model`.
        species: one entry a crystal: the atomic numbers of its cell, or a formula such as ``"BaTiO3"`` (one unit).
        n_samples: structures for each entry.
        n_steps: length of the chains; by default as the model's settings say.
        seed: the same seed on the same machine gives the same structures.
        device: where to run; the model stays where it is by default.
        max_bytes: chains are run in batches whose edges fit in so many bytes.
        progress: show a progress bar of chain steps.

    Returns:
        One list of structures per entry, each with its energy (dimensionless) in ``properties["energy"]``.

    Raises:
        ValueError: on an entry that is no formula and no list of atomic numbers, or a count below 1.
    """
    from contsp_core.data import resolve_species

    for name, value in (("n_samples", n_samples), ("n_steps", 1 if n_steps is None else n_steps)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected ≥ 1")
    entries = resolve_species(species)
    config = sampling_config(model)
    config = config if n_steps is None else replace(config, n_steps=n_steps)
    model = model if device is None else model.to(device)
    chains = sorted((index for index in range(len(entries)) for _ in range(n_samples)), key=lambda i: len(entries[i]))
    results: list[list[Structure]] = [[] for _ in entries]
    batches = list(_batches(chains, [len(entry) for entry in entries], max_bytes))
    with tqdm(total=len(batches) * config.n_steps, desc="sampling", unit="step", disable=not progress) as bar:
        for number, batch in enumerate(batches):
            rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
            crystals = sample_crystals(model, [entries[i] for i in batch], config, rng, lambda *_: bar.update())
            with torch.no_grad():
                energies = model(crystals).tolist()
            for index, structure, energy in zip(batch, crystals.to_structures(), energies, strict=True):
                structure.properties["energy"] = energy
                results[index].append(structure)
    return results


def _batches(chains: list[int], n_atoms: list[int], max_bytes: int):
    """Cut the chains (sorted by size) into batches of at most ``max_bytes`` of edges, at least one chain each."""
    budget = max(1, max_bytes // (BYTES_PER_EDGE * EDGES_PER_ATOM))
    batch, used = [], 0
    for chain in chains:
        if batch and used + n_atoms[chain] > budget:
            yield batch
            batch, used = [], 0
        batch.append(chain)
        used += n_atoms[chain]
    if batch:
        yield batch
