"""Families of processors whose integer kernels compute the same codes, and where the families differ, as data.

Convolutions and products agree everywhere, except for sums of two products on x86 with AVX2 but without VNNI. Kernels
with two operands round ties differently. Measured with onnxruntime 1.32 and onnxruntime-web 1.30, natively and under
user-mode emulation.

Must not know: graphs, targets, runtimes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["FAMILIES", "PROCESSORS", "REFERENCE", "Processor"]


@dataclass(frozen=True)
class Processor:
    """A family of processors, or another library of kernels.

    add:      arithmetic of a quantized sum (calibrators.grid.kernel_tables): fused multiply-adds, float32 steps, 32-bit
              fixed point of two precisions, fixed point of 31 bits that is rounded twice (Q31), or the sum of the
              values.
    mul:      arithmetic of a quantized product: fused multiply-add, float32 steps, the product of the values, a number
              that is rounded before the zero point is added, or Q31.
    sigmoid:  arithmetic of the polynomials of a sigmoid; None where its kernel is not used.
    mean:     whether a mean is rounded before or after the zero point is added, or twice.
    conv, linear: arithmetic that makes codes of the sums of products of a convolution, and of a linear layer.
    average:  whether an average over windows is one of values, or one of codes, rounded half away from 0.
    pair_sum: largest magnitude of the sum of two products of an activation and a weight; None where every sum fits.
    """

    name: str
    summary: str
    add: Literal["fused", "plain", "fixed", "fixed, half up", "values", "Q31"]
    mul: Literal["fused", "plain", "values", "rounded", "Q31"]
    sigmoid: Literal["fused", "plain"] | None
    mean: Literal["rounded", "with zero", "Q31"] = "rounded"
    conv: Literal["float32", "Q31"] = "float32"
    linear: Literal["float32", "float64"] = "float32"
    average: Literal["values", "codes"] = "values"
    pair_sum: int | None = None


PROCESSORS = {
    processor.name: processor
    for processor in (
        Processor("x86-vnni", "x86-64 with VNNI", add="fused", mul="plain", sigmoid="fused"),
        Processor(
            "x86-avx2", "x86-64 with AVX2, without VNNI", add="fused", mul="plain", sigmoid="fused", pair_sum=2**15 - 1
        ),
        Processor("x86-sse", "x86-64 before AVX2", add="plain", mul="plain", sigmoid="plain"),
        Processor("arm64", "64-bit ARM", add="fixed", mul="fused", sigmoid="fused"),
        Processor("wasm", "WebAssembly with SIMD", add="values", mul="values", sigmoid="plain"),
    )
}
"""Families of processors on which onnxruntime computes the same codes, by name."""

FAMILIES = PROCESSORS | {
    "xnnpack": Processor("xnnpack", "XNNPACK", add="fixed, half up", mul="rounded", sigmoid=None, mean="with zero"),
    "tflite": Processor(
        "tflite",
        "LiteRT's reference kernels",
        add="Q31",
        mul="Q31",
        sigmoid=None,
        mean="Q31",
        conv="Q31",
        linear="float64",
        average="codes",
    ),
}
"""Every family by name: also a library whose kernels compute the same codes on every processor."""

REFERENCE: Final = "x86-vnni"
"""The family whose arithmetic the reference computes with; its sums of products are exact."""
