"""Data sets: find or download a split, parse it once, and hand back arrays.

A split that has been parsed before is read from one ``.npz`` with numpy alone, so that training runs on a node without
pandas and pymatgen.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import math
import operator
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import uuid4

import numpy as np
import torch

from contsp_core.crystals import MAX_ATOMIC_NUMBER, MIN_VOLUME, Crystals

if TYPE_CHECKING:
    import pandas as pd
    from pymatgen.core import Structure


FORMAT = "1"  # raise it when the arrays change meaning: older files are then refused


class Source(NamedTuple):
    """Where a split came from: the file read, its git blob id, and whether that is the published file's."""

    path: str
    blob_id: str
    official: bool


@dataclass(frozen=True, eq=False)
class Split(Sequence):
    """An immutable sequence of crystals; ``split[i]`` is a pymatgen structure, ``split[a:b]`` a smaller split.

    Attributes:
        name, split: data set and part, for example ``"perov5"``, ``"test"``.
        material_ids: one per crystal, as in the file.
        cell: (n, 3, 3) float64, rows are lattice vectors, Å.
        positions: (n_atoms_total, 3) float64, Cartesian, Å.
        atomic_numbers: (n_atoms_total,) int64.
        n_atoms: (n,) int64, atoms per crystal.
        columns: the other columns of the CSV (CIF texts left out), one array of length n each.
        source: file, git blob id, official or not.
        skipped: (material_id, reason) of each bad row left out; empty unless ``on_error="skip"`` was asked for.
    """

    name: str
    split: str
    material_ids: list[str]
    cell: np.ndarray
    positions: np.ndarray
    atomic_numbers: np.ndarray
    n_atoms: np.ndarray
    source: Source
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for array in (self.cell, self.positions, self.atomic_numbers, self.n_atoms, *self.columns.values()):
            array.setflags(write=False)

    def __len__(self) -> int:
        return len(self.n_atoms)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {self.split!r}, {len(self)} crystals, from {self.source.path!r})"

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        return self._structure(range(len(self))[operator.index(index)])

    def __iter__(self) -> Iterator[Structure]:
        return (self._structure(index) for index in range(len(self)))

    def _structure(self, index: int) -> Structure:
        from pymatgen.core import Lattice, Structure

        atoms = slice(self._ends[index] - self.n_atoms[index], self._ends[index])
        return Structure(
            Lattice(self.cell[index]),
            self.atomic_numbers[atoms].tolist(),
            self.positions[atoms],
            coords_are_cartesian=True,
            properties={"material_id": self.material_ids[index]},
        )

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.n_atoms)

    @cached_property
    def structures(self) -> list[Structure]:
        """All structures, each with ``properties["material_id"]``; built once and shared: copy before changing one."""
        return list(self)

    @cached_property
    def crystals(self) -> Crystals:
        """The whole split as one float64 batch, on the CPU."""
        return Crystals.from_arrays(self.cell.copy(), self.positions.copy(), self.species, dtype=torch.float64)

    @cached_property
    def species(self) -> list[list[int]]:
        """Atomic numbers of each crystal, in atom order."""
        return [part.tolist() for part in np.split(self.atomic_numbers, self._ends[:-1])]

    @property
    def frame(self) -> pd.DataFrame:
        """A table of ``material_id``, ``n_atoms`` and the other columns, one row per crystal."""
        import pandas as pd

        return pd.DataFrame({"material_id": self.material_ids, "n_atoms": self.n_atoms} | self.columns)

    @property
    def note(self) -> str:
        """One line when the file is not the published one, otherwise empty."""
        if self.source.official:
            return ""
        return (
            f"{self.name}/{self.split}: {Path(self.source.path).name} is not the official file ({len(self)} crystals, "
            f"git blob {self.source.blob_id[:12]}); results cannot be compared with published ones"
        )

    def select(self, indices: Sequence[int]) -> Split:
        """The chosen crystals, in the order given."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise ValueError(f"indices reach from {chosen.min()} to {chosen.max()}, expected 0 … {len(self) - 1}")
        starts = self._ends - self.n_atoms
        ranges = [np.arange(starts[i], self._ends[i]) for i in chosen]
        atoms = np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)
        return Split(
            self.name,
            self.split,
            [self.material_ids[i] for i in chosen],
            self.cell[chosen],
            self.positions[atoms],
            self.atomic_numbers[atoms],
            self.n_atoms[chosen],
            self.source,
            {name: column[chosen] for name, column in self.columns.items()},
            self.skipped,
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the split as one ``.npz``, to be read without pandas and pymatgen.

        Put as ``$CONTSP_DATA_DIR/<name>/<split>.npz`` it is found by :func:`load_split`.
        """
        arrays = {name: getattr(self, name) for name in ("cell", "positions", "atomic_numbers", "n_atoms")}
        arrays["material_id"] = np.array(self.material_ids, dtype=str)
        arrays["skipped_id"] = np.array([row for row, _ in self.skipped], dtype=str)
        arrays["skipped_reason"] = np.array([reason for _, reason in self.skipped], dtype=str)
        arrays |= {f"column:{name}": column for name, column in self.columns.items()}
        arrays["format"] = np.array(FORMAT)
        arrays["source"] = np.array([self.source.path, self.source.blob_id], dtype=str)
        write_whole(Path(path), lambda file: np.savez(file, **arrays))
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike, name: str, split: str, official_blob: str) -> Split:
        """Read what :meth:`save` wrote; official is what came from a file with the blob id ``official_blob``.

        Raises:
            ValueError: for a file that is damaged, foreign, or of another format version.
        """
        try:
            with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                if str(file["format"]) != FORMAT:
                    raise ValueError(f"format {file['format']}, expected {FORMAT}")
                origin, blob_id = file["source"].tolist()
                loaded = cls(
                    name,
                    split,
                    file["material_id"].tolist(),
                    *(file[key] for key in ("cell", "positions", "atomic_numbers", "n_atoms")),
                    source=Source(origin, blob_id, blob_id == official_blob),
                    columns={key[7:]: file[key] for key in file.files if key.startswith("column:")},
                    skipped=tuple(zip(file["skipped_id"].tolist(), file["skipped_reason"].tolist(), strict=True)),
                )
        except FileNotFoundError:
            raise
        except Exception as error:  # zip, zlib, header and key errors alike mean: not such a file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is not a split written by Split.save ({reason})") from error
        n_atoms = int(loaded.n_atoms.sum())
        shapes = (loaded.cell.shape, loaded.positions.shape, loaded.atomic_numbers.shape, len(loaded.material_ids))
        if shapes != ((len(loaded), 3, 3), (n_atoms, 3), (n_atoms,), len(loaded)):
            raise ValueError(f"{path} is not a split written by Split.save (array shapes disagree: {shapes})")
        return loaded


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file so that it appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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


