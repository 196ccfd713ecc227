"""Which cell describes a lattice: Niggli cells of a batch; and crystals wrapped, deformed and strained.

Rows of a cell are its lattice vectors (see :mod:`contsp_core.crystals`); lengths are in Å. Below, the metric of a basis
(a, b, c) is written A = a·a, B = b·b, C = c·c, D = b·c, E = a·c, F = a·b.

The Niggli form is found without case-by-case iteration. Two facts make that possible:

1. A basis of shortest vectors (a Buerger basis) consists of Voronoi-relevant vectors, and these are, up to sign, among
   the seven sums of an obtuse superbase. So only 168 ordered bases can be the answer.
2. Each condition of Niggli, where it fails, names a basis that is better in the lexicographic order
   (min A, min B, min C, all angles acute, max |F|, max |E|, max |D|). The best basis therefore meets all of them.

Ties are decided with a tolerance, which is what makes the form stable for symmetric lattices.

Sources: Niggli conditions, International Tables for Crystallography A, 9.2; obtuse superbase, Selling (1874) and Conway
& Sloane, Proc. R. Soc. A 436 (1992) 55; size reduction, Lenstra, Lenstra & Lovász, Math. Ann. 261 (1982) 515.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations, permutations

import numpy as np
import torch
from torch import Tensor

from contsp_core.crystals import Crystals

TOLERANCE = 1e-5  # relative to (shortest lattice vector)²: metric entries closer than that count as equal
MAX_ITERATIONS = 200  # of each preparatory reduction; they take as many as the logarithm of the skewness
MAX_SKEWNESS = 10.0  # |a||b||c| / volume, at most √2 for a Niggli cell: above this a cell is searched in another basis
MIN_LENGTH = 1e-13  # relative to the largest cell entry: a shorter vector is rounding error, so the cell is flat
MAX_ERROR = 1e-6  # relative to the shortest vector: largest difference accepted between two ways to compute the result
MIN_FILLING = 0.5  # volume / (|a||b||c|) is at least 1/√2 for a Niggli cell; less means the cell is flat
SELLING_ZERO = 1e-14  # relative: below this a scalar product counts as obtuse


def niggli_reduce(cell: Tensor) -> tuple[Tensor, Tensor]:
    """Niggli-reduced cells of a batch, of the same handedness, and the basis changes that lead to them.

    The metric of the result depends on the lattice only (but for the tolerances), not on the basis given. A cell that
    is reduced already, not finite, or flat (linearly dependent to within rounding) is returned unchanged.

    Cells are (n, 3, 3), Å, float32 or float64, on any device. Returned are reduced cells (n, 3, 3), differentiable, and
    transforms (n, 3, 3) int64 of determinant +1: reduced = transforms @ cell.
    """
    if cell.ndim != 3 or cell.shape[1:] != (3, 3):
        raise ValueError(f"cell has shape {tuple(cell.shape)}, expected (n, 3, 3)")
    if cell.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"cell is {cell.dtype}, expected float32 or float64")
    exact = cell.double()
    transform = torch.eye(3, dtype=torch.int64, device=cell.device).repeat(len(cell), 1, 1)
    usable = exact.isfinite().all(-1).all(-1) & exact.any(-1).any(-1)
    chosen = (usable & ~_is_strictly_reduced(exact.detach())).nonzero()[:, 0]
    if not len(chosen):
        return cell, transform
    change = _niggli_transform(exact.detach()[chosen])
    transform[chosen] = change.round().long()
    return cell.index_copy(0, chosen, (change @ exact[chosen]).to(cell.dtype)), transform


def wrap_positions(crystals: Crystals) -> Crystals:
    """The same solid with every atom moved into the cell by lattice vectors.

    Fractional coordinates end in [0, 1) to within rounding: an atom less than a rounding error below a face stays at
    that face. Atoms inside keep their positions to the last bit, and so do those of a non-finite or flat cell.
    """
    inverse = torch.linalg.inv_ex(crystals.cell.detach()).inverse  # of a flat cell: infinite or NaN, not an error
    frac = crystals.multiply_rows(crystals.positions.detach(), inverse)
    shift = torch.floor(frac + 8 * torch.finfo(frac.dtype).eps).nan_to_num(0.0, 0.0, 0.0)
    moved = crystals.positions - crystals.multiply_rows(shift, crystals.cell)
    return crystals.replace(positions=torch.where((shift != 0).any(-1, keepdim=True), moved, crystals.positions))


def niggli(crystals: Crystals) -> Crystals:
    """The same solid described by its Niggli cell, atoms wrapped into it. See :func:`niggli_reduce`."""
    return wrap_positions(crystals.replace(cell=niggli_reduce(crystals.cell)[0]))


def without_skew(crystals: Crystals) -> Crystals:
    """The same solid, with the Niggli cell in place of any cell so skewed that images would be sought far away.

    Differentiable; atoms are not wrapped. Images are then few, and distances exact, however the crystal is described.
    """
    cell = crystals.cell.detach().double()
    skewed = torch.linalg.vector_norm(cell, dim=-1).prod(-1) > MAX_SKEWNESS * torch.linalg.det(cell).abs()
    if not skewed.any():
        return crystals
    return crystals.replace(cell=torch.where(skewed[:, None, None], niggli_reduce(crystals.cell)[0], crystals.cell))


def apply_strain(crystals: Crystals, strain: Tensor, shift: Tensor | float = 0.0) -> Crystals:
    """L' = L exp(ε), every atom carried along at fixed fractional coordinates, and then moved by its ``shift`` (Å).

    The move acts on space, so it does not depend on how the solid is described. The strain −ε undoes it. ``strain`` is
    (n_systems, 3, 3), symmetric, dimensionless, of the dtype of the cell; differentiable, also at 0.
    """
    if strain.shape != crystals.cell.shape:
        raise ValueError(f"strain has shape {tuple(strain.shape)}, expected {tuple(crystals.cell.shape)}")
    strained = deform(crystals, torch.linalg.matrix_exp(strain))
    return strained.replace(positions=strained.positions + shift)


def deform(crystals: Crystals, matrices: Tensor) -> Crystals:
    """Space deformed: cells and positions (rows) times ``matrices`` (n_systems, 3, 3) on the right."""
    positions = crystals.multiply_rows(crystals.positions, matrices)
    return crystals.replace(cell=crystals.cell @ matrices, positions=positions)


def _metric(vectors: Tensor) -> Tensor:
    """(6, n): A, B, C, D, E, F of bases (n, 3, 3)."""
    return (vectors @ vectors.mT).flatten(1).T[[0, 4, 8, 5, 2, 1]]


def _is_strictly_reduced(cell: Tensor) -> Tensor:
    """Whether all Niggli inequalities hold by more than the tolerance, so that no other basis comes close: quick."""
    (a2, b2, c2), scalar = _metric(cell).split(3)
    margin, size = TOLERANCE * a2, 2 * scalar.abs()
    acute = (scalar > margin).all(0)
    obtuse = (scalar < -margin).all(0) & (size.sum(0) + margin < a2 + b2)
    ordered = (a2 + margin < b2) & (b2 + margin < c2)
    short = (size[0] + margin < b2) & (size[1:].amax(0) + margin < a2)
    return ordered & short & (acute | obtuse)


def _niggli_transform(cell: Tensor) -> Tensor:
    """(n, 3, 3) float64 integers of determinant +1; the identity where the cell is reduced or flat."""
    tables = _tables(cell.device)
    identity = torch.eye(3, dtype=cell.dtype, device=cell.device).expand_as(cell)
    peak = cell.abs().amax((1, 2), keepdim=True)
    scaled = cell / (peak / (2 * torch.frexp(peak).mantissa))  # by a power of two, so without rounding
    given = torch.cat([scaled, identity], -1)
    vectors = tables["sums"] @ _obtuse_superbase(_size_reduce(given))  # (n, 7, 6)
    gram = (vectors[..., :3] @ vectors[..., :3].mT).flatten(1)
    metrics = torch.cat([_metric(scaled).T.unsqueeze(-1), gram[:, tables["entries"]]], -1)  # (n, 6, 169)
    choice, margin = _best_basis(metrics)
    best = torch.where(choice[:, None, None] == 0, given, tables["bases"][choice] @ vectors)
    best = _sign_change(metrics[torch.arange(len(cell)), :, choice], margin) * best
    return torch.where(_is_resolved(best, scaled), best[..., 3:], identity)


def _is_resolved(basis: Tensor, cell: Tensor) -> Tensor:
    """(n, 1, 1): whether rounding is small in basis (n, 3, 6), judged by computing its vectors anew from the cell."""
    reduced = basis[..., 3:] @ cell
    lengths = torch.linalg.vector_norm(reduced, dim=-1)
    error = (reduced - basis[..., :3]).abs().amax((1, 2))
    volume = (reduced[:, 0] * torch.linalg.cross(reduced[:, 1], reduced[:, 2])).sum(-1).abs()
    exact_integers = basis[..., 3:].abs().amax((1, 2)) < 2**52
    small = (error < MAX_ERROR * lengths.amin(-1)) & (volume > MIN_FILLING * lengths.prod(-1))
    return (exact_integers & small).view(-1, 1, 1)


def _size_reduce(basis: Tensor) -> Tensor:
    """Shorten b by a, and c by a and b, while that helps; basis (n, 3, 6): vectors beside their integer coordinates."""
    for _ in range(MAX_ITERATIONS):
        norms, order = basis[..., :3].square().sum(-1).sort(-1)
        first, second, third = order.unbind(-1)
        parity = (second - first) * (third - first) * (third - second) // 2
        basis = basis.gather(1, order.unsqueeze(-1).expand(-1, -1, 6)) * parity.view(-1, 1, 1)
        a, b, c = basis.unbind(1)
        b = b - _projection(b, a).round() * a
        c = c - _projection(c, b - _projection(b, a) * a).round() * b
        c = c - _projection(c, a).round() * a
        new = torch.stack([a, b, c], 1)
        shorter = new[..., :3].square().sum(-1) < (1 - 1e-9) * norms  # by more than rounding, so that the loop ends
        shorter &= norms[:, :1] > MIN_LENGTH**2
        if not shorter.any():
            break
        basis = torch.where(shorter.unsqueeze(-1), new, basis)
    return basis


def _projection(row: Tensor, onto: Tensor) -> Tensor:
    row, onto = row[:, :3], onto[:, :3]
    return (row * onto).sum(-1, keepdim=True) / onto.square().sum(-1, keepdim=True).clamp(min=MIN_LENGTH**2)


def _obtuse_superbase(basis: Tensor) -> Tensor:
    """(n, 4, 6): four vectors of sum zero with no acute angle, by Selling's steps on the most acute pair."""
    tables = _tables(basis.device)
    superbase = torch.cat([basis, -basis.sum(1, keepdim=True)], 1)
    for _ in range(MAX_ITERATIONS):
        gram = superbase[..., :3] @ superbase[..., :3].mT
        value, pair = gram.flatten(1)[:, tables["pairs"]].max(-1)
        acute = value > SELLING_ZERO * gram.diagonal(dim1=1, dim2=2).amax(-1)
        if not acute.any():
            break
        superbase = tables["selling"][torch.where(acute, pair, 6)] @ superbase
    return superbase


