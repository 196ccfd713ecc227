"""How the energy answers when one atom of a crystal moves: the numbers behind the paper's Figure 2."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from contsp_core.checkpoints import CHECKPOINTS
from contsp_core.crystals import Crystals
from contsp_core.data import DATASETS, load_split
from contsp_core.diffusion import add_noise
from contsp_core.invariance import evaluate_in_chunks
from contsp_core.notebook import limit_structures
from contsp_core.split import Split

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
    return split.select(limit_structures(rows, n_structures, seed))


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
