"""What the integers mean, and how they are chosen.

The names below are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibrators.calibration import calibrate
    from calibrators.freeze import CalibrationResult
    from calibrators.place import PlacementOptions
    from calibrators.rules import LayerRule

__all__ = ["CalibrationResult", "LayerRule", "PlacementOptions", "calibrate"]

_HOME = {
    "CalibrationResult": "freeze",
    "LayerRule": "rules",
    "PlacementOptions": "place",
    "calibrate": "calibration",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
