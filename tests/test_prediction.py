"""Prediction: what is planned, made and written for a formula; and the command line on top of it."""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.metadata import version
from unittest.mock import Mock

import ase.io
import numpy as np
import pandas as pd
import pytest
import ranking
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.neighborlist import neighbor_list
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Composition, Lattice, Structure

from contsp_core import Crystals, load_model
from contsp_core.app import cli
from contsp_core.app.files import WRITTEN, identify, provenance, write_prediction
from contsp_core.app.powder import agreement, powder_pattern, read_pattern
from contsp_core.app.prediction import (
    DEFAULTS,
    PredictConfig,
    choose_checkpoint,
    choose_units,
    confidence,
    describe_cells,
    doubts,
    plan,
    predict,
    prototype,
    tabulate,
)
from contsp_core.checkpoints import save_checkpoint
from contsp_core.csp.candidates import TemplateLibrary, space_group, standardise
from contsp_core.data import CHECKPOINTS, DATA_DIR, choose, load_split
from contsp_core.energy import ContinuousCGCNN, EnergyConfig

NACL, SRTIO3 = [11, 17], [38, 22, 8, 8, 8]
ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
FACES = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
CAESIUM = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
QUICK = PredictConfig(n_samples=3, n_steps=6, n_units=(1, 2), n_jobs=1, n_best=3)


@pytest.fixture(scope="module")
def model():
    return load_model("prototypes")


@pytest.fixture(scope="module")
def library():
    return TemplateLibrary(load_split("prototypes", "train"))


@pytest.fixture(scope="module")
def prediction(model):
    return predict(model, "NaCl", QUICK)


@pytest.fixture(scope="module")
def written(prediction, tmp_path_factory):
    origin = provenance(identify("prototypes"), QUICK, prediction)
    return write_prediction(prediction, tmp_path_factory.mktemp("out") / "NaCl", origin)


# What is tried


def test_units_are_the_commonest_among_training_crystals_of_the_stoichiometry(model):
    split = load_split("prototypes", "train")
    counts = {}
    for species in split.species:
        composition = sorted(np.unique(species, return_counts=True)[1])
        if len(composition) == 2 and composition[0] == composition[1]:
            counts[composition[0]] = counts.get(composition[0], 0) + 1
    best = sorted(counts, key=counts.get, reverse=True)[:3]
    assert list(choose_units(model, NACL)) == sorted(best)
    strange = [number for number in range(3, 11) for _ in range(number)]
    assert choose_units(model, strange) == (1,)
    unknown = ContinuousCGCNN(EnergyConfig())  # nothing is known of its training
    assert choose_units(unknown, NACL) == (1, 2, 4)
    assert choose_units(unknown, [6] * 27 + [1] * 35) == (1, 2)  # four would have more than 200 atoms


def test_a_cell_holds_whole_formula_units_however_the_formula_is_written(model):
    for formula in ("NaCl", "Na3Cl3", "ClNa"):
        species, _ = plan(model, formula, PredictConfig(n_units=(2, 1)))
        assert [sorted(numbers) for numbers in species] == [NACL, sorted(NACL * 2)]


@pytest.mark.parametrize(
    ("unit", "n_units", "expected"),
    [
        (NACL, (1,), []),
        ([87, 17], (1,), ["no training crystal has Fr: energies are guesses"]),
        ([11] * 7 + [17] * 5, (1,), ["no training crystal has this stoichiometry"]),
        (NACL, (90,), ["cells of 180 atoms are larger than those of all training crystals"]),
    ],
)
def test_what_the_training_crystals_do_not_cover_is_said(model, unit, n_units, expected):
    found = doubts(model, unit, n_units)
    assert len(found) == len(expected)
    assert all(text in sentence for text, sentence in zip(expected, found))


def test_templates_are_counted_for_each_size_of_cell(model):
    counts = [0, 0]
    for numbers in load_split("prototypes", "train").species:
        amounts = np.unique(numbers, return_counts=True)[1].tolist()
        for place, n in enumerate((1, 2)):
            counts[place] += amounts == [n, n] and sorted(numbers) != sorted(NACL * n)
    assert 0 < counts[1] < counts[0]
    assert describe_cells(model, [NACL, NACL * 2, NACL * 19]).endswith(f": 2 ({counts[0]}), 4 ({counts[1]}), 38 (0)")


# What is found


def test_crystals_are_ranked_and_each_stands_for_those_that_equal_it(prediction, model):
    assert prediction.n_made == 6
    assert sum(map(len, prediction.groups)) <= 6
    energies = prediction.table["energy"]
    assert energies.is_monotonic_increasing
    assert model(Crystals.from_structures(prediction.best)).tolist() == pytest.approx(energies.tolist(), abs=1e-4)
    for group in prediction.groups:
        assert all(StructureMatcher().fit(group[0], other) for other in group)


def test_the_judge_ranks_and_the_seed_counts(model):
    judge, judged = copy.deepcopy(model), copy.deepcopy(model)
    judge.fc_final.weight.mul_(-1)
    vars(judged)["judge"] = judge
    quick = replace(QUICK, n_units=(1,), n_samples=2)
    found = predict(judged, "NaCl", quick)
    expected = judge(Crystals.from_structures(found.best))
    assert found.table["energy"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    energies = [predict(model, "NaCl", replace(quick, seed=seed)).table["energy"].tolist() for seed in (0, 0, 1)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-3)
    assert energies[0] != pytest.approx(energies[2], abs=1e-3)


def test_a_time_limit_ends_the_search_between_rounds_and_changes_no_sample(model):
    few = predict(model, "NaCl", PredictConfig(n_samples=16, n_steps=2, n_units=(1,), minutes=1e-6, n_jobs=1))
    assert few.n_made == 8
    eight = predict(model, "NaCl", PredictConfig(n_samples=8, n_steps=2, n_units=(1,), n_jobs=1))
    assert eight.table["energy"].tolist() == pytest.approx(few.table["energy"].tolist(), abs=1e-4)


def test_the_result_does_not_depend_on_the_number_of_processes(model, prediction):
    shared = predict(model, "NaCl", PredictConfig(**vars(QUICK) | {"n_jobs": 2}))
    assert shared.table["energy"].tolist() == pytest.approx(prediction.table["energy"].tolist(), abs=1e-3)
    assert shared.table["space group"].tolist() == prediction.table["space group"].tolist()


def test_confidence_counts_all_crystals_found_however_many_are_kept(model, prediction, monkeypatch):
    parameters = (1.0, 2.0, -1.0)
    monkeypatch.setattr(model, "sampling", replace(model.sampling, n_steps=3))
    asked = replace(QUICK, n_steps=None, n_units=(1,), n_samples=6, confidence=parameters)
    assert "confidence" not in predict(model, "NaCl", asked).table  # too few chains
    monkeypatch.setattr("contsp_core.app.prediction.N_CALIBRATED", 6)
    assert "confidence" not in predict(model, "NaCl", replace(asked, n_steps=4)).table  # of a length that was asked for
    assert "confidence" not in predict(model, "FrCl", asked).table  # of an element that was never seen
    tables = [predict(model, "NaCl", replace(asked, n_best=n)).table for n in (1, 6)]
    assert tables[0]["confidence"].iloc[0] == pytest.approx(tables[1]["confidence"].iloc[0], abs=1e-3)
    shares = tables[1]["found"].to_numpy() / 6
    expected = confidence(tables[1]["energy"].to_numpy(), shares, parameters)
    assert tables[1]["confidence"].tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert "confidence" not in prediction.table


@pytest.mark.parametrize("n_units", [(1,), (1, 2), (1, 2, 3)])
def test_confidence_ranks_cells_of_one_size_and_needs_chains_enough_of_each(model, monkeypatch, n_units):
    """Three chains found rock salt, one the caesium chloride type of lower energy; two others are far too small."""
    monkeypatch.setattr("contsp_core.app.prediction.prototype", space_group)  # a name in less time
    monkeypatch.setattr("contsp_core.app.prediction.N_CALIBRATED", 3)
    caesium = Structure(Lattice.cubic(3.4), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3], properties={"energy": -1.0})
    salt = ROCK_SALT.copy(properties={"energy": -0.9})
    shrunk = Structure(Lattice.cubic(1.6), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3], properties={"energy": -8.0})
    dense = Lattice([[0, 1.2, 1.2], [1.2, 0, 1.2], [1.2, 1.2, 0]])  # zinc blende
    heap = Structure(dense, ["Na", "Cl"], [[0, 0, 0], [0.25] * 3], properties={"energy": -9.0})
    monkeypatch.setattr("contsp_core.app.prediction._settle", lambda *_: [caesium, salt, salt, salt, heap, shrunk])
    monkeypatch.setattr(model, "sampling", replace(model.sampling, n_steps=1))
    config = PredictConfig(n_samples=1, n_units=n_units, n_jobs=1, confidence=(2.0, 1.0, -5.0))
    table = predict(model, "NaCl", config).table
    assert table["energy"].tolist() == ([-0.9, -1.0, -9.0] if len(n_units) == 1 else [-1.0, -0.9, -9.0])
    if len(n_units) == 3:  # six crystals are two of each size
        assert "confidence" not in table
        return
    salt, caesium = confidence(np.array([-0.9, -1.0]), np.array([3, 2]) / 6, (2.0, 1.0, -5.0))
    assert salt > caesium
    assert table["confidence"].tolist() == pytest.approx(
        [salt, caesium, 0] if len(n_units) == 1 else [caesium, salt, 0]
    )


