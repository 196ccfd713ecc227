"""What the performance notebook rests on: counts against a plain listing, clocks and memory against known sizes."""

from __future__ import annotations

import math
import time

import performance as perf
import pytest
import torch
from literal_energy import directed_edges

from contsp_core.energy import PRESETS, ContinuousCGCNN, EnergyConfig
from contsp_core.graph import cutoff_radius
from contsp_core.sampler import bytes_per_atom


def test_counted_edges_are_half_of_all_directed_edges_and_among_the_candidates():
    crystals = perf.random_packing([1, 4, 7], skew=2)
    radius = cutoff_radius(crystals)
    n_edges = perf.count_edges(crystals, EnergyConfig())
    assert 2 * n_edges == len(directed_edges(crystals, radius)[0])
    assert perf.count_candidates(crystals, radius) > n_edges


def test_the_skew_changes_the_description_but_not_the_edges():
    counts = [perf.count_edges(perf.random_packing([6, 6], skew=skew), EnergyConfig()) for skew in (0, 3)]
    assert counts[0] == counts[1]


def test_messages_dominate_the_count_and_grow_with_the_edges():
    one = perf.count_step(PRESETS["perov5"], 128, 640, 35_000, 240_000)
    two = perf.count_step(PRESETS["perov5"], 128, 640, 70_000, 240_000)
    messages = one["messages, forward"] + one["messages, backward"]
    total = sum(one.values(), perf.Cost(0, 0))
    assert messages.operations > 0.9 * total.operations
    assert two["messages, backward"].operations == pytest.approx(2 * one["messages, backward"].operations)


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    ceilings = perf.Ceilings(operations_per_s=100, bytes_per_s=10)
    assert ceilings.floor(perf.Cost(200, 5)) == 2
    assert ceilings.floor(perf.Cost(1, 50)) == 5


def test_processor_time_does_not_count_waiting():
    assert perf.cpu_time(lambda: time.sleep(0.02), 2) < 0.01 < perf.wall_time(lambda: time.sleep(0.02), 2)


def test_peak_memory_sees_an_array_that_lives_only_inside():
    size = 32 << 20
    peak = perf.peak_memory(lambda: torch.ones(size // 4).sum())
    assert math.isnan(peak) or 0.5 * size < peak < 1.5 * size


def test_estimated_memory_per_atom_agrees_with_the_measured():
    crystals = perf.perovskite_like(256)
    model = ContinuousCGCNN(PRESETS["perov5"]).eval().requires_grad_(False)
    if not model.use_kernels:
        pytest.skip("numba is not installed: no fused kernels")
    measured = perf.peak_memory(perf.step_function(model, crystals)) / len(crystals.positions)
    assert math.isnan(measured) or 0.2 < measured / bytes_per_atom(model) < 1.3


def test_slope_of_a_power_law_is_its_exponent():
    x = [1.0, 10.0, 100.0]
    assert perf.fitted_slope(x, [3 * value**1.5 for value in x]) == pytest.approx(1.5)


def test_acceptance_is_a_share_and_the_same_for_the_same_seed():
    crystals = perf.perovskite_like(4)
    model = ContinuousCGCNN(PRESETS["perov5"]).eval().requires_grad_(False)
    first, second = (perf.acceptance(model, crystals, 3, seed=1) for _ in range(2))
    assert first == second
    assert 0 <= first <= 1
