"""From a formula to ranked crystals: plan, search, rank, describe."""

from __future__ import annotations

import gzip
import itertools
import json
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed, effective_n_jobs
from pymatgen.core import Element, Structure
from pymatgen.core.structure_matcher import StructureMatcher
from tqdm.auto import tqdm

from contsp_core.app.powder import agreement
from contsp_core.crystals import MAX_ATOMIC_NUMBER, check_settings, reduce_counts, reduce_species
from contsp_core.csp import candidates
from contsp_core.csp.metrics import check_limits, run_with_time_limit
from contsp_core.data import CHECKPOINTS, find_checkpoint, parse_formula
from contsp_core.energy import ContinuousCGCNN, portable
from contsp_core.sampler import of_pattern, sample_structures, sampling_config, training_counts

if TYPE_CHECKING:
    from ase.calculators.calculator import BaseCalculator

MAX_ATOMS = 200  # of a cell
PART = 10  # chains of each size that run together, if more than every process has
N_SIZES = 3  # numbers of formula units that are tried, of those that training crystals have
ROUND = 8  # chains of each size between two looks at the clock
DEFAULTS = ("mp20", "mp")  # bundled checkpoints, of which the first that covers a formula answers, else the last
FALLBACK = f"{DEFAULTS[0]} does not cover it, and {DEFAULTS[1]} seldom finds such yet"
CALIBRATED = {"mp20": (1.52, 1.144, -3.116)}  # bundled checkpoint -> parameters of confidence
N_CALIBRATED = 20  # chains of each size for which they were fitted; fewer agree by chance, more were not tried
TOO_CLOSE = f"too close: atoms nearer than {candidates.CLOSEST} of the sum of their covalent radii; they come last"
UNITS = "energy: learned, per atom, no unit; found: times, in all and by source; "
UNITS += "density: g/cm³; V/atom: Å³; shortest, a, b, c: Å; atoms: in a, b, c"


@dataclass(frozen=True)
class PredictConfig:
    """What is tried for a formula, and what is kept."""

    source: Literal["chains", "templates", "both"] = "chains"  # templates: known crystals, elements exchanged
    n_samples: int = 20  # of each source and number of formula units
    n_steps: int | None = None  # of a chain; None: as the checkpoint says
    n_units: tuple[int, ...] | None = None  # in lowest integers (O, HO, not O2, H2O2); None: :func:`choose_units`
    minutes: float | None = None  # of chains; no further ones are started after it, but for a first round
    n_best: int = 10  # crystals kept
    confidence: tuple[float, float, float] | None = None  # of :func:`confidence`
    seed: int = 0
    n_jobs: int = -1  # processes; -1: all cores

    def __post_init__(self) -> None:
        check_limits(self.n_jobs)
        check_settings(self, seed=(0, 2**62), n_jobs=(-1, 2**62), n_samples=(1, 10**6), n_steps=(1, 10**6))
        if self.source == "templates" and (self.n_steps or self.minutes):
            raise ValueError("n_steps and minutes are for chains, not for source 'templates'")
        units = self.n_units
        if units is not None and not (isinstance(units, tuple) and all(type(n) is int and n > 0 for n in units or [0])):
            raise ValueError(f"n_units is {self.n_units}, expected a tuple of integers ≥ 1, or None")
        if (own := self.confidence) is not None and (type(own) is not tuple or [*map(type, own)] != [float] * 3):
            raise ValueError(f"confidence is {own!r}, expected a tuple of three floats, or None")


