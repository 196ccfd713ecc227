"""Audit of any energy: is it invariant to the description of a crystal, and is it continuous?

Invariance: the energy before and after each entry of :data:`contsp_core.transformations.TRANSFORMATIONS`.
Continuity: the change of the energy over shorter and shorter steps δ along paths (:mod:`contsp_core.invariance`) that
cross the places where graph-based energies tend to break. All in float64.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from contsp_core.cgcnn import nearest_neighbors
from contsp_core.checkpoints import CHECKPOINTS
from contsp_core.crystals import Crystals
from contsp_core.data import DATASETS, Split, choose, load_split
from contsp_core.diffusion import add_noise
from contsp_core.graph import cutoff_radius
from contsp_core.transformations import TRANSFORMATIONS, supercell

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator
    from pymatgen.core import Structure


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


Energy = Callable[[Crystals], Tensor]
DELTAS = tuple(10.0**-exponent for exponent in range(1, 9))  # Å
SEARCH_INTERVALS = 10  # per level of the jump search


class ContinuityProfile(NamedTuple):
    """Displacements along a path (Å), energies there, and |E(δ) − E(0)|; float64 arrays of equal length."""

    delta: np.ndarray
    energy: np.ndarray
    change: np.ndarray


def audit(
    energy: Energy | Calculator,
    structures: Crystals | Iterable[Structure],
    seed: int = 0,
    *,
    cutoff: float | Callable[[Crystals], Tensor] | None = None,
    n_neighbors: int = 12,
    extensive: bool = False,
    transformations: Sequence[str] | None = None,
    probes: Sequence[str] | None = None,
    deltas: Sequence[float] = DELTAS,
    max_atoms: int = 1024,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the invariance and the continuity of an energy on the given crystals.

    Args:
        energy: a callable ``Crystals -> (n_systems,)`` or an ASE calculator. A torch module is copied, cast to float64
            and put in evaluation mode; the energy of a calculator is divided by the number of atoms.
        structures: a batch, or pymatgen structures; ``material_id`` is read from their properties.
        seed: of every random choice.
        cutoff: radius (Å) at which the energy cuts its graph, or a function giving it, (n_systems,). By default what
            the energy declares (``cutoff_radius(crystals)``; ``rc`` or ``cutoff`` of a calculator), else
            3 (|det L| / N)^{1/3}.
        n_neighbors: the probe of neighbour order swaps neighbours number ``n_neighbors`` and ``n_neighbors + 1``.
        extensive: whether a callable gives total energies, to be divided by the number of atoms.
        transformations: names from :data:`TRANSFORMATIONS`, all by default.
        probes: names from :data:`PROBES`, all by default.
        deltas: step lengths, Å; the last one is the one whose change is called a jump.
        max_atoms: atoms handled at a time (at least one crystal), which bounds the memory.
        progress: whether to draw a progress bar on stderr.

    Returns:
        One row per transformation and probe: ``check``; ``kind`` (re-description, congruent or continuity);
        ``max_change``, the largest |ΔE| (for probes, at the last δ: the jump); ``material_id`` and ``index`` of the
        crystal that gave it; for probes ``lipschitz``, the largest |ΔE|/δ over all δ and crystals (1/Å), and
        ``exponent``, the x in |ΔE| ∝ δˣ between the last two δ for that crystal (1 or more where the energy is
        continuous, 0 at a jump); ``n_checked`` crystals. A non-finite energy counts as an infinite change.
        ``attrs`` holds the seed and the standard deviation of the energy over the crystals, because an energy that is
        constant passes any audit.

    Raises:
        ValueError: on an unknown name or an energy of the wrong shape.
    """
    transformations = _known("transformations", transformations, TRANSFORMATIONS)
    probes = _known("probes", probes, PROBES)
    crystals, names = _as_batch(structures)
    function, cutoff = as_energy(energy, extensive), _cutoff_function(energy, cutoff)
    generator = torch.Generator().manual_seed(seed)
    records, energies = [], []
    bar = tqdm(total=crystals.n_systems * (len(transformations) + len(probes)), unit="check", disable=not progress)
    with bar:
        for systems in _chunks(crystals, max_atoms):
            chunk = crystals[systems]

            def evaluate(batch: Crystals) -> Tensor:
                return evaluate_in_chunks(function, batch, max_atoms)

            reference = evaluate(chunk)
            energies.append(reference)
            for name in transformations:
                transform, kind = TRANSFORMATIONS[name]
                change = _finite_change(evaluate(transform(chunk, generator)), reference)
                records.append(_record(name, kind, systems, change[None], None))
                bar.update(len(systems))
            for name in probes:
                path = PROBES[name](chunk, cutoff, n_neighbors, generator)
                change = _changes(evaluate, path, deltas)
                records.append(_record(name, "continuity", systems, change, deltas))
                bar.update(len(systems))
    table = _worst(pd.concat(records, ignore_index=True), names)
    table.attrs = {"seed": seed, "energy_std": float(torch.cat(energies).std(correction=0))}
    return table


