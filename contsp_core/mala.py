"""The paper's sampler: Metropolis-adjusted Langevin (MALA) on p(L, X | a) ∝ exp(−E / T), annealed (arXiv 2502.02026).

``mala_step`` advances a batch of independent chains, ``anneal`` cools them. Two proposals leave the same law invariant:

``cartesian`` (the paper's): y′ = y − η ∇E(y) / T + √(2η) ξ on y = (L, X).

``strain``: L′ = L exp(ε), x′ = x exp(ε) + δ, with ε symmetric. It acts on space instead of on a description, so the law
of the chain on solids does not depend on the cell, the orientation or the order of the atoms.

| symbol | variable                        | symbol | variable                                  |
| ------ | ------------------------------- | ------ | ----------------------------------------- |
| η, η_c | step (n_systems, 2): cell, atoms | ε, δ   | move.cell, move.positions                 |
| T      | temperature (n_systems,)        | ∂E/∂ε  | grad_strain, at fixed fractional positions |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from contsp_core.crystals import Crystals, Rng, check_settings, random_rows
from contsp_core.energy import energy_and_gradient
from contsp_core.lattice import apply_strain, niggli

MIN_ATOMIC_VOLUME = 1e-2  # Å³; the law is restricted to larger volumes per atom,
MAX_LENGTH = 30.0  # and to lattices whose longest reduced vector is shorter, in units of V^{1/3} (in data sets ≤ 5.7)

Energy = Callable[[Crystals], Tensor]
Proposal = Literal["cartesian", "strain"]
Measure = Literal["cartesian", "invariant"]


@dataclass(frozen=True)
class ChainState:
    """A batch of chains: where they are, the energy there, and its gradients."""

    crystals: Crystals  # Niggli-reduced and wrapped
    energy: Tensor  # (n_systems,), dimensionless
    grad_strain: Tensor  # (n_systems, 3, 3) ∂E/∂ε of L exp(ε) at fixed fractional coordinates, for any description
    grad_positions: Tensor  # (n_atoms_total, 3) ∂E/∂X, Å⁻¹
    accepted: Tensor  # (n_systems,) bool, whether the last proposal was accepted
    n_nonfinite: Tensor  # (n_systems,) proposals so far rejected for a cell beyond these limits, or a number not finite


@dataclass(frozen=True)
class AnnealConfig:
    """Annealed MALA; the defaults are the paper's."""

    n_steps: int = 1000
    step_first: float = 0.5  # η, Å²
    step_last: float = 5e-4
    temperature_first: float = 1.0
    temperature_last: float = 1e-3
    proposal: Proposal = "cartesian"
    measure: Measure = "cartesian"
    cell_step_ratio: float = 1.0  # η_c / η; the paper moves cell and atoms with one step size

    def __post_init__(self) -> None:
        check_settings(self)


# one law for any basis and orientation, in which volumes do not count by themselves; a strain of 1 moves atoms by Å
STRAIN = AnnealConfig(proposal="strain", measure="invariant", cell_step_ratio=0.04)


def mala_init(energy: Energy, crystals: Crystals) -> ChainState:
    """Reduce the cells, wrap the atoms and evaluate the energy and its gradients once."""
    return begin(energy, niggli(crystals))


def begin(energy: Energy, crystals: Crystals) -> ChainState:
    """A chain at crystals that are reduced and wrapped."""
    never = torch.zeros_like(crystals.n_atoms)
    return ChainState(crystals, *energy_and_gradient(energy, crystals), never.bool(), never)


