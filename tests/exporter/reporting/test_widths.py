from __future__ import annotations

from typing import Any

import pytest

from exporter.reporting.schema import validate_report
from exporter.reporting.widths import activation_bits, weight_bits
from tests.exporter.reporting.sample_report import layer, sample_report


@pytest.mark.parametrize(
    ("layers", "weights", "activations"),
    [
        ([{"bits": 8, "input_bits": 8}] * 2, "8 bits", "8 bits"),
        (
            [{"bits": 8, "values": 100, "input_bits": 8}, {"bits": 4, "values": 6300, "input_bits": 4}],
            "4 to 8 bits, 4.06 on average",
            "4 to 8 bits",
        ),
        ([{"bits": 4, "input_bits": None}], "4 bits", "float"),
        ([], "8 bits", "8 bits"),
    ],
    ids=["uniform", "mixed", "weight-only", "no-layers"],
)
def test_bits_are_told_as_they_are(layers: list[dict[str, Any]], weights: str, activations: str) -> None:
    entries = [layer(index, "weight") | changes for index, changes in enumerate(layers)]
    report = validate_report(sample_report(1) | {"layers": entries, "bits": {"weight": 8, "activation": 8}})
    assert (weight_bits(report), activation_bits(report)) == (weights, activations)
