"""Settings of the data: batch size and images, for sources that do not decide them.

Must not know: torch, models, where data comes from.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from calibrators.settings import Settings, expected, setting

__all__ = ["LEVELS", "DataForm", "Names", "Positive"]

LEVELS = 255.0
"""The highest byte, by which pixels are divided."""

DATA = "Data"
"""Panel of `intact export --help`."""


def _split(value: object, separator: str = ",") -> object:
    """Split text; one number is a list of one."""
    if isinstance(value, str):
        return [part.strip() for part in value.lower().split(separator) if part.strip()]
    return [value] if isinstance(value, (int, float)) else value


def _pair(value: object) -> object:
    """Return height and width of `224`, `224x160`, 224 or a pair."""
    sizes = _split(value, "x")
    return sizes * 2 if isinstance(sizes, list) and len(sizes) == 1 else sizes


def _some(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values:
        raise ValueError
    return values


Positive = Annotated[int, Field(ge=1, lt=2**31)]
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Means = Annotated[
    tuple[float, ...],
    BeforeValidator(_split),
    AfterValidator(_some),
    expected("a number, or one per channel separated by commas, all finite"),
]
Deviations = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    BeforeValidator(_split),
    AfterValidator(_some),
    expected("a positive number, or one per channel separated by commas, all finite"),
]
ImageSize = Annotated[
    tuple[Positive, Positive], BeforeValidator(_pair), expected("a size: 224, or 224x160 for height x width")
]


class DataForm(Settings):
    """The batch size of data without batches, and the steps from the images of a folder to inputs.

    image_size: (height, width) to which images are scaled and cropped; None leaves them as they are.
    mean, std:  one number per channel, of values in 0..1.
    """

    batch_size: Positive = setting(64, "Samples per batch for .npz files and folders.", panel=DATA)
    image_size: ImageSize | None = setting(
        None,
        "Resize and centre-crop the images of a folder: `224`, or `224x160` (height x width).",
        panel=DATA,
        metavar="SIZE",
    )
    mean: Means | None = setting(
        None,
        "Mean per channel of images in 0..1: `0.485,0.456,0.406`; for folders, and for --input uint8.",
        panel=DATA,
        metavar="M,M,M",
    )
    std: Deviations | None = setting(
        None, "Standard deviation per channel of images in 0..1.", panel=DATA, metavar="S,S,S"
    )

    @property
    def is_for_images(self) -> bool:
        """Whether any setting of images is given."""
        return any(value is not None for value in (self.image_size, self.mean, self.std))
