"""Espressif's ESP-DL."""

from __future__ import annotations

from runtime_tests.ort.lint.profiles.profile import Profile
from runtime_tests.ort.lint.requirements import (
    activation_types,
    fixed_shapes,
    powers_of_two,
    symmetric_activations,
    symmetric_weights,
    weight_types,
)

__all__ = ["PROFILE"]

SPECIFICATION = "Espressif ESP-DL, Quantization specification"

PROFILE = Profile(
    "esp-dl",
    "Espressif ESP-DL, ESP32-S3 and ESP32-P4",
    (
        fixed_shapes(SPECIFICATION),
        activation_types(("INT8", "INT16"), SPECIFICATION),
        symmetric_activations(SPECIFICATION),
        weight_types(("INT8", "INT16"), SPECIFICATION),
        symmetric_weights(SPECIFICATION),
        powers_of_two(SPECIFICATION),
    ),
)
