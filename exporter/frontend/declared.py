"""The size of images that a model says it was made for: timm, transformers and many others keep it as an attribute.

Must not know: data, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from calibrators.errors import argument

__all__ = ["other_size"]

NAMES = ("input_size", "test_input_size", "image_size", "img_size")
"""Attributes that hold a size as a number, as (height, width) or as (channels, height, width)."""

OWNERS = ("pretrained_cfg", "default_cfg", "config", "patch_embed")
"""Attributes of a model that may hold such attributes."""


def other_size(model: Any, inputs: Sequence[Tensor]) -> str | None:
    """Return a clause about the size that the model names if its first image has none of these sizes, else None."""
    image = next((x for x in inputs if x.ndim == 4), None)
    sizes = list(dict.fromkeys(_sizes(model)))
    if image is None or not sizes or tuple(image.shape[2:]) in sizes:
        return None
    height, width = sizes[0]
    option = f"{height}" if height == width else f"{height}x{width}"
    return (
        f"the model says that it takes images of {height} x {width}, but the data has {image.shape[2]} x "
        f"{image.shape[3]} ({argument('image_size', option)} resizes the images of a folder)"
    )


def _sizes(model: Any) -> Iterator[tuple[int, int]]:
    for owner in (*(getattr(model, name, None) for name in OWNERS), model):
        for name in NAMES:
            value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
            size = [value, value] if isinstance(value, int) else value
            if isinstance(size, Sequence) and len(size) in (2, 3) and all(isinstance(n, int) and n > 0 for n in size):
                yield size[-2], size[-1]
