"""The reference program executed as the integer kernels that onnxruntime fuses it into, or literally as QDQ.

`plan` decides, operator by operator, which kernel the runtime's optimiser makes of the quantized neighbourhood and why
another one stays in float; `run` executes the plan. One interpreter serves both ways: without kernels it is QDQ.

An operator becomes an integer kernel when everything it reads is dequantized codes and its result is read by one
quantizer alone. What stands between the two is absorbed: a ReLU or clip whose bounds are the ends of the container, and
reshapes, transposes, slices and max pools, through which the runtime moves the quantizer. A linear layer or matrix
product without a quantizer behind it has an integer kernel too, which writes floats.

Must not know: ONNX, sessions, how parameters were chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from calibrators.forms import clip_bounds
from calibrators.graph import bind, constant, is_constant
from calibrators.place import operator_name
from calibrators.program import DEQUANTIZE, QUANTIZE
from runtime_tests import kernels
from runtime_tests.kernels import Grid

__all__ = ["FLOAT", "KernelPlan", "Step", "plan", "run", "run_qdq"]

aten = torch.ops.aten

FLOAT = "float"
"""Kernel name of what no integer kernel computes."""

CHANNELS_LAST_RANK = 4
"""The runtime holds tensors of this rank with channels last between its integer convolutions and pools. Where a graph
input is broadcast against one of them it may choose otherwise; that shows at ties of the sum alone."""

_PROPAGATED: dict[Any, str] = {
    aten.view.default: "Reshape",
    aten.reshape.default: "Reshape",
    aten.permute.default: "Transpose",
    aten.transpose.int: "Transpose",
    aten.squeeze.dim: "Squeeze",
    aten.squeeze.dims: "Squeeze",
    aten.unsqueeze.default: "Unsqueeze",
    aten.slice.Tensor: "Slice",
    aten.max_pool2d.default: "MaxPool",
}
"""Operators that select and move values and through which the runtime moves quantizers and dequantizers."""

_MOVES: dict[Any, str] = _PROPAGATED | {
    aten.flatten.using_ints: "Flatten",
    aten.upsample_nearest2d.vec: "Resize",
    aten.pixel_shuffle.default: "DepthToSpace",
    aten.clone.default: "Identity",
    aten.contiguous.default: "Identity",
}
"""Operators that run on codes when they stand between a dequantizer and a quantizer with the same parameters."""


@dataclass(frozen=True, eq=False)
class Step:
    """How one quantized value, or one float result of a weighted operator, comes about.

    site:     name of the site; of the node for a float result.
    kernel:   the runtime's operator, or FLOAT.
    reason:   why it is float; '' otherwise.
    op:       the operator that computes the value.
    absorbed: nodes behind it that are part of the kernel, in order, the quantizer aside.
    quantized: whether the value is a site's codes.
    """

    site: str
    kernel: str
    reason: str
    op: fx.Node
    absorbed: tuple[fx.Node, ...] = ()
    quantized: bool = True

    @property
    def is_integer(self) -> bool:
        return self.kernel != FLOAT


@dataclass(frozen=True, eq=False)
class _Kernel:
    """An integer kernel with its constants prepared: codes of `inputs` -> codes or floats; then codes move."""

    name: str
    inputs: tuple[fx.Node, ...]
    compute: Callable[..., Tensor]
    moves: tuple[fx.Node, ...] = ()

    @property
    def reads(self) -> list[fx.Node]:
        """Every node whose value the kernel needs: codes, and sizes that moves take from the graph."""
        inside = set(self.moves)
        sizes = [n for move in self.moves for n in move.all_input_nodes if n is not move.args[0] and n not in inside]
        return [*self.inputs, *sizes]


@dataclass(frozen=True, eq=False)
class KernelPlan:
    """A program and the way each of its values is computed.

    steps:   one per quantizer, and one per weighted operator with a float result.
    kernels: by the node at which they run: the quantizer, or the operator itself for a float result.
    skipped: nodes that no one evaluates, because a kernel covers them.
    """

    program: fx.GraphModule
    steps: tuple[Step, ...]
    kernels: Mapping[fx.Node, _Kernel]
    skipped: frozenset[fx.Node]

    @cached_property
    def by_site(self) -> dict[str, Step]:
        """The step of every quantized value."""
        return {step.site: step for step in self.steps if step.quantized}

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names of all quantized activations, in the order in which they are computed."""
        return tuple(_site(node) for node in self.program.graph.nodes if node.target is QUANTIZE)

    @cached_property
    def exact_outputs(self) -> tuple[bool, ...]:
        """Whether an integer kernel or a dequantizer writes each output of the program."""
        (output,) = (node for node in self.program.graph.nodes if node.op == "output")
        writers = map(_writer, output.args[0])
        return tuple(writer in self.kernels or writer.target is DEQUANTIZE for writer in writers)

    @cached_property
    def freed(self) -> dict[fx.Node, list[fx.Node]]:
        """Nodes whose values nobody reads after the key has been evaluated."""
        last: dict[fx.Node, fx.Node] = {}
        for node in self.program.graph.nodes:
            if node in self.skipped:
                continue
            last[node] = node
            reads = self.kernels[node].reads if node in self.kernels else node.all_input_nodes
            last.update(dict.fromkeys(reads, node))
        freed: dict[fx.Node, list[fx.Node]] = {}
        for node, user in last.items():
            freed.setdefault(user, []).append(node)
        return freed


