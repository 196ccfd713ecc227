"""Data sets: lookup, cache, checked download, bad rows, and the bundled prototypes against independent oracles."""

from __future__ import annotations

import csv
import gc
import gzip
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import tracemalloc
import warnings
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import spglib
import torch
from ase.data import reference_states
from hypothesis import given
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from contsp_core import data
from contsp_core.crystals import Crystals
from contsp_core.data import (
    DATASETS,
    SPLITS,
    Split,
    choose,
    git_blob_id,
    load_split,
    parse_formula,
    resolve_species,
    write_whole,
)

SALT = Structure(Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
GOOD = SALT.to(fmt="cif")
DISORDERED = Structure(Lattice.cubic(5), [{"Na": 0.5, "K": 0.5}], [[0, 0, 0]]).to(fmt="cif")
BAD_ROWS = {
    "no CIF": ("", "malformed CIF"),
    "prose": ("not a crystal", "malformed CIF"),
    "atom missing": (GOOD[: GOOD.rindex("  Cl")], "malformed CIF"),
    "cut in a line": (GOOD[:-30], "malformed CIF"),
    "another formula": (GOOD.replace("'Na1 Cl1'", "'Na2 Cl1'"), "Incorrect stoichiometry"),
    "disordered": (DISORDERED, "disordered site"),
    "mendelevium": (GOOD.replace("Na", "Md"), "atomic_numbers holds 101"),
    "flat cell": (GOOD.replace("_cell_length_a   5.64", "_cell_length_a   0.00"), "Singular matrix"),
    "thin cell": (GOOD.replace("_cell_length_a   5.64000000", "_cell_length_a   1e-8"), "below threshold"),
    "NaN coordinate": (GOOD.replace("0.50000000  0.50000000  0.50000000", "nan  0.5  0.5"), "NaN"),
    "NaN cell": (GOOD.replace("_cell_length_a   5.64000000", "_cell_length_a   nan"), "NaN"),
}


def table(rows: list[tuple[str, str]], columns: tuple[str, str] = ("material_id", "cif")) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue().encode()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder and an empty cache."""
    (tmp_path / "data" / "mp20").mkdir(parents=True)
    monkeypatch.setenv("CONTSP_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CONTSP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def put(folders: Path, content: bytes, name: str = "test.csv") -> Path:
    path = folders / "data" / "mp20" / name
    path.write_bytes(content)
    return path


def error_of(*args: object, kind: type[Exception] = ValueError, **kwargs: object) -> str:
    with pytest.raises(kind) as caught:
        load_split(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "cif",
    [
        re.sub(r"(?m)^_chemical_formula.*\n", "", GOOD).replace("  Na  Na0", "  Na1+  Na0"),
        "data_global\n_journal_name_full 'Acta Cryst.'\n" + GOOD.replace("# generated using pymatgen\n", ""),
    ],
)
def test_a_cif_need_not_have_a_formula_or_a_single_block(cif: str) -> None:
    assert cif != GOOD
    (crystal,) = data.parse_cifs([cif])
    assert crystal.species == [[11, 17]] and float(crystal.volume) == pytest.approx(5.64**3)
    (crystal,) = data.parse_cifs([cif + GOOD.replace("data_NaCl", "data_second")])
    assert crystal == "malformed CIF: ValueError: several crystals, expected one"


# --- a split is a sequence -------------------------------------------------------------------------------------------


def test_split_gives_back_the_structures_of_the_file(folders: Path) -> None:
    put(folders, table([("a", GOOD), ("b", SALT.copy().scale_lattice(200).to(fmt="cif"))]))
    split = load_split("mp20", "test")
    assert len(split) == 2
    assert split.material_ids == ["a", "b"]
    assert split[0].properties["material_id"] == "a"
    assert split[-1].volume == pytest.approx(200)
    assert np.allclose(split[0].lattice.matrix, SALT.lattice.matrix, atol=1e-8)
    assert np.allclose(split[0].frac_coords, SALT.frac_coords, atol=1e-8)
    assert split.species == [[11, 17], [11, 17]]
    assert [structure.properties["material_id"] for structure in split.structures] == ["a", "b"]
    with pytest.raises(IndexError):
        split[2]


def test_crystals_are_those_made_from_the_structures() -> None:
    split = load_split("prototypes", "test")
    expected = Crystals.from_structures(split.structures, dtype=torch.float64)
    assert torch.equal(split.crystals.cell, expected.cell)
    assert torch.equal(split.crystals.atomic_numbers, expected.atomic_numbers)
    moved = expected.positions - split.crystals.positions  # an atom at 0 − rounding is wrapped to 1
    shift = torch.linalg.solve(expected.cell[expected.system_idx].mT, moved[:, :, None])
    assert torch.allclose(shift, shift.round(), rtol=0, atol=1e-12)
    assert shift.abs().max() < 1.5


@given(st.lists(st.integers(0, 46), min_size=1, max_size=6))
def test_select_and_slice_agree_with_list_indexing(indices: list[int]) -> None:
    split = load_split("prototypes", "val")
    chosen = split.select(indices)
    assert chosen.material_ids == [split.material_ids[i] for i in indices]
    assert chosen.columns["formula"].tolist() == [split.columns["formula"][i] for i in indices]
    assert [s.composition for s in chosen] == [split[i].composition for i in indices]
    assert split[3:30:4].material_ids == split.material_ids[3:30:4]
    mask = np.isin(np.arange(len(split)), indices)
    assert split.select(mask).material_ids == [split.material_ids[i] for i in sorted(set(indices))]
    with pytest.raises(IndexError):
        split.select([0.5])  # type: ignore[list-item]


def test_choice_is_seeded_ordered_and_without_repeats() -> None:
    chosen = choose(range(100), 10, seed=1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 10
    assert chosen == choose(range(100), 10, seed=1) != choose(range(100), 10, seed=2)
    assert choose(range(5), None) == choose(range(5), 9) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="n is 0, expected ≥ 1"):
        choose(range(5), 0)


def test_each_entry_is_chosen_equally_often() -> None:
    counts = np.bincount([row for seed in range(2000) for row in choose(range(5), 2, seed)])
    assert np.abs(counts - 800).max() < 5 * (2000 * 0.4 * 0.6) ** 0.5


# --- lookup and cache ------------------------------------------------------------------------------------------------


def test_gzip_and_plain_files_give_the_same_blob_and_crystals(folders: Path) -> None:
    content = table([("a", GOOD)])
    put(folders, content, "val.csv")
    put(folders, gzip.compress(content), "test.csv.gz")
    plain, packed = load_split("mp20", "val"), load_split("mp20", "test")
    assert plain.source.blob_id == packed.source.blob_id == git_blob_id(content)
    assert torch.equal(plain.crystals.positions, packed.crystals.positions)


def test_blob_id_is_that_of_git(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"some\ncontent\n")
    git = subprocess.run(["git", "hash-object", str(tmp_path / "file")], capture_output=True, text=True, check=True)
    assert git.stdout.strip() == git_blob_id(b"some\ncontent\n")


def test_second_load_comes_from_the_cache_and_is_equal(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folders, table([("a", GOOD), ("b", "bad")]))
    first = load_split("mp20", "test", on_error="skip")
    monkeypatch.setattr(data, "parse_cifs", lambda *_: pytest.fail("parsed again"))
    second = load_split("mp20", "test", on_error="skip")
    assert torch.equal(first.crystals.cell, second.crystals.cell)
    assert torch.equal(first.crystals.positions, second.crystals.positions)
    assert first.species == second.species
    assert first.source == second.source
    assert first.skipped == second.skipped
    assert "b" in error_of("mp20", "test")  # a cache made while skipping does not hide bad rows


def test_a_changed_file_is_parsed_again(folders: Path) -> None:
    put(folders, table([("a", GOOD)]))
    load_split("mp20", "test")
    put(folders, table([("a", GOOD), ("b", GOOD)]))
    assert len(load_split("mp20", "test")) == 2


def test_a_damaged_cache_is_made_again(folders: Path) -> None:
    put(folders, table([("a", GOOD)]))
    load_split("mp20", "test")
    (cache,) = (folders / "cache").rglob("*.npz")
    cache.write_bytes(cache.read_bytes()[:500])
    assert len(load_split("mp20", "test")) == 1
    assert len(Split.load(cache, "mp20", "test")) == 1


def test_an_interrupted_write_leaves_no_file(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folders, table([("a", GOOD)]))

    def interrupted(file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_split("mp20", "test")
    assert not [path for path in (folders / "cache").rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_does_not_stop_the_work(folders: Path) -> None:
    put(folders, table([("a", GOOD)]))
    (folders / "cache").write_text("a file where the folder should be")
    assert len(load_split("mp20", "test")) == 1


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda _: events.append("fsync"))
    rename = Path.replace
    monkeypatch.setattr(Path, "replace", lambda source, target: (events.append("rename"), rename(source, target)))
    write_whole(tmp_path / "new" / "file", lambda file: file.write(b"content"))
    assert (tmp_path / "new" / "file").read_bytes() == b"content"
    assert events == ["fsync", "rename", "fsync"]  # the content, then the new name itself


def test_prepared_arrays_load_without_pandas_and_pymatgen(folders: Path) -> None:
    load_split("prototypes", "train").save(folders / "data" / "mp20" / "test.npz")
    code = (
        "import sys; sys.modules['pandas'] = sys.modules['pymatgen'] = None\n"
        "from contsp_core.data import load_split; print(load_split('mp20', 'test').crystals.cell.shape[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=data.DATA_DIR.parent
    )
    assert result.stdout.strip() == "368", result.stderr


def test_a_foreign_npz_is_named(folders: Path) -> None:
    np.savez(folders / "data" / "mp20" / "test.npz", something=np.zeros(3))
    assert "test.npz is not a split written by Split.save" in error_of("mp20", "test")


def test_note_tells_official_files_from_others(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = table([("a", GOOD)])
    put(folders, content)
    split = load_split("mp20", "test")
    assert not split.source.official
    assert "not the official file" in split.note
    assert "\n" not in split.note
    monkeypatch.setattr(data, "_official_blob", lambda *_: git_blob_id(content))
    split = load_split("mp20", "test")
    assert split.source.official
    assert split.note == ""


# --- download --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local web server in the place of the public one; the returned folder is what it serves."""
    root = folders / "www"
    (root / "mp_20").mkdir(parents=True)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=root)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        base_url = f"http://127.0.0.1:{http.server_port}/"
        monkeypatch.setattr(data, "MANIFEST", data.MANIFEST | {"base_url": base_url})
        yield root
        http.shutdown()
        thread.join()
    with warnings.catch_warnings(action="ignore"):  # urllib leaves the socket of a failed request to be collected
        gc.collect()


