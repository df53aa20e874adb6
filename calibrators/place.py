"""Where quantizers stand: the graph and a target's rules become sites.

A value is quantized when an integer kernel writes it or reads it:
- operators with a weight read codes; convolutions write codes too, so a quantizer stands on both sides;
- a linear layer writes codes only between integer neighbours, else floats (the faster and exact form in transformers);
- add, mul, concat, pools and the like run on integers when all their inputs do and somebody reads their integers;
- a reshape or max pool moves codes and shares the scale of its input;
- a ReLU or clip behind an integer kernel is part of that kernel: the codes saturate at its bounds.

Must not know: data, methods, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import fx

from calibrators.errors import InputError, UnknownNameError
from calibrators.forms import clip_bounds
from calibrators.graph import bind, constant, is_constant, module_path, shape_of
from calibrators.spec import QuantSpec, Site, Target

__all__ = ["Placement", "PlacementOptions", "operator_name", "place"]

aten = torch.ops.aten

REDUCED_BITS = 7
"""Widest symmetric weights whose pairs of products with uint8 codes fit 16 bits: 2 * 255 * 63 < 2**15."""


@dataclass(frozen=True)
class PlacementOptions:
    """What the user may decide about placement.

    weight_bits:     bits of weights. Below the widest grid (8, or 7 with reduce_range) a weight is asymmetric, for a
                     symmetric grid would lose one of its few levels.
    activation_bits: bits of the values that operators with weights read, and of all that share a scale with them. What
                     only sums, products, pools and outputs read keeps the bits of the target: the result of a residual
                     branch does, the sum that the next convolution reads does not.
    first_last_bits: bits of weight and input activation of the first and last weighted operator; None: no exception.
    reduce_range:    weights of at most 7 bits, |code - zero_point| <= 63, so that uint8 x int8 kernels that add pairs
                     of products in 16 bits do not saturate.
    split_skips:     take identity branches that folding hid in a kernel out again, where the bits cannot hold both
                     (calibrators.skips).
    include:         globs on module path, operator or node name; only matching operators are quantized.
    exclude:         globs likewise; matching operators stay in float.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int | None = 8
    per_tensor_weights: bool = False
    reduce_range: bool = False
    split_skips: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Placement:
    """The graph in integer forms and its sites, in topological order of the values."""

    graph: fx.GraphModule
    target: Target
    sites: tuple[Site, ...]

    @cached_property
    def by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def activation_of(self) -> dict[str, Site]:
        """Activation site by the fx name of its node."""
        return {site.node: site for site in self.sites if site.kind == "activation"}

    def root(self, site: Site) -> Site:
        """The site that owns the scale and zero point of `site`."""
        while site.shares is not None:
            site = self.by_name[site.shares]
        return site


def place(graph: fx.GraphModule, target: Target, options: PlacementOptions | None = None) -> Placement:
    """Sites of a graph in integer forms (calibrators.forms) for a target.

    raises: UnknownNameError for a pattern that matches nothing, InputError when nothing is left to quantize.
    """
    options = options or PlacementOptions()
    placer = _Placer(graph, target, _selected(graph, options))
    weighted = [node for node in placer.nodes if placer.is_weighted(node)]
    if not weighted:
        raise InputError(
            f"nothing to quantize: target {target.name!r} has integer kernels for "
            f"{', '.join(sorted(operator_name(op) for op in target.weighted))} with constant weights, and the model "
            "(after --include/--exclude) has none of them"
        )
    return Placement(graph, target, _Sites(placer, options, weighted).build())


def operator_name(target: object) -> str:
    """Short name of an operator: 'conv2d' for aten.conv2d.default."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _selected(graph: fx.GraphModule, options: PlacementOptions) -> frozenset[str]:
    """Names of the nodes that may be quantized under the include and exclude globs."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
    labels = {node.name: _labels(node) for node in nodes}

    def matching(patterns: Iterable[str], flag: str) -> set[str]:
        found: set[str] = set()
        for pattern in patterns:
            hits = {name for name, names in labels.items() if any(fnmatchcase(label, pattern) for label in names)}
            if not hits:
                raise UnknownNameError(
                    f"--{flag} pattern", pattern, {name for names in labels.values() for name in names}
                )
            found |= hits
        return found

    chosen = matching(options.include, "include") if options.include else set(labels)
    return frozenset(chosen - matching(options.exclude, "exclude"))


def _labels(node: fx.Node) -> list[str]:
    """What a glob may match: node name, operator, and the module path with each of its parents."""
    path = module_path(node)
    parts = path.split(".") if path else []
    return [node.name, operator_name(node.target), *(".".join(parts[: i + 1]) for i in range(len(parts)))]


