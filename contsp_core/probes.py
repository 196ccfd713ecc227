"""Paths through the places where graph-based energies tend to be discontinuous.

A probe sets a crystal up so that an event happens exactly at displacement 0 (a pair of atoms reaches the cutoff, two
atoms coincide, two neighbours are equally far) and lets it be passed from both sides, in steps as short as one likes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from contsp_core.cgcnn import nearest_neighbors
from contsp_core.crystals import Crystals
from contsp_core.transformations import supercell

Cutoff = Callable[[Crystals], Tensor]
THIN = 6  # the thin cell repeats this many times within the cutoff
MIN_ATOMS = 4  # a smaller crystal is repeated, so that single atoms can move
IMAGE_RANGE = 3
RATTLE = 0.03  # of the interatomic spacing: breaks ties among neighbours


@dataclass(frozen=True)
class Path:
    """A curve of crystals, one per crystal of a batch.

    Attributes:
        move: from displacements (n_systems,) in Å, 0 at the event, to crystals.
        possible: (n_systems,) bool, whether the event could be set up.
        search: whether the place of the event is unknown and has to be searched along the path.
    """

    move: Callable[[Tensor], Crystals]
    possible: Tensor
    search: bool = False

    def at(self, displacement: float | Tensor) -> Crystals:
        """The crystals at one displacement, or at one each, Å."""
        return self.move(torch.as_tensor(displacement, dtype=torch.float64).expand(len(self.possible)))


def cross_cutoff(crystals: Crystals, cutoff: Cutoff, n_neighbors: int, generator: torch.Generator) -> Path:
    """An atom passes the cutoff of another: their distance is R + δ."""
    crystals = enlarge(crystals, MIN_ATOMS)
    atom, direction, missing = _pair_near(crystals, cutoff(crystals), generator)
    return _all_possible(crystals, lambda s: _move_atom(crystals, atom, direction, missing + s))


def overlap(crystals: Crystals, cutoff: Cutoff, n_neighbors: int, generator: torch.Generator) -> Path:
    """Two atoms pass through each other: their distance is |δ|."""
    crystals = enlarge(crystals, MIN_ATOMS)
    atom, direction, missing = _pair_near(crystals, torch.zeros_like(crystals.volume), generator)
    return _all_possible(crystals, lambda s: _move_atom(crystals, atom, direction, missing + s))


def strain(crystals: Crystals, cutoff: Cutoff, n_neighbors: int, generator: torch.Generator) -> Path:
    """A random homogeneous strain moves the farthest lattice vector by δ, from a pair of atoms at the cutoff."""
    start = cross_cutoff(crystals, cutoff, n_neighbors, generator).at(0.0)
    direction = torch.randn(start.n_systems, 3, 3, generator=generator, dtype=torch.float64)
    direction = direction + direction.mT
    direction = direction / (start.cell @ direction).norm(dim=2).amax(dim=1)[:, None, None]
    identity = torch.eye(3, dtype=torch.float64)
    return _all_possible(start, lambda s: deform(start, identity + s[:, None, None] * direction))


def thin_cell(crystals: Crystals, cutoff: Cutoff, n_neighbors: int, generator: torch.Generator) -> Path:
    """A cell squeezed to a plate of height (R + δ)/6 at constant volume: atoms see their own sixth image pass R."""
    length, axis = crystals.cell.norm(dim=2).min(dim=1)
    normal = crystals.cell[torch.arange(crystals.n_systems), axis] / length[:, None]
    along = normal[:, :, None] * normal[:, None, :]
    across = torch.eye(3, dtype=along.dtype) - along
    radius = cutoff(crystals)

    def move(s: Tensor) -> Crystals:
        stretch = ((radius + s) / (THIN * length))[:, None, None]
        return deform(crystals, stretch * along + stretch.rsqrt() * across)

    return _all_possible(crystals, move)


def swap_neighbors(crystals: Crystals, cutoff: Cutoff, n_neighbors: int, generator: torch.Generator) -> Path:
    """Neighbours number n and n + 1 of an atom change places: their distances differ by δ.

    Impossible where, for every atom, the two are images of one atom or the farther is an image of the atom itself.
    """
    crystals = enlarge(crystals, MIN_ATOMS)
    noise = torch.randn(len(crystals.positions), 3, generator=generator, dtype=torch.float64)
    spacing = crystals.density.pow(-1 / 3)[crystals.system_idx][:, None]
    crystals = crystals.replace(positions=crystals.positions + RATTLE * spacing * noise)
    graph = nearest_neighbors(crystals, n_neighbors + 1)
    near = torch.arange(len(crystals.positions)) * (n_neighbors + 1) + n_neighbors - 1
    far = near + 1
    vector = _edge_vectors(crystals, graph.source, graph.target, graph.image)
    distance = vector.norm(dim=1)
    free = (graph.target[far] != graph.source[far]) & (graph.target[far] != graph.target[near])
    gap = torch.where(free, distance[far] - distance[near], torch.inf)
    chosen = _best_per_system(gap, crystals.system_idx, crystals.n_systems)
    direction = vector[far[chosen]] / distance[far[chosen], None]
    possible = free[chosen]
    closer = torch.where(possible, -gap[chosen], 0.0)
    return Path(lambda s: _move_atom(crystals, graph.target[far[chosen]], direction, closer + s), possible)


def wander(crystals: Crystals, cutoff: Cutoff, n_neighbors: int, generator: torch.Generator) -> Path:
    """A random atom moves in a random direction; jumps are searched along the way, wherever they are."""
    crystals = enlarge(crystals, MIN_ATOMS)
    atom = _random_atoms(crystals, generator)
    direction = torch.randn(crystals.n_systems, 3, generator=generator, dtype=torch.float64)
    direction = direction / direction.norm(dim=1, keepdim=True)
    path = _all_possible(crystals, lambda s: _move_atom(crystals, atom, direction, s))
    return Path(path.move, path.possible, search=True)


PROBES: dict[str, Callable[[Crystals, Cutoff, int, torch.Generator], Path]] = {
    "atom crosses the cutoff": cross_cutoff,
    "two atoms overlap": overlap,
    "strain": strain,
    "thin cell": thin_cell,
    "neighbours swap order": swap_neighbors,
    "search along a path": wander,
}


def deform(crystals: Crystals, gradient: Tensor) -> Crystals:
    """Multiply cells and positions (rows) by deformation gradients (n_systems, 3, 3) on the right."""
    positions = torch.einsum("ni,nij->nj", crystals.positions, gradient[crystals.system_idx])
    return crystals.replace(cell=crystals.cell @ gradient, positions=positions)


def enlarge(crystals: Crystals, min_atoms: int) -> Crystals:
    """Repeat each crystal along its shortest lattice vector until it has ``min_atoms`` atoms."""
    repeats = -(-min_atoms // crystals.n_atoms)
    matrices = torch.eye(3, dtype=torch.int64).repeat(crystals.n_systems, 1, 1)
    shortest = crystals.cell.norm(dim=2).argmin(dim=1)
    matrices[torch.arange(crystals.n_systems), shortest, shortest] = repeats.clamp(min=1)
    return supercell(crystals, matrices)


def _all_possible(crystals: Crystals, move: Callable[[Tensor], Crystals]) -> Path:
    return Path(move, torch.ones(crystals.n_systems, dtype=torch.bool))


def _move_atom(crystals: Crystals, atom: Tensor, direction: Tensor, distance: Tensor) -> Crystals:
    """Move one atom per crystal by a signed distance (n_systems,) along a unit vector (n_systems, 3)."""
    return crystals.replace(positions=crystals.positions.index_add(0, atom, distance[:, None] * direction))


def _pair_near(crystals: Crystals, distance: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A pair of atoms whose distance is close to a given one (n_systems,), Å.

    Returns:
        the second atom (n_systems,), the unit vector from the first to it (n_systems, 3), and how far along this vector
        the second atom has to go (n_systems,), Å.
    """
    first = _random_atoms(crystals, generator)
    second = torch.arange(len(crystals.positions))
    axis = torch.arange(-IMAGE_RANGE, IMAGE_RANGE + 1)
    images = torch.cartesian_prod(axis, axis, axis).double()
    offset = crystals.frac_coords - crystals.frac_coords[first][crystals.system_idx]
    offset = (offset - offset.round())[:, None, :] + images
    vectors = torch.einsum("nki,nij->nkj", offset, crystals.cell[crystals.system_idx])
    lengths = vectors.norm(dim=2)
    wrong = (lengths - distance[crystals.system_idx][:, None]).abs()
    wrong = torch.where(lengths > 1e-3, wrong, torch.inf)  # coincident atoms have no direction
    wrong[first] = torch.inf
    error, image = wrong.min(dim=1)
    chosen = _best_per_system(error, crystals.system_idx, crystals.n_systems)
    vector, length = vectors[chosen, image[chosen]], lengths[chosen, image[chosen]]
    return second[chosen], vector / length[:, None], distance - length


def _edge_vectors(crystals: Crystals, source: Tensor, target: Tensor, image: Tensor) -> Tensor:
    shift = torch.einsum("ni,nij->nj", image.to(crystals.cell), crystals.cell[crystals.system_idx[source]])
    return crystals.positions[target] + shift - crystals.positions[source]


def _random_atoms(crystals: Crystals, generator: torch.Generator) -> Tensor:
    counts = crystals.n_atoms
    draw = torch.rand(crystals.n_systems, generator=generator, dtype=torch.float64)
    return torch.cumsum(counts, 0) - counts + (draw * counts).long()


def _best_per_system(score: Tensor, system_idx: Tensor, n_systems: int) -> Tensor:
    """(n_systems,) index of the lowest score within each system."""
    order = torch.argsort(score)
    order = order[torch.argsort(system_idx[order], stable=True)]
    counts = torch.bincount(system_idx, minlength=n_systems)
    return order[torch.cumsum(counts, 0) - counts]
