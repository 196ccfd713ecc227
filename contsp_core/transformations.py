"""In what other ways can a crystal be described, and which solids are congruent to it? Random transformations.

A *re-description* gives another periodic unit of the same solid (another basis, other lattice images, another atom
order, a supercell, the primitive cell). A *congruent* solid is translated, rotated or reflected. All functions are pure
and batched. :data:`TRANSFORMATIONS` lists them with their kind.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from contsp_core.crystals import Crystals
from contsp_core.lattice import deform, niggli

LARGEST_SHIFT = 2  # cells along each lattice vector
LARGEST_SUPERCELL = 4  # cells


class Transformation(NamedTuple):
    """A random transformation ``function(crystals, rng) -> Crystals`` and what it keeps."""

    function: Callable[[Crystals, torch.Generator], Crystals]
    kind: str  # "re-description" or "congruent"


def translate(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Shift every crystal by its own vector, Gaussian with one cubic cell length per axis."""
    shift = torch.randn(len(crystals), 3, generator=rng, dtype=torch.float64).to(crystals.cell)
    shift = shift * crystals.volume.pow(1 / 3)[:, None]
    return crystals.replace(positions=crystals.positions + crystals.to_atoms(shift))


def rotate(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Turn every crystal by its own rotation about the origin, uniform on SO(3)."""
    return deform(crystals, random_rotations(len(crystals), rng).to(crystals.cell))


def reflect(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Mirror every crystal in its own plane through the origin, of uniform orientation."""
    normal = random_rotations(len(crystals), rng)[:, 0]
    mirror = torch.eye(3, dtype=torch.float64) - 2 * normal[:, :, None] * normal[:, None, :]
    return deform(crystals, mirror.to(crystals.cell))


def random_rotations(n: int, rng: torch.Generator) -> Tensor:
    """(n, 3, 3) float64 rotation matrices, uniform on SO(3): orthonormalised Gaussian matrices."""
    q, r = torch.linalg.qr(torch.randn(n, 3, 3, generator=rng, dtype=torch.float64))
    q = q * r.diagonal(dim1=1, dim2=2).sign()[:, None, :]  # makes the decomposition unique, and the law uniform
    return q * torch.linalg.det(q)[:, None, None]


def permute(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """List the atoms of every crystal in random order."""
    keys = torch.rand(len(crystals.positions), generator=rng, dtype=torch.float64).to(crystals.cell.device)
    order = torch.argsort(crystals.system_idx.double() + keys * (1 - 1e-9))
    return Crystals(crystals.cell, crystals.positions[order], crystals.atomic_numbers[order], crystals.system_idx)


def shift_images(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Replace every atom by one of its lattice images, up to two cells away along each vector."""
    images = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (len(crystals.positions), 3), generator=rng)
    shift = crystals.multiply_rows(images.to(crystals.cell), crystals.cell)
    return crystals.replace(positions=crystals.positions + shift)


def change_basis(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Describe every lattice by another basis: L′ = M L with M integer and det M = ±1; positions stay."""
    matrices = random_unimodular(len(crystals), rng)
    return crystals.replace(cell=matrices.to(crystals.cell) @ crystals.cell)


def random_unimodular(n: int, rng: torch.Generator) -> Tensor:
    """(n, 3, 3) int64 matrices of determinant ±1: shears by −1, 0 or 1, rows in random order and with random signs."""
    order = torch.argsort(torch.rand(n, 3, generator=rng), dim=1)
    signs = 2 * torch.randint(0, 2, (n, 3, 1), generator=rng) - 1
    identity, shears = torch.eye(3, dtype=torch.int64), torch.randint(-1, 2, (n, 3, 3), generator=rng).triu(1)
    return identity[order] * signs @ (identity + shears)


def supercell(crystals: Crystals, matrices: Tensor) -> Crystals:
    """The same solids described by the cells L′ = M L, each with det M times as many atoms.

    ``matrices`` are (n_systems, 3, 3) or (3, 3) integers; a ValueError tells of another shape or type, or det M < 1.
    """
    if matrices.is_floating_point() or matrices.shape[-2:] != (3, 3) or matrices.dim() not in (2, 3):
        raise ValueError(f"matrices is {matrices.dtype} {tuple(matrices.shape)}, expected integers of shape (n, 3, 3)")
    units = []
    for unit, matrix in zip(crystals, matrices.cpu().long().expand(len(crystals), 3, 3), strict=True):
        shifts = _coset_representatives(matrix).to(unit.cell) @ unit.cell[0]  # Å, one for each cell that is joined
        positions = (unit.positions[:, None] + shifts).flatten(0, 1)
        columns = (column.repeat_interleave(len(shifts)) for column in (unit.atomic_numbers, unit.system_idx))
        units.append(Crystals(matrix.to(unit.cell) @ unit.cell, positions, *columns))
    return Crystals.cat(units)


def _coset_representatives(matrix: Tensor) -> Tensor:
    """(det M, 3) integer vectors, one per class of Z³ modulo the rows of a matrix M.

    They fill the box spanned by the diagonal of the Hermite normal form, whose partial products are the greatest
    common divisors of the minors of the leading columns.
    """
    minors = torch.linalg.cross(matrix[:, 0], matrix[:, 1])
    n_cells = int(minors @ matrix[:, 2])
    if n_cells < 1:
        raise ValueError(f"matrices holds one of determinant {n_cells}, expected ≥ 1")
    first, both = gcd(*matrix[:, 0].tolist()), gcd(*minors.tolist())
    return torch.cartesian_prod(*map(torch.arange, (first, both // first, n_cells // both)))


def random_supercell(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """A random supercell of 1 … 4 cells, repeated along one random direction, in a random basis."""
    n_systems = len(crystals)
    n_cells = torch.randint(1, LARGEST_SUPERCELL + 1, (n_systems,), generator=rng)
    matrices = torch.eye(3, dtype=torch.int64).repeat(n_systems, 1, 1)
    axis = torch.randint(0, 3, (n_systems,), generator=rng)
    matrices[torch.arange(n_systems), axis, axis] = n_cells
    offset = torch.randint(0, LARGEST_SUPERCELL, (n_systems, 3, 3), generator=rng) % n_cells[:, None, None]
    basis = random_unimodular(n_systems, rng)
    sign = torch.linalg.det(basis.double()).round().long()
    return supercell(crystals, sign[:, None, None] * basis @ (matrices + torch.triu(offset, diagonal=1)))


def primitive(crystals: Crystals, tolerance: float | None = None) -> Crystals:
    """The smallest description of every solid; atoms kept are not moved, handedness is kept.

    A translated atom may lie as far as ``tolerance`` (Å) from the one it replaces; by default 1e-10 in float64 and 1e-4
    in float32: rounding only, because a looser one changes the solid.
    """
    if tolerance is None:
        tolerance = 1e-10 if crystals.cell.dtype == torch.float64 else 1e-4
    return Crystals.cat([_primitive_one(crystal, tolerance) for crystal in crystals])


def _primitive_one(crystal: Crystals, tolerance: float) -> Crystals:
    """Tries the translations that take the first atom of the rarest element to another one of that element."""
    cell, frac = (x.detach().cpu().double() for x in (crystal.cell[0], crystal.frac_coords))
    numbers, atoms = crystal.atomic_numbers.cpu(), torch.arange(len(frac))
    elements, counts = numbers.unique(return_counts=True)
    first, *others = atoms[numbers == elements[counts.argmin()]].tolist()
    kept, translations = atoms >= 0, []
    for other in others:
        gap = frac[:, None] + (frac[other] - frac[first]) - frac
        distance = ((gap - gap.round()) @ cell).norm(dim=2).masked_fill(numbers[:, None] != numbers, torch.inf)
        error, image = distance.min(dim=1)
        if error.max() <= tolerance and len(image.unique()) == len(image):
            kept &= atoms <= image
            translations.append(frac[other] - frac[first])
    order = len(translations) + 1  # of the group of translations modulo the lattice, so order · t is an integer vector
    if int(kept.sum()) * order != len(frac):
        return crystal  # the tolerance accepts some translations, but not their sums
    rows = [((order * t).round().long() % order).tolist() for t in translations]
    rows += (order * torch.eye(3, dtype=torch.int64)).tolist()
    triangular = [[row for row in rows if row[axis] > 0 and not any(row[axis + 1 :])] for axis in range(3)]
    basis = [min(triangular[axis], key=itemgetter(axis)) for axis in range(3)]  # the Hermite normal form
    new_cell = torch.tensor(basis, dtype=torch.float64) / order @ cell
    columns = (column[kept] for column in (crystal.positions, crystal.atomic_numbers, crystal.system_idx))
    return Crystals(new_cell[None].to(crystal.cell), *columns)


def random_redescription(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Compose the re-descriptions in random order, each with probability ½."""
    functions = [entry.function for entry in TRANSFORMATIONS.values() if entry.kind == "re-description"]
    chosen = torch.rand(len(functions), generator=rng) < 0.5
    for index in torch.randperm(len(functions), generator=rng).tolist():
        if chosen[index]:
            crystals = functions[index](crystals, rng)
    return crystals


def random_congruent_redescription(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """A random re-description of a translated, rotated and (with probability ½) reflected solid."""
    crystals = translate(rotate(random_redescription(crystals, rng), rng), rng)
    return reflect(crystals, rng) if torch.rand((), generator=rng) < 0.5 else crystals


TRANSFORMATIONS: dict[str, Transformation] = {
    "translation": Transformation(translate, "congruent"),
    "rotation": Transformation(rotate, "congruent"),
    "reflection": Transformation(reflect, "congruent"),
    "permutation": Transformation(permute, "re-description"),
    "lattice images": Transformation(shift_images, "re-description"),
    "basis change": Transformation(change_basis, "re-description"),
    "supercell": Transformation(random_supercell, "re-description"),
    "primitive cell": Transformation(lambda units, rng: primitive(random_supercell(units, rng)), "re-description"),
    "Niggli cell": Transformation(lambda crystals, rng: niggli(change_basis(crystals, rng)), "re-description"),
    "all re-descriptions + congruence": Transformation(random_congruent_redescription, "congruent"),
}
