"""What made a checkpoint: its header as a table.

``python notebooks/model_card.py perov5 > data/checkpoints/perov5.md``
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from contsp_core.checkpoints import read_settings
from contsp_core.data import find_checkpoint


def model_card(name_or_path: str | Path) -> str:
    """The settings of a checkpoint, a bundled one by name or a file, as a Markdown table."""
    (settings,) = pd.json_normalize(read_settings(name_or_path)).to_dict("records")
    rows = [f"| {name} | {value} |" for name, value in settings.items()]
    title = f"# {find_checkpoint(name_or_path).name}"
    return "\n".join([title, "", "| setting | value |", "| --- | --- |", *sorted(rows)])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(model_card(argument))
