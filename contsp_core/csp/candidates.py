"""Candidate crystals from several sources, and the energy as a judge of whatever made them.

Sources: chains from random starts; random structures at the right density, as drawn or after descent of the energy;
known crystals with their elements exchanged, as they are or after a short chain at low noise.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import permutations, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pymatgen.core import Element, Lattice, Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from contsp_core.crystals import MAX_ATOMIC_NUMBER, Crystals, fit_atomic_volumes, reduce_species
from contsp_core.csp.metrics import evaluate_csp, is_valid_structure, run_with_time_limit, score_pair
from contsp_core.data import SPLITS, load_split, parse_formula
from contsp_core.diffusion import DiffusionConfig, initial_crystals, reverse_diffusion
from contsp_core.energy import ContinuousCGCNN, energy_and_gradient
from contsp_core.lattice import apply_strain, niggli
from contsp_core.mala import AnnealConfig, anneal, random_crystals, strain_gradient, sum_atoms
from contsp_core.sampler import bytes_per_atom, sample_structures, sampling_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pymatgen.core import Structure
    from torch import Tensor


MIN_SHAPE = 0.3  # smallest volume / (a·b·c) of a random cell; a cube has 1
MAX_ASSIGNMENTS = 5040  # 7!: with more elements of equal count, only so many ways to assign them are tried


def random_structures(
    species: Sequence[int],
    n: int,
    seed: int | np.random.Generator = 0,
    atomic_volumes: np.ndarray | None = None,
    density: float = 0.05,
) -> list[Structure]:
    """The random baseline: cells of random shape at the right density, atoms anywhere.

    Cell entries are Gaussian, drawn again while the volume is below 0.3 of a·b·c, then scaled to the volume.

    Args:
        species: atomic numbers of one crystal.
        n: number of structures.
        seed: an integer, or a generator, which is advanced.
        atomic_volumes: (101,) of :func:`fit_atomic_volumes`, Å³; if None, ``density`` fixes the volume.
        density: atoms per Å³.

    Raises:
        ValueError: if species is empty or n is negative.
    """
    _check(species, n)
    rng = np.random.default_rng(seed)
    volume = len(species) / density if atomic_volumes is None else float(np.sum(atomic_volumes[list(species)]))
    structures = []
    for _ in range(n):
        cell = rng.normal(size=(3, 3))
        while abs(np.linalg.det(cell)) < MIN_SHAPE * np.prod(np.linalg.norm(cell, axis=1)):
            cell = rng.normal(size=(3, 3))
        cell *= (volume / abs(np.linalg.det(cell))) ** (1 / 3)
        structures.append(Structure(Lattice(cell), list(species), rng.random((len(species), 3))))
    return structures


class TemplateLibrary:
    """Training crystals sorted by stoichiometry, ready for the exchange of elements.

    Args:
        training: a data split with ``structures`` (or ``crystals``), or a sequence of pymatgen structures.

    Attributes:
        atomic_volumes: (101,) fitted to the training crystals, Å³.
    """

    def __init__(self, training: Any) -> None:
        self.structures = _structures(training)
        if not self.structures:
            raise ValueError("training is empty, expected at least one crystal")
        species = [list(structure.atomic_numbers) for structure in self.structures]
        self.atomic_volumes = fit_atomic_volumes(species, [structure.volume for structure in self.structures])
        groups: dict[tuple, list[tuple[int, list[int]]]] = defaultdict(list)
        for index, numbers in enumerate(species):
            elements, pattern = _pattern(numbers)
            groups[len(numbers), pattern].append((index, elements))
        # (number of atoms, reduced counts) -> crystals of that stoichiometry, and their elements in order of the counts
        self.groups = {key: tuple(map(np.array, zip(*entries, strict=True))) for key, entries in groups.items()}

    def substitute(self, species: Sequence[int], n: int, seed: int = 0) -> list[Structure]:
        """See :func:`substitute_templates`."""
        _check(species, n)
        elements, pattern = _pattern(species)
        rng = np.random.default_rng(seed)
        assigned = np.array([[elements[i] for i in order] for order in _assignments(pattern)])
        candidates = []
        for multiple in (m for m in range(1, len(species) + 1) if len(species) % m == 0):
            indices, olds = self.groups.get((len(species) // multiple, pattern), ((), ()))
            if len(indices) == 0:
                continue
            distance = np.zeros((len(indices), len(assigned)))
            for column, count in enumerate(pattern):
                distance += count / sum(pattern) * element_distances()[olds[:, [column]], assigned[:, column]]
            flat = distance.ravel()
            for place in np.lexsort((rng.random(len(flat)), flat))[:n]:
                template, assignment = np.unravel_index(place, distance.shape)
                exchange = dict(zip(olds[template].tolist(), assigned[assignment].tolist(), strict=True))
                candidates.append((multiple, flat[place], int(indices[template]), exchange))
        candidates.sort(key=lambda candidate: candidate[:2])  # same number of atoms first, then the nearest
        return [self._build(index, exchange, multiple) for multiple, _, index, exchange in candidates[:n]]

    def _build(self, index: int, exchange: dict[int, int], multiple: int) -> Structure:
        template = self.structures[index]
        numbers = [exchange[number] for number in template.atomic_numbers]
        ratio = self.atomic_volumes[numbers].sum() / self.atomic_volumes[list(template.atomic_numbers)].sum()
        structure = Structure(template.lattice.scale(template.volume * ratio), numbers, template.frac_coords)
        if multiple > 1:
            repeats = [1, 1, 1]
            repeats[int(np.argmin(structure.lattice.abc))] = multiple
            structure.make_supercell(repeats)
        return structure


def substitute_templates(species: Sequence[int], training: Any, n: int, seed: int = 0) -> list[Structure]:
    """Element substitution: the training crystals of nearest composition with their elements exchanged.

    Templates have the stoichiometry of the target (AB₂C for AB₂C) and its number of atoms; only if these do not
    suffice, smaller crystals are repeated along their shortest vector. Elements of equal count can be assigned in
    several ways: each is a candidate of its own. Candidates are sorted by the mean over atoms of the distance
    between the old and the new element, see :func:`element_distances`, ties in random order. The volume of the
    template is multiplied by the ratio of the volumes that the atomic volumes give for the two compositions.

    Args:
        species: atomic numbers of the crystal to predict.
        training: a data split, structures, or (to search many times) a :class:`TemplateLibrary`.
        n: number of structures asked for.
        seed: of the order of ties.

    Returns:
        at most n structures, the nearest first; fewer if the training crystals give no more candidates.

    Raises:
        ValueError: if species or training is empty, or n is negative.
    """
    library = training if isinstance(training, TemplateLibrary) else TemplateLibrary(training)
    return library.substitute(species, n, seed)


@lru_cache(maxsize=1)
def element_distances() -> np.ndarray:
    """(101, 101) chemical distance of elements: Euclidean, of three properties each scaled to unit variance.

    The properties are Pettifor's Mendeleev number, the electronegativity (Pauling) and the atomic radius (Slater);
    where one is not known it takes the mean of all elements.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each element without electronegativity or radius
        elements = [Element.from_Z(number) for number in range(1, MAX_ATOMIC_NUMBER + 1)]
        rows = [[element.mendeleev_no, element.X, element.atomic_radius or math.nan] for element in elements]
    properties = np.array(rows, dtype=float)
    properties = (properties - np.nanmean(properties, axis=0)) / np.nanstd(properties, axis=0)
    properties = np.nan_to_num(np.vstack([np.zeros(3), properties]))  # row 0 is no element
    return np.linalg.norm(properties[:, None] - properties[None], axis=-1)


