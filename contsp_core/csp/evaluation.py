"""How well does a checkpoint, or a folder of CIFs made by any other program, predict the crystals of a data set?

Sample, keep, compare, write. Samples lie in ``<output_dir>/<material_id>/<sample number>.cif``; beside these folders
``settings.json`` (what made them), ``summary.json`` and ``per_crystal.csv``.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter
from tqdm import tqdm

from contsp_core.checkpoints import find_checkpoint, load_model, read_settings
from contsp_core.crystals import pack
from contsp_core.csp.candidates import (
    N_STEPS,
    SOURCES,
    WITHOUT_LIBRARY,
    TemplateLibrary,
    make_candidates,
    with_energies,
)
from contsp_core.csp.metrics import LISTS, evaluate_csp
from contsp_core.data import choose, load_split, parse_cifs, write_whole
from contsp_core.diffusion import DiffusionConfig
from contsp_core.sampler import sampling_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contsp_core.data import Split
    from contsp_core.energy import ContinuousCGCNN

ENERGIES = "energies.json"  # {file name: energy or null}; written last: names the files of a complete crystal
SETTINGS, SUMMARY, TABLE = "settings.json", "summary.json", "per_crystal.csv"
N_SAMPLES = 20
OBJECTIVES = {"score_matching": "score matching", "contrastive_divergence": "contrastive divergence"}
METHODS = {  # labels of sources; that of "chains" depends on the model
    "start": "the sampler's start, no gradient",
    "start_descended": "the sampler's start, energy descent",
    "templates": "element substitution",
    "templates_relaxed": "element substitution, short chains",
}


@dataclass(frozen=True)
class EvaluationConfig:
    """What is sampled and compared; a wrong value is a ValueError in one line."""

    source: str = "chains"  # one of contsp_core.csp.candidates.SOURCES; of no meaning for CIF files
    split: str = "test"
    n_structures: int | None = None  # crystals, chosen by the seed; None: all
    n_samples: int | None = None  # of each crystal; None: 20, or as many as the CIF files have
    n_steps: int | None = None  # energy gradients a sample; None: as the source does by itself
    seed: int = 0  # of the choice and of the samples
    device: str | None = None  # where the model runs; None: on the CPU
    chunk_atoms: int = 8192  # atoms sampled at once: what an interruption may cost
    n_jobs: int = -1  # processes that read and compare; -1: all cores
    time_limit_s: float = 10.0  # of one comparison
    progress: bool = False  # show progress bars where standard error is a terminal

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}, expected one of {', '.join(SOURCES)}")
        for name, least in {"n_structures": 1, "n_samples": 1, "n_steps": 1, "seed": 0, "chunk_atoms": 1}.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected ≥ {least}")


@dataclass(frozen=True)
class Evaluation:
    """Scores and what they were computed from."""

    summary: dict[str, Any]  # settings, data and scores (metrics.summarise), as in summary.json
    table: pd.DataFrame  # a row per test crystal (metrics.evaluate_csp); with reference_energy if there is a model
    references: Split
    predictions: list[list[Structure | None]]  # None: missing or unreadable


def evaluate_checkpoint(
    checkpoint: str | Path | None, dataset: str, output_dir: str | Path, settings: EvaluationConfig | None = None
) -> Evaluation:
    """Predict test crystals from their species, and score the predictions; baselines are sources of samples too.

    A second call makes only the samples that are missing.

    Args:
        checkpoint: a bundled one by data set name, or a file; may be None for sources that need no model.
        dataset: as for :func:`contsp_core.data.load_split`.
        output_dir: made if missing.
        settings: by default 20 chains for each test crystal.

    Raises:
        ValueError: on an unknown checkpoint or data set, or if the folder holds samples of other settings.
    """
    settings = settings or EvaluationConfig()
    model = None if checkpoint is None else load_model(checkpoint, settings.device)
    chosen, source, n_samples = _chosen(dataset, settings), settings.source, settings.n_samples or N_SAMPLES
    training = None if source in WITHOUT_LIBRARY else load_split(dataset, "train")
    library = None if training is None else TemplateLibrary(training)
    record = _record(source, checkpoint, chosen, settings) | {"n_samples": n_samples}
    record |= {"n_steps": _steps(source, model, settings.n_steps)}
    record |= {"training_data": None if training is None else training.source.blob_id}
    options = {"model": model, "library": library, "n_steps": record["n_steps"] or None}
    species, folder = chosen.species, Path(output_dir)

    def make(rows: list[int]) -> list[list[Structure | None]]:
        asked = [species[row] for row in rows]
        return make_candidates(source, asked, n_samples, settings.seed, batch_atoms=settings.chunk_atoms, **options)

    check_settings(folder, {name: value for name, value in record.items() if name != "n_structures"})
    sizes = [n_samples * len(numbers) for numbers in species]
    fill_folder(folder, chosen.material_ids, sizes, make, settings.chunk_atoms, settings.progress)
    record |= {"method": method_label(source, checkpoint, model), "trained_on": _trained_on(checkpoint)}
    return _score(folder, chosen, record, model, folder, settings)


def evaluate_cifs(
    cif_dir: str | Path,
    dataset: str,
    output_dir: str | Path,
    settings: EvaluationConfig | None = None,
    checkpoint: str | Path | None = None,
    method: str = "CIF files",
) -> Evaluation:
    """Score crystals made by any program: ``<cif_dir>/<material_id>/<sample number>.cif``.

    A file that is missing or cannot be read keeps its place as a sample that matches nothing.

    Args:
        cif_dir: read only; the results go to ``output_dir``.
        checkpoint: if given, its energy chooses among the samples.
        method: name in the summary.

    Raises:
        ValueError: if the folder is missing or holds no sample of the crystals chosen.
    """
    settings = settings or EvaluationConfig()
    model = None if checkpoint is None else load_model(checkpoint, settings.device)
    chosen = _chosen(dataset, settings)
    record = _record("cifs", checkpoint, chosen, settings) | {"n_samples": settings.n_samples, "n_steps": None}
    record |= {"method": method, "trained_on": _trained_on(checkpoint)}
    return _score(Path(cif_dir), chosen, record, model, Path(output_dir), settings)


def _chosen(dataset: str, settings: EvaluationConfig) -> Split:
    split = load_split(dataset, settings.split)
    return split.select(choose(range(len(split)), settings.n_structures, settings.seed))


def _record(source: str, checkpoint: str | Path | None, chosen: Split, settings: EvaluationConfig) -> dict[str, Any]:
    """All that determines samples and scores, for the files."""
    digest = None
    if checkpoint is not None:
        path = find_checkpoint(checkpoint)
        digest = f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"
    record = {"source": source, "checkpoint": digest, "dataset": chosen.name, "split": chosen.split}
    return record | {"test_data": chosen.source.blob_id, "n_structures": len(chosen), "seed": settings.seed}


def method_label(source: str, checkpoint: str | Path | None, model: ContinuousCGCNN | None) -> str:
    """What the samples are; for chains the objective of the training, from the checkpoint's header, and the sampler."""
    if source != "chains":
        return METHODS[source]
    objective = (read_settings(checkpoint).get("training") or {}).get("objective")
    sampler = "noise levels" if isinstance(sampling_config(model), DiffusionConfig) else "annealed MALA"
    return f"{OBJECTIVES.get(objective, 'unknown objective')}, {sampler}"


