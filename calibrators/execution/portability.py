"""Report the weights and scales that the target's limits changed, and their cost in the whole network.

The network without limits has the same activation ranges and the weights that the method would give it, so that no
second calibration is needed.

Must not know: which methods there are, ONNX, runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.allocator import give_back
from calibrators.errors import InputError
from calibrators.execution.losses import OutputMetrics
from calibrators.execution.network_loss import CHUNK, compared_outputs, draw_samples, float_outputs, outputs_at
from calibrators.execution.task import Problem
from calibrators.graph.aten import batch_of
from calibrators.grid.metrics import decibels, energy
from calibrators.grid.numerics import dequantize, fake_quant, quantize
from calibrators.grid.processors import REFERENCE
from calibrators.grid.spec import QParams, QuantizedTensor
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.program.settle import moved
from calibrators.record import LimitedWeight, PortabilityCost, Reading

__all__ = ["portability"]

SAMPLES = 128
"""Calibration samples on which the cost is measured, at most."""


def portability(problem: Problem, result: CalibrationResult) -> dict[str, Any]:
    """Return the entries of the record about limits: the weights concerned, those stored as uint8, and the cost."""
    limited = tuple(_limited_weight(problem, result, name) for name in _raised(problem))
    unsigned = tuple(site.name for site in problem.placement.sites if site.unsigned)
    cost = _cost(problem, result)
    return {"limited_weights": limited or None, "unsigned_weights": unsigned or None, "portability": cost}


def _raised(problem: Problem) -> list[str]:
    """Return the names of the weight sites with scales that the limits raised."""
    return [name for name, factors in problem.coarser.items() if bool((factors > 1).any())]


def _free_grid(problem: Problem, result: CalibrationResult, name: str) -> QParams:
    """Return the grid of a weight without limits."""
    qparams = result.weights[name].qparams
    return replace(qparams, scale=qparams.scale / problem.coarser[name].to(qparams.scale))


def _limited_weight(problem: Problem, result: CalibrationResult, name: str) -> LimitedWeight:
    weight, factors = problem.values(problem.placement.by_name[name]), problem.coarser[name]
    grids = result.weights[name].qparams, _free_grid(problem, result, name)
    signal = energy(weight)
    cost = [decibels(signal, energy(fake_quant(weight, grid).sub_(weight))) for grid in grids]
    give_back(weight.nbytes)
    raised = int((factors > 1).sum())
    return LimitedWeight(name, raised, factors.numel(), float(factors.mean()), float(factors.max()), *cost)


def _cost(problem: Problem, result: CalibrationResult) -> PortabilityCost | None:
    """Return the cost in the whole network; None where nothing changed or no output can be compared."""
    raised, settled = _raised(problem), result.record.settled
    if not raised and not (settled and settled.moved):
        return None
    try:
        compared = [*compared_outputs(problem).values()]
    except InputError:
        return None
    is_known = all(name in problem.free or _is_nearest(problem, result, name) for name in raised)
    grids = {name: coded.qparams for name, coded in result.weights.items()}
    portable = result if is_known else _with_weights(result, grids)
    rows = draw_samples(problem, SAMPLES, "portability")
    inputs = problem.select(rows)
    metrics = OutputMetrics(float_outputs(problem, inputs), problem.labels_of(rows))
    readings = [
        _reading(problem, program, inputs, compared, metrics)
        for program in (portable.program, _without_limits(problem, portable, raised).program)
    ]
    return PortabilityCost(len(rows), metrics.loss_name, "method" if is_known else "nearest", *readings)


def _is_nearest(problem: Problem, result: CalibrationResult, name: str) -> bool:
    weight, coded = problem.values(problem.placement.by_name[name]), result.weights[name]
    return torch.equal(quantize(weight, coded.qparams), coded.codes)


def _with_weights(result: CalibrationResult, weights: Mapping[str, QParams | QuantizedTensor]) -> CalibrationResult:
    """Return the network with other weights, those given as grids rounded to nearest."""
    biases = {name: dequantize(coded.codes, coded.qparams).double() for name, coded in result.biases.items()}
    return freeze(result.placement, result.activations, {**result.weights, **weights}, biases)


def _without_limits(problem: Problem, result: CalibrationResult, raised: Sequence[str]) -> CalibrationResult:
    """Return the network as one family of processors would get it."""
    target = replace(result.placement.target, exact_on=(REFERENCE,))
    settled = result.record.settled
    back = {move.site: moved(result.activations[move.site], -move.ulps) for move in (settled.moved if settled else ())}
    free = replace(
        result, placement=replace(result.placement, target=target), activations={**result.activations, **back}
    )
    return _with_weights(free, {name: problem.free.get(name) or _free_grid(problem, result, name) for name in raised})


def _reading(
    problem: Problem,
    program: fx.GraphModule,
    inputs: Sequence[Tensor],
    compared: Sequence[int],
    metrics: OutputMetrics,
) -> Reading:
    """Return the reading of a program on samples."""
    metrics.reset()
    chunks = zip(*(torch.split(x, batch_of(program, CHUNK)) for x in inputs), strict=True)
    losses, start = [], 0
    for outputs in problem.ranks.spread(partial(outputs_at, program, compared), chunks):
        losses.append(metrics(outputs, start))
        start += len(outputs[0])
    return metrics.reading(float(torch.cat(losses).mean()))
