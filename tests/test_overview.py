"""Counts of a data set agree with pymatgen's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from pymatgen.core import Element

from contsp_core.data import load_split
from contsp_core.overview import (
    crystal_table,
    distribution_figure,
    element_counts,
    periodic_table_figure,
    split_counts,
)


@pytest.fixture(scope="module")
def split():
    """The bundled training crystals."""
    return load_split("prototypes", "train")


def test_counts_agree_with_pymatgen(split):
    row = split_counts({"train": split}).loc["train"]
    formulas = Counter(structure.composition.reduced_formula for structure in split)
    assert row["crystals"] == row["rows"] == len(split)
    assert row["compositions"] == len(formulas)
    assert row["polymorphs"] == sum(count for count in formulas.values() if count > 1)
    assert row["elements"] == len({site.specie for structure in split for site in structure})
    assert row["official"] == "yes"


def test_each_crystal_is_described_as_pymatgen_does(split):
    table = crystal_table(split)
    for row in range(0, len(split), 37):
        structure = split[row]
        assert table.loc[row, "n_atoms"] == len(structure)
        assert table.loc[row, "n_elements"] == len(structure.elements)
        assert table.loc[row, "volume_per_atom"] == pytest.approx(structure.volume / len(structure))
        assert table.loc[row, "shape"] == pytest.approx(max(structure.lattice.abc) / min(structure.lattice.abc))


def test_elements_are_counted_once_a_crystal(split):
    counted = Counter(element.Z for structure in split for element in structure.elements)
    np.testing.assert_array_equal(element_counts(split), [counted[number] for number in range(101)])


def test_figures_show_every_column_and_every_element(split):
    assert len(distribution_figure(crystal_table(split)).axes) == 4
    ax = periodic_table_figure(element_counts(split)).axes[0]
    assert {Element.from_Z(number).symbol for number in range(1, 101)} <= {text.get_text() for text in ax.texts}
    cells = [patch.get_xy() for patch in ax.patches]
    assert len(set(cells)) == 100, "two elements share a cell"