@dataclass(frozen=True)
class Prediction:
    """Crystals of one formula, best first."""

    formula: str
    groups: list[list[Structure]]  # of equal crystals, each sorted by energy, crowded ones last
    table: pd.DataFrame  # a row a group: candidates.describe, with confidence and prototype
    n_made: int
    doubts: list[str]

    @property
    def best(self) -> list[Structure]:
        """Of each group the crystal of lowest energy, among those that are not crowded if there are any."""
        return [group[0] for group in self.groups]

    def relaxed(self, calculator: BaseCalculator, n_jobs: int = -1) -> Prediction:
        """Relaxed and ranked by an ASE calculator (:func:`relax_and_rank`): those that become one are joined, those on
        which it fails come last, as they were; its energy (eV/atom), or why it failed, is in the table."""
        from contsp_core.app.calculators import relax_and_rank

        numbered = [structure.copy() for structure in self.best]
        for place, structure in enumerate(numbered):
            structure.properties = structure.properties | {"place": place}  # copies share theirs
        found = relax_and_rank(numbered, calculator)
        done = [structure for structure in found if "calculator_energy" in structure.properties]
        groups = candidates.rank_distinct(done, key="calculator_energy") if done else []  # some have become the same
        groups = [sorted(group, key=candidates.is_crowded) for group in groups]
        known = {structure.properties["place"] for group in groups for structure in group}
        groups += [[structure] for structure in found if structure.properties["place"] not in known]
        groups.sort(key=lambda group: candidates.is_crowded(group[0]))
        places = [[structure.properties.pop("place") for structure in group] for group in groups]
        groups = [group + [s for n in own for s in self.groups[n][1:]] for group, own in zip(groups, places)]
        table = tabulate(groups, n_jobs)
        if "confidence" in self.table:
            table.insert(1, "confidence", [self.table["confidence"].iloc[own].sum() for own in places])
        return replace(self, groups=groups, table=table)

    def compared(self, measured: np.ndarray) -> Prediction:
        """Ranked by the :func:`agreement` with a measured powder pattern (n, 2), in the table as ``xrd``."""
        table = self.table.assign(xrd=[agreement(structure, measured) for structure in self.best])
        table = table.sort_values("xrd", ascending=False, kind="stable")
        table = table.loc[sorted(table.index, key=lambda rank: candidates.is_crowded(self.best[rank - 1]))]
        groups = [self.groups[rank - 1] for rank in table.index]
        table.index = self.table.index
        return replace(self, groups=groups, table=table)

    def summary(self) -> str:
        """The table for a terminal."""
        text = self.table.drop(columns=["α", "β", "γ", "at 0.01 Å", "at 0.3 Å"]).round(3).to_string()
        units = UNITS + ("; calculator_energy: eV/atom, energy: before relaxing" * ("calculator_energy" in self.table))
        units += "; confidence: that it is the right crystal; need not fall with rank" * ("confidence" in self.table)
        return "\n".join([text, units, *([TOO_CLOSE] if "too close" in self.table else ())])


def plan(model: ContinuousCGCNN, formula: str, config: PredictConfig) -> tuple[list[list[int]], list[str]]:
    """Species of the cells that are tried, and what should make one doubt the answer.

    A ValueError tells of text that is no formula, and of cells of more than 200 atoms.
    """
    unit = [number for number, count in reduce_species(parse_formula(formula)).items() for _ in range(count)]
    n_units = config.n_units or choose_units(model, unit)
    if (n_atoms := len(unit) * max(n_units)) > MAX_ATOMS:
        units = f"{max(n_units)} formula units of {len(unit)} atoms"
        raise ValueError(f"formula {formula!r}: {units} are {n_atoms} atoms, expected ≤ {MAX_ATOMS}")
    return [unit * n for n in sorted(set(n_units))], doubts(model, unit, n_units)


def choose_checkpoint(
    models: Mapping[str, ContinuousCGCNN], formula: str, config: PredictConfig
) -> tuple[str, PredictConfig]:
    """The first of several that raises no doubts about a formula, else the last, and the settings with its confidence.

    Models (≥ 1) go by names or paths; only bundled ones have parameters of :func:`confidence`. Refuses what plan does.
    """
    name = next((name for name, model in models.items() if not plan(model, formula, config)[1]), [*models][-1])
    bundled = (path := find_checkpoint(name)).resolve().parent == CHECKPOINTS.resolve()
    return name, replace(config, confidence=CALIBRATED.get(path.stem) if bundled else None)


