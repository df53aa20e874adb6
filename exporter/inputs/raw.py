"""Inputs that a file takes as bytes: how settings name them, and data as bytes or as the values that bytes stand for.

A byte p of an image stands for (p / 255 - mean) / std, each step rounded to float32, as torchvision's ToTensor and
Normalize compute it.

Must not know: graphs, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calibrators.errors import DataError, InputError, UnknownNameError, argument
from exporter.inputs.data import Batch, Data
from exporter.inputs.form import LEVELS, DataForm

__all__ = ["RawInput", "RawInputs", "parse_coded", "parse_layouts"]

Layout = Literal["nchw", "nhwc"]

UINT8 = "uint8"
CODES = "codes"
TOLERANCE = 0.1
"""Distance from a whole number up to which a value stands for a byte: data of half precision lie up to 0.07 away."""


def parse_layouts(texts: Iterable[str], names: Sequence[str]) -> dict[str, Layout]:
    """Return by input the layout of its bytes that texts such as `uint8`, `uint8:nhwc` and `x:uint8` name.

    names:  of the model's inputs; a text without a name means the only one.
    raises: InputError for a text of another form; UnknownNameError for an input that the model does not have.
    """
    found: dict[str, Layout] = {}
    for text in texts:
        parts = [part.strip() for part in text.split(":")]
        layout: Layout = "nhwc" if parts[-1].lower() == "nhwc" else "nchw"
        if parts[-1].lower() == layout:
            parts.pop()
        if len(parts) not in (1, 2) or parts.pop().lower() != UINT8:
            raise InputError(
                f"input {text!r} is not [NAME:]uint8[:LAYOUT]; write for example uint8 or image:uint8:nhwc."
            )
        if not parts and len(names) > 1:
            raise InputError(
                f"input {text!r} does not say which of the inputs {', '.join(names)} it means; write for example "
                f"{names[0]}:{text}."
            )
        name = parts[0] if parts else names[0]
        if name not in names:
            raise UnknownNameError("model input", name, names)
        if found.setdefault(name, layout) != layout:
            raise InputError(
                f"input {name!r} has two layouts, {found[name]} and {layout}; give the one in which its bytes come."
            )
    return found


def parse_coded(texts: Iterable[str], names: Sequence[str]) -> frozenset[str]:
    """Return the outputs that texts such as `codes` (all of them) and `boxes:codes` name.

    names:  of the model's outputs.
    raises: InputError for a text of another form; UnknownNameError for an output that the model does not have.
    """
    found: set[str] = set()
    for text in texts:
        *name, kind = (part.strip() for part in text.split(":"))
        if kind.lower() != CODES or len(name) > 1:
            raise InputError(f"output {text!r} is not [NAME:]codes; write for example codes or {names[0]}:codes.")
        if name and name[0] not in names:
            raise UnknownNameError("model output", name[0], names)
        found |= {*(name or names)}
    return frozenset(found)


@dataclass(frozen=True)
class RawInput:
    """One input that the file takes as bytes.

    layout:    "nchw", the order of axes that the model has, or "nhwc", channels last.
    mean, std: one number, or one per channel (axis 1 of the model's input), of values in 0..1.
    """

    layout: Layout
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def order(self, rank: int) -> tuple[int, ...]:
        """Return for each axis of the model's input the axis of the file's input that it is."""
        return tuple(range(rank)) if self.layout == "nchw" else (0, rank - 1, *range(1, rank - 1))

    def axis(self, of_model: int, rank: int) -> int:
        """Return the axis of the file's input that is an axis of the model's."""
        return self.order(rank)[of_model]

    def steps(self, rank: int) -> Iterator[tuple[Literal["div", "sub"], Tensor]]:
        """Yield the float32 operators that make values of bytes, each with its constant, without those of no effect."""
        mean, std = (torch.tensor(each).reshape(-1, *[1] * (rank - 2)) for each in (self.mean, self.std))
        yield "div", torch.tensor(LEVELS)
        if bool((mean != 0).any()):
            yield "sub", mean
        if bool((std != 1).any()):
            yield "div", std

    def values(self, pixels: Tensor) -> Tensor:
        """Return the model's input, float32, for bytes in the layout of the file."""
        x = pixels.permute(self.order(pixels.ndim)).to(torch.float32)
        for operator, operand in self.steps(x.ndim):
            x = x / operand if operator == "div" else x - operand
        return x.contiguous()

    def pixels(self, values: Tensor) -> Tensor:
        """Return the bytes, in the layout of the file, that are nearest to the model's input."""
        order = self.order(values.ndim)
        found = self._levels(values).round().clamp(0, LEVELS).to(torch.uint8)
        return found.permute([order.index(axis) for axis in range(values.ndim)]).contiguous()

    def _levels(self, values: Tensor) -> Tensor:
        """Return the model's input before normalization, float32, 0..255 where it stands for bytes."""
        x = values.float()
        for operator, operand in reversed([*self.steps(x.ndim)]):
            x = x * operand if operator == "div" else x + operand
        return x

    def check(self, x: Tensor, where: str) -> None:
        """Check data of the input: bytes in the layout of the file, or the model's input, which stands for bytes.

        raises: DataError; InputError for a mean or deviation of another number of channels.
        """
        if x.ndim < 3:
            raise DataError(f"{where} has shape {list(x.shape)}; only images, [n, channels, ...], can be fed as bytes.")
        is_raw = x.dtype == torch.uint8
        if not is_raw and not x.is_floating_point():
            raise DataError(f"{where} is {str(x.dtype)[6:]}; give uint8, or floats normalized as in training.")
        channels = x.shape[self.axis(1, x.ndim) if is_raw else 1]
        for setting, numbers in (("mean", self.mean), ("std", self.std)):
            if len(numbers) not in (1, channels):
                raise InputError(
                    f"{setting} has {len(numbers)} numbers, but {where} has {channels} channels; give one for each, or "
                    "one for all."
                )
        levels = torch.zeros(1) if is_raw else self._levels(x)
        distance = (levels - levels.round().clamp(0, LEVELS)).abs().flatten()
        if float(distance.max()) > TOLERANCE:
            worst = int(distance.argmax())
            value, level = (float(each.flatten()[worst]) for each in (x, levels))
            raise DataError(
                f"{where} cannot be fed as bytes: {value:.6g} would be {level:.2f} of 255 before a normalization with "
                f"mean {_text(self.mean)} and std {_text(self.std)}. Give {argument('mean')} and {argument('std')} "
                "as in training, or the "
                "images as uint8."
            )


def _text(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


@dataclass(frozen=True)
class RawInputs:
    """The inputs of a model that a file takes as bytes, by name.

    names: of all inputs of the model.
    """

    names: tuple[str, ...]
    by_name: Mapping[str, RawInput]

    @classmethod
    def of(cls, texts: Iterable[str], names: Sequence[str], form: DataForm) -> RawInputs:
        """Return the inputs that texts such as `uint8:nhwc` name, normalized as the form says."""
        mean, std = form.mean or (0.0,), form.std or (1.0,)
        layouts = parse_layouts(texts, names)
        return cls(tuple(names), {name: RawInput(layout, mean, std) for name, layout in layouts.items()})

    def renamed(self, names: Sequence[str]) -> RawInputs:
        """Return the same inputs under other names: captured graphs name those of `*args` themselves."""
        new = dict(zip(self.names, names, strict=True))
        return RawInputs(tuple(names), {new[name]: raw for name, raw in self.by_name.items()})

    def __bool__(self) -> bool:
        return bool(self.by_name)

    def as_values(self, data: Data) -> Data:
        """Return data as the model takes them: bytes are normalized; floats have to stand for bytes."""
        return data.mapped(self._values) if self else data

    def as_pixels(self, data: Data) -> Data:
        """Return data as the file takes them, from what `as_values` returns."""
        return data.mapped(lambda batch, where: replace(batch, inputs=self.pixels(batch.inputs))) if self else data

    def pixels(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return one sample of each input as the file takes it."""
        raws = map(self.by_name.get, self.names)
        return tuple(x if raw is None else raw.pixels(x) for raw, x in zip(raws, inputs, strict=True))

    def _values(self, batch: Batch, where: str) -> Batch:
        found = []
        for name, x in zip(self.names, batch.inputs, strict=True):
            if (raw := self.by_name.get(name)) is not None:
                raw.check(x, f"{where}: input {name!r}")
                x = raw.values(x) if x.dtype == torch.uint8 else x
            found.append(x)
        return replace(batch, inputs=tuple(found))
