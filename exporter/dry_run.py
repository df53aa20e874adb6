"""Tell in advance what an export would do: folds, placement, size, refusals, and roughly its time and memory.

The network is captured, folded, calibrated on one batch by ranges alone, and emitted into a temporary folder, so that
whatever cannot be exported is refused as in a real run. All data are read once.

Must not know: the command line, bundles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibrators.allocator import keep_freed_memory
from calibrators.errors import argument
from calibrators.graph.aten import shape_of
from calibrators.methods import RangeMethod, get_method
from calibrators.program.freeze import CalibrationResult
from calibrators.temporary import TemporaryFolder
from exporter.config import ExportConfig, make_config, takes_settings
from exporter.handover.bundle import check_out
from exporter.inputs.batches import GraphBatches, feed
from exporter.intake import Network, open_order, take_in
from exporter.pipeline import Work
from exporter.progress import Progress, default_progress
from exporter.reporting.forecast import Forecast
from exporter.reporting.schema import Bits, Times
from exporter.resume import check_apart
from exporter.run_calibrators import calibrated, calibration_notes, check_budget
from runtime_tests.measure.size import size_of
from runtime_tests.ort.coverage import coverage

__all__ = ["dry_run", "seconds_per_sample"]

QUICK: dict[str, Any] = {
    "method": "minmax",
    "options": {},
    "budget": (),
    "sensitivity": False,
    "explain": False,
    "resume": False,
    "cache": None,
}
"""Settings of the trial calibration: what is left out needs time and refuses nothing."""

EVALUATION, COMPARISON = 5.0, 14.0
"""Effort of the proof for a sample that is evaluated, and further effort for one whose integers are compared, in passes
of the float network (benchmarks/estimates.py)."""

KEPT = 3
"""Copies of the largest activation that methods which go through the network layer by layer keep for each sample."""

SHORTEST = 0.2
"""Seconds for which the float network is timed at least."""

SEARCHES = ("budget", "sensitivity", "explain")
"""Settings whose time is not estimated."""


@takes_settings
def dry_run(
    model: nn.Module | torch.export.ExportedProgram | str,
    data: Iterable[Any] | str,
    *,
    out: str | Path | None = None,
    eval_data: Iterable[Any] | str | None = None,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    config: ExportConfig | None = None,
    progress: Progress | None = None,
    metric: str | Callable[[Any, Any], float] | None = None,
    source: str = "",
    overwrite: bool = False,
    **settings: Any,
) -> Forecast:
    """Return what exporter.export would do with the same arguments; nothing is written.

    raises: what exporter.export raises before it calibrates, and what emission raises.
    """
    keep_freed_memory()
    config, progress = config or make_config(settings), progress or default_progress()
    order = open_order(
        model, data, eval_data, checkpoint, checkpoint_key, config=config, metric=metric, source=source
    )  # fmt: skip
    if out is not None:
        check_apart(Path(out), order.config)
        check_out(Path(out), overwrite=overwrite)
    torch.manual_seed(order.config.seed)
    with TemporaryFolder() as folder:
        work = Work(order, progress, folder)
        network = take_in(order, work.steps)
        samples = _samples(network.batches, progress), _samples(network.held_out, progress)
        once = seconds_per_sample(network)
        trial = calibrated(
            network.folded, GraphBatches(network.graph, order.calibration.take(1)),
            order.config.model_copy(update=QUICK), progress.stage,
        )  # fmt: skip
        check_budget(trial.placement, order.config)
        _, result, _, _ = work.emitted(network, trial)
        notes = [*network.graph.meta["notes"], *work.warnings, *network.warnings, *calibration_notes(trial)]
        searches = [argument(name) for name in SEARCHES if getattr(order.config, name)]
        notes += [f"the estimate leaves out the time of {' and '.join(searches)}"] if searches else []
        return Forecast(
            target=order.config.target,
            method=order.config.method,
            bits=Bits(order.config.weight_bits, order.config.activation_bits),
            fold=trial.placement.graph.meta["fold"],
            coverage=coverage(work.model, sample=feed(result.program, result.program.meta["example"])),
            size=size_of(work.folder / "model.onnx", work.float_path, work.lowered),
            samples=samples,
            time_s=Times(**work.steps.times | _estimated(order.config, samples, once)),
            memory=_memory(order.config, trial, samples[0]),
            warnings=tuple(dict.fromkeys([*notes, *(text for each in network.data for text in each.notes)])),
        )


def seconds_per_sample(network: Network) -> float:
    """Return the CPU seconds that the folded float network takes for a sample, from its second batch on."""
    batch = next(iter(network.batches))
    with torch.no_grad():
        network.folded(*batch)
        start, passes = time.process_time(), 0
        while not passes or time.process_time() - start < SHORTEST:
            network.folded(*batch)
            passes += 1
    return (time.process_time() - start) / passes / len(batch[0])


def _samples(batches: GraphBatches | None, progress: Progress) -> int:
    """Return the number of samples of data, which are all read."""
    if batches is None:
        return 0
    with progress.stage(f"read {batches.data.label}") as bar:
        for _ in batches:
            bar.advance()
    return batches.samples


def _estimated(config: ExportConfig, samples: tuple[int, int], once: float) -> dict[str, float]:
    """Return the seconds of calibration and proof."""
    calibration, evaluation = samples
    effort = get_method(config.method, config.options).effort(calibration)
    compared = min(config.parity_samples, evaluation or calibration)
    each = once / torch.get_num_threads()
    return {"calibrate": effort * each, "validate": (EVALUATION * evaluation + COMPARISON * compared) * each}


def _memory(config: ExportConfig, trial: CalibrationResult, samples: int) -> int | None:
    """Return the bytes at the peak: those of the trial so far, and the activations that the method keeps."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        so_far = 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
        if isinstance(get_method(config.method, config.options), RangeMethod):
            return so_far
        nodes, read = trial.placement.graph.graph.nodes, trial.placement.activation_of
        shapes = [shape_of(node) for node in nodes if node.name in read]
        largest = max((4 * math.prod(shape[1:]) for shape in shapes), default=0)
        return so_far + min(int(config.cache_gib * 2**30), KEPT * largest * samples)
    return None
