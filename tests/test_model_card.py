"""The card of a checkpoint holds what the checkpoint, the scores and the log say."""

from __future__ import annotations

import json

import pytest
import torch

from contsp_core.checkpoints import save_checkpoint
from contsp_core.energy import ContinuousCGCNN, EnergyConfig
from contsp_core.model_card import flatten_settings, used_settings, write_model_card

SETTINGS = {
    "dataset": "perov5",
    "data": {"path": "train.csv.gz", "blob_id": "62ce9168", "official": True},
    "n_structures": 11356,
    "n_updates": 900,
    "elapsed_s": 90.0,
    "machine": "a machine, 2 threads",
    "training": {"objective": "score_matching", "seed": 3, "chain": {"n_steps": 7}},
}


@pytest.fixture
def checkpoint(tmp_path):
    """A saved model with random weights."""
    with torch.random.fork_rng(devices=[]):
        model = ContinuousCGCNN(EnergyConfig(width=4, n_basis=4))
    return save_checkpoint(tmp_path / "small.safetensors", model, SETTINGS)


def test_card_holds_data_seed_time_machine_and_settings(checkpoint):
    card = write_model_card(checkpoint)
    text = card.read_text()
    assert card.name == "small.md"
    for line in (
        "| data | `perov5`, 11356 crystals, the official file |",
        "| file | `train.csv.gz`, git blob `62ce9168` |",
        "| seed | 3 |",
        "| updates | 900 |",
        "| time | 1.5 min |",
        "| machine | a machine, 2 threads |",
        "| width | 4 |",
    ):
        assert line in text
    assert "Not scored." in text
    assert "chain.n_steps" not in text, "score matching runs no chain"
    assert str(checkpoint.parent) not in text


def test_scores_and_log_beside_the_checkpoint_are_shown(checkpoint):
    scores = {"match_rate@1": 0.25, "match_rate@1_interval": [0.2, 0.3], "n_references": 100, "rmse": float("nan")}
    checkpoint.with_suffix(".scores.json").write_text(json.dumps(scores))
    checkpoint.with_suffix(".csv").write_text("update,loss\n" + "".join(f"{i},{i}\n" for i in range(16)))
    text = write_model_card(checkpoint).read_text()
    assert "| match_rate@1 | 0.25 (0.2 … 0.3) |" in text
    assert "| n_references | 100 |" in text
    assert "| rmse | – |" in text
    assert "| 0 – 1 | 0.5 |" in text
    assert "| 14 – 15 | 14.5 |" in text


def test_summary_of_an_evaluation_is_shown_with_its_protocol_and_main_scores(checkpoint, tmp_path):
    scores = {"match_rate@20": 0.5, "match_rate@20_interval": [0.4, 0.6], "metre_crmse@20": 0.1}
    settings = {"dataset": "perov5", "split": "test", "checkpoint": "perov5-0123", "seed": 4}
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"settings": settings, "scores": scores}))
    text = write_model_card(checkpoint, scores=summary).read_text()
    assert "| split | test |" in text
    assert "| match_rate@20 | 0.5 (0.4 … 0.6) |" in text
    assert "metre_crmse" not in text
    assert "perov5-0123" not in text


def test_settings_of_chains_belong_to_contrastive_divergence():
    training = {"objective": "contrastive_divergence", "chain": {"n_steps": 7}, "expand_p": 0.5}
    assert used_settings(training) == {"objective": "contrastive_divergence", "chain.n_steps": 7, "expand_p": 0.5}
    assert used_settings(training | {"objective": "score_matching"}) == {"objective": "score_matching"}


def test_validation_scores_replace_the_loss(checkpoint):
    checkpoint.with_suffix(".csv").write_text("update,loss,validation\n0,1,\n9,1,0.5\n")
    text = write_model_card(checkpoint).read_text()
    assert "| 9 | 0.5 |" in text
    assert "mean loss" not in text


def test_wrong_file_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"scores is 'none.json', expected an existing file"):
        write_model_card(checkpoint, scores="none.json")
    for content, message in (("[1]", "holds a list"), ("{", "is no JSON")):
        checkpoint.with_suffix(".scores.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            write_model_card(checkpoint)


def test_nested_settings_are_flattened():
    assert flatten_settings({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}
