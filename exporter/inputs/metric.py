"""A metric that the user gives, and the labels that it gets: whatever the data yields beside the inputs.

Must not know: how outputs are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from calibrators.errors import DataError
from exporter.frontend.user_code import article, load_callable, users_code

__all__ = ["Metric", "joined", "load_metric"]


@dataclass(frozen=True)
class Metric:
    """A function of outputs and labels, whose exceptions become one message."""

    name: str
    function: Callable[[Any, Any], Any]
    folder: Path | None = None

    def __call__(self, outputs: Any, labels: Any) -> float:
        """Return the metric.

        raises: DataError with the user's line, or for a result that is no finite number.
        """
        with users_code(f"metric {self.name}", "raised", self.folder, DataError):
            value = self.function(outputs, labels)
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"metric {self.name} returned {article(type(value).__name__)}, not a number; return one number for all "
                "samples."
            ) from error
        if not math.isfinite(number):
            raise DataError(f"metric {self.name} returned {number}; return a finite number.")
        return number


def load_metric(given: str | Callable[[Any, Any], Any] | None) -> Metric | None:
    """Return the metric of `file.py:callable`, or of a function.

    raises: DataError, UnknownNameError.
    """
    if given is None or not isinstance(given, str):
        return None if given is None else Metric(getattr(given, "__name__", type(given).__name__), given)
    loaded = load_callable(given, error=DataError)
    return Metric(given.rpartition(":")[2], loaded.function, loaded.folder)


def joined(parts: Sequence[Any], samples: int) -> Any:
    """Return the labels of all batches as one value, as the data gives them, cut to a number of samples.

    Arrays are concatenated, lists with one entry per sample chained, dictionaries joined by key; what is neither, or
    differs in shape, becomes a list with one entry per batch.
    """
    if all(part is None for part in parts):
        return None
    if all(isinstance(part, Mapping) for part in parts):
        return {key: joined([part.get(key) for part in parts], samples) for key in parts[0]}
    if all(isinstance(part, Tensor | np.ndarray) for part in parts):
        arrays = [part.numpy(force=True) if isinstance(part, Tensor) else part for part in parts]
        if len({array.shape[1:] for array in arrays}) == 1 and arrays[0].ndim:
            return np.concatenate(arrays)[:samples]
    if all(isinstance(part, list | tuple) for part in parts):
        return list(chain.from_iterable(parts))[:samples]
    return list(parts)
