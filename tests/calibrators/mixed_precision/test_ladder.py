"""The ladder of methods: what it holds out, where it stops, what it exports, and the escapes of single layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from calibrators.calibration import advice, calibrate
from calibrators.errors import InputError
from calibrators.execution import task
from calibrators.execution.held_out import Judge, hold_out
from calibrators.execution.task import Problem
from calibrators.grid.metrics import decibels, energy
from calibrators.ladder_record import Ladder
from calibrators.methods import get_method, range_method
from calibrators.methods.qdrop import QDrop
from calibrators.mixed_precision.escapes import candidates, fewest, with_escapes
from calibrators.mixed_precision.ladder import climb
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import CalibrationResult
from calibrators.targets import get_target
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.spectrum import Spectrum

W4A4 = PlacementOptions(weight_bits=4, activation_bits=4)
BOTH = {"rungs": "mse,gptq"}


@pytest.fixture(scope="module")
def data() -> Tensor:
    return torch.randn(64, 1, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graph(data: Tensor) -> fx.GraphModule:
    return fold(capture(Spectrum().eval(), (data[:2],)))


def problem_of(graph: fx.GraphModule, batches: list[Any], **fields: Any) -> Problem:
    return Problem(place(graph, get_target("ort-cpu"), W4A4), batches, range_method, **fields)


def ladder_of(result: CalibrationResult) -> Ladder:
    assert result.record.ladder is not None
    return result.record.ladder


def test_the_first_rung_that_is_good_enough_ends_it(graph: fx.GraphModule, data: Tensor) -> None:
    result = calibrate(graph, [(data,)], method="auto", options=BOTH, goal={"sqnr_db": 5.0})
    ladder = ladder_of(result)
    assert [rung.name for rung in ladder.rungs] == [ladder.chosen] == ["mse"]
    assert (ladder.stopped, ladder.calibrated, ladder.held_out) == ("goal", 48, 16)


def test_layers_get_escapes_until_the_goal_holds(graph: fx.GraphModule, data: Tensor) -> None:
    """The figures are those of the exported network on the samples that no rung saw."""
    result = calibrate(graph, [(data,)], method="auto", options=BOTH, goal={"sqnr_db": 25.0})
    ladder = ladder_of(result)
    assert [rung.name for rung in ladder.rungs] == ["mse", "gptq", "gptq, 1 layer finer"]
    assert [(e.layer, e.settings) for e in ladder.escapes] == [("filters", {"float": True})]
    assert not any("filters" in site.name for site in result.placement.sites if site.kind == "weight")
    _, rows = hold_out(problem_of(graph, [(data,)]), 0.25)
    with torch.no_grad():
        exact, found = graph(data[rows])[0], result.program(data[rows])[0]
    [figure] = ladder.rungs[-1].figures
    assert figure.value == pytest.approx(decibels(energy(exact), energy(found - exact)))
    assert figure.low < figure.value < figure.high


def test_nothing_that_is_held_out_is_calibrated_with(graph: fx.GraphModule, data: Tensor) -> None:
    rest, rows = hold_out(problem_of(graph, [(data[:40],), (data[40:],)]), 0.25)
    loud = data.clone()
    loud[rows] *= 1000
    other, same_rows = hold_out(problem_of(graph, [(loud,)]), 0.25)
    assert torch.equal(rows, same_rows) and rest.samples == other.samples == 48
    ends = [{name: (s.lo, s.hi) for name, s in each.statistics.items()} for each in (rest, other)]
    assert ends[0] == ends[1]


def test_statistics_are_kept_for_the_samples_that_are_not_held_out(
    graph: fx.GraphModule, data: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer, everything = Drawer(), problem_of(graph, [(data,)])
    seen = partial(hold_out, problem_of(graph, [(data,)], seen=drawer))
    first = {name: vars(each) for name, each in seen(0.25)[0].statistics.items()}
    assert {name: each.lo for name, each in everything.statistics.items()} != {n: s["lo"] for n, s in first.items()}
    assert len(drawer) == 1
    monkeypatch.setattr(task, "observe", lambda *_: pytest.fail("the data were observed again"))
    again = seen(0.25)[0].statistics
    assert {name: (each.lo, each.hi) for name, each in again.items()} == {
        n: (s["lo"], s["hi"]) for n, s in first.items()
    }
    monkeypatch.undo()
    assert seen(0.5)[0].statistics and len(drawer) == 2, "other samples have a name of their own"


def test_without_a_goal_it_stops_where_nothing_is_gained(graph: fx.GraphModule, data: Tensor) -> None:
    options = {"rungs": "gptq,mse,minmax"}
    ladder = ladder_of(calibrate(graph, [(data,)], method="auto", options=options, placement=W4A4, goal=None))
    assert [rung.name for rung in ladder.rungs] == ["gptq", "mse"]
    assert (ladder.chosen, ladder.stopped) == ("gptq", "gain")
    assert ladder.rungs[1].change is not None and ladder.rungs[1].change[2] >= 1


def test_the_default_goal_leaves_room(graph: fx.GraphModule, data: Tensor) -> None:
    """Half of the 5 % of decisions that a gate allows to change."""
    [figure] = ladder_of(calibrate(graph, [(data,)], method="auto", options=BOTH)).rungs[0].figures
    assert (figure.metric, figure.limit) == ("lowest_agreement", 0.975)


def test_outputs_take_no_more_memory_than_there_is(graph: fx.GraphModule, data: Tensor) -> None:
    """A sample has 144 + 10 floats, twice."""
    assert len(hold_out(problem_of(graph, [(data,)], memory=2 * 8 * 154 * 5), 0.25)[1]) == 5


def test_what_was_trained_is_kept_beside_escapes(graph: fx.GraphModule, data: Tensor) -> None:
    problem = problem_of(graph, [(data,)], goal={"sqnr_db": 60.0})
    base = QDrop(iters=2).fit(problem)
    ranked = candidates(base, Judge(problem, torch.arange(16), None))
    costs = [each.escape.cost for each in ranked]
    assert costs == sorted(costs, reverse=True) and all(cost > 0 for cost in costs)
    (chosen,) = (each for each in ranked if each.escape.layer == "second")
    assert chosen.escape.settings == {"weight_bits": 8, "activation_bits": 8}
    _, result = with_escapes(problem, base, range_method("mse"), [chosen])
    bits = {site.name: site.spec.bits for site in result.placement.sites if site.kind == "weight"}
    assert bits == {"filters.weight": 8, "first.weight": 4, "second.weight": 8, "head.weight": 8}
    for name in ("filters.weight", "first.weight", "head.weight"):
        assert torch.equal(result.weights[name].codes, base.weights[name].codes)
    methods = {"qdrop": QDrop(iters=2)}
    ladder = ladder_of(climb(problem, methods, range_method("mse"), share=0.25, room=0.0, escapes=True))
    assert [rung.name for rung in ladder.rungs] == ["qdrop", "qdrop, 1 layer finer", "qdrop, 2 layers finer"]
    assert ladder.stopped == "end"


class Drawer(dict[str, Any]):
    """Finished steps in memory, and the names of those that were taken over."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def load(self, name: str) -> Any:
        self.taken += [name] if name in self else []
        return self.get(name)

    def save(self, name: str, tensors: Any, record: Any) -> None:
        assert name not in self
        self[name] = tensors, record


