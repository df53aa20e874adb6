"""Run the graph and measure activations: statistics at the sites, and errors of the program's values.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from calibrators.errors import DataError
from calibrators.graph.aten import where
from calibrators.graph.walk import walk
from calibrators.grid.metrics import SignalAndNoise
from calibrators.placement.place import Placement
from calibrators.program.freeze import CalibrationResult
from calibrators.program.qdq_program import DEQUANTIZE
from calibrators.ranges.histogram import Statistic

__all__ = ["EMPTY_AGAIN", "Batch", "observe", "relative_errors"]

Batch = tuple[Tensor, ...]

EMPTY_AGAIN = "the calibration data was empty when read again; give a list or another re-iterable"


def observe(
    placement: Placement, batches: Iterable[Batch], advance: Callable[[], None] = lambda: None
) -> dict[str, Statistic]:
    """Return statistics of every activation site that owns its scale and of those that join it, from one float pass.

    raises: DataError if there are no batches, or an activation is not finite.
    """
    activations = (site for site in placement.sites if site.kind == "activation")
    owners = {s.node: placement.root(s).name for s in activations if s.shares is None or s.joined}
    statistics = {name: Statistic() for name in owners.values()}
    count = 0
    with torch.no_grad():
        for batch in batches:
            for node, values in walk(placement.graph, batch):
                if node.name in owners:
                    statistics[owners[node.name]].update(values[node])
            count += 1
            advance()
    if count == 0:
        raise DataError("the calibration data has no batches; give at least one")
    for node in placement.graph.graph.nodes:
        if node.name in owners and (bad := statistics[owners[node.name]].nonfinite):
            raise DataError(
                f"{bad} values of activation {where(node)} are NaN or infinite on the calibration data; check the data "
                "and the float model"
            )
    return statistics


def relative_errors(result: CalibrationResult, names: Collection[str], batches: Iterable[Batch]) -> dict[str, float]:
    """Return by fx name the mean squared errors of the program's values, dequantized where they are quantized.

    Errors are in units of the mean squares of the float graph's values.
    """
    nodes = {site.name: node for node, site in result.placement.activation_of.items()}
    errors = {name: SignalAndNoise() for name in names}
    with torch.no_grad():
        for batch in batches:
            steps = walk(result.placement.graph, batch)
            floats = {node.name: values[node] for node, values in steps if node.name in errors}
            for node, values in walk(result.program, batch):
                dequantizes = node.target is DEQUANTIZE
                name = nodes.get(str(node.args[-1]), "") if dequantizes else node.name
                if name in floats and (dequantizes or name not in result.placement.activation_of):
                    errors[name].add(values[node], floats[name])
    return {name: error.relative for name, error in errors.items()}
