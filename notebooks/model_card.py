"""What made a checkpoint: its header as a table.

``python notebooks/model_card.py perov5 > data/checkpoints/perov5.md``
"""

from __future__ import annotations

import sys
from pathlib import Path

from contsp_core.checkpoints import read_settings
from contsp_core.data import find_checkpoint


def model_card(name_or_path: str | Path) -> str:
    """The settings of a checkpoint, a bundled one by name or a file, as a Markdown table."""
    rows, todo = [], list(read_settings(name_or_path).items())
    while todo:
        name, value = todo.pop(0)
        if isinstance(value, dict):
            todo[:0] = [(f"{name}.{key}", item) for key, item in value.items()]
        else:
            rows.append(f"| {name} | {value} |")
    title = f"# {find_checkpoint(name_or_path).name}"
    return "\n".join([title, "", "| setting | value |", "| --- | --- |", *sorted(rows)])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(model_card(argument))
