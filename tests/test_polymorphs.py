"""An answer counts if it is any known crystal of its composition; what it is compared with is what is said."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import polymorphs
import pytest
from polymorphs import answers, compare_with_known
from pymatgen.core import Lattice, Structure

from contsp_core.csp.evaluation import EvaluationConfig, evaluate_checkpoint

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.6), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
CESIUM_CHLORIDE = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
ZINC_BLENDE = Structure.from_spacegroup("F-43m", Lattice.cubic(6.0), ["Na", "Cl"], [[0, 0, 0], [0.25, 0.25, 0.25]])
MAGNESIA = Structure.from_spacegroup("Fm-3m", Lattice.cubic(4.2), ["Mg", "O"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def with_energy(structure: Structure, energy: float) -> Structure:
    copy = structure.copy()
    copy.properties["energy"] = energy
    return copy


def test_an_answer_is_the_first_sample_or_the_one_of_lowest_energy():
    samples = [with_energy(ROCK_SALT, 1.0), None, with_energy(CESIUM_CHLORIDE, -1.0)]
    first, lowest = answers(samples).values()
    assert (first, lowest) == (samples[0], samples[2])
    assert list(answers([None]).values()) == [None, None]


def test_either_form_counts_but_no_other_structure_and_no_other_composition():
    samples = [[with_energy(CESIUM_CHLORIDE, 0.0)], [with_energy(ZINC_BLENDE, 0.0)], [with_energy(MAGNESIA, 0.0)]]
    asked = [ROCK_SALT, ROCK_SALT, MAGNESIA]
    table = compare_with_known(asked, samples, [ROCK_SALT, CESIUM_CHLORIDE, MAGNESIA], n_jobs=1)
    rates = table.pivot_table("rate", ["answer", "criterion"], "against")
    assert len(table) == 2 * 2 * 3 and (table["crystals"] == 3).all()
    for criterion in ("strict", "good"):
        row = rates.loc[("k = 1", criterion)]
        assert row["the one asked for"] == pytest.approx(100 / 3) and row["any known"] == pytest.approx(200 / 3)
    assert (rates["any known"] >= rates["the one asked for"]).all()
    assert ((table["low"] <= table["rate"]) & (table["rate"] <= table["high"])).all()


def test_the_command_reads_an_evaluation(tmp_path, monkeypatch, capsys):
    settings = EvaluationConfig(source="start", n_structures=3, n_samples=2, n_jobs=1)
    found = evaluate_checkpoint("prototypes", "prototypes", tmp_path / "start", settings)
    monkeypatch.setattr(sys, "argv", ["polymorphs.py", str(tmp_path / "start"), "--output", str(tmp_path / "a.csv")])
    polymorphs.main()
    table = pd.read_csv(tmp_path / "a.csv")
    own = table[(table["against"] == "the one asked for") & (table["answer"] == "k = 1")].set_index("criterion")["rate"]
    assert own["loose"] == pytest.approx(100 * found.summary["scores"]["match_rate@1"], abs=1e-2)
    assert np.isfinite(table["rate"]).all() and "any known" in capsys.readouterr().out
    last = sorted(path.parent for path in (tmp_path / "start").glob("*/energies.json"))[-1]
    for path in last.iterdir():  # an evaluation was interrupted here
        path.unlink()
    polymorphs.main()
    assert (table["crystals"] == 3).all() and (pd.read_csv(tmp_path / "a.csv")["crystals"] == 2).all()
    monkeypatch.setattr(sys, "argv", ["polymorphs.py", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="holds no evaluation"):
        polymorphs.main()
