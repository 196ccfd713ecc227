"""Nobody needs to read this: the sums of the energy once more, compiled (numba) to run fast on a CPU.

The filter c(d) is tabulated once per evaluation and interpolated (cubic Hermite, C¹). A kernel then gathers, computes
and accumulates edge by edge, in cache, and its backward recomputes instead of storing: no array of size n_edges × width
ever exists. Differentiable once; where second derivatives are needed, use the plain torch path.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import config, njit, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import overload
from torch import Tensor
from torch.autograd.function import once_differentiable

from contsp_core.crystals import Crystals
from contsp_core.graph import Graph, search_range

NUMBA: Any = config
if NUMBA.CPU_FEATURES is None and "+avx512f" in get_host_cpu_features():
    NUMBA.CPU_FEATURES = f"{get_host_cpu_features()},-prefer-256-bit"  # LLVM would use half of each register
FAST: Any = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "nogil": True, "cache": True}


class EdgeList(NamedTuple):
    """An undirected graph, cut into ``len(first_edge) − 1`` runs of whole systems that threads may work on alone."""

    graph: Graph
    first_edge: np.ndarray


@njit(nogil=True, cache=True)  # no contraction: counting and storing must take the same decisions
def _search(first, last, cell, frac, positions, reach, cutoff, first_atom, source, target, image, first_edge, store):
    """Count the edges of systems first … last − 1, or store those of each from index ``first_edge[system]`` on."""
    for system in range(first, last):
        L, n, square, end = cell[system], reach[system], cutoff[system] ** 2, first_atom[system + 1]
        edge = first_edge[system] if store else 0
        for i in range(first_atom[system], end):
            for j in range(i, end):
                o0 = -np.rint(frac[j, 0] - frac[i, 0])
                o1 = -np.rint(frac[j, 1] - frac[i, 1])
                o2 = -np.rint(frac[j, 2] - frac[i, 2])
                for m0 in range(0 if i == j else -n[0], n[0] + 1):  # of two opposite images of an atom, one
                    k0 = o0 + m0
                    x0 = positions[j, 0] - positions[i, 0] + k0 * L[0, 0]
                    y0 = positions[j, 1] - positions[i, 1] + k0 * L[0, 1]
                    z0 = positions[j, 2] - positions[i, 2] + k0 * L[0, 2]
                    for m1 in range(-n[1], n[1] + 1):
                        k1 = o1 + m1
                        x1, y1, z1 = x0 + k1 * L[1, 0], y0 + k1 * L[1, 1], z0 + k1 * L[1, 2]
                        for m2 in range(-n[2], n[2] + 1):
                            k2 = o2 + m2
                            x, y, z = x1 + k2 * L[2, 0], y1 + k2 * L[2, 1], z1 + k2 * L[2, 2]
                            if x * x + y * y + z * z > square or (i == j and (k0, k1, k2) <= (0, 0, 0)):
                                continue
                            if store:
                                source[edge], target[edge] = i, j
                                image[edge, 0], image[edge, 1], image[edge, 2] = k0, k1, k2
                            edge += 1
        if not store:
            first_edge[system + 1] = edge


@lru_cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="contsp")


def _after_fork() -> None:
    """A forked child inherits this pool and torch's, but not their threads: it would wait for ever."""
    _pool.cache_clear()
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def run_parts(kernel: Callable[..., None], bounds: np.ndarray, arguments: Callable[[int], tuple[Any, ...]]) -> None:
    """Run ``kernel(bounds[p], bounds[p + 1], *arguments(p))`` for every part p, each in a thread."""
    parts = range(len(bounds) - 1)
    in_order = map if len(parts) == 1 else _pool().map
    list(in_order(lambda p: kernel(bounds[p], bounds[p + 1], *arguments(p)), parts))


