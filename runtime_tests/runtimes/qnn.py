"""The simulator of Qualcomm's HTP, which onnxruntime's QNN provider brings along for x86-64.

Its licence forbids to pass it on: everybody installs it from PyPI.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from runtime_tests.workers.install import PipPackages
from runtime_tests.workers.process import LoadedInWorker, python_worker
from runtime_tests.workers.runtime import Artifact, Loaded, PinnedRuntime

__all__ = ["RUNTIME"]

VERSION = "2.7.0"
ARCHITECTURE = "73"
DEVICE = {"htp_arch": ARCHITECTURE, "soc_model": "43", "enable_htp_fp16_precision": "1"}
"""The HTP that is simulated: that of Snapdragon 8 Gen 2. Later ones gave the same codes. Floats have 16 bits."""

KERNEL_RATE = 0.08
"""Largest legal share of codes of one site that are one step off. Measured on networks of the tests: 1.4 % of all
codes, at most 4.2 % at one site of more than 1000 codes (a product)."""


FLOAT_FACTOR = 16.0
"""Outputs after float operators differed by up to 3.6e-4 of the largest value: float16 rounds to 4.9e-4."""

PACKAGES = PipPackages("qnn", (f"onnxruntime-qnn=={VERSION}",))


class _OnHtp(LoadedInWorker):
    """A file of which every node runs on the HTP."""

    kernel_rate, float_factor = KERNEL_RATE, FLOAT_FACTOR

    @property
    def provider(self) -> Mapping[str, Any]:
        """Return the plug-in and the device that it simulates."""
        folder = PACKAGES.folder / "onnxruntime_qnn"
        library, backend = (str(folder / name) for name in ("libonnxruntime_providers_qnn.so", "libQnnHtp.so"))
        return {"name": "QNN", "library": library, "options": {"backend_path": backend, **DEVICE}}


@dataclass(frozen=True)
class _Qnn(PinnedRuntime):
    """The version of onnxruntime of this environment with the QNN provider."""

    @property
    def flags(self) -> tuple[str, ...]:
        return "HTP simulator", f"v{ARCHITECTURE}"

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        worker = python_worker(self.name, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
        return _OnHtp(worker, artifact.model, probes, threads=threads, version=version("onnxruntime"))


RUNTIME = _Qnn(
    "qnn",
    "onnxruntime's QNN provider, HTP simulator; single steps are allowed",
    kernel_rate=KERNEL_RATE,
    packages=PACKAGES,
    release=VERSION,
)
