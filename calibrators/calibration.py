"""Calibration from end to end: a folded graph and batches become a CalibrationResult.

Must not know: how models are loaded, ONNX, runtimes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.corrections import correct_biases
from calibrators.errors import InputError, ModelError
from calibrators.forms import to_integer_forms
from calibrators.freeze import CalibrationResult
from calibrators.graph import constant, where
from calibrators.methods import Method, get_method
from calibrators.place import Placement, PlacementOptions, place
from calibrators.prepare import prepare_graph
from calibrators.problem import Problem, Stage, silent
from calibrators.simulate import Batch
from calibrators.skips import Skip, split_skips
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
    stage:     opens a stage of work for a progress display.
    raises:    InputError for unknown names or options, empty or non-finite data; ModelError for non-finite weights.
    """
    method = get_method(method, options or {}) if isinstance(method, str) else method
    target = get_target(target) if isinstance(target, str) else target
    _check_weights(graph)
    prepared, preparation = prepare_graph(to_integer_forms(graph), prepare)
    placed, skips = _placed(prepared, target, placement or PlacementOptions())
    problem = Problem(
        placement=placed,
        batches=_Tuples(batches),
        labels=labels,
        seed=seed,
        device=_device(device),
        memory=int(cache_gib * 2**30),
        explain=explain,
        stage=stage,
    )
    torch.manual_seed(seed)
    result = method.fit(problem)
    result = replace(result, record={**result.record, "preparation": preparation, "skips": tuple(skips)})
    if bias_correction:
        result = correct_biases(result, problem.batches)
    return result


def _placed(graph: fx.GraphModule, target: Target, options: PlacementOptions) -> tuple[Placement, list[Skip]]:
    """The placement, after identity branches that the bits cannot hold were taken out of their kernels."""
    placement = place(graph, target, options)
    if not options.split_skips:
        return placement, []
    bits = {user: site.spec.bits for site in placement.sites if site.kind == "weight" for user in site.users}
    split, skips = split_skips(graph, lambda node: bits.get(node.name))
    return (place(split, target, options) if skips else placement), skips


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