def test_download_is_checked_kept_and_not_repeated(
    server: Path, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = table([("a", GOOD)])
    (server / "mp_20" / "test.csv").write_bytes(content)
    monkeypatch.setattr(data, "_official_blob", lambda *_: git_blob_id(content))
    split = load_split("mp20", "test")
    assert split.source.official
    assert Path(split.source.path).read_bytes() == content
    monkeypatch.setattr(data, "urlopen", lambda *_, **__: pytest.fail("downloaded again"))
    assert load_split("mp20", "test").material_ids == ["a"]
    next((folders / "cache").rglob("*.npz")).unlink()
    assert load_split("mp20", "test").material_ids == ["a"]  # from the kept CSV


def test_a_download_with_the_wrong_content_raises_and_leaves_no_file(server: Path, folders: Path) -> None:
    (server / "mp_20" / "test.csv").write_bytes(b"something else")
    message = error_of("mp20", "test")
    assert git_blob_id(b"something else") in message
    assert "133f5697e1d3fd94f9bf0ab6a3b6c5054d325955" in message
    assert not [path for path in (folders / "cache").rglob("*") if path.is_file()]


def test_a_failed_download_says_where_to_put_the_file_in_one_line_and_without_a_chain(server: Path) -> None:
    with pytest.raises(ConnectionError) as caught:
        load_split("mp20", "val")
    assert "HTTP Error 404" in str(caught.value)
    assert "$CONTSP_DATA_DIR/mp20/val.csv" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


def test_urls_name_the_pinned_revision() -> None:
    assert data.MANIFEST["base_url"].startswith(
        "https://raw.githubusercontent.com/jiaor17/DiffCSP/7121d159826efa2ba9500bf299250d96da37f146/"
    )
    assert data.MANIFEST["datasets"]["perov5"]["splits"]["val"]["path"] == "perov_5/val.csv"


def test_manifest_lists_every_data_set_and_split() -> None:
    entries = data.MANIFEST["datasets"]
    assert tuple(entries) == DATASETS
    assert all(len(entry["splits"][split]["git_blob"]) == 40 for entry in entries.values() for split in SPLITS)


# --- the union -------------------------------------------------------------------------------------------------------

PARTS = ("perov5", "mp20", "mpts52", "carbon24")
# (material_id, species) of each crystal; ids of mp20 and mpts52 have one origin.
HAND_MADE = {
    ("perov5", "train"): [("1", "K Cl"), ("2", "Ti O O"), ("3", "Na Cl")],  # 2: mp20/test has its supercell
    ("perov5", "val"): [("1", "Cs Cl"), ("4", "Mg O")],  # 1 has the id of another; Mg O is in mpts52/test
    ("perov5", "test"): [("5", "Li F")],
    ("mp20", "train"): [("mp-1", "Ba O"), ("mp-2", "Na Cl Na Cl"), ("mp-3", "Mg O"), ("mp-4", "Ca O")],
    ("mp20", "val"): [("mp-5", "Rb Cl")],
    ("mp20", "test"): [("mp-6", "Ti Ti O O O O")],
    ("mpts52", "train"): [("mp-2", "Na Cl"), ("1", "Ba O O"), ("mp-7", "Cl Cs"), ("mp-4", "Ca O")],  # 1: not perov5's
    ("mpts52", "val"): [("mp-8", "Rb Br"), ("mp-5", "Rb Cl")],
    ("mpts52", "test"): [("mp-9", "O Mg"), ("mp-6", "Ti O O")],
    ("carbon24", "train"): [("mp-1", "C"), ("C-1", "Si C"), ("C-2", "Ca O")],
    ("carbon24", "val"): [("C-3", "Ge")],
    ("carbon24", "test"): [("C-4", "C C")],
}


def row_of(species: str) -> str:
    numbers = species.split()
    sites = [[0.15 * index + 0.05, 0.1 * index, 0.3] for index in range(len(numbers))]
    return Structure(Lattice.cubic(4 + len(numbers)), numbers, sites).to(fmt="cif")


def union_of_files(root: Path, split: str) -> dict[str, str]:
    """What mp holds, {material_id: reduced formula}, from the files alone."""
    tables = {key: pd.read_csv(root / key[0] / f"{key[1]}.csv", dtype=str) for key in HAND_MADE}
    for (name, _), frame in tables.items():
        frame["formula"] = [Structure.from_str(cif, fmt="cif").composition.reduced_formula for cif in frame["cif"]]
        if name in ("perov5", "carbon24"):
            frame["material_id"] = name + "-" + frame["material_id"]
    held_out = {"train": ("val", "test"), "val": ("test",), "test": ()}[split]
    forbidden = {formula for (_, part), frame in tables.items() if part in held_out for formula in frame["formula"]}
    whole = pd.concat([tables[name, split] for name in PARTS])
    whole = whole[~whole["formula"].isin(forbidden)].drop_duplicates("material_id")
    return dict(zip(whole["material_id"], whole["formula"]))


@pytest.fixture
def parts(folders: Path) -> Path:
    """Small files of the parts of mp."""
    for (name, split), crystals in HAND_MADE.items():
        path = folders / "data" / name / f"{split}.csv"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(table([(material_id, row_of(species)) for material_id, species in crystals]))
    return folders / "data"


def held(split: Split) -> dict[str, str]:
    return {row.properties["material_id"]: row.composition.reduced_formula for row in split}


@pytest.mark.parametrize("split", SPLITS)
def test_the_union_is_that_of_the_files(parts: Path, split: str) -> None:
    expected, found = union_of_files(parts, split), load_split("mp", split)
    assert list(held(found).items()) == list(expected.items())
    assert len(found) == len(expected)


def test_no_formula_of_the_union_is_in_two_splits(parts: Path) -> None:
    expected = ["perov5-1", "perov5-3", "mp-1", "mp-2", "mp-4", "1", "carbon24-C-1", "carbon24-C-2"]
    assert load_split("mp", "train").material_ids == expected
    formulas = [set(held(load_split("mp", split)).values()) for split in SPLITS]
    assert not formulas[0] & formulas[1] and not (formulas[0] | formulas[1]) & formulas[2]


def test_a_crystal_in_two_parts_is_that_of_the_first(parts: Path) -> None:
    split = load_split("mp", "train")
    assert split.material_ids.count("mp-2") == 1
    assert len(split[split.material_ids.index("mp-2")]) == 4  # as in mp20: two formula units


@pytest.mark.parametrize(("part", "gone"), [(("carbon24", "val"), "perov5-1"), (("mp20", "test"), "perov5-1")])
def test_a_changed_part_changes_the_union(parts: Path, part: tuple[str, str], gone: str) -> None:
    before = load_split("mp", "train")
    path = parts / part[0] / f"{part[1]}.csv"
    path.write_bytes(table([*((name, row_of(text)) for name, text in HAND_MADE[part]), ("new", row_of("K K Cl Cl"))]))
    after = load_split("mp", "train")
    assert set(before.material_ids) - set(after.material_ids) == {gone}
    assert before.source.blob_id != after.source.blob_id


def test_the_users_own_union_wins(parts: Path) -> None:
    (parts / "mp").mkdir()
    (parts / "mp" / "train.csv").write_bytes(table([("mine", GOOD)]))
    assert load_split("mp", "train").material_ids == ["mine"]
    assert len(load_split("mp", "val")) == 4


def test_a_bad_row_of_a_part_stops_the_union_or_is_listed(parts: Path) -> None:
    (parts / "mp20" / "train.csv").write_bytes(table([("mp-1", row_of("Ba O")), ("broken", "")]))
    assert [row for row, _ in load_split("mp", "train", on_error="skip").skipped] == ["broken"]
    assert str(parts / "mp20" / "train.csv") in error_of("mp", "train")
    assert not load_split("mp", "val").skipped


def test_the_union_is_official_when_all_its_parts_are(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    official, mp = data._official_blob, {split: data._official_blob("mp", split) for split in SPLITS}
    for split in SPLITS:
        blob_ids = [official(name, part) for part in SPLITS[SPLITS.index(split) :] for name in PARTS]
        assert mp[split] == git_blob_id("\n".join(blob_ids).encode())  # the manifest follows from its other entries
    actual = {(name, split): load_split(name, split).source.blob_id for name, split in HAND_MADE}
    assert not load_split("mp", "val").source.official
    parts_of_val = [actual[name, split] for split in ("val", "test") for name in PARTS]
    actual["mp", "val"] = git_blob_id("\n".join(parts_of_val).encode())
    monkeypatch.setattr(data, "_official_blob", lambda *key: actual.get(key, ""))
    split = load_split("mp", "val")
    assert split.source.official and split.note == ""
    (parts / "mp20" / "test.csv").write_bytes(table([("mp-6", row_of("Ti O"))]))
    assert not load_split("mp", "val").source.official


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named_and_skipped_only_when_asked(
    folders: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    cif, reason = BAD_ROWS[case]
    assert cif != GOOD
    path = put(folders, table([("fine", GOOD), ("broken-1", cif), ("broken-2", cif)]))
    message = error_of("mp20", "test")
    for part in (str(path), "2 of 3", "broken-1", reason):
        assert part in message
    with caplog.at_level(logging.WARNING):
        split = load_split("mp20", "test", on_error="skip")
    assert split.material_ids == ["fine"]
    assert [row for row, _ in split.skipped] == ["broken-1", "broken-2"]
    assert "2 of 3" in caplog.text


def test_no_good_row_is_an_error_even_when_skipping(folders: Path) -> None:
    put(folders, table([("x", "bad")]))
    assert "all 1 rows are bad, the first is x: malformed CIF" in error_of("mp20", "test", on_error="skip")


@pytest.mark.parametrize(
    ("columns", "missing"), [(("material_id", "structure"), "'cif'"), (("id", "cif"), "'material_id'")]
)
def test_a_csv_without_a_needed_column_is_named_with_its_columns(
    folders: Path, columns: tuple[str, str], missing: str
) -> None:
    path = put(folders, table([("a", GOOD)], columns=columns))
    message = error_of("mp20", "test")
    for part in (str(path), missing, ", ".join(columns)):
        assert part in message


UNFIT_IDS = [
    "",
    " ",
    "a ",
    ".",
    "..",
    "../up",
    "/",
    "/etc/x",
    "a/b",
    "a\\b",
    ".hidden",
    "a\0b",
    "a\nb",
    "x" * 201,
    "é" * 101,
]


@pytest.mark.parametrize("material_id", UNFIT_IDS, ids=repr)
def test_an_id_that_cannot_name_a_file_is_a_bad_row(folders: Path, material_id: str) -> None:
    put(folders, table([("fine", GOOD), (material_id, GOOD)]))
    message = error_of("mp20", "test")
    assert "1 of 2 rows are bad, the first is row 2: material_id is" in message
    assert len(message) < 500
    assert load_split("mp20", "test", on_error="skip").material_ids == ["fine"]


def test_an_id_that_is_taken_is_a_bad_row(folders: Path) -> None:
    put(folders, table([("a", GOOD), ("b", GOOD), ("a", GOOD)]))
    assert "the first is row 3: material_id 'a' is that of row 1 too" in error_of("mp20", "test")
    assert load_split("mp20", "test", on_error="skip").material_ids == ["a", "b"]


def test_unfit_ids_of_prepared_arrays_are_refused(folders: Path) -> None:
    split = load_split("prototypes", "val")
    replace(split, material_ids=["..", *split.material_ids[1:]]).save(folders / "data" / "mp20" / "test.npz")
    assert "material_id is '..'" in error_of("mp20", "test")


def test_a_packed_file_that_unpacks_to_too_much_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = table([("a", GOOD)])
    monkeypatch.setattr(data, "MAX_CSV_BYTES", len(content))
    put(folders, gzip.compress(content), "val.csv.gz")
    assert len(load_split("mp20", "val")) == 1  # as large as allowed
    path = put(folders, gzip.compress(content + b"\n" * 10_000_000), "test.csv.gz")
    assert path.stat().st_size < 20_000
    tracemalloc.start()
    assert error_of("mp20", "test") == f"{path} unpacks to more than {len(content)} bytes, the most that is read"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000  # 10 MB were not unpacked


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "cannot be read as CSV"), (b"\xff\xfe\x00", "cannot be read as CSV"), (b"material_id,cif\n", "has no rows")],
)
def test_an_empty_or_unreadable_csv_is_named(folders: Path, content: bytes, expected: str) -> None:
    path = put(folders, content)
    message = error_of("mp20", "test")
    assert str(path) in message
    assert expected in message