def test_a_stop_ends_the_search_after_the_batch_in_progress_and_changes_no_sample(model, monkeypatch):
    monkeypatch.setattr("contsp_core.app.prediction.prototype", space_group)  # a name in less time
    monkeypatch.setattr("contsp_core.csp.candidates.N_DESCENT", 2)
    monkeypatch.setattr("contsp_core.app.prediction.N_CALIBRATED", 9)
    monkeypatch.setattr(model, "sampling", replace(model.sampling, n_steps=2))
    config = PredictConfig(n_samples=24, n_units=(1,), n_jobs=1, confidence=(1.0, 2.0, -1.0))
    answers = iter([False, True])
    few = predict(model, "NaCl", config, stop=lambda: next(answers))
    assert few.n_made == 8
    assert "confidence" not in few.table  # eight chains are fewer than it was fitted for
    eight = predict(model, "NaCl", replace(config, n_samples=8))
    assert eight.table["energy"].tolist() == pytest.approx(few.table["energy"].tolist(), abs=1e-4)
    with pytest.raises(ValueError, match="formula 'NaCl' was stopped too early: nothing was found"):
        predict(model, "NaCl", config, stop=lambda: True)


def test_crystals_with_atoms_too_close_rank_below_the_others_and_are_marked(model, prediction, monkeypatch):
    monkeypatch.setattr("contsp_core.app.prediction.prototype", space_group)  # a name in less time
    crowded = Structure(Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [0.2, 0, 0]], properties={"energy": -99.0})
    sound = Structure(ROCK_SALT.lattice, ROCK_SALT.species, ROCK_SALT.frac_coords, properties={"energy": 0.0})
    monkeypatch.setattr("contsp_core.app.prediction._settle", lambda *_: [crowded, sound])
    found = predict(model, "NaCl", replace(QUICK, n_samples=1))
    assert found.table["too close"].tolist() == [False, True]
    assert found.table["energy"].tolist() == [0.0, -99.0]
    assert predict(model, "NaCl", replace(QUICK, n_samples=1, n_best=1)).best == [sound]
    for agreements in ([0.5, 0.5], [0.9, 0.1], [0.1, 0.9]):
        values = iter(agreements)
        monkeypatch.setattr("contsp_core.app.prediction.agreement", lambda *_, values=values: next(values))
        assert found.compared(np.zeros((1, 2))).best == [sound, crowded]
    assert "too close: atoms nearer than 0.6 of the sum of their covalent radii" in found.summary()

    class Flat(Calculator):
        """Prefers the crowded crystal, and moves nothing."""

        def __init__(self):
            super().__init__()
            self.implemented_properties = ["energy", "forces", "stress"]

        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            self.results = {"energy": float(len(self.atoms)), "forces": 0 * self.atoms.positions}
            self.results["stress"] = np.zeros(6)
            if len(self.atoms) == 2:
                self.results["energy"] = -99.0

    assert found.relaxed(Flat()).table["calculator_energy"].tolist() == [1.0, -49.5]
    assert "too close" not in prediction.table and "too close" not in prediction.summary()


@pytest.mark.parametrize(("found", "alone"), [([CAESIUM, ROCK_SALT], True), ([ROCK_SALT, ROCK_SALT, CAESIUM], False)])
def test_a_search_that_found_nothing_twice_says_so(model, monkeypatch, found, alone):
    monkeypatch.setattr("contsp_core.app.prediction.prototype", space_group)  # a name in less time
    made = [Structure.from_sites(list(structure), properties={"energy": 0.0}) for structure in found]
    monkeypatch.setattr("contsp_core.app.prediction._settle", lambda *_: [*made, overlapping()])  # that one is dropped
    doubted = predict(model, "NaCl", replace(QUICK, n_samples=1)).doubts
    assert any("no crystal was found twice" in doubt for doubt in doubted) is alone


def test_nothing_but_overlapping_atoms_is_an_error_that_says_so(model, monkeypatch):
    monkeypatch.setattr("contsp_core.app.prediction._settle", lambda *_: [overlapping()])
    with pytest.raises(ValueError, match=r"atoms overlap in all of \d candidates"):
        predict(model, "NaCl", QUICK)


def test_templates_join_the_chains_and_are_counted_apart(model, library):
    config = PredictConfig(source="both", n_samples=2, n_steps=4, n_units=(1,), n_jobs=1)
    table = predict(model, "NaCl", config, library).table
    assert (table["chains"] + table["templates"]).tolist() == table["found"].tolist()
    assert table[["chains", "templates"]].sum().tolist() == [2, 2]


@pytest.mark.parametrize(
    ("structure", "name"),
    [
        (ROCK_SALT, "Halite, Rock Salt (B1)"),
        (Structure(Lattice.cubic(3), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]), "B2"),
        (Structure(Lattice.from_parameters(3, 4, 5, 80, 95, 100), ["Cs", "Cl"], [[0, 0, 0], [0.4, 0.3, 0.2]]), ""),
    ],
)
def test_prototypes_are_called_by_their_names(structure, name):
    assert prototype(structure) == name


