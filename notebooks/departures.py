"""What each departure from the public code does: to the chains of an energy, and to an energy trained with such chains.

``python notebooks/departures.py --checkpoint FILE`` runs them for validation crystals and writes
``figures/03_departures_perov5.csv``; ``--train NAME --n-updates 200 --n-steps 100 --output FILE`` trains with them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
from joblib import Parallel, delayed
from parameters import FIGURES, output_file
from samplers import score_samples
from torch import Tensor

from contsp_core import Crystals, load_model, mala
from contsp_core.crystals import keyed_rng
from contsp_core.data import DATASETS, choose, load_split
from contsp_core.energy import ContinuousCGCNN, portable
from contsp_core.lattice import deform
from contsp_core.mala import STRAIN, AnnealConfig, ChainState, Move, anneal
from contsp_core.sampler import random_crystals, start_crystals
from contsp_core.training import Job, preset, run


@dataclass(frozen=True)
class Chains:
    """One way to sample; the defaults are the paper's, with the exact acceptance ratio."""

    config: AnnealConfig = field(default_factory=AnnealConfig)
    start: str = "paper"  # "volumes": the paper's cells, scaled to learned volumes; "cells": those of like crystals
    public: bool = False  # whether moves are accepted as the public code does
    again: bool = False  # whether, as a persistent chain does, another one goes on from the end, at a tenth of T

    def moves(self) -> AbstractContextManager:
        """In which all chains take these steps, those of a training too."""
        return mock.patch.object(mala, "mala_step", public_step if self.public else mala.mala_step)


DEPARTURES = {
    "the paper's, exact ratio": Chains(),
    "ratio of the public code": Chains(public=True),
    "invariant measure": Chains(AnnealConfig(measure="invariant")),
    "strain moves": Chains(replace(STRAIN, measure="cartesian")),
    "strain moves, invariant measure": Chains(STRAIN),
    "learned volumes": Chains(start="volumes"),
    "cells of like crystals": Chains(start="cells"),
    "all three: strain, invariant, cells": Chains(STRAIN, start="cells"),
    "persistent: gone on from there": Chains(again=True),
}
EVERY_LENGTH = list(DEPARTURES)[:2]  # the others are compared at the paper's 1000 steps
TRAINABLE = [name for name, chains in DEPARTURES.items() if chains.start == "paper" and not chains.again]
FAR = 3.0  # volumes that differ from the reference's by more than this factor are counted


