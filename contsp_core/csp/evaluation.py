"""How well does a checkpoint, or a folder of CIFs made by any other program, predict the crystals of a data set?

Sample, keep, compare, write. Samples lie in ``<output_dir>/<material_id>/<sample number>.cif``; beside these folders
``settings.json`` (what made them), ``summary.json`` and ``per_crystal.csv``.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter
from tqdm import tqdm

from contsp_core.checkpoints import load_model, read_settings
from contsp_core.crystals import check_settings, reduce_counts
from contsp_core.csp.candidates import N_STEPS, SOURCES, TemplateLibrary, make_candidates, with_energies
from contsp_core.csp.metrics import LISTS, check_limits, evaluate_csp, run_with_time_limit, spread
from contsp_core.data import Split, choose, find_checkpoint, load_split, parse_cifs, retold, stamp, write_whole
from contsp_core.energy import ContinuousCGCNN, portable
from contsp_core.sampler import sampling_config, training_counts

ENERGIES = "energies.json"  # {file name: energy or null}; written last: names the files of a complete crystal
SETTINGS, SUMMARY, TABLE = "settings.json", "summary.json", "per_crystal.csv"
N_SAMPLES = 20
SAMPLERS = {None: "noise levels", "cartesian": "annealed MALA", "strain": "annealed MALA, strain moves"}
# labels of sources; that of "chains" depends on the model
METHODS = {"start": "the sampler's start, no gradient", "start_descended": "the sampler's start, energy descent"}
METHODS |= {"templates": "element substitution", "templates_relaxed": "element substitution, short chains"}
# of pickled training crystals, for these can be a key: made once in each process
_library = lru_cache(maxsize=1)(lambda training: TemplateLibrary(pickle.loads(training)))


@dataclass(frozen=True)
class EvaluationConfig:
    """What is sampled and compared; a wrong value is a ValueError in one line."""

    source: str = "chains"  # one of contsp_core.csp.candidates.SOURCES; of no meaning for CIF files
    split: Literal["train", "val", "test"] = "test"
    n_structures: int | None = None  # crystals, chosen by the seed; None: all
    n_samples: int | None = None  # of each crystal; None: 20, or as many as the CIF files have
    n_steps: int | None = None  # energy gradients a candidate, if it takes any; None: as the source does by itself
    best_of: int = 1  # candidates of each sample, which is the one of lowest energy; of no meaning for CIF files
    seed: int = 0  # of the choice and of the samples
    device: str | None = None  # where the model runs; None: on the CPU
    chunk_atoms: int = 8192  # atoms sampled at once, or up to 16 times fewer: what an interruption costs each process
    n_jobs: int = -1  # processes of one thread that sample, read and compare; -1: all cores
    time_limit_s: float = 10.0  # of one CIF file, or comparison
    progress: bool = False  # show progress bars where standard error is a terminal

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}, expected one of {', '.join(SOURCES)}")
        check_limits(self.n_jobs, self.time_limit_s)
        counts = dict.fromkeys(("n_samples", "n_steps", "best_of"), (1, 10**6))
        check_settings(self, seed=(0, 2**62), n_jobs=(-1, math.inf), **counts)


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

    A second call makes only the samples that are missing. All cores are used, or those that joblib is told to use, for
    example by ``joblib.parallel_config(backend="dask")``; the result does not depend on it (but for rounding).

    ``checkpoint`` is a bundled one by name, or a file, or None for sources that need no model; by default 20 chains
    are made for each test crystal. It is a ValueError if a checkpoint or data set is unknown, or if the folder,
    which is made if missing, holds samples of other settings.
    """
    settings, model, chosen, record = _load(checkpoint, dataset, settings)
    source, folder = settings.source, Path(output_dir)
    n_samples, best_of = settings.n_samples or N_SAMPLES, settings.best_of
    training = load_split(dataset, "train") if source.startswith("templates") else None
    if model is None and (source != "templates" or best_of > 1):
        raise ValueError(f"checkpoint is None, expected one for source {source!r} and best_of {best_of}")
    n_steps, blob_id = settings.n_steps or N_STEPS.get(source), training and training.source.blob_id
    n_steps = 0 if source in ("templates", "start") else n_steps or sampling_config(model).n_steps
    record |= {"n_samples": n_samples, "n_steps": n_steps, "best_of": best_of, "training_data": blob_id}
    compare_settings(folder, {name: value for name, value in record.items() if name != "n_structures"})
    options = {"source": source, "n_samples": n_samples * best_of, "n_steps": n_steps or None, "seed": settings.seed}
    options |= {"batch_atoms": settings.chunk_atoms if model and model.use_kernels else None}
    given = model and portable(model), None if training is None else pickle.dumps(training)
    make = partial(_make, *given, options, best_of)
    fill_folder(folder, list(zip(chosen.material_ids, chosen.species, strict=True)), make, settings)
    method = method_label(source, checkpoint, model) + f", best of {best_of}" * (best_of > 1)
    return _score(folder, chosen, record | {"method": method}, model, folder, settings)


