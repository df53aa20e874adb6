"""Calibration from end to end: a folded graph and batches become a CalibrationResult.

Must not know: how models are loaded, ONNX, runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.allocation import Stored
from calibrators.budgets import Budget
from calibrators.corrections import correct_biases
from calibrators.errors import InputError, ModelError
from calibrators.forms import to_integer_forms
from calibrators.freeze import CalibrationResult
from calibrators.graph import constant, where
from calibrators.methods import Method, get_method, range_method
from calibrators.methods.lp import Lp
from calibrators.mixed import allocate_bits, measure_sensitivity
from calibrators.place import PlacementOptions, place
from calibrators.prepare import prepare_graph
from calibrators.problem import Problem, Stage, silent
from calibrators.ranges import RangeMethod
from calibrators.simulate import Batch
from calibrators.spec import Target
from calibrators.targets import get_target

__all__ = ["calibrate"]


def calibrate(
    graph: fx.GraphModule,
    batches: Iterable[Batch | Tensor],
    *,
    method: str | Method = "mse",
    options: Mapping[str, object] | None = None,
    target: str | Target = "ort-cpu",
    placement: PlacementOptions | None = None,
    prepare: Collection[str] = (),
    bias_correction: bool = False,
    labels: Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
    cache_gib: float = 4.0,
    explain: bool = False,
    sensitivity: bool = False,
    budgets: Sequence[Budget] = (),
    stored: Stored = lambda size, bits, taps: size,
    stage: Stage = silent,
) -> CalibrationResult:
    """Scales, zero points, integer weights and biases for `graph`, chosen by a method for a target.

    graph:     captured and folded (exporter.capturing, exporter.folding).
    batches:   tensors, or tuples with one tensor per model input, [samples, ...]; range methods read them once, other
               methods and bias_correction again.
    method:    a name (see `intact methods`) with its options, or a method object.
    prepare:   names of rewrites of the float graph that come first: "cle", "absorb" (calibrators.prepare).
    labels:    int64 [samples], for methods that can use them.
    device:    where methods that train do so: "cpu", "cuda", "cuda:1".
    cache_gib: memory for activations kept between steps; what does not fit goes to temporary files.
    explain:   also compute what explains the method's choice; it goes into the record.
    sensitivity: also measure what the bits of each layer cost; it goes into the record.
    budgets:   limits within which bits are allocated to the layers instead of the general ones (calibrators.mixed).
    stored:    bytes that weights take in the file, by size, bits and wide taps; one each where it is not given.
    stage:     opens a stage of work for a progress display.
    raises:    InputError for unknown names or options, empty or non-finite data; ModelError for non-finite weights.
    """
    method = get_method(method, options or {}) if isinstance(method, str) else method
    target = get_target(target) if isinstance(target, str) else target
    _check_weights(graph)
    prepared, preparation = prepare_graph(to_integer_forms(graph), prepare)
    placement = placement or PlacementOptions()
    for rule in placement.layers:
        if rule.method is not None:
            range_method(rule.method)
    problem = Problem(
        placement=place(prepared, target, placement),
        batches=_Tuples(batches),
        labels=labels,
        seed=seed,
        device=_device(device),
        memory=int(cache_gib * 2**30),
        explain=explain,
        stage=stage,
    )
    torch.manual_seed(seed)
    record: dict[str, Any] = {"preparation": preparation}
    ranges = method if isinstance(method, RangeMethod) else Lp(2.0)
    if budgets:
        rules, found = allocate_bits(problem, placement, ranges, budgets, stored)
        record |= found
        problem = problem.variant(placement=place(prepared, target, replace(placement, allocated=rules)))
    elif sensitivity:
        record["sensitivity"] = measure_sensitivity(problem, placement, ranges)
    result = method.fit(problem)
    result = replace(result, record={**result.record, **record})
    if bias_correction:
        result = correct_biases(result, problem.batches)
    return result


class _Tuples:
    """Batches with every one a tuple."""

    def __init__(self, batches: Iterable[Batch | Tensor]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return ((batch,) if isinstance(batch, Tensor) else tuple(batch) for batch in self.batches)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name!r} cannot be used here: {str(error).splitlines()[0]} Use --device cpu."
        ) from error
    return device


def _check_weights(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "get_attr" and not bool(torch.isfinite(constant(graph, node)).all()):
            user = next(iter(node.users), node)
            raise ModelError(f"parameter {node.target!r} of {where(user)} holds NaN or infinity; load other weights")
