"""Is an energy invariant to the description of a crystal, and continuous? And what does it do when one atom moves?

Invariance: the energy before and after each entry of :data:`contsp_core.transformations.TRANSFORMATIONS`.
Continuity: the change of the energy over shorter and shorter steps along each path of :data:`PROBES`. They lead through
the places where graph-based energies tend to break, or search for a jump whose place is not known.
Rounding: an energy computed in float32 changes by noise, whatever the step. The noise is measured, and a change below
it is not called one. All geometry is in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from contsp_core.cgcnn import nearest_neighbors
from contsp_core.crystals import Crystals, pack
from contsp_core.graph import cutoff_radius, edge_vectors
from contsp_core.transformations import TRANSFORMATIONS, supercell

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator
    from pymatgen.core import Structure

Energy = Callable[[Crystals], Tensor]
Cutoff = float | Callable[[Crystals], Tensor] | None

# Paths through the places where energies break


@dataclass(frozen=True)
class Path:
    """A straight line of crystals, one per crystal of a batch: at δ, cell and positions of ``start`` + δ · velocity.

    Attributes:
        start: the crystals at δ = 0, where the event is if ``grid`` is None.
        cell: (n_systems, 3, 3) and ``positions`` (n_atoms_total, 3), velocities, Å per Å.
        possible: (n_systems,) bool, whether the event could be set up; None for all.
        grid: (n_points, n_systems) δ among which a jump is searched, Å.
    """

    start: Crystals
    cell: Tensor
    positions: Tensor
    possible: Tensor | None = None
    grid: Tensor | None = None

    def at(self, delta: Tensor) -> Crystals:
        """The crystals at δ (n_systems,), Å."""
        positions = self.start.positions + self.start.to_atoms(delta)[:, None] * self.positions
        return self.start.replace(cell=self.start.cell + delta[:, None, None] * self.cell, positions=positions)

    def energies(self, function: Energy, deltas: Tensor) -> Tensor:
        """(n_points, n_systems) energies at ``deltas`` (n_points, n_systems or 1), Å."""
        deltas = deltas.expand(-1, self.start.n_systems)
        return function(Crystals.cat([self.at(delta) for delta in deltas])).view(len(deltas), -1)


def cross_cutoff(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """An atom passes the cutoff of another: their distance is R + δ."""
    return _through_distance(crystals, cutoff, rng)


def overlap(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """Two atoms pass through each other: their distance is |δ|."""
    return _through_distance(crystals, 0 * cutoff, rng)


def approach(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """Two atoms come closer, from 0.5 Å down to 10⁻⁷ Å, in equal steps of the logarithm."""
    distances = torch.logspace(-7, np.log10(0.5), 34, dtype=torch.float64)
    return replace(_through_distance(crystals, 0 * cutoff, rng), grid=distances[:, None].expand(-1, len(crystals)))


def strain(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """A random homogeneous strain moves the farthest lattice vector by δ, from a pair of atoms at the cutoff."""
    start, direction = _through_distance(crystals, cutoff, rng).start, crystals.random_cells(rng)
    return _deforming(start, direction / (start.cell @ direction).norm(dim=2).amax(dim=1)[:, None, None])


def breathe(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """The crystal swells from a third to twice its volume: (V/N)^{1/3} grows by δ."""
    side = crystals.density.pow(-1 / 3)
    grid = torch.linspace(-0.3, 0.27, 25, dtype=torch.float64)[:, None] * side
    return replace(_deforming(crystals, torch.eye(3, dtype=torch.float64) / side[:, None, None]), grid=grid)


def thin_cell(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """A cell squeezed to a plate of height (R + δ)/6: atoms see their own sixth image pass R."""
    length, axis = crystals.cell.norm(dim=2).min(dim=1)
    normal = crystals.cell[torch.arange(len(crystals)), axis] / length[:, None]
    along = normal[:, :, None] * normal[:, None, :]
    stretch = (cutoff / (6 * length))[:, None, None]
    across = torch.eye(3, dtype=torch.float64) - along
    plate = _deforming(crystals, (stretch - 1) * along + (stretch.rsqrt() - 1) * across).at(torch.ones_like(length))
    return _deforming(plate, along / cutoff[:, None, None])


def swap_neighbors(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """Neighbours number n and n + 1 of an atom change places: their distances differ by δ.

    Impossible where, for every atom, the two are images of one atom or the farther is an image of the atom itself.
    """
    noise = 0.03 * crystals.to_atoms(crystals.density.pow(-1 / 3))[:, None] * crystals.random_atoms(rng)
    crystals = crystals.replace(positions=crystals.positions + noise)  # no ties left
    graph = nearest_neighbors(crystals, n_neighbors + 1)
    near = torch.arange(len(crystals.positions)) * (n_neighbors + 1) + n_neighbors - 1
    far = near + 1
    vector = edge_vectors(crystals, graph)
    distance = vector.norm(dim=1)
    free = (graph.target[far] != graph.source[far]) & (graph.target[far] != graph.target[near])
    gap = torch.where(free, distance[far] - distance[near], torch.inf)
    chosen = _best_per_system(gap, crystals)
    possible, edge = free[chosen], far[chosen]
    closer = torch.where(possible, -gap[chosen], 0.0)
    path = _moving_atom(crystals, graph.target[edge], vector[edge] / distance[edge, None], closer)
    return replace(path, possible=possible)


def wander(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """A random atom moves in a random direction, by half an Å to either side."""
    direction = torch.randn(len(crystals), 3, generator=rng, dtype=torch.float64)
    path = _moving_atom(crystals, _random_atom(crystals, rng), direction / direction.norm(dim=1, keepdim=True))
    return replace(path, grid=torch.linspace(-0.5, 0.5, 21, dtype=torch.float64)[:, None].expand(-1, len(crystals)))


PROBES: dict[str, Callable[[Crystals, Tensor, int, torch.Generator], Path]] = {
    "atom crosses the cutoff": cross_cutoff,
    "two atoms overlap": overlap,
    "two atoms approach": approach,
    "strain": strain,
    "volume": breathe,
    "thin cell": thin_cell,
    "neighbours swap order": swap_neighbors,
    "search along a path": wander,
}


def enlarge(crystals: Crystals, min_atoms: int = 4) -> Crystals:
    """Repeat each crystal along its shortest lattice vector until it has ``min_atoms``: single atoms can then move."""
    matrices = torch.eye(3, dtype=torch.int64).repeat(len(crystals), 1, 1)
    shortest = crystals.cell.norm(dim=2).argmin(dim=1)
    matrices[torch.arange(len(crystals)), shortest, shortest] = -(-min_atoms // crystals.n_atoms)
    return supercell(crystals, matrices)


def _deforming(crystals: Crystals, direction: Tensor) -> Path:
    """Space is deformed by 1 + δ · direction (n_systems, 3, 3)."""
    return Path(crystals, crystals.cell @ direction, crystals.multiply_rows(crystals.positions, direction))


def _moving_atom(crystals: Crystals, atom: Tensor, direction: Tensor, offset: Tensor | None = None) -> Path:
    """One atom per crystal moves along a unit vector (n_systems, 3); at δ = 0 it is moved by ``offset`` already."""
    velocity = torch.zeros_like(crystals.positions).index_add(0, atom, direction)
    path = Path(crystals, torch.zeros_like(crystals.cell), velocity)
    return path if offset is None else replace(path, start=path.at(offset))


def _through_distance(crystals: Crystals, distance: Tensor, rng: torch.Generator) -> Path:
    """The atom that is at about this distance (n_systems,) from a random one moves away from it; at it for δ = 0."""
    first, axis = _random_atom(crystals, rng), torch.arange(-3.0, 4.0, dtype=torch.float64)
    offset = crystals.frac_coords - crystals.to_atoms(crystals.frac_coords[first])
    offset = (offset - offset.round())[:, None, :] + torch.cartesian_prod(axis, axis, axis)
    vectors = offset @ crystals.to_atoms(crystals.cell)
    lengths = vectors.norm(dim=2)
    wrong = (lengths - crystals.to_atoms(distance)[:, None]).abs()
    wrong = torch.where(lengths > 1e-3, wrong, torch.inf)  # coincident atoms have no direction
    wrong[first] = torch.inf
    error, image = wrong.min(dim=1)
    second = _best_per_system(error, crystals)
    vector, length = vectors[second, image[second]], lengths[second, image[second]]
    return _moving_atom(crystals, second, vector / length[:, None], distance - length)


def _random_atom(crystals: Crystals, rng: torch.Generator) -> Tensor:
    draw = torch.rand(len(crystals), generator=rng, dtype=torch.float64)
    return torch.cumsum(crystals.n_atoms, 0) - crystals.n_atoms + (draw * crystals.n_atoms).long()


def _best_per_system(score: Tensor, crystals: Crystals) -> Tensor:
    """(n_systems,) index of the atom with the lowest score (n_atoms_total,) in each crystal."""
    order = torch.argsort(score)
    order = order[torch.argsort(crystals.system_idx[order], stable=True)]
    return order[torch.cumsum(crystals.n_atoms, 0) - crystals.n_atoms]


# The audit

DELTAS = torch.logspace(-1, -8, 8, dtype=torch.float64)  # Å
MAX_ATOMS = 1024  # handled at a time (at least one crystal), which bounds the memory
NOISE_STEP = 1e-5  # Å: 20 units in the last place of a float32 coordinate of 5 Å, too short for curvature to show
MARGIN = 10.0  # times the rounding noise: what counts as a change
VERDICTS = ("impossible", "below rounding", "invariant", "continuous", "changes", "jump", "infinite")  # best to worst


def audit(
    energy: Energy | Calculator,
    structures: Crystals | Iterable[Structure],
    seed: int = 0,
    *,
    checks: Sequence[str] | None = None,
    cutoff: Cutoff = None,
    n_neighbors: int = 12,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the invariance and the continuity of an energy on the given crystals.

    Args:
        energy: a callable ``Crystals -> (n_systems,)``, energies per atom, or an ASE calculator, whose energy is
            divided by the number of atoms. A torch module is copied, cast to float64 and put in evaluation mode.
        structures: a batch, or pymatgen structures; ``material_id`` is read from their properties.
        seed: of every random choice.
        checks: names from :data:`TRANSFORMATIONS` and :data:`PROBES`, all by default.
        cutoff: radius (Å) at which the energy cuts its graph, or a function giving it, (n_systems,). By default what
            the energy declares (``cutoff_radius(crystals)``; ``rc`` or ``cutoff`` of a calculator), else
            3 (|det L| / N)^{1/3}.
        n_neighbors: the probe of neighbour order swaps neighbours number ``n_neighbors`` and ``n_neighbors + 1``.
        progress: whether to draw a progress bar on stderr.

    Returns:
        One row per check, about the crystal (``material_id``, ``index``) with the worst verdict and, among these, the
        largest change: ``kind`` (re-description, congruent or continuity); ``verdict``; ``max_change``, its |ΔE| (for
        probes over the shortest step, about 10⁻⁸ Å); ``floor``, what rounding may do to it: ten times
        :func:`rounding_noise`, for transformations two hundred times or more; for probes ``lipschitz``, its largest
        |ΔE|/δ (1/Å) above the floor, and ``exponent``, the x in |ΔE| ∝ δˣ over the shortest two steps above the floor
        (1 or more for a slope, 0 at a jump); ``n_checked`` crystals. Verdicts: ``invariant``, or ``changes`` above the
        floor; ``continuous``, or ``jump`` if the exponent is below 1/2; ``below rounding`` where none can be measured;
        ``infinite``; ``impossible``. ``attrs`` holds the seed and the standard deviation of the energy over the
        crystals, because an energy that is constant passes any audit.

    Raises:
        ValueError: on an unknown name or an energy of the wrong shape.
    """
    known = TRANSFORMATIONS | PROBES
    checks = list(known) if checks is None else list(checks)
    if unknown := [name for name in checks if name not in known]:
        raise ValueError(f"checks holds {unknown[0]!r}, expected names among {sorted(known)}")
    crystals, names = _as_batch(structures)
    function, rng = as_energy(energy), torch.Generator().manual_seed(seed)
    records, energies = [], []
    with tqdm(total=len(crystals) * len(checks), unit="check", disable=not progress) as bar:
        for systems in pack(crystals.n_atoms.tolist(), MAX_ATOMS):
            chunk = crystals[systems]
            larger, index = enlarge(chunk), np.arange(len(crystals))[systems]
            energies.append(function(chunk))
            floor = MARGIN * rounding_noise(function, chunk, rng)
            for name in checks:
                if name in PROBES:
                    path = PROBES[name](larger, _cutoff(energy, cutoff, larger), n_neighbors, rng)
                    record = _continuity(function, path, floor, rng).assign(kind="continuity")
                else:
                    transform, kind = TRANSFORMATIONS[name]
                    record = _invariance(function, chunk, transform(chunk, rng), floor).assign(kind=kind)
                records.append(record.assign(check=name, index=index, material_id=[names[i] for i in index]))
                bar.update(len(index))
    table = _worst(pd.concat(records, ignore_index=True))
    table.attrs = {"seed": seed, "energy_std": float(torch.cat(energies).std(correction=0))}
    return table


