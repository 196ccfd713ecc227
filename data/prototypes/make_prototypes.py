"""Build the bundled data set: lattice_constants.txt -> train.csv, val.csv, test.csv, and their entry in the manifest.

Run ``python data/prototypes/make_prototypes.py``; the same input gives the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.io.cif import CifWriter
from pymatgen.symmetry.groups import SpaceGroup

from contsp_core.data import git_blob_id

HERE = Path(__file__).resolve().parent
COLUMNS = ("material_id", "cif", "formula", "prototype", "spacegroup.number", "source")
SOURCES = {
    "AM": "Ashcroft & Mermin (1976)",
    "W1": "Wyckoff vol. 1 (1963)",
    "W2": "Wyckoff vol. 2-3 (1964-65)",
    "P": "Pearson's Handbook (1991)",
}
# Rows are the primitive vectors in units of the conventional ones, by centring letter (R: hexagonal axes, obverse).
PRIMITIVE = {
    "P": np.eye(3),
    "F": np.array([[0, 1, 1], [1, 0, 1], [1, 1, 0]]) / 2,
    "I": np.array([[-1, 1, 1], [1, -1, 1], [1, 1, -1]]) / 2,
    "C": np.array([[1, 1, 0], [-1, 1, 0], [0, 0, 2]]) / 2,
    "R": np.array([[2, 1, 1], [-1, 1, 1], [-1, -2, 1]]) / 3,
}
Sites = Callable[..., list[tuple[float, float, float]]]


class Prototype(NamedTuple):
    """Space group number and one position per site, as a function of the free coordinates (origin choice 1)."""

    spacegroup: int
    sites: Sites


ORIGIN, CENTRE, QUARTER, T = (0, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 4, 1 / 4, 1 / 4), 1 / 3
PROTOTYPES = {
    "fcc": Prototype(225, lambda: [ORIGIN]),
    "bcc": Prototype(229, lambda: [ORIGIN]),
    "hcp": Prototype(194, lambda: [(T, 2 * T, 1 / 4)]),
    "dhcp": Prototype(194, lambda: [ORIGIN, (T, 2 * T, 1 / 4)]),
    "diamond": Prototype(227, lambda: [ORIGIN]),
    "graphite": Prototype(194, lambda: [(0, 0, 1 / 4), (T, 2 * T, 1 / 4)]),
    "lonsdaleite": Prototype(194, lambda: [(T, 2 * T, 1 / 16)]),
    "boron nitride, layered": Prototype(194, lambda: [(T, 2 * T, 1 / 4), (T, 2 * T, 3 / 4)]),
    "arsenic": Prototype(166, lambda z: [(0, 0, z)]),
    "selenium": Prototype(152, lambda x: [(x, 0, T)]),
    "white tin": Prototype(141, lambda: [ORIGIN]),
    "body-centred tetragonal": Prototype(139, lambda: [ORIGIN]),
    "simple cubic": Prototype(221, lambda: [ORIGIN]),
    "mercury": Prototype(166, lambda: [ORIGIN]),
    "alpha-uranium": Prototype(63, lambda y: [(0, y, 1 / 4)]),
    "rock salt": Prototype(225, lambda: [ORIGIN, CENTRE]),
    "CsCl": Prototype(221, lambda: [ORIGIN, CENTRE]),
    "zinc blende": Prototype(216, lambda: [ORIGIN, QUARTER]),
    "wurtzite": Prototype(186, lambda u=3 / 8: [(T, 2 * T, 0), (T, 2 * T, u)]),
    "fluorite": Prototype(225, lambda: [ORIGIN, QUARTER]),
    "antifluorite": Prototype(225, lambda: [QUARTER, ORIGIN]),
    "rutile": Prototype(136, lambda u: [ORIGIN, (u, u, 0)]),
    "anatase": Prototype(141, lambda z: [ORIGIN, (0, 0, z)]),
    "cubic perovskite": Prototype(221, lambda: [ORIGIN, CENTRE, (1 / 2, 1 / 2, 0)]),
    "antiperovskite": Prototype(221, lambda: [ORIGIN, CENTRE, (1 / 2, 1 / 2, 0)]),
    "rhenium trioxide": Prototype(221, lambda: [ORIGIN, (1 / 2, 0, 0)]),
    "NiAs": Prototype(194, lambda: [ORIGIN, (T, 2 * T, 1 / 4)]),
    "tungsten carbide": Prototype(187, lambda: [ORIGIN, (T, 2 * T, 1 / 2)]),
    "CdI2": Prototype(164, lambda z: [ORIGIN, (T, 2 * T, z)]),
    "brucite": Prototype(164, lambda z_o, z_h: [ORIGIN, (T, 2 * T, z_o), (T, 2 * T, z_h)]),
    "CdCl2": Prototype(166, lambda z: [ORIGIN, (0, 0, z)]),
    "molybdenite": Prototype(194, lambda z: [(T, 2 * T, 1 / 4), (T, 2 * T, z)]),
    "niobium diselenide 2H": Prototype(194, lambda z: [(0, 0, 1 / 4), (T, 2 * T, z)]),
    "cuprite": Prototype(224, lambda: [ORIGIN, QUARTER]),
    "pyrite": Prototype(205, lambda u: [ORIGIN, (u, u, u)]),
    "marcasite": Prototype(58, lambda x, y: [ORIGIN, (x, y, 0)]),
    "CaCl2": Prototype(58, lambda x, y: [ORIGIN, (x, y, 0)]),
    "ideal cristobalite": Prototype(227, lambda: [ORIGIN, (1 / 8, 1 / 8, 1 / 8)]),
    "quartz": Prototype(154, lambda u, x, y, z: [(u, 0, 2 / 3), (x, y, z)]),
    "corundum": Prototype(167, lambda z, x: [(0, 0, z), (x, 0, 1 / 4)]),
    "ilmenite": Prototype(148, lambda z1, z2, x, y, z: [(0, 0, z1), (0, 0, z2), (x, y, z)]),
    "calcite": Prototype(167, lambda x: [ORIGIN, (0, 0, 1 / 4), (x, 0, 1 / 4)]),
    "chalcopyrite": Prototype(122, lambda x: [ORIGIN, (0, 0, 1 / 2), (x, 1 / 4, 1 / 8)]),
    "Cu3Au": Prototype(221, lambda: [ORIGIN, (0, 1 / 2, 1 / 2)]),
    "CuAu": Prototype(123, lambda: [ORIGIN, CENTRE]),
    "TiAl3": Prototype(139, lambda: [ORIGIN, (0, 0, 1 / 2), (0, 1 / 2, 1 / 4)]),
    "BiF3": Prototype(225, lambda: [ORIGIN, CENTRE, QUARTER]),
    "Na3As": Prototype(194, lambda z: [(T, 2 * T, 1 / 4), (0, 0, 1 / 4), (T, 2 * T, z)]),
    "Laves MgCu2": Prototype(227, lambda: [ORIGIN, (5 / 8, 5 / 8, 5 / 8)]),
    "Laves MgZn2": Prototype(194, lambda z, x: [(T, 2 * T, z), ORIGIN, (x, 2 * x, 1 / 4)]),
    "Heusler": Prototype(225, lambda: [ORIGIN, CENTRE, QUARTER]),
    "half-Heusler": Prototype(216, lambda: [ORIGIN, CENTRE, QUARTER]),
    "A15": Prototype(223, lambda: [ORIGIN, (1 / 4, 0, 1 / 2)]),
    "hexaboride": Prototype(221, lambda x: [ORIGIN, (x, 1 / 2, 1 / 2)]),
    "AlB2": Prototype(191, lambda: [ORIGIN, (T, 2 * T, 1 / 2)]),
    "CaC2": Prototype(139, lambda z: [ORIGIN, (0, 0, z)]),
    "MoSi2": Prototype(139, lambda z: [ORIGIN, (0, 0, z)]),
    "CuAl2": Prototype(140, lambda x: [(0, 0, 1 / 4), (x, x + 1 / 2, 0)]),
    "CaCu5": Prototype(191, lambda: [ORIGIN, (T, 2 * T, 0), (1 / 2, 0, 1 / 2)]),
    "ThCr2Si2": Prototype(139, lambda z: [ORIGIN, (0, 1 / 2, 1 / 4), (0, 0, z)]),
    "litharge": Prototype(129, lambda z: [ORIGIN, (0, 1 / 2, z)]),
    "PbFCl": Prototype(129, lambda z1, z2: [ORIGIN, (0, 1 / 2, z1), (0, 1 / 2, z2)]),
    "spinel": Prototype(227, lambda u: [ORIGIN, (5 / 8, 5 / 8, 5 / 8), (u, u, u)]),
    "lanthanum sesquioxide": Prototype(164, lambda z1, z2: [ORIGIN, (T, 2 * T, z1), (T, 2 * T, z2)]),
    "tetradymite": Prototype(166, lambda z1, z2: [ORIGIN, (0, 0, z1), (0, 0, z2)]),
    "NaFeO2": Prototype(166, lambda z: [ORIGIN, (0, 0, 1 / 2), (0, 0, z)]),
    "delafossite": Prototype(166, lambda z: [ORIGIN, (0, 0, 1 / 2), (0, 0, z)]),
    "K2NiF4": Prototype(139, lambda z1, z2: [ORIGIN, (0, 0, z1), (0, 1 / 2, 0), (0, 0, z2)]),
    "K2PtCl6": Prototype(225, lambda u: [ORIGIN, QUARTER, (u, 0, 0)]),
    "scheelite": Prototype(88, lambda x, y, z: [ORIGIN, (0, 0, 1 / 2), (x, y, z)]),
    "zircon": Prototype(141, lambda y, z: [ORIGIN, (0, 0, 1 / 2), (0, y, z)]),
}


def build(prototype: str, elements: list[str], numbers: list[float]) -> Structure:
    """The primitive cell of a prototype: one element per site, then a [b] [c] (Å) and the free coordinates.

    Raises:
        ValueError: when elements and sites differ in number.
    """
    number, sites = PROTOTYPES[prototype]
    lattice, free = _lattice(number, numbers)
    if prototype == "CuAu":  # tabulated for the face-centred cell of four atoms; the true cell is turned by 45°
        lattice = Lattice.tetragonal(numbers[0] / np.sqrt(2), numbers[1])
    positions = sites(*free)
    if len(positions) != len(elements):
        raise ValueError(
            f"{prototype} {elements} has {len(elements)} elements, expected {len(positions)}, one per site"
        )
    vectors = PRIMITIVE[_operations(number)[0]]
    species, frac_coords = [], []
    for element, position in zip(elements, positions, strict=True):
        orbit = _orbit(number, position, vectors)
        species += [element] * len(orbit)
        frac_coords += orbit
    return Structure(Lattice(vectors @ lattice.matrix), species, np.array(frac_coords))


@cache
def _operations(number: int) -> tuple[str, np.ndarray]:
    group = SpaceGroup.from_int_number(number)
    matrices = {tuple(operation.affine_matrix.round(6).ravel()) for operation in group.symmetry_ops}
    return group.symbol[0], np.array(sorted(matrices)).reshape(-1, 4, 4)


def _orbit(number: int, position: tuple[float, float, float], vectors: np.ndarray) -> list[np.ndarray]:
    """Images of a position under the space group, in the primitive cell, each once."""
    images = (_operations(number)[1] @ np.array([*position, 1.0]))[:, :3]
    images = np.round(images @ np.linalg.inv(vectors), 6) % 1
    kept: list[np.ndarray] = []
    for image in images:
        difference = np.array(kept).reshape(-1, 3) - image
        if (np.abs(difference - np.round(difference)).max(axis=1) > 1e-4).all():
            kept.append(image)
    return kept


def _lattice(spacegroup: int, numbers: list[float]) -> tuple[Lattice, list[float]]:
    if spacegroup >= 195:
        return Lattice.cubic(numbers[0]), numbers[1:]
    if spacegroup >= 143:
        return Lattice.hexagonal(*numbers[:2]), numbers[2:]
    if spacegroup >= 75:
        return Lattice.tetragonal(*numbers[:2]), numbers[2:]
    return Lattice.orthorhombic(*numbers[:3]), numbers[3:]


def read_constants() -> Iterator[tuple[str, str, list[str], list[float]]]:
    """Yield (prototype, source, elements, numbers) for each line of lattice_constants.txt."""
    prototype = source = ""
    for line in (HERE / "lattice_constants.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            prototype, _, key = line[1:].partition("] ")
            source = SOURCES[key]
        elif line and not line.startswith("#"):
            elements, *numbers = line.split()
            yield prototype, source, elements.split(","), [float(number) for number in numbers]


def part_of(formula: str) -> str:
    """train, val or test (80 / 10 / 10), from a hash of the reduced formula: polymorphs stay together."""
    fraction = int(hashlib.sha256(formula.encode()).hexdigest()[:8], 16) / 16**8
    return "train" if fraction < 0.8 else "val" if fraction < 0.9 else "test"


def tables() -> dict[str, bytes]:
    """The three CSV files, as bytes."""
    texts = {part: io.StringIO() for part in ("train", "val", "test")}
    writers = {part: csv.writer(text, lineterminator="\n") for part, text in texts.items()}
    for writer in writers.values():
        writer.writerow(COLUMNS)
    for prototype, source, elements, numbers in read_constants():
        structure = build(prototype, elements, numbers)
        formula = Composition(structure.formula).reduced_formula
        material_id = f"{prototype.replace(', ', '-').replace(' ', '-')}-{formula}"
        cif = str(CifWriter(structure, significant_figures=6))
        row = (material_id, cif, formula, prototype, PROTOTYPES[prototype].spacegroup, source)
        writers[part_of(formula)].writerow(row)
    return {part: text.getvalue().encode() for part, text in texts.items()}


def main() -> None:
    """Write the files and their blob ids."""
    manifest_path = HERE.parent / "manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    for part, content in tables().items():
        (HERE / f"{part}.csv").write_bytes(content)
        entry = manifest["datasets"]["prototypes"]["splits"][part]
        rows = list(csv.reader(io.StringIO(content.decode())))
        entry.update(git_blob=git_blob_id(content), crystals=len(rows) - 1)
        print(f"{part}: {len(rows) - 1} crystals, {len(content)} bytes")
    manifest_path.write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
