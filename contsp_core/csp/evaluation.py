"""From a checkpoint, or a folder of CIFs made by any other program, to scores: sample, keep, compare, write.

Samples lie in ``<output_dir>/<material_id>/<sample number>.cif``; beside them ``settings.json`` (what made them),
``summary.json`` and ``per_crystal.csv``.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pymatgen.core import Lattice, Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.io.cif import CifWriter
from tqdm.auto import tqdm

from contsp_core.checkpoints import find_checkpoint, load_model
from contsp_core.csp.candidates import N_STEPS, SOURCES, TemplateLibrary, make_candidates, with_energies
from contsp_core.csp.metrics import evaluate_csp, match_rate_curve
from contsp_core.data import DATA_DIR, load_split, parse_cifs, write_whole
from contsp_core.sampler import sample_structures, sampling_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pymatgen.core import Structure

    from contsp_core.data import Split
    from contsp_core.energy import ContinuousCGCNN


ENERGIES = "energies.json"  # written last: a crystal that has it is complete
SETTINGS = "settings.json"


def write_samples(folder: Path, material_id: str, structures: Sequence[Structure | None]) -> None:
    """Write the samples of one crystal and, last, their energies (null where there is none).

    Args:
        folder: parent of the crystal's own folder.
        material_id: name of that folder.
        structures: in order; None leaves its number out.
    """
    own, width = crystal_folder(folder, material_id), max(2, len(str(len(structures) - 1)))
    for number, structure in enumerate(structures):
        if structure is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pymatgen warns of elements without electronegativity
                text = str(CifWriter(structure, significant_figures=8))
            write_text(own / f"{number:0{width}d}.cif", text)
    energies = [None if structure is None else structure.properties.get("energy") for structure in structures]
    write_text(own / ENERGIES, json.dumps(energies) + "\n")


def read_samples(
    folder: str | Path, material_ids: Sequence[str], n_samples: int | None = None, n_jobs: int = -1
) -> list[list[Structure | None]]:
    """Read the samples of some crystals; None stands for a file that is missing or cannot be read.

    Numbers in file names start at 0, or at 1 if no crystal has a 0. Energies found beside the files go to
    ``properties["energy"]``.

    Args:
        folder: has one folder a crystal.
        material_ids: the crystals asked for.
        n_samples: how many samples a crystal should have; by default the largest number found.
        n_jobs: processes that parse CIFs; -1 is all cores.

    Raises:
        ValueError: if the folder is missing or has no sample of these crystals, or a file's name is not a number.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"cif_dir is {str(folder)!r}, expected a folder with <material_id>/<sample number>.cif in it")
    files = {
        (row, _number(path)): path
        for row, material_id in enumerate(material_ids)
        for path in crystal_folder(folder, material_id).glob("*.cif")
    }
    if not files:
        raise ValueError(
            f"cif_dir {str(folder)!r} has no <material_id>/<number>.cif, for example {material_ids[0]}/0.cif"
        )
    first = 0 if any(number == 0 for _, number in files) else 1
    n_samples = max(number for _, number in files) - first + 1 if n_samples is None else n_samples
    samples: list[list[Structure | None]] = [[None] * n_samples for _ in material_ids]
    energies = [_energies(crystal_folder(folder, material_id)) for material_id in material_ids]
    wanted = {key: path for key, path in files.items() if 0 <= key[1] - first < n_samples}
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in wanted.values()]
    for (row, number), cell in zip(wanted, parse_cifs(texts, n_jobs, "samples"), strict=True):
        if not isinstance(cell, str):
            place = number - first
            structure = Structure(
                Lattice(cell.cell), cell.atomic_numbers.tolist(), cell.positions, coords_are_cartesian=True
            )
            if place < len(energies[row]) and energies[row][place] is not None:
                structure.properties["energy"] = energies[row][place]
            samples[row][place] = structure
    return samples


