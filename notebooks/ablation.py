"""What each part of the energy is worth: variants trained equally long, their loss at each noise level, what they find.

``python notebooks/ablation.py --dataset perov5 --minutes 4`` writes ``figures/03_ablation_perov5.csv``. Minutes are of
one processor, so that another program on the machine does not disturb the comparison.
"""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest import mock

import pandas as pd
import torch
from parameters import FIGURES, output_file
from samplers import draw, score_samples

from contsp_core.crystals import Crystals, keyed_rng
from contsp_core.data import DATASETS, choose, load_split
from contsp_core.diffusion import denoising_residual
from contsp_core.energy import ContinuousCGCNN, EnergyConfig
from contsp_core.training import TrainConfig, TrainState, initial_model, preset, train_step

SIGMAS = (0.05, 0.1, 0.3, 0.6, 1.0, 1.5)  # Å
N_VALIDATION = 400
N_SEARCHED, N_SAMPLES, N_STEPS = 60, 4, 300  # validation crystals, chains for each, gradients of a chain
VARIANTS: dict[str, dict] = {
    "as shipped": {},
    "update of the paper": {"form": "paper"},
    "no vectors": {"n_vectors": 0},
    "embeddings drawn independently": {"independent": True},
    "2 convolutions": {"n_conv": 2},
    "4 convolutions": {"n_conv": 4},
    "width 64": {"width": 64},
    "width 128": {"width": 128},
    "cutoff 2.0": {"cutoff_multiple": 2.0},
    "cutoff 3.0": {"cutoff_multiple": 3.0},
    "basis to 20 Å": {"basis_max": 20.0},
}


def train_variant(
    crystals: Crystals, energy: EnergyConfig, config: TrainConfig, minutes: float, independent: bool = False
) -> TrainState:
    """Score matching for so many minutes of processor time."""
    model = initial_model(crystals, energy, config.seed)
    if independent:
        torch.nn.init.normal_(model.embedding.weight, generator=torch.Generator().manual_seed(config.seed))
    state, started = TrainState(model, config), None
    while (progress := 0.0 if started is None else (time.process_time() - started) / (60 * minutes)) < 1:
        train_step(state, crystals, config, progress)
        started = started or time.process_time()  # the first update compiles
    return state


def validation_loss(model: ContinuousCGCNN, crystals: Crystals) -> dict[str, float]:
    """Mean denoising loss of atoms and of cells at each level: 1 (of N atoms 1 − 1/N) for an energy that is zero."""
    found: dict[str, float] = {}
    for sigma in SIGMAS:
        parts = [
            denoising_residual(model, batch, torch.full((len(batch),), sigma), keyed_rng("ablation", sigma, first))
            for first in range(0, len(crystals), 100)
            for batch in [crystals[first : first + 100]]
        ]
        found[f"atoms {sigma}"] = float(torch.cat([part.loss_positions for part in parts]).mean())
        found[f"cell {sigma}"] = float(torch.cat([part.loss_strain for part in parts]).mean())
    return found


def compare_variants(
    dataset: str,
    minutes: float,
    seed: int = 0,
    on_row: Callable[[dict], None] | None = None,
    variants: Sequence[str] = tuple(VARIANTS),
) -> pd.DataFrame:
    """One row for each variant: updates made, losses on validation crystals, and scores of chains for some."""
    train, validation = (load_split(dataset, split).crystals.to(torch.float32) for split in ("train", "val"))
    validation = validation[choose(range(len(validation)), N_VALIDATION, seed)]
    references = choose(load_split(dataset, "val"), N_SEARCHED, seed)
    species = [structure.atomic_numbers for structure in references]
    energy, config = preset(dataset)
    rows = []
    for name in variants:
        changes = dict(VARIANTS[name])
        options = {"independent": changes.pop("independent", False)}
        n_vectors = changes.pop("n_vectors", None)
        with contextlib.ExitStack() as stack:
            if n_vectors is not None:
                stack.enter_context(mock.patch.object(EnergyConfig, "n_vectors", n_vectors))
                stack.enter_context(warnings.catch_warnings(action="ignore"))  # torch, of weights with no element
            state = train_variant(train, replace(energy, **changes), replace(config, seed=seed), minutes, **options)
            model = state.averaged
            losses = validation_loss(model, validation)
            samples = draw(model, "20 levels, T = 0.5", species, N_SAMPLES, N_STEPS, seed)
            scores = score_samples(model, references, samples, N_SAMPLES)
        rows.append({"variant": name, "updates": state.update} | losses | scores)
        if on_row is not None:
            on_row(rows[-1])
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="perov5", choices=DATASETS)
    parser.add_argument("--minutes", type=float, default=4.0, help="processor time of each variant")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file(".csv"), help="a .csv (default figures/03_ablation_<dataset>.csv)")
    options = parser.parse_args()
    output = options.output or FIGURES / f"03_ablation_{options.dataset}.csv"
    torch.set_num_threads(1)
    table = compare_variants(options.dataset, options.minutes, options.seed, print, options.variants)
    table.to_csv(output, index=False, float_format="%.3g")
    print(f"{output} written")


if __name__ == "__main__":
    main()
