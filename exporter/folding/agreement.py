"""Compare the folded network with the model on data: no later proof could find a wrong fold.

Must not know: quantization, ONNX.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from calibrators.errors import ModelError
from calibrators.grid.metrics import alike
from exporter.frontend.capture import SAME

__all__ = ["check_folding"]

ROUNDINGS = 4.0
"""Errors that a fold may make, over those that float32 makes in the model itself: folded weights are rounded too."""


def check_folding(graph: fx.GraphModule, folded: fx.GraphModule, batch: Sequence[Tensor]) -> None:
    """Check that the outputs agree up to SAME, or up to what float32 loses in a network that amplifies rounding.

    batch:  inputs of both.
    raises: ModelError, which is a fault of the fold.
    """
    with torch.no_grad():
        pairs = list(zip(graph(*batch), folded(*batch), strict=True))
    differing = [index for index, (ours, theirs) in enumerate(pairs) if not _agree(ours, theirs, SAME)]
    if not differing:
        return
    exact = _in_float64(graph, batch)
    for index in differing:
        ours, theirs = pairs[index]
        limit = max(SAME, ROUNDINGS * _distance(ours, exact[index])) if exact is not None else SAME
        if not _agree(ours, theirs, limit):
            raise ModelError(
                f"folding changed output {graph.meta['output_names'][index]!r} of the model by more than {limit:.2g} "
                "of its largest value, which is a fault of intact; please report this model"
            )


def _agree(ours: Tensor, theirs: Tensor, limit: float) -> bool:
    return not ours.is_floating_point() or alike(ours, theirs, limit)


def _in_float64(graph: fx.GraphModule, batch: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the outputs of the model in float64; None where it fixes another type."""
    wide = copy.deepcopy(graph).double()
    inputs = [x.double() if x.is_floating_point() else x for x in batch]
    try:
        with torch.no_grad():
            return list(wide(*inputs))
    except RuntimeError:
        return None


def _distance(ours: Tensor, exact: Tensor) -> float:
    """Return the largest finite difference over the largest value."""
    difference, size = (ours.double() - exact.double()).abs(), exact.double().abs()
    finite = difference.isfinite() & size.isfinite()
    if not bool(finite.any()):
        return 0.0
    largest = float(size[finite].max())
    return float(difference[finite].max()) / largest if largest else 0.0
