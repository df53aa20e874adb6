"""Choose what the integers mean: scales, zero points, codes and biases.

The public names are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from calibrators.calibration import calibrate as calibrate
    from calibrators.placement.layer_rules import LayerRule as LayerRule
    from calibrators.placement.placement_options import PlacementOptions as PlacementOptions
    from calibrators.program.freeze import CalibrationResult as CalibrationResult

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "calibration": ["calibrate"],
        "placement.layer_rules": ["LayerRule"],
        "placement.placement_options": ["PlacementOptions"],
        "program.freeze": ["CalibrationResult"],
    },
)
