"""Why an axis cannot be free: the model makes its size a constant, or binds it to the sizes of others.

Must not know: how programs are captured, quantization, ONNX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

import torch

from calibrators.errors import ModelError, argument
from exporter.frontend.calling import user_inputs
from exporter.frontend.free_sizes import SMALLEST, Bounds

__all__ = ["fixed_axis", "narrowed"]

FIXED_AXIS = re.compile(
    r"marked L\['(\w+)'\]\S*\.size\(\)\[(\d+)\] as dynamic but .* specialized it to be a constant \((\d+)\)"
)
"""The words of torch.export for a free axis that is not free: input, axis, size."""

SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
"""A size in the conditions under which torch.export's program holds; here it is called `input__axis`."""

LARGEST_TRIED = 256
"""Largest size for which these conditions are evaluated, unless twice the size of the data is larger."""


def fixed_axis(error: Exception) -> str | None:
    """Return the error text for a free axis whose size the model makes a constant; None for other errors."""
    found = FIXED_AXIS.search(str(error))
    if found is None:
        return None
    name, axis, size = found.groups()
    return (
        f"axis {axis} of input {name!r} cannot be free, because the model makes its size a constant ({size}), for "
        f"example by int(), range() or a parameter of that size; leave it out of {argument('dynamic')}, or compute "
        "with x.shape"
    )


def narrowed(
    bounds: Mapping[str, Bounds], program: torch.export.ExportedProgram, names: Mapping[str, Mapping[int, str]]
) -> dict[str, Bounds]:
    """Return the bounds of free sizes, narrowed to those for which a program holds while the others stay.

    program: made in this process, whose conditions are safe to evaluate; names: as `free_axes` returns them.
    raises: ModelError for a size that cannot be another one, naming the axis and the condition that binds it.
    """
    conditions, found = _Conditions.of(program), dict(bounds)
    for name, labels in names.items():
        for axis, label in labels.items():
            size, given = conditions.axes[f"{name}__{axis}"], bounds[label]
            if not size.node.expr.is_symbol:
                continue
            own, last = size.node.hint, max(LARGEST_TRIED, 2 * size.node.hint)
            tried = range(max(SMALLEST, given.low), min(last, given.high or last) + 1)
            taken = [other for other in tried if not conditions.broken(size, other)]
            if not {*taken} - {own} and len(tried) > 1:
                raise ModelError(
                    f"axis {axis} of input {name!r} cannot be free while the others stay, because the model needs "
                    f"{conditions.broken(size, 2 * own)}; leave it out of {argument('dynamic')}"
                )
            step = math.gcd(*taken) if len(taken) > 1 else 1
            low = taken[0] if taken and taken[0] > tried[0] else given.low
            found[label] = replace(given, low=low, multiple=step if step > 1 else None)
    return found


@dataclass(frozen=True)
class _Conditions:
    """The sizes of a program's inputs, by `input__axis`, and the conditions on them under which it holds."""

    axes: Mapping[str, Any]
    conditions: Mapping[str, CodeType]

    @classmethod
    def of(cls, program: torch.export.ExportedProgram) -> _Conditions:
        axes = {f"{x.name}__{axis}": n for x in user_inputs(program) for axis, n in enumerate(x.meta["val"].shape)}
        texts = [SIZE.sub(r"\1__\2", text) for text in program._guards_code]
        known = (text for text in texts if "L[" not in text)
        return cls(axes, {text: compile(text, "condition", "eval") for text in known})

    def broken(self, free: torch.SymInt, size: int) -> str:
        """Return the first condition that does not hold if a free size has this value, '' if all hold."""
        sizes = {name: n if isinstance(n, int) else self._value(n, free, size) for name, n in self.axes.items()}
        for text, condition in self.conditions.items():
            try:
                holds = eval(condition, {}, sizes)  # of torch's own words about sizes, in this process
            except (NameError, ZeroDivisionError):  # a function of torch's, or a size for which it means nothing
                holds = True
            if not holds:
                return re.sub(r"(\w+)__(\d+)", r"\1.shape[\2]", text)
        return ""

    @staticmethod
    def _value(n: torch.SymInt, free: torch.SymInt, size: int) -> int:
        expression = n.node.expr
        if expression == free.node.expr:
            return size
        return int(expression.subs(free.node.expr, size)) if free.node.expr in expression.free_symbols else n.node.hint