def continuity_profile(
    energy: Energy | Calculator,
    crystal: Crystals | Structure,
    deltas: Sequence[float],
    probe: str = "atom crosses the cutoff",
    seed: int = 0,
    *,
    cutoff: float | Callable[[Crystals], Tensor] | None = None,
    n_neighbors: int = 12,
    extensive: bool = False,
) -> ContinuityProfile:
    """The energy along one path: arrays for a plot of E(δ), or of |E(δ) − E(0)| on logarithmic axes.

    Args:
        deltas: displacements from the probed event, Å, of either sign.
        probe: a name from :data:`PROBES`.

    Other arguments are those of :func:`audit`, for a single crystal.
    """
    (probe,) = _known("probe", [probe], PROBES)
    crystals, _ = _as_batch(crystal if isinstance(crystal, Crystals) else [crystal])
    if crystals.n_systems != 1:
        raise ValueError(f"crystal holds {crystals.n_systems} crystals, expected one")
    function = as_energy(energy, extensive)
    generator = torch.Generator().manual_seed(seed)
    path = PROBES[probe](crystals, _cutoff_function(energy, cutoff), n_neighbors, generator)
    if not path.possible.all():
        raise ValueError(f"probe {probe!r} cannot be applied to this crystal, choose another crystal or probe")
    values = evaluate_in_chunks(function, Crystals.cat([path.at(delta) for delta in (0.0, *deltas)])).numpy()
    return ContinuityProfile(np.asarray(deltas, dtype=float), values[1:], np.abs(values[1:] - values[0]))


def as_energy(energy: Energy | Calculator, extensive: bool = False) -> Energy:
    """A float64 function ``Crystals -> (n_systems,)`` from a module, a callable or an ASE calculator.

    Raises:
        ValueError: when called, if the energy has not one number per crystal.
    """
    if _is_calculator(energy):
        energy, extensive = _calculator_energy(energy), True
    elif isinstance(energy, nn.Module):
        energy = copy.deepcopy(energy).double().eval()

    @torch.no_grad()
    def function(crystals: Crystals) -> Tensor:
        values = torch.as_tensor(energy(crystals)).detach().cpu().double()
        if tuple(values.shape) != (crystals.n_systems,):
            raise ValueError(f"energy returned shape {tuple(values.shape)}, expected ({crystals.n_systems},)")
        return values / crystals.n_atoms if extensive else values

    return function


def evaluate_in_chunks(function: Energy, crystals: Crystals, max_atoms: int = 1024) -> Tensor:
    """(n_systems,) energies, computed for at most ``max_atoms`` atoms (but at least one crystal) at a time."""
    return torch.cat([function(crystals[systems]) for systems in _chunks(crystals, max_atoms)])


def _chunks(crystals: Crystals, max_atoms: int) -> Iterator[list[int]]:
    chunk, size = [], 0
    for system, n_atoms in enumerate(crystals.n_atoms.tolist()):
        if chunk and size + n_atoms > max_atoms:
            yield chunk
            chunk, size = [], 0
        chunk.append(system)
        size += n_atoms
    yield chunk


def _changes(evaluate: Energy, path: Path, deltas: Sequence[float]) -> Tensor:
    """(n_deltas, n_systems) largest change over a step of each length; NaN where the probe is impossible."""
    found = _search(evaluate, path, deltas) if path.search else _around_zero(evaluate, path, deltas)
    found[:, ~path.possible] = torch.nan
    return found