def _site(quantizer: fx.Node) -> str:
    return str(bind(quantizer)["site"])


def _writer(node: fx.Node) -> fx.Node:
    """The node that computes a value, moves aside."""
    while node.target in _MOVES:
        node = node.args[0]  # type: ignore[assignment]
    return node


# --- planning --------------------------------------------------------------------------------------------------------


def plan(program: fx.GraphModule, *, integer: bool = True) -> KernelPlan:
    """Which integer kernels the runtime makes of `program`; with integer=False none, as with optimisations off."""
    planner = _Planner(program, integer)
    for node in program.graph.nodes:
        if node.target is QUANTIZE:
            planner.quantizer(node)
    for node in program.graph.nodes:
        if node.target in _WEIGHTED and node not in planner.covered:
            planner.float_result(node)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    steps = sorted(planner.steps, key=lambda step: order[step.op])
    return KernelPlan(program, tuple(steps), planner.kernels, frozenset(planner.skipped))


@dataclass
class _Planner:
    program: fx.GraphModule
    integer: bool
    steps: list[Step] = field(default_factory=list)
    kernels: dict[fx.Node, _Kernel] = field(default_factory=dict)
    covered: set[fx.Node] = field(default_factory=set)
    skipped: set[fx.Node] = field(default_factory=set)

    def quantizer(self, node: fx.Node) -> None:
        """The step of one quantize node."""
        y, site = _output_grid(self.program, node), _site(node)
        op, absorbed, moves = _chain(node, y)
        if op.op != "call_function":
            kernel = "QuantizeLinear" if op.op == "placeholder" else FLOAT
            reason = "" if op.op == "placeholder" else "a constant is quantized at every run"
            self.steps.append(Step(site, kernel, reason, op))
            return
        self.covered.add(op)
        try:
            made = self._kernel(op, y)
        except _StaysFloat as why:
            self.steps.append(Step(site, FLOAT, str(why), op))
            return
        self.kernels[node] = replace(made, moves=moves)
        if op.target not in _MOVES:
            self.skipped |= {op, *absorbed}
        self.steps.append(Step(site, made.name, "", op, absorbed))

    def _kernel(self, op: fx.Node, y: Grid) -> _Kernel:
        rule = _RULES.get(op.target)
        if not self.integer:
            raise _StaysFloat(_OPTIMISATIONS_OFF)
        if rule is None:
            raise _StaysFloat(_reason_without_rule(op))
        if len(op.users) > 1 and op.target not in _MOVES:
            raise _StaysFloat(_BOTH)
        if y.dtype != torch.uint8:
            raise _StaysFloat(_UNSIGNED_ONLY)
        return rule(self.program, op, y)

    def float_result(self, node: fx.Node) -> None:
        """The step of a weighted operator whose result is read as floats."""
        try:
            if not self.integer:
                raise _StaysFloat(_OPTIMISATIONS_OFF)
            if len(node.users) > 1 and any(map(_feeds_quantizer, node.users)):
                raise _StaysFloat(_BOTH)
            made = _WEIGHTED[node.target](self.program, node, None)
        except _StaysFloat as why:
            self.steps.append(Step(node.name, FLOAT, str(why), node, quantized=False))
            return
        self.kernels[node] = made
        self.steps.append(Step(node.name, made.name, "", node, quantized=False))


