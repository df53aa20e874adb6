"""Sets of ATen operators by name, so that data about operators can be read without torch.

Must not know: targets, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Operators"]


class Operators(frozenset[str]):
    """Names such as "conv2d.default"; `node.target in operators` holds for the overload of that name."""

    def __new__(cls, *names: str) -> Operators:
        return super().__new__(cls, names)

    def __contains__(self, operator: object) -> bool:
        return super().__contains__(str(operator).removeprefix("aten."))

    def __or__(self, other: Iterable[str]) -> Operators:  # type: ignore[override]
        return Operators(*self, *other)
