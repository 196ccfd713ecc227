"""Benchmarks run with ``make bench`` only; at the end a table compares each with the literal reference."""

from __future__ import annotations

from collections import defaultdict

import pytest

PATHS = ("fused", "plain", "literal")
NOT_TIMED = pytest.mark.skip(reason="a benchmark: run with `make bench`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("benchmark_disable"):
        for item in items:
            if "benchmarks" in item.path.parts:
                item.add_marker(NOT_TIMED)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One row for each operation and size: the implementations side by side, and ratios to the reference."""
    rows: dict[tuple[str, int], dict[str, float]] = defaultdict(dict)
    for bench in config._benchmarksession.benchmarks:
        info = bench.extra_info
        if "operation" in info and not bench.has_error:
            rows[info["operation"], info["n_systems"]][info["path"]] = 1e3 * bench.stats.min
    if not rows:
        return
    terminalreporter.section("processor time (ms), and how many times faster than the literal reference")
    terminalreporter.write_line(
        f"{'operation':22}{'crystals':>9}" + "".join(f"{path:>10}" for path in PATHS) + "   ratio"
    )
    for (operation, n_systems), times in rows.items():
        cells = "".join(f"{times[path]:10.2f}" if path in times else 10 * " " for path in PATHS)
        ratio = f"{times['literal'] / times['fused']:8.1f}" if {"literal", "fused"} <= set(times) else ""
        terminalreporter.write_line(f"{operation:22}{n_systems:9d}{cells}{ratio}")
    for n_systems in sorted({size for _, size in rows}):
        energy, step = rows["energy and gradient", n_systems], rows["full step", n_systems]
        if "literal" in energy and "fused" in step:
            share = energy["literal"] / step["fused"]
            terminalreporter.write_line(f"{n_systems} crystals: a full step = 1/{share:.1f} of the literal E and ∇E")
