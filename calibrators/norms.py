"""What batch norms knew of the values behind them, kept when they were folded away.

A batch norm tells, channel by channel, how its output was distributed over the training set: its shift is the mean, its
gain the deviation. Folding hangs that on the operator it makes, as `meta["expected"]` of the node.

Must not know: how folding works, methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

__all__ = ["EXPECTED", "Expected", "expected_outputs"]

EXPECTED = "expected"
"""Key in the meta of a node."""


@dataclass(frozen=True, eq=False)
class Expected:
    """Distribution of a value over the training set, per channel, float64 [channels] each.

    mean:  its expectation, away from padded borders.
    gains: deviation of each branch that is added up in it; that of the value itself where there is one branch. What
           several branches have in common is not known.
    """

    mean: Tensor
    gains: tuple[Tensor, ...]

    @property
    def std(self) -> Tensor | None:
        """Deviation of the value, None where branches were added."""
        return self.gains[0] if len(self.gains) == 1 else None

    @property
    def spread(self) -> Tensor:
        """Deviation of the value if its branches were independent."""
        total = self.gains[0].square()
        for gain in self.gains[1:]:
            total = total + gain.square()
        return total.sqrt()


def expected_outputs(graph: fx.GraphModule) -> Mapping[str, Expected]:
    """What is known, by fx name of the value."""
    return {node.name: node.meta[EXPECTED] for node in graph.graph.nodes if EXPECTED in node.meta}
