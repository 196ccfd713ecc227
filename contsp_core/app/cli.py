"""The command line: ``contsp predict | evaluate | audit | train``. What goes wrong is told in one line."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import math
import re
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  contsp predict SrTiO3                            crystals of one formula, in predictions/SrTiO3/
  contsp predict TiO2 --n-units 2 4 --n-samples 60 longer, in cells of two and four formula units
  contsp predict formulas.csv --minutes 5          each formula of the column 'formula', five minutes of chains at most
  contsp evaluate mp20 --n-structures 50           how often a checkpoint finds the test crystals of its data set
  contsp audit crystals/*.cif --calculator ase.calculators.emt:EMT
  contsp train --dataset perov5 --minutes 60       all that follows is for training; contsp train --help
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; a problem ends it with one line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.stderr = sys.stderr or io.StringIO()  # closed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # Å and ₃ where only ASCII is spoken
    warnings.showwarning = lambda text, *_, **__: print("warning:", *str(text).split(), file=sys.stderr)
    try:
        if given[:1] == ["train"]:
            from contsp_core.training import main as train

            return train(given[1:])
        with suppress(ValueError):  # only the main thread has signals
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is half-written is removed
        options = vars(_parser().parse_args(given))
        options.pop("command")(**options)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error}; the extra contsp_core[analysis] has what the commands need") from None
    except (MemoryError, OverflowError) as error:
        raise SystemExit(f"error: {type(error).__name__}: a number is too large") from None
    except (ValueError, OSError, ImportError, RuntimeError, Warning) as error:
        raise SystemExit(f"error: {' '.join(str(error).split())}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped; what is on disk is complete") from None


def _examples(command: str) -> dict[str, Any]:
    lines = [line for line in EXAMPLES.splitlines() if line.startswith(f"  contsp {command}")]
    return {"epilog": "\n".join(["examples:", *lines]), "formatter_class": argparse.RawDescriptionHelpFormatter}


def _parser() -> argparse.ArgumentParser:
    from contsp_core.data import DATASETS

    parser = argparse.ArgumentParser("contsp", description="Crystal structures from a learned energy.", **_examples(""))
    parser.add_argument("--version", action="version", version=f"contsp {version('contsp_core')}")
    commands = parser.add_subparsers(required=True, metavar="predict | evaluate | audit | train")
    own = commands.add_parser("predict", help="crystals of formulas, ranked, in files", **_examples("predict"))
    own.set_defaults(command=predict)
    own.add_argument("formulas", nargs="+", metavar="FORMULA|FILE.csv", help="or files with a column 'formula'")
    own.add_argument("--checkpoint", help="bundled name or file (default: mp20, or mp for what mp20 does not cover)")
    own.add_argument("--output", type=Path, default=Path("predictions"), help="folder of their folders (predictions)")
    own.add_argument("--source", default="chains", choices=("chains", "templates", "both"), help="default chains")
    own.add_argument("--n-samples", type=int, default=20, help="of each source and cell size (default 20)")
    own.add_argument(
        "--n-units", type=int, nargs="+", help="formula units, in lowest integers, of the cell (default: common ones)"
    )
    own.add_argument("--n-steps", type=int, help="of a chain (default: the checkpoint's; mp20: 300, and 100 is fast)")
    own.add_argument("--n-best", type=int, default=10, help="crystals kept (default 10)")
    own.add_argument("--minutes", type=float, help="start no more chains after so long, for each formula")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--n-jobs", type=int, default=-1, help="processes (default: all cores)")
    own.add_argument("--calculator", metavar="MODULE:CLASS", help="ASE calculator to relax and rank those kept")
    own.add_argument("--xrd", type=Path, metavar="FILE", help="measured powder pattern (Cu Kα) to rank by")
    existing = own.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="leave out formulas predicted with these settings")
    existing.add_argument("--overwrite", action="store_true", help="replace earlier predictions")
    own = commands.add_parser("evaluate", help="score a checkpoint, or CIFs, on a data set", **_examples("evaluate"))
    own.set_defaults(command=evaluate)
    own.add_argument("checkpoint", nargs="?", help="bundled name or .safetensors file; may be left out with --cifs")
    own.add_argument("--dataset", choices=DATASETS, help="default: that of the checkpoint")
    own.add_argument("--split", default="test", choices=("train", "val", "test"))
    own.add_argument("--cifs", type=Path, help="score these: <material_id>/<number>.cif, made by any program")
    own.add_argument("--output", type=Path, help="default evaluations/<checkpoint or CIFs>_<dataset>_<other settings>")
    own.add_argument("--n-structures", type=int, help="default: all")
    own.add_argument("--n-samples", type=int, help="default 20; with --cifs, as many as there are")
    own.add_argument("--n-steps", type=int, help="of a chain (default: the checkpoint's)")
    own.add_argument("--best-of", type=int, default=1, help="chains of a sample, which is that of lowest energy (1)")
    own.add_argument("--seed", type=int, default=0)
    own.add_argument("--n-jobs", type=int, default=-1, help="processes (default: all cores)")
    own = commands.add_parser("audit", help="is an energy invariant and continuous?", **_examples("audit"))
    own.set_defaults(command=audit)
    own.add_argument("files", nargs="+", type=Path, metavar="FILE", help="crystals: CIF, POSCAR, …")
    own.add_argument("--checkpoint", default="mp20", help="energy to audit (default mp20)")
    own.add_argument("--calculator", metavar="MODULE:CLASS", help="audit this ASE calculator instead")
    own.add_argument("--cutoff", type=float, help="its radius, Å (default: what its parameters say, or 3 (V/N)^⅓)")
    own.add_argument("--seed", type=int, default=0)
    commands.add_parser("train", help="train an energy; contsp train --help")
    return parser


def predict(
    formulas: Sequence[str], checkpoint: str | None, output: Path, resume: bool, overwrite: bool, **options: Any
) -> None:
    """``contsp predict``: what is wrong with the arguments is found before the first chain."""
    from contsp_core.data import find_checkpoint, load_split, retold, stamp

    given = read_formulas(formulas)
    checkpoint is None or find_checkpoint(checkpoint)  # before what takes seconds to import
    from pymatgen.core import Composition

    from contsp_core import load_model
    from contsp_core.app import files
    from contsp_core.app import prediction as search
    from contsp_core.app.calculators import load_calculator
    from contsp_core.app.powder import read_pattern
    from contsp_core.csp.candidates import TemplateLibrary

    name, pattern, output = options.pop("calculator"), options.pop("xrd"), output.absolute()
    options["n_units"] = options["n_units"] and tuple(options["n_units"])
    config = search.PredictConfig(**options)
    measured = None if pattern is None else read_pattern(pattern)
    models = {own: load_model(own) for own in ([checkpoint] if checkpoint else search.DEFAULTS)}
    origins = {own: files.identify(own) | {"calculator": name, "xrd": pattern and stamp(pattern)} for own in models}
    with warnings.catch_warnings(action="ignore"):  # of elements without electronegativity
        names = list(dict.fromkeys(Composition(Counter(numbers)).reduced_formula for numbers in given))
    chosen = {formula: search.choose_checkpoint(models, formula, config) for formula in names}
    used = {own for own, _ in chosen.values()}
    calculator = name and load_calculator(name)
    for own in used:
        if config.source != "chains" and (dataset := origins[own]["trained_on"]["dataset"]):
            origins[own]["templates"] = load_split(dataset, "train").source.blob_id
    for formula, (own, settings) in chosen.items():
        if resume and files.is_finished(output / formula):
            files.check_same(output / formula, origins[own] | {"settings": asdict(settings)})
        else:
            files.check_replaceable(output / formula, overwrite or resume)
    with retold(f"output {str(output)!r} cannot be written", OSError):
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    libraries, failed = {}, []
    if config.source != "chains":
        print("reading the training crystals …", file=sys.stderr)
        libraries = {own: TemplateLibrary.of_checkpoint(own) for own in used}
    for formula, (own, settings) in chosen.items():
        if resume and files.is_finished(output / formula):  # perhaps by another process, meanwhile
            print(f"{formula}: kept as it is in {output / formula}/", file=sys.stderr)
            continue
        model, library = models[own], libraries.get(own)
        if own != next(iter(models)):
            print(f"{formula}: warning: {search.FALLBACK}", file=sys.stderr)
        species, doubts = search.plan(model, formula, settings)
        for text in (search.describe_cells(model, species), *(f"warning: {doubt}" for doubt in doubts)):
            print(f"{formula}: {text}", file=sys.stderr)
        try:
            prediction = search.predict(model, formula, settings, library, progress=True, measured=measured)
            prediction = prediction.relaxed(calculator, config.n_jobs) if calculator else prediction
            prediction = prediction if measured is None else prediction.compared(measured)
            without = bool(calculator) and "calculator_energy" not in prediction.table
            origin = files.provenance(origins[own], settings, prediction) | {"calculator_failed": without}
            folder = files.write_prediction(prediction, output / formula, origin, overwrite or resume)
            for doubt in prediction.doubts[len(doubts) :]:
                print(f"{formula}: warning: {doubt}", file=sys.stderr)
            for reason in dict.fromkeys(filter(None, prediction.table.get("calculator_error", []))):
                print(f"{formula}: warning: {name} failed: {reason}", file=sys.stderr)
            if without:
                raise ValueError(f"{name} failed on all crystals, which are in {folder} as they were found")
        except (ValueError, OSError, RuntimeError, MemoryError) as error:  # the other formulas do not wait for this one
            failed.append(formula)
            reason = " ".join(str(error).split()) or "a number is too large for the memory"
            print(f"{formula}: error: {reason}", file=sys.stderr)
            continue
        with suppress(OSError):  # nobody reads any more
            made = f"{prediction.n_made} candidates by {own}, {folder}/"
            print(f"\n{formula} ({made}):\n{prediction.summary()}", flush=True)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, for the reasons above")


def read_formulas(entries: Sequence[str]) -> list[list[int]]:
    """Atomic numbers of formulas, given or in CSV files; a ValueError names file and row of one that is none."""
    from contsp_core.data import parse_formula, retold

    found = []
    for entry in entries:
        if not entry.lower().endswith(".csv"):
            found.append(parse_formula(entry))
            continue
        with retold(f"{entry!r} cannot be read as CSV", OSError, ValueError, csv.Error):
            text = Path(entry).read_text(encoding="utf-8-sig")
            rows = list(table := csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True))
        if not rows or "formula" not in rows[0]:
            columns = ", ".join(map(str, table.fieldnames or ["none"]))
            raise ValueError(f"{entry!r} has {len(rows)} rows of {columns}, expected some, with a column 'formula'")
        for number, row in enumerate(rows, start=1):
            with retold(f"{entry!r}, row {number}", ValueError):
                if None in row or row["formula"] is None:
                    raise ValueError(f"{len(table.fieldnames or ())} columns have names, but the row has other fields")
                found.append(parse_formula(row["formula"]))
    return found


def evaluate(
    checkpoint: str | None, dataset: str | None, cifs: Path | None, output: Path | None, **options: Any
) -> None:
    """``contsp evaluate``: a table of scores; all of them as JSON, and the samples, are in the output folder."""
    from contsp_core.data import find_checkpoint

    if checkpoint is None and (cifs is None or dataset is None):
        raise ValueError("checkpoint is missing, expected one, or --cifs and --dataset")
    if cifs and (options["n_steps"] is not None or options["best_of"] != 1):
        raise ValueError("--n-steps and --best-of are for the chains of a checkpoint, not for --cifs")
    checkpoint is None or find_checkpoint(checkpoint)
    from contsp_core.checkpoints import read_settings
    from contsp_core.csp.evaluation import SUMMARY, EvaluationConfig, evaluate_checkpoint, evaluate_cifs
    from contsp_core.csp.metrics import score_table

    settings = EvaluationConfig(progress=True, **options)
    if not (dataset := dataset or read_settings(str(checkpoint)).get("dataset")):
        raise ValueError(f"checkpoint {checkpoint!r} does not say its data set, expected --dataset")
    given = {name: options[name] for name in ("split", "n_samples", "n_steps", "best_of", "seed")}
    own = [f"_{name}_{value}" for name, value in given.items() if value != getattr(EvaluationConfig, name)]
    source = cifs.absolute().name if cifs else Path(str(checkpoint)).stem
    output = output or Path("evaluations") / "".join([source, "_", dataset, *own])
    if cifs is None:
        found = evaluate_checkpoint(checkpoint, dataset, output, settings)
    else:
        found = evaluate_cifs(cifs, dataset, output, settings, checkpoint)
    n_samples, method = found.summary["scores"]["n_samples"], found.summary["settings"]["method"]
    crystals = f"{len(found.table)} crystals of {dataset}/{found.references.split}"
    crystals += f" ({n} with the formula of a training crystal)" if (n := found.summary["data"]["n_seen"]) else ""
    print(f"{method}: {crystals}, {n_samples} samples of each")
    counts = {name: found.summary["scores"][f"n_{name}"] for name in ("missing", "timed_out", "wrong_composition")}
    if any(counts.values()):
        print("samples that match nothing:", ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items()))
    print(f"{score_table(found.summary['scores']).to_string()}\nmore in {output / SUMMARY}")


def audit(files: Sequence[Path], checkpoint: str, calculator: str | None, cutoff: float | None, seed: int) -> None:
    """``contsp audit``: the table of :func:`contsp_core.invariance.audit`."""
    from pymatgen.core import Structure
    from pymatgen.io.vasp.inputs import BadPoscarWarning

    from contsp_core.data import find_checkpoint, parse_cifs, retold

    if not 0 <= seed <= 2**62:
        raise ValueError(f"seed is {seed}, expected 0 … {2**62}")
    if cutoff is not None and not (calculator and 0 < cutoff < math.inf):
        raise ValueError(f"cutoff is {cutoff}, expected a length > 0, for --calculator")
    calculator or find_checkpoint(checkpoint)
    structures = []
    for path in files:
        with retold(f"{str(path)!r} cannot be read as a crystal", Exception):  # pymatgen raises many kinds
            if re.search(r"\.cif(\.|$)", path.name, re.IGNORECASE):
                open_file = gzip.open if path.suffix.lower() == ".gz" else open
                with open_file(path, "rt", encoding="utf-8", errors="replace") as file:
                    (crystal,) = parse_cifs([file.read()])
                if isinstance(crystal, str):
                    raise ValueError(crystal)
                structures += crystal.to_structures()
            else:
                with warnings.catch_warnings(action="error", category=BadPoscarWarning):  # elements are not named
                    structures.append(Structure.from_file(path))
        structures[-1].properties = {"material_id": str(path)}
    from contsp_core import Crystals, load_model
    from contsp_core.app.calculators import load_calculator
    from contsp_core.invariance import audit as measure
    from contsp_core.invariance import graph_cutoff

    for path, structure in zip(files, structures):
        with retold(f"{str(path)!r} cannot be audited", ValueError):
            Crystals.from_structures([structure])
    energy: Any = load_calculator(calculator) if calculator else load_model(checkpoint)
    radii = graph_cutoff(energy, Crystals.from_structures(structures), cutoff).tolist()
    table = measure(energy, structures, seed=seed, cutoff=cutoff, progress=sys.stderr.isatty())
    table = table.rename(columns={"material_id": "worst crystal"})
    names = [f"{path} ({structure.composition.reduced_formula})" for path, structure in zip(files, structures)]
    reach = " … ".join(dict.fromkeys(f"{radius:.3g}" for radius in (min(radii), max(radii))))
    print(f"{calculator or checkpoint} on {', '.join(names)}; cutoff looked for at {reach} Å")
    print(table.drop(columns="index").to_string(index=False))


if __name__ == "__main__":
    main()
