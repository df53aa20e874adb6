"""Keep the finished units of an export that trains, so that it continues where it was interrupted, and statistics of
data, for exports with other methods or bits.

The folder is named by the digest of everything that can change the result: data, settings, versions, threads; the
graph is part of it, or of the name of the file. What belongs to something else is never read.

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

from calibrators.errors import InputError, argument, counted
from calibrators.graph.digest import digest_of, graph_digest
from exporter.about import __version__
from exporter.config import ExportConfig
from exporter.inputs.batches import GraphBatches
from exporter.inputs.data import Data

__all__ = ["Store", "cache_folder", "check_apart", "export_digest", "kept_statistics", "kept_units"]

VARIABLE = "INTACT_CACHE"
LARGEST = 4 << 30
"""Bytes that what is kept in one folder may take together; the oldest go first."""


def cache_folder() -> Path:
    """Return the folder of unfinished exports: INTACT_CACHE, or `intact` in the user's folder for caches."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intact"


def check_apart(out: Path, config: ExportConfig) -> None:
    """Check that what is kept does not lie in the bundle, which nothing but an export fills.

    raises: InputError.
    """
    used = [(argument("cache"), Path(config.cache))] if config.cache else []
    used += [(VARIABLE, cache_folder())] if config.resume else []
    for name, folder in used:
        if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(out)):  # which takes links in a circle
            raise InputError(f"{name} {folder} is inside the bundle {out}; give it another folder.")


def export_digest(graph: fx.GraphModule, data_digest: str, config: ExportConfig) -> str:
    """Return the sha256 of all that can change what training makes of a folded graph."""
    return _digest(config.digest(), config.cache_gib, data_digest, graph_digest(graph))


def _digest(*parts: object) -> str:
    """Return the sha256 of what JSON can hold, of versions, machine and threads."""
    versions = (__version__, torch.__version__, platform.machine(), torch.get_num_threads())
    return hashlib.sha256(json.dumps([*versions, *parts]).encode()).hexdigest()


class Store:
    """Results of steps that belong together, a file for each, in a folder of that name.

    parent:  the folder of all of them; the oldest go where they take more than LARGEST bytes.
    advice:  what to do where it cannot be written.
    raises:  InputError then.
    """

    def __init__(self, parent: Path, digest: str, advice: str) -> None:
        self.folder = parent / digest[:32]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            os.utime(self.folder)
            _shrink(self.folder.parent, self.folder)
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {error.strerror or error}; {advice}.") from error

    @property
    def count(self) -> int:
        """The number of steps that are kept."""
        return sum(1 for _ in self.folder.glob("*.safetensors"))

    def load(self, name: str) -> tuple[Mapping[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and the record of a step, None if it is not kept, or is not what was kept."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            with safetensors.safe_open(path, framework="pt") as stored:
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
                record, digest = (stored.metadata()[key] for key in ("record", "sha256"))
            return (tensors, json.loads(record)) if digest == digest_of(record, sorted(tensors.items())) else None
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError):
            return None  # it is done again

    def save(self, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Write a step; a run that is killed meanwhile leaves no half of it.

        Where it cannot be written (a full disk, a folder that another export removed) the work goes on without it.
        """
        path = self.folder / f"{name}.safetensors"
        partial, text = path.with_suffix(f".{os.getpid()}.partial"), json.dumps(record)
        metadata = {"record": text, "sha256": digest_of(text, sorted(tensors.items()))}
        with suppress(OSError, safetensors.SafetensorError):
            safetensors.torch.save_file(dict(tensors), partial, metadata=metadata)
            partial.replace(path)

    def remove(self) -> None:
        """Remove what was kept, after the export has succeeded."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def kept_units(
    graph: fx.GraphModule, data: Data, config: ExportConfig, note: Callable[[str], object]
) -> Iterator[Store | None]:
    """Yield where training keeps the units of an export, None unless it is to be resumable.

    They are removed when the body succeeds. note: is called with what was taken over.

    raises: KeyboardInterrupt that says what is kept.
    """
    if not config.resume:
        yield None
        return
    advice = f"name another folder in {VARIABLE}, or leave {argument('resume')} out"
    kept = Store(cache_folder() / "unfinished", export_digest(graph, data.digest(), config), advice)
    found = kept.count
    try:
        yield kept
    except KeyboardInterrupt as interrupt:
        units = counted(kept.count, "finished unit")
        raise KeyboardInterrupt(f"no bundle was written; run again to continue after {units}") from interrupt
    if found:
        note(f"{counted(found, 'unit')} of an interrupted export were taken over")
    kept.remove()


def kept_statistics(batches: GraphBatches, config: ExportConfig) -> Store | None:
    """Return where the statistics of data are kept for exports with other methods or bits; None without a cache.

    All data are read, for their digest. Sums of floats depend on the sizes of batches, so these count too.
    """
    if config.cache is None:
        return None
    sizes = [len(batch[0]) for batch in batches]
    advice = f"give {argument('cache')} another folder, or leave it out"
    return Store(Path(config.cache) / "intact-statistics", _digest(batches.data.digest(), sizes), advice)


def _shrink(parent: Path, kept: Path) -> None:
    """Remove the oldest folders while all of them take more than LARGEST bytes."""
    found = {path: _age_and_size(path) for path in parent.iterdir()}
    total = sum(size for _, size in found.values())
    for path in sorted(found.keys() - {kept}, key=lambda path: (found[path], path)):
        if total <= LARGEST:
            return
        shutil.rmtree(path, ignore_errors=True)
        total -= found[path][1]


def _age_and_size(path: Path) -> tuple[float, int]:
    """Return the time of a folder's last use and its bytes; what another export removes meanwhile has none."""
    time, size = 0.0, 0
    with suppress(OSError):
        time = path.lstat().st_mtime
        for each in path.rglob("*"):
            size += each.lstat().st_size
    return time, size
