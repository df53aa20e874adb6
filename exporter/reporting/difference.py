"""The difference of two exports, as data: the "baseline" part of report.json, and the answer of `intact compare`.

Pairs are values of the earlier and of the later export. Nothing that is equal in both is listed.

Must not know: files, how the differences are found, how they look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from calibrators.intervals import Interval
from runtime_tests.measure.paired import Change

__all__ = ["Difference", "Figure", "GateChange", "LayerChange", "Unit", "ValueChange"]

Unit: TypeAlias = Literal["bytes", "ms", "share", "dB", "nats", "count", "ratio"]


@dataclass(frozen=True)
class Figure:
    """A number of both exports.

    ratio: later over earlier; None where either is missing or unreliable, or the earlier is 0.
    """

    name: str
    unit: Unit
    before: float | None
    after: float | None
    ratio: float | None


@dataclass(frozen=True)
class ValueChange:
    """A setting, a version or an origin that differs; None where an export does not have it."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class GateChange:
    """A gate whose outcome differs, True if it passed; None where an export does not have the gate."""

    expression: str
    before: bool | None
    after: bool | None


@dataclass(frozen=True)
class LayerChange:
    """A weight or activation that differs; a site that only one export has lacks the values of the other.

    bits:    of the codes; None is float.
    scale:   later over earlier largest scale.
    sqnr_db: signal over quantization noise.
    """

    site: str
    kind: Literal["activation", "weight"]
    bits: tuple[int | None, int | None]
    scale: float | None
    sqnr_db: tuple[float | None, float | None]

    @property
    def noise_added_db(self) -> float:
        """The decibels that were lost; 0 where they were not measured in both."""
        before, after = self.sqnr_db
        return 0.0 if before is None or after is None else before - after


@dataclass(frozen=True)
class Difference:
    """One export compared with an earlier one.

    before, after: the folders.
    metric:        of the scores; drop: of the samples decided rightly; error: mean divergence from the float model
                   (or energy of the difference), later over earlier. Both None unless the evaluation data are the same.
    identical:     whether both model files hold the same bytes.
    now_float:     compute nodes in float that were not; now_integer: the reverse.
    unpaired:      the reason that scores are not compared by sample, None where they are or where there are none.
    notes:         that reason too, and what is to be read with care.
    """

    before: str
    after: str
    identical: bool
    verdicts: tuple[str, str]
    metric: str | None
    drop: Change | None
    error: Interval | None
    figures: tuple[Figure, ...]
    gates: tuple[GateChange, ...]
    layers: tuple[LayerChange, ...]
    now_float: tuple[str, ...]
    now_integer: tuple[str, ...]
    settings: tuple[ValueChange, ...]
    origins: tuple[ValueChange, ...]
    notes: tuple[str, ...]
    unpaired: str | None = None
