"""ContinuouSP: crystal structure prediction with an invariant and continuous energy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contsp_core.checkpoints import load_model
    from contsp_core.crystals import Crystals

__all__ = ["Crystals", "load_model"]
MAX_ATOMIC_NUMBER = 100


def __getattr__(name: str) -> Any:
    """What is offered here, imported when it is asked for: torch takes seconds."""
    if name in __all__:
        module = "crystals" if name == "Crystals" else "checkpoints"
        return getattr(importlib.import_module(f"contsp_core.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