def overlapping():
    structure = Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]])
    structure.properties["energy"] = 0.0
    return structure


def test_confidence_is_a_probability_that_grows_with_agreement_and_falls_with_energy():
    energies, shares, parameters = np.array([-1.0, -0.9, -0.9]), np.array([0.5, 0.4, 0.1]), (1.0, 5.0, -1.0)
    chances = confidence(energies, shares, parameters)
    weights = np.array([0.5, 0.4 * np.exp(-0.5), 0.1 * np.exp(-0.5)])
    assert chances.tolist() == pytest.approx((weights / (np.exp(-1) + weights.sum())).tolist())
    assert confidence(energies - 1e3, shares, parameters).tolist() == pytest.approx(chances.tolist())
    assert confidence(np.zeros(1), np.ones(1), (1, 1, 0)).tolist() == [0.5]


def test_the_fit_recovers_what_made_the_data():
    truth, rng, rows = (0.8, 6.0, -1.0), np.random.default_rng(0), []
    for formula in range(600):
        energies, shares = np.sort(rng.normal(0, 0.3, 5)), rng.dirichlet(np.ones(5))
        chances = confidence(energies, shares, truth)
        right = rng.choice(6, p=[*chances, 1 - chances.sum()])
        rows += [(formula, e, s, place == right) for place, (e, s) in enumerate(zip(energies, shares))]
    table = pd.DataFrame(rows, columns=["formula", "energy", "share", "right"])
    assert ranking.fit(table).tolist() == pytest.approx(truth, rel=0.3, abs=0.3)


def test_the_confidence_is_fitted_to_what_a_prediction_finds(model, tmp_path):
    """In cells of all sizes that are tried, not of the right one; what was found already is kept."""
    options = argparse.Namespace(dataset="prototypes", checkpoint="prototypes", n_structures=2, n_samples=2)
    table = ranking.predict_all(options, tmp_path)
    split = load_split("prototypes", "val")
    for number, crystal in enumerate(split.select(choose(range(len(split)), 2)).structures):
        found = predict(model, crystal.composition.reduced_formula, PredictConfig(n_samples=2, n_best=2, n_jobs=1))
        rows = table[table["formula"] == number].sort_values("energy").head(2)
        assert rows["energy"].tolist() == pytest.approx(found.table["energy"].tolist(), rel=1e-3)
        assert rows["share"].tolist() == pytest.approx([len(group) / found.n_made for group in found.groups])
    (tmp_path / "00001.csv").unlink()
    kept = (tmp_path / "00000.csv").stat().st_mtime_ns
    pd.testing.assert_frame_equal(ranking.predict_all(options, tmp_path), table, rtol=1e-3)
    assert (tmp_path / "00000.csv").stat().st_mtime_ns == kept
    options.n_samples = 3
    with pytest.raises(ValueError, match="samples made with n_samples=2, expected 3"):
        ranking.predict_all(options, tmp_path)


# Powder patterns


def test_peaks_obey_braggs_law():
    peaks = powder_pattern(ROCK_SALT)
    two_theta = 2 * np.degrees(np.arcsin(1.54184 * math.sqrt(4) / (2 * 5.64)))  # 200, the strongest of rock salt
    assert peaks.loc[peaks["intensity"].idxmax(), "two_theta"] == pytest.approx(two_theta, abs=0.05)
    assert peaks.loc[peaks["intensity"].idxmax(), "hkl"] == "2 0 0"
    assert "1 0 0" not in peaks["hkl"].tolist()
    peaks = powder_pattern(Structure(Lattice.tetragonal(12, 14), ["Po"], [[0, 0, 0]]))
    assert peaks["hkl"].is_unique and {"1 0 11", "10 1 1"} <= set("; ".join(peaks["hkl"]).split("; "))


def measure(structure, background=30.0):
    """A pattern as a diffractometer gives it: broad peaks on a background."""
    angles, peaks = np.arange(10, 80, 0.05), powder_pattern(structure)
    counts = np.exp(-(((angles[:, None] - peaks["two_theta"].to_numpy()) / 0.2) ** 2) / 2) @ peaks["intensity"]
    return np.column_stack([angles, counts + background])


COUNTED = [(10.0 + step, 100 + step) for step in range(50)]


def test_a_pattern_may_be_a_csv_file_with_a_header(tmp_path):
    rows = measure(ROCK_SALT)
    pd.DataFrame(rows, columns=["2theta", "counts"]).to_csv(tmp_path / "measured.csv", index=False)
    np.testing.assert_allclose(read_pattern(tmp_path / "measured.csv"), rows)
    text = "\n".join(f"{angle:.3f};{count:.4f}".replace(".", ",") for angle, count in rows)
    for separator in (";", " ", "\t"):  # where a comma stands before decimals
        (tmp_path / "measured.xy").write_text(text.replace(";", separator))
        np.testing.assert_allclose(read_pattern(tmp_path / "measured.xy"), rows, atol=1e-3)
    (tmp_path / "measured.xy").write_text("\n".join(f"{angle:.1f},{count}" for angle, count in COUNTED))
    np.testing.assert_allclose(read_pattern(tmp_path / "measured.xy"), COUNTED)
    for text in ("\ufeff", "# slit 1,5 2\n"):
        (tmp_path / "measured.xy").write_text(text + "\n".join(f"{angle:.1f},{count}" for angle, count in COUNTED))
        np.testing.assert_allclose(read_pattern(tmp_path / "measured.xy"), COUNTED)
    peaks = pd.DataFrame(COUNTED, columns=["two_theta", "intensity"]).assign(hkl="5 1 1; 3 3 3")  # as written here
    peaks.to_csv(tmp_path / "measured.csv", index=False)
    np.testing.assert_allclose(read_pattern(tmp_path / "measured.csv"), COUNTED)
    peaks.to_csv(tmp_path / "measured.csv")
    with pytest.raises(ValueError, match="first column that counts the rows, expected angles"):
        read_pattern(tmp_path / "measured.csv")
    (tmp_path / "measured.xy").write_text("\n".join(f"{angle:.2f}\t1,{count:03.0f}" for angle, count in COUNTED))
    with pytest.raises(ValueError, match="commas for thousands"):
        read_pattern(tmp_path / "measured.xy")
    counts = 20 + np.random.default_rng(0).integers(60, size=(40, 10))
    np.savetxt(
        tmp_path / "measured.xy", counts, fmt="%d", header="10.000 0.020 80.000", comments=""
    )  # as FullProf has it
    with pytest.raises(ValueError, match="first column that rises and falls, expected angles"):
        read_pattern(tmp_path / "measured.xy")
    for rows in (COUNTED[::-1], [COUNTED[0], *COUNTED]):  # downwards; one angle twice
        np.savetxt(tmp_path / "measured.xy", rows)
        np.testing.assert_allclose(read_pattern(tmp_path / "measured.xy"), rows)


def test_a_measured_pattern_tells_structures_apart_and_forgives_a_wrong_volume():
    swollen, other = ROCK_SALT.copy(), Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    swollen.scale_lattice(swollen.volume * 1.03**3)
    measured = measure(ROCK_SALT)
    assert agreement(ROCK_SALT, measured) == pytest.approx(1, abs=1e-3)
    assert agreement(swollen, measured) > 0.98
    assert agreement(other, measured) < 0.7
    assert agreement(other, measure(other)) > 0.99
    assert powder_pattern(Structure(Lattice.cubic(3), ["Es"], [[0, 0, 0]])).empty  # nothing is tabulated


