"""Sources of batches: arrays, .npz files, folders of images; each function makes one pass.

Items have the forms that data.py reads: x, {name: x}, (x, labels) or ({name: x}, labels). Nothing here checks values.

Must not know: torch, models, what the batches are for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from calibrators.errors import DataError, argument, first_line
from exporter.inputs.arrays import open_arrays
from exporter.inputs.form import DataForm

__all__ = ["CHANNELS", "class_folders", "from_arrays", "from_images", "from_npz"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Decoders that read images, whatever the name of a file; others of Pillow start programs (EPS)."""

CHANNELS = 3
"""Channels with which images are read: red, green, blue."""

LARGEST_IMAGE = 1 << 26
"""Pixels of the largest image."""

BATCH_BYTES = 3 << 28
"""Bytes that a batch of images in their own size may take, besides four times those of the files."""

DECODERS = 4
"""Threads that decode images: Pillow's decoders and scalers run beside each other and beside torch."""

Item = TypeVar("Item")
Made = TypeVar("Made")
Raw = Iterator[object]


def from_arrays(value: object, label: str, batch: int) -> Raw:
    """Yield batches of x, {name: x}, (x, labels) or ({name: x}, labels), as views; x needs a length and slices."""
    inputs, labels = value if isinstance(value, tuple) else (value, None)
    arrays = dict(inputs) if isinstance(inputs, Mapping) else {"x": inputs}
    lengths = {name: len(array) for name, array in [*arrays.items(), ("labels", labels)] if array is not None}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
        raise DataError(
            f"{label}: arrays have different numbers of samples: {counts}; give each array one entry per sample."
        )
    for start in range(0, max(lengths.values(), default=0), batch):
        cut = {name: array[start : start + batch] for name, array in arrays.items()}
        part = cut if isinstance(inputs, Mapping) else cut["x"]
        yield part if labels is None else (part, labels[start : start + batch])


def from_npz(path: Path, batch: int) -> Raw:
    """Yield batches that are read row by row from the archive: memory does not grow with the file."""
    with open_arrays(path) as arrays:
        if not arrays:
            raise DataError(f"{path} holds no array; save one per model input, and labels as 'labels'.")
        for name, rows in arrays.items():
            if not rows.shape:
                raise DataError(
                    f"{path}: array {name!r} is a single number; save an array whose first dimension counts samples."
                )
        yield from from_arrays(arrays, str(path), batch)


def from_images(root: Path, form: DataForm) -> Raw:
    """Yield batches of the images under `root` in sorted order; sub-folders are classes, numbered in sorted order.

    Threads decode the images of a batch, and from the second batch on the next one while the last one is used.
    """
    files, labels = _image_files(root)
    starts = range(0, len(files), form.batch_size)
    batches = [files[start : start + form.batch_size] for start in starts]
    with ThreadPoolExecutor(DECODERS) as decoders, closing(_ahead(partial(_stacked, form, decoders), batches)) as made:
        for start, stacked in zip(starts, made, strict=True):
            yield stacked if labels is None else (stacked, np.array(labels[start : start + len(stacked)]))


def _ahead(function: Callable[[Item], Made], items: Iterable[Item]) -> Generator[Made]:
    """Yield what a function makes of each item, in order; a thread makes one ahead once a second one is asked for."""
    made: deque[Future[Made]] = deque()
    with ThreadPoolExecutor(1) as thread:
        for index, item in enumerate(items):
            made.append(_submit(thread, function, item))
            if index != 1:
                yield made.popleft().result()
        if made:
            yield made.popleft().result()


def _submit(executor: Executor, function: Callable[[Item], Made], item: Item) -> Future[Made]:
    """Submit a call that has the caller's context, in which messages find how to write arguments."""
    return executor.submit(copy_context().run, function, item)


def _stacked(form: DataForm, decoders: Executor, batch: Sequence[Path]) -> np.ndarray[Any, Any]:
    """Return the images of a batch, [n, 3, height, width]."""
    first = _image(batch[0], form)
    if form.image_size is None:
        _check_batch(batch, first)
    stacked = np.empty((len(batch), *first.shape), np.float32)
    stacked[0] = first

    def put(index: int) -> None:
        stacked[index] = _image(batch[index], form, like=(batch[0], stacked))

    for each in [_submit(decoders, put, index) for index in range(1, len(batch))]:
        each.result()
    return stacked