def _best_basis(metrics: Tensor) -> tuple[Tensor, Tensor]:
    """First of the candidates (n, 6, m) that is best in the module's lexicographic order; and the margin (n, 1)."""
    margin = TOLERANCE * metrics[:, 0].amin(-1, keepdim=True)
    size = metrics[:, 3:].abs()
    acute = (size.amin(1) > margin) & (metrics[:, 3:].sign().prod(1) > 0)
    keys = (metrics[:, 0], metrics[:, 1], metrics[:, 2], -acute.to(metrics), -size[:, 2], -size[:, 1], -size[:, 0])
    alive = torch.ones_like(acute)
    for key in keys:
        value = key.masked_fill(~alive, torch.inf)
        alive &= value <= value.amin(-1, keepdim=True) + margin
    return alive.byte().argmax(-1), margin


def _sign_change(metric: Tensor, margin: Tensor) -> Tensor:
    """(n, 3, 1) signs, of product +1, that make D, E, F (of metric (n, 6)) all exceed the margin, or none of them."""
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).to(metric)
    scalar = metric[:, None, 3:] * signs  # D = b·c takes the signs of b and c, which are together that of a
    exceeds = scalar > margin.unsqueeze(-1)
    fits = exceeds.all(-1) | ~exceeds.any(-1)
    return signs[fits.byte().argmax(-1)].unsqueeze(-1)


