"""Niggli reduction against spglib, pymatgen and its own definition; coordinates and strain against exact results."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymatgen.core import Lattice

from contsp_core import Crystals
from contsp_core.lattice import (
    apply_strain,
    deform,
    niggli,
    niggli_reduce,
    without_skew,
    wrap_positions,
)

FACE = np.array([[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
BODY = np.array([[-0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.5, 0.5, -0.5]])
HEXAGON = np.array([[1, 0, 0], [-0.5, np.sqrt(0.75), 0], [0, 0, 1]])
THIRDS = np.array([[2, 1, 1], [-1, 1, 1], [-1, -2, 1]]) / 3  # rhombohedral in hexagonal axes


def _nearly_singular(rng: np.random.Generator) -> np.ndarray:
    cell = rng.normal(size=(3, 3)) * 4
    cell[2] = rng.normal(size=2) @ cell[:2] + 1e-3 * cell[2]
    return cell


LATTICES = {
    "triclinic": lambda rng: rng.normal(size=(3, 3)) * 4,
    "cubic P": lambda rng: np.eye(3) * rng.uniform(2, 8),
    "cubic F": lambda rng: FACE * rng.uniform(2, 8),
    "cubic I": lambda rng: BODY * rng.uniform(2, 8),
    "hexagonal": lambda rng: np.diag(rng.uniform(2, 9, 2)[[0, 0, 1]]) @ HEXAGON,
    "rhombohedral": lambda rng: THIRDS @ HEXAGON @ np.diag(rng.uniform(2, 9, 2)[[0, 0, 1]]),
    "tetragonal P": lambda rng: np.diag(rng.uniform(2, 9, 2)[[0, 0, 1]]),
    "tetragonal I": lambda rng: BODY @ np.diag(rng.uniform(2, 9, 2)[[0, 0, 1]]),
    "orthorhombic F": lambda rng: FACE @ np.diag(rng.uniform(2, 9, 3)),
    "monoclinic P": lambda rng: np.diag(rng.uniform(2, 9, 3)) + rng.uniform(-3, 3) * np.eye(3)[[2]].T * np.eye(3)[0],
    "needle": lambda rng: np.diag([1, 1, 100]) @ rng.normal(size=(3, 3)),
    "plate": lambda rng: np.diag([1, 60, 60]) @ rng.normal(size=(3, 3)),
    "nearly singular": _nearly_singular,
}


def _unimodular(rng: np.random.Generator, largest: int, n_steps: int = 4) -> np.ndarray:
    """Product of shears, a permutation and a sign: any determinant ±1."""
    change = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1])
    for _ in range(n_steps):
        row, column = rng.permutation(3)[:2]
        change[row] += rng.integers(-largest, largest + 1) * change[column]
    return change


def _cells(n_cells: int, seed: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Cells of all kinds in turn, and the same lattices in other bases, rotated."""
    rng = np.random.default_rng(seed)
    makers = list(LATTICES.values())
    cells = np.array([makers[index % len(makers)](rng) for index in range(n_cells)])
    cells *= 1 + noise * rng.normal(size=cells.shape)
    rotations = np.linalg.qr(rng.normal(size=(n_cells, 3, 3)))[0]
    return cells, np.array([_unimodular(rng, 3) for _ in cells]) @ cells @ rotations


def _metric(cell: torch.Tensor) -> torch.Tensor:
    return cell @ cell.mT


