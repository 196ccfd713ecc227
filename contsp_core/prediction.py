"""What a prediction is handed over as: distinct structures, ranked by energy, described, and written as CIF."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from pymatgen.core import Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from contsp_core.candidates import make_candidates
from contsp_core.crystals import reduce_species
from contsp_core.data import SPLITS, load_split, parse_formula
from contsp_core.energy import ContinuousCGCNN
from contsp_core.matching import is_valid_structure, score_pair
from contsp_core.sampler import sample_structures
from contsp_core.templates import TemplateLibrary
from contsp_core.workers import run_with_time_limit

SOURCES = ("chains", "templates", "both")


def is_formula(value: Any) -> str | None:
    """Rule of a notebook parameter: None if the value is a formula, else what is expected."""
    try:
        parse_formula(value)
    except (ValueError, TypeError, AttributeError):
        return 'a formula with whole numbers, like "BaTiO3"'
    return None if isinstance(value, str) else 'a formula with whole numbers, like "BaTiO3"'


def gather_candidates(
    model: ContinuousCGCNN,
    formula: str,
    source: str = "both",
    n_samples: int = 20,
    n_steps: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Structure]:
    """Candidates for one formula, each with ``properties["energy"]`` and ``properties["source"]``.

    Args:
        model: from :func:`contsp_core.load_model`.
        formula: content of the cell.
        source: ``chains``, from random starts; ``templates``, the training crystals of nearest composition with their
            elements exchanged, then followed down the last noise levels; or ``both``.
        n_samples: of each source; templates may be fewer.
        n_steps: length of a chain from a random start, by default as the model's settings say.
        seed: of all that is random.
        progress: show a progress bar of the chains.

    Raises:
        ValueError: on an unknown source, or if there is no template for the formula and nothing else was asked for.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}, expected one of {', '.join(SOURCES)}")
    found = []
    if source != "templates":
        sampled = sample_structures(model, [formula], n_samples, n_steps, seed, progress=progress)[0]
        found += [("chains", structure) for structure in sampled]
    if source != "chains":
        library = TemplateLibrary(load_split(model.settings["dataset"], "train"))
        species = [parse_formula(formula)]
        made = make_candidates("templates_relaxed", species, n_samples, seed, model=model, library=library)[0]
        found += [("templates", structure) for structure in made if structure is not None]
    if not found:
        raise ValueError(f"no training crystal has the stoichiometry of {formula!r}; source='chains' needs none")
    for name, structure in found:
        structure.properties["source"] = name
    return [structure for _, structure in found]


def rank_distinct(
    structures: Sequence[Structure], time_limit_s: float = 10.0, n_jobs: int = 1
) -> tuple[list[Structure], list[int]]:
    """Sort by energy, drop structures with overlapping atoms, and keep one of each group that matches.

    Two structures are the same if ``StructureMatcher`` says so at its default tolerances (0.2, 0.3, 5°); of each group
    the one of lowest energy is kept. A comparison that exceeds the time limit counts as different.

    Args:
        structures: each with ``properties["energy"]``.
        time_limit_s: limit of one comparison, s.
        n_jobs: worker processes.

    Returns:
        The structures kept, lowest energy first, and how many of the structures given each stands for.

    Raises:
        ValueError: if nothing was given or a structure has no energy.
    """
    if not structures or any("energy" not in structure.properties for structure in structures):
        raise ValueError("structures is empty or one has no properties['energy'], expected ≥ 1 structure, all with it")
    valid = [structure for structure in structures if is_valid_structure(structure, charge_neutrality=False)]
    ordered = sorted(valid, key=lambda structure: structure.properties["energy"])
    pairs = list(itertools.combinations(range(len(ordered)), 2))
    tasks = [(ordered[first], ordered[second]) for first, second in pairs]
    found = run_with_time_limit(_is_same, tasks, n_jobs, time_limit_s, "comparing", False)
    same = {pair for pair, answer in zip(pairs, found) if answer}
    counts: dict[int, int] = {}
    for index in range(len(ordered)):
        leader = next((kept for kept in counts if (kept, index) in same), index)
        counts[leader] = counts.get(leader, 0) + 1
    return [ordered[index] for index in counts], list(counts.values())


def _is_same(first: Structure, second: Structure) -> bool:
    try:
        return bool(StructureMatcher().fit(first, second))
    except Exception:  # a distorted cell makes spglib, numpy and pymatgen fail in many ways
        return False


