"""The batched state: a frozen set of periodic units, and the composition maps Reduce and Expand.

One convention, used everywhere: the rows of ``cell`` are the lattice vectors (as in pymatgen and ASE), positions
are Cartesian, lengths are in Å, and atoms are grouped by system.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from contsp_core import MAX_ATOMIC_NUMBER as MAX_ATOMIC_NUMBER

if TYPE_CHECKING:
    from pymatgen.core import Structure

Rngs = Sequence[torch.Generator]  # one a crystal: then none depends on the others
Rng = torch.Generator | Rngs  # or one for a batch
MIN_VOLUME = 1e-6  # Å³: below this a cell is called flat, whatever its shape


@dataclass(frozen=True, eq=False)
class Crystals:
    """A batch of periodic units U = (L, X, a): cell, positions and species (Tone et al., arXiv 2502.02026).

    A ValueError tells of a wrong shape, dtype or device, an empty batch, a system without atoms, an unknown element, a
    number that is not finite, or a flat cell.
    """

    cell: Tensor  # (n_systems, 3, 3), rows are lattice vectors, Å
    positions: Tensor  # (n_atoms_total, 3), Cartesian, Å; atoms may lie outside the cell
    atomic_numbers: Tensor  # (n_atoms_total,) int64, 1 … 100
    system_idx: Tensor  # (n_atoms_total,) int64, the system of each atom, non-decreasing, without gaps

    def __post_init__(self) -> None:
        n_systems, n_atoms = len(self.cell), len(self.positions)
        if n_systems == 0:
            raise ValueError("empty batch: Crystals needs at least one crystal")
        shapes = (n_systems, 3, 3), (n_atoms, 3), (n_atoms,), (n_atoms,)
        for (name, tensor), shape in zip(vars(self).items(), shapes, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
            if tensor.device != self.cell.device:
                raise ValueError(f"{name} is on {tensor.device}, but cell is on {self.cell.device}")
            floats = name in ("cell", "positions")
            if floats and (tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != self.cell.dtype):
                raise ValueError(f"{name} is {tensor.dtype}, expected float32 or float64, the same for both")
            if not floats and tensor.dtype != torch.int64:
                raise ValueError(f"{name} is {tensor.dtype}, expected torch.int64")
        is_ordered = (self.system_idx >= 0).all() and (self.system_idx.diff() >= 0).all()
        if not is_ordered or len(self.n_atoms) != n_systems or (self.n_atoms == 0).any():
            raise ValueError(f"system_idx must list every system 0 … {n_systems - 1} in order, each with an atom")
        bad = self.atomic_numbers[(self.atomic_numbers < 1) | (self.atomic_numbers > MAX_ATOMIC_NUMBER)]
        if len(bad):
            raise ValueError(f"atomic_numbers holds {int(bad[0])}, expected 1 … {MAX_ATOMIC_NUMBER}")
        if not torch.isfinite(self.cell).all() or not torch.isfinite(self.positions).all():
            raise ValueError("cell and positions must be finite numbers in Å; found NaN or infinity")
        smallest, system = self.volume.min(dim=0)
        if smallest < MIN_VOLUME:
            raise ValueError(f"cell of system {system} has volume {smallest:.3g} Å³, expected ≥ {MIN_VOLUME} Å³")

    @property
    def n_atoms(self) -> Tensor:
        """(n_systems,) atoms per crystal."""
        return torch.bincount(self.system_idx, minlength=len(self))

    @property
    def volume(self) -> Tensor:
        """(n_systems,) |det L|, Å³."""
        return torch.linalg.det(self.cell).abs()

    @property
    def frac_coords(self) -> Tensor:
        """(n_atoms_total, 3) fractional coordinates, not wrapped."""
        return self.multiply_rows(self.positions, torch.linalg.inv(self.cell))

    def to_atoms(self, per_system: Tensor) -> Tensor:
        """(n_systems, …) -> (n_atoms_total, …), the value of its crystal for each atom."""
        return per_system.index_select(0, self.system_idx)

    def sum_atoms(self, per_atom: Tensor) -> Tensor:
        """(n_atoms_total, …) -> (n_systems, …), the sum over the atoms of each crystal."""
        return per_atom.new_zeros(len(self), *per_atom.shape[1:]).index_add(0, self.system_idx, per_atom)

    def multiply_rows(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """(n_atoms_total, 3) rows, each times the matrix (n_systems, 3, 3) of its crystal, on the right."""
        return torch.bmm(rows.unsqueeze(1), self.to_atoms(matrices)).squeeze(1)

    def random_atoms(self, rng: Rng) -> Tensor:
        """(n_atoms_total, 3) standard normal numbers; with one generator a crystal, each draws for its own atoms."""
        return random_rows(torch.randn, self.n_atoms.tolist(), rng, self.cell.dtype).to(self.cell.device)

    def random_cells(self, rng: Rng, symmetric: bool = True) -> Tensor:
        """(n_systems, 3, 3) Gaussian matrices: of density ∝ exp(−|ε|²/2) if symmetric, else of independent entries."""
        noise = random_rows(torch.randn, [3] * len(self), rng, self.cell.dtype).to(self.cell.device).view(-1, 3, 3)
        return (noise + noise.mT) / 2 if symmetric else noise

    @property
    def species(self) -> list[list[int]]:
        """Atomic numbers of each crystal, in atom order."""
        return [part.tolist() for part in torch.split(self.atomic_numbers, self.n_atoms.tolist())]

    @property
    def element_counts(self) -> Tensor:
        """(n_systems, 101) int64, how many atoms of each atomic number."""
        n_elements = MAX_ATOMIC_NUMBER + 1
        places = self.system_idx * n_elements + self.atomic_numbers
        return torch.bincount(places, minlength=len(self) * n_elements).view(-1, n_elements)

    def __len__(self) -> int:
        return len(self.cell)

    def replace(self, cell: Tensor | None = None, positions: Tensor | None = None) -> Crystals:
        """The same atoms in another geometry: another cell, other positions, or both.

        Values are not checked again: a Monte Carlo proposal may be non-finite, and it is the sampler that rejects it.
        """
        given = {name: x for name, x in (("cell", cell), ("positions", positions)) if x is not None}
        for name, tensor in given.items():
            if tensor.shape != vars(self)[name].shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(vars(self)[name].shape)}")
        new = object.__new__(Crystals)
        vars(new).update(vars(self) | given)
        return new

    def to(self, target: torch.device | str | torch.dtype) -> Crystals:
        """A copy on another device, or in another floating-point precision."""
        names, new = ("cell", "positions") if isinstance(target, torch.dtype) else vars(self), self.replace()
        vars(new).update({name: getattr(self, name).to(target) for name in names})
        return new

    def __iter__(self) -> Iterator[Crystals]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, systems: int | slice | Sequence[int] | np.ndarray | Tensor) -> Crystals:
        """The chosen crystals, in the order given (a crystal may be chosen more than once); a loop takes one by one."""
        device, counts = self.cell.device, self.n_atoms
        if not isinstance(systems, slice):
            systems = torch.as_tensor(systems, device=device).reshape(-1)  # a single number too, of any kind
            systems = systems if systems.numel() else systems.long()
        chosen = torch.arange(len(self), device=device)[systems]
        atoms = ragged_arange((torch.cumsum(counts, 0) - counts)[chosen], counts[chosen])
        system_idx = torch.repeat_interleave(torch.arange(len(chosen), device=device), counts[chosen])
        return Crystals(self.cell[chosen], self.positions[atoms], self.atomic_numbers[atoms], system_idx)

    @classmethod
    def cat(cls, batches: Sequence[Crystals]) -> Crystals:
        """Join batches end to end."""
        if not batches:
            raise ValueError("empty batch: nothing to join")
        offsets = np.cumsum([0, *map(len, batches)])
        moved = [batch.system_idx + int(offset) for batch, offset in zip(batches, offsets)]
        joined = {name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])}
        return cls(**joined | {"system_idx": torch.cat(moved)})

    @classmethod
    def from_arrays(
        cls,
        cells: np.ndarray | Tensor,
        positions: np.ndarray | Tensor,
        species: Sequence[Sequence[int]],
        dtype: torch.dtype = torch.float32,
    ) -> Crystals:
        """From cells (n_systems, 3, 3), concatenated Cartesian positions (Å) and one list of atomic numbers each."""
        counts = torch.tensor([len(numbers) for numbers in species], dtype=torch.int64)
        cell, xyz = (torch.as_tensor(np.asarray(array), dtype=dtype).clone() for array in (cells, positions))
        flat = torch.tensor([number for numbers in species for number in numbers], dtype=torch.int64)
        return cls(cell, xyz, flat, torch.repeat_interleave(torch.arange(len(counts)), counts))

    @classmethod
    def from_structures(cls, structures: Iterable[Structure], dtype: torch.dtype = torch.float32) -> Crystals:
        """From pymatgen structures; a ValueError names one that is disordered, or is one of :class:`Crystals`."""
        structures = list(structures)
        if not structures:
            raise ValueError("empty batch: Crystals.from_structures needs at least one structure")
        for index, structure in enumerate(structures):
            if not structure.is_ordered:
                name = f"structure {index} ({structure.formula})"
                raise ValueError(f"{name} has a disordered site, expected full occupancy")
        cells = np.stack([structure.lattice.matrix for structure in structures])
        positions = np.concatenate([structure.cart_coords for structure in structures])
        return cls.from_arrays(cells, positions, [list(structure.atomic_numbers) for structure in structures], dtype)

    def to_structures(self) -> list[Structure]:
        """One pymatgen structure per crystal, atoms wrapped into the cell; −L for a left-handed L, for CIFs."""
        from pymatgen.core import Lattice, Structure

        species: list[Any] = self.species  # pymatgen takes atomic numbers, but its annotations do not say so
        cells = self.cell.detach().cpu().double().numpy()
        cells = np.where(np.linalg.det(cells) < 0, -1, 1)[:, None, None] * cells
        positions = torch.split(self.positions.detach().cpu().double(), self.n_atoms.tolist())
        return [
            Structure(Lattice(cell), numbers, xyz.numpy(), coords_are_cartesian=True, to_unit_cell=True)
            for cell, numbers, xyz in zip(cells, species, positions)
        ]


def keyed_rng(*key: object) -> torch.Generator:
    """A generator of the text of a key alone: equal texts give equal numbers, others unless 32 bits of a hash agree."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def random_rows(
    sample: Callable[..., Tensor], counts: Sequence[int], rng: Rng, dtype: torch.dtype, width: int = 3
) -> Tensor:
    """(sum of counts, width) numbers of ``torch.rand`` or ``torch.randn``, so many rows for each crystal."""
    if isinstance(rng, torch.Generator):
        return sample(sum(counts), width, generator=rng, dtype=dtype)
    return torch.cat([sample(n, width, generator=own, dtype=dtype) for n, own in zip(counts, rng, strict=True)])


