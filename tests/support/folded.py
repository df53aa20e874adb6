"""Folded networks of the tests, and the error by which methods are compared on them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx

from calibrators.program.freeze import CalibrationResult
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.architectures import construct
from tests.support.networks import NETWORKS, build


@functools.cache
def folded_network(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Return the folded graph of a network or an architecture, and 64 input samples."""
    if name in NETWORKS:
        model, x = build(name, batch=64)
        inputs: tuple[Tensor, ...] = (x,)
    else:
        model, inputs = construct(name, batch=64)
    return fold(capture(model, inputs)), inputs


def output_error(result: CalibrationResult, graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Return the relative squared error of the network's outputs, averaged over all of them."""
    with torch.no_grad():
        pairs = list(zip(graph(*inputs), result.program(*inputs), strict=True))
    return sum(float((y - t).square().sum() / t.square().sum()) for t, y in pairs) / len(pairs)
