"""Benchmarks run with ``make bench`` only; at the end a table sets the implementations side by side."""

from __future__ import annotations

from collections import defaultdict

import pytest

NOT_TIMED = pytest.mark.skip(reason="a benchmark: run with `make bench`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_disable"):
        for item in items:
            if "benchmarks" in item.path.parts:
                item.add_marker(NOT_TIMED)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One row for each operation and size: times, and how many times faster the first is than the last."""
    rows: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for bench in config._benchmarksession.benchmarks:
        info = bench.extra_info
        if "operation" in info and not bench.has_error:
            rows[info["operation"], info["n_systems"]][info["path"]] = 1e3 * bench.stats.min
    if rows:
        terminalreporter.section("processor time (ms) of one thread, and the ratio of the last to the first")
    for (operation, n_systems), times in rows.items():
        cells = "".join(f"{path:>10}{time:9.2f}" for path, time in times.items())
        first, *_, last = times.values()
        terminalreporter.write_line(f"{operation:22}{n_systems:5d} crystals{cells}   ratio {last / first:8.2g}")
