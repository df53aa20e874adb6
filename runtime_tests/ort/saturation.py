"""Find the layers that give wrong sums on x86 CPUs with AVX2 but without VNNI.

There the kernels multiply uint8 activations with int8 weights by VPMADDUBSW, which adds two neighbouring products in a
saturating int16. The sum of a pair is exact if and only if, with `a` the highest activation code,

    a * (max(w0, 0) + max(w1, 0)) <= 32767   and   a * (min(w0, 0) + min(w1, 0)) >= -32768.

Pairs: the reduction is packed from its start in steps of two (2k, 2k + 1), an odd rest alone. A matrix product reduces
over the rows of its second operand, a convolution over (channel, row, column) in NCHW layout and over (row, column,
channel) in the NHWC layout of integer networks; which of them runs depends on the neighbours, so both are checked
and a layer is reported if either can saturate. Depthwise convolutions have kernels of their own, which are exact.

Must not know: how codes were chosen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cpuinfo
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibrators.grid.processors import PROCESSORS
from runtime_tests.ort.operands import Product, flag, products, where
from runtime_tests.ort.sessions import Model, Source

__all__ = [
    "Cpu",
    "Saturation",
    "SaturationRisk",
    "blocks",
    "cpu_from",
    "layers_at_risk",
    "needs_unsigned",
    "pair_sums",
    "saturation",
    "this_cpu",
]

Array = NDArray[Any]

INT16_MAX, INT16_MIN = 2**15 - 1, -(2**15)

REPORTED_FLAGS = (
    "sse4_1", "sse4_2", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx_vnni_int8",
    "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve",
)  # fmt: skip
"""Instruction sets that decide which integer kernels run, in the spelling of Linux."""

LOWEST: dict[ir.DataType | None, int] = {ir.DataType.UINT8: 0, ir.DataType.INT8: -128}
"""Lowest activation code: int8 codes run as uint8, moved up by 128."""

BLOCK = 2**22
"""Weights that are looked at together: intermediate results take up to 50 times their space."""

EXACT_FLAGS = ("avx512_vnni", "avx_vnni")


@dataclass(frozen=True)
class SaturationRisk:
    """A layer that can saturate.

    name, op:       the node.
    worst:          largest magnitude that a pair of products can reach; beyond `limit` it saturates.
    activation_max: highest code its activations can hold.
    pairs:          number of pairs of weights that can saturate, of `pairs_total`.
    """

    name: str
    worst: int
    limit: int
    op: str = ""
    activation_max: int | None = None
    pairs: int = 0
    pairs_total: int = 0


@dataclass(frozen=True)
class Cpu:
    """A machine: its architecture, its brand, and those of REPORTED_FLAGS that it has."""

    arch: str
    brand: str
    flags: tuple[str, ...]

    @property
    def family(self) -> str | None:
        """Its name in calibrators.grid.processors; None where architecture or flags are not known."""
        if self.arch.startswith("ARM_8"):
            return "arm64"
        if self.arch != "X86_64" or not self.flags:
            return None
        if any(flag in self.flags for flag in EXACT_FLAGS):
            return "x86-vnni"
        return "x86-avx2" if "avx2" in self.flags else "x86-sse"

    @property
    def saturates(self) -> bool:
        """Whether its u8 x s8 kernels add pairs in int16, as AVX2 without VNNI does; older x86 and Arm are exact."""
        return self.family is not None and PROCESSORS[self.family].pair_sum is not None


@dataclass(frozen=True)
class Saturation:
    """Whether the file gives the same integers on CPUs without VNNI, and whether this is such a CPU.

    layers:  layers that can saturate.
    checked: number of layers with uint8 activations and int8 weights.
    """

    safe_without_vnni: bool
    affected_here: bool
    layers: tuple[SaturationRisk, ...]
    checked: int = 0


def saturation(model: Source, *, cpu: Cpu | None = None) -> Saturation:
    """Return the layers of a QDQ model that can saturate without VNNI; `cpu` is this machine's if None."""
    risks, checked = layers_at_risk(model)
    return Saturation(not risks, bool(risks) and (cpu or this_cpu()).saturates, risks, checked)


