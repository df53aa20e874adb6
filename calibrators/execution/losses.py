"""Losses of the predictions of the quantized network against the float network or labels, sample by sample.

Must not know: graphs, quantization, methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from calibrators.errors import InputError
from calibrators.grid.metrics import LEAST_ENERGY, decibels, energy, mean_energy, relative_error
from calibrators.record import Reading

__all__ = [
    "OutputMetrics",
    "PredictionLoss",
    "cross_entropy",
    "is_logits",
    "kl_divergence",
    "prediction_loss",
]


def is_logits(output: Tensor) -> bool:
    """Return whether an output has the shape of logits, [n, classes]."""
    return output.ndim == 2 and output.shape[1] > 1


def kl_divergence(outputs: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(softmax(targets / T) || softmax(outputs / T)) of logits [n, classes], as [n]."""
    reference = torch.log_softmax(targets / temperature, -1)
    return (reference.exp() * (reference - torch.log_softmax(outputs / temperature, -1))).sum(-1)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log likelihood of labels [n] under logits [n, classes], as [n]."""
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


class PredictionLoss(Protocol):
    """Loss of consecutive samples."""

    def __call__(self, outputs: Sequence[Tensor], start: int) -> Tensor:
        """Return the loss of the samples from `start` on: outputs [n, ...] each, result float64 [n] on the CPU."""


def prediction_loss(
    name: str, floats: Sequence[Tensor], labels: Tensor | None = None, temperature: float = 1.0
) -> PredictionLoss:
    """Return the loss called `name`; "auto" is "kl" where every output is [samples, classes], else "mse".

    floats: outputs of the float network for all samples, [samples, ...] each.
    labels: int64 [samples], which "ce" needs.
    raises: InputError where the outputs or the labels do not fit the loss.
    """
    logits = all(map(is_logits, floats))
    if name == "auto":
        name = "kl" if logits else "mse"
    if name == "mse":
        return _MeanSquare(tuple(floats))
    if not logits or (name == "ce" and len(floats) != 1):
        shapes = ", ".join(str(["n", *y.shape[1:]]).replace("'", "") for y in floats)
        wanted = "one output" if name == "ce" else "outputs"
        raise InputError(
            f"loss {name!r} needs {wanted} of shape [n, classes], but the model returns {shapes}; use loss=mse."
        )
    if name == "kl":
        return _Divergence(tuple(y.double() for y in floats), temperature)
    if labels is None:
        raise InputError("loss 'ce' needs labels, but the calibration data has none; give labels, or use loss=kl.")
    classes = floats[0].shape[1]
    if len(labels) != len(floats[0]) or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(
            f"loss 'ce' needs one label from 0 to {classes - 1} for each of {len(floats[0])} samples, but there are "
            f"{len(labels)} labels from {int(labels.min())} to {int(labels.max())}; check them, or use loss=kl."
        )
    return _CrossEntropy(labels)


@dataclass(frozen=True, eq=False)
class _Divergence:
    floats: tuple[Tensor, ...]
    temperature: float

    def __call__(self, outputs: Sequence[Tensor], start: int) -> Tensor:
        pairs = zip(outputs, self.floats, strict=True)
        losses = [kl_divergence(y.cpu().double(), t[start : start + len(y)], self.temperature) for y, t in pairs]
        return torch.stack(losses).mean(0)


@dataclass(frozen=True, eq=False)
class _CrossEntropy:
    labels: Tensor

    def __call__(self, outputs: Sequence[Tensor], start: int) -> Tensor:
        (logits,) = outputs
        return cross_entropy(logits.cpu().double(), self.labels[start : start + len(logits)])


class _MeanSquare:
    def __init__(self, floats: tuple[Tensor, ...]) -> None:
        self.floats = floats
        self.energy = [mean_energy(y) for y in floats]

    def __call__(self, outputs: Sequence[Tensor], start: int) -> Tensor:
        triples = zip(outputs, self.floats, self.energy, strict=True)
        losses = [relative_error(y.cpu(), t[start : start + len(y)], e).double() for y, t, e in triples]
        return torch.stack(losses).mean(0)


class OutputMetrics:
    """A prediction loss that also collects the other numbers of a reading.

    floats: outputs of the float network for all samples, [samples, ...] each; labels: int64 [samples].
    """

    def __init__(self, floats: Sequence[Tensor], labels: Tensor | None) -> None:
        self.floats, self.labels = floats, labels
        self.energy = [max(energy(y), LEAST_ENERGY) for y in floats]
        self.loss_name: Literal["kl", "mse"] = "kl" if all(map(is_logits, floats)) else "mse"
        self.loss = prediction_loss(self.loss_name, floats)
        self.classes = floats[0].argmax(1) if is_logits(floats[0]) else None
        self.reset()

    def reset(self) -> None:
        """Begin another reading."""
        self.noise = [0.0] * len(self.floats)
        self.changed = self.hits = self.float_hits = self.seen = 0

    def __call__(self, outputs: Sequence[Tensor], start: int) -> Tensor:
        losses = self.loss(outputs, start)
        rows = slice(start, start + len(losses))
        made = [y.cpu() for y in outputs]
        for index, (y, t) in enumerate(zip(made, self.floats, strict=True)):
            self.noise[index] += energy(y - t[rows])
        self.seen += len(losses)
        if self.classes is not None:
            found, expected = made[0].argmax(1), self.classes[rows]
            self.changed += int((found != expected).sum())
            if self.labels is not None:
                self.hits += int((found == self.labels[rows]).sum())
                self.float_hits += int((expected == self.labels[rows]).sum())
        return losses

    def reading(self, loss: float) -> Reading:
        """Return the reading of the samples seen, with their mean loss."""
        noise = sum(n / e for n, e in zip(self.noise, self.energy, strict=True)) / len(self.noise)
        drop = None
        if self.classes is not None:
            lost = self.changed if self.labels is None else self.float_hits - self.hits
            drop = lost / self.seen
        return Reading(loss, decibels(1.0, noise) if noise else None, drop)
