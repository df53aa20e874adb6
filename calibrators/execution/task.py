"""The problem that a method solves: a placed network, calibration data, and limits on time and memory.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from calibrators.allocator import give_back
from calibrators.errors import DataError, InputError
from calibrators.execution.kept_statistics import name_of, restored, stored
from calibrators.execution.measure import EMPTY_AGAIN, Batch, observe
from calibrators.execution.ranks import ALONE, Ranks
from calibrators.goal import Goal
from calibrators.graph.walk import sample_values
from calibrators.grid.limits import coarsened
from calibrators.grid.spec import QParams, QuantizedTensor, Site
from calibrators.placement.place import Placement
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.ranges.histogram import Statistic
from calibrators.ranges.range_method import RangeMethod

__all__ = ["Bar", "Kept", "KeptPart", "Problem", "Stage", "silent"]


class Bar(Protocol):
    """Progress of one stage of work."""

    def advance(self, steps: int = 1) -> None:
        """Advance the display by `steps`."""

    def skip(self, steps: int) -> None:
        """Leave out `steps` of the stage, which take no time."""


Stage = Callable[[str, int | None], AbstractContextManager[Bar]]
"""A function that opens a stage of work, given its name and number of steps, None where that is not known."""


class _Silent:
    def advance(self, steps: int = 1) -> None:
        pass

    def skip(self, steps: int) -> None:
        pass


@contextmanager
def silent(name: str, total: int | None = None) -> Iterator[Bar]:
    """Open a stage without a display."""
    yield _Silent()


class Kept(Protocol):
    """Results of finished steps that outlive the process, of this model, these data and these settings alone."""

    def load(self, name: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record of a step, None if it was not finished."""

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep the results of a step; the record holds what JSON does."""


@dataclass(frozen=True, eq=False)
class KeptPart:
    """Results of the steps of one part of a calibration among those of all."""

    part: str
    kept: Kept

    def load(self, name: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record of a step of this part, None if it was not finished."""
        return self.kept.load(f"{self.part}-{name}")

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep the results of a step of this part."""
        self.kept.save(f"{self.part}-{name}", tensors, record)


@dataclass(frozen=True, eq=False)
class Problem:
    """One calibration problem.

    batches: calibration data, tuples with one tensor per model input [samples, ...]; every pass reads it again.
    range_method: range methods by name, and options as a mapping (calibrators.methods.range_method).
    labels:  int64 [samples] in the order of the batches, None where there are none.
    device:  where heavy steps run.
    memory:  bytes of RAM that cached activations may take.
    explain: whether to compute what explains the choice, for the record.
    coarser: by name of a weight site: the factors by which limits of its codes raised the scales, filled as they do.
    free:    by name of a weight site: the codes that the method would choose without the limits, where it knows them.
    kept:    where training keeps the results of its units, so that another run continues after the last one.
    seen:    where statistics are kept, for runs of other methods on the same data.
    goal:    limits on figures of held-out data at which the network is good enough, None for none.
    ranks:   the processes that solve it together; each has all the data, and runs its part.
    """

    placement: Placement
    batches: Iterable[Batch]
    range_method: Callable[..., RangeMethod]
    labels: Tensor | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: int = 4 << 30
    explain: bool = False
    stage: Stage = silent
    coarser: dict[str, Tensor] = field(default_factory=dict)
    free: dict[str, QuantizedTensor] = field(default_factory=dict)
    kept: Kept | None = None
    seen: Kept | None = None
    goal: Goal | None = None
    ranks: Ranks = ALONE

    @cached_property
    def statistics(self) -> dict[str, Statistic]:
        """Statistics of every activation site that owns its scale, from one float pass or an earlier run."""
        name = "" if self.seen is None else name_of(self.placement)
        if self.seen is not None and (found := self.ranks.shared(self.seen.load(name))) is not None:
            return restored(*found)
        with self.stage("calibrate", None) as bar:
            statistics, samples = observe(self.placement, self.batches, bar.advance, self.ranks)
        vars(self).setdefault("samples", samples)
        if self.seen is not None and self.ranks.is_first:
            self.seen.save(name, *stored(statistics))
        return statistics

    @cached_property
    def sample_values(self) -> frozenset[str]:
        """Names of the graph's values whose first dimension counts the samples."""
        return sample_values(self.placement.graph)

    def variant(self, **changes: Any) -> Problem:
        """Return the problem with changed fields that have no effect on statistics: memory, bits of the placement."""
        other = replace(self, **changes)
        vars(other).update(statistics=self.statistics, samples=self.samples)
        return other

    def placed(self, placement: Placement, **changes: Any) -> Problem:
        """Return the problem on another placement of the graph; its statistics are kept if they are of the same values.

        changes: as those of `variant`.
        """
        if placement is self.placement:
            return self
        other, known = replace(self, placement=placement, **changes), vars(self)
        vars(other).update({name: known[name] for name in ("samples", "sample_values") if name in known})
        if "statistics" in known:
            by_values = {values: known["statistics"][name] for name, values in _observed(self.placement).items()}
            wanted = _observed(placement)
            if by_values.keys() >= {*wanted.values()}:
                vars(other)["statistics"] = {name: by_values[values] for name, values in wanted.items()}
        return other

    def activations(self, method: RangeMethod) -> dict[str, QParams]:
        """Return the parameters of every activation site that owns its scale, by the site's name."""
        owners = [site for site in self.placement.sites if site.kind == "activation" and site.shares is None]
        _ = self.statistics  # which all processes make together
        found = self.ranks.spread(lambda site: self.qparams(site, method), owners)
        return {site.name: qparams for site, qparams in zip(owners, found, strict=True)}

    def weights(self, method: RangeMethod) -> dict[str, QParams]:
        """Return the parameters of every weight site, by the site's name."""
        sites = [site for site in self.placement.sites if site.kind == "weight"]
        found = self.ranks.spread(lambda site: (self.qparams(site, method), self.coarser.get(site.name)), sites)
        weights = {}
        for site, (qparams, factors) in zip(sites, found, strict=True):
            weights[site.name] = qparams
            self.coarser.pop(site.name, None)
            if factors is not None:  # noted in the process that found them
                self.coarser[site.name] = factors
        return weights

    def qparams(self, site: Site, method: RangeMethod) -> QParams:
        """Return the parameters of a weight site or of an activation site that owns its scale, on its grid.

        A rule for the layer that names a range method wins over `method`.
        """
        method = self.range_method(site.method) if site.method else method
        if site.kind == "weight":
            self.coarser.pop(site.name, None)
            weight = self.values(site)
            found = self.within_limits(site, weight, method.weight(weight, site.spec))
            give_back(weight.nbytes)
            return found
        return _fixed(site) if site.fixed else method.activation(self.statistics[site.name], site.spec)

    def within_limits(self, site: Site, weight: Tensor, qparams: QParams) -> QParams:
        """Return the smallest scales at which a weight keeps the limits of pairs, and note the factors in `coarser`."""
        limits = self.placement.limits_of(site)
        if limits is None:
            return qparams
        found = coarsened(weight, qparams, limits)
        self.coarser[site.name] = self.coarser.get(site.name, 1.0) * found.scale / qparams.scale
        return found

    def values(self, site: Site) -> Tensor:
        """Return the float weight or bias of a site."""
        return self.placement.values(site)

    def solve(self, method: RangeMethod) -> CalibrationResult:
        """Return the result of a range method: every tensor on its own, weights rounded to nearest."""
        result = freeze(self.placement, self.activations(method), self.weights(method))
        return replace(result, observed=self.statistics)

    @cached_property
    def samples(self) -> int:
        """Samples of the calibration data.

        raises: DataError if the data cannot be read a second time.
        """
        found = sum(len(batch[0]) for batch in self.batches)
        if not found:
            raise DataError(EMPTY_AGAIN)
        return found

    def select(self, rows: Tensor) -> list[Tensor]:
        """Return the samples `rows` (int64 [n], ascending) of every model input, [n, ...], from one pass.

        Their memory is taken at once: pieces that are kept between batches would split the freed memory of these.
        """
        found, start = list[Tensor](), 0
        for batch in self.batches:
            found = found or [x.new_empty(len(rows), *x.shape[1:]) for x in batch]
            inside = (rows >= start) & (rows < start + len(batch[0]))
            for kept, x in zip(found, batch, strict=True):
                kept[inside] = x[rows[inside] - start]
            start += len(batch[0])
        return found

    def labels_of(self, rows: Tensor) -> Tensor | None:
        """Return the labels of the samples `rows`, where there are any.

        raises: InputError unless there is one label per sample.
        """
        if self.labels is None:
            return None
        if len(self.labels) != self.samples:
            raise InputError(
                f"there are {len(self.labels)} labels for {self.samples} calibration samples; give one per sample."
            )
        return self.labels[rows]

    def generator(self, purpose: str) -> torch.Generator:
        """Return a random generator that depends on the seed and the purpose alone."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _observed(placement: Placement) -> dict[str, frozenset[str]]:
    """Return by name of the site that owns a scale the graph's values from which its statistic is made."""
    found: dict[str, set[str]] = {}
    for site in placement.sites:
        if site.kind == "activation" and (site.shares is None or site.joined):
            found.setdefault(placement.root(site).name, set()).add(site.node)
    return {name: frozenset(values) for name, values in found.items()}


def _fixed(site: Site) -> QParams:
    assert site.fixed is not None
    scale, zero_point = site.fixed
    levels = 1 << (8 - site.spec.bits)  # a narrower grid over the same known range
    return QParams(
        torch.tensor(scale * levels, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32), site.spec
    )
