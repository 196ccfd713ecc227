"""Which crystals are in a data set? Find or download a split, check it, parse it once, and hand back arrays.

Splits saved as ``.npz`` need numpy alone, so that training runs without pandas and pymatgen.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import operator
import os
import re
import reprlib
import unicodedata
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.client import HTTPException
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.request import urlopen
from uuid import uuid4

import numpy as np

import contsp_core  # its Crystals brings torch, which takes seconds: only where crystals are made
from contsp_core import MAX_ATOMIC_NUMBER

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from contsp_core import Crystals

UNION = {"perov5": "perov5-", "mp20": "", "mpts52": "", "carbon24": "carbon24-"}  # parts of mp: put before their ids
DATASETS = ("prototypes", *UNION, "mp")
SPLITS = ("train", "val", "test")
ON_ERROR = ("raise", "skip")
PACKAGE = Path(__file__).resolve().parent
# An installed package has the bundled files inside; in a checkout they lie beside it.
DATA_DIR = PACKAGE / "_bundled" if (PACKAGE / "_bundled").is_dir() else PACKAGE.parent / "data"
CHECKPOINTS = DATA_DIR / "checkpoints"
MANIFEST = json.loads((DATA_DIR / "manifest.json").read_text(encoding="utf-8"))
FORMAT = "2"  # of the .npz; raise it when the arrays change meaning: older files are then refused
MAX_CSV_BYTES = 2**29  # 512 MiB unpacked; the largest public file has a tenth of it
MAX_FORMULA_ATOMS = 1000
MAX_ID_BYTES = 200  # file systems allow 255 for a name, and endings are added
SERIAL_ROWS = 600  # up to here, starting processes costs more than they save
logger = logging.getLogger(__name__)


def load_split(name: str, split: str, on_error: str = "raise") -> Split:
    """One part of a data set; its ``.note`` tells when the file is not the official one.

    The user's file ``$CONTSP_DATA_DIR/<name>/<split>.csv``, ``.csv.gz`` or ``.npz``, a bundled one, or the public one,
    downloaded once and checked; ``mp`` is made of four others. Parsed crystals are cached (all this: data/README.md).

    ``name`` is one of ``DATASETS`` and ``split`` one of ``SPLITS``; with ``on_error="skip"`` bad rows are left out and
    listed in ``.skipped``. A ValueError tells of an argument that is unknown, of a bad file or row, and of a download
    with the wrong content; a ConnectionError of one that fails.
    """
    for label, value, allowed in (("name", name, DATASETS), ("split", split, SPLITS), ("on_error", on_error, ON_ERROR)):
        if value not in allowed:
            raise ValueError(f"{label}={value!r} is unknown, expected one of {', '.join(allowed)}")
    path = _find_file(name, split)
    if path is None:
        return _union(split, on_error)
    found = Split.load(path, name, split) if path.suffix == ".npz" else _from_csv(path, name, split)
    if found.skipped:
        (row, reason), n_bad = found.skipped[0], len(found.skipped)
        message = f"{path}: {n_bad} of {len(found) + n_bad} rows are bad, the first is {row}: {reason}"
        if on_error == "raise":
            raise ValueError(f"{message}; on_error='skip' leaves them out")
        logger.warning("%s; skipped", message)
    return found


def _find_file(name: str, split: str) -> Path | None:
    """The first file there is: the user's, a bundled one, the published one, downloaded once; ``mp`` has no such."""
    root, official = os.environ.get("CONTSP_DATA_DIR"), _official_blob(name, split)
    if root and not Path(root).is_dir():
        raise ValueError(f"CONTSP_DATA_DIR={root!r} is not a folder, expected one with <name>/<split>.csv[.gz] in it")
    folders = [Path(root, name), DATA_DIR / name] if root else [DATA_DIR / name]
    paths = [folder / f"{split}{ending}" for folder in folders for ending in (".csv", ".csv.gz", ".npz")]
    if found := next(filter(Path.is_file, paths), None):
        return found
    if (published := _cache_dir() / name / f"{split}-{official}.csv").is_file():
        return published
    if name == "mp":
        return None
    url = MANIFEST["base_url"] + MANIFEST["datasets"][name]["splits"][split]["path"]
    problem = f"cannot download {url}, put the file at $CONTSP_DATA_DIR/{name}/{split}.csv instead"
    with retold(problem, OSError, HTTPException, kind=ConnectionError), urlopen(url, timeout=60) as answer:
        content = answer.read(MAX_CSV_BYTES)
    if git_blob_id(content) != official:
        raise ValueError(f"{url} has git blob id {git_blob_id(content)}, expected {official}; nothing was kept")
    write_whole(published, lambda file: file.write(content))
    return published


