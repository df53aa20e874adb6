"""A network of the accuracy benchmark with the data that calibrate and evaluate it.

Must not know: methods, bits, files of results.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scores import Array, Outputs, Scores, score
from torch import Tensor, fx

from calibrators.errors import DataError, InputError
from exporter import capture, fold
from exporter.emission.build_model import emit_float
from exporter.frontend.load import Model
from exporter.inputs.data import Batch, Data
from exporter.inputs.open import open_data
from runtime_tests.measure.latency import latency
from runtime_tests.ort.sessions import session

HELD_OUT = 0.25
"""Share of the calibration batches that judge choices in place of evaluation data."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Calibration and evaluation data.

    batches, labels: calibration inputs, and int64 [samples] or None; read once, for all runs.
    """

    evaluation: Data
    batches: list[tuple[Tensor, ...]]
    labels: Tensor | None

    @classmethod
    def of(cls, data: str, evaluation: str | None) -> Samples:
        """Return the data that two specifications name; without an evaluation, calibration data is held out for it.

        raises: DataError.
        """
        held_out = None if evaluation is None else open_data(evaluation)
        if held_out is not None:
            held_out.example()
        batches = list(open_data(data))
        if held_out is None:
            batches, held_out = _split(batches)
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return cls(held_out, [batch.inputs for batch in batches], torch.cat(labels) if labels else None)

    def held_out(self, samples: int) -> Iterator[tuple[Tensor, ...]]:
        """Yield the inputs of the first `samples` evaluation samples."""
        for batch in self.evaluation:
            yield tuple(x[:samples] for x in batch.inputs)
            samples -= len(batch)
            if samples <= 0:
                return


def _split(batches: list[Batch]) -> tuple[list[Batch], Data]:
    """Return the batches that calibrate, and the others, about a quarter, as evaluation data without labels.

    raises: DataError.
    """
    held_out = max(1, round(len(batches) * HELD_OUT))
    if held_out >= len(batches):
        raise DataError("calibration data of one batch cannot be split; give at least two batches.")
    return batches[:-held_out], open_data([(batch.inputs, None) for batch in batches[-held_out:]])


@dataclass(frozen=True, eq=False)
class Network:
    """A model and its folded graph, made when first needed."""

    spec: str
    model: Model
    samples: Samples

    @cached_property
    def graph(self) -> fx.GraphModule:
        graph = capture(self.model, self.samples.batches[0])
        if not graph.meta["dynamic_batch"]:
            raise InputError(f"{self.spec} fixes its batch size; this benchmark needs networks that take any.")
        return fold(graph)

    @cached_property
    def float_outputs(self) -> list[tuple[float, Outputs]]:
        """Checksum of the inputs and outputs of the folded float graph, per batch of the evaluation data."""
        with torch.no_grad():
            return [(checksum(batch), arrays(self.graph(*batch.inputs))) for batch in self.samples.evaluation]

    def scores(self, path: Path) -> Scores:
        """Return the scores of the file at `path` in onnxruntime, all optimisations on."""
        return score(self._compared(path))

    def latency_ratio(self, path: Path) -> float:
        """Return the time of the file at `path` over that of the float file: one sample, one thread, same rounds."""
        with tempfile.TemporaryDirectory() as folder:
            float_file = Path(folder) / "float.onnx"
            emit_float(self.graph, float_file)
            names = [info.name for info in session(float_file).get_inputs()]
            sample = {name: x[:1].numpy() for name, x in zip(names, self.samples.batches[0], strict=True)}
            ratio = latency({"float": float_file, "quantized": path}, sample).summary(batch=1).ratio
        assert ratio is not None  # both are timed
        return ratio

    def _compared(self, path: Path) -> Iterator[tuple[Outputs, Outputs, Array | None]]:
        runtime = session(path, optimized=True, threads=torch.get_num_threads())
        names = [info.name for info in runtime.get_inputs()]
        for batch, (known, exact) in zip(self.samples.evaluation, self.float_outputs, strict=True):
            if checksum(batch) != known:
                raise InputError(
                    f"{self.samples.evaluation.label} differs from pass to pass; fix its order and content."
                )
            found = runtime.run(None, {name: x.numpy() for name, x in zip(names, batch.inputs, strict=True)})
            yield exact, tuple(found), None if batch.labels is None else batch.labels.numpy()


def checksum(batch: Batch) -> float:
    """Return a number that tells a batch from another."""
    return sum(float(x.sum(dtype=torch.float64)) for x in batch.inputs)


def arrays(outputs: Any) -> Outputs:
    """Return what a graph gives, one array per output."""
    return tuple(output.numpy() for output in (outputs if isinstance(outputs, tuple | list) else (outputs,)))
