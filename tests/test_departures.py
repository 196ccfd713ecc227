"""The chains of the public code, and others beside the paper's, are what the table of departures calls them."""

from __future__ import annotations

import math
import sys

import departures
import numpy as np
import pandas as pd
import pytest
import test_mala
import torch
from departures import DEPARTURES, Chains, describe_ends, public_step, run_departure, start_of, train
from pymatgen.core import Structure
from scipy import stats
from test_energy import SMALL

from contsp_core import Crystals, load_model
from contsp_core.checkpoints import read_settings, save_checkpoint
from contsp_core.crystals import keyed_rng
from contsp_core.data import load_split
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import AnnealConfig, anneal, mala_init, mala_step

SLOPE, STEP, N = 1.2, 0.2, 4000


def slope(crystals: Crystals) -> torch.Tensor:
    """E = g x: under it the exact ratio accepts every move."""
    return SLOPE * crystals.sum_atoms(crystals.positions[:, 0])


def test_under_a_constant_force_the_public_ratio_is_that_derived_by_hand():
    """With both drifts reversed ln α = −2 g d / T, where d ~ N(−ηg/T, 2η); exactly, it is 0."""
    cells, middle = np.tile(50 * np.eye(3), (N, 1, 1)), np.full((N, 3), 25.0)
    state = mala_init(slope, Crystals.from_arrays(cells, middle, [[8]] * N, torch.float64))
    step = torch.tensor([test_mala.FROZEN, STEP], dtype=torch.float64).repeat(N, 1)
    arguments = state, step, torch.ones(N, dtype=torch.float64)
    assert mala_step(slope, *arguments, test_mala.generator()).accepted.all()
    accepted = public_step(slope, *arguments, test_mala.generator()).accepted.double().mean()
    mean, width = 2 * STEP * SLOPE**2, math.sqrt(8 * STEP) * SLOPE
    expected = stats.norm.cdf(mean / width)
    expected += math.exp(mean + width**2 / 2) * stats.norm.cdf(-width - mean / width)
    assert float(accepted) == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / N))


def test_the_public_chain_has_another_law(monkeypatch):
    monkeypatch.setattr(test_mala, "mala_step", lambda *arguments, proposal: public_step(*arguments, proposal))
    offsets, _ = test_mala.harmonic_chains("cartesian", temperature=0.8)
    assert offsets.var() < 0.8


@pytest.fixture(scope="module")
def small() -> ContinuousCGCNN:
    torch.manual_seed(0)
    return ContinuousCGCNN(SMALL).eval().requires_grad_(False)


def test_the_papers_chains_are_those_of_anneal_and_a_persistent_one_goes_on_from_their_end(small):
    like, species, config = load_model("prototypes"), [(11, 17)] * 3, AnnealConfig(n_steps=10)

    def begin() -> tuple[Crystals, list[torch.Generator]]:
        rng = [keyed_rng(number) for number in range(3)]
        return start_of(Chains(), like, species, range(3), rng).to(torch.float32), rng

    start, rng = begin()
    once = anneal(small, start, config, rng).crystals
    twice = anneal(small, once, config, rng, start=torch.full((3,), 1 / 3)).crystals
    for chains, expected in ((Chains(), once), (Chains(again=True), twice)):
        start, rng = begin()
        found, row = run_departure(chains, small, start, 10, rng)
        assert torch.equal(found.positions, expected.positions)
        assert 0 <= row["never moved"] < 1 and 0 < row["acceptance"] < 1


def test_starts_are_the_papers_or_have_learned_volumes_or_cells(small):
    like, species = load_model("prototypes"), [(11, 17), (12, 8)]
    volumes = {}
    for kind in ("paper", "volumes", "cells"):
        rng = [keyed_rng(number) for number in range(2)]
        volumes[kind] = start_of(Chains(start=kind), like, species, range(2), rng).volume
    expected = [float(like.atomic_volume[list(numbers)].sum()) for numbers in species]
    assert volumes["volumes"].tolist() == pytest.approx(expected, rel=1e-6)
    assert volumes["cells"].tolist() == pytest.approx(expected, rel=0.7)
    assert volumes["paper"].tolist() != pytest.approx(expected, rel=0.05)


