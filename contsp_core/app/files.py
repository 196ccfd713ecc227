"""What stays of a prediction? A folder of tables and crystals, with what made them, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pymatgen.core import Structure
from pymatgen.io.cif import CifWriter

from contsp_core.app.powder import powder_pattern
from contsp_core.app.prediction import PredictConfig, Prediction
from contsp_core.checkpoints import read_settings
from contsp_core.csp.candidates import standardise
from contsp_core.csp.figures import draw_crystals
from contsp_core.data import find_checkpoint, one_line, retold, stamp

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE_BY = "candidates.json"
WRITTEN = re.compile(
    r"candidates\.(csv|json|png)|\d{2,}_([A-Z][a-z]?\d*|[()]\d*)+(_symmetrised\.cif|_xrd\.csv|\.(cif|vasp|extxyz))"
)


def identify(checkpoint: str | Path) -> dict[str, Any]:
    """Name, digest, training data and judge of a checkpoint as it is now: a training may replace it meanwhile."""
    path, header = find_checkpoint(checkpoint), read_settings(checkpoint)
    trained_on = {name: header.get(name) for name in ("dataset", "n_structures", "data")}
    identity = {"checkpoint": path.stem, "checkpoint_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    judge = header.get("judge")
    return identity | {"trained_on": trained_on, "judge": judge and stamp(find_checkpoint(judge))}


def provenance(identity: dict[str, Any], config: PredictConfig, prediction: Prediction) -> dict[str, Any]:
    """What made a prediction: the checkpoint, of :func:`identify`, settings and program versions."""
    made = {"formula": prediction.formula} | identity | {"settings": asdict(config)}
    versions = {name: version(name) for name in ("contsp_core", "torch", "pymatgen", "spglib", "numpy")}
    return made | {"n_candidates": prediction.n_made, "doubts": prediction.doubts, "versions": versions}


def write_prediction(prediction: Prediction, folder: Path, origin: dict[str, Any], overwrite: bool = False) -> Path:
    """Everything about one formula in ``folder``, which appears whole or not at all.

    ``candidates.csv``, ``.png`` and, for what made them, ``.json``. Of each crystal, by rank: CIF as found (P1) and
    symmetrised (at 0.1 Å), POSCAR and extended XYZ, each with energy, checkpoint and seed; peaks of its powder pattern.
    What is there already, unless it is an earlier prediction and ``overwrite`` is true, is a FileExistsError.
    """
    check_replaceable(folder, overwrite)
    temporary, old = (folder.with_name(f".{folder.name}-{uuid4().hex}.{ending}") for ending in ("tmp", "old"))
    temporary.mkdir(parents=True)
    try:
        prediction.table.to_csv(temporary / "candidates.csv", float_format="%.6g")
        (temporary / MADE_BY).write_text(json.dumps(origin, indent=2, default=str) + "\n")
        for rank, structure in enumerate(prediction.best, start=1):
            _write_crystal(structure, temporary / f"{rank:02d}_{structure.composition.reduced_formula}", origin)
        try:  # a picture that fails must not take the crystals with it
            contact_sheet(prediction).savefig(temporary / "candidates.png", dpi=150, metadata={"Software": None})
        except Exception as error:
            warnings.warn(f"{folder} has no candidates.png: {one_line(error)}", stacklevel=2)
        check_replaceable(folder, overwrite)  # again: another process may have written it meanwhile
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def is_finished(folder: Path) -> bool:
    """Whether a prediction lies there, and no calculator failed on all of its crystals."""
    return (folder / MADE_BY).is_file() and '"calculator_failed": true' not in (folder / MADE_BY).read_text()


def check_same(folder: Path, asked: dict[str, Any]) -> None:
    """A ValueError if a finished prediction was made with other settings than those asked for now."""
    with retold(f"{folder / MADE_BY} is damaged", OSError, ValueError, TypeError, KeyError):
        made, now = json.loads((folder / MADE_BY).read_text()), json.loads(json.dumps(asked, default=str))
        made, now = made | made["settings"], now | now["settings"]
    for name in sorted(now.keys() - {"settings", "n_jobs"}):
        if made.get(name) != now[name]:
            raise ValueError(
                f"{str(folder)!r} was made with {name}={made.get(name)!r}, not {now[name]!r}: --overwrite it"
            )


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """A FileExistsError if there is something of this name that is no earlier prediction, or that must be kept."""
    if folder.exists() and not overwrite:
        raise FileExistsError(f"output {str(folder)!r} exists; --resume leaves it out, --overwrite replaces it")
    if folder.is_symlink() or (folder.exists() and not (folder / MADE_BY).is_file()):
        raise FileExistsError(f"output {str(folder)!r} is a link or has no {MADE_BY}: only a prediction is replaced")
    if others := [path.name for path in folder.glob("*") if not WRITTEN.fullmatch(path.name)]:
        raise FileExistsError(f"output {str(folder)!r} has {others[0]!r}, which no prediction made: move it away first")


def _write_crystal(structure: Structure, stem: Path, origin: dict[str, Any]) -> None:
    from ase.io import write  # here: they take a second to load
    from pymatgen.io.ase import AseAtomsAdaptor
    from pymatgen.io.vasp.inputs import Poscar

    energy, relaxed = structure.properties["energy"], structure.properties.get("calculator_energy")
    both: dict[str, Any] = {"calculator_energy_eV_per_atom": relaxed, "learned_energy_before_relaxing": energy}
    label = {"learned_energy_per_atom": energy} if relaxed is None else both
    label |= {"checkpoint": origin["checkpoint"], "seed": origin["settings"]["seed"]}
    comment = ", ".join(f"{name} {value}" for name, value in label.items())
    symmetric, name = standardise(structure), structure.composition.reduced_formula
    with warnings.catch_warnings(action="ignore"):  # of elements without electronegativity
        writers = {"": CifWriter(structure), "_symmetrised": CifWriter(symmetric)}
        with suppress(Exception):  # spglib finds no symmetry
            writers["_symmetrised"] = CifWriter(symmetric, symprec=1e-3)  # a looser one may find yet another crystal
        for ending, writer in writers.items():
            told = "before symmetrising: " * bool(ending)
            stem.with_name(f"{stem.name}{ending}.cif").write_text(f"# {told}{comment}\n{writer}")
    poscar = Poscar(structure, comment=f"{name}, {comment}", sort_structure=True)
    poscar.write_file(str(stem.with_suffix(".vasp")))
    atoms = AseAtomsAdaptor.get_atoms(structure, msonable=False)
    atoms.info = label
    write(stem.with_suffix(".extxyz"), atoms, format="extxyz")
    powder_pattern(symmetric).to_csv(stem.with_name(f"{stem.name}_xrd.csv"), index=False, float_format="%.4f")


def contact_sheet(prediction: Prediction, n: int = 10) -> Figure:
    """The best n crystals side by side in their conventional cells, with polyhedra."""
    titles = [f"{rank}: {group}" for rank, group in prediction.table["space group"].head(n).items()]
    return draw_crystals([*map(standardise, prediction.best[:n])], titles, n_columns=5, polyhedra=True)
