"""What runs on a GPU gives the numbers of the CPU: ``make test-gpu``.

``CONTSP_TEST_DEVICE=cpu`` runs the same checks without one, on the plain torch path that a GPU takes.
"""

from __future__ import annotations

import copy
import math
import os
from dataclasses import replace

import pytest
import torch
from test_energy import NOISY, SMALL, random_batch, small_model

from contsp_core.crystals import Crystals, keyed_rng
from contsp_core.diffusion import DiffusionConfig, reverse_diffusion, score_matching_step
from contsp_core.energy import ContinuousCGCNN, EnergyConfig, energy_and_gradient
from contsp_core.graph import build_graph, cutoff_radius
from contsp_core.lattice import niggli
from contsp_core.mala import AnnealConfig, anneal
from contsp_core.sampler import sample_structures
from contsp_core.training import TrainState, preset, train_step

DEVICE = os.environ.get("CONTSP_TEST_DEVICE", "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]


def on_both(model: ContinuousCGCNN) -> tuple[ContinuousCGCNN, ContinuousCGCNN]:
    """The model on the CPU, and a copy on the device, on the path that a device takes."""
    there = copy.deepcopy(model).to(DEVICE)
    there.use_kernels = False
    return model, there


def generators(n: int) -> list[torch.Generator]:
    return [keyed_rng(0, number) for number in range(n)]


@pytest.mark.parametrize("config", [SMALL, NOISY, replace(NOISY, form="residual")], ids=["paper", "levels", "residual"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-4)])
def test_energy_and_gradients(config: EnergyConfig, dtype: torch.dtype, tolerance: float):
    crystals = random_batch(dtype=dtype)
    here, there = on_both(small_model(config, dtype).eval())
    found = energy_and_gradient(there, crystals.to(DEVICE))
    assert all(tensor.device.type == DEVICE for tensor in found)
    for ours, expected in zip(found, energy_and_gradient(here, crystals)):
        torch.testing.assert_close(ours.cpu(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_graph_and_niggli_cell():
    crystals = random_batch()
    cutoff = cutoff_radius(crystals)
    found, expected = build_graph(crystals.to(DEVICE), cutoff.to(DEVICE)), build_graph(crystals, cutoff)
    edges = [torch.column_stack([g.source, g.target, g.image]).cpu().tolist() for g in (found, expected)]
    assert sorted(edges[0]) == sorted(edges[1])
    torch.testing.assert_close(niggli(crystals.to(DEVICE)).cell.cpu(), niggli(crystals).cell, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("proposal", ["cartesian", "strain"])
def test_chains_draw_the_same_numbers_and_take_the_same_decisions(proposal: str):
    crystals = random_batch()
    here, there = on_both(small_model(SMALL).eval())
    config = AnnealConfig(20, step_first=0.01, proposal=proposal)
    ours = anneal(there, crystals.to(DEVICE), config, generators(len(crystals)))
    expected = anneal(here, crystals, config, generators(len(crystals)))
    torch.testing.assert_close(ours.energy.cpu(), expected.energy, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ours.crystals.positions.cpu(), expected.crystals.positions, rtol=1e-6, atol=1e-6)


def test_noise_levels():
    crystals = random_batch()
    here, there = on_both(small_model(NOISY).eval())
    config = DiffusionConfig(12, 4)
    ours = reverse_diffusion(there, crystals.to(DEVICE), config, generators(len(crystals)))
    expected = reverse_diffusion(here, crystals, config, generators(len(crystals)))
    torch.testing.assert_close(ours.positions.cpu(), expected.positions, rtol=1e-6, atol=1e-6)


def test_score_matching_gradient():
    crystals, sigma = random_batch(), torch.full((len(random_batch()),), 0.3, dtype=torch.float64)
    rows, gradients = [], []
    for model, device in zip(on_both(small_model(replace(NOISY, form="residual"))), ("cpu", DEVICE)):
        rng = generators(len(crystals))
        rows.append(score_matching_step(model, crystals.to(device), sigma.to(device), rng))
        gradients.append(torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()]))
    assert rows[1] == pytest.approx(rows[0], rel=1e-7)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", ["score_matching", "contrastive_divergence"])
def test_updates(objective: str):
    energy = replace(NOISY if objective == "score_matching" else SMALL, spectral_norm=False)
    chain = AnnealConfig(5, step_first=0.01)
    config = replace(preset("perov5", objective)[1], n_updates=3, batch_size=2, chain=chain)
    crystals, states = random_batch(), []
    for model in on_both(small_model(energy)):
        states.append(TrainState(model, config))
        rows = [train_step(states[-1], crystals, config, update / 3) for update in range(3)]
        assert all(math.isfinite(row["loss"]) for row in rows)
    pairs = zip(*(state.averaged.parameters() for state in states))
    for expected, ours in pairs:
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-6)


def test_structures_come_back():
    model = small_model(NOISY, torch.float32)
    found = sample_structures(model, ["NaCl", [22, 8, 8]], 2, 4, device=DEVICE)
    assert [[len(structure) for structure in structures] for structures in found] == [[2, 2], [3, 3]]
    assert next(model.parameters()).device.type == "cpu"
    crystals = Crystals.from_structures([structure for structures in found for structure in structures])
    assert crystals.cell.isfinite().all()
