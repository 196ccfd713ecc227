"""How does a crystal form? A chain recorded, as an animated picture or a page with a slider."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from player import player

from contsp_core.crystals import Crystals, keyed_rng
from contsp_core.csp.candidates import space_group
from contsp_core.csp.figures import COLORS, draw_crystal, lay_out, new_figure, styled
from contsp_core.data import resolve_species, write_whole
from contsp_core.diffusion import DiffusionConfig, schedule
from contsp_core.energy import ContinuousCGCNN
from contsp_core.lattice import niggli
from contsp_core.mala import AnnealConfig, ChainState
from contsp_core.sampler import run_chains, sampling_config, start_crystals

if TYPE_CHECKING:
    from pymatgen.core import Structure

NEAR_FACE = 0.08  # fractional distance to a face below which a moving atom is drawn on the opposite face too
AZIMUTHS = (-26.0, 24.0)  # degrees, of the first and last picture: a slow turn shows the depth
ROOM = 0.9  # Å about the cell, for the atoms at its corners
HOLD = 20  # pictures for which the last one stands
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{}</title>
<body style="margin: 24px auto; max-width: 640px">
<h1 style="font: 600 18px system-ui, sans-serif">{}</h1>
{}</body></html>
"""


@dataclass(frozen=True)
class Frame:
    """A moment of a chain; ``structure`` is described as the last one is, so that atoms and cell move little."""

    step: int  # steps taken so far
    structure: Structure  # atoms may lie outside the cell
    energy: float  # dimensionless, as in ``properties["energy"]`` of a sample
    level: float  # of the step that led here: noise σ (Å), or temperature if the sampler has no noise levels
    level_name: str
    acceptance: float | None  # share of the proposals accepted so far; None if the sampler accepts every step


def record_chain(
    model: ContinuousCGCNN,
    formula: str,
    number: int = 0,
    seed: int = 0,
    n_frames: int = 60,
    n_steps: int | None = None,
) -> list[Frame]:
    """The chain of sample ``number`` of ``sample_structures(model, [formula], seed=seed)``, from its random start.

    Args:
        model: from :func:`contsp_core.load_model`.
        formula: content of the cell, such as ``"Ti2O4"``.
        number: which sample, from 0.
        seed: the one of the samples.
        n_frames: at most so many moments, evenly spread; the start and the end are among them.
        n_steps: length of the chain; by default as the model's settings say.

    Returns:
        Frames in order. The structure of the last is the sample itself; the others are described alike.

    Raises:
        ValueError: on text that is no formula, or a number that is no count.
    """
    given = {"number": (number, 0), "seed": (seed, 0), "n_frames": (n_frames, 2), "n_steps": (n_steps, 1)}
    for name, (value, least) in given.items():
        if not (value is None and name == "n_steps") and (type(value) is not int or value < least):
            raise ValueError(f"{name} is {value!r}, expected an integer ≥ {least}")
    numbers = tuple(sorted(resolve_species([formula])[0]))
    config = sampling_config(model)
    config = config if n_steps is None else replace(config, n_steps=n_steps)
    rng, weight = [keyed_rng(seed, numbers, number)], next(model.parameters())
    start = start_crystals(model, [numbers], rng, [number])
    chain, accepted = [niggli(start.to(weight.device).to(weight.dtype))], []

    def keep(_: int, state: Any) -> None:
        if isinstance(state, ChainState):
            accepted.append(bool(state.accepted))
        chain.append(state.crystals if isinstance(state, ChainState) else state)

    run_chains(model, start, config, rng, keep)
    structures = describe_alike(Crystals.cat(chain).to_structures())
    chosen = np.unique(np.linspace(0, config.n_steps, n_frames).round().astype(int)).tolist()
    with torch.no_grad():
        energies = model(Crystals.cat([chain[step] for step in chosen])).tolist()
    name, levels = chain_levels(model, config)
    shares = [float(np.mean(accepted[: max(step, 1)])) if accepted else None for step in chosen]
    return [
        Frame(step, structures[step], energy, levels[max(step - 1, 0)], name, share)
        for step, energy, share in zip(chosen, energies, shares)
    ]


def chain_levels(model: ContinuousCGCNN, config: DiffusionConfig | AnnealConfig) -> tuple[str, list[float]]:
    """What a chain lowers, and its value at each step."""
    if isinstance(config, DiffusionConfig):
        return "noise level σ (Å)", [sigma for sigma, *_ in schedule(model.config, config)]
    levels = np.geomspace(config.temperature_first, config.temperature_last, max(config.n_steps, 2))
    return "temperature T", levels[: config.n_steps].tolist()


