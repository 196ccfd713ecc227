"""Checkpoints: one safetensors file with the weights and, as JSON in its header, every setting that made them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from contsp_core.energy import ContinuousCGCNN, EnergyConfig

CHECKPOINTS = Path(__file__).resolve().parent.parent / "data" / "checkpoints"
FORMAT = "contsp-1"


def save_checkpoint(path: str | Path, model: ContinuousCGCNN, settings: dict[str, Any]) -> Path:
    """Write the model and its settings; the file appears whole or not at all.

    Args:
        path: ends in ``.safetensors``.
        model: saved with its configuration.
        settings: anything JSON can hold: data, training and sampling settings, seed, scores.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "format": FORMAT,
        "energy": json.dumps(asdict(model.config)),
        "settings": json.dumps(settings, sort_keys=True),
    }
    partial = path.with_suffix(".partial")
    partial.write_bytes(_to_safetensors(model.state_dict(), metadata))
    partial.replace(path)
    return path


def _to_safetensors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """The safetensors format, written here so that a training node needs torch and numpy only.

    Length of the header (8 bytes, little endian), header (JSON, padded to 8 bytes), then the tensors, row-major.
    """
    names = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": names[tensors[name].dtype], "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in arrays.values())


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The file of a bundled checkpoint by data set name, or the path itself.

    Raises:
        ValueError: if there is no such file, naming the bundled ones.
    """
    bundled = CHECKPOINTS / f"{name_or_path}.safetensors"
    path = bundled if bundled.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CHECKPOINTS.glob("*.safetensors"))) or "none bundled"
        raise ValueError(
            f"checkpoint is {str(name_or_path)!r}, expected an existing .safetensors file or one of: {names}"
        )
    return path


def read_settings(name_or_path: str | Path) -> dict[str, Any]:
    """The settings saved with a checkpoint, and its energy configuration under ``energy``.

    Raises:
        ValueError: on a file that is truncated or not one of ours. Nothing in a file is ever executed.
    """
    from safetensors import SafetensorError, safe_open

    path = find_checkpoint(name_or_path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} is truncated or not a safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"checkpoint {path} has format {metadata.get('format')!r}, expected {FORMAT!r}")
    try:
        return json.loads(metadata["settings"]) | {"energy": json.loads(metadata["energy"])}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint {path} has unreadable settings: {error!r}") from None


def load_model(name_or_path: str | Path, device: str | torch.device | None = None) -> ContinuousCGCNN:
    """A trained energy, in evaluation mode: a bundled checkpoint by data set name (``"perov5"``), or a file.

    The settings it was saved with are in ``model.settings``.

    Raises:
        ValueError: on a missing, truncated or foreign file.
    """
    from safetensors.torch import load_file

    settings = read_settings(name_or_path)
    path = find_checkpoint(name_or_path)
    try:
        model = ContinuousCGCNN(EnergyConfig(**settings["energy"]))
    except TypeError as error:
        raise ValueError(f"checkpoint {path} has settings of another energy: {' '.join(str(error).split())}") from None
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint {path} does not fit its own configuration: {' '.join(str(error).split())}"
        ) from None
    model.settings = settings
    return model.to(device or "cpu").eval().requires_grad_(False)