class _Placer:
    """Decides node by node: what can be an integer, and what is wanted as one."""

    def __init__(self, graph: fx.GraphModule, target: Target, selected: frozenset[str]) -> None:
        self.graph, self.target, self.selected = graph, target, selected
        self.nodes = [node for node in graph.graph.nodes if node.op in ("placeholder", "call_function")]
        self.absorbed: dict[fx.Node, fx.Node] = {}  # ReLU or clip -> the operator whose kernel does it
        for node in self.nodes:
            self._absorb_clip(node)
        self.available: dict[fx.Node, bool] = {}
        for node in self.nodes:
            self.available[node] = self._is_available(node)
        self.sited: dict[fx.Node, bool] = {}
        for node in reversed(self.nodes):
            self.sited[node] = self._is_sited(node)

    def _absorb_clip(self, node: fx.Node) -> None:
        user = next(iter(node.users), None)
        if not (self.is_weighted(node) or self._is_integer_op(node)) or len(node.users) != 1:
            return
        if isinstance(user, fx.Node) and user.name in self.selected and clip_bounds(user) is not None:
            self.absorbed[user] = node

    def is_weighted(self, node: fx.Node) -> bool:
        """An operator with constant float32 weight that the target runs on integers."""
        if node.target not in self.target.weighted or node.name not in self.selected or not _is_float(node):
            return False
        bound = bind(node)
        if is_constant(bound["input"]) or not is_constant(bound["weight"]):
            return False
        bias_ok = bound["bias"] is None or is_constant(bound["bias"])
        return bias_ok and constant(self.graph, bound["weight"]).dtype == torch.float32

    def _is_integer_op(self, node: fx.Node) -> bool:
        if node.target not in self.target.integer_ops or node.name not in self.selected or not _is_float(node):
            return False
        check = _FORM_OF_INTEGER_OP.get(node.target)
        return all(not is_constant(x) for x in _inputs(node)) and (check is None or check(node))

    def _moves_codes(self, node: fx.Node) -> bool:
        """Reshapes, max pools and stand-alone clips: output codes are input codes, moved or saturated."""
        if node.name not in self.selected or not _is_float(node) or node in self.absorbed:
            return False
        is_move = node.target in self.target.same_scale_ops | self.target.on_codes_ops
        check = _FORM_OF_MOVE.get(node.target)
        return (is_move and (check is None or check(node))) or clip_bounds(node) is not None

    def _is_available(self, node: fx.Node) -> bool:
        """Whether the value can be had as integers without forcing a float operator's result into codes."""
        if node.op == "placeholder":
            return _is_float(node)
        if node in self.absorbed:
            return self.available[self.absorbed[node]]
        if self.is_weighted(node):
            return node.target in self.target.weighted_to_codes or self.available[bind(node)["input"]]
        if self._is_integer_op(node) or self._moves_codes(node):
            inputs = [x for x in _inputs(node) if isinstance(x, fx.Node)]
            return bool(inputs) and all(self.available.get(x, False) for x in inputs)
        return False

    def reads_codes(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether `user` runs an integer kernel on `value`."""
        if user.op != "call_function":
            return False
        if self.is_weighted(user):
            return bind(user)["input"] is value
        return self.runs_on_integers(user)

    def runs_on_integers(self, node: fx.Node) -> bool:
        """Whether a weightless operator is executed on codes: its result is a site and its inputs can be."""
        if not (self._is_integer_op(node) or self._moves_codes(node)) or not self.available[node]:
            return False
        carrier = next(iter(node.users)) if self._carried(node) else node
        return self.sited[carrier]

    def _carried(self, node: fx.Node) -> bool:
        return len(node.users) == 1 and self.absorbed.get(next(iter(node.users))) is node

    def _is_sited(self, node: fx.Node) -> bool:
        if not _is_float(node) or self._carried(node):
            return False
        origin = self.absorbed.get(node, node)
        if origin.target in self.target.weighted_to_codes and self.is_weighted(origin):
            return True
        return any(self.reads_codes(user, node) for user in node.users)

    def writes_codes(self, node: fx.Node) -> bool:
        """Whether the value comes out of an integer kernel, so that only its dequantized form exists."""
        origin = self.absorbed.get(node, node)
        if origin.op != "call_function":
            return False
        return self.sited[node] and self.available[node]


def _is_float(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return getattr(meta, "dtype", None) == torch.float32


def _inputs(node: fx.Node) -> list[object]:
    """Tensor operands of a weightless operator, constants and numbers included."""
    first = node.args[0]
    if isinstance(first, (list, tuple)):
        return list(first)
    return list(node.args[:2]) if node.target in (aten.add.Tensor, aten.mul.Tensor) else [first]


def _is_plain_sum(node: fx.Node) -> bool:
    return bind(node).get("alpha", 1) == 1 and all(isinstance(x, fx.Node) and _is_float(x) for x in node.args[:2])


def _is_global_pool(node: fx.Node) -> bool:
    return list(bind(node)["output_size"]) == [1, 1] and len(shape_of(node)) == 4


def _is_plain_average(node: fx.Node) -> bool:
    bound = bind(node)
    return not bound["ceil_mode"] and bound["divisor_override"] is None and len(shape_of(node)) == 4


_FORM_OF_INTEGER_OP = {
    aten.add.Tensor: _is_plain_sum,
    aten.mul.Tensor: _is_plain_sum,
    aten.adaptive_avg_pool2d.default: _is_global_pool,
    aten.avg_pool2d.default: _is_plain_average,
}


def _pads_with_zeros(node: fx.Node) -> bool:
    bound = bind(node)
    return bound.get("mode", "constant") != "constant" or not bound["value"]


_FORM_OF_MOVE: dict[object, Callable[[fx.Node], bool]] = {
    aten.constant_pad_nd.default: _pads_with_zeros,
    aten.pad.default: _pads_with_zeros,
}


@dataclass
class _Sites:
    """Turns the placer's decisions into named sites."""

    placer: _Placer
    options: PlacementOptions
    weighted: list[fx.Node]
    names: set[str] = field(default_factory=set)

    @property
    def edges(self) -> tuple[fx.Node, fx.Node]:
        """The first and the last weighted operator."""
        return self.weighted[0], self.weighted[-1]

    def build(self) -> tuple[Site, ...]:
        activations = self._activations()
        weights: dict[str, Site] = {}
        biases: list[Site] = []
        for node in self.weighted:
            bound = bind(node)
            weight = bound["weight"].name
            if weight in weights:
                weights[weight] = replace(weights[weight], users=(*weights[weight].users, node.name))
            else:
                spec = self._weight_spec(node)
                weights[weight] = Site(self._name(node, "weight"), "weight", weight, (node.name,), spec)
            if bound["bias"] is not None:
                spec = QuantSpec(bits=32, signed=True, symmetric=True, axis=0, narrow=True)
                biases.append(Site(self._name(node, "bias"), "bias", bound["bias"].name, (node.name,), spec))
        return (*activations, *weights.values(), *biases)

    def _name(self, node: fx.Node, what: str) -> str:
        """`module.path.what`, numbered where that is taken."""
        path = module_path(node)
        readable = f"{path}.{what}" if path else what
        name, count = readable, 0
        while name in self.names:
            count += 1
            name = f"{readable}_{count}"
        self.names.add(name)
        return name

    def _weight_spec(self, node: fx.Node) -> QuantSpec:
        options, grid = self.options, self.placer.target.weight
        widest = min(grid.bits, REDUCED_BITS) if options.reduce_range else grid.bits
        weight = bind(node)["weight"]
        bits = options.weight_bits
        if options.first_last_bits is not None and weight in [bind(edge)["weight"] for edge in self.edges]:
            bits = options.first_last_bits
        if math.prod(shape_of(weight)[1:]) == 1:  # a rescaling of channels: nothing to save
            bits = widest
        grid = replace(grid, bits=min(bits, widest), axis=None if options.per_tensor_weights else grid.axis)
        return grid if bits >= widest else replace(grid, symmetric=False, narrow=False)

    def _activations(self) -> list[Site]:
        placer = self.placer
        sites: dict[fx.Node, Site] = {}
        for node in placer.nodes:
            if not placer.sited[node]:
                continue
            origin = placer.absorbed.get(node, node)
            users = list(node.users)
            if not placer.writes_codes(node):
                users = [user for user in users if placer.reads_codes(user, node)]
            what = node.name if node.op == "placeholder" else operator_name(node.target)
            site = Site(
                name=self._name(node, what),
                kind="activation",
                node=node.name,
                users=tuple(user.name for user in users),
                spec=placer.target.activation,
                fixed=placer.target.fixed_outputs.get(node.target),
                clip=clip_bounds(node) if node in placer.absorbed else None,
            )
            if origin is node and node.op == "call_function" and placer.runs_on_integers(node):
                site = self._share(site, node, sites)
            sites[node] = site
        return self._with_bits(sites)

    def _share(self, site: Site, node: fx.Node, sites: dict[fx.Node, Site]) -> Site:
        """A reshape, pad or stand-alone clip takes the scale of its input's site."""
        target = self.placer.target
        if node.target in target.same_scale_ops | target.on_codes_ops:
            of_codes = node.target in target.on_codes_ops
            return replace(site, shares=sites[node.args[0]].name, of_codes=of_codes)  # type: ignore[index]
        bounds = clip_bounds(node)
        if bounds is not None:
            return replace(site, shares=sites[node.args[0]].name, clip=bounds, of_codes=True)  # type: ignore[index]
        return site

    def _with_bits(self, sites: dict[fx.Node, Site]) -> list[Site]:
        """Sites with the bits of who reads them; sites that share a scale have the same."""
        by_name = {site.name: site for site in sites.values()}

        def root(site: Site) -> str:
            while site.shares is not None:
                site = by_name[site.shares]
            return site.name

        bits = {root(sites[bind(node)["input"]]): self.options.activation_bits for node in self.weighted}
        if self.options.first_last_bits is not None:
            bits |= {root(sites[bind(node)["input"]]): self.options.first_last_bits for node in self.edges}
        return [
            replace(site, spec=replace(site.spec, bits=bits.get(root(site), site.spec.bits)))
            for site in by_name.values()
        ]