def _trained_on(checkpoint: str | Path | None) -> dict[str, Any]:
    header = {} if checkpoint is None else read_settings(checkpoint)
    return {name: header[name] for name in ("dataset", "n_structures", "data") if name in header}


def _steps(source: str, model: ContinuousCGCNN | None, n_steps: int | None) -> int:
    """Energy gradients spent on each sample."""
    if source in ("templates", "start") or model is None:
        return 0
    return n_steps or N_STEPS.get(source) or sampling_config(model).n_steps


def _score(
    folder: Path,
    references: Split,
    record: dict[str, Any],
    model: ContinuousCGCNN | None,
    output_dir: Path,
    settings: EvaluationConfig,
) -> Evaluation:
    predictions = read_samples(folder, references.material_ids, record["n_samples"], settings.n_jobs)
    if model is not None and record["source"] == "cifs":
        rest = iter(with_energies(model, [s for samples in predictions for s in samples if s is not None]))
        predictions = [[None if s is None else next(rest) for s in samples] for samples in predictions]
    structures = references.structures if model is None else with_energies(model, references.structures)
    options = {"time_limit_s": settings.time_limit_s, "progress": settings.progress}
    options["material_ids"] = references.material_ids
    scores, table = evaluate_csp(structures, predictions, settings.n_jobs, **options)
    if model is not None:
        table["reference_energy"] = [structure.properties["energy"] for structure in structures]
    data = {"official": references.source.official, "n_crystals": len(load_split(references.name, references.split))}
    summary = {"settings": record, "data": data, "scores": scores}
    write_text(output_dir / SUMMARY, json.dumps(_without_nan(summary), indent=2, default=str) + "\n")
    lists = {name: [json.dumps(_without_nan(row)) for row in table[name]] for name in (*LISTS, "pool_rms")}
    write_text(output_dir / TABLE, table.assign(**lists).to_csv(float_format="%.6g"))
    return Evaluation(summary, table, references, predictions)


def _without_nan(value: Any) -> Any:
    """The same, with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears complete or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def crystal_folder(folder: str | Path, material_id: str) -> Path:
    """Where the samples of one crystal lie; a ValueError if the id cannot name a folder inside ``folder``."""
    if material_id in ("", ".", "..", SETTINGS, SUMMARY, TABLE) or set(material_id) & set("/\\\0"):
        raise ValueError(f"material_id is {material_id!r}, expected a name that a folder can have")
    return Path(folder) / material_id


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the samples in a folder, or compare them with those found: a ValueError if they differ."""
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if not path.is_file():
        write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in sorted(found.keys() | settings.keys()):
        if found.get(name) != settings.get(name):
            raise ValueError(
                f"output_dir {str(folder)!r} holds samples made with {name}={found.get(name)!r}, "
                f"expected {settings.get(name)!r}: choose another folder, or remove it"
            )


