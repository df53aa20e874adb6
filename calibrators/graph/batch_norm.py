"""Batch norms in evaluation: what they compute, and what they tell about values over the training set.

A batch norm with its running statistics is y = slope * x + offset in every channel. If the statistics are true, its
output has the mean beta and the deviation |gamma| * sqrt(variance / (variance + eps)). Folding carries both to the
output of the operator that takes the norm in and leaves them in that node's meta[EXPECTED], for methods that ask. They
belong to the value: a rewrite that computes the value in another way moves them to the node that does, and nodes that
compute a part of it have none.

Must not know: folding, methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, is_constant

__all__ = [
    "EXPECTED",
    "HIGH_BIAS",
    "BatchNorm",
    "Expected",
    "expected_outputs",
    "mean_and_deviation",
    "read_batch_norm",
    "update_expected",
    "uses_batch_statistics",
]

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
        """Standard deviation [channels]; None where several norms reach a channel, as their covariance is unknown."""
        if not self.gains or bool((torch.stack(self.gains).count_nonzero(0) > 1).any()):
            return None
        return torch.stack(self.gains).sum(0)

    @property
    def spread(self) -> Tensor | None:
        """Deviation if the norms were independent; None where no norm tells it."""
        return torch.stack(self.gains).square().sum(0).sqrt() if self.gains else None

    @property
    def largest_std(self) -> Tensor | None:
        """Upper bound of the deviation, whatever the covariance of the norms; None where no norm tells it."""
        return torch.stack(self.gains).sum(0) if self.gains else None

    def to(self, dtype: torch.dtype) -> Expected:
        """Return the same in another dtype."""
        return Expected(self.mean.to(dtype), tuple(gain.to(dtype) for gain in self.gains))

    def scaled(self, factor: Tensor) -> Expected:
        """Return the statistics of the value times a positive `factor` [channels], in the dtype they have."""
        return Expected(self.mean * factor, tuple(gain * factor for gain in self.gains)).to(self.mean.dtype)

    def shifted(self, constant: Tensor) -> Expected:
        """Return the statistics of the value plus a `constant` [channels], in the dtype they have."""
        return Expected((self.mean + constant).to(self.mean.dtype), self.gains)


@dataclass(frozen=True, eq=False)
class BatchNorm:
    """A batch norm in evaluation, slope * x + offset; every tensor is float64 [channels].

    slope:    gamma / sqrt(variance + eps).
    offset:   beta - mean * slope.
    variance: running variance of the input.
    expected: statistics of the output if the running ones are true.
    """

    slope: Tensor
    offset: Tensor
    variance: Tensor
    expected: Expected


def read_batch_norm(node: fx.Node, exact: Callable[[fx.Node], Tensor]) -> BatchNorm | None:
    """Return what a batch norm computes; None unless its statistics are kept and its parameters are constants.

    exact: gives the float64 value of a get_attr node.
    """
    bound = bind(node)
    parameters = [bound[name] for name in ("weight", "bias", "running_mean", "running_var")]
    if uses_batch_statistics(node) or not all(each is None or is_constant(each) for each in parameters):
        return None
    gamma, beta, mean, variance = (None if each is None else exact(each) for each in parameters)
    assert mean is not None and variance is not None
    gamma = torch.ones_like(variance) if gamma is None else gamma
    beta = torch.zeros_like(variance) if beta is None else beta
    eps = bound["eps"]
    slope = (variance + eps).rsqrt() * gamma
    deviation = (variance / (variance + eps)).sqrt() * gamma.abs()
    return BatchNorm(slope, beta - mean * slope, variance, Expected(beta, (deviation,)))


def uses_batch_statistics(node: fx.Node) -> bool:
    """Return whether a batch norm normalizes with the statistics of the batch."""
    bound = bind(node)
    return bool(bound["training"]) or bound["running_mean"] is None or bound["running_var"] is None


def expected_outputs(graph: fx.GraphModule) -> dict[str, Expected]:
    """Return what is known of the outputs of operators, by name of their nodes."""
    known = (node for node in graph.graph.nodes if node.op == "call_function" and EXPECTED in node.meta)
    return {node.name: node.meta[EXPECTED] for node in known}


def mean_and_deviation(node: fx.Node) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the largest possible deviation of a node's output, float64 [channels] each, where known."""
    expected: Expected | None = node.meta.get(EXPECTED)
    if expected is None or expected.largest_std is None:
        return None
    return expected.mean.double(), expected.largest_std.double()


def update_expected(node: fx.Node, change: Callable[[Expected], Expected], later: Iterable[fx.Node] = ()) -> None:
    """Record how a rewrite changed a node's output; forget what was known of `later` values, which follow from it."""
    if EXPECTED in node.meta:
        node.meta[EXPECTED] = change(node.meta[EXPECTED])
    for each in later:
        each.meta.pop(EXPECTED, None)
