"""Watch a training run: a progress bar on stderr, and a loss curve that is redrawn while the run goes on."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from contsp_core.figures import save_figure, training_curves

SHOWN = ("loss", "acceptance_rate", "validation")


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

    def draw(self) -> None:
        """Write the curve of all rows so far."""
        history = pd.DataFrame(self.history)
        save_figure(training_curves(history, smooth=max(1, len(history) // 50)), self.path, self.parameters)