def continuity_profile(
    energy: Energy | Calculator,
    crystal: Crystals | Structure,
    deltas: Sequence[float],
    probe: str = "atom crosses the cutoff",
    seed: int = 0,
    *,
    cutoff: Cutoff = None,
    n_neighbors: int = 12,
) -> pd.DataFrame:
    """The energy of one crystal along one path: columns ``delta`` (Å), ``energy`` and ``change``, |E(δ) − E(0)|.

    ``deltas`` are displacements from the event, Å, of either sign; the other arguments are those of :func:`audit`.
    """
    if probe not in PROBES:
        raise ValueError(f"probe is {probe!r}, expected one of {sorted(PROBES)}")
    crystals, rng = enlarge(_as_batch(crystal)[0]), torch.Generator().manual_seed(seed)
    if len(crystals) != 1:
        raise ValueError(f"crystal holds {len(crystals)} crystals, expected one")
    path = PROBES[probe](crystals, _cutoff(energy, cutoff, crystals), n_neighbors, rng)
    if path.possible is not None and not path.possible.all():
        raise ValueError(f"probe {probe!r} is impossible for this crystal, expected another crystal or probe")
    displacements = torch.tensor([0.0, *deltas], dtype=torch.float64)[:, None]
    values = path.energies(as_energy(energy), displacements)[:, 0].numpy()
    return pd.DataFrame({"delta": deltas, "energy": values[1:], "change": np.abs(values[1:] - values[0])})