@pytest.mark.parametrize(
    "rows", [np.ones((50, 2)), np.column_stack([np.arange(95, 140), np.arange(45)]), np.full((20, 2), np.nan)]
)
def test_a_pattern_that_tells_nothing_is_refused(rows, tmp_path):
    np.savetxt(tmp_path / "measured.xy", rows)
    with pytest.raises(ValueError, match="expected ten or more rows"):
        read_pattern(tmp_path / "measured.xy")


def test_ranking_by_a_pattern_keeps_crystals_and_rows_together(prediction):
    measured = measure(prediction.best[-1])
    found = prediction.compared(measured)
    assert len(found.groups) > 1
    assert found.table["xrd"].is_monotonic_decreasing
    assert found.table["xrd"].tolist() == pytest.approx([agreement(crystal, measured) for crystal in found.best])
    assert found.table["energy"].tolist() == [crystal.properties["energy"] for crystal in found.best]
    assert found.table["energy"].iloc[0] == prediction.table["energy"].iloc[-1]


def test_a_pattern_finds_its_crystal_below_the_ones_of_lowest_energy(model, prediction):
    """Only so many crystals are kept: with a pattern, those that fit it."""
    assert len(prediction.groups) > 1
    measured, one = measure(prediction.best[-1]), replace(QUICK, n_best=1)
    assert predict(model, "NaCl", one).best[0].properties == prediction.best[0].properties
    assert predict(model, "NaCl", one, measured=measured).best[0].properties == prediction.best[-1].properties
    with pytest.raises(ValueError, match=r"measured has shape \(5,\), expected \(n, 2\)"):
        predict(model, "NaCl", one, measured=np.ones(5))


# On disk


def test_each_crystal_is_written_in_four_formats_that_agree_and_name_what_made_them(written, prediction):
    table = pd.read_csv(written / "candidates.csv", index_col="rank")
    assert table["energy"].tolist() == pytest.approx(prediction.table["energy"].tolist(), rel=1e-5)
    for rank, structure in enumerate(prediction.best, start=1):
        stem = written / f"{rank:02d}_NaCl"
        for path in (stem.with_suffix(".cif"), stem.with_suffix(".vasp")):
            read = Structure.from_file(path)
            assert read.volume == pytest.approx(structure.volume, rel=1e-4)
            assert StructureMatcher(scale=False).get_rms_dist(read, structure)[0] < 1e-3
            assert "checkpoint prototypes, seed 0" in path.read_text().splitlines()[0]
        atoms = ase.io.read(stem.with_suffix(".extxyz"))
        assert atoms.info["learned_energy_per_atom"] == pytest.approx(structure.properties["energy"], abs=1e-6)
        assert atoms.cell.volume == pytest.approx(structure.volume, rel=1e-5)
        symmetrised = written / f"{stem.name}_symmetrised.cif"
        assert space_group(Structure.from_file(symmetrised)) == table.loc[rank, "space group"]
        assert symmetrised.read_text().startswith("# before symmetrising: learned_energy_per_atom ")
        peaks = pd.read_csv(written / f"{stem.name}_xrd.csv", dtype={"hkl": str})
        assert peaks["intensity"].max() == pytest.approx(100)
        assert peaks["hkl"].tolist() == powder_pattern(standardise(structure))["hkl"].tolist()
    origin = json.loads((written / "candidates.json").read_text())
    assert origin["checkpoint"] == "prototypes"
    assert origin["settings"]["n_samples"] == 3
    assert (written / "candidates.png").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:Issues encountered")
def test_a_symmetrised_file_holds_the_crystal_of_the_table_however_distorted_it_is(prediction, tmp_path):
    """Operations found at a loose tolerance may be of a higher group than the coordinates obey, and double atoms."""
    rng = np.random.default_rng(30)
    cell = 3.75 * np.eye(3) @ (np.eye(3) + 0.01 * rng.normal(size=(3, 3)))
    distorted = Structure(cell, ["Au", "Cu", "Cu", "Cu"], np.array(FACES) + 0.01 * rng.normal(size=(4, 3)))
    distorted.properties["energy"] = 0.0
    found = replace(prediction, groups=[[distorted]], table=tabulate([[distorted]]))
    folder = write_prediction(found, tmp_path / "Cu3Au", provenance(identify("prototypes"), QUICK, found))
    read, group = Structure.from_file(folder / "01_Cu3Au_symmetrised.cif"), found.table["space group"].iloc[0]
    assert read.composition.reduced_formula == "Cu3Au" and space_group(read, 1e-3) == group == "Cm (8)"


@pytest.mark.filterwarnings("ignore:Issues encountered")
def test_a_left_handed_description_is_written_as_the_same_hand_in_all_files(prediction, tmp_path):
    quartz = Structure.from_spacegroup(
        "P3_121", Lattice.hexagonal(4.913, 5.405), ["Si", "O"], [[0.4697, 0, 1 / 3], [0.4135, 0.2669, 0.4524]]
    )
    crystals = Crystals.from_structures([quartz])
    order = [1, 0, 2]  # of the lattice vectors: atoms stay where they are
    (left,) = crystals.replace(cell=crystals.cell[:, order]).to_structures()
    assert np.linalg.det(left.lattice.matrix) > 0 and space_group(left) == "P3_121 (152)"
    left.properties["energy"] = 0.0
    found = replace(prediction, groups=[[left]], table=tabulate([[left]]))
    folder = write_prediction(found, tmp_path / "SiO2", provenance(identify("prototypes"), QUICK, found))
    for name in ("01_SiO2.cif", "01_SiO2.vasp", "01_SiO2_symmetrised.cif"):
        assert space_group(Structure.from_file(folder / name)) == "P3_121 (152)"


def test_a_folder_appears_whole_or_not_at_all(prediction, tmp_path, monkeypatch):
    origin, folder = provenance(identify("prototypes"), QUICK, prediction), tmp_path / "NaCl"

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("contsp_core.app.files.powder_pattern", fail)
        with pytest.raises(OSError, match="disk full"):
            write_prediction(prediction, folder, origin)
    assert list(tmp_path.iterdir()) == []
    write_prediction(prediction, folder, origin)
    with pytest.raises(FileExistsError, match="exists; --resume leaves it out"):
        write_prediction(prediction, folder, origin)
    (folder / "99_NaCl.cif").touch()  # of a longer table
    write_prediction(prediction, folder, origin, overwrite=True)
    assert not (folder / "99_NaCl.cif").exists()
    for mine in ("notes.txt", "01_NaCl_relaxed.cif", "1_NaCl.cif", "02_relaxed.cif", "02_NaCl.csv"):
        (folder / mine).touch()
        with pytest.raises(FileExistsError, match=f"has '{mine}', which no prediction made: move it away first"):
            write_prediction(prediction, folder, origin, overwrite=True)
        (folder / mine).unlink()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(FileExistsError, match="link' is a link or has no"):
        write_prediction(prediction, tmp_path / "link", origin, overwrite=True)
    (tmp_path / "link").unlink()
    assert list(tmp_path.iterdir()) == [folder]
    with monkeypatch.context() as patch:
        patch.setattr("contsp_core.app.files.contact_sheet", fail)
        with pytest.warns(UserWarning, match=r"has no candidates.png: OSError: disk full"):
            write_prediction(prediction, folder, origin, overwrite=True)
    assert (folder / "candidates.csv").is_file()
    other = tmp_path / "other"
    with monkeypatch.context() as patch:
        patch.setattr("contsp_core.app.files.contact_sheet", lambda _: other.mkdir())  # by another process
        with (
            pytest.warns(UserWarning, match="no candidates.png"),
            pytest.raises(FileExistsError, match="exists; --resume leaves it out"),
        ):
            write_prediction(prediction, other, origin)
    assert sorted(tmp_path.iterdir()) == [folder, other] and list(other.iterdir()) == []
    foreign = tmp_path / "mine"
    foreign.mkdir()
    with pytest.raises(FileExistsError, match="only a prediction is replaced"):
        write_prediction(prediction, foreign, origin, overwrite=True)
    assert foreign.is_dir()


