"""A checkpoint gives back what was saved; a damaged or foreign file is an error in one line, and executes nothing."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_card import model_card
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_energy import NOISY, SMALL, random_batch, small_model

from contsp_core.checkpoints import (
    FORMAT,
    digest,
    load_model,
    read_settings,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from contsp_core.data import CHECKPOINTS, choose, find_checkpoint, load_split
from contsp_core.diffusion import DiffusionConfig, denoising_residual
from contsp_core.energy import ContinuousCGCNN, portable
from contsp_core.mala import AnnealConfig

SETTINGS = {"dataset": "prototypes", "training": {"seed": 3, "clip_norm": None}, "scores": [0.5, 1e-3]}


@pytest.fixture
def saved(tmp_path) -> Path:
    return save_checkpoint(tmp_path / "model.safetensors", small_model(dtype=torch.float32), SETTINGS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "config", [SMALL, NOISY, replace(SMALL, spectral_norm=False)], ids=["paper", "noisy", "no norm"]
)
def test_what_is_loaded_is_what_was_saved(tmp_path, config, dtype):
    model = small_model(config, dtype)
    path = save_checkpoint(tmp_path / "new folder" / "model.safetensors", model, SETTINGS)
    loaded = load_model(path)
    assert loaded.config == config and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype and torch.equal(loaded.state_dict()[name], tensor), name
    crystals = random_batch(dtype=dtype)
    assert torch.equal(loaded(crystals), model(crystals))
    settings = read_settings(path)
    assert {name: settings[name] for name in SETTINGS} == SETTINGS
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("config", "sampling"),
    [(SMALL, AnnealConfig(n_steps=7, proposal="strain")), (NOISY, DiffusionConfig(9, 3)), (NOISY, AnnealConfig())],
)
def test_a_model_remembers_how_it_is_sampled(tmp_path, config, sampling):
    path = save_checkpoint(tmp_path / "model.safetensors", ContinuousCGCNN(config, sampling), {})
    assert load_model(path).sampling == sampling


def test_another_energy_may_be_the_judge(tmp_path, saved):
    """It ranks, wherever the model goes, and its weights are not taken for the model's."""
    assert (own := load_model(saved)).judge is own
    model, other = small_model(NOISY, torch.float32), load_model(saved)
    path = save_checkpoint(tmp_path / "judged.safetensors", model, {"judge": str(saved)})
    crystals, plain = random_batch(dtype=torch.float32), load_model(path)
    plain.use_kernels = False
    assert not portable(plain).use_kernels
    sent = pickle.loads(pickle.dumps(portable(load_model(path))))
    for loaded in (load_model(path), sent, copy.deepcopy(load_model(path))):
        assert torch.equal(loaded(crystals), model(crystals))
        assert torch.equal(loaded.judge(crystals), other(crystals))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert len([*loaded.parameters()]) == len([*model.parameters()])
    moved = load_model(path).double()  # to another precision, and to another device
    assert torch.allclose(moved.judge(crystals.to(torch.float64)).float(), other(crystals), atol=1e-4)
    assert moved.to("meta").judge.embedding.weight.is_meta
    with pytest.raises(ValueError, match="model has a judge, expected its bundled name, or path, as settings"):
        save_checkpoint(tmp_path / "unnamed.safetensors", load_model(path), {})
    with pytest.raises(ValueError, match=r"judged\.safetensors', which has one too, expected one without"):
        load_model(save_checkpoint(path, model, {"judge": str(path)}))
    save_checkpoint(path, model, {"judge": str(saved)})
    saved.unlink()
    with pytest.raises(ValueError, match=r"checkpoint is '.*model\.safetensors', expected a \.safetensors file"):
        load_model(path)


def test_a_bundled_checkpoint_is_found_by_its_name(tmp_path, monkeypatch, saved):
    monkeypatch.setattr("contsp_core.data.CHECKPOINTS", tmp_path)
    path = saved.rename(tmp_path / "perov5.safetensors")
    assert find_checkpoint("perov5") == path
    assert read_settings("perov5")["dataset"] == "prototypes"
    with pytest.raises(ValueError, match=r"checkpoint is 'perovskite', expected .* or one of: perov5$"):
        load_model("perovskite")


