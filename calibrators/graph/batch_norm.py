"""Statistics of values over the training set, from batch norms; kept when the norms are folded.

A batch norm in evaluation, its running statistics taken as true, gives every channel the mean beta and the deviation
|gamma| * sqrt(variance / (variance + eps)). Folding carries both to the output of the operator that takes the norm in
and leaves them in that node's meta[EXPECTED]. They belong to the value: a rewrite that makes it in another way moves
them to the node that makes it, and the nodes that make a part of it have none (`meta_of_part`).

Must not know: folding, methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["EXPECTED", "Expected", "expected_outputs", "meta_of_part", "of_batch_norm"]

EXPECTED = "expected"
"""Key of node.meta."""

HIGH_BIAS = 3.0
"""Deviations above zero from which on the mean of a channel makes it almost always positive: 99.865 percent of normally
distributed values are (Nagel et al. 2019, "absorbing high biases")."""


@dataclass(frozen=True, eq=False)
class Expected:
    """A value over the training set, per channel (axis 1), away from the image's border.

    mean:  [channels].
    gains: standard deviation that each batch norm gives it, each [channels], 0 in channels that a norm does not reach;
           none where a convolution or a pool stands between the norms and the value.
    """

    mean: Tensor
    gains: tuple[Tensor, ...]

    @property
    def std(self) -> Tensor | None:
        """Standard deviation [channels]; None where several norms reach a channel: nobody knows their covariance."""
        if not self.gains or bool((torch.stack(self.gains).count_nonzero(0) > 1).any()):
            return None
        return torch.stack(self.gains).sum(0)

    @property
    def spread(self) -> Tensor | None:
        """The deviation if the norms were independent; None where it is unknown."""
        return torch.stack(self.gains).square().sum(0).sqrt() if self.gains else None

    @property
    def largest_std(self) -> Tensor | None:
        """The upper bound of the deviation, however the norms vary together; None where it is unknown."""
        return torch.stack(self.gains).sum(0) if self.gains else None

    def to(self, dtype: torch.dtype) -> Expected:
        """The same in another dtype."""
        return Expected(self.mean.to(dtype), tuple(gain.to(dtype) for gain in self.gains))

    def scaled(self, factor: Tensor) -> Expected:
        """Return the statistics of the value times a positive `factor` [channels], in their dtype."""
        return Expected(self.mean * factor, tuple(gain * factor for gain in self.gains)).to(self.mean.dtype)

    def shifted(self, constant: Tensor) -> Expected:
        """Return the statistics of the value plus a `constant` [channels], in their dtype."""
        return Expected((self.mean + constant).to(self.mean.dtype), self.gains)


def of_batch_norm(gamma: Tensor | None, beta: Tensor | None, variance: Tensor, eps: float) -> Expected:
    """Return the output statistics of a batch norm for inputs with its running statistics; tensors are [channels]."""
    std = (variance / (variance + eps)).sqrt()
    mean = torch.zeros_like(variance) if beta is None else beta
    return Expected(mean, (std if gamma is None else std * gamma.abs(),))


def expected_outputs(graph: fx.GraphModule) -> dict[str, Expected]:
    """Return the known statistics of operator outputs, by name of their nodes."""
    return {node.name: node.meta[EXPECTED] for node in graph.graph.nodes if _is_known(node)}


def _is_known(node: fx.Node) -> bool:
    return node.op == "call_function" and EXPECTED in node.meta


def meta_of_part(node: fx.Node) -> dict[str, Any]:
    """The meta of `node` for another that comes from the same module and has another value."""
    return {key: value for key, value in node.meta.items() if key != EXPECTED}
