"""Start and watch a training run: its limits, a progress bar on stderr, and a loss curve redrawn while it goes on."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from tqdm import tqdm

from contsp_core.figures import save_figure, training_curves
from contsp_core.training import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("loss", "acceptance_rate", "validation")


def limit_run(config: TrainConfig, n_updates: int | None, minutes: float | None, seed: int) -> TrainConfig:
    """A preset with another length: so many updates, so many minutes, or whichever comes first if both are given.

    The warm-up is cut to a tenth of the updates, so that a short run reaches its learning rate.
    """
    time_limit_s = None if minutes is None else 60.0 * minutes
    if n_updates is None:
        n_updates = config.n_updates if minutes is None else sys.maxsize
    warmup = min(config.warmup, n_updates // 10)
    return replace(config, n_updates=n_updates, time_limit_s=time_limit_s, warmup=warmup, seed=seed)


def positive_or_none(value: Any) -> str | None:
    """Rule of a notebook parameter: a number above 0, or None."""
    right = value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value > 0)
    return None if right else "a number > 0, or None"


def checkpoint_to_write(value: Any) -> str | None:
    """Rule of a notebook parameter: the file that a training run writes, or None."""
    right = value is None or (isinstance(value, str | Path) and Path(value).suffix == ".safetensors")
    return None if right else "a file name that ends in .safetensors, or None"


class LiveCurve:
    """Give it to :func:`contsp_core.training.run` as ``on_row``; use it in a ``with`` statement.

    Args:
        path: the picture, ``….png``.
        parameters: what made it, written beside it.
        n_updates: length of the progress bar; None if the run ends by time.
        every: updates between two drawings of the curve.
        at_least_s: shortest time between two drawings, s, so that drawing never costs much.
    """

    def __init__(
        self,
        path: str | Path,
        parameters: dict[str, Any],
        n_updates: int | None = None,
        every: int = 20,
        at_least_s: float = 10.0,
    ) -> None:
        self.path, self.parameters, self.every, self.at_least_s = Path(path), parameters, every, at_least_s
        self.history: list[dict[str, float]] = []
        self._drawn = time.monotonic()
        self._bar = tqdm(total=n_updates, unit="update", file=sys.stderr, mininterval=2)

    def __call__(self, row: dict[str, float]) -> None:
        """Record one row of the log."""
        self.history.append(row)
        self._bar.set_postfix({name: f"{row[name]:.3g}" for name in SHOWN if name in row}, refresh=False)
        self._bar.update()
        waited = time.monotonic() - self._drawn
        if len(self.history) % self.every == 0 and waited >= self.at_least_s:
            self.draw()
            self._drawn = time.monotonic()

    def __enter__(self) -> LiveCurve:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self.history:
            self.draw()

    def figure(self) -> Figure:
        """The curve of all rows so far, smoothed over a twentieth of them, without what is always 0."""
        history = pd.DataFrame(self.history)
        unused = [name for name in ("buffer_age", "buffer_share") if name in history and not history[name].any()]
        return training_curves(history.drop(columns=unused), smooth=max(1, len(history) // 20))

    def draw(self) -> None:
        """Write the curve of all rows so far."""
        save_figure(self.figure(), self.path, self.parameters)
