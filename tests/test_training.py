"""Contrastive divergence on models solvable by hand, invariance of training (P7), and runs that survive."""

from __future__ import annotations

import copy
import csv
import errno
import hashlib
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import strategies
import torch
from hypothesis import given, settings
from test_energy import NOISY, SMALL, small_model
from torch import Tensor, distributed, nn

from contsp_core import Crystals, checkpoints, load_model, training
from contsp_core.checkpoints import read_settings, read_tensors
from contsp_core.data import load_split, stamp, write_whole
from contsp_core.diffusion import random_noise_levels, score_matching_step
from contsp_core.energy import NOISE_LEVELS, PRESETS, EnergyConfig
from contsp_core.lattice import niggli
from contsp_core.mala import STRAIN, AnnealConfig
from contsp_core.training import (
    OBJECTIVES,
    PAPER,
    Job,
    TrainConfig,
    TrainState,
    contrastive_divergence_step,
    initial_model,
    main,
    preset,
    run,
    train_step,
)
from contsp_core.transformations import TRANSFORMATIONS, random_redescription

SHORT = replace(PAPER, batch_size=16, max_atoms=6, chain=AnnealConfig(n_steps=3))
DENOISING = TrainConfig(batch_size=16, learning_rate=3e-3)
CONFIGS = {"score_matching": DENOISING, "contrastive_divergence": SHORT}
ENERGIES = {"score_matching": NOISY, "contrastive_divergence": SMALL}

LOG_VOLUME = math.log(50.0)