def layers_at_risk(model: Source) -> tuple[tuple[SaturationRisk, ...], int]:
    """Return the layers that can saturate without VNNI, and the number of layers that were checked."""
    risks, checked = [], 0
    for found in products(Model.of(model).graph_model.graph):
        if matrices := _matrices(found):  # copies of the weights: one layer at a time
            checked += 1
            risks += [risk] if (risk := _risk(found, matrices)) is not None else []
    return tuple(risks), checked


def needs_unsigned(found: Product) -> bool:
    """Return whether a product with UINT8 weights could saturate without VNNI if they were stored as INT8."""
    codes, zero_point = found.weight.data, found.weight.zero_point
    if codes is None or zero_point is None or zero_point.size != 1:
        return False
    centred = np.subtract(codes, zero_point.reshape(()), dtype=np.int16, casting="unsafe")
    signed = replace(found.weight, data=centred, dtype=ir.DataType.INT8)
    product = replace(found, weight=signed)
    matrices = _matrices(product)
    return bool(matrices) and _risk(product, matrices) is not None


@functools.cache
def this_cpu() -> Cpu:
    """Return architecture and instruction sets of this machine, as far as the operating system reports them."""
    return cpu_from(cpuinfo.get_cpu_info())


def cpu_from(info: Mapping[str, Any]) -> Cpu:
    """Return the CPU that py-cpuinfo describes; underscores in flags are ignored, as systems place them differently."""
    present = {str(flag).replace("_", "").lower() for flag in info.get("flags", ())}
    flags = tuple(flag for flag in REPORTED_FLAGS if flag.replace("_", "") in present)
    return Cpu(str(info.get("arch", "unknown")), str(info.get("brand_raw", "unknown")), flags)


def blocks(matrix: Array) -> list[Array]:
    """Cut a matrix into groups of rows with about BLOCK numbers each."""
    return np.array_split(matrix, max(1, min(len(matrix), matrix.size // BLOCK)))


def pair_sums(weights: Array) -> tuple[Array, Array]:
    """Sum the positive and the negative parts of each pair (2k, 2k + 1).

    weights: [channels, reduction] integers of at most 16 bits.
    returns: two arrays [channels, ceil(reduction / 2)] int32.
    """
    padded = np.pad(weights.astype(np.int32), ((0, 0), (0, weights.shape[1] % 2)))
    even, odd = padded[:, ::2], padded[:, 1::2]
    return np.maximum(even, 0) + np.maximum(odd, 0), np.minimum(even, 0) + np.minimum(odd, 0)


def _matrices(found: Product) -> list[Array]:
    """Return the weights as [channels, reduction] in each layout; none if no sum can saturate."""
    node, weight = found.node, found.weight.data
    if weight is None or found.weight.dtype != ir.DataType.INT8 or found.x.dtype not in LOWEST:
        return []
    if node.op_type == "Conv" and weight.ndim > 1:
        if flag(node, "group") == weight.shape[0] > 1 and weight.shape[1] == 1:
            return []  # depthwise
        return [weight.reshape(len(weight), -1), np.moveaxis(weight, 1, -1).reshape(len(weight), -1)]
    if node.op_type == "Gemm" and flag(node, "transB"):
        return [weight]
    if weight.ndim < 2:
        return [weight.reshape(1, -1)]
    return [np.moveaxis(weight, -2, -1).reshape(-1, weight.shape[-2])]


def _risk(found: Product, matrices: list[Array]) -> SaturationRisk | None:
    highest = found.x.hi - LOWEST[found.x.dtype]
    risks = []
    for weights in matrices:
        worst = count = total = 0
        for block in blocks(weights):
            positive, negative = (highest * sums for sums in pair_sums(block))
            count += int(np.sum((positive > INT16_MAX) | (negative < INT16_MIN)))
            worst = int(max(worst, positive.max(initial=0), -negative.min(initial=0)))
            total += positive.size
        risks.append(SaturationRisk(where(found.node), worst, INT16_MAX, found.node.op_type, highest, count, total))
    worst_risk = max(risks, key=lambda risk: (risk.pairs, risk.worst))
    return worst_risk if worst_risk.pairs else None
