"""What is kept of a training? One safetensors file with the weights and, as JSON in its header, all that made them.

A SHA-256 of all content is in the header. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from contsp_core.data import find_checkpoint, retold, write_whole
from contsp_core.diffusion import DiffusionConfig
from contsp_core.energy import ContinuousCGCNN, EnergyConfig
from contsp_core.mala import AnnealConfig
from contsp_core.sampler import sampling_config

FORMAT = "contsp-3"


def save_checkpoint(path: str | Path, model: ContinuousCGCNN, settings: dict[str, Any]) -> Path:
    """Write the model, its configuration, how it is sampled, and settings; the file appears whole or not at all.

    ``settings``, of data and training, go into JSON. A ``path`` that does not end in ``.safetensors``, and a judge that
    is not named there, are a ValueError.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"checkpoint is {str(path)!r}, expected a path that ends in .safetensors")
    if model.judge is not model and not settings.get("judge"):
        raise ValueError("model has a judge, expected its bundled name, or path, as settings['judge']")
    settings = settings | {"sampling": asdict(sampling_config(model))}
    header = {"energy": json.dumps(asdict(model.config)), "settings": json.dumps(settings, sort_keys=True)}
    write_tensors(path, model.state_dict(), header)
    return path


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with text metadata; whole on disk, or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = metadata | {"format": FORMAT}
    content = save(tensors, metadata | {"sha256": digest(tensors, metadata)})
    write_whole(path, lambda file: file.write(content))


def digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of names, types, shapes, numbers and metadata, in whatever order they are written."""
    kinds = {name: (str(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
    found = hashlib.sha256(json.dumps([kinds, metadata], sort_keys=True).encode())
    for name in sorted(tensors):
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file of :func:`write_tensors`; a ValueError tells of one that is damaged or foreign."""
    problem = f"checkpoint {path} is truncated or not a checkpoint"  # whatever a file can be
    with retold(problem, Exception), safe_open(path, "pt") as file:
        metadata, names = dict(file.metadata() or {}), file.keys()
        tensors = {name: file.get_tensor(name).clone() for name in names}  # aligned, for rounding
    found, sha256 = metadata.get("format"), metadata.pop("sha256", None)
    if found != FORMAT:
        raise ValueError(f"checkpoint {path} has format {str(found)[:40]!r}, expected {FORMAT!r}")
    if digest(tensors, metadata) != sha256:
        raise ValueError(f"checkpoint {path} is damaged: its content is not what was saved (SHA-256 differs)")
    return tensors, metadata


def read_settings(name_or_path: str | Path) -> dict[str, Any]:
    """The settings saved with a checkpoint, and its energy configuration under ``energy``; see :func:`load_model`."""
    return _read(find_checkpoint(name_or_path))[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = read_tensors(path)
    with retold(f"checkpoint {path} has unreadable settings", ValueError, KeyError, TypeError):
        return tensors, json.loads(metadata["settings"]) | {"energy": json.loads(metadata["energy"])}


def load_model(name_or_path: str | Path, device: str | torch.device | None = None) -> ContinuousCGCNN:
    """A trained energy, in evaluation mode: a bundled checkpoint by name (``"perov5"``), or a file.

    What it was saved with is told by :func:`read_settings`; ``model.sampling`` says how to sample it, ``model.judge``
    is the energy that ranks. A ValueError tells of a file that is missing or damaged, or of weights not finite.
    """
    tensors, settings = _read(path := find_checkpoint(name_or_path))
    judge = settings.get("judge")
    if judge and read_settings(judge).get("judge"):  # a circle would have no end
        raise ValueError(f"checkpoint {path} has the judge {judge!r}, which has one too, expected one without")
    judge = judge and load_model(judge, device)
    with retold(f"checkpoint {path} does not fit its own configuration", Exception):  # whatever a header can say
        config = EnergyConfig(**settings["energy"])
        kind = AnnealConfig if "proposal" in settings["sampling"] else DiffusionConfig
        with torch.device("meta"):  # no memory is spent on what the file only claims to hold
            model = ContinuousCGCNN(config, kind(**settings["sampling"]), judge).to(tensors["embedding.weight"].dtype)
        for name, tensor in model.state_dict().items():
            if name in tensors and tensors[name].dtype != tensor.dtype:
                raise ValueError(f"{name} is {tensors[name].dtype}, expected {tensor.dtype}")
            if name in tensors and not tensors[name].isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
        model.load_state_dict(tensors, assign=True)
    with retold(f"device is {device!r}, which fails", RuntimeError, AssertionError):
        return model.to(device or "cpu").eval().requires_grad_(False)
