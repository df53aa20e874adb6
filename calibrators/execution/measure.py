"""Running the graph with eyes open: statistics at the sites, and the quantized program beside the float graph.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import DataError
from calibrators.graph.aten import where
from calibrators.placement.place import Placement
from calibrators.program.freeze import CalibrationResult
from calibrators.program.qdq_program import DEQUANTIZE
from calibrators.ranges.histogram import Statistic

__all__ = ["EMPTY_AGAIN", "Batch", "Watcher", "observe", "relative_errors"]

Batch = tuple[Tensor, ...]

EMPTY_AGAIN = "the calibration data was empty when read again: give a list or another re-iterable"


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


def relative_errors(result: CalibrationResult, names: Collection[str], batches: Iterable[Batch]) -> dict[str, float]:
    """Mean squared error of the program's values in units of the float values' mean square, by their fx names."""
    powers = _powers(result, names, batches)
    return {name: noise / signal if signal > 0 else 0.0 for name, (signal, noise) in powers.items()}


def _powers(
    result: CalibrationResult, names: Collection[str], batches: Iterable[Batch]
) -> dict[str, tuple[float, float]]:
    """Energy of float values, and of how far the program's (dequantized where they are quantized) are from them."""
    sites = {site.name: node for node, site in result.placement.activation_of.items()}
    quantized = set(sites.values())
    signal, noise = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for batch in batches:
            floats: dict[str, Tensor] = {}

            def keep(node: fx.Node, value: Any, floats: dict[str, Tensor] = floats) -> None:
                if node.name in signal:
                    floats[node.name] = value

            def compare(node: fx.Node, value: Any, floats: dict[str, Tensor] = floats) -> None:
                name = sites.get(str(node.args[-1]), "") if node.target is DEQUANTIZE else node.name
                if name in floats and (node.target is DEQUANTIZE or name not in quantized):
                    signal[name] += float(floats[name].square().sum(dtype=torch.float64))
                    noise[name] += float((value - floats[name]).square().sum(dtype=torch.float64))

            Watcher(result.placement.graph, keep).run(*batch)
            Watcher(result.program, compare).run(*batch)
    return {name: (signal[name], noise[name]) for name in names}
