"""Audit of any energy: is it invariant to the description of a crystal, and is it continuous?

Invariance: the energy before and after each entry of :data:`contsp_core.transformations.TRANSFORMATIONS`.
Continuity: the change of the energy over shorter and shorter steps δ along paths (:mod:`contsp_core.probes`) that
cross the places where graph-based energies tend to break. All in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from contsp_core.crystals import Crystals
from contsp_core.graph import cutoff_radius
from contsp_core.probes import PROBES, Path
from contsp_core.transformations import TRANSFORMATIONS

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator
    from pymatgen.core import Structure

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
