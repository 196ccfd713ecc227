"""Evaluation of checkpoints and of folders of CIFs: nothing lost, nothing done twice, known answers for the judge."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import deque
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import results
import torch
from pymatgen.core import Lattice, Structure
from results import overview_table, results_table, to_markdown

from contsp_core.app.files import MADE_BY
from contsp_core.checkpoints import load_model, save_checkpoint
from contsp_core.csp import evaluation
from contsp_core.csp.candidates import SOURCES
from contsp_core.csp.evaluation import (
    METHODS,
    EvaluationConfig,
    compare_settings,
    evaluate_checkpoint,
    evaluate_cifs,
    fill_folder,
    keep_best,
    method_label,
    read_samples,
    write_samples,
)
from contsp_core.csp.metrics import evaluate_csp
from contsp_core.data import choose, load_split
from contsp_core.energy import EnergyConfig
from contsp_core.mala import STRAIN
from contsp_core.training import initial_model

SMALL = {"width": 8, "n_conv": 1, "n_basis": 8, "cutoff_multiple": 1.5}
NOISY = EnergyConfig(**SMALL, noise_min=0.02, noise_max=1.0, spectral_norm=False)
PLAIN = EnergyConfig(**SMALL)
QUICK = EvaluationConfig(n_structures=3, n_samples=2, n_steps=3, seed=1, n_jobs=1)


@pytest.fixture(scope="module")
def training():
    return load_split("prototypes", "train").crystals.to(torch.float32)


@pytest.fixture(scope="module")
def checkpoint(training, tmp_path_factory):
    model = initial_model(training, NOISY, seed=0).eval().requires_grad_(False)
    settings = {"dataset": "prototypes", "n_structures": 368, "training": {"objective": "score_matching"}}
    return save_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors", model, settings)


def cesium_chloride(a=3.5, shift=0.0):
    return Structure(Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5 + shift]])


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Files


def test_samples_return_from_files_with_gaps_and_energies(tmp_path):
    first = cesium_chloride(3.456789)
    first.properties["energy"] = -1.5
    write_samples(tmp_path, "a", [first, None, cesium_chloride(4.0)])
    ((read, gap, last, absent),) = read_samples(tmp_path, ["a"], 4)
    assert (gap, absent) == (None, None)
    assert read.properties["energy"] == -1.5
    assert "energy" not in last.properties
    assert read.lattice.abc == pytest.approx(first.lattice.abc, abs=1e-6)
    assert np.allclose(read.distance_matrix, first.distance_matrix, atol=1e-6)


def test_a_source_that_makes_fewer_leaves_no_gap_to_fill(tmp_path):
    """A sample that was never made is not one that was lost."""
    for structures in ([cesium_chloride(), None], [None, None]):
        write_samples(tmp_path, "a", structures)
        assert evaluation._is_complete(tmp_path / "a")
    write_samples(tmp_path, "b", [cesium_chloride(), cesium_chloride()])
    (tmp_path / "b" / "01.cif").unlink()
    assert not evaluation._is_complete(tmp_path / "b")


def test_files_of_others_may_count_from_one_and_be_broken(tmp_path):
    for number in (1, 2, 10):
        (tmp_path / "x").mkdir(exist_ok=True)
        cesium_chloride().to(str(tmp_path / "x" / f"{number}.cif"))
    (tmp_path / "x" / "2.cif").write_text("no cif")
    with pytest.warns(UserWarning, match=r"^1 CIF files cannot be read, such as .*x/2\.cif: malformed CIF"):
        (samples, missing) = read_samples(tmp_path, ["x", "y"])
    assert [sample is not None for sample in samples] == [True, *[False] * 8, True]
    assert missing == [None] * 10


def test_a_file_that_takes_too_long_is_as_good_as_missing(tmp_path, monkeypatch):
    """The parser is not ours, and the files are not either."""
    parse = evaluation.parse_cifs

    def hang_on_gold(texts):
        if "Au" in texts[0]:
            deque(itertools.repeat(0), maxlen=0)
        return parse(texts)

    monkeypatch.setattr(evaluation, "parse_cifs", hang_on_gold)
    gold = Structure(Lattice.cubic(4), ["Au"], [[0, 0, 0]])
    write_samples(tmp_path, "a", [cesium_chloride(), gold, cesium_chloride()])
    with pytest.warns(UserWarning, match="a/01.cif: it takes too long"):
        (samples,) = read_samples(tmp_path, ["a"], n_jobs=1, time_limit_s=1.0)
    assert [sample is not None for sample in samples] == [True, False, True]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x/best.cif", "no number"),
        ("x/99999999999.cif", "no number < 100000"),
        ("x/1.txt", "has no x/0.cif or other"),
        (None, "has no x/0.cif or other"),
    ],
)
def test_wrong_folders_are_named_in_one_line(tmp_path, name, message):
    if name:
        (tmp_path / "x").mkdir()
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=message) as error:
        read_samples(tmp_path if name else tmp_path / "absent", ["x"])
    assert "\n" not in str(error.value)


def test_two_files_of_one_number_are_refused(tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("1.cif", "01.cif"):
        (tmp_path / "x" / name).write_text("")
    with pytest.raises(ValueError, match="expected different ones"):
        read_samples(tmp_path, ["x"])


@pytest.mark.parametrize("material_id", ["../x", "..", ".", "", "a/b", "a\\b", "a\0b", "/x", "summary.json"])
def test_ids_that_leave_the_folder_are_refused(tmp_path, material_id):
    folder = tmp_path / "output"
    for action in (
        lambda: write_samples(folder, material_id, [cesium_chloride()]),
        lambda: fill(folder, [material_id]),
    ):
        with pytest.raises(ValueError, match="material_id is") as error:
            action()
        assert "\n" not in str(error.value)
    assert contents(tmp_path) == {}


def fill(folder, names="abcde", fail_at=None):
    calls = []

    def make(crystals):
        if len(calls) == fail_at:
            raise KeyboardInterrupt
        calls.append("".join(name for name, _ in crystals))
        return [(name, [cesium_chloride(3 + len(species))] * 2) for name, species in crystals]

    sizes = dict(zip("abcde", [5, 1, 3, 2, 4]))
    crystals = [(name, [11] * sizes.get(name, 1)) for name in names]
    fill_folder(folder, crystals, make, EvaluationConfig(n_samples=2, chunk_atoms=6, n_jobs=1))
    return calls


def test_an_interruption_costs_one_part_and_changes_no_file(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fill(whole) == ["a", "e", "c", "db"]  # the largest first, at most 6 atoms or one crystal
    with pytest.raises(KeyboardInterrupt):
        fill(broken, fail_at=2)
    assert fill(broken) == ["c", "db"]
    assert contents(whole) == contents(broken)
    assert fill(broken) == []
    (whole / "d" / "energies.json").unlink()
    (whole / "e" / "01.cif").unlink()
    assert fill(whole) == ["e", "d"]
    assert contents(whole) == contents(broken)


def test_crystals_of_one_composition_are_made_together(tmp_path):
    """They have the same samples, which are then made once."""
    calls, species = [], {"a": [11, 17], "b": [3, 9], "c": [17, 11], "d": [9, 3]}

    def make(crystals):
        calls.append([name for name, _ in crystals])
        return [(name, [None]) for name, _ in crystals]

    fill_folder(tmp_path, list(species.items()), make, EvaluationConfig(n_samples=1, chunk_atoms=4, n_jobs=1))
    assert calls == [["b", "d"], ["a", "c"]]


def test_a_write_that_fails_leaves_no_file_that_looks_complete(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_samples(tmp_path, "a", [cesium_chloride()])
    assert contents(tmp_path) == {}


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    compare_settings(tmp_path, {"seed": 0, "n_steps": None})
    compare_settings(tmp_path, {"seed": 0, "n_steps": None})
    with pytest.raises(ValueError, match="seed=0, expected 1: choose another folder") as error:
        compare_settings(tmp_path, {"seed": 1, "n_steps": None})
    assert "\n" not in str(error.value)


# The driver


def test_what_needs_a_model_is_refused_before_the_folder_is_touched(tmp_path):
    with pytest.raises(ValueError, match="checkpoint is None, expected one for source 'chains'"):
        evaluate_checkpoint(None, "prototypes", tmp_path / "new", QUICK)
    assert not (tmp_path / "new").exists()


def test_without_any_template_nothing_is_matched(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "make_candidates", lambda species, **_: [[None] * 2 for _ in species])
    settings = replace(QUICK, source="templates", n_steps=None)
    scores = evaluate_checkpoint(None, "prototypes", tmp_path, settings).summary["scores"]
    assert (scores["match_rate"], scores["n_missing"], scores["n_predictions"]) == (0, 6, 6)


def test_a_damaged_file_of_energies_is_named(tmp_path):
    write_samples(tmp_path, "x", [cesium_chloride()])
    for content in ("{", "[1, 2]", "null", '{"00.cif": [1]}', '{"00.cif": "low"}'):
        (tmp_path / "x" / "energies.json").write_text(content)
        with pytest.raises(ValueError, match=r"x/energies\.json is damaged"):
            read_samples(tmp_path, ["x"], n_jobs=1, progress=False)


def test_a_checkpoint_is_scored_once_and_again_from_its_files(checkpoint, tmp_path, monkeypatch):
    first = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, QUICK)
    assert len(list(tmp_path.glob("*/*.cif"))) == 6
    assert (first.summary["settings"]["n_steps"], first.summary["settings"]["seed"]) == (3, 1)
    assert json.loads((tmp_path / "summary.json").read_text())["scores"]["n_references"] == 3
    before = contents(tmp_path)
    monkeypatch.setattr(evaluation, "make_candidates", lambda *_, **__: pytest.fail("sampled again"))
    again = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, QUICK)
    assert contents(tmp_path) == before
    pd.testing.assert_frame_equal(again.table, first.table)
    for name, value in {"n_samples": 4, "n_steps": 4, "seed": 2, "source": "start_descended", "split": "val"}.items():
        with pytest.raises(ValueError, match=f"{name}='?{getattr(QUICK, name)}'?, expected '?{value}"):
            evaluate_checkpoint(checkpoint, "prototypes", tmp_path, replace(QUICK, **{name: value}))
    with pytest.raises(ValueError, match=r"checkpoint='tiny-.*', expected 'prototypes-"):
        evaluate_checkpoint("prototypes", "prototypes", tmp_path, QUICK)


def test_the_best_of_three_is_the_one_of_lowest_energy_among_the_same_chains(checkpoint, tmp_path):
    settings = replace(QUICK, n_samples=2, best_of=3)
    every = evaluate_checkpoint(checkpoint, "prototypes", tmp_path / "every", replace(QUICK, n_samples=6))
    found = evaluate_checkpoint(checkpoint, "prototypes", tmp_path / "best", settings)
    energies = np.array(every.table["energy"].tolist()).reshape(-1, 2, 3)
    np.testing.assert_allclose(found.table["energy"].tolist(), energies.min(axis=2), atol=1e-4)
    assert np.ptp(energies, axis=2).min() > 1e-3 and energies.argmin(axis=2).any()
    assert found.summary["settings"]["method"].endswith(", best of 3")
    assert results_table([found.summary], published=False)["n_steps"].tolist() == [9, 9, 9]
    with pytest.raises(ValueError, match="best_of=3, expected 1"):
        evaluate_checkpoint(checkpoint, "prototypes", tmp_path / "best", replace(settings, best_of=1))
    with pytest.raises(ValueError, match="checkpoint is None, expected one for source 'templates' and best_of 3"):
        evaluate_checkpoint(None, "prototypes", tmp_path / "new", replace(settings, source="templates"))


def test_what_has_no_energy_is_kept_only_where_there_is_nothing_else():
    low, high, none = (cesium_chloride() for _ in range(3))
    for structure, energy in ((low, -1.0), (high, 1.0), (none, math.nan)):
        structure.properties["energy"] = energy
    kept = keep_best([None, high, low, none, high, None, None, None, None], 3)
    assert kept[0] is low and kept[1] is high and kept[2] is None


def test_samples_are_made_with_the_seed_of_the_settings(checkpoint, tmp_path, monkeypatch):
    seeds = []

    def make_none(species, seed, **_):
        seeds.append(seed)
        return [[None] * 2 for _ in species]

    monkeypatch.setattr(evaluation, "make_candidates", make_none)
    evaluate_checkpoint(checkpoint, "prototypes", tmp_path, replace(QUICK, seed=5))
    assert set(seeds) == {5}


@pytest.mark.parametrize("source", ["chains", "start_descended", "templates"])
def test_half_of_the_samples_deleted_come_back_with_the_same_scores(checkpoint, tmp_path, source):
    settings = EvaluationConfig(source=source, n_structures=4, n_samples=3, n_steps=3, n_jobs=1)
    first = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, settings)
    before = contents(tmp_path)
    for path in sorted(tmp_path.glob("*/*.cif"))[:6]:
        path.unlink()
    again = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, settings)
    assert contents(tmp_path).keys() == before.keys()
    for (got, _), (expected, _) in zip(values(again), values(first), strict=True):
        assert got == pytest.approx(expected, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize("source", ["chains", "start_descended"])
def test_samples_that_cannot_be_read_are_told_but_where_a_descent_leaves_atoms_on_each_other(
    checkpoint, tmp_path, source
):
    settings = EvaluationConfig(source=source, n_structures=2, n_samples=2, n_steps=2, n_jobs=1)
    evaluate_checkpoint(checkpoint, "prototypes", tmp_path, settings)
    sorted(tmp_path.glob("*/*.cif"))[0].write_text("data_none")
    told = pytest.warns(UserWarning, match="1 CIF files cannot be read")
    with told if source == "chains" else nullcontext():
        assert evaluate_checkpoint(checkpoint, "prototypes", tmp_path, settings).summary["scores"]["n_missing"] == 1


def values(result):
    """Every number of the summary with its name."""
    scores = result.summary["scores"]
    return [(number, name) for name, value in scores.items() for number in np.ravel(value)]


def test_more_crystals_use_the_samples_there(checkpoint, tmp_path):
    few = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, QUICK)
    before = contents(tmp_path)
    n = len(load_split("prototypes", "test"))
    more = evaluate_checkpoint(
        checkpoint, "prototypes", tmp_path, EvaluationConfig(n_structures=n, n_samples=2, n_steps=3, seed=1, n_jobs=1)
    )
    samples = {name: content for name, content in before.items() if "/" in name}
    assert samples.items() <= contents(tmp_path).items()
    for name in few.table.index:
        assert more.table.loc[name, "rms"] == pytest.approx(few.table.loc[name, "rms"], nan_ok=True)


def test_the_files_hold_the_scores(checkpoint, tmp_path):
    """The summary and the table on disk, against the matcher's driver called on the samples on disk."""
    settings = EvaluationConfig(source="templates", n_structures=4, n_samples=3, n_jobs=1)
    result = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, settings)
    references = result.references
    expected, _ = evaluate_csp(references.structures, read_samples(tmp_path, references.material_ids, 3), 1)
    written = json.loads((tmp_path / "summary.json").read_text())["scores"]
    assert written["match_rate"] == expected["match_rate"] > 0
    assert written["match_rate_good@1"] == expected["match_rate_good@1"]
    assert result.summary["settings"]["training_data"] == load_split("prototypes", "train").source.blob_id
    table = pd.read_csv(tmp_path / "per_crystal.csv", index_col="material_id", keep_default_na=False)
    assert table.index.tolist() == list(references.material_ids)
    assert json.loads(table["rms"].iloc[0])[0] == result.table["rms"].iloc[0][0]


