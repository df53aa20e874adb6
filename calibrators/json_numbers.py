"""Numbers of a record as JSON holds them.

Must not know: which records there are, torch.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

__all__ = ["Real"]


def _number(value: object) -> object:
    return math.nan if value is None else value


Real = Annotated[float, BeforeValidator(_number), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "null"}]})]
"""A number that is null in JSON if it is not finite, and NaN when it is read back."""
