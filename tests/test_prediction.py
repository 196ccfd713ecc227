"""Candidates: distinct ones are kept, described as handbooks do, and survive the way through a file."""

from __future__ import annotations

import pytest
from pymatgen.core import Lattice, Structure

from contsp_core.csp import candidates as prediction
from contsp_core.csp.candidates import (
    compare_with_known,
    describe_structures,
    is_formula,
    known_crystals,
    rank_distinct,
    standardise,
    write_cifs,
)
from contsp_core.data import load_split

ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
CESIUM_CHLORIDE = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def with_energy(structure: Structure, energy: float) -> Structure:
    """A copy that carries an energy."""
    copy = structure.copy()
    copy.properties["energy"] = energy
    return copy


@pytest.fixture
def candidates() -> list[Structure]:
    """Rock salt in three descriptions, one slightly disturbed; CsCl-type; two atoms on top of each other."""
    primitive = ROCK_SALT.get_primitive_structure()
    sheared = primitive.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, 1]], in_place=False)
    disturbed = primitive.copy()
    disturbed.translate_sites(0, [0.02, 0, 0], frac_coords=False)
    overlapping = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]])
    units = (disturbed, CESIUM_CHLORIDE, primitive, sheared, overlapping)
    return [with_energy(unit, energy) for unit, energy in zip(units, (0.4, -0.5, -1.0, 0.2, -9.0))]


def test_each_solid_is_kept_once_with_its_lowest_energy(candidates):
    kept, counts = rank_distinct(candidates)
    assert [structure.properties["energy"] for structure in kept] == [-1.0, -0.5]
    assert counts == [3, 1]


def test_description_agrees_with_the_handbook(candidates):
    kept, counts = rank_distinct(candidates)
    table = describe_structures(kept, counts)
    assert table["space group"].tolist() == ["Fm-3m (225)", "Pm-3m (221)"]
    assert table.loc[1, ["a", "b", "c"]].tolist() == pytest.approx([5.64] * 3, abs=1e-3)
    assert table.loc[1, ["α", "β", "γ"]].tolist() == pytest.approx([90] * 3, abs=1e-3)
    assert table.loc[1, "density"] == pytest.approx(2.16, abs=0.01)  # halite, g/cm³
    assert table.loc[1, "V/atom"] == pytest.approx(5.64**3 / 8)
    assert table["found"].tolist() == [3, 1]


def test_standard_cell_is_the_conventional_one_and_keeps_the_energy():
    standard = standardise(with_energy(ROCK_SALT.get_primitive_structure(), 2.0))
    assert len(standard) == 8
    assert standard.properties["energy"] == 2.0


def test_files_hold_the_structures_and_replace_older_ones(candidates, tmp_path):
    write_cifs(candidates, tmp_path)
    paths = write_cifs(candidates[1:3], tmp_path)
    assert [path.name for path in paths] == ["01_NaCl.cif", "02_NaCl.cif"]
    assert sorted(tmp_path.iterdir()) == paths
    for path, structure in zip(paths, candidates[1:3]):
        read = Structure.from_file(path)
        assert read.composition == structure.composition
        assert read.volume == pytest.approx(structure.volume, rel=1e-6)


def test_known_crystals_are_found_in_their_split_and_matched_by_rank():
    known = known_crystals("prototypes", "Na4Cl4")
    assert list(known) == ["rock-salt-NaCl (val)"]
    table = compare_with_known([CESIUM_CHLORIDE, ROCK_SALT], known)
    assert table["rank"].tolist() == [2]
    assert table["rms"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert compare_with_known([CESIUM_CHLORIDE], known)["rank"].isna().all()


def test_templates_follow_the_training_crystals(monkeypatch):
    def exchanged(source, species, n_samples, seed, *, model, library):
        return [[with_energy(library.substitute(species[0], 1)[0], 0.0), None]]

    class Model:
        settings = {"dataset": "prototypes"}  # noqa: RUF012

    monkeypatch.setattr(prediction, "make_candidates", exchanged)
    found = prediction.gather_candidates(Model(), "NaCl", "templates")
    assert [structure.composition.reduced_formula for structure in found] == ["NaCl"]
    assert [structure.properties["source"] for structure in found] == ["templates"]
    training = [structure.composition.anonymized_formula for structure in load_split("prototypes", "train")]
    assert found[0].composition.anonymized_formula in training


def test_wrong_argument_is_named():
    with pytest.raises(ValueError, match="source is 'luck', expected one of chains, templates, both"):
        prediction.gather_candidates(None, "NaCl", "luck")
    with pytest.raises(ValueError, match="expected ≥ 1 structure"):
        rank_distinct([])
    with pytest.raises(ValueError, match=r"properties\['energy'\]"):
        rank_distinct([ROCK_SALT])
    assert is_formula("BaTiO3") is None
    for wrong in ("Xx2", "", 5, None):
        assert "BaTiO3" in is_formula(wrong)
