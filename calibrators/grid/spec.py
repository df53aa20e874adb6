"""Frozen data that all other modules share: what a quantizer can represent, and the parameters chosen for it.

Must not know: graphs, ONNX, runtimes, methods.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["QParams", "QuantSpec", "QuantizedTensor", "Site"]


@dataclass(frozen=True)
class QuantSpec:
    """The integer grid of one tensor.

    bits:      width of the grid; codes below 8 bits are stored in an 8-bit container.
    signed:    two's complement codes, else unsigned.
    symmetric: zero_point is 0 (signed) and never searched.
    axis:      dimension that carries one scale per index, None for one scale per tensor.
    narrow:    the lowest signed code is not used, so that the grid is symmetric about 0.
    block_size: of matrices with axis 0: entries of a row under one scale, None for all of it; the last may have fewer.
    tap_bits:  of kernels with a folded identity branch: width of the codes on their middle diagonal, which have the
               scale and zero point of the others and lie within 2**(tap_bits - 1) - 1 of it. None: `bits`.
    """

    bits: int = 8
    signed: bool = False
    symmetric: bool = False
    axis: int | None = None
    narrow: bool = False
    block_size: int | None = None
    tap_bits: int | None = None

    @property
    def granularity(self) -> Literal["tensor", "channel", "block"]:
        """The part of the tensor that has one scale."""
        if self.block_size is not None:
            return "block"
        return "tensor" if self.axis is None else "channel"

    @property
    def qmin(self) -> int:
        return (-(1 << (self.bits - 1)) + int(self.narrow)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def is_wide(self) -> bool:
        """Whether the codes need 16 bits, which no integer kernel reads or writes."""
        return 8 < self.bits <= 16

    @property
    def dtype(self) -> torch.dtype:
        """Container of the codes: uint8, int8, uint16, int16 or int32."""
        import torch

        if self.is_wide:
            return torch.int16 if self.signed else torch.uint16
        if self.bits > 8:
            return torch.int32
        return torch.int8 if self.signed else torch.uint8


@dataclass(frozen=True, eq=False)
class QParams:
    """Chosen parameters of one quantizer.

    scale:      float32, [], [channels] along spec.axis or [channels, blocks]; strictly positive and finite.
    zero_point: int32, same shape as scale.
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def to(self, device: torch.device | str) -> QParams:
        """Return the parameters on `device`."""
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device))


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Integer codes with the parameters that give them meaning."""

    codes: Tensor
    qparams: QParams


@dataclass(frozen=True)
class Site:
    """One quantizer on one edge of the graph.

    name:      readable and unique; the codes are called f"{name}_quantized" in the file.
    kind:      "activation", "constant" (an operand on the grid of activations), "weight" or "bias".
    node:      fx name of the value: the node that makes the activation, or the get_attr of the constant.
    users:     fx names of the nodes that read the dequantized value; other readers see the float value.
    spec:      the grid.
    shares:    name of the site whose scale and zero point this one has; None for its own.
    joined:    its own kernel writes it on the scale of `shares`, because a maximum or minimum compares their codes.
    factor:    its scale is that of `shares` times this number; it has the same codes.
    fixed:     (scale, zero_point) where the operator or the constant decides the range.
    clip:      bounds of a ReLU or clip that the saturation of the codes performs, or of the values of a constant; None
               where there is none.
    method:    name of the range method that a rule asks for; None leaves it to the calibration.
    of_codes:  the value is computed on integers from the codes of its operands: by that clip, or by the operator.
    weight_only: of a weight: its layer reads float activations and computes in float.
    unsigned:  of a weight: the file holds it as uint8 codes with zero point 128, whose products kernels add in 32 bits
               on every processor.
    """

    name: str
    kind: Literal["activation", "constant", "weight", "bias"]
    node: str
    users: tuple[str, ...]
    spec: QuantSpec
    shares: str | None = None
    joined: bool = False
    factor: float = 1.0
    fixed: tuple[float, int] | None = None
    clip: tuple[float, float] | None = None
    method: str | None = None
    of_codes: bool = False
    weight_only: bool = False
    unsigned: bool = False
