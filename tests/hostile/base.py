"""The good files that hostile inputs are made from, and the list of hostile inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from exporter import export

__all__ = ["BAD", "CASES", "Base", "Hostile", "bytes_on_disk", "hostile", "hostile_each", "make_base", "reseal"]

BAD = frozenset({2, 3})
"""Exit codes for input that is refused."""

NETWORK = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
"""
QUICK = ("--quiet", "--set", "latency_runs=0", "--set", "simplify=false", "--method", "minmax")


@dataclass(frozen=True)
class Base:
    """Good files: net.py, data.npz, net.pt, net.pt2, and a bundle of the network.

    Each is copied before it is changed.
    """

    folder: Path

    @property
    def export(self) -> list[str]:
        """The beginning of the command that exports the network, without model and data."""
        return ["export", "--out", "out", *QUICK]

    @property
    def model(self) -> str:
        return f"{self.folder / 'net.py'}:build"

    @property
    def data(self) -> str:
        return str(self.folder / "data.npz")

    def bundle(self, folder: Path) -> Path:
        """Return a copy of the bundle in `folder`."""
        return Path(shutil.copytree(self.folder / "bundle", folder / "bundle"))

    def with_checkpoint(self, path: Path) -> list[str]:
        return [*self.export, self.model, "--checkpoint", str(path), "--data", self.data]

    def with_program(self, path: Path) -> list[str]:
        return [*self.export, str(path), "--data", self.data]

    def with_data(self, path: Path | str, *more: str) -> list[str]:
        return [*self.export, self.model, "--data", str(path), *more]


def make_base(folder: Path, *, whole: bool = True) -> Base:
    """Write the good files; without the program and the bundle, which take seconds, unless `whole`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NETWORK)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)
    network: nn.Module = scope["build"]().eval()
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    np.savez(folder / "data.npz", x=x.numpy())
    torch.save(network.state_dict(), folder / "net.pt")
    if whole:
        shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
        torch.export.save(torch.export.export(network, (x[:2],), dynamic_shapes=shapes), folder / "net.pt2")
        report = export(network, [x], method="minmax", out=folder / "bundle", latency_runs=0, simplify=False)
        assert report["verdict"] == "pass"
    return Base(folder)


def bytes_on_disk(folder: Path) -> int:
    """Return the bytes that the files in a folder take, without those that are linked."""
    found, waiting = 0, [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    found += 512 * entry.stat(follow_symlinks=False).st_blocks
    return found


def reseal(bundle: Path) -> None:
    """Make the manifest fit the files, as the sender of a hostile bundle does."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"] = {
        file.relative_to(bundle).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in sorted(bundle.rglob("*"))
        if file.is_file() and file != path
    }
    path.write_text(json.dumps(manifest))


Make = Callable[[Path, Base], list[str]]
"""A function that writes hostile files into an empty folder and returns the arguments of `intact`."""


@dataclass(frozen=True)
class Hostile:
    """A hostile input.

    codes: legal exit codes.
    """

    kind: str
    name: str
    make: Make
    codes: frozenset[int] = BAD

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}".replace(" ", "-")


CASES: list[Hostile] = []


def hostile(kind: str, name: str, *, codes: Iterable[int] = BAD) -> Callable[[Make], Make]:
    """Add a hostile input to the list."""

    def add(make: Make) -> Make:
        CASES.append(Hostile(kind, name, make, frozenset(codes)))
        return make

    return add


def hostile_each(
    kind: str, values: Mapping[str, Any], make: Callable[[Path, Base, Any], list[str]], *, codes: Iterable[int] = BAD
) -> None:
    """Add one hostile input for every value."""
    for name, value in values.items():
        hostile(kind, name, codes=codes)(lambda folder, base, value=value: make(folder, base, value))  # type: ignore[misc]
