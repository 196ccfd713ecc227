"""Time of the reduction that a sampler calls after every step, on 128 cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from contsp_core.lattice import niggli_reduce

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("n_unreduced", [0, 8, 128])
def test_niggli_reduce_128_cells(benchmark: BenchmarkFixture, n_unreduced: int) -> None:
    cell = 4 * torch.randn(128, 3, 3, generator=torch.Generator().manual_seed(0))
    mixed = torch.cat([cell[:n_unreduced], niggli_reduce(cell)[0][n_unreduced:]])
    reduced, _ = benchmark(niggli_reduce, mixed)
    assert reduced.shape == (128, 3, 3)