@pytest.mark.parametrize("formula", ["Ca3P2O8", "CaMgC2O6", "MgO2H2", "Li2Co2O6", "NaCl"])
def test_files_of_any_formula_are_known_as_a_predictions_own(formula):
    name = Composition(formula).reduced_formula
    for ending in (".cif", "_symmetrised.cif", ".vasp", ".extxyz", "_xrd.csv"):
        assert WRITTEN.fullmatch(f"01_{name}{ending}")


# The command line


def run(capsys, *arguments):
    cli.main(arguments)
    return capsys.readouterr()


QUICKLY = ("--checkpoint", "prototypes", "--n-samples", "2", "--n-steps", "2", "--n-units", "1", "--n-jobs", "1")


def test_formulas_of_a_file_are_predicted_and_resumed(tmp_path, capsys):
    table, output = tmp_path / "mine.csv", tmp_path / "out"
    table.write_text("formula,why\nNaCl,salt\nFrCl,rare\n")
    done = run(capsys, "predict", str(table), "KCl", *QUICKLY, "--output", str(output))
    assert sorted(path.name for path in output.iterdir()) == ["FrCl", "KCl", "NaCl"]
    assert "FrCl: warning: no training crystal has Fr" in done.err
    assert "space group" in done.out
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*.csv")}
    done = run(capsys, "predict", str(table), "K₂Br₂", *QUICKLY, "--output", str(output), "--resume")
    assert f"NaCl: kept as it is in {output}/NaCl/" in done.err
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (output / "KBr" / "candidates.csv").is_file()


def test_a_calculator_relaxes_ranks_and_may_fail_on_one_crystal(prediction, tmp_path):
    class Springs(Calculator):
        """Volume per atom pulled to 20 Å³; refuses the cell of lowest learned energy."""

        def __init__(self):
            super().__init__()
            self.implemented_properties = ["energy", "forces", "stress"]

        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            volume, n = self.atoms.get_volume() / len(self.atoms), len(self.atoms)
            if abs(volume - prediction.best[0].volume / len(prediction.best[0])) < 1e-6:
                raise RuntimeError("out of range")
            pressure = 0.1 * (volume - 20)
            self.results = {"energy": n * 0.05 * (volume - 20) ** 2, "forces": np.zeros((n, 3))}
            self.results["stress"] = np.array([pressure] * 3 + [0.0] * 3)

    chances = np.linspace(0.5, 0.1, len(prediction.groups))
    found = replace(prediction, table=prediction.table.assign(confidence=chances)).relaxed(Springs())
    assert len(found.groups) == len(prediction.groups)
    known = dict(zip(prediction.table["energy"], chances))
    assert [known[energy] for energy in found.table["energy"]] == found.table["confidence"].tolist()
    assert "calculator_energy: eV/atom" in found.summary() and "eV" not in prediction.summary()
    assert "out of range" in found.table["calculator_error"].iloc[-1] and found.table["calculator_error"].iloc[0] == ""
    assert found.best[-1].volume == pytest.approx(prediction.best[0].volume)
    assert found.table["V/atom"].iloc[:-1].tolist() == pytest.approx([20] * (len(found.groups) - 1), abs=0.6)
    assert found.table["calculator_energy"].iloc[:-1].is_monotonic_increasing
    tails = {group[0].properties["energy"]: group[1:] for group in prediction.groups}
    assert [group[1:] for group in found.groups] == [tails[crystal.properties["energy"]] for crystal in found.best]
    assert found.table["energy"].tolist() == [crystal.properties["energy"] for crystal in found.best]
    assert all("calculator" not in name for structure in prediction.best for name in structure.properties)
    folder = write_prediction(found, tmp_path / "NaCl", provenance(identify("prototypes"), QUICK, found))
    first, *_, last = (path.read_text().partition("\n")[0] for path in sorted(folder.glob("*_NaCl.cif")))
    assert f"calculator_energy_eV_per_atom {found.table['calculator_energy'].iloc[0]}" in first
    assert f"learned_energy_before_relaxing {found.table['energy'].iloc[0]}" in first
    assert f"learned_energy_per_atom {found.table['energy'].iloc[-1]}" in last and "eV" not in last


def test_crystals_that_relax_into_one_are_one(prediction):
    """Copper stretched along an axis, found twice, and copper as it is, found once."""
    stretched, copper = (Structure(Lattice.tetragonal(3.6 / s, 3.6 * s**2), ["Cu"] * 4, FACES) for s in (1.1, 1.0))
    groups = [[stretched, stretched], [copper]]
    for energy, group in enumerate(groups):
        group[0].properties = {"energy": float(energy), "source": "chains"}
    table = tabulate(groups).assign(confidence=[0.3, 0.2])
    found = replace(prediction, groups=groups, table=table).relaxed(EMT())
    assert [len(group) for group in found.groups] == [3] and found.table["found"].tolist() == [3]
    assert found.table["space group"].tolist() == ["Fm-3m (225)"]
    assert found.table["confidence"].tolist() == pytest.approx([0.5])
    assert "energy: before relaxing" in found.summary() and "that it is the right crystal" in found.summary()


def test_of_relaxed_crystals_that_are_the_same_one_without_atoms_too_close_leads(prediction):
    """A comparison ignores volumes; the calculator moves nothing, and prefers the smaller."""

    class Squeeze(Calculator):
        implemented_properties = ("energy", "forces", "stress")

        def calculate(self, atoms=None, properties=("energy",), system_changes=()):
            super().calculate(atoms, properties, system_changes)
            self.results = {"energy": self.atoms.get_volume(), "forces": np.zeros((len(self.atoms), 3))}
            self.results["stress"] = np.zeros(6)

    dense, copper = (Structure(Lattice.cubic(a), ["Cu"] * 4, FACES) for a in (2.0, 3.6))
    groups = [[dense], [copper]]
    for energy, group in enumerate(groups):
        group[0].properties = {"energy": float(energy)}
    found = replace(prediction, groups=groups, table=tabulate(groups)).relaxed(Squeeze())
    assert len(found.groups) == 1 and found.best[0].volume == pytest.approx(copper.volume)


