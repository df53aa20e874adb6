"""Compare OpenVINO, kernel by kernel, with the reference program of the same file.

Its kernels multiply by float32 scales that were merged, so that a result next to a tie may be rounded to the
other side: codes may rarely differ by one. A wrong scale, zero point, weight or bias changes far more than that.
OpenVINO does not fuse across probes, so the file also runs as it is deployed, without them. Its outputs then are
reported but not judged, because single steps travel through the network.

Must not know: how the model was made, reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from calibrators.errors import InputError, ModelError
from calibrators.execution.losses import is_logits
from runtime_tests.ort.sessions import Model
from runtime_tests.parity.compare import Comparison, distance, largest_finite, probes_of
from runtime_tests.parity.results import Agreement, SecondLevel
from runtime_tests.reference.execute import KernelPlan

__all__ = ["SecondComparison", "check_installed"]

NAME = "OpenVINO"

PINNED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Settings that override defaults: bfloat16 in float operators, rounded activations in weight-only products."""

KERNEL_RATE = 5e-2
"""Largest legal share of codes of one site that are one step off. Measured: 1e-4 after convolutions, 1.7e-3 at a sum
whose operands meet many ties, 3.1e-2 at a pool whose codes OpenVINO quantizes once more. A zero point that is off by
one moves all codes by one."""

TINY = 1e-30

_PLUMBING = ("Parameter", "Result", "Input", "Output", "Const", "Constant", "Reorder", "Reshape")


def check_installed() -> None:
    """Raise InputError unless OpenVINO is installed."""
    if find_spec("openvino") is None:
        raise InputError("OpenVINO is not installed; run pip install 'openvino>=2025.4', or leave --openvino out.")


class SecondComparison(Comparison):
    """Running totals of OpenVINO, with probes and as the file is deployed."""

    def __init__(self, model: Model, plan: KernelPlan, weights: Mapping[str, Agreement], threads: int) -> None:
        check_installed()
        self.deployed = _OpenVino(model, (), threads)
        super().__init__(_OpenVino(model, probes_of(plan), threads), plan, weights)
        self.differences, self.largest = [0.0] * len(self.outputs), [0.0] * len(self.outputs)
        self.agreeing = self.decided = 0

    def add(self, inputs: tuple[Tensor, ...], codes: Mapping[str, Tensor], ours: tuple[Tensor, ...]) -> None:
        """Run a batch with and without probes, and compare it with the codes and outputs of the reference."""
        super().add(inputs, codes, ours)
        theirs, _ = self.deployed.run(inputs)
        for index, (y, t) in enumerate(zip(ours, theirs, strict=True)):
            self.differences[index] = max(self.differences[index], distance(y, t))
            self.largest[index] = max(self.largest[index], largest_finite(y))
        if is_logits(ours[0]):
            self.agreeing += int((ours[0].argmax(1) == theirs[0].argmax(1)).sum())
            self.decided += len(ours[0])

    def report(self) -> SecondLevel:
        """Return what all batches together say."""
        pairs = zip(self.differences, self.largest, strict=True)
        return SecondLevel.of(
            **self._found(),
            version=_version(),
            executed=self.deployed.kernels(),
            relative=max(d / max(most, TINY) if d else 0.0 for d, most in pairs),
            agreement=self.agreeing / self.decided if self.decided else None,
        )


class _OpenVino:
    """A model compiled for the CPU, with `probes` as outputs; everything that changes a number is pinned."""

    name = NAME
    kernel_rate = KERNEL_RATE

    def __init__(self, source: Model, probes: Sequence[str], threads: int) -> None:
        import openvino

        model = onnx.ModelProto()
        model.CopyFrom(source.proto)
        if not isinstance(source.source, onnx.ModelProto):
            onnx.load_external_data_for_model(model, str(Path(source.source).parent))
        self.input_names = [value.name for value in model.graph.input]
        self.output_names = [value.name for value in model.graph.output]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(probe) for probe in probes)
        core = openvino.Core()
        try:
            network = core.read_model(model.SerializeToString())
            self.compiled = core.compile_model(network, "CPU", {**PINNED, "INFERENCE_NUM_THREADS": str(threads)})
        except (RuntimeError, ValueError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ModelError(
                f"OpenVINO {_version()} refuses the model: {lines[-1][:300] if lines else type(error).__name__}; leave "
                "--openvino out, or keep what it names in float (--exclude)"
            ) from error

    def run(self, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        """Return the model's outputs and the probes."""
        read = {name for port in self.compiled.inputs for name in port.names}  # unused ones are gone
        feeds = {name: x.numpy(force=True) for name, x in zip(self.input_names, inputs, strict=True) if name in read}
        found = self.compiled(feeds)
        values = [torch.from_numpy(np.array(found[index])) for index in range(len(self.compiled.outputs))]
        count = len(self.output_names)
        return values[:count], values[count:]

    def unplanned(self, plan: KernelPlan) -> None:
        """Return None, because there is no plan of OpenVINO's kernels."""

    def kernels(self) -> dict[str, int]:
        """Count the layers into which OpenVINO compiled the file, by type and precision."""
        found: Counter[str] = Counter()
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
            if kind not in _PLUMBING:
                found[f"{kind} {precision}"] += 1
        return dict(sorted(found.items()))


def _version() -> str:
    import openvino

    return str(openvino.__version__).split("-")[0]
