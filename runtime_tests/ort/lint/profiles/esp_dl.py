"""Espressif's ESP-DL."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    fixed_shapes,
    powers_of_two,
    symmetric_activations,
    symmetric_weights,
    weight_scales_per_tensor,
    weight_types,
)

__all__ = ["PROFILE"]

SPECIFICATION = "Espressif ESP-DL, Quantization specification"
RELEASES = "Espressif ESP-DL 3.3.14, release notes (scales per channel on the ESP32-P4 alone, since 3.3.1)"

PROFILE = Profile(
    "esp-dl",
    "Espressif ESP-DL, ESP32-S3 and ESP32-P4",
    (
        fixed_shapes(SPECIFICATION),
        activation_types(("INT8", "INT16"), SPECIFICATION),
        symmetric_activations(SPECIFICATION),
        weight_types(("INT8", "INT16"), SPECIFICATION),
        symmetric_weights(SPECIFICATION),
        weight_scales_per_tensor(RELEASES, severity="warning"),
        powers_of_two(SPECIFICATION),
    ),
)
