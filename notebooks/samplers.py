"""What each sampler reaches with equally many gradients of one energy, on validation crystals.

``python notebooks/samplers.py --dataset perov5 --n-structures 60 --n-samples 4 --gradients 100 300 1000`` writes
``figures/07_samplers_perov5.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from matplotlib.figure import Figure
from parameters import FIGURES, output_file

from contsp_core import Crystals, load_model
from contsp_core.crystals import keyed_rng
from contsp_core.csp.figures import COLORS, new_figure
from contsp_core.csp.metrics import evaluate_csp
from contsp_core.data import DATASETS, choose, load_split
from contsp_core.diffusion import DiffusionConfig
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import STRAIN, AnnealConfig
from contsp_core.sampler import random_crystals, run_chains, start_crystals

SAMPLERS = {  # whether cells are those of like crystals or the paper's, and how chains go on
    "MALA of the paper": (False, AnnealConfig()),
    "MALA, strain moves, like cells": (True, STRAIN),
    "a level a gradient": (True, DiffusionConfig(n_levels=10_000)),
    "60 levels": (True, DiffusionConfig(n_levels=60, temperature=1.0)),
    "20 levels": (True, DiffusionConfig(n_levels=20, temperature=1.0)),
    "20 levels, T = 0.5": (True, DiffusionConfig(n_levels=20, temperature=0.5)),
}
SCORES = {  # columns of the table and their scores: rates of one sample, the mean over all; RMSE of the first ones
    "match@1": "match_rate_random@1",
    "strict@1": "match_rate_strict_random@1",
    "good@1": "match_rate_good_random@1",
    "rmse@1": "rmse@1",
    "match_lowest": "match_rate_lowest_energy",
    "strict_lowest": "match_rate_strict_lowest_energy",
}


def draw(model: ContinuousCGCNN, name: str, species: Sequence[Sequence[int]], n_samples: int, n_steps: int, seed: int):
    """(n_species · n_samples) crystals, by the named sampler."""
    alike, config = SAMPLERS[name]
    entries = [tuple(sorted(numbers)) for numbers in species for _ in range(n_samples)]
    places = [place for _ in species for place in range(n_samples)]
    rng = [keyed_rng(seed, *key) for key in zip(entries, places)]
    start = start_crystals(model, entries, rng, places) if alike else random_crystals(entries, rng)
    return run_chains(model, start, replace(config, n_steps=n_steps), rng)


@torch.no_grad()
def score_samples(model: ContinuousCGCNN, references: Sequence, samples: Crystals, n_samples: int) -> dict[str, float]:
    """Energies above the reference, of all samples and of the best of each crystal, and scores."""
    energies = model(samples).unflatten(0, (-1, n_samples))
    above, structures = energies - model(Crystals.from_structures(references))[:, None], samples.to_structures()
    for structure, energy in zip(structures, energies.flatten().tolist(), strict=True):
        structure.properties["energy"] = energy
    lists = [structures[i : i + n_samples] for i in range(0, len(structures), n_samples)]
    scores, _ = evaluate_csp(references, lists, n_jobs=1, metre=False, progress=False)
    row = {"energy": float(above.mean()), "energy_best": float(above.amin(dim=1).mean())}
    row |= {column: scores[score] for column, score in SCORES.items()}
    return row | {f"match@{n_samples}": scores["match_rate"], f"rmse@{n_samples}": scores["rmse"]}


def compare_samplers(
    model: ContinuousCGCNN, references: Sequence, gradients: Sequence[int], n_samples: int, seed: int = 0
) -> pd.DataFrame:
    """A row for each sampler and length of chain: energies above the reference, and scores."""
    rows, species = [], [structure.atomic_numbers for structure in references]
    for n_steps in gradients:
        for name in SAMPLERS:
            drawn = draw(model, name, species, n_samples, n_steps, seed)
            row = score_samples(model, references, drawn, n_samples)
            rows.append({"sampler": name, "gradients": n_steps} | row)
    return pd.DataFrame(rows)


def plot_samplers(table: pd.DataFrame) -> Figure:
    """Match rate, strict rate and RMSE of one sample against the gradients spent on it; rows: data sets."""
    names = list(table["data set"].unique())
    figure, axes = new_figure(len(names), 3, size=(2.6, 2.2))
    figure.set_layout_engine("constrained")
    for row, dataset in zip(axes.reshape(len(names), 3), names, strict=True):
        for ax, (column, label) in zip(row, {"match@1": "match", "strict@1": "strict", "rmse@1": "RMSE"}.items()):
            for (name, part), color in zip(table[table["data set"] == dataset].groupby("sampler", sort=False), COLORS):
                ax.semilogx(part["gradients"], part[column], "o-", ms=3, color=color, label=name)
            ax.set(xlabel="gradients a sample", ylabel=f"{label}, {dataset}", ylim=(0, None))
            ax.set_xticks(part["gradients"], part["gradients"])
            ax.minorticks_off()
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--checkpoint", help="a bundled one by name, or a file (default: that of the data set)")
    parser.add_argument("--n-structures", type=int, default=60)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--gradients", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file(".csv"), help="a .csv (default figures/07_samplers_<dataset>.csv)")
    options = parser.parse_args()
    output = options.output or FIGURES / f"07_samplers_{options.dataset}.csv"
    torch.set_num_threads(1)
    model = load_model(options.checkpoint or options.dataset)
    if model.noise_features is None:
        parser.error(f"--checkpoint is {options.checkpoint!r}, expected an energy with noise levels, such as 'perov5'")
    references = choose(load_split(options.dataset, "val"), options.n_structures, options.seed)
    table = compare_samplers(model, references, options.gradients, options.n_samples, options.seed)
    table.to_csv(output, index=False, float_format="%.4g")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
