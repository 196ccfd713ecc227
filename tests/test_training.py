"""Contrastive divergence on models solvable by hand, invariance of the training map (P7), and the visible loop."""

from __future__ import annotations

import copy
import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given, settings
from test_energy import NOISY, SMALL, small_model
from torch import Tensor, nn

from contsp_core import Crystals, contrastive, load_model, training
from contsp_core.checkpoints import read_settings
from contsp_core.data import load_split
from contsp_core.diffusion import random_noise_levels, score_matching_step
from contsp_core.energy import PRESETS, EnergyConfig
from contsp_core.mala import AnnealConfig
from contsp_core.training import (
    FINE_TUNING,
    SCORE_MATCHING,
    ReplayBuffer,
    TrainConfig,
    contrastive_divergence_step,
    initial_model,
    main,
    preset,
    run,
    train,
)
from contsp_core.transformations import random_redescription

SHORT = TrainConfig(batch_size=16, max_atoms=6, chain=AnnealConfig(n_steps=3))
DENOISING = TrainConfig(objective="score_matching", batch_size=16, learning_rate=3e-3)
LOG_VOLUME = math.log(50.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class VolumeModel(nn.Module):
    """E = θ (ln V − ln V₀)²: under the invariant measure and T = 1, ln V is Gaussian with variance 1/2θ."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, crystals: Crystals) -> Tensor:
        return self.theta * statistic(crystals)


def statistic(crystals: Crystals) -> Tensor:
    """∂E/∂θ."""
    return (crystals.volume.log() - LOG_VOLUME) ** 2


def cubic_crystals(edges: list[float], dtype: torch.dtype = torch.float64) -> Crystals:
    cells = np.stack([edge * np.eye(3) for edge in edges])
    return Crystals.from_arrays(cells, np.zeros((len(edges), 3)), [[84]] * len(edges), dtype)


@pytest.fixture
def chains(monkeypatch) -> list[dict]:
    """Records the start and the end of every batch of chains."""
    seen, anneal = [], contrastive.anneal

    def record(energy, crystals, config, rng, on_step, start):
        state = anneal(energy, crystals, config, rng, on_step, start)
        seen.append({"initial": crystals, "start": start, "final": state.crystals})
        return state

    monkeypatch.setattr(contrastive, "anneal", record)
    return seen


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_gradient_is_the_one_derived_by_hand(chains, penalty):
    """∂/∂θ of mean(E − Ẽ) + α (mean E² + mean Ẽ²) with E = θ g is mean g − mean g̃ + 2αθ (mean g² + mean g̃²)."""
    model, crystals = VolumeModel(3.0), cubic_crystals([3.0, 3.5, 4.0])
    row = contrastive_divergence_step(model, crystals, replace(SHORT, energy_penalty=penalty), generator())
    real, sampled = statistic(crystals), statistic(chains[0]["final"])
    squares = real.square().mean() + sampled.square().mean()
    expected = real.mean() - sampled.mean() + 2 * penalty * 3.0 * squares
    assert float(model.theta.grad) == pytest.approx(float(expected), rel=1e-6)
    assert row["loss"] == pytest.approx(float(3 * (real.mean() - sampled.mean()) + penalty * 9 * squares), rel=1e-6)
    assert row["gap"] == pytest.approx(row["energy_real"] - row["energy_sample"], rel=1e-6)


def test_with_chains_in_equilibrium_the_gradient_is_that_of_the_likelihood():
    """∂/∂θ of −ln p(U) is g(U) − ⟨g⟩, and ⟨g⟩ = 1/2θ for a Gaussian ln V."""
    theta, n_systems = 5.0, 400
    chain = AnnealConfig(
        n_steps=70,
        step_first=0.05,
        step_last=0.05,
        temperature_last=1.0,
        proposal="strain",
        measure="invariant",
        cell_step_ratio=0.3,
    )
    model = VolumeModel(theta)
    config = TrainConfig(energy_penalty=0.0, expand_p=1.0, chain=chain)
    row = contrastive_divergence_step(model, cubic_crystals([4.0] * n_systems), config, generator(1))
    expected = (math.log(64) - LOG_VOLUME) ** 2 - 1 / (2 * theta)
    error = math.sqrt(2 / n_systems) / (2 * theta)
    assert float(model.theta.grad) == pytest.approx(expected, abs=4 * error)
    assert 0.4 < row["acceptance_rate"] < 0.99 and row["n_nonfinite"] == 0


def real_crystals(request, dataset: str) -> Crystals:
    """64 training crystals, chosen by a seed."""
    if dataset != "prototypes":
        request.getfixturevalue("data_dir")
    split = load_split(dataset, "val" if dataset == "perov5" else "train")
    chosen = np.random.default_rng(0).choice(len(split), 64, replace=False)
    return split.crystals[chosen.tolist()]


@pytest.mark.parametrize("dataset", ["prototypes", "perov5"])
def test_training_does_not_see_how_real_crystals_are_described(request, dataset):
    """P7: the same generator gives the same loss and gradient for 64 crystals and for re-descriptions of them."""
    crystals, rng = real_crystals(request, dataset), generator(8)
    redescribed = Crystals.cat([random_redescription(crystals[index], rng) for index in range(len(crystals))])
    assert (redescribed.n_atoms != crystals.n_atoms).any()
    assert max(float(grad.norm()) for grad in assert_same_update(crystals, redescribed).values()) > 1e-3


@settings(max_examples=15)
@given(unit=strategies.crystals(densities=(0.02, 0.05, 0.1)), source=strategies.generators())
def test_training_does_not_see_how_any_crystal_is_described(unit, source):
    assert_same_update(unit, random_redescription(unit, source))


def assert_same_update(crystals: Crystals, redescribed: Crystals) -> dict[str, Tensor]:
    """Loss and gradients agree; returns the latter."""
    losses, gradients = [], []
    for batch in (crystals, redescribed):
        model = small_model(SMALL).train()
        row = contrastive_divergence_step(model, batch, SHORT, generator(0))
        losses.append(row["loss"])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-9, abs=1e-9)
    for name, grad in gradients[0].items():
        assert float((grad - gradients[1][name]).norm()) <= 1e-8 * max(1e-3, float(grad.norm())), name
    return gradients[0]


def test_a_step_leaves_the_model_as_it_was_but_for_the_gradient():
    model = small_model(SMALL, torch.float32).train()
    contrastive_divergence_step(model, cubic_crystals([3.0, 4.0], torch.float32), SHORT, generator())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Replay buffer


def test_a_buffer_returns_the_last_sample_of_the_same_species():
    buffer, batch = ReplayBuffer(), cubic_crystals([3.0, 4.0])
    assert buffer.get([84]) is None and len(buffer) == 0
    buffer.put(batch[0], 3)
    buffer.put(batch[1], 7)
    sample, update = buffer.get([84])
    assert update == 7 and torch.equal(sample.cell, batch[1].cell) and len(buffer) == 1
    assert buffer.get([84, 84]) is None


def test_buffered_chains_start_at_the_last_sample_further_down_the_schedule(chains):
    model, crystals = VolumeModel(3.0), cubic_crystals([3.0])
    config, buffer = replace(SHORT, buffer_share=1.0, buffer_start=0.4, expand_p=1.0), ReplayBuffer()
    first = contrastive_divergence_step(model, crystals, config, generator(0), buffer, update=0)
    second = contrastive_divergence_step(model, crystals, config, generator(1), buffer, update=5)
    assert (first["buffer_share"], second["buffer_share"], second["buffer_age"]) == (0, 1, 5)
    assert chains[0]["start"].tolist() == [0] and chains[1]["start"].tolist() == pytest.approx([0.4])
    assert torch.equal(chains[1]["initial"].cell, chains[0]["final"].cell)


def test_without_a_share_the_buffer_is_not_used(chains):
    buffer = ReplayBuffer()
    for update in range(2):
        contrastive_divergence_step(VolumeModel(3.0), cubic_crystals([3.0]), SHORT, generator(0), buffer, update)
    assert torch.equal(chains[0]["initial"].cell, chains[1]["initial"].cell)
    assert len(buffer) >= 1


# The loop


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(learning_rate=2.0, warmup=4, final_learning_rate=0.1)
    rates = [
        training._learning_rate(config, update, progress) for update, progress in ((0, 0), (3, 0), (9, 0.5), (99, 1))
    ]
    assert rates == pytest.approx([0.5, 2.0, 1.1, 0.2])
    assert training._learning_rate(TrainConfig(), 17, 0.7) == pytest.approx(1e-3)  # the paper's is constant


def loop(n_updates: int, stop=None, **changes) -> list[dict]:
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)[:24]
    config = replace(DENOISING, n_updates=n_updates, **changes)
    return [row for row, _ in train(initial_model(crystals, NOISY, 0), crystals, config, stop)]


def without_time(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "elapsed_s"} for row in rows]


def test_training_repeats_with_its_seed():
    assert without_time(loop(3)) == without_time(loop(3))
    assert without_time(loop(3)) != without_time(loop(3, seed=1))


def test_the_loop_ends_after_its_updates_its_time_or_when_told():
    assert [row["update"] for row in loop(4)] == [0, 1, 2, 3]
    assert len(loop(100, time_limit_s=1e-9)) == 0
    assert len(loop(100, stop=lambda: True)) == 1


def test_averaged_weights_follow_the_last_ones():
    """averaged ← d averaged + (1 − d) weights, with d = min(decay, (1 + n) / (10 + n))."""
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)[:24]
    model = initial_model(crystals, NOISY, 0)
    expected = model.fc_final.weight.detach().clone()
    for row, averaged in train(model, crystals, replace(DENOISING, n_updates=4, ema_decay=0.3)):
        decay = min(0.3, (1 + row["update"]) / (10 + row["update"]))
        expected = decay * expected + (1 - decay) * model.fc_final.weight.detach()
        torch.testing.assert_close(averaged.fc_final.weight, expected)


@pytest.mark.parametrize("objective", ["contrastive_divergence", "score_matching"])
def test_a_loss_that_is_not_a_number_stops_the_training(objective):
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)[:8]
    model = initial_model(crystals, NOISY if objective == "score_matching" else SMALL, 0)
    with torch.no_grad():
        model.fc_final.bias.fill_(math.nan)
        model.fc_final.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="update 0: loss nan"):
        next(train(model, crystals, replace(SHORT, objective=objective)))


def test_gradients_are_clipped_and_their_norm_before_that_is_reported():
    rows = loop(2, clip_norm=1e-6, learning_rate=1e-3)
    assert all(row["gradient_norm"] > 1e-4 for row in rows)


@pytest.mark.parametrize("objective", ["contrastive_divergence", "score_matching"])
def test_a_run_leaves_a_checkpoint_with_its_settings_and_a_log(tmp_path, objective):
    config = replace(SHORT if objective == "contrastive_divergence" else DENOISING, n_updates=3)
    energy = SMALL if objective == "contrastive_divergence" else NOISY
    output, shown = tmp_path / "runs" / "tiny.safetensors", []
    history = run("prototypes", energy, config, output, n_structures=20, on_row=shown.append)
    assert [row["update"] for row in history] == [0, 1, 2] == [row["update"] for row in shown]
    with output.with_suffix(".csv").open(newline="") as file:
        log = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in log] == [row["loss"] for row in history]
    settings = read_settings(output)
    assert settings["dataset"] == "prototypes" and settings["n_structures"] == 20 and settings["n_updates"] == 3
    assert settings["training"]["batch_size"] == 16 and settings["training"]["objective"] == objective
    assert load_model(output).config == energy
    assert {file.name for file in output.parent.iterdir()} == {"tiny.safetensors", "tiny.csv"}


def test_the_best_model_by_validation_is_the_one_saved(tmp_path):
    scores = iter([0.2, 0.7, 0.1, 0.3])
    output = tmp_path / "best.safetensors"
    config = replace(DENOISING, n_updates=100)
    options = {"n_structures": 16, "validate_every": 1, "patience": 2}
    history = run("prototypes", NOISY, config, output, validate=lambda _: next(scores), **options)
    assert [row["validation"] for row in history] == [0.2, 0.7, 0.1, 0.3]  # and stops after two without a new best
    assert read_settings(output)["n_updates"] == 2


def test_a_hundred_updates_lower_the_denoising_loss_on_the_prototypes():
    """Over all training crystals, at the same noise before and after."""
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)
    energy = replace(NOISY, width=16, n_basis=16, basis_max=12.0, cutoff_multiple=2.0, noise_min=0.05, noise_max=1.0)
    model = initial_model(crystals, energy, 0)
    before = denoising_loss(model, crystals)
    config = replace(DENOISING, n_updates=100, learning_rate=1e-2, clip_norm=1.0, ema_decay=0.9)
    *_, (_, averaged) = train(model, crystals, config)
    assert denoising_loss(averaged, crystals) < 0.94 * before


def denoising_loss(model, crystals: Crystals) -> float:
    sigma = random_noise_levels(model, len(crystals), generator(1))
    return score_matching_step(copy.deepcopy(model).requires_grad_(True), crystals, sigma, generator(2))["loss"]


def test_the_initial_model_depends_on_its_seed_alone():
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)[:30]
    states = [initial_model(crystals, NOISY, seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["fc_final.weight"], states[2]["fc_final.weight"])


def test_a_model_with_noise_levels_knows_volumes_and_cells_of_the_training_crystals():
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)
    model = initial_model(crystals, NOISY, 0)
    expected = model.atomic_volume[crystals.atomic_numbers]
    sums = torch.zeros(len(crystals)).index_add(0, crystals.system_idx, expected)
    constant = crystals.volume.mean() / crystals.n_atoms.float().mean() * crystals.n_atoms
    assert (sums / crystals.volume).log().std() < 0.7 * (constant / crystals.volume).log().std()
    torch.testing.assert_close(torch.linalg.det(model.start_cells).abs(), torch.ones(len(model.start_cells)))
    assert set(model.start_n_atoms.tolist()) <= set(crystals.n_atoms.tolist())


def test_the_published_preset_is_the_papers():
    energy, config = preset("perov5", "contrastive_divergence")
    assert energy == PRESETS["perov5"] == EnergyConfig(width=32, n_conv=3, n_fc=2, n_basis=32)
    assert (config.batch_size, config.learning_rate, config.energy_penalty, config.expand_p) == (128, 1e-3, 0.1, 0.5)
    chain = config.chain
    assert (chain.n_steps, chain.step_first, chain.step_last) == (1000, 0.5, 5e-4)
    assert (chain.temperature_first, chain.temperature_last, chain.proposal) == (1.0, 1e-3, "cartesian")
    assert config.n_updates == 5 * math.ceil(11356 / 128)
    with pytest.raises(ValueError, match="objective is 'likelihood', expected 'score_matching', 'contrastive"):
        preset("perov5", "likelihood")


def test_a_run_may_start_from_a_checkpoint(tmp_path):
    """With a learning rate of zero the weights come back as they were, whatever the objective."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    energy = replace(NOISY, width=8, n_basis=8)
    run("prototypes", energy, replace(SCORE_MATCHING, n_updates=2, batch_size=8), first, n_structures=8)
    chain = replace(FINE_TUNING.chain, n_steps=2)
    still = replace(FINE_TUNING, n_updates=2, batch_size=4, learning_rate=0.0, chain=chain)
    run("prototypes", energy, still, second, n_structures=8, initial=first)
    before, after = load_model(first), load_model(second)
    assert all(torch.equal(old, new) for old, new in zip(before.parameters(), after.parameters(), strict=True))
    assert after.settings["initial"] == str(first) and before.settings["initial"] is None


def test_fine_tuning_needs_a_checkpoint():
    with pytest.raises(SystemExit, match="--initial is missing"):
        main(["--dataset", "prototypes", "--objective", "fine_tuning"])
