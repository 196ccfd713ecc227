"""Training: contrastive divergence as in Figure 1 of the paper, or denoising score matching, on one visible loop.

``python -m contsp_core.training --dataset perov5 --output runs/perov5.safetensors``
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from contsp_core.checkpoints import load_model, save_checkpoint
from contsp_core.crystals import Crystals, expand_composition, fit_atomic_volumes, reduce_species
from contsp_core.diffusion import DiffusionConfig, random_noise_levels, score_matching_step
from contsp_core.energy import PRESETS, ContinuousCGCNN, EnergyConfig
from contsp_core.lattice import niggli_reduce
from contsp_core.mala import AnnealConfig, anneal, random_crystals
from contsp_core.sampler import sample_crystals


class ReplayBuffer:
    """The last sample of each species list, where persistent chains start."""

    def __init__(self) -> None:
        self._samples: dict[tuple[int, ...], tuple[Crystals, int]] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def get(self, species: list[int]) -> tuple[Crystals, int] | None:
        """The sample and the update that made it."""
        return self._samples.get(tuple(species))

    def put(self, crystals: Crystals, update: int) -> None:
        """Remember every crystal of a batch."""
        for system, species in enumerate(crystals.species):
            self._samples[tuple(species)] = (crystals[system], update)


def contrastive_divergence_step(
    model: ContinuousCGCNN,
    crystals: Crystals,
    config: TrainConfig,
    rng: torch.Generator,
    buffer: ReplayBuffer | None = None,
    update: int = 0,
) -> dict[str, float]:
    """Accumulate in ``.grad`` the gradient of mean(E(U) − E(Ũ)) + α (mean E(U)² + mean E(Ũ)²) (Figure 1).

    Ũ is sampled under the current θ, for Expand(Reduce(species)) of every training crystal: the description of a
    crystal enters through E alone, which is why the training map is strongly re-description invariant.

    Samples come from annealed MALA chains, or, if ``config.chain`` is a ``DiffusionConfig``, down the noise levels.

    Returns:
        The loss and what the log shows: energies, gap, and of chains acceptance rate, share and age of buffered starts.
    """
    species = [
        expand_composition(reduce_species(numbers), rng, config.expand_p, config.max_atoms)
        for numbers in crystals.species
    ]
    was_training = model.training
    model.eval().requires_grad_(False)
    if isinstance(config.chain, DiffusionConfig):
        samples, row = sample_crystals(model, species, config.chain, rng), {}
    else:
        samples, row = _persistent_chains(model, crystals, species, config, rng, buffer, update)
    model.train(was_training).requires_grad_(True)
    real, sampled = model(crystals), model(samples)
    penalty = config.energy_penalty * (real.square().mean() + sampled.square().mean())
    loss = (real.mean() - sampled.mean()) + penalty
    loss.backward()
    return {
        "loss": float(loss.detach()),
        "energy_real": float(real.detach().mean()),
        "energy_sample": float(sampled.detach().mean()),
        "gap": float((real.mean() - sampled.mean()).detach()),
    } | row


def _persistent_chains(
    model: ContinuousCGCNN,
    crystals: Crystals,
    species: list[list[int]],
    config: TrainConfig,
    rng: torch.Generator,
    buffer: ReplayBuffer | None,
    update: int,
) -> tuple[Crystals, dict[str, float]]:
    """Annealed MALA from fresh starts and from the buffer, which keeps the result; and what the log shows of it."""
    initial, start, ages = _chain_starts(species, config, rng, buffer, update)
    accepted: list[Tensor] = []
    record = lambda _, state: accepted.append(state.accepted.float().mean())  # noqa: E731
    initial = initial.to(crystals.cell.device).to(crystals.cell.dtype)
    state = anneal(model, initial, config.chain, rng, record, start)
    if buffer is not None:
        buffer.put(state.crystals.to("cpu"), update)  # where fresh starts are drawn
    return state.crystals, {
        "acceptance_rate": float(torch.stack(accepted).mean()),
        "buffer_share": len(ages) / len(species),
        "buffer_age": float(np.mean(ages)) if ages else 0.0,
        "n_nonfinite": int(state.n_nonfinite.sum()),
    }


def _chain_starts(
    species: list[list[int]], config: TrainConfig, rng: torch.Generator, buffer: ReplayBuffer | None, update: int
) -> tuple[Crystals, Tensor, list[int]]:
    """Fresh or buffered starts, where on its schedules each begins, and the ages (updates) of the buffered ones."""
    starts = random_crystals(species, rng)
    persistent = torch.rand(len(species), generator=rng) < config.buffer_share
    start = torch.zeros(len(species))
    parts, ages = [], []
    for system, numbers in enumerate(species):
        found = buffer.get(numbers) if buffer is not None and persistent[system] else None
        if found is not None:
            start[system] = config.buffer_start
            ages.append(update - found[1])
        parts.append(starts[system] if found is None else found[0])
    return Crystals.cat(parts), start, ages


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run; the defaults are the paper's."""

    objective: Literal["contrastive_divergence", "score_matching"] = "contrastive_divergence"
    n_updates: int = 445  # 5 epochs of Perov-5
    time_limit_s: float | None = None  # stop after so long, if that comes first; the learning rate follows
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 0  # updates
    final_learning_rate: float = 1.0  # fraction of learning_rate reached by a cosine
    weight_decay: float = 0.0
    clip_norm: float | None = None
    ema_decay: float = 0.0  # of the weights that are kept; 0 keeps the last ones
    energy_penalty: float = 0.1  # α of mean E² (contrastive divergence)
    expand_p: float = 0.5
    max_atoms: int | None = None  # of an expanded composition
    chain: AnnealConfig | DiffusionConfig = field(default_factory=AnnealConfig)
    buffer_share: float = 0.0  # chains that start at an earlier sample of the same species; the others start afresh
    buffer_start: float = 1 / 3  # how far down the schedules such a chain begins; a third is T = 0.1
    seed: int = 0


