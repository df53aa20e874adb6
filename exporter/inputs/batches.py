"""Batches as a graph takes them: named, of the batch size that it fixes, and checked before any work.

Must not know: where data come from, quantization, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.errors import DataError, InputError, argument, counted, no_file
from calibrators.execution.losses import is_logits
from calibrators.execution.measure import Batch
from calibrators.graph.aten import batch_of
from exporter.frontend.lookups import check_indices, lookups_of
from exporter.inputs.data import Data
from exporter.inputs.metric import Metric, joined
from runtime_tests.measure.metric import arguments_of

__all__ = ["GraphBatches", "check_evaluation", "check_metric", "class_names", "cut", "feed"]


class GraphBatches:
    """The batches of `data` for `graph`; each pass reads the data again.

    Where the graph fixes its batch size, samples are regrouped to it; an incomplete last batch is dropped.

    samples: number of samples in the longest pass so far; dropped: of those that the last complete pass left out.
    given:   the labels of the last pass, as the data gives them, batch by batch; empty unless they are to be kept.
    """

    def __init__(self, graph: fx.GraphModule, data: Data, *, keeps_labels: bool = False) -> None:
        self.graph, self.data = graph, data if data.names else data.named(graph.meta["input_names"])
        self.samples = self.dropped = 0
        self.keeps_labels, self.given = keeps_labels, list[Any]()
        self.lookups = lookups_of(graph.graph, graph.graph.find_nodes(op="placeholder"))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the passes so far."""
        last = counted(self.dropped, "sample")
        text = f"{self.data.label}: what is over is not used ({last}), because the model has a fixed batch"
        return (*self.data.notes, text) if self.dropped else self.data.notes

    def __iter__(self) -> Iterator[Batch]:
        return (inputs for inputs, _ in self.labelled())

    def labelled(self) -> Iterator[tuple[Batch, Any]]:
        """Yield the inputs of each batch and its labels, an array, or None where there are none.

        raises: DataError for indices beyond a table of the graph, and what the data raise.
        """
        rest: tuple[Tensor, ...] = ()
        samples = 0
        self.given = []
        for batch in self.data:
            if self.keeps_labels:
                self.given.append(batch.given)
            check_indices(self.lookups, batch.inputs, self.graph.meta["input_names"])
            values = batch.inputs if batch.labels is None else (*batch.inputs, batch.labels)
            if rest:
                values = tuple(torch.cat(pair) for pair in zip(rest, values, strict=True))
            size = batch_of(self.graph, len(values[0]))
            for start in range(0, len(values[0]) - size + 1, size):
                part = tuple(x[start : start + size] for x in values)
                samples += size
                self.samples = max(self.samples, samples)
                inputs, labels = part[: len(batch.inputs)], part[len(batch.inputs) :]
                yield inputs, labels[0].numpy() if labels else None
            rest = tuple(x[len(x) // size * size :] for x in values) if len(values[0]) % size else ()
        self.dropped = len(rest[0]) if rest else 0


def cut(graph: fx.GraphModule, batch: Batch, samples: int = 1) -> Batch:
    """Return the first samples of a batch, or the batch itself where the graph fixes its size."""
    return tuple(x[:samples] for x in batch) if graph.meta["dynamic_batch"] else batch


def feed(graph: fx.GraphModule, batch: Batch) -> dict[str, Any]:
    """Return a batch as arrays by input name."""
    return {name: x.numpy() for name, x in zip(graph.meta["input_names"], batch, strict=True)}


def check_metric(graph: fx.GraphModule, evaluation: Data, metric: Metric) -> None:
    """Call the metric on the first batch, so that its errors come before the work.

    raises: DataError.
    """
    batch = evaluation.example()
    size = batch_of(graph, len(batch))
    if size <= len(batch):
        with torch.no_grad():
            outputs = [y.numpy() for y in graph(*(x[:size] for x in batch.inputs))]
        metric(arguments_of(graph.meta["output_names"], outputs), joined([batch.given], size))


def class_names(file: str | None, sources: Iterable[Data], graph: fx.GraphModule) -> tuple[str, ...] | None:
    """Return the names of the classes of the first output: those of a file, else of the first source that has as many.

    raises: InputError for a file that cannot be read or names another number of classes.
    """
    with torch.no_grad():
        output = graph(*graph.meta["example"])[0]
    count = output.shape[1] if is_logits(output) else None
    if file is None:
        return next((each.classes for each in sources if len(each.classes) == count), None)
    if not Path(file).is_file():
        raise InputError(f"labels {no_file(Path(file))}")
    try:
        names = tuple(Path(file).read_text(encoding="utf-8").rstrip().split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is no readable text: {error}; give the names of the classes, one a line.") from error
    if count not in (None, len(names)):
        raise InputError(f"{file} names {len(names)} classes, but the model has {count}; give one name a line.")
    return names


def check_evaluation(graph: fx.GraphModule, calibration: Data, evaluation: Data, name: str = "eval_data") -> None:
    """Refuse evaluation data that the model cannot take, judged by its first batch; name: of the argument that gave it.

    raises: DataError if inputs have another form than in calibration, or labels name classes that do not exist.
    """
    ours, theirs = calibration.example(), evaluation.example()
    if len(ours.inputs) != len(theirs.inputs):
        raise DataError(
            f"{argument(name)} has {counted(len(theirs.inputs), 'input')} and {argument('data')} {len(ours.inputs)}; "
            "give all that the model "
            f"takes: {', '.join(graph.meta['input_names'])}."
        )
    for slot, x, y in zip(graph.meta["input_names"], ours.inputs, theirs.inputs, strict=True):
        free = graph.meta["free_axes"].get(slot, {})
        sizes = [(a, b) for axis, (a, b) in enumerate(zip(x.shape, y.shape, strict=False)) if axis and axis not in free]
        if x.dtype != y.dtype or x.ndim != y.ndim or any(a != b for a, b in sizes):
            forms = [f"{['n', *t.shape[1:]]} {str(t.dtype)[6:]}".replace("'", "") for t in (x, y)]
            raise DataError(
                f"input {slot!r} is {forms[0]} in {argument('data')} and {forms[1]} in {argument(name)}; give both "
                "the same shape and type."
            )
    if theirs.labels is None:
        return
    with torch.no_grad():
        output = graph(*graph.meta["example"])[0]
    highest = max(int(theirs.labels.max()), len(evaluation.classes) - 1)
    if is_logits(output) and highest >= output.shape[1]:
        raise DataError(
            f"labels of {argument('eval_data')} hold {highest}, but the model has classes 0..{output.shape[1] - 1}; "
            "check the labels."
        )
    if is_logits(output) and 0 < len(evaluation.classes) < output.shape[1]:
        evaluation.noted(
            f"{evaluation.label} has {len(evaluation.classes)} class folders, but the model has {output.shape[1]} "
            "outputs: check that both count the same classes in the same order"
        )
