"""From compositions to crystals: where chains start, and structures drawn from a trained energy."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from contsp_core.crystals import MAX_ATOMIC_NUMBER, Crystals, Rng, keyed_rng, pack, random_rows
from contsp_core.data import resolve_species, retold
from contsp_core.diffusion import DiffusionConfig, reverse_diffusion, strain_width
from contsp_core.energy import ContinuousCGCNN
from contsp_core.lattice import apply_strain
from contsp_core.mala import AnnealConfig, anneal

if TYPE_CHECKING:
    from pymatgen.core import Structure

MAX_ASSIGNMENTS = 5040  # 7!: with more elements of equal count, only so many ways to assign them are tried


def random_crystals(species: Sequence[Sequence[int]], rng: Rng, reference_density: float = 0.05) -> Crystals:
    """The paper's start, in float64: Gaussian cell entries scaled to the density (Å⁻³), atoms uniform in the cell."""
    counts = torch.tensor([len(numbers) for numbers in species])
    scale = (counts.double() / (2 * math.sqrt(2 / math.pi)) / reference_density) ** (1 / 3)
    noise = random_rows(torch.randn, [3] * len(species), rng, torch.float64).view(-1, 3, 3)
    return uniform_atoms(scale[:, None, None] * noise, species, rng)


def uniform_atoms(cell: Tensor, species: Sequence[Sequence[int]], rng: Rng) -> Crystals:
    """Atoms of the given species, uniform in the given cells (n_systems, 3, 3)."""
    frac = random_rows(torch.rand, [len(numbers) for numbers in species], rng, cell.dtype)
    crystals = Crystals.from_arrays(cell, frac, species, cell.dtype)
    return crystals.replace(positions=crystals.multiply_rows(frac, cell))


def start_crystals(
    model: ContinuousCGCNN, species: Sequence[Sequence[int]], rng: Rng, places: Sequence[int] = ()
) -> Crystals:
    """Where chains start, in float64 on the CPU: as in the paper, or for an energy with noise levels at the largest.

    There, atoms are uniform in the cell of a training crystal, scaled and strained as at that level: that at place
    ``places[system]`` (by default 0) of :func:`similar_cells`, which begins again where there are not so many. Its
    volume is the mean (geometric) of two guesses: Σ atomic volumes, and the crystal's volume times the ratio of these.
    """
    if model.noise_features is None:
        return random_crystals(species, rng, model.config.reference_density)
    entries = [tuple(sorted(entry)) for entry in species]
    similar = {entry: similar_cells(model, entry) for entry in set(entries)}
    pairs = zip([similar[entry] for entry in entries], places or [0] * len(entries), strict=True)
    chosen = torch.stack([rows[number % len(rows)] for rows, number in pairs])
    atomic, given = model.atomic_volume.cpu().double(), model.start_cells.cpu().double()[chosen]
    expected = torch.stack([atomic[list(entry)].sum() for entry in entries])
    volume, known = torch.linalg.det(given).abs(), model.start_counts.cpu().double()[chosen] @ atomic
    cells = given * (expected / (volume * known).sqrt())[:, None, None] ** (1 / 3)
    crystals = uniform_atoms(cells, species, rng)
    width = float(strain_width(model.config, torch.tensor(model.config.noise_max)))
    return apply_strain(crystals, width * crystals.random_cells(rng))


def similar_cells(model: ContinuousCGCNN, species: Sequence[int]) -> Tensor:
    """(m,) training crystals whose cell a composition may have, the most likely first.

    These are the crystals of its stoichiometry and number of atoms, in order of the mean over atoms of the distance of
    the elements exchanged (:func:`element_distances`), assigned as is best. If there is none, all crystals whose number
    of atoms is nearest. None has the composition itself, as its cell would lead the search back to it, unless all have.
    """
    bank, own = model.start_counts.cpu(), torch.bincount(torch.tensor(species), minlength=MAX_ATOMIC_NUMBER + 1)
    other = (bank != own).any(dim=1)
    rows = torch.nonzero(of_pattern(bank, own) & other)[:, 0]
    if len(rows) == 0:
        difference = (bank.sum(dim=1) - len(species)).abs().masked_fill(~other, 2**30)  # the last resort
        return torch.nonzero(difference == difference.min())[:, 0]
    n_elements = int((own > 0).sum())
    counts, elements = (column[-n_elements:] for column in own.sort(stable=True))
    present = bank[rows].argsort(dim=1, stable=True)[:, -n_elements:]
    distance = torch.from_numpy(element_distances())[present[:, :, None], elements]  # (m, n, n)
    exchanged = distance[:, torch.arange(n_elements), torch.tensor(assignments(counts.tolist()))]
    return rows[(exchanged * counts).sum(dim=2).min(dim=1).values.argsort(stable=True)]


def training_counts(model: ContinuousCGCNN | None) -> Tensor:
    """(n, 101) int64 atoms of each element in the training crystals; n is 0 for an energy without noise levels."""
    return getattr(model, "start_counts", torch.zeros(0, MAX_ATOMIC_NUMBER + 1)).cpu().long()


