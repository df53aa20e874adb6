"""Read .npy and .npz files row by row; limits are checked before memory is taken, and objects are never unpickled.

Must not know: what the arrays are for.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from calibrators.errors import DataError, argument, first_line, no_file

__all__ = ["Rows", "open_arrays"]

CHUNK_BYTES = 1 << 20
"""Bytes read at once."""

FREE_BYTES = 1 << 28
"""Bytes that may be read into memory at once, besides as many as the file has."""

UNFOLDED = 100
"""Largest number of times its size to which a file of more than FREE_BYTES may unfold; data packs 2 to 10 times."""

PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression that numpy writes; other decoders take memory before they find out that a file is damaged."""


@contextmanager
def open_arrays(path: Path) -> Iterator[dict[str, Rows]]:
    """Open the arrays of an .npz file by name, or that of an .npy file by the name of the file.

    raises: DataError for what is no such file, promises more than it holds or unfolds to far more; so does reading.
    """
    if not path.is_file():
        raise DataError(no_file(path))
    try:
        with ExitStack() as stack:
            of_file = path.stat().st_size
            if path.suffix == ".npy":
                opened = {path.stem: _Stored(stack.enter_context(path.open("rb")), of_file)}
            else:
                opened = _members(path, stack.enter_context(zipfile.ZipFile(path)), stack)
            yield {name: Rows(each, f"{path}: array {name!r}", of_file) for name, each in opened.items()}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, RuntimeError, MemoryError) as error:
        kind = path.suffix if path.suffix == ".npy" else ".npz"
        raise DataError(
            f"{path} is not a readable {kind} file ({first_line(error)}); save it again with numpy.save{kind[3:]}."
        ) from error


class _Stored(NamedTuple):
    """An array with its header as a stream of so many bytes."""

    stream: IO[bytes]
    size: int


def _members(path: Path, archive: zipfile.ZipFile, stack: ExitStack) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    unfolded, size = sum(info.file_size for info in archive.infolist()), path.stat().st_size
    if unfolded > max(UNFOLDED * size, FREE_BYTES):
        raise DataError(
            f"{path} has {size:,} bytes, but unfolds to {unfolded:,}, which no data does; save it with numpy.savez."
        )
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise DataError(f"{path} holds array {name!r} twice; keep one of them.")
        if info.compress_type not in PLAIN:
            raise DataError(f"{path}: array {name!r} is packed in another way than numpy does; save the file again.")
        found[name] = _Stored(stack.enter_context(archive.open(info)), info.file_size)
    return found


class Rows:
    """One array, whose slices are read forward along its first dimension.

    of_file: bytes of the whole file.
    raises: DataError for a header that is malformed, lies, or describes objects or samples without values.
    """

    def __init__(self, stored: _Stored, where: str, of_file: int) -> None:
        self._stream, self._where, self._limit = stored.stream, where, FREE_BYTES + of_file
        self.shape, fortran, self.dtype = _header(stored.stream, where)
        if self.dtype.hasobject:
            raise DataError(
                f"{where} holds Python objects, refused as loading them could run code; save plain numbers."
            )
        if min(self.shape, default=0) < 0:
            raise DataError(f"{where} has a negative size, {list(self.shape)}; save the file again.")
        if (promised := math.prod(self.shape) * self.dtype.itemsize) > stored.size:
            raise DataError(
                f"{where} has {stored.size:,} bytes, but its header promises {promised:,}; save the file again."
            )
        if not promised and self.shape and self.shape[0]:
            raise DataError(f"{where} has samples without values, {list(self.shape)}; save an array that holds some.")
        # A column-major array cannot be read by rows, so all of it is read here.
        self._whole = self._read(self.shape[::-1]).transpose() if fortran and len(self.shape) > 1 else None

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray[Any, Any]:
        """Return the next rows; a slice has to begin where the one before it ended."""
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[rows])
        return self._read((len(range(len(self))[rows]), *self.shape[1:]))

    def all(self) -> np.ndarray[Any, Any]:
        """Return the whole array."""
        return self._read(self.shape) if self._whole is None else self._whole

    def _read(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if (needed := math.prod(shape) * self.dtype.itemsize) > self._limit:
            raise DataError(
                f"{self._where} has to be read {needed:,} bytes at a time, more than its file has; give a smaller "
                f"{argument('batch_size')}, or save the array in row-major order (numpy.ascontiguousarray)."
            )
        array = np.empty(shape, self.dtype)
        buffer = array.reshape(-1).view(np.uint8)
        filled = 0
        while filled < len(buffer):
            chunk = self._stream.read(min(len(buffer) - filled, CHUNK_BYTES))
            if not chunk:
                raise EOFError("an array is shorter than its header says")
            buffer[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
            filled += len(chunk)
        return array


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is column-major, and dtype."""
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (OSError, zipfile.BadZipFile):
        raise
    except Exception as error:  # numpy's parser of headers raises many types
        raise DataError(f"{where} has no readable header ({first_line(error)}); save the file again.") from error
    return shape, fortran, dtype