def _check(species: Sequence[int], n: int) -> None:
    if len(species) == 0:
        raise ValueError("species is empty, expected at least one atomic number")
    if n < 0:
        raise ValueError(f"n is {n}, expected a number ≥ 0")


def _structures(training: Any) -> list[Structure]:
    if hasattr(training, "structures"):
        return list(training.structures)
    if hasattr(training, "crystals"):
        return training.crystals.to_structures()
    return list(training)


def _pattern(species: Sequence[int]) -> tuple[list[int], tuple[int, ...]]:
    """Elements in order of their counts, and these counts in lowest terms."""
    counts = sorted(Counter(int(number) for number in species).items(), key=lambda item: (item[1], item[0]))
    divisor = math.gcd(*(count for _, count in counts))
    return [number for number, _ in counts], tuple(count // divisor for _, count in counts)


def _assignments(pattern: tuple[int, ...]) -> list[list[int]]:
    """All orders of the elements that keep the counts: permutations among elements of equal count."""
    places = [[i for i, other in enumerate(pattern) if other == count] for count in sorted(set(pattern))]
    orders = product(*(permutations(group) for group in places))
    return [[i for group in order for i in group] for order, _ in zip(orders, range(MAX_ASSIGNMENTS))]


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


ORIGINS = ("chains", "templates", "both")


def is_formula(value: Any) -> str | None:
    """Rule of a notebook parameter: None if the value is a formula, else what is expected."""
    try:
        parse_formula(value)
    except (ValueError, TypeError, AttributeError):
        return 'a formula with whole numbers, like "BaTiO3"'
    return None if isinstance(value, str) else 'a formula with whole numbers, like "BaTiO3"'


def gather_candidates(
    model: ContinuousCGCNN,
    formula: str,
    source: str = "both",
    n_samples: int = 20,
    n_steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Structure]:
    """Candidates for one formula, each with ``properties["energy"]`` and ``properties["source"]``.

    Args:
        model: from :func:`contsp_core.load_model`.
        formula: content of the cell.
        source: ``chains``, from random starts; ``templates``, the training crystals of nearest composition with their
            elements exchanged, then followed down the last noise levels; or ``both``.
        n_samples: of each source; templates may be fewer.
        n_steps: length of a chain from a random start, by default as the model's settings say.
        seed: of all that is random.
        progress: show a progress bar of the chains.

    Raises:
        ValueError: on an unknown source, or if there is no template for the formula and nothing else was asked for.
    """
    if source not in ORIGINS:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(ORIGINS)}")
    found = []
    if source != "templates":
        sampled = sample_structures(model, [formula], n_samples, n_steps, seed, progress=progress)[0]
        found += [("chains", structure) for structure in sampled]
    if source != "chains":
        library = TemplateLibrary(load_split(model.settings["dataset"], "train"))
        species = [parse_formula(formula)]
        made = make_candidates("templates_relaxed", species, n_samples, seed, model=model, library=library)[0]
        found += [("templates", structure) for structure in made if structure is not None]
    if not found:
        raise ValueError(f"no training crystal has the stoichiometry of {formula!r}; source='chains' needs none")
    for name, structure in found:
        structure.properties["source"] = name
    return [structure for _, structure in found]


