"""Execute the reference program as the integer kernels that onnxruntime fuses it into, or literally as QDQ.

`plan` decides which kernel computes each value; `run` executes the plan. One interpreter serves both ways: without
kernels it is QDQ.

Must not know: ONNX, sessions, how parameters were chosen, which kernels a runtime has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind
from calibrators.graph.operators import LISTS, MOVES, ON_FLOATS
from calibrators.graph.walk import call, walk
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE, dequantized, quantized
from runtime_tests.reference.kernel_plan import FLOAT, KernelPlan, plan, site_of
from runtime_tests.reference.kernel_rules import Kernel, source
from runtime_tests.reference.kernels import lookup
from runtime_tests.reference.ordered import CHOICES, gap, in_order, indices_of

__all__ = ["FLOAT", "KernelPlan", "choice_of", "floats_of", "gap_of", "plan", "rounded_in", "run"]

See = Callable[[str, Tensor], None]
"""A function that gets the name of a site and its dequantized codes."""

Disturb = Callable[[str, Tensor], Tensor]
"""A function that gets the name of a site and its codes, and returns those with which the run goes on."""


def floats_of(operator: str) -> str:
    """Return the key of the floats that an integer kernel writes; no site has such a name."""
    return f"floats of {operator}"


def rounded_in(site: str) -> str:
    """Return the key of the floats that a site rounds, where no integer kernel writes its codes."""
    return f"rounded in {site}"


def choice_of(operator: str) -> str:
    """Return the key of the indices that an operator of CHOICES gives; no site has such a name."""
    return f"choice of {operator}"


def gap_of(choice: str) -> str:
    """Return the key of how much worse the scores at forced indices are, for the key of the indices."""
    return f"gap of {choice}"


@dataclass(frozen=True, eq=False)
class _QuantizedTensor:
    """Codes in place of the floats of a dequantize node, which are computed only when they are read."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    site: str
    block_size: int | None

    @property
    def values(self) -> Tensor:
        return dequantized(self.codes, self.scale, self.zero_point, self.axis, self.site, self.block_size)

    @cached_property
    def table(self) -> Tensor | None:
        """The value of every code, [256]; None where it depends on more than an 8-bit code."""
        if self.axis is not None or self.codes.dtype.itemsize > 1:
            return None
        container = torch.iinfo(self.codes.dtype)
        every_code = torch.arange(container.min, container.max + 1, dtype=self.codes.dtype)
        return dequantized(every_code, self.scale, self.zero_point, None, self.site)


@dataclass(frozen=True, eq=False)
class _PointwiseResult:
    """The result of float operators that map every code to one float.

    table:  of the codes, float32 [256].
    floats: computes the floats themselves.
    """

    codes: Tensor
    table: Tensor
    floats: Callable[[], Tensor]

    @property
    def values(self) -> Tensor:
        return self.floats()