def fill_folder(
    folder: str | Path,
    material_ids: Sequence[str],
    n_atoms: Sequence[int],
    n_samples: int,
    settings: dict[str, Any],
    make: Callable[[list[int], int], list[list[Structure | None]]],
    chunk_atoms: int = 8192,
) -> None:
    """Make the samples that a folder lacks, in chunks of crystals: an interruption loses at most one chunk.

    Chunks are fixed by the arguments alone, so that an interrupted job ends with the same files as one that was not.

    Args:
        folder: made if missing.
        material_ids: one per crystal.
        n_atoms: atoms of each; crystals of similar size share a chunk.
        n_samples: for each crystal.
        settings: all that determines the samples; kept in ``settings.json``.
        make: ``make(rows, number of the chunk)`` returns a list of samples for each row.
        chunk_atoms: atoms in all samples of a chunk, at most (but at least one crystal).

    Raises:
        ValueError: if the folder holds samples of other settings.
    """
    folder, settings = Path(folder), json.loads(json.dumps(settings | {"chunk_atoms": chunk_atoms}, default=str))
    _check_settings(folder, settings)
    order = sorted(range(len(n_atoms)), key=lambda row: n_atoms[row])
    chunks, used = [[]], 0
    for row in order:
        if chunks[-1] and used + n_atoms[row] * n_samples > chunk_atoms:
            chunks.append([])
            used = 0
        chunks[-1].append(row)
        used += n_atoms[row] * n_samples
    for number, rows in enumerate(chunks):
        missing = {row for row in rows if not (crystal_folder(folder, material_ids[row]) / ENERGIES).is_file()}
        if missing:
            for row, structures in zip(rows, make(rows, number), strict=True):
                if row in missing:
                    write_samples(folder, material_ids[row], structures)


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
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


def crystal_folder(folder: str | Path, material_id: str) -> Path:
    """Where the samples of one crystal lie.

    Raises:
        ValueError: if the id cannot name a folder.
    """
    if Path(material_id).name != material_id:
        raise ValueError(f"material_id is {material_id!r}, expected a name that a folder can have")
    return Path(folder) / material_id


def _number(path: Path) -> int:
    if not path.stem.isdecimal():
        raise ValueError(f"{path} has a name that is no number, expected <material_id>/<sample number>.cif")
    return int(path.stem)


def _energies(folder: Path) -> list[float | None]:
    path = folder / ENERGIES
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it appears complete or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


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
        summary: ``settings``, ``scores`` (see :func:`contsp_core.csp.metrics.summarise`) and ``data``, as written to
            ``summary.json``.
        table: a row per test crystal, see :func:`contsp_core.csp.metrics.evaluate_csp`;
            reference_energy if a model is at hand.
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
        source: one of ``contsp_core.csp.candidates.SOURCES``.
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


PUBLISHED = DATA_DIR / "published.csv"
COLUMNS = ["dataset", "k", "method", "match rate (%)", "95 % interval", "RMSE", "test crystals", "remarks"]
SCORES = {
    "match_rate": "match rate",
    "rmse": "RMSE",
    "match_rate_valid": "match rate, valid samples only",
    "rmse_valid": "RMSE, valid samples only",
    "match_rate_strict": "match rate, strict tolerances",
    "match_rate_random": "match rate, samples in random order",
    "match_rate_ranked": "match rate, samples ranked by energy",
    "crmse": "cRMSE",
    "metre": "METRe",
    "metre_crmse": "cRMSE of METRe",
}
MISSING = "nan"
MAX_POLYMORPHS = 4  # more than so many share the last row of the count


def results_table(summaries: Sequence[str | Path | dict[str, Any]], published: bool = True) -> pd.DataFrame:
    """Our scores beside the published ones, a row for each method and number k of answers.

    Match at ltol, stol, angle_tol = 0.3, 0.5, 10, invalid samples included. A summary gives a row at k = 1, one at its
    number of samples, and, if its samples carry energies, one for the best-ranked of them.

    Args:
        summaries: ``summary.json`` files, or their content.
        published: add the published numbers for the data sets that occur.

    Returns:
        Columns dataset, k, method, match rate (%), 95 % interval, RMSE, test crystals, remarks; k = "1 of n" is the one
        of lowest energy among n. Every difference in protocol or data from the published numbers is in the remarks.
    """
    read = [item if isinstance(item, dict) else json.loads(Path(item).read_text()) for item in summaries]
    rows = [row for summary in read for row in _own_rows(summary)]
    if published:
        datasets = {row["dataset"] for row in rows}
        numbers = pd.read_csv(PUBLISHED)
        rows += [_published_row(row) for _, row in numbers[numbers["dataset"].isin(datasets)].iterrows()]
    rows.sort(key=lambda row: (row["dataset"], "of" in str(row["k"]), int(str(row["k"]).split()[-1])))
    return pd.DataFrame(rows, columns=COLUMNS)