def as_energy(energy: Energy | Calculator) -> Energy:
    """A function ``Crystals -> (n_systems,)``, float64, in bounded memory, from a module, callable or ASE calculator.

    Raises:
        ValueError: if it is none of these; when called, if the energy has not one number per crystal.
    """
    if isinstance(energy, nn.Module):
        energy = copy.deepcopy(energy).double().eval().requires_grad_(False)
    elif hasattr(energy, "get_potential_energy"):
        energy = _calculator_energy(energy)
    elif not callable(energy):
        raise ValueError(f"energy is {energy!r}, expected a function of Crystals or an ASE calculator")

    @torch.enable_grad()  # a calculator may find its forces by differentiation
    def function(crystals: Crystals) -> Tensor:
        parts = []
        for chunk in (crystals[systems] for systems in pack(crystals.n_atoms.tolist(), MAX_ATOMS)):
            values = torch.as_tensor(energy(chunk)).detach().cpu().double()
            if tuple(values.shape) != (len(chunk),):
                raise ValueError(f"energy returned shape {tuple(values.shape)}, expected ({len(chunk)},)")
            parts.append(values)
        return torch.cat(parts)

    return function


def rounding_noise(function: Energy, crystals: Crystals, rng: torch.Generator) -> Tensor:
    """(n_systems,) standard deviation of the rounding error of an energy, at least one unit in its last place.

    From fourth differences of the energy at twelve points 10⁻⁵ Å apart on a line of random direction: in them slope and
    curvature cancel, and independent errors of size σ leave √70 σ (Hamming's difference table; see Moré & Wild, SIAM J.
    Sci. Comput. 33, 1292 (2011)). The smaller of two lines, since one may cross a jump. A jump at its start is not
    crossed, because the first point is left out.
    """
    steps = NOISE_STEP * torch.arange(1.0, 13.0, dtype=torch.float64)[:, None]
    lines = [Path(crystals, crystals.random_cells(rng), crystals.random_atoms(rng)) for _ in range(2)]
    energies = torch.stack([line.energies(function, steps) for line in lines])
    noise = (energies.diff(n=4, dim=1).square().mean(dim=1) / 70).sqrt().amin(dim=0)
    is_single = (energies.float() == energies).flatten(0, 1).all(dim=0)  # every value is a float32 number
    last_place = energies.abs().amax(dim=(0, 1)) * torch.where(is_single, 2.0**-23, 2.0**-52)
    return torch.maximum(noise, last_place).nan_to_num(nan=0.0, posinf=0.0)


