"""The paper's Figure 1 with the numbers of one real update: what contrastive divergence does with a training crystal.

``python notebooks/figure1.py --dataset perov5 --output figures/03_figure1.svg`` writes the picture and a PNG beside it.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from parameters import FIGURES, output_file
from pymatgen.core import Composition, Structure

from contsp_core import Crystals, load_model
from contsp_core.crystals import expand_composition, keyed_rng, reduce_species
from contsp_core.csp.figures import COLORS, draw_crystal, new_figure, save_figure, styled
from contsp_core.data import DATASETS, load_split
from contsp_core.mala import anneal, mala_init
from contsp_core.sampler import random_crystals
from contsp_core.training import TrainConfig, initial_model, preset


class Update(NamedTuple):
    """What one update does with a batch of one crystal."""

    crystal: Structure  # U
    composition: dict[int, int]  # Reduce(U), {atomic number: count}
    chain: dict[str, Structure]  # from the start to Ũ
    energies: tuple[float, float]  # E(U), E(Ũ)
    penalty: float  # α

    @property
    def loss(self) -> float:
        """E(U) − E(Ũ) + α (E(U)² + E(Ũ)²)."""
        return self.energies[0] - self.energies[1] + self.penalty * sum(energy**2 for energy in self.energies)


def trace_update(model: torch.nn.Module, crystal: Crystals, config: TrainConfig, rng: torch.Generator) -> Update:
    """The steps of ``contrastive_divergence_step`` on a batch of one, with the same draws, and no gradient in θ."""
    composition = reduce_species(crystal.species[0])
    species = expand_composition(composition, rng, config.expand_p, config.max_atoms)
    energy, cooling, last = copy.deepcopy(model).eval(), config.chain, config.chain.n_steps - 1
    start = random_crystals([species], rng, model.config.reference_density).to(crystal.cell.dtype)
    chain = {"random start": mala_init(energy, start).crystals}

    def record(index: int, state) -> None:
        if index in (last // 3, 2 * last // 3, last):
            ratio = (cooling.temperature_last / cooling.temperature_first) ** (index / max(1, last))
            chain[f"step {index + 1}, $T$ = {cooling.temperature_first * ratio:.2g}"] = state.crystals

    samples = anneal(energy, start, cooling, rng, record).crystals
    with torch.no_grad():
        energies = tuple(model(Crystals.cat([crystal, samples])).tolist())
    snapshots = {name: crystals.to_structures()[0] for name, crystals in chain.items()}
    return Update(crystal.to_structures()[0], composition, snapshots, energies, config.energy_penalty)


def formula(composition: Composition) -> str:
    """With subscripts, electropositive elements first."""
    return Composition(composition.formula).to_latex_string().replace("$_{1}$", "")


@styled
def draw_update(update: Update, caption: str) -> Figure:
    """Boxes, arrows and crystals in the order of the update; each number is one of ``update``."""
    figure, ((page,),) = new_figure(size=(10, 6))
    figure.set_layout_engine("none")
    page.set(position=(0, 0, 1, 1), xlim=(0, 100), ylim=(0, 60))
    page.axis("off")

    def write(x: float, y: float, text: str, size: float = 11, **style) -> None:
        page.text(x, y, text, size=size, **{"ha": "center", "va": "center", "linespacing": 1.6} | style)

    def box(x: float, y: float, width: float, height: float, color: str, text: str = "") -> None:
        shape = "round,pad=0,rounding_size=1.2"
        page.add_patch(FancyBboxPatch((x, y), width, height, shape, fc=color + "12", ec=color, lw=1.4))
        write(x + width / 2, y + height / 2, text, 12.5)

    def arrow(x: float, y: float, dx: float, dy: float, text: str = "") -> None:
        page.annotate("", (x + dx, y + dy), (x, y), arrowprops={"arrowstyle": "-|>", "fc": "k", "lw": 1.5})
        write(x + 1, y + dy / 2, text, ha="left")

    def picture(structure: Structure, x: float, y: float, size: float, legend: bool) -> None:
        ax = figure.add_axes((x / 100, y / 60, size / 100, size / 60))
        draw_crystal(structure, ax, "").axes[-1].get_legend().set_visible(legend)

    blue, red, green, violet = COLORS[:4]
    real, sampled = (f"{x:.3f}" if x >= 0 else f"(−{-x:.3f})" for x in update.energies)
    (*_, sample), unit = update.chain.values(), Composition(update.composition)
    box(2, 33, 21, 25, blue)
    write(12.5, 55.5, f"training crystal $U$: {formula(update.crystal.composition)}")
    picture(update.crystal, 4.5, 37.2, 16, legend=True)
    arrow(12.5, 33, 0, -6, "Reduce")
    box(4, 21, 17, 6, green, formula(unit))
    arrow(12.5, 21, 0, -7, f"Expand, $m$ = {len(sample) // unit.num_atoms:g}")
    box(4, 8, 17, 6, green, formula(sample.composition))
    arrow(21, 11, 7, 0)
    box(28, 1.5, 70, 26, red)
    write(30, 24.5, r"Markov chain (MALA) of $p \propto \exp(-E_\theta / T)$, cooled", 12.5, ha="left")
    write(88.2, 24.5, r"sample $\tilde U$", 12.5)
    for x, (name, structure) in zip((30, 47, 64, 81), update.chain.items()):
        picture(structure, x, 6.2, 14.5, legend=False)
        write(x + 7.2, 4.3, name)
        arrow(x - 3.5, 13, 3.5 if x > 30 else 0, 0)
    arrow(23, 51, 6, 0)
    box(29, 47.5, 18, 7, blue, rf"$E_\theta(U)$ = {real}")
    arrow(47, 51, 6, 0)
    numbers = f"{real} − {sampled} + {update.penalty:g} ({update.energies[0] ** 2:.3f} + {update.energies[1] ** 2:.3f})"
    result = f"= {numbers}\n= {update.loss:.3f}".replace("= -", "= −")
    box(53, 44, 45, 14, violet, r"loss $= E(U) - E(\tilde U) + \alpha\,(E(U)^2 + E(\tilde U)^2)$" + "\n" + result)
    arrow(88.2, 27.5, 0, 4.5)
    box(79, 32, 18.4, 7, red, rf"$E_\theta(\tilde U)$ = {sampled}")
    arrow(88.2, 39, 0, 5)
    arrow(62, 44, 0, -5, r"$\nabla_{\!\theta}$ loss")
    box(53, 32, 18, 7, violet, r"Adam: new $\theta$")
    arrow(62, 32, 0, -4.5, "next update")
    write(28.5, 37.5, caption, 9.5, ha="left", color="0.35")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="perov5", choices=DATASETS)
    parser.add_argument("--formula", default="BaTiO3", help="of the training crystal: the first one that has it")
    parser.add_argument("--checkpoint", help="by name or file (default: random weights of the paper's preset)")
    parser.add_argument("--seed", type=int, default=6, help="of weights and chain; 6 draws two formula units")
    parser.add_argument("--output", type=output_file(".svg"), default=FIGURES / "03_figure1.svg")
    options = parser.parse_args()
    split = load_split(options.dataset, "train")
    formulas = [structure.reduced_formula for structure in split]
    if options.formula not in formulas:
        parser.error(f"--formula is {options.formula!r}, expected that of a training crystal of {options.dataset}")
    crystal = split.crystals[formulas.index(options.formula)].to(torch.float32)
    energy, config = preset(options.dataset, "contrastive_divergence")
    model = load_model(options.checkpoint) if options.checkpoint else initial_model(crystal, energy, options.seed)
    update = trace_update(model.eval(), crystal, config, keyed_rng("figure 1", options.seed))
    weights = f"trained, {Path(options.checkpoint).stem}" if options.checkpoint else "random (update 1)"
    figure = draw_update(update, f"{options.dataset}, as in the paper, but\na batch of one crystal;\nweights {weights}")
    shown = {name: value for name, value in vars(options).items() if name != "output"}
    save_figure(figure, options.output.with_suffix(".png"), shown)
    with rc_context({"svg.hashsalt": "figure 1"}):
        figure.savefig(options.output.with_suffix(".svg"), metadata={"Date": None})
    print(f"E(U) {update.energies[0]:.4f}, E(sample) {update.energies[1]:.4f}, loss {update.loss:.4f}")


if __name__ == "__main__":
    main()
