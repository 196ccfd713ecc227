"""The loss of a zero energy is known, and each setting changes what it names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from contsp_core.ablation import SETTINGS, compare_settings, validation_loss
from contsp_core.data import load_split
from contsp_core.energy import ContinuousCGCNN
from contsp_core.training import NOISY, preset


def test_the_loss_of_a_zero_energy_is_one():
    """Per direction: σ² times the mean square of the noise's score, without the translation that no energy sees."""
    crystals = load_split("prototypes", "train").crystals.to(torch.float32)
    crystals = crystals[torch.nonzero(crystals.n_atoms > 1)[:, 0]]
    model = ContinuousCGCNN(replace(NOISY, width=4, n_basis=4, density_weight=0.0)).requires_grad_(False)
    model.fc_final.weight.zero_()
    expected = (1 + float((1 - 1 / crystals.n_atoms).mean())) / 2
    assert validation_loss(model, crystals, 0.05) == pytest.approx(expected, rel=0.06)


def test_settings_are_fields_of_the_energy():
    energy, _ = preset("perov5")
    for changes in SETTINGS.values():
        replace(energy, **{name: value for name, value in changes.items() if name != "atomic_volume"})


def test_a_row_for_each_setting():
    small = {"width": 4, "n_basis": 4}
    settings = {"first": small, "second": small | {"atomic_volume": 20.0}}
    table = compare_settings("prototypes", 2, settings, n_structures=2, n_samples=2)
    assert table["setting"].tolist() == ["first", "second"]
    assert table["match_rate@2"].between(0, 1).all()
    assert table["loss_0.03"][0] == pytest.approx(table["loss_0.03"][1], rel=0.05)
    assert not table.drop(columns="setting").isna().any(axis=None)
