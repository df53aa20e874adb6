"""OpenVINO on CPUs: the operators that its low-precision transformations run on integers.

Activations are uint8 and weights int8 per channel, as for onnxruntime. A convolution may write floats, so that no
quantizer stands between it and an activation function, into which it is fused. The operands of a concatenation have one
scale. Sigmoids and LeakyReLUs have no integer kernel.

Sources: the CPU table of NNCF (nncf/common/hardware/setups/cpu.py: ADD, MULTIPLY, AVG_POOL, CONCAT with unified scales)
and the layers that OpenVINO 2026.4 executed in the tests. With a quantizer after every convolution, nine of ten codes
before a class token were wrong by up to 69 steps; in this form none is.
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.graph.operators import Operators
from calibrators.targets import ort_cpu

_IN_FLOAT = Operators("sigmoid.default", "leaky_relu.default")

TARGET = replace(
    ort_cpu.TARGET,
    name="openvino",
    summary="OpenVINO, CPU plugin",
    runtime="openvino",
    min_version="2025.4",
    proof="steps",
    proved_in="openvino",
    weighted_to_codes=Operators(),
    weighted_to_either=ort_cpu.TARGET.weighted_to_codes,
    weight_only=Operators(),
    integer_ops=ort_cpu.TARGET.integer_ops - _IN_FLOAT,
    fused_ops=ort_cpu.TARGET.fused_ops | _IN_FLOAT,
    joined_ops=Operators("cat.default"),
    fixed_outputs={},
    costs={},
    packed_weights=False,
    free_factors=False,
)