def fill_folder(
    folder: Path,
    material_ids: Sequence[str],
    sizes: Sequence[int],
    make: Callable[[list[int]], list[list[Structure | None]]],
    chunk_atoms: int = 8192,
    progress: bool = False,
) -> None:
    """Make the samples of the crystals that a folder lacks, in chunks: an interruption loses at most one chunk.

    Args:
        sizes: atoms in all samples of each crystal; crystals of similar size share a chunk.
        make: ``make(rows)`` returns a list of samples for each row.
        chunk_atoms: atoms in a chunk, at most (but at least one crystal).
    """
    missing = [row for row, name in enumerate(material_ids) if not _is_complete(crystal_folder(folder, name))]
    missing.sort(key=lambda row: sizes[row])
    with tqdm(total=len(missing), desc="sampling", unit="crystal", disable=None if progress else True) as bar:
        for chunk in pack([sizes[row] for row in missing], chunk_atoms):
            rows = missing[chunk]
            for row, structures in zip(rows, make(rows), strict=True):
                write_samples(folder, material_ids[row], structures)
            bar.update(len(rows))


def _is_complete(own: Path) -> bool:
    return (own / ENERGIES).is_file() and all((own / name).is_file() for name in _energies(own))


def _energies(own: Path) -> dict[str, float | None]:
    path = own / ENERGIES
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, expected {{file name: energy}}")
    return found


def write_samples(folder: Path, material_id: str, structures: Sequence[Structure | None]) -> None:
    """Write the samples of one crystal and, last, their energies; None leaves its number out."""
    own, width, energies = crystal_folder(folder, material_id), max(2, len(str(len(structures) - 1))), {}
    for number, structure in enumerate(structures):
        if structure is None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pymatgen warns of elements without electronegativity
            text = str(CifWriter(structure, significant_figures=8))
        name = f"{number:0{width}d}.cif"
        write_text(own / name, text)
        energies[name] = structure.properties.get("energy")
    write_text(own / ENERGIES, json.dumps(energies, indent=1) + "\n")


def read_samples(
    folder: str | Path, material_ids: Sequence[str], n_samples: int | None = None, n_jobs: int = -1
) -> list[list[Structure | None]]:
    """Read the samples of some crystals; None stands for a file that is missing or cannot be read.

    Numbers in file names start at 0, or at 1 if no crystal has a 0. Energies found beside the files go to
    ``properties["energy"]``.

    Args:
        folder: has one folder a crystal.
        n_samples: how many samples a crystal should have; by default the largest number found.
        n_jobs: processes that parse CIFs; -1 is all cores.

    Raises:
        ValueError: if the folder is missing or has no sample of these crystals, or a file's name is not a number.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"cif_dir is {str(folder)!r}, expected a folder with <material_id>/<sample number>.cif in it")
    files: dict[tuple[int, int], Path] = {}
    for row, material_id in enumerate(material_ids):
        for path in filter(Path.is_file, sorted(crystal_folder(folder, material_id).glob("*.cif"))):
            if files.setdefault((row, _number(path)), path) != path:
                raise ValueError(f"{path} has the number of {files[row, _number(path)].name}, expected different ones")
    if not files:
        example = f"{material_ids[0]}/0.cif"
        raise ValueError(f"cif_dir {str(folder)!r} has no <material_id>/<number>.cif, for example {example}")
    first = min(1, *(number for _, number in files))
    n_samples = n_samples or max(number for _, number in files) - first + 1
    samples: list[list[Structure | None]] = [[None] * n_samples for _ in material_ids]
    energies = [_energies(crystal_folder(folder, material_id)) for material_id in material_ids]
    wanted = {(row, number - first): path for (row, number), path in files.items() if number - first < n_samples}
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in wanted.values()]
    for ((row, place), path), cell in zip(wanted.items(), parse_cifs(texts, n_jobs, "samples"), strict=True):
        if not isinstance(cell, str):  # else the reason why it cannot be read
            lattice, energy = Lattice(cell.cell), energies[row].get(path.name)
            frac_coords = lattice.get_fractional_coords(cell.positions)
            properties = None if energy is None else {"energy": energy}
            samples[row][place] = Structure(lattice, cell.atomic_numbers.tolist(), frac_coords, properties=properties)
    return samples


def _number(path: Path) -> int:
    if not path.stem.isdecimal() or len(path.stem) > 5:
        raise ValueError(f"{path} has no number < 100000 as name, expected <material_id>/<sample number>.cif")
    return int(path.stem)
