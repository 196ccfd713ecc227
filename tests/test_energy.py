"""The energy equals the published one and its literal definition; its gradients equal finite differences."""

from __future__ import annotations

import math
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from literal_energy import LiteralEnergy, directed_edges
from strategies import make_cell
from torch import Tensor

from contsp_core import Crystals
from contsp_core.energy import PRESETS, ContinuousCGCNN, EnergyConfig, energy_and_gradient
from contsp_core.graph import build_graph, cutoff_radius
from contsp_core.invariance import audit

SMALL = EnergyConfig(width=8, n_conv=2, n_fc=3, n_basis=8)
NOISY = replace(SMALL, spectral_norm=False, noise_min=0.02, noise_max=2.0)
RESIDUAL = replace(NOISY, form="residual")
PATHS = {"fused": True, "plain": False}


def small_model(config: EnergyConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 0) -> ContinuousCGCNN:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ContinuousCGCNN(config).to(dtype).eval()


def random_batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Crystals:
    """Crystals of 1 … 7 atoms in skewed, thin and left-handed cells, atoms also outside the cell."""
    rng = np.random.default_rng(seed)
    shapes = ["cubic", "skewed", "needle", "left-handed", "hexagonal"]
    cells, positions, species = [], [], []
    for shape, n_atoms in zip(shapes, (1, 3, 2, 7, 4)):
        cell = make_cell(shape, rng)
        cell *= (20 * n_atoms / abs(np.linalg.det(cell))) ** (1 / 3)
        cells.append(cell)
        positions.append(rng.uniform(-1.5, 1.5, (n_atoms, 3)) @ cell)
        species.append(rng.integers(1, 101, n_atoms).tolist())
    return Crystals.from_arrays(np.stack(cells), np.concatenate(positions), species, dtype)


def golden_files() -> list[Path]:
    """The small file here (weights of one preset, without elements it does not need), and the full one if at hand."""
    given = os.environ.get("CONTSP_DATA_DIR")
    full = [Path(given, "..", "golden", "energy.npz")] if given else []
    return [Path(__file__).with_name("golden_energy.npz"), *(path for path in full if path.is_file())]


GOLDEN: dict[str, dict[str, np.ndarray]] = {}  # "file: preset" -> arrays
for path in golden_files():
    for key, array in np.load(path).items():
        preset, name = key.split("/", 1)
        GOLDEN.setdefault(f"{path.stem}: {preset}", {})[name] = array
WITH_WEIGHTS = [case for case, arrays in GOLDEN.items() if "energy" in arrays]


def golden_crystals(case: str) -> Crystals:
    arrays = GOLDEN[case]
    species = np.split(arrays["atomic_numbers"], np.cumsum(arrays["n_atoms"])[:-1])
    return Crystals.from_arrays(arrays["cell"], arrays["positions"], [s.tolist() for s in species], torch.float64)


@pytest.fixture(params=WITH_WEIGHTS)
def golden(request) -> tuple[ContinuousCGCNN, Crystals, dict[str, Tensor]]:
    """The published weights, some real crystals, and what the public implementation computes for them."""
    arrays = GOLDEN[request.param]
    weights = {name.removeprefix("weights/"): a for name, a in arrays.items() if name.startswith("weights/")}
    expected = {name: torch.as_tensor(a) for name, a in arrays.items() if a.dtype.kind in "fi"}
    model = ContinuousCGCNN.from_public_weights(weights, request.param.split(": ")[1])
    return model, golden_crystals(request.param), expected


def assert_golden(energy, crystals: Crystals, expected: dict[str, Tensor], tolerance: float) -> None:
    per_atom = crystals.positions[:, :, None].double() * expected["grad_positions"][:, None, :]
    strain = crystals.cell.mT.double() @ expected["grad_cell"] + crystals.sum_atoms(per_atom)  # by the chain rule
    golden = expected["energy"], strain, expected["grad_positions"]
    for value, right in zip(energy_and_gradient(energy, crystals), golden, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=tolerance, atol=tolerance, msg=lambda m: f"{m}")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_energies_and_gradients_are_the_published_ones(golden, path, dtype, tolerance):
    model, crystals, expected = golden
    model.use_kernels = PATHS[path]
    assert_golden(model.to(dtype), crystals.to(dtype), expected, tolerance)


