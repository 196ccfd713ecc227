"""Wrong structures for the training crystals are kept in their order, whatever order they were made in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import negatives
import pytest
import torch

from contsp_core import Crystals
from contsp_core.csp.candidates import TemplateLibrary
from contsp_core.data import Split, load_split

COMMON = ["--checkpoint", "prototypes", "--dataset", "prototypes"]


def made(path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[Crystals, Crystals]:
    """What the command writes, and the training crystals."""
    monkeypatch.setattr(sys, "argv", ["negatives.py", *COMMON, "--n-jobs", "1", "--output", str(path), *options])
    negatives.main()
    return Split.load(path, "prototypes", "train").crystals, load_split("prototypes", "train").crystals


def test_a_chain_for_each_training_crystal_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, crystals = made(tmp_path / "found.npz", monkeypatch, "--n-steps", "1")
    assert torch.equal(found.atomic_numbers, crystals.atomic_numbers)  # atom by atom
    assert torch.equal(found.system_idx, crystals.system_idx)
    assert found.cell.isfinite().all() and (found.volume > 1e-3 * crystals.volume).all()
    assert not torch.allclose(found.positions, crystals.positions, atol=0.5)


def test_several_processes_make_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script itself is run: what it caches must be found in other processes too."""
    one, _ = made(tmp_path / "one.npz", monkeypatch, "--source", "templates")
    options = [*COMMON, "--source", "templates", "--n-jobs", "2", "--output", str(tmp_path / "two.npz")]
    subprocess.run([sys.executable, negatives.__file__, *options], check=True, capture_output=True)
    two = Split.load(tmp_path / "two.npz", "prototypes", "train").crystals
    assert torch.allclose(one.positions, two.positions, atol=1e-9) and torch.allclose(one.cell, two.cell, atol=1e-9)


def test_a_template_of_another_composition_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some crystal of other elements, scaled; a crystal's own composition, of volume ratio 1, never serves it."""
    found, crystals = made(tmp_path / "found.npz", monkeypatch, "--source", "templates")
    assert torch.equal(found.element_counts, crystals.element_counts)
    atomic = torch.from_numpy(TemplateLibrary(load_split("prototypes", "train")).atomic_volumes)
    ratio = found.volume / (found.element_counts.double() @ atomic)  # that of the template, which scaling keeps
    known = crystals.volume / (crystals.element_counts.double() @ atomic)
    near = (ratio[:, None] - known).abs() < 1e-6
    same = (crystals.element_counts[:, None] == crystals.element_counts).all(dim=2)
    assert (near & ~same).any(dim=1).float().mean() > 0.97  # chains stand in where there is no template
    slid, _ = made(tmp_path / "slid.npz", monkeypatch, "--source", "templates", "--n-steps", "3")
    assert torch.equal(slid.element_counts, found.element_counts)
    assert not torch.allclose(slid.volume, found.volume, rtol=1e-4)
