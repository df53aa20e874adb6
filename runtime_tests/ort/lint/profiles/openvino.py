"""OpenVINO on CPUs."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    biases_of_codes,
    no_double_quantizers,
    no_early_quantizers,
    no_symmetric_relus,
    same_scales,
    symmetric_weights,
    weight_types,
)

__all__ = ["PROFILE"]

TABLE = "NNCF, nncf/common/hardware/setups/cpu.py"
EXPERIMENT = "experiment: OpenVINO 2026.4 (docs/openvino.md)"

PROFILE = Profile(
    "openvino",
    "OpenVINO, CPU plugin",
    (
        activation_types(("UINT8", "INT8", "UINT16", "INT16"), TABLE),
        weight_types(("INT8",), EXPERIMENT),
        symmetric_weights(EXPERIMENT),
        same_scales(("Concat",), "warning", TABLE),
        no_early_quantizers(EXPERIMENT),
        no_symmetric_relus(EXPERIMENT),
        no_double_quantizers(EXPERIMENT),
        biases_of_codes(EXPERIMENT)[1],
    ),
)
