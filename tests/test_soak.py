"""Do samplers and readers endure? A million steps of each sampler, and an hour of hostile bytes for the readers.

Skipped unless asked for: ``make soak``, or ``pytest -s -m soak``, which prints the numbers. ``SOAK_STEPS`` (crystal-
steps of each sampler, default 10⁶) and ``SOAK_SECONDS`` (of fuzzing in all, default 3600) make it shorter.
"""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import fuzz
import psutil
import pytest
import torch
from torch import Tensor

from contsp_core import Crystals, load_model
from contsp_core.crystals import keyed_rng
from contsp_core.data import load_split
from contsp_core.diffusion import reverse_diffusion
from contsp_core.energy import PRESETS
from contsp_core.mala import AnnealConfig, ChainState, anneal
from contsp_core.sampler import random_crystals, start_crystals
from contsp_core.training import initial_model

N_STEPS = int(os.environ.get("SOAK_STEPS", "1_000_000"))
N_SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
N_CHAINS = 250  # at once, of about ten atoms each
N_ROUNDS = 8  # each with new crystals; memory grows in the first two, and may not in the others
N_STEPS_OF_ROUND = -(-N_STEPS // (N_ROUNDS * N_CHAINS))
MAX_GROWTH_MB = 64  # 67 bytes a crystal-step
MAX_STEP_S = 10.0  # CPU time, which does not depend on what else the machine does


@pytest.fixture(autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    """A user's own ``-m "not slow"`` replaces any -m of ours, and does not mean these tests."""
    if request.node.get_closest_marker("soak") and "soak" not in request.config.option.markexpr:
        pytest.skip("takes more than an hour: make soak, or -m soak")


@pytest.fixture(autouse=True)
def environment_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer points the data folder to its own files; other tests must not find them."""
    for name in ("CONTSP_DATA_DIR", "CONTSP_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # recorded, and put back after the test


@dataclass
class Watch:
    """What a sampler does, checked after every step of a batch."""

    n_steps: int = 0
    n_nonfinite: int = 0  # proposals
    slowest_s: float = 0.0
    rss: list[int] = field(default_factory=list)  # bytes, after each step
    started: float = field(default_factory=time.monotonic)
    begun_s: float = field(default_factory=time.process_time)
    cpu_s: float = field(default_factory=time.process_time)  # after the last step

    def check(self, crystals: Crystals, species: list[list[int]], *others: Tensor) -> None:
        """Count a step, and refuse crystals that are broken or have other atoms."""
        now = time.process_time()
        self.slowest_s, self.cpu_s = max(self.slowest_s, now - self.cpu_s), now
        self.n_steps += 1
        self.rss.append(psutil.Process().memory_info().rss)
        for tensor in (crystals.cell, crystals.positions, crystals.volume, *others):
            assert tensor.isfinite().all(), f"step {self.n_steps}"
        assert (crystals.volume > 0).all(), f"step {self.n_steps}"
        assert crystals.species == species, f"step {self.n_steps}"
        if self.n_steps % N_STEPS_OF_ROUND == 0:
            print(f"\n  round {self.n_steps // N_STEPS_OF_ROUND} of {N_ROUNDS}", end="", flush=True)
        self.cpu_s = time.process_time()

    def report(self, name: str) -> None:
        """Print the numbers, and hold them against the limits."""
        n_steps, warm_up = self.n_steps * N_CHAINS, max(1, self.n_steps // 4)
        seconds, cpu_s = time.monotonic() - self.started, time.process_time() - self.begun_s
        growth = (max(self.rss[warm_up:]) - max(self.rss[:warm_up])) / 2**20
        print(f"\n{name}: {n_steps} crystal-steps in {seconds:.0f} s, {n_steps / cpu_s:.0f} per second of CPU time")
        print(f"  slowest step of {N_CHAINS} crystals {self.slowest_s:.2f} s, {self.n_nonfinite} non-finite proposals")
        print(f"  resident memory {self.rss[-1] / 2**20:.0f} MiB; peak after the warm-up {growth:+.1f} MiB", flush=True)
        assert n_steps >= N_STEPS
        assert self.slowest_s < MAX_STEP_S
        assert growth < MAX_GROWTH_MB


def rounds() -> Iterator[tuple[int, list[list[int]], torch.Generator]]:
    """Number, species (1 … 20 atoms, elements 1 … 100) and generator of each round."""
    for number in range(N_ROUNDS):
        rng = keyed_rng("soak", number)
        counts = torch.randint(1, 21, (N_CHAINS,), generator=rng).tolist()
        yield number, [torch.randint(1, 101, (count,), generator=rng).tolist() for count in counts], rng


@pytest.mark.soak
def test_chains_endure() -> None:
    """The paper's energy, start and schedules, with both proposals in turn."""
    model = initial_model(load_split("prototypes", "train").crystals, PRESETS["perov5"], seed=0)
    model.eval().requires_grad_(False)
    anneal(model, random_crystals([[1]], keyed_rng(0)).to(torch.float32), AnnealConfig(n_steps=1), keyed_rng(0))
    watch = Watch()
    for number, species, rng in rounds():

        def on_step(_: int, state: ChainState, species: list[list[int]] = species) -> None:
            watch.check(state.crystals, species, state.energy, state.grad_strain, state.grad_positions)

        config = AnnealConfig(n_steps=N_STEPS_OF_ROUND, proposal=("cartesian", "strain")[number % 2])
        state = anneal(model, random_crystals(species, rng).to(torch.float32), config, rng, on_step)
        watch.n_nonfinite += int(state.n_nonfinite.sum())
    watch.report("Langevin chains")


@pytest.mark.soak
def test_the_way_down_the_noise_levels_endures() -> None:
    """From the largest noise level to clean crystals, compositions unlike any training crystal."""
    model = load_model("prototypes")
    watch = Watch()
    for _, species, rng in rounds():
        start = start_crystals(model, species, rng).to(torch.float32)

        def on_step(index: int, crystals: Crystals, species: list[list[int]] = species) -> None:
            watch.check(crystals, species, *([model(crystals)] if index % 10 == 9 else []))

        crystals = reverse_diffusion(model, start, replace(model.sampling, n_steps=N_STEPS_OF_ROUND), rng, on_step)
        assert model(crystals).isfinite().all()
    watch.report("Noise levels")


@pytest.mark.soak
@pytest.mark.parametrize("name", fuzz.READERS)
def test_reader_survives_hostile_bytes(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    seconds = round(N_SECONDS / len(fuzz.READERS))
    command = [sys.executable, fuzz.__file__, name, str(seconds), str(tmp_path)]
    with (tmp_path / "log").open("w+") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
        log.seek(0)
        lines = log.read().splitlines()
    print(f"\n{name}: {seconds} s", *(line for line in lines if re.match(r"#\d+\s+DONE", line)), flush=True)
    findings = sorted((tmp_path / "findings").iterdir())  # a text tells what is wrong with the input of the same name
    assert findings == [], "\n".join(path.read_text() for path in findings if path.suffix == ".txt")
    assert done.returncode == 0, "\n".join(lines[-30:])


@pytest.mark.parametrize("name", fuzz.READERS)
def test_reader_accepts_each_seed_of_the_fuzzer_and_answers_to_half_of_it(name: str, tmp_path: Path) -> None:
    for content in fuzz.seeds(name, tmp_path):
        assert fuzz.READERS[name](content, tmp_path) is None
        assert fuzz.problem(name, content[: len(content) // 2], tmp_path) is None


def unsound(content: bytes, folder: Path) -> str:
    """A reader that does what the bytes say."""
    if content == b"lines":
        raise ValueError("first\x85second")
    if content == b"silent":
        raise ValueError
    if content == b"memory":
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        bytearray(b"x") * (peak - psutil.Process().memory_info().rss + 2**26)
    if content == b"time":
        end = time.process_time() + 0.1
        while time.process_time() < end:
            pass
    return content.decode()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"a reason", None),
        (b"\xff", "UnicodeDecodeError"),
        (b"one\ntwo", "several lines"),
        (b"lines", "several lines"),
        (b"silent", "without a message"),
        (b"MemoryError: 8 GiB", "out of memory"),
        (b"memory", "MiB"),
        (b"time", "takes 0 s"),
    ],
)
def test_the_fuzzer_tells_a_sound_answer_from_others(
    content: bytes, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fuzz.READERS, "unsound", unsound)
    monkeypatch.setattr(fuzz, "MAX_MEMORY_MB", 32)
    monkeypatch.setattr(fuzz, "MAX_CPU_S", 0.05 if content == b"time" else 10)
    problem = fuzz.problem("unsound", content, tmp_path)
    assert problem is None if found is None else found in problem


def test_the_watch_refuses_broken_crystals_other_atoms_slow_steps_and_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    crystals, species = random_crystals([[1, 2], [3]], keyed_rng(0)), [[1, 2], [3]]
    watch = Watch()
    watch.check(crystals, species, crystals.volume)
    for broken, others in (
        (crystals.replace(cell=crystals.cell * torch.nan), []),
        (crystals.replace(cell=crystals.cell * 0), []),
        (crystals.replace(positions=crystals.positions / 0), []),
        (replace(crystals, atomic_numbers=crystals.atomic_numbers.flip(0)), []),
        (crystals, [torch.tensor(torch.inf)]),
    ):
        with pytest.raises(AssertionError, match="step"):
            watch.check(broken, species, *others)
    monkeypatch.setattr(sys.modules[__name__], "N_STEPS", 1000)
    steady = [10**9] * 4
    Watch(4, rss=steady).report("sound")
    for n_steps, slowest_s, rss in (3, 0.0, steady), (4, 10.1, steady), (4, 0.0, [*steady[:3], 10**9 + 2**26]):
        with pytest.raises(AssertionError):
            Watch(n_steps, slowest_s=slowest_s, rss=rss).report("unsound")