def describe_cells(model: ContinuousCGCNN, species: Sequence[Sequence[int]]) -> str:
    """Their sizes, and how many training crystals each can take its start from, of those of the same stoichiometry."""
    counts, sizes = training_counts(model), []
    for own in (torch.bincount(torch.tensor(numbers), minlength=MAX_ATOMIC_NUMBER + 1) for numbers in species):
        alike = of_pattern(counts, own) & (counts != own).any(dim=1)
        sizes.append(f"{own.sum()} ({alike.sum()})")
    return f"atoms in a cell (and training crystals of this stoichiometry and size): {', '.join(sizes)}"


def choose_units(model: ContinuousCGCNN, unit: Sequence[int]) -> tuple[int, ...]:
    """Formula units in the cell: the three commonest among training crystals of this stoichiometry.

    If there are none: 1, 2 and 4, but for cells larger than all training crystals.
    """
    sizes = training_counts(model).sum(dim=1)
    same = Counter((sizes[_same_stoichiometry(model, unit)] // len(unit)).tolist())
    largest = max(len(unit), int(sizes.max()) if len(sizes) else MAX_ATOMS)
    fitting = [n for n in (1, 2, 4) if n * len(unit) <= largest]
    return tuple(sorted(n for n, _ in same.most_common(N_SIZES)) or fitting)


def doubts(model: ContinuousCGCNN, unit: Sequence[int], n_units: Sequence[int]) -> list[str]:
    """What the training crystals of a checkpoint do not cover, a sentence each."""
    counts, found = training_counts(model), []
    if not len(counts):
        return ["the checkpoint does not say which crystals it was trained on"]
    if unseen := [str(Element.from_Z(number)) for number in dict.fromkeys(unit) if not counts[:, number].any()]:
        found.append(f"no training crystal has {' or '.join(unseen)}: energies are guesses")
    if not _same_stoichiometry(model, unit).any():
        found.append("no training crystal has this stoichiometry: cells are those of others")
    largest, n_atoms = int(counts.sum(dim=1).max()), len(unit) * max(n_units)
    if n_atoms > largest:
        found.append(f"cells of {n_atoms} atoms are larger than those of all training crystals (≤ {largest} atoms)")
    return found


def _same_stoichiometry(model: ContinuousCGCNN, unit: Sequence[int]) -> torch.Tensor:
    """Which training crystals consist of so many elements in the same ratio, (n,) bool."""
    counts = _reduced(model)
    return of_pattern(counts, torch.bincount(torch.tensor(unit), minlength=counts.shape[1]))


@lru_cache(maxsize=2)
def _reduced(model: ContinuousCGCNN) -> torch.Tensor:
    return torch.from_numpy(reduce_counts(training_counts(model).numpy()))


def predict(
    model: ContinuousCGCNN,
    formula: str,
    config: PredictConfig | None = None,
    library: candidates.TemplateLibrary | None = None,
    progress: bool = False,
    stop: Callable[[], bool] | None = None,
    measured: np.ndarray | None = None,
) -> Prediction:
    """The crystals that a formula may have, from an energy that knows nothing but the formula.

    Candidates slide down their wells; energies are per atom, so cells of different size compare.

    Args:
        model: from :func:`contsp_core.load_model`.
        formula: any number of formula units; :class:`PredictConfig` says how many the cells have.
        config: by default 20 chains of each size.
        library: training crystals, needed for the sources ``templates`` and ``both``.
        progress: show a progress bar where standard error is a terminal.
        stop: asked before every ``ROUND`` chains of each size whether to end with what was found.
        measured: a powder pattern (n, 2), 2θ in degrees and counts; the crystals kept are those that agree best, not
            those of lowest energy.

    Text that is no formula, cells that are too large, a library that is missing, and nothing found are a ValueError.
    """
    config, made = config or PredictConfig(), list[Structure]()
    if measured is not None and (np.ndim(measured) != 2 or measured.shape[1] != 2):
        raise ValueError(f"measured has shape {np.shape(measured)}, expected (n, 2): angles and counts")
    species, doubted = plan(model, formula, config)
    if config.source != "chains":
        if library is None:
            raise ValueError(f"library is None, expected the training crystals for source {config.source!r}")
        made += _from_templates(model, species, config, library)
    if config.source != "templates":
        made += _from_chains(model, species, config, progress, stop)
    if not made:
        is_stopped = config.source != "templates" and stop is not None and stop()
        problem = "was stopped too early" if is_stopped else "has no template; source 'chains' needs none"
        raise ValueError(f"formula {formula!r} {problem}: nothing was found")
    if not (groups := candidates.rank_distinct(made)):
        raise ValueError(f"formula {formula!r}: atoms overlap in all of {len(made)} candidates, expected one without")
    groups = [sorted(group, key=candidates.is_crowded) for group in groups]  # comparing them ignores volumes
    sound, chances = np.array([not candidates.is_crowded(group[0]) for group in groups]), np.zeros(len(groups))
    energies, counts = np.array([(group[0].properties["energy"], len(group)) for group in groups]).T
    as_calibrated = not doubted and config.n_steps in (None, sampling_config(model).n_steps)
    as_calibrated &= config.source == "chains" and len(made) >= N_CALIBRATED * len(species)
    if config.confidence and as_calibrated and sound.any():
        chances[sound] = confidence(energies[sound], counts[sound] / len(made), config.confidence)
    order = np.lexsort((energies, -chances * (len(species) == 1), ~sound))  # of several sizes, small cells recur more
    if measured is not None:
        order = np.lexsort((-np.array([agreement(group[0], measured) for group in groups]), ~sound))
    table = tabulate(kept := [groups[i] for i in order[: config.n_best]], config.n_jobs)
    if chances.any():
        table.insert(1, "confidence", chances[order[: config.n_best]])
    if counts.max() == 1 and config.source != "templates":
        doubted.append("no crystal was found twice: more chains would find others")
    return Prediction(formula, kept, table, len(made), doubted)


def _from_templates(
    model: ContinuousCGCNN, species: list[list[int]], config: PredictConfig, library: candidates.TemplateLibrary
) -> list[Structure]:
    made, options = list[Structure](), dict[str, Any](model=model, library=library)
    for found in candidates.make_candidates("templates_relaxed", species, config.n_samples, config.seed, **options):
        made += _settle(model, [structure for structure in found if structure is not None], "templates")
    return made


def _from_chains(
    model: ContinuousCGCNN, species: list[list[int]], config: PredictConfig, progress: bool, stop: Callable | None
) -> list[Structure]:
    """In rounds, where something may end the search early."""
    on_cpu, started, made = next(model.parameters()).device.type == "cpu", time.monotonic(), list[Structure]()
    n_jobs = effective_n_jobs(config.n_jobs if on_cpu else 1)
    work = delayed(partial(_run, portable(model), species, config))
    round_ = config.n_samples if config.minutes is None and stop is None else ROUND
    for first in range(0, config.n_samples, round_):
        spent = (time.monotonic() - started) / 60  # another round may end too late
        late = first and config.minutes is not None and spent * (1 + round_ / first) > config.minutes
        if late or (stop is not None and stop()):
            break
        numbers = np.arange(first, min(first + round_, config.n_samples))
        parts = [part for part in np.array_split(numbers, max(n_jobs, len(numbers) // PART)) if len(part)]
        found = Parallel(min(n_jobs, len(parts)), return_as="generator")(work(part) for part in parts)
        shown = tqdm(found, "sampling", len(parts), disable=None if progress else True)
        made += itertools.chain.from_iterable(shown)
    return made


def _run(
    model: ContinuousCGCNN, species: list[list[int]], config: PredictConfig, numbers: np.ndarray
) -> list[Structure]:
    """Chains of consecutive numbers, by one thread of any process."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted = range(int(numbers[0]), int(numbers[-1]) + 1)
        found = sample_structures(model, species, wanted, config.n_steps, config.seed)
        return _settle(model, [structure for samples in found for structure in samples], "chains")
    finally:
        torch.set_num_threads(n_threads)


def _settle(model: ContinuousCGCNN, structures: list[Structure], source: str) -> list[Structure]:
    """Further down their wells, with energy and source."""
    settled = candidates.descend(model, structures, candidates.N_DESCENT)
    settled = candidates.with_energies(model.judge, settled)
    for structure in settled:
        structure.properties["source"] = source
    return settled


def tabulate(groups: list[list[Structure]], n_jobs: int = -1) -> pd.DataFrame:
    """The table of :func:`candidates.describe` with the names of prototypes, and what a calculator said."""
    table, best = candidates.describe(groups), [group[0] for group in groups]
    names = run_with_time_limit(prototype, [(structure,) for structure in best], n_jobs, progress=False)
    table.insert(table.columns.get_loc("space group"), "prototype", [name or "" for name in names])
    for name in ("calculator_error", "calculator_converged", "calculator_energy"):
        if any(name in structure.properties for structure in best):
            without = "" if name == "calculator_error" else None  # pandas makes NaN of None among texts
            table.insert(1, name, [structure.properties.get(name, without) for structure in best])
    if any(crowded := [candidates.is_crowded(structure) for structure in best]):
        table.insert(1, "too close", crowded)
    return table


@cache
def _prototypes() -> list[dict[str, Any]]:
    """AFLOW's, as pymatgen has them on disk: it would take seconds to make structures of them all."""
    package: Any = find_spec("pymatgen.analysis.prototypes")  # not imported
    with gzip.open(Path(package.origin).with_name("aflow_prototypes.json.gz")) as file:
        return json.load(file)


def prototype(structure: Structure) -> str:
    """Name and Strukturbericht symbol of the AFLOW prototype that a crystal is nearest to; empty if it matches none."""
    number, found = candidates.space_group(structure).split("(")[-1].rstrip(")"), list[tuple[float, dict]]()
    for entry in _prototypes():
        if entry["tags"]["aflow"].split("_")[2] == number:
            with warnings.catch_warnings(action="ignore"), suppress(Exception):  # pymatgen fails in many ways
                rms, _ = StructureMatcher().get_rms_anonymous(structure, Structure.from_dict(entry["snl"]))
                found += [] if rms is None else [(rms, entry["tags"])]
    if not found:
        return ""
    tags = min(found, key=itemgetter(0))[1]
    known = [tags[name] for name in ("mineral", "strukturbericht", "aflow") if tags[name] not in (None, "", "None")]
    return known[0] if len(known) < 3 else f"{known[0]} ({known[1]})"


def confidence(energies: np.ndarray, shares: np.ndarray, parameters: Sequence[float]) -> np.ndarray:
    """How likely each crystal of a formula is the right one, (n,), calibrated on validation crystals.

    A conditional logit: exp(s) / (exp(c) + Σ exp(s)) with s = a ln(share) − b (E − lowest E); exp(c) stands for a
    crystal that was not found. ``notebooks/ranking.py --choose-units`` fits (a, b, c) to 20 chains of each size of
    cell that is tried for a formula, and tests them on other formulas. ``energies`` (n,) are per atom, dimensionless;
    ``shares`` (n,) are those of the candidates that ended in each crystal.
    """
    a, b, c = parameters
    scores = a * np.log(shares) - b * (energies - energies.min())
    weights = np.exp(scores - scores.max())
    return weights / (np.exp(c - scores.max()) + weights.sum())