def _invariance(function: Energy, crystals: Crystals, transformed: Crystals, floor: Tensor) -> pd.DataFrame:
    change = _size(function(transformed) - function(crystals))
    # on the way coordinates are rounded several times, and all of a crystal alike
    floor = 20 * floor * (_amplification(transformed) / _amplification(crystals)).clamp(min=1)
    verdict = np.where(change > floor, np.where(change == torch.inf, "infinite", "changes"), "invariant")
    return pd.DataFrame({"max_change": change, "floor": floor, "verdict": verdict})


def _amplification(crystals: Crystals) -> Tensor:
    """(n_systems,) how the rounding of a description grows: largest coordinate, times images needed per distance."""
    atoms = crystals.positions.abs().amax(dim=1)
    largest = crystals.cell.abs().amax(dim=(1, 2)).scatter_reduce(0, crystals.system_idx, atoms, "amax")
    return largest * torch.linalg.inv(crystals.cell).abs().amax(dim=(1, 2))


def _continuity(function: Energy, path: Path, floor: Tensor, rng: torch.Generator) -> pd.DataFrame:
    place, width, change = _around_zero(function, path) if path.grid is None else _search(function, path, floor)
    floor = torch.maximum(floor, MARGIN * rounding_noise(function, path.at(place), rng))
    visible = change > floor
    last = ((visible[1:] & visible[:-1]) * torch.arange(1, len(change))[:, None]).amax(dim=0)  # with the one before it
    system, before = torch.arange(len(floor)), (last - 1).clamp(min=0)
    exponent = torch.log(change[before, system] / change[last, system])
    exponent = exponent / torch.log(width[before, system] / width[last, system])
    exponent = torch.where((last > 0) & exponent.isfinite(), exponent, torch.nan)
    verdict = np.where(exponent < 0.5, "jump", np.where(exponent >= 0.5, "continuous", "below rounding"))
    verdict = np.where((change == torch.inf).any(dim=0), "infinite", verdict)
    lipschitz = torch.where(visible, change / width, 0).amax(dim=0)
    table = pd.DataFrame({"max_change": change[-1], "floor": floor, "lipschitz": lipschitz, "exponent": exponent})
    possible = np.full(len(floor), True) if path.possible is None else path.possible.numpy()
    table[~possible] = np.nan
    return table.assign(verdict=np.where(possible, verdict, "impossible"))