def mala_step(
    energy: Energy,
    state: ChainState,
    step: Tensor,
    temperature: Tensor,
    rng: Rng,
    proposal: Proposal = "cartesian",
    measure: Measure = "cartesian",
) -> ChainState:
    """One Metropolis-adjusted Langevin step of each chain; what is beyond limits or not finite is rejected and counted.

    ``step`` (n_systems, 2) is η of the cell (Å² or, for strain, dimensionless) and of the positions (Å²), and
    ``temperature`` (n_systems,) is T: chains at different stages may share a batch. ``rng``, on the CPU, is one
    generator, or one a chain. ``measure`` is the base measure of the target exp(−E / T): ``cartesian`` is dL dX (the
    paper's), ``invariant`` is |det L|⁻³ dL d(frac), which no choice of basis or orientation changes.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure is {measure!r}, expected one of {', '.join(get_args(Measure))}")
    move = draw_move(state, proposal, step, temperature, rng)
    moved, new, sound = try_move(energy, state, move, proposal)
    back = reverse_move(state.crystals, moved, new.crystals, move, proposal)
    forward = log_move_density(move, mean_move(state, proposal, step, temperature), step, moved)
    backward = log_move_density(back, mean_move(new, proposal, step, temperature), step, moved)
    log_ratio = (state.energy - new.energy) / temperature + backward - forward
    log_ratio = log_ratio + log_measure_ratio(state.crystals, new.crystals, proposal, measure)
    return accept(state, new, log_ratio, sound, rng)


def anneal(
    energy: Energy,
    crystals: Crystals,
    config: AnnealConfig,
    rng: Rng,
    on_step: Callable[[int, ChainState], None] | None = None,
    start: Tensor | None = None,
) -> ChainState:
    """Lower step size and temperature together along geometric schedules, as the paper does.

    ``on_step(index, state)`` is called after every step, for progress bars and records; ``start``, (n_systems,) in
    [0, 1), is how far down its schedules each chain begins (default 0). For the others see :func:`mala_step`.
    """
    state = mala_init(energy, crystals)
    ratio = torch.tensor([config.cell_step_ratio, 1.0]).to(crystals.cell)
    start = torch.zeros_like(state.energy) if start is None else start.to(state.energy)
    for index in range(config.n_steps):
        progress = start + (1 - start) * (index / max(1, config.n_steps - 1))
        step = config.step_first * (config.step_last / config.step_first) ** progress
        temperature = config.temperature_first * (config.temperature_last / config.temperature_first) ** progress
        state = mala_step(energy, state, step[:, None] * ratio, temperature, rng, config.proposal, config.measure)
        if on_step is not None:
            on_step(index, state)
    return state


class Move(NamedTuple):
    """A proposed change: ``cell`` and ``positions`` increments (cartesian) or ``strain`` and ``positions`` (strain)."""

    cell: Tensor  # (n_systems, 3, 3), Å or dimensionless strain
    positions: Tensor  # (n_atoms_total, 3), Å


def draw_move(state: ChainState, proposal: Proposal, step: Tensor, temperature: Tensor, rng: Rng) -> Move:
    """Langevin proposal: mean −η ∇E / T and variance 2η along every independent direction; see :func:`mala_step`."""
    mean = mean_move(state, proposal, step, temperature)
    crystals, scale = state.crystals, (2 * step).sqrt()
    cell = scale[:, 0, None, None] * crystals.random_cells(rng, symmetric=proposal == "strain")
    positions = crystals.to_atoms(scale[:, 1:]) * crystals.random_atoms(rng)
    return Move(mean.cell + cell, mean.positions + positions)


def mean_move(state: ChainState, proposal: Proposal, step: Tensor, temperature: Tensor) -> Move:
    """The drift −η ∇E / T of :func:`draw_move`."""
    if proposal == "cartesian":
        gradient = cell_gradient(state)
    elif proposal == "strain":
        gradient = (state.grad_strain + state.grad_strain.mT) / 2
    else:
        raise ValueError(f"proposal is {proposal!r}, expected 'cartesian' or 'strain'")
    drift = -step / temperature[:, None]
    return Move(drift[:, 0, None, None] * gradient, state.crystals.to_atoms(drift[:, 1:]) * state.grad_positions)


def cell_gradient(state: ChainState) -> Tensor:
    """(n_systems, 3, 3) ∂E/∂L at fixed Cartesian positions, recovered for the description the state has now."""
    atoms = state.crystals.positions[:, :, None] * state.grad_positions[:, None, :]
    return torch.linalg.solve(state.crystals.cell.mT, state.grad_strain - state.crystals.sum_atoms(atoms))


def apply_move(crystals: Crystals, move: Move, proposal: Proposal) -> Crystals:
    """The proposed crystals, neither reduced nor wrapped."""
    if proposal == "cartesian":
        return crystals.replace(cell=crystals.cell + move.cell, positions=crystals.positions + move.positions)
    return apply_strain(crystals, move.cell, move.positions)


def try_move(energy: Energy, state: ChainState, move: Move, proposal: Proposal) -> tuple[Crystals, ChainState, Tensor]:
    """The proposed crystals, a chain there, and (n_systems,) which are finite and not flat; the others do not move."""
    moved = apply_move(state.crystals, move, proposal)
    n_broken, volume = moved.sum_atoms((~moved.positions.isfinite()).any(dim=1).long()), moved.volume
    sound = volume.isfinite() & (volume > MIN_ATOMIC_VOLUME * moved.n_atoms) & (n_broken == 0)
    reduced = niggli(where(sound, moved, state.crystals))
    sound &= reduced.cell.norm(dim=2).amax(dim=1) < MAX_LENGTH * volume.nan_to_num() ** (1 / 3)
    new = where(sound, reduced, state.crystals)
    return where(sound, moved, state.crystals), begin(energy, new), sound


def log_move_density(move: Move, mean: Move, step: Tensor, crystals: Crystals) -> Tensor:
    """(n_systems,) log q(move) = −|move − mean|² / 4η, up to a constant that is the same for the reverse move."""
    cell = (move.cell - mean.cell).square().sum(dim=(1, 2)) / step[:, 0]
    positions = crystals.sum_atoms((move.positions - mean.positions).square().sum(dim=1)) / step[:, 1]
    return -(cell + positions) / 4


def reverse_move(old: Crystals, moved: Crystals, new: Crystals, move: Move, proposal: Proposal) -> Move:
    """The move from ``new`` (the reduced and wrapped ``moved``) back to ``old``.

    For strain it is (−ε, −δ exp(−ε)), in any description. A Cartesian move depends on the description: the way back
    starts in the basis and with the images of ``new``, so it must lead to ``old`` described in the same basis and
    images. Taking −(ΔL, ΔX) instead, as if the cell had not been reduced, would sample another law.
    """
    if proposal == "strain":
        return Move(-move.cell, -old.multiply_rows(move.positions, torch.linalg.matrix_exp(-move.cell)))
    transform = torch.linalg.solve(moved.cell, new.cell, left=False).round()  # new.cell = transform @ moved.cell
    images = old.multiply_rows(new.positions - moved.positions, torch.linalg.inv(new.cell)).round()
    cell = -transform @ move.cell
    return Move(cell, old.multiply_rows(images, cell) - move.positions)


def log_measure_ratio(old: Crystals, new: Crystals, proposal: Proposal, measure: Measure) -> Tensor:
    """(n_systems,) log of the volume factors in the acceptance ratio.

    A strain move preserves |det L|⁻³ dL and scales displacements by det L / det L′ per atom on the way back; a
    Cartesian move preserves dL dX. The two measures differ by |det L|^{N+3}.
    """
    log_ratio = torch.log(new.volume / old.volume)
    if proposal == "strain":
        return 3 * log_ratio if measure == "cartesian" else -old.n_atoms * log_ratio
    return 0 * log_ratio if measure == "cartesian" else -(old.n_atoms + 3) * log_ratio


def metropolis(log_ratio: Tensor, rng: Rng) -> Tensor:
    """(n_systems,) bool: accept with probability min(1, exp(log_ratio)); NaN is a rejection."""
    uniform = random_rows(torch.rand, [1] * len(log_ratio), rng, torch.float64, width=1)[:, 0]
    return uniform.to(log_ratio.device).log() < log_ratio


def accept(state: ChainState, new: ChainState, log_ratio: Tensor, sound: Tensor, rng: Rng) -> ChainState:
    """``new`` with probability min(1, exp(log_ratio)) where all numbers are finite, elsewhere ``state``."""
    finite = sound & new.energy.isfinite() & (log_ratio.isfinite() | (log_ratio == torch.inf))
    accepted = metropolis(log_ratio, rng) & finite
    crystals, value = where(accepted, new.crystals, state.crystals), torch.where(accepted, new.energy, state.energy)
    grad_strain = torch.where(accepted[:, None, None], new.grad_strain, state.grad_strain)
    grad_positions = torch.where(new.crystals.to_atoms(accepted)[:, None], new.grad_positions, state.grad_positions)
    return ChainState(crystals, value, grad_strain, grad_positions, accepted, state.n_nonfinite + (~finite).long())


def where(chosen: Tensor, new: Crystals, old: Crystals) -> Crystals:
    """Per system: the new geometry where chosen, the old one elsewhere."""
    positions = torch.where(old.to_atoms(chosen)[:, None], new.positions, old.positions)
    return old.replace(cell=torch.where(chosen[:, None, None], new.cell, old.cell), positions=positions)
