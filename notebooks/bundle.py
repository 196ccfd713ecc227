"""Take a trained checkpoint into ``data/checkpoints``, with log, card and, for noise levels, validation losses.

``python notebooks/bundle.py runs/perov5.safetensors``; the log is thinned to at most 450 rows. With ``--judge NAME``
its crystals are ranked by another bundled checkpoint; with ``--n-steps N`` it samples by chains of N energy gradients.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from ablation import N_VALIDATION, validation_loss
from model_card import model_card

from contsp_core.checkpoints import load_model, read_settings, save_checkpoint
from contsp_core.data import CHECKPOINTS, choose, load_split
from contsp_core.sampler import sampling_config


def bundle(trained: Path, folder: Path = CHECKPOINTS, judge: str | None = None, n_steps: int | None = None) -> Path:
    """The bundled checkpoint; ``.csv`` and ``.md`` lie beside it."""
    model, header = load_model(trained), read_settings(trained)
    if n_steps is not None:
        model.sampling = replace(sampling_config(model), n_steps=n_steps)
    settings = {name: value for name, value in header.items() if name not in ("energy", "sampling")}  # made by saving
    settings |= {"judge": judge} if judge else {}
    if model.noise_features is not None:
        crystals = load_split(header["dataset"], "val").crystals.to(torch.float32)
        crystals = crystals[choose(range(len(crystals)), N_VALIDATION)]
        losses = validation_loss(model, crystals)
        settings["validation_loss"] = {name: float(f"{value:.3g}") for name, value in losses.items()}
    target = save_checkpoint(folder / trained.name, model, settings)
    log = pd.read_csv(trained.with_suffix(".csv"))
    log[log.index % -(-len(log) // 450) == 0].to_csv(target.with_suffix(".csv"), index=False, float_format="%.5g")
    target.with_suffix(".md").write_text(model_card(target) + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trained", type=Path, nargs="+")
    parser.add_argument("--judge", help="bundled checkpoint that ranks the crystals (default: each does so itself)")
    parser.add_argument("--n-steps", type=int, help="of a chain when it samples (default: as the checkpoint says)")
    options = parser.parse_args(sys.argv[1:])
    for path in options.trained:
        print(bundle(path, judge=options.judge, n_steps=options.n_steps))
