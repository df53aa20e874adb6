"""The ATen operators that the project knows, in one table; every other module reads the columns that it needs.

A row holds what is true on every target; which operators have integer kernels is in calibrators.targets. Operators go
by name ("conv2d.default"), so that the table can be read without torch.

Must not know: torch, targets, runtimes, quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

__all__ = [
    "ALIASES",
    "CONVOLUTIONS",
    "DROPOUTS",
    "HOMOGENEOUS",
    "LISTS",
    "MOVES",
    "NORMS",
    "ON_FLOATS",
    "PADDED_BY_NAME",
    "PADS",
    "POOLS",
    "PRODUCTS",
    "QUOTIENTS",
    "REVERSED",
    "SUMS",
    "TRANSPOSED",
    "WEIGHTED",
    "Operator",
    "Operators",
    "facts",
    "name_of",
]


@dataclass(frozen=True)
class Operator:
    """The properties of one operator that hold on every runtime.

    kind:        "convolution", "transposed" (convolution) and "linear" carry a weight; "pool" averages windows; "sum",
                 "product" and "quotient" combine two operands; "pad" adds values at the borders; "norm" divides by
                 the size of its input; "dropout" returns its input outside training.
    spatial:     spatial dimensions of a convolution or pool.
    by_name:     its padding is "same" or "valid".
    reversed:    it subtracts the first operand from the second.
    onnx:        its ONNX operator, if it moves values: every value of the result is one of the first operand,
                 so that it gives the same on codes.
    is_list:     the result is a list of tensors.
    homogeneous: f(a x) = a f(x) for a > 0, whatever its arguments.
    on_integers: torch implements it for integers (max_pool2d of uint8 not for images of 128 pixels with channels last).
    """

    kind: str = ""
    spatial: int = 0
    by_name: bool = False
    reversed: bool = False
    onnx: str = ""
    is_list: bool = False
    homogeneous: bool = False
    on_integers: bool = True


def _rows(names: str, **columns: Any) -> dict[str, Operator]:
    return dict.fromkeys(names.split(), Operator(**columns))


OPERATORS: dict[str, Operator] = {
    # carry a weight
    **_rows("conv1d.default", kind="convolution", spatial=1),
    **_rows("conv2d.default", kind="convolution", spatial=2),
    **_rows("conv3d.default", kind="convolution", spatial=3),
    **_rows("conv1d.padding", kind="convolution", spatial=1, by_name=True),
    **_rows("conv2d.padding", kind="convolution", spatial=2, by_name=True),
    **_rows("conv3d.padding", kind="convolution", spatial=3, by_name=True),
    **_rows("conv_transpose1d.default", kind="transposed", spatial=1),
    **_rows("conv_transpose2d.input", kind="transposed", spatial=2),
    **_rows("conv_transpose3d.input", kind="transposed", spatial=3),
    **_rows("linear.default", kind="linear"),
    # move values
    **_rows("view.default reshape.default flatten.using_ints", onnx="Reshape", homogeneous=True),
    **_rows("permute.default transpose.int", onnx="Transpose", homogeneous=True),
    **_rows("squeeze.dim squeeze.dims", onnx="Squeeze", homogeneous=True),
    **_rows("unsqueeze.default", onnx="Unsqueeze", homogeneous=True),
    **_rows("slice.Tensor flip.default", onnx="Slice", homogeneous=True),
    **_rows("clone.default contiguous.default", onnx="Identity", homogeneous=True),
    **_rows("max_pool1d.default", onnx="MaxPool", homogeneous=True, on_integers=False),
    **_rows("max_pool2d.default", onnx="MaxPool", homogeneous=True, on_integers=False),
    **_rows("max_pool3d.default", onnx="MaxPool", homogeneous=True, on_integers=False),
    **_rows("amax.default", onnx="ReduceMax", homogeneous=True),
    **_rows("amin.default", onnx="ReduceMin", homogeneous=True),
    **_rows("upsample_nearest2d.vec", onnx="Resize", homogeneous=True, on_integers=False),
    **_rows("pixel_shuffle.default", onnx="DepthToSpace"),
    **_rows("getitem", onnx="Split"),
    **_rows("split.Tensor split_with_sizes.default chunk.default unbind.int", onnx="Split", is_list=True),
    # pad
    **_rows("pad.default constant_pad_nd.default", kind="pad"),
    # average, or keep the sign of a value
    **_rows("avg_pool1d.default", kind="pool", spatial=1, homogeneous=True),
    **_rows("avg_pool2d.default", kind="pool", spatial=2, homogeneous=True),
    **_rows("avg_pool3d.default", kind="pool", spatial=3),
    **_rows("adaptive_avg_pool1d.default adaptive_avg_pool2d.default mean.dim", homogeneous=True),
    **_rows("upsample_bilinear2d.vec leaky_relu.default", homogeneous=True),
    # combine two operands
    **_rows("add.Tensor add.Scalar sub.Tensor sub.Scalar", kind="sum"),
    **_rows("rsub.Tensor rsub.Scalar", kind="sum", reversed=True),
    **_rows("mul.Tensor mul.Scalar", kind="product"),
    **_rows("div.Tensor div.Scalar", kind="quotient"),
    # divide by the size of their input
    **_rows("layer_norm.default rms_norm.default", kind="norm"),
    # act in training alone
    **_rows("dropout.default feature_dropout.default", kind="dropout"),
    **_rows("alpha_dropout.default feature_alpha_dropout.default", kind="dropout"),
}

ALIASES = {
    **dict.fromkeys(("concat.default", "concatenate.default"), "cat.default"),
    **{f"unsafe_{name}": name for name in ("split.Tensor", "split_with_sizes.default", "chunk.default")},
    "split.sizes": "split_with_sizes.default",
    "broadcast_to.default": "expand.default",
    **{f"multiply.{form}": f"mul.{form}" for form in ("Tensor", "Scalar")},
    **{f"subtract.{form}": f"sub.{form}" for form in ("Tensor", "Scalar")},
    **{f"{name}.{form}": f"div.{form}" for name in ("divide", "true_divide") for form in ("Tensor", "Scalar")},
    **{f"clip.{form}": f"clamp.{form}" for form in ("default", "Tensor")},
    **dict.fromkeys(("linalg_matmul.default", "mv.default", "dot.default", "vdot.default"), "matmul.default"),
    "special_expit.default": "sigmoid.default",
    "special_softmax.default": "softmax.int",
    "absolute.default": "abs.default",
    "max.other": "maximum.default",
    "min.other": "minimum.default",
    "negative.default": "neg.default",
}
"""Other names of operators that take the same arguments in the same order and compute the same."""


def name_of(target: object) -> str:
    """Return the name by which the table knows the target of a call: "conv2d.default" for aten.conv2d.default."""
    return str(getattr(target, "__name__", target))


def facts(target: object) -> Operator:
    """Return the row of the target of a call; an empty one for operators that are not in the table."""
    return OPERATORS.get(name_of(target), Operator())


class Operators(frozenset[str]):
    """Names such as "conv2d.default"; `node.target in operators` holds for the overload of that name."""

    def __new__(cls, *names: str) -> Operators:
        return super().__new__(cls, names)

    def __contains__(self, operator: object) -> bool:
        return super().__contains__(name_of(operator))

    def __or__(self, other: Iterable[str]) -> Operators:  # type: ignore[override]
        return Operators(*self, *other)

    def __sub__(self, other: Iterable[str]) -> Operators:  # type: ignore[override]
        return Operators(*(name for name in self if name not in frozenset(other)))


def _where(holds: Callable[[Operator], object]) -> Operators:
    return Operators(*(name for name, row in OPERATORS.items() if holds(row)))


CONVOLUTIONS = _where(lambda row: row.kind == "convolution")
PADDED_BY_NAME = _where(lambda row: row.by_name)
TRANSPOSED = _where(lambda row: row.kind == "transposed")
WEIGHTED = CONVOLUTIONS | TRANSPOSED | _where(lambda row: row.kind == "linear")
POOLS = _where(lambda row: row.kind == "pool")
PADS = _where(lambda row: row.kind == "pad")
DROPOUTS = _where(lambda row: row.kind == "dropout")
SUMS = _where(lambda row: row.kind == "sum")
REVERSED = _where(lambda row: row.reversed)
PRODUCTS = _where(lambda row: row.kind == "product")
QUOTIENTS = _where(lambda row: row.kind == "quotient")
MOVES = _where(lambda row: row.onnx)
NORMS = _where(lambda row: row.kind == "norm")
LISTS = _where(lambda row: row.is_list)
HOMOGENEOUS = _where(lambda row: row.homogeneous)
ON_FLOATS = _where(lambda row: not row.on_integers)