def test_a_checkpoint_has_its_own_ending(tmp_path):
    with pytest.raises(ValueError, match=r"expected a path that ends in \.safetensors"):
        save_checkpoint(tmp_path / "model.pt", small_model(), SETTINGS)


# The safetensors library as an oracle


def test_the_library_reads_what_is_written(saved):
    model = load_model(saved)
    tensors = load_file(saved)
    assert tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())
    with safe_open(saved, "pt") as file:
        assert json.loads(file.metadata()["settings"])["dataset"] == "prototypes"


def test_what_the_library_writes_is_read(tmp_path):
    """It puts tensors in another order: the digest must not depend on that."""
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.rand(5), "c": torch.tensor(1.5, dtype=torch.float64)}
    tensors["empty"] = torch.zeros(0, 3)
    metadata = {"format": FORMAT, "note": "Å"}
    save_file(tensors, tmp_path / "file", metadata | {"sha256": digest(tensors, metadata)})
    found, noted = read_tensors(tmp_path / "file")
    assert noted == metadata and found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


# Damage


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_file_is_refused(saved, kept):
    saved.write_bytes(saved.read_bytes()[:kept])
    refused(saved, "truncated or not a checkpoint|is damaged")


def test_flipped_bits_are_refused_or_change_nothing(saved):
    """600 files with a random bit flipped, half of them in the header; most header flips would still be good JSON."""
    content, expected = saved.read_bytes(), load_model(saved)
    settings, header = read_settings(saved), 8 + int.from_bytes(content[:8], "little")
    rng, n_refused, n_same = random.Random(0), 0, 0
    for case in range(600):
        changed = bytearray(content)
        changed[rng.randrange(header) if case % 2 else rng.randrange(header, len(content))] ^= 1 << rng.randrange(8)
        saved.write_bytes(changed)
        try:
            model = load_model(saved)
        except ValueError as error:
            n_refused += "\n" not in str(error) and str(saved) in str(error)
            continue
        assert case % 2, "a flipped bit of a weight went unseen"
        assert read_settings(saved) == settings and model.config == expected.config
        assert all(map(torch.equal, model.state_dict().values(), expected.state_dict().values()))
        n_same += 1
    assert n_refused + n_same == 600 and n_same < 10  # blanks at the end of the header mean nothing


