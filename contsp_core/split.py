"""A loaded part of a data set: crystals as read-only arrays, written to and read from one ``.npz``.

Only numpy and torch are needed here, so that training runs where pandas and pymatgen are missing.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import numpy as np
import torch

from contsp_core.crystals import Crystals

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
