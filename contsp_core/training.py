"""How does the energy learn? By contrastive divergence (the paper's Figure 1) or score matching, on one visible loop.

``python -m contsp_core.training --dataset perov5 --output runs/perov5.safetensors``, or with two processes
``torchrun --standalone --nproc-per-node 2 -m contsp_core.training --dataset perov5``

Everything random in an update is drawn from the seed, the update, the retries before it and the place of a crystal in
its batch. So a run that was stopped and resumed, or is shared by several processes, computes what an undisturbed one
does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast, get_args

import torch
from torch import Tensor, distributed, nn

from contsp_core.checkpoints import load_model, read_tensors, save_checkpoint, write_tensors
from contsp_core.crystals import (
    Crystals,
    Rng,
    Rngs,
    check_settings,
    expand_composition,
    fit_atomic_volumes,
    keyed_rng,
    reduce_species,
    similar_elements,
)
from contsp_core.data import DATASETS, Split, choose, find_checkpoint, load_split, retold, stamp
from contsp_core.diffusion import contrast_step, random_noise_levels, score_matching_step
from contsp_core.energy import NOISE_LEVELS, PRESETS, ContinuousCGCNN, EnergyConfig
from contsp_core.lattice import niggli_reduce
from contsp_core.mala import STRAIN, AnnealConfig, Proposal, anneal
from contsp_core.sampler import random_crystals

Objective = Literal["score_matching", "contrastive_divergence"]
OBJECTIVES = get_args(Objective)
MAX_RETRIES = 3  # returns to one saved state after a loss that is not finite, or
MAX_LOSS = 1e4  # above this, as where the gap of contrastive divergence runs away
AVERAGE_WARMUP = 10  # updates over which the average forgets its start
Row = dict[str, float]  # of the log


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run, checked; the defaults are those of score matching."""

    objective: Objective = "score_matching"
    n_updates: int | None = 20_000  # None: until the time is over
    time_limit_s: float | None = None  # whichever comes first; the learning rate follows
    batch_size: int = 128  # of all processes together
    learning_rate: float = 2e-3
    warmup: int = 100  # updates
    final_learning_rate: float = 0.01  # fraction of learning_rate reached by a cosine
    weight_decay: float = 1e-4
    clip_norm: float | None = 1.0
    ema_decay: float = 0.999  # of the weights that are kept; 0 keeps the last ones
    contrast_weight: float = 0.5  # of telling data from what chains found, if that is given (score matching)
    energy_penalty: float = 0.1  # α of mean E² (contrastive divergence)
    expand_p: float = 0.5
    max_atoms: int | None = None  # of an expanded composition
    chain: AnnealConfig = field(default_factory=AnnealConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("final_learning_rate", "ema_decay"), (0, 1))
        others = ("learning_rate", "warmup", "weight_decay", "contrast_weight", "energy_penalty")
        check_settings(self, **shares, **dict.fromkeys(others, (0, math.inf)), expand_p=(1e-3, 1), seed=(0, 2**62))
        if self.n_updates is None and self.time_limit_s is None:
            raise ValueError("n_updates is None, expected a number where there is no time_limit_s")


PAPER = TrainConfig(
    objective="contrastive_divergence", n_updates=445, learning_rate=1e-3, warmup=0, final_learning_rate=1.0,
    weight_decay=0.0, clip_norm=None, ema_decay=0.0,
)  # fmt: skip
EPOCHS = {"perov5": (5, 11356), "mp20": (5, 27136), "mpts52": (3, 27380), "carbon24": (2, 6091), "mp": (5, 28342)}


