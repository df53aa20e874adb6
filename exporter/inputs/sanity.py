"""Warnings about data that is legal but looks wrong: only the user knows what was meant.

Must not know: where data come from, quantization, ONNX.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from calibrators.errors import argument
from calibrators.execution.measure import Batch
from calibrators.graph.aten import bind, constant, is_constant, where
from calibrators.graph.walk import walk
from exporter.inputs.form import LEVELS, DataForm
from runtime_tests.measure.accuracy import RunningAccuracy

__all__ = ["calibration_warnings", "range_warnings", "scale_warning", "score_warnings", "split_warning"]

SPLITS = frozenset(
    ("train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev", "holdout")
)
"""Names of folders that hold parts of a data set rather than classes."""

FAR, SPREAD = 3.0, 4.0
"""Distance of means in deviations, and ratio of deviations, from which on two sets of values were prepared in different
ways. Images in 0..255 for a model that takes 0..1 are 255 times too wide; ImageNet's normalization moves means by about
2 deviations of the unnormalized values and widens them 4.4 times."""

CHANCE_SAMPLES, CERTAIN = 32, 2.0
"""Samples from which on a score is compared with chance, and the deviations within which it is near chance."""

PER_CLASS = 4
"""Samples per class from which on a class that never occurs is no accident."""


def split_warning(folder: str, names: Sequence[str]) -> str | None:
    """Return what is wrong with sub-folders that are parts of a data set; None for those that may be classes."""
    if len(names) > 1 and {name.lower() for name in names} <= SPLITS:
        return (
            f"the sub-folders of {folder} ({', '.join(names)}) look like parts of a data set, but each counts as a "
            f"class here: give one of them, for example {folder}/{names[0]}"
        )
    return None


def scale_warning(form: DataForm) -> str | None:
    """Return what is wrong with a mean or deviation of bytes; None for those that values in 0..1 may have."""
    found = {name: max(values) for name, values in (("mean", form.mean), ("std", form.std)) if values is not None}
    name = next((name for name, value in found.items() if value > 1), None)
    if name is None:
        return None
    return (
        f"{argument(name)} holds {found[name]:g}, but pixels are divided by {LEVELS:g} before it applies: divide mean "
        f"and deviation by {LEVELS:g} too if they are those of pixels in 0..{LEVELS:g}"
    )


def calibration_warnings(graph: fx.GraphModule, batch: Batch, label: str) -> Iterator[str]:
    """Yield what is suspicious in the first calibration batch: constant values, or values that no norm has seen.

    graph: as captured, with its batch norms.
    """
    named = list(zip(graph.meta["input_names"], batch, strict=True))
    for name, x in named:
        if x.is_floating_point() and x[0].numel() > 1 and float(x.min()) == float(x.max()):
            yield (
                f"input {name!r} of {label} holds the same value ({float(x.min()):g}) everywhere in the first batch, "
                "so that nothing can be learned from it: check how the data is read"
            )
        elif x.is_floating_point() and len(x) > 1 and bool((x == x[:1]).all()):
            yield f"all samples of input {name!r} in the first batch of {label} are equal: check how the data is read"
    found = _first_norm(graph, batch)
    if found is not None:
        node, distance, ratio = found
        if distance > FAR or not 1 / SPREAD <= ratio <= SPREAD:
            yield (
                f"the values that reach the first batch norm, {where(node)}, are not those that it saw in training: "
                f"their means are {distance:.2g} deviations away, and they spread {ratio:.2g} times as wide. Check "
                f"that {label} is prepared as in training (range 0..1 or 0..255, {argument('mean')}, "
                f"{argument('std')}, order of channels)"
            )


def _first_norm(graph: fx.GraphModule, batch: Batch) -> tuple[fx.Node, float, float] | None:
    """Return the first batch norm with statistics, and how far its input is from them: in deviations, and as a ratio.

    Both are medians over channels, for single channels may well differ.
    """
    with torch.no_grad():
        for node, values in walk(graph, batch):
            if node.target is not torch.ops.aten.batch_norm.default:
                continue
            x, mean, variance = (bind(node)[name] for name in ("input", "running_mean", "running_var"))
            if not (is_constant(mean) and is_constant(variance)):
                return None
            known = constant(graph, mean).double(), constant(graph, variance).double()
            trained = bool(known[0].any()) or bool((known[1] != 1).any())
            rows = values[x].double().transpose(0, 1).flatten(1) if x in values else None
            if not trained or rows is None or rows.shape[1] < 2:
                return None
            deviation = known[1].sqrt().clamp(min=1e-12)
            distance = ((rows.mean(1) - known[0]).abs() / deviation).median()
            return node, float(distance), float((rows.std(1) / deviation).median())
    return None


def range_warnings(names: Sequence[str], calibration: Batch, evaluation: Batch) -> Iterator[str]:
    """Yield the inputs whose calibration and evaluation values were prepared in different ways."""
    for name, x, y in zip(names, calibration, evaluation, strict=True):
        if not x.is_floating_point() or x.numel() < 2 or y.numel() < 2:
            continue
        (a, spread), (b, other) = _moments(x), _moments(y)
        wider = max(spread, other)
        ratio = wider / max(min(spread, other), 1e-12)
        if wider and (ratio > SPREAD or abs(a - b) > FAR * wider):
            yield (
                f"input {name!r} is {_range(x)} in calibration and {_range(y)} in evaluation (first batches): prepare "
                "both in the same way"
            )


def _moments(x: Tensor) -> tuple[float, float]:
    values = x.double()
    return float(values.mean()), float(values.std())


def _range(x: Tensor) -> str:
    mean, deviation = _moments(x)
    return f"{mean:.3g} +- {deviation:.3g}, from {float(x.min()):.3g} to {float(x.max()):.3g},"


def score_warnings(accuracy: RunningAccuracy) -> Iterator[str]:
    """Yield what is suspicious in the scores of the float model on labelled data."""
    if not accuracy.labelled or not accuracy.classes or accuracy.samples < CHANCE_SAMPLES:
        return
    classes, share = accuracy.classes, accuracy.value("float") or 0.0
    chance = 1 / classes
    if share <= chance + CERTAIN * math.sqrt(chance * (1 - chance) / accuracy.samples):
        yield (
            f"the float model itself is right for {share:.1%} of {accuracy.samples} samples, and chance for "
            f"{chance:.1%}: check the weights, the preparation of the data and the order of the classes"
        )
    if accuracy.highest + 1 < classes and accuracy.samples >= PER_CLASS * classes:
        yield (
            f"the labels of {argument('eval_data')} are 0..{accuracy.highest} in {accuracy.samples} samples, but the "
            "model has "
            f"{classes} outputs: check that both count the same classes"
        )