def evaluate_cifs(
    cif_dir: str | Path,
    dataset: str,
    output_dir: str | Path,
    settings: EvaluationConfig | None = None,
    checkpoint: str | Path | None = None,
    method: str = "CIF files",
) -> Evaluation:
    """Score crystals made by any program: ``<cif_dir>/<material_id>/<sample number>.cif``.

    A file that is missing or cannot be read keeps its place as a sample that matches nothing. Results go to
    ``output_dir``, with the name of the ``method``. If a checkpoint is given, the energy of its judge chooses among the
    samples. A folder that is missing, or has no sample of the crystals chosen, is a ValueError.
    """
    settings, model, chosen, record = _load(checkpoint, dataset, settings)
    record |= {"source": "cifs", "n_samples": settings.n_samples, "n_steps": None}
    sample_files(cif_dir, chosen.material_ids)  # a wrong name is told before settings are written
    compare_settings(Path(output_dir), record | {"cif_dir": str(Path(cif_dir).resolve()), "n_structures": None})
    return _score(Path(cif_dir), chosen, record | {"method": method}, model, Path(output_dir), settings)


def _load(checkpoint: str | Path | None, dataset: str, settings: EvaluationConfig | None) -> tuple:
    """Settings, model, the crystals chosen, and for the files what determines samples and scores."""
    settings = settings or EvaluationConfig()
    model = None if checkpoint is None else load_model(checkpoint, settings.device)
    header = {} if checkpoint is None else read_settings(checkpoint)
    digest = " + ".join(stamp(find_checkpoint(name)) for name in (checkpoint, header.get("judge")) if name) or None
    split = load_split(dataset, settings.split)
    chosen = split.select(choose(range(len(split)), settings.n_structures, settings.seed))
    record = dict[str, Any](source=settings.source, checkpoint=digest, dataset=chosen.name, split=chosen.split)
    record |= {"test_data": chosen.source.blob_id, "n_structures": len(chosen), "seed": settings.seed}
    record["trained_on"] = {name: header[name] for name in ("dataset", "n_structures", "data") if name in header}
    return settings, model, chosen, record


def method_label(source: str, checkpoint: str | Path | None, model: ContinuousCGCNN | None) -> str:
    """What the samples are; for chains the objective of the training, from the checkpoint's header, and the sampler."""
    if source != "chains" or checkpoint is None or model is None:
        return METHODS[source]
    header = read_settings(checkpoint)
    objective = (header.get("training") or {}).get("objective", "unknown objective").replace("_", " ")
    sampler = SAMPLERS[getattr(sampling_config(model), "proposal", None)]
    return f"{objective}{' and negatives' if header.get('negatives') else ''}, {sampler}"


def _make(model: Any, training: bytes | None, options: dict, best_of: int, crystals: Sequence[tuple]) -> list[tuple]:
    """Material id and samples of each crystal, by one thread of any process: all that they depend on is given."""
    names, species = zip(*crystals, strict=True)
    library, n_threads = None if training is None else _library(training), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        made = make_candidates(species=species, model=model, library=library, **options)
        return [(name, keep_best(found, best_of)) for name, found in zip(names, made, strict=True)]
    finally:
        torch.set_num_threads(n_threads)


def keep_best(candidates: Sequence[Structure | None], n: int) -> list[Structure | None]:
    """Of every ``n`` consecutive candidates the one of lowest energy; None where there is none. ``n`` divides them."""
    energies = [math.inf if s is None else s.properties.get("energy", 0.0) for s in candidates]
    lowest = torch.tensor(energies, dtype=torch.float64).nan_to_num(math.inf).view(-1, n).argmin(dim=1).tolist()
    return [candidates[n * row + place] for row, place in enumerate(lowest)]