def _relative_difference(metric: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Largest difference of metric entries, in units of the shortest squared length."""
    return (metric - other).abs().amax((1, 2)) / other.diagonal(dim1=1, dim2=2).amin(1)


def _determinants(transform: torch.Tensor) -> list[int]:
    """Exact, in Python integers."""
    return [
        a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
        for a, b, c, d, e, f, g, h, i in transform.flatten(1).tolist()
    ]


def _is_niggli(cell: torch.Tensor, tolerance: float = 1e-4) -> torch.Tensor:
    """The definition, condition by condition (International Tables A, 9.2.2); equalities imply the special ones."""
    a, b, c, d, e, f = _metric(cell).flatten(1).T[[0, 4, 8, 5, 2, 1]]
    margin = tolerance * a

    def equal(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs() <= margin / 100

    main = (a <= b + margin) & (b <= c + margin)
    main &= (2 * d.abs() <= b + margin) & (2 * e.abs() <= a + margin) & (2 * f.abs() <= a + margin)
    main &= ~equal(a, b) | (d.abs() <= e.abs() + margin)
    main &= ~equal(b, c) | (e.abs() <= f.abs() + margin)
    acute = (d > 0) & (e > 0) & (f > 0)
    acute &= ~equal(2 * d, b) | (f <= 2 * e + margin)
    acute &= ~equal(2 * e, a) | (f <= 2 * d + margin)
    acute &= ~equal(2 * f, a) | (e <= 2 * d + margin)
    total = -2 * (d + e + f)
    obtuse = (d <= margin) & (e <= margin) & (f <= margin) & (total <= a + b + margin)
    obtuse &= ~equal(-2 * d, b) | (f.abs() <= margin)
    obtuse &= ~equal(-2 * e, a) | (f.abs() <= margin)
    obtuse &= ~equal(-2 * f, a) | (e.abs() <= margin)
    obtuse &= ~equal(total, a + b) | (a <= -(2 * e + f) + margin)
    return main & (acute | obtuse)


def _spglib_metric(cell: np.ndarray, tolerance: float) -> np.ndarray | None:
    import spglib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it announces a change of its error handling
            reduced = spglib.niggli_reduce(cell, eps=tolerance)
    except spglib.SpglibError:
        return None
    return None if reduced is None else reduced @ reduced.T


def _pymatgen_metric(cell: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> np.ndarray | None:
    # It ends with a search for the orientation that never ends on needles; the metric is known before that.
    monkeypatch.setattr(Lattice, "find_mapping", lambda _self, other, *_args, **_kwargs: (other, None, None))
    try:
        reduced = Lattice(cell).get_niggli_reduced_lattice().matrix
    except ValueError:
        return None
    return reduced @ reduced.T


def _compare_with_references(n_cells: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    cells = np.concatenate([_cells(n_cells // 2, 0)[1], _cells(n_cells // 2, 1, noise=1e-9)[1]])
    metric = _metric(niggli_reduce(torch.tensor(cells))[0])
    counts = {"spglib wrong": 0, "spglib failed": 0, "pymatgen wrong": 0, "pymatgen failed": 0}
    for cell, ours in zip(cells, metric):
        references = {
            "spglib": _spglib_metric(cell, 1e-5 * float(ours[0, 0])),
            "pymatgen": _pymatgen_metric(cell, monkeypatch),
        }
        for name, theirs in references.items():
            if theirs is None:
                counts[f"{name} failed"] += 1
            elif float(_relative_difference(torch.tensor(theirs)[None], ours[None])) > 1e-3:
                counts[f"{name} wrong"] += 1
    return counts


@pytest.mark.parametrize("n_cells", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_metric_agrees_with_spglib_and_pymatgen(n_cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = _compare_with_references(n_cells, monkeypatch)
    print(counts)
    assert counts["spglib wrong"] == counts["pymatgen wrong"] == 0
    assert counts["spglib failed"] <= 0.01 * n_cells  # needles
    assert counts["pymatgen failed"] <= 0.001 * n_cells


def nearly_symmetric_cells_that_depend_on_the_basis(n_cells: int) -> dict[str, int]:
    """How many lattices within 1e-5 of a symmetric one have two Niggli cells, by our reduction and by spglib's."""
    pairs = _cells(n_cells, 3, noise=1e-5)
    ours = [_metric(niggli_reduce(torch.tensor(cells))[0]) for cells in pairs]
    counts = {"ours": int((_relative_difference(*ours) > 1e-4).sum()), "spglib": 0}
    for first, second, metric in zip(*pairs, ours[0]):
        theirs = [_spglib_metric(cell, 1e-5 * float(metric[0, 0])) for cell in (first, second)]
        if theirs[0] is not None and theirs[1] is not None:
            difference = _relative_difference(*(torch.tensor(other)[None] for other in theirs))
            counts["spglib"] += int(difference > 1e-4)
    return counts


def test_a_nearly_symmetric_lattice_has_one_niggli_cell() -> None:
    counts = nearly_symmetric_cells_that_depend_on_the_basis(520)
    print(counts)
    assert counts["ours"] == 0


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_result_meets_every_niggli_condition(noise: float) -> None:
    assert _is_niggli(niggli_reduce(torch.tensor(_cells(2600, 2, noise)[1]))[0]).all()


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_metric_does_not_depend_on_the_basis(noise: float) -> None:
    cells, same = (torch.tensor(cells) for cells in _cells(2600, 3, noise))
    difference = _relative_difference(_metric(niggli_reduce(same)[0]), _metric(niggli_reduce(cells)[0]))
    assert difference.max() < 1e-4  # needles, where rounding is largest in this unit
    assert difference.median() < max(100 * noise, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reduction_is_idempotent_unimodular_and_keeps_handedness(dtype: torch.dtype) -> None:
    cell = torch.tensor(_cells(1300, 4)[1]).to(dtype)
    reduced, transform = niggli_reduce(cell)
    assert reduced.dtype == dtype
    assert transform.dtype == torch.int64
    assert set(_determinants(transform)) == {1}
    torch.testing.assert_close((transform.double() @ cell.double()).to(dtype), reduced, rtol=0, atol=0)
    again, identity = niggli_reduce(reduced)
    assert torch.equal(again, reduced)
    assert (identity == torch.eye(3, dtype=torch.int64)).all()


def test_float32_takes_the_same_steps_as_float64() -> None:
    cell = torch.tensor(_cells(1300, 5)[1]).float()
    reduced, transform = niggli_reduce(cell)
    exact, exact_transform = niggli_reduce(cell.double())
    assert torch.equal(transform, exact_transform)
    torch.testing.assert_close(reduced, exact.float(), rtol=0, atol=0)


shears = st.lists(st.tuples(st.permutations(range(3)), st.integers(-100, 100)), min_size=1, max_size=3)
integer_cells = hnp.arrays(np.int64, (3, 3), elements=st.integers(-9, 9))


@given(cell=integer_cells, steps=shears, sign=st.sampled_from([-1, 1]))
@example(cell=np.eye(3, dtype=int), steps=[((0, 1, 2), 100), ((1, 2, 0), -99), ((2, 0, 1), 98)], sign=-1)
@example(cell=(2 * FACE).astype(int), steps=[((0, 1, 2), 1)], sign=1)
@example(cell=(2 * BODY).astype(int), steps=[((2, 1, 0), -1)], sign=-1)
def test_integer_lattice_has_exactly_one_metric(cell: np.ndarray, steps: list, sign: int) -> None:
    assume(round(np.linalg.det(cell)) != 0)
    other = sign * cell
    for (row, column, _), multiple in steps:
        other = other.copy()
        other[row] += multiple * other[column]
    both = torch.tensor(np.array([cell, other])).double()  # exact: integers far below 2^53
    reduced, transform = niggli_reduce(both)
    first, second = _metric(reduced)
    assert torch.equal(first, second)
    assert _determinants(transform) == [1, 1]
    assert _is_niggli(reduced).all()


@given(
    cell=hnp.arrays(np.float64, (3, 3), elements=st.floats(allow_nan=True, allow_infinity=True)),
)
@example(cell=np.zeros((3, 3)))
@example(cell=np.ones((3, 3)))
@example(cell=np.full((3, 3), 1e300))
@example(cell=np.diag([1e-300, 1, 1e300]))
@example(cell=np.array([[1, 0, 0], [0, 1, 0], [np.sqrt(2), np.sqrt(3), 0]]))
def test_any_input_gives_the_same_lattice_or_is_returned_unchanged(cell: np.ndarray) -> None:
    batch = torch.tensor(np.array([cell, np.eye(3)]))
    reduced, transform = niggli_reduce(batch)
    assert _determinants(transform) == [1, 1]
    assert torch.equal(reduced[1], batch[1])
    if np.isfinite(cell).all():
        assert reduced.isfinite().all()
    else:
        np.testing.assert_array_equal(reduced[0].numpy(), cell)
        assert torch.equal(transform[0], torch.eye(3, dtype=torch.int64))


@pytest.mark.parametrize(
    "cell",
    [
        np.zeros((3, 3)),
        np.ones((3, 3)),
        [[1, 0, 0], [0, 1, 0], [3, -2, 0]],
        [[1, 0, 0], [0, 1, 0], [np.sqrt(2), np.sqrt(3), 0]],
        np.full((3, 3), np.nan),
        [[1, 0, 0], [0, np.inf, 0], [0, 0, 1]],
    ],
)
def test_flat_and_non_finite_cells_pass_through(cell: np.ndarray) -> None:
    batch = torch.tensor(np.array(cell))[None].double()
    reduced, transform = niggli_reduce(batch)
    np.testing.assert_array_equal(reduced.numpy(), batch.numpy())
    assert torch.equal(transform[0], torch.eye(3, dtype=torch.int64))


def test_extreme_skew_of_a_cube_is_undone() -> None:
    cell = torch.tensor([[1.0, 0, 0], [12345678, 1, 0], [-87654321, 0, 1]], dtype=torch.float64)[None]
    reduced, _ = niggli_reduce(cell)
    assert torch.equal(_metric(reduced)[0], torch.eye(3, dtype=torch.float64))


def test_gradient_passes_through_the_transform() -> None:
    cell = torch.tensor(_cells(13, 6)[1], requires_grad=True)
    reduced, transform = niggli_reduce(cell)
    weight = torch.linspace(-1, 1, reduced.numel(), dtype=torch.float64).view_as(reduced)
    (gradient,) = torch.autograd.grad((weight * reduced).sum(), cell)
    torch.testing.assert_close(gradient, transform.double().mT @ weight)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (torch.zeros(3, 3), r"cell has shape \(3, 3\)"),
        (torch.zeros(1, 3, 3, dtype=torch.int64), "cell is torch.int64"),
    ],
)
def test_wrong_cells_are_named(cell: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        niggli_reduce(cell)


def _crystals(seed: int, dtype: torch.dtype = torch.float64) -> Crystals:
    rng = np.random.default_rng(seed)
    cells = _cells(len(LATTICES), seed)[1]
    species = [[int(number) for number in rng.integers(1, 100, rng.integers(1, 6))] for _ in cells]
    frac = [rng.uniform(-3, 3, size=(len(numbers), 3)) for numbers in species]
    return Crystals.from_arrays(cells, np.concatenate([f @ c for f, c in zip(frac, cells)]), species, dtype)


@pytest.mark.parametrize("seed", range(5))
def test_niggli_moves_atoms_by_lattice_vectors_only(seed: int) -> None:
    crystals = _crystals(seed)
    reduced = niggli(crystals)
    steps = crystals.multiply_rows(reduced.positions - crystals.positions, torch.linalg.inv(reduced.cell))
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert (reduced.frac_coords > -1e-12).all()
    assert (reduced.frac_coords < 1).all()
    assert torch.equal(reduced.atomic_numbers, crystals.atomic_numbers)
    again = niggli(reduced)
    assert torch.equal(again.cell, reduced.cell)
    assert torch.equal(again.positions, reduced.positions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapping_is_robust_at_faces(dtype: torch.dtype) -> None:
    frac = np.array([[-1e-17, 1 - 1e-17, 0.5], [-1.0, 2.0, 0.0], [0.25, -0.25, 1.25]])
    crystals = Crystals.from_arrays(np.eye(3)[None] * 4, frac * 4, [[1, 2, 3]], dtype)
    wrapped = wrap_positions(crystals)
    expected = torch.tensor([[0, 0, 2], [0, 0, 0], [1, 3, 1]], dtype=dtype)
    torch.testing.assert_close(wrapped.positions, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-15)
    assert torch.equal(wrap_positions(wrapped).positions, wrapped.positions)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_wrapping_leaves_a_broken_crystal_alone(bad: float) -> None:
    crystals = _crystals(0)
    cell = crystals.cell.clone()
    cell[3] = bad
    moved = niggli(crystals.replace(cell=cell))
    broken = crystals.system_idx == 3
    assert torch.equal(moved.positions[broken], crystals.positions[broken])
    assert torch.equal(moved.positions[~broken], niggli(crystals).positions[~broken])


def test_fractional_coordinates_are_those_of_pymatgen_and_lead_back() -> None:
    crystals = _crystals(1)
    frac = crystals.frac_coords
    torch.testing.assert_close(crystals.multiply_rows(frac, crystals.cell), crystals.positions)
    reference = [
        Lattice(cell.numpy()).get_fractional_coords(xyz.numpy())
        for cell, xyz in zip(crystals.cell, crystals.positions.split(crystals.n_atoms.tolist()))
    ]
    np.testing.assert_allclose(frac.numpy(), np.concatenate(reference), rtol=1e-9, atol=1e-9)


def test_deformation_keeps_fractional_coordinates_and_scales_the_volume_by_its_determinant() -> None:
    crystals = _crystals(6)
    matrices = torch.eye(3, dtype=torch.float64) + 0.2 * torch.tensor(_cells(len(crystals), 8)[0]).tanh()
    deformed = deform(crystals, matrices)
    torch.testing.assert_close(deformed.frac_coords, crystals.frac_coords, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(deformed.volume, crystals.volume * torch.linalg.det(matrices).abs())
    one = deform(crystals[[0]], matrices[:1])
    assert torch.equal(one.positions, deformed.positions[: crystals.n_atoms[0]])


SKEWED = [[4.0, 0, 0], [4000, 4, 0], [1e6, 5e5, 4]]  # a simple cubic lattice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skew_is_removed_where_there_is_some_and_nowhere_else(dtype: torch.dtype) -> None:
    cells = np.array([np.eye(3) * 3, SKEWED, THIRDS @ HEXAGON * 5])
    crystals = Crystals.from_arrays(cells, np.ones((4, 3)), [[1], [2, 3], [4]], dtype)
    plain = without_skew(crystals)
    assert torch.equal(plain.cell[[0, 2]], crystals.cell[[0, 2]])
    assert torch.equal(plain.positions, crystals.positions)
    torch.testing.assert_close(_metric(plain.cell)[1], 16 * torch.eye(3, dtype=dtype))
    assert without_skew(plain) is plain


def test_skew_is_removed_differentiably() -> None:
    cell = torch.tensor(np.array([SKEWED, np.eye(3)]), requires_grad=True)
    crystals = Crystals.from_arrays(cell.detach().numpy(), np.ones((2, 3)), [[1], [2]], torch.float64)
    (gradient,) = torch.autograd.grad(without_skew(crystals.replace(cell=cell)).cell.sum(), cell)
    transform = niggli_reduce(cell.detach())[1].double()
    torch.testing.assert_close(gradient, transform.mT @ torch.ones(2, 3, 3, dtype=torch.float64))


def test_broken_cells_keep_their_skew() -> None:
    crystals = _crystals(0)
    cell = crystals.cell.clone()
    cell[1], cell[2] = torch.nan, 0.0
    kept = without_skew(crystals.replace(cell=cell)).cell
    assert kept[1].isnan().all() and not kept[2].any()


def _strain(crystals: Crystals, seed: int, scale: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    strain = scale * torch.randn(len(crystals), 3, 3, generator=generator, dtype=torch.float64)
    return (strain + strain.mT) / 2


def test_strain_keeps_fractional_coordinates_and_is_undone_by_its_negative() -> None:
    crystals = _crystals(2)
    strain = _strain(crystals, 0)
    strained = apply_strain(crystals, strain)
    torch.testing.assert_close(strained.frac_coords, crystals.frac_coords, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(strained.volume, crystals.volume * strain.diagonal(dim1=1, dim2=2).sum(-1).exp())
    restored = apply_strain(strained, -strain)
    torch.testing.assert_close(restored.cell, crystals.cell, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(restored.positions, crystals.positions, rtol=1e-12, atol=1e-11)
    with pytest.raises(ValueError, match="strain has shape"):
        apply_strain(crystals, strain[:1])


def test_strain_does_not_depend_on_the_basis() -> None:
    crystals = _crystals(3)
    strain = _strain(crystals, 1, scale=0.01)
    _, transform = niggli_reduce(crystals.cell)
    torch.testing.assert_close(
        apply_strain(niggli(crystals), strain).cell, transform.double() @ apply_strain(crystals, strain).cell
    )


def test_volume_gradient_at_zero_strain_is_volume_times_identity() -> None:
    crystals = _crystals(4)
    strain = torch.zeros_like(crystals.cell, requires_grad=True)
    (gradient,) = torch.autograd.grad(apply_strain(crystals, strain).volume.sum(), strain)
    torch.testing.assert_close(gradient, crystals.volume.view(-1, 1, 1) * torch.eye(3, dtype=torch.float64))
