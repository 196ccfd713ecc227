"""How an energy answers when one atom of a crystal moves (the paper's Figure 2), or along one path of the audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contsp_core.crystals import Crystals
from contsp_core.energy import energy_and_gradient
from contsp_core.invariance import PROBES, as_energy, enlarge, graph_cutoff

Energy = Callable[[Crystals], Tensor]

N_SHELLS = 5
TOLERATED_SHARE = 0.01


def displacement_scan(
    energy: Energy, crystal: Crystals, atom: int, rng: torch.Generator, n_draws: int = 1000, sigma: float = 0.05
) -> pd.DataFrame:
    """Energies of a crystal with one atom, and its periodic images, displaced by Gaussian noise (paper, Figure 2).

    Args:
        energy: maps a batch to (n_systems,) energies.
        crystal: a batch of one, of at least two atoms: a lone atom can only be translated.
        atom: index of the atom that moves.
        rng: of the draws.
        n_draws: number of displacements.
        sigma: standard deviation of each Cartesian component, Å; the paper uses 0.05.

    Returns:
        Columns ``displacement`` (its length, Å) and ``energy``; the first row is the undisturbed crystal.

    Raises:
        ValueError: on more than one crystal, a crystal of one atom, an atom that does not exist, or a size ≤ 0.
    """
    n_atoms = len(crystal.positions)
    if len(crystal) != 1 or n_atoms < 2:
        raise ValueError(f"crystal is {len(crystal)} crystals of {n_atoms} atoms, expected 1 of at least 2")
    if not 0 <= atom < n_atoms:
        raise ValueError(f"atom is {atom}, expected 0 … {n_atoms - 1}")
    if n_draws < 1 or not sigma > 0:
        raise ValueError(f"n_draws is {n_draws} and sigma is {sigma}, expected both > 0")
    draws = sigma * torch.randn(n_draws, 3, generator=rng, dtype=torch.float64)
    draws = torch.cat([torch.zeros(1, 3, dtype=draws.dtype), draws])
    copies = crystal.to(torch.float64)[[0] * len(draws)]
    moved = copies.positions.clone()
    moved[atom::n_atoms] += draws
    energies = as_energy(energy)(copies.replace(positions=moved))
    return pd.DataFrame({"displacement": draws.norm(dim=1), "energy": energies})


def describe_response(scan: pd.DataFrame) -> dict[str, float | str]:
    """Which of the two behaviours of the paper a scan shows.

    The draws are sorted by the length of the displacement and cut into five shells with equally many. The energy
    ``only rises`` if the mean energy grows from the undisturbed crystal to the first shell and from shell to shell,
    and at most 1 % of the draws lie below the undisturbed crystal. It ``only falls`` if the same holds for its
    negative; everything else ``rises and falls``.

    Returns:
        ``share_above``: share of the draws above the undisturbed crystal; ``range``: largest minus smallest energy;
        ``behaviour``.

    Raises:
        ValueError: with fewer draws than shells.
    """
    draws = scan.iloc[1:].sort_values("displacement")
    if len(draws) < N_SHELLS:
        raise ValueError(f"scan has {len(draws)} draws, expected at least {N_SHELLS}")
    change = draws["energy"].to_numpy() - float(scan["energy"].iloc[0])
    growth = np.diff([0.0, *(shell.mean() for shell in np.array_split(change, N_SHELLS))])
    behaviour = "rises and falls"
    for sign, name in ((1, "only rises"), (-1, "only falls")):
        if (sign * growth > 0).all() and (sign * change > 0).mean() >= 1 - TOLERATED_SHARE:
            behaviour = name
    return {"share_above": float((change > 0).mean()), "range": float(np.ptp(scan["energy"])), "behaviour": behaviour}


def classify_curves(
    energy: Energy, crystals: Crystals, atoms: Sequence[int], sigma: float = 0.05, step: float = 1e-3
) -> pd.DataFrame:
    """What the energy of each crystal does when one atom moves, to second order: ΔE = g·d + ½ d·H·d.

    Gaussian displacements d give the mean of ΔE² as σ²|g|² + σ⁴ (½ tr H² + ¼ (tr H)²). Where the first term is more
    than half of it the curve is a ``cone``: the crystal is at no minimum. Else it is a ``minimum`` where all three
    curvatures are positive, and a ``saddle`` where not.

    Args:
        energy: maps a batch to (n_systems,) energies; differentiable.
        crystals: in float64.
        atoms: for each crystal the index of the atom that moves.
        sigma: standard deviation of each Cartesian component of d, Å.
        step: of the differences of g that give H, Å.

    Returns:
        Columns ``curve``; ``slope``, |g| (1/Å); ``curvature``, the smallest (1/Å²); ``slope_share``, 0 … 1; ``offset``,
        |H⁻¹g|, how far from the atom the minimum is (Å; missing where there is none).
    """
    moving = torch.cumsum(crystals.n_atoms, 0) - crystals.n_atoms + torch.as_tensor(atoms)

    def gradient(shift: Tensor) -> Tensor:
        positions = crystals.positions.index_add(0, moving, shift.expand(len(moving), 3))
        return energy_and_gradient(energy, crystals.replace(positions=positions))[2][moving]

    axes = step * torch.eye(3, dtype=crystals.positions.dtype)
    slope = gradient(0 * axes[0])
    hessian = torch.stack([gradient(axis) - gradient(-axis) for axis in axes], dim=1) / (2 * step)
    hessian = (hessian + hessian.mT) / 2
    curvatures = torch.linalg.eigvalsh(hessian)
    linear = sigma**2 * slope.square().sum(dim=1)
    quadratic = sigma**4 * (curvatures.square().sum(dim=1) / 2 + curvatures.sum(dim=1) ** 2 / 4)
    table = pd.DataFrame({"slope": slope.norm(dim=1), "curvature": curvatures[:, 0]})
    table["slope_share"] = (linear / (linear + quadratic).clamp(min=1e-300)).numpy()
    cone, rises = table["slope_share"] > 0.5, table["curvature"] > 0
    table.insert(0, "curve", np.select([cone, rises], ["cone", "minimum"], "saddle"))
    offset = torch.linalg.lstsq(hessian, slope.unsqueeze(-1)).solution.norm(dim=(1, 2))
    return table.assign(offset=np.where(rises, offset, np.nan))


def continuity_profile(
    energy: Any,
    crystal: Crystals,
    deltas: Sequence[float],
    probe: str = "atom crosses the cutoff",
    seed: int = 0,
    cutoff: float | None = None,
) -> pd.DataFrame:
    """The energy of one crystal along one path of :data:`PROBES`.

    Args:
        energy: a module, a callable or an ASE calculator, as for :func:`contsp_core.invariance.audit`.
        crystal: a batch of one.
        deltas: displacements from the event, Å, of either sign.
        probe: which path.
        seed: of the pair of atoms, where the probe chooses one.
        cutoff: radius of the graph, Å; by default that of the energy.

    Returns:
        Columns ``delta`` (Å), ``energy`` and ``change``, |E(δ) − E(0)|.

    Raises:
        ValueError: on an unknown probe, one that is impossible for this crystal, or more than one crystal.
    """
    if probe not in PROBES:
        raise ValueError(f"probe is {probe!r}, expected one of {sorted(PROBES)}")
    if len(crystal) != 1:
        raise ValueError(f"crystal holds {len(crystal)} crystals, expected one")
    larger, rng = enlarge(crystal.to(torch.float64)), torch.Generator().manual_seed(seed)
    path = PROBES[probe](larger, graph_cutoff(energy, larger, cutoff), 12, rng)
    if path.possible is not None and not path.possible.all():
        raise ValueError(f"probe {probe!r} is impossible for this crystal, expected another crystal or probe")
    displacements = torch.tensor([0.0, *deltas], dtype=torch.float64)[:, None]
    values = path.energies(as_energy(energy), displacements)[:, 0].numpy()
    return pd.DataFrame({"delta": deltas, "energy": values[1:], "change": np.abs(values[1:] - values[0])})
