"""What a prediction is handed over as: distinct structures, ranked by energy, described, and written as CIF."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from pymatgen.core import Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from contsp_core.metrics import is_valid_structure, run_with_time_limit


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
    try:
        standard = SpacegroupAnalyzer(structure, symprec=symprec).get_refined_structure()
    except Exception:  # spglib found none
        standard = structure.copy()
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
        Columns ``energy`` (dimensionless), ``found`` (times), ``space group``, ``density`` (g/cm³), ``V/atom`` (Å³),
        ``a``, ``b``, ``c`` (Å), ``α``, ``β``, ``γ`` (degrees); the index ``rank`` starts at 1.
    """
    rows = []
    for structure, count in zip(structures, counts or [1] * len(structures)):
        lattice = standardise(structure, symprec).lattice
        rows.append(
            {
                "energy": structure.properties["energy"],
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
    try:
        found = SpacegroupAnalyzer(structure, symprec=symprec)
        return f"{found.get_space_group_symbol()} ({found.get_space_group_number()})"
    except Exception:  # spglib found none
        return "P1 (1)"


def write_cifs(structures: Sequence[Structure], folder: str | Path) -> list[Path]:
    """One CIF a structure, exactly as predicted (P1): ``01_NaCl.cif``, ``02_NaCl.cif``, … in the order given."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for rank, structure in enumerate(structures, start=1):
        path = folder / f"{rank:02d}_{structure.composition.formula.replace(' ', '')}.cif"
        path.write_text(str(CifWriter(structure)))
        paths.append(path)
    return paths