@pytest.mark.parametrize("content", [b"not gzip", gzip.compress(b"material_id,cif\n" * 99, mtime=0)[:-12]])
def test_a_damaged_gzip_is_named(folders: Path, content: bytes) -> None:
    path = put(folders, content, "test.csv.gz")
    assert str(path) in error_of("mp20", "test")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("mp2020", "test"), f"name='mp2020' is unknown, expected one of {', '.join(DATASETS)}"),
        (("mp20", "dev"), "split='dev' is unknown, expected one of train, val, test"),
        (("mp20", "test", "ignore"), "on_error='ignore' is unknown, expected one of raise, skip"),
    ],
)
def test_an_unknown_argument_is_named_with_what_is_allowed(arguments: tuple[str, ...], expected: str) -> None:
    assert error_of(*arguments) == expected


def test_a_data_folder_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTSP_DATA_DIR", "/nowhere")
    assert "CONTSP_DATA_DIR='/nowhere' is not a folder" in error_of("mp20", "test")


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("BaTiO3", [56, 22, 8, 8, 8]), ("Ca(OH)2", [20, 8, 8, 1, 1]), ("NaN", [11, 7]), ("Fm2O3", [100, 100, 8, 8, 8])],
)
def test_formula_is_read_in_the_order_written(text: str, expected: list[int]) -> None:
    assert parse_formula(text) == expected


