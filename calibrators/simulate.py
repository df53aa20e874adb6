"""Running the graph with eyes open: statistics at the sites, and the quantized program beside the float graph.

Must not know: methods, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.freeze import CalibrationResult
from calibrators.graph import constant, where
from calibrators.numerics import dequantize
from calibrators.observe import Statistic
from calibrators.place import Placement
from calibrators.program import DEQUANTIZE

__all__ = ["Batch", "observe", "sqnr"]

Batch = tuple[Tensor, ...]


class Watcher(fx.Interpreter):
    """Runs a graph and shows every value to a callback; values are freed after their last reader."""

    def __init__(self, graph: fx.GraphModule, see: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(graph)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.see(n, value)
        return value


def observe(
    placement: Placement, batches: Iterable[Batch], advance: Callable[[], None] = lambda: None
) -> dict[str, Statistic]:
    """Statistics of every activation site that owns its scale, from one float pass over the batches.

    raises: DataError when there are no batches, or where an activation is not finite.
    """
    owners = {s.node: s for s in placement.sites if s.kind == "activation" and s.shares is None}
    statistics = {site.name: Statistic() for site in owners.values()}

    def see(node: fx.Node, value: Any) -> None:
        if node.name in owners:
            statistics[owners[node.name].name].update(value)

    watcher = Watcher(placement.graph, see)
    count = 0
    with torch.no_grad():
        for batch in batches:
            watcher.run(*batch)
            count += 1
            advance()
    if count == 0:
        raise DataError("no calibration batches: the calibration data is empty; give at least one batch")
    for node in placement.graph.graph.nodes:
        if node.name in owners and statistics[owners[node.name].name].nonfinite:
            bad = statistics[owners[node.name].name].nonfinite
            raise DataError(f"{bad} values of activation {where(node)} are NaN or infinite on the calibration data")
    return statistics


def sqnr(result: CalibrationResult, batches: Iterable[Batch]) -> dict[str, float]:
    """Signal to quantization noise in dB at every site: the program's values against the float graph's.

    Activations carry all noise that came before them; weights are compared alone. Infinite where nothing differs.
    """
    placement = result.placement
    sites = placement.activation_of
    signal: dict[str, float] = dict.fromkeys((site.name for site in sites.values()), 0.0)
    noise = dict(signal)
    with torch.no_grad():
        for batch in batches:
            floats = _site_values(placement, batch)

            def see(node: fx.Node, value: Any, floats: Mapping[str, Tensor] = floats) -> None:
                if node.target is DEQUANTIZE and node.args[-1] in floats:
                    name = str(node.args[-1])
                    signal[name] += float(floats[name].square().sum(dtype=torch.float64))
                    noise[name] += float((value - floats[name]).square().sum(dtype=torch.float64))

            Watcher(result.program, see).run(*batch)
    constants = {node.name: node for node in placement.graph.graph.nodes if node.op == "get_attr"}
    for site in placement.sites:
        if site.kind == "weight":
            weight = constant(placement.graph, constants[site.node])
            error = dequantize(result.weights[site.name].codes, result.weights[site.name].qparams) - weight
            signal[site.name], noise[site.name] = float(weight.square().sum()), float(error.square().sum())
    return {name: _decibel(signal[name], noise[name]) for name in signal}


def _site_values(placement: Placement, batch: Batch) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}

    def see(node: fx.Node, value: Any) -> None:
        if node.name in placement.activation_of:
            values[placement.activation_of[node.name].name] = value

    Watcher(placement.graph, see).run(*batch)
    return values


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