def make_rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class VolumeModel(nn.Module):
    """E = θ (ln V − ln V₀)²: under the invariant measure and T = 1, ln V is Gaussian with variance 1/2θ."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta, self.config = nn.Parameter(torch.tensor(theta, dtype=torch.float64)), EnergyConfig()

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
    seen, anneal = [], training.anneal

    def record(energy, crystals, config, rng, on_step):
        state = anneal(energy, crystals, config, rng, on_step)
        seen.append({"initial": crystals, "final": state.crystals})
        return state

    monkeypatch.setattr(training, "anneal", record)
    return seen


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_the_gradient_is_the_one_derived_by_hand(chains, penalty):
    """∂/∂θ of mean(E − Ẽ) + α (mean E² + mean Ẽ²) with E = θ g is mean g − mean g̃ + 2αθ (mean g² + mean g̃²)."""
    model, crystals = VolumeModel(3.0), cubic_crystals([3.0, 3.5, 4.0])
    row = contrastive_divergence_step(model, crystals, replace(SHORT, energy_penalty=penalty), make_rng())
    real, sampled = statistic(crystals), statistic(chains[0]["final"])
    squares = real.square().mean() + sampled.square().mean()
    expected = real.mean() - sampled.mean() + 2 * penalty * 3.0 * squares
    assert float(model.theta.grad) == pytest.approx(float(expected), rel=1e-6)
    assert row["loss"] == pytest.approx(float(3 * (real.mean() - sampled.mean()) + penalty * 9 * squares), rel=1e-6)
    assert row["gap"] == pytest.approx(row["energy_real"] - row["energy_sample"], rel=1e-6)
    assert row["penalty"] == pytest.approx(row["loss"] - row["gap"], abs=1e-6)


def test_both_energies_are_of_one_function(monkeypatch):
    """A spectrally normalised layer takes a power iteration each time it is called in training."""
    crystals = cubic_crystals([3.0, 3.5], torch.float32)
    one, other = (initial_model(crystals, SMALL, 0).train() for _ in range(2))
    for parameters in zip(one.parameters(), other.parameters(), strict=True):  # an update, which the norms do not know
        change = torch.randn(parameters[0].shape, generator=make_rng())
        [parameter.data.add_(change) for parameter in parameters]
    monkeypatch.setattr(training, "_sample", lambda *_: (crystals, {}))
    assert abs((one(crystals).mean() - one(crystals).mean()).item()) > 1e-4
    assert contrastive_divergence_step(other, crystals, SHORT, make_rng())["gap"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("step", "stuck"), [(1e12, 1.0), (1e-12, 0.0)])
def test_chains_that_never_move_are_counted_and_kept(chains, step, stuck):
    chain = AnnealConfig(n_steps=4, step_first=step, step_last=step)
    row = contrastive_divergence_step(
        VolumeModel(3.0), cubic_crystals([3.0] * 40), replace(SHORT, chain=chain), make_rng()
    )
    assert row["stuck_share"] == stuck == 1 - row["acceptance_rate"]
    start, final = niggli(chains[0]["initial"]), chains[0]["final"]
    assert torch.allclose(start.cell, final.cell, atol=1e-3) and len(final) == 40


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
    row = contrastive_divergence_step(model, cubic_crystals([4.0] * n_systems), config, make_rng(1))
    expected = (math.log(64) - LOG_VOLUME) ** 2 - 1 / (2 * theta)
    error = math.sqrt(2 / n_systems) / (2 * theta)
    assert float(model.theta.grad) == pytest.approx(expected, abs=4 * error)
    assert 0.4 < row["acceptance_rate"] < 0.99 and row["nonfinite_rate"] == 0


def real_crystals(request, dataset: str) -> Crystals:
    """64 training crystals, chosen by a seed."""
    if dataset != "prototypes":
        request.getfixturevalue("data_dir")
    split = load_split(dataset, "val" if dataset == "perov5" else "train")
    chosen = np.random.default_rng(0).choice(len(split), 64, replace=False)
    return split.crystals[chosen.tolist()]


@pytest.mark.parametrize("dataset", ["prototypes", "perov5"])
def test_training_does_not_see_how_real_crystals_are_described(request, dataset):
    """P7: the same generator gives the same loss and gradient for 64 crystals and for re-descriptions of every kind."""
    crystals, rng = real_crystals(request, dataset), make_rng(8)
    kinds = [entry.function for entry in TRANSFORMATIONS.values() if entry.kind == "re-description"]
    redescribed = Crystals.cat([kinds[index % len(kinds)](crystals[index], rng) for index in range(len(crystals))])
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
        row = contrastive_divergence_step(model, batch, SHORT, make_rng(0))
        losses.append(row["loss"])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-9, abs=1e-9)
    for name, grad in gradients[0].items():
        assert float((grad - gradients[1][name]).norm()) <= 1e-8 * max(1e-3, float(grad.norm())), name
    return gradients[0]


def test_a_step_leaves_the_model_as_it_was_but_for_the_gradient():
    model = small_model(SMALL, torch.float32).train()
    contrastive_divergence_step(model, cubic_crystals([3.0, 4.0], torch.float32), SHORT, make_rng())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# One update


def prototypes(n: int = 24) -> Crystals:
    return load_split("prototypes", "train").crystals.to(torch.float32)[:n]


def make_state(objective: str = "score_matching", **changes) -> tuple[TrainState, TrainConfig]:
    config = replace(CONFIGS[objective], **changes)
    return TrainState(initial_model(prototypes(), ENERGIES[objective], 0), config), config


def rows_of(n_updates: int, **changes) -> list[dict]:
    state, config = make_state(**changes)
    return [train_step(state, prototypes(), config, progress=0.0) for _ in range(n_updates)]


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainConfig(learning_rate=2.0, warmup=4, final_learning_rate=0.1)
    moments = ((0, 0), (3, 0), (9, 0.5), (99, 1))
    assert [training._learning_rate(config, *moment) for moment in moments] == pytest.approx([0.5, 2.0, 1.1, 0.2])
    assert training._learning_rate(PAPER, 17, 0.7) == pytest.approx(1e-3)  # constant
    short = replace(config, n_updates=20)  # a tenth of it is two updates
    assert [training._learning_rate(short, update, 0) for update in (0, 1, 2)] == pytest.approx([1.0, 2.0, 2.0])


def test_training_repeats_with_its_seed():
    assert rows_of(3) == rows_of(3) != rows_of(3, seed=1)


def test_every_epoch_takes_each_crystal_once_in_a_new_order():
    config = TrainConfig(batch_size=4)
    epochs = [[training._batch(10, config, update).tolist() for update in (n, n + 1, n + 2)] for n in (0, 3)]
    assert [[len(batch) for batch in epoch] for epoch in epochs] == [[4, 4, 2]] * 2
    orders = [[index for batch in epoch for index in batch] for epoch in epochs]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10)) and orders[0] != orders[1]


def test_averaged_weights_follow_the_last_ones():
    """averaged ← d averaged + (1 − d) weights, with d = min(decay, (1 + n) / (10 + n))."""
    state, config = make_state(ema_decay=0.3)
    expected = state.model.fc_final.weight.detach().clone()
    for update in range(4):
        train_step(state, prototypes(), config, progress=0.0)
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * state.model.fc_final.weight.detach()
        torch.testing.assert_close(state.averaged.fc_final.weight, expected)


def test_gradients_are_clipped_and_their_norm_before_that_is_reported():
    state, config = make_state(clip_norm=1e-6)
    assert train_step(state, prototypes(), config, progress=0.0)["gradient_norm"] > 1e-4
    assert torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm() < 1.1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_loss_that_is_not_finite_changes_nothing(objective):
    state, config = make_state(objective)
    with torch.no_grad():
        state.model.fc_final.weight.fill_(math.inf)
    before = copy.deepcopy(state.model.state_dict())
    row = train_step(state, prototypes(), config, progress=0.0)
    assert state.update == 0 and not math.isfinite(row["loss"] + row["gradient_norm"])
    assert torch.equal(state.model.embedding.weight, before["embedding.weight"])
    assert not state.optimiser.state


def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch):
    """Though the loss is: it would stay in the weights, and in the optimiser."""
    state, config = make_state()
    before = copy.deepcopy(state.model.state_dict())

    def overflow(model, *_):
        model.fc_final.weight.grad = torch.full_like(model.fc_final.weight, math.inf)
        return {"loss": 1.0}

    monkeypatch.setattr(training, "score_matching_step", overflow)
    row = train_step(state, prototypes(), config, progress=0.0)
    assert state.update == 0 and row["gradient_norm"] == math.inf
    assert all(map(torch.equal, state.model.state_dict().values(), before.values()))


def denoising_loss(model: nn.Module, crystals: Crystals) -> float:
    """At the same noise for every model."""
    sigma = random_noise_levels(model, len(crystals), make_rng(1))
    return score_matching_step(copy.deepcopy(model).requires_grad_(True), crystals, sigma, make_rng(2))["loss"]


def test_a_hundred_updates_lower_the_denoising_loss_on_the_prototypes():
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)
    energy = replace(NOISY, width=16, n_basis=16, basis_max=12.0, cutoff_multiple=2.0, noise_min=0.05, noise_max=1.0)
    config = replace(DENOISING, learning_rate=1e-2, ema_decay=0.9)
    state = TrainState(initial_model(crystals, energy, 0), config)
    before = denoising_loss(state.averaged, crystals)
    for update in range(100):
        train_step(state, crystals, config, progress=update / 100)
    assert denoising_loss(state.averaged, crystals) < 0.94 * before


def test_the_bundled_prototypes_denoise_their_training_crystals():
    """A zero energy has 1, and so have about weights in another order."""
    crystals, model = load_split("prototypes", "train").crystals.to(torch.float32), load_model("prototypes")
    assert denoising_loss(model, crystals) < 0.3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten().roll(7).view_as(parameter))
    assert denoising_loss(model, crystals) > 0.6


# Where training begins


def test_the_initial_model_depends_on_its_seed_alone():
    states = [initial_model(prototypes(30), NOISY, seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["fc_final.weight"], states[2]["fc_final.weight"])


def test_a_model_with_noise_levels_knows_volumes_and_cells_of_the_training_crystals():
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)
    model = initial_model(crystals, NOISY, 0)
    sums = crystals.sum_atoms(model.atomic_volume[crystals.atomic_numbers])
    constant = crystals.volume.mean() / crystals.n_atoms.float().mean() * crystals.n_atoms
    assert (sums / crystals.volume).log().std() < 0.7 * (constant / crystals.volume).log().std()
    torch.testing.assert_close(torch.linalg.det(model.start_cells).abs(), crystals.volume)
    assert torch.equal(model.start_counts.sum(dim=1), crystals.n_atoms)


def test_the_published_preset_is_the_papers():
    energy, config = preset("perov5", "contrastive_divergence")
    assert energy == PRESETS["perov5"] == EnergyConfig(width=32, n_conv=3, n_fc=2, n_basis=32)
    assert (config.batch_size, config.learning_rate, config.energy_penalty, config.expand_p) == (128, 1e-3, 0.1, 0.5)
    chain = config.chain
    assert (chain.n_steps, chain.step_first, chain.step_last) == (1000, 0.5, 5e-4)
    assert (chain.temperature_first, chain.temperature_last, chain.proposal) == (1.0, 1e-3, "cartesian")
    assert config == replace(PAPER, n_updates=5 * math.ceil(11356 / 128))


def test_the_union_is_trained_as_mp20_with_its_own_number_of_crystals():
    assert preset("mp") == preset("mp20")
    energy, config = preset("mp", "contrastive_divergence")
    assert (energy, config.n_updates) == (PRESETS["mp20"], 5 * math.ceil(28342 / 128))
    assert config == replace(preset("mp20", "contrastive_divergence")[1], n_updates=config.n_updates)


def test_presets_defaults_and_command_line_agree(monkeypatch, tmp_path):
    assert preset("perov5") == (replace(NOISE_LEVELS, strain_cap=0.03), TrainConfig())
    jobs = []
    monkeypatch.setattr(training, "run", lambda job, on_row: jobs.append(job) or TrainState(small_model(), job.config))
    main(["--dataset", "perov5"])
    main(["--dataset", "mp20", "--minutes", "2", "--output", "x.safetensors"])
    energy, config = preset("perov5")
    assert jobs[0] == Job("perov5", Path("runs/perov5.safetensors"), energy, config)
    assert jobs[1].config == replace(preset("mp20")[1], n_updates=None, time_limit_s=120.0)
    main(["--dataset", "mp20", "--objective", "contrastive_divergence", "--n-steps", "100"])
    published = preset("mp20", "contrastive_divergence")[1]
    assert jobs[2].config == replace(published, chain=replace(published.chain, n_steps=100))
    for steps, chain in (([], STRAIN), (["--n-steps", "9"], replace(STRAIN, n_steps=9))):
        main(["--dataset", "mp20", "--objective", "contrastive_divergence", "--moves", "strain", *steps])
        assert jobs.pop().config == replace(published, chain=chain)
    assert (STRAIN.proposal, STRAIN.measure, STRAIN.n_steps) == ("strain", "invariant", 1000)
    main(["--dataset", "mp20", "--initial", "mp20", "--negatives", "a.npz", "b.npz", "--contrast-weight", "2"])
    assert (jobs[3].initial, jobs[3].negatives) == ("mp20", ["a.npz", "b.npz"])
    assert jobs[3].config == replace(preset("mp20")[1], contrast_weight=2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("oqmd",), "dataset is 'oqmd', expected one of prototypes, perov5, mp20, mpts52, carbon24, mp"),
        (("oqmd", "contrastive_divergence"), "dataset is 'oqmd', expected one of prototypes"),
        (("perov5", "likelihood"), "objective is 'likelihood', expected one of score_matching, contrastive_divergence"),
    ],
)
def test_an_unknown_preset_names_the_known_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        preset(*arguments)


NUMBERS = [name for name in TrainConfig.__dataclass_fields__ if name not in ("objective", "chain")]


@pytest.mark.parametrize(
    "changes",
    [{name: value} for name in NUMBERS for value in (math.nan, -1, math.inf, "many")]
    + [{"n_updates": 0}, {"n_updates": 1.5}, {"batch_size": 0}, {"batch_size": None}, {"time_limit_s": 0}]
    + [{"expand_p": 0}, {"seed": 2**70}, {"objective": "likelihood"}, {"n_updates": None}],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"^{name} is .*, expected ") as error:
        TrainConfig(**changes)
    assert "\n" not in str(error.value)


# Runs


def tiny_job(output: Path, objective: str = "score_matching", **changes) -> Job:
    """Six updates with a model of a few hundred weights."""
    names = set(Job.__dataclass_fields__) & set(changes)
    options = {name: changes.pop(name) for name in names}
    config = replace(CONFIGS[objective], **({"n_updates": 6, "batch_size": 4} | changes))
    energy = replace(ENERGIES[objective], width=4, n_basis=4, n_conv=1, n_fc=2, cutoff_multiple=2.0)
    return Job("prototypes", output, energy, config, **({"n_structures": 6} | options))


def log_of(job: Job) -> list[dict[str, str]]:
    """Rows of the log but for the time."""
    with job.log.open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "elapsed_s"} for row in csv.DictReader(file)]


def assert_same_result(job: Job, other: Job) -> None:
    """Weights, averaged weights, optimiser and log are equal to the last bit."""
    (tensors, _), (expected, _) = read_tensors(job.state), read_tensors(other.state)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert all(map(torch.equal, load_model(job.output).parameters(), load_model(other.output).parameters()))
    assert log_of(job) == log_of(other)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_leaves_a_checkpoint_with_its_settings_and_a_log(tmp_path, objective):
    job, shown = tiny_job(tmp_path / "runs" / "tiny.safetensors", objective), []
    state = run(job, shown.append)
    assert [row["update"] for row in shown] == list(range(6)) and state.update == 6
    assert [float(row["loss"]) for row in log_of(job)] == [row["loss"] for row in shown]
    rates = [training._learning_rate(job.config, update, update / 6) for update in range(6)]
    assert [row["learning_rate"] for row in shown] == pytest.approx(rates)
    assert state.optimiser.param_groups[0]["weight_decay"] == job.config.weight_decay
    made = read_settings(job.output)
    assert made["dataset"] == "prototypes" and made["n_structures"] == 6 and made["n_updates"] == 6
    assert made["training"] == asdict(job.config) and made["n_retries"] == 0
    start_cells = {"n_start_cells": 6} if objective == "score_matching" else {}  # those of all training crystals
    assert load_model(job.output).config == replace(job.energy, **start_cells)
    assert all(map(torch.equal, load_model(job.output).parameters(), state.averaged.parameters()))
    assert {file.name for file in job.output.parent.iterdir()} == {"tiny.safetensors", "tiny.csv", "tiny.state"}


def negatives(path: Path, reverse: bool = False, seed: int = 1) -> Path:
    """The training crystals with every atom moved at random: what chains might have found."""
    split = load_split("prototypes", "train")
    moved = split.crystals.positions + split.crystals.random_atoms(torch.Generator().manual_seed(seed))
    found = split.crystals.replace(positions=moved)
    replace(split, crystals=found[list(range(len(split)))[::-1]] if reverse else found).save(path)
    return path


def test_a_run_tells_data_from_negatives(tmp_path, monkeypatch):
    """The pairs are those of the chosen crystals, and a stopped run goes on with the same ones."""
    found = negatives(tmp_path / "found.npz")
    whole = tiny_job(tmp_path / "whole.safetensors", contrast_weight=2.0, negatives=[found, found])
    step, pairs = training.contrast_step, []

    def record(model, crystals, wrong, sigma, rng, weight):
        pairs.append((crystals, wrong, weight))
        return step(model, crystals, wrong, sigma, rng, weight)

    with monkeypatch.context() as patched:
        patched.setattr(training, "contrast_step", record)
        run(whole)
    assert len(pairs) == 6 and {weight for _, _, weight in pairs} == {2.0}
    for crystals, wrong, _ in pairs:
        assert torch.equal(crystals.atomic_numbers, wrong.atomic_numbers) and torch.equal(crystals.cell, wrong.cell)
    assert all(0 < float(row["contrast"]) < 50 and 0 <= float(row["told_apart"]) <= 1 for row in log_of(whole))
    assert read_settings(whole.output)["negatives"] == 2 * [stamp(found)]
    part = replace(whole, output=tmp_path / "part.safetensors")
    run(part, lambda row: os.kill(os.getpid(), signal.SIGINT) if row["update"] == 2 else None)
    run(replace(part, resume=True))
    assert_same_result(part, whole)
    without = tiny_job(tmp_path / "without.safetensors")
    run(without)
    assert not torch.equal(load_model(whole.output).fc_final.weight, load_model(without.output).fc_final.weight)


def test_files_of_negatives_are_taken_in_turn(tmp_path):
    first, second = (negatives(tmp_path / f"{seed}.npz", seed=seed) for seed in (1, 2))
    contrasts = []
    for name, files in {"one": [first], "two": [first, second]}.items():
        job = tiny_job(tmp_path / f"{name}.safetensors", n_updates=2, negatives=files)
        run(job)
        contrasts.append([row["contrast"] for row in log_of(job)])
    (one, also_one), (same, other) = contrasts
    assert one == same and also_one != other


def test_negatives_of_other_crystals_or_for_another_objective_are_refused(tmp_path):
    job = tiny_job(tmp_path / "tiny.safetensors", negatives=[negatives(tmp_path / "other.npz", reverse=True)])
    with pytest.raises(ValueError, match=r"negatives .*other\.npz' are not for the crystals of .*train\.csv"):
        run(job)
    paper = tiny_job(job.output, "contrastive_divergence", negatives=[negatives(tmp_path / "found.npz")])
    with pytest.raises(ValueError, match="negatives are for score_matching, not for contrastive_divergence"):
        run(paper)
    with pytest.raises(ValueError, match=r"negatives '.*none\.npz' cannot be read: FileNotFoundError"):
        run(replace(job, negatives=[tmp_path / "none.npz"]))
    assert not job.output.exists()


def test_a_run_ends_when_its_time_is_over(tmp_path):
    job = tiny_job(tmp_path / "tiny.safetensors", n_updates=None, time_limit_s=0.3)
    state = run(job)
    assert state.update > 0 and state.elapsed_s >= 0.3
    assert run(replace(job, resume=True)).update == state.update  # the time before counts


def test_a_run_may_start_from_a_checkpoint(tmp_path):
    """With a learning rate of zero the weights come back as they were, whatever the objective."""
    first = tiny_job(tmp_path / "first.safetensors")
    run(first)
    changes = {"initial": first.output, "learning_rate": 0.0, "n_updates": 2}
    second = tiny_job(tmp_path / "second.safetensors", "contrastive_divergence", **changes)
    run(second)
    before, after = load_model(first.output), load_model(second.output)
    assert all(map(torch.equal, before.parameters(), after.parameters()))
    other = replace(second, output=tmp_path / "other.safetensors", n_structures=4)
    run(other)  # of other crystals it learns the cells and volumes
    assert len(before.start_cells) == 6 and len(load_model(other.output).start_cells) == 4
    assert not torch.equal(load_model(other.output).atomic_volume, before.atomic_volume)
    name, digest = read_settings(second.output)["initial"].split("-")
    assert name == "first" and hashlib.sha256(first.output.read_bytes()).hexdigest().startswith(digest)
    run(replace(first, config=replace(first.config, seed=1), overwrite=True))
    with pytest.raises(ValueError, match=r"was saved with initial = first-"):  # of the same name
        run(replace(second, config=replace(second.config, n_updates=3), resume=True))
    with pytest.raises(ValueError, match="score_matching needs an energy with noise levels"):
        run(replace(tiny_job(tmp_path / "third.safetensors"), energy=SMALL))
    run(tiny_job(tmp_path / "paper.safetensors", "contrastive_divergence", n_updates=1))
    with pytest.raises(ValueError, match="score_matching needs an energy with noise levels"):
        run(tiny_job(tmp_path / "third.safetensors", initial=tmp_path / "paper.safetensors"))
    assert not list(tmp_path.glob("third*"))
    changes = {"initial": tmp_path / "paper.safetensors", "n_updates": 1, "chain": AnnealConfig(n_steps=4)}
    run(tiny_job(tmp_path / "fourth.safetensors", "contrastive_divergence", **changes))
    assert load_model(tmp_path / "fourth.safetensors").sampling == changes["chain"]


# Interruptions


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_resume_goes_on_as_if_it_had_not(tmp_path, objective, number):
    straight = tiny_job(tmp_path / "straight.safetensors", objective)
    run(straight)
    job = replace(straight, output=tmp_path / "stopped.safetensors")

    def interrupt(row):
        if row["update"] == 2:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    state = run(job, interrupt)
    assert (state.update, state.stopped_by, len(log_of(job))) == (3, number, 3)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert run(replace(job, resume=True)).update == 6
    assert_same_result(job, straight)


def test_a_longer_run_goes_on_from_a_shorter_one(tmp_path):
    job = tiny_job(tmp_path / "tiny.safetensors", n_updates=2)
    run(job)
    assert run(replace(job, config=replace(job.config, n_updates=4), resume=True)).update == 4
    assert [row["update"] for row in log_of(job)] == ["0", "1", "2", "3"]
    energy = replace(job.energy, cutoff_multiple=2.1)
    for changes in ({"learning_rate": 1.0}, {"n_structures": 5}, {"initial": job.output}):
        with pytest.raises(ValueError, match=f"was saved with {next(iter(changes))} = "):
            run(tiny_job(job.output, resume=True, **changes))
    with pytest.raises(ValueError, match=r"was saved with cutoff_multiple = 2\.0"):
        run(replace(job, energy=energy, resume=True))


def kill_and_resume(folder: str, n_kills: int) -> None:
    """Kill a training so many times, resume it, and compare its end with that of one left alone.

    Writes are slowed down, so that they are hit, and happen after every update; a training that ends in between is
    compared, and starts again. To be called in a process that has loaded everything: its children start at once.
    """
    straight, rng = tiny_job(Path(folder) / "straight.safetensors", n_updates=30), random.Random(0)
    job = replace(straight, output=Path(folder) / "killed.safetensors", resume=True, save_every_s=1e-9)
    split = load_split("prototypes", "train")
    training.load_split = lambda *_: split
    run(straight)
    while n_kills:
        child = os.fork()
        if not child:
            checkpoints.write_whole = write_slowly
            run(job)
            os._exit(0)
        time.sleep(rng.uniform(0.0, 0.4))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        n_kills -= status == signal.SIGKILL
        if job.state.is_file():
            read_tensors(job.state)
        if job.output.is_file():
            load_model(job.output)
        if status == 0:
            assert_same_result(job, straight)
            job.state.unlink(), job.log.unlink(), job.output.unlink()
    run(job)
    assert_same_result(job, straight)


def write_slowly(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    write_whole(path, lambda file: write(SlowFile(file)))


class SlowFile:
    """Writes in forty pieces."""

    def __init__(self, file) -> None:
        self.file = file

    def write(self, content: bytes) -> None:
        size = len(content) // 40 + 1
        for start in range(0, len(content), size):
            self.file.write(content[start : start + size])
            self.file.flush()
            time.sleep(2e-4)


def test_a_training_killed_at_thirty_moments_ends_as_if_left_alone(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    command = f"import test_training; test_training.kill_and_resume({str(tmp_path)!r}, 30)"
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob(".*"))  # nor do half-written files stay


def test_a_full_disk_is_told_and_what_was_saved_before_is_intact(tmp_path):
    """The kernel itself refuses to write beyond so many bytes, in the middle of a state."""
    job, straight = (tiny_job(tmp_path / f"{name}.safetensors", save_every_s=1e-9) for name in ("full", "straight"))
    run(straight)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row):
        if row["update"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job.state.stat().st_size // 2, limits[1]))

    try:
        with pytest.raises(OSError, match=r"full\.safetensors cannot be saved: File too large; what was saved before"):
            run(job, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_settings(job.output)["n_updates"] == 3 and load_model(job.output)
    assert sorted(path.name for path in tmp_path.glob("*full*")) == ["full.csv", "full.safetensors", "full.state"]
    run(replace(job, resume=True))
    assert_same_result(job, straight)


@pytest.mark.parametrize("n_calls", range(3))
def test_a_disk_that_fails_at_any_call_loses_nothing(tmp_path, monkeypatch, n_calls):
    """A save asks the disk for the log, the state and the checkpoint."""
    job = tiny_job(tmp_path / "full.safetensors", final_learning_rate=1.0)
    run(replace(job, config=replace(job.config, n_updates=3)))
    fsync, rows, calls = os.fsync, [], []

    def fail(descriptor):
        calls.extend([descriptor] if rows else [])  # the first save of a resumed run goes well
        if len(calls) > n_calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="cannot be saved: No space left on device"):
            run(replace(job, resume=True), rows.append)
    assert load_model(job.output) and read_tensors(job.state)
    run(replace(job, resume=True))
    run(straight := replace(job, output=tmp_path / "straight.safetensors"))
    assert_same_result(job, straight)


@pytest.mark.parametrize(("n_failures", "n_retries"), [(1, 1), (3, 3)])
def test_a_loss_that_is_not_finite_takes_the_run_back_to_other_random_numbers(
    tmp_path, monkeypatch, n_failures, n_retries
):
    fail_at(monkeypatch, update=4, n_failures=n_failures)
    job = tiny_job(tmp_path / "tiny.safetensors")
    state = run(job)
    assert (state.update, state.n_retries, read_settings(job.output)["n_retries"]) == (6, n_retries, n_retries)
    assert [row["update"] for row in log_of(job)] == list("012345")
    assert all(math.isfinite(float(row["loss"])) for row in log_of(job))


@pytest.mark.parametrize("loss", [math.nan, 2e4])
def test_a_loss_that_is_never_sound_ends_the_run_with_a_diagnosis(tmp_path, monkeypatch, loss):
    fail_at(monkeypatch, update=4, n_failures=10, loss=loss)
    job = tiny_job(tmp_path / "tiny.safetensors", save_every_s=1e-9)
    diagnosis = f"update 4: loss {loss}, gradient norm .*; going back 3 times to update 4 did not help; a smaller"
    with pytest.raises(FloatingPointError, match=diagnosis) as error:
        run(job)
    assert "\n" not in str(error.value)
    assert read_settings(job.output)["n_updates"] == 4 == len(log_of(job)) and load_model(job.output)


def fail_at(monkeypatch, update: int, n_failures: int, loss: float = math.nan) -> None:
    """The loss of an update is not a number, or too large, so many times; random numbers must be new every time."""
    step, seen = training.score_matching_step, []

    def broken(model, crystals, sigma, rng):
        row = step(model, crystals, sigma, rng)
        draw = torch.rand((), generator=rng[0]).item()
        assert draw not in seen
        seen.append(draw)
        is_broken = len(seen) in [update + 1 + (update + 1) * n for n in range(n_failures)] or (
            n_failures > 3 and len(seen) > update
        )
        return row | ({"loss": loss} if is_broken else {})

    monkeypatch.setattr(training, "score_matching_step", broken)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    job = tiny_job(tmp_path / "tiny.safetensors", n_updates=1, learning_rate=1e300)
    with pytest.raises(FloatingPointError, match="update 1: weights are not finite; a smaller learning_rate may help"):
        run(job)
    assert load_model(job.output).fc_final.weight.isfinite().all()


# What a run refuses, before it changes anything


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_does_not_overwrite_another_unless_told(tmp_path, monkeypatch):
    job = tiny_job(tmp_path / "tiny.safetensors", n_updates=1)
    run(job)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"tiny\.safetensors' exists; resume goes on from it, overwrite begins anew"):
        run(job)
    assert contents(tmp_path) == before
    job.state.unlink()
    with pytest.raises(ValueError, match=r"resume needs .*tiny\.state', which is missing; overwrite begins anew"):
        run(replace(job, resume=True))
    job.state.write_bytes(before[str(job.state)])
    with monkeypatch.context() as patched:  # killed before the first save: the old state must not be gone on from
        patched.setattr(training, "_save", lambda *_: sys.exit())
        with pytest.raises(SystemExit):
            run(replace(job, overwrite=True))
    with pytest.raises(ValueError, match=r"resume needs .*tiny\.state', which is missing; overwrite begins anew"):
        run(replace(job, resume=True))
    run(replace(job, overwrite=True, config=replace(job.config, seed=1)))
    assert contents(tmp_path).keys() == before.keys() and len(log_of(job)) == 1
    assert contents(tmp_path)[str(job.output)] != before[str(job.output)]
    header, row = before[str(job.log)].splitlines(keepends=True)
    for cut in (header, header + row[:-1], header[:60]):
        job.log.write_bytes(cut)
        with pytest.raises(ValueError, match=r"tiny\.csv' is shorter than when .*tiny\.state' was saved"):
            run(replace(job, resume=True, config=replace(job.config, seed=1)))
    other = tiny_job(job.output, "contrastive_divergence", n_updates=1, overwrite=True)
    run(other)
    assert "gap" in log_of(other)[0] and len(log_of(other)) == 1


def test_a_second_run_on_the_same_path_refuses(tmp_path):
    job, second = tiny_job(tmp_path / "tiny.safetensors", n_updates=2), []

    def start_another(row):
        with pytest.raises(ValueError, match=r"tiny\.safetensors' belongs to a training that is running"):
            run(replace(job, overwrite=True))
        second.append(row["update"])

    assert run(job, start_another).update == 2 and second == [0, 1]
    assert len(log_of(job)) == 2


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-9], lambda content: content[:-9] + b"?" * 9, lambda _: b"x"]
)
def test_a_damaged_state_is_refused(tmp_path, damage):
    job = tiny_job(tmp_path / "tiny.safetensors", n_updates=1)
    run(job)
    job.state.write_bytes(damage(job.state.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"tiny\.state is (truncated|damaged)"):
        run(replace(job, resume=True))
    assert contents(tmp_path) == before
    job.state.write_bytes(job.output.read_bytes())  # a checkpoint is no state
    with pytest.raises(ValueError, match=r"tiny\.state"):
        run(replace(job, resume=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "error: --minutes is 0.0, expected 0.001 …"),
        (["--minutes", "-1"], "error: --minutes is -1.0, expected 0.001 …"),
        (["--minutes", "nan"], "error: --minutes is nan, expected 0.001 …"),
        (["--minutes", "inf"], "error: --minutes is inf, expected 0.001 …"),
        (["--n-updates", "0"], "n_updates is 0, expected"),
        (["--n-updates", "-5"], "n_updates is -5, expected"),
        (["--contrast-weight", "2"], "--contrast-weight is for --negatives"),
        (["--n-steps", "10"], "--n-steps and --moves are for contrastive_divergence"),
        (["--moves", "strain"], "--n-steps and --moves are for contrastive_divergence"),
        (["--n-steps", "0", "--objective", "contrastive_divergence"], "n_steps is 0, expected"),
        (["--n-structures", "0"], "n_structures is 0, expected"),
        (["--seed", "-1"], "seed is -1, expected"),
        (["--device", "abacus"], "device is 'abacus', which fails"),
        (["--device", "meta"], "device is 'meta', which fails"),
        (["--initial", "nobody"], "checkpoint is 'nobody', expected a .safetensors file or one of"),
        (["--output", "folder.safetensors"], "'folder.safetensors', which is no regular file"),
        (["--output", "device.safetensors"], "'device.safetensors', which is no regular file"),
        (["--output", "/dev/full"], "output is '/dev/full', expected a path that ends in .safetensors"),
        (["--output", "train.csv"], "output is 'train.csv', expected a path that ends in .safetensors"),
        (["--output", "train.safetensors"], "output would overwrite 'train.csv', which is no training log"),
        (["--output", "train.csv/tiny.safetensors"], "cannot be written"),
        (["--output", "/proc/nothing.safetensors"], "cannot be written"),
        (["--output", "tiny.safetensors"], "output 'tiny.safetensors' exists; resume goes on"),
    ],
    ids=" ".join,
)
def test_a_command_that_makes_no_sense_changes_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("folder.safetensors").mkdir()
    Path("device.safetensors").symlink_to("/dev/full")
    Path("train.csv").write_text("material_id,cif\n1,data_x\n")
    Path("tiny.safetensors").write_text("weights")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["--dataset", "prototypes", *arguments])
    assert message in str(error.value.code) and "\n" not in error.value.code
    assert contents(tmp_path) == before
    assert capsys.readouterr() == ("", "")  # no bar, no row


def test_the_command_line_trains_and_tells_of_a_signal(tmp_path, monkeypatch, capsys):
    arguments = [
        "--dataset",
        "prototypes",
        "--n-structures",
        "4",
        "--n-updates",
        "2",
        "--output",
        str(tmp_path / "a.safetensors"),
    ]
    main(arguments)
    assert capsys.readouterr().err.startswith("update 0, elapsed_s ")
    assert read_settings(tmp_path / "a.safetensors")["n_updates"] == 2
    show = training._print_row
    monkeypatch.setattr(training, "_print_row", lambda row: os.kill(os.getpid(), signal.SIGTERM) or show(row))
    with pytest.raises(SystemExit) as error:
        main([*arguments[:-1], str(tmp_path / "b.safetensors")])
    assert error.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.endswith("stopped after 1 updates; --resume goes on\n")


def test_the_command_line_tells_of_a_run_that_is_finished_and_goes_on_with_a_longer_one(tmp_path, capsys):
    arguments = ["--dataset", "prototypes", "--n-structures", "4", "--output", str(tmp_path / "a.safetensors")]
    main([*arguments, "--n-updates", "2"])
    assert capsys.readouterr().err.endswith("a.safetensors holds the average after 2 updates\n")
    main([*arguments, "--n-updates", "2", "--resume"])
    told = capsys.readouterr().err
    assert "a.safetensors is finished: 2 updates;" in told and told.count("\n") == 1
    assert told.endswith("; --resume with more --n-updates or --minutes goes on\n")
    main([*arguments, "--n-updates", "3", "--resume"])
    assert capsys.readouterr().err.endswith("a.safetensors holds the average after 3 updates\n")
    paper = [*arguments[:-1], str(tmp_path / "b.safetensors"), "--objective", "contrastive_divergence"]
    main([*paper, "--n-steps", "1", "--n-updates", "1"])
    assert capsys.readouterr().err.endswith("b.safetensors holds the weights after 1 updates\n")


def test_a_second_interruption_ends_the_command_at_once_with_one_line(tmp_path, monkeypatch):
    arguments = ["--dataset", "prototypes", "--n-structures", "4", "--n-updates", "9"]
    arguments += ["--output", str(tmp_path / "a.safetensors")]
    shown = []

    def interrupt_twice(row):
        shown.append(row)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(training, "_print_row", interrupt_twice)
        with pytest.raises(SystemExit) as error:
            main(arguments)
    assert error.value.code == "stopped at once; --resume goes on from what was saved last" and len(shown) == 1
    assert error.value.__suppress_context__
    main([*arguments, "--resume"])
    assert read_settings(tmp_path / "a.safetensors")["n_updates"] == 9


# Several processes

CASES = [(objective, batch_size) for objective in OBJECTIVES for batch_size in (8, 5, 1)]


def updates_of(objective: str, batch_size: int) -> tuple[list[dict[str, float]], TrainState]:
    """Four updates in double precision on seven crystals: the last batch of an epoch is smaller than the others."""
    config = replace(CONFIGS[objective], batch_size=batch_size, max_atoms=4)
    crystals = prototypes(7).to(torch.float64)
    state = TrainState(initial_model(crystals, ENERGIES[objective], 0).double(), config)
    return [train_step(state, crystals, config, progress=0.0) for _ in range(4)], state


def work(rank: int, folder: str) -> None:
    """One of two processes; leaves what it gets in a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = []
    for case in CASES:
        rows, state = updates_of(*case)
        found.append((rows, state.averaged.state_dict()))
    shares = [training._progress(state, TrainConfig(time_limit_s=9e9), time.monotonic() - 5e9 * rank)]
    state.stopped_by = signal.SIGTERM if rank else None
    found.append(([*shares, training._progress(state, TrainConfig(), 0.0)], {}))
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    times, others = (result.pop()[0] for result in results)
    assert times == others == [pytest.approx(5 / 9, rel=1e-3), math.inf]  # of the clock and of a signal to one of them
    for (rows, weights), (other_rows, other_weights), case in zip(*results, CASES):
        expected_rows, state = updates_of(*case)
        assert rows == other_rows, case
        for row, expected in zip(rows, expected_rows, strict=True):
            assert row == pytest.approx(expected, rel=1e-7, abs=1e-9), case
        for name, tensor in state.averaged.state_dict().items():
            assert torch.equal(weights[name], other_weights[name]), (case, name)
            torch.testing.assert_close(weights[name], tensor, rtol=1e-8, atol=1e-9, msg=f"{case} {name}")


def test_torchrun_trains_as_one_process_does(tmp_path):
    arguments = ["--dataset", "prototypes", "--n-structures", "5", "--n-updates", "3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "contsp_core.training", *arguments, "--output", str(tmp_path / "two.safetensors")]
    for more, n_said in ((["--n-updates", "1"], 1), (["--resume"], 0)):
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("update 0, ") == n_said  # one process speaks
    main([*arguments, "--output", str(tmp_path / "one.safetensors")])
    two, one = (Job("prototypes", tmp_path / f"{name}.safetensors", SMALL, SHORT) for name in ("two", "one"))
    for row, expected in zip(log_of(two), log_of(one), strict=True):
        assert {name: float(x) for name, x in row.items()} == pytest.approx(
            {n: float(x) for n, x in expected.items()}, rel=1e-3
        )
    models = (load_model(two.output), load_model(one.output), initial_model(prototypes(5), preset("prototypes")[0], 0))
    found, expected, start = (nn.utils.parameters_to_vector(model.parameters()) for model in models)
    # all weights together: where a gradient is nothing but rounding, as of the last bias, the steps of Adam are too
    assert (found - expected).norm() <= 0.02 * (expected - start).norm()
