"""In what other ways can a crystal be described, and which solids are congruent to it? Random transformations.

A *re-description* gives another periodic unit of the same solid (another basis, other lattice images, another atom
order, a supercell, the primitive cell). A *congruent* solid is translated, rotated or reflected. All functions are pure
and batched. :data:`TRANSFORMATIONS` lists them with their kind.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import NamedTuple

import numpy as np
import torch
from scipy.spatial import cKDTree
from sympy.polys.domains import ZZ
from sympy.polys.matrices import DM
from sympy.polys.matrices.normalforms import hermite_normal_form
from torch import Tensor

from contsp_core.crystals import Crystals, ragged_arange
from contsp_core.lattice import deform, niggli


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


def shift_images(crystals: Crystals, rng: torch.Generator, largest: int = 2) -> Crystals:
    """Replace every atom by one of its lattice images, up to ``largest`` cells away along each vector."""
    images = torch.randint(-largest, largest + 1, (len(crystals.positions), 3), generator=rng)
    shift = crystals.multiply_rows(images.to(crystals.cell), crystals.cell)
    return crystals.replace(positions=crystals.positions + shift)


def change_basis(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Describe every lattice by another basis: L′ = M L with M integer and det M = ±1; positions stay."""
    matrices = random_unimodular(crystals.n_systems, rng)
    return crystals.replace(cell=matrices.to(crystals.cell) @ crystals.cell)


def random_unimodular(n: int, rng: torch.Generator, n_shears: int = 4) -> Tensor:
    """(n, 3, 3) int64 matrices of determinant ±1: a signed permutation followed by shears of ±1."""
    order = torch.argsort(torch.rand(n, 3, generator=rng), dim=1)
    signs = 2 * torch.randint(0, 2, (n, 3, 1), generator=rng) - 1
    matrices = torch.eye(3, dtype=torch.int64)[order] * signs
    systems = torch.arange(n)
    for _ in range(n_shears):
        row = torch.randint(0, 3, (n,), generator=rng)
        other = (row + torch.randint(1, 3, (n,), generator=rng)) % 3
        sign = 2 * torch.randint(0, 2, (n, 1), generator=rng) - 1
        matrices = matrices.index_put((systems, row), matrices[systems, row] + sign * matrices[systems, other])
    return matrices


def supercell(crystals: Crystals, matrices: Tensor) -> Crystals:
    """The same solids described by the cells L′ = M L, each with det M times as many atoms.

    Args:
        matrices: (n_systems, 3, 3) or (3, 3) integers, det ≥ 1.

    Raises:
        ValueError: on a wrong shape, a non-integer matrix or a determinant below 1.
    """
    if matrices.is_floating_point() or matrices.shape[-2:] != (3, 3) or matrices.dim() not in (2, 3):
        raise ValueError(f"matrices is {matrices.dtype} {tuple(matrices.shape)}, expected integers of shape (n, 3, 3)")
    matrices = matrices.cpu().long().expand(crystals.n_systems, 3, 3)
    n_cells = torch.linalg.det(matrices.double()).round().long()
    if (n_cells < 1).any():
        raise ValueError(f"matrices holds one of determinant {int(n_cells.min())}, expected ≥ 1")
    offsets, system = _coset_representatives(matrices, n_cells)
    device = crystals.cell.device
    n_cells = n_cells.to(device)
    shifts = (offsets.to(crystals.cell)[:, None] @ crystals.cell[system.to(device)]).squeeze(1)  # Å, one per cell
    # every atom is paired with every unit cell of its own crystal
    cells_per_atom = n_cells[crystals.system_idx]
    first_cell = (torch.cumsum(n_cells, 0) - n_cells)[crystals.system_idx]
    atom = torch.repeat_interleave(torch.arange(len(crystals.positions), device=device), cells_per_atom)
    positions = crystals.positions[atom] + shifts[ragged_arange(first_cell, cells_per_atom)]
    cell = matrices.to(crystals.cell) @ crystals.cell
    return Crystals(cell, positions, crystals.atomic_numbers[atom], crystals.system_idx[atom])


