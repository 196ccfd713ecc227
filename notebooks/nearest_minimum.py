"""How far is the nearest minimum of an energy from the crystals of the data? Descent from validation crystals.

``python notebooks/nearest_minimum.py`` writes ``figures/05_nearest_minimum.csv`` and ``.png``; one data set, another
checkpoint: ``--dataset mpts52 --n-structures 60 --checkpoint runs/mpts52.safetensors --output runs/05.csv``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from parameters import FIGURES, output_file
from pymatgen.core import Structure

from contsp_core import Crystals, load_model
from contsp_core.csp.candidates import descend, with_energies
from contsp_core.csp.figures import COLORS, new_figure, save_figure, styled
from contsp_core.data import DATASETS, choose, load_split
from contsp_core.energy import ContinuousCGCNN
from contsp_core.lattice import niggli

DRAWN = {
    "displacement": "rms displacement per atom (Å)",
    "strain": "strain of the cell (no unit)",
    "drop": "energy drop per atom (no unit)",
}


def moved_by(start: Structure, end: Structure) -> tuple[float, float]:
    """What a descent did to a crystal, apart from a translation, a rotation and another choice of cell.

    Args:
        start: before.
        end: after; the same atoms in the same order.

    Returns:
        The rms displacement per atom (Å) at fixed strain, and the root of the sum of the squared principal strains.

    Raises:
        ValueError: where the cells have no lattice vectors in common, so that the two are no one crystal deformed.
    """
    change = np.round(end.lattice.matrix @ np.linalg.inv(start.lattice.matrix))  # end ≈ change @ start
    if round(abs(np.linalg.det(change))) != 1:
        raise ValueError(f"cells differ by {change.tolist()}, expected a change of basis and a small strain")
    deformation = np.linalg.solve(change @ start.lattice.matrix, end.lattice.matrix)
    shift = end.frac_coords - start.frac_coords @ np.linalg.inv(change)
    shift -= shift[0]
    shift -= np.round(shift)
    moves = (shift - shift.mean(axis=0)) @ end.lattice.matrix
    strains = np.log(np.linalg.svd(deformation, compute_uv=False))
    return float(np.sqrt((moves**2).sum(axis=1).mean())), float(np.sqrt((strains**2).sum()))


def nearest_minima(model: ContinuousCGCNN, structures: Sequence[Structure], n_steps: int = 200) -> pd.DataFrame:
    """One row a crystal, of its way down to the nearest minimum of the energy, in two halves of ``n_steps`` gradients.

    Returns:
        Columns ``formula``, ``atoms``; ``displacement`` (Å) and ``strain`` of :func:`moved_by`, missing where the
        lattice became another one; ``energy`` of the data and its ``drop`` (dimensionless, per atom); ``late``, the
        share of the drop in the second half: near 0 where the minimum was reached.
    """
    starts = niggli(Crystals.from_structures(structures, torch.float64)).to_structures()
    path = [with_energies(model, starts)]
    for _ in range(2):
        path.append(with_energies(model, descend(model, path[-1], n_steps // 2, model.config.noise_default)))
    rows = []
    for start, middle, end in zip(*path, strict=True):
        try:
            displacement, strain = moved_by(start, end)
        except ValueError:
            displacement = strain = np.nan
        energy, halfway, lowest = (structure.properties["energy"] for structure in (start, middle, end))
        row = {"formula": start.reduced_formula, "atoms": len(start), "displacement": displacement, "strain": strain}
        late = (halfway - lowest) / max(energy - lowest, 1e-12)
        rows.append(row | {"energy": energy, "drop": energy - lowest, "late": late})
    return pd.DataFrame(rows)


@styled
def draw_minima(table: pd.DataFrame) -> Figure:
    """Cumulative distributions of ``DRAWN``, one line for each ``dataset``; missing values count as far away."""
    figure, axes = new_figure(1, len(DRAWN), size=(2.9, 2.5))
    for ax, (column, label) in zip(axes.flat, DRAWN.items()):
        for color, (name, part) in zip(COLORS, table.groupby("dataset", sort=False)):
            values = np.sort(part[column].clip(lower=1e-4))  # NaN last
            ax.step(values, 100 * np.arange(1, len(values) + 1) / len(values), where="post", color=color, label=name)
        ax.set(xscale="log", xlabel=label, ylabel="crystals (%)", ylim=(0, 103))
    axes[0, 0].legend(title="below 10⁻⁴: at 10⁻⁴", title_fontsize="x-small")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", nargs="+", default=["perov5", "mp20", "mpts52"], choices=DATASETS)
    parser.add_argument("--checkpoint", nargs="+", help="one for each data set, by name or file (default: the bundled)")
    parser.add_argument("--n-structures", type=int, nargs="+", help="one number for each data set (default 200)")
    parser.add_argument("--n-steps", type=int, default=200, help="energy gradients for each crystal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file(".csv"), help="a .csv (default figures/05_nearest_minimum.csv)")
    options = parser.parse_args()
    checkpoints = options.checkpoint or options.dataset
    counts = options.n_structures or [200] * len(options.dataset)
    if not len(options.dataset) == len(checkpoints) == len(counts):
        parser.error("--checkpoint and --n-structures need one value for each data set")
    output = options.output or FIGURES / "05_nearest_minimum.csv"
    torch.set_num_threads(1)
    tables = []
    for name, checkpoint, count in zip(options.dataset, checkpoints, counts):
        structures = choose(load_split(name, "val"), count, options.seed)
        found = nearest_minima(load_model(checkpoint).double(), structures, options.n_steps)
        found.insert(0, "dataset", name)
        tables.append(found)
        print(found[[*DRAWN, "late"]].quantile([0.1, 0.5, 0.9]).T.to_string(float_format="%.4f", header=True))
        print(f"{name}: {len(found)} crystals, {found['strain'].isna().sum()} with another lattice")
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(output, index=False, float_format="%.4g")
    parameters = {"dataset": dict(zip(options.dataset, counts)), "n_steps": options.n_steps, "seed": options.seed}
    save_figure(draw_minima(table), output.with_suffix(".png"), parameters)


if __name__ == "__main__":
    main()