def _cache_dir() -> Path:
    if given := os.environ.get("CONTSP_CACHE_DIR"):
        return Path(given)
    with retold("there is no home for a cache, expected a folder in CONTSP_CACHE_DIR", RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "contsp"


def _official_blob(name: str, split: str) -> str:
    return MANIFEST["datasets"][name]["splits"][split]["git_blob"]


def git_blob_id(content: bytes) -> str:
    """The id git gives to a file with this content: SHA-1 of a header with its length, then the bytes."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def stamp(path: Path) -> str:
    """By what a run knows a file that it was made from: its name, and the first digits of its SHA-256."""
    return f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"


def _from_csv(path: Path, name: str, split: str) -> Split:
    """Parsed once, and from then on found in the cache; a packed file is read up to ``MAX_CSV_BYTES`` only."""
    open_file = gzip.open if path.suffix == ".gz" else Path.open
    with retold(f"{path} is damaged", gzip.BadGzipFile, EOFError, zlib.error), open_file(path, "rb") as file:
        content = file.read(MAX_CSV_BYTES + 1)
    if len(content) > MAX_CSV_BYTES:
        raise ValueError(f"{path} unpacks to more than {MAX_CSV_BYTES} bytes, the most that is read")
    blob_id = git_blob_id(content)
    source = Source(str(path), blob_id, blob_id == _official_blob(name, split))
    cache = _cache_dir() / name / f"{split}-{blob_id}-v{FORMAT}.npz"
    try:
        return replace(Split.load(cache, name, split), source=source)
    except (ValueError, OSError):  # none yet, or a damaged one: made again
        parsed = _parse_csv(content, source, name, split)
    with suppress(OSError):  # a read-only home must not stop the work
        parsed.save(cache)
    return parsed


def _union(split: str, on_error: str) -> Split:
    """``mp``: the crystals of this split of all parts whose formula is in no later split; of equal ids, the first."""
    parts = [load_split(name, part, on_error) for part in SPLITS[SPLITS.index(split) :] for name in UNION]
    own, crystals = parts[: len(UNION)], contsp_core.Crystals.cat([part.crystals for part in parts])
    ids = [UNION[part.name] + material_id for part in own for material_id in part.material_ids]
    formulas = [row.tobytes() for row in contsp_core.crystals.reduce_counts(crystals.element_counts.numpy())]
    held_out = {*formulas[len(ids) :]}
    rows = sorted({ids[row]: row for row in reversed(range(len(ids))) if formulas[row] not in held_out}.values())
    blob_id = git_blob_id("\n".join(part.source.blob_id for part in parts).encode())
    source = Source(" + ".join(UNION), blob_id, blob_id == _official_blob("mp", split))
    skipped = tuple(bad for part in own for bad in part.skipped)
    return Split("mp", split, [ids[row] for row in rows], crystals[rows], source, skipped=skipped)


def _parse_csv(content: bytes, source: Source, name: str, split: str) -> Split:
    """The good rows of a CSV, without row counters and further CIF texts; missing texts are empty."""
    import pandas as pd

    text = {"material_id": str, "cif": str, "formula": str}
    with retold(f"{source.path} cannot be read as CSV", ValueError):  # pandas' own errors are of this kind
        # only an empty field is missing: "NaN" is also sodium nitride
        table = pd.read_csv(io.BytesIO(content), keep_default_na=False, na_values=[""], dtype=text)
    for label in ("material_id", "cif"):
        if label not in table.columns:
            raise ValueError(f"{source.path} has columns {' '.join(', '.join(table).split())}, expected {label!r} too")
    if not len(table):
        raise ValueError(f"{source.path} has no rows, expected one crystal a row")
    table = table.fillna(dict.fromkeys(table.select_dtypes(exclude="number"), ""))
    ids = table["material_id"].tolist()
    results = parse_cifs(table["cif"].tolist(), description=f"{name}/{split}")
    for row, reason in _bad_ids(ids).items():
        ids[row], results[row] = f"row {row + 1}", reason
    good = {row: result for row, result in enumerate(results) if not isinstance(result, str)}
    skipped = tuple((ids[row], result) for row, result in enumerate(results) if isinstance(result, str))
    if not good:
        raise ValueError(f"{source.path}: all {len(ids)} rows are bad, the first is {ids[0]}: {results[0]}")
    labels = [label for label in table.columns.drop("material_id") if not label.startswith(("cif", "Unnamed"))]
    columns = {label: np.array(table[label].iloc[list(good)].tolist()) for label in labels}
    crystals = contsp_core.Crystals.cat(list(good.values()))
    return Split(name, split, [ids[row] for row in good], crystals, source, columns, skipped)


def _bad_ids(material_ids: Sequence[str]) -> dict[int, str]:
    """{row: reason} of each ``material_id`` that is taken already or cannot name a file or a folder."""
    reasons, first = dict[int, str](), dict[str, int]()
    for row, text in enumerate(material_ids):
        plain = text.isprintable() and re.fullmatch(r"(?![. ])[^/\\]+(?<! )", text)
        if not plain or len(text.encode()) > MAX_ID_BYTES:
            reasons[row] = f"material_id is {reprlib.repr(text)}, expected a name for a file of ≤ {MAX_ID_BYTES} bytes"
        elif first.setdefault(text, row) != row:
            reasons[row] = f"material_id {text!r} is that of row {first[text] + 1} too, expected one of its own"
    return reasons


def parse_cifs(cifs: Sequence[str], n_jobs: int = -1, description: str = "CIFs") -> list[Crystals | str]:
    """Each CIF text as a crystal in float64, or in one line why it is none; on ``n_jobs`` cores (-1: all) if many."""
    if len(cifs) <= SERIAL_ROWS:
        return [_parse(cif) for cif in cifs]
    from joblib import Parallel, delayed
    from tqdm import tqdm

    parallel = Parallel(n_jobs=n_jobs, batch_size=200, return_as="generator")  # enough to hide the cost of sending them
    parsed = parallel(delayed(_parse)(cif) for cif in cifs)
    return list(tqdm(parsed, desc=f"parsing {description}", total=len(cifs), disable=None))  # None: in terminals only


def _parse(cif: str) -> Crystals | str:
    import torch
    from pymatgen.io.cif import CifParser

    *others, cif = [block for block in re.split("(?m)^(?=data_)", cif) if "_atom_site_fract_x" in block] or [cif]
    try:  # pymatgen raises many kinds, and warns of each coordinate it rounds to a fraction
        with retold("malformed CIF", Exception), warnings.catch_warnings(action="ignore"):
            if others:
                raise ValueError("several crystals, expected one")
            parser = CifParser(io.StringIO(cif))
            structure = parser.parse_structures(primitive=False, on_error="raise")[0]
            failure = parser.check(structure)
            if failure and not failure.startswith("Cannot determine"):  # it has no formula to compare with
                raise ValueError(failure)
        return contsp_core.Crystals.from_structures([structure], torch.float64)
    except ValueError as error:
        return str(error)


class Source(NamedTuple):
    """Where a split came from: the file read, its git blob id, and whether that is the published file's."""

    path: str
    blob_id: str
    official: bool


@dataclass(frozen=True, eq=False)
class Split(Sequence["Structure"]):
    """An immutable sequence of crystals; ``split[i]`` is a pymatgen structure, ``split[a:b]`` a smaller split."""

    name: str  # of the data set
    split: str
    material_ids: list[str]  # one per crystal, as in the file; unique, and fit to name a file
    crystals: Crystals  # all of them as one float64 batch on the CPU
    source: Source
    columns: dict[str, np.ndarray] = field(default_factory=dict)  # the others of the CSV but for CIF texts, (n,) each
    skipped: tuple[tuple[str, str], ...] = ()  # (material_id or row, reason) of each bad row, with on_error="skip"

    def __len__(self) -> int:
        return len(self.crystals)

    def __repr__(self) -> str:
        return f"Split({self.name!r}, {self.split!r}, {len(self)} crystals, from {self.source.path!r})"

    def __getitem__(self, index: int | slice) -> Any:
        rows = range(len(self))
        return self.select(rows[index]) if isinstance(index, slice) else self.select([rows[index]]).structures[0]

    def __iter__(self) -> Iterator[Structure]:
        return iter(self.structures)

    @cached_property
    def structures(self) -> list[Structure]:
        """All structures, each with ``properties["material_id"]``; built once and shared: copy before changing one."""
        structures = self.crystals.to_structures()
        for structure, material_id in zip(structures, self.material_ids, strict=True):
            structure.properties["material_id"] = material_id
        return structures

    @property
    def species(self) -> list[list[int]]:
        """Atomic numbers of each crystal, in atom order."""
        return self.crystals.species

    @property
    def note(self) -> str:
        """One line when the file is not the published one, otherwise empty."""
        text = f"{self.name}/{self.split} is not the official file (git blob {self.source.blob_id[:12]})"
        return "" if self.source.official else f"{text}; results cannot be compared with published ones"

    def select(self, indices: Sequence[int] | np.ndarray) -> Split:
        """The chosen crystals, in the order given; or those for which a mask of all is true."""
        chosen = np.arange(len(self))[np.asarray(indices) if len(indices) else slice(0)]
        columns = {name: column[chosen] for name, column in self.columns.items()}
        ids = [self.material_ids[i] for i in chosen]
        return replace(self, material_ids=ids, crystals=self.crystals[chosen], columns=columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one ``.npz``; as ``$CONTSP_DATA_DIR/<name>/<split>.npz`` :func:`load_split` finds it."""
        arrays = {name: tensor.numpy() for name, tensor in vars(self.crystals).items()}
        arrays |= {f"column:{name}": column for name, column in self.columns.items()}
        header: dict[str, Any] = {"format": FORMAT, "path": self.source.path, "blob_id": self.source.blob_id}
        header |= {"material_ids": self.material_ids, "skipped": self.skipped}
        write_whole(Path(path), lambda file: np.savez(file, header=np.array(json.dumps(header)), **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str, split: str) -> Split:
        """Read what :meth:`save` wrote; a ValueError tells of a file that is damaged, foreign, or of another format."""
        import torch

        content = io.BytesIO(Path(path).read_bytes())
        with retold(f"{path} is not a split written by Split.save", Exception):  # of zip, zlib, header, keys or lengths
            with np.load(content, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                fields = contsp_core.Crystals.__dataclass_fields__
                crystals = contsp_core.Crystals(*(torch.from_numpy(file[name]) for name in fields))
                columns = {key.removeprefix("column:"): file[key] for key in file.files if key.startswith("column:")}
            ids, skipped = [*header["material_ids"]], tuple((str(row), str(why)) for row, why in header["skipped"])
            source = Source(str(header["path"]), header["blob_id"], header["blob_id"] == _official_blob(name, split))
            lengths = {len(ids), *(column.shape[0] for column in columns.values())} - {len(crystals)}
            reasons = [*_bad_ids(ids).values(), *(f"length {n}, expected {len(crystals)}" for n in lengths)]
            if header["format"] != FORMAT or reasons:
                raise ValueError(*reasons[:1] or [f"format {header['format']}, expected {FORMAT}"])
        return cls(name, split, ids, crystals, source, columns, skipped)


def find_checkpoint(name_or_path: str | Path) -> Path:
    """The file of a bundled checkpoint by name, or the path itself; a ValueError, naming the bundled ones, if none."""
    bundled = CHECKPOINTS / f"{name_or_path}.safetensors"
    path = bundled if bundled.is_file() else Path(str(name_or_path))
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in CHECKPOINTS.glob("*.safetensors"))) or "none bundled"
        raise ValueError(f"checkpoint is {str(name_or_path)!r}, expected a .safetensors file or one of: {names}")
    return path


def parse_formula(text: str) -> list[int]:
    """Atomic numbers of a formula, in the order written: "BaTiO3" gives [56, 22, 8, 8, 8].

    A ValueError tells of text that is no formula or several, fractional counts, an unknown element, or too many atoms.
    """
    from pymatgen.core import Composition, Element

    known = {symbol for symbol, element in Element.__members__.items() if element.Z <= MAX_ATOMIC_NUMBER}
    known -= {"D", "T"}  # pymatgen has them, but TIO2 should not be a hydride
    text = unicodedata.normalize("NFKC", text) if isinstance(text, str) else text  # SrTiO₃
    symbols = re.findall("[A-Z][a-z]*", str(text).replace("@", ""))
    unknown = [symbol for symbol in symbols if symbol not in known]
    parts = [set(re.findall("[A-Z][a-z]*", part)) for part in str(text).split()]
    several = re.search(r"-|\s\d", str(text)) or sum(map(len, parts)) > len(set[str]().union(*parts))  # CaO 2TiO2
    counts: Mapping[Any, float] = {}
    with suppress(Exception):  # pymatgen raises several kinds
        counts = Composition(text, strict=True).element_composition
    none = {Element[symbol].Z for symbol in symbols if symbol in known} - {element.Z for element in counts}  # as in N0
    sound = 0 < sum(counts.values()) <= MAX_FORMULA_ATOMS and not any(n % 1 for n in counts.values())
    if unknown or none or several or not sound:
        problem = f": element {unknown[0]!r} is unknown" if unknown else " cannot be read"
        expected = f'expected one like "BaTiO3" or "CuSO4(H2O)5", Z ≤ {MAX_ATOMIC_NUMBER}, ≤ {MAX_FORMULA_ATOMS} atoms'
        raise ValueError(f"formula {text!r}{problem}, {expected}")
    return [element.Z for element, n in counts.items() for _ in range(round(n))]


def resolve_species(entries: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """Atomic-number lists from a sequence of formulas and atomic-number lists; a ValueError tells of anything else."""
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not len(entries):
        raise ValueError(f'species is {entries!r}, expected a list like ["BaTiO3", [11, 17]]')
    species = []
    for entry in entries:
        numbers = []
        with suppress(TypeError):
            numbers = parse_formula(entry) if isinstance(entry, str) else [*map(operator.index, entry)]
        if not numbers or min(numbers) < 1 or max(numbers) > MAX_ATOMIC_NUMBER:
            raise ValueError(f"species entry is {entry!r}, expected a formula or numbers 1 … {MAX_ATOMIC_NUMBER}")
        species.append(numbers)
    return species


def choose(items: Sequence[Any], n: int | None, seed: int = 0) -> list[Any]:
    """A random choice of at most ``n`` ≥ 1 entries, without repeats, in their original order; all of them for None."""
    if n is not None and n < 1:
        raise ValueError(f"n is {n}, expected ≥ 1, or None for all")
    order = np.random.default_rng(seed).permutation(len(items))[:n]
    return [items[index] for index in sorted(order.tolist())]


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], replace: bool = True) -> None:
    """Write a file, complete or not at all even if the power fails; without ``replace`` one that exists is an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        try:
            if not replace:
                os.link(temporary, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links, where a race cannot be seen
            replace = True
        if replace:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


@contextmanager
def retold(problem: str, *kinds: type[BaseException], kind: type[Exception] = ValueError) -> Iterator[None]:
    """Errors of these kinds become one of ``kind`` that tells the problem and the reason, on one line."""
    try:
        yield
    except kinds as error:
        raise kind(f"{problem}: {one_line(error)}") from None


def one_line(error: BaseException) -> str:
    """Kind and message of an error, on one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
