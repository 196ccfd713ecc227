"""The periodic multigraph of a batch: every pair of atoms, images included, within a cutoff radius."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from contsp_core.crystals import Crystals, ragged_arange

CANDIDATES_PER_CHUNK = 4_000_000  # bounds the memory of the search: about 100 bytes per candidate pair


@dataclass(frozen=True)
class Graph:
    """Edges (i, j, k) with |x_j + k L − x_i| ≤ R, the self term (i = j, k = 0) excluded by index.

    An undirected graph holds each pair of opposite edges (i, j, k), (j, i, −k) once; edges are grouped by system.

    Attributes:
        source: (n_edges,) int64, atom i.
        target: (n_edges,) int64, atom j.
        image: (n_edges, 3) int32, lattice translation k added to x_j.
    """

    source: Tensor
    target: Tensor
    image: Tensor

    def directed(self) -> Graph:
        """Both directions of every edge."""
        return Graph(
            torch.cat([self.source, self.target]),
            torch.cat([self.target, self.source]),
            torch.cat([self.image, -self.image]),
        )


def cutoff_radius(crystals: Crystals, multiple: float = 3.0) -> Tensor:
    """(n_systems,) R = multiple · (|det L| / N)^{1/3}, Å: intensive, hence the same for every description."""
    return multiple * (crystals.volume / crystals.n_atoms) ** (1 / 3)


def edge_vectors(crystals: Crystals, graph: Graph) -> Tensor:
    """(n_edges, 3) x_j + k L − x_i, Å, differentiable in the cell and the positions."""
    cell = crystals.cell.index_select(0, crystals.system_idx.index_select(0, graph.source))
    translation = torch.bmm(graph.image.to(cell.dtype).unsqueeze(1), cell).squeeze(1)
    positions = crystals.positions
    return positions.index_select(0, graph.target) - positions.index_select(0, graph.source) + translation


@torch.no_grad()
def build_graph(crystals: Crystals, cutoff: Tensor) -> Graph:
    """The undirected graph of a batch, for any cells and any placement of the atoms.

    The search range along each lattice vector follows from the distance between opposite faces, so that no neighbour
    is missed in a skewed cell. All candidates are tested at once, in chunks of bounded memory.

    Args:
        crystals: the batch.
        cutoff: (n_systems,) radius R, Å.

    Returns:
        Each edge once (see :class:`Graph`); ``graph.directed()`` gives both directions.
    """
    frac = crystals.frac_coords
    inverse = torch.linalg.inv(crystals.cell)
    reach = (cutoff[:, None] * inverse.norm(dim=1) + 0.5).floor().long()  # 1 / |column of L⁻¹| = distance of two faces
    counts = crystals.n_atoms
    first_atom = torch.cumsum(counts, 0) - counts
    # one entry per atom pair i ≤ j; the number of candidate images differs from system to system
    source = torch.repeat_interleave(
        torch.arange(len(frac), device=frac.device), (first_atom + counts)[crystals.system_idx] - _arange_like(frac)
    )
    target = ragged_arange(_arange_like(frac), (first_atom + counts)[crystals.system_idx] - _arange_like(frac))
    system = crystals.system_idx[source]
    n_images = (2 * reach + 1).prod(dim=1)[system]
    parts = []
    for chunk in _chunks(n_images):
        parts.append(_search(crystals, frac, reach, cutoff, source[chunk], target[chunk], n_images[chunk]))
    return Graph(*(torch.cat(column) for column in zip(*parts)))


def _arange_like(tensor: Tensor) -> Tensor:
    return torch.arange(len(tensor), device=tensor.device)


def _chunks(sizes: Tensor) -> list[slice]:
    """Cut consecutive entries into slices whose sizes sum to about ``CANDIDATES_PER_CHUNK``."""
    group = torch.cumsum(sizes, 0) // CANDIDATES_PER_CHUNK
    lengths = torch.unique_consecutive(group, return_counts=True)[1].tolist()
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, lengths)]


def _search(
    crystals: Crystals, frac: Tensor, reach: Tensor, cutoff: Tensor, source: Tensor, target: Tensor, n_images: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Test every image of the given atom pairs against the cutoff."""
    pair = torch.repeat_interleave(_arange_like(source), n_images)
    number = ragged_arange(torch.zeros_like(n_images), n_images)
    source, target = source[pair], target[pair]
    system = crystals.system_idx[source]
    span = 2 * reach[system] + 1
    steps = torch.stack(
        [number // (span[:, 1] * span[:, 2]), number // span[:, 2] % span[:, 1], number % span[:, 2]], 1
    )
    # counted from the nearest image in fractional coordinates, so that unwrapped atoms need no larger range
    offset = frac[target] - frac[source]
    image = (steps - reach[system] - offset.round().long()).int()
    vector = torch.einsum("ei,eij->ej", offset + image, crystals.cell[system])
    first_nonzero = torch.where(image[:, 0] != 0, image[:, 0], torch.where(image[:, 1] != 0, image[:, 1], image[:, 2]))
    keep = (vector.norm(dim=1) <= cutoff[system]) & ((source != target) | (first_nonzero > 0))
    return source[keep], target[keep], image[keep]
