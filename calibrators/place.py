"""Where quantizers stand: the graph and a target's rules become sites.

A value is quantized when an integer kernel writes it or reads it:
- operators with a weight read codes; convolutions write codes too, so a quantizer stands on both sides;
- a linear layer writes codes only between integer neighbours, else floats (the faster and exact form in transformers);
- add, mul, concat, pools and the like run on integers when all their inputs do and somebody reads their integers;
- a reshape or max pool moves codes and shares the scale of its input;
- a ReLU or clip behind an integer kernel is part of that kernel: the codes saturate at its bounds;
- a layer of which weights only are quantized reads and writes floats.

How fine a grid is, the layers that read it say (calibrators.rules). Where several read one value, scale or weight, the
most demanding decides: most bits, a scale per channel, a zero point.

Must not know: data, methods, ONNX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from calibrators.errors import InputError
from calibrators.forms import clip_bounds
from calibrators.graph import bind, constant, fan_in, is_constant, layer_name, module_path, shape_of
from calibrators.rules import DEFAULT_BLOCK, WIDE, AppliedRule, LayerRule, MatchedRule, RuleList
from calibrators.spec import QuantSpec, Site, Target
from calibrators.taps import needs_wide_taps

__all__ = ["Placement", "PlacementOptions", "operator_name", "place"]

aten = torch.ops.aten

FIRST_LAST = "first and last layer"
"""What stands for a glob in the rule that first_last_bits implies."""

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
    first_last_bits: bits of weight and input activation of the first and last weighted operator; None: no exception. It
                     is the first rule of all, so that any of `layers` takes precedence.
    reduce_range:    weights of at most 7 bits, |code - zero_point| <= 63, so that uint8 x int8 kernels that add pairs
                     of products in 16 bits do not saturate.
    weight_only:     layers with a kernel for it (linear ones) have quantized weights, float inputs and float biases.
    block_size:      inputs of a channel that have one weight scale there; None: all.
    wide_taps:       where the bits cannot hold an identity branch beside the other weights of a kernel that it was
                     folded into, its codes keep 8 bits (7 with reduce_range; calibrators.taps).
    include:         globs on module path, operator or node name; only matching operators are quantized.
    exclude:         globs likewise; matching operators stay in float.
    layers:          rules for single layers, in order; they win over all of the above.
    allocated:       rules that calibrators.mixed found for operators by name; `layers` win over them.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    first_last_bits: int | None = 8
    per_tensor_weights: bool = False
    weight_only: bool = False
    block_size: int | None = None
    reduce_range: bool = False
    wide_taps: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    layers: tuple[LayerRule, ...] = ()
    allocated: tuple[MatchedRule, ...] = ()


@dataclass(frozen=True, eq=False)
class Placement:
    """The graph in integer forms and its sites, in topological order of the values.

    rules: which layers the rules decided; notes: which of their settings could not be kept, and why.
    """

    graph: fx.GraphModule
    target: Target
    sites: tuple[Site, ...]
    rules: tuple[AppliedRule, ...] = ()
    notes: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def activation_of(self) -> dict[str, Site]:
        """Activation site by the fx name of its node."""
        return {site.node: site for site in self.sites if site.kind == "activation"}

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Weighted operators that read each weight and each activation scale, by the name of the site that owns it."""
        found: dict[str, list[str]] = {}
        nodes = {node.name: node for node in self.graph.graph.nodes}
        for site in (site for site in self.sites if site.kind == "weight"):
            found[site.name] = [*site.users]
            for user in () if site.weight_only else site.users:
                found.setdefault(self.input_of(nodes[user]).name, []).append(user)
        return {name: tuple(users) for name, users in found.items()}

    def input_of(self, node: fx.Node) -> Site:
        """The site that owns the scale of what a weighted operator reads."""
        return self.root(self.activation_of[bind(node)["input"].name])

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
    given = _matched(graph, options)
    floats = RuleList(given)
    operators = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    selected = frozenset(name for name in operators if not floats.value("float", name))
    weighted = [node for node in graph.graph.nodes if node.name in selected and _has_weight(graph, target, node)]
    if not weighted:
        raise InputError(
            f"nothing to quantize: target {target.name!r} has integer kernels for "
            f"{', '.join(sorted(operator_name(op) for op in target.weighted))} with constant weights, and the model "
            "(after --include, --exclude and float layers) has none of them"
        )
    _check_reach(given, weighted)
    rules = RuleList([*_implied(options, target, weighted), *options.allocated, *given])
    weight_only = _weight_only(rules, target, weighted)
    _check_blocks(rules, weighted)
    placer = _Placer(graph, target, selected, frozenset(weighted) - weight_only)
    sites = _Sites(placer, options, rules, weighted).build()
    notes = *_notes(rules, sites, weighted), *_notes_on_weight_only(rules, target, weighted, weight_only)
    return Placement(graph, target, sites, _applied(graph, rules, weighted), notes)


