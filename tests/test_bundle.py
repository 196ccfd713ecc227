"""Bundling: a trained checkpoint keeps its weights and what made them; its losses, log and card lie beside it."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch
from bundle import bundle
from model_card import model_card

from contsp_core import load_model
from contsp_core.checkpoints import read_settings
from contsp_core.mala import AnnealConfig
from contsp_core.training import Job, preset, run

STEPS = AnnealConfig(n_steps=2)


@pytest.mark.parametrize("objective", ["score_matching", "contrastive_divergence"])
def test_a_checkpoint_is_taken_in_with_all_that_made_it(tmp_path, objective):
    energy, config = preset("prototypes", objective)
    config = replace(config, n_updates=451, batch_size=1, chain=STEPS, max_atoms=2, expand_p=1.0)
    config = config if objective == "score_matching" else replace(config, n_updates=2)
    trained = tmp_path / "trained.safetensors"
    run(Job("prototypes", trained, replace(energy, width=8, n_conv=1), config, n_structures=1))
    by_chains = objective == "contrastive_divergence"
    given = {"n_steps": 7} if by_chains else {"judge": "prototypes"}
    taken = bundle(trained, tmp_path / "bundled", **given)
    weights, header, before = load_model(taken).state_dict(), read_settings(taken), read_settings(trained)
    assert all(torch.equal(weights[name], value) for name, value in load_model(trained).state_dict().items())
    assert header["training"] == before["training"] and header["training"]["chain"]["n_steps"] == 2
    if by_chains:
        assert header["sampling"] == before["sampling"] | {"n_steps": 7}
    else:
        assert (
            header["sampling"] == before["sampling"] and header["judge"] == "prototypes" and header["validation_loss"]
        )
    assert taken.with_suffix(".md").read_text() == model_card(taken) + "\n"
    log = pd.read_csv(taken.with_suffix(".csv"))
    assert log["update"].tolist() == ([0, 1] if by_chains else [*range(0, 451, 2)])
