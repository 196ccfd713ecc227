"""Are other energies invariant and continuous? The audit of our energy, two CGCNN baselines and universal potentials.

``python notebooks/audit_others.py --calculator chgnet.model.dynamics:CHGNetCalculator@6`` writes the table
``figures/01_audit_others.csv`` and a picture of the same name; what follows @ is the radius at which a potential cuts
its graph, Å. Energies are per atom, in units of their standard deviation over ``--n-scale`` crystals.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from cgcnn import CGCNN
from matplotlib.figure import Figure
from parameters import FIGURES, output_file

from contsp_core import Crystals, load_model
from contsp_core.app.calculators import load_calculator
from contsp_core.csp.figures import new_figure, save_figure, styled
from contsp_core.data import choose, load_split
from contsp_core.invariance import PROBES, as_energy, audit

LOOKS = {"#000000": "o", "#E69F00": "s", "#56B4E9": "^", "#D55E00": "D", "#009E73": "v", "#CC79A7": "P"}  # Okabe & Ito
LOW, TOP = 1e-16, 1e4  # where smaller and larger changes are drawn, no change and an infinite one too


def named_energies(calculators: list[str], checkpoint: str) -> dict[str, tuple]:
    """{name: (energy, radius of its graph in Å or None)}."""
    energies = {"continuous (ours)": (load_model(checkpoint), None)}
    energies["CGCNN, 5 Å radius"] = CGCNN("radius", cutoff=5.0, n_features=16), None
    energies["CGCNN, 12 nearest"] = CGCNN("nearest", cutoff=5.0, n_features=16), None
    for entry in calculators:
        name, _, radius = entry.partition("@")
        label = name.rpartition(":")[2].removesuffix("Calculator") + (f", {radius} Å" if radius else "")
        if label in energies or len(energies) == len(LOOKS):
            raise ValueError(f"calculator {entry!r} has the name of another, or is one of more than {len(LOOKS) - 3}")
        energies[label] = load_calculator(name), float(radius) if radius else None
    return energies


def measure(energy, radius: float | None, structures: list, many: Crystals, seed: int) -> pd.DataFrame:
    """The audit of one energy; ``attrs`` also holds ``scale``, the standard deviation of the energy over ``many``."""
    table = audit(energy, structures, seed, cutoff=radius)
    table.attrs["scale"] = float(as_energy(energy)(many).std())
    return table


def side_by_side(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a check; of each energy the change and the floor in units of its scale, and the verdict."""
    columns = dict(next(iter(tables.values()))[["check", "kind"]])
    for name, table in tables.items():
        columns |= {name: table["max_change"] / table.attrs["scale"], f"{name} verdict": table["verdict"]}
        columns |= {f"{name} floor": table["floor"] / table.attrs["scale"]}
    return pd.DataFrame(columns)


@styled
def plot_profiles(tables: dict[str, pd.DataFrame]) -> Figure:
    """A panel for each probe: |ΔE| over shorter and shorter steps, of the crystal with the worst verdict."""
    figure, axes = new_figure(2, 4, size=(2.7, 2.4))
    for ax, probe in zip(axes.flat, PROBES, strict=True):
        ax.loglog([1e-8, 1e-1], [1e-8, 1e-1], color="0.6", ls=":", lw=1, label="a slope of one std per Å")
        for (name, table), (color, marker) in zip(tables.items(), LOOKS.items()):
            row, scale = table.set_index("check").loc[probe], table.attrs["scale"]
            if row["verdict"] == "impossible":
                continue
            steps, change = torch.tensor(table.attrs["profiles"][probe], dtype=torch.float64)
            shown, hidden = (change / scale).clamp(min=LOW, max=TOP), change <= row["floor"]
            ax.loglog(steps, shown, color=color, lw=1.1, marker=marker, ms=4, label=name)
            ax.loglog(steps[hidden], shown[hidden], ls="", color=color, marker=marker, ms=4, mfc="white", zorder=3)
            ax.plot([0, 0.06], [row["floor"] / scale] * 2, color=color, lw=2, transform=ax.get_yaxis_transform())
            ax.set_xlim(min(2e-9, float(steps.min()) / 5, ax.get_xlim()[0]), 1)
        ax.set(title=probe, ylim=(LOW, 2 * TOP))
    for ax in axes[-1]:
        ax.set_xlabel("step δ (Å)")
    for ax in axes[:, 0]:
        ax.set_ylabel("|ΔE| / std of E")
    note = "Flat: a jump. Bars on the left: floor of rounding; hollow: below it. Top edge: larger still, or infinite."
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, title=note, title_fontsize="medium")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calculator", nargs="*", default=[], help="module:Class@radius of ASE calculators")
    parser.add_argument("--dataset", default="mp20", help="of the crystals (test split) and of the bundled checkpoint")
    parser.add_argument("--n-structures", type=int, default=3)
    parser.add_argument("--max-atoms", type=int, default=8, help="in a crystal")
    parser.add_argument("--n-scale", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=output_file(".csv"), default=FIGURES / "01_audit_others.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = [s for s in load_split(options.dataset, "test").structures if len(s) <= options.max_atoms]
    structures = choose(small, options.n_structures, options.seed)
    many = Crystals.from_structures(choose(small, options.n_scale, options.seed), torch.float64)
    energies = named_energies(options.calculator, options.dataset)
    tables = {name: measure(*energy, structures, many, options.seed) for name, energy in energies.items()}
    side_by_side(tables).to_csv(options.output, index=False, float_format="%.1e")
    about = vars(options) | {"crystals": [s.properties["material_id"] for s in structures]}
    about |= {"std of the energy": {name: f"{table.attrs['scale']:.3g}" for name, table in tables.items()}}
    save_figure(plot_profiles(tables), options.output.with_suffix(".png"), about | {"output": options.output.name})


if __name__ == "__main__":
    main()
