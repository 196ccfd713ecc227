"""One prediction and one reference: is it a valid crystal, and is it the same crystal?

RMS displacements are those of pymatgen's ``StructureMatcher``: divided by (volume per atom)^(1/3), hence unitless.
"""

from __future__ import annotations

import math
import warnings
from functools import cache

import numpy as np
from pymatgen.core import Composition, Structure
from pymatgen.core.structure_matcher import StructureMatcher
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

MIN_DISTANCE = 0.5  # Å, CDVAE
MIN_VOLUME = 0.1  # Å³, CDVAE
STRICT = {"ltol": 0.2, "stol": 0.3, "angle_tol": 5.0}  # pymatgen's defaults
SYMPREC = 0.1  # Å


@cache
def is_charge_neutral(formula: str) -> bool:
    """Whether a composition can be charge neutral, by the rule of CDVAE.

    Single elements and compounds of metals only are valid. Otherwise every element takes one of its known oxidation
    states (``Element.oxidation_states`` of pymatgen, zero excluded; the shorter list of *common* states would reject
    two thirds of Perov-5): some choice must sum to zero with every cation less electronegative than every anion.
    CDVAE reads the states from the smact package, whose list differs: the two verdicts agree for 99 % of the
    compositions of the Perov-5 test set and for 97 % of MP-20's and MPTS-52's.

    Args:
        formula: anything that ``Composition`` parses.

    Source: Xie et al., ICLR 2022 (CDVAE), evaluation metrics; Davies et al., Chem 1, 617 (2016) (SMACT).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pymatgen warns of each noble gas, which has no electronegativity
        counts = {el: round(n) for el, n in Composition(formula).element_composition.reduced_composition.items()}
        electronegativity = {el: math.inf if math.isnan(el.X) else el.X for el in counts}
    elements = sorted(counts, key=electronegativity.get)
    if len(elements) == 1 or all(element.is_metal for element in elements):
        return True
    for n_cations in range(1, len(elements)):
        cation, anion = elements[n_cations - 1 : n_cations + 1]
        totals = {0} if electronegativity[cation] < electronegativity[anion] else set()
        for rank, element in enumerate(elements):
            states = [state for state in element.oxidation_states if (state > 0) == (rank < n_cations) and state]
            totals = {total + counts[element] * state for total in totals for state in states}
        if 0 in totals:
            return True
    return False


def _has_volume(structure: Structure) -> bool:
    return bool(np.isfinite(structure.frac_coords).all() and structure.volume >= MIN_VOLUME)  # a NaN volume fails


def is_valid_structure(structure: Structure, charge_neutrality: bool = True) -> bool:
    """Validity as in CDVAE and DiffCSP.

    Coordinates are finite, the volume is at least 0.1 Å³, the shortest distance between two sites (nearest images; a
    site and its own images are not compared) exceeds 0.5 Å, and, unless ``charge_neutrality`` is False, the
    composition passes :func:`is_charge_neutral`. DiffCSP also calls a crystal invalid for which no CrystalNN
    fingerprint can be computed; that is left out here.
    """
    if not _has_volume(structure):
        return False
    distances = structure.distance_matrix[np.triu_indices(len(structure), 1)]
    return bool((distances > MIN_DISTANCE).all()) and (not charge_neutrality or is_charge_neutral(structure.formula))


def score_pair(
    prediction: Structure | None, reference: Structure, ltol: float = 0.3, stol: float = 0.5, angle_tol: float = 10.0
) -> tuple[float, bool, bool]:
    """Compare one prediction with one reference.

    Both cells are LLL-reduced first: the same solids, but pymatgen's Niggli reduction then takes milliseconds where
    it takes seconds for a skewed cell. A missing prediction, a different composition or a volume below 0.1 Å³ is no
    match, and an error inside the matcher is none either.

    Returns:
        normalised RMS displacement (NaN: no match), whether they match at the strict tolerances 0.2 / 0.3 / 5, and
        whether the prediction is valid but for its charge.
    """
    nothing = (math.nan, False, False)
    if prediction is None or not _has_volume(prediction):
        return nothing
    try:
        first, second = (structure.get_reduced_structure("LLL") for structure in (prediction, reference))
        valid = is_valid_structure(first, charge_neutrality=False)
        if prediction.composition.reduced_formula != reference.composition.reduced_formula:
            return math.nan, False, valid
        match = StructureMatcher(ltol=ltol, stol=stol, angle_tol=angle_tol).get_rms_dist(first, second)
        strict = match is not None and StructureMatcher(**STRICT).get_rms_dist(first, second) is not None
        return (math.nan if match is None else float(match[0])), strict, valid
    except Exception:  # a distorted cell makes spglib, numpy and pymatgen fail in many ways
        return nothing


def same_space_group(prediction: Structure, reference: Structure) -> bool:
    """Whether spglib finds the same space group for both, at a tolerance of 0.1 Å; False if it finds none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # spglib announces a new way to report failure
            first, second = (
                SpacegroupAnalyzer(s, symprec=SYMPREC).get_space_group_number() for s in (prediction, reference)
            )
    except Exception:  # spglib finds no space group
        return False
    return first == second
