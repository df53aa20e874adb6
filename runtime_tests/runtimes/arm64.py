"""onnxruntime on 64-bit ARM: emulated, with an interpreter and libraries of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version

from calibrators.errors import UnknownNameError
from runtime_tests.workers.emulation import emulator, qemu_components, qemu_flags
from runtime_tests.workers.install import Component, DebianPackages, PipPackages
from runtime_tests.workers.process import LoadedInWorker, python_worker
from runtime_tests.workers.runtime import Artifact, Loaded, Runtime

__all__ = ["RUNTIME"]

PYTHON = "3.11"
SYSTEM = DebianPackages(
    "arm64-system", "bookworm", "arm64", (f"python{PYTHON}", "libstdc++6", "libgomp1"), with_dependencies=True
)
CPUS = (
    "cortex-a35",
    "cortex-a53",
    "cortex-a55",
    "cortex-a72",
    "cortex-a76",
    "cortex-a710",
    "neoverse-n1",
    "neoverse-v1",
)
"""Processors that QEMU emulates. Cortex-A53 has no dot products (ARMv8.0), Cortex-A76 has (ARMv8.2)."""


@dataclass(frozen=True)
class _Arm64(Runtime):
    """The version of onnxruntime of this environment on an emulated ARM processor."""

    cpu: str = "cortex-a76"

    @property
    def components(self) -> tuple[Component, ...]:
        packages = PipPackages(
            "arm64-packages",
            ("numpy==2.4.6", f"onnxruntime=={self.version}"),
            platforms=("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64"),
            python=PYTHON,
        )
        return (*qemu_components("aarch64"), SYSTEM, packages)

    @property
    def version(self) -> str:
        return version("onnxruntime")

    @property
    def flags(self) -> tuple[str, ...]:
        return qemu_flags("aarch64", self.cpu)

    def missing(self) -> str:
        return super().missing() if sys.platform == "linux" else "emulation of programs needs Linux"

    def variant(self, text: str) -> Runtime:
        if text not in CPUS:
            raise UnknownNameError("ARM processor", text, CPUS)
        summary = self.summary.replace(self.cpu, text)
        return replace(self, name=f"{self.name}=={text}", summary=summary, variants=(), cpu=text)

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        *_, system, packages = self.components
        worker = python_worker(
            self.name,
            before=(emulator("aarch64"), "-cpu", self.cpu),
            python=system.folder / "usr" / "bin" / f"python{PYTHON}",
            QEMU_LD_PREFIX=system.folder,
            PYTHONHOME=system.folder / "usr",
            PYTHONPATH=packages.folder,
            OPENBLAS_NUM_THREADS=1,
        )
        return LoadedInWorker(worker, artifact.model, probes, threads=threads, version=self.version)


RUNTIME = _Arm64("arm64", "onnxruntime, emulated Arm cortex-a76", processor="arm64", variants=("cortex-a53",))
