"""Calibrate a graph as the settings of an export say.

Must not know: ONNX, bundles, reports.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.calibration import calibrate
from calibrators.errors import InputError, argument, counted, first_line
from calibrators.execution.measure import Batch
from calibrators.execution.ranks import ALONE, Ranks
from calibrators.execution.shared import Shared
from calibrators.execution.task import Kept
from calibrators.goal import Goal
from calibrators.mixed_precision.ilp import Stored
from calibrators.mixed_precision.mixed import check_budgets
from calibrators.placement.place import Placement
from calibrators.program.freeze import CalibrationResult
from exporter.config import ExportConfig
from exporter.emission.packing import stored_bytes
from exporter.inputs.batches import GraphBatches
from exporter.resume import kept_statistics

__all__ = ["calibrated", "calibration_notes", "check_budget"]


def calibrated(  # noqa: PLR0913 (what steps of an export pass on)
    graph: fx.GraphModule,
    batches: GraphBatches,
    config: ExportConfig,
    stage: Callable[..., Any],
    kept: Kept | None = None,
    goal: Goal | None = None,
    shared: Shared | None = None,
    ranks: Ranks = ALONE,
) -> CalibrationResult:
    """Calibrate the folded graph.

    stage:  opens a bar of the progress.
    kept:   where finished units are kept.
    goal:   what the gates on accuracy ask for.
    shared: what exports for other targets found.
    ranks:  the processes that do it together.
    raises: InputError where a disk or an accelerator is full, and what calibrators.calibration.calibrate raises.
    """
    with _out_of_space(config):
        data, labels = _labelled(batches)
        return calibrate(
            graph,
            data,
            method=config.method,
            options=config.options,
            target=config.target,
            placement=config,
            prepare=config.prepare,
            bias_correction=config.bias_correction,
            labels=labels,
            seed=config.seed,
            device=config.device,
            cache_gib=config.cache_gib,
            explain=config.explain,
            sensitivity=config.sensitivity,
            budgets=config.budget,
            stored=_stored(config),
            stage=stage,
            kept=kept,
            seen=kept_statistics(batches, config),
            shared=shared,
            goal=goal,
            ranks=ranks,
        )


def check_budget(placement: Placement, config: ExportConfig) -> None:
    """Raise InputError for a budget of size that no bits of a placed network keep."""
    check_budgets(placement, config, config.budget, _stored(config))


def _stored(config: ExportConfig) -> Stored:
    return partial(stored_bytes, storage=config.weight_storage, min_ort=config.min_ort)


def calibration_notes(result: CalibrationResult) -> list[str]:
    """Return notes for the user on a calibration."""
    notes = [*result.placement.notes, *result.record.notes]
    if wide := [site for site in result.placement.sites if site.spec.tap_bits]:
        notes.append(
            f"the identity taps of {counted(len(wide), 'kernel')} keep {wide[0].spec.tap_bits} bits, "
            f"because fewer cannot hold them ({wide[0].name}, ...); {argument('wide_taps', False)} gives all taps "
            "the same bits"
        )
    return notes


def _labelled(batches: GraphBatches) -> tuple[Iterable[Batch], Tensor | None]:
    """Return the calibration batches, and labels where they are needed: from one pass, as data may be shuffled."""
    if batches.data.labels != "needed":
        return batches, None
    pairs = list(batches.labelled())
    return [batch for batch, _ in pairs], torch.cat([torch.from_numpy(labels) for _, labels in pairs])


@contextmanager
def _out_of_space(config: ExportConfig) -> Iterator[None]:
    """Turn a full disk or accelerator into an InputError that says what to change."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{error.strerror}: {tempfile.gettempdir()} cannot hold the activations that do not fit into "
            f"{config.cache_gib:g} GiB of memory; free space there, set TMPDIR to another disk, raise "
            f"{argument('cache_gib')}, or "
            "use fewer calibration samples."
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"device {config.device!r} has too little memory ({first_line(error)}); use smaller "
            f"batches ({argument('options', {'batch': 8})}) or {argument('device', 'cpu')}."
        ) from error