SCORE_MATCHING = TrainConfig(
    objective="score_matching",
    n_updates=20_000,
    learning_rate=2e-3,
    warmup=100,
    final_learning_rate=0.01,
    weight_decay=1e-4,
    clip_norm=1.0,
    ema_decay=0.999,
)
FINE_TUNING = TrainConfig(
    n_updates=100,
    learning_rate=1e-4,
    clip_norm=1.0,
    ema_decay=0.95,
    energy_penalty=0.0,  # the energy has its scale from score matching
    expand_p=1.0,  # one formula unit
    chain=DiffusionConfig(),
)  # contrastive divergence after score matching
NOISY = EnergyConfig(
    width=96, n_basis=64, basis_max=12.0, basis_width=1.5, cutoff_multiple=2.5, density_weight=0.1,
    spectral_norm=False, noise_min=0.02, noise_max=1.5,
)  # fmt: skip

SAMPLING = {  # chosen on validation crystals of Perov-5 and MP-20; MPTS-52 takes a shorter chain of MP-20's kind
    "perov5": DiffusionConfig(noise_scale=0.0),
    "mp20": DiffusionConfig(250, anneal_share=0.72),
    "mpts52": DiffusionConfig(150, anneal_share=0.6),
}


def preset(dataset: str, objective: str = "score_matching") -> tuple[EnergyConfig, TrainConfig]:
    """Settings of energy and training for a data set.

    ``contrastive_divergence`` is the paper's, as published; ``fine_tuning`` is contrastive divergence that starts from
    a checkpoint trained by ``score_matching``.

    Raises:
        ValueError: on an unknown objective.
    """
    if objective in ("score_matching", "fine_tuning"):
        # cells of one shape need little strain; where shapes differ, atoms and cell must find their places together
        strain_noise, noise_default = (0.1, 0.3) if dataset == "perov5" else (0.2, 0.4)
        energy = replace(NOISY, strain_noise=strain_noise, noise_default=noise_default)
        batch_size = 64 if dataset == "mpts52" else 128  # large cells take longer
        return energy, replace(SCORE_MATCHING, batch_size=batch_size) if objective == "score_matching" else FINE_TUNING
    if objective != "contrastive_divergence":
        names = "'score_matching', 'contrastive_divergence' or 'fine_tuning'"
        raise ValueError(f"objective is {objective!r}, expected {names}")
    epochs, n_train = {"mp20": (5, 27136), "mpts52": (3, 27380), "carbon24": (2, 6091)}.get(dataset, (5, 11356))
    energy = PRESETS.get(dataset, EnergyConfig())
    return energy, TrainConfig(n_updates=math.ceil(n_train / TrainConfig.batch_size) * epochs)


