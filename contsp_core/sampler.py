"""From compositions to crystals: draw structures from a trained energy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from contsp_core.crystals import Crystals
from contsp_core.diffusion import DiffusionConfig, initial_crystals, reverse_diffusion
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import AnnealConfig, anneal, random_crystals

if TYPE_CHECKING:
    from pymatgen.core import Structure


def bytes_per_atom(model: ContinuousCGCNN) -> int:
    """Peak memory of an energy gradient per atom of the batch, bytes: what was measured, rounded up.

    The fused kernels keep the edges, and the features of each atom in each layer; the plain path keeps the features of
    each edge too.
    """
    config = model.config
    edges = math.ceil(2 / 3 * math.pi * config.cutoff_multiple**3)  # undirected, at uniform density
    features = config.width * config.n_conv
    if _is_fused(model):
        return 114 * edges + 39 * features
    return 110 * edges * features


def default_max_bytes(model: ContinuousCGCNN) -> int:
    """100 MB with the fused kernels (larger batches gain little), 1 GB without, a quarter of the memory of a GPU."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 4
    return (100 if _is_fused(model) else 1024) << 20


def _is_fused(model: ContinuousCGCNN) -> bool:
    return model.use_kernels and next(model.parameters()).device.type == "cpu"


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
    weight = next(model.parameters())
    if isinstance(config, DiffusionConfig):
        start = initial_crystals(model, species, rng).to(weight.device).to(weight.dtype)
        return reverse_diffusion(model, start, config, rng, on_step)
    start = random_crystals(species, rng).to(weight.device).to(weight.dtype)
    return anneal(model, start, config, rng, on_step).crystals


def sample_structures(
    model: ContinuousCGCNN,
    species: Sequence[str | Sequence[int]],
    n_samples: int = 20,
    n_steps: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    *,
    max_bytes: int | None = None,
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
        max_bytes: chains are run in batches that fit in so much memory; see :func:`default_max_bytes`.
        progress: show a progress bar of chain steps.

    Returns:
        One list of structures per entry, each with its energy (dimensionless) in ``properties["energy"]``.

    Raises:
        ValueError: on an entry that is no formula and no list of atomic numbers, or a count below 1.
    """
    from tqdm.auto import tqdm

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
    max_atoms = (max_bytes or default_max_bytes(model)) // bytes_per_atom(model)
    batches = list(_batches(chains, [len(entry) for entry in entries], max_atoms))
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


def _batches(chains: list[int], n_atoms: list[int], max_atoms: int) -> Iterator[list[int]]:
    """Cut the chains (sorted by size) into batches of at most ``max_atoms`` atoms, at least one chain each."""
    batch, used = [], 0
    for chain in chains:
        if batch and used + n_atoms[chain] > max_atoms:
            yield batch
            batch, used = [], 0
        batch.append(chain)
        used += n_atoms[chain]
    if batch:
        yield batch