def test_end_points_far_too_large_or_too_small_are_counted(small):
    (salt,) = load_split("prototypes", "train").structures[:1]
    sizes = [salt.volume * factor for factor in (1, 1.01, 2.9, 1 / 2.9, 3.1, 100, 0.3, 1)]
    made = [Structure(salt.lattice.scale(volume), salt.species, salt.frac_coords) for volume in sizes]
    found = describe_ends(small, [salt, salt], Crystals.from_structures(made), 4)
    assert found["expanded"] == 0.25 and found["collapsed"] == 0.125
    found = describe_ends(small, [salt, salt], Crystals.from_structures([salt] * 4 + made[4:8]), 4)
    assert found["energy_median"] == 0


def test_a_training_takes_the_steps_and_the_law_that_are_named(tmp_path):
    weights, rates = {}, {}
    for name in ("the paper's, exact ratio", "ratio of the public code", "invariant measure"):
        path = tmp_path / f"{len(weights)}.safetensors"
        train(name, "prototypes", path, n_updates=1, n_steps=4, seed=0)
        weights[name], rates[name] = load_model(path).state_dict(), pd.read_csv(path.with_suffix(".csv"))
        chain = read_settings(path)["training"]["chain"]
        assert chain["n_steps"] == 4 and chain["measure"] == DEPARTURES[name].config.measure
    exact, *others = (table["acceptance_rate"].item() for table in rates.values())
    assert all(abs(rate - exact) > 1e-3 for rate in others)
    with pytest.raises(ValueError, match="exists"):  # which would not say that its steps were others
        train("ratio of the public code", "prototypes", tmp_path / "0.safetensors", n_updates=2, n_steps=4, seed=0)
    exact, *others = weights.values()
    assert all(not torch.equal(exact["embedding.weight"], other["embedding.weight"]) for other in others)


def test_the_command_writes_a_row_for_each_departure(tmp_path, monkeypatch, small, capsys):
    save_checkpoint(tmp_path / "small.safetensors", small, {})
    arguments = ["--dataset", "prototypes", "--checkpoint", tmp_path / "small.safetensors", "--n-structures", 2]
    arguments += ["--n-samples", 2, "--lengths", 2, 4, "--output", tmp_path / "a.csv"]
    monkeypatch.setattr(sys, "argv", ["departures.py", *map(str, arguments)])
    departures.main()
    table = pd.read_csv(tmp_path / "a.csv")
    assert list(table["chains"].unique()) == list(DEPARTURES) and len(table) == len(DEPARTURES) + 2
    assert table["gradients"].tolist() == [2, 4, 2, 4, 4, 4, 4, 4, 4, 4, 8]
    assert table["acceptance"].between(0, 1).all() and table["match@2"].between(0, 1).all()
    assert "ratio of the public code" in capsys.readouterr().out
    both = [tmp_path / "small.safetensors", tmp_path / "other.safetensors"]
    save_checkpoint(both[1], small, {})
    arguments = [*arguments[:3], *both, *arguments[4:], "--chains", "strain moves"]
    monkeypatch.setattr(sys, "argv", ["departures.py", *map(str, arguments)])
    departures.main()
    first, second = pd.read_csv(tmp_path / "a.csv", index_col="checkpoint").to_dict("records")
    assert str(first) == str(second) and first["chains"] == "strain moves"
    monkeypatch.setattr(sys, "argv", ["departures.py", "--train", "strain moves"])
    with pytest.raises(SystemExit):
        departures.main()
    assert "expected --checkpoint, or --train and --output" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["departures.py", "--train", "learned volumes", "--output", "x.safetensors"])
    with pytest.raises(SystemExit):
        departures.main()
    assert "invalid choice: 'learned volumes'" in capsys.readouterr().err  # a training starts as the paper's