def _coset_representatives(matrices: Tensor, n_cells: Tensor) -> tuple[Tensor, Tensor]:
    """Integer vectors, one per class of Z³ modulo the rows of each matrix, and the matrix each belongs to.

    They fill the box spanned by the diagonal of the Hermite normal form, whose partial products are the greatest
    common divisors of the minors of the leading columns.
    """
    gcd_1 = torch.gcd(torch.gcd(matrices[:, 0, 0], matrices[:, 1, 0]), matrices[:, 2, 0])
    minor = torch.linalg.cross(matrices[:, :, 0], matrices[:, :, 1], dim=1)
    gcd_2 = torch.gcd(torch.gcd(minor[:, 0], minor[:, 1]), minor[:, 2])
    diagonal = torch.stack([gcd_1, gcd_2 // gcd_1, n_cells // gcd_2], dim=1)
    system = torch.repeat_interleave(torch.arange(len(matrices)), n_cells)
    index = ragged_arange(torch.zeros_like(n_cells), n_cells)
    size = diagonal[system]
    by_z, rest = index % size[:, 2], index // size[:, 2]
    return torch.stack([rest // size[:, 1], rest % size[:, 1], by_z], dim=1), system


def random_supercell(crystals: Crystals, rng: torch.Generator, largest: int = 4) -> Crystals:
    """A random supercell of 1 … ``largest`` cells: a random Hermite normal form in a random basis."""
    return supercell(crystals, random_supercell_matrices(crystals.n_systems, rng, largest))


def random_supercell_matrices(n: int, rng: torch.Generator, largest: int = 4) -> Tensor:
    """(n, 3, 3) int64 matrices of determinant 1 … ``largest``."""
    n_cells = torch.randint(1, largest + 1, (n,), generator=rng)
    matrices = torch.eye(3, dtype=torch.int64).repeat(n, 1, 1)
    axis = torch.randint(0, 3, (n,), generator=rng)
    matrices[torch.arange(n), axis, axis] = n_cells
    offset = torch.randint(0, largest, (n, 3, 3), generator=rng) % n_cells[:, None, None]
    matrices = matrices + torch.triu(offset, diagonal=1)
    basis = random_unimodular(n, rng, n_shears=2)
    sign = torch.linalg.det(basis.double()).round().long()
    return basis @ matrices * sign[:, None, None]


def primitive(crystals: Crystals, tolerance: float | None = None) -> Crystals:
    """The smallest description of every solid; atoms kept are not moved, handedness is kept.

    Args:
        tolerance: Å, how far a translated atom may lie from the one it replaces; 1e-10 in float64 and 1e-4 in
            float32 by default: rounding only, because a looser one changes the solid.
    """
    if tolerance is None:
        tolerance = 1e-10 if crystals.cell.dtype == torch.float64 else 1e-4
    return Crystals.cat([_primitive_one(crystals[system], tolerance) for system in range(len(crystals))])


def _primitive_one(crystal: Crystals, tolerance: float) -> Crystals:
    cell, frac_coords = (x.detach().cpu().double() for x in (crystal.cell[0], crystal.frac_coords))
    found = _lattice_translations(cell.numpy(), frac_coords.numpy(), crystal.atomic_numbers.cpu().numpy(), tolerance)
    if not found:
        return crystal
    translations, images = zip(*found)
    order = len(found) + 1  # of the group of translations modulo the lattice, so order · t is an integer vector
    rows = [*np.rint(np.array(translations) * order).astype(int).tolist(), *(order * np.eye(3, dtype=int)).tolist()]
    basis = hermite_normal_form(DM(rows, ZZ).transpose()).transpose().to_Matrix()  # of the lattice the rows span
    new_cell = torch.tensor(basis.tolist(), dtype=torch.float64) / order @ cell
    kept = torch.as_tensor(np.arange(len(crystal.positions)) <= np.min(images, axis=0))
    atoms = [column[kept] for column in (crystal.positions, crystal.atomic_numbers, crystal.system_idx)]
    return Crystals(new_cell[None].to(crystal.cell), *atoms)


def _lattice_translations(
    cell: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, tolerance: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Fractional translations, no lattice vectors, that map a crystal onto itself; and the image of each atom."""
    kinds, counts = np.unique(numbers, return_counts=True)
    if gcd(*counts.tolist()) == 1:
        return []
    # the species is a fourth, non-periodic coordinate: atoms of two species never coincide
    points = np.column_stack([frac_coords % 1 % 1, numbers])
    tree = cKDTree(points, boxsize=[1, 1, 1, 0])
    rarest = np.flatnonzero(numbers == kinds[counts.argmin()])
    found = []
    for other in rarest[1:]:
        translation = frac_coords[other] - frac_coords[rarest[0]]
        moved = np.column_stack([(frac_coords + translation) % 1 % 1, numbers])
        image = tree.query(moved)[1]
        gap = moved - points[image]
        distance = np.linalg.norm((gap[:, :3] - np.rint(gap[:, :3])) @ cell, axis=1)
        fits = distance.max() <= tolerance and not gap[:, 3].any() and len(np.unique(image)) == len(image)
        if fits and (image != np.arange(len(image))).any():
            found.append((translation, image))
    return found


def random_redescription(crystals: Crystals, rng: torch.Generator) -> Crystals:
    """Compose the re-descriptions in random order, each with probability ½ (a supercell of at most 4 cells)."""
    names = [name for name, entry in TRANSFORMATIONS.items() if entry.kind == "re-description" and "+" not in name]
    chosen = torch.rand(len(names), generator=rng) < 0.5
    for index in torch.randperm(len(names), generator=rng).tolist():
        if chosen[index]:
            crystals = TRANSFORMATIONS[names[index]].function(crystals, rng)
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
    "primitive cell": Transformation(
        lambda crystals, rng: primitive(random_supercell(crystals, rng)), "re-description"
    ),
    "Niggli cell": Transformation(lambda crystals, rng: niggli(change_basis(crystals, rng)), "re-description"),
    "all re-descriptions + congruence": Transformation(random_congruent_redescription, "congruent"),
}