def _check_batch(batch: Sequence[Path], first: np.ndarray[Any, Any]) -> None:
    """Refuse images that as a batch take far more memory than their files have."""
    needed = len(batch) * first.nbytes
    if needed > BATCH_BYTES + 4 * sum(file.stat().st_size for file in batch):
        raise DataError(
            f"a batch of {len(batch)} images like {batch[0]}, {_extent(first)} pixels, takes {needed / 2**30:.1f} GiB; "
            f"give {argument('image_size')}, or a smaller {argument('batch_size')}."
        )


def class_folders(root: Path) -> list[str]:
    """Return the names of the sub-folders of a folder, each a class, in the order of their numbers."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(root: Path) -> tuple[list[Path], list[int] | None]:
    direct = _found(root.iterdir())
    try:
        classes = [(root / name, _found((root / name).rglob("*"))) for name in class_folders(root)]
    except RecursionError as error:
        raise DataError(
            f"{root} holds a thousand folders in folders; give images in folders, one per class."
        ) from error
    inside = sum(len(files) for _, files in classes)
    if direct and inside:
        raise DataError(
            f"{root} holds both images and folders of images; use either one folder, or one sub-folder per class."
        )
    if not direct and not inside:
        raise DataError(f"{root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}); give a folder that does.")
    if direct:
        return direct, None
    empty = [folder.name for folder, files in classes if not files]
    if empty:
        raise DataError(f"{root / empty[0]} holds no images and would shift the class numbers; fill it or remove it.")
    return [f for _, files in classes for f in files], [i for i, (_, files) in enumerate(classes) for _ in files]


def _found(entries: Iterable[Path]) -> list[Path]:
    return sorted(
        e for e in entries if e.suffix.lower() in IMAGE_SUFFIXES and not e.name.startswith(".") and e.is_file()
    )


def _image(path: Path, form: DataForm, like: tuple[Path, np.ndarray[Any, Any]] | None = None) -> np.ndarray[Any, Any]:
    """Return one image as float32 [3, height, width]; like: the first of the batch, whose size it must have.

    The image is converted to RGB; if a size is given, it is scaled (bilinear, antialiased) to just cover it, and the
    centre is cropped, as torchvision's Resize(n) and CenterCrop(n) do. Values are in 0..1, then (x - mean) / std.
    """
    try:
        with Image.open(path, formats=FORMATS) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has more than 8 bits per channel ({opened.mode}); give such data as a .npz file."
                )
            _check_pixels(path, opened.size, form)
            if like is not None and form.image_size is None:
                _check_like(path, opened.size, *like)
            image = opened.convert("RGB")
    except DataError:
        raise
    except Exception as error:  # Pillow's decoders raise many types
        raise DataError(f"{path} is not a readable image ({first_line(error)}); replace or remove it.") from error
    if form.image_size is not None:
        image = _cover(image, form.image_size)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)  # [3, height, width]
    if form.mean is not None:
        pixels = pixels - np.array(form.mean, np.float32).reshape(-1, 1, 1)
    if form.std is not None:
        pixels = pixels / np.array(form.std, np.float32).reshape(-1, 1, 1)
    return pixels


def _check_pixels(path: Path, size: tuple[int, int], form: DataForm) -> None:
    """Refuse an image that is too large, as it is stored or as it is scaled."""
    for width, height in (size, _covering(size, form.image_size) if form.image_size else size):
        if width * height > LARGEST_IMAGE:
            scaled = "" if (width, height) == size else f" once it covers {argument('image_size')} ({width}x{height})"
            raise DataError(
                f"{path} is {size[0]}x{size[1]} pixels, more than {LARGEST_IMAGE:,}{scaled}; scale or cut it first."
            )


def _check_like(path: Path, size: tuple[int, int], first: Path, batch: np.ndarray[Any, Any]) -> None:
    """Refuse an image of another size than the first of its batch, before it is decoded."""
    if size != (extent := batch.shape[:1:-1]):
        raise DataError(
            f"{path} is {size[0]}x{size[1]}, {first} is {extent[0]}x{extent[1]} pixels; "
            f"give {argument('image_size')} to bring all images to one size."
        )


def _covering(extent: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the extent to which an image is scaled, so that it just covers `size` (height, width)."""
    height, width = size
    factor = max(height / extent[1], width / extent[0])
    return max(width, int(extent[0] * factor)), max(height, int(extent[1] * factor))


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    (height, width), covering = size, _covering(image.size, size)
    image = image.resize(covering, Image.Resampling.BILINEAR) if covering != image.size else image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _extent(pixels: np.ndarray[Any, Any]) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"
