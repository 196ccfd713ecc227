"""Crystals like those of the training, and others: who is who, and what is found of each."""

from __future__ import annotations

import covered
import pandas as pd
import pytest

from contsp_core import load_model
from contsp_core.csp.evaluation import EvaluationConfig, evaluate_checkpoint


def test_elements_stoichiometry_and_size_are_those_of_training_crystals():
    model = load_model("mp20")
    asked = {("Mg4O4", 8): True, ("MgO", 48): False, ("Li4Fe4P4O16", 28): False}
    assert {pair: covered.is_covered(model, *pair) for pair in asked} == asked


def test_rates_are_of_one_sample_and_of_any():
    rows = {"rms": ["[0.1, null]", "[null, null]"], "strict": ["[false, false]", "[false, false]"]}
    found = covered.rates(pd.DataFrame(rows))
    assert found == {"crystals": 2, "samples": 2, "sample": 25, "strict sample": 0, "any": 50, "strict any": 0}


def test_the_command_reads_evaluations(tmp_path, capsys):
    settings = EvaluationConfig(source="start", n_structures=4, n_samples=2, n_jobs=1)
    evaluate_checkpoint("prototypes", "prototypes", tmp_path / "start", settings)
    covered.main([str(tmp_path / "start"), "--checkpoint", "prototypes"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert {row[1] for row in rows} <= {"covered", "beyond"} and sum(int(row[2]) for row in rows) == 4
    assert all(row[0] == "start" and row[3] == "2" for row in rows)
    with pytest.raises(ValueError, match="nowhere' holds no evaluation"):
        covered.main([str(tmp_path / "nowhere")])
