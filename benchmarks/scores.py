"""Scores of a quantized network against the float network on the same samples, with intervals paired by sample.

Must not know: where outputs come from, methods, files.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

Array = NDArray[Any]
Outputs = tuple[Array, ...]
"""The outputs of a network for one batch, [n, ...] each."""


@dataclass(frozen=True, eq=False)
class PerSample:
    """The scores of every sample that later comparisons need.

    kl:   [n] float32, nats; None where no output has classes.
    gain: [n], 1 where only this network decides as the label says, -1 where only the float one does, else 0; None
          without labels.
    """

    kl: Array | None
    gain: Array | None


@dataclass(frozen=True, eq=False)
class Scores:
    """One network against the float network on all samples.

    float_top1, top1: shares of the samples; None without labels or where the first output is not [n, classes].
    agreement:        share of the decisions that are those of the float network; None where no output has classes.
    noise:            energy of the difference divided by that of the float outputs.
    """

    float_top1: float | None
    top1: float | None
    agreement: float | None
    noise: float
    per_sample: PerSample


def score(batches: Iterable[tuple[Outputs, Outputs, Array | None]]) -> Scores:
    """Return the scores of all batches: outputs of the float network, outputs of the other one, labels.

    Outputs that are not floats are left out. An output has classes where its last axis is longer than one; every
    position before that axis is a decision. The divergence of a sample is the mean over the decisions of an output, and
    over the outputs.
    """
    kls: list[Array] = []
    hits: list[tuple[Array, Array]] = []
    signal = noise = 0.0
    agreed = decisions = 0
    for exact, found, labels in batches:
        pairs = [
            (p.astype(np.float64), q.astype(np.float64)) for p, q in zip(exact, found, strict=True) if _is_float(p)
        ]
        signal += sum(float(np.sum(p**2)) for p, _ in pairs)
        noise += sum(float(np.sum((q - p) ** 2)) for p, q in pairs)
        classes = [(p, q) for p, q in pairs if p.ndim > 1 and p.shape[-1] > 1]
        if classes:
            kls.append(np.mean([divergence(p, q) for p, q in classes], axis=0))
        for p, q in classes:
            agreed += int(np.sum(p.argmax(-1) == q.argmax(-1)))
            decisions += p[..., 0].size
        if labels is not None and exact[0].ndim == 2 and exact[0].shape[1] > 1:
            hits.append((exact[0].argmax(1) == labels, found[0].argmax(1) == labels))
    before, after = (np.concatenate(each) for each in zip(*hits, strict=True)) if hits else (None, None)
    return Scores(
        float_top1=None if before is None else float(before.mean()),
        top1=None if after is None else float(after.mean()),
        agreement=agreed / decisions if decisions else None,
        noise=noise / signal if signal else 0.0,
        per_sample=PerSample(
            np.concatenate(kls).astype(np.float32) if kls else None,
            None if before is None or after is None else after.astype(np.int8) - before.astype(np.int8),
        ),
    )


def _is_float(output: Array) -> bool:
    return np.issubdtype(output.dtype, np.floating)


def divergence(exact: Array, found: Array) -> Array:
    """Return KL(softmax(exact) || softmax(found)) in nats, mean over a sample's decisions.

    exact, found: logits [n, ..., classes], float64.
    returns:      [n], not negative.
    """
    p, q = log_softmax(exact, axis=-1), log_softmax(found, axis=-1)
    terms = np.exp(p) * np.where(np.isneginf(p), 0.0, p - q)
    return np.asarray(np.maximum(terms.sum(-1).reshape(len(exact), -1).mean(1), 0.0))


def standard_error(values: Array) -> float:
    """Return the standard error of the mean of [n] values."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
