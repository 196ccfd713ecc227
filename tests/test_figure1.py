"""Figure 1: the numbers drawn are those of the training step."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from figure1 import draw_update, trace_update

from contsp_core.crystals import keyed_rng
from contsp_core.data import load_split
from contsp_core.training import contrastive_divergence_step, initial_model, preset


@pytest.mark.parametrize("training", [False, True])
def test_figure_1_shows_the_numbers_of_the_training_step(training):
    energy, config = preset("prototypes", "contrastive_divergence")
    config = replace(config, chain=replace(config.chain, n_steps=4), energy_penalty=0.2)
    split = load_split("prototypes", "train")
    place = [structure.reduced_formula for structure in split].index("BaTiO3")
    crystal = split.crystals[place].to(torch.float32)
    model = initial_model(crystal, energy, 0).train(training)  # spectral norms follow the weights while training
    row = contrastive_divergence_step(copy.deepcopy(model), crystal, config, keyed_rng(6))
    update = trace_update(model, crystal, config, keyed_rng(6))
    assert update.energies == (row["energy_real"], row["energy_sample"])
    assert update.loss == pytest.approx(row["loss"], rel=1e-5)
    assert update.energies[0] - update.energies[1] == pytest.approx(row["gap"], rel=1e-5)
    assert list(update.chain) == ["random start", "step 2, $T$ = 0.1", "step 3, $T$ = 0.01", "step 4, $T$ = 0.001"]
    assert all(parameter.grad is None for parameter in model.parameters())

    figure = draw_update(update, "caption")
    drawn = "\n".join(text.get_text() for text in figure.axes[0].texts).replace("(−", "(-").replace("= −", "= -")
    for text in (rf"$E_\theta(U)$ = {row['energy_real']:.3f}", f"\n= {row['loss']:.3f}", "+ 0.2 ("):
        assert text in drawn
    assert f"{abs(row['energy_sample']):.3f}" in drawn
    assert drawn.count("BaTiO$_{3}$") == 2  # U, and its composition
    sizes = [len(structure) for structure in update.chain.values()]
    assert f"$m$ = {sizes[0] // 5}" in drawn and len(set(sizes)) == 1
    assert len(figure.axes) == 1 + 1 + len(update.chain)  # the page, U and the chain