def test_the_literal_energy_is_the_published_one(golden):
    model, crystals, expected = golden
    assert_golden(LiteralEnergy(model), crystals, expected, 1e-9)


def test_the_network_without_the_density_term_is_the_published_one(golden):
    model, crystals, expected = golden
    network = (model(crystals) - model.density_term(crystals)).detach()
    torch.testing.assert_close(network, expected["energy_without_density_term"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", GOLDEN)
def test_edge_counts_are_the_published_ones(case):
    """A neighbour at the cutoff to the last bit may count or not: its weight is zero."""
    crystals, expected = golden_crystals(case), torch.as_tensor(GOLDEN[case]["n_directed_edges"])
    for scale, compare in ((1 - 1e-9, torch.le), (1 + 1e-9, torch.ge)):
        graph = build_graph(crystals, scale * cutoff_radius(crystals)).directed()
        counts = torch.bincount(crystals.system_idx[graph.source], minlength=len(crystals))
        assert compare(counts, expected).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("changes", [{}, {"n_fc": 1}, {"spectral_norm": False}, {"density_weight": 0.1}])
@pytest.mark.parametrize("form", [SMALL, NOISY, RESIDUAL, replace(SMALL, form="residual")])
def test_the_energy_is_its_literal_definition(path, form, changes):
    model, crystals = small_model(replace(form, **changes)), random_batch()
    model.use_kernels = PATHS[path]
    model.atomic_volume.copy_(torch.linspace(5, 40, 101))
    literal = LiteralEnergy(model)
    sigma = torch.tensor([0.02, 0.1, 0.15, 0.7, 2.0], dtype=torch.float64)
    tolerance = 5e-6 if form.noise_max else 1e-9  # the features of noise levels were made in single precision
    for level in [(), *([(sigma,)] if form.noise_max else [])]:
        ours, expected = (energy_and_gradient(energy, crystals, *level) for energy in (model, literal))
        for value, right in zip(ours, expected):
            torch.testing.assert_close(value, right, rtol=tolerance, atol=tolerance)


def test_the_literal_edges_are_symmetric():
    crystals = random_batch()
    i, j, k = (column.tolist() for column in directed_edges(crystals, 0.99 * cutoff_radius(crystals)))
    edges = {(a, b, *map(int, image)) for a, b, image in zip(i, j, k)}
    assert len(edges) == len(i)
    assert edges == {(b, a, -x, -y, -z) for a, b, x, y, z in edges}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("config", [SMALL, NOISY, RESIDUAL], ids=["one level", "noise levels", "residual"])
def test_gradients_are_finite_differences(path, config):
    model, crystals = small_model(config), random_batch()[[1, 2]]
    model.use_kernels = PATHS[path]
    sigma = None if config is SMALL else torch.tensor([0.1, 0.9], dtype=torch.float64)

    def energy(cell: Tensor, positions: Tensor) -> Tensor:
        return model(crystals.replace(cell=cell, positions=positions), sigma)

    inputs = (crystals.cell.clone().requires_grad_(), crystals.positions.clone().requires_grad_())
    assert torch.autograd.gradcheck(energy, inputs, eps=1e-5, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("config", [SMALL, NOISY, RESIDUAL], ids=["one level", "noise levels", "residual"])
def test_second_derivatives_of_the_plain_path_are_finite_differences(config):
    model, crystals = small_model(config), random_batch()[[2]]
    model.use_kernels = False
    positions = crystals.positions.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: model(crystals.replace(positions=x)), positions, atol=1e-6)


@pytest.mark.parametrize("config", [SMALL, NOISY, RESIDUAL], ids=["one level", "noise levels", "residual"])
def test_both_paths_agree_in_value_and_in_every_gradient(config):
    model, crystals = small_model(config), random_batch()
    arguments = () if config is SMALL else (torch.logspace(-1.5, 0.2, len(crystals), dtype=torch.float64),)
    weights = torch.linspace(-1, 2, len(crystals), dtype=torch.float64)
    results = {}
    for path, fused in PATHS.items():
        model.use_kernels = fused
        cell = crystals.cell.clone().requires_grad_()
        positions = crystals.positions.clone().requires_grad_()
        value = model(crystals.replace(cell=cell, positions=positions), *arguments)
        inputs = {"cell": cell, "positions": positions} | dict(model.named_parameters())
        grads = torch.autograd.grad((weights * value).sum(), inputs.values())
        results[path] = {"value": value.detach()} | dict(zip(inputs, grads))
    for name, value in results["fused"].items():
        torch.testing.assert_close(
            value, results["plain"][name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_noisy_energy_is_evaluated_at_its_default_level():
    model, crystals = small_model(NOISY), random_batch()
    default = torch.full((len(crystals),), NOISY.noise_default, dtype=torch.float64)
    torch.testing.assert_close(model(crystals), model(crystals, default), rtol=0, atol=0)


def test_the_density_term_uses_the_volumes_of_the_elements():
    model, crystals = small_model(), random_batch()
    model.atomic_volume.copy_(torch.linspace(10, 30, 101, dtype=torch.float64))
    expected = [
        math.log(float(volume) / sum(10 + 0.2 * number for number in numbers)) ** 2
        for volume, numbers in zip(crystals.volume, crystals.species)
    ]
    np.testing.assert_allclose(model.density_term(crystals).numpy(), expected, rtol=1e-9)


def test_an_isolated_atom_in_a_wide_cell_has_an_energy():
    """A cutoff too small for any edge leaves the embedding and the density term."""
    model = small_model(replace(SMALL, cutoff_multiple=0.5))
    crystals = Crystals.from_arrays(10 * np.eye(3)[None], np.zeros((1, 3)), [[26]], torch.float64)
    for fused in PATHS.values():
        model.use_kernels = fused
        value, *grads = energy_and_gradient(model, crystals)
        torch.testing.assert_close(value, LiteralEnergy(model)(crystals))
        assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_a_cell_skewed_beyond_measure_has_the_energy_of_its_lattice(path, dtype, tolerance):
    cells = np.array([np.eye(3) * 4, [[4, 0, 0], [4000, 4, 0], [1e6, 5e5, 4]], np.eye(3) * 3])
    crystals = Crystals.from_arrays(cells, np.arange(15).reshape(5, 3), [[6, 8], [6, 8], [1]], dtype)
    crystals.positions[2:4] = crystals.positions[:2]
    model = small_model(dtype=dtype)
    model.use_kernels = PATHS[path]
    value, strain, grad_positions = energy_and_gradient(model, crystals)
    torch.testing.assert_close(value[1], value[0], rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        torch.testing.assert_close(strain[1], strain[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_positions[2:4], grad_positions[:2], rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("path", PATHS)
def test_the_gradient_in_a_skewed_cell_is_the_finite_difference(path):
    crystals, model = random_batch()[[1]], small_model()
    model.use_kernels = PATHS[path]
    shear = torch.tensor([[1, 0, 0], [7, 1, 0], [-3, 9, 1]], dtype=torch.float64)
    inputs = ((shear @ crystals.cell).requires_grad_(), crystals.positions.clone().requires_grad_())

    def energy(cell: Tensor, positions: Tensor) -> Tensor:
        return model(crystals.replace(cell=cell, positions=positions))

    assert torch.autograd.gradcheck(energy, inputs, eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_one_atom_in_a_very_wide_box_takes_no_memory_to_speak_of(path):
    crystals = Crystals.from_arrays(1000 * np.eye(3)[None], np.zeros((1, 3)), [[26]], torch.float64)
    model = small_model()
    model.use_kernels = PATHS[path]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, *grads = energy_and_gradient(model, crystals)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
    torch.testing.assert_close(value, LiteralEnergy(model)(crystals))
    assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("broken", ["cell", "positions"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_crystal_that_is_not_finite_has_no_energy_and_does_not_touch_the_others(path, broken, number):
    model, crystals = small_model(), random_batch()
    model.use_kernels = PATHS[path]
    expected = model(crystals).detach()
    values = getattr(crystals, broken).clone()
    values[1] = number  # the second crystal has the second to fourth atom
    found = model(crystals.replace(**{broken: values})).detach()
    assert found[1].isnan()
    others = [0, 2, 3, 4]
    torch.testing.assert_close(found[others], expected[others], rtol=1e-9, atol=1e-12)


def test_two_atoms_at_one_point_have_a_finite_gradient():
    crystals = Crystals.from_arrays(4 * np.eye(3)[None], np.ones((2, 3)), [[11, 17]], torch.float64)
    for fused in PATHS.values():
        model = small_model()
        model.use_kernels = fused
        value, *grads = energy_and_gradient(model, crystals)
        assert torch.isfinite(value).all() and all(torch.isfinite(grad).all() for grad in grads)


def test_energy_and_gradient_leaves_no_trace():
    model, crystals = small_model(), random_batch()
    value, *grads = energy_and_gradient(model, crystals)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(tensor.requires_grad for tensor in (value, *grads, crystals.cell, crystals.positions))
    zero = energy_and_gradient(lambda crystals: crystals.volume, crystals)[2]
    assert zero.shape == crystals.positions.shape and not zero.any()  # an energy that ignores the atoms


def public_weights() -> dict[str, np.ndarray]:
    state = ContinuousCGCNN(PRESETS["perov5"]).state_dict()
    return {name: tensor.numpy() for name, tensor in state.items() if name != "atomic_volume"}


def test_public_weights_keep_their_precision_and_come_in_evaluation_mode():
    model = ContinuousCGCNN.from_public_weights({k: v.astype(np.float64) for k, v in public_weights().items()})
    assert next(model.parameters()).dtype == torch.float64
    assert not model.training


@pytest.mark.parametrize(
    ("change", "preset", "message"),
    [
        ({}, "perovskite", "preset is 'perovskite', expected one of perov5, mp20, mpts52, carbon24"),
        ({"embedding.weight": None}, "perov5", "Missing key.*embedding.weight"),
        ({"pooling.weight": np.zeros(3)}, "perov5", "Unexpected key.*pooling.weight"),
        ({"fc_final.bias": np.zeros(2)}, "perov5", "size mismatch for fc_final.bias"),
        ({}, "mpts52", "weights do not fit preset 'mpts52'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(change, preset, message):
    weights = {name: value for name, value in (public_weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message) as error:
        ContinuousCGCNN.from_public_weights(weights, preset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [NOISY, RESIDUAL], ids=["noise levels", "residual"])
def test_other_forms_pass_the_audit(config):
    """What the paper's form must satisfy: every re-description within 1e-9, no jump on any path."""
    table = audit(small_model(config), random_batch()[[1, 2, 4]], progress=False)
    assert set(table["verdict"]) <= {"invariant", "continuous", "below rounding", "impossible"}
    assert (table.loc[table["kind"] != "continuity", "max_change"] < 1e-9).all()


def test_the_filter_table_does_not_grow_with_an_empty_box():
    """One atom in 1000 Å: the cutoff is 3000 Å, but beyond the reach of the basis the filter is constant."""
    model, lengths = small_model(), []
    crystals = Crystals.from_arrays(1000 * np.eye(3)[None], np.zeros((1, 3)), [[26]], torch.float64)
    model.distance_expansion.register_forward_hook(lambda _, inputs, __: lengths.append(len(inputs[0])))
    fused = model(crystals)
    assert lengths and max(lengths) < 15_000
    model.use_kernels = False
    torch.testing.assert_close(fused, model(crystals), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0, expected an integer ≥ 1"),
        ({"n_basis": 1}, "n_basis is 1, expected an integer ≥ 2"),
        ({"cutoff_multiple": math.nan}, "cutoff_multiple is nan, expected a positive number"),
        ({"density_weight": -1.0}, "density_weight is -1.0, expected a number ≥ 0"),
        ({"form": "deep"}, "form is 'deep', expected one of paper, residual"),
        ({"noise_min": 0.1}, r"noise_min, noise_max are \(0.1, None\)"),
        ({"noise_min": 2.0, "noise_max": 1.0}, "0 < noise_min < noise_max"),
    ],
)
def test_settings_without_sense_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        EnergyConfig(**options)
