"""OpenVINO on this machine's processor, in this process. Its kernels have formulas of their own.

Must not know: the reference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np

from calibrators.errors import InputError, ModelError, argument
from runtime_tests.ort.sessions import Model
from runtime_tests.workers.runtime import Array, Artifact, Runtime

__all__ = ["RUNTIME"]

PINNED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Settings that override defaults: bfloat16 in float operators, rounded activations in weight-only products."""

KERNEL_RATE = 5e-2
"""Largest legal share of codes of one site that are one step off. Measured: 1e-4 after convolutions, 1.7e-3 at a sum
whose operands meet many ties, 3.1e-2 at a pool whose codes OpenVINO quantizes once more. A zero point that is off by
one moves all codes by one."""

_PLUMBING = ("Parameter", "Result", "Input", "Output", "Const", "Constant", "Reorder", "Reshape")


@dataclass(frozen=True)
class _OpenVino(Runtime):
    """OpenVINO's plugin for CPUs."""

    @property
    def version(self) -> str:
        return version("openvino").split("-")[0]

    @property
    def how_to_get(self) -> str:
        return "run pip install 'openvino>=2025.4'"

    def missing(self) -> str:
        return "OpenVINO is not installed" if find_spec("openvino") is None else ""

    def install(self) -> None:
        if reason := self.missing():
            raise InputError(f"{reason}, and belongs into this environment: {self.how_to_get}.")

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Compiled:
        if reason := self.missing():
            raise InputError(f"{reason}; {self.how_to_get}, or leave {argument('openvino')} out.")
        return Compiled(artifact.model, probes, threads)


class Compiled:
    """A model compiled for the CPU, with `probes` as outputs; everything that changes a number is pinned."""

    name = "OpenVINO"
    kernel_rate, float_factor = KERNEL_RATE, 1.0

    def __init__(self, source: Model, probes: Sequence[str], threads: int) -> None:
        import openvino

        self.input_names = [value.name for value in source.proto.graph.input]
        self.output_names = [value.name for value in source.proto.graph.output]
        core = openvino.Core()
        try:
            network = core.read_model(source.whole(probes))
            self.compiled = core.compile_model(network, "CPU", {**PINNED, "INFERENCE_NUM_THREADS": str(threads)})
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"OpenVINO {RUNTIME.version} refuses the model: {lines[-1][:300] if lines else type(error).__name__}; "
                f"leave {argument('openvino')} out, or keep what it names in float ({argument('exclude')})"
            ) from error

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the model's outputs and the probes."""
        read = {name for port in self.compiled.inputs for name in port.names}  # unused ones are gone
        feeds = {name: x for name, x in zip(self.input_names, inputs, strict=True) if name in read}
        found = self.compiled(feeds)
        values = [np.array(found[index]) for index in range(len(self.compiled.outputs))]
        count = len(self.output_names)
        return values[:count], values[count:]

    def executed(self) -> None:
        """Return None: OpenVINO's layers are not operators of onnxruntime."""

    def layers(self) -> dict[str, int]:
        """Count the layers into which OpenVINO compiled the file, by type and precision."""
        found: Counter[str] = Counter()
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
            if kind not in _PLUMBING:
                found[f"{kind} {precision}"] += 1
        return dict(sorted(found.items()))


RUNTIME = _OpenVino(
    "openvino",
    "OpenVINO in this environment; single steps next to ties are allowed",
    samples=None,
    kernel_rate=KERNEL_RATE,
)