def _around_zero(evaluate: Energy, path: Path, deltas: Sequence[float]) -> Tensor:
    """The larger of |E(δ) − E(0)| and |E(0) − E(−δ)|."""
    middle = evaluate(path.at(0.0))
    sides = [[_finite_change(evaluate(path.at(sign * delta)), middle) for sign in (1, -1)] for delta in deltas]
    return torch.stack([torch.maximum(*pair) for pair in sides])


def _search(evaluate: Energy, path: Path, deltas: Sequence[float]) -> Tensor:
    """Descend to the steepest of ten intervals again and again: finds a jump whose place is not known."""
    start = torch.full((len(path.possible),), -SEARCH_INTERVALS * deltas[0] / 2, dtype=torch.float64)
    found = []
    for delta, following in zip(deltas, [*deltas[1:], deltas[-1]]):
        grid = [evaluate(path.at(start + step * delta)) for step in range(SEARCH_INTERVALS + 1)]
        change = torch.stack([_finite_change(after, before) for before, after in itertools.pairwise(grid)])
        largest, steepest = change.max(dim=0)
        found.append(largest)
        start = start + (steepest + 0.5) * delta - SEARCH_INTERVALS * following / 2
    return torch.stack(found)


def _finite_change(energy: Tensor, reference: Tensor) -> Tensor:
    return (energy - reference).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _record(check: str, kind: str, systems: list[int], change: Tensor, deltas: Sequence[float] | None) -> pd.DataFrame:
    columns = {"check": check, "kind": kind, "index": systems, "max_change": change[-1].numpy()}
    columns |= {"lipschitz": np.nan, "exponent": np.nan}
    if deltas is not None:
        delta = torch.tensor(deltas, dtype=torch.float64)
        columns["lipschitz"] = (change / delta[:, None]).amax(dim=0).numpy()
        if len(delta) > 1:
            columns["exponent"] = (torch.log(change[-2] / change[-1]) / torch.log(delta[-2] / delta[-1])).numpy()
    return pd.DataFrame(columns)