def build_edges(crystals: Crystals, cutoff: Tensor) -> EdgeList:
    """The graph of :func:`contsp_core.graph.build_graph`, with its errors, found by a compiled search on the CPU."""
    frac, reach = search_range(crystals, cutoff)
    n_systems = len(crystals)
    first_atom = np.searchsorted(crystals.system_idx.numpy(), np.arange(n_systems + 1))
    first_edge = np.zeros(n_systems + 1, np.int64)
    geometry = (*(x.detach().numpy() for x in (crystals.cell, frac, crystals.positions, reach, cutoff)), first_atom)
    n_parts = min(n_systems, torch.get_num_threads())
    systems = np.linspace(0, n_systems, n_parts + 1).astype(np.int64)
    empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 3), np.int32))
    run_parts(_search, systems, lambda part: (*geometry, *empty, first_edge, False))
    np.cumsum(first_edge, out=first_edge)
    n_edges = int(first_edge[-1])
    found = (np.empty(n_edges, np.int64), np.empty(n_edges, np.int64), np.empty((n_edges, 3), np.int32))
    run_parts(_search, systems, lambda part: (*geometry, *found, first_edge, True))
    shares = np.searchsorted(first_edge, np.arange(1, n_parts) * n_edges / n_parts)
    return EdgeList(Graph(*map(torch.from_numpy, found)), first_edge[np.concatenate([[0], shares, [n_systems]])])


def _sigmoid(x):
    """1 / (1 + e^{−x}) in the precision of x; a loop over it vectorises, which one over exp does not."""


@overload(_sigmoid, jit_options=FAST | {"cache": False})
def _compiled_sigmoid(x):
    """e^y = 2^n e^r with |r| ≤ ln(2) / 2: 2^n from its bits, e^r from its Taylor series, to rounding."""
    single: Any = np.float32, np.int32, 23, 127, 80.0, 7, 9
    double: Any = np.float64, np.int64, 52, 1023, 700.0, 14, 32
    real, integer, mantissa_bits, bias, limit, n_terms, n_high = single if x == types.float32 else double
    high = round(math.log(2) * 2**n_high) / 2**n_high  # so short that n · high is exact
    low, inverse = math.log(2) - high, 1 / math.log(2)
    terms = tuple(1 / math.factorial(n) for n in reversed(range(n_terms)))

    def sigmoid(x):
        y = min(max(-x, real(-limit)), real(limit))
        n = np.rint(y * real(inverse))
        r = y - n * real(high) - n * real(low)
        exponential = real(0)
        for term in terms:
            exponential = exponential * r + real(term)
        power = integer((integer(n) + integer(bias)) << integer(mantissa_bits)).view(real)
        return real(1) / (real(1) + exponential * power)

    return sigmoid


@njit(inline="always")
def _hermite(distance, inverse_spacing, n_nodes):
    """Table row, and weights of (value, slope) at its two ends, for the interpolant and for its derivative."""
    one, six = type(distance)(1), type(distance)(6)
    position = distance * inverse_spacing
    row = max(0, min(int(position), n_nodes - 2))  # also where the distance is NaN
    t = position - type(distance)(row)
    s = one - t
    value = (s * s * (one + t + t), s * s * t, t * t * (one + s + s), -t * t * s)
    bump = six * s * t * inverse_spacing
    slope = (-bump, s * (s - t - t) * inverse_spacing, bump, t * (t - s - s) * inverse_spacing)
    return row, value, slope


@njit(inline="always")
def _filter_at(W, table, row, ends, c):
    """c = Σ ends · (value, slope) at both ends of an interval of the table."""
    lower, upper, (v0, s0, v1, s1) = table[row], table[row + 1], ends
    for k in range(W):
        c[k] = v0 * lower[k] + s0 * lower[W + k] + v1 * upper[k] + s1 * upper[W + k]


