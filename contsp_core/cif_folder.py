"""Predicted crystals as files, ``<folder>/<material_id>/<sample number>.cif``, written by us or by another program."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pymatgen.core import Lattice, Structure
from pymatgen.io.cif import CifWriter

from contsp_core.cif import parse_cifs
from contsp_core.split import write_whole

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
