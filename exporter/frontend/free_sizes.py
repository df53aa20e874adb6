"""Free axes of an exported program: which they are, and inputs of other sizes for comparisons.

Must not know: how programs are captured, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.frontend.axes import LARGEST, FreeAxis, tiled
from exporter.frontend.calling import user_inputs

__all__ = ["Bounds", "bounds_of", "free_axes", "has_free_batch", "inputs_of_other_sizes"]

SIZES = (
    lambda size: size * 3 // 2 + 1,
    lambda size: size // 2,
    lambda size: size * 2,
    lambda size: size * 3 // 4,
    lambda size: size + 1,
    lambda size: size - 1,
)
"""Sizes to try beside the example's: odd ones show how a model rounds; many models take only some multiples."""

SMALLEST = 2
"""A size of 1 broadcasts, which torch.export treats as another program."""


@dataclass(frozen=True)
class Bounds:
    """Sizes that a free axis may have: `low` to `high` (None: no limit), multiples of `multiple`."""

    low: int
    high: int | None = None
    multiple: int | None = None


def has_free_batch(program: torch.export.ExportedProgram) -> bool:
    """Return whether the first dimension of every input is free."""
    shapes = _shapes(program)
    return bool(shapes) and all(len(shape) and isinstance(shape[0], torch.SymInt) for shape in shapes)


def free_axes(
    program: torch.export.ExportedProgram, named: Sequence[Mapping[int, FreeAxis]] = ()
) -> dict[str, dict[int, str]]:
    """Return the free axes besides the batch by input and number, with a name for the size; equal sizes have one name.

    named: names that the user gave, per input.
    """
    names: dict[str, str] = {}
    found: dict[str, dict[int, str]] = {}
    for index, (node, shape) in enumerate(zip(user_inputs(program), _shapes(program), strict=True)):
        for axis, size in enumerate(shape):
            if axis and isinstance(size, torch.SymInt):
                given = named[index].get(axis) if named else None
                name = given.name if given else f"{node.name}_{axis}"
                taken = name in names.values() and str(size) not in names
                found.setdefault(node.name, {})[axis] = names.setdefault(str(size), f"{name}_" if taken else name)
    return found


def bounds_of(program: torch.export.ExportedProgram, names: Mapping[str, Mapping[int, str]]) -> dict[str, Bounds]:
    """Return the bounds of free sizes by name, as torch.export found them; names: as `free_axes` returns them."""
    found = {}
    for node, shape in zip(user_inputs(program), _shapes(program), strict=True):
        for axis, name in names.get(node.name, {}).items():
            size = shape[axis].node.expr
            limits = {symbol: program.range_constraints[symbol] for symbol in size.free_symbols}
            low, high = (size.subs({s: getattr(r, end) for s, r in limits.items()}) for end in ("lower", "upper"))
            multiple = int(size.as_coeff_Mul()[0])
            is_open = not high.is_finite or high >= LARGEST
            found[name] = Bounds(int(low), None if is_open else int(high), multiple if multiple > 1 else None)
    return found


def inputs_of_other_sizes(
    program: torch.export.ExportedProgram, inputs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, ...]]:
    """Yield the inputs with other sizes of all free axes but the batch, first each axis its own way, then all alike."""
    shapes = _shapes(program)
    sizes: dict[Any, int] = {}
    for x, shape in zip(inputs, shapes, strict=True):
        for axis, size in enumerate(shape):
            for symbol in size.node.expr.free_symbols if axis and isinstance(size, torch.SymInt) else ():
                expression = size.node.expr  # linear: the symbol, or what torch.export takes as a derived size
                sizes.setdefault(symbol, int((x.shape[axis] - expression.subs(symbol, 0)) / expression.coeff(symbol)))
    seen = [sizes]
    for shift in (1, 0) if len(sizes) > 1 else (0,) if sizes else ():
        for start in range(len(SIZES)):
            values = {
                symbol: _within(program, symbol, SIZES[(start + shift * index) % len(SIZES)](size))
                for index, (symbol, size) in enumerate(sizes.items())
            }
            if values not in seen:
                seen.append(values)
                yield tuple(tiled(x, _values(shape, x, values)) for x, shape in zip(inputs, shapes, strict=True))


def _shapes(program: torch.export.ExportedProgram) -> list[tuple[Any, ...]]:
    return [tuple(node.meta["val"].shape) for node in user_inputs(program)]


def _within(program: torch.export.ExportedProgram, symbol: Any, size: int) -> int:
    """Return a size within the bounds of a free axis."""
    bounds = program.range_constraints.get(symbol)
    size = max(size, SMALLEST)
    return size if bounds is None else int(min(max(size, bounds.lower), bounds.upper))


def _values(shape: tuple[Any, ...], x: Tensor, values: Mapping[Any, int]) -> list[int]:
    """Return the sizes of an input after its first axis for values of the symbols."""
    return [
        int(size.node.expr.subs(values)) if isinstance(size, torch.SymInt) else x.shape[axis]
        for axis, size in enumerate(shape)
        if axis
    ]
