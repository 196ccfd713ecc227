"""A checkpoint gives back what was saved; a damaged or foreign file is an error in one line, and executes nothing."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_energy import NOISY, SMALL, random_batch, small_model

from contsp_core import checkpoints
from contsp_core.checkpoints import find_checkpoint, load_model, read_settings, save_checkpoint

SETTINGS = {"dataset": "prototypes", "training": {"seed": 3, "clip_norm": None}, "scores": [0.5, 1e-3]}


@pytest.mark.parametrize(
    "config", [SMALL, NOISY, replace(SMALL, spectral_norm=False)], ids=["paper", "noisy", "no norm"]
)
def test_what_is_loaded_is_what_was_saved(tmp_path, config):
    model = small_model(config, dtype=torch.float32)
    path = save_checkpoint(tmp_path / "new folder" / "model.safetensors", model, SETTINGS)
    loaded = load_model(path)
    assert loaded.config == config and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    crystals = random_batch(dtype=torch.float32)
    assert torch.equal(loaded(crystals), model(crystals))
    settings = read_settings(path)
    assert settings == loaded.settings
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


def test_a_bundled_checkpoint_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINTS", tmp_path)
    path = save_checkpoint(tmp_path / "perov5.safetensors", small_model(dtype=torch.float32), SETTINGS)
    assert find_checkpoint("perov5") == path
    assert load_model("perov5").settings["dataset"] == "prototypes"
    with pytest.raises(ValueError, match=r"checkpoint is 'perovskite', expected an existing .* or one of: perov5"):
        load_model("perovskite")


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = save_checkpoint(tmp_path / "model.safetensors", small_model(), SETTINGS)
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "truncated or not a safetensors file")


class Trap:
    """Leaves a file behind if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_file_with_code_in_it_is_refused_and_the_code_is_not_run(tmp_path, kind):
    path, touched = tmp_path / "model.safetensors", tmp_path / "touched"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(touched)))
    else:
        torch.save({"weights": Trap(touched)}, path)
    refused(path, "truncated or not a safetensors file")
    assert not touched.exists()
    pickle.loads(pickle.dumps(Trap(touched)))
    assert touched.exists()  # the trap works


def test_foreign_weights_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    refused(path, "format None, expected 'contsp-1'")
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    refused(path, "format 'pt', expected 'contsp-1'")


def rewrite(path: Path, metadata: dict[str, str], drop: str | None = None) -> Path:
    """The same weights, except one, under another header."""
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != drop}
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    save_file(tensors, path, json.loads(content[8 : 8 + length])["__metadata__"] | metadata)
    return path


def test_weights_that_do_not_fit_their_configuration_are_refused(tmp_path):
    path = save_checkpoint(tmp_path / "model.safetensors", small_model(), SETTINGS)
    refused(rewrite(path, {}, drop="fc_final.bias"), "does not fit its own configuration: .*fc_final.bias")


@pytest.mark.parametrize(
    "metadata",
    [
        {"energy": json.dumps({"depth": 3})},
        {"energy": "not JSON"},
        {"settings": "{"},
        {"energy": json.dumps({"width": "wide"})},
    ],
    ids=["unknown setting", "no JSON", "cut JSON", "wrong type"],
)
def test_unreadable_settings_are_refused(tmp_path, metadata):
    path = save_checkpoint(tmp_path / "model.safetensors", small_model(), SETTINGS)
    refused(rewrite(path, metadata), "settings")


def test_missing_settings_are_refused(tmp_path):
    path = tmp_path / "bare.safetensors"
    save_file({"weight": torch.zeros(3)}, path, {"format": "contsp-1"})
    refused(path, "settings")
