"""The scores of every evaluation sample in a bundle, so that a later export can be compared with it by sample.

Must not know: graphs, how scores are measured or compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from calibrators.errors import InputError
from exporter.handover.check import save_arrays
from exporter.inputs.arrays import open_arrays
from runtime_tests.measure.paired import SampleScores

__all__ = ["SCORES", "read_scores", "write_scores"]

SCORES = "evaluation.npz"


def write_scores(folder: Path, scores: SampleScores) -> None:
    """Write the scores into a bundle."""
    arrays = {"error": scores.error} | ({"right": scores.right} if scores.right is not None else {})
    save_arrays(folder / SCORES, arrays)


def read_scores(bundle: Path) -> SampleScores | None:
    """Return the scores in a bundle, None if it has none: its export measured no accuracy.

    raises: InputError if the file is not what `write_scores` writes.
    """
    path = bundle / SCORES
    if not path.is_file():
        return None
    with open_arrays(path) as arrays:
        if "error" not in arrays:
            raise InputError(f"{path} holds no scores; export the model again.")
        error = arrays["error"].all()
        right = arrays["right"].all() if "right" in arrays else None
    fits = error.ndim == 1 and error.dtype == np.float32
    if not fits or (right is not None and (right.dtype, right.shape) != (np.bool_, error.shape)):
        raise InputError(f"{path} holds other arrays than scores of samples; export the model again.")
    return SampleScores(error, right)
