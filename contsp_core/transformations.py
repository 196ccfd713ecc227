"""Random transformations of crystals: other descriptions of the same solid, and congruent solids.

A *re-description* gives another periodic unit of the same solid (another basis, other lattice images, another atom
order, a supercell, the primitive cell). A *congruent* solid is translated, rotated or reflected. All functions are pure
and batched; random ones take a CPU generator. :data:`TRANSFORMATIONS` lists them with their kind.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from contsp_core.crystals import Crystals, ragged_arange
from contsp_core.lattice import niggli

Kind = Literal["re-description", "congruent"]


class Transformation(NamedTuple):
    """A random transformation ``function(crystals, generator) -> Crystals`` and what it keeps."""

    function: Callable[[Crystals, torch.Generator], Crystals]
    kind: Kind


# Congruent solids


def translate(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """Shift every crystal by its own vector, Gaussian with one cubic cell length per axis."""
    shift = _gaussian(crystals, (crystals.n_systems, 3), generator)
    shift = shift * crystals.volume.pow(1 / 3)[:, None]
    return crystals.replace(positions=crystals.positions + shift[crystals.system_idx])


def rotate(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """Turn every crystal by its own rotation about the origin, uniform on SO(3)."""
    return apply_orthogonal(crystals, random_rotations(crystals.n_systems, generator))


def reflect(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """Mirror every crystal in its own plane through the origin, of uniform orientation."""
    normal = torch.randn(crystals.n_systems, 3, generator=generator, dtype=torch.float64)
    normal = normal / normal.norm(dim=1, keepdim=True)
    mirror = torch.eye(3, dtype=torch.float64) - 2 * normal[:, :, None] * normal[:, None, :]
    return apply_orthogonal(crystals, mirror)


def apply_orthogonal(crystals: Crystals, matrices: Tensor) -> Crystals:
    """Multiply cells and positions (rows) by orthogonal matrices (n_systems, 3, 3) on the right."""
    matrices = matrices.to(crystals.cell)
    positions = torch.einsum("ni,nij->nj", crystals.positions, matrices[crystals.system_idx])
    return crystals.replace(cell=crystals.cell @ matrices, positions=positions)


def random_rotations(n: int, generator: torch.Generator) -> Tensor:
    """(n, 3, 3) float64 rotation matrices, uniform on SO(3): unit quaternions with Gaussian direction."""
    q = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    w, x, y, z = (q / q.norm(dim=1, keepdim=True)).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
        (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
        (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


# Re-descriptions


def permute(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """List the atoms of every crystal in random order."""
    keys = torch.rand(len(crystals.positions), generator=generator, dtype=torch.float64).to(crystals.cell.device)
    order = torch.argsort(crystals.system_idx.double() + keys * (1 - 1e-9))
    return Crystals(crystals.cell, crystals.positions[order], crystals.atomic_numbers[order], crystals.system_idx)


def shift_images(crystals: Crystals, generator: torch.Generator, largest: int = 2) -> Crystals:
    """Replace every atom by one of its lattice images, up to ``largest`` cells away along each vector."""
    images = torch.randint(-largest, largest + 1, (len(crystals.positions), 3), generator=generator)
    shift = torch.einsum("ni,nij->nj", images.to(crystals.cell), crystals.cell[crystals.system_idx])
    return crystals.replace(positions=crystals.positions + shift)


def change_basis(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """Describe every lattice by another basis: L′ = M L with M integer and det M = ±1; positions stay."""
    matrices = random_unimodular(crystals.n_systems, generator)
    return crystals.replace(cell=matrices.to(crystals.cell) @ crystals.cell)


def random_unimodular(n: int, generator: torch.Generator, n_shears: int = 4) -> Tensor:
    """(n, 3, 3) int64 matrices of determinant ±1: a signed permutation followed by shears of ±1."""
    order = torch.argsort(torch.rand(n, 3, generator=generator), dim=1)
    signs = 2 * torch.randint(0, 2, (n, 3, 1), generator=generator) - 1
    matrices = torch.eye(3, dtype=torch.int64)[order] * signs
    systems = torch.arange(n)
    for _ in range(n_shears):
        row = torch.randint(0, 3, (n,), generator=generator)
        other = (row + torch.randint(1, 3, (n,), generator=generator)) % 3
        sign = 2 * torch.randint(0, 2, (n, 1), generator=generator) - 1
        matrices = matrices.index_put((systems, row), matrices[systems, row] + sign * matrices[systems, other])
    return matrices


def supercell(crystals: Crystals, matrices: Tensor) -> Crystals:
    """The same solids described by the cells L′ = M L, each with det M times as many atoms.

    Args:
        crystals: the batch.
        matrices: (n_systems, 3, 3) or (3, 3) integers, det ≥ 1.

    Raises:
        ValueError: on a wrong shape, a non-integer matrix or a determinant below 1.
    """
    matrices = torch.as_tensor(matrices).cpu()
    if matrices.is_floating_point() or matrices.shape[-2:] != (3, 3) or matrices.dim() not in (2, 3):
        raise ValueError(
            f"matrices is {matrices.dtype} {tuple(matrices.shape)}, expected integers of shape (n_systems, 3, 3)"
        )
    matrices = matrices.long().expand(crystals.n_systems, 3, 3)
    n_cells = torch.linalg.det(matrices.double()).round().long()
    if (n_cells < 1).any():
        raise ValueError(f"matrices holds one of determinant {int(n_cells.min())}, expected ≥ 1")
    offsets, system_of_offset = _coset_representatives(matrices, n_cells)
    device = crystals.cell.device
    offsets, n_cells = offsets.to(crystals.cell), n_cells.to(device)
    shifts = torch.einsum("ni,nij->nj", offsets, crystals.cell[system_of_offset.to(device)])  # Å, one per cell
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


def random_supercell(crystals: Crystals, generator: torch.Generator, largest: int = 4) -> Crystals:
    """A random supercell of 1 … ``largest`` cells: a random Hermite normal form in a random basis."""
    return supercell(crystals, random_supercell_matrices(crystals.n_systems, generator, largest))


def random_supercell_matrices(n: int, generator: torch.Generator, largest: int = 4) -> Tensor:
    """(n, 3, 3) int64 matrices of determinant 1 … ``largest``."""
    n_cells = torch.randint(1, largest + 1, (n,), generator=generator)
    matrices = torch.eye(3, dtype=torch.int64).repeat(n, 1, 1)
    axis = torch.randint(0, 3, (n,), generator=generator)
    matrices[torch.arange(n), axis, axis] = n_cells
    offset = torch.randint(0, largest, (n, 3, 3), generator=generator) % n_cells[:, None, None]
    matrices = matrices + torch.triu(offset, diagonal=1)
    basis = random_unimodular(n, generator, n_shears=2)
    sign = torch.linalg.det(basis.double()).round().long()
    return basis @ matrices * sign[:, None, None]


def primitive(crystals: Crystals, tolerance: float | None = None) -> Crystals:
    """The smallest description of every solid; atoms kept are not moved, handedness is kept.

    Args:
        crystals: the batch.
        tolerance: Å, how far a translated atom may lie from the one it replaces; 1e-10 in float64 and 1e-4 in
            float32 by default: rounding only, because a looser one changes the solid.
    """
    if tolerance is None:
        tolerance = 1e-10 if crystals.cell.dtype == torch.float64 else 1e-4
    counts = crystals.n_atoms.tolist()
    parts = zip(crystals.cell, torch.split(crystals.positions, counts), torch.split(crystals.atomic_numbers, counts))
    reduced = [_primitive_one(*part, tolerance) for part in parts]
    cells, positions, numbers = (list(column) for column in zip(*reduced))
    n_atoms = torch.tensor([len(part) for part in numbers], device=crystals.cell.device)
    system_idx = torch.repeat_interleave(torch.arange(len(cells), device=crystals.cell.device), n_atoms)
    return Crystals(torch.stack(cells), torch.cat(positions), torch.cat(numbers), system_idx)


def _primitive_one(cell: Tensor, positions: Tensor, numbers: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    matrix = cell.detach().cpu().double().numpy()
    frac_coords = positions.detach().cpu().double().numpy() @ np.linalg.inv(matrix)
    found = lattice_translations(matrix, frac_coords, numbers.cpu().numpy(), tolerance)
    if len(found) == 0:
        return cell, positions, numbers
    translations, images = zip(*found)
    order = len(found) + 1  # of the group of translations modulo the lattice, so order · t is an integer vector
    multiples = np.rint(np.array(translations) * order).astype(int)
    basis = hermite_normal_form([*multiples.tolist(), *(order * np.eye(3, dtype=int)).tolist()])
    new_cell = torch.as_tensor(np.array(basis) / order @ matrix).to(cell)
    kept = torch.as_tensor(np.flatnonzero(np.arange(len(numbers)) <= np.min(images, axis=0)), device=cell.device)
    return new_cell, positions[kept], numbers[kept]


def lattice_translations(
    cell: np.ndarray, frac_coords: np.ndarray, numbers: np.ndarray, tolerance: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Translations, other than those of ``cell``, that map a crystal onto itself.

    Args:
        cell: (3, 3), Å.
        frac_coords: (n_atoms, 3).
        numbers: (n_atoms,) atomic numbers.
        tolerance: Å.

    Returns:
        pairs of a fractional translation (3,) and the atom (n_atoms,) onto which it carries each atom.
    """
    from scipy.spatial import cKDTree

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


