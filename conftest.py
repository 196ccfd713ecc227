"""Settings of all tests: those in tests/, the examples in contsp_core, and the notebooks (``pytest --nbval``)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import matplotlib
import pytest
from hypothesis import HealthCheck, settings

matplotlib.use("Agg")  # figures are drawn, never shown

# No deadline: a shared machine stalls now and then. Derandomised: a failure in CI is found again at once elsewhere.
settings.register_profile("contsp", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("contsp")

collect_ignore_glob = ["notebooks/[!0-9]*.ipynb"]  # out.ipynb and the like, left by papermill, are no tests


def pytest_configure(config: pytest.Config) -> None:
    """Notebooks under test are compared after sanitising, and write into a folder of their own."""
    if not getattr(config.option, "nbval", False):
        return
    if not config.option.nbval_sanitize_with:
        config.option.nbval_sanitize_with = str(config.rootpath / "tests" / "nbval_sanitize.cfg")
    folder = tempfile.TemporaryDirectory()
    config.add_cleanup(folder.cleanup)
    os.environ["CONTSP_OUTPUT_DIR"] = folder.name


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real data sets, or a skip with the reason."""
    folder = os.environ.get("CONTSP_DATA_DIR")
    if not folder:
        pytest.skip("CONTSP_DATA_DIR is not set: the real data sets are not at hand")
    return Path(folder)
