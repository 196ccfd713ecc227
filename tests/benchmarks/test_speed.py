"""Time of what training and sampling consist of: compiled, in plain torch, and as the definition reads."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import spglib
import torch
from literal_energy import LiteralEnergy
from timing import perovskite_like, step_function

from contsp_core import Crystals
from contsp_core.diffusion import score_matching_step
from contsp_core.energy import NOISE_LEVELS, PRESETS, EnergyConfig, energy_and_gradient
from contsp_core.lattice import niggli_reduce
from contsp_core.training import initial_model

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=time.process_time, min_rounds=5, max_time=0.5, warmup=True)
SIZES = pytest.mark.parametrize("n_systems", [8, 128])
GPU = pytest.param("gpu", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
PATHS = pytest.mark.parametrize("path", ["fused", GPU, "plain", "literal"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Processor time of several threads would add up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_and_crystals(path: str, n_systems: int, config: EnergyConfig = PRESETS["perov5"]) -> tuple:
    """Random weights, and crystals of 5 atoms, the unit of the paper's Perov-5 settings."""
    crystals = perovskite_like(n_systems)
    model = initial_model(crystals, config, seed=0).eval()
    model.use_kernels = path == "fused"
    if path == "gpu":
        model, crystals = model.to("cuda"), crystals.to("cuda")
    return (LiteralEnergy(model) if path == "literal" else model.requires_grad_(False)), crystals


def run(benchmark: BenchmarkFixture, path: str, crystals: Crystals, operation: str, function: Callable) -> None:
    """Time a function under a name that the table of ratios knows."""
    benchmark.group = f"{operation}, {len(crystals)} crystals"
    benchmark.extra_info.update(operation=operation, path=path, n_systems=len(crystals))
    if path == "gpu":
        benchmark(lambda: (function(), torch.cuda.synchronize()))  # which spins, so that processor time is time
    else:
        benchmark(function)


@SIZES
@PATHS
def test_energy_and_gradient(benchmark: BenchmarkFixture, path: str, n_systems: int) -> None:
    energy, crystals = model_and_crystals(path, n_systems)
    run(benchmark, path, crystals, "energy and gradient", lambda: energy_and_gradient(energy, crystals))


@SIZES
@PATHS
def test_mala_step(benchmark: BenchmarkFixture, path: str, n_systems: int) -> None:
    energy, crystals = model_and_crystals(path, n_systems)
    run(benchmark, path, crystals, "MALA step", step_function(energy, crystals))


@SIZES
@pytest.mark.parametrize("path", ["fused", GPU, "plain"])
def test_score_matching_step(benchmark: BenchmarkFixture, path: str, n_systems: int) -> None:
    """At width 96, without the optimiser."""
    model, crystals = model_and_crystals(path, n_systems, NOISE_LEVELS)
    model.requires_grad_(True).train()
    sigma, rng = torch.full_like(crystals.volume, 0.2), torch.Generator().manual_seed(0)
    run(benchmark, path, crystals, "score matching step", lambda: score_matching_step(model, crystals, sigma, rng))


def by_spglib(cells: torch.Tensor) -> int:
    """How many cells it reduces; it takes one at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces a change of its error handling
        return sum(spglib.niggli_reduce(cell, 1e-5) is not None for cell in cells.double().numpy())


@SIZES
@pytest.mark.parametrize("path", ["ours", "spglib"])
def test_lattice_reduction(benchmark: BenchmarkFixture, path: str, n_systems: int) -> None:
    """Of cells that have moved as far as in a MALA step."""
    crystals = perovskite_like(n_systems)
    crystals = crystals.replace(cell=crystals.cell + 0.18 * torch.randn(n_systems, 3, 3))
    reduce = niggli_reduce if path == "ours" else by_spglib
    run(benchmark, path, crystals, "lattice reduction", lambda: reduce(crystals.cell))


def test_spglib_depends_on_the_basis_where_the_lattice_is_nearly_symmetric(
    benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture
) -> None:
    """Why the reduction is our own: a crystal has one Niggli cell, whichever cell it is described by."""
    from test_lattice import nearly_symmetric_cells_that_depend_on_the_basis

    counts = benchmark.pedantic(nearly_symmetric_cells_that_depend_on_the_basis, (10_000,), rounds=1)
    with capsys.disabled():
        print(f"\nof 10 000 lattices within 1e-5 of a symmetric one, so many have two Niggli cells: {counts}")
    assert counts["ours"] == 0
