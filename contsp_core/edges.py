"""The edges of a batch on the CPU: a compiled neighbour search, and edge lengths, on all threads.

The same graph as :func:`contsp_core.graph.build_graph`; lengths are differentiable once.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from contsp_core.crystals import Crystals
from contsp_core.graph import Graph

FAST = {"fastmath": {"reassoc", "contract", "arcp", "nsz"}, "error_model": "numpy", "nogil": True, "cache": True}


@dataclass(frozen=True)
class EdgeList:
    """An undirected graph, cut into ``len(first_edge) − 1`` runs of whole systems that threads may work on alone."""

    graph: Graph
    first_edge: np.ndarray


@njit(nogil=True, cache=True)  # no contraction: counting and storing must take the same decisions
def _search_system(cell, frac, positions, reach, cutoff, first, last, source, target, image, edge, store):
    """Count (and store from index ``edge`` on) the edges of one system; returns the index after the last edge."""
    square = cutoff * cutoff
    for i in range(first, last):
        for j in range(i, last):
            o0 = -np.rint(frac[j, 0] - frac[i, 0])
            o1 = -np.rint(frac[j, 1] - frac[i, 1])
            o2 = -np.rint(frac[j, 2] - frac[i, 2])
            for m0 in range(-reach[0], reach[0] + 1):
                k0 = o0 + m0
                x0 = positions[j, 0] - positions[i, 0] + k0 * cell[0, 0]
                y0 = positions[j, 1] - positions[i, 1] + k0 * cell[0, 1]
                z0 = positions[j, 2] - positions[i, 2] + k0 * cell[0, 2]
                if i == j and k0 < 0:
                    continue
                for m1 in range(-reach[1], reach[1] + 1):
                    k1 = o1 + m1
                    x1 = x0 + k1 * cell[1, 0]
                    y1 = y0 + k1 * cell[1, 1]
                    z1 = z0 + k1 * cell[1, 2]
                    if i == j and k0 == 0 and k1 < 0:
                        continue
                    for m2 in range(-reach[2], reach[2] + 1):
                        k2 = o2 + m2
                        x = x1 + k2 * cell[2, 0]
                        y = y1 + k2 * cell[2, 1]
                        z = z1 + k2 * cell[2, 2]
                        if x * x + y * y + z * z > square or (i == j and k0 == 0 and k1 == 0 and k2 <= 0):
                            continue
                        if store:
                            source[edge] = i
                            target[edge] = j
                            image[edge, 0] = k0
                            image[edge, 1] = k1
                            image[edge, 2] = k2
                        edge += 1
    return edge


@njit(nogil=True, cache=True)
def _search(first, last, cell, frac, positions, reach, cutoff, first_atom, source, target, image, first_edge, store):
    for system in range(first, last):
        edge = _search_system(
            cell[system], frac, positions, reach[system], cutoff[system], first_atom[system], first_atom[system + 1],
            source, target, image, first_edge[system] if store else 0, store,
        )  # fmt: skip
        if not store:
            first_edge[system + 1] = edge


@njit(**FAST)
def _lengths(first, last, cell, positions, system_idx, source, target, image, out):
    for e in range(first, last):
        i, j, s = source[e], target[e], system_idx[source[e]]
        square = positions.dtype.type(0)
        for x in range(3):
            r = positions[j, x] - positions[i, x]
            r += image[e, 0] * cell[s, 0, x] + image[e, 1] * cell[s, 1, x] + image[e, 2] * cell[s, 2, x]
            square += r * r
        out[e] = np.sqrt(square)


@njit(**FAST)
def _lengths_backward(
    first, last, cell, positions, system_idx, source, target, image, length, grad, g_cell, g_positions
):
    for e in range(first, last):
        if length[e] == 0:  # two atoms at one point: |r| has no gradient there, zero is its symmetric choice
            continue
        i, j, s = source[e], target[e], system_idx[source[e]]
        scale = grad[e] / length[e]
        for x in range(3):
            r = positions[j, x] - positions[i, x]
            r += image[e, 0] * cell[s, 0, x] + image[e, 1] * cell[s, 1, x] + image[e, 2] * cell[s, 2, x]
            g = scale * r
            g_positions[j, x] += g
            g_positions[i, x] -= g
            for y in range(3):
                g_cell[s, y, x] += image[e, y] * g


@lru_cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="contsp")


def run_parts(kernel: Callable, bounds: np.ndarray, arguments: Callable[[int], tuple]) -> None:
    """Run ``kernel(bounds[p], bounds[p + 1], *arguments(p))`` for every part p, in torch's number of threads."""
    n_parts = len(bounds) - 1
    if n_parts == 1:
        kernel(bounds[0], bounds[1], *arguments(0))
        return
    jobs = [_pool(n_parts).submit(kernel, bounds[p], bounds[p + 1], *arguments(p)) for p in range(n_parts)]
    for job in jobs:
        job.result()


def build_edges(crystals: Crystals, cutoff: Tensor) -> EdgeList:
    """The graph of :func:`contsp_core.graph.build_graph`, found by a compiled search.

    Args:
        crystals: the batch, on the CPU.
        cutoff: (n_systems,) radius R, Å.
    """
    cell, positions, radius = (tensor.detach() for tensor in (crystals.cell, crystals.positions, cutoff))
    inverse = torch.linalg.inv(cell)
    frac = torch.einsum("ni,nij->nj", positions, inverse[crystals.system_idx]).numpy()
    reach = (radius[:, None] * inverse.norm(dim=1) + 0.5).floor().int().numpy()
    n_systems = crystals.n_systems
    first_atom = np.searchsorted(crystals.system_idx.numpy(), np.arange(n_systems + 1))
    first_edge = np.zeros(n_systems + 1, np.int64)
    geometry = (cell.numpy(), frac, positions.numpy(), reach, radius.numpy(), first_atom)
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


class _EdgeLengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cell, positions, system_idx, edges):
        graph = edges.graph
        arrays = [t.detach().numpy() for t in (cell, positions, system_idx, graph.source, graph.target, graph.image)]
        length = np.empty(len(graph.source), arrays[0].dtype)
        run_parts(_lengths, edges.first_edge, lambda part: (*arrays, length))
        ctx.arrays, ctx.first_edge = (*arrays, length), edges.first_edge
        return torch.from_numpy(length)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grads = (np.zeros_like(ctx.arrays[0]), np.zeros_like(ctx.arrays[1]))
        arrays = (*ctx.arrays, grad.contiguous().numpy(), *grads)
        run_parts(_lengths_backward, ctx.first_edge, lambda part: arrays)
        return torch.from_numpy(grads[0]), torch.from_numpy(grads[1]), None, None


def edge_lengths(crystals: Crystals, edges: EdgeList) -> Tensor:
    """(n_edges,) distances |x_j + k L − x_i|, Å, differentiable once in the cell and the positions."""
    return _EdgeLengths.apply(crystals.cell, crystals.positions, crystals.system_idx, edges)
