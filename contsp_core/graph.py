"""Which atoms are neighbours: every pair of atoms of a crystal, images included, within a cutoff radius."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from contsp_core.crystals import Crystals, ragged_arange

CANDIDATES_PER_CHUNK = 4_000_000  # bounds the memory of the search: about 100 bytes per candidate pair
MAX_CANDIDATES = 50_000_000  # of one crystal: as many as 10 000 atoms have in a wide cell


class Graph(NamedTuple):
    """Edges (i, j, k) with |x_j + k L − x_i| ≤ R, the self term (i = j, k = 0) excluded by index.

    An undirected graph holds each pair of opposite edges (i, j, k), (j, i, −k) once; edges are grouped by system.
    """

    source: Tensor  # (n_edges,) int64, atom i
    target: Tensor  # (n_edges,) int64, atom j
    image: Tensor  # (n_edges, 3) int32, lattice translation k added to x_j

    def directed(self) -> Graph:
        """Both directions of every edge."""
        ends = (self.source, self.target), (self.target, self.source), (self.image, -self.image)
        return Graph(*map(torch.cat, ends))


def cutoff_radius(crystals: Crystals, multiple: float = 3.0) -> Tensor:
    """(n_systems,) R = multiple · (|det L| / N)^{1/3}, Å: intensive, hence the same for every description."""
    return multiple * (crystals.volume / crystals.n_atoms) ** (1 / 3)


def edge_vectors(crystals: Crystals, graph: Graph) -> Tensor:
    """(n_edges, 3) x_j + k L − x_i, Å, differentiable in the cell and the positions."""
    cell = crystals.to_atoms(crystals.cell).index_select(0, graph.source)
    translation = torch.bmm(graph.image.to(cell.dtype).unsqueeze(1), cell).squeeze(1)
    positions = crystals.positions
    return positions.index_select(0, graph.target) - positions.index_select(0, graph.source) + translation


@torch.no_grad()
def search_range(crystals: Crystals, cutoff: Tensor) -> tuple[Tensor, Tensor]:
    """Fractional coordinates, and (n_systems, 3) int64 how many lattice steps either way cover a sphere of radius R.

    The range along each lattice vector follows from the distance between opposite faces, so that no neighbour is missed
    in a skewed cell; but the more skewed or flat a cell, the more images there are to try. More than ``MAX_CANDIDATES``
    pairs of atoms and images of one crystal are a ValueError.
    """
    inverse = torch.linalg.inv(crystals.cell)
    reach = (cutoff[:, None] * inverse.norm(dim=1) + 0.5).floor()  # 1 / |column of L⁻¹| = distance of two faces
    candidates = crystals.n_atoms * (crystals.n_atoms + 1) / 2 * (2 * reach.double() + 1).prod(dim=1)
    if (candidates > MAX_CANDIDATES).any():
        worst = int(candidates.nan_to_num(0).argmax())
        raise ValueError(
            f"crystal {worst} has {float(candidates[worst]):.1e} candidate pairs for R = {float(cutoff[worst]):.3g} Å, "
            f"expected ≤ {MAX_CANDIDATES:.0e}: its cell is too flat or skewed, or it has too many atoms"
        )
    return crystals.multiply_rows(crystals.positions, inverse), reach.nan_to_num(0).long()


@torch.no_grad()
def build_graph(crystals: Crystals, cutoff: Tensor) -> Graph:
    """The undirected graph of a batch, for any cells and any placement of the atoms; ``cutoff`` (n_systems,) is R, Å.

    All candidates of :func:`search_range` are tested, in chunks of bounded memory.
    """
    frac, reach = search_range(crystals, cutoff)
    # one entry per atom pair i ≤ j; the number of candidate images differs from system to system
    atom = torch.arange(len(frac), device=frac.device)
    n_partners = crystals.to_atoms(torch.cumsum(crystals.n_atoms, 0)) - atom
    source, target = torch.repeat_interleave(atom, n_partners), ragged_arange(atom, n_partners)
    ends = torch.cumsum(crystals.to_atoms((2 * reach + 1).prod(dim=1)).index_select(0, source), 0)
    parts = []
    for first in range(0, int(ends[-1]), CANDIDATES_PER_CHUNK):
        candidate = torch.arange(first, min(first + CANDIDATES_PER_CHUNK, int(ends[-1])), device=frac.device)
        pair = torch.searchsorted(ends, candidate, right=True)
        number = ends[pair] - 1 - candidate
        parts.append(_search(crystals, frac, reach, cutoff, source[pair], target[pair], number))
    return Graph(*(torch.cat(column) for column in zip(*parts)))


def _search(
    crystals: Crystals, frac: Tensor, reach: Tensor, cutoff: Tensor, source: Tensor, target: Tensor, number: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of candidates, image ``number`` of each atom pair, those within the cutoff."""
    system = crystals.system_idx[source]
    _, b, c = (2 * reach[system] + 1).unbind(dim=1)
    steps = torch.stack([number // (b * c), number // c % b, number % c], dim=1)
    # counted from the nearest image in fractional coordinates, so that unwrapped atoms need no larger range
    offset = frac[target] - frac[source]
    image = (steps - reach[system] - offset.round().long()).int()
    vector = ((offset + image)[:, :, None] * crystals.cell[system]).sum(dim=1)  # on a GPU, faster than a product
    first_nonzero = torch.where(image[:, 0] != 0, image[:, 0], torch.where(image[:, 1] != 0, image[:, 1], image[:, 2]))
    far = vector.norm(dim=1) > cutoff[system]  # NaN is kept, and makes the energy NaN
    keep = ~far & ((source != target) | (first_nonzero > 0))
    return source[keep], target[keep], image[keep]


@torch.no_grad()
def nearest_neighbors(crystals: Crystals, n_neighbors: int) -> Graph:
    """Directed edges from every atom to its ``n_neighbors`` nearest atoms or images."""
    radius = (n_neighbors * crystals.volume / crystals.n_atoms) ** (1 / 3)
    while True:  # the radius, common to the atoms of one crystal, grows until every atom has found enough
        graph = build_graph(crystals, radius).directed()
        found = torch.bincount(graph.source, minlength=len(crystals.positions))
        poor = crystals.sum_atoms((found < n_neighbors).int()) > 0
        if not poor.any():
            break
        radius = torch.where(poor, 1.25 * radius, radius)
    distance = edge_vectors(crystals, graph).norm(dim=1)
    order = torch.argsort(distance)
    order = order[torch.argsort(graph.source[order], stable=True)]  # by atom, then by distance
    kept = order[ragged_arange(torch.cumsum(found, 0) - found, torch.full_like(found, n_neighbors))]
    return Graph(graph.source[kept], graph.target[kept], graph.image[kept])
