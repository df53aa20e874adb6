"""Measure how much accuracy quantization costs, from outputs that arrive batch by batch.

The float model and the runtime are compared on all samples, the reference program on the first ones, as many as it
ran on. Counts, float64 sums and five bytes for every sample are kept, and the split of the samples into batches does
not matter.

Must not know: where the outputs come from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from calibrators.errors import DataError
from calibrators.grid.metrics import decibels
from calibrators.intervals import paired_interval
from runtime_tests.measure.outputs import OutputAccuracy, masked
from runtime_tests.measure.paired import SampleScores

__all__ = ["Accuracy", "RunningAccuracy", "Triple"]

Array = NDArray[Any]
Real: TypeAlias = float
"""The builtin, in classes with a field of that name."""

NETWORKS = ("float", "reference", "runtime")
TOP = 5
BEYOND = 1e30
"""Stands for an infinite score, whose difference from itself is not a number."""


@dataclass(frozen=True)
class Triple:
    """A score of the float model, of the reference program and in the runtime; None if it was not measured."""

    float: Real | None
    reference: Real | None
    runtime: Real | None


@dataclass(frozen=True)
class Accuracy(Triple):
    """Scores on held-out data: the "accuracy" part of report.json. Shares are fractions from 0 to 1.

    metric:    of the scores: "top1" with labels, "agreement" with the float model, or "sqnr_db".
    top5:      top-5 accuracy of the same three; only of scores, with labels.
    agreement: share of the samples for which runtime and float model make the same decision.
    sqnr_db:   of the runtime's outputs; None where they are identical.
    mean_kl:   divergence of the runtime's predictions from the float model's.
    drop_ci:   95 % interval of float - runtime, paired by sample.
    outputs:   scores of every output; the others are those of the first one.
    reference_samples: number of samples, from the first on, on which the reference program ran: its scores are theirs.
    reference_drop:    float - reference on those samples.
    """

    metric: str
    samples: int
    top5: Triple | None
    agreement: Real | None
    sqnr_db: Real | None
    mean_kl: Real | None
    drop_ci: tuple[Real, Real] | None
    outputs: tuple[OutputAccuracy, ...] | None = None
    reference_samples: int | None = None
    reference_drop: Real | None = None


def _zeros() -> dict[str, Any]:
    return dict.fromkeys(NETWORKS, 0)


@dataclass
class RunningAccuracy:
    """Running comparison of the float, reference and runtime outputs.

    samples: number of all samples.
    kind:    "scores" of classes: floats [N, classes] with at least two of them; "indices" of classes: integers [N] or
             [N, 1], as of an argmax; "values": only the signal-to-noise ratio is measured, and labels are not read.
             Decided by the first batch, like `labelled`.
    classes: number of classes that scores tell apart, 0 for indices; highest: highest label so far.
    """

    samples: int = 0
    kind: Literal["scores", "indices", "values"] = "scores"
    labelled: bool = False
    classes: int = 0
    highest: int = -1
    _batches: int = 0
    _samples: dict[str, int] = field(default_factory=_zeros)
    _top1: dict[str, int] = field(default_factory=_zeros)
    _top5: dict[str, int] = field(default_factory=_zeros)
    _agree: dict[str, int] = field(default_factory=_zeros)
    _noise: dict[str, float] = field(default_factory=_zeros)
    _signal: dict[str, float] = field(default_factory=_zeros)
    _paired_top1: int = 0  # of the float model, on the samples of the reference
    _divergence: float = 0.0
    _lost: int = 0
    _gained: int = 0
    _errors: list[Array] = field(default_factory=list)
    _right: list[Array] = field(default_factory=list)

    def update(
        self,
        float_outputs: ArrayLike,
        reference: ArrayLike | None,
        runtime: ArrayLike,
        labels: ArrayLike | None = None,
    ) -> None:
        """Add one batch of outputs, all of one shape [N, ...], and its labels [N].

        reference: None for a batch on which the reference program did not run.
        raises: DataError naming the batch: shapes differ, values are not finite (the same infinity in all is a mask),
                labels are not integers, out of range, or present in some batches only.
        """
        given = zip(NETWORKS, (float_outputs, reference, runtime), strict=True)
        outputs = {name: np.asarray(each) for name, each in given if each is not None}
        truth = outputs["float"]
        self._check_outputs(outputs)
        checked = self._check_labels(labels, truth)
        self.samples += len(truth)
        self._batches += 1
        hidden = masked(outputs)  # neither signal nor noise
        exact = {name: np.where(hidden, 0.0, each.astype(np.float64)) for name, each in outputs.items()}
        signal = float(np.sum(exact["float"] ** 2))
        for name, each in exact.items():
            self._samples[name] += len(truth)
            self._signal[name] += signal
            self._noise[name] += float(np.sum((each - exact["float"]) ** 2))
        if self.kind == "scores":
            self._add_scores({name: np.where(hidden, np.sign(truth) * BEYOND, each) for name, each in exact.items()})
        elif self.kind == "indices":
            self._add_decisions({name: each.reshape(len(truth)) for name, each in outputs.items()})
            self._add_errors(outputs["runtime"].reshape(len(truth)) != outputs["float"].reshape(len(truth)))
        else:
            self._add_errors(((exact["runtime"] - exact["float"]) ** 2).reshape(len(truth), -1).sum(1))
        if checked is not None:
            self.highest = max(self.highest, int(checked.max()))
            rank = _rank if self.kind == "scores" else _rank_of_index
            self._add_ranks({name: rank(each, checked) for name, each in outputs.items()})

    @property
    def metric(self) -> str:
        """The metric that `value` returns: "top1" with labels, "agreement" with the float model, or "sqnr_db"."""
        if self.kind == "values":
            return "sqnr_db"
        return "top1" if self.labelled else "agreement"

    def value(self, network: str) -> float | None:
        """Return the metric of "float", "reference" or "runtime"; None for an infinite signal-to-noise ratio."""
        if self.metric == "sqnr_db":
            return self.sqnr_db(network)
        return self._share(self._counts, network)

    def sqnr_db(self, network: str) -> float | None:
        """Return 10 log10(sum float^2 / sum (float - network)^2) over all outputs; None if they are identical."""
        noise = self._noise[network]
        return decibels(self._signal[network], noise) if noise else None

    def reference_drop(self) -> float | None:
        """Return the metric of the float model minus that of the reference, on the samples of the reference.

        None without such samples, or for a signal-to-noise ratio.
        """
        samples = self._samples["reference"]
        if not samples or self.metric == "sqnr_db":
            return None
        right = self._paired_top1 if self.labelled else samples  # the float model agrees with itself
        return (right - self._counts["reference"]) / samples

    def drop_interval(self) -> tuple[float, float] | None:
        """Return the 95 % confidence interval of top1(float) - top1(runtime), paired by sample; None without labels."""
        return paired_interval(self._lost, self._gained, self.samples) if self.labelled and self.samples else None

    def result(self) -> Accuracy:
        """Return the scores over all batches."""
        return Accuracy(
            float=self.value("float"),
            reference=self.value("reference"),
            runtime=self.value("runtime"),
            metric=self.metric,
            samples=self.samples,
            top5=Triple(**{name: self._share(self._top5, name) for name in NETWORKS}) if self.classes else None,
            agreement=self._share(self._agree, "runtime") if self.kind != "values" else None,
            sqnr_db=self.sqnr_db("runtime"),
            mean_kl=self._divergence / max(self.samples, 1) if self.kind == "scores" else None,
            drop_ci=self.drop_interval(),
            reference_samples=self._samples["reference"],
            reference_drop=self.reference_drop(),
        )

    @property
    def _counts(self) -> dict[str, int]:
        """The counts of the metric, of outputs that decide for a class."""
        return self._top1 if self.labelled else self._agree

    def _share(self, counts: dict[str, int], network: str) -> float | None:
        """Return the share of the samples of a network; None if it did not run."""
        return counts[network] / self._samples[network] if self._samples[network] else None

    def _check_outputs(self, outputs: dict[str, Array]) -> None:
        shapes = {name: each.shape for name, each in outputs.items()}
        shape = shapes["float"]
        if not shape or len(set(shapes.values())) > 1:
            raise DataError(f"outputs of batch {self._batches} have shapes {shapes}; all must have one shape [N, ...].")
        hidden = masked(outputs)
        broken = [name for name, each in outputs.items() if not np.isfinite(each[~hidden]).all()]
        if broken:
            raise DataError(
                f"outputs of batch {self._batches} are not finite in: {', '.join(broken)}; check weights and inputs."
            )
        kind = _kind(outputs["float"])
        if self._batches == 0:
            self.kind = kind
        elif kind != self.kind:
            raise DataError(
                f"outputs of batch {self._batches} have shape {shape}, unlike those of the first batch; use one shape."
            )

    def _check_labels(self, labels: ArrayLike | None, truth: Array) -> Array | None:
        labelled = labels is not None and self.kind != "values"
        if self._batches == 0:
            self.labelled = labelled
        elif labelled != self.labelled:
            raise DataError(
                f"batch {self._batches} has {'' if labelled else 'no '}labels, unlike the first; label all or none."
            )
        if labels is None or not labelled:
            return None
        given = np.asarray(labels)
        count = len(truth)
        if given.shape not in ((count,), (count, 1)) or not np.issubdtype(given.dtype, np.integer):
            raise DataError(
                f"labels of batch {self._batches} are {given.dtype} {list(given.shape)}; "
                f"give {count} integers, one class index per sample."
            )
        given = given.reshape(count)
        if self.kind == "scores":
            self.classes = truth.shape[1]
            if wrong := given[(given < 0) | (given >= self.classes)].tolist():
                last = self.classes - 1
                raise DataError(
                    f"labels of batch {self._batches} hold {wrong[0]}, but the model's classes are 0..{last}."
                )
        return given

    def _add_decisions(self, decisions: dict[str, Array]) -> None:
        for name, each in decisions.items():
            self._agree[name] += int(np.sum(each == decisions["float"]))

    def _add_scores(self, outputs: dict[str, Array]) -> None:
        self._add_decisions({name: each.argmax(1) for name, each in outputs.items()})
        p, q = log_softmax(outputs["float"], axis=1), log_softmax(outputs["runtime"], axis=1)
        divergence = np.sum(np.exp(p) * (p - q), axis=1)
        self._divergence += float(np.sum(divergence))
        self._add_errors(divergence)

    def _add_errors(self, errors: Array) -> None:
        self._errors.append(errors.astype(np.float32))

    def _add_ranks(self, ranks: dict[str, Array]) -> None:
        for name, rank in ranks.items():
            self._top1[name] += int(np.sum(rank == 0))
            self._top5[name] += int(np.sum(rank < TOP))
        before, after = ranks["float"] == 0, ranks["runtime"] == 0
        self._paired_top1 += int(np.sum(before)) if "reference" in ranks else 0
        self._lost += int(np.sum(before & ~after))
        self._gained += int(np.sum(after & ~before))
        self._right.append(after)

    @property
    def by_sample(self) -> SampleScores:
        """The scores of every sample in the runtime."""
        right = np.concatenate(self._right) if self._right else None
        return SampleScores(np.concatenate([np.zeros(0, np.float32), *self._errors]), right)


def _kind(outputs: Array) -> Literal["scores", "indices", "values"]:
    if not np.issubdtype(outputs.dtype, np.floating):
        return "indices" if outputs.shape[1:] in ((), (1,)) else "values"
    return "scores" if outputs.ndim == 2 and outputs.shape[1] > 1 else "values"


def _rank_of_index(outputs: Array, labels: Array) -> Array:
    """Return 0 where the class index is the label, else TOP, [N]: the others have no order."""
    return np.where(outputs.reshape(len(labels)) == labels, 0, TOP)


def _rank(outputs: Array, labels: Array) -> Array:
    """Count the classes that rank before the label, [N]; of equal scores the lower index ranks first, as in argmax."""
    score = outputs[np.arange(len(labels)), labels][:, None]  # [N, 1]
    earlier = np.arange(outputs.shape[1])[None] < labels[:, None]  # [N, classes]
    return np.asarray(np.sum((outputs > score) | ((outputs == score) & earlier), axis=1))
