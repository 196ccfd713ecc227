"""A run ends when it was asked to, and its picture and log bar follow it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from contsp_core.progress import LiveCurve, checkpoint_to_write, limit_run, positive_or_none
from contsp_core.training import TrainConfig

CONFIG = TrainConfig(n_updates=500, warmup=100)


@pytest.mark.parametrize(
    ("n_updates", "minutes", "expected"),
    [(None, None, (500, None)), (60, None, (60, None)), (None, 2, (sys.maxsize, 120.0)), (60, 0.5, (60, 30.0))],
)
def test_run_has_the_length_asked_for(n_updates, minutes, expected):
    config = limit_run(CONFIG, n_updates, minutes, seed=7)
    assert (config.n_updates, config.time_limit_s) == expected
    assert config.seed == 7
    assert config.warmup == min(100, config.n_updates // 10)


def test_picture_appears_during_the_run_and_again_at_its_end(tmp_path, capsys):
    path = tmp_path / "new folder" / "curve.png"
    with LiveCurve(path, {"seed": 0}, n_updates=4, every=2, at_least_s=0) as curve:
        curve({"update": 0, "loss": 1.0, "acceptance_rate": 0.5, "buffer_age": 0.0})
        assert not path.exists()
        curve({"update": 1, "loss": 0.5, "acceptance_rate": 0.5, "buffer_age": 0.0})
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()
    assert path.exists()
    assert path.with_suffix(".json").exists()
    titles = [ax.get_title() for ax in curve.figure().axes]
    assert not any("buffer" in title for title in titles)
    output = capsys.readouterr()
    assert output.out == ""
    assert "loss=0.5" in output.err
    assert "acceptance_rate=0.5" in output.err


def test_rules_name_what_is_expected():
    for right in (None, 1, 0.5):
        assert positive_or_none(right) is None
    for wrong in (0, -1.0, True, "1"):
        assert positive_or_none(wrong) == "a number > 0, or None"
    for right in (None, "a.safetensors", Path("b/c.safetensors")):
        assert checkpoint_to_write(right) is None
    for wrong in ("a.pt", 3):
        assert ".safetensors" in checkpoint_to_write(wrong)