def run(
    plan: KernelPlan,
    inputs: Sequence[Tensor],
    forced: Mapping[str, Tensor] | None = None,
    see: See | None = None,
    disturb: Disturb | None = None,
    *,
    with_floats: bool = False,
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Return the codes of every site and the outputs of the program.

    forced:  codes by site that replace the computed ones downstream, once these are recorded. With the runtime's
             own codes, every site shows what its kernel computes from the inputs that the runtime had. Indices too, by
             `choice_of` the operator's name.
    see:     gets the floats of every dequantized site that no kernel covers.
    disturb: changes the codes of sites, once they are recorded.
    with_floats: also return the floats of integer kernels, by `floats_of` the operator's name, and those that sites
             without such a kernel round to other codes than the forced ones, by `rounded_in` the site.
    returns: codes in their container dtype by site name, and the outputs in order. With the codes are the indices of
             operators of CHOICES, by `choice_of` the operator's name; where they are forced, how much worse their
             scores are too, by `gap_of` that.
    """
    forced = forced or {}
    codes: dict[str, Tensor] = {}
    outputs: tuple[Tensor, ...] = ()
    with torch.no_grad(), _full_float32():
        steps = walk(plan.program, inputs, partial(_evaluate, plan, forced), skipped=plan.skipped, reads=plan.reads)
        for node, values in steps:
            if node.op == "output":
                outputs = tuple(map(_floats, values[node]))
            elif node.target is QUANTIZE:
                site = site_of(node)
                codes[site] = values[node]
                values[node] = forced.get(site, values[node])
                rounds = with_floats and plan.by_site[site].kernel == FLOAT
                if rounds and not torch.equal(values[node], codes[site]):
                    codes[rounded_in(site)] = _floats(values[source(node)])
                if disturb is not None:
                    values[node] = disturb(site, values[node])
            elif with_floats and node in plan.kernels:
                codes[floats_of(node.name)] = values[node]
            elif node.target in CHOICES:
                codes |= _choice(node, values, forced.get(choice_of(node.name)))
            elif see is not None and node.target is DEQUANTIZE:
                see(values[node].site, values[node].values)
    return codes, outputs


def _choice(node: fx.Node, values: Mapping[fx.Node, Any], forced: Tensor | None) -> dict[str, Tensor]:
    """Return the indices that an operator chose, and how much worse the scores at forced ones are."""
    found = {choice_of(node.name): indices_of(node, values[node])}
    if forced is not None:
        found[gap_of(choice_of(node.name))] = gap(node, _operands(node, values), forced)
    return found


def _evaluate(plan: KernelPlan, forced: Mapping[str, Tensor], node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.target in CHOICES:
        return in_order(node, _operands(node, values), forced.get(choice_of(node.name)))
    if node in plan.kernels:
        return _run_kernel(plan.kernels[node], values)
    if node.target is DEQUANTIZE:
        return _QuantizedTensor(*fx.map_arg(tuple(bind(node).values()), values.__getitem__))
    if node.target is QUANTIZE:
        return _quantize(fx.map_arg(bind(node), values.__getitem__))
    if node.target in MOVES and isinstance(values[source(node)], _QuantizedTensor):
        return _move_codes(node, values)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return _pointwise(node, values)
    return _call(node, values, {})


def _quantize(bound: Mapping[str, Any]) -> Tensor:
    """Quantize floats, or look up the codes of those that a pointwise operator makes of 8-bit codes."""
    x = bound["x"]
    if not isinstance(x, _PointwiseResult) or bound["axis"] is not None or bound["zero_point"].dtype.itemsize > 1:
        return quantized(**{**bound, "x": _floats(x)})
    return lookup(quantized(**{**bound, "x": x.table}), x.codes)


def _pointwise(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Run a pointwise operator: on all codes instead of all elements where the same codes are all that it reads."""
    operands = {source: values[source] for source in node.all_input_nodes}
    kinds = (_QuantizedTensor, _PointwiseResult)
    of_codes = all(isinstance(x, kinds) and x.table is not None for x in operands.values())
    if not operands or not of_codes or len({id(x.codes) for x in operands.values()}) > 1:
        return _call(node, values, {})
    table = call(node, {source: x.table for source, x in operands.items()})
    return _PointwiseResult(next(iter(operands.values())).codes, table, partial(_call, node, operands, {}))


def _move_codes(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """Move codes, or floats if the scale follows an axis that may move too."""
    coded: _QuantizedTensor = values[source(node)]
    if coded.axis is not None:
        return _call(node, values, {})
    moved = _moved(node, values, coded.codes)
    if node.target in LISTS:
        return [replace(coded, codes=part) for part in moved]
    return replace(coded, codes=moved)


def _run_kernel(kernel: Kernel, values: Mapping[fx.Node, Any]) -> Tensor:
    result = kernel.compute(*(values[node].codes for node in kernel.inputs))
    for move in kernel.moves:
        result = _moved(move, values, result)
    return result


def _moved(node: fx.Node, values: Mapping[fx.Node, Any], codes: Tensor) -> Any:
    """Move codes, as integer-valued floats if torch does not implement the operator on integers."""
    if node.target in ON_FLOATS:
        return _call(node, values, {source(node): codes.to(torch.float32)}).to(codes.dtype)
    return _call(node, values, {source(node): codes})


def _call(node: fx.Node, values: Mapping[fx.Node, Any], instead: Mapping[fx.Node, Tensor]) -> Any:
    """Run the operator itself on floats, with some operands replaced by those of `instead`."""
    return call(node, {**_operands(node, values), **instead})


def _operands(node: fx.Node, values: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    return {source: _floats(values.get(source)) for source in node.all_input_nodes}


def _floats(value: Any) -> Any:
    return value.values if isinstance(value, _QuantizedTensor | _PointwiseResult) else value


@contextmanager
def _full_float32() -> Iterator[None]:
    """Forbid products of reduced precision, whatever the caller chose, since integers in float32 need all 24 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
