"""Hypothesis strategies: random crystals, ordinary and extreme."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from contsp_core import Crystals

CELL_SHAPES = ("cubic", "hexagonal", "skewed", "needle", "plate", "left-handed")
DENSITIES = (1e-4, 0.05, 5.0)  # Å⁻³: a gas, a solid, a hundred times a solid
MAX_ATOMS = 20


def make_cell(shape: str, rng: np.random.Generator) -> np.ndarray:
    """A cell (3, 3) of a named shape, rows are lattice vectors, any volume."""
    if shape == "cubic":
        return np.eye(3)
    if shape == "hexagonal":
        return np.array([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, 1.6]])
    if shape == "skewed":
        return np.eye(3) + np.tril(rng.uniform(-3, 3, (3, 3)), -1)
    if shape == "needle":
        return np.diag([1, 1, 8.0]) + 0.1 * rng.standard_normal((3, 3))
    if shape == "plate":
        return np.diag([5, 5, 0.5]) + 0.05 * rng.standard_normal((3, 3))
    return np.diag([1, 1, -1]) + 0.1 * rng.standard_normal((3, 3))


@st.composite
def crystals(draw: st.DrawFn, dtype: torch.dtype = torch.float64, densities: tuple[float, ...] = DENSITIES) -> Crystals:
    """One crystal: 1 … 20 atoms of at most three species, some or all of them on cell faces, edges and corners."""
    n_atoms = draw(st.integers(1, MAX_ATOMS), label="n_atoms")
    shape = draw(st.sampled_from(CELL_SHAPES), label="shape")
    density = draw(st.sampled_from(densities), label="density")
    species = draw(st.lists(st.integers(1, 100), min_size=1, max_size=3), label="species")
    on_faces = draw(st.sampled_from((0.0, 0.5, 1.0)), label="share of coordinates 0 or 1/2")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    cell = make_cell(shape, rng)
    cell *= (n_atoms / density / abs(np.linalg.det(cell))) ** (1 / 3)
    frac_coords = rng.random((n_atoms, 3))
    special = rng.random((n_atoms, 3)) < on_faces
    frac_coords[special] = rng.choice([0.0, 0.5, 1.0], size=special.sum())
    _, first = np.unique(frac_coords % 1, axis=0, return_index=True)
    repeated = np.setdiff1d(np.arange(n_atoms), first)
    frac_coords[repeated] = rng.random((len(repeated), 3))  # a solid is a set: no two atoms at one point
    return Crystals.from_arrays(cell[None], frac_coords @ cell, [rng.choice(species, n_atoms).tolist()], dtype)


def generators() -> st.SearchStrategy[torch.Generator]:
    """Seeded torch generators."""
    return st.integers(0, 2**31 - 1).map(lambda seed: torch.Generator().manual_seed(seed))
