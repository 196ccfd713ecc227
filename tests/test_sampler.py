"""Structures drawn from an energy: repeatable, complete, and refused where the request makes no sense."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import samplers
import torch
from test_energy import NOISY, SMALL, small_model

from contsp_core import Crystals
from contsp_core.diffusion import DiffusionConfig
from contsp_core.energy import ContinuousCGCNN
from contsp_core.mala import AnnealConfig
from contsp_core.sampler import batch_size, sample_structures, sampling_config

ENTRIES = ["NaCl", [8, 22, 8], "Fe"]
SPECIES = [[11, 17], [8, 22, 8], [26]]


@pytest.fixture(params=[SMALL, NOISY], ids=["annealing", "noise levels"])
def model(request):
    return small_model(request.param, torch.float32)


def geometry(results) -> list[np.ndarray]:
    return [np.vstack([s.lattice.matrix, s.cart_coords]) for structures in results for s in structures]


def test_each_entry_gets_its_atoms_and_the_energy_of_each_structure(model):
    model.train()  # the norms of its weights would follow every call
    before = copy.deepcopy(model.state_dict())
    results = sample_structures(model, ENTRIES, n_samples=3, n_steps=4)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    model.eval()
    assert [len(structures) for structures in results] == [3, 3, 3]
    for structures, species in zip(results, SPECIES):
        for structure in structures:
            assert sorted(structure.atomic_numbers) == sorted(species)
            with torch.no_grad():
                energy = float(model(Crystals.from_structures([structure])))
            assert structure.properties["energy"] == pytest.approx(energy, rel=1e-3, abs=1e-3)
    matrices = {structure.lattice.matrix.tobytes() for structures in results for structure in structures}
    assert len(matrices) == 9  # all different
    again = sample_structures(model, ["NaCl", "NaCl"], n_samples=1, n_steps=2)
    again[0][0].properties["mine"] = True
    assert "mine" not in again[1][0].properties  # equal entries get the same crystals, each its own


def test_the_same_seed_gives_the_same_structures_and_another_seed_others(model):
    one, same, other = (geometry(sample_structures(model, ENTRIES, 2, 3, seed)) for seed in (5, 5, 6))
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert not any(np.allclose(a, b) for a, b in zip(one, other))


def test_the_global_seed_plays_no_part(model):
    results = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            results.append(geometry(sample_structures(model, ["NaCl"], 2, 3)))
    assert all((a == b).all() for a, b in zip(*results))


def test_without_kernels_fewer_atoms_move_together(model):
    plain = copy.copy(model)
    plain.use_kernels = False
    assert batch_size(model) == 8 * batch_size(plain) == 8192


@pytest.mark.parametrize("batch_atoms", [1, 12, 10_000])
def test_a_sample_depends_on_seed_formula_and_number_alone(model, batch_atoms):
    """Neither on what else is sampled, nor on order, nor on batches; float64, so that rounding stays small."""
    model = copy.deepcopy(model).double()
    alone = sample_structures(model, ["O2Ti"], n_samples=2, n_steps=3, seed=4)[0]
    among = sample_structures(model, [*ENTRIES, "Fe2O3", "TiO2"], 3, 3, seed=4, batch_atoms=batch_atoms)
    for structures in (among[1], among[4]):  # [8, 22, 8] is TiO2 too
        for one, other in zip(alone, structures[:2], strict=True):
            np.testing.assert_allclose(one.lattice.matrix, other.lattice.matrix, atol=1e-9)
            np.testing.assert_allclose(one.cart_coords, other.cart_coords, atol=1e-9)
    assert not np.allclose(among[1][2].cart_coords, among[1][1].cart_coords)


def test_samples_can_be_drawn_in_parts(model):
    model = copy.deepcopy(model).double()
    whole = sample_structures(model, ["TiO2", "Fe"], 3, 3, seed=4)
    part = sample_structures(model, ["TiO2", "Fe"], range(2, 3), 3, seed=4)
    for all_three, (last,) in zip(whole, part, strict=True):
        np.testing.assert_allclose(all_three[2].cart_coords, last.cart_coords, atol=1e-9)


def test_the_callers_model_is_not_moved(model):
    """On this device a chain fails at once, but what it would move was moved before."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        sample_structures(model, ["Fe"], 1, 2, device="meta")
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize(
    ("species", "options", "message"),
    [
        (["NaCl"], {"n_samples": 0}, "n_samples is 0, expected an integer ≥ 1"),
        (["NaCl"], {"n_steps": 0}, "n_steps is 0, expected an integer ≥ 1"),
        (["NaCl"], {"n_samples": None}, "n_samples is None, expected an integer ≥ 1"),
        (["NaCl"], {"seed": None}, "seed is None, expected an integer ≥ 0"),
        (["NaCl"], {"n_samples": range(3, 3)}, "n_samples is 0, expected an integer ≥ 1"),
        (["NaCl"], {"n_samples": range(-1, 3)}, "n_samples is 0, expected an integer ≥ 1"),
        (["NaCl"], {"device": "foo"}, "device is 'foo', which fails"),
        (None, {}, "species is None"),
        ([], {}, r"species is \[\]"),
        ("NaCl", {}, "species is 'NaCl', expected a list"),
        (["NaXq"], {}, "element 'Xq' is unknown"),
        ([""], {}, "formula ''"),
        (["Na0.5Cl"], {}, "formula 'Na0.5Cl' cannot be read"),
        ([[11, 101]], {}, "expected a formula or numbers 1 … 100"),
        ([[]], {}, r"species entry is \[\]"),
        ([[1.5]], {}, r"species entry is \[1.5\]"),
        ([26], {}, "species entry is 26"),
    ],
)
def test_requests_without_sense_are_refused_in_one_line(species, options, message):
    with pytest.raises(ValueError, match=message) as error:
        sample_structures(small_model(dtype=torch.float32), species, **({"n_samples": 1, "n_steps": 1} | options))
    assert "\n" not in str(error.value)


def test_a_model_is_sampled_as_its_settings_say():
    assert sampling_config(small_model(SMALL)) == AnnealConfig()
    model = small_model(NOISY)
    assert sampling_config(model) == DiffusionConfig()
    assert sampling_config(ContinuousCGCNN(NOISY, DiffusionConfig(7, 2))) == DiffusionConfig(7, 2)


def test_the_comparison_of_samplers_needs_noise_levels(monkeypatch, capsys):
    command = ["samplers.py", "--dataset", "perov5", "--checkpoint", "perov5_paper"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        samplers.main()
    assert "expected an energy with noise levels, such as 'perov5'" in capsys.readouterr().err
