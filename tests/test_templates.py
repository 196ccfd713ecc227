"""Known answers for the baselines: atomic volumes, random structures, element substitution."""

import numpy as np
import pytest
from pymatgen.core import Composition, Lattice, Structure

from contsp_core.csp.candidates import (
    TemplateLibrary,
    element_distances,
    fit_atomic_volumes,
    random_structures,
    substitute_templates,
)
from contsp_core.csp.metrics import score_pair

BA, SR, TI, ZR, O, S, NA, CL, K, BR = 56, 38, 22, 40, 8, 16, 11, 17, 19, 35  # noqa: E741


def perovskite(a_site, b_site, anion, a=4.0):
    coords = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(a), [a_site, b_site, anion, anion, anion], coords)


def cesium_chloride(first, second, a=3.5):
    return Structure(Lattice.cubic(a), [first, second], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_atomic_volumes_are_recovered_from_additive_volumes():
    rng = np.random.default_rng(0)
    true = rng.uniform(5, 40, size=101)
    species = [rng.integers(1, 21, size=rng.integers(1, 12)).tolist() for _ in range(2000)]
    volumes = [true[numbers].sum() for numbers in species]
    fitted = fit_atomic_volumes(species, volumes, ridge=1e-6)
    assert fitted.shape == (101,)
    assert fitted[1:21] == pytest.approx(true[1:21], rel=1e-4)
    mean = np.mean([volume / len(numbers) for volume, numbers in zip(volumes, species)])
    assert fitted[50] == pytest.approx(mean)  # never seen


def test_atomic_volumes_stay_positive():
    assert (fit_atomic_volumes([[1], [1, 2], [2]], [1.0, 100.0, 1.0], ridge=0.01) > 0).all()


@pytest.mark.parametrize(
    ("species", "volumes", "message"),
    [([], [], "species has 0"), ([[1]], [1.0, 2.0], "volumes 2"), ([[1], [2]], [1.0, -1.0], "volumes holds -1.0")],
)
def test_wrong_volumes_are_named(species, volumes, message):
    with pytest.raises(ValueError, match=message):
        fit_atomic_volumes(species, volumes)


def test_random_structures_have_the_right_volume_species_and_seed():
    species = [BA, TI, O, O, O]
    volumes = np.arange(101.0)
    for structure in random_structures(species, 5, seed=1, atomic_volumes=volumes):
        assert structure.volume == pytest.approx(sum(species))
        assert list(structure.atomic_numbers) == species
    for structure in random_structures(species, 5, density=0.1):
        assert structure.volume == pytest.approx(50)
    first, again, other = (random_structures(species, 3, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_distances_of_elements_are_a_metric_that_knows_chemical_families():
    distances = element_distances()
    assert np.isfinite(distances).all()
    assert np.allclose(distances, distances.T)
    assert (np.diag(distances) == 0).all()
    assert distances[CL, BR] < distances[CL, NA]
    assert distances[BA, SR] < distances[BA, TI] < distances[BA, O]


def test_substitution_gives_the_target_in_the_structure_of_the_template():
    """SrTiO3 in a training set, BaTiO3 asked for; volumes scale by the ratio of the additive ones."""
    training = [perovskite(SR, TI, O, 3.9), cesium_chloride(NA, CL), perovskite(BA, ZR, S, 5.0)]
    (nearest, *others) = substitute_templates([BA, TI, O, O, O], training, n=10)
    assert nearest.composition == Composition("BaTiO3")
    assert score_pair(nearest, perovskite(BA, TI, O))[0] == pytest.approx(0, abs=1e-6)
    volumes = TemplateLibrary(training).atomic_volumes
    ratio = volumes[[BA, TI, O, O, O]].sum() / volumes[[SR, TI, O, O, O]].sum()
    assert nearest.volume == pytest.approx(3.9**3 * ratio)
    assert len(others) == 3  # two templates, two ways to place Ba and Ti
    assert all(other.composition == Composition("BaTiO3") for other in others)


def test_a_training_crystal_of_the_same_composition_is_returned_unchanged_and_first():
    known = perovskite(BA, TI, O, 4.03)
    training = [perovskite(SR, ZR, O), perovskite(SR, TI, O, 3.9), known]
    nearest = substitute_templates([O, O, TI, BA, O], training, n=1)[0]
    assert nearest == known


def test_all_assignments_of_elements_are_candidates_and_the_likely_one_is_first():
    candidates = substitute_templates([K, BR], [cesium_chloride(NA, CL)], n=5)
    first_sites = [candidate[0].specie.Z for candidate in candidates]
    assert first_sites == [K, BR]  # K on the site of Na first


def test_smaller_templates_are_repeated_only_if_needed():
    training = [cesium_chloride(NA, CL), Structure(Lattice.cubic(5), [NA, NA, CL, CL], np.eye(4, 3) * 0.4)]
    candidates = substitute_templates([NA, NA, CL, CL], training, n=4)
    assert [len(candidate) for candidate in candidates] == [4] * 4
    assert score_pair(candidates[0], training[1])[0] == pytest.approx(0, abs=1e-6)
    assert score_pair(candidates[2], training[0])[0] == pytest.approx(0, abs=1e-6)


def test_a_new_stoichiometry_gives_no_candidate():
    assert substitute_templates([NA, NA, CL], [cesium_chloride(NA, CL)], n=5) == []


def test_a_split_is_accepted_and_results_repeat():
    class Split:
        structures = [perovskite(SR, TI, O, a) for a in (3.8, 3.9, 4.0, 4.1)]  # noqa: RUF012

    volumes = [[s.volume for s in substitute_templates([BA, TI, O, O, O], Split(), 3, seed)] for seed in (0, 0, 1, 2)]
    assert volumes[0] == volumes[1]
    assert len({tuple(v) for v in volumes}) > 1  # ties are in random order


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match="species is empty"):
        substitute_templates([], [cesium_chloride(NA, CL)], 1)
    with pytest.raises(ValueError, match="training is empty"):
        substitute_templates([NA], [], 1)
    with pytest.raises(ValueError, match="n is -1"):
        random_structures([NA], -1)
