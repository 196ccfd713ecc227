"""Known answers for the scores of crystal structure prediction."""

import itertools
import math
import os
import random
import signal
import time
from collections import deque

import numpy as np
import pandas as pd
import pytest
from pymatgen.core import Element, Lattice, Structure
from pymatgen.core.structure_matcher import StructureMatcher
from results import match_rate_curve, pool_candidates, ranking_table
from scipy.stats import binom
from smact.screening import smact_validity

from contsp_core.csp import metrics
from contsp_core.csp.metrics import (
    PairScore,
    bootstrap_interval,
    evaluate_csp,
    is_charge_neutral,
    is_valid_structure,
    run_with_time_limit,
    score_pair,
    summarise,
)


def face_centred(a, elements, coords):
    return Structure(Lattice(a / 2 * (1 - np.eye(3))), elements, coords)


def rock_salt(a=5.64):
    return face_centred(a, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def silicon(a=5.43):
    return face_centred(a, ["Si", "Si"], [[0, 0, 0], [0.25, 0.25, 0.25]])


def cesium_chloride(a=3.5):
    return Structure(Lattice.cubic(a), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])


def perovskite(a=4.0):
    coords = [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    return Structure(Lattice.cubic(a), ["Ba", "Ti", "O", "O", "O"], coords)


def shaken(structure, scale, rng):
    """Each atom moved by Gaussian noise of so many Å in each direction."""
    shift = rng.normal(scale=scale, size=(len(structure), 3))
    return Structure(structure.lattice, structure.species, structure.cart_coords + shift, coords_are_cartesian=True)


def with_energy(structure, energy):
    structure = structure.copy()
    structure.properties["energy"] = energy
    return structure


def evaluate(*args, n_jobs=1, **kwargs):
    return evaluate_csp(*args, n_jobs, progress=False, **kwargs)


def test_descriptions_of_one_solid_match():
    rng = np.random.default_rng(0)
    reference = perovskite()
    rotated = reference.copy()
    rotated.lattice = Lattice(reference.lattice.matrix @ np.linalg.qr(rng.normal(size=(3, 3)))[0])
    rotated.make_supercell([[1, 1, 0], [0, 1, 3], [1, 0, 1]])  # four cells, skewed
    rotated.translate_sites(range(len(rotated)), [0.1, 0.2, 0.3])
    assert score_pair(rotated, reference)[0] == pytest.approx(0, abs=1e-5)


def test_oxidation_states_do_not_matter():
    charged = rock_salt()
    charged.add_oxidation_state_by_guess()
    for pair in ((charged, rock_salt()), (rock_salt(), charged), (charged, charged)):
        assert score_pair(*pair) == score_pair(rock_salt(), rock_salt()) != score_pair(None, rock_salt())


def test_volume_alone_does_not_matter():
    assert score_pair(perovskite(4.6), perovskite(4.0))[0] == pytest.approx(0, abs=1e-7)


def test_a_known_displacement_gives_its_rms():
    """An atom moved by d among N: after removal of the mean shift, rms = d sqrt(1/N − 1/N²) over (V/N)^(1/3)."""
    reference, shift = perovskite(), 0.2
    moved = reference.copy()
    moved.translate_sites([0], [0, 0, shift], frac_coords=False)
    n = len(reference)
    expected = shift * math.sqrt(1 / n - 1 / n**2) / (reference.volume / n) ** (1 / 3)
    assert score_pair(moved, reference)[0] == pytest.approx(expected, rel=1e-6)


def test_scores_are_those_of_the_matcher_itself():
    """Without the LLL reduction that precedes ours, and with the tolerances written out."""
    rng = np.random.default_rng(0)
    loose = StructureMatcher(stol=0.5, ltol=0.3, angle_tol=10)
    strict = StructureMatcher(stol=0.3, ltol=0.2, angle_tol=5)
    seen = set()
    for scale in np.tile([0.0, 0.1, 0.4, 0.6, 0.8], 10):
        prediction = shaken(perovskite(), scale, rng)
        prediction.apply_strain(rng.normal(size=3) * (0.02 if scale else 0.15))
        expected = loose.get_rms_dist(prediction, perovskite())
        score = score_pair(prediction, perovskite())
        assert math.isnan(score.rms) if expected is None else score.rms == pytest.approx(expected[0], abs=1e-9)
        assert score.strict == (strict.get_rms_dist(prediction, perovskite()) is not None)
        seen.add((math.isfinite(score.rms), score.strict))
    assert len(seen) == 3  # no match, a loose one only, and a strict one


@pytest.mark.parametrize(
    "other", [cesium_chloride(), perovskite(), Structure(Lattice.cubic(0.1), ["Na", "Cl"], np.eye(3)[:2])]
)
def test_other_structures_compositions_and_absurd_volumes_do_not_match(other):
    assert math.isnan(score_pair(other, rock_salt())[0])


def test_strict_tolerances_reject_a_strained_cell():
    strained = cesium_chloride()
    strained.lattice = Lattice.from_parameters(3.5, 3.5, 3.5, 90, 90, 82)
    rms, strict, _ = score_pair(strained, cesium_chloride())
    assert math.isfinite(rms)
    assert not strict


@pytest.mark.parametrize(
    ("formula", "neutral"),
    [
        ("NaCl", True),
        ("Fe", True),  # one element
        ("Cu3Au", True),  # metals only
        ("BaTiO3", True),
        ("NaCl2", False),
        ("Na3Cl", False),
        ("LiF3", False),
        ("MgAr", False),  # argon has no oxidation state
    ],
)
def test_charge_neutrality_of_textbook_compositions(formula, neutral):
    assert is_charge_neutral(formula) is neutral


def test_charge_neutrality_is_that_of_smact():
    rng, found = random.Random(0), []
    for _ in range(400):
        elements = rng.sample(range(1, 95), rng.choice((2, 3, 4)))
        formula = "".join(f"{Element.from_Z(number).symbol}{rng.randint(1, 4)}" for number in elements)
        found.append(is_charge_neutral(formula))
        assert found[-1] == smact_validity(formula, oxidation_states_set="smact14"), formula
    assert 0.2 < np.mean(found) < 0.8


def test_validity_has_the_limits_of_cdvae():
    def pair_at(distance):
        return Structure(Lattice.cubic(4), ["Na", "Cl"], [[0, 0, 0], [0, 0, distance]], coords_are_cartesian=True)

    assert is_valid_structure(pair_at(0.51))
    assert not is_valid_structure(pair_at(0.49))
    assert not is_valid_structure(pair_at(3.51))  # 0.49 Å from the next image
    chlorine_rich = Structure(Lattice.cubic(4), ["Na", "Cl", "Cl"], [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5]])
    assert not is_valid_structure(chlorine_rich)
    assert is_valid_structure(chlorine_rich, charge_neutrality=False)
    assert is_valid_structure(Structure(Lattice.cubic(0.47), ["Fe"], [[0, 0, 0]]))  # 0.104 Å³; own images do not count
    assert not is_valid_structure(Structure(Lattice.cubic(0.46), ["Fe"], [[0, 0, 0]]))  # 0.097 Å³
    assert not is_valid_structure(Structure(Lattice.cubic(4), ["Fe"], [[math.nan, 0, 0]]))


