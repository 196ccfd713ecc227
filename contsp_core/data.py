"""Data sets: find or download a split, parse it once, and hand back arrays.

A split that has been parsed before is read from one ``.npz`` with numpy alone, so that training runs on a node without
pandas and pymatgen.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import operator
import os
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from contsp_core.cif import first_line, other_columns, parse_cifs, read_table
from contsp_core.crystals import MAX_ATOMIC_NUMBER
from contsp_core.split import FORMAT, Source, Split, write_whole

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