def of_pattern(counts: Tensor, own: Tensor) -> Tensor:
    """Which crystals (n, 101) have the numbers of atoms of another one (101,), whatever their elements: (n,) bool."""
    return (counts.sort(dim=1).values == own.sort().values).all(dim=1)


def assignments(counts: Sequence[int]) -> list[list[int]]:
    """Ways to exchange elements of given counts, in ascending order: permutations among those of equal count."""
    places = [list(group) for _, group in itertools.groupby(range(len(counts)), key=counts.__getitem__)]
    orders = itertools.product(*map(itertools.permutations, places))
    return [list(itertools.chain(*order)) for order in itertools.islice(orders, MAX_ASSIGNMENTS)]


@lru_cache(maxsize=1)
def element_distances() -> np.ndarray:
    """(101, 101) chemical distance of elements: Euclidean, of three properties each scaled to unit variance.

    The properties are Pettifor's Mendeleev number, the electronegativity (Pauling) and the atomic radius (Slater);
    where one is not known it takes the mean of all elements.
    """
    from pymatgen.core import Element

    with warnings.catch_warnings(action="ignore"):  # of each element without electronegativity or radius
        elements = [Element.from_Z(number) for number in range(1, MAX_ATOMIC_NUMBER + 1)]
        properties = np.array([[e.mendeleev_no, e.X, e.atomic_radius or math.nan] for e in elements], dtype=float)
    properties = (properties - np.nanmean(properties, axis=0)) / np.nanstd(properties, axis=0)
    properties = np.nan_to_num(np.vstack([np.zeros(3), properties]))  # row 0 is no element
    return np.linalg.norm(properties[:, None] - properties[None], axis=-1)


def sampling_config(model: ContinuousCGCNN) -> DiffusionConfig | AnnealConfig:
    """How to sample this model: as its checkpoint says, else by noise levels if it has them, else by annealed MALA."""
    return model.sampling or (AnnealConfig() if model.noise_features is None else DiffusionConfig())


def batch_size(model: ContinuousCGCNN) -> int:
    """Atoms that move together by default, at some 20 kB each; at 1 to 2 MB, and fewer, on a CPU without kernels."""
    plain = not model.use_kernels and next(model.parameters()).device.type == "cpu"
    return 1024 if plain else 8192


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
    n_samples: int | range = 20,
    n_steps: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    *,
    batch_atoms: int | None = None,
) -> list[list[Structure]]:
    """Draw crystals of given species from a trained energy.

    A sample depends on the seed, its formula and its own number only: neither on what else is sampled, nor (but for
    rounding) on how chains are batched. Entries of one formula therefore get the same samples.

    Args:
        model: from :func:`contsp_core.load_model`; a copy in evaluation mode is used.
        species: one entry a crystal: the atomic numbers of its cell, or a formula such as ``"BaTiO3"`` (one unit).
        n_samples: structures for each entry; or their numbers, to go on where an earlier call stopped.
        n_steps: length of the chains; by default as the model's settings say.
        seed: the same seed on the same machine gives the same structures.
        device: where to run; by default where the model is.
        batch_atoms: atoms that move together; by default :func:`batch_size`.

    Returns:
        One list of structures per entry, each with the model's own energy (dimensionless; a judge may rank better) in
        ``properties["energy"]``. A ValueError tells of an entry that is no formula and no list of atomic numbers, or a
        number that is no count.
    """
    numbered = n_samples if isinstance(n_samples, range) else None
    count = n_samples if numbered is None else len(numbered) * (min(numbered, default=0) >= 0)
    given = {"n_samples": count, "batch_atoms": 1 if batch_atoms is None else batch_atoms, "seed": seed}
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < (name != "seed"):
            raise ValueError(f"{name} is {value!r}, expected an integer ≥ {int(name != 'seed')}")
    entries = [tuple(sorted(numbers)) for numbers in resolve_species(species)]
    config = sampling_config(model) if n_steps is None else replace(sampling_config(model), n_steps=n_steps)
    with retold(f"device is {device!r}, which fails", RuntimeError, AssertionError):
        model = copy.deepcopy(model).eval().to(device or next(model.parameters()).device)
    numbered = range(cast(int, n_samples)) if numbered is None else numbered
    chains = [(numbers, n) for numbers in sorted(set(entries), key=lambda e: (len(e), e)) for n in numbered]
    found: dict[tuple[int, ...], list[Structure]] = {numbers: [] for numbers in entries}
    for batch in pack([len(numbers) for numbers, _ in chains], batch_atoms or batch_size(model)):
        rng = [keyed_rng(seed, numbers, number) for numbers, number in chains[batch]]
        numbers, places = zip(*chains[batch])
        crystals = run_chains(model, start_crystals(model, numbers, rng, places), config, rng)
        with torch.no_grad():
            energies = model(crystals).tolist()
        for (numbers, _), structure, energy in zip(chains[batch], crystals.to_structures(), energies, strict=True):
            structure.properties["energy"] = energy
            found[numbers].append(structure)
    return [copy.deepcopy(found[numbers]) for numbers in entries]  # Structure.copy shares the properties