def _own_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    settings, scores = summary["settings"], summary["scores"]
    n = settings["n_samples"]
    keys = {1: ("match_rate@1", "rmse@1"), n: (f"match_rate@{n}", f"rmse@{n}")}
    if _parse_number(scores.get("match_rate_lowest_energy")) != MISSING and n > 1:
        keys[f"1 of {n}"] = ("match_rate_lowest_energy", "rmse_lowest_energy")
    rows = []
    for k, (rate, rmse) in keys.items():
        low, high = scores[f"{rate}_interval"]
        values = (f"{100 * scores[rate]:.2f}", f"{100 * low:.1f} – {100 * high:.1f}", _parse_number(scores[rmse]))
        ranked = ["best of n by energy"] if "of" in str(k) else []
        remarks = "; ".join(_remarks(summary) + ranked)
        rows.append(
            dict(zip(COLUMNS, (settings["dataset"], k, settings["method"], *values, scores["n_references"], remarks)))
        )
    return rows


def _remarks(summary: dict[str, Any]) -> list[str]:
    settings, data = summary["settings"], summary["data"]
    remarks = [f"{settings['n_steps']} energy gradients per sample"] if settings.get("n_steps") else []
    if settings["split"] != "test":
        remarks.append(f"on the {settings['split']} split")
    if settings["n_structures"] < data["n_crystals"]:
        remarks.append(
            f"{settings['n_structures']} of {data['n_crystals']} crystals, chosen by seed {settings['seed']}"
        )
    if settings["dataset"] == "prototypes":
        remarks.append("textbook crystals bundled here, no published numbers")
    elif not data["official"]:
        trained_on = summary["trained_on"].get("n_structures")
        remarks.append("not the official split" + (f", trained on {trained_on} crystals" if trained_on else ""))
    n_missing = summary["scores"]["n_missing"]
    return remarks + ([f"{n_missing} samples missing: no match"] if n_missing else [])


def _published_row(row: pd.Series) -> dict[str, Any]:
    values = (f"{row['match_rate_percent']:.2f}", "", _parse_number(row["rmse"]), "", f"published: {row['source']}")
    return dict(zip(COLUMNS, (row["dataset"], row["k"], row["method"], *values)))


def overview_table(results: pd.DataFrame) -> pd.DataFrame:
    """The rows of :func:`results_table`, read as texts, with all k of a method side by side.

    Returns:
        A row for each data set and method; for each k the match rate (%) with its interval, and the RMSE.
    """
    counts = sorted(results["k"].unique(), key=lambda k: ("of" in k, int(k.split()[-1])))
    columns = ["data set", "method"]
    for k in counts:
        columns += [f"lowest energy of {k.split()[-1]} (%)" if "of" in k else f"k = {k} (%)", "RMSE"]
    rows = []
    for (dataset, method), group in results.groupby(["dataset", "method"], sort=False):
        found = group.set_index("k")
        rows.append([dataset, method, *(cell for k in counts for cell in _cells(found, k))])
    return pd.DataFrame(rows, columns=columns)


def _cells(found: pd.DataFrame, k: str) -> tuple[str, str]:
    if k not in found.index:
        return "", ""
    rate, interval = found.loc[k, "match rate (%)"], found.loc[k, "95 % interval"]
    text = f"{float(rate):.1f} [{interval.replace(' – ', ', ')}]" if interval else rate
    return text, found.loc[k, "RMSE"].replace(MISSING, "–")


