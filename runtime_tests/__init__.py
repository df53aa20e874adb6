"""Compare the runtime with the reference program, code by code.

    validate("model.onnx", reference=result, batches=held_out).raise_for_mismatch()

The public names are imported on first use, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from runtime_tests.parity.results import ParityError as ParityError
    from runtime_tests.proof import second_parity as second_parity
    from runtime_tests.proof import validate as validate

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "parity.results": ["ParityError"],
        "proof": ["second_parity", "validate"],
    },
)
