"""Is an energy invariant to the description of a crystal, and does it change continuously with the crystal?

Invariance: the energy before and after each entry of :data:`contsp_core.transformations.TRANSFORMATIONS`.
Continuity: its change over shorter and shorter steps along each path of :data:`PROBES`, through the places where
graph-based energies tend to break, or in search of a jump. Rounding: an energy computed in float32 changes by noise,
whatever the step; the noise is measured, and a change below it is not called one. All geometry is in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from ase import Atoms
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot
from tqdm import tqdm

from contsp_core.crystals import Crystals, pack
from contsp_core.data import retold
from contsp_core.graph import cutoff_radius, edge_vectors, nearest_neighbors
from contsp_core.lattice import deform
from contsp_core.transformations import TRANSFORMATIONS, supercell

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator
    from pymatgen.core import Structure

Energy = Callable[[Crystals], Tensor]
DELTAS = torch.logspace(-1, -8, 8, dtype=torch.float64)  # Å
MAX_ATOMS = 1024  # whose energy is computed at a time (at least one crystal), which bounds the memory
NOISE_STEP = 1e-5  # Å: 20 units in the last place of a float32 coordinate of 5 Å, too short for curvature to show
MARGIN = 10.0  # times the rounding noise: what counts as a change
VERDICTS = ("impossible", "below rounding", "invariant", "continuous", "changes", "jump", "infinite")  # best to worst


@dataclass(frozen=True)
class Path:
    """A straight line of crystals, one per crystal of a batch: at δ, cell and positions of ``start`` + δ · velocity."""

    start: Crystals  # at δ = 0, where the event is if there is no grid
    cell: Tensor  # (n_systems, 3, 3), velocity, Å per Å
    positions: Tensor  # (n_atoms_total, 3), velocity, Å per Å
    possible: Tensor | None = None  # (n_systems,) bool, whether the event could be set up; None for all
    grid: Tensor | None = None  # (n_points, n_systems or 1) δ among which a jump is searched, Å

    def at(self, delta: Tensor) -> Crystals:
        """The crystals at δ (n_systems,), Å."""
        positions = self.start.positions + self.start.to_atoms(delta)[:, None] * self.positions
        return self.start.replace(cell=self.start.cell + delta[:, None, None] * self.cell, positions=positions)

    def energies(self, function: Energy, deltas: Tensor) -> Tensor:
        """(n_points, n_systems) energies at ``deltas`` (n_points, n_systems or 1), Å."""
        crystals = Crystals.cat([self.at(delta.expand(len(self.start))) for delta in deltas])
        return function(crystals).view(len(deltas), -1)


def cross_cutoff(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """An atom passes the cutoff of another: the distance of a random atom and one that is at about R is R + δ."""
    first, axis = _random_atom(crystals, rng), torch.arange(-3.0, 4.0, dtype=torch.float64)
    offset = crystals.frac_coords - crystals.to_atoms(crystals.frac_coords[first])
    offset = (offset - offset.round())[:, None, :] + torch.cartesian_prod(axis, axis, axis)
    vectors = offset @ crystals.to_atoms(crystals.cell)
    lengths = vectors.norm(dim=2)
    wrong = (lengths - crystals.to_atoms(cutoff)[:, None]).abs()
    wrong[first] = torch.inf
    error, image = wrong.masked_fill(lengths < 1e-3, torch.inf).min(dim=1)  # coincident atoms have no direction
    second = _best_per_system(error, crystals)
    vector, length = vectors[second, image[second]], lengths[second, image[second]]
    return _moving_atom(crystals, second, vector / length[:, None], cutoff - length)


def overlap(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """Two atoms pass through each other: their distance is |δ|."""
    return cross_cutoff(crystals, 0 * cutoff, n_neighbors, rng)


def approach(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """Two atoms come closer, from 0.5 Å down to 10⁻⁷ Å, in equal steps of the logarithm."""
    grid = torch.logspace(-7, np.log10(0.5), 34, dtype=torch.float64)[:, None]
    return replace(overlap(crystals, cutoff, n_neighbors, rng), grid=grid)


def strain(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """A random homogeneous strain moves the farthest lattice vector by δ, from a pair of atoms at the cutoff."""
    start, direction = cross_cutoff(crystals, cutoff, n_neighbors, rng).start, crystals.random_cells(rng)
    return _deforming(start, direction / (start.cell @ direction).norm(dim=2).amax(dim=1)[:, None, None])


def breathe(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """The crystal swells from a third to twice its volume: (V/N)^{1/3} grows by δ."""
    side = cutoff_radius(crystals, 1.0)
    grid = torch.linspace(-0.3, 0.27, 25, dtype=torch.float64)[:, None] * side
    return replace(_deforming(crystals, torch.eye(3, dtype=torch.float64) / side[:, None, None]), grid=grid)


def thin_cell(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """A cell squeezed to a plate of height (R + δ)/6: atoms see their own sixth image pass R."""
    length, axis = crystals.cell.norm(dim=2).min(dim=1)
    normal = crystals.cell[torch.arange(len(crystals)), axis] / length[:, None]
    along = normal[:, :, None] * normal[:, None, :]
    stretch = (cutoff / (6 * length))[:, None, None]
    plate = deform(crystals, stretch * along + stretch.rsqrt() * (torch.eye(3, dtype=torch.float64) - along))
    return _deforming(plate, along / cutoff[:, None, None])


def swap_neighbors(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """Neighbours number n and n + 1 of an atom change places: their distances differ by δ.

    Impossible where, for every atom, the two are images of one atom or the farther is an image of the atom itself.
    """
    noise = 0.03 * crystals.to_atoms(cutoff_radius(crystals, 1.0))[:, None] * crystals.random_atoms(rng)
    crystals = crystals.replace(positions=crystals.positions + noise)  # no ties left
    graph = nearest_neighbors(crystals, n_neighbors + 1)
    vectors = edge_vectors(crystals, graph).view(-1, n_neighbors + 1, 3)
    near, far = graph.target.view(-1, n_neighbors + 1)[:, -2:].unbind(dim=1)
    gap = vectors.norm(dim=2)[:, -1] - vectors.norm(dim=2)[:, -2]
    free = (far != torch.arange(len(far))) & (far != near)
    atom = _best_per_system(torch.where(free, gap, torch.inf), crystals)
    path = _moving_atom(crystals, far[atom], normalize(vectors[atom, -1], dim=1), -gap[atom])
    return replace(path, possible=free[atom])


def wander(crystals: Crystals, cutoff: Tensor, n_neighbors: int, rng: torch.Generator) -> Path:
    """A random atom moves in a random direction, by half an Å to either side."""
    direction = normalize(torch.randn(len(crystals), 3, generator=rng, dtype=torch.float64), dim=1)
    path = _moving_atom(crystals, _random_atom(crystals, rng), direction)
    return replace(path, grid=torch.linspace(-0.5, 0.5, 21, dtype=torch.float64)[:, None])


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


def enlarge(crystals: Crystals) -> Crystals:
    """Repeat each crystal along its shortest lattice vector until it has four atoms: single atoms can then move."""
    shortest = one_hot(crystals.cell.norm(dim=2).argmin(dim=1), 3)
    return supercell(crystals, torch.diag_embed(1 + (3 // crystals.n_atoms)[:, None] * shortest))


def _deforming(crystals: Crystals, direction: Tensor) -> Path:
    """Space is deformed by 1 + δ · direction (n_systems, 3, 3)."""
    return Path(crystals, crystals.cell @ direction, crystals.multiply_rows(crystals.positions, direction))


def _moving_atom(crystals: Crystals, atom: Tensor, direction: Tensor, offset: Tensor | None = None) -> Path:
    """One atom per crystal moves along a unit vector (n_systems, 3); at δ = 0 it is moved by ``offset`` already."""
    path = Path(crystals, 0 * crystals.cell, torch.zeros_like(crystals.positions).index_add(0, atom, direction))
    return path if offset is None else replace(path, start=path.at(offset))


def _random_atom(crystals: Crystals, rng: torch.Generator) -> Tensor:
    draw = torch.rand(len(crystals), generator=rng, dtype=torch.float64)
    return torch.cumsum(crystals.n_atoms, 0) - crystals.n_atoms + (draw * crystals.n_atoms).long()


def _best_per_system(score: Tensor, crystals: Crystals) -> Tensor:
    """(n_systems,) index of the atom with the lowest score (n_atoms_total,) in each crystal."""
    best = torch.stack([scores.argmin() for scores in score.split(crystals.n_atoms.tolist())])
    return torch.cumsum(crystals.n_atoms, 0) - crystals.n_atoms + best


def audit(
    energy: Energy | Calculator,
    structures: Crystals | Iterable[Structure],
    seed: int = 0,
    *,
    checks: Sequence[str] | None = None,
    cutoff: float | None = None,
    n_neighbors: int = 12,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the invariance and the continuity of an energy on the given crystals.

    Args:
        energy: a callable ``Crystals -> (n_systems,)``, energies per atom, or an ASE calculator, whose energy is
            divided by the number of atoms. A torch module is copied, cast to float64 and put in evaluation mode.
        structures: a batch, or pymatgen structures; ``material_id`` is read from their properties.
        checks: names from :data:`TRANSFORMATIONS` and :data:`PROBES`, all by default.
        cutoff: radius (Å) at which the energy cuts its graph. By default what the energy declares
            (``cutoff_radius(crystals)``; ``rc`` or ``cutoff`` of a calculator), else 3 (|det L| / N)^{1/3}.
        n_neighbors: the probe of neighbour order swaps neighbours number ``n_neighbors`` and ``n_neighbors + 1``.

    Returns:
        One row per check, about the crystal (``material_id``, ``index``) with the worst verdict and, among these, the
        largest change: ``kind`` (re-description, congruent or continuity); ``verdict``: ``invariant``, or ``changes``
        above the floor; ``continuous``, or ``jump`` if the exponent is below 1/2; ``below rounding`` where none can be
        measured; ``infinite``; ``impossible``; ``max_change``, |ΔE| (of probes over the shortest step, about 10⁻⁸ Å);
        ``floor``, what rounding may do to it: 10 times :func:`rounding_noise`, for transformations 200 times or more;
        for probes ``lipschitz``, the largest |ΔE|/δ (1/Å) above the floor, and ``exponent``, x in |ΔE| ∝ δˣ over the
        shortest two steps above it; ``n_checked`` crystals. ``attrs`` holds the seed; ``energy_std`` over the crystals,
        as a constant energy passes any audit; and ``profiles``, {probe: (steps, |ΔE|)} of these worst crystals.

    A ValueError tells of an unknown name, or of an energy of the wrong shape.
    """
    known = TRANSFORMATIONS | PROBES
    checks = list(known) if checks is None else list(checks)
    if unknown := [name for name in checks if name not in known]:
        raise ValueError(f"checks holds {unknown[0]!r}, expected names among {sorted(known)}")
    crystals, names = _as_batch(structures)
    function, rng = as_energy(energy), torch.Generator().manual_seed(seed)
    larger, rows = enlarge(crystals), []
    floor = MARGIN * rounding_noise(function, crystals, rng)
    with tqdm(total=len(crystals) * len(checks), unit="check", disable=not progress) as bar:
        for name in checks:
            if name in PROBES:
                path = PROBES[name](larger, graph_cutoff(energy, larger, cutoff), n_neighbors, rng)
                kind, found = "continuity", _continuity(function, path, floor, rng)
            else:
                transform, kind = TRANSFORMATIONS[name]
                found = _invariance(function, crystals, transform(crystals, rng), floor)
            found["severity"] = found["verdict"].map(VERDICTS.index)
            worst = found.sort_values(["severity", "max_change"], na_position="first").iloc[-1]
            row = {"check": name, "kind": kind, "material_id": names[worst.name], "index": worst.name}
            rows.append(row | {"n_checked": (found["verdict"] != "impossible").sum()} | worst.to_dict())
            bar.update(len(crystals))
    columns = "check kind verdict max_change floor lipschitz exponent material_id index n_checked"
    table = pd.DataFrame(rows, columns=columns.split())
    profiles = {row["check"]: row["profile"] for row in rows if "profile" in row}
    table.attrs = {"seed": seed, "energy_std": float(function(crystals).std(correction=0)), "profiles": profiles}
    return table


