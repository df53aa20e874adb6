"""How the output of a region to be folded was distributed over the training set, from the batch norms in it.

A batch norm starts afresh: mean and deviation of its output are its shift and gain, whatever comes in. Scales, shifts,
sums and differences carry them on, channel by channel. Where a part of the output came past every batch norm, or a
convolution follows one, nothing is said.

Must not know: what the region is folded to, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph import bind, is_constant, shape_of
from calibrators.norms import Expected
from exporter.regions import BATCH_NORM, QUOTIENTS, SCALES, SUMS, Analysis, terms_of

__all__ = ["expectation"]


def expectation(analysis: Analysis, nodes: Iterable[fx.Node]) -> Expected | None:
    """Distribution of the last of `nodes`, given in topological order; None where it is not known."""
    known: dict[fx.Node, Expected] = {}
    found: Expected | None = None
    for node in nodes:
        if node.target is BATCH_NORM:
            found = _normalized(analysis, node)
        elif node.target in SUMS:
            found = _sum(analysis, node, known)
        elif node.target in SCALES:
            found = _scaled(analysis, node, known)
        else:
            found = None
        if found is not None:
            known[node] = found
    return found


def _normalized(analysis: Analysis, node: fx.Node) -> Expected | None:
    bound = bind(node)
    variance = analysis.exact(bound["running_var"])
    gain = (variance / (variance + bound["eps"])).sqrt()
    if bound["weight"] is not None:
        gain = gain * analysis.exact(bound["weight"]).abs()
    mean = torch.zeros_like(gain) if bound["bias"] is None else analysis.exact(bound["bias"])
    return Expected(mean, (gain,))


def _sum(analysis: Analysis, node: fx.Node, known: dict[fx.Node, Expected]) -> Expected | None:
    """A sum of known values and constants."""
    mean: Tensor | float = 0.0
    gains: list[Tensor] = []
    for factor, operand in terms_of(node):
        if operand in known:
            mean = mean + factor * known[operand].mean
            gains += [gain * abs(factor) for gain in known[operand].gains]
            continue
        shift = _per_channel(analysis, operand, shape_of(node)[1])
        if shift is None:
            return None
        mean = mean + factor * shift
    return Expected(mean, tuple(gains)) if isinstance(mean, Tensor) and gains else None


def _scaled(analysis: Analysis, node: fx.Node, known: dict[fx.Node, Expected]) -> Expected | None:
    """A known value times or by a constant."""
    left, right = node.args[:2]
    value, other = (left, right) if left in known else (right, left)
    factor = _per_channel(analysis, other, shape_of(node)[1])
    if value not in known or factor is None or (node.target in QUOTIENTS and value is right):
        return None
    factor = 1 / factor if node.target in QUOTIENTS else factor
    before = known[value]  # type: ignore[index]
    return replace(before, mean=before.mean * factor, gains=tuple(gain * factor.abs() for gain in before.gains))


def _per_channel(analysis: Analysis, operand: Any, channels: int) -> Tensor | None:
    """A number or a constant with one value per channel or one for all, float64; None for anything else."""
    if isinstance(operand, (int, float)):
        return torch.tensor(float(operand), dtype=torch.float64)
    if not is_constant(operand):
        return None
    values = analysis.exact(operand)
    return values.flatten() if values.numel() in (1, channels) else None
