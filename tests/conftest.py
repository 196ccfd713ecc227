"""Settings shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn, never shown

# No deadline: a shared machine stalls now and then. Derandomised: a failure in CI is found again at once elsewhere.
settings.register_profile("contsp", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("contsp")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data sets, or a skip with the reason."""
    folder = os.environ.get("CONTSP_DATA_DIR")
    if not folder:
        pytest.skip("CONTSP_DATA_DIR is not set: the real data sets are not at hand")
    return Path(folder)
