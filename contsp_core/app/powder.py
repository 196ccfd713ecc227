"""Does a crystal fit a measured powder? Patterns for Cu Kα, computed, read from files, and compared."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
from pymatgen.core import Structure

from contsp_core.csp.candidates import standardise
from contsp_core.data import retold

PEAK_WIDTH = 0.2  # standard deviation of a peak of a simulated powder pattern, degrees
STRETCHES = np.linspace(0.94, 1.06, 49)  # of the lattice, tried when a pattern is compared
TWO_THETA = (5.0, 90.0)  # degrees, Cu Kα


def powder_pattern(structure: Structure) -> pd.DataFrame:
    """Peaks of a powder for Cu Kα: columns ``two_theta`` (degrees), ``intensity`` (the highest has 100), ``hkl``.

    Planes read ``1 0 11; 3 1 2``. Empty where an element has no tabulated scattering power.
    """
    from pymatgen.analysis.diffraction.xrd import XRDCalculator  # brings a plotting library, which writes to disk

    rows: list[tuple] = []
    with suppress(ValueError):
        pattern = XRDCalculator().get_pattern(structure, two_theta_range=TWO_THETA)
        planes = ["; ".join(" ".join(map(str, plane["hkl"])) for plane in peak) for peak in pattern.hkls]
        rows = list(zip(pattern.x, pattern.y, planes))
    return pd.DataFrame(rows, columns=["two_theta", "intensity", "hkl"])


def agreement(structure: Structure, measured: np.ndarray) -> float:
    """Cosine similarity of a measured powder pattern (n, 2: 2θ in degrees, counts) and the simulated one, 0 … 1.

    The lattice may be stretched by up to 6 %, as predicted lattices are off by some per cent, and the lowest count is
    taken for the background.
    """
    peaks, (angles, counts) = powder_pattern(standardise(structure)), measured.T
    sines, heights = np.sin(np.radians(peaks["two_theta"].to_numpy() / 2)), peaks["intensity"].to_numpy()
    counts, best = (counts - counts.min()) / np.linalg.norm(counts - counts.min()), 0.0
    for stretch in STRETCHES:
        centers = 2 * np.degrees(np.arcsin(np.minimum(sines / stretch, 1.0)))
        simulated = np.exp(-(((angles[:, None] - centers) / PEAK_WIDTH) ** 2) / 2) @ heights
        best = max(best, float(simulated @ counts) / max(float(np.linalg.norm(simulated)), 1e-12))
    return best


def read_pattern(path: str | Path) -> np.ndarray:
    """(n, 2) angles and counts from 5° to 90°, of a text file in columns; a ValueError tells of another content."""
    with retold(f"xrd file {str(path)!r} cannot be read", OSError, ValueError):
        lines = Path(path).read_text(encoding="utf-8-sig", errors="replace").splitlines()
        lines = [line for line in lines if re.match(r"\s*[-+]?\.?\d[-+\d.,eE]*[\s;,]", line)]  # not a header
        if not any("." in line for line in lines) and any(re.match(r"\s*\d+,\d+[;\s]", line) for line in lines):
            lines = [line.replace(",", ".") for line in lines]  # 10,02 107
        if any(re.match(r"\s*[-+\d.eE]+[;\s]+\d+,\d{3}\b", line) for line in lines):
            raise ValueError("counts with commas for thousands, expected none")
        rows = [re.split(r"\s*[;,]\s*|\s+", line.strip()) for line in lines]
        measured = np.array([row[:2] for row in rows], dtype=float).reshape(-1, 2)
        if {-1, 1} <= {*np.sign(np.diff(measured[:, 0]))}:
            raise ValueError("a first column that rises and falls, expected angles")
        if rows and all(len(row) > 2 and row[0].isdigit() for row in rows) and (np.diff(measured[:, 0]) == 1).all():
            raise ValueError("a first column that counts the rows, expected angles")
        measured = measured[(measured[:, 0] >= TWO_THETA[0]) & (measured[:, 0] <= TWO_THETA[1])]
        if len(measured) < 10 or not np.isfinite(measured).all() or not np.ptp(measured[:, 1]):
            raise ValueError("expected ten or more rows of an angle from 5° to 90° and a count, which varies")
    return measured
