"""LiteRT's reference kernels in a process of their own, which execute what is made of the reference program."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calibrators.errors import InputError, ModelError
from runtime_tests.tflite import worker as script
from runtime_tests.workers.install import PipPackages
from runtime_tests.workers.lowering import check_count, copied, unsigned
from runtime_tests.workers.process import Worker, environment
from runtime_tests.workers.runtime import Array, Artifact, Loaded, PinnedRuntime

if TYPE_CHECKING:
    from torch import fx

    from runtime_tests.tflite.lowered import Lowered

__all__ = ["RUNTIME"]

VERSION = "2.3.0"
PACKAGES = PipPackages(
    "litert",
    (
        *(f"ai-edge-litert=={VERSION}", "flatbuffers==25.12.19", "numpy==2.4.6", "protobuf==7.36.2"),
        *("ml_dtypes==0.6.0", "backports.strenum==1.2.8", "typing-extensions==4.16.0", "tqdm==4.70.1"),
    ),
)
"""LiteRT with what it imports, numpy too: it needs nothing of the environment of intact."""

DEPLOYED = "model.tflite"
KERNELS = {
    **dict.fromkeys(("CONV_2D", "DEPTHWISE_CONV_2D"), "QLinearConv"),
    "FULLY_CONNECTED": "QGemm",
    "ADD": "QLinearAdd",
    "MUL": "QLinearMul",
    "CONCATENATION": "QLinearConcat",
    "MEAN": "QLinearGlobalAveragePool",
    "AVERAGE_POOL_2D": "QLinearAveragePool",
}
"""Operators that run on codes, and the kernels of onnxruntime that compute nearly the same."""

TO_CHANNELS_LAST, TO_CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


class _OnLiteRt:
    """A file in a worker; codes are uint8 here and images have channels first, as in the reference."""

    kernel_rate, float_factor, name = 0.0, 1.0, "tflite"

    def __init__(self, artifact: Artifact, probes: Sequence[str]) -> None:
        if artifact.program is None:
            raise ModelError("LiteRT executes what is made of a reference program, and this file comes without one.")
        self.output_names = [value.name for value in artifact.model.proto.graph.output]
        self.worker = _started()
        made = _lowered(self.worker, artifact.program, DEPLOYED)
        if artifact.lowered is not None:
            copied(artifact.lowered, self.worker.folder / DEPLOYED)
        sites = [name.removesuffix("_quantized") for name in probes]  # runtime_tests.parity.probes
        tensors = [made.sites[site] for site in sites]
        found = self.worker.ask({"load": DEPLOYED, "probes": tensors})
        self._executed = Counter(
            KERNELS[each["name"]]
            for each in found["operators"]
            if each["name"] in KERNELS and each["types"][0] == each["types"][-1] == "int8"
        )
        self._count = len(self.output_names) + len(probes)

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the outputs and the codes of the probes."""
        total = self.worker.run_batch([_transposed(x, TO_CHANNELS_LAST) for x in inputs])["outputs"]
        check_count(total, self._count, DEPLOYED)
        found = [_transposed(unsigned(x), TO_CHANNELS_FIRST) for x in self.worker.outputs(total)]
        count = len(self.output_names)
        return found[:count], found[count:]

    def executed(self) -> Mapping[str, int]:
        """Count the kernels that run on codes, by operator of onnxruntime."""
        return self._executed


@dataclass(frozen=True)
class _LiteRt(PinnedRuntime):
    """LiteRT's interpreter with its reference kernels."""

    def lower(self, program: fx.GraphModule, path: Path) -> tuple[str, ...]:
        if reason := self.missing():
            raise InputError(f"{path.name} is written with LiteRT's schema: {reason}; {self.how_to_get}.")
        worker = _started()
        made = _lowered(worker, program, DEPLOYED)
        worker.ask({"load": DEPLOYED, "probes": []})  # which finds what the schema lets pass
        shutil.copyfile(worker.folder / DEPLOYED, path)
        return made.outside

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        return _OnLiteRt(artifact, probes)


def _started() -> Worker:
    command: list[str | Path] = [sys.executable, "-P", Path(str(script.__file__)).resolve()]
    return Worker(command, environment(PYTHONPATH=PACKAGES.folder), RUNTIME.name)


def _lowered(worker: Worker, program: fx.GraphModule, name: str) -> Lowered:
    """Let a worker write the file of a program.

    raises: ModelError if it has no form there.
    """
    from runtime_tests.tflite.lowered import lowered

    made = lowered(program)
    made.draft.save(worker.folder, "intact")
    found: dict[str, Any] = worker.ask({"draft": "draft.json", "file": name})
    if found["version"] != VERSION:
        raise ModelError(f"LiteRT {found['version']} answers where {VERSION} is installed; install it again.")
    return made


def _transposed(values: Array, order: Sequence[int]) -> Array:
    """Return a value of four axes with its axes in another order; others as they are."""
    return np.ascontiguousarray(values.transpose(order)) if values.ndim == len(order) else values


RUNTIME = _LiteRt(
    "tflite",
    "LiteRT's reference kernels, in a process of their own",
    processor="tflite",
    samples=256,
    lowers=True,
    packages=PACKAGES,
    release=VERSION,
)
