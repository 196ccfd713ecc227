"""From a checkpoint, or a folder of CIFs made by any other program, to scores: sample, keep, compare, write.

Samples lie in ``<output_dir>/<material_id>/<sample number>.cif``; beside them ``settings.json`` (what made them),
``summary.json`` and ``per_crystal.csv``.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from contsp_core.candidates import N_STEPS, SOURCES, make_candidates, with_energies
from contsp_core.checkpoints import find_checkpoint, load_model
from contsp_core.cif_folder import fill_folder, read_samples, write_text
from contsp_core.data import load_split
from contsp_core.metrics import evaluate_csp, match_rate_curve
from contsp_core.sampler import sample_structures, sampling_config
from contsp_core.templates import TemplateLibrary

if TYPE_CHECKING:
    from collections.abc import Callable

    from pymatgen.core import Structure

    from contsp_core.energy import ContinuousCGCNN
    from contsp_core.split import Split

LISTS = ("rms", "strict", "structure_valid", "valid", "energy", "pool_rms")  # columns with an entry per sample
METHODS = {
    "chains": "ContinuouSP",
    "random": "random structures",
    "random_descended": "random structures, energy descent",
    "templates": "element substitution",
    "templates_relaxed": "element substitution, short chains",
}


@dataclass(frozen=True)
class Evaluation:
    """Scores and what they were computed from.

    Attributes:
        summary: ``settings``, ``scores`` (see :func:`contsp_core.metrics.summarise`) and ``data``, as written to
            ``summary.json``.
        table: a row per test crystal, see :func:`contsp_core.metrics.evaluate_csp`; reference_energy if a model is at
            hand.
        references: the test crystals.
        predictions: their samples; None where one is missing or cannot be read.
        folder: where everything was written.
    """

    summary: dict[str, Any]
    table: pd.DataFrame
    references: Split
    predictions: list[list[Structure | None]]
    folder: Path


def evaluate_checkpoint(
    checkpoint: str | Path | None,
    dataset: str,
    output_dir: str | Path,
    *,
    source: str = "chains",
    split: str = "test",
    n_structures: int | None = None,
    n_samples: int = 20,
    n_steps: int | None = None,
    seed: int = 0,
    device: str | None = None,
    chunk_atoms: int = 8192,
    n_jobs: int = -1,
    time_limit_s: float = 10.0,
    progress: bool = False,
) -> Evaluation:
    """Predict test crystals from their species, and score the predictions.

    A second call with the same settings makes only the samples that are missing. Baselines are sources of samples too.

    Args:
        checkpoint: a bundled one by data set name, or a file; may be None for sources that need no model.
        dataset, split: as for :func:`contsp_core.data.load_split`.
        output_dir: made if missing.
        source: one of ``contsp_core.candidates.SOURCES``.
        n_structures: test crystals, chosen by the seed; all if None.
        n_samples: for each.
        n_steps: length of the chains; by default as the model says.
        seed: of the choice and of the samples.
        device: where the model runs; "cpu" by default.
        chunk_atoms: samples are made in chunks of so many atoms (more on a GPU).
        n_jobs: worker processes for reading and matching.
        time_limit_s: limit of one comparison, s.
        progress: show progress bars.

    Raises:
        ValueError: on an unknown checkpoint, data set or source, or if the folder holds samples of other settings.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    model = None if checkpoint is None else load_model(checkpoint, device)
    chosen = choose_crystals(load_split(dataset, split), n_structures, seed)
    training = None if source == "chains" else load_split(dataset, "train")
    library = None if training is None else TemplateLibrary(training)
    steps = _steps(source, model, n_steps)
    settings = {
        "source": source,
        "checkpoint": None if model is None else checkpoint_id(checkpoint),
        "dataset": dataset,
        "split": split,
        "test_data": chosen.source.blob_id,
        "training_data": None if training is None else training.source.blob_id,
        "n_structures": len(chosen),
        "n_samples": n_samples,
        "n_steps": steps,
        "seed": seed,
    }
    species = chosen.species
    with tqdm(total=len(chosen), desc=METHODS[source], unit="crystal", disable=not progress) as bar:

        def make(rows: list[int], number: int) -> list[list[Structure | None]]:
            options = {"model": model, "library": library, "n_steps": n_steps, "batch_atoms": chunk_atoms}
            made = make_candidates(source, [species[row] for row in rows], n_samples, seed * 10_007 + number, **options)
            bar.update(len(rows))
            return made

        fill_folder(output_dir, chosen.material_ids, chosen.n_atoms, n_samples, settings, make, chunk_atoms)
    settings["method"] = METHODS[source]
    return _score(Path(output_dir), chosen, settings, model, Path(output_dir), n_jobs, time_limit_s, progress)


