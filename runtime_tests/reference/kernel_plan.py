"""Plan the kernels that onnxruntime's optimizer makes of a program: what runs on integers, and why the rest does not.

An operator becomes an integer kernel if everything it reads is dequantized codes and only one quantizer reads its
result. Operators between the two are absorbed: a ReLU or clip whose bounds are the ends of the container, and
reshapes, transposes, slices and max pools, through which the runtime moves the quantizer. A linear layer or matrix
product without a quantizer after it has an integer kernel too, which writes floats. A quantizer of an input, or of
basic arithmetic on one, is exact as well.

Must not know: ONNX, sessions, how parameters were chosen, how a kernel computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import fx

from calibrators.graph.aten import bind, outputs_of, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.operators import MOVES, Operators
from calibrators.grid.processors import FAMILIES, REFERENCE, Processor
from calibrators.grid.target import Target
from calibrators.placement.kernel_forms import missing_form
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE, is_saturation
from calibrators.targets import DEFAULT_TARGET, get_target
from runtime_tests.ort.onnx_operators import WEIGHT_ONLY
from runtime_tests.reference.float_depth import float_depths
from runtime_tests.reference.kernel_rules import (
    PRODUCTS,
    PROPAGATED,
    RULES,
    WEIGHTED,
    Kernel,
    StaysFloat,
    before_moves,
    check_containers,
    is_basic_arithmetic,
    is_coded,
    is_codes,
    is_weight_only,
    output_grid,
    reason_without_kernel,
    source,
)
from runtime_tests.reference.kernels import Grid

__all__ = ["COUNTED", "FLOAT", "KernelPlan", "Step", "plan", "site_of"]

FLOAT = "float"
"""Kernel name for values that no integer kernel computes."""

COUNTED = (
    *("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat", "QLinearAdd", "QLinearMul", "QLinearConcat"),
    *("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax"),
    WEIGHT_ONLY,
)
"""Kernels that compute: the runtime runs as many of each as planned. It may merge, double or remove moves."""


@dataclass(frozen=True, eq=False)
class Step:
    """The computation of one quantized value, or of one float result of a weighted operator.

    site:     name of the site; of the node for a float result.
    kernel:   the runtime's operator, or FLOAT.
    reason:   why it is float; '' for an integer kernel.
    op:       the operator that computes the value.
    quantized: whether the value is a site's codes.
    """

    site: str
    kernel: str
    reason: str
    op: fx.Node
    quantized: bool = True

    @property
    def is_integer(self) -> bool:
        return self.kernel != FLOAT


@dataclass(frozen=True, eq=False)
class KernelPlan:
    """A program and how each of its values is computed.

    steps:   one per quantizer, and one per weighted operator with a float result.
    kernels: by the node at which they run: the quantizer, or the operator itself for a float result.
    skipped: nodes that are not evaluated, because a kernel covers them.
    integer: whether integer kernels were planned; if not, QDQ is taken literally.
    """

    program: fx.GraphModule
    steps: tuple[Step, ...]
    kernels: Mapping[fx.Node, Kernel]
    skipped: frozenset[fx.Node]
    integer: bool = True

    @cached_property
    def by_site(self) -> dict[str, Step]:
        """The step of every quantized value."""
        return {step.site: step for step in self.steps if step.quantized}

    @cached_property
    def container_bits(self) -> dict[str, int]:
        """Bits of the container of every site's codes, sites in the order in which they are computed."""
        quantizers = (node for node in self.program.graph.nodes if node.target is QUANTIZE)
        return {site_of(node): torch.iinfo(output_grid(self.program, node).dtype).bits for node in quantizers}

    @cached_property
    def depths(self) -> dict[str, int]:
        """Number of float operators, one after the other, before the codes of every site."""
        depths = float_depths(self.program)
        return {site_of(node): depths[source(node)] for node in depths if node.target is QUANTIZE}

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of all quantized activations, in the order in which they are computed."""
        return tuple(self.container_bits)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of planned kernels by operator of COUNTED, zeros included."""
        found = Counter(step.kernel for step in self.steps)
        found[WEIGHT_ONLY] = sum(map(is_weight_only, self.program.graph.nodes)) if self.integer else 0
        return {name: found[name] for name in COUNTED}

    @cached_property
    def exact_outputs(self) -> tuple[bool, ...]:
        """For each output of the program, whether an integer kernel or a dequantizer writes it."""
        writers = (before_moves(node, MOVES) for node in outputs_of(self.program))
        return tuple(writer in self.kernels or writer.target is DEQUANTIZE or is_codes(writer) for writer in writers)

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values are needed to evaluate `node`."""
        return self.kernels[node].reads if node in self.kernels else node.all_input_nodes


def site_of(quantizer: fx.Node) -> str:
    """Return the name of the site whose codes a quantize node writes."""
    return str(bind(quantizer)["site"])


def plan(
    program: fx.GraphModule, target: Target | None = None, *, integer: bool = True, own: bool = False
) -> KernelPlan:
    """Plan the integer kernels that the runtime makes of `program`; integer=False: none, as with optimizations off.

    target: says which operators and forms have kernels, or that QDQ is taken literally; None: the default target.
    own:    in the target's own runtime, with the arithmetic of its kernels. It fuses nothing that stands between codes
            by chance, and rounds otherwise where it quantizes floats.
    """
    target = target or get_target(DEFAULT_TARGET)
    integer = integer and target.proof != "qdq"
    planner = _Planner(program, target, integer, own)
    for node in program.graph.nodes:
        if node.target is QUANTIZE:
            planner.quantizer(node)
    for node in program.graph.nodes:
        if node.target in WEIGHTED and node not in planner.covered:
            planner.float_result(node)
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    steps = sorted(planner.steps, key=lambda step: order[step.op])
    return KernelPlan(program, tuple(steps), planner.kernels, frozenset(planner.skipped), integer)


@dataclass
class _Planner:
    program: fx.GraphModule
    target: Target
    integer: bool
    own: bool
    steps: list[Step] = field(default_factory=list)
    kernels: dict[fx.Node, Kernel] = field(default_factory=dict)
    covered: set[fx.Node] = field(default_factory=set)
    skipped: set[fx.Node] = field(default_factory=set)

    @property
    def _family(self) -> Processor:
        return FAMILIES[self.target.arithmetic if self.own else REFERENCE]

    @property
    def _kernels(self) -> Operators:
        return self.target.kernels - self.target.fused_ops if self.own else self.target.kernels

    def quantizer(self, node: fx.Node) -> None:
        """Plan one quantize node."""
        y, site = output_grid(self.program, node), site_of(node)
        op, absorbed, moves = _chain(node, y)
        if op.op == "get_attr":
            self.steps.append(Step(site, FLOAT, "a constant is quantized at every run", op))
            return
        if is_basic_arithmetic(op):
            self.steps.append(Step(site, FLOAT, _ROUNDED, op) if self.own else Step(site, "QuantizeLinear", "", op))
            return
        self.covered.add(op)
        try:
            made = self._kernel(op, y)
        except StaysFloat as why:
            self.steps.append(Step(site, FLOAT, str(why), op))
            return
        self.kernels[node] = replace(made, moves=moves)
        if op.target not in MOVES:
            self.skipped |= {op, *absorbed}
        self.steps.append(Step(site, made.name, "", op))

    def _kernel(self, op: fx.Node, y: Grid) -> Kernel:
        if not self.integer:
            raise StaysFloat(_OPTIMIZATIONS_OFF)
        rule = RULES.get(op.target)
        if rule is None or op.target not in self._kernels:
            raise StaysFloat(reason_without_kernel(op))
        if len(op.users) > 1 and op.target not in MOVES:
            raise StaysFloat(_BOTH)
        self._check(op, y)
        return rule(self.program, op, y, self._family)

    def _check(self, op: fx.Node, y: Grid | None) -> None:
        """Raise StaysFloat unless the target has a kernel for this form of an operator and the types of its codes."""
        if (why := missing_form(op, self.target)) is not None:
            raise StaysFloat(why)
        check_containers(self.program, op, y, self.target)

    def float_result(self, node: fx.Node) -> None:
        """Plan a weighted operator whose result is read as floats."""
        try:
            if not self.integer:
                raise StaysFloat(_OPTIMIZATIONS_OFF)
            if len(node.users) > 1 and any(map(_feeds_quantizer, node.users)):
                raise StaysFloat(_BOTH)
            if _is_clipped(node):
                raise StaysFloat(_CLIPPED)
            if node.target not in self._kernels:
                raise StaysFloat(reason_without_kernel(node))
            if _is_merged_with_sum(node):
                raise StaysFloat(_MERGED)
            self._check(node, None)
            made = WEIGHTED[node.target](self.program, node, None, self._family)
        except StaysFloat as why:
            self.steps.append(Step(node.name, FLOAT, str(why), node, quantized=False))
            return
        self.kernels[node] = made
        self.steps.append(Step(node.name, made.name, "", node, quantized=False))


_OPTIMIZATIONS_OFF = "optimizations are off"
_ROUNDED = "the runtime rounds floats next to ties otherwise"
_BOTH = "its result is read both by a quantizer and as floats"
_CLIPPED = "a ReLU or clip is between its result and a float operator"
_MERGED = "the runtime merges the sum after it into a product of floats"


def _chain(quantizer: fx.Node, y: Grid) -> tuple[fx.Node, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """Return the operator that computes what `quantizer` reads, all nodes between the two, and the moves among them."""
    node = source(quantizer)
    moves: list[fx.Node] = []
    while node.target in PROPAGATED and len(node.users) == 1 and not is_coded(node):
        moves.insert(0, node)
        node = source(node)
    if len(node.users) == 1 and _saturates(node, y):
        origin = source(node)
        if len(origin.users) == 1 and origin.target in RULES and not is_coded(origin):
            return origin, (node, *moves), tuple(moves)
    return node, tuple(moves), tuple(moves)


def _saturates(node: fx.Node, y: Grid) -> bool:
    """Return whether a ReLU or clip has no effect beyond saturation at the ends of the container."""
    bounds = clip_bounds(node)
    return bounds is not None and is_saturation(bounds, y.scale, y.zero_point, y.container)


def _is_clipped(node: fx.Node) -> bool:
    """Return whether only a ReLU or clip reads the result, and only one float operator reads that.

    The runtime takes the clip for part of a kernel that writes codes, finds no quantizer after it, and makes no kernel.
    Only bundles of earlier versions have such a clip: now it is written as a maximum.
    """
    clip = next(iter(node.users))
    readers = list(clip.users)
    return len(node.users) == 1 and clip_bounds(clip) is not None and len(readers) == 1 and readers[0].op != "output"


def _is_merged_with_sum(node: fx.Node) -> bool:
    """Return whether the runtime makes one Gemm of a product of matrices and the sum that alone reads it.

    It does so if the other operand has the shape of a bias, and has an integer kernel only for a bias of codes.
    """
    user = next(iter(node.users))
    others = [x for x in user.all_input_nodes if x is not node]
    is_sum = user.target is torch.ops.aten.add.Tensor and bind(user)["alpha"] == 1
    if node.target not in PRODUCTS or len(node.users) != 1 or not is_sum or len(others) != 1:
        return False
    if not all(len(shape_of(x)) == 2 for x in (*node.all_input_nodes, node)):
        return False
    rows, columns = shape_of(node)
    return shape_of(others[0]) in ((columns,), (1, columns), (rows, 1), (rows, columns))


def _feeds_quantizer(user: fx.Node) -> bool:
    while user.target in PROPAGATED and len(user.users) == 1:
        user = next(iter(user.users))
    return user.target is QUANTIZE