def _score(
    folder: Path, chosen: Split, record: dict, model: ContinuousCGCNN | None, output: Path, settings: EvaluationConfig
) -> Evaluation:
    limits = dict[str, Any](n_jobs=settings.n_jobs, time_limit_s=settings.time_limit_s, progress=settings.progress)
    ends_overlap = record["source"] == "start_descended"  # which are no CIFs, and match nothing
    with warnings.catch_warnings(action="ignore") if ends_overlap else nullcontext():
        predictions = read_samples(folder, chosen.material_ids, record["n_samples"], **limits)
    if model is not None and record["source"] == "cifs":
        rest = iter(_judged(model.judge, [s for samples in predictions for s in samples if s is not None]))
        predictions = [[None if s is None else next(rest) for s in samples] for samples in predictions]
    structures = chosen.structures if model is None else with_energies(model.judge, chosen.structures)
    scores, table = evaluate_csp(structures, predictions, material_ids=chosen.material_ids, **limits)
    if model is not None:
        table["reference_energy"] = [structure.properties["energy"] for structure in structures]
    data = {"official": chosen.source.official, "n_seen": n_seen(model, chosen)}
    data["n_crystals"] = len(load_split(chosen.name, chosen.split))
    summary = {"settings": record, "data": data, "scores": scores}
    write_text(output / SUMMARY, _to_json(summary, indent=2) + "\n")
    lists = {name: table[name].map(_to_json) for name in (*LISTS, "pool_rms")}
    write_text(output / TABLE, table.assign(**lists).to_csv(float_format="%.6g"))
    return Evaluation(summary, table, chosen, predictions)


def _judged(judge: ContinuousCGCNN, structures: list[Structure]) -> list[Structure | None]:
    """With energies; None for what has none, such as a cell of 10¹⁵ Å."""
    with suppress(ValueError):
        return [*with_energies(judge, structures)]
    half = len(structures) // 2
    return _judged(judge, structures[:half]) + _judged(judge, structures[half:]) if half else [None]


def n_seen(model: Any, chosen: Split) -> int | None:
    """How many of these crystals have the reduced formula of a training crystal; None if the model does not say."""
    if not len(counts := training_counts(model)):
        return None
    known = {row.tobytes() for row in reduce_counts(counts.numpy())}
    return sum(row.tobytes() in known for row in reduce_counts(chosen.crystals.element_counts.numpy()))


def _to_json(value: Any, indent: int | None = None) -> str:
    """JSON with null for NaN, which it does not have."""
    plain = json.loads(json.dumps(value, default=str), parse_constant=lambda _: None)
    return json.dumps(plain, indent=indent)


def write_text(path: Path, text: str, replace: bool = True) -> None:
    """Write a text file as by :func:`write_whole`."""
    write_whole(path, lambda file: file.write(text.encode()), replace)


def crystal_folder(folder: str | Path, material_id: str) -> Path:
    """Where the samples of one crystal lie; a ValueError if the id cannot name a folder inside ``folder``."""
    if material_id in ("", ".", "..", SETTINGS, SUMMARY, TABLE) or set(material_id) & set("/\\\0"):
        raise ValueError(f"material_id is {material_id!r}, expected a name that a folder can have")
    return Path(folder) / material_id