def operator_name(target: object) -> str:
    """Short name of an operator: 'conv2d' for aten.conv2d.default."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", str(target))


def _matched(graph: fx.GraphModule, options: PlacementOptions) -> list[MatchedRule]:
    """The rules that the user gave, in order, with what they match: include, exclude, single layers."""
    labels = {node.name: _labels(node) for node in graph.graph.nodes if node.op == "call_function"}
    rules = [("include", LayerRule(glob, float=False)) for glob in options.include]
    rules += [("exclude", LayerRule(glob, float=True)) for glob in options.exclude]
    rules += [("layer", rule) for rule in options.layers]
    everything = [MatchedRule(LayerRule("*", float=True), frozenset(labels))] if options.include else []
    return [*everything, *(MatchedRule.by_glob(rule, labels, flag) for flag, rule in rules)]


def _has_weight(graph: fx.GraphModule, target: Target, node: fx.Node) -> bool:
    """An operator with a constant float32 weight for which the target has a kernel."""
    if node.target not in target.weighted or not _is_float(node):
        return False
    bound = bind(node)
    if is_constant(bound["input"]) or not is_constant(bound["weight"]):
        return False
    bias_ok = bound["bias"] is None or is_constant(bound["bias"])
    return bias_ok and constant(graph, bound["weight"]).dtype == torch.float32


def _implied(options: PlacementOptions, target: Target, weighted: Sequence[fx.Node]) -> Iterator[MatchedRule]:
    """The rules that come before all others: for every layer, for weight-only ones, for the first and the last."""
    everywhere = LayerRule(
        "*",
        weight_bits=options.weight_bits,
        activation_bits=options.activation_bits,
        granularity="tensor" if options.per_tensor_weights else "channel",
    )
    yield MatchedRule(everywhere, frozenset(node.name for node in weighted))
    if options.weight_only:
        nodes = frozenset(node.name for node in weighted if node.target in target.weight_only)
        if not nodes:
            raise InputError(f"weight_only: {_no_weight_only(target, weighted)}.")
        granularity: Any = None if options.block_size is None else "block"
        rule = LayerRule("*", weight_only=True, granularity=granularity, block_size=options.block_size)
        yield MatchedRule(rule, nodes)
    if options.first_last_bits is not None:
        bits = options.first_last_bits
        nodes = frozenset({weighted[0].name, weighted[-1].name})
        yield MatchedRule(LayerRule(FIRST_LAST, weight_bits=bits, activation_bits=bits), nodes, "first-last-bits")


def _check_reach(rules: Iterable[MatchedRule], weighted: Sequence[fx.Node]) -> None:
    """Raises InputError for a rule that says more than float and meets no layer to which that applies."""
    names = {node.name for node in weighted}
    for matched in rules:
        if matched.rule.settings.keys() != {"float"} and not matched.nodes & names:
            first = next(iter(matched.rule.settings))
            raise InputError(
                f"--layer pattern {matched.rule.match!r} sets {first} and matches no quantized layer with weights, the "
                f"only ones that have it; they are {', '.join(dict.fromkeys(map(layer_name, weighted)))}."
            )


def _weight_only(rules: RuleList, target: Target, weighted: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """The layers of which weights only are quantized: told so, with such a kernel and a weight that no other reads.

    raises: InputError for a rule that says so of no layer with such a kernel.
    """
    able = {node.name for node in weighted if node.target in target.weight_only}
    for matched in rules.rules:
        if matched.rule.weight_only and not matched.nodes & able:
            reached = [node for node in weighted if node.name in matched.nodes]
            raise InputError(f"--layer pattern {matched.rule.match!r}: {_no_weight_only(target, reached)}.")
    readers = Counter(bind(node)["weight"].name for node in weighted)
    told = (node for node in weighted if node.name in able and rules.value("weight_only", node.name))
    return frozenset(node for node in told if readers[bind(node)["weight"].name] == 1)


def _no_weight_only(target: Target, layers: Sequence[fx.Node]) -> str:
    """That none of the layers has a kernel that reads codes of the weight alone."""
    kernels = ", ".join(sorted(map(operator_name, target.weight_only))) or "no operator"
    found = ", ".join(sorted({operator_name(node.target) for node in layers}))
    return f"target {target.name!r} has kernels with quantized weights and float inputs for {kernels}, not for {found}"


def _check_blocks(rules: RuleList, weighted: Sequence[fx.Node]) -> None:
    """Raises InputError for scales per block in integer kernels."""
    for node in weighted:
        decider = rules.decider("granularity", node.name)
        if decider is None or decider.rule.granularity != "block" or rules.value("weight_only", node.name):
            continue
        raise InputError(
            f"--layer pattern {decider.rule.match!r} gives {layer_name(node)} one weight scale per block, which "
            "integer kernels do not have; set weight_only = true there or another granularity."
        )


def _applied(graph: fx.GraphModule, rules: RuleList, weighted: Sequence[fx.Node]) -> tuple[AppliedRule, ...]:
    """What the rules decided, without the one that holds for every layer."""
    with_weights = {node.name for node in weighted}

    def decides(matched: MatchedRule, node: fx.Node) -> bool:
        settings = matched.rule.settings if node.name in with_weights else {"float": None}
        return any(rules.decider(setting, node.name) is matched for setting in settings)

    def layers(matched: MatchedRule) -> tuple[str, ...]:
        nodes = (node for node in graph.graph.nodes if node.name in matched.nodes and decides(matched, node))
        return tuple(dict.fromkeys(map(layer_name, nodes)))

    told = [matched for matched in rules.rules if matched.flag]
    return tuple(AppliedRule(matched.rule.match, matched.rule.settings, layers(matched)) for matched in told)


def _notes(rules: RuleList, sites: Iterable[Site], weighted: Sequence[fx.Node]) -> Iterator[str]:
    """One sentence for every layer that has not the bits of a rule of the user, or is float by a rule for another."""
    bits = {(site.kind, user): site.spec.bits for site in sites for user in site.users}

    def missed(setting: str, node: fx.Node, found: int) -> bool:
        decider = rules.decider(setting, node.name)
        told = decider is not None and (decider.flag == "layer" or found == WIDE)
        return told and found > rules.value(setting, node.name)

    for node in weighted:
        of_weight, of_input = bits["weight", node.name], bits.get(("activation", node.name), 0)
        if missed("weight_bits", node, of_weight) and not _rescales(node):
            yield f"{layer_name(node)}: its weight keeps {of_weight} bits, because another layer shares the weight"
        if missed("activation_bits", node, of_input):
            yield f"{layer_name(node)}: its input keeps {of_input} bits, because another layer shares value or scale"


def _notes_on_weight_only(
    rules: RuleList, target: Target, weighted: Sequence[fx.Node], weight_only: Collection[fx.Node]
) -> Iterator[str]:
    """One sentence for every layer that is not weight-only although a rule says so, or whose rules do not show."""
    for node in weighted:
        if node in weight_only:
            decider = rules.decider("activation_bits", node.name)
            if decider is not None and decider.flag == "layer":
                yield f"{layer_name(node)}: activation_bits has no effect, because it is weight_only"
        elif rules.value("weight_only", node.name):
            if node.target in target.weight_only:
                yield f"{layer_name(node)}: not weight_only, because another layer shares its weight"
            else:
                yield f"{layer_name(node)}: not weight_only, because {operator_name(node.target)} has no such kernel"
    others = {operator_name(node.target) for node in weighted if node.target not in target.weight_only}
    everywhere = any(matched.rule.weight_only and not matched.flag for matched in rules.rules)
    if everywhere and others:
        yield f"weight_only does not apply to {', '.join(sorted(others))}: there is no such kernel, it stays as it was"


def _labels(node: fx.Node) -> list[str]:
    """What a glob may match: node name, operator, and the module path with each of its parents."""
    path = module_path(node)
    parts = path.split(".") if path else []
    paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return [*dict.fromkeys((node.name, operator_name(node.target), *paths))]


class _Placer:
    """Decides node by node: what can be an integer, and what is wanted as one."""

    def __init__(
        self, graph: fx.GraphModule, target: Target, selected: frozenset[str], weighted: frozenset[fx.Node]
    ) -> None:
        self.graph, self.target, self.selected, self.weighted = graph, target, selected, weighted
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
        """An operator with constant weight that the target runs on integers."""
        return node in self.weighted

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


def _rescales(node: fx.Node) -> bool:
    """Whether a weight is one number per channel: its grid is the widest there is."""
    return fan_in(node) == 1


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
    rules: RuleList
    weighted: list[fx.Node]
    names: set[str] = field(default_factory=set)

    def build(self) -> tuple[Site, ...]:
        activations = self._activations()
        readers: dict[str, list[fx.Node]] = {}  # of each weight: tied layers share one site
        for node in self.weighted:
            readers.setdefault(bind(node)["weight"].name, []).append(node)
        weights = [self._weight(name, nodes) for name, nodes in readers.items()]
        integer = [node for node in self.weighted if self.placer.is_weighted(node)]
        biases = [self._bias(node) for node in integer if bind(node)["bias"] is not None]
        return (*activations, *weights, *biases)

    def _weight(self, name: str, nodes: list[fx.Node]) -> Site:
        users = tuple(node.name for node in nodes)
        weight_only = not self.placer.is_weighted(nodes[0])
        label = self._name(nodes[0], "weight")
        method = next(filter(None, self._settings("method", nodes)), None)
        return Site(label, "weight", name, users, self._weight_spec(nodes), method=method, weight_only=weight_only)

    def _bias(self, node: fx.Node) -> Site:
        spec = QuantSpec(bits=32, signed=True, symmetric=True, axis=0, narrow=True)
        return Site(self._name(node, "bias"), "bias", bind(node)["bias"].name, (node.name,), spec)

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

    def _settings(self, setting: str, nodes: Iterable[fx.Node]) -> list[Any]:
        return [self.rules.value(setting, node.name) for node in nodes]

    def _weight_spec(self, nodes: list[fx.Node]) -> QuantSpec:
        """The grid of a weight: of all that its readers ask for the finest."""
        grid = self._grid(nodes)
        reduced = self.options.reduce_range and self.placer.is_weighted(nodes[0])
        widest = min(grid.bits, REDUCED_BITS) if reduced else grid.bits
        bits = min(max(self._settings("weight_bits", nodes)), widest)
        if _rescales(nodes[0]):  # nothing to save
            return replace(grid, bits=widest)
        symmetric = self._settings("symmetric", nodes)
        if False in symmetric and bits == widest:
            raise InputError(
                f"--layer pattern {self._decider('symmetric', nodes).match!r} asks for symmetric = false at "
                f"{layer_name(nodes[0])}, whose weights have {bits} bits: only fewer can have a zero point; set "
                f"weight_bits below {widest} there, or leave symmetric out."
            )
        if not all(symmetric) and bits < widest:
            grid = replace(grid, symmetric=False, narrow=False)
        return replace(grid, bits=bits, tap_bits=self._tap_bits(nodes, bits, widest))

    def _tap_bits(self, nodes: list[fx.Node], bits: int, widest: int) -> int | None:
        """Bits of the taps of an identity branch where they are more than the others'."""
        weight, graph = bind(nodes[0])["weight"], self.placer.graph
        wide = self.options.wide_taps and bits < widest and len(weight.users) == len(nodes)
        return widest if wide and needs_wide_taps(graph, weight) else None

    def _grid(self, nodes: list[fx.Node]) -> QuantSpec:
        """The grid of the target with what has one scale; blocks that hold a whole row are channels."""
        grid, granularities = self.placer.target.weight, set(self._settings("granularity", nodes))
        if granularities == {"tensor"}:
            return replace(grid, axis=None)
        sizes = [size or DEFAULT_BLOCK for size in self._settings("block_size", nodes)]
        inputs = shape_of(bind(nodes[0])["weight"])[1]
        blocked = "block" in granularities and not self.placer.is_weighted(nodes[0]) and min(sizes) < inputs
        return replace(grid, block_size=min(sizes) if blocked else None)

    def _decider(self, setting: str, nodes: list[fx.Node]) -> LayerRule:
        found = (self.rules.decider(setting, node.name) for node in nodes)
        return next(matched.rule for matched in found if matched is not None and not getattr(matched.rule, setting))

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
        """Sites with the bits of their readers with weights, of the widest; sites that share a scale have the same."""
        by_name = {site.name: site for site in sites.values()}

        def root(site: Site) -> str:
            while site.shares is not None:
                site = by_name[site.shares]
            return site.name

        bits: dict[str, int] = {}
        methods: dict[str, str | None] = {}  # of the first reader with one
        for node in filter(self.placer.is_weighted, self.weighted):
            scale = root(sites[bind(node)["input"]])
            bits[scale] = max(bits.get(scale, 0), self.rules.value("activation_bits", node.name))
            methods[scale] = methods.get(scale) or self.rules.value("method", node.name)
        return [
            replace(self._at_bits(site, bits.get(root(site), site.spec.bits)), method=methods.get(root(site)))
            for site in by_name.values()
        ]

    def _at_bits(self, site: Site, bits: int) -> Site:
        """The site on a grid of that width; a wide one is made from floats, whatever stands before it."""
        if bits == WIDE:
            return replace(site, spec=self.placer.target.wide_activation, fixed=None, of_codes=False)
        return replace(site, spec=replace(site.spec, bits=bits))
