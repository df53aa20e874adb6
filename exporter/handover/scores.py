"""The scores of every evaluation sample in a bundle, so that a later export can be compared with it by sample.

Must not know: graphs, how scores are measured or compared.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from calibrators.errors import InputError
from exporter.handover.check import save_arrays
from runtime_tests.measure.paired import SampleScores

__all__ = ["SCORES", "read_scores", "write_scores"]

SCORES = "evaluation.npz"
LARGEST = 1 << 30
"""Bytes of the largest array that is read."""


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
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.file_size > LARGEST for entry in archive.infolist()):
                raise ValueError("its arrays are too large")
        with np.load(path, allow_pickle=False) as arrays:
            error, right = arrays["error"], arrays.get("right")
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error_found:
        raise InputError(f"{path} holds no readable scores: {error_found}; export the model again.") from error_found
    fits = error.ndim == 1 and error.dtype == np.float32
    if not fits or (right is not None and (right.dtype, right.shape) != (np.bool_, error.shape)):
        raise InputError(f"{path} holds other arrays than scores of samples; export the model again.")
    return SampleScores(error, right)
