"""Candidate crystals from several sources, and the energy as a judge of whatever made them.

Sources: chains from random starts; random structures at the right density, as drawn or after descent of the energy;
known crystals with their elements exchanged, as they are or after a short chain at low noise.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch

from contsp_core.crystals import Crystals
from contsp_core.diffusion import DiffusionConfig, initial_crystals, reverse_diffusion
from contsp_core.energy import ContinuousCGCNN, energy_and_gradient
from contsp_core.lattice import apply_strain, niggli
from contsp_core.mala import AnnealConfig, anneal, random_crystals, strain_gradient, sum_atoms
from contsp_core.metrics import evaluate_csp
from contsp_core.sampler import bytes_per_atom, sample_structures, sampling_config
from contsp_core.templates import TemplateLibrary, random_structures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pymatgen.core import Structure
    from torch import Tensor

SOURCES = ("chains", "random", "random_descended", "templates", "templates_relaxed")
BATCH_ATOMS = 8192  # relaxed together
LARGEST_MOVE = 0.3  # Å, of all atoms together in one step of descent; or a strain of 0.1
N_STEPS = {"random_descended": 50, "templates_relaxed": 20}  # energy gradients per structure


def make_candidates(
    source: str,
    species: Sequence[Sequence[int]],
    n_samples: int,
    seed: int,
    *,
    model: ContinuousCGCNN | None = None,
    library: TemplateLibrary | None = None,
    n_steps: int | None = None,
    batch_atoms: int = BATCH_ATOMS,
) -> list[list[Structure | None]]:
    """Candidates for some compositions.

    Args:
        source: ``chains`` (the model's sampler), ``random``, ``random_descended`` (:func:`descend`), ``templates``
            (nearest first), ``templates_relaxed`` (:func:`relax`).
        species: atomic numbers of each crystal.
        n_samples: for each.
        seed: of all that is random.
        model: needed by all but ``random`` and ``templates``; if given, candidates carry its energy.
        library: training crystals; needed by all but ``chains``.
        n_steps: length of chain, descent or relaxation; by default the sampler's own, 200, or 50.
        batch_atoms: atoms of chains that run together.

    Returns:
        One list per composition, of n_samples; None where templates do not suffice.

    Raises:
        ValueError: on an unknown source, or if the model or the library that it needs is missing.
    """
    _check_source(source, model, library)
    if source == "chains":
        max_bytes = batch_atoms * bytes_per_atom(model)
        return sample_structures(model, species, n_samples, n_steps, seed, max_bytes=max_bytes)
    if source.startswith("random"):
        volumes = library.atomic_volumes
        found = [random_structures(numbers, n_samples, [seed, i], volumes) for i, numbers in enumerate(species)]
    else:
        found = [library.substitute(numbers, n_samples, seed) for numbers in species]
    flat = [structure for structures in found for structure in structures]
    if source == "random_descended":
        flat = descend(model, flat, n_steps or N_STEPS[source])
    elif source == "templates_relaxed":
        flat = relax(model, flat, n_steps=n_steps or N_STEPS[source], seed=seed)
    if model is not None:
        flat = with_energies(model, flat)
    rest = iter(flat)
    return [[next(rest) for _ in part] + [None] * (n_samples - len(part)) for part in found]


def _check_source(source: str, model: ContinuousCGCNN | None, library: TemplateLibrary | None) -> None:
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    if model is None and source not in ("random", "templates"):
        raise ValueError(f"model is None, expected one for source {source!r}")
    if library is None and source != "chains":
        raise ValueError(f"library is None, expected the training crystals for source {source!r}")


def with_energies(
    model: ContinuousCGCNN, structures: Sequence[Structure], sigma: float | None = None
) -> list[Structure]:
    """Copies that carry the model's energy per atom (dimensionless) in ``properties["energy"]``.

    Args:
        model: any energy of a batch.
        structures: of any composition.
        sigma: noise level at which the energy is taken, Å; by default that of the model.
    """

    @torch.no_grad()
    def evaluate(crystals: Crystals) -> Tensor:
        return model(crystals) if sigma is None else model(crystals, torch.full_like(crystals.cell[:, 0, 0], sigma))

    copies = [structure.copy() for structure in structures]
    for batch in _batches(structures):
        for structure, energy in zip(copies[batch], evaluate(_to_crystals(model, structures[batch])).tolist()):
            structure.properties = structure.properties | {"energy": energy}
    return copies


def rank_candidates(
    model: ContinuousCGCNN, candidates: Sequence[Structure], sigma: float | None = None
) -> list[Structure]:
    """Candidates for one composition sorted by energy, lowest first, whatever made them.

    Args:
        model: from :func:`contsp_core.load_model`.
        candidates: structures of one composition.
        sigma: see :func:`with_energies`.

    Raises:
        ValueError: if there is no candidate, or compositions differ (their energies cannot be compared).
    """
    formulas = sorted({structure.composition.reduced_formula for structure in candidates})
    if len(formulas) != 1:
        raise ValueError(f"candidates have compositions {formulas}, expected exactly one")
    return sorted(with_energies(model, list(candidates), sigma), key=lambda s: s.properties["energy"])


def relax(
    model: ContinuousCGCNN, structures: Sequence[Structure], noise: float = 0.3, n_steps: int = 50, seed: int = 0
) -> list[Structure]:
    """A short chain from given structures: the model's own sampler, begun late.

    Args:
        model: with noise levels, the chain begins at noise level ``noise``; without, at the last third of annealing.
        structures: starting points.
        noise: Å.
        n_steps: of the chain.
        seed: of its noise.
    """
    config = replace(sampling_config(model), n_steps=n_steps)

    def run(crystals: Crystals, number: int) -> Crystals:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + number)
        if isinstance(config, DiffusionConfig):
            late = replace(config, noise_first=min(noise, model.config.noise_max))
            return reverse_diffusion(model, crystals, late, rng)
        start = torch.full_like(crystals.cell[:, 0, 0], 2 / 3)
        return anneal(model, crystals, config, rng, start=start).crystals

    return _in_batches(model, structures, run)


def descend(model: ContinuousCGCNN, structures: Sequence[Structure], n_steps: int = 200) -> list[Structure]:
    """Gradient descent of the energy in atoms and cell, each crystal with a step size of its own.

    A step that raises the energy is undone and the next one is half as long; else the next one is a fifth longer.

    Args:
        model: any energy of a batch.
        structures: starting points.
        n_steps: energy gradients spent on each.
    """
    return _in_batches(model, structures, lambda crystals, _: _descend(model, crystals, n_steps))


def _descend(energy: Callable[[Crystals], Tensor], crystals: Crystals, n_steps: int) -> Crystals:
    def gradients(crystals: Crystals) -> tuple[Tensor, Tensor, Tensor]:
        value, grad_cell, grad_positions = energy_and_gradient(energy, crystals)
        strain = strain_gradient(crystals, grad_cell, grad_positions)
        return value, (strain + strain.mT) / 2, grad_positions

    value, strain, positions = gradients(crystals)
    step = torch.full_like(value, LARGEST_MOVE)
    for _ in range(n_steps):
        norm = sum_atoms(crystals, positions.square().sum(dim=1)).sqrt()
        scale = step / torch.maximum(norm, 3 * strain.norm(dim=(1, 2))).clamp(min=1e-12)
        moved = apply_strain(crystals, -scale[:, None, None] * strain)
        atoms = moved.positions - scale.index_select(0, crystals.system_idx)[:, None] * positions
        tried = niggli(moved.replace(positions=atoms))
        new = gradients(tried)
        better = new[0] < value
        step = torch.where(better, 1.2 * step, step / 2).clamp(max=LARGEST_MOVE)
        per_atom, per_cell = better.index_select(0, crystals.system_idx)[:, None], better[:, None, None]
        crystals = crystals.replace(
            cell=torch.where(per_cell, tried.cell, crystals.cell),
            positions=torch.where(per_atom, tried.positions, crystals.positions),
        )
        value = torch.where(better, new[0], value)
        strain, positions = torch.where(per_cell, new[1], strain), torch.where(per_atom, new[2], positions)
    return crystals


def _in_batches(
    model: ContinuousCGCNN, structures: Sequence[Structure], run: Callable[[Crystals, int], Crystals]
) -> list[Structure]:
    results: list[Structure] = []
    for number, batch in enumerate(_batches(structures)):
        results += run(_to_crystals(model, structures[batch]), number).to_structures()
    return results


def _to_crystals(model: ContinuousCGCNN, structures: Sequence[Structure]) -> Crystals:
    weight = next(model.parameters())
    return Crystals.from_structures(structures, weight.dtype).to(weight.device)


def _batches(structures: Sequence[Structure]) -> list[slice]:
    """Consecutive structures with at most ``BATCH_ATOMS`` atoms together."""
    cuts, used = [0], 0
    for index, structure in enumerate(structures):
        if used + len(structure) > BATCH_ATOMS and index > cuts[-1]:
            cuts.append(index)
            used = 0
        used += len(structure)
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(structures)]) if end > start]


def compare_samplers(
    model: ContinuousCGCNN,
    references: Sequence[Structure],
    n_steps: Sequence[int],
    n_samples: int = 5,
    seed: int = 0,
    n_jobs: int = 1,
) -> pd.DataFrame:
    """Energy reached and match rate against the number of energy gradients, for the paper's sampler and ours.

    Args:
        model: an energy with noise levels; the chains of annealed MALA move on its default level.
        references: crystals whose species are sampled.
        n_steps: lengths of chains, in energy gradients.
        n_samples: chains a crystal.
        seed: of starts and chains.
        n_jobs: worker processes for matching.

    Returns:
        One row for each sampler and length: mean energy above the reference of all samples and of the best one a
        crystal (dimensionless), match rate of one sample (mean over all) and of any.
    """
    species = [list(structure.atomic_numbers) for structure in references for _ in range(n_samples)]
    with torch.no_grad():
        reference = model(Crystals.from_structures(references))[:, None]
    strain = AnnealConfig(proposal="strain", measure="invariant", cell_step_ratio=0.04)
    samplers = {
        "MALA of the paper": (random_crystals, AnnealConfig()),
        "MALA of the paper, learned start": (partial(initial_crystals, model), AnnealConfig()),
        "MALA with strain moves, learned start": (partial(initial_crystals, model), strain),
        "noise levels": (partial(initial_crystals, model), replace(sampling_config(model), anneal_share=0.0)),
        "noise levels, cooled": (partial(initial_crystals, model), replace(sampling_config(model), anneal_share=0.7)),
    }
    rows = []
    for length in n_steps:
        for name, (start, config) in samplers.items():
            rng = torch.Generator().manual_seed(seed)
            crystals, config = start(species, rng), replace(config, n_steps=length)
            if isinstance(config, DiffusionConfig):
                crystals = reverse_diffusion(model, crystals, config, rng)
            else:
                crystals = anneal(model, crystals, config, rng).crystals
            with torch.no_grad():
                above = model(crystals).unflatten(0, (-1, n_samples)) - reference
            samples = crystals.to_structures()
            lists = [samples[i : i + n_samples] for i in range(0, len(samples), n_samples)]
            scores, _ = evaluate_csp(references, lists, n_jobs=n_jobs, metre=False, progress=False)
            best = above.amin(dim=1).mean()
            found = (scores["match_rate_random@1"], scores["match_rate"])
            rows.append((name, length, float(above.mean()), float(best), *found))
    columns = ["sampler", "gradients", "energy", "energy_best", "match_rate@1", f"match_rate@{n_samples}"]
    return pd.DataFrame(rows, columns=columns)
