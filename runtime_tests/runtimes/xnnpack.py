"""XNNPACK on this machine's processor, in ExecuTorch: it executes what it lowers from the reference program."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from calibrators.errors import InputError, ModelError, first_line
from runtime_tests.workers.install import PipPackages
from runtime_tests.workers.lowering import check_count, copied, unsigned
from runtime_tests.workers.process import Worker, environment
from runtime_tests.workers.runtime import Array, Artifact, Loaded, PinnedRuntime
from runtime_tests.xnnpack import worker as script

if TYPE_CHECKING:
    from torch import fx

__all__ = ["RUNTIME"]

VERSION = "1.5.1"
PACKAGES = PipPackages(
    "executorch",
    (
        *(f"executorch=={VERSION}", "torchao==0.18.0", "flatbuffers==25.12.19"),
        *("pyyaml==6.0.3", "ruamel.yaml==0.19.1", "tabulate==0.10.0"),
    ),
)
"""ExecuTorch with what it imports; it uses the torch of this environment."""

DEPLOYED, PROBED = "model.pte", "probed.pte"

KERNELS = {
    "convolution": "QLinearConv",
    **dict.fromkeys(("linear", "addmm", "mm"), "QGemm"),
    "add": "QLinearAdd",
    "mul": "QLinearMul",
    "cat": "QLinearConcat",
    "mean": "QLinearGlobalAveragePool",
}
"""Operators that XNNPACK runs on codes, and the kernels of onnxruntime that compute the same."""

_LOWERED: WeakKeyDictionary[fx.GraphModule, Worker] = WeakKeyDictionary()
"""Workers that lowered a program and may execute it: starting one takes 10 s."""


class _OnXnnPack:
    """A program in a worker, as it is deployed and with the codes of probes as further outputs.

    Codes are uint8 here, as in the reference.
    """

    kernel_rate, float_factor, name = 0.0, 1.0, "xnnpack"

    def __init__(self, artifact: Artifact, probes: Sequence[str]) -> None:
        if artifact.program is None:
            raise ModelError("XNNPACK executes what it makes of a reference program, and this file comes without one.")
        outputs = artifact.model.proto.graph.output
        self.output_names = [value.name for value in outputs]
        self.worker = _LOWERED.pop(artifact.program) if artifact.program in _LOWERED else _started()
        sites = [name.removesuffix("_quantized") for name in probes]  # runtime_tests.parity.probes
        self._executed = _lowered(self.worker, artifact.program, sites, PROBED).kernels
        if artifact.lowered is None:
            _lowered(self.worker, artifact.program, (), DEPLOYED)
        else:
            copied(artifact.lowered, self.worker.folder / DEPLOYED)
        self._count = 2 * len(self.output_names) + len(probes)
        self.worker.ask({"load": [DEPLOYED, PROBED]})

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the outputs of the program as it is deployed, and the probes."""
        count = len(self.output_names)
        total = self.worker.run_batch(inputs)["outputs"]
        check_count(total, self._count, DEPLOYED)
        found = [*map(unsigned, self.worker.outputs(total))]
        return found[:count], found[2 * count :]

    def executed(self) -> Mapping[str, int]:
        """Count the kernels that run on codes, by operator of onnxruntime."""
        return self._executed


@dataclass(frozen=True)
class _XnnPack(PinnedRuntime):
    """ExecuTorch's runtime with its XNNPACK backend."""

    def lower(self, program: fx.GraphModule, path: Path) -> tuple[str, ...]:
        if reason := self.missing():
            raise InputError(f"{path.name} is made by ExecuTorch: {reason}; {self.how_to_get}.")
        started = _started()
        found = _lowered(started, program, (), DEPLOYED)
        started.ask({"load": [DEPLOYED]})  # which finds what lowering lets pass
        shutil.copyfile(started.folder / DEPLOYED, path)
        _LOWERED[program] = started
        return found.outside

    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        return _OnXnnPack(artifact, probes)


def _started() -> Worker:
    path = os.pathsep.join([str(PACKAGES.folder), *filter(None, sys.path)])
    command: list[str | Path] = [sys.executable, "-P", Path(str(script.__file__)).resolve()]
    return Worker(command, environment(PYTHONPATH=path), RUNTIME.name)


@dataclass(frozen=True)
class _Lowered:
    """A lowered program: the kernels that run on codes, and the operators that run outside XNNPACK."""

    kernels: Mapping[str, int]
    outside: tuple[str, ...]


def _lowered(worker: Worker, program: fx.GraphModule, sites: Sequence[str], name: str) -> _Lowered:
    """Let a worker lower a program with the codes of sites as further outputs.

    raises: ModelError if it cannot.
    """
    import torch

    from runtime_tests.xnnpack.decomposed import decomposed

    module = decomposed(program, sites)
    try:
        with torch.no_grad():
            exported = torch.export.export(module, tuple(program.meta["example"]))
    except Exception as error:  # of torch.export, whose errors have no common base
        raise ModelError(f"the program has no form in ExecuTorch: {first_line(error)}") from error
    torch.export.save(exported, worker.folder / "program.pt2")
    found: dict[str, Any] = worker.ask({"program": "program.pt2", "lowered": name})
    if found["version"] != VERSION:
        raise ModelError(f"ExecuTorch {found['version']} answers where {VERSION} is installed; install it again.")
    counts: Counter[str] = Counter()
    for operator, count in found["integer"].items():
        if operator in KERNELS:
            counts[KERNELS[operator]] += count
    return _Lowered(counts, tuple(found["outside"]))


RUNTIME = _XnnPack(
    "xnnpack",
    "XNNPACK, in ExecuTorch in a process of its own",
    processor="xnnpack",
    samples=256,
    lowers=True,
    packages=PACKAGES,
    release=VERSION,
)
