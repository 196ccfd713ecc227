"""Baselines that need no model: random structures, and substitution of elements in known crystals.

Both take their volumes from an additive model: one atomic volume per element, fitted to the training crystals.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import numpy as np
from pymatgen.core import Element, Lattice, Structure

from contsp_core.crystals import MAX_ATOMIC_NUMBER, fit_atomic_volumes

if TYPE_CHECKING:
    from collections.abc import Sequence

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
