"""From a CSV with a ``cif`` column to arrays: each row parsed by pymatgen, on all cores, a bad row with its reason."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from contsp_core.crystals import MAX_ATOMIC_NUMBER, MIN_VOLUME

if TYPE_CHECKING:
    import pandas as pd

CHUNK = 200  # rows a task: large enough to hide the cost of sending them
CELL_KEYS = ("length_a", "length_b", "length_c", "angle_alpha", "angle_beta", "angle_gamma")
SERIAL_ROWS = 600  # below this, starting processes costs more than they save


class Cell(NamedTuple):
    """One parsed crystal: cell (3, 3), Å, rows are lattice vectors; positions (n, 3), Cartesian, Å; numbers (n,)."""

    cell: np.ndarray
    positions: np.ndarray
    atomic_numbers: np.ndarray


def read_table(content: bytes, path: str) -> pd.DataFrame:
    """The rows of a CSV with at least a ``cif`` column; ``material_id`` defaults to the row number.

    Args:
        content: the bytes of the file, unpacked.
        path: named in errors.

    Raises:
        ValueError: if it is no CSV, has no ``cif`` column, or no row.
    """
    import pandas as pd

    try:  # only an empty field is missing: "NaN" is also sodium nitride
        text_columns = {"material_id": str, "cif": str, "formula": str}
        table = pd.read_csv(io.BytesIO(content), keep_default_na=False, na_values=[""], dtype=text_columns)
    except (ValueError, UnicodeError) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"{path} cannot be read as CSV: {first_line(error)}") from error
    if "cif" not in table.columns:
        raise ValueError(f"{path} has no column 'cif', expected one; found {', '.join(map(str, table.columns))}")
    if not len(table):
        raise ValueError(f"{path} has no rows, expected one crystal a row")
    if "material_id" not in table.columns:
        table["material_id"] = [f"row {row}" for row in range(len(table))]
    table["material_id"] = table["material_id"].fillna("(no material_id)")
    table["cif"] = table["cif"].fillna("")
    return table


def other_columns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Every column but the identifiers, row counters and CIF texts: numbers as they are, the rest as text."""
    columns = {}
    for name in table.columns:
        if name == "material_id" or name.startswith(("cif", "Unnamed")):
            continue
        column = table[name]
        numeric = column.dtype.kind in "biuf"
        columns[name] = column.to_numpy() if numeric else column.fillna("").astype(str).to_numpy().astype(np.str_)
    return columns


def parse_cifs(cifs: Sequence[str], n_jobs: int = -1, description: str = "CIFs") -> list[Cell | str]:
    """Parse CIF texts in order: arrays for a good one, the reason in one line for a bad one.

    Args:
        cifs: CIF texts.
        n_jobs: processes; -1 is all cores. Few texts are parsed in this process.
        description: label of the progress bar.
    """
    if len(cifs) <= SERIAL_ROWS:
        return _parse_chunk(cifs)
    from joblib import Parallel, delayed
    from tqdm.auto import tqdm

    chunks = [cifs[start : start + CHUNK] for start in range(0, len(cifs), CHUNK)]
    parsed = Parallel(n_jobs=n_jobs, return_as="generator")(delayed(_parse_chunk)(chunk) for chunk in chunks)
    with tqdm(total=len(cifs), desc=f"parsing {description}", unit="crystal") as bar:
        results = []
        for part in parsed:
            results += part
            bar.update(len(part))
    return results


def _parse_chunk(cifs: Sequence[str]) -> list[Cell | str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each coordinate it rounds to a fraction
        return [_parse(cif) for cif in cifs]


def _parse(cif: str) -> Cell | str:
    from pymatgen.io.cif import CifParser

    try:
        parser = CifParser(io.StringIO(cif))
        block = next(iter(parser.as_dict().values()), None)
    except Exception as error:  # pymatgen raises many kinds
        return f"malformed CIF ({first_line(error)})"
    if block is None:
        return "malformed CIF (no data block)"
    reason = _bad_numbers(block)  # first, since pymatgen reports these as "no structure"
    if reason:
        return reason
    try:
        structure = parser.parse_structures(primitive=False, on_error="raise")[0]
        failure = parser.check(structure)
    except Exception as error:
        return f"malformed CIF ({first_line(error)})"
    if failure:
        return f"malformed CIF ({first_line(failure)})"
    if not structure.is_ordered:
        return f"disordered site ({structure.formula}), expected full occupancy"
    return _check_values(
        structure.lattice.matrix, structure.cart_coords, [getattr(site.specie, "Z", 0) for site in structure]
    )


def _bad_numbers(block: dict[str, Any]) -> str:
    cell = _floats(block.get(f"_cell_{key}") for key in CELL_KEYS)
    positions = [_floats(block.get(f"_atom_site_fract_{axis}", ())) for axis in "xyz"]
    if not np.isfinite([*cell, *(value for axis in positions for value in axis)]).all():
        return "NaN or infinity in cell or coordinates"
    if len(cell) < len(CELL_KEYS):
        return f"malformed CIF (it has {len(cell)} of the six cell lengths and angles)"
    a, b, c = np.cos(np.radians(cell[3:]))
    volume = np.prod(cell[:3]) * math.sqrt(max(0, 1 - a * a - b * b - c * c + 2 * a * b * c))
    return "" if volume >= MIN_VOLUME else f"cell has volume {volume:.3g} Å³, expected ≥ {MIN_VOLUME} Å³"


def _floats(texts: Iterable[object]) -> list[float]:
    """The numbers among some CIF values, standard uncertainties cut off; anything else is left to the parser."""
    numbers = []
    for text in texts:
        try:
            numbers.append(float(str(text).partition("(")[0]))
        except ValueError:
            continue
    return numbers


def _check_values(cell: np.ndarray, positions: np.ndarray, numbers: Sequence[int]) -> Cell | str:
    if min(numbers) < 1 or max(numbers) > MAX_ATOMIC_NUMBER:
        return f"element Z = {max(numbers)}, expected 1 … {MAX_ATOMIC_NUMBER}"
    if not np.isfinite(cell).all() or not np.isfinite(positions).all():
        return "NaN or infinity in cell or coordinates"
    volume = abs(np.linalg.det(cell))
    if volume < MIN_VOLUME:
        return f"cell has volume {volume:.3g} Å³, expected ≥ {MIN_VOLUME} Å³"
    return Cell(np.array(cell), np.array(positions), np.array(numbers, dtype=np.int64))


def first_line(error: Exception | str) -> str:
    """The first line of a message, or the kind of an error without one."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
