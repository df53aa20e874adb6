"""The reference program: the graph with explicit quantize and dequantize operators, one step before ONNX.

Emission translates it operator by operator; `runtime_tests.reference.execute` executes it as the runtime's integer
kernels; called as a module it executes as QDQ: float arithmetic between dequantize and quantize.

Form of a program (a flat `GraphModule`, see calibrators.graph.aten):
- an activation site is `dequantize(quantize(x, ...), ...)`; scale and zero_point are get_attr buffers, float32 [] and
  uint8 [] (int16 for wide grids); [qmin, qmax] of quantize may be narrower than the container;
- the product of a quantized value and a positive number is `dequantize` of its codes with another scale;
- the constant operand of a sum or product is `dequantize` of a get_attr uint8 buffer;
- a ReLU or clip of the floats that an integer product writes is a maximum and a minimum with get_attr numbers;
- a ReLU or clip of a value that is quantized already is `dequantize(clamp(codes, lo, hi), ...)` on the codes, and
  padding it with zeros `dequantize(constant_pad_nd(codes, widths, zero_point), ...)`; a maximum or minimum likewise
  compares codes of one scale;
- a weight is `dequantize` of a get_attr int8 buffer with zero_point 0, with scales along `axis`: the buffer of an
  asymmetric grid holds code - zero_point, which is the same number and the form that fast integer kernels take; an
  unsigned site's buffer and zero_point are uint8 and 128 more;
- the weight of a weight-only layer keeps codes and zero points, since both are stored in few bits; its scales may
  belong to blocks of `block_size` entries of a row; its bias stays a float buffer;
- an embedding is the product of the codes and of the scales that it looks up in a table of int8 rows, which may be the
  weight of a layer;
- a bias is `dequantize` of a get_attr int32 buffer whose scale is f32(x_scale * weight_scale), or a float buffer of
  these values where the target reads floats;
- `program.meta["names"]` maps buffer names to readable ones for the file.

Must not know: ONNX, runtimes, how the parameters were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import add_constant, bind, constant, copy_graph, infer_shapes, is_constant, replace_args
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.elementwise import restore_activations
from calibrators.graph.operators import WEIGHTED
from calibrators.graph.rewrite import call_before, constant_before, origin, replace_by
from calibrators.grid.numerics import along_axis, as_codes, dequantize, grid_of, quantize, round_codes, values_of
from calibrators.grid.spec import QParams, QuantizedTensor, Site
from calibrators.placement.place import Placement

__all__ = [
    "DEQUANTIZE",
    "QUANTIZE",
    "build_program",
    "code_bounds",
    "dequantized",
    "is_saturation",
    "quantized",
    "table_rows",
]

aten = torch.ops.aten

UNSIGNED_ZERO = 128
"""Zero point of weights stored as uint8."""
ROW_LIMIT = 127
"""Largest code of a table of which no layer shares the codes."""
CLIP_TOLERANCE = torch.finfo(torch.float32).eps
"""Distance between the bound of a clip and the end of a grid within which onnxruntime takes them for equal."""
INT32_END = 2.0**31
FLOAT_PRODUCTS = (aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default)
"""Products whose integer kernels may write floats."""


def quantized(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, site: str
) -> Tensor:
    """Return the codes of floats in the dtype of the zero point: the operator QUANTIZE, without its dispatcher."""
    scale_b, zero_point_b = along_axis(scale, x, axis), along_axis(zero_point, x, axis)
    return as_codes(round_codes(x, scale_b, zero_point_b, qmin, qmax), zero_point.dtype)


_quantize = torch.library.custom_op("intact::quantize", quantized, mutates_args=())


@_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, axis: int | None, site: str) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


def dequantized(
    codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, site: str, block_size: int | None = None
) -> Tensor:
    """Return the float32 values of codes: the operator DEQUANTIZE, without its dispatcher."""
    scale_b, zero_point_b = (along_axis(values, codes, axis, block_size) for values in (scale, zero_point))
    return values_of(codes, scale_b, zero_point_b)


_dequantize = torch.library.custom_op("intact::dequantize", dequantized, mutates_args=())


@_dequantize.register_fake
def _(
    codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None, site: str, block_size: int | None = None
) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


QUANTIZE = torch.ops.intact.quantize.default
DEQUANTIZE = torch.ops.intact.dequantize.default


def build_program(
    placement: Placement,
    qparams_of: Callable[[Site], QParams],
    weights: Mapping[str, QuantizedTensor],
    biases: Mapping[str, QuantizedTensor],
) -> fx.GraphModule:
    """Return the placed graph with explicit quantize and dequantize operators, in the form described above.

    Node names of the placed graph are kept, so that the two can be compared value by value.
    """
    builder = _Builder(placement, qparams_of)
    for site in placement.sites:
        if site.kind == "activation":
            builder.activation(site)
        elif site.kind == "constant":
            builder.operand(site)
        else:
            builder.constant(site, (weights if site.kind == "weight" else biases)[site.name])
    for name in placement.lookups:
        builder.lookup(builder.nodes[name])
    return builder.finish()


class _Builder:
    """Edits a copy of the placed graph, one site at a time."""

    def __init__(self, placement: Placement, qparams_of: Callable[[Site], QParams]) -> None:
        self.placement, self.qparams_of = placement, qparams_of
        self.program = copy_graph(placement.graph)
        self.graph = self.program.graph
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.names: dict[str, str] = {}
        self.operands = {name: [x.name for x in node.all_input_nodes] for name, node in placement.nodes.items()}
        self.codes: dict[str, fx.Node] = {}  # codes of each activation site
        self.parameters: dict[str, tuple[str, str]] = {}  # buffers of each site that owns its scale
        self.rows: dict[str, tuple[str, str]] = {}  # codes of 8 bits and scales of rows, by the float constant
        self.weight_only = {user for site in placement.sites if site.weight_only for user in site.users}

    def _buffer(self, readable: str, value: Tensor, *, shared: bool = False) -> str:
        name = add_constant(self.program, readable, value, shared=shared)
        self.names[name] = readable
        return name

    def _scale_and_zero_point(self, site: Site, qparams: QParams) -> tuple[fx.Node, fx.Node]:
        owner = self.placement.root(site) if site.factor == 1 else site
        if owner.name not in self.parameters:
            zero_point = qparams.zero_point.to(owner.spec.dtype)
            scale_name = self._buffer(f"{owner.name}_scale", qparams.scale)
            self.parameters[owner.name] = scale_name, self._buffer(f"{owner.name}_zero_point", zero_point)
        scale, zero_point_name = self.parameters[owner.name]
        return self.graph.get_attr(scale), self.graph.get_attr(zero_point_name)

    def activation(self, site: Site) -> None:
        """Insert quantize and dequantize after a value, for the readers that the site names."""
        node, qparams = self.nodes[site.node], self.qparams_of(site)
        readers = [user for user in node.users if user.name in set(site.users)]
        clips_codes = self.placement.target.clips_codes
        lo, hi = code_bounds(site, qparams) if clips_codes else (site.spec.qmin, site.spec.qmax)
        before = node
        if site.clip is not None and not site.of_codes and clips_codes:
            before = self._source_of_clip(node, site, qparams, readers)
        with self.graph.inserting_after(node):
            anchor = self.graph.call_function(aten.alias.default, (node,))  # keeps the insertion order below simple
        with self.graph.inserting_before(anchor):
            scale, zero_point = self._scale_and_zero_point(site, qparams)
            if site.of_codes:
                codes = self.codes[site.shares or ""]
                if site.factor == 1:
                    codes = self._on_codes(node, qparams, (lo, hi))
            else:
                codes = self.graph.call_function(QUANTIZE, (before, scale, zero_point, lo, hi, None, site.name))
            value = self.graph.call_function(DEQUANTIZE, (codes, scale, zero_point, None, site.name))
        self.graph.erase_node(anchor)
        for made in (codes, value) if site.factor == 1 else (value,):
            made.meta = origin(node)
        self.codes[site.name] = codes
        for user in readers:
            user.replace_input_with(node, value)

    def _on_codes(self, node: fx.Node, qparams: QParams, bounds: tuple[int, int]) -> fx.Node:
        """Insert the operator that does to codes what `node` does to values."""
        operands = [self.codes[self.placement.activation_of[x].name] for x in self.operands[node.name]]
        if node.target is aten.constant_pad_nd.default:
            return self.graph.call_function(node.target, (*operands, node.args[1], int(qparams.zero_point)))
        if clip_bounds(node) is not None:
            return self.graph.call_function(aten.clamp.default, (*operands, *bounds))
        target: Any = node.target
        return self.graph.call_function(target, (*operands, *node.args[len(operands) :]))

    def _source_of_clip(self, node: fx.Node, site: Site, qparams: QParams, readers: list[fx.Node]) -> fx.Node:
        """Return what the quantizer reads.

        That is the ReLU or clip itself if the runtime removes it, because saturation at the ends of the container
        equals it, or if it runs in float anyway; else its input, because the integer bounds do its work.
        """
        assert site.clip is not None
        container = torch.iinfo(site.spec.dtype)
        saturates = is_saturation(site.clip, qparams.scale, qparams.zero_point, (container.min, container.max))
        is_dropped = saturates and self.placement.target.drops_clips
        if site.spec.is_wide or is_dropped or len(readers) != len(node.users):
            return node
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return source

    def operand(self, site: Site) -> None:
        """Replace a constant operand by dequantize of its codes."""
        node, qparams = self.nodes[site.node], self.qparams_of(site)
        codes = quantize(self.placement.values(site), qparams)
        for user in map(self.nodes.__getitem__, site.users):
            with self.graph.inserting_before(user):
                buffer = self.graph.get_attr(self._buffer(f"{site.name}_quantized", codes))
                parameters = self._scale_and_zero_point(site, qparams)
                value = self.graph.call_function(DEQUANTIZE, (buffer, *parameters, None, site.name))
            value.meta = origin(user)
            user.replace_input_with(node, value)

    def constant(self, site: Site, coded: QuantizedTensor) -> None:
        """Replace a weight or bias by dequantize of its codes, moved to the zero point 0 or 128 for integer kernels.

        Below 8 bits |code - zero_point| is at most 127; 8 bits are symmetric. A bias that the target reads as floats is
        replaced by the values of its codes.
        """
        qparams, codes = coded.qparams, coded.codes
        if site.kind == "bias" and self.placement.target.float_bias:
            values = self._buffer(f"{site.name}_values", dequantize(codes, qparams))
            for user in map(self.nodes.__getitem__, site.users):
                with self.graph.inserting_before(user):
                    replace_args(user, bias=self.graph.get_attr(values))
            return
        zero_point = qparams.zero_point.to(site.spec.dtype)
        if not site.weight_only:
            dtype, zero = (torch.uint8, UNSIGNED_ZERO) if site.unsigned else (site.spec.dtype, 0)
            if codes.dtype != dtype or bool((zero_point != zero).any()):
                codes = (codes.to(torch.int32) - grid_of(codes, qparams)[1] + zero).to(dtype)
            zero_point = torch.full_like(zero_point, zero, dtype=dtype)
        buffers = [
            self._buffer(f"{site.name}_quantized", codes, shared=True),
            self._buffer(f"{site.name}_scale", qparams.scale),
            self._buffer(f"{site.name}_zero_point", zero_point),
        ]
        if codes.dtype == torch.int8 and site.spec.bits == 8 and codes.ndim == 2 and not site.weight_only:
            self.rows[str(self.nodes[site.node].target)] = self._rows(
                site.name, buffers[0], qparams.scale.expand(len(codes))
            )
        for user in map(self.nodes.__getitem__, site.users):
            with self.graph.inserting_before(user):
                constants = tuple(self.graph.get_attr(name) for name in buffers)
                axis = None if qparams.scale.ndim == 0 else 0
                block = () if site.spec.block_size is None else (site.spec.block_size,)
                value = self.graph.call_function(DEQUANTIZE, (*constants, axis, site.name, *block))
            value.meta = origin(user)
            replace_args(user, **{"weight" if site.kind == "weight" else "bias": value})

    def _rows(self, name: str, codes: str, scale: Tensor) -> tuple[str, str]:
        """Return the buffers of codes [rows, columns] and of their scales as a column, which lookups can read."""
        return codes, self._buffer(f"{name}_row_scale", scale[:, None].contiguous())

    def lookup(self, node: fx.Node) -> None:
        """Look codes and scales of rows up instead of floats: those of the layer that shares the table, or its own.

        The products of codes and scales are the numbers that a dequantizer gives.
        """
        table, indices = node.args[:2]
        assert is_constant(table)
        target = str(table.target)
        if target not in self.rows:
            rounded, scale = table_rows(constant(self.program, table))
            self.rows[target] = self._rows(target, self._buffer(f"{target}_quantized", rounded), scale)
        with self.graph.inserting_before(node):
            codes, scales = (
                self.graph.call_function(aten.embedding.default, (self.graph.get_attr(name), indices))
                for name in self.rows[target]
            )
            numbers = self.graph.call_function(aten._to_copy.default, (codes,), {"dtype": torch.float32})
            value = self.graph.call_function(aten.mul.Tensor, (numbers, scales))
        for made in (codes, scales, numbers, value):
            made.meta = origin(node)
        replace_by(node, value)

    def _shield(self, node: fx.Node) -> None:
        """Shield an operator that stays in float, or of which only the weight is quantized, from codes before it.

        Runtimes may quantize float weights by themselves where codes stand directly before and after the operator; a
        clip at the bounds of the grid changes no value and hides the codes from them.
        """
        weight, source = bind(node)["weight"], node.args[0]
        coded = self._before_moves(source)
        in_integers = weight.target is DEQUANTIZE and node.name not in self.weight_only
        if in_integers or coded.target is not DEQUANTIZE:
            return
        assert isinstance(source, fx.Node)
        step, zero = (constant(self.program, node) for node in coded.args[1:3] if is_constant(node))
        grid = torch.iinfo(zero.dtype)
        lo, hi = ((torch.tensor(code) - zero.to(torch.int32)).float() * step for code in (grid.min, grid.max))
        with self.graph.inserting_before(node):
            clipped = self.graph.call_function(aten.clamp.default, (source, float(lo), float(hi)))
        clipped.meta = dict(source.meta)
        node.replace_input_with(source, clipped)

    def _spell_clip(self, node: fx.Node) -> None:
        """Write a clip of the floats of an integer product as a maximum and a minimum, and one between two quantizers.

        onnxruntime keeps a product in float if a ReLU or Clip is its only reader and has one reader itself that is not
        a quantizer. How many there are depends on what its optimizer merges. The HTP skips a clip of the codes of a
        layer if one of the bounds is at the end of their grid or beyond.
        """
        if (bounds := clip_bounds(node)) is None:
            return
        value: Any = node.args[0]
        if value.target in FLOAT_PRODUCTS:
            is_integer = all(self._before_moves(x).target is DEQUANTIZE for x in value.args[:2])
            is_spelled = is_integer and any(user.target is not QUANTIZE for user in node.users)
        else:
            stands_alone = not self.placement.target.fuses_clips and value.target is DEQUANTIZE
            is_spelled = stands_alone and bounds != (0, math.inf)
        if is_spelled:
            limits = zip((aten.maximum.default, aten.minimum.default), bounds, strict=True)
            for target, bound in ((target, bound) for target, bound in limits if math.isfinite(bound)):
                limit = constant_before(node, f"{node.name}_bound", torch.tensor(bound))
                value = call_before(node, target, value, limit)
            replace_by(node, value)

    def _before_moves(self, value: Any) -> fx.Node:
        """Return the node that computes a value before moves, through which runtimes move quantizers."""
        while value.target in self.placement.target.same_scale_ops:
            value = value.args[0]
        assert isinstance(value, fx.Node)
        return value

    def finish(self) -> fx.GraphModule:
        restore_activations(self.program)
        for node in list(self.graph.nodes) if self.placement.target.shields_floats else ():
            if node.target in WEIGHTED:
                self._shield(node)
        for node in list(self.graph.nodes):
            self._spell_clip(node)
        self.graph.eliminate_dead_code()
        self.program.delete_all_unused_submodules()
        used = {str(node.target).split(".")[0] for node in self.graph.nodes if node.op == "get_attr"}
        for name in [*self.program._parameters, *self.program._buffers]:
            if name not in used:
                delattr(self.program, name)
        self.program.recompile()
        self.program.meta = {**self.placement.graph.meta, "names": self.names}
        infer_shapes(self.program)
        return self.program


def table_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return a table [rows, columns] rounded to 8 bits, int8, and the scale of each row, float32 [rows]."""
    scale = (table.abs().amax(1) / ROW_LIMIT).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round(table / scale[:, None]).to(torch.int8), scale