@njit(inline="always")
def _receive(D, V, ai, bj, c, w, x, y, z, out):
    for k in range(V):
        message = w * _sigmoid((ai[k] + bj[k]) * c[k]) * ((ai[D + k] + bj[D + k]) * c[D + k])
        out[k] += message
        out[D + k] += x * message
        out[D + V + k] += y * message
        out[D + 2 * V + k] += z * message
    for k in range(V, D):
        out[k] += w * _sigmoid((ai[k] + bj[k]) * c[k]) * ((ai[D + k] + bj[D + k]) * c[D + k])


@njit(inline="always")
def _receive_backward(D, V, ai, bj, c, w, x, y, z, g, ga, gb, gz, gc):
    """Adjoint of ``_receive`` with respect to a_i, b_j, c (accumulated), w, x, y and z (returned); gz is scratch."""
    one, gw, gx, gy, g_z = type(w)(1), type(w)(0), type(w)(0), type(w)(0), type(w)(0)
    for k in range(V):
        s_u, s_v = ai[k] + bj[k], ai[D + k] + bj[D + k]
        gate = _sigmoid(s_u * c[k])
        value = s_v * c[D + k]
        message = gate * value
        gx += message * g[D + k]
        gy += message * g[D + V + k]
        g_z += message * g[D + 2 * V + k]
        gm = (g[k] + x * g[D + k] + y * g[D + V + k] + z * g[D + 2 * V + k]) * gate
        gw += gm * value
        gv = gm * w
        gu = gv * value * (one - gate)
        gc[k] += gu * s_u
        gc[D + k] += gv * s_v
        gz[k] = gu * c[k]
        gz[D + k] = gv * c[D + k]
    for k in range(V, D):  # the same without the vectors; shared code would not vectorise
        s_u, s_v = ai[k] + bj[k], ai[D + k] + bj[D + k]
        gate = _sigmoid(s_u * c[k])
        value = s_v * c[D + k]
        gm = g[k] * gate
        gw += gm * value
        gv = gm * w
        gu = gv * value * (one - gate)
        gc[k] += gu * s_u
        gc[D + k] += gv * s_v
        gz[k] = gu * c[k]
        gz[D + k] = gv * c[D + k]
    for k in range(2 * D):  # a loop of its own: with so few arrays the compiler can rule out overlap, and vectorise
        ga[k] += gz[k]
    for k in range(2 * D):
        gb[k] += gz[k]
    return gw, w * gx, w * gy, w * g_z