def test_subscripts_are_digits():
    assert parse_formula("SrTiO₃") == parse_formula("SrTiO3")


def test_the_cache_needs_no_home_if_it_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CONTSP_CACHE_DIR", str(tmp_path))
    assert data._cache_dir() == tmp_path
    monkeypatch.delenv("CONTSP_CACHE_DIR")
    with pytest.raises(ValueError, match="no home for a cache, expected a folder in CONTSP_CACHE_DIR"):
        data._cache_dir()


SEVERAL = ["CaO 2TiO2", "MgO 2SiO2", "CuSO4 5H2O", "CaTiO3 BaO", "Na2Cl-1Cl2"]  # pymatgen reads one formula


@pytest.mark.parametrize(
    "text", ["", " ", "Ba0.5TiO3", "Hello", "MdO", "X2", "NaCl0", "Ba(TiO3", "H1000001", "Na-1", None, 3, *SEVERAL]
)
def test_a_bad_formula_is_quoted(text: object) -> None:
    with pytest.raises(ValueError, match=r"^formula") as caught:
        parse_formula(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "symbol"), [("Xx2O", "Xx"), ("NaCl2Zz", "Zz"), ("MdO", "Md")])
def test_an_unknown_element_is_named(text: str, symbol: str) -> None:
    with pytest.raises(ValueError, match=f"element '{symbol}' is unknown"):
        parse_formula(text)