def public_step(
    energy: mala.Energy, state: ChainState, step: Tensor, temperature: Tensor, rng: mala.Rng, *_: str
) -> ChainState:
    """A Cartesian step that accepts as the public code does: its chain has another law than exp(−E / T).

    In both densities of its ratio the drift has the wrong sign, and the way back is taken from the proposed crystal as
    it was before its cell was reduced. Not followed: after atoms were wrapped, that code keeps the cell's gradient of
    before.
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
    crystals, config = start.to(torch.float32), replace(chains.config, n_steps=n_steps)
    with chains.moves():
        for begin in (0.0, 1 / 3) if chains.again else (0.0,):
            begins = torch.full((len(crystals),), begin)
            crystals = anneal(
                model, crystals, config, rng, lambda _, s: accepted.append(s.accepted.float()), begins
            ).crystals
    rates = torch.stack(accepted)
    row = {"acceptance": float(rates.mean()), "acceptance, end": float(rates[-len(rates) // 10 :].mean())}
    return crystals, row | {"never moved": float((rates.sum(dim=0) == 0).float().mean())}


@torch.no_grad()
def describe_ends(model: ContinuousCGCNN, references: Sequence, crystals: Crystals, n_samples: int) -> dict[str, float]:
    """Median energy above the reference, and shares of end points that are far too large or far too small."""
    known = Crystals.from_structures(references)[[i for i in range(len(references)) for _ in range(n_samples)]]
    above, grown = model(crystals) - model(known), crystals.volume / known.volume
    shares = {"expanded": grown > FAR, "collapsed": grown < 1 / FAR}
    return {"energy_median": float(above.median())} | {name: float(far.float().mean()) for name, far in shares.items()}


def compare_departures(
    model: ContinuousCGCNN,
    like: ContinuousCGCNN,
    references: Sequence,
    lengths: Sequence[int],
    n_samples: int,
    seed: int = 0,
    names: Sequence[str] = tuple(DEPARTURES),
) -> pd.DataFrame:
    """A row for each of these departures and lengths of chain, shared by all cores."""
    entries = [tuple(sorted(s.atomic_numbers)) for s in references for _ in range(n_samples)]
    places = [place for _ in references for place in range(n_samples)]
    model, like = portable(model), portable(like)

    def row(name: str, n_steps: int) -> dict:
        torch.set_num_threads(1)
        rng, chains = [keyed_rng(seed, *key) for key in zip(entries, places)], DEPARTURES[name]
        start = start_of(chains, like, entries, places, rng)
        crystals, rates = run_departure(chains, model, start, n_steps, rng)
        scores = score_samples(model, references, crystals, n_samples)
        described = describe_ends(model, references, crystals, n_samples)
        return {"chains": name, "gradients": n_steps * (1 + chains.again)} | rates | described | scores

    one = [n for n in lengths if n == 1000] or lengths[-1:]
    tasks = [(name, n_steps) for name in names for n_steps in (lengths if name in EVERY_LENGTH else one)]
    return pd.DataFrame(Parallel(-1)(delayed(row)(*task) for task in tasks))


def train(name: str, dataset: str, output: Path, n_updates: int, n_steps: int, seed: int) -> None:
    """The paper's objective and settings, with chains of another kind, from the paper's start."""
    energy, config = preset(dataset, "contrastive_divergence")
    chain = replace(DEPARTURES[name].config, n_steps=n_steps)
    with DEPARTURES[name].moves():
        run(Job(dataset, output, energy, replace(config, n_updates=n_updates, chain=chain, seed=seed)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="perov5", choices=DATASETS)
    parser.add_argument("--checkpoint", nargs="+", help="trained by contrastive divergence, without noise levels")
    parser.add_argument("--like", help="holds learned volumes and cells of like crystals (default: <dataset>)")
    parser.add_argument("--chains", nargs="+", default=list(DEPARTURES), choices=DEPARTURES, metavar="NAME")
    parser.add_argument("--n-structures", type=int, default=100)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--lengths", type=int, nargs="+", default=[100, 300, 1000, 3000])
    parser.add_argument("--train", choices=TRAINABLE, metavar="NAME", help="train with such chains instead")
    parser.add_argument("--n-updates", type=int, default=200, help="of the training")
    parser.add_argument("--n-steps", type=int, default=100, help="of a chain in the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output",
        type=output_file(".csv", ".safetensors"),
        help="a .csv (default figures/03_departures_<dataset>.csv)",
    )
    options = parser.parse_args()
    if bool(options.checkpoint) == bool(options.train) or (options.train and not options.output):
        parser.error("expected --checkpoint, or --train and --output")
    if options.output and options.output.suffix != (".safetensors" if options.train else ".csv"):
        parser.error("--output is a .safetensors file with --train, else a .csv")
    if options.train and options.output.exists():
        parser.error(f"--output {options.output} exists, and does not say how its chains accepted: choose another")
    if options.train:
        torch.set_num_threads(1)
        train(options.train, options.dataset, options.output, options.n_updates, options.n_steps, options.seed)
        return
    output = options.output or FIGURES / f"03_departures_{options.dataset}.csv"
    like, tables = load_model(options.like or options.dataset), {}
    references = choose(load_split(options.dataset, "val"), options.n_structures, options.seed)
    for checkpoint in options.checkpoint:
        arguments = load_model(checkpoint), like, references, options.lengths, options.n_samples, options.seed
        tables[Path(checkpoint).stem] = compare_departures(*arguments, options.chains)
    table = pd.concat(tables, names=["checkpoint"]).droplevel(1)
    table.to_csv(output, index=len(tables) > 1, float_format="%.4g")
    print(table.round(3).to_string(index=len(tables) > 1))


if __name__ == "__main__":
    main()
