"""From compositions to crystals: where chains start, and structures drawn from a trained energy."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contsp_core.crystals import Crystals, Rng, keyed_rng, pack, random_rows
from contsp_core.diffusion import DiffusionConfig, reverse_diffusion
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import AnnealConfig, anneal

if TYPE_CHECKING:
    from pymatgen.core import Structure


def random_crystals(species: Sequence[Sequence[int]], rng: Rng, reference_density: float = 0.05) -> Crystals:
    """The paper's start, in float64: Gaussian cell entries scaled to the density (Å⁻³), atoms uniform in the cell."""
    counts = torch.tensor([len(numbers) for numbers in species])
    scale = (counts.double() / (2 * math.sqrt(2 / math.pi)) / reference_density) ** (1 / 3)
    noise = random_rows(torch.randn, [3] * len(species), rng, torch.float64).view(-1, 3, 3)
    return uniform_atoms(scale[:, None, None] * noise, species, rng)


def uniform_atoms(cell: Tensor, species: Sequence[Sequence[int]], rng: Rng) -> Crystals:
    """Atoms of the given species, uniform in the given cells (n_systems, 3, 3)."""
    counts = torch.tensor([len(numbers) for numbers in species])
    system_idx = torch.repeat_interleave(torch.arange(len(species)), counts)
    numbers = torch.tensor([number for numbers in species for number in numbers])
    frac = random_rows(torch.rand, counts.tolist(), rng, cell.dtype)
    crystals = Crystals(cell, frac, numbers, system_idx)
    return crystals.replace(positions=crystals.multiply_rows(frac, cell))


def start_crystals(model: ContinuousCGCNN, species: Sequence[Sequence[int]], rng: Rng) -> Crystals:
    """Where chains start, in float64 on the CPU: as in the paper, or for an energy with noise levels at the largest.

    There, atoms are uniform in a cell of the expected volume and, but for the strain of that level, of the shape of a
    random training crystal with as many atoms (or with the nearest number).
    """
    if model.noise_features is None:
        return random_crystals(species, rng, model.config.reference_density)
    cells, bank = model.start_cells.cpu().double(), model.start_n_atoms.cpu()
    volumes = model.atomic_volume.cpu().double()
    draws = random_rows(torch.rand, [1] * len(species), rng, torch.float64, width=1)[:, 0].tolist()
    shapes = []
    for numbers, draw in zip(species, draws, strict=True):
        distance = (bank - len(numbers)).abs()
        candidates = torch.nonzero(distance == distance.min())[:, 0]
        chosen = cells[candidates[int(draw * len(candidates))]]
        shapes.append(chosen * volumes[list(numbers)].sum() ** (1 / 3))
    crystals = uniform_atoms(torch.stack(shapes), species, rng)
    width = min(model.config.strain_noise * model.config.noise_max, model.config.strain_cap)
    deformation = torch.linalg.matrix_exp(width * crystals.random_cells(rng))
    positions = crystals.multiply_rows(crystals.positions, deformation)
    return crystals.replace(cell=crystals.cell @ deformation, positions=positions)


def sampling_config(model: ContinuousCGCNN) -> DiffusionConfig | AnnealConfig:
    """How to sample this model: as its checkpoint says, else by noise levels if it has them, else by annealed MALA."""
    return model.sampling or (AnnealConfig() if model.noise_features is None else DiffusionConfig())


def run_chains(
    model: ContinuousCGCNN,
    crystals: Crystals,
    config: DiffusionConfig | AnnealConfig,
    rng: Rng,
    on_step: Callable[[int, object], None] | None = None,
) -> Crystals:
    """Chains of a model from given starts."""
    weight = next(model.parameters())
    crystals = crystals.to(weight.device).to(weight.dtype)
    if isinstance(config, DiffusionConfig):
        return reverse_diffusion(model, crystals, config, rng, on_step)
    return anneal(model, crystals, config, rng, on_step).crystals


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

    A sample depends on the seed, its formula and its own number only: neither on what else is sampled, nor (but for
    rounding) on how chains are batched. Entries of one formula therefore get the same samples.

    Args:
        model: from :func:`contsp_core.load_model`; it is not changed.
        species: one entry a crystal: the atomic numbers of its cell, or a formula such as ``"BaTiO3"`` (one unit).
        n_samples: structures for each entry.
        n_steps: length of the chains; by default as the model's settings say.
        seed: the same seed on the same machine gives the same structures.
        device: where to run; by default where the model is.
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
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected an integer ≥ 1")
    entries = [tuple(sorted(numbers)) for numbers in resolve_species(species)]
    config = sampling_config(model)
    config = config if n_steps is None else replace(config, n_steps=n_steps)
    if device is not None:
        model = copy.deepcopy(model).to(device)
    chains = [(numbers, n) for numbers in sorted(set(entries), key=lambda e: (len(e), e)) for n in range(n_samples)]
    max_atoms = (max_bytes or default_max_bytes(model)) // bytes_per_atom(model)
    batches = pack([len(numbers) for numbers, _ in chains], max_atoms)
    found: dict[tuple[int, ...], list[Structure]] = {numbers: [] for numbers in entries}
    with tqdm(total=len(batches) * config.n_steps, desc="sampling", unit="step", disable=not progress) as bar:
        for batch in batches:
            rng = [keyed_rng(seed, numbers, number) for numbers, number in chains[batch]]
            start = start_crystals(model, [numbers for numbers, _ in chains[batch]], rng)
            crystals = run_chains(model, start, config, rng, lambda *_: bar.update())
            with torch.no_grad():
                energies = model(crystals).tolist()
            for (numbers, _), structure, energy in zip(chains[batch], crystals.to_structures(), energies, strict=True):
                structure.properties["energy"] = energy
                found[numbers].append(structure)
    return [[structure.copy() for structure in found[numbers]] for numbers in entries]


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
