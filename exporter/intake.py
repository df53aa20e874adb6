"""Open what an export is asked for, check it, and bring the network into the form that is calibrated.

Must not know: calibration, how files are emitted, bundles.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from calibrators.execution.ranks import ALONE, Ranks
from calibrators.execution.shared import Shared
from calibrators.graph.aten import copy_graph
from calibrators.targets import get_target
from exporter.checks import adapted, check_settings, checked_data
from exporter.comparing.compare import Export, read_export
from exporter.config import ExportConfig
from exporter.emission.raw_ends import input_grids
from exporter.folding.fold_regions import fold
from exporter.frontend.calling import input_names, optional_inputs, tensor_names
from exporter.frontend.capture import capture
from exporter.frontend.declared import other_size
from exporter.frontend.load import load_model
from exporter.inputs.batches import GraphBatches, check_evaluation, check_metric, class_names
from exporter.inputs.data import Data
from exporter.inputs.golden import golden_file
from exporter.inputs.metric import Metric, load_metric
from exporter.inputs.open import check_takes_integers, open_both
from exporter.inputs.raw import RawInputs, parse_coded
from exporter.inputs.sanity import calibration_warnings, range_warnings, scale_warning
from exporter.progress import Bar, Progress
from exporter.reporting.gates import Gate
from exporter.reporting.interface import Images, images_of
from exporter.verify import gates_of

__all__ = ["Network", "Order", "Steps", "for_targets", "open_order", "take_in"]


class Steps:
    """The steps of an export: a bar for each, and their times in seconds."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.times = dict.fromkeys(("capture", "fold", "calibrate", "emit", "validate"), 0.0)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of the body to the step `name`."""
        start = time.perf_counter()
        yield
        self.times[name] += time.perf_counter() - start

    @contextmanager
    def shown(self, name: str, title: str | None = None) -> Iterator[Bar]:
        """Show a bar too."""
        with self.timed(name), self.progress.stage(title or name) as bar:
            yield bar


@dataclass(frozen=True, eq=False, kw_only=True)
class Captured:
    """A captured network, the same network folded, and what its calibrations share: for many targets."""

    graph: fx.GraphModule
    folded: fx.GraphModule
    shared: Shared = field(default_factory=Shared)


@dataclass(frozen=True, eq=False, kw_only=True)
class Order:
    """The parts of an export, opened and checked as far as the network need not be captured.

    notes, warnings: what to tell the user about the model, and about the target.
    ranks: the processes that carry it out together; the first writes.
    captures: captured networks by whether their batch is free, for exports of one network to many targets.
    """

    model: nn.Module | torch.export.ExportedProgram
    source: str
    calibration: Data
    evaluation: Data | None
    config: ExportConfig
    gates: list[Gate]
    baseline: Export | None
    metric: Metric | None
    raws: RawInputs
    notes: list[str]
    warnings: tuple[str, ...]
    ranks: Ranks = ALONE
    checkpoint: Path | None = None
    checkpoint_key: str | None = None
    captures: dict[bool, Captured] | None = None

    @property
    def free_batch(self) -> bool:
        """Whether the batch of the network is captured as a free size."""
        return not get_target(self.config.target).static_shapes


@dataclass(frozen=True, eq=False, kw_only=True)
class Network:
    """A captured network, and the same network folded, with the data that they take.

    golden:   data of the golden set, where a file gives it.
    coded:    outputs that the file gives as codes.
    shared:   what its calibrations for several targets share.
    warnings: what to tell the user.
    """

    graph: fx.GraphModule
    folded: fx.GraphModule
    batches: GraphBatches
    held_out: GraphBatches | None
    golden: GraphBatches | None
    raws: RawInputs
    coded: frozenset[str]
    labels: tuple[str, ...] | None
    images: Images | None
    shared: Shared | None
    warnings: list[str] = field(default_factory=list)

    @property
    def data(self) -> list[GraphBatches]:
        """All data there are."""
        return [each for each in (self.batches, self.held_out, self.golden) if each is not None]


