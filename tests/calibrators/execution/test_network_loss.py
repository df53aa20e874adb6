"""The loss at a point equals that of the program it stands for, however much of the network is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from calibrators.execution import network_loss as module
from calibrators.execution.losses import prediction_loss
from calibrators.execution.network_loss import CHUNK, FIRST_LOOK, BudgetExhausted, NetworkLoss, float_outputs
from calibrators.execution.task import Problem
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.spec import QParams
from calibrators.methods import range_method
from calibrators.methods.mse import MSE
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import freeze
from calibrators.targets import get_target
from exporter.frontend.capture import capture
from tests.support.networks import NETWORKS, build

SAMPLES = 4 * CHUNK

TIES = 0.02
"""Share of the loss that codes at a tie may make: the program adds in another memory layout, which can move a few."""


def problem(name: str, bits: int = 4) -> Problem:
    model, x = build(name, batch=SAMPLES)
    options = PlacementOptions(weight_bits=bits, activation_bits=bits)
    placement = place(to_integer_forms(capture(model, x[:2])), get_target("ort-cpu"), options)
    return Problem(placement=placement, batches=[(x,)], range_method=range_method)


def network_loss(given: Problem, budget: int = 1000) -> NetworkLoss:
    inputs = given.select(torch.arange(given.samples))
    loss = prediction_loss("kl", float_outputs(given, inputs))
    return NetworkLoss(given, inputs, mse(given), loss, budget=budget)


def mse(given: Problem) -> dict[str, QParams]:
    return {**given.activations(MSE()), **given.weights(MSE())}


def scaled(point: Mapping[str, QParams], name: str, factor: float) -> dict[str, QParams]:
    return {**point, name: replace(point[name], scale=point[name].scale * factor)}


def of_program(given: Problem, surface: NetworkLoss, point: Mapping[str, QParams]) -> float:
    activations = {name: point[name] for name in surface.quantizers}
    program = freeze(given.placement, activations, {n: q for n, q in point.items() if n not in activations}).program
    (x,) = given.select(torch.arange(given.samples))
    with torch.no_grad():
        outputs = torch.cat([program(part)[0] for part in torch.split(x, CHUNK)])
    return float(surface.loss([outputs], 0).mean())


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_loss_is_that_of_the_program_at_every_point(name: str) -> None:
    """Every site moved in turn, in and against the order of execution, from the best point of the moment."""
    given = problem(name)
    surface = network_loss(given)
    point = mse(given)
    assert surface.evaluate(point) == pytest.approx(of_program(given, surface, point), rel=TIES)
    names = sorted((n for n in point if n in surface.first), key=lambda n: surface.first[n])
    assert set(names) == set(point)
    skipped = 0.0
    for moved in [*names, *names[::-3]]:
        assert surface.best is not None
        point, before = scaled(surface.best.point, moved, 1.07), surface.evaluations
        found = surface.evaluate(point, whole=True)
        assert found == pytest.approx(of_program(given, surface, point), rel=TIES)
        skipped += 1.0 - (surface.evaluations - before)
    assert skipped > 1.0


def test_what_is_left_out_changes_no_bit() -> None:
    given = problem("residual")
    surface, point = network_loss(given), mse(given)
    surface.evaluate(point)
    for moved in list(point)[::3]:
        point = scaled(surface.current, moved, 0.93)
        assert surface.evaluate(point, whole=True) == network_loss(given).evaluate(point)


def test_work_is_counted_by_share() -> None:
    given = problem("residual")
    surface = network_loss(given)
    point = mse(given)
    surface.evaluate(point)
    assert surface.evaluations == 1.0
    surface.evaluate(dict(point))
    assert surface.evaluations == 1.0  # known
    surface.evaluate(scaled(point, "head.weight", 0.9), whole=True)
    assert surface.evaluations == 2.0  # what crosses into the last block is made on the way
    surface.evaluate(scaled(point, "head.weight", 1.1), whole=True)
    head, total = 8 * 5, (27 * 8 + 9 * 8 + 8 * 8) * 81 + 8 * 5
    assert surface.evaluations == pytest.approx(2.0 + head / total, abs=1e-12)


def test_a_budget_is_never_exceeded_and_refuses_before_any_work() -> None:
    given = problem("residual")
    surface = network_loss(given, budget=3)
    point = mse(given)
    for factor in (1.0, 1.1, 1.2):
        surface.evaluate(scaled(point, "stem.weight", factor), whole=True)
    assert surface.evaluations == 3.0
    current = surface.current
    with pytest.raises(BudgetExhausted):
        surface.evaluate(scaled(point, "stem.weight", 0.9))
    assert surface.evaluations == 3.0 and surface.current is current


def test_a_deadline_ends_it() -> None:
    given = problem("mlp")
    surface = network_loss(given)
    surface.evaluate(mse(given))
    surface.deadline = 0.0
    with pytest.raises(BudgetExhausted):
        surface.evaluate(scaled(mse(given), "layers.2.weight", 1.1))


def test_a_hopeless_point_is_given_up_early() -> None:
    given = problem("residual")
    surface = network_loss(given)
    good = surface.evaluate(mse(given))
    bad = surface.evaluate(scaled(mse(given), "stem.weight", 100.0))
    assert surface.evaluations == 1.0 + FIRST_LOOK
    assert bad > good and surface.best is not None and surface.best.loss == good
    assert surface.evaluate(scaled(mse(given), "stem.weight", 90.0), whole=True) > good
    assert surface.evaluations == 2.0 + FIRST_LOOK


def test_only_weights_that_change_are_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem("residual")
    surface = network_loss(given)
    point = mse(given)
    surface.evaluate(point)
    quantized: list[torch.Size] = []
    original = module.fake_quant
    monkeypatch.setattr(module, "fake_quant", lambda w, q: quantized.append(w.shape) or original(w, q))
    surface.evaluate(scaled(point, "point.weight", 1.05))
    assert quantized == [torch.Size([8, 8, 1, 1])]
    surface.evaluate(scaled(surface.current, "x", 1.05))
    assert len(quantized) == 1


def test_little_memory_changes_no_loss() -> None:
    given = problem("pooled")
    ample, scarce = network_loss(given), network_loss(replace(given, memory=0))
    point = mse(given)
    for name in point:
        moved = scaled(point, name, 0.93)
        assert ample.evaluate(moved, whole=True) == scarce.evaluate(moved, whole=True)
    assert scarce.memory.spilled and not ample.memory.spilled
