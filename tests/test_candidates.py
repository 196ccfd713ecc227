"""Candidates: each source gives what it says, one energy judges them all, and descriptions agree with handbooks."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from predictions import compare_with_known, known_crystals
from pymatgen.core import Composition, Lattice, Structure
from pymatgen.core.structure_matcher import StructureMatcher

from contsp_core import load_model
from contsp_core.crystals import Crystals, keyed_rng
from contsp_core.csp.candidates import (
    SOURCES,
    TemplateLibrary,
    descend,
    describe,
    is_crowded,
    make_candidates,
    rank_distinct,
    relax,
    shortest_distance,
    standardise,
    with_energies,
)
from contsp_core.csp.metrics import score_pair
from contsp_core.data import load_split
from contsp_core.energy import EnergyConfig
from contsp_core.sampler import element_distances, run_chains, sampling_config

BA, SR, TI, ZR, S, NA, CL, K, BR, OXYGEN = 56, 38, 22, 40, 16, 11, 17, 19, 35, 8
ROCK_SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
BATIO3 = [BA, TI, OXYGEN, OXYGEN, OXYGEN]


def perovskite(a_site, b_site, anion, a=4.0):
    coords = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(a), [a_site, b_site, anion, anion, anion], coords)


def cesium_chloride(first=NA, second=CL, a=3.5, shift=0.0):
    return Structure(Lattice.cubic(a), [first, second], [[0, 0, 0], [0.5, 0.5, 0.5 + shift]])


def with_energy(structure, energy):
    labelled = structure.copy()
    labelled.properties["energy"] = energy
    return labelled


@pytest.fixture(scope="module")
def model():
    return load_model("prototypes")


@pytest.fixture(scope="module")
def library():
    return TemplateLibrary(load_split("prototypes", "train"))


@pytest.fixture
def candidates():
    """Rock salt in three descriptions, one slightly disturbed; CsCl-type; two atoms on top of each other."""
    primitive = ROCK_SALT.get_primitive_structure()
    sheared = primitive.make_supercell([[1, 1, 0], [0, 1, 0], [0, 0, 1]], in_place=False)
    disturbed = primitive.copy()
    disturbed.translate_sites(0, [0.02, 0, 0], frac_coords=False)
    overlapping = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]])
    units = (disturbed, cesium_chloride(), primitive, sheared, overlapping)
    return [with_energy(unit, energy) for unit, energy in zip(units, (0.4, -0.5, -1.0, 0.2, -9.0))]


# Sources


@pytest.mark.parametrize("source", SOURCES)
def test_a_candidate_depends_on_the_seed_its_formula_and_its_number_only(source, model, library):
    options = {"model": model, "library": library, "n_steps": 3}
    alone = make_candidates(source, [[TI, OXYGEN, OXYGEN]], 2, 5, **options)[0]
    species = [[NA, CL], [OXYGEN, TI, OXYGEN]]
    among = make_candidates(source, species, 3, 5, batch_atoms=4, **options)
    for numbers, found in zip(species, among, strict=True):
        assert len(found) == 3
        for candidate in found:
            assert sorted(candidate.atomic_numbers) == sorted(numbers)
            assert math.isfinite(candidate.properties["energy"])
    for one, other in zip(alone, among[1]):
        assert one.lattice.parameters == pytest.approx(other.lattice.parameters, abs=1e-3)
        assert one.properties["energy"] == pytest.approx(other.properties["energy"], abs=1e-3)
    other_seed = make_candidates(source, [[TI, OXYGEN, OXYGEN]], 2, 6, **options)[0]
    assert source == "templates" or alone[0] != other_seed[0]


@pytest.mark.parametrize("source", SOURCES)
def test_the_judge_ranks_and_moves_nothing(source, model, library):
    judged, judge = copy.deepcopy(model), load_model("perov5")
    vars(judged)["judge"] = judge
    options = {"species": [[TI, OXYGEN, OXYGEN]], "n_samples": 2, "seed": 5, "n_steps": 3, "library": library}
    own, other = (make_candidates(source, model=each, **options)[0] for each in (model, judged))
    crystals = Crystals.from_structures(other)
    assert torch.equal(crystals.positions, Crystals.from_structures(own).positions)
    assert [s.properties["energy"] for s in other] == pytest.approx(judge(crystals).tolist(), rel=1e-4)
    assert [s.properties["energy"] for s in own] == pytest.approx(model(crystals).tolist(), rel=1e-4)


def test_the_start_is_that_of_the_chains(model):
    """Chains run by hand from these structures, with what is left of the same generators, end where samples end."""
    found = make_candidates("start", [[NA, CL]], 3, 4, model=model)[0]
    chains = make_candidates("chains", [[NA, CL]], 3, 4, model=model)[0]
    rng = [keyed_rng(4, (NA, CL), number) for number in range(3)]
    for generator in rng:  # what a start takes: the positions, the strain
        for shape in ((2, 3), (3, 3)):
            draw = torch.randn if shape == (3, 3) else torch.rand
            draw(shape, generator=generator, dtype=torch.float64)
    ends = run_chains(model, Crystals.from_structures(found), sampling_config(model), rng).to_structures()
    for by_hand, sampled in zip(ends, chains, strict=True):
        assert by_hand.volume == pytest.approx(sampled.volume, rel=1e-3)


def test_a_descended_start_spends_the_gradients_of_a_chain(model, monkeypatch):
    spent = []
    monkeypatch.setattr(
        "contsp_core.csp.candidates.energy_and_gradient",
        lambda energy, crystals, *_: spent.append(1) or _zero_gradient(crystals),
    )
    make_candidates("start_descended", [[NA, CL]], 1, 0, model=model)
    assert len(spent) == sampling_config(model).n_steps


def _zero_gradient(crystals):
    return torch.zeros(len(crystals)), torch.zeros_like(crystals.cell), torch.zeros_like(crystals.positions)


def test_too_few_templates_leave_gaps(library):
    found = make_candidates("templates", [[NA] * 7 + [CL] * 11], 2, 0, library=library)
    assert found == [[None, None]]


# Templates


def test_distances_of_elements_are_a_metric_that_knows_chemical_families():
    distances = element_distances()
    assert np.isfinite(distances).all()
    assert np.allclose(distances, distances.T)
    assert (np.diag(distances) == 0).all()
    assert distances[CL, BR] < distances[CL, NA]
    assert distances[BA, SR] < distances[BA, TI] < distances[BA, OXYGEN]


def test_substitution_gives_the_target_in_the_structure_of_the_template():
    """SrTiO3 in a training set, BaTiO3 asked for; volumes scale by the ratio of the additive ones."""
    training = [perovskite(SR, TI, OXYGEN, 3.9), cesium_chloride(), perovskite(BA, ZR, S, 5.0)]
    library = TemplateLibrary(training)
    (nearest, *others) = library.substitute(BATIO3, n=10)
    assert nearest.composition == Composition("BaTiO3")
    assert score_pair(nearest, perovskite(BA, TI, OXYGEN)).rms == pytest.approx(0, abs=1e-6)
    volumes = library.atomic_volumes
    ratio = volumes[BATIO3].sum() / volumes[[SR, TI, OXYGEN, OXYGEN, OXYGEN]].sum()
    assert nearest.volume == pytest.approx(3.9**3 * ratio)
    assert len(others) == 3  # two templates, two ways to place Ba and Ti
    assert all(other.composition == Composition("BaTiO3") for other in others)


def test_a_training_crystal_of_the_same_composition_is_returned_unchanged_and_first():
    known = perovskite(BA, TI, OXYGEN, 4.03)
    training = [perovskite(SR, ZR, OXYGEN), perovskite(SR, TI, OXYGEN, 3.9), known]
    assert TemplateLibrary(training).substitute(BATIO3[::-1], n=1) == [known.copy(properties={"template": 2})]


def test_all_assignments_of_elements_are_candidates_and_the_likely_one_is_first():
    found = TemplateLibrary([cesium_chloride()]).substitute([K, BR], n=5)
    assert [candidate[0].specie.Z for candidate in found] == [K, BR]  # K on the site of Na first


def test_smaller_templates_are_repeated_only_if_needed():
    training = [cesium_chloride(), Structure(Lattice.cubic(5), [NA, NA, CL, CL], np.eye(4, 3) * 0.4)]
    found = TemplateLibrary(training).substitute([NA, NA, CL, CL], n=4)
    assert [len(candidate) for candidate in found] == [4] * 4
    assert score_pair(found[0], training[1]).rms == pytest.approx(0, abs=1e-6)
    assert score_pair(found[2], training[0]).rms == pytest.approx(0, abs=1e-6)


def test_a_new_stoichiometry_gives_no_template():
    assert TemplateLibrary([cesium_chloride()]).substitute([NA, NA, CL], n=5) == []


def test_ties_are_in_random_order_and_repeat():
    library = TemplateLibrary([perovskite(SR, TI, OXYGEN, a) for a in (3.8, 3.9, 4.0, 4.1)])
    volumes = [[s.volume for s in library.substitute(BATIO3, 3, seed)] for seed in (0, 0, 1, 2)]
    assert volumes[0] == volumes[1]
    assert len({tuple(v) for v in volumes}) > 1


# The energy as a judge


class Harmonic(torch.nn.Module):
    """Lowest, 0, for a volume of 30 Å³ a crystal and atoms 1 Å apart (of two)."""

    config, noise_features, use_kernels = EnergyConfig(), None, True

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, crystals):
        gap = crystals.positions[1::2] - crystals.positions[::2]
        return (crystals.volume / 30).log() ** 2 + (gap.norm(dim=1) - 1) ** 2


def test_descent_never_climbs_and_reaches_a_known_minimum(model):
    start = [cesium_chloride(shift=shift) for shift in (0.05, 0.1, 0.15)]
    for noise in (0.15, 0.6):  # at that level, wherever the energy is read
        level = torch.full((3,), noise)
        ends = [Crystals.from_structures(descend(model, start, n, noise)) for n in (1, 5, 20)]
        for earlier, later in itertools.pairwise(model(crystals, level) for crystals in ends):
            assert (later <= earlier + 1e-6).all() and (later < earlier).any()
    near = Structure(
        Lattice.cubic(30 ** (1 / 3)), ["Na", "Cl"], [[0.3, 0.5, 0.5], [0.3 + 1.02 / 30 ** (1 / 3), 0.5, 0.5]]
    )
    steps = [with_energies(Harmonic(), descend(Harmonic(), [near], n))[0].properties["energy"] for n in range(1, 25)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(steps))  # the first ones overshoot
    pair = Structure(Lattice.cubic(3.5), ["Na", "Cl"], [[0.4, 0.4, 0.4], [0.6, 0.6, 0.6]])
    (found,) = descend(Harmonic(), [pair], 200)
    assert found.volume == pytest.approx(30, rel=1e-2)
    assert with_energies(Harmonic(), [found])[0].properties["energy"] < 1e-4


def test_noise_beyond_what_was_trained_is_the_nearest_that_was(model):
    start, low, high = cesium_chloride(shift=0.1), model.config.noise_min, model.config.noise_max
    for beyond, nearest in ((low / 10, low), (10 * high, high)):
        for move in (descend, lambda *args, noise: relax(*args[:2], [keyed_rng(0)], args[2], noise)):
            assert move(model, [start], 3, noise=beyond) == move(model, [start], 3, noise=nearest)


def test_a_short_chain_stays_near_its_start_at_low_noise_only(model):
    start = cesium_chloride()
    moved = [relax(model, [start], [keyed_rng(0)], n_steps=5, noise=noise)[0] for noise in (0.03, 0.9)]
    changes = [abs(structure.volume / start.volume - 1) for structure in moved]
    assert changes[0] < 0.05
    assert changes[0] < changes[1]


# Distinct, described, kept


def energies(groups):
    return [[structure.properties["energy"] for structure in group] for group in groups]


def test_equal_crystals_are_grouped_whatever_their_cell_the_lowest_energy_first(candidates):
    groups = rank_distinct(candidates)
    assert [group[0] for group in energies(groups)] == [-1.0, -0.5]
    assert [len(group) for group in groups] == [3, 1]
    assert all(group == sorted(group) for group in energies(groups))


def test_groups_are_those_that_pymatgen_makes_by_comparing_as_given(library):
    units = [*library.substitute([NA, CL], 6), *library.substitute([NA, NA, CL, CL], 10)]
    rng, made = np.random.default_rng(0), []
    for number, unit in enumerate(units * 2):
        disturbed = unit.copy().perturb(rng.uniform(0, 0.2), seed=number)
        made.append(disturbed.make_supercell([1 + number % 2, 1, 1], in_place=False))
        made[-1].properties = {"energy": float(number)}
    expected = StructureMatcher().group_structures(made)
    assert energies(rank_distinct(made[::-1])) == energies(expected)
    assert 1 < len(expected) < len(made)


def test_description_agrees_with_the_handbook(candidates):
    table = describe(rank_distinct(candidates))
    assert table["space group"].tolist() == ["Fm-3m (225)", "Pm-3m (221)"]
    assert table.loc[1, ["a", "b", "c"]].tolist() == pytest.approx([5.64] * 3, abs=1e-3)
    assert table.loc[1, ["α", "β", "γ"]].tolist() == pytest.approx([90] * 3, abs=1e-3)
    assert table.loc[1, "density"] == pytest.approx(2.16, abs=0.01)  # halite, g/cm³
    assert table.loc[1, "V/atom"] == pytest.approx(5.64**3 / 8)
    assert table.loc[1, "shortest"] == pytest.approx(5.64 / 2)
    assert table["found"].tolist() == [3, 1]
    assert "chains" not in table


def test_description_counts_what_each_source_found_and_shows_symmetry_at_three_tolerances(candidates):
    bent = ROCK_SALT.copy()
    bent.translate_sites(0, [0.02, 0.01, 0], frac_coords=False)
    bent.properties |= {"energy": 0.0, "source": "chains"}
    other = bent.copy()
    other.properties = {"energy": 0.0, "source": "templates"}
    table = describe([[bent, other, other]])
    assert table.loc[1, ["found", "chains", "templates"]].tolist() == [3, 1, 2]
    assert table.loc[1, "at 0.01 Å"] != table.loc[1, "space group"] == "Fm-3m (225)" == table.loc[1, "at 0.3 Å"]


@pytest.mark.parametrize("edge", [2.0, 2.5])
def test_shortest_distance_may_be_that_of_an_atom_and_its_own_image(edge):
    needle = Structure(Lattice.orthorhombic(edge, 9, 9), ["Na"], [[0, 0, 0]])
    assert shortest_distance(needle) == pytest.approx(edge)
    assert shortest_distance(needle.make_supercell([3, 1, 1], in_place=False)) == pytest.approx(edge)


def test_standard_cell_is_the_conventional_one_and_keeps_the_energy():
    standard = standardise(with_energy(ROCK_SALT.get_primitive_structure(), 2.0))
    assert len(standard) == 8
    assert standard.properties["energy"] == 2.0


def test_known_crystals_are_found_in_their_split_and_the_closest_candidate_is_named():
    known = known_crystals("prototypes", "Na4Cl4")
    assert list(known) == ["rock-salt-NaCl (val)"]
    disturbed = ROCK_SALT.get_primitive_structure()
    disturbed.translate_sites(0, [0.3, 0, 0], frac_coords=False)
    assert score_pair(disturbed, ROCK_SALT).rms > 0.01  # it matches as well, but less
    table = compare_with_known([cesium_chloride(), disturbed, ROCK_SALT], known)
    assert table["rank"].tolist() == [3]
    assert table["rms"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert compare_with_known([cesium_chloride()], known)["rank"].isna().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: make_candidates("luck", [[NA]], 1, 0), "source is 'luck', expected one of chains, start"),
        (lambda m: make_candidates("start", [[NA]], 1, 0), "model is None, expected one for source 'start'"),
        (lambda m: make_candidates("templates", [[NA]], 1, 0), "library is None"),
        (lambda m: make_candidates("start", [[NA]], 0, 0, model=m), "n_samples is 0, expected ≥ 1"),
        (lambda m: rank_distinct([]), "expected ≥ 1 structure"),
        (lambda m: rank_distinct([ROCK_SALT]), r"properties\['energy'\]"),
        (lambda m: TemplateLibrary([]), "training is empty"),
    ],
)
def test_wrong_input_is_named_in_one_line(call, message, model):
    with pytest.raises(ValueError, match=message) as error:
        call(model)
    assert "\n" not in str(error.value)


def test_atoms_are_too_close_below_a_share_of_the_covalent_radii_that_no_known_crystal_goes_below():
    radii = 1.66 + 1.02  # of Na and Cl, Cordero et al., Dalton Trans. 2832 (2008), Table 2
    for share, crowded in ((0.59, True), (0.61, False)):
        pair = Structure(Lattice.cubic(9), ["Na", "Cl"], [[0, 0, 0], [share * radii / 9, 0, 0]])
        assert is_crowded(pair) is crowded
    alone = Structure(Lattice.orthorhombic(1.9, 5, 5), ["Na"], [[0, 0, 0]])  # an atom and its own image
    assert is_crowded(alone)
    known = load_split("prototypes", "train").structures
    assert min(shortest_distance(structure, relative=True) for structure in known) > 0.70