def pack(sizes: Sequence[int], limit: int) -> list[slice]:
    """Consecutive entries in runs whose sizes sum to at most ``limit``; a larger entry is a run of its own."""
    cuts, used = [0], 0
    for index, size in enumerate(sizes):
        if index > cuts[-1] and used + size > limit:
            cuts.append(index)
            used = 0
        used += size
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(sizes)]) if end > start]


def ragged_arange(starts: Tensor, counts: Tensor) -> Tensor:
    """Concatenate ``arange(start, start + count)`` over all pairs, without a loop."""
    ends = torch.cumsum(counts, 0)
    offsets = torch.repeat_interleave(starts - (ends - counts), counts)
    return torch.arange(int(ends[-1]) if len(ends) else 0, device=starts.device) + offsets


def reduce_species(species: Sequence[int]) -> dict[int, int]:
    """Reduce(a): the composition in lowest integer terms, {atomic number: count}, ordered by atomic number."""
    if not len(species):
        raise ValueError("species is empty, expected at least one atomic number")
    counts = Counter(sorted(species))
    divisor = math.gcd(*counts.values())
    return {number: count // divisor for number, count in counts.items()}


def reduce_counts(counts: np.ndarray) -> np.ndarray:
    """(n, 101) atoms of each element, as :attr:`Crystals.element_counts`, in lowest integer terms."""
    return counts // np.maximum(np.gcd.reduce(counts, axis=1, keepdims=True), 1)


def expand_composition(
    composition: dict[int, int], rng: torch.Generator, p: float = 0.5, max_atoms: int | None = None
) -> list[int]:
    """Expand(c): the species of m formula units, m ~ Geometric(p) on {1, 2, …} (paper, Figure 1).

    If ``max_atoms`` is given, m is truncated so that the crystal holds at most so many atoms (but m ≥ 1).
    """
    uniform = float(torch.rand((), generator=rng, dtype=torch.float64))
    multiple = 1 + int(math.log1p(-uniform) / math.log1p(-p)) if p < 1 else 1
    if max_atoms is not None:
        multiple = max(1, min(multiple, max_atoms // sum(composition.values())))
    return [number for number, count in composition.items() for _ in range(count * multiple)]


def similar_elements(width: int, rng: torch.Generator) -> Tensor:
    """(100, width) random embeddings, alike for neighbours in the periodic table.

    A Gaussian process over period, group and place in the f block, with a fifth of independent noise.
    """
    noble = torch.tensor([0, 2, 10, 18, 36, 54, 86, 118])
    number = torch.arange(1, MAX_ATOMIC_NUMBER + 1)
    period = torch.searchsorted(noble, number)
    place, until_end = number - noble[period - 1], noble[period] - number
    group = torch.where((place <= 2) & (until_end > 0), place, (18 - until_end).clamp(min=3))
    in_f_block = torch.where((group == 3) & (place > 3), place - 3, 0)
    where = torch.stack([period / 1.5, group / 2, in_f_block / 8], dim=1).double()
    covariance = 0.8 * torch.exp(-0.5 * torch.cdist(where, where) ** 2) + 0.2 * torch.eye(len(where))
    normal = torch.randn(len(where), width, generator=rng, dtype=torch.float64)
    return (torch.linalg.cholesky(covariance) @ normal).float()


def fit_atomic_volumes(crystals: Crystals, ridge: float = 1.0) -> Tensor:
    """(101,) volume of an atom of each element, Å³, by ridge regression of volumes per atom on compositions.

    Entry 0, and that of an element never seen, is the mean over crystals; none is below a tenth of it. ``ridge`` is the
    strength of the pull to the mean, in crystals.
    """
    fractions = crystals.element_counts.double() / crystals.n_atoms[:, None]
    per_atom = (crystals.volume / crystals.n_atoms).double()
    mean = per_atom.mean()
    normal = fractions.T @ fractions + ridge * torch.eye(MAX_ATOMIC_NUMBER + 1, dtype=torch.float64)
    return (mean + torch.linalg.solve(normal, fractions.T @ (per_atom - mean))).clamp(min=0.1 * mean)


def check_settings(config: object, **limits: tuple[float, float]) -> None:
    """Refuse, by a ValueError in one line, a setting of a dataclass that is outside its limits.

    Whole numbers are ≥ 1 and others positive, unless ``limits`` say otherwise; all are finite. A Literal is one of its
    values, and None passes where the annotation has it.
    """
    for name, kind in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(kind) or (kind,)
        if get_origin(kind) is Literal:
            sound, expected = value in kinds, f"one of {', '.join(kinds)}"
        elif not {int, float} & set(kinds) or (value is None and NoneType in kinds):
            continue
        else:
            whole = float not in kinds
            least, most = limits.get(name, (1 if whole else math.ulp(0.0), math.inf))
            sound = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            sound = sound and least <= value <= most and value < math.inf
            limit = f"≥ {least}" if most == math.inf else f"from {least} to {most}"
            expected = f"{'an integer' if whole else 'a number'} {limit}"
            expected = expected if whole or name in limits else "a positive number"
        if not sound:
            raise ValueError(f"{name} is {value!r}, expected {expected}")
