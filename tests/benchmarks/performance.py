"""What a sampling step must cost, what the machine could do, and what is measured.

Times are processor seconds (``time.process_time``), the smallest of several: another program on the machine then
disturbs them little. They are those of one thread if torch is set to one. Memory is resident memory, in bytes.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from contsp_core.crystals import Crystals
from contsp_core.energy import ContinuousCGCNN, EnergyConfig, energy_and_gradient
from contsp_core.graph import build_graph, cutoff_radius
from contsp_core.lattice import niggli
from contsp_core.mala import ChainState, mala_init, mala_step, uniform_atoms

SIGMOID = 21  # operations of the single-precision sigmoid in kernels.py, a fused multiply-add counted as two
HERMITE = 40  # scalar operations per edge: interpolation weights and their derivatives
LENGTHS = 36 + 63  # edge vector and its length, forward and backward
CANDIDATE = 9  # one image in the neighbour search: three multiply-adds, a squared norm, a comparison


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes of memory traffic."""

    operations: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return Cost(self.operations + other.operations, self.bytes + other.bytes)

    def __rmul__(self, times: int) -> Cost:
        """The same, so many times."""
        return Cost(times * self.operations, times * self.bytes)


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at best: float32 operations per second, and bytes per second of memory traffic."""

    operations_per_s: float
    bytes_per_s: float

    def floor(self, cost: Cost) -> float:
        """Shortest possible time of a cost, s."""
        return max(cost.operations / self.operations_per_s, cost.bytes / self.bytes_per_s)


def count_step(config: EnergyConfig, n_systems: int, n_atoms: int, n_edges: int, n_candidates: int) -> dict[str, Cost]:
    """Operations and bytes of the parts of one step (one energy and gradient, one reduction) in float32.

    Bytes are those no cache can save: each array of edges is read or written once a pass, each array of nodes once. The
    reduction of the cells and the proposal are a few 3 × 3 products per crystal, and are left out.

    Args:
        config: of the energy.
        n_systems, n_atoms, n_edges: of the batch; undirected edges.
        n_candidates: images of atom pairs that the neighbour search has to test.
    """
    D, L, K = config.width, config.n_conv, config.n_basis
    per_filter = 7 * 2 * D  # cubic interpolation: four products, three sums
    forward = 2 * D * (SIGMOID + 7) + per_filter + HERMITE // 2
    backward = 2 * D * (SIGMOID + 21) + 2 * per_filter + 2 * 2 * D + HERMITE
    index_bytes, node_bytes = 16 + 8, 4 * n_atoms
    linear = 2 * n_atoms * D * 4 * D  # the two projections of a layer
    return {
        "neighbour search": Cost(CANDIDATE * n_candidates, 28 * n_edges),
        "edge lengths and weights": Cost((LENGTHS + 2 * SIGMOID) * n_edges, (2 * (28 + 4) + 6 * 4) * n_edges),
        "messages, forward": L * Cost(forward * n_edges, index_bytes * n_edges + 5 * D * node_bytes),
        "messages, backward": L * Cost(backward * n_edges, (index_bytes + 8) * n_edges + 9 * D * node_bytes),
        "nodes": Cost(L * (2 * linear + 2 * SIGMOID * 3 * n_atoms * D), L * 12 * D * node_bytes)
        + Cost(2 * 2 * config.n_fc * D * D * n_systems + 4 * K * D * L, 4 * 2 * D * D),
    }


def count_candidates(crystals: Crystals, cutoff: Tensor) -> int:
    """Images of atom pairs (i ≤ j) that the neighbour search tests."""
    reach = (cutoff[:, None] * torch.linalg.inv(crystals.cell).norm(dim=1) + 0.5).floor()
    pairs = crystals.n_atoms * (crystals.n_atoms + 1) / 2
    return int((pairs * (2 * reach + 1).prod(dim=1)).sum())


def count_edges(crystals: Crystals, config: EnergyConfig) -> int:
    """Undirected edges of a batch."""
    return len(build_graph(crystals, cutoff_radius(crystals, config.cutoff_multiple)).source)


def cpu_time(function: Callable[[], object], repeats: int = 7, min_seconds: float = 0.0) -> float:
    """Smallest processor time of ``function()``, s, after one call that is not timed.

    Args:
        function: called without arguments.
        repeats: number of timed calls, at least.
        min_seconds: repeat until so much processor time is spent.
    """
    return _best(time.process_time, function, repeats, min_seconds)


def cpu_times(functions: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """:func:`cpu_time` of several functions, called in turn: a disturbance of some seconds then hits all of them."""
    best = {name: cpu_time(function, 1) for name, function in functions.items()}
    for _ in range(repeats - 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
    return best


def wall_time(function: Callable[[], object], repeats: int = 7, min_seconds: float = 0.0) -> float:
    """Smallest elapsed time of ``function()``, s: for several threads, on a machine with nothing else to do."""
    return _best(time.perf_counter, function, repeats, min_seconds)


def _best(clock: Callable[[], float], function: Callable[[], object], repeats: int, min_seconds: float) -> float:
    function()
    times: list[float] = []
    while len(times) < repeats or sum(times) < min_seconds:
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def peak_memory(function: Callable[[], object]) -> float:
    """Largest resident memory during ``function()`` beyond that before, bytes; NaN where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return math.nan
    function()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what is used
        reset.write_text("5")  # sets the recorded peak to the present
    except (AttributeError, OSError):
        return math.nan
    before = _status_bytes(status, "VmRSS")
    function()
    return _status_bytes(status, "VmHWM") - before