def test_species_are_formulas_or_atomic_numbers() -> None:
    assert resolve_species(["NaCl", [56, 22, 8], np.array([1, 1])]) == [[11, 17], [56, 22, 8], [1, 1]]


@pytest.mark.parametrize("entries", ["NaCl", [], [11, 17], [[]], [[0]], [[101]], [[1.5]], [["Na"]], [None]])
def test_bad_species_are_quoted(entries: object) -> None:
    with pytest.raises(ValueError, match=r"^species.* expected"):
        resolve_species(entries)  # type: ignore[arg-type]


# --- the bundled prototypes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prototypes() -> list[Split]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CONTSP_DATA_DIR", raising=False)
        return [load_split("prototypes", split) for split in SPLITS]


def test_committed_prototypes_are_what_the_script_makes() -> None:
    path = data.DATA_DIR / "prototypes" / "make_prototypes.py"
    spec = spec_from_file_location("make_prototypes", path)
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    for split, content in script.tables().items():
        assert (path.parent / f"{split}.csv").read_bytes() == content, split
        assert git_blob_id(content) == data._official_blob("prototypes", split)


def test_prototypes_are_many_unique_and_small(prototypes: list[Split]) -> None:
    ids = [material_id for split in prototypes for material_id in split.material_ids]
    assert len(ids) == len(set(ids)) >= 260
    assert all(split.note == "" for split in prototypes)
    assert sum(path.stat().st_size for path in (data.DATA_DIR / "prototypes").glob("*.csv")) < 410_000
    shares = np.array([len(split) for split in prototypes]) / len(ids)
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.03