def rank_distinct(
    structures: Sequence[Structure], time_limit_s: float = 10.0, n_jobs: int = 1
) -> tuple[list[Structure], list[int]]:
    """Sort by energy, drop structures with overlapping atoms, and keep one of each group that matches.

    Two structures are the same if ``StructureMatcher`` says so at its default tolerances (0.2, 0.3, 5°); of each group
    the one of lowest energy is kept. A comparison that exceeds the time limit counts as different.

    Args:
        structures: each with ``properties["energy"]``.
        time_limit_s: limit of one comparison, s.
        n_jobs: worker processes.

    Returns:
        The structures kept, lowest energy first, and how many of the structures given each stands for.

    Raises:
        ValueError: if nothing was given or a structure has no energy.
    """
    if not structures or any("energy" not in structure.properties for structure in structures):
        raise ValueError("structures is empty or one has no properties['energy'], expected ≥ 1 structure, all with it")
    valid = [structure for structure in structures if is_valid_structure(structure, charge_neutrality=False)]
    ordered = sorted(valid, key=lambda structure: structure.properties["energy"])
    pairs = list(itertools.combinations(range(len(ordered)), 2))
    tasks = [(ordered[first], ordered[second]) for first, second in pairs]
    found = run_with_time_limit(_is_same, tasks, n_jobs, time_limit_s, "comparing", False)
    same = {pair for pair, answer in zip(pairs, found) if answer}
    counts: dict[int, int] = {}
    for index in range(len(ordered)):
        leader = next((kept for kept in counts if (kept, index) in same), index)
        counts[leader] = counts.get(leader, 0) + 1
    return [ordered[index] for index in counts], list(counts.values())


def _is_same(first: Structure, second: Structure) -> bool:
    try:
        return bool(StructureMatcher().fit(first, second))
    except Exception:  # a distorted cell makes spglib, numpy and pymatgen fail in many ways
        return False


def standardise(structure: Structure, symprec: float = 0.1) -> Structure:
    """The conventional cell of the symmetrised crystal, or the structure as it is where spglib finds no symmetry.

    Args:
        structure: a predicted crystal.
        symprec: how far, in Å, an atom may be from its symmetric site.
    """
    standard = _ask_spglib(structure, symprec, SpacegroupAnalyzer.get_refined_structure) or structure.copy()
    standard.properties = dict(structure.properties)
    return standard


