"""Inputs of the golden set that show nothing of the user's data, since bundles go to others: noise, or those of a file.

Must not know: the proof, bundles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from calibrators.errors import DataError, InputError, argument, no_file
from calibrators.execution.measure import Batch
from calibrators.graph.aten import batch_of
from calibrators.program.freeze import CalibrationResult
from exporter.inputs.batches import GraphBatches, cut
from exporter.inputs.open import open_data
from exporter.inputs.raw import RawInputs

__all__ = [
    "GOLDEN_SAMPLES",
    "check_golden",
    "check_outputs",
    "digest_of",
    "golden_file",
    "golden_inputs",
    "origin_of",
    "synthetic",
]

SAMPLES, SYNTHETIC = "samples", "synthetic"
GOLDEN_SAMPLES = 4
"""Samples of a golden set that is not a file."""

LARGEST_SET = 64
"""Samples of a file that are kept: the reference runs them at once."""

COARSEST = 3
"""Samples take turns with blocks of 1, 2, 4 and 8 elements along each axis after the channels."""

Limits = tuple[float, float]


def check_golden(setting: str) -> None:
    """Raise InputError unless a setting names inputs of a golden set."""
    if setting in (SAMPLES, SYNTHETIC):
        return
    if not setting.endswith(".npz"):
        raise InputError(f"golden is {setting!r}; give {SAMPLES}, {SYNTHETIC} or the name of an .npz file.")
    if not Path(setting).is_file():
        raise InputError(f"golden {no_file(Path(setting))}")


def golden_file(setting: str, graph: fx.GraphModule, raws: RawInputs) -> GraphBatches | None:
    """Return the data of the file that a setting names, None if it names none."""
    if setting in (SAMPLES, SYNTHETIC):
        return None
    return GraphBatches(graph, raws.as_values(open_data(Path(setting)).without_labels().named(raws.names)))


def origin_of(setting: str, label: str) -> str:
    """Return in words where golden inputs come from; label: of the data whose first samples are taken."""
    return {SAMPLES: f"first samples of {label}", SYNTHETIC: "synthetic noise within the calibrated ranges"}.get(
        setting, setting
    )


def golden_inputs(
    setting: str, result: CalibrationResult, batches: GraphBatches, given: GraphBatches | None, seed: int
) -> Batch | None:
    """Return the inputs of the golden set; None for the first samples.

    Otherwise the program's example, which bundles hold too, is replaced by noise.

    batches: the calibration data; given: the data of the file that the setting names, if it names one.
    """
    if setting == SAMPLES:
        return None
    program, example = result.program, result.program.meta["example"]
    limits = _limits(result, next(iter(batches)))
    program.meta["example"] = synthetic(example, limits, seed)
    if given is not None:
        return cut(program, next(iter(given)), LARGEST_SET)
    count = batch_of(program, GOLDEN_SAMPLES)
    return synthetic([x.new_empty(count, *x.shape[1:]) if x.ndim else x for x in example], limits, seed)


def check_outputs(outputs: Sequence[Tensor]) -> None:
    """Raise DataError if an output for the golden inputs is not a number, as that compares with nothing."""
    if any(bool(y.isnan().any()) for y in outputs):
        raise DataError(
            f"an output for the golden inputs is not a number; give others with {argument('golden', 'FILE.npz')}."
        )


def _limits(result: CalibrationResult, batch: Batch) -> list[Limits]:
    """Return the ends of the calibrated range of each input; of integers and float inputs those of a batch."""
    found = [(float(x.min()), float(x.max())) if x.numel() else (0.0, 0.0) for x in batch]
    placement = result.placement
    for index, node in enumerate(placement.graph.graph.find_nodes(op="placeholder")):
        site = placement.activation_of.get(node.name)
        if site is not None and batch[index].is_floating_point():
            qparams = result.qparams_of(site)
            low, high = (qparams.scale * (code - qparams.zero_point) for code in (site.spec.qmin, site.spec.qmax))
            found[index] = float(low), float(high)
    return found


def synthetic(like: Sequence[Tensor], limits: Sequence[Limits], seed: int) -> tuple[Tensor, ...]:
    """Return inputs with the shapes [n, ...] and types of others: the same for the same seed, on every machine.

    Floats are noise, uniform between the limits; on images it is coarser from sample to sample, because convolutions
    average fine noise away, so that deep layers would see the middle of their ranges only. Integers, which may be
    indices, are uniform between the limits, both included.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(_noise(x, *ends, generator) for x, ends in zip(like, limits, strict=True))


def _noise(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.randint(int(low), int(high) + 1, like.shape, generator=generator).to(like.dtype)
    uniform = torch.rand(like.shape, generator=generator)
    for number, sample in enumerate(uniform if like.ndim > 2 else ()):
        for axis in range(1, sample.ndim):
            size, block = sample.shape[axis], 2 ** (number % (COARSEST + 1))
            sample.copy_(sample.index_select(axis, torch.arange(size) // block))
    return (low + (high - low) * uniform).to(like.dtype)


def digest_of(inputs: Sequence[Tensor]) -> str:
    """Return the sha256 of inputs: of their types, shapes and values."""
    found = hashlib.sha256()
    for x in inputs:
        found.update(f"{x.dtype}{list(x.shape)}".encode() + x.numpy(force=True).tobytes())
    return found.hexdigest()
