"""Calculators: gradients by finite differences, relaxation by ASE, names that do not load, candidates that fail."""

from __future__ import annotations

import re
import sys
import types
from copy import deepcopy

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE
from pymatgen.core import Lattice, Structure

from contsp_core import Crystals, load_model
from contsp_core.app.calculators import ContinuousCalculator, load_calculator, relax_and_rank
from contsp_core.energy import ContinuousCGCNN
from contsp_core.invariance import graph_cutoff

VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))
TRICLINIC = Atoms(
    "TiO2", scaled_positions=[[0, 0, 0], [0.3, 0.35, 0.4], [0.7, 0.6, 0.65]], pbc=True, cell=[4, 4.6, 5, 75, 100, 82]
)


@pytest.fixture(scope="module")
def model() -> ContinuousCGCNN:
    return load_model("prototypes")


def rattled(name: str, calculator: Calculator | None = None) -> Atoms:
    """A crystal without symmetry, its cell strained too."""
    atoms = TRICLINIC.copy() if name == "triclinic" else bulk("NaCl", "rocksalt", 5.64, cubic=name == "cubic")
    atoms.set_cell(atoms.cell @ [[1, 0.02, 0], [0, 1.01, 0.03], [0, 0, 0.98]], scale_atoms=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = calculator
    return atoms


def difference(atoms: Atoms, change, step: float = 1e-4) -> float:
    """Central difference of the energy of a copy that ``change`` moves by ± step."""
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.calc = atoms.calc
        change(moved, sign * step)
        energies.append(moved.get_potential_energy())
    return (energies[0] - energies[1]) / (2 * step)


@pytest.mark.parametrize("name", ["primitive", "cubic", "triclinic"])
def test_forces_and_stress_are_those_of_finite_differences(model, name):
    atoms = rattled(name, ContinuousCalculator(model))
    for index, axis in ((0, 0), (1, 1), (len(atoms) - 1, 2)):

        def move(moved, step, index=index, axis=axis):
            moved.positions[index, axis] += step

        assert atoms.get_forces()[index, axis] == pytest.approx(-difference(atoms, move), rel=1e-5, abs=1e-6)
    expected = []
    for row, column in VOIGT:

        def deform(moved, step, row=row, column=column):
            strain = np.zeros((3, 3))
            strain[row, column] += step / 2  # in full on the diagonal, which both lines meet
            strain[column, row] += step / 2
            moved.set_cell(moved.cell @ (np.eye(3) + strain), scale_atoms=True)

        expected.append(difference(atoms, deform) / atoms.get_volume())
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(atoms.get_stress(), expected, rtol=1e-5, atol=1e-8)


def test_energy_is_that_of_the_model_times_the_atoms_and_extensive(model):
    calculator = ContinuousCalculator(model)
    atoms = rattled("triclinic", calculator)
    structure = Structure(atoms.cell.array, atoms.numbers, atoms.positions, coords_are_cartesian=True)
    with torch.no_grad():
        per_atom = float(load_model("prototypes").double()(Crystals.from_structures([structure], torch.float64)))
    double = atoms.repeat((1, 2, 1))
    double.calc = calculator
    assert atoms.get_potential_energy() == pytest.approx(3 * per_atom, rel=1e-12)
    assert double.get_potential_energy() == pytest.approx(2 * atoms.get_potential_energy(), rel=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    np.testing.assert_allclose(double.get_forces()[:3], atoms.get_forces(), atol=1e-10)
    np.testing.assert_allclose(double.get_stress(), atoms.get_stress(), atol=1e-12)


def test_the_audit_looks_where_the_model_cuts_its_graph(model):
    crystals = Crystals.from_structures([Structure(Lattice.cubic(4), ["Po"], [[0, 0, 0]])], torch.float64)
    radii = [graph_cutoff(energy, crystals) for energy in (ContinuousCalculator(model), model)]
    assert radii[0] == radii[1] == pytest.approx(4 * model.config.cutoff_multiple)
    assert model.config.cutoff_multiple != 3  # what is assumed of an energy that does not say


def test_model_given_stays_as_it_is(model):
    rattled("primitive", ContinuousCalculator(model)).get_forces()
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize("pbc", [False, (True, True, False)])
def test_atoms_that_are_no_crystal_are_refused(model, pbc):
    atoms = rattled("primitive", ContinuousCalculator(model))
    atoms.pbc = pbc
    with pytest.raises(ValueError, match=r"^atoms.pbc is \[.*False\], expected True in all three directions$"):
        atoms.get_potential_energy()


@pytest.mark.parametrize("optimiser", [FIRE, BFGS])
def test_relaxing_with_ase_lowers_the_energy_to_rest(model, optimiser):
    atoms = rattled("primitive", ContinuousCalculator(model))
    before = atoms.get_potential_energy()
    with optimiser(FrechetCellFilter(atoms), logfile=None) as relaxation:
        assert relaxation.run(fmax=0.05, steps=300)
    assert atoms.get_potential_energy() < before - 0.1
    assert np.abs(atoms.get_forces()).max() < 0.05
    assert np.abs(atoms.get_stress()).max() * atoms.get_volume() / len(atoms) < 0.05  # the force on the cell


# By name


class Stubborn(Calculator):
    """Cannot be made."""

    def __init__(self) -> None:
        raise FileNotFoundError("no weights\nat all")


@pytest.fixture
def broken(monkeypatch) -> None:
    module = types.ModuleType("broken_calculators")
    module.Stubborn = Stubborn
    monkeypatch.setitem(sys.modules, "broken_calculators", module)


def test_calculator_is_loaded_by_name():
    assert type(load_calculator("ase.calculators.emt:EMT")) is EMT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ase.calculators.emt", "expected module:Class"),
        (":EMT", "expected module:Class"),
        ("ase.calculators.emt:", "expected module:Class"),
        ("no_such_package.x:EMT", "module 'no_such_package.x' cannot be imported: ModuleNotFoundError"),
        ("ase.calculators.emt:EMTT", "module 'ase.calculators.emt' has no class 'EMTT'"),
        ("ase:Atoms", r"Atoms\(\) is a Atoms, not an ASE calculator"),
        ("broken_calculators:Stubborn", r"Stubborn\(\) cannot be made .*: FileNotFoundError: no weights at all"),
    ],
)
def test_name_that_gives_no_calculator_is_refused_on_one_line(broken, name, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_calculator(name)
    assert repr(name) in str(caught.value) and "\n" not in str(caught.value)


# Candidates


def candidates() -> list[Structure]:
    """By learned energy: copper body-centred and face-centred, iron, copper simple cubic."""
    body_centred = Structure(Lattice.cubic(3.0), ["Cu", "Cu"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    face_centred = Structure.from_spacegroup("Fm-3m", Lattice.cubic(3.8), ["Cu"], [[0, 0, 0]])
    iron = Structure(Lattice.cubic(2.87), ["Fe", "Fe"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    simple = Structure(Lattice.cubic(2.6), ["Cu"], [[0, 0, 0]])
    found = [simple, face_centred, iron, body_centred]
    for structure, energy, name in zip(found, (4.0, 2.0, 3.0, 1.0), ("simple", "fcc", "iron", "bcc")):
        structure.properties |= {"energy": energy, "source": name}
    return found


def names(structures: list[Structure]) -> list[str]:
    return [structure.properties["source"] for structure in structures]


def test_candidates_are_relaxed_and_ranked_and_nothing_is_lost():
    given = candidates()
    before = deepcopy(given)
    ranked = relax_and_rank(given, EMT(), max_steps=100, force_tolerance=0.02)
    assert given == before  # properties too
    assert names(ranked) == ["fcc", "bcc", "simple", "iron"]  # iron is unknown to EMT
    fcc, bcc, simple, iron = ranked
    assert fcc.properties["energy"] == 2.0 and fcc.properties["calculator_converged"]
    rest = bulk("Cu", "fcc", 3.59)
    rest.calc = EMT()
    with BFGS(FrechetCellFilter(rest), logfile=None) as relaxation:
        relaxation.run(fmax=1e-4, steps=50)
    assert fcc.properties["calculator_energy"] == pytest.approx(rest.get_potential_energy(), abs=1e-4)
    assert fcc.volume / 4 == pytest.approx(rest.get_volume(), rel=1e-2)
    assert bcc.properties["calculator_energy"] > fcc.properties["calculator_energy"]
    error = iron.properties["calculator_error"]
    assert error.startswith("NotImplementedError: ") and "Fe" in error and "\n" not in error
    assert iron.properties.pop("calculator_error") and iron == before[2]
    assert simple.properties["calculator_energy"] > bcc.properties["calculator_energy"]


def test_max_steps_bounds_the_work():
    ranked = relax_and_rank(candidates()[1:2], EMT(), max_steps=0)
    assert not ranked[0].properties["calculator_converged"]
    assert ranked[0].lattice.a == pytest.approx(3.8, abs=1e-9)


class WithoutNumber(EMT):
    """EMT whose energy and forces are no numbers."""

    def calculate(self, *args, **kwargs) -> None:
        super().calculate(*args, **kwargs)
        self.results = {name: value * np.nan for name, value in self.results.items()}


def test_energy_that_is_no_number_is_a_failure():
    (structure,) = relax_and_rank(candidates()[:1], WithoutNumber(), max_steps=0)
    assert structure.properties["calculator_error"].startswith("ValueError: energy is nan")


class Broken(Calculator):
    """No forces, but for what is done to the answer."""

    def __init__(self, answer) -> None:
        super().__init__()
        self.implemented_properties, self.answer = ["energy", "forces", "stress"], answer

    def calculate(self, *args, **kwargs) -> None:
        super().calculate(*args, **kwargs)
        self.results = {"energy": 1.0, "forces": np.zeros((len(self.atoms), 3)), "stress": np.zeros(6)}
        self.answer(self.results)


def no_forces(results):
    results["forces"][:] = np.nan


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (no_forces, "an atom is nowhere"),
        (lambda results: results.update(stress=np.array([5.0, 5, 5, 0, 0, 0])), "the volume is .* times what it was"),
        (lambda results: results.update(stress=np.array([-5.0] * 3 + [0] * 3)), "the volume is .* times what it was"),
        (lambda _: sys.exit(0), "SystemExit"),
        ({}.__getitem__, "TypeError"),
    ],
)
def test_a_calculator_fails_in_many_ways_and_the_crystal_stays(answer, error):
    (given,) = candidates()[:1]
    (found,) = relax_and_rank([given], Broken(answer), max_steps=30)
    assert re.search(error, found.properties.pop("calculator_error"))
    assert found == given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": -1}, "max_steps is -1, .*expected ≥ 0"),
        ({"force_tolerance": 0.0}, "force_tolerance 0.0; expected .* > 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        relax_and_rank(candidates(), EMT(), **options)


def test_candidates_without_energy_are_refused():
    with pytest.raises(ValueError, match=r"no properties\['energy'\]"):
        relax_and_rank([Structure(Lattice.cubic(3), ["Cu"], [[0, 0, 0]])], EMT())
