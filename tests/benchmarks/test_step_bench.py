"""Time of a sampling step and of its parts: fused kernels, plain torch and the literal reference, at three sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from literal_energy import LiteralEnergy, directed_edges
from performance import perovskite_like, step_function

from contsp_core import Crystals
from contsp_core.energy import PRESETS, energy_and_gradient
from contsp_core.graph import build_graph, cutoff_radius
from contsp_core.lattice import niggli
from contsp_core.training import initial_model

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

pytestmark = pytest.mark.benchmark(timer=time.process_time, min_rounds=5, max_time=0.5, warmup=True)
SIZES = pytest.mark.parametrize("crystals", [8, 32, 128], indirect=True)
PATHS = pytest.mark.parametrize("path", ["fused", "plain", "literal"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Processor time of several threads would add up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def crystals(request: pytest.FixtureRequest) -> Crystals:
    """Perovskite-like crystals of 5 atoms, the unit of the paper's Perov-5 settings."""
    return perovskite_like(request.param)


def energy(path: str, crystals: Crystals) -> Callable[[Crystals], torch.Tensor]:
    """The paper's energy for Perov-5 with random weights, computed in one of three ways."""
    model = initial_model(crystals, PRESETS["perov5"], seed=0).eval().requires_grad_(False)
    model.use_kernels = path == "fused"
    return LiteralEnergy(model) if path == "literal" else model


def run(
    benchmark: BenchmarkFixture, operation: str, path: str, crystals: Crystals, function: Callable[[], object]
) -> None:
    """Time a function under a name that the table of ratios knows."""
    benchmark.group = f"{operation}, {crystals.n_systems} crystals"
    benchmark.extra_info.update(operation=operation, path=path, n_systems=crystals.n_systems)
    benchmark(function)


@SIZES
@PATHS
def test_energy_and_gradient(benchmark: BenchmarkFixture, path: str, crystals: Crystals) -> None:
    function = energy(path, crystals)
    run(benchmark, "energy and gradient", path, crystals, lambda: energy_and_gradient(function, crystals))


@SIZES
@PATHS
def test_graph(benchmark: BenchmarkFixture, path: str, crystals: Crystals) -> None:
    edges = pytest.importorskip("contsp_core.kernels")
    build = {"fused": edges.build_edges, "plain": build_graph, "literal": directed_edges}[path]
    run(benchmark, "graph", path, crystals, lambda: build(crystals, cutoff_radius(crystals)))


@SIZES
def test_reduction(benchmark: BenchmarkFixture, crystals: Crystals) -> None:
    sheared = crystals.replace(cell=torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 1]]) @ crystals.cell)
    run(benchmark, "reduction", "fused", crystals, lambda: niggli(sheared))


@SIZES
@PATHS
def test_full_step(benchmark: BenchmarkFixture, path: str, crystals: Crystals) -> None:
    run(benchmark, "full step", path, crystals, step_function(energy(path, crystals), crystals))