def as_energy(energy: Energy | Calculator) -> Energy:
    """``Crystals -> (n_systems,)``, in float64 and bounded memory, from a module, a callable or an ASE calculator."""
    if isinstance(energy, nn.Module):
        energy = copy.deepcopy(energy).cpu().double().eval().requires_grad_(False)
    elif hasattr(energy, "get_potential_energy"):
        energy = partial(_calculator_energy, energy)
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


def graph_cutoff(energy: Energy | Calculator, crystals: Crystals, cutoff: float | None = None) -> Tensor:
    """(n_systems,) radius at which an energy cuts its graph, Å: the one given, else as :func:`audit` says."""
    if cutoff is None and isinstance(settings := getattr(energy, "parameters", None), dict):  # of a calculator
        found = [settings.get(name) for name in ("rc", "cutoff")]
        cutoff = next((float(value) for value in found if isinstance(value, int | float | np.number) and value), None)
    if cutoff is None:
        return getattr(energy, "cutoff_radius", cutoff_radius)(crystals)
    return torch.full_like(crystals.volume, cutoff)


def rounding_noise(function: Energy, crystals: Crystals, rng: torch.Generator) -> Tensor:
    """(n_systems,) standard deviation of the rounding error of an energy, at least one unit in its last place.

    From fourth differences at twelve points 10⁻⁵ Å apart on a random line: slope and curvature cancel in them, errors
    of size σ leave √70 σ (Hamming's difference table; see Moré & Wild, SIAM J. Sci. Comput. 33, 1292 (2011)). The
    smaller of two lines, since one may cross a jump; the first point is left out, so none at the start is crossed.
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
    if path.grid is None:  # the larger of |E(δ) − E(0)| and |E(0) − E(−δ)|
        energies = path.energies(function, torch.cat([torch.zeros(1), DELTAS, -DELTAS])[:, None])
        change = _size(energies[1:] - energies[0]).unflatten(0, (2, -1)).amax(dim=0)
        place, width = torch.zeros_like(floor), DELTAS[:, None].expand_as(change)
    else:
        place, width, change = _search(function, path, path.grid, floor)
    floor = torch.maximum(floor, MARGIN * rounding_noise(function, path.at(place), rng))
    pairs = (change[1:] > floor) & (change[:-1] > floor)
    last = (pairs * torch.arange(len(pairs))[:, None]).amax(dim=0)
    exponent = (change.log().diff(dim=0) / width.log().diff(dim=0))[last, torch.arange(len(floor))]
    exponent = torch.where(pairs.any(dim=0) & exponent.isfinite(), exponent, torch.nan)
    verdict = np.where(exponent < 0.5, "jump", np.where(exponent >= 0.5, "continuous", "below rounding"))
    verdict = np.where((change == torch.inf).any(dim=0), "infinite", verdict)
    lipschitz = torch.where(change > floor, change / width, 0).amax(dim=0)
    table = pd.DataFrame({"max_change": change[-1], "floor": floor, "lipschitz": lipschitz, "exponent": exponent})
    possible = np.full(len(floor), True) if path.possible is None else path.possible.numpy()
    table[~possible] = np.nan
    verdict, profile = np.where(possible, verdict, "impossible"), zip(width.T.tolist(), change.T.tolist())
    return table.assign(verdict=verdict, profile=list(profile))


def _search(function: Energy, path: Path, grid: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zoom into the step whose slope stands out most from those beside it, again and again: place, widths, |ΔE|.

    A jump that is small against the bending of the energy over one step of ``grid`` can be missed.
    """
    grid, system = grid.expand(-1, len(floor)), torch.arange(len(floor))
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


def _as_batch(structures: Any) -> tuple[Crystals, list[str]]:
    if isinstance(structures, Crystals):
        return structures.to(torch.float64).to("cpu"), [str(index) for index in range(len(structures))]
    structures = [structures] if hasattr(structures, "lattice") else list(structures)
    names = [str((s.properties or {}).get("material_id", index)) for index, s in enumerate(structures)]
    return Crystals.from_structures(structures, dtype=torch.float64), names


def _calculator_energy(calculator: Any, crystals: Crystals) -> Tensor:
    """(n_systems,) energies per atom, one crystal after the other."""
    units = zip(crystals.species, crystals.positions.split(crystals.n_atoms.tolist()), crystals.cell)
    atoms = [Atoms(numbers, xyz.numpy(), cell=cell.numpy(), pbc=True) for numbers, xyz, cell in units]
    with np.errstate(all="ignore"), retold("the calculator fails", Exception, SystemExit):
        energies = [float(calculator.get_potential_energy(unit)) / len(unit) for unit in atoms]  # or infinite
    return torch.tensor(energies, dtype=torch.float64)
