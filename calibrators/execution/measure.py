"""Run the graph and measure activations: statistics at the sites, and errors of the program's values.

Must not know: methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor

from calibrators.errors import DataError
from calibrators.execution.ranks import ALONE, Ranks
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
    placement: Placement,
    batches: Iterable[Batch],
    advance: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
) -> tuple[dict[str, Statistic], int]:
    """Return statistics of every activation site that owns its scale and of those that join it, from one float pass.

    Also returns the number of samples. Of several processes each runs some of the batches.

    raises: DataError if there are no batches, or an activation is not finite.
    """
    activations = (site for site in placement.sites if site.kind == "activation")
    owners = {s.node: placement.root(s).name for s in activations if s.shares is None or s.joined}
    statistics = {name: Statistic() for name in owners.values()}
    samples = 0
    with torch.no_grad():
        for index, batch in enumerate(batches):
            samples += len(batch[0])
            if ranks.takes(index):
                for node, values in walk(placement.graph, batch):
                    if node.name in owners:
                        statistics[owners[node.name]].update(values[node])
            advance()
    if samples == 0:
        raise DataError("the calibration data has no batches; give at least one")
    _merge(list(statistics.values()), ranks)
    for node in placement.graph.graph.nodes:
        if node.name in owners and (bad := statistics[owners[node.name]].nonfinite):
            raise DataError(
                f"{bad} values of activation {where(node)} are NaN or infinite on the calibration data; check the data "
                "and the float model"
            )
    return statistics, samples


def _merge(statistics: list[Statistic], ranks: Ranks) -> None:
    """Turn the statistics of the batches of each process into those of all batches."""
    if ranks.count == 1 or not statistics:
        return
    ends = torch.tensor([[-each.lo, each.hi, each.exponent] for each in statistics], dtype=torch.float64)
    for each, (lo, hi, exponent) in zip(statistics, ranks.largest(ends).tolist(), strict=True):
        each.widen(int(exponent))
        each.lo, each.hi = 0.0 - lo, hi
    counts = ranks.total(torch.stack([each.counts for each in statistics]))
    broken = ranks.total(torch.tensor([each.nonfinite for each in statistics])).tolist()
    for each, mine, nonfinite in zip(statistics, counts, broken, strict=True):
        each.counts, each.nonfinite = mine, nonfinite


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