def _parse_number(value: float | None) -> str:
    return MISSING if value is None or np.isnan(value) else f"{value:.4f}"


def score_table(scores: dict[str, Any]) -> pd.DataFrame:
    """Scores at k = 1 and k = n_samples side by side: a row for each score, each with its 95 % interval.

    Args:
        scores: of :func:`contsp_core.csp.metrics.summarise`.
    """
    rows = {}
    for k in sorted({1, scores["n_samples"]}):
        for name, label in SCORES.items():
            value = scores.get(f"{name}@{k}")
            text = _parse_number(value)
            if text != MISSING:
                low, high = scores[f"{name}@{k}_interval"]
                text = f"{value:.3f} [{low:.3f}, {high:.3f}]"
            rows.setdefault(label, {})[f"k = {k}"] = text
    return pd.DataFrame.from_dict(rows, orient="index")


def extreme_cases(result: Evaluation, n: int = 2) -> tuple[list[Structure], list[str]]:
    """Best and worst predictions, each after its reference, with titles: n of smallest rms, n of largest or no match.

    A matching sample is shown in the cell of its reference; a crystal without match by its first sample. Cells of one
    atom, where there is nothing to place, are left out if there are others.
    """
    rms_best, n_atoms = (result.table[name].to_numpy() for name in ("rms_best", "n_atoms"))
    order = np.nan_to_num(rms_best, nan=np.inf).argsort(kind="stable")
    order = order[n_atoms[order] > 1] if (n_atoms > 1).any() else order
    structures, titles = [], []
    for row in dict.fromkeys([*order[:n], *order[-n:]]):
        reference, best = result.references.structures[row], int(result.table["best_index"].iloc[row])
        sample = result.predictions[row][max(best, 0)]
        if sample is None:
            continue
        structures += [reference, _in_cell_of(reference, sample)]
        titles += [
            f"{result.references.material_ids[row]}",
            "no match" if best < 0 else f"sample, rms {rms_best[row]:.3f}",
        ]
    return structures, titles


def _in_cell_of(reference: Structure, sample: Structure) -> Structure:
    """The sample described like the reference, if they match cell by cell; else in its reduced cell."""
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10, primitive_cell=False)
    return matcher.get_s2_like_s1(reference, sample) or sample.get_reduced_structure()


def to_markdown(table: pd.DataFrame) -> str:
    """A table of texts and numbers in Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def polymorph_counts(references: Split) -> pd.Series:
    """For each crystal, how many crystals of its composition the whole data set has (all splits, itself included)."""
    splits = [load_split(references.name, split) for split in ("train", "val", "test")]
    counts = pd.Series([_formula(numbers) for split in splits for numbers in split.species]).value_counts()
    found = [int(counts[_formula(numbers)]) for numbers in references.species]
    return pd.Series(found, index=pd.Index(references.material_ids, name="material_id"), name="polymorphs")


def _formula(species: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Composition in lowest terms, as something that can be counted."""
    numbers, counts = np.unique(species, return_counts=True)
    return tuple(zip(numbers.tolist(), (counts // np.gcd.reduce(counts)).tolist(), strict=True))


def single_answer_ceiling(counts: pd.Series) -> tuple[float, pd.DataFrame]:
    """Match rate at k = 1 of one who knows all crystals of a composition, but not which of them is asked for.

    An answer drawn evenly from m polymorphs is right with probability 1/m. (More, where two of them match each other.)

    Args:
        counts: from :func:`polymorph_counts`.

    Returns:
        The ceiling, and a table of the share of crystals with 1, 2, … polymorphs.
    """
    labels = counts.clip(upper=MAX_POLYMORPHS).map(lambda m: f"{m}" if m < MAX_POLYMORPHS else f"≥ {m}")
    shares = labels.value_counts(sort=False, normalize=True).sort_index()
    return float((1 / counts).mean()), shares.rename_axis("crystals of the composition").rename("share").reset_index()


if __name__ == "__main__":
    tables = [pd.read_csv(path, dtype=str, keep_default_na=False) for path in sys.argv[1:]]
    print(to_markdown(overview_table(pd.concat(tables))), end="")
