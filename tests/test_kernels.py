"""The compiled kernels compute the sums they stand for, with the right derivatives, in any number of threads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from scipy import special
from test_energy import SMALL, random_batch, small_model

from contsp_core import energy, kernels
from contsp_core.energy import ContinuousCGCNN, energy_and_gradient
from contsp_core.graph import Graph, cutoff_radius, edge_vectors
from contsp_core.kernels import EdgeList, build_edges


def cubic(table: torch.Tensor, position: torch.Tensor, D: int) -> torch.Tensor:
    """The Hermite interpolant of values and slopes in ``table`` at positions in units of the spacing."""
    row = position.floor().long().clamp(max=len(table) - 2)
    t = (position - row)[:, None]
    (v0, s0), (v1, s1) = table[row].split(2 * D, dim=1), table[row + 1].split(2 * D, dim=1)
    return (2 * t**3 - 3 * t**2 + 1) * v0 + (t**3 - 2 * t**2 + t) * s0 + (3 * t**2 - 2 * t**3) * v1 + (t**3 - t**2) * s1


def message_inputs(D: int = 5, dtype: torch.dtype = torch.float64) -> tuple[tuple, EdgeList]:
    crystals = random_batch(dtype=dtype)
    edges = build_edges(crystals, 0.6 * cutoff_radius(crystals))
    rng = np.random.default_rng(0)
    distance = edge_vectors(crystals, edges.graph).norm(dim=1)
    n_nodes = int(distance.max() * 2.0) + 3
    shapes = [(len(crystals.positions), 2 * D), (len(crystals.positions), 2 * D), (n_nodes, 4 * D)]
    a, b, table = (torch.as_tensor(rng.standard_normal(shape), dtype=dtype) for shape in shapes)
    weight = torch.as_tensor(rng.random(len(distance)), dtype=dtype)
    direction = torch.as_tensor(rng.standard_normal((len(distance), 3)), dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (a, b, table, distance, weight, direction)), edges


def literal_sum(a, b, table, geometry, n_vectors, spacing, edges) -> torch.Tensor:
    """Σ_j m and Σ_j m ⊗ x with m = w σ(u) v, one edge direction after the other."""
    D, (distance, weight, direction) = a.shape[1] // 2, geometry
    c = cubic(table, distance / spacing, D)
    out = a.new_zeros(len(a), D + 3 * n_vectors)
    source, target = edges.graph.source, edges.graph.target
    for i, j, x in ((source, target, direction), (target, source, -direction)):
        z = (a[i] + b[j]) * c
        message = weight[:, None] * torch.sigmoid(z[:, :D]) * z[:, D:]
        vectors = torch.einsum("ex,ek->exk", x, message[:, :n_vectors]).flatten(1)
        out = out.index_add(0, i, torch.cat([message, vectors], dim=1))
    return out


@pytest.mark.parametrize("n_vectors", [0, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_the_message_sum_and_its_six_gradients_are_those_of_autograd(dtype, tolerance, n_vectors):
    inputs, edges = message_inputs(dtype=dtype)
    fused = kernels.message_sum(*inputs[:3], inputs[3:], n_vectors, 0.5, edges)
    literal = literal_sum(*inputs[:3], inputs[3:], n_vectors, 0.5, edges)
    adjoint = torch.linspace(-1, 1, fused.numel(), dtype=dtype).view_as(fused)
    torch.testing.assert_close(fused, literal, rtol=tolerance, atol=10 * tolerance)
    options = {"allow_unused": True, "materialize_grads": True}  # without vectors nothing depends on the directions
    ours, expected = (torch.autograd.grad(value, inputs, adjoint, **options) for value in (fused, literal))
    for found, wanted in zip(ours, expected):
        torch.testing.assert_close(found, wanted, rtol=10 * tolerance, atol=20 * tolerance)


def test_no_gradient_of_the_table_is_made_when_none_is_asked_for(monkeypatch):
    compiled, rows = kernels._message_kernels, []

    def watched(*widths):
        forward, backward = compiled(*widths)
        return forward, lambda *arrays: rows.append(len(arrays[14])) or backward(*arrays)

    monkeypatch.setattr(kernels, "_message_kernels", watched)
    (a, b, table, *of_edges), edges = message_inputs()
    total = kernels.message_sum(a, b, table.detach(), of_edges, 2, 0.5, edges).sum()
    with_table = kernels.message_sum(a, b, table, of_edges, 2, 0.5, edges).sum()
    inputs = (a, b, *of_edges)
    for one, other in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(with_table, inputs)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert set(rows) == {0, len(table)} and rows[0] == 0


@pytest.mark.parametrize(("dtype", "limit", "tolerance"), [(torch.float32, 80, 1e-6), (torch.float64, 700, 1e-14)])
def test_the_sigmoid_is_right_over_its_whole_range(dtype, limit, tolerance):
    """One atom pair at distance 0 with w = v = 1, so that the message is the sigmoid."""
    x = torch.cat([torch.linspace(-1.3 * limit, 1.3 * limit, 4001), torch.tensor([0, -1e-30])]).to(dtype)
    count = len(x)
    a = torch.zeros(2 * count, 2, dtype=dtype)
    a[::2, 0] = x
    a[::2, 1] = 1
    table = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * 2, dtype=dtype)
    pair = torch.arange(0, 2 * count, 2)
    edges = EdgeList(Graph(pair, pair + 1, torch.zeros(count, 3, dtype=torch.int32)), np.array([0, count]))
    at, one = torch.zeros(count, dtype=dtype), torch.ones(count, dtype=dtype)
    geometry = at, one, at.new_zeros(count, 3)
    found = kernels.message_sum(a, torch.zeros_like(a), table, geometry, 0, 1.0, edges)[::2, 0].numpy()
    expected = special.expit(x.double().numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    inside = np.abs(x.numpy()) < limit  # beyond, the exponent is held back from overflow
    np.testing.assert_allclose(found[inside], expected[inside], rtol=20 * tolerance)


def test_the_result_does_not_depend_on_the_number_of_threads():
    crystals, model = random_batch(), small_model()
    threads = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 2, 4):
            torch.set_num_threads(n_threads)
            results.append(energy_and_gradient(model, crystals))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for one, other in zip(results[0], result):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


FORK = """
import multiprocessing, warnings
import torch
from contsp_core import kernels
from contsp_core.energy import energy_and_gradient
from test_energy import random_batch, small_model