def hermite_normal_form(rows: list[list[int]]) -> list[list[int]]:
    """The upper-triangular integer basis, with positive diagonal, of the full-rank lattice that ``rows`` span."""
    rows, basis = [list(row) for row in rows], []
    for column in range(3):
        while True:
            rows.sort(key=lambda row: (row[column] == 0, abs(row[column])))
            pivot = rows[0]
            if len(rows) == 1 or rows[1][column] == 0:
                break
            for row in rows[1:]:
                factor = row[column] // pivot[column]
                row[:] = [a - factor * b for a, b in zip(row, pivot)]
        sign = 1 if pivot[column] > 0 else -1
        basis.append([sign * entry for entry in rows.pop(0)])
    return basis


# Registry


def _niggli_of_random_basis(crystals: Crystals, generator: torch.Generator) -> Crystals:
    return niggli(change_basis(crystals, generator))


def _primitive_of_random_supercell(crystals: Crystals, generator: torch.Generator) -> Crystals:
    return primitive(random_supercell(crystals, generator))


def random_redescription(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """Compose the re-descriptions in random order, each with probability ½ (a supercell of at most 4 cells)."""
    names = [name for name, entry in TRANSFORMATIONS.items() if entry.kind == "re-description" and "+" not in name]
    chosen = torch.rand(len(names), generator=generator) < 0.5
    for index in torch.randperm(len(names), generator=generator).tolist():
        if chosen[index]:
            crystals = TRANSFORMATIONS[names[index]].function(crystals, generator)
    return crystals


def random_congruent_redescription(crystals: Crystals, generator: torch.Generator) -> Crystals:
    """A random re-description of a translated, rotated and (with probability ½) reflected solid."""
    crystals = translate(rotate(random_redescription(crystals, generator), generator), generator)
    return reflect(crystals, generator) if torch.rand((), generator=generator) < 0.5 else crystals


TRANSFORMATIONS: dict[str, Transformation] = {
    "translation": Transformation(translate, "congruent"),
    "rotation": Transformation(rotate, "congruent"),
    "reflection": Transformation(reflect, "congruent"),
    "permutation": Transformation(permute, "re-description"),
    "lattice images": Transformation(shift_images, "re-description"),
    "basis change": Transformation(change_basis, "re-description"),
    "supercell": Transformation(random_supercell, "re-description"),
    "primitive cell": Transformation(_primitive_of_random_supercell, "re-description"),
    "Niggli cell": Transformation(_niggli_of_random_basis, "re-description"),
    "all re-descriptions + congruence": Transformation(random_congruent_redescription, "congruent"),
}


def _gaussian(crystals: Crystals, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(crystals.cell)
