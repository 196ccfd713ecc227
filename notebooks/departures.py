"""What each departure from the public code does to the chains of one energy, on validation crystals.

``python notebooks/departures.py --checkpoint FILE`` writes ``figures/03_departures_perov5.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from samplers import score_samples
from torch import Tensor

from contsp_core import Crystals, load_model, mala
from contsp_core.crystals import keyed_rng
from contsp_core.data import DATASETS, choose, load_split
from contsp_core.energy import ContinuousCGCNN
from contsp_core.lattice import deform
from contsp_core.mala import AnnealConfig, ChainState, Move, anneal
from contsp_core.sampler import random_crystals, start_crystals


@dataclass(frozen=True)
class Chains:
    """One way to sample; the defaults are the paper's, with the exact acceptance ratio."""

    config: AnnealConfig = field(default_factory=AnnealConfig)
    start: str = "paper"  # "volumes": the paper's cells, scaled to learned volumes; "cells": those of like crystals
    public: bool = False  # whether moves are accepted as the public code does
    again: bool = False  # whether, as a persistent chain does, another one goes on from the end, at a tenth of T


STRAIN = AnnealConfig(proposal="strain", measure="invariant", cell_step_ratio=0.04)
DEPARTURES = {
    "the paper's, exact ratio": Chains(),
    "ratio of the public code": Chains(public=True),
    "strain moves": Chains(STRAIN),
    "learned volumes": Chains(start="volumes"),
    "cells of like crystals": Chains(start="cells"),
    "strain moves, cells of like crystals": Chains(STRAIN, start="cells"),
    "persistent: gone on from there": Chains(again=True),
}
EVERY_LENGTH = list(DEPARTURES)[:2]  # the others are compared at the paper's 1000 steps


def public_step(
    energy: mala.Energy, state: ChainState, step: Tensor, temperature: Tensor, rng: mala.Rng, *_: str
) -> ChainState:
    """A Cartesian step that accepts as the public code does: its chain has another law than exp(−E / T).

    In both densities of its ratio the drift has the wrong sign, and the way back is taken from the proposed crystal as
    it was before its cell was reduced.
    """
    move = mala.draw_move(state, "cartesian", step, temperature, rng)
    moved, new, sound = mala.try_move(energy, state, move, "cartesian")

    def log_density(move: Move, at: ChainState) -> Tensor:
        drift = mala.mean_move(at, "cartesian", step, temperature)
        return mala.log_move_density(move, Move(-drift.cell, -drift.positions), step, moved)

    backward = log_density(Move(-move.cell, -move.positions), replace(new, crystals=moved))
    log_ratio = (state.energy - new.energy) / temperature + backward - log_density(move, state)
    return mala.accept(state, new, log_ratio, sound, rng)


def start_of(chains: Chains, like: ContinuousCGCNN, species: Sequence[Sequence[int]], places: Sequence[int], rng):
    """Where these chains start; ``like`` holds the learned volumes and the cells of training crystals."""
    if chains.start == "cells":
        return start_crystals(like, species, rng, places)
    crystals = random_crystals(species, rng)
    if chains.start == "paper":
        return crystals
    expected = crystals.sum_atoms(like.atomic_volume.double()[crystals.atomic_numbers])
    scale = (expected / crystals.volume) ** (1 / 3)
    return deform(crystals, scale[:, None, None] * torch.eye(3, dtype=torch.float64))


def run_departure(
    chains: Chains, model: ContinuousCGCNN, start: Crystals, n_steps: int, rng
) -> tuple[Crystals, dict[str, float]]:
    """End points; the acceptance rate, its value in the last tenth, and the share of chains that never moved."""
    accepted: list[Tensor] = []
    step = public_step if chains.public else mala.mala_step
    crystals, config = start.to(torch.float32), replace(chains.config, n_steps=n_steps)
    with mock.patch.object(mala, "mala_step", step):
        for begin in (0.0, 1 / 3) if chains.again else (0.0,):
            begins = torch.full((len(crystals),), begin)
            crystals = anneal(
                model, crystals, config, rng, lambda _, s: accepted.append(s.accepted.float()), begins
            ).crystals
    rates = torch.stack(accepted)
    row = {"acceptance": float(rates.mean()), "acceptance, end": float(rates[-len(rates) // 10 :].mean())}
    return crystals, row | {"never moved": float((rates.sum(dim=0) == 0).float().mean())}


def compare_departures(
    model: ContinuousCGCNN,
    like: ContinuousCGCNN,
    references: Sequence,
    lengths: Sequence[int],
    n_samples: int,
    seed: int = 0,
) -> pd.DataFrame:
    """A row for each of ``DEPARTURES`` and length of chain."""
    entries = [tuple(sorted(s.atomic_numbers)) for s in references for _ in range(n_samples)]
    places = [place for _ in references for place in range(n_samples)]
    rows = []
    for name, chains in DEPARTURES.items():
        for n_steps in lengths if name in EVERY_LENGTH else [n for n in lengths if n == 1000] or lengths[-1:]:
            rng = [keyed_rng(seed, *key) for key in zip(entries, places)]
            start = start_of(chains, like, entries, places, rng)
            crystals, row = run_departure(chains, model, start, n_steps, rng)
            gradients = n_steps * (1 + chains.again)
            scores = score_samples(model, references, crystals, n_samples)
            rows.append({"chains": name, "gradients": gradients} | row | scores)
    return pd.DataFrame(rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="perov5", choices=DATASETS)
    parser.add_argument("--checkpoint", required=True, help="trained by contrastive divergence, without noise levels")
    parser.add_argument("--like", help="holds learned volumes and cells of like crystals (default: <dataset>)")
    parser.add_argument("--n-structures", type=int, default=100)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a .csv (default figures/03_departures_<dataset>.csv)")
    options = parser.parse_args()
    output = options.output or Path(__file__).parent.parent / "figures" / f"03_departures_{options.dataset}.csv"
    torch.set_num_threads(1)
    model, like = load_model(options.checkpoint), load_model(options.like or options.dataset)
    references = choose(load_split(options.dataset, "val"), options.n_structures, options.seed)
    table = compare_departures(model, like, references, options.lengths, options.n_samples, options.seed)
    table.to_csv(output, index=False, float_format="%.4g")
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
