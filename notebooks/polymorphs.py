"""How often is an answer one of the known crystals of its composition? Perov-5 asks for one, and often there are two.

``python notebooks/polymorphs.py runs/perov5/perov5_test_perov5/chains`` (samples of ``make evaluate-perov5``) writes
``figures/04_polymorphs_perov5.csv``. Known crystals are those of all splits, the training crystals too.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from parameters import FIGURES, output_file
from pymatgen.core import Structure

from contsp_core.csp.evaluation import ENERGIES, SETTINGS, read_samples
from contsp_core.csp.metrics import CRITERIA, bootstrap_interval, evaluate_csp, matching_rms
from contsp_core.data import SPLITS, load_split, retold


def answers(samples: Sequence[Structure | None]) -> dict[str, Structure | None]:
    """The first sample, and the one of lowest energy."""
    present = [s for s in samples if s is not None and "energy" in s.properties]
    lowest = min(present, key=lambda s: s.properties["energy"], default=None)
    return {"k = 1": samples[0], f"lowest energy of {len(samples)}": lowest}


def compare_with_known(
    asked: Sequence[Structure],
    samples: Sequence[Sequence[Structure | None]],
    known: Sequence[Structure],
    n_jobs: int = -1,
) -> pd.DataFrame:
    """Match rates (%), with 95 % intervals, against the crystal asked for and against any known one.

    Args:
        asked: one crystal for each list of samples.
        known: crystals; of these count the ones that have the composition of the one asked for, and that one.
    """
    forms = defaultdict(list)
    for structure in known:
        forms[structure.composition.reduced_formula].append(structure)
    rows = []
    chosen = [answers(own) for own in samples]
    for name in chosen[0]:
        owners, references, predictions = [], [], []
        for owner, (structure, own) in enumerate(zip(asked, chosen, strict=True)):
            for reference in (structure, *forms[structure.composition.reduced_formula]):
                owners.append(owner)
                references.append(reference)
                predictions.append([own[name]])
        _, table = evaluate_csp(references, predictions, n_jobs, metre=False)
        groups = pd.Series(range(len(owners))).groupby(owners)
        for criterion in CRITERIA:
            met = pd.Series(np.isfinite(matching_rms(table, criterion)[:, 0]))
            right = {"the one asked for": met.iloc[groups.first()], "any known": met.groupby(owners).any()}
            for label, column in right.items():
                low, high = (float(end) for end in bootstrap_interval(column.to_numpy(dtype=float)))
                row = {"answer": name, "against": label, "criterion": criterion, "rate": 100 * column.mean()}
                rows.append(row | {"low": 100 * low, "high": 100 * high, "crystals": len(asked)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="made by evaluate_checkpoint")
    parser.add_argument(
        "--output", type=output_file(".csv"), help="a .csv (default figures/04_polymorphs_<data set>.csv)"
    )
    options = parser.parse_args()
    with retold(f"folder {str(options.folder)!r} holds no evaluation", OSError, ValueError, KeyError):
        settings = json.loads((options.folder / SETTINGS).read_text(encoding="utf-8"))
        dataset, split = settings["dataset"], load_split(settings["dataset"], settings["split"])
        found = [row for row, name in enumerate(split.material_ids) if (options.folder / name / ENERGIES).is_file()]
        chosen = split.select(found)
    known = [structure for name in SPLITS for structure in load_split(dataset, name)]
    samples = read_samples(options.folder, chosen.material_ids, settings["n_samples"])
    table = compare_with_known(chosen.structures, samples, known)
    output = options.output or FIGURES / f"04_polymorphs_{dataset}.csv"
    table.to_csv(output, index=False, float_format="%.3f")
    print(table.round(1).to_string(index=False))


if __name__ == "__main__":
    main()
