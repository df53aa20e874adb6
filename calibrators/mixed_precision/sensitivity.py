"""Measure what coarser grids cost the network's prediction, at its outputs, for any bits of its scales.

The samples that do not reach the first changed block are not computed again (calibrators.execution.network_loss).

Must not know: budgets, how bits are allocated, ONNX.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from calibrators.execution.losses import OutputMetrics
from calibrators.execution.network_loss import NetworkLoss, Point, draw_samples, float_outputs
from calibrators.execution.task import Problem
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.placement.place import Placement, PlacementOptions, place
from calibrators.ranges.range_method import RangeMethod
from calibrators.record import Reading

__all__ = ["CANDIDATES", "Grids", "Kind", "Meter", "TunableScale", "tunable_scales"]

Kind = Literal["weight", "activation"]

CANDIDATES = (2, 3, 4, 5, 6, 8)
"""Widths that are tried."""

UNLIMITED = 1 << 40
"""Budget of a NetworkLoss, in evaluations."""


@dataclass(frozen=True, eq=False)
class TunableScale:
    """A scale whose bits are open: that of a weight, or of an activation and all values that share it.

    layers: names of the weighted operators that read it; specs: its grids by bits, ascending.
    """

    site: str
    kind: Kind
    layers: tuple[str, ...]
    specs: Mapping[int, QuantSpec]

    @property
    def finest(self) -> int:
        return max(self.specs)


def tunable_scales(placement: Placement, options: PlacementOptions, kinds: Collection[Kind]) -> list[TunableScale]:
    """Return the scales of these kinds that follow the general bits of `options`, with their possible grids.

    Left out are scales that a rule for single layers decides, and those where coarser grids save nothing.
    """
    found = []
    for kind in kinds:
        given = getattr(options, f"{kind}_bits")
        changes = ({f"{kind}_bits": bits} for bits in {*CANDIDATES, given})
        placed = [place(placement.graph, placement.target, options.model_copy(update=change)) for change in changes]
        for site in placement.sites:
            specs = {other.by_name[site.name].spec.bits: other.by_name[site.name].spec for other in placed}
            layers = placement.readers.get(site.name, ())
            if site.kind == kind and layers and len(specs) > 1:
                found.append(TunableScale(site.name, kind, layers, dict(sorted(specs.items()))))
    return found


class Grids:
    """Parameters of every scale at any bits of the tunable scales, each computed once."""

    def __init__(self, problem: Problem, scales: Sequence[TunableScale], method: RangeMethod) -> None:
        self.problem, self.method = problem, method
        self.scales = {scale.site: scale for scale in scales}
        self.given = {**problem.activations(method), **problem.weights(method)}
        self.found: dict[tuple[str, int], QParams] = {}

    def widths(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """Return the bits of every tunable scale; those that are not in `chosen` have their finest grid."""
        return {name: chosen.get(name, scale.finest) for name, scale in self.scales.items()}

    def point(self, widths: Mapping[str, int]) -> Point:
        """Return all parameters with these bits of the tunable scales."""
        return {**self.given, **{name: self._grid(name, bits) for name, bits in widths.items()}}

    def _grid(self, name: str, bits: int) -> QParams:
        if (name, bits) not in self.found:
            site = replace(self.problem.placement.by_name[name], spec=self.scales[name].specs[bits])
            self.found[name, bits] = self.problem.qparams(site, self.method)
        return self.found[name, bits]


class Meter:
    """Measures the network on some calibration samples, each choice of bits once; weights are rounded to nearest."""

    def __init__(self, grids: Grids, samples: int) -> None:
        self.grids, problem = grids, grids.problem
        rows = draw_samples(problem, samples, "sensitivity")
        chosen = problem.select(rows)
        floats = float_outputs(problem, chosen)
        self.metrics = OutputMetrics(floats, problem.labels_of(rows))
        self.network_loss = NetworkLoss(problem, chosen, grids.given, self.metrics, budget=UNLIMITED)
        self.readings: dict[tuple[int, ...], Reading] = {}

    @property
    def samples(self) -> int:
        """Number of samples of a reading."""
        return self.network_loss.samples

    @property
    def order(self) -> list[str]:
        """The tunable scales in order of execution, in which readings one after the other are cheap."""
        return sorted(self.grids.scales, key=self.network_loss.first.__getitem__)

    def read(self, chosen: Mapping[str, int]) -> Reading:
        """Return the reading with these bits; scales that are not named have their finest grid."""
        widths = self.grids.widths(chosen)
        key = tuple(widths.values())
        if key not in self.readings:
            self.metrics.reset()
            loss = self.network_loss.evaluate(self.grids.point(widths), whole=True)
            self.readings[key] = self.metrics.reading(loss)
        return self.readings[key]