def describe_alike(structures: Sequence[Structure]) -> list[Structure]:
    """Structures of a chain, of atoms in one order, each in the basis, with the images and the origin of the next.

    The last one stays as it is. A chain reduces its cell and wraps its atoms after every step, which changes the
    description by leaps; going back from the end, each lattice vector is followed to the nearest in the other lattice,
    and each atom to its nearest image. The mean displacement is taken out, since no energy can see it.
    """
    from pymatgen.core import Lattice, Structure
    from pymatgen.util.coord import pbc_shortest_vectors

    alike, basis, origin = [structures[-1]], np.eye(3), np.zeros(3)
    for later, earlier in zip(structures[:0:-1], structures[-2::-1]):
        change = np.rint(later.lattice.matrix @ earlier.lattice.inv_matrix)
        if round(abs(np.linalg.det(change))) == 1:  # else the lattices have nothing in common: a leap stays
            basis = basis @ change
        lattice, shown = Lattice(basis @ earlier.lattice.matrix), alike[-1].frac_coords
        frac_coords = earlier.frac_coords @ np.linalg.inv(basis) + origin
        moves = pbc_shortest_vectors(earlier.lattice, shown @ basis, frac_coords @ basis)  # a reduced cell: exact
        steps = moves.diagonal().T @ lattice.inv_matrix
        origin = origin - steps.mean(axis=0)
        alike.append(Structure(lattice, earlier.species, shown + steps - steps.mean(axis=0)))
    return alike[::-1]


def _at_origin(frames: Sequence[Frame]) -> list[Structure]:
    """The structures, with an atom of the rarest element at the corner of the last cell."""
    last = frames[-1].structure
    atom = min(range(len(last)), key=lambda index: last.species.count(last[index].specie))
    return [
        type(last)(frame.structure.lattice, last.species, frame.structure.frac_coords - last.frac_coords[atom])
        for frame in frames
    ]


@styled
def write_gif(frames: Sequence[Frame], path: str | Path) -> Path:
    """Animated GIF: the crystal, and beneath it energy and level against the step; the last picture stands longer."""
    from matplotlib.animation import PillowWriter

    path = _checked(frames, path, ".gif")
    structures, last = _at_origin(frames), frames[-1]
    figure = new_figure(size=(3.8, 4.9))[0]
    figure.clear()
    figure.set_layout_engine("none")
    crystal, curve = figure.add_axes((0.02, 0.3, 0.96, 0.65)), figure.add_axes((0.15, 0.09, 0.69, 0.15))
    steps, levels, energies = zip(*((frame.step, frame.level, frame.energy) for frame in frames))
    other = curve.twinx()
    curve.set(xlabel="step", ylabel="energy $E$", xlim=(0, last.step))
    other.set(ylabel=last.level_name, yscale="log")
    dots = []
    for ax, values, color in ((curve, energies, COLORS[0]), (other, levels, COLORS[1])):
        ax.plot(steps, values, color=color)
        ax.yaxis.label.set_color(color)
        dots.append(ax.plot([], [], "o", color=color, clip_on=False)[0])
    angles = np.linspace(*AZIMUTHS, len(frames))
    cells = [lay_out(structure, azimuth=azimuth).edges for structure, azimuth in zip(structures, angles)]
    middles = [edges.mean(axis=(0, 1))[:2] for edges in cells]
    half = ROOM + max(np.abs(edges[..., :2] - middle).max() for edges, middle in zip(cells, middles))
    writer = PillowWriter(fps=12)
    with tempfile.TemporaryDirectory() as folder:
        film = Path(folder, "film.gif")
        writer.setup(figure, str(film), dpi=110)
        for frame, structure, azimuth, (x, y) in zip(frames, structures, angles, middles):
            crystal.clear()
            told = f"step {frame.step} · $E$ = {frame.energy:.2f}".replace("-", "−")
            told += " · " + re.sub(r"_(\d)", r"$_{\1}$", space_group(structure)) if frame is last else ""
            draw_crystal(structure, crystal, told, azimuth=azimuth, boundary=NEAR_FACE)
            crystal.set_aspect("equal", adjustable="box")
            crystal.set(xlim=(x - half, x + half), ylim=(y - half, y + half))
            for dot, value in zip(dots, (frame.energy, frame.level)):
                dot.set_data([frame.step], [value])
            for _ in range(HOLD if frame is last else 1):
                writer.grab_frame()
        writer.finish()
        write_whole(path, lambda file: file.write(film.read_bytes()))
    return path


def write_slider(frames: Sequence[Frame], path: str | Path) -> Path:
    """One HTML file that needs nothing else: the crystal to turn by hand at each moment of the chain, and to play."""
    path = _checked(frames, path, ".html")
    last = frames[-1]
    told: list[dict] = [
        {"step": f.step, "energy": f.energy, "level": f.level, "acceptance": f.acceptance} for f in frames
    ]
    formula, group = last.structure.composition.reduced_formula, space_group(last.structure)
    title = f"{formula}: from atoms anywhere to {group}"
    heading = title.replace(formula, re.sub(r"(\d+)", r"<sub>\1</sub>", formula))
    heading = re.sub(r"_(\d)", r"<sub>\1</sub>", heading)
    film = {"title": title, "level": last.level_name}
    content = PAGE.format(title, heading, player(_at_origin(frames), told, film, NEAR_FACE))
    write_whole(path, lambda file: file.write(content.encode()))
    return path


def _checked(frames: Sequence[Frame], path: str | Path, suffix: str) -> Path:
    if not len(frames):
        raise ValueError("frames is empty, expected those of record_chain")
    if Path(path).suffix != suffix:
        raise ValueError(f"path is {str(path)!r}, expected a name that ends in {suffix}")
    return Path(path)