def test_polymorphs_of_a_formula_are_in_one_split(prototypes: list[Split]) -> None:
    train, val, test = (set(split.columns["formula"]) for split in prototypes)
    assert not train & val | train & test | val & test


def test_prototypes_have_their_space_group_and_are_primitive(prototypes: list[Split]) -> None:
    first = {  # one crystal of each prototype: spglib takes a tenth of a second for a cubic one
        prototype: (structure, number)
        for split in prototypes
        for structure, prototype, number in zip(split, split.columns["prototype"], split.columns["spacegroup.number"])
    }
    for prototype, (structure, number) in first.items():
        cell = (structure.lattice.matrix, structure.frac_coords, structure.atomic_numbers)
        with warnings.catch_warnings(action="ignore"):  # spglib announces another way to report errors
            dataset = spglib.get_symmetry_dataset(cell, symprec=1e-3)
        assert dataset.number == number, prototype
        assert dataset.mapping_to_primitive.max() + 1 == len(structure), prototype


def test_no_two_atoms_of_a_prototype_are_too_close_and_none_is_alone(prototypes: list[Split]) -> None:
    for split in prototypes:
        for structure in split:
            shortest = min(n.nn_distance for site in structure.get_all_neighbors(6.5) for n in site)
            has_hydrogen = 1 in structure.atomic_numbers
            assert (0.9 if has_hydrogen else 1.15) < shortest < 5.5, structure.properties["material_id"]


