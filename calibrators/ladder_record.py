"""The record of judging networks on held-out samples: the rungs of a ladder, and the layers that cost most.

Must not know: torch, how any number was obtained, how reports look.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from calibrators.json_numbers import Real

__all__ = ["CostlyLayers", "Escape", "HeldOutFigure", "Ladder", "Rung"]


@dataclass(frozen=True)
class HeldOutFigure:
    """A figure on held-out samples with its 95 % interval, and the limit that it should keep (calibrators.goal)."""

    metric: str
    value: Real
    low: Real
    high: Real
    limit: float | None = None


@dataclass(frozen=True)
class Escape:
    """A layer that gets a finer grid, or stays in float.

    layer:    text that a rule matches: the path of its module, or the name of its operator.
    settings: those of the rule.
    cost:     loss of the network where only what the rule changes is rounded as before.
    """

    layer: str
    settings: Mapping[str, int | bool]
    cost: Real


@dataclass(frozen=True)
class Rung:
    """One try of a ladder.

    name:    the method, or the number of layers that got an escape.
    loss:    mean over the held-out samples: kl of logits, mse of other outputs, or of integers the share that differs.
    change:  loss over that of the best rung before, and the bounds of its paired 95 % interval.
    reached: whether every figure keeps its limit, None without limits.
    """

    name: str
    seconds: float
    loss: Real
    figures: tuple[HeldOutFigure, ...]
    change: tuple[Real, Real, Real] | None = None
    reached: bool | None = None


@dataclass(frozen=True)
class Ladder:
    """Methods tried one after the other on calibration samples, and judged on others.

    calibrated, held_out: number of samples of either kind.
    chosen:  the name of the rung that is exported.
    stopped: because its figures keep their limits ("goal"), because the next rung gained no more than noise ("gain"),
             or after the last rung ("end").
    escapes: layers that the chosen rung gave a finer grid.
    """

    loss: Literal["kl", "mse", "share"]
    calibrated: int
    held_out: int
    rungs: tuple[Rung, ...]
    chosen: str
    stopped: Literal["goal", "gain", "end"]
    escapes: tuple[Escape, ...] = ()


@dataclass(frozen=True)
class CostlyLayers:
    """The layers that cost the prediction most, the costliest first, as measured on calibration samples.

    figures: of the network as it is; advised: number of the first layers with whose escapes `better` keeps all limits;
             both are None where no half of the layers suffices, or nothing has a limit.
    """

    samples: int
    loss: Literal["kl", "mse", "share"]
    layers: tuple[Escape, ...]
    figures: tuple[HeldOutFigure, ...]
    advised: int | None = None
    better: tuple[HeldOutFigure, ...] | None = None
