"""Calibration from end to end: a folded graph and batches become a CalibrationResult.

Must not know: how models are loaded, ONNX, runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.allocator import keep_freed_memory
from calibrators.errors import DataError, InputError, ModelError, argument, first_line
from calibrators.execution.measure import EMPTY_AGAIN, Batch
from calibrators.execution.portability import portability
from calibrators.execution.ranks import ALONE, Ranks
from calibrators.execution.shared import Shared
from calibrators.execution.task import Kept, Problem, Stage, silent
from calibrators.goal import DEFAULT_GOAL, Goal
from calibrators.graph.aten import constant, operator_name, where
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.target import Target
from calibrators.ladder_record import CostlyLayers
from calibrators.methods import Method, check_parallel, get_method, range_method
from calibrators.methods.lp import Lp
from calibrators.mixed_precision.budgets import Budget
from calibrators.mixed_precision.escapes import costly_layers
from calibrators.mixed_precision.ilp import Stored
from calibrators.mixed_precision.mixed import allocate_bits, measure_sensitivity
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import CalibrationResult
from calibrators.ranges.range_method import RangeMethod
from calibrators.rewrites.bias_correction import correct_biases
from calibrators.rewrites.prepare import prepare_and_place
from calibrators.targets import DEFAULT_TARGET, get_target

__all__ = ["advice", "calibrate"]


def calibrate(
    graph: fx.GraphModule,
    batches: Iterable[Batch | Tensor],
    *,
    method: str | Method = "gptq",
    options: Mapping[str, object] | None = None,
    target: str | Target = DEFAULT_TARGET,
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
    kept: Kept | None = None,
    seen: Kept | None = None,
    shared: Shared | None = None,
    goal: Goal | None = DEFAULT_GOAL,
    ranks: Ranks = ALONE,
) -> CalibrationResult:
    """Return the scales, zero points, integer weights and biases for `graph`, chosen by a method for a target.

    graph:     captured and folded (exporter.frontend.capture, exporter.folding.fold_regions).
    batches:   tensors, or tuples with one tensor per model input, [samples, ...]; range methods read them once, other
               methods and bias_correction again.
    method:    a name (see `intact methods`) with its options, or a method object.
    prepare:   names of rewrites of the float graph that come first (calibrators.rewrites.prepare).
    labels:    int64 [samples], for methods that can use them.
    device:    where methods that train do so: "cpu", "cuda", "cuda:1".
    cache_gib: memory for activations kept between steps, at most a quarter of a GPU; the rest goes to disk.
    explain:   also compute what explains the method's choice; it goes into the record.
    sensitivity: also measure what the bits of each layer cost; it goes into the record.
    budgets:   limits within which bits are allocated to layers, in place of the general ones (mixed_precision.mixed).
    stored:    function from size, bits and wide taps of a weight to its bytes in the file; by default one byte a code.
    stage:     opens a stage of work for a progress display.
    kept:      where methods that train keep finished units, from which another run with the same arguments continues.
    seen:      where statistics of activations are kept, for runs with the same data and other methods or bits.
    shared:    what earlier calls with the same arguments but for the target found, and where this one adds to it.
    goal:      limits at which method "auto" stops; None: where another method gains no more than noise.
    ranks:     the processes that call this together, each with all the data; all get the same result.
    raises:    InputError for unknown names or options, empty or non-finite data; ModelError for non-finite weights.
    """
    keep_freed_memory()
    method = get_method(method, options or {}) if isinstance(method, str) else method
    check_parallel(method, ranks)
    target = get_target(target) if isinstance(target, str) else target
    _check_constants(graph)
    placement = _checked(placement or PlacementOptions())
    data = _Batches(batches, graph)
    prepared, preparation = prepare_and_place(
        to_integer_forms(graph), prepare, lambda graph: place(graph, target, placement), data
    )
    problem = Problem(
        placement=prepared,
        batches=data,
        range_method=range_method,
        labels=labels,
        seed=seed,
        device=_device(device),
        memory=int(cache_gib * 2**30),
        explain=explain,
        stage=stage,
        kept=kept,
        seen=seen or shared,
        goal=goal,
        ranks=ranks,
    )
    decided = problem.placement
    if budgets or sensitivity or getattr(method, "places_again", False):
        shared = None  # the target decides about other placements too
    if shared is not None and (found := shared.result(decided)) is not None:
        return found
    with _float32_convolutions():
        problem, record = _with_chosen_bits(problem, placement, method, budgets, stored, sensitivity=sensitivity)
        result = method.fit(problem)
        problem = problem.placed(result.placement)
        if bias_correction:
            result = correct_biases(result, problem.batches)
    record |= portability(problem, result) | ({"preparation": preparation} if prepare else {})
    result = replace(result, record=replace(result.record, **record))
    if shared is not None:
        shared.add(decided, result)
    return result


def advice(
    result: CalibrationResult,
    batches: Iterable[Batch | Tensor],
    *,
    goal: Goal | None = DEFAULT_GOAL,
    seed: int = 0,
    stage: Stage = silent,
) -> CostlyLayers | None:
    """Return the layers of a calibrated network that cost its prediction most, and what helps.

    batches: the calibration data; goal: limits that the network should keep.
    returns: None where no output has one row per sample, by which networks could be compared.
    """
    data = _Batches(batches, result.placement.graph)
    problem = Problem(result.placement, data, range_method, seed=seed, stage=stage)
    with _float32_convolutions(), stage("rank layers", None):
        try:
            return costly_layers(problem, result, Lp(2.0), goal)
        except InputError:
            return None


def _checked(options: PlacementOptions) -> PlacementOptions:
    """Return the options after a check of the range methods in their rules, before placement, which takes longer."""
    for rule in options.layers:
        if rule.method is not None:
            range_method(rule.method)
    return options


def _with_chosen_bits(
    problem: Problem,
    options: PlacementOptions,
    method: Method,
    budgets: Sequence[Budget],
    stored: Stored,
    *,
    sensitivity: bool,
) -> tuple[Problem, dict[str, Any]]:
    """Return the problem with bits within the budgets, if there are any, and the entries of the record about bits."""
    ranges = method if isinstance(method, RangeMethod) else Lp(2.0)
    if not budgets:
        return problem, {"sensitivity": measure_sensitivity(problem, options, ranges)} if sensitivity else {}
    rules, sensitivities, mixed = allocate_bits(problem, options, ranges, budgets, stored)
    placement = place(problem.placement.graph, problem.placement.target, options, rules)
    return problem.variant(placement=placement), {"sensitivity": sensitivities, "mixed_precision": mixed}


class _Batches:
    """Batches as tuples, checked against the inputs of the graph; those that were there once must be there again."""

    def __init__(self, batches: Iterable[Batch | Tensor], graph: fx.GraphModule) -> None:
        self.batches, self.graph, self.were_read = batches, graph, False

    def __iter__(self) -> Iterator[Batch]:
        index = -1
        for index, batch in enumerate(self.batches):
            self.were_read = True
            inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            self._check(inputs, f"calibration batch {index}")
            yield inputs
        if index < 0 and self.were_read:
            raise DataError(EMPTY_AGAIN)

    def _check(self, inputs: Batch, where: str) -> None:
        example: Batch = self.graph.meta["example"]
        if len(inputs) != len(example):
            raise DataError(
                f"{where} has {len(inputs)} tensors, but the model takes {len(example)}; give its inputs alone, and "
                "labels as the argument of that name"
            )
        for x, like in zip(inputs, example, strict=True):
            if not isinstance(x, Tensor) or x.dtype != like.dtype or x.shape[1:] != like.shape[1:] or not x.ndim:
                seen = f"{list(x.shape)} {str(x.dtype)[6:]}" if isinstance(x, Tensor) else type(x).__name__
                shape = ", ".join(map(str, ["n", *like.shape[1:]]))
                raise DataError(
                    f"{where} holds {seen}, but the model takes [{shape}] {str(like.dtype)[6:]}; convert it"
                )
        if len({len(x) for x in inputs}) > 1:
            raise DataError(
                f"{where} has inputs with different numbers of samples: {[len(x) for x in inputs]}; give all the same"
            )


@contextmanager
def _float32_convolutions() -> Iterator[None]:
    """Make convolutions of a GPU compute in float32; by default cuDNN cuts operands to 10 bits (TF32)."""
    cudnn: Any = torch.backends.cudnn
    per_operator = hasattr(cudnn, "conv")  # from torch 2.9 on, where the older flag cannot be read once both are in use
    flags, name, exact = (cudnn.conv, "fp32_precision", "ieee") if per_operator else (cudnn, "allow_tf32", False)
    before = getattr(flags, name)
    setattr(flags, name, exact)
    try:
        yield
    finally:
        setattr(flags, name, before)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {name!r} cannot be used here: {first_line(error)} Use {argument('device', 'cpu')}."
        ) from error
    return device


def _check_constants(graph: fx.GraphModule) -> None:
    """Raise ModelError for NaN, or infinities in parameters and what layers read; masks, as buffers, may hold them."""
    parameters = {name for name, _ in graph.named_parameters()}
    for node in graph.graph.find_nodes(op="get_attr"):
        value = constant(graph, node)
        users = [operator_name(user.target) for user in node.users]
        is_read = any(kind in name for name in users for kind in ("conv", "linear", "norm", "embedding"))
        finite = is_read or str(node.target) in parameters
        ends = torch.stack(value.aminmax()) if value.is_floating_point() and value.numel() else torch.zeros(2)
        if bool((~torch.isfinite(ends) if finite else torch.isnan(ends)).any()):  # NaN is an end of its own
            user = next(iter(node.users), node)
            raise ModelError(f"parameter {node.target!r} of {where(user)} holds NaN or infinity; load other weights")
