"""How long does it take, how much memory, and on which crystals: for the timing study and the performance notebook.

Times are processor seconds, the smallest of several: another program on the machine then disturbs them little.
"""

from __future__ import annotations

import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from contsp_core import Crystals
from contsp_core.mala import ChainState, Energy, mala_init, mala_step
from contsp_core.sampler import uniform_atoms


def cpu_times(functions: Mapping[str, Callable[[], object]], repeats: int = 7) -> dict[str, float]:
    """Smallest processor time of each function, s. They are called in turn, so that a disturbance hits all of them."""
    best = dict.fromkeys(functions, math.inf)
    for repeat in range(repeats + 1):  # the first round compiles and warms up
        for name, function in functions.items():
            start = time.process_time()
            function()
            if repeat:
                best[name] = min(best[name], time.process_time() - start)
    return best


def peak_memory(function: Callable[[], object]) -> float:
    """Largest resident memory during ``function()`` beyond that before, bytes; NaN where the system does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    function()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what is used
        reset.write_text("5")  # sets the recorded peak to the present
        before = _kilobytes(status, "VmRSS")
        function()
        return 1024 * (_kilobytes(status, "VmHWM") - before)
    except (AttributeError, OSError, StopIteration):
        return math.nan


def _kilobytes(status: Path, name: str) -> int:
    return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])


def step_function(energy: Energy, crystals: Crystals, seed: int = 0) -> Callable[[], ChainState]:
    """One MALA step from the given crystals, half way down the paper's schedules, to be called again and again."""
    state, rng = mala_init(energy, crystals), torch.Generator().manual_seed(seed)
    step, temperature = torch.full_like(state.grad_strain[:, 0, :2], 0.016), torch.full_like(state.energy, 0.03)
    return lambda: mala_step(energy, state, step, temperature, rng)


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


def random_packing(counts: Sequence[int], seed: int = 0) -> Crystals:
    """Atoms at random, 20 Å³ each, in nearly cubic cells: one crystal for each number of atoms."""
    rng = torch.Generator().manual_seed(seed)
    species = [torch.randint(1, 90, (n,), generator=rng).tolist() for n in counts]
    edge = (20.0 * torch.tensor([float(n) for n in counts]))[:, None, None] ** (1 / 3)
    return uniform_atoms(edge * (torch.eye(3) + 0.05 * torch.randn(len(counts), 3, 3, generator=rng)), species, rng)