BUNDLED = "prototypes"
DATASETS = (BUNDLED, "perov5", "mp20", "mpts52", "carbon24")
SPLITS = ("train", "val", "test")
DATA_DIR = Path(__file__).resolve().parent.parent / "data"
MAX_FORMULA_ATOMS = 1000
OnError = Literal["raise", "skip"]
logger = logging.getLogger(__name__)


def load_split(name: str, split: str, on_error: OnError = "raise", n_jobs: int = -1) -> Split:
    """Load one part of a data set.

    Looked for in this order: ``$CONTSP_DATA_DIR/<name>/<split>.csv``, ``.csv.gz`` or ``.npz``; for ``prototypes`` the
    bundled file; the cache (``$CONTSP_CACHE_DIR``, default ``~/.cache/contsp``); the pinned public revision, downloaded
    and checked against its git blob id. Parsed crystals are cached under the blob id of the file they came from.

    Args:
        name: prototypes, perov5, mp20, mpts52 or carbon24.
        split: train, val or test.
        on_error: ``"raise"``, or ``"skip"`` to leave bad rows out and list them in ``.skipped``.
        n_jobs: processes that parse CIFs; -1 is all cores.

    Returns:
        A :class:`Split`; ``.note`` tells when the file is not the official one.

    Raises:
        ValueError: for an unknown name, split or on_error; a bad file or row; a download with the wrong content.
        ConnectionError: when the download itself fails.
    """
    for label, value, allowed in (
        ("name", name, DATASETS),
        ("split", split, SPLITS),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in allowed:
            raise ValueError(f"{label}={value!r} is unknown, expected one of {', '.join(allowed)}")
    found = _from_local_files(name, split, n_jobs) or _from_public_files(name, split, n_jobs)
    if found.note:
        logger.info(found.note)
    return _report_skipped(found, on_error)


def parse_formula(text: str) -> list[int]:
    """Atomic numbers of a formula, in the order written: "BaTiO3" gives [56, 22, 8, 8, 8].

    Raises:
        ValueError: for text that is no formula, fractional counts, elements beyond Z = 100, or too many atoms.
    """
    from pymatgen.core import Composition

    expected = 'expected a formula with whole numbers and elements up to Z = 100, like "BaTiO3"'
    try:
        counts = {element.Z: amount for element, amount in Composition(text, strict=True).element_composition.items()}
    except Exception as error:  # pymatgen raises several kinds
        raise ValueError(f"formula {text!r} cannot be read, {expected}") from error
    if not counts or any(amount != round(amount) for amount in counts.values()):
        raise ValueError(f"formula {text!r} is empty or has fractional counts, {expected}")
    if max(counts) > MAX_ATOMIC_NUMBER or sum(counts.values()) > MAX_FORMULA_ATOMS:
        raise ValueError(
            f"formula {text!r} has an element or an atom too many, {expected}, ≤ {MAX_FORMULA_ATOMS} atoms"
        )
    return [number for number, amount in counts.items() for _ in range(round(amount))]


def resolve_species(entries: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Atomic-number lists from a sequence of formulas and atomic-number lists.

    Raises:
        ValueError: for an empty sequence, a lone formula, or an entry that is neither, naming it.
    """
    if isinstance(entries, str) or not len(entries):
        raise ValueError(f'species is {entries!r}, expected a list like ["BaTiO3", [11, 17]]')
    return [parse_formula(entry) if isinstance(entry, str) else _checked_numbers(entry) for entry in entries]


def _checked_numbers(entry: Sequence[int]) -> list[int]:
    expected = f"expected a formula or a list of atomic numbers 1 … {MAX_ATOMIC_NUMBER}"
    try:
        numbers = [operator.index(number) for number in entry]
    except TypeError as error:
        raise ValueError(f"species entry {entry!r} cannot be read, {expected}") from error
    if not numbers or min(numbers) < 1 or max(numbers) > MAX_ATOMIC_NUMBER:
        raise ValueError(f"species entry {entry!r} is empty or holds an unknown element, {expected}")
    return numbers


def git_blob_id(content: bytes) -> str:
    """The id git gives to a file with this content: SHA-1 of a header with its length, then the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@lru_cache(maxsize=1)
def _manifest() -> dict[str, Any]:
    return json.loads((DATA_DIR / "manifest.json").read_text(encoding="utf-8"))


def _official_blob(name: str, split: str) -> str:
    return _manifest()["datasets"][name]["splits"][split]["git_blob"]


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("CONTSP_CACHE_DIR") or Path(base) / "contsp")


def _local_folder(name: str) -> Path | None:
    root = os.environ.get("CONTSP_DATA_DIR")
    if not root:
        return None
    if not Path(root).is_dir():
        raise ValueError(f"CONTSP_DATA_DIR={root!r} is not a folder, expected one with <name>/<split>.csv[.gz] in it")
    return Path(root) / name


def _from_local_files(name: str, split: str, n_jobs: int) -> Split | None:
    folders = [_local_folder(name), DATA_DIR / name if name == BUNDLED else None]
    for folder in filter(None, folders):
        for ending in (".csv", ".csv.gz", ".npz"):
            path = folder / f"{split}{ending}"
            if path.is_file() and ending == ".npz":
                return Split.load(path, name, split, _official_blob(name, split))
            if path.is_file():
                return _parse_or_cached(_read_csv(path), str(path), name, split, n_jobs)
    return None


def _from_public_files(name: str, split: str, n_jobs: int) -> Split:
    official = _official_blob(name, split)
    cached = _load_cache(name, split, official)
    if cached:
        return cached
    csv = _cache_dir() / name / f"{split}.csv"
    if not csv.is_file() or git_blob_id(csv.read_bytes()) != official:
        _download(_url(name, split), csv, official)
    return _parse_or_cached(csv.read_bytes(), str(csv), name, split, n_jobs)


def _url(name: str, split: str) -> str:
    if name == BUNDLED:
        raise ValueError(f"bundled file {DATA_DIR / name / split}.csv is missing, expected it in a complete checkout")
    return _manifest()["base_url"] + _manifest()["datasets"][name]["splits"][split]["path"]


def _download(url: str, path: Path, expected_blob: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = Path(folder) / "download"
        try:
            _fetch(url, download)
        except OSError as error:  # every error of requests is one
            raise ConnectionError(
                f"cannot download {url} ({first_line(error)}); put the file at "
                f"$CONTSP_DATA_DIR/{path.parent.name}/{path.name} instead"
            ) from error
        content = download.read_bytes()
    blob_id = git_blob_id(content)
    if blob_id != expected_blob:
        raise ValueError(f"{url} has git blob id {blob_id}, expected {expected_blob}; nothing was kept")
    write_whole(path, lambda file: file.write(content))


def _fetch(url: str, path: Path) -> None:
    import pooch

    pooch.HTTPDownloader(progressbar=True, timeout=60)(url, str(path), None)


def _read_csv(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({first_line(error)})") from error


def _parse_or_cached(content: bytes, path: str, name: str, split: str, n_jobs: int) -> Split:
    blob_id = git_blob_id(content)
    source = Source(path, blob_id, blob_id == _official_blob(name, split))
    cached = _load_cache(name, split, blob_id)
    if cached:
        return replace(cached, source=source)
    parsed = _parse_csv(content, source, name, split, n_jobs)
    try:
        parsed.save(_cache_path(name, split, blob_id))
    except OSError as error:  # a read-only home must not stop the work
        logger.info("cannot write the cache %s: %s", _cache_path(name, split, blob_id), error)
    return parsed


def _cache_path(name: str, split: str, blob_id: str) -> Path:
    return _cache_dir() / name / f"{split}-{blob_id}-v{FORMAT}.npz"


def _load_cache(name: str, split: str, blob_id: str) -> Split | None:
    path = _cache_path(name, split, blob_id)
    try:
        return Split.load(path, name, split, _official_blob(name, split))
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.info("the cache is made again: %s", error)
        return None


def _parse_csv(content: bytes, source: Source, name: str, split: str, n_jobs: int) -> Split:
    table = read_table(content, source.path)
    ids = table["material_id"].tolist()
    results = parse_cifs(table["cif"].tolist(), n_jobs, f"{name}/{split}")
    good = [row for row, result in enumerate(results) if not isinstance(result, str)]
    skipped = tuple((ids[row], result) for row, result in enumerate(results) if isinstance(result, str))
    if not good:
        raise ValueError(_describe_bad_rows(source.path, skipped, len(ids)))
    cells = [results[row] for row in good]
    return Split(
        name,
        split,
        [ids[row] for row in good],
        np.stack([cell.cell for cell in cells]),
        np.concatenate([cell.positions for cell in cells]),
        np.concatenate([cell.atomic_numbers for cell in cells]),
        np.array([len(cell.atomic_numbers) for cell in cells], dtype=np.int64),
        source,
        {label: column[good] for label, column in other_columns(table).items()},
        skipped,
    )


def _describe_bad_rows(path: str, skipped: Sequence[tuple[str, str]], n_rows: int) -> str:
    material_id, reason = skipped[0]
    return f"{path}: {len(skipped)} of {n_rows} rows are bad, the first is material_id={material_id}: {reason}"


def _report_skipped(found: Split, on_error: OnError) -> Split:
    if not found.skipped:
        return found
    message = _describe_bad_rows(found.source.path, found.skipped, len(found) + len(found.skipped))
    if on_error == "raise":
        raise ValueError(f"{message}; on_error='skip' leaves them out")
    logger.warning("%s; skipped", message)
    return found


def choose(structures: Sequence[Any], n_structures: int | None, seed: int = 0) -> list[Any]:
    """A random choice of at most ``n_structures`` entries, in their original order; all of them if None."""
    if n_structures is None or n_structures >= len(structures):
        return list(structures)
    chosen = np.random.default_rng(seed).choice(len(structures), size=n_structures, replace=False)
    return [structures[int(index)] for index in sorted(chosen)]
