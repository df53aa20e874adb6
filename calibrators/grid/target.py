"""Describe an integer runtime as data: grids, operators, forms and limits, checked when it is constructed.

Placement, the reference program, emission, the plan of kernels and the linter read it. What is true on every runtime is
in calibrators.graph.operators.

Must not know: graphs, ONNX, how a runtime is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from calibrators.graph.operators import Operators
from calibrators.grid.costs import Costs
from calibrators.grid.processors import FAMILIES, PROCESSORS, REFERENCE
from calibrators.grid.spec import QuantSpec

__all__ = ["Form", "Target"]

SETTLED_BY_PLACEMENT = frozenset(
    {
        *("name", "summary", "runtime", "min_version", "proof", "proved_in", "opsets", "static_shapes"),
        *("ignored_rules", "wide_activation", "widths", "coded_tables", "packed_weights", "weighted_to_codes"),
        *("weighted_to_either", "weighted_to_float", "weight_only", "fused_ops", "forms", "on_codes_ops"),
        *("joined_ops", "constant_operands", "fixed_outputs", "costs", "free_factors", "lowered_file"),
    }
)
"""Fields that methods and reference programs do not read: what they decide about a network is in its placement."""

Form = Literal["tensors", "unscaled", "to-one-pixel", "images", "whole-windows", "own-divisor"]
"""A condition under which an operator has an integer kernel; calibrators.placement.kernel_forms holds their checks."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(arbitrary_types_allowed=True, extra="forbid", strict=True))
class Target:
    """One integer runtime. Data only; operators go by ATen name.

    The runtime
    runtime:           its name, and the oldest release that loads the files (min_version).
    exact_on:          families of processors (calibrators.grid.processors) on which onnxruntime computes the same
                       integers from its files.
    proof:             what is proved about a file: "exact", that the runtime computes the integers of the reference;
                       "steps", that no kernel is more than one step off, at a stated rate; "qdq", that onnxruntime
                       computes what the QDQ text says without integer kernels, since the runtime cannot be had here.
    proved_in:         name of the runtime (runtime_tests.runtimes) that executes its files besides this process's
                       onnxruntime; '' where there is none.
    lowered_file:      name of the file that this runtime makes of the program and executes; '' where it executes
                       model.onnx.
    arithmetic:        family with whose arithmetic this runtime executes it.
    opsets:            ONNX opset of emitted files, and the highest one, for files that need more than the first.
    static_shapes:     whether the batch must be fixed (to 1).
    ignored_rules:     rules of the linter about patterns that this runtime does not break on.

    The grids
    activation:        of activations; its type is the only one that integer kernels read and write.
    wide_activation:   16-bit grid for activations of single layers; operators that write or read it compute in float.
    widths:            bits that activations may have.
    weight, bias:      of constants. The scale of a bias is float32(scale of the input * scale of the weight).
    float_bias:        whether the file holds the values of a bias instead of its codes.
    coded_tables:      whether the tables of embeddings are stored as codes of 8 bits.
    packed_weights:    whether the file may hold weights in types of fewer than 8 bits.

    The operators
    weighted_to_codes: with a constant weight, whose integer kernel writes codes only: their output is quantized.
    weighted_to_either: with a constant weight, whose integer kernel writes codes where they are read, else floats.
    weighted_to_float: with a constant weight, whose integer kernel may write floats.
    weight_only:       with a kernel that reads codes of the weight alone, and computes in float.
    integer_ops:       with an integer kernel if every input and the output are quantized: placement sees to that.
    fused_ops:         that become integer kernels likewise, but only where codes stand around them anyway.
    forms:             conditions under which operators of integer_ops and fused_ops have that kernel.
    same_scale_ops:    that move codes around unchanged: output and input share scale and zero point.
    on_codes_ops:      that move codes likewise, but only if the file applies them to the codes themselves.
    joined_ops:        operators of integer_ops whose operands and result have one scale.
    constant_operands: operators of integer_ops whose second operand may be a constant, stored as codes.
    fixed_outputs:     whose output range is known: (scale, zero_point).
    costs:             of operators, by ATen name or kind of convolution, by which `placement = fastest` decides; empty
                       where nothing was measured.

    The forms of programs
    clips_codes:       the runtime clips codes. If not, ReLUs and clips stay operators on floats, and a grid fills its
                       container.
    fuses_clips:       a clip with another lower bound than 0 may stand between a kernel and its quantizer. If not, it
                       stands between two quantizers, as a maximum and a minimum.
    drops_clips:       the runtime removes a ReLU or clip that the saturation at the ends of the container performs.
                       If not, programs leave it out.
    free_factors:      a dequantizer may read codes with another scale than that of their quantizer, so that the product
                       with a positive number costs nothing.
    shields_floats:    a clip at the bounds of the grid stands between codes and a layer with float weights, which the
                       runtime would quantize by itself.
    """

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    summary: str
    runtime: str
    min_version: Annotated[str, Field(pattern=r"^\d+(\.\d+)*$")]
    exact_on: Annotated[tuple[str, ...], Field(min_length=1)]
    proof: Literal["exact", "steps", "qdq"] = "exact"
    proved_in: str = ""
    lowered_file: str = ""
    arithmetic: str = REFERENCE
    opsets: tuple[int, int]
    static_shapes: bool = False
    ignored_rules: frozenset[str] = frozenset()
    activation: QuantSpec
    wide_activation: QuantSpec
    widths: tuple[int, ...] = (*range(2, 9), 16)
    weight: QuantSpec
    bias: QuantSpec
    float_bias: bool = False
    coded_tables: bool = True
    packed_weights: bool = True
    weighted_to_codes: Operators
    weighted_to_either: Operators = Operators()
    weighted_to_float: Operators
    weight_only: Operators
    integer_ops: Operators
    fused_ops: Operators
    forms: Mapping[str, tuple[Form, ...]]
    same_scale_ops: Operators
    on_codes_ops: Operators
    joined_ops: Operators = Operators()
    constant_operands: Operators
    fixed_outputs: Mapping[str, tuple[float, int]]
    costs: Mapping[str, Costs]
    clips_codes: bool = True
    fuses_clips: bool = True
    drops_clips: bool
    free_factors: bool
    shields_floats: bool

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Target:
        """Raise ValueError for names that are not known, or fields that contradict each other."""
        unknown = [name for name in (*self.exact_on, self.arithmetic) if name not in FAMILIES]
        contradictions = (
            (bool(unknown), f"unknown processors {unknown}; known are {', '.join(FAMILIES)}"),
            (self.opsets[0] > self.opsets[1], f"opsets {self.opsets} are in the wrong order"),
            (
                not self.forms.keys() <= self.integer_ops | self.fused_ops,
                "forms belong to operators of integer_ops and fused_ops",
            ),
            (not self.joined_ops <= self.integer_ops, "operators of joined_ops are in integer_ops"),
            (self.proof == "steps" and not self.proved_in, "a runtime counts the steps, so that proved_in names it"),
            (
                bool(self.lowered_file) and not self.proved_in,
                "a runtime makes the lowered file, so that proved_in names it",
            ),
            (not self.weight_only <= self.weighted, "operators of weight_only carry a weight"),
            (bool(self.integer_ops & self.weighted), "an operator of integer_ops carries no weight"),
            (not self.constant_operands <= self.integer_ops, "operators of constant_operands are in integer_ops"),
        )
        for applies, reason in contradictions:
            if applies:
                raise ValueError(f"target {self.name!r}: {reason}")
        return self

    @property
    def weighted(self) -> Operators:
        """Operators with a constant weight and an integer kernel."""
        return self.weighted_to_codes | self.weighted_to_either | self.weighted_to_float

    @property
    def kernels(self) -> Operators:
        """Every operator that the runtime can run on codes."""
        return self.weighted | self.integer_ops | self.fused_ops | self.same_scale_ops

    @property
    def computation(self) -> dict[str, object]:
        """The fields that a calibration reads beside the placement of the network, by name."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in SETTLED_BY_PLACEMENT}

    @property
    def rounding_alike(self) -> tuple[str, ...]:
        """Families of exact_on on which the same file computes the same integers, so that no tie may part them."""
        return tuple(name for name in self.exact_on if name == REFERENCE or name != self.arithmetic)

    @property
    def promise(self) -> str:
        """Where its files compute the integers of the reference, or how closely, in a few words."""
        if self.proof == "exact":
            everywhere = {*self.exact_on} == {*PROCESSORS}
            return f"exact on {'every processor' if everywhere else ', '.join(self.exact_on)}"
        return f"at most one step off in {self.proved_in}" if self.proof == "steps" else "not proved on the device"

    @property
    def pair_sum(self) -> int | None:
        """Largest magnitude of the sum of two products that all its processors hold; None where they hold every sum."""
        return min((held for name in self.exact_on if (held := FAMILIES[name].pair_sum) is not None), default=None)