def _status_bytes(status: Path, name: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def measure_ceilings(size: int = 1024, n_stream: int = 1 << 24, repeats: int = 7) -> Ceilings:
    """The two ceilings, with torch's number of threads: a float32 matrix product, and a = b + s c on long arrays.

    Args:
        size: of the square matrices.
        n_stream: entries of each array, many times what the caches hold.
        repeats: the best of so many runs counts.
    """
    a, b = torch.ones(size, size), torch.ones(size, size)
    product = torch.empty(size, size)
    timer = cpu_time if torch.get_num_threads() == 1 else wall_time
    operations = 2 * size**3 / timer(lambda: torch.mm(a, b, out=product), repeats)
    x, y, z = (torch.ones(n_stream) for _ in range(3))
    bandwidth = 3 * 4 * n_stream / timer(lambda: torch.add(x, y, alpha=3.0, out=z), repeats)
    return Ceilings(operations, bandwidth)


def profile_step(model: ContinuousCGCNN, crystals: Crystals, repeats: int = 15) -> dict[str, float]:
    """Processor time of the parts of a MALA step, s, each timed alone; what is left over is named as such.

    Args:
        model: without noise levels, with fused kernels.
        crystals: the batch, float32, on the CPU.
        repeats: timed calls of each part.
    """
    from contsp_core.kernels import build_edges, edge_lengths, message_sum

    cutoff = cutoff_radius(crystals, model.config.cutoff_multiple)
    edges = build_edges(crystals, cutoff)
    moving = crystals.replace(cell=crystals.cell.clone().requires_grad_())
    length = edge_lengths(moving, edges)
    width, n_conv = model.config.width, model.config.n_conv
    a, b = (torch.randn(len(crystals.positions), 2 * width).requires_grad_() for _ in range(2))
    table = torch.randn(int(8 * cutoff.max()) + 3, 4 * width)
    distance, weight = (x.detach().clone().requires_grad_() for x in (length, torch.ones_like(length)))

    def messages() -> Tensor:
        return message_sum(a, b, table, distance, weight, 8.0, edges)

    summed = messages()
    ones = torch.ones_like(summed)
    inputs = (a, b, distance, weight)
    parts = {
        "neighbour search": lambda: build_edges(crystals, cutoff),
        "edge lengths, forward": lambda: edge_lengths(crystals, edges),
        "edge lengths, backward": lambda: torch.autograd.grad(length.sum(), moving.cell, retain_graph=True),
        "messages, forward": messages,
        "messages, backward": lambda: torch.autograd.grad(summed, inputs, ones, retain_graph=True),
    }
    times = {name: cpu_time(part, repeats) * (n_conv if "messages" in name else 1) for name, part in parts.items()}
    gradient = cpu_time(lambda: energy_and_gradient(model, crystals), repeats)
    times["nodes, edge weights and autograd (rest of energy and gradient)"] = gradient - sum(times.values())
    times["Niggli reduction and wrapping"] = cpu_time(lambda: niggli(crystals), repeats)
    step = time_step(model, crystals, repeats)
    times["proposal and acceptance (rest of the step)"] = step - gradient - times["Niggli reduction and wrapping"]
    return times | {"energy and gradient": gradient, "full step": step}


def time_step(model: Callable[[Crystals], Tensor], crystals: Crystals, repeats: int = 15) -> float:
    """Processor time of one full MALA step with the paper's proposal, s."""
    return cpu_time(step_function(model, crystals), repeats)


def step_function(model: Callable[[Crystals], Tensor], crystals: Crystals, seed: int = 0) -> Callable[[], ChainState]:
    """One MALA step from the given crystals, half way down the paper's schedules, to be called again and again."""
    state, rng = mala_init(model, crystals), torch.Generator().manual_seed(seed)
    return lambda: _step(model, state, rng)


def _step(model: Callable[[Crystals], Tensor], state: ChainState, rng: torch.Generator) -> ChainState:
    step, temperature = torch.full_like(state.grad_strain[:, 0, :2], 0.016), torch.full_like(state.energy, 0.03)
    return mala_step(model, state, step, temperature, rng)


def acceptance(energy: Callable[[Crystals], Tensor], crystals: Crystals, n_steps: int, seed: int = 0) -> float:
    """Share of accepted proposals of short chains, half way down the paper's schedules."""
    state, rng, accepted = mala_init(energy, crystals), torch.Generator().manual_seed(seed), []
    for _ in range(n_steps):
        state = _step(energy, state, rng)
        accepted.append(state.accepted.float().mean())
    return float(torch.stack(accepted).mean())


def measure_batch(model: ContinuousCGCNN, crystals: Crystals, x: float) -> dict[str, float]:
    """One point of a scaling curve: ``x``, numbers of atoms and edges, times of step and search (s), peak bytes."""
    from contsp_core.kernels import build_edges

    cutoff = cutoff_radius(crystals, model.config.cutoff_multiple)
    n_atoms = len(crystals.positions)
    repeats = 3 if n_atoms > 2000 else 10
    return {
        "x": x,
        "n_atoms": n_atoms,
        "n_edges": count_edges(crystals, model.config),
        "step_s": time_step(model, crystals, repeats),
        "search_s": cpu_time(lambda: build_edges(crystals, cutoff), repeats),
        "peak_bytes": peak_memory(step_function(model, crystals)),
    }


def perovskite_like(n_systems: int, seed: int = 0, rattle: float = 0.1) -> Crystals:
    """ABX₃ in nearly cubic cells of 3.8 to 4.2 Å, atoms displaced by Gaussians of ``rattle`` Å, random elements."""
    rng = torch.Generator().manual_seed(seed)
    frac = torch.tensor([[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    edge = 3.8 + 0.4 * torch.rand(n_systems, 1, 1, generator=rng)
    cell = edge * torch.eye(3) + 0.05 * torch.randn(n_systems, 3, 3, generator=rng)
    positions = frac @ cell + rattle * torch.randn(n_systems, 5, 3, generator=rng)
    numbers = torch.randint(1, 90, (n_systems, 3), generator=rng)[:, [0, 1, 2, 2, 2]]
    system_idx = torch.repeat_interleave(torch.arange(n_systems), 5)
    return Crystals(cell, positions.flatten(0, 1), numbers.flatten(), system_idx)


def random_packing(counts: Sequence[int], seed: int = 0, skew: int = 0) -> Crystals:
    """Atoms at random, 20 Å³ each, in nearly cubic cells: one crystal for each number of atoms.

    Args:
        counts: atoms of each crystal.
        seed: of positions, cells and elements.
        skew: the lattice is described with its second vector plus ``skew`` times the first.
    """
    rng = torch.Generator().manual_seed(seed)
    species = [torch.randint(1, 90, (n,), generator=rng).tolist() for n in counts]
    edge = (20.0 * torch.tensor([float(n) for n in counts]))[:, None, None] ** (1 / 3)
    cell = edge * (torch.eye(3) + 0.05 * torch.randn(len(counts), 3, 3, generator=rng))
    crystals = uniform_atoms(cell, species, rng)
    shear = torch.eye(3)
    shear[1, 0] = skew
    return crystals.replace(cell=shear @ crystals.cell)


def fitted_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ∝ xᵖ, by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