def with_header(path: Path, change: Callable[[dict], object]) -> Path:
    """The same file under a changed header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    return path


@pytest.mark.parametrize(
    "entry",
    [
        {"data_offsets": [-32, 0]},
        {"data_offsets": [0, 2**70]},
        {"data_offsets": [32, 0]},
        {"data_offsets": [0, 4]},  # what the next tensor holds
        {"data_offsets": "all"},
        {"data_offsets": [None, None]},
        {"shape": [2**62, 2**62]},
        {"shape": [0, 2**62]},
        {"shape": [-1]},
        {"shape": [-2, -4]},
        {"shape": [8.0]},
        {"shape": 8},
        {"dtype": "BOOL"},
        {"dtype": ["F32"]},
    ],
    ids=str,
)
def test_a_hostile_header_is_refused_as_by_the_library(saved, entry):
    with_header(saved, lambda header: header["fc_final.bias"].update(entry))
    refused(saved, "truncated or not a checkpoint|is damaged")
    with pytest.raises(SafetensorError):
        load_file(saved)


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 64, (2).to_bytes(8, "little") + b"[]", (10**5).to_bytes(8, "little") + b"[" * 10**5, b"id,cif\n1,x\n"],
    ids=["ones", "list", "nested", "text"],
)
def test_no_content_is_too_strange(tmp_path, content):
    path = tmp_path / "strange.safetensors"
    path.write_bytes(content)
    refused(path, "truncated or not a checkpoint")


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
    refused(path, "truncated or not a checkpoint")
    assert not touched.exists()
    pickle.loads(pickle.dumps(Trap(touched)))
    assert touched.exists()  # the trap works


def test_foreign_weights_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    refused(path, "has format 'None', expected 'contsp-3'")
    save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    refused(path, "format 'pt', expected 'contsp-3'")
    save_file({"weight": torch.zeros(3)}, path, {"format": FORMAT})
    refused(path, "is damaged")
    save_file({"weight": torch.zeros(3, dtype=torch.bfloat16)}, path, {"format": FORMAT})  # numpy has no such numbers
    refused(path, "is damaged")


# Files that are whole, but were made wrong


def rewritten(path: Path, tensors: dict[str, torch.Tensor | None], metadata: dict[str, str | None]) -> Path:
    old, header = read_tensors(path)
    kept = {name: tensor for name, tensor in (old | tensors).items() if tensor is not None}
    write_tensors(path, kept, {name: text for name, text in (header | metadata).items() if text is not None})
    return path


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("fc_final.bias", None, "Missing key.*fc_final.bias"),
        ("fc_final.scale", torch.zeros(1), "Unexpected key.*fc_final.scale"),
        ("fc_final.bias", torch.zeros(2), "size mismatch for fc_final.bias"),
        ("fc_final.bias", torch.zeros(1, dtype=torch.int64), "fc_final.bias is torch.int64, expected torch.float32"),
        ("fc_final.bias", torch.zeros(1, dtype=torch.float64), "fc_final.bias is torch.float64"),
        ("fc_final.bias", torch.tensor([float("nan")]), "fc_final.bias holds numbers that are not finite"),
        ("atomic_volume", torch.full((101,), float("inf")), "atomic_volume holds numbers that are not finite"),
    ],
    ids=["missing", "unexpected", "shape", "integers", "mixed precision", "NaN", "infinite"],
)
def test_weights_that_do_not_fit_their_configuration_are_refused(saved, name, tensor, message):
    refused(rewritten(saved, {name: tensor}, {}), f"does not fit its own configuration: .*{message}")


@pytest.mark.parametrize(
    "metadata",
    [
        {"energy": json.dumps({"depth": 3})},
        {"energy": "not JSON"},
        {"energy": "[]"},
        {"settings": "{"},
        {"settings": "{}"},
        {"settings": None},
        {"energy": json.dumps({"width": "wide"})},
        {"energy": json.dumps({"width": 10**6})},  # 8 TB of weights: told by the shapes alone
        {"settings": json.dumps({"sampling": {"speed": 1}})},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(saved, metadata):
    refused(rewritten(saved, {}, metadata), "unreadable settings|does not fit its own configuration")


@pytest.mark.parametrize("name", sorted(path.stem for path in CHECKPOINTS.glob("*.safetensors")))
def test_the_card_of_a_bundled_checkpoint_is_its_header_printed(name):
    card = model_card(name)
    assert card + "\n" == find_checkpoint(name).with_suffix(".md").read_text(encoding="utf-8")
    settings = read_settings(name)
    assert f"| data.blob_id | {settings['data']['blob_id']} |" in card
    assert f"| energy.width | {settings['energy']['width']} |" in card


@pytest.mark.parametrize(("name", "largest"), [("perov5", 0.08), ("mp20", 0.25), ("mpts52", 0.5)])
def test_a_bundled_checkpoint_denoises_crystals_that_it_has_not_seen(data_dir, name, largest):
    """At 0.3 Å, 64 validation crystals; a zero energy has 1. Weights in another order have more than 0.6."""
    split = load_split(name, "val")
    crystals = split.select(choose(range(len(split)), 64, seed=0)).crystals.to(torch.float32)
    losses, model = [], load_model(name)
    for _ in range(2):
        sigma, rng = torch.full((len(crystals),), 0.3), torch.Generator().manual_seed(0)
        losses.append(float(denoising_residual(model, crystals, sigma, rng).loss_positions.mean()))
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten().roll(7).view_as(parameter))
    assert losses[0] < largest < 0.6 < losses[1]