def is_saturation(
    bounds: tuple[float, float], scale: Tensor, zero_point: Tensor | int, container: tuple[int, int]
) -> bool:
    """Return whether a runtime takes a clip for the saturation of the quantizer after it.

    Its bounds must have the codes of the ends of the container. onnxruntime computes these as int32, where a high upper
    bound overflows (IsClipMadeRedundantByQ, 1.32); it removes such a clip only if the lower bound is the value of the
    lowest code, up to CLIP_TOLERANCE (ClipQuantFusion).
    """
    first, last = (
        bound if math.isinf(bound) else float(torch.round(torch.tensor(bound) / scale)) + int(zero_point)
        for bound in bounds
    )
    lowest = float(scale * (container[0] - int(zero_point)))
    is_counted = last < INT32_END or bounds[0] - lowest <= CLIP_TOLERANCE
    return first <= container[0] and last >= container[1] and is_counted


def code_bounds(site: Site, qparams: QParams) -> tuple[int, int]:
    """Return the first and the last code of a site: its grid, cut at the bounds of its clip where codes are clipped."""
    spec = site.spec
    if site.clip is None or spec.is_wide:
        return spec.qmin, spec.qmax
    zero_point = qparams.zero_point

    def code(bound: float, otherwise: int) -> int:
        if math.isinf(bound):
            return otherwise
        return int(round_codes(torch.tensor(bound), qparams.scale, zero_point, spec.qmin, spec.qmax))

    return code(site.clip[0], spec.qmin), code(site.clip[1], spec.qmax)
