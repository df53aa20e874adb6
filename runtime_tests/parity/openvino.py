"""OpenVINO as a second runtime: the same file, compared kernel by kernel with the same reference program.

Its kernels multiply by float32 scales that were folded together, so that a result next to a tie may be rounded to the
other side: codes may differ by one, rarely. What a wrong scale, zero point, weight or bias does is far more than that.
Making values visible keeps OpenVINO from fusing across them; the file as it is deployed runs beside, without taps, and
what its outputs make of that is reported, not judged: from the float input on, single steps travel through the network.

Must not know: how the model was made, reports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from calibrators.errors import InputError, ModelError
from calibrators.execution.losses import is_logits
from runtime_tests.parity.compare import Comparison, ParityReport, distance, largest_finite
from runtime_tests.reference.execute import KernelPlan

__all__ = ["SecondParity", "check_installed", "second_parity"]

NAME = "OpenVINO"

PINNED = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""By default float operators run in bfloat16 where the processor has it, and weight-only products round activations."""

KERNEL_RATE = 5e-2
"""Largest legal share of codes of one site that lie one step off. Measured: 1e-4 behind convolutions, 1.7e-3 at a sum
whose operands meet many ties, 3.1e-2 at a pool whose codes OpenVINO quantizes once more. A zero point that is off by
one moves all codes by one."""

TINY = 1e-30

_PLUMBING = ("Parameter", "Result", "Input", "Output", "Const", "Constant", "Reorder", "Reshape")


def check_installed() -> None:
    """Nothing, if OpenVINO is there.

    raises: InputError.
    """
    if find_spec("openvino") is None:
        raise InputError("OpenVINO is not installed; pip install 'openvino>=2025.4', or leave --openvino out.")


@dataclass(frozen=True)
class SecondParity:
    """What OpenVINO computes.

    tapped:    every site from OpenVINO's own codes.
    kernels:   layers that execute the file as it is deployed, by type and precision ("Convolution u8").
    relative:  largest difference of its outputs there from the reference's, as a share of the largest output.
    agreement: share of samples for which the first output, if it is [n, classes], is largest at the same class.
    """

    version: str
    tapped: ParityReport
    kernels: dict[str, int]
    relative: float
    agreement: float | None

    def to_dict(self) -> dict[str, Any]:
        tapped = self.tapped.to_dict()
        del tapped["unplanned"]
        return {
            **tapped,
            "version": self.version,
            "executed": self.kernels,
            "relative": self.relative,
            "agreement": self.agreement,
        }


def second_parity(
    model: onnx.ModelProto | str | Path,
    program: fx.GraphModule,
    batches: Iterable[Sequence[Tensor] | Tensor],
    *,
    threads: int = 1,
) -> SecondParity:
    """`model` in OpenVINO against `program`, the integer kernels of which are the reference.

    batches: tensors or tuples with one tensor per input; memory does not grow with their number.
    raises:  InputError where OpenVINO is not installed; ModelError where it refuses the file; else as `parity`.
    """
    check_installed()
    deployed = _OpenVino(model, (), threads)
    comparison = Comparison(lambda taps: _OpenVino(model, taps, threads), model, program)
    differences, largest = [0.0] * len(deployed.output_names), [0.0] * len(deployed.output_names)
    decisions: list[Tensor] = []  # whether they are the same, [n] per batch
    for batch in batches:
        inputs = (batch,) if isinstance(batch, Tensor) else tuple(batch)
        ours = comparison.add(inputs)
        theirs = deployed.run(inputs)[0] if ours else []
        for index, (y, t) in enumerate(zip(ours, theirs, strict=True)):
            differences[index] = max(differences[index], distance(y, t))
            largest[index] = max(largest[index], largest_finite(y))
        if ours and is_logits(ours[0]):
            decisions.append(ours[0].argmax(1) == theirs[0].argmax(1))
    relative = max(d / max(most, TINY) if d else 0.0 for d, most in zip(differences, largest, strict=True))
    agreement = float(torch.cat(decisions).double().mean()) if decisions else None
    return SecondParity(_version(), comparison.report(), deployed.kernels(), relative, agreement)


class _OpenVino:
    """A model compiled for the CPU, values called `taps` made visible; everything that changes a number is pinned."""

    name = NAME
    kernel_rate = KERNEL_RATE

    def __init__(self, source: onnx.ModelProto | str | Path, taps: Sequence[str], threads: int) -> None:
        import openvino

        if isinstance(source, onnx.ModelProto):
            model = onnx.ModelProto()
            model.CopyFrom(source)
        else:
            model = onnx.load(source)
        self.input_names = [value.name for value in model.graph.input]
        self.output_names = [value.name for value in model.graph.output]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(tap) for tap in taps)
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
        """The model's outputs and the taps."""
        read = {name for port in self.compiled.inputs for name in port.names}  # those that nobody reads are gone
        feeds = {name: x.numpy(force=True) for name, x in zip(self.input_names, inputs, strict=True) if name in read}
        found = self.compiled(feeds)
        values = [torch.from_numpy(np.array(found[index])) for index in range(len(self.compiled.outputs))]
        count = len(self.output_names)
        return values[:count], values[count:]

    def unplanned(self, plan: KernelPlan) -> Mapping[str, int]:
        """Nothing: there is no plan of its kernels."""
        return {}

    def kernels(self) -> dict[str, int]:
        """The layers that OpenVINO made of the file."""
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
