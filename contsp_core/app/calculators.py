"""The learned energy as an ASE calculator, and candidates relaxed and ranked by any ASE calculator.

No potential is imported here: its user names it, such as ``chgnet.model.dynamics:CHGNetCalculator``.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from ase.filters import FrechetCellFilter
from ase.optimize import FIRE
from ase.stress import full_3x3_to_voigt_6_stress
from pymatgen.core import Lattice, Structure

from contsp_core.crystals import Crystals
from contsp_core.data import one_line, retold
from contsp_core.energy import ContinuousCGCNN, energy_and_gradient

LARGEST_GROWTH = 10.0  # of the volume while a crystal relaxes; beyond it or its inverse a calculator has failed


class ContinuousCalculator(Calculator):
    """The learned energy for everything that ASE does: optimisers, filters, dynamics, the audit.

    The learned energy E is per atom and dimensionless. ASE expects an extensive energy, so ``energy`` is n_atoms · E;
    ``forces`` (Å⁻¹) are minus its gradient, ``stress`` (Å⁻³) its derivative by the strain divided by the volume. With
    noise levels E is read at the model's ``noise_default``. All is computed in float64, by a copy of the model. Atoms
    that are not periodic in all directions are a ValueError.
    """

    def __init__(self, model: ContinuousCGCNN, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.implemented_properties = ["energy", "free_energy", "forces", "stress"]
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.cutoff_radius = self.model.cutoff_radius  # where the audit looks

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """All properties of the atoms, into ``results``, as ASE asks for it."""
        super().calculate(atoms, properties, system_changes)
        unit = cast(Atoms, self.atoms)
        if not unit.pbc.all():
            raise ValueError(f"atoms.pbc is {unit.pbc.tolist()}, expected True in all three directions")
        crystals = Crystals.from_arrays(unit.cell.array[None], unit.positions, [unit.numbers], torch.float64)
        crystals = crystals.to(next(self.model.parameters()).device)
        value, (strain,), gradient = energy_and_gradient(self.model, crystals)
        energy, forces = len(unit) * float(value), -len(unit) * gradient
        stress = (len(unit) / unit.get_volume() * (strain + strain.T) / 2).cpu().numpy()
        self.results = {"energy": energy, "free_energy": energy, "forces": forces.cpu().numpy()}
        self.results["stress"] = full_3x3_to_voigt_6_stress(stress)


def load_calculator(name: str) -> BaseCalculator:
    """An ASE calculator by name, made without arguments; this runs the code of the module named.

    The name is ``module:Class``, such as ``ase.calculators.emt:EMT``; a function that returns a calculator will do. A
    ValueError tells of another form, of nothing found there, or of what is made and is no ASE calculator.
    """
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ValueError(f"calculator is {name!r}, expected module:Class, such as ase.calculators.emt:EMT")
    with retold(f"calculator {name!r}: module {module_name!r} cannot be imported", Exception, SystemExit):
        module = importlib.import_module(module_name)
    if not callable(make := getattr(module, attribute, None)):
        raise ValueError(f"calculator {name!r}: module {module_name!r} has no class {attribute!r}")
    with retold(f"calculator {name!r}: {attribute}() cannot be made without arguments", Exception, SystemExit):
        calculator = make()
    if not isinstance(calculator, BaseCalculator):
        raise ValueError(f"calculator {name!r}: {attribute}() is a {type(calculator).__name__}, not an ASE calculator")
    return calculator


def relax_and_rank(
    structures: Sequence[Structure], calculator: BaseCalculator, max_steps: int = 200, force_tolerance: float = 0.05
) -> list[Structure]:
    """Relax candidates, atoms and cell, with a calculator, and rank them by its energy.

    Args:
        structures: each with ``properties["energy"]``; they stay as they are.
        calculator: any of ASE that knows energies, forces and stresses.
        max_steps: of the optimiser (FIRE), for each.
        force_tolerance: largest force at which it stops, eV/Å; the stress counts as a force on the cell.

    Returns:
        Copies of all structures: first the relaxed ones, sorted by ``calculator_energy`` (eV/atom) in their properties
        (``calculator_converged``: whether the tolerance was reached; ``energy`` is as before relaxing); then those on
        which the calculator failed, unchanged, by learned energy, with the reason in ``calculator_error``.

    Raises:
        ValueError: if a structure has no energy, or an argument is out of range.
    """
    if max_steps < 0 or not force_tolerance > 0:
        raise ValueError(f"max_steps is {max_steps}, force_tolerance {force_tolerance}; expected ≥ 0 and > 0")
    if any("energy" not in structure.properties for structure in structures):
        raise ValueError("one of structures has no properties['energy'], expected all with it")
    relaxed, failed = [], []
    for structure in sorted((structure.copy() for structure in structures), key=lambda s: s.properties["energy"]):
        try:
            relaxed.append(_relax(structure, calculator, max_steps, force_tolerance))
        except (Exception, SystemExit) as error:  # calculators fail in as many ways as there are calculators
            structure.properties = structure.properties | {"calculator_error": one_line(error)}  # copies share theirs
            failed.append(structure)
    return sorted(relaxed, key=lambda s: s.properties["calculator_energy"]) + failed


def _relax(structure: Structure, calculator: BaseCalculator, max_steps: int, force_tolerance: float) -> Structure:
    numbers: list[Any] = list(structure.atomic_numbers)
    atoms = Atoms(numbers, structure.cart_coords, cell=structure.lattice.matrix, pbc=True, calculator=calculator)
    with FIRE(FrechetCellFilter(atoms), logfile=None) as optimiser:
        converged = bool(optimiser.run(fmax=force_tolerance, steps=max_steps))
    energy, growth = float(atoms.get_potential_energy()) / len(atoms), atoms.get_volume() / structure.volume
    if not np.isfinite([energy, *atoms.positions.flat, *atoms.cell.array.flat]).all():
        raise ValueError(f"energy is {energy}, or an atom is nowhere")
    if not 1 / LARGEST_GROWTH < growth < LARGEST_GROWTH:
        raise ValueError(f"the volume is {growth:.3g} times what it was")
    found = {"calculator_energy": energy, "calculator_converged": converged}
    lattice, properties = Lattice(atoms.cell.array), structure.properties | found
    return Structure(lattice, numbers, atoms.positions, coords_are_cartesian=True, properties=properties)