def test_a_folder_of_perfect_cifs_scores_perfectly_and_missing_files_count(checkpoint, tmp_path):
    split = load_split("prototypes", "test")
    for row in choose(range(len(split)), 4, 0)[:3]:
        folder = tmp_path / "peer" / split.material_ids[row]
        folder.mkdir(parents=True)
        split[row].to(str(folder / "0.cif"))
    settings = EvaluationConfig(n_structures=4, n_jobs=1)
    result = evaluate_cifs(tmp_path / "peer", "prototypes", tmp_path / "scores", settings, checkpoint)
    scores = result.summary["scores"]
    assert (scores["match_rate"], scores["match_rate_strict"], scores["match_rate_good"]) == (0.75, 0.75, 0.75)
    assert scores["n_missing"] == 1
    assert scores["rmse"] == pytest.approx(0, abs=1e-5)
    assert result.table["energy"].iloc[0][0] == pytest.approx(result.table["reference_energy"].iloc[0], abs=1e-3)
    assert results_table([result.summary], published=False)["method"].unique() == ["CIF files"]
    shutil.copytree(tmp_path / "peer", tmp_path / "other")
    with pytest.raises(ValueError, match=r"samples made with cif_dir='.*peer', expected '.*other'"):
        evaluate_cifs(tmp_path / "other", "prototypes", tmp_path / "scores", settings, checkpoint)
    (tmp_path / "empty").mkdir()
    for name in ("absent", "empty"):
        with pytest.raises(ValueError, match=rf"folder '.*{name}' has no .*/0\.cif or other sample"):
            evaluate_cifs(tmp_path / name, "prototypes", tmp_path / "nothing", settings, checkpoint)
    (tmp_path / "empty" / split.material_ids[row]).mkdir()
    (tmp_path / "empty" / split.material_ids[row] / "best.cif").touch()
    with pytest.raises(ValueError, match=r"best\.cif has no number"):
        evaluate_cifs(tmp_path / "empty", "prototypes", tmp_path / "nothing", settings, checkpoint)
    assert not (tmp_path / "nothing").exists()
    for folder, file in (("prediction", MADE_BY), ("mine", "summary.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("{}")
    with pytest.raises(ValueError, match=r"prediction' has results, but no settings\.json"):
        evaluate_checkpoint(checkpoint, "prototypes", tmp_path / "prediction", settings)
    with pytest.raises(ValueError, match=r"mine' has results, but no settings\.json"):
        evaluate_cifs(tmp_path / "peer", "prototypes", tmp_path / "mine", settings, checkpoint)
    rows = pd.read_csv(tmp_path / "scores" / "per_crystal.csv")["rms"]
    assert [json.loads(row, parse_constant=pytest.fail) for row in rows].count([None]) == 1  # NaN is no JSON


def test_a_crystal_without_energy_costs_only_itself(checkpoint, tmp_path):
    split, huge = load_split("prototypes", "test"), Structure(Lattice.cubic(1e15), ["H", "H"], [[0, 0, 0], [0.5] * 3])
    for row in (rows := choose(range(len(split)), 3, 0)):
        folder = tmp_path / "cifs" / split.material_ids[row]
        folder.mkdir(parents=True)
        for number, structure in enumerate([split[row], huge if row == rows[1] else split[row]]):
            structure.to(str(folder / f"{number}.cif"))
    settings = EvaluationConfig(n_structures=3, n_jobs=1)
    scores = evaluate_cifs(tmp_path / "cifs", "prototypes", tmp_path / "out", settings, checkpoint).summary["scores"]
    assert (scores["n_missing"], scores["match_rate@1"], scores["match_rate_lowest_energy"]) == (1, 1.0, 1.0)


def test_a_file_in_the_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file' is a file, expected a folder"):
        evaluate_checkpoint("prototypes", "prototypes", tmp_path / "file", QUICK)
    assert (tmp_path / "file").read_text() == "mine"


def test_of_two_evaluations_that_begin_at_once_one_finds_the_folder_taken(tmp_path, monkeypatch):
    """Both have looked for settings and found none."""
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    evaluation.compare_settings(tmp_path, {"seed": 0})
    with pytest.raises(ValueError, match="holds samples made with seed=0, expected 1"):
        evaluation.compare_settings(tmp_path, {"seed": 1})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0}
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError))  # a file system without links
    (tmp_path / "new").mkdir()
    evaluation.compare_settings(tmp_path / "new", {"seed": 1})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "guess"}, "source is 'guess'"),
        ({"n_samples": 0}, "n_samples is 0, expected an integer from 1 to 1000000"),
        ({"n_steps": 10**7}, "n_steps is 10000000, expected an integer from 1"),
        ({"split": "all"}, "split is 'all', expected one of train, val, test"),
        ({"n_structures": -5}, "n_structures is -5, expected an integer ≥ 1"),
        ({"seed": -1}, "seed is -1, expected an integer from 0"),
        ({"n_samples": "2"}, "n_samples is '2', expected an integer"),
        ({"n_jobs": 0}, "n_jobs is 0, expected -1 .all cores. or an integer ≥ 1"),
        ({"n_jobs": -2}, "n_jobs is -2, expected -1 "),
        ({"n_jobs": 1.5}, "n_jobs is 1.5, expected -1 "),
        ({"time_limit_s": 0}, "time_limit_s is 0, expected a positive number"),
        ({"time_limit_s": math.inf}, "time_limit_s is inf, expected a positive number"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        EvaluationConfig(**options)
    assert "\n" not in str(error.value)


def test_an_unknown_data_set_is_named(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="name='x'"):
        evaluate_checkpoint(checkpoint, "x", tmp_path, QUICK)


def test_methods_are_called_what_they_are(checkpoint, training, tmp_path):
    assert set(METHODS) | {"chains"} == set(SOURCES)
    result = evaluate_checkpoint(checkpoint, "prototypes", tmp_path / "noise", QUICK)
    assert result.summary["settings"]["method"] == "score matching, noise levels"
    model = initial_model(training, PLAIN, seed=0).eval().requires_grad_(False)
    settings = {"dataset": "prototypes", "training": {"objective": "contrastive_divergence"}}
    plain = save_checkpoint(tmp_path / "plain.safetensors", model, settings)
    result = evaluate_checkpoint(plain, "prototypes", tmp_path / "mala", QUICK)
    assert result.summary["settings"]["method"] == "contrastive divergence, annealed MALA"
    model.sampling = STRAIN
    assert method_label("chains", plain, model) == "contrastive divergence, annealed MALA, strain moves"


@pytest.mark.parametrize(("split", "share"), [("train", 1.0), ("test", 0.0)])
def test_crystals_with_the_formula_of_a_training_crystal_are_counted(checkpoint, tmp_path, split, share):
    settings = replace(QUICK, source="start", split=split)
    summary = evaluate_checkpoint(checkpoint, "prototypes", tmp_path, settings).summary
    assert summary["data"]["n_seen"] == share * QUICK.n_structures
    remarks = results_table([summary], published=False)["remarks"][0]
    assert ("3 have the formula of a training crystal" in remarks) == bool(share)


def test_what_made_the_samples_names_the_judge_too():
    made_by = evaluation._load("mp20", "prototypes", None)[3]["checkpoint"]
    assert re.fullmatch(r"mp20-\w{12} \+ mp20_judge-\w{12}", made_by)
    assert evaluation._load(None, "prototypes", None)[3]["checkpoint"] is None


# What scores are compared with


def summary(dataset="perov5", official=True, n_structures=100):
    scores = {"n_references": n_structures, "n_samples": 20, "n_missing": 0}
    for end in ("@1", "@20", "_lowest_energy"):
        scores |= {f"match_rate{end}": 0.5, f"match_rate{end}_interval": [0.4, 0.6], f"rmse{end}": 0.1}
        scores |= {f"match_rate_strict{end}": 0.3, f"match_rate_good{end}": 0.2}
    settings = {"dataset": dataset, "split": "test", "method": "ours", "n_samples": 20, "seed": 0, "n_steps": 100}
    settings |= {"n_structures": n_structures, "trained_on": {"n_structures": 7}}
    return {"settings": settings, "data": {"official": official, "n_crystals": 3785}, "scores": scores}


def test_results_are_numbers_that_stand_beside_the_published_ones():
    table = results_table([summary(), summary("mp20", official=False, n_structures=3785)])
    perov5 = table[table["dataset"] == "perov5"].set_index(["method", "k", "filter"])
    assert perov5.loc[("DiffCSP", 20, "valid samples"), "match_rate"] == pytest.approx(0.986)
    ours = table[(table["dataset"] == "mp20") & (table["method"] == "ours")]
    assert ours["k"].tolist() == [1, 20, 1]
    assert ours["chosen_from"].tolist() == [0, 0, 20]
    assert set(ours["remarks"]) == {"not the official split; trained on 7 crystals"}
    assert "100 of 3785 crystals, chosen by seed 0" in table["remarks"][0]
    mp20 = table[(table["dataset"] == "mp20") & (table["method"] == "DiffCSP") & (table["k"] == 1)]
    assert mp20.set_index("filter")["match_rate"].to_dict() == {"valid samples": 0.5149, "none": 0.5782}


def test_a_model_without_energies_has_no_row_for_the_lowest():
    without = summary()
    without["scores"]["match_rate_lowest_energy"] = None  # as read from JSON
    assert results_table([without], published=False)["k"].tolist() == [1, 20]


def test_the_command_prints_each_method_in_one_row(tmp_path, capsys):
    files = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, dataset in zip(files, ("perov5", "mp20")):
        results_table([summary(dataset)]).to_csv(path, index=False)
    results.main([str(path) for path in files])
    lines = capsys.readouterr().out.splitlines()
    end = " | strict / good | RMSE |"
    assert lines[0].startswith(f"| data set | method | filter | k = 1 (%){end} k = 20 (%){end} lowest energy of 20 (%)")
    cells = "50.0 [40.0, 60.0] | 30.0 / 20.0 | 0.1000"
    assert lines[2] == f"| perov5 | ours | none | {cells} | {cells} | {cells} |"
    assert "| perov5 | DiffCSP | valid samples | 52.02 |  | 0.0760 | 98.60 |  | 0.0128 |  |  |  |" in lines
    (tmp_path / "summary.json").write_text(json.dumps(summary("perov5")))
    results.main([str(tmp_path / "summary.json")])
    assert capsys.readouterr().out.splitlines() == lines[:3]
    with pytest.raises(SystemExit):
        results.main([str(tmp_path / "absent.csv")])
    assert "is no file" in capsys.readouterr().err


def test_the_module_is_a_command():
    command = [sys.executable, str(Path(__file__).parent.parent / "notebooks" / "results.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: python notebooks/results.py" in done.stderr


def test_two_rows_of_one_name_are_not_mixed_up():
    twice = results_table([summary(), summary(n_structures=50)])
    with pytest.raises(ValueError, match="results has 'ours' on 'perov5' twice"):
        overview_table(twice)
    same = results_table([summary(), summary()])
    assert len(overview_table(same)) == len(overview_table(results_table([summary()])))


def test_a_missing_number_is_a_dash():
    none = summary()
    none["scores"] |= {"match_rate@1": 0.0, "rmse@1": math.nan}
    table = overview_table(results_table([none], published=False))
    assert table.iloc[0, 5] == "–"
    assert to_markdown(table).count("\n") == 3


def test_the_method_says_what_the_training_was(tmp_path):
    made = {"training": {"objective": "score_matching"}}
    model = load_model("prototypes")
    for header, label in (
        (made, "score matching"),
        (made | {"negatives": "found.npz"}, "score matching and negatives"),
    ):
        path = save_checkpoint(tmp_path / "model.safetensors", model, header)
        assert method_label("chains", path, model) == f"{label}, noise levels"
    assert method_label("start", path, model) == "the sampler's start, no gradient"
