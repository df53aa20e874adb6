"""Sources of batches: arrays, .npz files, folders of images; each function makes one pass.

Items have the forms that data.py reads: x, {name: x}, (x, labels) or ({name: x}, labels). Nothing here checks values.

Must not know: torch, models, what the batches are for.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from calibrators.errors import DataError
from exporter.inputs.form import DataForm

__all__ = ["class_folders", "from_arrays", "from_images", "from_npz"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CHUNK_BYTES = 1 << 20
"""Bytes read from an archive at once."""

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
    try:
        with zipfile.ZipFile(path) as archive, ExitStack() as stack:
            arrays: dict[str, _Rows] = {}
            for member in archive.namelist():
                name = member.removesuffix(".npy")
                size = archive.getinfo(member).file_size
                arrays[name] = _Rows(stack.enter_context(archive.open(member)), f"{path}: array {name!r}", size)
            if not arrays:
                raise DataError(f"{path} holds no array; save one per model input, and labels as 'labels'.")
            yield from from_arrays(arrays, str(path), batch)
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError, MemoryError) as error:
        raise DataError(f"{path} is not a readable .npz file ({error}); save it again with numpy.savez.") from error


class _Rows:
    """One .npy member, whose slices are read forward along its first dimension. Objects are never unpickled."""

    def __init__(self, stream: Any, where: str, size: int) -> None:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self._shape, fortran, self._dtype = read_header(stream)
        if self._dtype.hasobject:
            raise DataError(
                f"{where} holds Python objects, refused as loading them could run code; save plain numbers."
            )
        if not self._shape:
            raise DataError(f"{where} is a single number; save an array whose first dimension counts samples.")
        if (promised := math.prod(self._shape) * self._dtype.itemsize) > size:
            raise DataError(f"{where} has {size:,} bytes, but its header promises {promised:,}; save the file again.")
        self._stream = stream
        # A column-major array cannot be read by rows, so all of it is read here.
        self._whole = self._read(self._shape[::-1]).transpose() if fortran and len(self._shape) > 1 else None

    def __len__(self) -> int:
        return int(self._shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray[Any, Any]:
        """Return the next rows; a slice has to begin where the one before it ended."""
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[rows])
        return self._read((len(range(len(self))[rows]), *self._shape[1:]))

    def _read(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        array = np.empty(shape, self._dtype)
        buffer = array.reshape(-1).view(np.uint8)
        filled = 0
        while filled < len(buffer):
            chunk = self._stream.read(min(len(buffer) - filled, CHUNK_BYTES))
            if not chunk:
                raise EOFError("an array is shorter than its header says")
            buffer[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
        return array


def from_images(root: Path, form: DataForm) -> Raw:
    """Yield batches of the images under `root` in sorted order; sub-folders are classes, numbered in sorted order."""
    files, labels = _image_files(root)
    for start in range(0, len(files), form.batch_size):
        end = start + form.batch_size
        pixels = [_image(file, form) for file in files[start:end]]
        shapes = {image.shape for image in pixels}
        if len(shapes) > 1:
            odd = next(i for i, image in enumerate(pixels) if image.shape != pixels[0].shape)
            raise DataError(
                f"{files[start + odd]} is {_extent(pixels[odd])}, {files[start]} is {_extent(pixels[0])} pixels; "
                "give --image-size to bring all images to one size."
            )
        stacked = np.stack(pixels)  # [n, 3, height, width]
        yield stacked if labels is None else (stacked, np.array(labels[start:end]))


def class_folders(root: Path) -> list[str]:
    """Return the names of the sub-folders of a folder, each a class, in the order of their numbers."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(root: Path) -> tuple[list[Path], list[int] | None]:
    direct = _found(root.iterdir())
    classes = [(root / name, _found((root / name).rglob("*"))) for name in class_folders(root)]
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


def _image(path: Path, form: DataForm) -> np.ndarray[Any, Any]:
    """Return one image as float32 [3, height, width].

    The image is converted to RGB; if a size is given, it is scaled (bilinear, antialiased) to just cover it, and the
    centre is cropped, as torchvision's Resize(n) and CenterCrop(n) do. Values are in 0..1, then (x - mean) / std.
    """
    try:
        with Image.open(path) as opened:
            if opened.mode.startswith(("I", "F")):
                raise DataError(
                    f"{path} has more than 8 bits per channel ({opened.mode}); give such data as a .npz file."
                )
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image ({error}); replace or remove it.") from error
    if form.image_size is not None:
        image = _cover(image, form.image_size)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)  # [3, height, width]
    if form.mean is not None:
        pixels = pixels - np.array(form.mean, np.float32).reshape(-1, 1, 1)
    if form.std is not None:
        pixels = pixels / np.array(form.std, np.float32).reshape(-1, 1, 1)
    return pixels


def _cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    height, width = size
    factor = max(height / image.height, width / image.width)
    covering = (max(width, int(image.width * factor)), max(height, int(image.height * factor)))
    image = image.resize(covering, Image.Resampling.BILINEAR) if covering != image.size else image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _extent(pixels: np.ndarray[Any, Any]) -> str:
    return f"{pixels.shape[2]}x{pixels.shape[1]}"
