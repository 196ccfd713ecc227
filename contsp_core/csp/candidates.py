"""Which crystals could a formula have? Candidates from several sources, ranked by one energy and described.

Chains, their starts, known crystals with elements exchanged, as made or descended; keyed by seed, formula and number.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from ase.data import covalent_radii
from pymatgen.core import Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer
from torch import Tensor

from contsp_core import sampler
from contsp_core.checkpoints import read_settings
from contsp_core.crystals import Crystals, Rngs, fit_atomic_volumes, keyed_rng, pack, reduce_species
from contsp_core.csp.metrics import is_valid_structure, run_with_time_limit
from contsp_core.data import load_split
from contsp_core.diffusion import DiffusionConfig
from contsp_core.energy import ContinuousCGCNN, energy_and_gradient
from contsp_core.lattice import apply_strain, niggli
from contsp_core.mala import where

SOURCES = ("chains", "start", "start_descended", "templates", "templates_relaxed")
N_STEPS = {"templates_relaxed": 20}  # energy gradients a candidate; what descends takes as many as a chain
N_DESCENT = 60  # gradients from the end of a chain down its well
CLOSEST = 0.6  # of the sum of covalent radii (Cordero et al., Dalton Trans. 2832 (2008)); bundled crystals have ≥ 0.70
LARGEST_MOVE = 0.3  # Å, of all atoms together in one step of descent; or a strain of 0.1


def make_candidates(
    source: str,
    species: Sequence[Sequence[int]],
    n_samples: int,
    seed: int,
    *,
    model: ContinuousCGCNN | None = None,
    library: TemplateLibrary | None = None,
    n_steps: int | None = None,
    batch_atoms: int | None = None,
) -> Sequence[Sequence[Structure | None]]:
    """Candidates for some compositions.

    Args:
        source: ``chains`` (the model's sampler); ``start`` (where these chains begin); ``start_descended``
            (:func:`descend`); ``templates`` (nearest first); ``templates_relaxed`` (:func:`relax`).
        species: atomic numbers of each crystal.
        n_samples: for each.
        seed: of all that is random.
        model: needed by all but ``templates``; if given, candidates carry the energy of its judge.
        library: training crystals; needed by ``templates…``.
        n_steps: energy gradients a candidate; by default 20 for templates, else those of the model's own chains.
        batch_atoms: atoms of chains that run together; by default :func:`contsp_core.sampler.batch_size`.

    Returns:
        One list per composition, of n_samples; None where templates do not suffice. A ValueError tells of an unknown
        source, or of a model or a library that it needs and that is missing.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    if n_samples < 1:
        raise ValueError(f"n_samples is {n_samples}, expected ≥ 1")
    if model is None and source != "templates":
        raise ValueError(f"model is None, expected one for source {source!r}")
    if library is None and source.startswith("templates"):
        raise ValueError(f"library is None, expected the training crystals for source {source!r}")
    energy, templates = cast(ContinuousCGCNN, model), cast(TemplateLibrary, library)  # there, where the source needs it
    species = [tuple(sorted(map(int, numbers))) for numbers in species]
    rngs = [[keyed_rng(seed, numbers, n) for n in range(n_samples)] for numbers in species]  # as of the chains
    if source == "chains":
        found = sampler.sample_structures(energy, species, n_samples, n_steps, seed, batch_atoms=batch_atoms)
    elif source.startswith("start"):
        places = range(n_samples)
        starts = (sampler.start_crystals(energy, [n] * n_samples, rng, places) for n, rng in zip(species, rngs))
        found = [crystals.to_structures() for crystals in starts]
    else:
        found = [templates.substitute(numbers, n_samples, seed) for numbers in species]
    flat = [structure for structures in found for structure in structures]
    if source.endswith("_descended"):
        flat = descend(energy, flat, n_steps or sampler.sampling_config(energy).n_steps)
    elif source.endswith("_relaxed"):
        rng = [own for part, all_own in zip(found, rngs) for own in all_own[: len(part)]]
        flat = relax(energy, flat, rng, n_steps or N_STEPS[source])
    rest = iter(flat if model is None else with_energies(model.judge, flat))
    return [[next(rest) for _ in part] + [None] * (n_samples - len(part)) for part in found]


class TemplateLibrary:
    """Training crystals, a data split or pymatgen structures, by stoichiometry: ready for the exchange of elements."""

    def __init__(self, training: Any) -> None:
        self.structures = list(getattr(training, "structures", training))
        if not self.structures:
            raise ValueError("training is empty, expected at least one crystal")
        crystals = Crystals.from_structures(self.structures, torch.float64)
        self.atomic_volumes = fit_atomic_volumes(crystals).numpy()  # (101,), Å³
        groups: dict[tuple, list[tuple[int, list[int]]]] = defaultdict(list)
        for index, numbers in enumerate(crystals.species):
            elements, pattern = _pattern(numbers)
            groups[len(numbers), pattern].append((index, elements))
        # (number of atoms, reduced counts) -> crystals of that stoichiometry, and their elements in order of the counts
        self.groups = {key: tuple(map(np.array, zip(*entries, strict=True))) for key, entries in groups.items()}

    @classmethod
    def of_checkpoint(cls, checkpoint: str | Path) -> TemplateLibrary:
        """The training crystals of its data set; a warning tells of others, and a ValueError of none."""
        if not (dataset := (settings := read_settings(checkpoint)).get("dataset")):
            raise ValueError(f"checkpoint {str(checkpoint)!r} does not say its data set, expected source chains")
        split = load_split(dataset, "train")
        if (settings.get("data") or {}).get("blob_id") != split.source.blob_id:
            warnings.warn(f"{dataset}/train at hand is not what {checkpoint} was trained on", stacklevel=2)
        return cls(split)

    def substitute(self, species: Sequence[int], n: int, seed: int = 0) -> list[Structure]:
        """The training crystals of nearest composition with their elements exchanged.

        Templates have the stoichiometry of the target (AB₂C for AB₂C) and its number of atoms; only if these do not
        suffice, smaller crystals are repeated along their shortest vector. Elements of equal count can be assigned in
        several ways: each is a candidate of its own. Candidates are sorted by the mean distance of the
        old and the new element (:func:`sampler.element_distances`), ties in random order. The volume is multiplied by
        the ratio of the volumes that the atomic volumes give for the two compositions.

        ``species`` are the atomic numbers of the crystal to predict; ``seed`` is that of ties. Returned are at most n
        structures, the nearest first.
        """
        elements, pattern = _pattern(species)
        rng = keyed_rng(seed, tuple(sorted(map(int, species))))
        assigned = np.array([[elements[i] for i in order] for order in sampler.assignments(pattern)])
        candidates = []
        for multiple in (m for m in range(1, len(species) + 1) if len(species) % m == 0):
            if (found := self.groups.get((len(species) // multiple, pattern))) is None:
                continue
            indices, olds = found
            distance = np.zeros((len(indices), len(assigned)))
            for column, count in enumerate(pattern):
                distance += count / sum(pattern) * sampler.element_distances()[olds[:, [column]], assigned[:, column]]
            flat = distance.ravel()
            for place in np.lexsort((torch.rand(len(flat), generator=rng).numpy(), flat))[:n]:
                template, assignment = np.unravel_index(place, distance.shape)
                exchange = dict(zip(olds[template].tolist(), assigned[assignment].tolist(), strict=True))
                candidates.append((multiple, flat[place], int(indices[template]), exchange))
        candidates.sort(key=lambda candidate: candidate[:2])  # same number of atoms first, then the nearest
        return [self._build(index, exchange, multiple) for multiple, _, index, exchange in candidates[:n]]

    def _build(self, index: int, exchange: dict[int, int], multiple: int) -> Structure:
        template = self.structures[index]
        numbers: list[Any] = [exchange[number] for number in template.atomic_numbers]
        ratio = self.atomic_volumes[numbers].sum() / self.atomic_volumes[list(template.atomic_numbers)].sum()
        lattice, made_from = template.lattice.scale(template.volume * ratio), {"template": index}
        structure = Structure(lattice, numbers, template.frac_coords, properties=made_from)
        if multiple > 1:
            shortest = np.argmin(structure.lattice.abc)
            structure.make_supercell([multiple if axis == shortest else 1 for axis in range(3)])
        return structure


def _pattern(species: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """Elements in order of their counts, and these counts in lowest terms."""
    pairs = sorted((count, number) for number, count in reduce_species(species).items())
    return [number for _, number in pairs], tuple(count for count, _ in pairs)


def with_energies(model: ContinuousCGCNN, structures: Sequence[Structure]) -> list[Structure]:
    """Copies that carry the model's energy per atom (dimensionless) in ``properties["energy"]``."""
    copies = [structure.copy() for structure in structures]
    for batch, crystals in _batches(model, structures):
        with torch.no_grad():
            energies = model(crystals).tolist()
        for structure, energy in zip(copies[batch], energies, strict=True):
            structure.properties = structure.properties | {"energy": energy}
    return copies


def _batches(model: ContinuousCGCNN, structures: Sequence[Structure]) -> Iterator[tuple[slice, Crystals]]:
    weight = next(model.parameters())
    for batch in pack([len(structure) for structure in structures], sampler.batch_size(model)):
        yield batch, Crystals.from_structures(structures[batch], weight.dtype).to(weight.device)


def relax(
    model: ContinuousCGCNN, structures: Sequence[Structure], rng: Rngs, n_steps: int = 50, noise: float = 0.3
) -> list[Structure]:
    """A short chain from each structure, with a generator each: the model's own sampler, begun late.

    With noise levels it begins at level ``noise`` (Å), without at the last third of annealing.
    """
    config = replace(sampler.sampling_config(model), n_steps=n_steps)
    if isinstance(config, DiffusionConfig):
        config = replace(config, noise_first=float(np.clip(noise, model.config.noise_min, model.config.noise_max)))
    else:  # both schedules are geometric
        step = (config.step_first * config.step_last**2) ** (1 / 3)
        temperature = (config.temperature_first * config.temperature_last**2) ** (1 / 3)
        config = replace(config, step_first=step, temperature_first=temperature)
    moved = [sampler.run_chains(model, crystals, config, rng[batch]) for batch, crystals in _batches(model, structures)]
    return [structure for crystals in moved for structure in crystals.to_structures()]


def descend(
    model: ContinuousCGCNN, structures: Sequence[Structure], n_steps: int = 200, noise: float = 0.3
) -> list[Structure]:
    """Gradient descent of the energy in atoms and cell, ``n_steps`` gradients for each crystal.

    A step that raises the energy is undone and the next one is half as long; else the next one is a fifth longer. With
    noise levels the energy is the one at level ``noise`` (Å), which is smoother than where crystals are judged.
    """
    made, levels = list[Structure](), (model.config.noise_min, model.config.noise_max)
    for _, crystals in _batches(model, structures):
        level = [] if model.noise_features is None else [torch.full_like(crystals.volume, noise).clamp(*levels)]
        made += _descend(model, crystals, n_steps, *level).to_structures()
    return made


def _descend(energy: Callable[..., Tensor], crystals: Crystals, n_steps: int, *level: Tensor) -> Crystals:
    def gradients(crystals: Crystals) -> tuple[Tensor, Tensor, Tensor]:
        value, strain, positions = energy_and_gradient(energy, crystals, *level)
        return value, (strain + strain.mT) / 2, positions

    value, strain, positions = gradients(crystals)
    step = torch.full_like(value, LARGEST_MOVE)
    for _ in range(n_steps - 1):
        norm = crystals.sum_atoms(positions.square().sum(dim=1)).sqrt()
        scale = step / torch.maximum(norm, 3 * strain.norm(dim=(1, 2))).clamp(min=1e-12)
        shift = -crystals.to_atoms(scale)[:, None] * positions
        tried = niggli(apply_strain(crystals, -scale[:, None, None] * strain, shift))
        new = gradients(tried)
        better = new[0] < value
        step = torch.where(better, 1.2 * step, step / 2).clamp(max=LARGEST_MOVE)
        crystals, value = where(better, tried, crystals), torch.where(better, new[0], value)
        strain = torch.where(better[:, None, None], new[1], strain)
        positions = torch.where(crystals.to_atoms(better)[:, None], new[2], positions)
    return crystals


def rank_distinct(structures: Sequence[Structure], key: str = "energy") -> list[list[Structure]]:
    """Groups of structures that are the same crystal, each sorted by a property, and so are the groups by their best.

    Structures without volume, or with atoms closer than 0.5 Å, are dropped. Two are the same if ``StructureMatcher``
    says so at its default tolerances (0.2, 0.3, 5°), whatever their volume and cell; each joins the group with the
    lowest ``properties[key]`` whose best one it matches. A comparison that exceeds ten seconds counts as
    different. It is a ValueError if nothing was given or a structure lacks the property.
    """
    if not structures or any(key not in structure.properties for structure in structures):
        raise ValueError(f"structures is empty or one has no properties[{key!r}], expected ≥ 1 structure, all with it")
    valid = [structure for structure in structures if is_valid_structure(structure, charge_neutrality=False)]
    valid = sorted(valid, key=lambda structure: structure.properties[key])
    cells = run_with_time_limit(_reduce, [(structure,) for structure in valid], 1, progress=False)
    rest, groups = list(zip(valid, cells, strict=True)), list[list[Structure]]()
    while rest:
        (first, cell), *others = rest
        alike = [len(other or ()) == len(cell or ()) for _, other in others]  # None is the same as nothing
        tasks = [(cell, other) for _, other in itertools.compress(others, alike)]
        answers = iter(run_with_time_limit(_is_same, tasks, 1, progress=False))
        same = [likely and bool(next(answers)) for likely in alike]
        groups.append([first, *(structure for (structure, _), found in zip(others, same) if found)])
        rest = [other for other, found in zip(others, same) if not found]
    return groups


def _reduce(structure: Structure) -> Structure | None:
    """The cell in which ``StructureMatcher`` compares; making it takes longer than a comparison."""
    return _ask(lambda: structure.get_reduced_structure().get_primitive_structure())


def _is_same(first: Structure, second: Structure) -> bool:
    return bool(_ask(lambda: StructureMatcher().fit(first, second, skip_structure_reduction=True)))


def standardise(structure: Structure, symprec: float = 0.1) -> Structure:
    """The conventional cell of the symmetrised crystal (``symprec`` in Å); as it is where spglib finds no symmetry."""
    standard = _ask(lambda: SpacegroupAnalyzer(structure, symprec).get_refined_structure()) or structure.copy()
    standard.properties = dict(structure.properties)
    return standard


def space_group(structure: Structure, symprec: float = 0.1) -> str:
    """Symbol and number, such as ``Fm-3m (225)``, by spglib at ``symprec`` Å; ``P1 (1)`` where it finds none."""
    symbol, number = _ask(lambda: structure.get_space_group_info(symprec)) or ("P1", 1)
    return f"{symbol} ({number})"


def _ask(question: Callable[[], Any]) -> Any:
    """The answer; None where spglib, numpy or pymatgen fail, as they do in many ways on a distorted cell."""
    os.environ.setdefault("SPGLIB_WARNING", "OFF")  # it would print to stderr what None says
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning), suppress(Exception):
        return question()  # pymatgen calls spglib in a way that spglib is leaving
    return None


def describe(groups: Sequence[Sequence[Structure]]) -> pd.DataFrame:
    """One row a crystal, from :func:`rank_distinct`: energy, how often it was found, symmetry, density and cell.

    Returns:
        Columns ``energy`` (dimensionless), ``found`` (times) and, if the structures name their source, how often each
        source found it, ``space group`` (spglib, at 0.1 Å) and those at 0.01 and 0.3 Å, ``density``
        (g/cm³), ``V/atom`` (Å³), ``shortest`` distance of two atoms (Å), and of the conventional cell ``atoms``,
        ``a``, ``b``, ``c`` (Å), ``α``, ``β``, ``γ`` (degrees); the index ``rank`` starts at 1.
    """
    sources = sorted({structure.properties.get("source", "") for group in groups for structure in group} - {""})
    rows = []
    for group in groups:
        best, made_by = group[0], [structure.properties.get("source") for structure in group]
        row = {"energy": best.properties["energy"], "found": len(group)}
        row |= {source: made_by.count(source) for source in sources}
        row |= {"space group": space_group(best)} | {f"at {limit} Å": space_group(best, limit) for limit in (0.01, 0.3)}
        standard = standardise(best)
        row |= {"atoms": len(standard), "density": float(best.density), "V/atom": best.volume / len(best)}
        row |= {"shortest": shortest_distance(best)}
        rows.append(row | dict(zip(("a", "b", "c", "α", "β", "γ"), standard.lattice.parameters)))
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))


def shortest_distance(structure: Structure, relative: bool = False) -> float:
    """Between two atoms of a crystal, images included, Å; or relative to the sum of their covalent radii."""
    distances, radii = structure.distance_matrix, covalent_radii[list(structure.atomic_numbers)]
    np.fill_diagonal(distances, min(structure.lattice.get_niggli_reduced_lattice().abc))
    return float((distances / (radii[:, None] + radii) if relative else distances).min())


def is_crowded(structure: Structure) -> bool:
    """Whether two atoms are nearer than in any real crystal: ``CLOSEST`` of the sum of their covalent radii."""
    return shortest_distance(structure, relative=True) < CLOSEST