def standardise(structure: Structure, symprec: float = 0.1) -> Structure:
    """The conventional cell of the symmetrised crystal, or the structure as it is where spglib finds no symmetry.

    Args:
        structure: a predicted crystal.
        symprec: how far, in Å, an atom may be from its symmetric site.
    """
    standard = _ask_spglib(structure, symprec, SpacegroupAnalyzer.get_refined_structure) or structure.copy()
    standard.properties = dict(structure.properties)
    return standard


def describe_structures(
    structures: Sequence[Structure], counts: Sequence[int] | None = None, symprec: float = 0.1
) -> pd.DataFrame:
    """One row a structure, in the order given: energy, space group, density and conventional cell.

    Args:
        structures: each with ``properties["energy"]``.
        counts: how many samples each stands for, by default 1.
        symprec: tolerance of the space group, Å.

    Returns:
        Columns ``energy`` (dimensionless), ``source`` (of the one kept), ``found`` (times), ``space group``,
        ``density`` (g/cm³), ``V/atom`` (Å³), ``a``, ``b``, ``c`` (Å), ``α``, ``β``, ``γ`` (degrees); the index ``rank``
        starts at 1.
    """
    rows = []
    for structure, count in zip(structures, counts or [1] * len(structures)):
        lattice = standardise(structure, symprec).lattice
        rows.append(
            {
                "energy": structure.properties["energy"],
                "source": structure.properties.get("source", ""),
                "found": count,
                "space group": space_group(structure, symprec),
                "density": float(structure.density),
                "V/atom": structure.volume / len(structure),
            }
            | dict(zip(("a", "b", "c"), lattice.abc))
            | dict(zip(("α", "β", "γ"), lattice.angles))
        )
    return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="rank"))


def space_group(structure: Structure, symprec: float = 0.1) -> str:
    """Symbol and number, such as ``Fm-3m (225)``, by spglib at ``symprec`` Å; ``P1 (1)`` where it finds none."""
    symbol = _ask_spglib(structure, symprec, SpacegroupAnalyzer.get_space_group_symbol) or "P1"
    return f"{symbol} ({_ask_spglib(structure, symprec, SpacegroupAnalyzer.get_space_group_number) or 1})"


def _ask_spglib(structure: Structure, symprec: float, question: Callable[[SpacegroupAnalyzer], Any]) -> Any:
    """The answer, or None where spglib finds no symmetry at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pymatgen calls spglib in a way that spglib is leaving
        try:
            return question(SpacegroupAnalyzer(structure, symprec=symprec))
        except Exception:  # spglib and pymatgen fail in many ways on a distorted cell
            return None


def known_crystals(dataset: str, formula: str) -> dict[str, Structure]:
    """Crystals of a data set with this composition, in any of its splits, by ``"material_id (split)"``."""
    composition = reduce_species(parse_formula(formula))
    known = {}
    for part in SPLITS:
        split = load_split(dataset, part)
        rows = [row for row, numbers in enumerate(split.species) if reduce_species(numbers) == composition]
        known |= {f"{split.material_ids[row]} ({part})": split[row] for row in rows}
    return known


def compare_with_known(structures: Sequence[Structure], known: Mapping[str, Structure]) -> pd.DataFrame:
    """Which candidates match known crystals, at the tolerances of the field's benchmarks (0.3, 0.5, 10°).

    Args:
        structures: candidates, best first.
        known: crystals by name.

    Returns:
        One row for each known crystal: ``space group``; ``rank`` of the first candidate that matches it (from 1;
        missing if none does) and its normalised RMS displacement ``rms`` (unitless).
    """
    rows = {}
    for name, reference in known.items():
        tasks = [(structure, reference) for structure in structures]
        scores = run_with_time_limit(score_pair, tasks, 1, 10.0, "matching", False)
        matched = [(rank, score[0]) for rank, score in enumerate(scores, start=1) if score and score[0] == score[0]]
        rank, rms = matched[0] if matched else (None, None)
        rows[name] = {"space group": space_group(reference), "rank": rank, "rms": rms}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["space group", "rank", "rms"])
    return table.astype({"rank": "Int64", "rms": float}).rename_axis("known crystal")


def write_cifs(structures: Sequence[Structure], folder: str | Path) -> list[Path]:
    """One CIF a structure, exactly as predicted (P1): ``01_NaCl.cif``, ``02_NaCl.cif``, … in the order given.

    Files that an earlier call left in the folder are replaced.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9]_*.cif"):
        old.unlink()
    paths = []
    for rank, structure in enumerate(structures, start=1):
        path = folder / f"{rank:02d}_{structure.composition.reduced_formula}.cif"
        path.write_text(str(CifWriter(structure)))
        paths.append(path)
    return paths
