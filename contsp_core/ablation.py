"""What each setting changes: short training runs that differ in one thing, scored on the same validation crystals.

``python -m contsp_core.ablation --dataset perov5 --output figures/03_ablation_perov5.csv``
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from contsp_core.data import load_split
from contsp_core.diffusion import denoising_residual
from contsp_core.energy import ContinuousCGCNN
from contsp_core.evaluation import choose_crystals
from contsp_core.metrics import evaluate_csp
from contsp_core.sampler import sample_structures
from contsp_core.training import initial_model, preset, train

SETTINGS: dict[str, dict[str, Any]] = {
    "preset": {},
    "width 64": {"width": 64},
    "2 convolutions": {"n_conv": 2},
    "4 convolutions": {"n_conv": 4},
    "cutoff multiple 2": {"cutoff_multiple": 2.0},
    "cutoff multiple 3": {"cutoff_multiple": 3.0},
    "32 basis functions": {"n_basis": 32},
    "basis of the paper": {"n_basis": 32, "basis_max": 20.0, "basis_width": 3.0},
    "spectral norm": {"spectral_norm": True},
    "constant atomic volume": {"atomic_volume": 20.0},  # Å³
}
LEVELS = (0.03, 0.1, 0.3, 1.0)  # Å, of the validation loss


def validation_loss(model: ContinuousCGCNN, crystals: Any, sigma: float, seed: int = 0) -> float:
    """Denoising loss of one noise level σ, Å, over given crystals: 1 for a zero energy."""
    level = torch.full((len(crystals),), sigma)
    residual = denoising_residual(model, crystals, level, torch.Generator().manual_seed(seed))
    return float((residual.loss_positions + residual.loss_strain).mean()) / 2


def compare_settings(
    dataset: str,
    n_updates: int = 250,
    settings: Mapping[str, Mapping[str, Any]] = SETTINGS,
    n_structures: int = 100,
    n_samples: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Train the energy of a data set in several settings, each for as many updates.

    Args:
        dataset: name known to :func:`contsp_core.data.load_split`.
        n_updates: of each run.
        settings: changes of the preset, by name: fields of ``EnergyConfig``, or ``atomic_volume`` (Å³, the same for all
            elements, instead of the fitted ones).
        n_structures: validation crystals that are predicted, chosen by the seed.
        n_samples: for each.
        seed: of weights, batches, noise and samples.

    Returns:
        A row for each setting: validation loss at four noise levels, match rate of one sample and of any.
    """
    crystals = load_split(dataset, "train").crystals.to(torch.float32)
    validation = load_split(dataset, "val")
    held_out = validation.crystals.to(torch.float32)[:500]
    chosen = choose_crystals(validation, n_structures, seed)
    rows = []
    for name, changes in settings.items():
        model = _train(dataset, crystals, dict(changes), n_updates, seed)
        losses = {f"loss_{sigma}": validation_loss(model, held_out, sigma, seed) for sigma in LEVELS}
        samples = sample_structures(model, chosen.species, n_samples, seed=seed)
        scores, _ = evaluate_csp(chosen.structures, samples, metre=False, progress=False)
        rates = {"match_rate@1": scores["match_rate_random@1"], f"match_rate@{n_samples}": scores["match_rate"]}
        rows.append({"setting": name} | losses | rates)
        print(rows[-1], file=sys.stderr)
    return pd.DataFrame(rows)


def _train(dataset: str, crystals: Any, changes: dict[str, Any], n_updates: int, seed: int) -> ContinuousCGCNN:
    volume = changes.pop("atomic_volume", None)
    energy, config = preset(dataset)
    model = initial_model(crystals, replace(energy, **changes), seed)
    if volume is not None:
        model.atomic_volume.fill_(volume)
    # the average over fewer updates, in proportion to the shorter run
    config = replace(config, n_updates=n_updates, seed=seed, ema_decay=0.98)
    _, averaged = deque(train(model, crystals, config), maxlen=1)[0]
    return averaged


def main(arguments: Sequence[str]) -> None:
    """Write the table as CSV."""
    parser = argparse.ArgumentParser(prog="python -m contsp_core.ablation", description=__doc__)
    parser.add_argument("--dataset", default="perov5")
    parser.add_argument("--n-updates", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    options = parser.parse_args(arguments)
    table = compare_settings(options.dataset, options.n_updates, seed=options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output, index=False, float_format="%.4g")


if __name__ == "__main__":
    main(sys.argv[1:])