def evaluate_cifs(
    cif_dir: str | Path,
    dataset: str,
    output_dir: str | Path,
    *,
    checkpoint: str | Path | None = None,
    split: str = "test",
    n_structures: int | None = None,
    n_samples: int | None = None,
    seed: int = 0,
    method: str = "CIF files",
    n_jobs: int = -1,
    time_limit_s: float = 10.0,
    progress: bool = False,
) -> Evaluation:
    """Score crystals made by any program: ``<cif_dir>/<material_id>/<sample number>.cif``.

    A file that is missing or cannot be read keeps its place as a sample that matches nothing.

    Args:
        cif_dir: read only.
        output_dir: where ``summary.json`` and ``per_crystal.csv`` go.
        checkpoint: if given, its energy ranks the samples.
        n_samples: how many each crystal should have; by default the largest number found.
        method: name in the summary.

    The other arguments are those of :func:`evaluate_checkpoint`.

    Raises:
        ValueError: if the folder is missing or holds no sample of the crystals chosen.
    """
    model = None if checkpoint is None else load_model(checkpoint)
    chosen = choose_crystals(load_split(dataset, split), n_structures, seed)
    settings = {
        "source": "cifs",
        "method": method,
        "checkpoint": None if model is None else checkpoint_id(checkpoint),
        "dataset": dataset,
        "split": split,
        "test_data": chosen.source.blob_id,
        "n_structures": len(chosen),
        "n_samples": n_samples,
        "seed": seed,
    }
    return _score(Path(cif_dir), chosen, settings, model, Path(output_dir), n_jobs, time_limit_s, progress)


def choose_crystals(split: Split, n_structures: int | None, seed: int) -> Split:
    """A random choice of crystals in the order of the file; all of them if ``n_structures`` is None or too large."""
    if n_structures is None or n_structures >= len(split):
        return split
    return split.select(sorted(np.random.default_rng(seed).choice(len(split), size=n_structures, replace=False)))


def _steps(source: str, model: ContinuousCGCNN | None, n_steps: int | None) -> int:
    """Energy gradients spent on each sample."""
    if source == "chains" and model is not None and n_steps is None:
        return sampling_config(model).n_steps
    return 0 if source in ("random", "templates") else n_steps or N_STEPS.get(source, 0)


def checkpoint_id(checkpoint: str | Path) -> str:
    """Name of a checkpoint with the start of its SHA-256."""
    path = find_checkpoint(checkpoint)
    return f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _score(
    folder: Path,
    references: Split,
    settings: dict[str, Any],
    model: ContinuousCGCNN | None,
    output_dir: Path,
    n_jobs: int,
    time_limit_s: float,
    progress: bool,
) -> Evaluation:
    predictions = read_samples(folder, references.material_ids, settings["n_samples"], n_jobs)
    if model is not None and settings["source"] == "cifs":
        rest = iter(with_energies(model, [s for samples in predictions for s in samples if s is not None]))
        predictions = [[None if s is None else next(rest) for s in samples] for samples in predictions]
    options = {"n_jobs": n_jobs, "time_limit_s": time_limit_s, "progress": progress}
    scores, table = evaluate_csp(
        references.structures, predictions, material_ids=references.material_ids, seed=settings["seed"], **options
    )
    if model is not None:
        energies = with_energies(model, references.structures)
        table["reference_energy"] = [structure.properties["energy"] for structure in energies]
    trained_on = {} if model is None else {key: model.settings.get(key) for key in ("dataset", "n_structures", "data")}
    data = {"official": references.source.official, "n_crystals": len(load_split(references.name, references.split))}
    summary = {"settings": settings, "data": data, "trained_on": trained_on, "scores": scores}
    write_text(output_dir / "summary.json", json.dumps(_without_nan(summary), indent=2, default=str) + "\n")
    write_text(output_dir / "per_crystal.csv", _to_csv(table))
    return Evaluation(summary, table, references, predictions, output_dir)


def _without_nan(value: Any) -> Any:
    """The same, with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _to_csv(table: pd.DataFrame) -> str:
    lists = {name: [json.dumps(_without_nan(list(row))) for row in table[name]] for name in LISTS}
    return table.assign(**lists).to_csv(float_format="%.6g")


def read_per_crystal(path: str | Path) -> pd.DataFrame:
    """The table behind a ``per_crystal.csv``; it can be summarised, plotted and pooled again."""
    texts = {"material_id": str, "formula": str}  # NaN is also sodium nitride
    missing = {"rms_best": [""], "same_space_group": [""]}
    table = pd.read_csv(path, index_col="material_id", dtype=texts, keep_default_na=False, na_values=missing)
    for name in LISTS:
        table[name] = [json.loads(text.replace("null", "NaN")) for text in table[name]]
    return table


def validation_match_rate(
    split: Split, n_structures: int = 50, n_samples: int = 4, seed: int = 0, k: int = 1, n_steps: int | None = None
) -> Callable[[ContinuousCGCNN], float]:
    """A score for models in training, higher is better: match rate of k samples, on the same crystals each time.

    All samples are used: the rate is the exact mean over all choices of k among them.

    Args:
        split: validation crystals, of which ``n_structures`` are chosen by the seed.
        n_samples: for each.
        seed: of the choice and of the samples.
        k: samples per answer.
        n_steps: length of the chains; by default as the model says.
    """
    chosen = choose_crystals(split, n_structures, seed)

    def validate(model: ContinuousCGCNN) -> float:
        samples = sample_structures(model, chosen.species, n_samples, n_steps, seed)
        table = evaluate_csp(chosen.structures, samples, metre=False, progress=False)[1]
        return float(match_rate_curve(table)["match_rate"][k - 1])

    return validate
