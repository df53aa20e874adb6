"""Quantizers by name: the grid of every weight, bias and activation, according to the rules for layers.

Must not know: how rules were written, methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import fx

from calibrators.graph.aten import bind, fan_in, free_name, module_path, operator_name, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.elementwise import constant_operand
from calibrators.graph.operators import name_of
from calibrators.graph.rewrite import constant_of
from calibrators.grid.numerics import qparams_from_range
from calibrators.grid.spec import QuantSpec, Site
from calibrators.placement.identity_taps import needs_wide_taps
from calibrators.placement.integer_values import EXTREMES, Placer
from calibrators.placement.layer_rules import DEFAULT_BLOCK, WIDE, RuleList

__all__ = ["Sites", "rescales"]

REDUCED_BITS = 7
"""Widest symmetric weights whose pairs of products with uint8 codes fit 16 bits: 2 * 255 * 63 < 2**15."""


def rescales(node: fx.Node) -> bool:
    """Return whether a weight is one number per channel; such a weight always has the widest grid."""
    return fan_in(node) == 1


def _root(site: Site, by_name: Mapping[str, Site]) -> str:
    """Return the name of the site that owns the scale of `site`."""
    while site.shares is not None:
        site = by_name[site.shares]
    return site.name


@dataclass
class Sites:
    """Turns the placer's decisions into named sites."""

    placer: Placer
    rules: RuleList
    weighted: list[fx.Node]
    reduce_range: bool
    wide_taps: bool
    names: set[str] = field(default_factory=set)

    def build(self) -> tuple[Site, ...]:
        activations = [*self._activations(), *self._constants()]
        readers: dict[str, list[fx.Node]] = {}  # of each weight: layers that share it share one site
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
        name = bind(node)["bias"].name
        return Site(self._name(node, "bias"), "bias", name, (node.name,), self.placer.target.bias)

    def _name(self, node: fx.Node, what: str) -> str:
        """Return `module.path.what`, followed by a number if that is taken."""
        path = module_path(node)
        readable = f"{path}.{what}" if path else what
        name = free_name(readable, self.names.__contains__)
        self.names.add(name)
        return name

    @property
    def _grids(self) -> Mapping[str, tuple[float, int]]:
        """Scale and zero point of inputs whose values lie on such a grid of 8 bits."""
        grids: Mapping[str, tuple[float, int]] = self.placer.graph.meta.get("input_grids", {})
        return grids

    def _settings(self, setting: str, nodes: Iterable[fx.Node]) -> list[Any]:
        return [self.rules.value(setting, node.name) for node in nodes]

    def _weight_spec(self, nodes: list[fx.Node]) -> QuantSpec:
        """Return the grid of a weight: the finest that its readers ask for."""
        grid = self._grid(nodes)
        reduced = self.reduce_range and self.placer.is_weighted(nodes[0])
        widest = min(grid.bits, REDUCED_BITS) if reduced else grid.bits
        bits = min(max(self._settings("weight_bits", nodes)), widest)
        if rescales(nodes[0]):  # nothing to save
            return replace(grid, bits=widest)
        if not all(self._settings("symmetric", nodes)) and bits < widest:
            grid = replace(grid, symmetric=False, narrow=False)
        return replace(grid, bits=bits, tap_bits=self._tap_bits(nodes, bits, widest))

    def _tap_bits(self, nodes: list[fx.Node], bits: int, widest: int) -> int | None:
        """Return the bits of wide identity taps, None if the taps have the bits of the other weights."""
        wide = self.wide_taps and bits < widest and needs_wide_taps(self.placer.graph, bind(nodes[0])["weight"])
        return widest if wide else None

    def _grid(self, nodes: list[fx.Node]) -> QuantSpec:
        """Return the target's grid with the granularity of the rules; a block that holds a whole row is a channel."""
        grid, granularities = self.placer.target.weight, set(self._settings("granularity", nodes))
        if granularities == {"tensor"}:
            return replace(grid, axis=None)
        sizes = [size or DEFAULT_BLOCK for size in self._settings("block_size", nodes)]
        inputs = shape_of(bind(nodes[0])["weight"])[1]
        blocked = "block" in granularities and not self.placer.is_weighted(nodes[0]) and min(sizes) < inputs
        return replace(grid, block_size=min(sizes) if blocked else None)

    def _constants(self) -> list[Site]:
        """Return the sites of constants with which integer kernels combine codes; their values decide the grid."""
        spec, sites = self.placer.target.activation, list[Site]()
        for node in self.placer.nodes:
            operand = constant_operand(node) if self.placer.runs_on_integers(node) else None
            if operand is None or self.placer.factor(node) is not None:
                continue
            low, high = constant_of(operand).aminmax()
            found = qparams_from_range(low, high, spec)
            sites.append(
                Site(
                    name=self._name(node, "constant"),
                    kind="constant",
                    node=operand.name,
                    users=(node.name,),
                    spec=spec,
                    fixed=(float(found.scale), int(found.zero_point)),
                    clip=(float(low), float(high)),
                )
            )
        return sites

    def _activations(self) -> list[Site]:
        placer = self.placer
        sites: dict[fx.Node, Site] = {}
        for node in placer.nodes:
            if not placer.is_quantized[node]:
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
                fixed=self._grids.get(node.name, placer.target.fixed_outputs.get(name_of(node.target))),
                clip=clip_bounds(node) if node in placer.absorbed else None,
            )
            if origin is node and node.op == "call_function" and placer.runs_on_integers(node):
                self._join(node, sites)
                site = self._share(site, node, sites)
            sites[node] = site
        return self._with_bits(sites)

    def _join(self, node: fx.Node, sites: dict[fx.Node, Site]) -> None:
        """Give the operands of an operator that needs it one scale, that of the one which is computed first."""
        if node.target not in EXTREMES and node.target not in self.placer.target.joined_ops:
            return
        by_name = {site.name: site for site in sites.values()}
        roots = {_root(sites[x], by_name) for x in node.all_input_nodes}
        first, *others = (x for x in sites if sites[x].name in roots)
        if any(sites[x].fixed for x in (first, *others)):
            return
        for other in others:
            sites[other] = replace(sites[other], shares=sites[first].name, joined=True)

    def _share(self, site: Site, node: fx.Node, sites: dict[fx.Node, Site]) -> Site:
        """Return the site of a move, stand-alone clip or product with a number with its input's scale, others as is."""
        target = self.placer.target
        if (factor := self.placer.factor(node)) is not None:
            return replace(site, shares=sites[node.args[0]].name, factor=factor, of_codes=True)  # type: ignore[index]
        if node.target in target.same_scale_ops | target.on_codes_ops:
            of_codes = node.target in target.on_codes_ops
            return replace(site, shares=sites[node.args[0]].name, of_codes=of_codes)  # type: ignore[index]
        bounds = clip_bounds(node)
        if bounds is not None:
            of_codes = target.clips_codes
            return replace(site, shares=sites[node.args[0]].name, clip=bounds, of_codes=of_codes)  # type: ignore[index]
        if node.target in target.joined_ops:
            by_name = {each.name: each for each in sites.values()}
            roots = {_root(sites[x], by_name) for x in node.all_input_nodes}
            return replace(site, shares=roots.pop(), joined=True) if len(roots) == 1 else site
        return site

    def _with_bits(self, sites: dict[fx.Node, Site]) -> list[Site]:
        """Return the sites with the most bits that a weighted reader asks for, the same for all that share a scale."""
        root = partial(_root, by_name={site.name: site for site in sites.values()})
        bits: dict[str, int] = {}
        methods: dict[str, str | None] = {}  # of the first reader with one
        for node in filter(self.placer.is_weighted, self.weighted):
            scale = root(sites[bind(node)["input"]])
            bits[scale] = max(bits.get(scale, 0), self.rules.value("activation_bits", node.name))
            methods[scale] = methods.get(scale) or self.rules.value("method", node.name)
        return [
            replace(self._at_bits(site, bits.get(root(site), site.spec.bits)), method=methods.get(root(site)))
            for site in sites.values()
        ]

    def _at_bits(self, site: Site, bits: int) -> Site:
        """Return the site on a grid of that width; one of 16 bits is quantized from floats in any case."""
        if bits == WIDE:
            return replace(site, spec=self.placer.target.wide_activation, fixed=None, of_codes=False)
        fixed = None if site.node in self._grids and bits != site.spec.bits else site.fixed
        return replace(site, spec=replace(site.spec, bits=bits), fixed=fixed)