def describe_structures(
    structures: Sequence[Structure], counts: Sequence[int] | None = None, symprec: float = 0.1
) -> pd.DataFrame:
    """One row a structure, in the order given: energy, space group, density and conventional cell.

    Args:
        structures: each with ``properties["energy"]``.
        counts: how many samples each stands for, by default 1.
        symprec: tolerance of the space group, Å.

    Returns:
        Columns ``energy`` (dimensionless), ``source`` (of the one kept), ``found`` (times), ``space group``,
        ``density`` (g/cm³), ``V/atom`` (Å³), ``a``, ``b``, ``c`` (Å), ``α``, ``β``, ``γ`` (degrees); the index ``rank``
        starts at 1.
    """
    rows = []
    for structure, count in zip(structures, counts or [1] * len(structures)):
        lattice = standardise(structure, symprec).lattice
        rows.append(
            {
                "energy": structure.properties["energy"],
                "source": structure.properties.get("source", ""),
                "found": count,
                "space group": space_group(structure, symprec),
                "density": float(structure.density),
                "V/atom": structure.volume / len(structure),
            }
            | dict(zip(("a", "b", "c"), lattice.abc))
            | dict(zip(("α", "β", "γ"), lattice.angles))
        )
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))


def space_group(structure: Structure, symprec: float = 0.1) -> str:
    """Symbol and number, such as ``Fm-3m (225)``, by spglib at ``symprec`` Å; ``P1 (1)`` where it finds none."""
    symbol = _ask_spglib(structure, symprec, SpacegroupAnalyzer.get_space_group_symbol) or "P1"
    return f"{symbol} ({_ask_spglib(structure, symprec, SpacegroupAnalyzer.get_space_group_number) or 1})"


def _ask_spglib(structure: Structure, symprec: float, question: Callable[[SpacegroupAnalyzer], Any]) -> Any:
    """The answer, or None where spglib finds no symmetry at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pymatgen calls spglib in a way that spglib is leaving
        try:
            return question(SpacegroupAnalyzer(structure, symprec=symprec))
        except Exception:  # spglib and pymatgen fail in many ways on a distorted cell
            return None


def known_crystals(dataset: str, formula: str) -> dict[str, Structure]:
    """Crystals of a data set with this composition, in any of its splits, by ``"material_id (split)"``."""
    composition = reduce_species(parse_formula(formula))
    known = {}
    for part in SPLITS:
        split = load_split(dataset, part)
        rows = [row for row, numbers in enumerate(split.species) if reduce_species(numbers) == composition]
        known |= {f"{split.material_ids[row]} ({part})": split[row] for row in rows}
    return known


def compare_with_known(structures: Sequence[Structure], known: Mapping[str, Structure]) -> pd.DataFrame:
    """Which candidates match known crystals, at the tolerances of the field's benchmarks (0.3, 0.5, 10°).

    Args:
        structures: candidates, best first.
        known: crystals by name.

    Returns:
        One row for each known crystal: ``space group``; ``rank`` of the first candidate that matches it (from 1;
        missing if none does) and its normalised RMS displacement ``rms`` (unitless).
    """
    rows = {}
    for name, reference in known.items():
        tasks = [(structure, reference) for structure in structures]
        scores = run_with_time_limit(score_pair, tasks, 1, 10.0, "matching", False)
        matched = [(rank, score[0]) for rank, score in enumerate(scores, start=1) if score and score[0] == score[0]]
        rank, rms = matched[0] if matched else (None, None)
        rows[name] = {"space group": space_group(reference), "rank": rank, "rms": rms}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["space group", "rank", "rms"])
    return table.astype({"rank": "Int64", "rms": float}).rename_axis("known crystal")


def write_cifs(structures: Sequence[Structure], folder: str | Path) -> list[Path]:
    """One CIF a structure, exactly as predicted (P1): ``01_NaCl.cif``, ``02_NaCl.cif``, … in the order given.

    Files that an earlier call left in the folder are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]_*.cif"):
        old.unlink()
    paths = []
    for rank, structure in enumerate(structures, start=1):
        path = folder / f"{rank:02d}_{structure.composition.reduced_formula}.cif"
        path.write_text(str(CifWriter(structure)))
        paths.append(path)
    return paths
