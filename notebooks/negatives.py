"""What do chains find for the training crystals, where it is not the crystal itself? Negatives for the training.

``python notebooks/negatives.py --checkpoint mp20 --dataset mp20 --output runs/negatives.npz`` runs a chain for each
training crystal, from the cell of another composition; then ``python -m contsp_core.training --dataset mp20 --initial
mp20 --negatives runs/negatives.npz`` teaches the energy to tell them from the data.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from contsp_core import Crystals, load_model
from contsp_core.crystals import keyed_rng
from contsp_core.csp.metrics import spread
from contsp_core.data import load_split
from contsp_core.energy import ContinuousCGCNN
from contsp_core.sampler import run_chains, sampling_config, start_crystals

CHUNK_ATOMS = 4096


def find(
    model: ContinuousCGCNN, seed: int, n_steps: int | None, part: list[tuple[int, list[int]]]
) -> list[tuple[int, Crystals]]:
    """A chain for each (row, atomic numbers), the atoms in the order given; none starts in a cell of its formula."""
    torch.set_num_threads(1)
    rows, species = zip(*part, strict=True)
    config = sampling_config(model) if n_steps is None else replace(sampling_config(model), n_steps=n_steps)
    rng = [keyed_rng("negative", seed, row) for row in rows]
    found = run_chains(model, start_crystals(model, species, rng), config, rng)
    return list(zip(rows, found, strict=True))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--n-steps", type=int, help="energy gradients of a chain; by default as the checkpoint says")
    parser.add_argument("--n-jobs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split, model = load_split(options.dataset, "train"), load_model(options.checkpoint)
    rows = sorted(enumerate(split.species), key=lambda entry: -len(entry[1]))
    make = partial(find, model, options.seed, options.n_steps)
    sizes = [len(species) for _, species in rows]
    made = spread(make, rows, sizes, CHUNK_ATOMS, options.n_jobs, return_as="generator_unordered")
    found = dict(tqdm(made, "chains", len(rows)))
    crystals = Crystals.cat([found[row] for row in range(len(rows))]).to(torch.float64)
    replace(split, crystals=crystals, columns={}).save(options.output)


if __name__ == "__main__":
    main()
