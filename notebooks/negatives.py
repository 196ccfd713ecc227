"""Wrong structures for the training crystals: what chains find, or known crystals with their elements exchanged.

``python notebooks/negatives.py --checkpoint mp20 --dataset mp20 --output runs/chains.npz`` runs a chain for each
training crystal, from the cell of another composition; with ``--source templates`` it takes one of the crystals of
other compositions that are most alike, in its place, and lets it slide into its well for ``--n-steps`` gradients.
``python -m contsp_core.training --dataset mp20 --initial mp20 --negatives runs/chains.npz runs/templates.npz`` then
teaches an energy to tell them from the data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import torch
from parameters import output_file
from tqdm import tqdm

from contsp_core import Crystals, load_model
from contsp_core.crystals import keyed_rng, reduce_counts
from contsp_core.csp.candidates import TemplateLibrary, descend
from contsp_core.csp.metrics import spread
from contsp_core.data import load_split
from contsp_core.energy import ContinuousCGCNN
from contsp_core.sampler import run_chains, sampling_config, start_crystals

CHUNK_ATOMS = 4096
N_STARTS = 20  # cells, or templates, that are tried for a composition when it is predicted
N_FOUND = 60  # templates looked at: many may have the composition itself

Part = list[tuple[int, list[int]]]  # (row, atomic numbers)
Maker = Callable[[Part], list[tuple[int, Crystals]]]


def from_chains(model: ContinuousCGCNN, seed: int, n_steps: int | None, part: Part) -> list[tuple[int, Crystals]]:
    """A chain for each, the atoms in the order given; none starts in a cell of its formula."""
    torch.set_num_threads(1)
    rows, species = zip(*part, strict=True)
    config = sampling_config(model) if n_steps is None else replace(sampling_config(model), n_steps=n_steps)
    rng = [keyed_rng("negative", seed, row) for row in rows]
    start = start_crystals(model, species, rng, [row % N_STARTS for row in rows])
    return list(zip(rows, run_chains(model, start, config, rng), strict=True))


@lru_cache(maxsize=1)
def library_of(dataset: str) -> tuple[TemplateLibrary, np.ndarray]:
    """Made once in each process: the training crystals, and their compositions."""
    split = load_split(dataset, "train")
    return TemplateLibrary(split), reduce_counts(split.crystals.element_counts.numpy())


def from_templates(
    model: ContinuousCGCNN, dataset: str, seed: int, n_steps: int | None, part: Part
) -> list[tuple[int, Crystals]]:
    """One of the nearest templates of another composition for each that has any; their atoms in any order."""
    torch.set_num_threads(1)
    (library, counts), rows, chosen = library_of(dataset), [], []
    for row, species in part:
        made = library.substitute(species, N_FOUND, seed)
        others = [s for s in made if (counts[s.properties["template"]] != counts[row]).any()][:N_STARTS]
        if others:
            place = torch.randint(len(others), (), generator=keyed_rng("template", seed, row))
            rows.append(row)
            chosen.append(others[int(place)])
    chosen = descend(model, chosen, n_steps) if n_steps and chosen else chosen
    return list(zip(rows, Crystals.from_structures(chosen), strict=True)) if chosen else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--output", type=output_file(".npz"), required=True)
    parser.add_argument("--source", default="chains", choices=("chains", "templates"))
    parser.add_argument("--n-steps", type=int, help="energy gradients (default: a whole chain; of a template, none)")
    parser.add_argument("--n-jobs", type=int, default=-1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    split, model = load_split(options.dataset, "train"), load_model(options.checkpoint)
    chains: Maker = partial(from_chains, model, options.seed, options.n_steps)
    templates: Maker = partial(from_templates, model, options.dataset, options.seed, options.n_steps)
    make = chains if options.source == "chains" else templates
    wanted = sorted(enumerate(split.species), key=lambda entry: -len(entry[1]))
    sizes = [len(species) for _, species in wanted]
    made = spread(make, wanted, sizes, CHUNK_ATOMS, options.n_jobs, return_as="generator_unordered")
    found = dict(tqdm(made, options.source, len(wanted)))
    if missing := [entry for entry in wanted if entry[0] not in found]:  # no other crystal has this stoichiometry
        found |= dict(from_chains(model, options.seed, options.n_steps or None, missing))
    crystals = Crystals.cat([found[row].to(torch.float64) for row in range(len(wanted))])
    replace(split, crystals=crystals, columns={}).save(options.output)


if __name__ == "__main__":
    import negatives  # by this name other processes find what is cached

    negatives.main()