def open_order(  # noqa: PLR0913 (the arguments of an export)
    model: nn.Module | torch.export.ExportedProgram | str,
    data: Iterable[Any] | str,
    eval_data: Iterable[Any] | str | None,
    checkpoint: Path | None,
    checkpoint_key: str | None,
    *,
    config: ExportConfig,
    metric: str | Callable[[Any, Any], float] | None,
    source: str,
    ranks: Ranks = ALONE,
) -> Order:
    """Open and check everything that an export is given; the arguments are those of exporter.pipeline.export.

    raises: InputError.
    """
    measure = load_metric(metric or config.metric)
    if measure is not None and config.metric is None:
        config = config.model_copy(update={"metric": metric if isinstance(metric, str) else measure.name})
    config, warnings, gates = _meant(config, ranks)
    baseline = read_export(Path(config.baseline)) if config.baseline is not None else None
    given, evaluation = open_both(data, eval_data, config)
    notes: list[str] = []
    if isinstance(model, str):
        source, model = model, load_model(model, checkpoint, key=checkpoint_key, note=notes.append)
    names, optional = input_names(model), optional_inputs(model)
    given, evaluation = given.named(names, optional), evaluation and evaluation.named(names, optional)
    calibration, evaluation = checked_data(given, evaluation, config, gates)
    example = calibration.example()
    raws = RawInputs.of(config.input, tensor_names(model, len(example.inputs), example.form), config)
    if raws:
        calibration.noted(scale_warning(config))
    return Order(
        model=model,
        source=source,
        calibration=raws.as_values(calibration),
        evaluation=evaluation and raws.as_values(evaluation),
        config=config,
        gates=gates,
        baseline=baseline,
        metric=measure,
        raws=raws,
        notes=notes,
        warnings=warnings,
        ranks=ranks,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
    )


def for_targets(order: Order, configs: Iterable[ExportConfig]) -> list[Order]:
    """Return what was opened once as an order for each of some settings, which differ in the target alone.

    The orders share what they capture and calibrate.

    raises: InputError.
    """
    captures: dict[bool, Captured] = {}
    found = []
    for config in configs:
        mine, warnings, gates = _meant(config.model_copy(update={"metric": order.config.metric}))
        found.append(replace(order, config=mine, warnings=warnings, gates=gates, captures=captures))
    return found


def _meant(config: ExportConfig, ranks: Ranks = ALONE) -> tuple[ExportConfig, tuple[str, ...], list[Gate]]:
    """Return the settings as their target needs them, warnings about it, and the gates.

    raises: InputError.
    """
    check_settings(config, ranks)
    config, warnings = adapted(config)
    return config, warnings, gates_of(config.gates, config.proving_runtimes)


def take_in(order: Order, steps: Steps) -> Network:
    """Capture and fold the network, and check the data against it.

    raises: InputError, ExportError.
    """
    config, example, notes = order.config, order.calibration.example(), list[str]()
    if isinstance(order.model, nn.Module):
        check_takes_integers(order.model, example, order.calibration.label)
        notes += [text] if (text := other_size(order.model, example.inputs)) else []
    known = order.captures.get(order.free_batch) if order.captures is not None else None
    graph = copy_graph(known.graph) if known is not None else _captured(order, steps)
    raws = order.raws.renamed(graph.meta["input_names"])
    batches = GraphBatches(graph, order.calibration)
    evaluation, keeps = order.evaluation, order.metric is not None
    held_out = None if evaluation is None else GraphBatches(graph, evaluation, keeps_labels=keeps)
    golden = golden_file(config.golden, graph, raws)
    sources = [each.data for each in (held_out, batches) if each is not None]
    labels = class_names(config.labels, sources, graph)
    notes += _checked(graph, batches, held_out, golden, order.metric)
    coded = parse_coded(config.output, graph.meta["output_names"])
    if known is None:
        with steps.shown("fold"):
            folded = fold(graph)
        if order.captures is not None:
            known = order.captures[order.free_batch] = Captured(graph=copy_graph(graph), folded=copy_graph(folded))
    else:
        folded = copy_graph(known.folded)
    folded.meta |= {"coded_outputs": coded, "input_grids": input_grids(folded, raws)}
    return Network(
        graph=graph,
        folded=folded,
        batches=batches,
        held_out=held_out,
        golden=golden,
        raws=raws,
        coded=coded,
        labels=labels,
        images=images_of(next((x.form for x in sources if x.form), None), raws.by_name),
        shared=known.shared if known is not None else None,
        warnings=notes,
    )


def _captured(order: Order, steps: Steps) -> fx.GraphModule:
    example = order.calibration.example()
    with steps.shown("capture"):
        return capture(
            order.model, example.inputs, form=example.form, free_batch=order.free_batch, axes=order.config.free_axes
        )


def _checked(
    graph: fx.GraphModule,
    batches: GraphBatches,
    held_out: GraphBatches | None,
    golden: GraphBatches | None,
    metric: Metric | None,
) -> list[str]:
    """Refuse data that the model cannot take; return warnings about data that look wrong."""
    first = next(iter(batches), None)
    warnings = [] if first is None else [*calibration_warnings(graph, first, batches.data.label)]
    if golden is not None:
        check_evaluation(graph, batches.data, golden.data, "golden")
    if held_out is not None:
        check_evaluation(graph, batches.data, held_out.data)
        pair = (data.example().inputs for data in (batches.data, held_out.data))
        warnings += range_warnings(graph.meta["input_names"], *pair)
        if metric is not None:
            check_metric(graph, held_out.data, metric)
    return warnings