def compare_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write the settings of the samples in a folder, or compare them with those found: a ValueError if they differ."""
    path, settings = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {str(folder)!r} is a file, expected a folder, or none")
    if not path.is_file():
        if any((folder / name).exists() for name in (SUMMARY, TABLE, "candidates.json")):  # this one of a prediction
            raise ValueError(f"output_dir {str(folder)!r} has results, but no {SETTINGS}: choose another folder")
        with retold(f"output_dir {str(folder)!r} cannot be written", OSError, kind=OSError), suppress(FileExistsError):
            write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n", replace=False)
    with retold(f"{path} is damaged", OSError, ValueError, TypeError):
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    for name in sorted(found.keys() | settings.keys()):
        if found.get(name) != settings.get(name):
            made = f"samples made with {name}={found.get(name)!r}, expected {settings.get(name)!r}"
            raise ValueError(f"output_dir {str(folder)!r} holds {made}: choose another folder, or remove it")


def fill_folder(folder: Path, crystals: Sequence[tuple], make: Callable, settings: EvaluationConfig) -> None:
    """Make the samples that a folder lacks, in parts: an interruption loses only those in the making.

    Args:
        crystals: (material id, atomic numbers) of each; those of similar size share a part.
        make: ``make(crystals)`` returns (material id, samples) of each, perhaps in another process.
    """
    missing = [crystal for crystal in crystals if not _is_complete(crystal_folder(folder, crystal[0]))]
    missing.sort(key=lambda crystal: (-len(crystal[1]), sorted(crystal[1])))  # the slowest first
    sizes = [(settings.n_samples or N_SAMPLES) * settings.best_of * len(species) for _, species in missing]
    n_jobs = settings.n_jobs if torch.device(settings.device or "cpu").type == "cpu" else 1
    with closing(spread(make, missing, sizes, settings.chunk_atoms, n_jobs, return_as="generator_unordered")) as made:
        for name, structures in tqdm(made, "sampling", len(missing), disable=None if settings.progress else True):
            write_samples(folder, name, structures)


def _is_complete(own: Path) -> bool:
    return (own / ENERGIES).is_file() and all((own / name).is_file() for name in _energies(own))


def _energies(own: Path) -> dict[str, float | None]:
    path = own / ENERGIES
    with retold(f"{path} is damaged", ValueError, TypeError, AttributeError):
        found = json.loads(path.read_text(encoding="utf-8")).items() if path.is_file() else ()
        return {str(name): None if energy is None else float(energy) for name, energy in found}


def write_samples(folder: Path, material_id: str, structures: Sequence[Structure | None]) -> None:
    """Write the samples of one crystal and, last, their energies; None leaves its number out."""
    own, width = crystal_folder(folder, material_id), max(2, len(str(len(structures) - 1)))
    made = {f"{number:0{width}d}.cif": s for number, s in enumerate(structures) if s is not None}
    with warnings.catch_warnings(action="ignore"):  # pymatgen warns of elements without electronegativity
        texts = [str(CifWriter(structure, significant_figures=8)) for structure in made.values()]
    with ThreadPoolExecutor(8) as pool:  # nearly all of the time is waiting for the disk
        list(pool.map(write_text, map(own.joinpath, made), texts))
    energies = {name: structure.properties.get("energy") for name, structure in made.items()}
    write_text(own / ENERGIES, json.dumps(energies, indent=1) + "\n")


def read_samples(
    folder: str | Path, material_ids: Sequence[str], n_samples: int | None = None, **limits: Any
) -> list[list[Structure | None]]:
    """Read the samples of some crystals; None stands for a file that is missing or cannot be read.

    Numbers in file names start at 0, or at 1 if no crystal has a 0. Energies found beside the files go to
    ``properties["energy"]``. Each should have ``n_samples``, by default the largest number found; ``limits`` (of one
    file) are options of :func:`run_with_time_limit`. ValueErrors are those of :func:`sample_files`.
    """
    files = sample_files(folder, material_ids)
    numbers = [number for _, number in files] or [0]  # none: no crystal has a template
    first = min(1, *numbers)
    n_samples = n_samples or max(numbers) - first + 1
    samples: list[list[Structure | None]] = [[None] * n_samples for _ in material_ids]
    energies = [_energies(crystal_folder(folder, material_id)) for material_id in material_ids]
    wanted = {(row, number - first): path for (row, number), path in files.items() if number - first < n_samples}
    texts = [(path.read_text(encoding="utf-8", errors="replace"),) for path in wanted.values()]
    found, failed = run_with_time_limit(_parse, texts, description="reading", **limits), []
    for ((row, place), path), structure in zip(wanted.items(), found, strict=True):
        if not isinstance(structure, Structure):
            failed.append(f"{path}: {structure or 'it takes too long'}")
            continue
        if energies[row].get(path.name) is not None:
            structure.properties["energy"] = energies[row][path.name]
        samples[row][place] = structure
    if failed:
        warnings.warn(f"{len(failed)} CIF files cannot be read, such as {failed[0]}", stacklevel=2)
    return samples


def sample_files(folder: str | Path, material_ids: Sequence[str]) -> dict[tuple[int, int], Path]:
    """The CIF files of samples, by crystal and by the number in their name.

    A ValueError tells of a folder that has no sample of these crystals, and of a name that is no number.
    """
    files: dict[tuple[int, int], Path] = {}
    for row, material_id in enumerate(material_ids):
        for path in filter(Path.is_file, sorted(crystal_folder(folder, material_id).glob("*.cif"))):
            if not path.stem.isdecimal() or len(path.stem) > 5:
                raise ValueError(f"{path} has no number < 100000 as name, expected <material_id>/<sample number>.cif")
            if files.setdefault((row, int(path.stem)), path) != path:
                raise ValueError(f"{path} has the number of {files[row, int(path.stem)].name}, expected different ones")
    if not files and not any((crystal_folder(folder, name) / ENERGIES).is_file() for name in material_ids):
        raise ValueError(f"folder {str(folder)!r} has no {material_ids[0]}/0.cif or other sample of these crystals")
    return files


def _parse(cif: str) -> Structure | str:
    (crystal,) = parse_cifs([cif])
    return crystal if isinstance(crystal, str) else crystal.to_structures()[0]  # a string says why it cannot be read
