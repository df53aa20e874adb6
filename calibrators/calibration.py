"""Calibration from end to end: a folded graph and batches become a CalibrationResult.

Must not know: how models are loaded, ONNX, runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from calibrators.corrections import correct_biases
from calibrators.errors import ModelError
from calibrators.forms import to_integer_forms
from calibrators.freeze import CalibrationResult, freeze
from calibrators.graph import constant, where
from calibrators.methods import RangeMethod, get_method
from calibrators.place import PlacementOptions, place
from calibrators.simulate import Batch, observe
from calibrators.spec import QParams, Site, Target
from calibrators.targets import get_target

__all__ = ["calibrate"]


def calibrate(
    graph: fx.GraphModule,
    batches: Iterable[Batch | Tensor],
    *,
    method: str | RangeMethod = "mse",
    options: Mapping[str, object] | None = None,
    target: str | Target = "ort-cpu",
    placement: PlacementOptions | None = None,
    bias_correction: bool = False,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> CalibrationResult:
    """Scales, zero points, integer weights and biases for `graph`, chosen by a method for a target.

    graph:   captured and folded (exporter.capturing, exporter.folding).
    batches: tensors, or tuples with one tensor per model input, [samples, ...]; read once, twice with bias_correction.
    method:  a name (see `intact methods`) with its options, or a method object.
    raises:  InputError for unknown names or options, empty or non-finite data; ModelError for non-finite weights.
    """
    method = get_method(method, options or {}) if isinstance(method, str) else method
    target = get_target(target) if isinstance(target, str) else target
    _check_weights(graph)
    placed = place(to_integer_forms(graph), target, placement)
    torch.manual_seed(seed)
    statistics = observe(placed, map(_as_tuple, batches), advance)
    activations = {
        site.name: _fixed(site) if site.fixed else method.activation(statistics[site.name], site.spec)
        for site in placed.sites
        if site.kind == "activation" and site.shares is None
    }
    nodes = {node.name: node for node in placed.graph.graph.nodes}
    weights = {
        site.name: method.weight(constant(placed.graph, nodes[site.node]), site.spec)
        for site in placed.sites
        if site.kind == "weight"
    }
    result = freeze(placed, activations, weights)
    result = replace(result, observed=statistics)
    if bias_correction:
        result = correct_biases(result, map(_as_tuple, batches))
    return result


def _as_tuple(batch: Batch | Tensor) -> Batch:
    return (batch,) if isinstance(batch, Tensor) else tuple(batch)


def _fixed(site: Site) -> QParams:
    assert site.fixed is not None
    scale, zero_point = site.fixed
    levels = 1 << (8 - site.spec.bits)  # a narrower grid over the same known range
    return QParams(
        torch.tensor(scale * levels, dtype=torch.float32), torch.tensor(zero_point, dtype=torch.int32), site.spec
    )


def _check_weights(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "get_attr" and not bool(torch.isfinite(constant(graph, node)).all()):
            user = next(iter(node.users), node)
            raise ModelError(f"parameter {node.target!r} of {where(user)} holds NaN or infinity; load other weights")