def _worst(records: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """The row of the largest change per check, in order of appearance."""
    rows = []
    for (check, kind), group in records.groupby(["check", "kind"], sort=False):
        possible = group.dropna(subset="max_change")
        row = {"check": check, "kind": kind, "n_checked": len(possible), "lipschitz": group["lipschitz"].max()}
        if len(possible):
            worst = possible.loc[possible["max_change"].idxmax()]
            row |= {name: worst[name] for name in ("max_change", "exponent", "index")}
            row["material_id"] = names[worst["index"]]
        rows.append(row)
    columns = ["check", "kind", "max_change", "lipschitz", "exponent", "material_id", "index", "n_checked"]
    return pd.DataFrame(rows).reindex(columns=columns)


def _as_batch(structures: Crystals | Iterable[Structure]) -> tuple[Crystals, list[str]]:
    if isinstance(structures, Crystals):
        return structures.to(torch.float64).to("cpu"), [str(index) for index in range(structures.n_systems)]
    structures = list(structures)
    names = [str((s.properties or {}).get("material_id", index)) for index, s in enumerate(structures)]
    return Crystals.from_structures(structures, dtype=torch.float64), names


def _is_calculator(energy: object) -> bool:
    return not isinstance(energy, nn.Module) and hasattr(energy, "get_potential_energy")


def _calculator_energy(calculator: Calculator) -> Energy:
    """Total energies, one crystal after the other."""
    from ase import Atoms

    def total(crystals: Crystals) -> Tensor:
        positions = torch.split(crystals.positions, crystals.n_atoms.tolist())
        units = zip(crystals.species, positions, crystals.cell)
        atoms = [Atoms(numbers, xyz.numpy(), cell=cell.numpy(), pbc=True) for numbers, xyz, cell in units]
        with np.errstate(all="ignore"):  # overlapping atoms: the infinity is reported
            return torch.tensor([float(calculator.get_potential_energy(unit)) for unit in atoms], dtype=torch.float64)

    return total


def _cutoff_function(
    energy: Energy | Calculator, cutoff: float | Callable[[Crystals], Tensor] | None
) -> Callable[[Crystals], Tensor]:
    if cutoff is None and _is_calculator(energy):
        cutoff = energy.parameters.get("rc") or energy.parameters.get("cutoff")
    if cutoff is None:
        cutoff = getattr(energy, "cutoff_radius", cutoff_radius)
    if callable(cutoff):
        return cutoff
    return lambda crystals: torch.full_like(crystals.volume, float(cutoff))


def _known(argument: str, names: Sequence[str] | None, registry: dict) -> list[str]:
    names = list(registry) if names is None else list(names)
    for name in names:
        if name not in registry:
            raise ValueError(f"{argument} holds {name!r}, expected names among {sorted(registry)}")
    return names


# Columns that tell how stable a crystal is (lower is more stable), and the largest value called stable, eV per atom.
STABILITY = {"e_above_hull": 0.0, "energy_above_hull": 0.0, "heat_all": 0.2}
N_SHELLS = 5
TOLERATED_SHARE = 0.01
logger = logging.getLogger(__name__)


def displaced(crystal: Crystals, atom: int, displacements: Tensor) -> Crystals:
    """Copies of a crystal, each with one atom moved (all of its periodic images move along).

    Args:
        crystal: a batch of one.
        atom: index of the atom that moves.
        displacements: (n, 3), Å.

    Raises:
        ValueError: if the batch holds more than one crystal or the atom does not exist.
    """
    n_atoms = len(crystal.positions)
    if crystal.n_systems != 1:
        raise ValueError(f"crystal is a batch of {crystal.n_systems}, expected one crystal")
    if not 0 <= atom < n_atoms:
        raise ValueError(f"atom is {atom}, expected 0 … {n_atoms - 1}")
    copies = crystal[[0] * len(displacements)]
    moved = copies.positions.clone()
    moved[atom::n_atoms] += displacements.to(moved)
    return copies.replace(positions=moved)


@torch.no_grad()
def displacement_scan(
    energy: Callable[[Crystals], Tensor],
    crystal: Crystals,
    atom: int,
    n_draws: int = 1000,
    sigma: float = 0.05,
    seed: int = 0,
) -> pd.DataFrame:
    """Energies of a crystal with one atom displaced by isotropic Gaussian noise (paper, Figure 2).

    Args:
        energy: maps a batch to (n_systems,) energies, dimensionless.
        crystal: a batch of one.
        atom: index of the atom that moves.
        n_draws: number of displacements.
        sigma: standard deviation of each Cartesian component, Å; the paper uses 0.05.
        seed: of the draws.

    Returns:
        Columns ``displacement`` (its length, Å) and ``energy``; the first row is the undisturbed crystal.

    Raises:
        ValueError: on a crystal of one atom, a count or a width that is not positive, or as :func:`displaced`.
    """
    if len(crystal.positions) < 2:
        raise ValueError("crystal has 1 atom, expected at least 2: a lone atom can only be translated")
    if n_draws < 1 or not sigma > 0:
        raise ValueError(f"n_draws is {n_draws} and sigma is {sigma}, expected both > 0")
    generator = torch.Generator().manual_seed(seed)
    draws = sigma * torch.randn(n_draws, 3, generator=generator, dtype=torch.float64)
    draws = torch.cat([torch.zeros(1, 3, dtype=draws.dtype), draws])
    energies = evaluate_in_chunks(energy, displaced(crystal, atom, draws))
    return pd.DataFrame({"displacement": draws.norm(dim=1).numpy(), "energy": energies.double().numpy()})


def describe_response(scan: pd.DataFrame) -> dict[str, float | str]:
    """Which of the two behaviours of the paper a scan shows.

    The draws are sorted by the length of the displacement and cut into five shells with equally many. The energy
    ``only rises`` if the mean energy grows from the undisturbed crystal to the first shell and from shell to shell,
    and at most 1 % of the draws lie below the undisturbed crystal. It ``only falls`` if the same holds for its
    negative; everything else ``rises and falls``.

    Args:
        scan: from :func:`displacement_scan`.

    Returns:
        ``share_above``: share of the draws above the undisturbed crystal; ``range``: largest minus smallest energy;
        ``behaviour``.

    Raises:
        ValueError: with fewer draws than shells.
    """
    start = float(scan["energy"].iloc[0])
    draws = scan.iloc[1:].sort_values("displacement")
    if len(draws) < N_SHELLS:
        raise ValueError(f"scan has {len(draws)} draws, expected at least {N_SHELLS}")
    change = draws["energy"].to_numpy() - start
    means = np.array([0.0, *(shell.mean() for shell in np.array_split(change, N_SHELLS))])
    above = float((change > 0).mean())
    behaviour = "rises and falls"
    if (np.diff(means) > 0).all() and above >= 1 - TOLERATED_SHARE:
        behaviour = "only rises"
    if (np.diff(means) < 0).all() and (change < 0).mean() >= 1 - TOLERATED_SHARE:
        behaviour = "only falls"
    return {"share_above": above, "range": float(scan["energy"].max() - scan["energy"].min()), "behaviour": behaviour}


def stable_crystals(split: Split, n_structures: int | None = None, seed: int = 0) -> Split:
    """A random choice of stable crystals with at least two atoms (a lone atom can only be translated).

    Stable is what the data set says in a column of :data:`STABILITY`: an energy above the hull of 0, or for Perov-5 a
    formation energy of at most 0.2 eV per atom, the bound of Castelli et al. (2012). Without such a column all crystals
    are taken to be stable.

    Raises:
        ValueError: if none is left.
    """
    passed = split.n_atoms >= 2
    for name, largest in STABILITY.items():
        if name in split.columns:
            passed &= np.asarray(split.columns[name], dtype=float) <= largest
    rows = np.flatnonzero(passed)
    if not len(rows):
        raise ValueError(
            f"split {split.name}/{split.split} has no stable crystal with two atoms, expected at least one"
        )
    return split.select(choose(rows, n_structures, seed))


def response_table(
    energy: Callable[[Crystals], Tensor],
    crystals: Crystals,
    names: Sequence[str],
    n_draws: int = 1000,
    sigma: float = 0.05,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scan one random atom of each crystal.

    Args:
        energy, n_draws, sigma: as in :func:`displacement_scan`.
        crystals: the batch.
        names: (n_systems,) label of each crystal; the symbol of the moved atom is appended.
        seed: chooses the atoms and the displacements.

    Returns:
        All scans (columns ``material``, ``displacement``, ``energy``) and their description, one row a crystal.
    """
    from pymatgen.core import Element

    generator = torch.Generator().manual_seed(seed)
    scans, rows = [], []
    for system, name in enumerate(names):
        crystal = crystals[system]
        atom = int(torch.randint(len(crystal.positions), (), generator=generator))
        material = f"{name}, {Element.from_Z(int(crystal.atomic_numbers[atom])).symbol} moved"
        scan = displacement_scan(energy, crystal, atom, n_draws, sigma, seed + system)
        scans.append(scan.assign(material=material))
        rows.append({"material": material} | describe_response(scan))
    return pd.concat(scans, ignore_index=True), pd.DataFrame(rows)


@torch.no_grad()
def share_below_disturbed(
    energy: Callable[[Crystals], Tensor],
    crystals: Crystals,
    sigmas: Sequence[float],
    strain_noise: float = 0.1,
    seed: int = 0,
) -> pd.Series:
    """How often a crystal lies lower than a disturbed copy of itself.

    Args:
        energy: maps a batch to (n_systems,) energies.
        crystals: the batch.
        sigmas: sizes of the disturbance, Å: atoms are moved by Gaussian noise of that width.
        strain_noise: the cell is strained by noise of width ``strain_noise`` · sigma, Å⁻¹.
        seed: of the noise, the same for every size.

    Returns:
        Share of the crystals, indexed by sigma.
    """
    real, shares = evaluate_in_chunks(energy, crystals), {}
    for sigma in sigmas:
        rng = torch.Generator().manual_seed(seed)
        width = torch.full_like(crystals.cell[:, 0, 0], sigma)
        disturbed = evaluate_in_chunks(energy, add_noise(crystals, width, strain_noise, rng).crystals)
        shares[sigma] = float((real < disturbed).double().mean())
    return pd.Series(shares, name="share").rename_axis("sigma")


def available_datasets() -> list[str]:
    """Data sets that have a bundled checkpoint and a test split that can be loaded here."""
    found = []
    for name in DATASETS:
        if (CHECKPOINTS / f"{name}.safetensors").is_file():
            try:
                load_split(name, "test")
            except (ConnectionError, ValueError) as error:
                logger.warning("%s is left out: %s", name, error)
            else:
                found.append(name)
    return found
