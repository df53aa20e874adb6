"""A ladder of methods, the fastest first: the first one that is good enough on held-out samples is exported.

Good enough is what the accuracy gate of an export asks for (docs/gates.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from calibrators.errors import InputError
from calibrators.goal import ROOM
from calibrators.options import Options, option

if TYPE_CHECKING:
    from calibrators.execution.task import Problem
    from calibrators.program.freeze import CalibrationResult

__all__ = ["Auto"]


@dataclass(frozen=True)
class Auto(Options):
    """The fastest of several methods that passes the accuracy gate on held-out calibration samples."""

    places_again: ClassVar[bool] = True

    rungs: str = option("mse,gptq,qdrop", "methods in the order in which they are tried")
    held_out: float = option(0.25, "share of the calibration samples that judge", minimum=0.05, maximum=0.5)
    room: float = option(
        ROOM, "share of what the gate allows that has to be left on held-out samples", minimum=0, maximum=0.95
    )
    escapes: bool = option(
        True, "where no method suffices, give the layers that cost most 8 bits, or leave them in float"
    )
    ranges: str = option("mse", "range method for the grids that escapes change")

    def __post_init__(self) -> None:
        super().__post_init__()
        from calibrators.methods import get_method, range_method

        range_method(self.ranges)
        for name in self.names:
            if name == "auto" or getattr(get_method(name), "needs_labels", False):
                raise InputError(f"option 'rungs' of method 'auto' names {name!r}; name methods that can be a rung.")
        if len({*self.names}) < len(self.names):
            raise InputError(f"option 'rungs' of method 'auto' is {self.rungs!r}, which names a method twice.")

    def effort(self, samples: int) -> float:
        from calibrators.methods import get_method

        return float(sum(get_method(name).effort(samples) for name in self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """The methods of the rungs in order."""
        return tuple(name.strip() for name in self.rungs.split(","))

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return the network of the first rung that reaches the goal, with all rungs in its record."""
        from calibrators.methods import get_method, range_method
        from calibrators.mixed_precision.ladder import climb

        methods = {name: get_method(name) for name in self.names}
        ranges = range_method(self.ranges)
        return climb(problem, methods, ranges, share=self.held_out, room=self.room, escapes=self.escapes)