def test_units_are_kept_by_rung(graph: fx.GraphModule, data: Tensor) -> None:
    """Two rungs that train have units of the same names; another run trains none of them."""
    methods = {"qdrop": QDrop(iters=2), "brecq": get_method("brecq", {"iters": 2})}
    drawer = Drawer()
    problem = problem_of(graph, [(data,)], goal={"sqnr_db": 90.0}, kept=drawer)
    found = [climb(problem, methods, range_method("mse"), share=0.25, room=0.0, escapes=False) for _ in range(2)]
    assert drawer.taken == [*drawer] and {name.partition("-")[0] for name in drawer} == {"qdrop", "brecq"}
    for name, coded in found[0].weights.items():
        assert torch.equal(coded.codes, found[1].weights[name].codes)


def test_the_same_inputs_give_the_same_codes(graph: fx.GraphModule, data: Tensor) -> None:
    goal = {"sqnr_db": 25.0}
    pair = [
        calibrate(graph, batches, method="auto", options=BOTH, goal=goal)
        for batches in ([(data,)], [(data[:10],), (data[10:],)])
    ]
    assert pair[0].weights.keys() == pair[1].weights.keys()
    for name, coded in pair[0].weights.items():
        assert torch.equal(coded.codes, pair[1].weights[name].codes)
    assert replace(ladder_of(pair[0]), rungs=()) == replace(ladder_of(pair[1]), rungs=())


def test_advice_names_the_layer_and_what_it_gives(graph: fx.GraphModule, data: Tensor) -> None:
    result = calibrate(graph, [(data,)], method="mse")
    found = advice(result, [(data,)], goal={"sqnr_db": 25.0})
    assert found is not None and found.better is not None
    assert (found.layers[0].layer, found.advised) == ("filters", 1)
    assert found.figures[0].value < 25 < found.better[0].value
    assert advice(result, [(data,)], goal=None).advised is None  # type: ignore[union-attr]


@pytest.mark.parametrize("needed", range(1, 12))
def test_the_fewest_that_suffice_are_found_in_few_tries(needed: int) -> None:
    tries: list[int] = []

    def suffices(count: int) -> bool:
        tries.append(count)
        return count >= needed

    assert fewest(10, suffices) == (needed if needed <= 10 else None)
    assert len({*tries}) == len(tries) <= 7


def test_a_fixed_batch_is_climbed_too(data: Tensor) -> None:
    graph = fold(capture(Spectrum().eval(), (data[:1],), free_batch=False))
    batches = [(x,) for x in data[:16].split(1)]
    ladder = ladder_of(calibrate(graph, batches, method="auto", options={"rungs": "mse"}, goal={"sqnr_db": 25.0}))
    assert (ladder.calibrated, ladder.held_out, ladder.stopped) == (8, 8, "goal")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rungs": "mse,auto"}, "names 'auto'"),
        ({"rungs": "mse,mse"}, "names a method twice"),
        ({"rungs": "mse,gptg"}, "gptq"),
        ({"ranges": "gptq"}, "takes a range method"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        get_method("auto", options)


def test_too_few_samples_are_refused(graph: fx.GraphModule, data: Tensor) -> None:
    with pytest.raises(InputError, match="only 7; give at least 8, or name a method"):
        calibrate(graph, [(data[:7],)], method="auto")
