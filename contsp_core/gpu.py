"""Nobody needs to read this: the sums of :mod:`contsp_core.kernels` on a GPU (Triton, which comes with torch for CUDA).

One program sums the messages of one atom and some features, so nothing is added by two at once: the same input gives
the same bits. Its backward recomputes instead of storing, and visits each edge from both ends. Differentiable once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from contsp_core.graph import Graph

FEATURES = 32  # of one program
EDGES = 8  # that it handles at once


@dataclass(frozen=True)
class AtomEdges:
    """Both directions of every edge, grouped by the atom that receives: atom i has ``first[i] … first[i + 1] − 1``."""

    first: Tensor  # (n_atoms_total + 1,) int32
    other: Tensor  # (2 n_edges,) int32, the sending atom
    edge: Tensor  # (2 n_edges,) int32, its number in the undirected graph
    sign: Tensor  # (2 n_edges,) int32, −1 where its vector counts backwards


def group_edges(graph: Graph, n_atoms: int) -> AtomEdges:
    """Group the edges of an undirected graph by atom."""
    directed = graph.directed()
    order = torch.argsort(directed.source, stable=True)
    first = torch.zeros(n_atoms + 1, dtype=torch.int32, device=order.device)
    first[1:] = torch.cumsum(torch.bincount(directed.source, minlength=n_atoms), 0)
    n_edges = len(graph.source)
    sign = torch.where(order < n_edges, 1, -1)
    return AtomEdges(first, directed.target[order].int(), (order % max(1, n_edges)).int(), sign.int())


@triton.jit
def _forward(
    a, b, c, weight, direction, first, other, edge, sign, out,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    i, k = tl.program_id(0), tl.program_id(1) * F + tl.arange(0, F)
    features = k < D
    a_u = tl.load(a + i * 2 * D + k, features, 0.0)[None, :]
    a_v = tl.load(a + i * 2 * D + D + k, features, 0.0)[None, :]
    total, sum_x = tl.zeros_like(a_u), tl.zeros_like(a_u)
    sum_y, sum_z = tl.zeros_like(a_u), tl.zeros_like(a_u)
    last = tl.load(first + i + 1)
    for start in range(tl.load(first + i), last, E):
        rows = start + tl.arange(0, E)
        is_edge = rows < last
        j, e = tl.load(other + rows, is_edge, 0).to(tl.int64), tl.load(edge + rows, is_edge, 0).to(tl.int64)
        s = tl.load(sign + rows, is_edge, 0)
        w = tl.load(weight + e, is_edge, 0.0)
        x, y, z = tl.load(direction + 3 * e) * s, tl.load(direction + 3 * e + 1) * s, tl.load(direction + 3 * e + 2) * s
        at_j, at_e = (j * 2 * D)[:, None] + k[None, :], (e * 2 * D)[:, None] + k[None, :]
        mask = is_edge[:, None] & features[None, :]
        u = (a_u + tl.load(b + at_j, mask, 0.0)) * tl.load(c + at_e, mask, 0.0)
        v = (a_v + tl.load(b + at_j + D, mask, 0.0)) * tl.load(c + at_e + D, mask, 0.0)
        message = w[:, None] * tl.sigmoid(u) * v
        total += tl.sum(message, 0, keep_dims=True)
        sum_x += tl.sum(message * x[:, None], 0, keep_dims=True)
        sum_y += tl.sum(message * y[:, None], 0, keep_dims=True)
        sum_z += tl.sum(message * z[:, None], 0, keep_dims=True)
    row = out + i * (D + 3 * V) + k[None, :]
    vectors = k[None, :] < V
    tl.store(row, total, features[None, :])
    tl.store(row + D, sum_x, vectors)
    tl.store(row + D + V, sum_y, vectors)
    tl.store(row + D + 2 * V, sum_z, vectors)


@triton.jit
def _adjoint(s_u, s_v, c_u, c_v, w, x, y, z, g, g_x, g_y, g_z):
    """Of one message w σ(s_u c_u) s_v c_v: gradients of s_u, s_v, c_u, c_v, and summed ones of w, x, y, z."""
    gate, value = tl.sigmoid(s_u * c_u), s_v * c_v
    message = w * gate * value
    d_message = (g + x * g_x + y * g_y + z * g_z) * gate
    d_v = d_message * w
    d_u = d_v * value * (1 - gate)
    d_w, d_x = tl.sum(d_message * value, 1, keep_dims=True), tl.sum(message * g_x, 1, keep_dims=True)
    d_y, d_z = tl.sum(message * g_y, 1, keep_dims=True), tl.sum(message * g_z, 1, keep_dims=True)
    return d_u * c_u, d_v * c_v, d_u * s_u, d_v * s_v, d_w, d_x, d_y, d_z


@triton.jit
def _backward(
    a, b, c, weight, direction, first, other, edge, sign, grad, grad_a, grad_b, grad_c, grad_edge, n_edges,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    i, part = tl.program_id(0), tl.program_id(1)
    k = (part * F + tl.arange(0, F))[None, :]
    features, vectors = k < D, k < V
    at_i, of_i = i * 2 * D + k, i * (D + 3 * V) + k
    a_u, a_v = tl.load(a + at_i, features, 0.0), tl.load(a + at_i + D, features, 0.0)
    b_u, b_v = tl.load(b + at_i, features, 0.0), tl.load(b + at_i + D, features, 0.0)
    g, g_x = tl.load(grad + of_i, features, 0.0), tl.load(grad + of_i + D, vectors, 0.0)
    g_y, g_z = tl.load(grad + of_i + D + V, vectors, 0.0), tl.load(grad + of_i + D + 2 * V, vectors, 0.0)
    sum_au, sum_av, sum_bu, sum_bv = tl.zeros_like(a_u), tl.zeros_like(a_u), tl.zeros_like(a_u), tl.zeros_like(a_u)
    last = tl.load(first + i + 1)
    for start in range(tl.load(first + i), last, E):
        rows = (start + tl.arange(0, E))[:, None]
        is_edge = rows < last
        j, e = tl.load(other + rows, is_edge, 0).to(tl.int64), tl.load(edge + rows, is_edge, 0).to(tl.int64)
        s = tl.load(sign + rows, is_edge, 0)
        w = tl.load(weight + e, is_edge, 0.0)
        x, y, z = tl.load(direction + 3 * e) * s, tl.load(direction + 3 * e + 1) * s, tl.load(direction + 3 * e + 2) * s
        mask, has_vector = is_edge & features, is_edge & vectors
        at_j, at_e, of_j = j * 2 * D + k, e * 2 * D + k, j * (D + 3 * V) + k
        c_u, c_v = tl.load(c + at_e, mask, 0.0), tl.load(c + at_e + D, mask, 0.0)
        s_u, s_v = a_u + tl.load(b + at_j, mask, 0.0), a_v + tl.load(b + at_j + D, mask, 0.0)
        au, av, c_u1, c_v1, w1, x1, y1, z1 = _adjoint(s_u, s_v, c_u, c_v, w, x, y, z, g, g_x, g_y, g_z)
        s_u, s_v = tl.load(a + at_j, mask, 0.0) + b_u, tl.load(a + at_j + D, mask, 0.0) + b_v
        h, h_x = tl.load(grad + of_j, mask, 0.0), tl.load(grad + of_j + D, has_vector, 0.0)
        h_y = tl.load(grad + of_j + D + V, has_vector, 0.0)
        h_z = tl.load(grad + of_j + D + 2 * V, has_vector, 0.0)
        bu, bv, c_u2, c_v2, w2, x2, y2, z2 = _adjoint(s_u, s_v, c_u, c_v, w, -x, -y, -z, h, h_x, h_y, h_z)
        sum_au += tl.sum(au, 0, keep_dims=True)
        sum_av += tl.sum(av, 0, keep_dims=True)
        sum_bu += tl.sum(bu, 0, keep_dims=True)
        sum_bv += tl.sum(bv, 0, keep_dims=True)
        once = is_edge & (s > 0)
        tl.store(grad_c + at_e, c_u1 + c_u2, once & features)
        tl.store(grad_c + at_e + D, c_v1 + c_v2, once & features)
        to = grad_edge + (part * n_edges + e) * 4
        tl.store(to, w1 + w2, once)
        tl.store(to + 1, x1 - x2, once)
        tl.store(to + 2, y1 - y2, once)
        tl.store(to + 3, z1 - z2, once)
    tl.store(grad_a + at_i, sum_au, features)
    tl.store(grad_a + at_i + D, sum_av, features)
    tl.store(grad_b + at_i, sum_bu, features)
    tl.store(grad_b + at_i + D, sum_bv, features)


class _MessageSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, c, weight, direction, n_vectors, edges):
        tensors = [tensor.detach().contiguous() for tensor in (a, b, c, weight, direction)]
        width = a.shape[1] // 2
        out = a.new_empty(len(a), width + 3 * n_vectors)
        ctx.arguments = (*tensors, edges.first, edges.other, edges.edge, edges.sign)
        ctx.sizes = {"D": width, "V": n_vectors, "F": FEATURES, "E": EDGES, "num_warps": 1}
        ctx.grid = len(a), triton.cdiv(width, FEATURES)
        _forward[ctx.grid](*ctx.arguments, out, **ctx.sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, c, weight, *_ = ctx.arguments
        grads = tuple(map(torch.empty_like, (a, b, c)))
        of_edge = a.new_empty(ctx.grid[1], len(weight), 4)
        _backward[ctx.grid](*ctx.arguments, grad.contiguous(), *grads, of_edge, len(weight), **ctx.sizes)
        summed = of_edge.sum(0)
        return *grads, summed[:, 0], summed[:, 1:], None, None


def message_sum(
    a: Tensor, b: Tensor, c: Tensor, weight: Tensor, direction: Tensor, n_vectors: int, edges: AtomEdges
) -> Tensor:
    """See :func:`contsp_core.kernels.message_sum`; here the filter ``c`` (n_edges, 2 D) is given for each edge."""
    return _MessageSum.apply(a, b, c, weight, direction, n_vectors, edges)