def test_element_volumes_agree_with_the_reference_states_of_ase(prototypes: list[Split]) -> None:
    compared = 0
    for split in prototypes:
        for structure, prototype in zip(split, split.columns["prototype"]):
            state = reference_states[structure.atomic_numbers[0]]
            if len(set(structure.atomic_numbers)) > 1 or not state or state["symmetry"] != prototype:
                continue
            edge = state["a"]
            per_atom = {"fcc": 1 / 4, "bcc": 1 / 2, "diamond": 1 / 8, "hcp": state.get("c/a", 0) * 3**0.5 / 4}[
                prototype
            ]
            expected = edge**3 * per_atom
            assert (structure.volume / len(structure) / expected) ** (1 / 3) == pytest.approx(1, abs=0.021)
            compared += 1
    assert compared >= 40


# --- the real data sets ----------------------------------------------------------------------------------------------

COUNTS = {
    "perov5": (11356, 3787, 3785),
    "mp20": (11695, 714, 715),
    "mpts52": (11266, 500, 501),
    "carbon24": (2032, 1015, 1015),
    "mp": (28342, 4248, 6013),
}


@pytest.mark.usefixtures("data_dir")
def test_perov5_is_official_and_complete() -> None:
    splits = [load_split("perov5", split) for split in SPLITS]
    assert tuple(map(len, splits)) == COUNTS["perov5"]
    assert all(split.source.official for split in splits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mp20", "mpts52", "carbon24", "mp"])
def test_real_data_sets_have_their_known_sizes(name: str, data_dir: Path) -> None:
    for part in PARTS if name == "mp" else (name,):
        if not (data_dir / part).is_dir():
            pytest.skip(f"{part} is not in CONTSP_DATA_DIR")
    assert tuple(len(load_split(name, split)) for split in SPLITS) == COUNTS[name]


@pytest.mark.usefixtures("data_dir")
def test_cells_agree_with_a_fresh_pymatgen_parse() -> None:
    split = load_split("perov5", "test")
    path = Path(os.environ["CONTSP_DATA_DIR"]) / "perov5" / "test.csv.gz"
    rows = csv.DictReader(io.StringIO(gzip.decompress(path.read_bytes()).decode()))
    for (index, row), _ in zip(enumerate(rows), range(5)):
        with warnings.catch_warnings(action="ignore"):  # of coordinates rounded to fractions
            expected = Structure.from_str(row["cif"], fmt="cif")
        assert row["material_id"] == split.material_ids[index]
        moved = split.crystals[index].positions.numpy() - expected.cart_coords
        assert np.abs(moved).max() < 1e-10
        assert expected.atomic_numbers == split[index].atomic_numbers


@pytest.mark.parametrize("name", ["path", "blob_id", "skipped"])
def test_a_saved_split_without_a_header_entry_is_refused(tmp_path, name):
    path = tmp_path / "a.npz"
    load_split("prototypes", "train")[:2].save(path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    header = json.loads(str(arrays["header"]))
    del header[name]
    np.savez(path, **arrays | {"header": np.array(json.dumps(header))})
    with pytest.raises(ValueError, match="not a split written"):
        Split.load(path, "prototypes", "train")