def preset(dataset: str, objective: Objective = TrainConfig.objective) -> tuple[EnergyConfig, TrainConfig]:
    """Settings of energy and training for a data set; ``contrastive_divergence`` is the paper's, as published."""
    if dataset not in DATASETS:
        raise ValueError(f"dataset is {dataset!r}, expected one of {', '.join(DATASETS)}")
    if objective == "contrastive_divergence":
        epochs, n_train = EPOCHS.get(dataset, EPOCHS["perov5"])  # as published; mp as MP-20
        return PRESETS.get(dataset, EnergyConfig()), replace(PAPER, n_updates=epochs * -(-n_train // PAPER.batch_size))
    # a start bends the cell by the largest strain, and cells of Perov-5 are all alike
    energy = replace(NOISE_LEVELS, strain_cap=0.03 if dataset == "perov5" else 0.06)
    return energy, TrainConfig(objective, batch_size=64 if dataset == "mpts52" else 128)  # large cells take longer


def contrastive_divergence_step(model: nn.Module, crystals: Crystals, config: TrainConfig, rng: Rng) -> Row:
    """Accumulate in ``.grad`` the gradient of mean(E(U) − E(Ũ)) + α (mean E(U)² + mean E(Ũ)²) (paper, Figure 1).

    A training crystal U enters through its composition and through E alone, neither of which knows how it is described:
    that is why the training map is strongly re-description invariant.

    Returns:
        Loss, energies, their gap and penalty; of the chains: acceptance rate, share of those that never moved (they are
        kept) and of non-finite proposals.
    """
    rng = [rng] * len(crystals) if isinstance(rng, torch.Generator) else rng
    compositions = [reduce_species(numbers) for numbers in crystals.species]  # Reduce
    species = [expand_composition(c, own, config.expand_p, config.max_atoms) for c, own in zip(compositions, rng)]
    samples, row = _sample(model, species, config, rng)  # Ũ ~ exp(−E / T), by MALA under the current θ
    real, sampled = model(Crystals.cat([crystals, samples])).chunk(2)  # at once: one power iteration, one energy
    gap = real.mean() - sampled.mean()
    penalty = config.energy_penalty * (real.square().mean() + sampled.square().mean())
    (gap + penalty).backward()  # the optimiser's update follows in train_step
    names = "loss", "energy_real", "energy_sample", "gap", "penalty"
    return {n: v.item() for n, v in zip(names, (gap + penalty, real.mean(), sampled.mean(), gap, penalty))} | row


def _sample(model: Any, species: list[list[int]], config: TrainConfig, rng: Rngs) -> tuple[Crystals, Row]:
    """Ũ, and what the log shows of the chains."""
    energy = copy.deepcopy(model).eval().requires_grad_(False)  # chains need no gradient in θ, and leave it alone
    starts = random_crystals(species, rng, model.config.reference_density)
    starts, accepted = starts.to((weight := next(model.parameters())).device).to(weight.dtype), list[Tensor]()
    state = anneal(energy, starts, config.chain, rng, lambda _, new: accepted.append(new.accepted.double()))
    rates = torch.stack(accepted).mean(dim=0)
    row = {"acceptance_rate": rates.mean().item(), "stuck_share": (rates == 0).double().mean().item()}
    return state.crystals, row | {"nonfinite_rate": state.n_nonfinite.double().mean().item() / len(accepted)}


def initial_model(crystals: Crystals, energy: EnergyConfig, seed: int, sampling: Any = None) -> ContinuousCGCNN:
    """A model with random weights; with noise levels, also the atomic volumes and the cells of training crystals."""
    if energy.noise_max is not None:
        energy = replace(energy, n_start_cells=len(crystals))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ContinuousCGCNN(energy, sampling)
    if energy.noise_max is not None:
        model.embedding.weight.data.copy_(similar_elements(energy.width, torch.Generator().manual_seed(seed)))
        model.atomic_volume.copy_(fit_atomic_volumes(crystals))
        model.start_cells.copy_(niggli_reduce(crystals.cell)[0])
        model.start_counts.copy_(crystals.element_counts.clamp(max=255))  # what a byte holds
    return model


class TrainState:
    """All that training has made so far; :meth:`save` and :meth:`load` keep every bit of it."""

    def __init__(self, model: ContinuousCGCNN, config: TrainConfig, origin: dict[str, Any] | None = None) -> None:
        self.origin = origin or {}  # of data and weights
        made_by = asdict(config) | {"n_updates": None, "time_limit_s": None}  # a resumed run may be longer
        self.settings = json.loads(json.dumps(self.origin | asdict(model.config) | made_by))
        self.model = model.requires_grad_(True).train()
        self.averaged = copy.deepcopy(model).requires_grad_(False).eval()
        self.optimiser = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, fused=True)
        self.begun_at = self.update = 0  # where this process took over, and where it is
        self.elapsed_s = 0.0
        self.n_retries = 0  # it enters the random numbers: the same ones would lead to the same failure
        self.rows: list[Row] = []  # of the log, not saved yet
        self.stopped_by: int | None = None  # the signal that ended the run early

    def save(self, path: Path) -> None:
        """Write everything to one file, whole or not at all."""
        groups = {"model": self.model.state_dict(), "averaged": self.averaged.state_dict()}
        groups |= self.optimiser.state_dict()["state"]
        tensors = {f"{group}/{name}": tensor for group, entry in groups.items() for name, tensor in entry.items()}
        progress = {name: getattr(self, name) for name in ("update", "elapsed_s", "n_retries")}
        write_tensors(path, tensors, {"settings": json.dumps(self.settings), "progress": json.dumps(progress)})

    def load(self, path: Path) -> None:
        """Go on where a saved state stopped; a ValueError tells of damage, or of a run with other settings."""
        tensors, metadata = read_tensors(path)
        saved = json.loads(metadata.get("settings", "{}"))
        for name, value in self.settings.items():
            if saved.get(name) != value:
                raise ValueError(f"{path} was saved with {name} = {saved.get(name)}, expected {value} to go on from it")
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            group, _, key = name.partition("/")
            groups.setdefault(group, {})[key] = tensor
        self.model.load_state_dict(groups.pop("model"))
        self.averaged.load_state_dict(groups.pop("averaged"))
        moments = {int(index): entry for index, entry in groups.items()}
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": moments})
        vars(self).update(json.loads(metadata["progress"]), rows=[])


def train_step(
    state: TrainState, crystals: Crystals, config: TrainConfig, progress: float, found: Sequence[Crystals] = ()
) -> Row:
    """One update on one batch, shared by all processes; returns the row of the log.

    The state changes in place, unless loss or gradient is not sound. ``crystals`` are all training crystals, and
    ``found`` wrong structures for each, taken in turn, all on the CPU; ``progress``, 0 … 1, sets the learning rate.
    """
    model, key = state.model, (config.seed, state.update, state.n_retries)
    chosen = _batch(len(crystals), config, state.update)
    rank, n_ranks = _rank()
    places = torch.arange(len(chosen)).tensor_split(n_ranks)[rank]
    weight = len(places) / len(chosen)
    places = places if len(places) else torch.tensor([0])  # a process without a crystal takes one with weight zero
    rng = [keyed_rng("crystal", *key, place) for place in places.tolist()]
    batch = crystals[chosen[places]].to(next(model.parameters()).device)
    state.optimiser.zero_grad()
    if config.objective == "score_matching":
        sigma = random_noise_levels(model, len(chosen), keyed_rng("sigma", *key))
        sigma = sigma[places].to(batch.cell.device)
        row = score_matching_step(model, batch, sigma, rng)
        if found:
            wrong = found[state.update % len(found)][chosen[places]].to(sigma.device)
            row |= contrast_step(model, batch, wrong, sigma, rng, config.contrast_weight)
    else:
        row = contrastive_divergence_step(model, batch, config, rng)
    if n_ranks > 1:
        row = _average_over_ranks(state, row, weight)
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm or math.inf).item()
    learning_rate = state.optimiser.param_groups[0]["lr"] = _learning_rate(config, state.update, progress)
    if abs(row["loss"]) <= MAX_LOSS and math.isfinite(gradient_norm):
        state.optimiser.step()
        decay = min(config.ema_decay, (1 + state.update) / (AVERAGE_WARMUP + state.update))
        for kept, new in zip(state.averaged.parameters(), model.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - decay)
        for old, now in zip(state.averaged.buffers(), model.buffers(), strict=True):
            old.copy_(now)
        state.update += 1
    return row | {"gradient_norm": gradient_norm, "learning_rate": learning_rate}


