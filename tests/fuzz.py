"""What do readers make of hostile bytes? Each is fuzzed with coverage guidance, by atheris (libFuzzer).

``python tests/fuzz.py cif 60 runs/fuzz`` fuzzes one of ``READERS`` for 60 s; ``test_soak.py`` runs them all. A reader
must give a sound result, or refuse by a ValueError in one line, within 10 s of CPU time and 256 MiB more memory than
before. Inputs it fails on are kept in runs/fuzz/findings, the shortest of each kind beside what went wrong; libFuzzer
adds those that stop the process: ``timeout-…`` after a minute, ``oom-…`` above 4 GiB.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import resource
import sys
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

INSTRUMENTED = ("contsp_core.data", "contsp_core.checkpoints", "pymatgen.io.cif", "pymatgen.core.composition")
MAX_CPU_S = 10
MAX_MEMORY_MB = 256
FORMULAS = ("BaTiO3", "NaCl", "Ca(OH)2", "Cu[NH3]4SO4", "Fe2.0O3", "{H2O}16", "Y3N@C80", "Es2", "H2O2")


def problem(name: str, content: bytes, folder: Path) -> str | None:
    """How a reader fails on these bytes, or None if it gives a sound result or refuses as it should."""
    started, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refusal = ""
    try:
        refusal = READERS[name](content, folder) or ""
    except Exception as error:
        refusal = str(error)
        if type(error) is not ValueError:  # a UnicodeDecodeError is one too, and tells the user nothing
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} in {Path(where.filename).name}, {where.name}: {refusal[:200]}"
        if not refusal:
            return "ValueError without a message"
    if len(refusal.splitlines()) > 1:
        return f"message of several lines: {refusal[:200]!r}"
    if "MemoryError" in refusal:
        return f"out of memory: {refusal[:200]}"
    if (seconds := time.process_time() - started) > MAX_CPU_S:
        return f"takes {seconds:.0f} s"
    if (grown := (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) >> 10) > MAX_MEMORY_MB:
        return f"takes {grown} MiB"
    return None


def require(fact: bool, what: str) -> None:
    """A result that is not sound is a finding."""
    if not fact:
        raise AssertionError(what)


def read_cif(content: bytes, folder: Path) -> str | None:
    """A crystal, or the reason why there is none."""
    from contsp_core.data import parse_cifs

    (result,) = parse_cifs([content.decode("utf-8", "replace")])
    if isinstance(result, str):
        require(bool(result), "no reason given")
        return result
    require(len(result) == 1, "not one crystal")
    return None


def read_csv(content: bytes, folder: Path) -> None:
    """A split, and the same one from the cache."""
    from contsp_core.data import load_split

    (folder / "prototypes").mkdir(exist_ok=True)
    (folder / "prototypes" / "train.csv").write_bytes(content)
    os.environ |= {"CONTSP_DATA_DIR": str(folder), "CONTSP_CACHE_DIR": str(folder / "cache")}
    try:
        first, again = (load_split("prototypes", "train", on_error="skip") for _ in range(2))
    finally:
        for file in (folder / "cache").rglob("*.npz"):
            file.unlink()
    check_split(first)
    require(first.material_ids == again.material_ids and first.skipped == again.skipped, "another split from the cache")
    require(first.crystals.positions.equal(again.crystals.positions), "other positions from the cache")


def read_split(content: bytes, folder: Path) -> None:
    """A split saved as .npz: these bytes, or the arrays that they list as JSON."""
    from contsp_core.data import Split

    if content.startswith(b"{"):
        try:
            listed = json.loads(content)
            arrays = {name: np.array(values) for name, values in listed.items() if name != "header"}
            np.savez(folder / "train.npz", header=np.array(json.dumps(listed["header"])), **arrays)
        except Exception:
            return  # no arrays, so nothing to read
    else:
        (folder / "train.npz").write_bytes(content)
    check_split(Split.load(folder / "train.npz", "prototypes", "train"))


def check_split(split) -> None:
    """One name and one value of each column for every crystal, and texts that can be shown."""
    n = len(split)
    require(len(split.material_ids) == n, f"{len(split.material_ids)} names for {n} crystals")
    require(all(column.shape[:1] == (n,) for column in split.columns.values()), "a column of another length")
    require(all(isinstance(text, str) for pair in split.skipped for text in pair), "a reason that is no text")
    require(isinstance(split.source.path, str) and isinstance(split.source.blob_id, str), "a source that is no text")
    require(len(split.structures) == n, "other structures")


def read_checkpoint(content: bytes, folder: Path) -> None:
    """A model with its settings, of these bytes, or of a header, a line break and numbers, put together to fit."""
    from contsp_core.checkpoints import load_model, read_settings

    if content.startswith(b"{"):
        header, _, body = content.partition(b"\n")
        content = len(header).to_bytes(8, "little") + header + body
    (folder / "model.safetensors").write_bytes(content)
    model = load_model(folder / "model.safetensors")
    require(all(weight.isfinite().all() for weight in model.state_dict().values()), "weights that are not finite")
    require(isinstance(read_settings(folder / "model.safetensors"), dict), "settings that are no dict")


def read_formula(content: bytes, folder: Path) -> None:
    """Atomic numbers."""
    from contsp_core.data import parse_formula

    numbers = parse_formula(content.decode("utf-8", "surrogateescape"))
    require(0 < len(numbers) <= 1000 and set(numbers) <= set(range(1, 101)), f"atomic numbers {numbers[:10]}")


READERS: dict[str, Callable[[bytes, Path], str | None]] = {
    "cif": read_cif,
    "csv": read_csv,
    "split": read_split,
    "checkpoint": read_checkpoint,
    "formula": read_formula,
}


def seeds(name: str, folder: Path) -> list[bytes]:
    """Small valid inputs of a reader; files are made in the folder."""
    from pymatgen.core import Lattice, Structure
    from pymatgen.io.cif import CifWriter

    from contsp_core import Crystals
    from contsp_core.checkpoints import save_checkpoint
    from contsp_core.data import Source, Split
    from contsp_core.energy import EnergyConfig
    from contsp_core.training import initial_model

    salt = Structure.from_spacegroup(10, Lattice.monoclinic(3, 4, 5, 95), ["Na+", "Cl-"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    metal = Structure(Lattice.hexagonal(3.2, 5.2), ["Zn", "Cu"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.38]])
    with warnings.catch_warnings(action="ignore"):  # spglib tells pymatgen of changes to come
        cifs = [str(CifWriter(salt, symprec=0.1)), str(CifWriter(metal))]
    if name == "formula":
        return [text.encode() for text in FORMULAS]
    if name == "cif":
        return [text.encode() for text in cifs]
    if name == "csv":
        text = cifs[1].replace('"', '""')
        rows = "".join(f'{row},agm-{row},{0.5 * row},"{text}",NaN\n' for row in range(2))
        return [f",material_id,energy,cif,formula\n{rows}".encode(), f'material_id,cif\r\na,"{text}"\r\n'.encode()]
    if name == "split":
        crystals = Crystals.from_structures([salt, metal]).to(torch.float64)
        columns = {"energy": crystals.volume.numpy(), "formula": crystals.volume.numpy().astype(str)}
        source = Source("train.csv", "0" * 40, False)
        split = Split("prototypes", "train", ["a", "b"], crystals, source, columns, (("row 3", "no crystal"),))
        split.save(folder / "seed.npz")
        with np.load(folder / "seed.npz") as file:
            arrays = {key: file[key].tolist() for key in file.files}
        text = json.dumps(arrays | {"header": json.loads(arrays["header"])})
        return [(folder / "seed.npz").read_bytes(), text.encode()]
    levels = {"form": "residual", "noise_min": 0.02, "noise_max": 1.5}
    configs = [EnergyConfig(width=2, n_conv=1, n_fc=1, n_basis=2, **more) for more in ({}, levels)]
    crystals = Crystals.from_structures([metal])
    paths = [folder / f"seed_{number}.safetensors" for number in range(2)]
    for path, config in zip(paths, configs, strict=True):
        save_checkpoint(path, initial_model(crystals, config, seed=0), {"dataset": "prototypes"})
    contents = [path.read_bytes() for path in paths]
    ends = [8 + int.from_bytes(content[:8], "little") for content in contents]
    return contents + [content[8:end] + b"\n" + content[end:] for content, end in zip(contents, ends, strict=True)]


def forget_checksums() -> None:
    """No mutation passes a checksum: without them, the fuzzer gets at what they protect."""
    from contsp_core import checkpoints

    digest, sealed = checkpoints.digest, hashlib.sha256().hexdigest()

    def constant(*arguments: object) -> str:
        digest(*arguments)  # must not fail either
        return sealed

    checkpoints.digest = constant
    zipfile.ZipExtFile._update_crc = lambda *_: None


def dictionary(contents: list[bytes]) -> str:
    """The words of the seeds, for libFuzzer to put together anew."""
    words = {word for content in contents for word in re.findall(rb"[A-Za-z_.\-]{3,40}", content)}
    return "".join(f'"{word.decode()}"\n' for word in sorted(words))


def main(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one reader; never returns."""
    import atheris

    packages = sorted({module.split(".")[0] for module in INSTRUMENTED})
    with atheris.instrument_imports(include=packages, exclude=["contsp_core.kernels"]):
        for module in INSTRUMENTED:
            importlib.import_module(module)
    from contsp_core import data

    data.SERIAL_ROWS = sys.maxsize  # in this process
    logging.disable()
    warnings.simplefilter("ignore")
    forget_checksums()
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))  # the machine is not at stake
    corpus, findings = folder / "corpus", folder / "findings"
    for path in (corpus, findings):
        path.mkdir(parents=True, exist_ok=True)
    contents = seeds(name, folder)
    for number, content in enumerate(contents):
        (corpus / f"seed-{number}").write_bytes(content)
    (folder / "dictionary").write_text(dictionary(contents))
    os.fsync = lambda _: None  # files here need not outlive the power

    READERS[name] = atheris.instrument_func(READERS[name])

    def one_input(content: bytes) -> None:
        if what := problem(name, content, folder):
            kind = hashlib.sha256(re.sub(r"\d", "", what[:60]).encode(errors="replace")).hexdigest()[:8]
            path = findings / f"{name}-{kind}"
            if not path.exists() or len(content) < path.stat().st_size:
                path.write_bytes(content)
                path.with_suffix(".txt").write_text(what, encoding="utf-8", errors="backslashreplace")

    options = {
        "max_total_time": seconds,
        "timeout": 6 * MAX_CPU_S,  # wall time: a busy machine may be slow
        "rss_limit_mb": 4096,
        "max_len": 100 + max(map(len, contents)),
        "seed": 1,
        "dict": folder / "dictionary",
        "artifact_prefix": f"{findings}/",
        "print_final_stats": 1,
        "report_slow_units": 6 * MAX_CPU_S,
    }
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
