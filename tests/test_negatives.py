"""What chains find for the training crystals is kept in their order, whatever order they were made in."""

from __future__ import annotations

import sys
from pathlib import Path

import negatives
import pytest
import torch

from contsp_core.data import Split, load_split


def test_a_chain_for_each_training_crystal_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, crystals = tmp_path / "found.npz", load_split("prototypes", "train").crystals
    options = ["--checkpoint", "prototypes", "--dataset", "prototypes", "--n-steps", "1", "--n-jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["negatives.py", *options, "--output", str(output)])
    negatives.main()
    found = Split.load(output, "prototypes", "train").crystals
    assert torch.equal(found.atomic_numbers, crystals.atomic_numbers)  # atom by atom
    assert torch.equal(found.system_idx, crystals.system_idx)
    assert found.cell.isfinite().all() and (found.volume > 1e-3 * crystals.volume).all()
    assert not torch.allclose(found.positions, crystals.positions, atol=0.5)