def test_relaxed_crystals_are_ranked_by_the_calculator_and_not_as_before(prediction):
    """Effective medium theory has face-centred copper below body-centred, whose learned energy is made the lower."""
    centred = Structure(Lattice.cubic(2.87), ["Cu"] * 2, [[0, 0, 0], [0.5] * 3], properties={"energy": 0.0})
    copper = Structure(Lattice.cubic(3.6), ["Cu"] * 4, FACES, properties={"energy": 1.0})
    groups = [[centred], [copper]]
    found = replace(prediction, groups=groups, table=tabulate(groups)).relaxed(EMT())
    assert found.table["energy"].tolist() == [1.0, 0.0] and found.table["calculator_energy"].is_monotonic_increasing
    assert found.table["space group"].tolist() == ["Fm-3m (225)", "Im-3m (229)"]


def test_a_number_beyond_the_memory_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("contsp_core.app.prediction.predict", Mock(side_effect=MemoryError))
    with pytest.raises(SystemExit, match=r"^error: BaO, NaCl failed"):  # the second is tried, too
        cli.main(["predict", "BaO", "NaCl", *QUICKLY, "--output", str(tmp_path)])
    assert capsys.readouterr().err.count("error: a number is too large for the memory\n") == 2


def test_what_changes_while_chains_run_changes_no_record(model, tmp_path, monkeypatch, capsys):
    """A training replaces the checkpoint, a calculator goes to another folder, and SIGTERM ends it all."""
    monkeypatch.chdir(tmp_path)
    save_checkpoint("mine.safetensors", model, {"dataset": "prototypes"})
    digest = identify("mine.safetensors")["checkpoint_sha256"]

    def disturbed(*arguments, **options):
        save_checkpoint("mine.safetensors", model, {"dataset": "perov5"})
        (tmp_path / "elsewhere").mkdir()
        os.chdir("elsewhere")
        return predict(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr("contsp_core.app.prediction.predict", disturbed)
        run(capsys, "predict", "NaCl", "--checkpoint", "mine.safetensors", *QUICKLY[2:], "--output", "out")
    made = json.loads((tmp_path / "out" / "NaCl" / "candidates.json").read_text())
    assert (made["checkpoint_sha256"], made["trained_on"]["dataset"]) == (digest, "prototypes")
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("contsp_core.app.files._write_crystal", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit, match="stopped; what is on disk is complete"):
            cli.main(["predict", "NaCl", *QUICKLY, "--output", str(tmp_path / "new")])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_measured_pattern_reaches_the_table_and_its_file(tmp_path, capsys, monkeypatch):
    np.savetxt(tmp_path / "measured.xy", measure(ROCK_SALT))
    run(capsys, "predict", "NaCl", *QUICKLY, "--output", str(tmp_path), "--xrd", str(tmp_path / "measured.xy"))
    assert pd.read_csv(tmp_path / "NaCl" / "candidates.csv")["xrd"].between(0, 1).all()
    assert json.loads((tmp_path / "NaCl" / "candidates.json").read_text())["xrd"].startswith("measured-")
    command = ("predict", "NaCl", *QUICKLY, "--output", str(tmp_path), "--xrd", str(tmp_path / "measured.xy"))
    agreements = pd.read_csv(tmp_path / "NaCl" / "candidates.csv")["xrd"]
    seen, found = [], predict
    monkeypatch.setattr(
        "contsp_core.app.prediction.predict", lambda *given, **more: seen.append(more) or found(*given, **more)
    )
    run(capsys, *command, "--n-best", "1", "--overwrite")  # of all, the one that fits best
    assert pd.read_csv(tmp_path / "NaCl" / "candidates.csv")["xrd"].tolist() == [agreements.max()]
    np.testing.assert_allclose(seen[0]["measured"], measure(ROCK_SALT))
    np.savetxt(tmp_path / "measured.xy", measure(CAESIUM))  # of another sample
    command = (*command, "--n-best", "1")
    with pytest.raises(SystemExit, match=r"was made with xrd='measured-\w+', not 'measured-\w+'"):
        cli.main([*command, "--resume"])


def test_a_judge_is_known_by_its_content():
    name, digest = identify("mp20")["judge"].split("-")
    content = (CHECKPOINTS / "mp20_judge.safetensors").read_bytes()
    assert name == "mp20_judge" and hashlib.sha256(content).hexdigest().startswith(digest)
    assert identify("prototypes")["judge"] is None


def test_a_bundled_checkpoint_is_the_same_by_name_and_by_path(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("contsp_core.app.prediction.CALIBRATED", {"prototypes": (1.0, 2.0, -1.0)})
    seen = []
    monkeypatch.setattr("contsp_core.app.prediction.predict", lambda *given, **_: seen.append(given[2]) or 1 / 0)
    shutil.copy(CHECKPOINTS / "prototypes.safetensors", tmp_path)  # of the same name only
    for checkpoint in ("prototypes", CHECKPOINTS / "prototypes.safetensors", tmp_path / "prototypes.safetensors"):
        with pytest.raises(ZeroDivisionError):
            cli.main(["predict", "NaCl", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "out")])
    assert [config.confidence for config in seen] == [(1.0, 2.0, -1.0), (1.0, 2.0, -1.0), None]


@pytest.mark.parametrize("given", [(1.0, 2.0), (1.0, 2.0, "a"), 1.0, "abc", [1.0, 2.0, 3.0]])
def test_parameters_of_the_confidence_are_three_floats(given):
    with pytest.raises(ValueError, match=r"confidence is .*, expected a tuple of three floats, or None"):
        PredictConfig(confidence=given)


def test_where_no_checkpoint_is_named_the_first_that_covers_a_formula_answers(tmp_path, capsys):
    models = {name: load_model(name) for name in DEFAULTS}
    asked = {"MgO": "mp20", "Mg4O4": "mp20", "LiFePO4": "mp", "Fr11He7": "mp"}  # four elements; what nothing covers
    assert {formula: choose_checkpoint(models, formula, PredictConfig())[0] for formula in asked} == asked
    assert choose_checkpoint(models, "MgO", PredictConfig(n_units=(2, 12)))[0] == "mp"  # 24 atoms
    command = ("predict", "MgO", "LiFePO4", *QUICKLY[2:], "--output", str(tmp_path))
    told = run(capsys, *command)
    assert [place in told.out for place in ("candidates by mp20, ", "candidates by mp, ")] == [True, True]
    assert re.findall(".*seldom.*", told.err) == [
        "LiFePO4: warning: mp20 does not cover it, and mp seldom finds such yet"
    ]
    made = [json.loads((tmp_path / name / "candidates.json").read_text()) for name in ("MgO", "LiFePO4")]
    assert [(one["checkpoint"], one["trained_on"]["dataset"]) for one in made] == [("mp20", "mp20"), ("mp", "mp")]
    assert [bool(one["settings"]["confidence"]) for one in made] == [True, False]
    assert run(capsys, *command, "--resume").err.count("kept as it is") == 2


def test_a_calculator_that_fails_on_all_crystals_is_an_error_and_loses_none(tmp_path, capsys):
    arguments = ("predict", "NaCl", *QUICKLY, "--output", str(tmp_path), "--calculator", "ase.calculators.emt:EMT")
    with pytest.raises(SystemExit, match="error: NaCl failed"):
        cli.main(arguments)
    assert "EMT failed on all crystals" in capsys.readouterr().err
    assert (tmp_path / "NaCl" / "candidates.csv").is_file()
    with pytest.raises(SystemExit, match="exists; --resume leaves it out"):
        cli.main(arguments)
    assert "kept as it is" not in run(capsys, *arguments[:-2], "--resume").err  # it did not count as done
    assert "kept as it is" in run(capsys, *arguments[:-2], "--resume").err
    with pytest.raises(SystemExit, match=r"NaCl' was made with calculator=None, not 'ase\.calculators\.emt:EMT'"):
        cli.main([*arguments, "--resume"])


def test_a_formula_that_fails_does_not_stop_the_others(tmp_path, capsys):
    quickly = QUICKLY[:4] + QUICKLY[6:]  # templates have no chains, and no steps
    arguments = ("predict", "Na7Cl5", "NaCl", *quickly, "--source", "templates", "--output", str(tmp_path))
    with pytest.raises(SystemExit, match="error: Na7Cl5 failed"):
        cli.main(arguments)
    assert "Na7Cl5: error: formula 'Na7Cl5' has no template" in capsys.readouterr().err
    assert (tmp_path / "NaCl" / "candidates.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["NaXx"], "element 'Xx' is unknown"),
        (["Na0.5Cl"], "cannot be read"),
        (["TIO2"], "element 'T' is unknown"),
        (["Na0"], "cannot be read"),
        (["NaCl", "--n-units", "101"], "101 formula units of 2 atoms are 202 atoms, expected ≤ 200"),
        (["NaCl", "--n-units", "0"], "n_units is"),
        (["NaCl", "--n-samples", "0"], "n_samples is 0"),
        (["NaCl", "--n-jobs", "0"], "n_jobs is 0, expected -1 (all cores) or an integer ≥ 1"),
        (["NaCl", "--minutes", "-1"], "minutes is -1"),
        (["NaCl", "--checkpoint", "nowhere"], "checkpoint is 'nowhere'"),
        (["NaCl", "--calculator", "nowhere"], "calculator"),
        (["NaCl", "--xrd", "nowhere.xy"], "xrd file 'nowhere.xy' cannot be read"),
        (["nowhere.csv"], "'nowhere.csv' cannot be read as CSV"),
        (["bad.csv"], "'bad.csv', row 2"),
        (["other.csv"], "'other.csv' has 1 rows of name, expected some, with a column 'formula'"),
        (["surplus.csv"], "'surplus.csv', row 2: ValueError: 1 columns have names, but the row has other fields"),
        (["short.CSV"], "'short.CSV', row 2: ValueError: 2 columns have names, but the row has other fields"),
        (["empty.csv"], "'empty.csv' has 0 rows of formula, expected some, with a column 'formula'"),
        (["CuSO4.5H2O"], 'expected one like "BaTiO3" or "CuSO4(H2O)5"'),
        (["NaCl", "--source", "templates", "--n-steps", "9"], "n_steps and minutes are for chains"),
        (["NaCl", "--source", "templates", "--minutes", "9"], "n_steps and minutes are for chains"),
        (["NaCl", "--output", "sealed"], "sealed' cannot be written: PermissionError"),
        (["NaCl", "--output", "bad.csv"], "bad.csv"),
        (["NaCl", "--output", "full"], "exists; --resume leaves it out, --overwrite replaces it"),
        (["NaCl", "--output", "full", "--overwrite"], "only a prediction is replaced"),
        (["NaCl", "--output", "full", "--resume"], "only a prediction is replaced"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_before_any_work(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("contsp_core.app.prediction.predict", lambda *_: pytest.fail("work was done"))
    (tmp_path / "bad.csv").write_text("formula\nNaCl\nNaXx\n")
    (tmp_path / "other.csv").write_text("name\nNaCl\n")
    (tmp_path / "surplus.csv").write_text("\ufeffformula\nNaCl\nTiO2,NaCl\n")
    (tmp_path / "short.CSV").write_text("name,formula\nsalt,NaCl\nrutile\n")
    (tmp_path / "empty.csv").write_text("formula\n")
    (tmp_path / "full" / "NaCl").mkdir(parents=True)
    if "sealed" in arguments:
        monkeypatch.setattr("tempfile.TemporaryFile", Mock(side_effect=PermissionError("no")))
    with pytest.raises(SystemExit) as error:
        cli.main(["predict", "--checkpoint", "prototypes", *arguments])
    assert message in str(error.value)
    assert str(error.value).startswith("error: ")
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_evaluated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("--n-structures", "2", "--n-samples", "1", "--n-steps", "9", "--n-jobs", "1")
    done = run(capsys, "evaluate", "prototypes", *arguments)
    run(capsys, "evaluate", "prototypes", *arguments, "--best-of", "2")  # which has a folder of its own
    path = tmp_path / "evaluations" / "prototypes_prototypes_n_samples_1_n_steps_9" / "summary.json"
    assert path.parent.with_name(f"{path.parent.name}_best_of_2").is_dir()
    assert json.loads(path.read_text())["settings"]["n_steps"] == 9
    assert "score matching, noise levels: 2 crystals of prototypes/test, 1 samples of each" in done.out
    assert str(path.relative_to(tmp_path)) in done.out
    scores = json.loads(path.read_text())["scores"]
    for name, label in (("match_rate", "match rate, loose"), ("crmse", "cRMSE")):
        low, high = scores[f"{name}@1_interval"]
        assert re.search(rf"^{label} +{scores[name + '@1']:.3f} \[{low:.3f}, {high:.3f}\]$", done.out, re.MULTILINE)
    assert re.search("^RMSE +(–|0)", done.out, re.MULTILINE)


def test_an_energy_is_audited(tmp_path, capsys):
    path, other = tmp_path / "salt.cif", tmp_path / "caesium.cif"
    ROCK_SALT.get_primitive_structure().to(str(path))
    Structure(Lattice.cubic(4.1), ["Cs", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]).to(str(other))
    done = run(capsys, "audit", str(path), str(other), "--checkpoint", "prototypes")
    first, header, *rows = done.out.splitlines()
    assert first == f"prototypes on {path} (NaCl), {other} (CsCl); cutoff looked for at 7.05 … 8.14 Å"
    assert "worst crystal" in header
    assert all((str(path) in row) != (str(other) in row) for row in rows)
    assert "supercell" in done.out
    assert "jump" not in done.out
    with pytest.raises(SystemExit, match=r"nowhere\.cif' cannot be read as a crystal"):
        cli.main(["audit", str(tmp_path / "nowhere.cif")])
    (tmp_path / "journal.cif").write_bytes(b"data_global\n_author 'M\xfcller'\n" + path.read_bytes())
    assert "(NaCl)" in run(capsys, "audit", str(tmp_path / "journal.cif"), "--checkpoint", "prototypes").out
    for damage, message in ((path.read_text() + other.read_text(), "several crystals"), ("data_x\n", "")):
        (tmp_path / "bad.cif").write_text(damage)
        with pytest.raises(SystemExit, match=rf"bad\.cif' cannot be read as a crystal: .*{message}"):
            cli.main(["audit", str(other), str(tmp_path / "bad.cif")])
    Structure(Lattice.cubic(4), [{"Cu": 0.5, "Au": 0.5}], [[0, 0, 0]]).to(str(tmp_path / "bad.cif"))
    with pytest.raises(SystemExit, match=r"bad\.cif' cannot be read as a crystal: .* disordered"):
        cli.main(["audit", str(other), str(tmp_path / "bad.cif")])
    (tmp_path / "two.cif.gz").write_bytes(gzip.compress(path.read_bytes() + other.read_bytes()))
    (tmp_path / "sum.cif").write_text(other.read_text().replace("'Cs1 Cl1'", "'Cs1 Cl2'"))
    (tmp_path / "POSCAR").write_text("salt\n1\n4 0 0\n0 4 0\n0 0 4\n1 1\ndirect\n0 0 0\n.5 .5 .5\n")
    (tmp_path / "TWO.CIF.GZ").write_bytes((tmp_path / "two.cif.gz").read_bytes())
    bad = {"two.cif.gz": "several crystals", "TWO.CIF.GZ": "several crystals", "sum.cif": "Cl"}
    bad |= {"POSCAR": "BadPoscarWarning"}
    for name, message in bad.items():
        with pytest.raises(SystemExit, match=rf"{name}' cannot be read as a crystal: .*{message}"):
            cli.main(["audit", str(other), str(tmp_path / name)])
    with pytest.raises(SystemExit, match="error: seed is -1, expected 0"):
        cli.main(["audit", str(other), "--seed", "-1"])
    with pytest.raises(SystemExit, match=r"error: cutoff is 5\.0, expected a length > 0, for --calculator"):
        cli.main(["audit", str(other), "--cutoff", "5"])
    with pytest.raises(SystemExit, match=r"error: the calculator fails: .* No EMT-potential for C[ls]"):
        cli.main(["audit", str(other), "--calculator", "ase.calculators.emt:EMT"])


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # as it was afterwards
    monkeypatch.setattr(cli, "predict", lambda **_: warnings.warn("of two\n  lines", stacklevel=1))
    assert run(capsys, "predict", "NaCl").err == "warning: of two lines\n"


class HardCutoff(Calculator):
    """Counts neighbours up to 6 Å, and does not say so."""

    implemented_properties = ("energy",)

    def calculate(self, atoms, *_):
        self.results = {"energy": 1e-3 * len(neighbor_list("i", atoms, 6.0))}


def test_an_audit_finds_the_jump_of_a_calculator_whose_radius_is_given(tmp_path, capsys):
    ROCK_SALT.get_primitive_structure().to(str(tmp_path / "salt.cif"))
    command = ("audit", str(tmp_path / "salt.cif"), "--calculator", f"{__name__}:HardCutoff")
    tables = [run(capsys, *command, *cutoff).out for cutoff in ((), ("--cutoff", "6"))]
    rows = [next(line for line in table.splitlines() if "crosses the cutoff" in line) for table in tables]
    assert [" jump " in row for row in rows] == [False, True]


def test_a_checkpoint_without_its_data_set_is_evaluated_on_a_named_one_only(model, tmp_path):
    nameless = str(save_checkpoint(tmp_path / "nameless.safetensors", model, {}))
    with pytest.raises(SystemExit, match=r"nameless\.safetensors' does not say its data set, expected --dataset"):
        cli.main(["evaluate", nameless])
    with pytest.raises(SystemExit, match=r"nameless\.safetensors' does not say its data set, expected source chains"):
        cli.main(["predict", "NaCl", "--checkpoint", nameless, "--source", "both", "--output", str(tmp_path / "new")])


def test_templates_that_a_checkpoint_was_not_trained_on_are_told(model, tmp_path):
    for blob_id in (load_split("prototypes", "train").source.blob_id, "0" * 40):
        settings = {"dataset": "prototypes", "data": {"blob_id": blob_id}}
        path = save_checkpoint(tmp_path / "other.safetensors", model, settings)
        with warnings.catch_warnings(record=True, action="always") as caught:
            assert TemplateLibrary.of_checkpoint(path).structures
        assert ["is not what" in str(warning.message) for warning in caught] == [True] * (blob_id[0] == "0")


@pytest.mark.filterwarnings("ignore:.*is not what")
def test_a_prediction_by_other_templates_is_not_kept(tmp_path, capsys, monkeypatch):
    quickly = QUICKLY[:4] + QUICKLY[6:]
    command = ("predict", "NaCl", *quickly, "--source", "templates", "--output", str(tmp_path / "out"))
    run(capsys, *command)
    assert "kept as it is" in run(capsys, *command, "--resume").err
    (tmp_path / "prototypes").mkdir()
    given = (DATA_DIR / "prototypes" / "train.csv").read_text()
    (tmp_path / "prototypes" / "train.csv").write_text(given + "\n")
    monkeypatch.setenv("CONTSP_DATA_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"NaCl' was made with templates='\w+', not '\w+'"):
        cli.main([*command, "--resume"])


def test_a_package_that_is_missing_is_told_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymatgen.core", None)
    with pytest.raises(SystemExit, match=r"error: .*the extra contsp_core\[analysis\] has what the commands need"):
        cli.main(["predict", "NaCl", "--checkpoint", "prototypes"])
    problems = [RuntimeError("CUDA out of\nmemory"), ModuleNotFoundError("No module named 'pandas'")]
    expected = ["error: CUDA out of memory$", r"error: No module named 'pandas'; the extra contsp_core\[analysis\]"]
    for problem, message in zip(problems, expected):
        monkeypatch.setattr("contsp_core.training.run", Mock(side_effect=problem))
        with pytest.raises(SystemExit, match=message):
            cli.main(["train", "--dataset", "prototypes"])


def test_training_is_one_of_the_commands():
    with pytest.raises(SystemExit, match="--minutes is -1"):
        cli.main(["train", "--dataset", "prototypes", "--minutes", "-1"])


@pytest.mark.parametrize("command", ["predict", "evaluate", "audit", "train"])
def test_help_teaches_by_examples(command, capsys):
    for arguments in (["--help"], [command, "--help"]):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        text = capsys.readouterr().out.partition("example")[2]
        assert f" contsp {command} " in text
    others = {"predict", "evaluate", "audit", "train"} - {command}
    assert not any(f"contsp {other}" in text for other in others)


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"contsp {version('contsp_core')}\n"


SLIPS = """
import sys
from contsp_core.app.cli import main
for line in sys.stdin.read().splitlines():
    try:
        main(line.split())
    except SystemExit as end:
        assert end.code, line
    else:
        sys.exit(f"{line} is no error")
    assert "torch" not in sys.modules, line
"""


def test_a_slip_is_told_before_torch_is_imported(tmp_path):
    lines = ["predcit", "predict --n-smaples 3 TiO2", "predict NaXx", "predict nowhere.csv", "audit nowhere.cif"]
    lines += ["predict --checkpoint nowhere TiO2", "evaluate nowhere", "evaluate mp20 --dataset nowhere"]
    lines += [f"evaluate --cifs . --dataset prototypes {option}" for option in ("--n-steps 0", "--best-of 2")]
    lines += ["evaluate", "audit --checkpoint nowhere salt.cif"]
    ROCK_SALT.to(str(tmp_path / "salt.cif"))
    command = [sys.executable, "-W", "ignore", "-c", SLIPS]
    done = subprocess.run(command, cwd=tmp_path, input="\n".join(lines), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "invalid choice: 'predcit'" in done.stderr
