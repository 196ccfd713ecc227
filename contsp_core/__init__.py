"""ContinuouSP: crystal structure prediction with an invariant and continuous energy."""

from contsp_core.checkpoints import load_model
from contsp_core.crystals import Crystals

__all__ = ["Crystals", "load_model"]
