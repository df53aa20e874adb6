"""onnxruntime with the QNN provider, for the HTP of Qualcomm's processors.

Every layer writes codes, linear ones too; the batch is fixed to 1; nothing clips codes, so that activations have 8
bits. A file must not hold a dequantizer with a scale other than that of its quantizer, nor packed weights.

Sources: the QNN provider's documentation and onnxruntime's qnn/quant_config.py (types, static shapes), and the HTP
simulator of onnxruntime-qnn 2.7.0, which refused a Gemm with a float output, a Clip of uint8 codes, a
Clip to [-1, 1] between a convolution and its quantizer, and uint16 activations beside int8 weights.
"""

from __future__ import annotations

from dataclasses import replace

from calibrators.graph.operators import Operators
from calibrators.grid.spec import QuantSpec
from calibrators.targets import ort_cpu

TARGET = replace(
    ort_cpu.TARGET,
    name="ort-qnn",
    summary="onnxruntime, QNN provider, Qualcomm HTP",
    runtime="qnn",
    min_version="1.24",
    exact_on=("arm64", "x86-vnni"),
    proof="steps",
    proved_in="qnn",
    opsets=(20, 21),
    static_shapes=True,
    wide_activation=QuantSpec(bits=16, signed=False),
    widths=(8,),
    coded_tables=False,
    packed_weights=False,
    weighted_to_codes=ort_cpu.TARGET.weighted,
    weighted_to_float=Operators(),
    weight_only=Operators(),
    on_codes_ops=Operators(),
    costs={},
    clips_codes=False,
    fuses_clips=False,
    free_factors=False,
)