def energy_in_a_child(queue):
    kernels._pool().submit(int).result()
    queue.put(energy_and_gradient(small_model(), random_batch())[0].tolist())

warnings.simplefilter("ignore")  # Python warns of any fork beside threads
torch.set_num_threads(2)
here = energy_and_gradient(small_model(), random_batch())[0].tolist()
context = multiprocessing.get_context("fork")
queue = context.SimpleQueue()
child = context.Process(target=energy_in_a_child, args=(queue,), daemon=True)
child.start()
child.join(60)
assert child.exitcode == 0, child.exitcode
there = queue.get()
assert all(abs(one - other) <= 1e-12 * abs(other) for one, other in zip(there, here)), (there, here)
"""


def test_a_forked_process_does_not_wait_for_threads_it_does_not_have():
    """In a process of its own: threads of other libraries in this one are not what is tested."""
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", FORK], cwd=tests, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


def test_another_number_of_threads_starts_no_other_pool():
    threads = torch.get_num_threads()
    try:
        for n_threads in range(2, 6):
            torch.set_num_threads(n_threads)
            build_edges(random_batch(), cutoff_radius(random_batch()))
    finally:
        torch.set_num_threads(threads)
    assert kernels._pool.cache_info().currsize <= 1


def test_threads_share_the_edges_by_whole_crystals():
    crystals = random_batch()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        edges = build_edges(crystals, cutoff_radius(crystals))
    finally:
        torch.set_num_threads(threads)
    bounds = edges.first_edge
    assert bounds[0] == 0 and bounds[-1] == len(edges.graph.source) and (np.diff(bounds) >= 0).all()
    systems = crystals.system_idx[edges.graph.source]
    inner = [bound for bound in bounds[1:-1] if 0 < bound < bounds[-1]]
    assert len(bounds) == 4 and all(systems[bound - 1] != systems[bound] for bound in inner)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("width", [8, 32, 96])
def test_both_paths_agree_at_every_width(width, dtype, tolerance):
    """The filter is interpolated: its slope is less exact than its value."""
    model = small_model(replace(SMALL, n_basis=32, width=width), dtype)
    crystals = random_batch(dtype=dtype)
    fused = energy_and_gradient(model, crystals)
    model.use_kernels = False
    plain = energy_and_gradient(model, crystals)
    for ours, expected, factor in zip(fused, plain, (1, 10, 10)):
        torch.testing.assert_close(ours, expected, rtol=factor * tolerance, atol=factor * tolerance)


def test_an_atom_that_is_nowhere_reads_no_memory_but_the_table():
    """Its distances are NaN, and so is what it receives; the row of the table must still be one."""
    (a, b, table, distance, weight, direction), edges = message_inputs()
    lost = distance.detach().clone()
    lost[0] = torch.nan
    found = kernels.message_sum(a, b, table, (lost, weight, direction), 2, 0.5, edges)
    both = [int(edges.graph.source[0]), int(edges.graph.target[0])]
    (gradient,) = torch.autograd.grad(found.sum(), table)
    assert found[both].isnan().all()
    elsewhere = [atom for atom in range(len(a)) if atom not in both]
    assert found[elsewhere].isfinite().all()
    assert gradient.isnan().any(dim=1).nonzero()[:, 0].tolist() == [0, 1]


def test_a_second_derivative_is_refused_instead_of_wrong():
    model, crystals = small_model(), random_batch()
    positions = crystals.positions.clone().requires_grad_()
    value = model(crystals.replace(positions=positions)).sum()
    (grad,) = torch.autograd.grad(value, positions, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_without_numba_the_plain_path_is_taken(monkeypatch):
    monkeypatch.setattr(energy, "kernels", None)
    assert not ContinuousCGCNN(SMALL).use_kernels


@pytest.mark.skipif(
    "-prefer-256-bit" not in str(kernels.NUMBA.CPU_FEATURES), reason="no registers of 512 bits, or not wanted"
)
def test_vectors_fill_the_registers():
    kernel = numba.njit(**kernels.FAST | {"cache": False})(kernels._message_kernels(16, 0)[0].py_func)
    a, table, edge = np.ones((2, 32), np.float32), np.ones((3, 64), np.float32), np.zeros(1, np.int64)
    geometry = np.ones(1, np.float32), np.ones(1, np.float32), np.ones((1, 3), np.float32)
    kernel(0, 1, a, a, table, *geometry, edge, edge, np.float32(1), np.zeros((2, 16), np.float32))
    (assembly,) = kernel.inspect_asm().values()
    assert assembly.count("zmm") > assembly.count("ymm")


def test_no_product_with_the_table_is_subnormal(monkeypatch):
    """Arithmetic with numbers below 1e-38 takes a hundred times as long, and such a product was a fifth of training."""
    monkeypatch.setattr(kernels, "message_sum", lambda a, b, table, *_: table)
    config, crystals = energy.NOISE_LEVELS, random_batch(dtype=torch.float32)
    identity = torch.nn.Linear(config.n_basis, config.n_basis, bias=False)
    torch.nn.init.eye_(identity.weight)
    messages = ContinuousCGCNN(config)._fused_messages(crystals, cutoff_radius(crystals))
    table = messages(torch.zeros(1, 2), torch.zeros(1, 2), identity)
    sizes = table.abs()[table != 0]
    assert sizes.min() >= 1e-20 and sizes.max() > 0.9 and (table == 0).any()
