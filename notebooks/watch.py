"""Watch a crystal form: one chain as an animated GIF and as a page with a slider, beside each other."""

from __future__ import annotations

import argparse

from movies import record_chain, write_gif, write_slider
from parameters import FIGURES, output_file

from contsp_core import load_model
from contsp_core.csp.candidates import space_group

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="mp20", help="bundled name or a .safetensors file")
    parser.add_argument("--formula", default="Ti2O4", help="content of the cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=2, help="which sample, from 0")
    parser.add_argument("--output", type=output_file(".gif"), default=FIGURES / "06_watch_TiO2.gif")
    given = parser.parse_args()
    frames = record_chain(load_model(given.checkpoint), given.formula, given.number, given.seed)
    print(f"{given.formula}, seed {given.seed}, sample {given.number}: {space_group(frames[-1].structure)}")
    print(write_gif(frames, given.output), write_slider(frames, given.output.with_suffix(".html")), sep="\n")
