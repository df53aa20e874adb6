"""Try methods one after the other until held-out samples say that the network is good enough.

The order of the rungs decides, not their time: the same inputs give the same bytes. Where no method suffices, the
layers that cost the prediction most get finer grids or stay in float, as few as suffice.

Must not know: which methods there are, ONNX.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from calibrators.errors import counted
from calibrators.execution.held_out import Judge, Verdict, hold_out
from calibrators.execution.task import KeptPart, Problem
from calibrators.ladder_record import Ladder, Rung
from calibrators.mixed_precision.escapes import RANKED, Candidate, candidates, fewest, finer, most_escapes, with_escapes
from calibrators.program.freeze import CalibrationResult
from calibrators.ranges.range_method import RangeMethod

__all__ = ["climb"]


Solution = tuple[Problem, CalibrationResult]
"""A network and the problem that it solves."""


class Fits(Protocol):
    """A method of a rung; `slow` where fitting it takes minutes."""

    slow: bool

    def fit(self, problem: Problem) -> CalibrationResult:
        """Return the calibrated network."""


@dataclass(frozen=True, eq=False)
class _Tried:
    """A network that was tried, what the samples say of it, and the problem that it solves."""

    name: str
    problem: Problem
    result: CalibrationResult
    verdict: Verdict
    chosen: tuple[Candidate, ...] = ()


def climb(
    problem: Problem, methods: Mapping[str, Fits], ranges: RangeMethod, *, share: float, room: float, escapes: bool
) -> CalibrationResult:
    """Return the network of the first method that reaches the goal of the problem, with the ladder in its record.

    Without a goal, the last one that gained more than noise over that before; if no method reaches the goal, that with
    the fewest escapes that does, or else the one with the least loss.

    methods: in order, by name; ranges: for the new grids of escapes; share: of the samples, held out.
    room:    share of what the goal allows that has to be left on them.
    escapes: whether layers may get more bits, or stay in float, where no method reaches the goal.
    raises:  InputError where there are too few samples, or no output that could be judged.
    """
    rest, rows = hold_out(problem, share)
    climbing = _Climbing(rest, methods, Judge(problem, rows, problem.goal, room))
    stopped = climbing.climb()
    if escapes and climbing.best.verdict.reached is False:
        stopped = climbing.escapes(ranges)
    best = climbing.best
    problem.coarser.update(best.problem.coarser)
    problem.free.update(best.problem.free)
    ladder = Ladder(
        loss=climbing.judge.loss_name,
        calibrated=rest.samples,
        held_out=climbing.judge.samples,
        rungs=tuple(climbing.rungs),
        chosen=best.name,
        stopped=stopped,
        escapes=tuple(each.escape for each in best.chosen),
    )
    return replace(best.result, record=replace(best.result.record, ladder=ladder))


class _Climbing:
    """The rungs so far, and the best of them."""

    def __init__(self, problem: Problem, methods: Mapping[str, Fits], judge: Judge) -> None:
        self.problem, self.methods, self.judge = problem, methods, judge
        self.rungs: list[Rung] = []
        self.tried: _Tried | None = None

    @property
    def best(self) -> _Tried:
        """The best network so far."""
        assert self.tried is not None
        return self.tried

    def climb(self) -> Literal["goal", "gain", "end"]:
        """Try the methods in order until one reaches the goal or, without one, gains no more than noise."""
        for name, method in self.methods.items():
            before = self.tried

            def fit(name: str = name, method: Fits = method) -> Solution:
                problem = self._alone(name)
                return problem, method.fit(problem)

            tried = self._try(name, fit)
            if tried.verdict.reached:
                return "goal"
            if tried.verdict.reached is None and self.tried is before:
                return "gain"
        return "end"

    def escapes(self, ranges: RangeMethod) -> Literal["goal", "end"]:
        """Give escapes to as few layers as reach the goal, in the best network so far."""
        base = self.best
        with base.problem.stage("rank layers", None):
            ranked = candidates(base.result, self.judge.part(RANKED))
        most = most_escapes(base.problem.placement, ranked)
        tries: dict[int, _Tried] = {}

        def suffices(count: int) -> bool:
            if count not in tries:
                chosen = tuple(ranked[:count])
                name = f"{base.name}, {counted(count, 'layer')} finer"
                tries[count] = self._try(name, partial(self._with, base, chosen, ranges), chosen)
            return bool(tries[count].verdict.reached)

        if most and (found := fewest(most, suffices)) is not None:
            self.tried = tries[found]
            return "goal"
        return "end"

    def _with(self, base: _Tried, chosen: Sequence[Candidate], ranges: RangeMethod) -> Solution:
        """Return a network with escapes: fitted again, because codes make up for the errors of layers before them.

        What was trained is kept instead, as training takes too long.
        """
        if self.methods[base.name].slow:
            return with_escapes(base.problem, base.result, ranges, chosen)
        problem = finer(base.problem, chosen)
        return problem, self.methods[base.name].fit(problem)

    def _alone(self, name: str) -> Problem:
        """Return the problem of one rung: its stages and kept units have names of their own."""
        stage, kept = self.problem.stage, self.problem.kept
        return self.problem.variant(
            coarser={},
            free={},
            stage=lambda title, total=None: stage(f"{name}: {title}", total),
            kept=None if kept is None else KeptPart(name, kept),
        )

    def _try(self, name: str, fit: Callable[[], Solution], chosen: tuple[Candidate, ...] = ()) -> _Tried:
        """Fit a network and judge it; it is the best if it reaches the goal, or loses less by more than noise."""
        start = time.perf_counter()
        solved, result = fit()
        with solved.stage("judge", None):
            verdict = self.judge.judge(result.program)
        tried = _Tried(name, solved, result, verdict, chosen)
        change = None if self.tried is None else verdict.gain_over(self.tried.verdict)
        ends = None if change is None else (change.value, change.low, change.high)
        seconds = time.perf_counter() - start
        self.rungs.append(Rung(name, seconds, verdict.loss, verdict.figures, ends, verdict.reached))
        if change is None or verdict.reached or change.high < 1:
            self.tried = tried
        return tried