def _batch(n_systems: int, config: TrainConfig, update: int) -> Tensor:
    """Indices of the crystals of an update: every epoch is shuffled anew, its last batch may be smaller."""
    epoch, position = divmod(update, -(-n_systems // config.batch_size))
    order = torch.randperm(n_systems, generator=keyed_rng("epoch", config.seed, epoch))
    return order[position * config.batch_size : (position + 1) * config.batch_size]


def _rank() -> tuple[int, int]:
    """The number of this process among those of a distributed run, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _average_over_ranks(state: TrainState, row: Row, weight: float) -> Row:
    """Gradients and log row as those of the whole batch."""
    grads = [cast(Tensor, parameter.grad) for parameter in state.model.parameters()]
    flat = weight * torch.cat([grads[0].new_tensor(list(row.values())), *(grad.flatten() for grad in grads)])
    distributed.all_reduce(flat)
    torch.nn.utils.vector_to_parameters(flat[len(row) :], grads)
    return dict(zip(row, flat[: len(row)].tolist(), strict=True))


def _learning_rate(config: TrainConfig, update: int, progress: float) -> float:
    """Linear warm-up, at most a tenth of ``n_updates``, times a cosine from ``learning_rate`` to its final fraction."""
    warm = min(1.0, (update + 1) / max(1, min(config.warmup, (config.n_updates or 10 * config.warmup) // 10)))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * warm * (config.final_learning_rate + (1 - config.final_learning_rate) * cosine)


@dataclass(frozen=True)
class Job:
    """What to train, on what, and where results go."""

    dataset: str
    output: Path  # ….safetensors; beside it ….csv, the log, and ….state, from which a stopped run goes on
    energy: EnergyConfig
    config: TrainConfig
    n_structures: int | None = None  # use only so many training crystals, chosen by the seed
    initial: str | Path | None = None  # checkpoint to start from; ``energy`` is then not used
    negatives: Sequence[str | Path] = ()  # .npz of wrong structures for these crystals (notebooks/negatives.py)
    device: str = "cpu"
    resume: bool = False  # go on from ….state, if there is one
    overwrite: bool = False  # begin anew in the place of an earlier run
    save_every_s: float = 120.0

    @property
    def log(self) -> Path:
        """A row an update."""
        return self.output.with_suffix(".csv")

    @property
    def state(self) -> Path:
        """All that is needed to go on."""
        return self.output.with_suffix(".state")

    def check(self) -> None:
        """Refuse, by a ValueError, a device that does not work and files that are not there to be written."""
        with retold(f"device is {self.device!r}, which fails", RuntimeError, AssertionError):
            torch.zeros(1, device=self.device).item()
        if self.n_structures is not None and self.n_structures < 1:
            raise ValueError(f"n_structures is {self.n_structures}, expected ≥ 1, or None for all")
        if self.output.suffix != ".safetensors":
            raise ValueError(f"output is {str(self.output)!r}, expected a path that ends in .safetensors")
        for path in (self.output, self.log, self.state):
            if path.exists() and not path.is_file():
                raise ValueError(f"output needs {str(path)!r}, which is no regular file; choose another name")
        if self.log.exists() and self.log.read_bytes()[:16] not in (b"", b"update,elapsed_s"):
            raise ValueError(f"output would overwrite {str(self.log)!r}, which is no training log")
        existing = [path for path in (self.output, self.log, self.state) if path.exists() and path.stat().st_size]
        if existing and not (self.resume or self.overwrite):
            raise ValueError(f"output {str(existing[0])!r} exists; resume goes on from it, overwrite begins anew")
        if existing and self.state not in existing and not self.overwrite:
            raise ValueError(f"resume needs {str(self.state)!r}, which is missing; overwrite begins anew")


def run(job: Job, on_row: Callable[[Row], None] | None = None) -> TrainState:
    """Train; write checkpoint, log and state every few minutes, at the end, and on SIGINT or SIGTERM.

    ``on_row`` is called with every row of the log. A ValueError tells before any work of settings or files that do not
    fit; a FloatingPointError of a loss that stays non-finite after three returns to a saved state; an OSError of a save
    that failed. What was saved before remains.
    """
    job.check()
    (state, crystals, found), (rank, n_ranks) = _begin(job), _rank()
    with _open_log(job) if rank == 0 else contextlib.nullcontext() as log, _signals(state):
        if job.resume and job.state.is_file():
            state.load(job.state)
            state.begun_at = state.update
        if n_ranks > 1:
            distributed.barrier()  # all have read the state before it is written
        if log is not None:
            _cut_log(job, log, state.update)
        started = time.monotonic() - state.elapsed_s
        _save(job, state, log)
        saved = time.monotonic()
        while (progress := _progress(state, job.config, started)) < 1:
            row = {"update": state.update, "elapsed_s": round(state.elapsed_s, 3)}
            row |= train_step(state, crystals, job.config, progress, found)
            if state.update == row["update"]:
                _return_to_saved_state(job, state, row)
                continue
            if rank == 0:
                state.rows.append(row)
                on_row is None or on_row(row)
            if time.monotonic() - saved > job.save_every_s:
                _save(job, state, log)
                saved = time.monotonic()
        _save(job, state, log)
    return state


def _begin(job: Job) -> tuple[TrainState, Crystals, list[Crystals]]:
    """A fresh state, the training crystals, and wrong structures for them, file by file."""
    split, found = load_split(job.dataset, "train"), []
    rows = choose(range(len(split)), job.n_structures, job.config.seed)
    crystals = split.crystals.to(torch.float32)[rows]
    for path in job.negatives:
        with retold(f"negatives {str(path)!r} cannot be read", OSError):
            other = Split.load(path, job.dataset, "train")
        if job.config.objective != "score_matching":
            raise ValueError(f"negatives are for score_matching, not for {job.config.objective}")
        if not torch.equal(other.crystals.element_counts, split.crystals.element_counts):
            raise ValueError(f"negatives {str(path)!r} are not for the crystals of {split.source.path}")
        found.append(other.crystals.to(torch.float32)[rows])
    given = load_model(job.initial) if job.initial else None
    energy = given.config if given else job.energy
    sampling = job.config.chain if energy.noise_max is None else None
    model = initial_model(crystals, energy, job.config.seed, sampling)
    if given:  # its weights; but volumes and cells are those of the crystals trained on now
        of_data, model.sampling = ("atomic_volume", "start_cells", "start_counts"), sampling or given.sampling
        model.load_state_dict({k: v for k, v in given.state_dict().items() if k not in of_data}, strict=False)
    if job.config.objective == "score_matching" and model.config.noise_max is None:
        raise ValueError("noise_max of the energy is None, but score_matching needs an energy with noise levels")
    data = {"path": Path(split.source.path).name, "blob_id": split.source.blob_id}
    origin: dict[str, Any] = {"dataset": job.dataset, "data": data, "n_structures": len(crystals)}
    origin["initial"] = stamp(find_checkpoint(job.initial)) if job.initial else None
    origin["negatives"] = [stamp(Path(path)) for path in job.negatives] or None
    return TrainState(model.to(job.device), job.config, origin), crystals, found


def _progress(state: TrainState, config: TrainConfig, started: float) -> float:
    """Share of the training that is done, the same for all processes; infinite after a signal."""
    device = next(state.model.parameters()).device
    agreed = torch.tensor([time.monotonic() - started, state.stopped_by or 0], dtype=torch.float64, device=device)
    if _rank()[1] > 1:
        distributed.all_reduce(agreed, distributed.ReduceOp.MAX)
    state.elapsed_s, stopped_by = agreed.tolist()
    if stopped_by:
        state.stopped_by = int(stopped_by)
        return math.inf
    return max(state.update / (config.n_updates or math.inf), state.elapsed_s / (config.time_limit_s or math.inf))


def _return_to_saved_state(job: Job, state: TrainState, row: Row) -> None:
    n_retries, elapsed_s = state.n_retries + 1, state.elapsed_s
    state.load(job.state)
    if n_retries - state.n_retries > MAX_RETRIES:
        raise FloatingPointError(
            f"update {row['update']}: loss {row['loss']}, gradient norm {row['gradient_norm']}; going back "
            f"{MAX_RETRIES} times to update {state.update} did not help; a smaller learning_rate or clip_norm may"
        )
    state.n_retries, state.elapsed_s = n_retries, elapsed_s


@contextlib.contextmanager
def _open_log(job: Job) -> Iterator[IO[bytes]]:
    """The log file, locked as long as the run lasts."""
    with retold(f"output {str(job.output)!r} cannot be written", OSError):
        job.output.parent.mkdir(parents=True, exist_ok=True)
        log = job.log.open("ab+")
    with log:
        with retold(f"output {str(job.output)!r} belongs to a training that is running", OSError):
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        job.check()  # again: another run may have come and gone meanwhile
        for path in job.output.parent.glob(".*.tmp"):  # left by a run that was killed while it wrote
            if path.name.startswith((f".{job.output.name}-", f".{job.state.name}-")):
                path.unlink()
        yield log


def _cut_log(job: Job, log: IO[bytes], n_updates: int) -> None:
    """Remove what was written after the state was saved."""
    if not n_updates:  # a state from before would be ahead of the log
        job.state.unlink(missing_ok=True)
    log.seek(0)
    lines = log.readlines()[: n_updates + 1 if n_updates else 0]  # with the header
    if n_updates and (len(lines) <= n_updates or not lines[-1].endswith(b"\n")):
        raise ValueError(f"log {str(job.log)!r} is shorter than when {str(job.state)!r} was saved")
    log.truncate(sum(map(len, lines)))


def _save(job: Job, state: TrainState, log: IO[bytes] | None) -> None:
    """Log, then state, then checkpoint: a log may be ahead of its state, which is mended on resuming."""
    if log is None:  # another process saves
        return
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {job.device}"
    made = {"training": asdict(job.config), "machine": machine, "n_updates": state.update}
    made |= {"elapsed_s": round(state.elapsed_s, 1), "n_retries": state.n_retries}
    try:
        header = [] if os.fstat(log.fileno()).st_size else state.rows[:1]
        for row in (*header, *(row.values() for row in state.rows)):
            log.write(",".join(map(str, row)).encode() + b"\n")
        log.flush()
        os.fsync(log.fileno())
        state.rows = []
        if not all(weights.isfinite().all() for weights in state.averaged.parameters()):
            raise FloatingPointError(f"update {state.update}: weights are not finite; a smaller learning_rate may help")
        state.save(job.state)
        save_checkpoint(job.output, state.averaged, state.origin | made)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{job.output} cannot be saved: {reason}; what was saved before is intact") from error


@contextlib.contextmanager
def _signals(state: TrainState) -> Iterator[None]:
    """SIGINT and SIGTERM end the run after the update in progress; a second one ends it at once."""

    def stop(number: int, _: object) -> None:
        if state.stopped_by:
            raise KeyboardInterrupt
        state.stopped_by = number

    old: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # only the main thread has signals
        old |= {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str]) -> None:
    """Train as the command line says; what goes wrong is told in one line, rows of the log appear on stderr."""
    speaks = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started, the first one
    try:
        job = _parse_arguments(arguments)
        if "LOCAL_RANK" in os.environ:
            is_cuda = job.device == "cuda" and torch.cuda.is_available()
            if is_cuda:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            distributed.init_process_group("nccl" if is_cuda else "gloo")
        state = run(job, _print_row)
    except KeyboardInterrupt:
        raise SystemExit("stopped at once; --resume goes on from what was saved last" if speaks else 1) from None
    except (ValueError, FloatingPointError, OSError, RuntimeError, ImportError) as error:
        hint = "; the extra contsp_core[analysis] has what reading CIFs needs" if isinstance(error, ImportError) else ""
        raise SystemExit(f"error: {' '.join(str(error).split())}{hint}" if speaks else 1) from None
    finally:
        if _rank()[1] > 1:
            distributed.destroy_process_group()
    end = f"{job.output} holds the {'average' if job.config.ema_decay else 'weights'} after {state.update} updates"
    if state.stopped_by:
        end = f"stopped after {state.update} updates; --resume goes on"
    elif state.update == state.begun_at:
        end = f"{job.output} is finished: {state.update} updates; --resume with more --n-updates or --minutes goes on"
    if speaks:
        print(end, file=sys.stderr)
    if state.stopped_by:
        raise SystemExit(128 + state.stopped_by)


def _parse_arguments(arguments: Sequence[str]) -> Job:
    prog = "contsp train" if Path(sys.argv[0]).name == "contsp" else "python -m contsp_core.training"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.splitlines()[0])
    parser.epilog = "example: contsp train --dataset perov5 --minutes 60 --output runs/perov5.safetensors"
    parser.add_argument("--dataset", required=True, choices=DATASETS)
    parser.add_argument("--output", type=Path, help="checkpoint to write (default runs/<dataset>.safetensors)")
    parser.add_argument("--objective", default=TrainConfig.objective, choices=OBJECTIVES)
    parser.add_argument("--initial", help="checkpoint to start from instead of random weights")
    parser.add_argument("--negatives", nargs="+", default=(), help="wrong structures, to be told from the crystals")
    parser.add_argument("--contrast-weight", type=float, help="of that, beside score matching")
    parser.add_argument("--minutes", type=float, help="stop after so many minutes; the learning rate follows")
    parser.add_argument("--n-updates", type=int, help="updates, instead of the preset's")
    parser.add_argument("--batch-size", type=int, help="crystals of an update, instead of the preset's")
    parser.add_argument("--learning-rate", type=float, help="its largest value, instead of the preset's")
    parser.add_argument("--n-steps", type=int, help="of the chains of contrastive divergence, instead of the preset's")
    parser.add_argument("--moves", choices=get_args(Proposal), help="the paper's, or strain, in the invariant measure")
    parser.add_argument("--n-structures", type=int, help="use only so many training crystals")
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--device", default=Job.device, help="cpu, cuda or cuda:<n>; with torchrun, cuda is one each")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from a saved state, if there is one")
    existing.add_argument("--overwrite", action="store_true", help="begin anew in the place of an earlier run")
    options = parser.parse_args(arguments)
    energy, config = preset(options.dataset, options.objective)
    given = {k: v for k, v in vars(options).items() if k in TrainConfig.__dataclass_fields__ and v is not None}
    if (limit := options.minutes) is not None:
        if not 1e-3 <= limit <= 1e7:
            raise ValueError(f"--minutes is {limit}, expected 0.001 … 10000000")
        given = {"n_updates": None, "time_limit_s": 60 * limit} | given
    if options.contrast_weight is not None and not options.negatives:
        raise ValueError("--contrast-weight is for --negatives, which are not given")
    if (options.n_steps is not None or options.moves) and options.objective != "contrastive_divergence":
        raise ValueError("--n-steps and --moves are for contrastive_divergence: score_matching runs no chains")
    chain = STRAIN if options.moves == "strain" else config.chain
    given["chain"] = chain if options.n_steps is None else replace(chain, n_steps=options.n_steps)
    config = replace(config, **given)
    output = options.output or Path("runs") / f"{options.dataset}.safetensors"
    chosen = ("n_structures", "initial", "negatives", "device", "resume", "overwrite")
    return Job(options.dataset, output, energy, config, **{name: getattr(options, name) for name in chosen})


def _print_row(row: Row) -> None:
    if row["update"] % 10 == 0:
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
