"""Axes besides the batch whose size is left free: how settings name them, and inputs of other sizes.

A text is `x:2,3`, the axes of one input; an axis may have a name and bounds: `x:2=height[32..512],3=width`.

Must not know: models, torch, ONNX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calibrators.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LARGEST", "Axes", "FreeAxis", "axes_by_input", "parse_axes", "resized", "tiled", "with_axes"]

AXIS = re.compile(r"(\d{1,9})(?:=([A-Za-z_]\w*))?(?:\[(\d{0,9})\.\.(\d{0,9})\])?", re.ASCII)
LARGEST = 2**31
"""Bounds from here on are none: torch.export.Dim has a number there where no bound was given."""


@dataclass(frozen=True)
class FreeAxis:
    """One axis of one input whose size is free.

    name:      what the file calls its size.
    low, high: smallest and largest size, None where it is open.
    """

    name: str
    low: int | None = None
    high: int | None = None


Axes = Mapping[str, Mapping[int, FreeAxis]]
"""Free axes besides the batch, by input name and number of the axis."""


def parse_axes(texts: Iterable[str]) -> dict[str, dict[int, FreeAxis]]:
    """Return the free axes that texts such as `x:2,3` name.

    raises: InputError for a text of another form, or for the batch.
    """
    found: dict[str, dict[int, FreeAxis]] = {}
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition(":"))
        matches = [AXIS.fullmatch(part.strip()) for part in rest.split(",")]
        if not name or None in matches:
            raise InputError(
                f"dynamic {text!r} does not name free axes of an input; write for example x:2,3 for height and width, "
                "or x:2=height[32..512]."
            )
        for axis, label, low, high in (match.groups() for match in matches if match):
            if int(axis) == 0:
                raise InputError(
                    f"dynamic {text!r} names axis 0, the batch, which is free wherever the model allows it; name other "
                    "axes."
                )
            axes = found.setdefault(name, {})
            axes[int(axis)] = FreeAxis(label or f"{name}_{axis}", _number(low), _number(high))
    return found


def _number(text: str | None) -> int | None:
    return int(text) if text else None


def with_axes(given: object) -> object:
    """Return dynamic axes as texts: those of a mapping {input: [axes]} or {input: {axis: torch.export.Dim or name}}.

    Anything else is returned as it is.
    """
    if isinstance(given, str):
        return (given,)
    if not isinstance(given, Mapping):
        return given
    return tuple(f"{name}:{','.join(map(_text, _items(axes)))}" for name, axes in given.items())


def _items(axes: Any) -> list[tuple[Any, Any]]:
    if isinstance(axes, Mapping):
        return [(axis, dim) for axis, dim in axes.items() if axis != 0]
    return [(axis, None) for axis in (axes if isinstance(axes, (list, tuple, set, range)) else [axes])]


def _text(item: tuple[Any, Any]) -> str:
    axis, dim = item
    name = dim if isinstance(dim, str) else getattr(dim, "__name__", None)
    label = f"={name}" if isinstance(name, str) and name.isidentifier() else ""
    low, high = (getattr(dim, bound, None) for bound in ("min", "max"))
    bounds = [str(int(each)) if each and each < LARGEST else "" for each in (low, high)]
    return f"{axis}{label}{f'[{bounds[0]}..{bounds[1]}]' if any(bounds) else ''}"


def axes_by_input(axes: Axes, names: Sequence[str], inputs: Sequence[Tensor]) -> tuple[Mapping[int, FreeAxis], ...]:
    """Return the free axes of each input of a model, which must have them.

    names: of the inputs.
    raises: InputError; UnknownNameError for an input that the model does not have.
    """
    for name, free in axes.items():
        if name not in names:
            raise UnknownNameError("model input", name, names)
        shape = tuple(inputs[names.index(name)].shape)
        for axis, each in free.items():
            if axis >= len(shape):
                raise InputError(
                    f"dynamic {name}:{axis} names an axis that the input does not have: its shape is {list(shape)}; "
                    f"axes are counted from 0, the batch, to {len(shape) - 1}."
                )
            if not (each.low or 0) <= shape[axis] <= (each.high or LARGEST):
                raise InputError(
                    f"dynamic {name}:{axis} allows sizes {each.low or 0} to {each.high or 'any'}, but the data has "
                    f"{shape[axis]}; give data within the bounds."
                )
    return tuple(axes.get(name, {}) for name in names)


def resized(batch: Sequence[Tensor], others: Iterable[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Return a batch in the sizes of others, each size once, without its own."""
    sizes = dict.fromkeys(tuple(tuple(x.shape[1:]) for x in other) for other in others)
    sizes.pop(tuple(tuple(x.shape[1:]) for x in batch), None)
    return [tuple(tiled(x, size) for x, size in zip(batch, each, strict=True)) for each in sizes]


def tiled(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a tensor with other sizes of the axes after the first: cut, or repeated from its start."""
    for axis, size in enumerate(sizes, 1):
        if size != x.shape[axis]:
            repeats = [1] * x.ndim
            repeats[axis] = -(-size // x.shape[axis])
            x = x.repeat(repeats).narrow(axis, 0, size)
    return x
