"""The proof: the runtime against the reference.

    validate("model.onnx", reference=result, batches=held_out).raise_for_mismatch()

The names below are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime_tests.parity import ParityError, validate
    from runtime_tests.second_runtime import second_parity

__all__ = ["ParityError", "second_parity", "validate"]

_HOMES = {"ParityError": "parity", "second_parity": "second_runtime", "validate": "parity"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
