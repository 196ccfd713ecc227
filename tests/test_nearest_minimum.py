"""What a descent did to a crystal, and what an energy does when one atom moves, on functions that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from displacement import classify_curves, displacement_scan
from nearest_minimum import draw_minima, moved_by, nearest_minima
from pymatgen.core import Lattice, Structure

from contsp_core import Crystals
from contsp_core.crystals import keyed_rng
from contsp_core.energy import EnergyConfig
from contsp_core.lattice import niggli

STRAIN = np.diag([0.02, -0.01, 0.0])
SHIFT = np.array([[0.3, -0.1, 0.2]] * 4) + np.array([[0.1, 0, 0], [-0.1, 0, 0], [0, 0.1, 0], [0, -0.1, 0]])


def four_atoms() -> Structure:
    lattice = Lattice.from_parameters(4.0, 4.6, 5.3, 84, 78, 71)
    return Structure(lattice, ["Na", "Na", "Cl", "Cl"], [[0.1, 0, 0], [0.5, 0.5, 0.4], [0.98, 0.5, 0.2], [0.4, 0, 0.7]])


@pytest.mark.parametrize("described_anew", [False, True])
def test_a_known_strain_and_displacement_are_found_again(described_anew):
    start = four_atoms()
    cell = start.lattice.matrix @ np.diag(np.exp(np.diag(STRAIN)))
    rotation = np.array([[np.cos(0.05), np.sin(0.05), 0], [-np.sin(0.05), np.cos(0.05), 0], [0, 0, 1]])
    positions = start.frac_coords @ cell + SHIFT
    basis = np.array([[1, 1, 0], [0, 1, 0], [-1, 0, 1]]) if described_anew else np.eye(3)
    end = Structure(Lattice(basis @ cell @ rotation), start.species, positions @ rotation, coords_are_cartesian=True)
    end = Structure(end.lattice, end.species, end.frac_coords % 1)
    assert moved_by(start, end) == pytest.approx((0.1, np.sqrt((STRAIN**2).sum())), rel=1e-6)


def test_another_lattice_is_told():
    start = four_atoms()
    with pytest.raises(ValueError, match="expected a change of basis"):
        moved_by(start, Structure(Lattice(2 * start.lattice.matrix), start.species, start.frac_coords))


SIDE = 30.3 ** (1 / 3)


class Spring(torch.nn.Module):
    """Zero at 30 Å³ and a fractional distance of 1 / SIDE of the two atoms, which no strain changes."""

    noise_features, config, use_kernels = None, EnergyConfig(), True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, crystals):
        gap = SIDE * (crystals.frac_coords[1::2] - crystals.frac_coords[::2])
        return (crystals.volume / 30).log() ** 2 + (gap.norm(dim=1) - 1) ** 2


def test_descent_of_a_spring_moves_as_far_as_the_spring_is_stretched():
    stretched = Structure(Lattice.cubic(SIDE), ["Na", "Cl"], [[0.3, 0.3, 0.3], [0.3 + 1.2 / SIDE, 0.3, 0.3]])
    (row,) = nearest_minima(Spring(), [stretched], 200).to_dict("records")
    assert row["displacement"] == pytest.approx(0.1, rel=0.02)  # each atom half of 0.2 Å
    assert row["strain"] == pytest.approx(np.log(30.3 / 30) / np.sqrt(3), rel=0.1)
    assert row["drop"] == pytest.approx(0.2**2 + np.log(30.3 / 30) ** 2, rel=0.01)
    assert row["late"] < 0.01
    table = nearest_minima(Spring(), [stretched] * 3, 4).assign(dataset="perov5")
    assert [len(ax.lines[0].get_ydata()) for ax in draw_minima(table).axes] == [3] * 3


H = torch.tensor([[3.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 2.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("curve", "slope", "hessian"),
    [("minimum", 0.02, H), ("cone", 2.0, H), ("saddle", 0.02, H - 2 * torch.eye(3)), ("saddle", 0.0, -H)],
)
def test_curve_of_a_known_function_is_named_and_its_draws_have_the_mean_square_stated(curve, slope, hessian):
    crystals = niggli(Crystals.from_structures([four_atoms()] * 2, torch.float64))
    g = slope * torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64)

    def energy(moved):
        d = moved.positions.view(-1, 4, 3)[:, 2] - crystals.positions[2]
        return d @ g + 0.5 * ((d @ hessian) * d).sum(dim=1)

    found = classify_curves(energy, crystals, [2, 1])
    assert list(found["curve"]) == [curve, "saddle"]  # an atom that does not enter has no curvature
    assert found["slope"][0] == pytest.approx(slope)
    assert found["curvature"][0] == pytest.approx(np.linalg.eigvalsh(hessian)[0])
    if np.linalg.eigvalsh(hessian)[0] > 0:
        assert found["offset"][0] == pytest.approx(float(torch.linalg.solve(hessian, g).norm()))
    draws = displacement_scan(energy, crystals[0], 2, keyed_rng(0), 40_000)["energy"].iloc[1:]
    assert found["slope_share"][0] == pytest.approx((0.05 * slope) ** 2 / (draws**2).mean(), rel=0.05, abs=1e-12)