@lru_cache
def _tables(device: torch.device) -> dict[str, Tensor]:
    """Constant matrices of the reduction, all basis changes among them of determinant +1.

    sums (7, 4): the seven sums of a superbase; bases (169, 3, 7): ordered bases made of them, after one unused entry;
    entries (6, 168): where their metric stands in the 7 × 7 Gram matrix; pairs (6,): pairs of a superbase in its 4 × 4
    Gram matrix; selling (7, 4, 4): the step for each pair, then the identity.
    """
    pairs = list(combinations(range(4), 2))
    sums = np.vstack([np.eye(4), [np.isin(range(4), pair) for pair in pairs[:2] + pairs[3:4]]])
    in_basis = sums @ np.vstack([np.eye(3), -np.ones(3)])  # the fourth vector is minus the sum of the others
    triples = [t for t in permutations(range(7), 3) if round(abs(np.linalg.det(in_basis[list(t)]))) == 1]
    bases = np.array([np.eye(7)[list(t)] * round(np.linalg.det(in_basis[list(t)])) for t in triples])
    i, j, k = np.array(triples).T
    entries = np.array([8 * i, 8 * j, 8 * k, 7 * j + k, 7 * i + k, 7 * i + j])
    selling = []
    for first, second in pairs:
        step = -np.eye(4)  # minus Selling's step, which turns the hand
        step[:, first] = -1.0
        step[[first, second], first] = 1.0, 0.0
        selling.append(step)
    tables = {"sums": sums, "bases": np.concatenate([np.zeros((1, 3, 7)), bases]), "selling": [*selling, np.eye(4)]}
    indices = {"entries": entries, "pairs": [4 * first + second for first, second in pairs]}
    return {name: torch.tensor(np.array(table), device=device) for name, table in (tables | indices).items()}
