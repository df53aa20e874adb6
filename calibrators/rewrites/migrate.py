"""Migration: factors and shifts per channel move from what linear layers read into constants and weights.

Channels of what a linear layer reads may differ by orders of magnitude, but all share one scale: outputs of layer norms
and GELUs, values of attention. Reading (x - z) / s with the weights W * s and the bias b + W z is the same function
of channels that are alike.

Source: Xiao et al., SmoothQuant, 2022 (s = max|x| ** a / max|W| ** (1 - a), moved into the layer norm); Li et al.,
RepQ-ViT, 2023 (s and z that make all channels of a layer norm's output alike, moved into its affine).
Departs: the exponents of both ranges and the shift are chosen for each value, as those with the least error of the
layers' outputs, both operands quantized to their bits; values of attention and linear layers carry factors too; where
no operator does, one product per channel is added if that lowers the error enough.

The function is the same up to rounding: factors are found in float64, and what they change is rounded once.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from calibrators.execution.measure import Batch
from calibrators.graph.aten import bind, constant, copy_graph, infer_shapes, layer_name, replace_args
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.rewrite import call_before, constant_before
from calibrators.graph.walk import walk
from calibrators.grid.numerics import fake_quant, qparams_from_range
from calibrators.grid.spec import QuantSpec, Site
from calibrators.placement.place import Placement
from calibrators.record import MigratedValue, Migration, Refused
from calibrators.rewrites.carriers import REORDERS, Carrier, Value, find_values
from calibrators.rewrites.layer_pairs import set_constants

__all__ = ["migrate"]

aten = torch.ops.aten

SAMPLES, ROWS = 128, 1024
"""Samples that are run, and rows of each value among theirs that judge."""

CARRIED, ADDED = 0.95, 0.5
"""Largest share of the error that may remain after a change that costs nothing, and after one that adds a product."""

DECIDES = 0.2
"""Smallest share of the error that must come from the value: methods that round weights well make up for the rest."""

WORTH = 1e-3
"""Smallest error for which a product is added, -30 dB."""

EXPONENTS = (0.0, 0.25, 0.75, 1.0)
"""Exponents of the ranges of channels that are compared with 0.5."""
WEIGHT_EXPONENTS = (0.25, 0.5)
"""Exponents of the ranges of a weight's columns that are compared with 0."""

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Ranges that stand for a range method: shares of the extremes, of which the least error is taken."""

SMALLEST = 2.0**-10
"""Smallest range of a channel that factors follow, relative to the largest; channels without values keep theirs."""

SMALLEST_ERROR = 1e-30
"""Floor of what is divided by."""


@dataclass(frozen=True, eq=False)
class _Layers:
    """The layers that read one value.

    x: [rows, columns], on `grid` when quantized; weights: [outputs, columns] each, with their grids.
    """

    x: Tensor
    grid: QuantSpec
    weights: Sequence[tuple[Tensor, QuantSpec]]

    def error(self, factor: Tensor, shift: Tensor, *, of_weights: bool = True) -> float:
        """Return the mean error of the layers' outputs, relative to their energy, both operands rounded or one."""
        read = _rounded(((self.x - shift) / factor).float(), self.grid)
        errors = []
        for weight, spec in self.weights:
            scaled = (weight * factor).float()
            noise = (self.x - shift).float() @ weight.T.float()
            noise -= read @ (_rounded(scaled, spec) if of_weights else scaled).T
            exact = self.x.float() @ weight.T.float()
            errors.append(
                float(noise.square().sum() / (exact - exact.mean(0)).square().sum().clamp(min=SMALLEST_ERROR))
            )
        return sum(errors) / len(errors)

    def shifts(self) -> Iterator[Tensor]:
        """Yield shifts: the middle and the mean of each channel."""
        yield (self.x.amax(0) + self.x.amin(0)) / 2
        yield self.x.mean(0)

    def factors(self, shift: Tensor, of_input: float, of_weight: float) -> Tensor:
        """Return range ** of_input / (range of the weights) ** of_weight, [columns], with a geometric mean of one."""
        weights = torch.stack([weight.abs().amax(0) for weight, _ in self.weights]).amax(0)
        ranges = ((self.x - shift).abs().amax(0), weights)
        read, written = (r.clamp(min=max(float(r.max()) * SMALLEST, SMALLEST_ERROR)) for r in ranges)
        factor = read**of_input / written**of_weight
        return factor / factor.log().mean().exp()


