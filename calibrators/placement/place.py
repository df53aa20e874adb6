"""Decide where quantizers stand: the graph and a target's rules become sites.

A value is quantized when an integer kernel writes it or reads it:
- operators with a weight read codes; convolutions write codes too, so a quantizer stands on both sides;
- a linear layer writes codes only between integer neighbours, else floats (the faster and exact form in transformers);
- add, mul, concat, pools and the like run on integers if all their inputs are integers and something reads their codes;
- a reshape or max pool moves codes and shares the scale of its input;
- a ReLU or clip after an integer kernel is part of that kernel: the codes saturate at its bounds;
- a constant operand of a sum or product is stored as codes; a positive number only changes the scale that readers see;
- a weight-only layer reads and writes floats.

The layers that read a value decide how fine its grid is (layer_rules). Where several read one value, scale or weight,
the most demanding one decides: most bits, a scale per channel, a zero point.

Must not know: data, methods, ONNX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import InputError, argument
from calibrators.graph.aten import (
    bind,
    coded_outputs,
    constant,
    is_constant,
    layer_name,
    module_path,
    operator_name,
    where,
)
from calibrators.grid.limits import Limits, pairings
from calibrators.grid.spec import QParams, Site
from calibrators.grid.target import Target
from calibrators.placement.fastest import LeftInFloat, faster_in_float
from calibrators.placement.integer_values import Placer
from calibrators.placement.kernel_forms import is_float
from calibrators.placement.layer_rules import AppliedRule, LayerRule, MatchedRule, RuleList
from calibrators.placement.notes import notes_on_floats, notes_on_rules, notes_on_weight_only
from calibrators.placement.placement_options import PlacementOptions
from calibrators.placement.sites import Sites

__all__ = ["Placement", "PlacementOptions", "check_widths", "place"]

aten = torch.ops.aten

FASTEST = LayerRule("placement = fastest", float=True)
"""The rule that `placement` implies, as reports show it."""
FIRST_LAST = "first and last layer"
"""Text in place of a glob in the rule that first_last_bits implies."""


@dataclass(frozen=True, eq=False)
class Placement:
    """The graph in integer forms and its sites, in topological order of the values.

    rules: the layers that each rule decided; notes: the settings that could not be kept, and why.
    lookups: fx names of the embeddings whose tables are stored in 8 bits.
    options, allocated: what decided the sites, as `place` takes it.
    left: the layers that are faster in float, None where there are none.
    """

    graph: fx.GraphModule
    target: Target
    sites: tuple[Site, ...]
    rules: tuple[AppliedRule, ...] = ()
    notes: tuple[str, ...] = ()
    lookups: tuple[str, ...] = ()
    options: PlacementOptions = field(default_factory=PlacementOptions)
    allocated: tuple[MatchedRule, ...] = ()
    left: LeftInFloat | None = None

    @cached_property
    def by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    @cached_property
    def nodes(self) -> dict[str, fx.Node]:
        """Nodes of the graph by fx name."""
        return {node.name: node for node in self.graph.graph.nodes}

    @cached_property
    def weight_of(self) -> dict[str, Site]:
        """Weight site by the fx name of each operator that reads it."""
        return {user: site for site in self.sites if site.kind == "weight" for user in site.users}

    @cached_property
    def activation_of(self) -> dict[str, Site]:
        """Site of an activation or constant by the fx name of its node."""
        return {site.node: site for site in self.sites if site.kind in ("activation", "constant")}

    @cached_property
    def constants(self) -> dict[str, QParams]:
        """Parameters of the constant operands, which their values decide, by the site's name."""
        return {
            site.name: QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), site.spec)
            for site in self.sites
            if site.kind == "constant" and site.fixed is not None
            for scale, zero_point in [site.fixed]
        }

    @cached_property
    def readers(self) -> dict[str, tuple[str, ...]]:
        """Weighted operators that read each weight and each activation scale, by the name of the site that owns it."""
        found: dict[str, list[str]] = {}
        for site in (site for site in self.sites if site.kind == "weight"):
            found[site.name] = [*site.users]
            for user in () if site.weight_only else site.users:
                found.setdefault(self.input_of(self.nodes[user]).name, []).append(user)
        return {name: tuple(users) for name, users in found.items()}

    def again(self, rules: Iterable[MatchedRule]) -> Placement:
        """Return the placement with further rules for operators by name, which win over all but those of the user.

        The layers that are left in float because they are faster there stay the same: one layer more in float could
        turn the balance for the whole network.
        """
        return place(self.graph, self.target, self.options, (*self.allocated, *rules), before=self)

    def matching(self, rule: LayerRule, flag: str) -> MatchedRule:
        """Return a rule with the operators that its glob matches.

        raises: UnknownNameError if there are none.
        """
        return MatchedRule.by_glob(rule, _all_labels(self.graph), flag)

    def values(self, site: Site) -> Tensor:
        """Return the floats of a site of a weight, bias or constant."""
        return constant(self.graph, self.nodes[site.node])

    def input_of(self, node: fx.Node) -> Site:
        """Return the site that owns the scale of what a weighted operator reads."""
        return self.root(self.activation_of[bind(node)["input"].name])

    def added_to(self, bias: Site) -> tuple[Site, Site]:
        """Return the weight site whose products a bias is added to, and the site that owns the scale of the input."""
        (user,) = bias.users
        return self.weight_of[user], self.input_of(self.nodes[user])

    def limits_of(self, weight: Site) -> Limits | None:
        """Return the limits of pairs of codes of a weight; None where no pair can reach what the kernels hold.

        Depthwise convolutions have kernels of their own, which hold every sum.
        """
        values, held = self.values(weight), self.target.pair_sum
        calls = [bind(self.nodes[user]) for user in weight.users]
        depthwise = all(call.get("groups", 1) == len(values) > 1 == values.shape[1] for call in calls)
        if held is None or weight.weight_only or weight.unsigned or depthwise:
            return None
        reads = [self.activation_of[call["input"].name].spec for call in calls]
        highest = max(spec.qmax - min(0, torch.iinfo(spec.dtype).min) for spec in reads)
        lowest, top = weight.spec.qmin, weight.spec.qmax
        reach = max(top, -lowest) if weight.spec.symmetric else top - lowest
        tap = 0 if weight.spec.tap_bits is None else (1 << (weight.spec.tap_bits - 1)) - 1  # one of a pair at most
        if (reach + max(reach, tap)) * highest <= held or any(spec.is_wide for spec in reads):
            return None
        return Limits(
            partners=pairings(values.shape), pair_lowest=-((held + 1) // highest), pair_highest=held // highest
        )

    def root(self, site: Site) -> Site:
        """Return the site that owns the scale and zero point of `site`."""
        while site.shares is not None:
            site = self.by_name[site.shares]
        return site

    def qparams_of(self, site: Site, activations: Mapping[str, QParams]) -> QParams:
        """Return the scale and zero point of an activation or constant, on its grid.

        activations: parameters by name of the site that owns them.
        """
        factor, spec = site.factor, site.spec
        while site.shares is not None:
            site = self.by_name[site.shares]
            factor *= site.factor
        found = activations[site.name]
        return replace(found, scale=found.scale if factor == 1 else found.scale * factor, spec=spec)


def place(
    graph: fx.GraphModule,
    target: Target,
    options: PlacementOptions | None = None,
    allocated: Sequence[MatchedRule] = (),
    *,
    before: Placement | None = None,
) -> Placement:
    """Return the sites of a graph in integer forms (calibrators.graph.canonical) for a target.

    allocated: rules that were found for operators by name; `options.layers` win over them.
    before:    a placement of the same graph, from which the layers that are faster in float are taken over.

    raises: UnknownNameError for a pattern that matches nothing, InputError if nothing is left to quantize.
    """
    options = options or PlacementOptions()
    check_widths(options, target)
    given = _matched(graph, options)
    floats = RuleList([*allocated, *given])
    operators = [node.name for node in graph.graph.nodes if node.op == "call_function"]
    selected = frozenset(name for name in operators if not floats.value("float", name))
    weighted = [node for node in graph.graph.nodes if node.name in selected and _has_weight(graph, target, node)]
    if not weighted:
        if wide := [node for node in graph.graph.nodes if node.name in selected and _is_double(graph, target, node)]:
            raise InputError(
                f"nothing to quantize: the weights of {layer_name(wide[0])} are float64, and integer kernels stand for "
                "float32; capture the model with inputs in float32, which makes its weights float32 too"
            )
        raise InputError(
            f"nothing to quantize: target {target.name!r} has integer kernels for "
            f"{', '.join(sorted(op.split('.')[0] for op in target.weighted))} with constant weights, but the model "
            f"(after {argument('include')}, {argument('exclude')} and float layers) has none of them; check these "
            "settings"
        )
    _check_reach(given, weighted)
    rules = RuleList([*_implied(options, target, weighted), *allocated, *given])
    weight_only = _weight_only(rules, target, weighted)
    placer = Placer(graph, target, selected, frozenset(weighted) - weight_only)
    left = before.left if before else _left_in_float(placer, given) if options.placement == "fastest" else None
    if left is not None:
        costly = MatchedRule(FASTEST, left.nodes, "placement")
        placer = placer.without(left.nodes)
        weighted = [node for node in weighted if node.name not in left.nodes]
        if not weighted:
            raise InputError(
                "nothing is left to quantize: all layers are faster in float, or have a rule that leaves them there; "
                f"give {argument('placement', 'integer')}, or leave out a rule."
            )
        rules = RuleList([*_implied(options, target, weighted), *allocated, costly, *given])
    _check_blocks(rules, weighted)
    _check_coded(placer)
    sites = Sites(placer, rules, weighted, reduce_range=options.reduce_range, wide_taps=options.wide_taps).build()
    notes = *notes_on_floats(graph, left), *notes_on_rules(rules, sites, weighted)
    notes += (*notes_on_weight_only(rules, target, weighted, weight_only),)
    applied = _applied(graph, rules, weighted)
    lookups = tuple(_lookups(graph, selected)) if target.coded_tables else ()
    placement = Placement(graph, target, sites, applied, notes, lookups, options, tuple(allocated), left)
    return _with_unsigned(placement, rules)


def check_widths(options: PlacementOptions, target: Target) -> None:
    """Raise InputError for a width of activations that the target does not have."""
    asked = {"activation_bits": options.activation_bits, "first_last_bits": options.first_last_bits}
    asked |= {f"activation_bits of the rule for layers {rule.match!r}": rule.activation_bits for rule in options.layers}
    for setting, bits in asked.items():
        if bits is not None and bits not in target.widths:
            raise InputError(
                f"{setting} is {bits}, but target {target.name!r} has activations of "
                f"{' or '.join(map(str, target.widths))} bits only; choose one of these."
            )


def _left_in_float(placer: Placer, given: Iterable[MatchedRule]) -> LeftInFloat | None:
    """Return the operators that are much faster in float, without those for which the user gave other settings."""
    asked = [matched for matched in given if matched.flag and matched.rule.settings != {"float": True}]
    return faster_in_float(placer, placer.target.costs, frozenset().union(*(matched.nodes for matched in asked)))


def _with_unsigned(placement: Placement, rules: RuleList) -> Placement:
    """Return the placement with those weights unsigned that a rule asks for and of which pairs could exceed limits."""

    def stored(site: Site) -> Site:
        asked = site.kind == "weight" and "uint8" in (rules.value("portable", user) for user in site.users)
        return replace(site, unsigned=True) if asked and placement.limits_of(site) is not None else site

    return replace(placement, sites=tuple(map(stored, placement.sites)))


def _matched(graph: fx.GraphModule, options: PlacementOptions) -> list[MatchedRule]:
    """Return the rules that the user gave, in order, with what they match: include, exclude, single layers."""
    labels = _all_labels(graph)
    rules = [("include", LayerRule(glob, float=False)) for glob in options.include]
    rules += [("exclude", LayerRule(glob, float=True)) for glob in options.exclude]
    rules += [("layers", rule) for rule in options.layers]
    everything = [MatchedRule(LayerRule("*", float=True), frozenset(labels))] if options.include else []
    return [*everything, *(MatchedRule.by_glob(rule, labels, flag) for flag, rule in rules)]


def _has_weight(graph: fx.GraphModule, target: Target, node: fx.Node) -> bool:
    """Return whether an operator has a constant float32 weight and the target has a kernel for it."""
    if node.target not in target.weighted or not is_float(node):
        return False
    bound = bind(node)
    if is_constant(bound["input"]) or not is_constant(bound["weight"]):
        return False
    bias_ok = bound["bias"] is None or is_constant(bound["bias"])
    return bias_ok and constant(graph, bound["weight"]).dtype == torch.float32


def _lookups(graph: fx.GraphModule, selected: Collection[str]) -> Iterator[str]:
    """Yield the names of embeddings that no rule keeps in float and whose table is a float32 constant."""
    for node in graph.graph.nodes:
        is_lookup = node.target is aten.embedding.default and node.name in selected
        if is_lookup and is_constant(node.args[0]) and constant(graph, node.args[0]).dtype == torch.float32:
            yield node.name


def _is_double(graph: fx.GraphModule, target: Target, node: fx.Node) -> bool:
    """Return whether an operator has a constant float64 weight."""
    weight = bind(node)["weight"] if node.target in target.weighted else None
    return is_constant(weight) and constant(graph, weight).dtype == torch.float64


def _implied(options: PlacementOptions, target: Target, weighted: Sequence[fx.Node]) -> Iterator[MatchedRule]:
    """Yield the rules that come before all others: for every layer, weight-only ones, the first and the last."""
    everywhere = LayerRule(
        "*",
        weight_bits=options.weight_bits,
        activation_bits=options.activation_bits,
        granularity="tensor" if options.per_tensor_weights else "channel",
        portable=options.portable,
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
        yield MatchedRule(LayerRule(FIRST_LAST, weight_bits=bits, activation_bits=bits), nodes, "first_last_bits")


def _check_coded(placer: Placer) -> None:
    """Raise InputError for an output that is to be given as codes, but that no integer kernel writes."""
    for name, node in coded_outputs(placer.graph).items():
        if not placer.writes_codes(node):
            raise InputError(
                f"output {name!r} cannot be given as codes, because it comes from {where(node)}, which is no integer "
                f"kernel; leave {argument('output')} out for it, or end the model before that operator."
            )


def _check_reach(rules: Iterable[MatchedRule], weighted: Sequence[fx.Node]) -> None:
    """Raise InputError for a rule that sets more than `float` but matches no layer to which the settings apply."""
    names = {node.name for node in weighted}
    for matched in rules:
        if matched.rule.settings.keys() != {"float"} and not matched.nodes & names:
            first = next(iter(matched.rule.settings))
            raise InputError(
                f"{argument('layers')} pattern {matched.rule.match!r} sets {first}, but matches no quantized layer "
                "with weights; "
                f"only these have it: {', '.join(dict.fromkeys(map(layer_name, weighted)))}."
            )


def _weight_only(rules: RuleList, target: Target, weighted: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """Return the weight-only layers: those that a rule names and that have such a kernel and a weight of their own.

    raises: InputError for a weight-only rule that matches no layer with such a kernel.
    """
    able = {node.name for node in weighted if node.target in target.weight_only}
    for matched in rules.rules:
        if matched.rule.weight_only and not matched.nodes & able:
            reached = [node for node in weighted if node.name in matched.nodes]
            raise InputError(
                f"{argument('layers')} pattern {matched.rule.match!r}: {_no_weight_only(target, reached)}."
            )
    readers = Counter(bind(node)["weight"].name for node in weighted)
    asked = (node for node in weighted if node.name in able and rules.value("weight_only", node.name))
    return frozenset(node for node in asked if readers[bind(node)["weight"].name] == 1)


def _no_weight_only(target: Target, layers: Sequence[fx.Node]) -> str:
    """Return the error text: none of the layers has a weight-only kernel."""
    kernels = ", ".join(sorted(op.split(".")[0] for op in target.weight_only)) or "no operator"
    found = ", ".join(sorted({operator_name(node.target) for node in layers}))
    return f"target {target.name!r} has weight-only kernels for {kernels}, but not for {found}"


def _check_blocks(rules: RuleList, weighted: Sequence[fx.Node]) -> None:
    """Raise InputError for scales per block in integer kernels."""
    for node in weighted:
        decider = rules.decider("granularity", node.name)
        if decider is None or decider.rule.granularity != "block" or rules.value("weight_only", node.name):
            continue
        raise InputError(
            f"{argument('layers')} pattern {decider.rule.match!r} gives {layer_name(node)} one weight scale per "
            "block, which "
            "integer kernels do not have; set weight_only = true there or another granularity."
        )


def _applied(graph: fx.GraphModule, rules: RuleList, weighted: Sequence[fx.Node]) -> tuple[AppliedRule, ...]:
    """Return the rules with the layers that they decided, without the rule that holds for all layers."""
    with_weights = {node.name for node in weighted}

    def decides(matched: MatchedRule, node: fx.Node) -> bool:
        settings = matched.rule.settings if node.name in with_weights else {"float": None}
        return any(rules.decider(setting, node.name) is matched for setting in settings)

    def layers(matched: MatchedRule) -> tuple[str, ...]:
        nodes = (node for node in graph.graph.nodes if node.name in matched.nodes and decides(matched, node))
        return tuple(dict.fromkeys(map(layer_name, nodes)))

    given = [matched for matched in rules.rules if matched.flag]
    return tuple(AppliedRule(matched.rule.match, matched.rule.settings, layers(matched)) for matched in given)


def _all_labels(graph: fx.GraphModule) -> dict[str, list[str]]:
    return {node.name: _labels(node) for node in graph.graph.nodes if node.op == "call_function"}


def _labels(node: fx.Node) -> list[str]:
    """Return what a glob may match: node name, operator, and the module path with each of its parents."""
    path = module_path(node)
    parts = path.split(".") if path else []
    paths = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return [*dict.fromkeys((node.name, operator_name(node.target), *paths))]
