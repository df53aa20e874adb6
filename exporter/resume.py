"""Keep the finished units of an export that trains, so that it continues where it was interrupted.

The folder of an export is named by the digest of everything that can change its result: model, data, settings,
versions, threads. A folder of another export is never read.

Must not know: what a unit is, how anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx

from calibrators.errors import InputError, counted
from exporter.about import __version__
from exporter.config import ExportConfig
from exporter.inputs.data import Data

__all__ = ["Unfinished", "cache_folder", "export_digest", "kept_units"]

VARIABLE = "INTACT_CACHE"
LARGEST = 4 << 30
"""Bytes that unfinished exports may take together; the oldest go first."""


def cache_folder() -> Path:
    """Return the folder of unfinished exports: INTACT_CACHE, or `intact` in the user's folder for caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intact"


def export_digest(graph: fx.GraphModule, data_digest: str, config: ExportConfig) -> str:
    """Return the sha256 of all that can change what training makes of a folded graph."""
    digest = hashlib.sha256()
    versions = (__version__, torch.__version__, platform.machine(), torch.get_num_threads())
    digest.update(json.dumps([*versions, config.digest(), config.cache_gib, data_digest, graph.code]).encode())
    for name, values in sorted(graph.state_dict().items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class Unfinished:
    """The finished units of one export: a file for each.

    raises: InputError if the folder cannot be written.
    """

    def __init__(self, digest: str) -> None:
        self.folder = cache_folder() / "unfinished" / digest[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            _shrink(self.folder.parent, self.folder)
        except OSError as error:
            raise InputError(
                f"cannot keep finished units in {self.folder}: {error.strerror or error}; name another folder in "
                f"{VARIABLE}, or leave --resume out."
            ) from error

    @property
    def count(self) -> int:
        """The number of units that are kept."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))

    def load(self, name: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record of a unit, None if it is not kept or cannot be read."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as stored:
                record = json.loads(stored.metadata()["record"])
                return {key: stored.get_tensor(key) for key in stored.keys()}, record  # noqa: SIM118 (not a mapping)
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # it is trained again

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a unit; a run that is killed meanwhile leaves no half of it.

        Where it cannot be written (a full disk, a folder that another export removed) training goes on without it.
        """
        path = self.folder / f"{name}.safetensors"
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with suppress(OSError, safetensors.SafetensorError):
            safetensors.torch.save_file(dict(tensors), partial, metadata={"record": json.dumps(record)})
            partial.replace(path)

    def remove(self) -> None:
        """Remove what was kept, after the export has succeeded."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def kept_units(
    graph: fx.GraphModule, data: Data, config: ExportConfig, note: Callable[[str], object]
) -> Iterator[Unfinished | None]:
    """Yield where training keeps the units of an export, None unless it is to be resumable.

    They are removed when the body succeeds. note: is called with what was taken over.

    raises: KeyboardInterrupt that says what is kept.
    """
    if not config.resume:
        yield None
        return
    kept = Unfinished(export_digest(graph, data.digest(), config))
    found = kept.count
    try:
        yield kept
    except KeyboardInterrupt as interrupt:
        units = counted(kept.count, "finished unit")
        raise KeyboardInterrupt(f"no bundle was written; run again to continue after {units}") from interrupt
    if found:
        note(f"{counted(found, 'unit')} of an interrupted export were taken over")
    kept.remove()


def _shrink(parent: Path, kept: Path) -> None:
    """Remove the oldest unfinished exports while all of them take more than LARGEST bytes."""
    others = sorted((path for path in parent.iterdir() if path != kept), key=lambda path: path.stat().st_mtime)
    sizes = {path: sum(each.stat().st_size for each in path.rglob("*") if each.is_file()) for path in [*others, kept]}
    for path in others:
        if sum(sizes.values()) <= LARGEST:
            return
        shutil.rmtree(path, ignore_errors=True)
        del sizes[path]