@dataclass(frozen=True, eq=False)
class _Choice:
    """Factors and shifts [columns], float64, and the error with them."""

    factor: Tensor
    shift: Tensor
    error: float


def migrate(placement: Placement, batches: Iterable[Batch]) -> tuple[fx.GraphModule, Migration]:
    """Return a copy of a placed graph in which factors have moved, and a record of it.

    batches: calibration data, of which the first 128 samples are read.
    """
    graph = copy_graph(placement.graph)
    found = ((value, _grids(placement, value), _usable(placement, value.carrier)) for value in find_values(graph))
    values = [(replace(value, carrier=carrier), *grids) for value, grids, carrier in found if grids is not None]
    samples = _sampled(graph, [value.node for value, *_ in values], batches)
    moved, skipped = list[MigratedValue](), list[Refused]()
    for value, grid, grids in values:
        weights = [constant(graph, bind(reader)["weight"]).double() for reader in value.readers]
        layers = _Layers(samples[value.node], grid, list(zip(weights, grids, strict=True)))
        before, choice = _chosen(layers, value.carrier, can_add=_is_float(placement, value.node))
        if isinstance(choice, str):
            skipped.append(Refused(layer_name(value.readers[0]), choice))
        else:
            _apply(graph, value, choice)
            moved.append(_record(value, choice, before))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    infer_shapes(graph)
    return graph, Migration(tuple(moved), tuple(skipped))


def _usable(placement: Placement, carrier: Carrier | str) -> Carrier | str:
    """Return a carrier unless the channels of its constants share a scale, which factors would make worse."""
    if isinstance(carrier, str):
        return carrier
    coarse = {site.node for site in placement.sites if site.kind in ("weight", "constant") and site.spec.axis is None}
    shares = any(node.name in coarse for node in carrier.node.all_input_nodes)
    return f"the constants of {layer_name(carrier.node)} have one scale" if shares else carrier


def _is_float(placement: Placement, node: fx.Node) -> bool:
    """Return whether a value comes from a float operator, so that a product after it is one as well."""
    while node.target in REORDERS:
        node = node.all_input_nodes[0]
    target = placement.target
    kernels = target.integer_ops | target.weighted_to_codes | target.weighted_to_either | target.weighted_to_float
    return node.target not in kernels and clip_bounds(node) is None


def _chosen(layers: _Layers, carrier: Carrier | str, *, can_add: bool) -> tuple[float, _Choice | str]:
    """Return the error as it is, and the choice that lowers it enough, or why there is none."""
    zeros = torch.zeros(layers.x.shape[1], dtype=torch.float64)
    start = _Choice(zeros + 1, zeros, layers.error(zeros + 1, zeros))
    before = max(start.error, SMALLEST_ERROR)
    of_weights = 1 - layers.error(start.factor, start.shift, of_weights=False) / before
    if of_weights > 1 - DECIDES:
        return before, f"{of_weights:.0%} of the error is that of weights"
    if isinstance(carrier, Carrier):
        shifts, enough, prefix = carrier.shifts, CARRIED, ""
    elif not can_add:
        return before, carrier
    elif before < WORTH:
        return before, f"{carrier}, and the error is {before:.1g}"
    else:
        shifts, enough, prefix = False, ADDED, f"{carrier}, and "
    choice = _search(layers, start, shifts=shifts)
    remains = choice.error / before
    return before, choice if remains <= enough else f"{prefix}{remains:.0%} of the error would remain"


def _grids(placement: Placement, value: Value) -> tuple[QuantSpec, list[QuantSpec]] | None:
    """Return the grids of a value and of its readers' weights; None unless all of them read codes of 8 bits or less."""
    site = placement.activation_of.get(value.node.name)
    sites: list[Site | None] = [placement.weight_of.get(reader.name) for reader in value.readers]
    weights = [each.spec for each in sites if each is not None and not each.weight_only]
    if site is None or site.spec.is_wide or len(weights) < len(sites) or site.shares is not None:
        return None
    return site.spec, weights


