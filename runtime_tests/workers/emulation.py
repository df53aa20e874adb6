"""Processors that this machine does not have, by user-mode emulation: the same codes, but not the same times.

QEMU before version 10 ends with an error while it loads onnxruntime for 64-bit ARM.

Must not know: files, what is compared.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from runtime_tests.workers.install import Component, DebianPackages, run_tool
from runtime_tests.workers.process import LoadedInWorker, python_worker
from runtime_tests.workers.runtime import Artifact, Loaded, Runtime

__all__ = ["EmulatedX86", "emulator", "qemu_components", "qemu_flags"]

OLDEST = 10

QEMU = DebianPackages("qemu", suite="bookworm-backports", architecture="amd64", packages=("qemu-user",))
"""Statically linked, so that it runs on any x86-64 Linux. Debian 12 itself has version 7.2."""


def emulator(architecture: str) -> Path:
    """Return the emulator of an architecture ("aarch64"): that of the system if it is recent enough, else ours."""
    name = f"qemu-{architecture}"
    for found in filter(None, (shutil.which(name), shutil.which(f"{name}-static"))):
        if _version(Path(found)) >= (OLDEST,):
            return Path(found)
    return QEMU.folder / "usr" / "bin" / name


def qemu_components(architecture: str) -> tuple[Component, ...]:
    """Return what has to be installed for the emulator of an architecture."""
    return (QEMU,) if emulator(architecture).is_relative_to(QEMU.folder) else ()


def qemu_flags(architecture: str, cpu: str) -> tuple[str, ...]:
    """Return the emulator with its version, and the processor that it emulates."""
    program = emulator(architecture)
    return f"qemu {'.'.join(map(str, _version(program)))}", cpu


@functools.cache
def _version(emulator: Path) -> tuple[int, ...]:
    """Return the version of an emulator."""
    found = re.search(r"version (\d+(?:\.\d+)*)", run_tool([emulator, "--version"], emulator.name))
    return tuple(map(int, found[1].split("."))) if found else ()


@dataclass(frozen=True)
class EmulatedX86(Runtime):
    """The onnxruntime of this environment on an emulated x86-64 processor.

    cpu: name of the processor, as QEMU knows it.
    """

    cpu: str = ""

    @property
    def components(self) -> tuple[Component, ...]:
        return qemu_components("x86_64")

    @property
    def version(self) -> str:
        return version("onnxruntime")

    @property
    def flags(self) -> tuple[str, ...]:
        return qemu_flags("x86_64", self.cpu)

    def missing(self) -> str:
        if platform.machine().lower() not in ("x86_64", "amd64") or sys.platform != "linux":
            return "only Linux on x86-64 can emulate another x86-64 processor for its own libraries"
        return super().missing()

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        worker = python_worker(
            self.name, before=(emulator("x86_64"), "-cpu", self.cpu), PYTHONPATH=os.pathsep.join(filter(None, sys.path))
        )
        return LoadedInWorker(worker, artifact.model, probes, threads=threads, version=self.version)