_OPTIMISATIONS_OFF = "optimisations are off"
_BOTH = "its result is read both by a quantizer and as floats"
_UNSIGNED_ONLY = "int8 activations have no fast integer kernels on x86, and the runtime keeps them in float"


def _reason_without_rule(op: fx.Node) -> str:
    if op.target is DEQUANTIZE:
        return "a quantizer directly behind another"
    if clip_bounds(op) is not None:
        return "a clip that is not the saturation of an integer kernel in front of it"
    return f"{operator_name(op.target)} has no integer kernel"


def _chain(quantizer: fx.Node, y: Grid) -> tuple[fx.Node, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The operator that computes what `quantizer` reads, all nodes between the two, and the moves among them."""
    node = _source(quantizer)
    moves: list[fx.Node] = []
    while node.target in _PROPAGATED and len(node.users) == 1 and not _is_coded(node):
        moves.insert(0, node)
        node = _source(node)
    if len(node.users) == 1 and _saturates(node, y):
        origin = _source(node)
        if len(origin.users) == 1 and origin.target in _RULES and not _is_coded(origin):
            return origin, (node, *moves), tuple(moves)
    return node, tuple(moves), tuple(moves)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _saturates(node: fx.Node, y: Grid) -> bool:
    """Whether a ReLU or clip does what the ends of the container do anyway."""
    bounds = clip_bounds(node)
    if bounds is None:
        return False
    low, high = y.container
    codes = [
        bound if math.isinf(bound) else float(torch.round(torch.tensor(bound) / y.scale)) + y.zero_point
        for bound in bounds
    ]
    return codes[0] <= low and codes[1] >= high


def _feeds_quantizer(user: fx.Node) -> bool:
    while user.target in _PROPAGATED and len(user.users) == 1:
        user = next(iter(user.users))
    return user.target is QUANTIZE


def _output_grid(program: fx.GraphModule, quantizer: fx.Node) -> Grid:
    bound = bind(quantizer)
    return _grid(program, bound["scale"], bound["zero_point"], (bound["qmin"], bound["qmax"]))


def _grid(program: fx.GraphModule, scale: Any, zero_point: Any, limits: tuple[Any, Any]) -> Grid:
    zero = constant(program, zero_point)
    return Grid(constant(program, scale), int(zero), limits[0], limits[1], zero.dtype)


def _is_coded(node: object) -> bool:
    """Whether a value is the dequantized form of codes with one scale, moved or not."""
    while isinstance(node, fx.Node) and node.target in _PROPAGATED:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and bind(node)["axis"] is None


def _input_grid(program: fx.GraphModule, node: fx.Node) -> Grid:
    """Grid of a coded value; the range is that of its quantizer, or of the container where a clip came between."""
    while node.target in _PROPAGATED:
        node = _source(node)
    bound = bind(node)
    codes, limits = bound["codes"], torch.iinfo(constant(program, bound["zero_point"]).dtype)
    known = (bind(codes)["qmin"], bind(codes)["qmax"]) if codes.target is QUANTIZE else (limits.min, limits.max)
    return _grid(program, bound["scale"], bound["zero_point"], known)


# --- rules: operator and output grid (None: floats) become a kernel; _StaysFloat says why not -------------------------


class _StaysFloat(Exception):
    """Why the runtime keeps an operator in float."""


def _grids(program: fx.GraphModule, *nodes: Any) -> list[Grid]:
    """Grids of the activations that an operator reads."""
    grids = []
    for node in nodes:
        if not isinstance(node, fx.Node):
            raise _StaysFloat("an operand is a number")
        if not _is_coded(node):
            raise _StaysFloat(f"its input {node.name} is not quantized")
        grids.append(_input_grid(program, node))
    if any(grid.dtype != torch.uint8 for grid in grids):
        raise _StaysFloat(_UNSIGNED_ONLY)
    return grids


def _is_quantized_constant(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is DEQUANTIZE and is_constant(node.args[0])


def _weights(program: fx.GraphModule, node: fx.Node, x: Grid, y: Grid | None) -> kernels.Weights:
    """Prepared weights [out, in, ...] and bias of a convolution or linear layer."""
    weight, bias = bind(node)["weight"], bind(node)["bias"]
    if not _is_quantized_constant(weight):
        raise _StaysFloat("its weight is not quantized")
    codes, scale, zero_point = (constant(program, argument) for argument in weight.args[:3])
    if codes.dtype not in (torch.int8, torch.uint8):
        raise _StaysFloat(f"weights of {codes.dtype} have no integer kernel")
    bias_codes = None if bias is None else _bias_codes(program, bias, x.scale * scale, y)
    return kernels.prepare_weights(codes, zero_point, scale, bias_codes, x)


def _bias_codes(program: fx.GraphModule, bias: fx.Node, scale: Tensor, y: Grid | None) -> Tensor:
    if is_constant(bias):
        if y is None:
            raise _StaysFloat("its bias is float and so is its result")
        return kernels.quantize_bias(constant(program, bias), scale)
    if not _is_quantized_constant(bias):
        raise _StaysFloat("its bias is computed")
    codes, bias_scale = (constant(program, argument) for argument in bias.args[:2])  # type: ignore[arg-type]
    if codes.dtype != torch.int32 or not torch.equal(bias_scale, scale.expand(bias_scale.shape)):
        raise _StaysFloat("the scale of its bias is not the product of input and weight scale")
    return codes


def _conv(program: fx.GraphModule, node: fx.Node, y: Grid | None) -> _Kernel:
    bound = bind(node)
    (x,) = _grids(program, bound["input"])
    if y is None:
        raise _StaysFloat("its result is not quantized")
    weights = _weights(program, node, x, y)
    space = weights.parts[0][1].ndim - 2
    geometry = kernels.ConvGeometry(
        stride=_per_axis(bound["stride"], space),
        padding=_per_axis(bound["padding"], space),
        dilation=_per_axis(bound["dilation"], space),
        groups=bound["groups"],
    )
    compute = partial(kernels.conv, x=x, weights=weights, y=y, geometry=geometry)
    return _Kernel("QLinearConv", (bound["input"],), compute)


def _per_axis(sizes: Sequence[int], space: int) -> tuple[int, ...]:
    return tuple(sizes) * space if len(sizes) == 1 else tuple(sizes)


def _linear(program: fx.GraphModule, node: fx.Node, y: Grid | None) -> _Kernel:
    source = bind(node)["input"]
    (x,) = _grids(program, source)
    return _gemm("QGemm", source, _weights(program, node, x, y), x, y)


def _gemm(name: str, source: fx.Node, weights: kernels.Weights, x: Grid, y: Grid | None) -> _Kernel:
    if y is None:
        return _Kernel(name, (source,), partial(kernels.linear_float, x=x, weights=weights))
    return _Kernel(name, (source,), partial(kernels.linear, x=x, weights=weights, y=y))


def _matmul(program: fx.GraphModule, node: fx.Node, y: Grid | None) -> _Kernel:
    left, right = bind(node).values()
    name = "MatMulIntegerToFloat" if y is None else "QLinearMatMul"
    if _is_quantized_constant(right):
        (x,) = _grids(program, left)
        codes, scale, zero_point = (constant(program, argument) for argument in right.args[:3])
        if codes.ndim != 2:
            raise _StaysFloat("a constant factor that is no matrix has no rule")
        return _gemm(name, left, kernels.prepare_weights(codes.T, zero_point, scale, None, x), x, y)
    a, b = _grids(program, left, right)
    if y is None:
        return _Kernel(name, (left, right), partial(kernels.matmul_float, a=a, b=b))
    return _Kernel(name, (left, right), partial(kernels.matmul, a=a, b=b, y=y))


def _add(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    left, right, factor = bind(node).values()
    a, b = _grids(program, left, right)
    if factor != 1:
        raise _StaysFloat("a factor on the second summand has no integer kernel")
    tables = kernels.add_table(a, b, y), kernels.add_table(b, a, y).T.contiguous()

    def compute(a_codes: Tensor, b_codes: Tensor) -> Tensor:
        channels_last = a_codes.ndim == b_codes.ndim == CHANNELS_LAST_RANK
        swapped = kernels.adds_swapped(a_codes.shape, b_codes.shape, channels_last=channels_last)
        return kernels.lookup_pair(tables[swapped], a_codes, b_codes)

    return _Kernel("QLinearAdd", (left, right), compute)


def _mul(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    left, right = bind(node).values()
    a, b = _grids(program, left, right)
    return _Kernel("QLinearMul", (left, right), partial(kernels.lookup_pair, kernels.mul_table(a, b, y)))


def _sigmoid(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    (source,) = bind(node).values()
    (x,) = _grids(program, source)
    return _Kernel("QLinearSigmoid", (source,), partial(kernels.lookup, kernels.unary_table(torch.sigmoid, x, y)))


def _leaky_relu(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    source, slope = bind(node).values()
    (x,) = _grids(program, source)
    table = kernels.unary_table(partial(functional.leaky_relu, negative_slope=slope), x, y)
    return _Kernel("QLinearLeakyRelu", (source,), partial(kernels.lookup, table))


def _softmax(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    source, dim, _ = bind(node).values()
    (x,) = _grids(program, source)
    return _Kernel("QLinearSoftmax", (source,), partial(kernels.softmax, x=x, y=y, dim=dim))


def _global_pool(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    source, size = bind(node).values()
    (x,) = _grids(program, source)
    if list(size) != [1, 1]:
        raise _StaysFloat("only pooling to 1x1 has an integer kernel")
    return _Kernel("QLinearGlobalAveragePool", (source,), partial(kernels.global_average_pool, x=x, y=y))


def _average_pool(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    bound = bind(node)
    (x,) = _grids(program, bound["self"])
    if bound["ceil_mode"] or bound["divisor_override"] is not None:
        raise _StaysFloat("average pooling with a ceiling or a divisor of its own has no integer kernel")
    size = bound["kernel_size"]
    kernel, stride, padding = ((v * 2)[:2] for v in map(tuple, (size, bound["stride"] or size, bound["padding"])))
    geometry = kernels.PoolGeometry(kernel, stride, padding, bound["count_include_pad"])
    compute = partial(kernels.average_pool, x=x, y=y, geometry=geometry)
    return _Kernel("QLinearAveragePool", (bound["self"],), compute)


def _cat(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    sources, dim = bind(node).values()
    tables = [kernels.unary_table(lambda values: values, x, y) for x in _grids(program, *sources)]

    def compute(*codes: Tensor) -> Tensor:
        return torch.cat([kernels.lookup(table, part) for table, part in zip(tables, codes, strict=True)], dim)

    return _Kernel("QLinearConcat", tuple(sources), compute)


def _move(program: fx.GraphModule, node: fx.Node, y: Grid) -> _Kernel:
    """The move itself is evaluated on codes like any move; what is left for the quantizer is its clip."""
    (x,) = _grids(program, node.args[0])
    if not torch.equal(x.scale, y.scale) or x.zero_point != y.zero_point:
        raise _StaysFloat(f"{operator_name(node.target)} between different scales is executed on floats")
    return _Kernel(_MOVES[node.target], (node,), partial(kernels.integer_clip, y=y))


_WEIGHTED: dict[Any, Callable[[fx.GraphModule, fx.Node, Grid | None], _Kernel]] = {
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.mm.default: _matmul,
}
"""Operators that multiply and accumulate: reported whether or not their result is quantized."""

_RULES: dict[Any, Callable[[fx.GraphModule, fx.Node, Grid], _Kernel]] = {
    **_WEIGHTED,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.cat.default: _cat,
    aten.adaptive_avg_pool2d.default: _global_pool,
    aten.avg_pool2d.default: _average_pool,
    aten.sigmoid.default: _sigmoid,
    aten.leaky_relu.default: _leaky_relu,
    aten.softmax.int: _softmax,
    **dict.fromkeys(_MOVES, _move),
}


# --- execution -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Coded:
    """Codes that stand for the floats of a dequantize node; floats only when somebody asks for them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None
    site: str

    @property
    def values(self) -> Tensor:
        result: Tensor = DEQUANTIZE(self.codes, self.scale, self.zero_point, self.axis, self.site)
        return result


def run(
    plan: KernelPlan, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Codes of every site and the outputs of the program.

    forced:  codes by site that replace the computed ones downstream, after these have been recorded: with the runtime's
             own codes, every site shows what its own kernel did to the inputs which the runtime had.
    returns: codes in their container dtype by site name, and the outputs in order.
    """
    forced = forced or {}
    pending = iter(inputs)
    values: dict[fx.Node, Any] = {}
    codes: dict[str, Tensor] = {}
    outputs: tuple[Tensor, ...] = ()
    with torch.no_grad(), _full_float32():
        for node in plan.program.graph.nodes:
            if node in plan.skipped:
                continue
            if node.op == "placeholder":
                values[node] = next(pending)
            elif node.op == "output":
                outputs = tuple(fx.map_arg(node.args[0], lambda n: _floats(values[n])))
            else:
                values[node] = _evaluate(plan, node, values)
            if node.target is QUANTIZE:
                site = _site(node)
                codes[site] = values[node]
                values[node] = forced.get(site, values[node])
            for dead in plan.freed.get(node, ()):
                values.pop(dead, None)
    return codes, outputs


def run_qdq(
    program: fx.GraphModule, inputs: Sequence[Tensor], forced: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """The same with float arithmetic between dequantize and quantize: what the text of the ONNX file says."""
    return run(plan(program, integer=False), inputs, forced)


def _evaluate(plan: KernelPlan, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return constant(plan.program, node)
    if node in plan.kernels:
        return _run_kernel(plan.kernels[node], values)
    if node.target is DEQUANTIZE:
        return _Coded(*fx.map_arg(tuple(bind(node).values()), values.__getitem__))
    source = node.args[0] if node.args else None
    if node.target in _MOVES and isinstance(source, fx.Node) and isinstance(values[source], _Coded):
        coded = values[source]
        if coded.axis is None:
            return replace(coded, codes=_call(node, values, {source: coded.codes}))
    return _call(node, values, {})


def _run_kernel(kernel: _Kernel, values: Mapping[fx.Node, Any]) -> Tensor:
    result = kernel.compute(*(values[node].codes for node in kernel.inputs))
    for move in kernel.moves:
        result = _call(move, values, {_source(move): result})
    return result


def _call(node: fx.Node, values: Mapping[fx.Node, Any], instead: Mapping[fx.Node, Tensor]) -> Any:
    """The operator itself on floats, `instead` replacing some operands."""

    def operand(n: fx.Node) -> Any:
        return instead[n] if n in instead else _floats(values[n])

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), operand)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _floats(value: Any) -> Any:
    return value.values if isinstance(value, _Coded) else value


@contextmanager
def _full_float32() -> Iterator[None]:
    """No reduced-precision products, whatever the caller chose: integers in float32 need all 24 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