@lru_cache
def _message_kernels(D: int, V: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """Forward and backward of one message pass, compiled for its widths: loops of known length vectorise better."""
    W = 2 * D

    @njit(**FAST)
    def forward(first, last, a, b, table, distance, weight, direction, source, target, inverse_spacing, out):
        """out_i = Σ_j m, Σ_j m x, Σ_j m y, Σ_j m z over both directions of each edge; the last three of V features."""
        c = np.empty(W, a.dtype)
        for e in range(first, last):
            i, j, w, x, y, z = source[e], target[e], weight[e], direction[e, 0], direction[e, 1], direction[e, 2]
            row, ends, _ = _hermite(distance[e], inverse_spacing, len(table))
            _filter_at(W, table, row, ends, c)
            _receive(D, V, a[i], b[j], c, w, x, y, z, out[i])
            _receive(D, V, a[j], b[i], c, w, -x, -y, -z, out[j])

    @njit(**FAST)
    def backward(
        first, last, a, b, table, distance, weight, direction, source, target, inverse_spacing, grad,
        grad_a, grad_b, grad_table, grad_distance, grad_weight, grad_direction,
    ):  # fmt: skip
        """Adjoints of ``forward``; ``grad_table`` is empty if it is not wanted."""
        want_table = len(grad_table) > 0
        c, gc, gz = np.empty(W, a.dtype), np.empty(W, a.dtype), np.empty(W, a.dtype)
        for e in range(first, last):
            i, j, w, x, y, z = source[e], target[e], weight[e], direction[e, 0], direction[e, 1], direction[e, 2]
            row, ends, slopes = _hermite(distance[e], inverse_spacing, len(table))
            _filter_at(W, table, row, ends, c)
            for k in range(W):
                gc[k] = type(w)(0)
            there = _receive_backward(D, V, a[i], b[j], c, w, x, y, z, grad[i], grad_a[i], grad_b[j], gz, gc)
            back = _receive_backward(D, V, a[j], b[i], c, w, -x, -y, -z, grad[j], grad_a[j], grad_b[i], gz, gc)
            grad_weight[e] = there[0] + back[0]
            for k in range(3):
                grad_direction[e, k] = there[1 + k] - back[1 + k]
            lower, upper, (dv0, ds0, dv1, ds1), gd = table[row], table[row + 1], slopes, type(w)(0)
            for k in range(W):
                gd += gc[k] * (dv0 * lower[k] + ds0 * lower[W + k] + dv1 * upper[k] + ds1 * upper[W + k])
            grad_distance[e] = gd
            if want_table:
                for node, value, slope in ((grad_table[row], *ends[:2]), (grad_table[row + 1], *ends[2:])):
                    for k in range(W):
                        node[k] += value * gc[k]
                    for k in range(W):
                        node[W + k] += slope * gc[k]

    return forward, backward


class _MessageSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, table, *of_edges):
        *geometry, n_vectors, inverse_spacing, edges = of_edges
        forward, ctx.kernel = _message_kernels(a.shape[1] // 2, n_vectors)
        tensors = (a, b, table, *geometry, edges.graph.source, edges.graph.target)
        arrays = [tensor.detach().contiguous().numpy() for tensor in tensors]
        arrays.append(arrays[0].dtype.type(inverse_spacing))
        out = np.zeros((len(a), a.shape[1] // 2 + 3 * n_vectors), arrays[0].dtype)
        run_parts(forward, edges.first_edge, lambda part: (*arrays, out))
        ctx.arrays, ctx.first_edge = arrays, edges.first_edge
        return torch.from_numpy(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, table, distance, weight, direction, *_ = ctx.arrays
        rows = len(table) if ctx.needs_input_grad[2] else 0
        grad_table = np.zeros((len(ctx.first_edge) - 1, rows, table.shape[1]), table.dtype)  # one slab per thread
        grad_a, grad_b, *of_edges = map(np.zeros_like, (a, b, distance, weight, direction))
        arrays = (*ctx.arrays, grad.contiguous().numpy(), grad_a, grad_b)
        run_parts(ctx.kernel, ctx.first_edge, lambda part: (*arrays, grad_table[part], *of_edges))
        grads = (grad_a, grad_b, grad_table.sum(axis=0) if rows else None, *of_edges)
        return *(array if array is None else torch.from_numpy(array) for array in grads), None, None, None


def message_sum(
    a: Tensor, b: Tensor, table: Tensor, geometry: tuple[Tensor, ...], n_vectors: int, spacing: float, edges: EdgeList
) -> Tensor:
    """Σ_j m_ij, and of the first features Σ_j m_ij x_ij, Σ_j m_ij y_ij, Σ_j m_ij z_ij, over both edge directions.

    m_ij = w_ij σ(u_ij) ⊙ v_ij with (u, v)_ij = (a_i + b_j) ⊙ c(d_ij).

    Args:
        a, b: (n_atoms_total, 2 D) projections of the receiving and of the sending atom.
        table: (n_nodes, 4 D) the filter c and its slope times the node spacing, at distances 0, 1, 2 … spacings.
        geometry: of the edges, (n_edges,) distance, Å; (n_edges,) weight w(d); (n_edges, 3) vector (x, y, z)_ij, which
            has the other sign for the other direction.
        n_vectors, spacing: V, the number of features of which the last three sums are taken; and of the nodes, Å.

    The sums are (n_atoms_total, D + 3 V), differentiable once in all tensors.
    """
    return _MessageSum.apply(a, b, table, *geometry, n_vectors, 1 / spacing, edges)
