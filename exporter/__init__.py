"""From model to artifact.

    graph = fold(capture(model, example))                  # torch in
    emit(calibrate(graph, batches), "model.onnx")          # ONNX out
    export(model, batches, out="build/")                   # all of it, with the bundle

The names below are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.capturing import capture
    from exporter.emission import emit
    from exporter.folding import fold
    from exporter.pipeline import export, verify

__all__ = ["capture", "emit", "export", "fold", "verify"]

_HOME = {"capture": "capturing", "emit": "emission", "export": "pipeline", "fold": "folding", "verify": "pipeline"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