def initial_model(crystals: Crystals, energy: EnergyConfig, seed: int) -> ContinuousCGCNN:
    """A model with random weights; with noise levels, also the atomic volumes and cell shapes of training crystals."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ContinuousCGCNN(energy)
    if energy.noise_max is not None:
        volumes = fit_atomic_volumes(crystals.species, crystals.volume.double().cpu().numpy())
        model.atomic_volume.copy_(torch.as_tensor(volumes))
        chosen = torch.randint(len(crystals), (energy.n_start_cells,), generator=torch.Generator().manual_seed(seed))
        cells = niggli_reduce(crystals.cell)[0]
        model.start_cells.copy_((cells / crystals.volume[:, None, None] ** (1 / 3))[chosen])
        model.start_n_atoms.copy_(crystals.n_atoms[chosen])
    return model


def train(
    model: ContinuousCGCNN, crystals: Crystals, config: TrainConfig, stop: Callable[[], bool] | None = None
) -> Iterator[tuple[dict[str, float], ContinuousCGCNN]]:
    """Update after update: yields (log row, averaged model). The model given is trained in place.

    Args:
        model: from :func:`initial_model` or :func:`contsp_core.checkpoints.load_model`.
        crystals: all training crystals, float32, on the CPU; batches are moved to the model's device.
        config: settings.
        stop: called after each update; true ends the run.
    """
    rng = torch.Generator().manual_seed(config.seed)
    device = next(model.parameters()).device
    optimiser = torch.optim.AdamW(model.requires_grad_(True).parameters(), weight_decay=config.weight_decay)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    buffer = ReplayBuffer()
    started = time.monotonic()
    model.train()
    for update, chosen in enumerate(_batches(crystals.n_systems, config, rng)):
        elapsed = time.monotonic() - started
        progress = max(update / config.n_updates, elapsed / (config.time_limit_s or math.inf))
        if progress >= 1:
            return
        learning_rate = _learning_rate(config, update, progress)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate
        batch = crystals[chosen].to(device)
        optimiser.zero_grad()
        if config.objective == "score_matching":
            sigma = random_noise_levels(model, batch.n_systems, rng).to(device)
            row = score_matching_step(model, batch, sigma, rng)
        else:
            row = contrastive_divergence_step(model, batch, config, rng, buffer, update)
        limit = math.inf if config.clip_norm is None else config.clip_norm
        gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        if not math.isfinite(row["loss"]) or not torch.isfinite(gradient_norm):
            raise FloatingPointError(f"update {update}: loss {row['loss']}, gradient norm {float(gradient_norm)}")
        optimiser.step()
        _average(averaged, model, min(config.ema_decay, (1 + update) / (10 + update)))
        row |= {"gradient_norm": float(gradient_norm), "learning_rate": learning_rate}
        yield {"update": update, "elapsed_s": time.monotonic() - started} | row, averaged
        if stop is not None and stop():
            return


def _batches(n_systems: int, config: TrainConfig, rng: torch.Generator) -> Iterator[Tensor]:
    """Epoch after epoch of shuffled indices, cut into batches (the last one of an epoch may be smaller)."""
    while True:
        yield from torch.randperm(n_systems, generator=rng).split(config.batch_size)


def _learning_rate(config: TrainConfig, update: int, progress: float) -> float:
    """Linear warm-up, then a cosine from ``learning_rate`` to its final fraction."""
    warm = min(1.0, (update + 1) / config.warmup) if config.warmup else 1.0
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * warm * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


@torch.no_grad()
def _average(averaged: ContinuousCGCNN, model: ContinuousCGCNN, decay: float) -> None:
    """averaged ← decay · averaged + (1 − decay) · model; buffers are copied."""
    for kept, new in zip(averaged.parameters(), model.parameters(), strict=True):
        kept.lerp_(new, 1 - decay)
    for kept, new in zip(averaged.buffers(), model.buffers(), strict=True):
        kept.copy_(new)


def run(
    dataset: str,
    energy: EnergyConfig,
    config: TrainConfig,
    output: str | Path,
    *,
    n_structures: int | None = None,
    initial: str | Path | None = None,
    validate: Callable[[ContinuousCGCNN], float] | None = None,
    validate_every: int = 1000,
    patience: int = 5,
    on_row: Callable[[dict[str, float]], None] | None = None,
    device: str = "cpu",
) -> list[dict[str, float]]:
    """Train on the training split of a data set; write checkpoint, settings and log.

    Args:
        dataset: name known to :func:`contsp_core.data.load_split`.
        energy: settings of the model; not used if ``initial`` is given.
        config: settings of the training.
        output: the checkpoint, ``….safetensors``; the log is written beside it as ``….csv``, row by row.
        n_structures: use only so many training crystals, chosen by the seed.
        initial: checkpoint to start from instead of random weights, for example to follow score matching by contrastive
            divergence.
        validate: scores a model, higher is better; the best model is the one saved. Without it, the last one is.
        validate_every: updates between two validations.
        patience: stop after so many validations without a new best.
        on_row: called with every log row.
        device: where to train.

    Returns:
        The log, one row an update.
    """
    from contsp_core.data import load_split

    split = load_split(dataset, "train")
    crystals = split.crystals.to(torch.float32)
    if n_structures is not None and n_structures < len(crystals):
        order = torch.randperm(len(crystals), generator=torch.Generator().manual_seed(config.seed))
        crystals = crystals[order[:n_structures].sort().values]
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    model = (initial_model(crystals, energy, config.seed) if initial is None else load_model(initial)).to(device)
    sampling = SAMPLING.get(dataset, DiffusionConfig())
    settings = {
        "dataset": dataset,
        "data": {
            "path": Path(split.source.path).name,
            "blob_id": split.source.blob_id,
            "official": split.source.official,
        },
        "n_structures": len(crystals),
        "initial": None if initial is None else str(initial),
        "training": asdict(config),
        "sampling": asdict(sampling if model.config.noise_max is not None else config.chain),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {device}",
    }
    history: list[dict[str, float]] = []
    best, since_best, averaged = -math.inf, 0, model
    with output.with_suffix(".csv").open("w", newline="") as log:
        writer = None
        for row, averaged in train(model, crystals, config):
            if validate is not None and (row["update"] + 1) % validate_every == 0:
                row["validation"] = validate(averaged)
                since_best += 1
                if row["validation"] > best:
                    best, since_best = row["validation"], 0
                    save_checkpoint(output, averaged, settings | _progress(row))
            history.append(row)
            if writer is None:
                columns = [name for name in row if name != "validation"] + ["validation"] * (validate is not None)
                writer = csv.DictWriter(log, columns)
                writer.writeheader()
            writer.writerow(row)
            if on_row is not None:
                on_row(row)
            if since_best >= patience:
                break
    if best == -math.inf:
        save_checkpoint(output, averaged, settings | _progress(history[-1]))
    return history


def _progress(row: dict[str, float]) -> dict[str, Any]:
    return {"n_updates": row["update"] + 1, "elapsed_s": round(row["elapsed_s"], 1), "last_row": row}


def _parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m contsp_core.training", description=__doc__)
    parser.add_argument("--dataset", required=True, help="prototypes, perov5, mp20, mpts52 or carbon24")
    parser.add_argument("--output", type=Path, help="checkpoint to write (default runs/<dataset>.safetensors)")
    objectives = "score_matching, contrastive_divergence, or fine_tuning of an initial checkpoint"
    parser.add_argument("--objective", default="score_matching", help=objectives)
    parser.add_argument("--initial", help="checkpoint to start from instead of random weights")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the learning rate follows")
    parser.add_argument("--n-updates", type=int, help="updates, instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    """Train as the command line says, with a progress bar on stderr."""
    from tqdm import tqdm

    options = _parse_arguments(arguments)
    if options.objective == "fine_tuning" and options.initial is None:
        raise SystemExit("--initial is missing, expected the checkpoint that fine_tuning starts from")
    energy, config = preset(options.dataset, options.objective)
    limit = None if options.minutes is None else 60 * options.minutes
    n_updates = options.n_updates or (config.n_updates if limit is None else sys.maxsize)
    config = replace(config, seed=options.seed, time_limit_s=limit, n_updates=n_updates)
    with tqdm(unit="update", total=None if limit else n_updates) as bar:

        def show(row: dict[str, float]) -> None:
            bar.set_postfix({name: f"{row[name]:.3g}" for name in ("loss", "acceptance_rate") if name in row})
            bar.update()

        output = options.output or Path("runs") / f"{options.dataset}.safetensors"
        run(options.dataset, energy, config, output, initial=options.initial, on_row=show, device=options.device)


if __name__ == "__main__":
    main(sys.argv[1:])