def _sampled(graph: fx.GraphModule, nodes: Sequence[fx.Node], batches: Iterable[Batch]) -> dict[fx.Node, Tensor]:
    """Return up to ROWS rows of every value, float64, drawn from the first samples with a fixed seed."""
    rows: dict[fx.Node, list[Tensor]] = {node: [] for node in nodes}
    seen = 0
    with torch.no_grad():
        for batch in batches if nodes else ():
            for node, values in walk(graph, batch):
                if node in rows:
                    rows[node].append(_drawn(values[node].double()))
            seen += len(batch[0])
            if seen >= SAMPLES:
                break
    return {node: _drawn(torch.cat(parts)) for node, parts in rows.items()}


def _drawn(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:ROWS]]


def _search(layers: _Layers, start: _Choice, *, shifts: bool) -> _Choice:
    """Return the best of shifts at the exponent 0.5, then of exponents of the value's ranges, then of the weights'."""

    def at(shift: Tensor, *exponents: float) -> tuple[_Choice, tuple[float, ...]]:
        factor = layers.factors(shift, *exponents)
        return _Choice(factor, shift, layers.error(factor, shift)), exponents

    def error(found: tuple[_Choice, tuple[float, ...]]) -> float:
        return found[0].error

    tried = [start.shift, *(layers.shifts() if shifts else ())]
    best = min((at(shift, 0.5, 0.0) for shift in tried), key=error)
    shift = best[0].shift
    best = min([best, *(at(shift, exponent, 0.0) for exponent in EXPONENTS)], key=error)
    own = best[1][0]
    return min([best, *(at(shift, own, exponent) for exponent in WEIGHT_EXPONENTS)], key=error)[0]


def _rounded(x: Tensor, spec: QuantSpec) -> Tensor:
    """Return a value or a weight on the best of some ranges, each channel on its own where it has a scale."""
    flat = x if spec.axis is not None else x.reshape(1, -1)
    lo, hi = flat.amin(1), flat.amax(1)
    own = replace(spec, axis=0, block_size=None)
    tries = [fake_quant(flat, qparams_from_range(lo * clip, hi * clip, own)) for clip in CLIPS]
    best = torch.stack([(each - flat).square().sum(1) for each in tries]).argmin(0)
    return torch.stack(tries)[best, torch.arange(len(flat))].reshape(x.shape)


def _apply(graph: fx.GraphModule, value: Value, choice: _Choice) -> None:
    """Make the layers read (x - shift) / factor, and give them weights with which they compute the same."""
    for reader in value.readers:
        weight, bias = (constant(graph, bind(reader)[name]).double() for name in ("weight", "bias"))
        set_constants(graph, reader, weight=weight * choice.factor, bias=bias + weight @ choice.shift)
    if isinstance(value.carrier, str):
        _add_product(value, 1 / choice.factor)
        return
    node, sources = value.carrier.node, value.carrier.sources
    bound, ones = bind(node), torch.ones(int(node.meta["tensor_meta"].shape[-1]), dtype=torch.float64)
    factor, shift = ones.clone(), torch.zeros_like(ones)
    factor[sources], shift[sources] = choice.factor, choice.shift
    changed = {}
    for name in ("weight", "bias", "other"):  # in this order, which the emitted file follows
        if name not in bound:
            continue
        known = bound[name]
        before = (ones * (name == "weight")) if known is None else constant(graph, known).double()
        moved = before - shift if name == "bias" else before
        changed[name] = moved / factor.reshape(-1, *[1] * (moved.ndim - 1))
    set_constants(graph, node, **changed)


def _add_product(value: Value, factor: Tensor) -> None:
    first = value.readers[0]
    dtype = value.node.meta["tensor_meta"].dtype
    made = call_before(first, aten.mul.Tensor, value.node, constant_before(first, "factor", factor.to(dtype)))
    made.meta = dict(value.node.meta)
    for reader in value.readers:
        replace_args(reader, input=made)


def _record(value: Value, choice: _Choice, before: float) -> MigratedValue:
    return MigratedValue(
        carrier=None if isinstance(value.carrier, str) else layer_name(value.carrier.node),
        readers=tuple(map(layer_name, value.readers)),
        channels=len(choice.factor),
        factor_lo=float(choice.factor.min()),
        factor_hi=float(choice.factor.max()),
        shifted=bool(choice.shift.any()),
        error_before=before,
        error_after=choice.error,
    )