def _around_zero(function: Energy, path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """The place 0; (n_deltas, n_systems) steps δ, and the larger of |E(δ) − E(0)| and |E(0) − E(−δ)|."""
    energies = path.energies(function, torch.cat([torch.zeros(1), DELTAS, -DELTAS])[:, None])
    outside, inside = _size(energies[1:] - energies[0]).split(len(DELTAS))
    return torch.zeros_like(energies[0]), DELTAS[:, None].expand_as(outside), torch.maximum(outside, inside)


def _search(function: Energy, path: Path, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zoom into the step whose slope stands out most from those beside it, again and again: place, widths, |ΔE|.

    A jump that is small against the bending of the energy over one step of ``path.grid`` can be missed.
    """
    grid, system = path.grid, torch.arange(len(floor))
    widths, changes = [], []
    for _ in DELTAS:
        step, width = path.energies(function, grid).diff(dim=0), grid.diff(dim=0)
        slope = step / width
        expected = torch.cat([slope[:1], slope.unfold(0, 3, 1).median(dim=2)[0], slope[-1:]])
        unusual = (_size(step - expected * width) - floor).clamp(min=0)
        chosen = ((unusual + 1e-6 * _size(step)) / width).argmax(dim=0)  # the steepest where none stands out
        widths.append(width[chosen, system])
        changes.append(_size(step[chosen, system]))
        shortest = (widths[0] / 1e3).clamp(max=DELTAS[-1])
        following = widths[-1] * (shortest / widths[0]).pow(1 / (len(DELTAS) - 1)).clamp(min=0.1)
        middle = grid[chosen, system] + widths[-1] / 2
        grid = middle + following * torch.arange(-6, 7)[:, None]
    return middle, torch.stack(widths), torch.stack(changes)


def _size(change: Tensor) -> Tensor:
    """|ΔE|; infinite where an energy is not finite."""
    return change.abs().nan_to_num(nan=torch.inf, posinf=torch.inf)


def _worst(records: pd.DataFrame) -> pd.DataFrame:
    """The row with the worst verdict, then the largest change, of each check in order of appearance."""
    records["severity"] = records["verdict"].map(VERDICTS.index)
    records["n_checked"] = (records["verdict"] != "impossible").groupby(records["check"]).transform("sum")
    rows = records.sort_values(["severity", "max_change"], na_position="first").groupby("check", sort=False).tail(1)
    rows = rows.set_index("check").loc[records["check"].unique()].reset_index()
    measured = ["max_change", "floor", "lipschitz", "exponent"]
    return rows.reindex(columns=["check", "kind", "verdict", *measured, "material_id", "index", "n_checked"])


def _as_batch(structures: Crystals | Structure | Iterable[Structure]) -> tuple[Crystals, list[str]]:
    if isinstance(structures, Crystals):
        return structures.to(torch.float64).to("cpu"), [str(index) for index in range(len(structures))]
    structures = [structures] if hasattr(structures, "lattice") else list(structures)
    names = [str((s.properties or {}).get("material_id", index)) for index, s in enumerate(structures)]
    return Crystals.from_structures(structures, dtype=torch.float64), names


def _calculator_energy(calculator: Calculator) -> Energy:
    """Energies per atom, one crystal after the other."""
    from ase import Atoms

    def per_atom(crystals: Crystals) -> Tensor:
        positions = torch.split(crystals.positions, crystals.n_atoms.tolist())
        units = zip(crystals.species, positions, crystals.cell)
        atoms = [Atoms(numbers, xyz.numpy(), cell=cell.numpy(), pbc=True) for numbers, xyz, cell in units]
        with np.errstate(all="ignore"):  # overlapping atoms: the infinity is reported
            energies = [float(calculator.get_potential_energy(unit)) / len(unit) for unit in atoms]
        return torch.tensor(energies, dtype=torch.float64)

    return per_atom


def _cutoff(energy: Energy | Calculator, cutoff: Cutoff, crystals: Crystals) -> Tensor:
    if cutoff is None and hasattr(energy, "get_potential_energy"):
        cutoff = energy.parameters.get("rc") or energy.parameters.get("cutoff")
    if cutoff is None:
        cutoff = getattr(energy, "cutoff_radius", cutoff_radius)
    return cutoff(crystals) if callable(cutoff) else torch.full_like(crystals.volume, float(cutoff))


# One atom moved