def test_summary_of_a_hand_made_case():
    small = perovskite()
    small.translate_sites([0], [0, 0, 0.2], frac_coords=False)
    references = [perovskite(), rock_salt(), silicon()]
    predictions = [
        [with_energy(small, 1.0), with_energy(perovskite(), 2.0)],  # match, better match
        [with_energy(cesium_chloride(), 5.0), with_energy(rock_salt(), -1.0)],  # no match, match
        [with_energy(rock_salt(), 0.0), with_energy(rock_salt(), 0.0)],  # other composition
    ]
    summary, table = evaluate(references, predictions, material_ids=["a", "b", "c"])
    rms = score_pair(small, perovskite())[0]
    expected = {
        "match_rate@1": 1 / 3,
        "rmse@1": rms,
        "crmse@1": (rms + 0.5 + 0.5) / 3,
        "match_rate@2": 2 / 3,
        "match_rate": 2 / 3,
        "rmse@2": 0.0,
        "crmse@2": 0.5 / 3,
        "match_rate_random@1": (1 + 0.5) / 3,
        "match_rate_lowest_energy": 2 / 3,
        "rmse_lowest_energy": rms / 2,
        "match_rate_strict@2": 2 / 3,
        "match_rate_good@1": 1 / 3,
        "match_rate_good_lowest_energy": 2 / 3,
        "match_rate_good": 2 / 3,
        "metre@2": 2 / 3,
        "n_references": 3,
        "n_predictions": 6,
        "n_samples": 2,
        "n_timed_out": 0,
        "n_invalid": 0,
        "n_wrong_composition": 2,
    }
    assert {name: summary[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert list(table.index) == ["a", "b", "c"]
    assert table["best_index"].tolist() == [1, 1, -1]
    assert str(summarise(table)) == str(summary)  # of strings, since NaN differs from itself


def test_a_good_match_is_one_below_a_tenth():
    """The rms of one moved atom is known, see above: shifts for 0.099 and 0.101."""
    scale = (perovskite().volume / 5) ** (1 / 3) / math.sqrt(1 / 5 - 1 / 25)
    structures = [perovskite(), perovskite()]
    for structure, rms in zip(structures, (0.099, 0.101)):
        structure.translate_sites([0], [0, 0, rms * scale], frac_coords=False)
    summary, table = evaluate([perovskite()] * 2, [[structure] for structure in structures])
    assert table["rms_best"].tolist() == pytest.approx([0.099, 0.101])
    assert (summary["match_rate@1"], summary["match_rate_strict@1"], summary["match_rate_good@1"]) == (1, 1, 0.5)


def test_invalid_samples_count_in_one_column_and_not_in_the_other():
    reference = Structure(Lattice.cubic(3), ["H", "H"], [[0, 0, 0], [0.16, 0, 0]])  # 0.48 Å apart
    summary, table = evaluate([reference, perovskite()], [[reference], [perovskite()]])
    assert summary["match_rate@1"] == 1
    assert summary["match_rate_valid@1"] == 0.5
    assert table["n_invalid"].tolist() == [1, 0]
    shaken = Structure(Lattice.cubic(3), ["H", "H"], [[0, 0, 0], [0.2, 0, 0]])
    summary, _ = evaluate([reference], [[reference, shaken]])
    assert summary["rmse@2"] == pytest.approx(0, abs=1e-7)
    assert summary["rmse_valid@2"] == pytest.approx(0.04 * 3 / 2 / (27 / 2) ** (1 / 3))  # each moves half of the way
    charged = Structure(
        Lattice.cubic(3.5), ["Na", "Na", "Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    )
    summary, _ = evaluate([charged], [[charged]])
    assert (summary["match_rate@1"], summary["match_rate_valid@1"]) == (1, 0)


def test_metre_forgives_the_order_of_polymorphs():
    """Two polymorphs, each predicted for the other: no match by index, all by METRe."""
    references, predictions = [rock_salt(), cesium_chloride()], [[cesium_chloride()], [rock_salt()]]
    summary, _ = evaluate(references, predictions)
    assert summary["match_rate@1"] == 0
    assert summary["crmse@1"] == 0.5
    assert summary["metre@1"] == 1
    assert summary["metre_crmse@1"] == pytest.approx(0, abs=1e-7)
    # one polymorph predicted twice: METRe rewards variety
    summary, _ = evaluate(references, [[rock_salt()], [rock_salt()]])
    assert summary["metre@1"] == summary["match_rate@1"] == 0.5
    summary, _ = evaluate(references, predictions, metre=False)
    assert math.isnan(summary["metre@1"])


def test_no_metre_where_too_many_crystals_share_a_composition(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_POOL", 2)
    n_compared = []
    monkeypatch.setattr(
        metrics,
        "run_with_time_limit",
        lambda _, tasks, *__: n_compared.append(len(tasks)) or [PairScore()] * len(tasks),
    )
    for n in (2, 3):
        summary, _ = evaluate([rock_salt()] * n, [[rock_salt()]] * n)
        assert math.isnan(summary["metre@1"]) == (n == 3)
    assert n_compared == [4, 3]


def test_metre_at_k_uses_the_first_k_of_each():
    references = [rock_salt(), cesium_chloride()]
    summary, _ = evaluate(references, [[rock_salt(), cesium_chloride()], [rock_salt(), rock_salt()]])
    assert (summary["metre@1"], summary["metre@2"]) == (0.5, 1.0)


def test_metre_equals_its_definition():
    """By brute force over all pairs of one composition."""
    rng = np.random.default_rng(0)
    kinds = [rock_salt(), cesium_chloride(), silicon()]
    references = [kinds[i] for i in (0, 1, 1, 2, 0)]
    predictions = [[shaken(kinds[i], 0.2, rng) for i in rng.integers(3, size=3)] for _ in references]
    summary, _ = evaluate(references, predictions)
    matcher = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
    for k in (1, 3):
        best = []
        for reference in references:
            pool = [
                s
                for other, made in zip(references, predictions)
                if other.formula == reference.formula
                for s in made[:k]
            ]
            found = [matcher.get_rms_dist(s, reference) for s in pool if s.formula == reference.formula]
            best.append(min((rms[0] for rms in found if rms is not None), default=math.nan))
        assert summary[f"metre@{k}"] == np.isfinite(best).mean()
        assert summary[f"metre_good@{k}"] == (np.array(best) < 0.1).mean()
        assert summary[f"metre_crmse@{k}"] == pytest.approx(np.nan_to_num(best, nan=0.5).mean(), abs=1e-9)
    assert summary["metre@1"] != summary["match_rate@1"]


def test_repeated_references_are_scored_like_single_ones():
    once, _ = evaluate([rock_salt()], [[cesium_chloride(), rock_salt()]])
    twice, table = evaluate([rock_salt()] * 2, [[cesium_chloride(), rock_salt()]] * 2)
    assert len(table) == 2
    for name in ("match_rate@1", "match_rate@2", "metre@1", "metre@2", "crmse@2"):
        assert twice[name] == once[name]


def test_fewer_predictions_than_k_or_none_are_allowed():
    summary, table = evaluate([rock_salt(), perovskite(), silicon()], [[rock_salt()], [], [rock_salt(), silicon()]])
    assert summary["match_rate@2"] == pytest.approx(2 / 3)
    assert table["n_predictions"].tolist() == [1, 0, 2]
    assert match_rate_curve(table)["match_rate"].tolist() == pytest.approx([0.5, 2 / 3])
    assert math.isnan(summary["match_rate_lowest_energy"])


def test_a_missing_prediction_keeps_its_place_and_matches_nothing():
    rock = with_energy(rock_salt(), 1.0)
    summary, _ = evaluate([rock_salt(), silicon()], [[None, rock], [None, None]])
    assert (summary["match_rate@1"], summary["match_rate@2"], summary["match_rate_lowest_energy"]) == (0, 0.5, 0.5)
    assert (summary["n_missing"], summary["n_invalid"], summary["n_wrong_composition"]) == (3, 3, 0)
    assert summary["match_rate_random@1"] == 0.25


# Time limit


def loop_in_compiled_code(endless=True):
    """Loops in C and keeps the interpreter lock: no signal handler, timer or thread of Python can run."""
    if endless:
        deque(itertools.repeat(0), maxlen=0)
    return os.getpid()


def test_a_worker_stuck_in_compiled_code_is_killed_and_replaced():
    tasks = [(number in (0, 5),) for number in range(20)]
    handler = signal.signal(signal.SIGALRM, lambda *_: None)  # a child must not inherit it
    try:
        results = run_with_time_limit(loop_in_compiled_code, tasks, n_jobs=2, time_limit_s=0.5, progress=False)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert [number for number, result in enumerate(results) if result is None] == [0, 5]
    assert all(result != os.getpid() for result in results)
    for pid in {result for result in results if result}:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def die(number):
    if number == 3:
        os._exit(1)
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_worker_that_dies_costs_one_task(n_jobs):
    results = run_with_time_limit(die, [(number,) for number in range(40)], n_jobs=n_jobs, progress=False)
    assert results == [None if number in (3, 7) else number for number in range(40)]


def nap(seconds):
    time.sleep(seconds)
    return seconds


def test_a_batch_of_slow_tasks_is_not_lost():
    """Each is within the limit, the batch is not."""
    tasks = [(0.1,)] * 20
    assert run_with_time_limit(nap, tasks, n_jobs=2, time_limit_s=0.9, progress=False) == [0.1] * 20


def test_scores_do_not_depend_on_the_number_of_processes():
    rng = np.random.default_rng(0)
    references = [rock_salt(), cesium_chloride(), perovskite(), silicon()]
    predictions = [[shaken(reference, rng.random(), rng) for _ in range(12)] for reference in references]
    (first, table), (second, other) = (evaluate_csp(references, predictions, n, progress=False) for n in (1, 3))
    assert str(first) == str(second)
    pd.testing.assert_frame_equal(table, other)


def test_an_error_in_a_task_is_raised():
    with pytest.raises(ZeroDivisionError):
        run_with_time_limit(divmod, [(1, 1), (1, 0)], n_jobs=1, progress=False)


def test_a_hanging_matcher_is_no_match_and_is_counted(monkeypatch):
    get_rms_dist = metrics.StructureMatcher.get_rms_dist

    def hang_on_perovskites(self, first, second):
        if len(second) == 5:
            loop_in_compiled_code()
        return get_rms_dist(self, first, second)

    monkeypatch.setattr(metrics.StructureMatcher, "get_rms_dist", hang_on_perovskites)
    references = [rock_salt(), perovskite(), silicon()]
    summary, table = evaluate(references, [[structure] * 2 for structure in references], time_limit_s=1.0)
    assert summary["match_rate@1"] == pytest.approx(2 / 3)
    assert summary["n_timed_out"] == summary["n_invalid"] == 2
    assert table["n_timed_out"].tolist() == [0, 2, 0]


# Intervals and curves


@pytest.mark.parametrize(("matched", "n"), [(3, 12), (60, 200), (199, 200)])
def test_the_bootstrap_of_a_rate_is_a_binomial(matched, n):
    """A resample of n zeros and ones holds Binomial(n, rate) ones."""
    values = np.arange(n) < matched
    low, high = bootstrap_interval(values, n_resamples=4000)
    exact = binom.ppf([0.025, 0.975], n, matched / n) / n
    assert (low, high) == pytest.approx(exact, abs=1.01 / n)


def test_columns_see_the_same_resamples():
    values = np.random.default_rng(0).random((50, 2))
    low, high = bootstrap_interval(values)
    alone = [bootstrap_interval(column) for column in values.T]
    assert np.allclose(np.transpose([low, high]), alone, rtol=1e-12)
    difference = bootstrap_interval(np.column_stack([values[:, 0], 1 - values[:, 0]]))
    assert np.allclose(difference[0][0], 1 - difference[1][1])  # only if the two columns are resampled together


def test_bootstrap_interval_has_the_width_of_the_normal_one_and_skips_nan():
    values = np.tile([0.0, 1.0, 1.0, np.nan], 250)
    low, high = bootstrap_interval(values, seed=0, n_resamples=3000)
    half_width = 1.96 * math.sqrt(2 / 9 / 750)
    assert (low, high) == pytest.approx((2 / 3 - half_width, 2 / 3 + half_width), abs=0.15 * half_width)
    assert bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1)
    assert bootstrap_interval(np.ones(5)) == pytest.approx((1, 1))
    assert all(map(math.isnan, bootstrap_interval([np.nan])))


def table_of(rms, energy=None):
    return pd.DataFrame(
        {
            "rms": rms,
            "strict": [[value < 0.3 for value in row] for row in rms],
            "energy": energy or [[math.nan] * len(row) for row in rms],
            "n_predictions": [len(row) for row in rms],
            "n_missing": [0] * len(rms),
        }
    )


def test_the_curve_inrandom_order_equals_the_mean_over_all_subsets():
    rng = np.random.default_rng(0)
    rms = [np.where(rng.random(6) < share, rng.random(6) / 2, math.nan).tolist() for share in (0, 0.2, 0.5, 1)]
    for criterion, limit in (("loose", 9.0), ("strict", 0.3), ("good", 0.1)):
        curve = match_rate_curve(table_of(rms), criterion)
        for k in range(1, 7):
            best = np.array(
                [[np.nan_to_num(subset, nan=9.0).min() for subset in itertools.combinations(row, k)] for row in rms]
            )
            matched = best < limit
            assert curve["match_rate"][k - 1] == pytest.approx(matched.mean())
            assert curve["rmse"][k - 1] == pytest.approx(
                best[matched].mean() if matched.any() else math.nan, nan_ok=True
            )


def test_candidates_may_be_ranked_after_pooling():
    given = [
        [[with_energy(cesium_chloride(), 1), with_energy(rock_salt(), 3)], [with_energy(rock_salt(), 2)]],
        [[with_energy(rock_salt(), 0.5)], [with_energy(silicon(4.0), 4.0)]],
    ]
    tables = [evaluate([rock_salt(), silicon()], predictions)[1] for predictions in given]
    pooled = pool_candidates(tables)
    table = ranking_table(pooled).set_index("match").loc["loose"]
    assert (table["n"], table["first"], table["lowest_energy"], table["best_of_n"]) == (3, 0, 0.5, 1)
    assert table["random"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert pooled["n_predictions"].tolist() == [3, 2]
    with pytest.raises(ValueError, match="different material ids"):
        pool_candidates([tables[0], tables[1].rename(index={0: 7})])


# Wrong input


@pytest.mark.parametrize(
    ("references", "predictions", "options", "message"),
    [
        ([], [], {}, "references is empty"),
        ([rock_salt()], [], {}, "predictions has 0 entries"),
        ([rock_salt()], [[]], {}, "predictions holds no structure"),
        ([rock_salt()], [["NaCl"]], {}, "found a str"),
        ([None], [[rock_salt()]], {}, "found a NoneType"),
        ([rock_salt()], [[rock_salt()]], {"material_ids": ["a", "b"]}, "material_ids has 2"),
        ([rock_salt()] * 2, [[rock_salt()]] * 2, {"material_ids": ["a", "a"]}, "material_ids has 'a' more than once"),
        ([rock_salt()] * 2, [[rock_salt()]] * 2, {"material_ids": ["a", None]}, "material_ids has a missing entry"),
        ([rock_salt()] * 2, [[rock_salt()]] * 2, {"material_ids": ["a", ""]}, "material_ids has a missing entry"),
        ([rock_salt()], [[rock_salt()]], {"time_limit_s": 0}, "time_limit_s is 0"),
        ([rock_salt()], [[rock_salt()]], {"time_limit_s": math.nan}, "time_limit_s is nan"),
        ([rock_salt()], [[rock_salt()]], {"n_jobs": 0}, "n_jobs is 0, expected -1 .all cores. or an integer ≥ 1"),
        ([rock_salt()], [[rock_salt()]], {"n_jobs": -2}, "n_jobs is -2"),
    ],
)
def test_wrong_input_is_named_in_one_line(references, predictions, options, message):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(references, predictions, **options)
    assert "\n" not in str(error.value)


def test_wrong_criteria_and_empty_tables_are_named():
    with pytest.raises(ValueError, match="criterion is 'best'"):
        match_rate_curve(table_of([[0.1]]), "best")
    with pytest.raises(ValueError, match="table is empty"):
        summarise(pd.DataFrame())
