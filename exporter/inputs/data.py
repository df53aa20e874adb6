"""Calibration and evaluation data: batches that are checked while they stream, whatever their source.

Errors name the batch. Only the current batch is kept in memory.

Must not know: models (beyond the names of their inputs), quantization, ONNX.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from calibrators.errors import DataError, UnknownNameError, argument
from exporter.inputs.form import DataForm

__all__ = ["Batch", "Data", "LabelError"]

KEPT_DTYPES = frozenset({torch.float32, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool})
"""Dtypes that reach the model unchanged; other real floats become float32, everything else is refused."""

LABEL_NAMES = ("labels", "label", "targets", "target", "y", "Y")
"""Names under which sources keep labels, unless the model has an input of that name."""

UNLABELLED = -1
"""Label of a sample that has none."""

Raw = Iterator[object]


class LabelError(DataError):
    """Labels that are not one class index per sample."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples along the first dimension of every tensor.

    inputs: one tensor per model input, in the model's order.
    labels: [n] int64, or None.
    given:  labels as the source gives them, whatever they are.
    form:   the named and nested arguments that the inputs make up; None where the source gives no names.
    """

    inputs: tuple[Tensor, ...]
    labels: Tensor | None = None
    form: pytree.TreeSpec | None = None
    given: Any = None

    def __len__(self) -> int:
        return len(self.inputs[0])


Convert = Callable[[Batch, str], Batch]
"""A function that changes a batch; the text says where it is, for messages."""


@dataclass
class _Seen:
    """The findings of earlier passes over one source, shared by all views of it."""

    notes: list[str] = field(default_factory=list)
    digests: dict[tuple[object, ...], str] = field(default_factory=dict)
    counts: dict[tuple[object, ...], Counter[int]] = field(default_factory=dict)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass(frozen=True, eq=False)
class Data:
    """Re-iterable batches: each `iter()` is a fresh, checked pass.

    label:       name of the source, for messages.
    start:       begins a pass over the source's own items.
    names:       the model's input names, in whose order named inputs are put; () while unknown.
    optional:    those of `names` that may be missing before others.
    by_position: named inputs that match none of `names` are taken in order (.npz files).
    limit:       batches of a pass; None for all.
    classes:     names of the classes that the source says it has, in the order of their numbers; () where it does not.
    form:        how the source reads images; None where there are none.
    convert:     changes each batch, for `mapped`; None leaves it as the source gives it.
    labels:      what becomes of labels: "read" where there are some, "needed" in every batch, or "unread".
    """

    label: str
    start: Callable[[], Raw]
    names: tuple[str, ...] = ()
    by_position: bool = False
    limit: int | None = None
    labels: Literal["read", "needed", "unread"] = "read"
    optional: frozenset[str] = frozenset()
    classes: tuple[str, ...] = ()
    form: DataForm | None = None
    convert: Convert | None = None
    _seen: _Seen = field(default_factory=_Seen, repr=False)

    def named(self, names: Sequence[str], optional: Iterable[str] = ()) -> Data:
        """Return the same data with named inputs in the order of the model's input names."""
        return replace(self, names=tuple(names), optional=frozenset(optional))

    def take(self, batches: int | None) -> Data:
        """Return the first `batches` batches of every pass; all of them for None."""
        return replace(self, limit=batches)

    def mapped(self, convert: Convert) -> Data:
        """Return the same data with every batch changed by a function; the digest stays that of the source."""
        before = self.convert
        return replace(self, convert=convert if before is None else lambda x, where: convert(before(x, where), where))

    def with_labels(self) -> Data:
        """Return the same data, but with an error for a batch without labels."""
        return replace(self, labels="needed")

    def without_labels(self, note: str | None = None) -> Data:
        """Return the same data, whose labels nobody looks at, and tell the user so by a note, if it is given."""
        return replace(self, labels="unread").noted(note)

    def noted(self, text: str | None) -> Data:
        """Return the same data, after a note for the user, if there is one."""
        if text:
            self._seen.note(text)
        return self

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for the user on the passes so far: conversions, and data that differs between passes."""
        return tuple(self._seen.notes)

    def example(self) -> Batch:
        """Return the first batch."""
        return next(iter(self.take(1)))

    def digest(self) -> str:
        """Return the sha256 of the bytes, shapes and dtypes of everything a pass yields, whatever the batch size.

        A complete pass computes it as it streams; if there was none, this makes one.
        """
        if self._key not in self._seen.digests:
            for _ in self:
                pass
        return self._seen.digests[self._key]

    def class_counts(self) -> dict[str, int] | None:
        """Return how many samples of a complete pass each class has; None where labels are no class indices.

        Classes without a name are called by their numbers.
        """
        self.digest()
        counts = self._seen.counts[self._key]
        if sum(counts.values()) == 0:
            return None
        numbers = sorted({*counts, *range(len(self.classes))})
        return {self.classes[n] if n < len(self.classes) else str(n): counts[n] for n in numbers}

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.limit, self.names, self.labels == "unread")

    def __iter__(self) -> Iterator[Batch]:
        digest, first, counts = _Digest(), None, Counter[int]()
        for index, item in enumerate(islice(self.start(), self.limit)):
            where = f"{self.label}: batch {index}"
            batch, names = self._read(item, where)
            if not len(batch):  # none of its samples has a label
                if first is None:
                    raise LabelError(f"{where}: no sample has a label; put samples with labels first.")
                continue
            first = first or _Form.of(batch, names)
            first.check(batch, where)
            digest.update(batch)
            counts.update(_classes_of(batch, where))
            yield self.convert(batch, where) if self.convert is not None else batch
        if first is None:
            raise DataError(
                f"{self.label} yielded no batches; a callable must return fresh data every time it is called."
            )
        self._seen.counts[self._key] = counts
        if self._seen.digests.setdefault(self._key, digest.hexdigest()) != digest.hexdigest():
            self._seen.note(
                f"{self.label} differs from pass to pass (shuffled or augmented), so results are not reproducible"
            )

    def _read(self, item: object, where: str) -> tuple[Batch, tuple[str, ...]]:
        """Return the checked batch of an item of the source, and the names of its inputs for messages."""
        parts = self._parts(item, where)
        if len(parts) not in (1, 2):
            raise DataError(
                f"{where} has {len(parts)} parts; yield x, (x, labels), ({{name: x}}, labels) or ((x1, x2), labels)."
            )
        named = self._ordered(parts[0], where)
        if not named:
            raise DataError(
                f"{where} has no input; yield x or {{name: x}}, or store an array per input in the .npz file."
            )
        named = {name: _in_order(value) for name, value in named.items()}
        paths, form = pytree.tree_flatten_with_path(named, is_leaf=lambda value: not isinstance(value, dict | tuple))
        inputs = {}
        for path, value in paths:
            name = "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            inputs[name], note = _input_tensor(value, f"{where}: input {name!r}")
            if note:
                self._seen.note(f"{self.label}: input {name!r} {note}")
        if len({len(x) for x in inputs.values()}) > 1:
            sizes = ", ".join(f"{name} {len(x)}" for name, x in inputs.items())
            raise DataError(
                f"{where}: inputs have different numbers of samples: {sizes}; give each input one per sample."
            )
        is_named = isinstance(parts[0], Mapping) and named.keys() <= set(self.names)
        given = parts[1] if len(parts) == 2 else None
        batch = Batch(tuple(inputs.values()), form=form if is_named else None, given=given)
        if self.labels == "unread":
            return batch, tuple(inputs)
        if given is not None:
            batch = self._with_labels(batch, where)
        elif self.labels == "needed":
            raise DataError(f"{where} has no labels; yield (x, labels), or store them as 'labels' in the .npz file.")
        return batch, tuple(inputs)

    def _with_labels(self, batch: Batch, where: str) -> Batch:
        """Return a batch with its labels, without the samples that have none, which a note for the user counts."""
        labels = _label_tensor(batch.given, len(batch), where)
        known = labels != UNLABELLED
        if bool(known.all()):
            return replace(batch, labels=labels)
        self._seen.note(f"{self.label}: samples with the label {UNLABELLED} are left out")
        inputs, given = tuple(x[known] for x in batch.inputs), np.asarray(batch.given)[known.numpy()]
        return replace(batch, inputs=inputs, labels=labels[known], given=given)

    def _parts(self, item: object, where: str) -> Sequence[object]:
        """Return inputs and, where there are some, labels of an item."""
        parts = item if isinstance(item, tuple | list) else (item,)
        if len(parts) > 1 or not parts or not isinstance(parts[0], Mapping):
            return parts
        inputs = {str(name): value for name, value in parts[0].items()}
        found = [name for name in LABEL_NAMES if name in inputs and name not in self.names]
        if len(found) > 1:
            raise DataError(f"{where} holds both {found[0]!r} and {found[1]!r}; keep only one of them.")
        return (inputs, inputs.pop(found[0])) if found else (inputs,)

    def _is_one(self, inputs: Mapping[Any, object]) -> bool:
        """Return whether a dictionary is what the only input of the model takes, rather than inputs by name."""
        return len(inputs) > 1 and not self.by_position and len(self.names) == 1 and self.names[0] not in inputs

    def _ordered(self, inputs: object, where: str) -> dict[str, object]:
        """Return inputs by name in the model's order; inputs without names get the model's, or their position."""
        if not isinstance(inputs, Mapping):
            values = inputs if isinstance(inputs, tuple | list) else (inputs,)
            names = [*self.names, *(f"input_{index}" for index in range(len(self.names), len(values)))]
            return dict(zip(names, values, strict=False))
        if self._is_one(inputs):
            return {self.names[0]: inputs}
        given = {str(name): value for name, value in inputs.items() if value is not None}
        unknown = [name for name in given if name not in self.names]
        if not self.names or (self.by_position and len(unknown) == len(given)):
            return given
        if unknown:
            raise DataError(f"{where}: {UnknownNameError('model input', unknown[0], self.names)}")
        ordered = {name: given[name] for name in self.names if name in given}
        last = max(map(self.names.index, ordered), default=0)
        for name in self.names[:last]:
            if name not in given and name not in self.optional:
                raise DataError(f"{where}: input {name!r} is missing; the model takes {', '.join(self.names)}.")
        return ordered


@dataclass(frozen=True)
class _Form:
    """The properties of the first batch, which all later ones must have."""

    names: tuple[str, ...]
    shapes: tuple[list[int], ...]
    dtypes: tuple[str, ...]
    labelled: bool

    @classmethod
    def of(cls, batch: Batch, names: tuple[str, ...]) -> _Form:
        shapes = tuple(list(x.shape[1:]) for x in batch.inputs)
        return cls(names, shapes, tuple(map(_dtype, batch.inputs)), batch.labels is not None)

    def check(self, batch: Batch, where: str) -> None:
        if len(batch.inputs) != len(self.names):
            raise DataError(
                f"{where} has {len(batch.inputs)} inputs, the first batch has {len(self.names)}; use the same in all."
            )
        for name, shape, dtype, x in zip(self.names, self.shapes, self.dtypes, batch.inputs, strict=True):
            if list(x.shape[1:]) != shape:
                raise DataError(
                    f"{where}: samples of input {name!r} have shape {list(x.shape[1:])}, but those of the first batch "
                    f"{shape}; bring them to one shape ({argument('image_size')} does it for a folder of images)."
                )
            if _dtype(x) != dtype:
                raise DataError(
                    f"{where}: input {name!r} is {_dtype(x)}, but {dtype} in the first batch; use one type."
                )
        if (batch.labels is not None) != self.labelled:
            has, had = ("has", "has none") if batch.labels is not None else ("has no", "has some")
            raise DataError(f"{where} {has} labels, but the first batch {had}; label all batches or none.")


class _Digest:
    """A sha256 that does not depend on batch sizes: one per stream of samples, then one of these, shapes and dtypes."""

    def __init__(self) -> None:
        self._streams: list[Any] = []
        self._forms: list[str] = []
        self._samples = 0

    def update(self, batch: Batch) -> None:
        tensors = [*batch.inputs, *([] if batch.labels is None else [batch.labels])]
        if not self._streams:
            self._streams = [hashlib.sha256() for _ in tensors]
            self._forms = [f"{_dtype(x)}{list(x.shape[1:])}" for x in tensors]
            self._forms.append(f"labels={batch.labels is not None}")
        for stream, tensor in zip(self._streams, tensors, strict=True):
            stream.update(np.ascontiguousarray(tensor.numpy()).data)
        self._samples += len(batch)

    def hexdigest(self) -> str:
        parts = [str(self._samples), *self._forms, *(stream.hexdigest() for stream in self._streams)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _in_order(value: object) -> object:
    """Return a nested argument with its dictionaries sorted by key, so that all batches have one order."""
    if isinstance(value, Mapping):
        return {key: _in_order(value[key]) for key in sorted(value, key=str) if value[key] is not None}
    return tuple(map(_in_order, value)) if isinstance(value, tuple) else value


def _input_tensor(value: object, where: str) -> tuple[Tensor, str]:
    """Return a CPU tensor in a dtype that models take, and a note on its conversion, if there was one."""
    tensor = _tensor(value, where)
    if tensor.numel() == 0 or tensor.ndim == 0:
        what = "a single number" if tensor.ndim == 0 else "empty (no samples)" if not len(tensor) else "without values"
        raise DataError(f"{where} is {what}; give an array whose first dimension counts samples.")
    note = ""
    if tensor.dtype not in KEPT_DTYPES:
        if not tensor.is_floating_point():
            raise DataError(f"{where} is {_dtype(tensor)}, but models take floats or integers; convert it.")
        note = f"was converted from {_dtype(tensor)} to float32"
        tensor = tensor.to(torch.float32)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        finite = torch.isfinite(tensor).reshape(len(tensor), -1).all(1)
        first = int((~finite).nonzero()[0])
        raise DataError(f"{where} holds NaN or infinite values (first in sample {first} of the batch); clean the data.")
    return tensor, note


def _classes_of(batch: Batch, where: str) -> list[int]:
    """Return the class of each sample, none where labels are missing or something else; unread ones count too."""
    with suppress(LabelError):
        labels = batch.labels
        if labels is None and batch.given is not None:
            labels = _label_tensor(batch.given, len(batch), where)
        return [] if labels is None else labels.tolist()
    return []


def _label_tensor(value: object, samples: int, where: str) -> Tensor:
    """Return labels as int64 [samples]: class indices, in a column or not, or rows with a single 1 among zeros.

    raises: LabelError.
    """
    try:
        labels = _tensor(value, f"{where}: labels")
    except DataError as error:
        raise LabelError(str(error)) from error
    if labels.is_floating_point() and not bool((labels == labels.round()).all()):
        raise LabelError(
            f"{where}: labels are not integers; give class indices. If this is a second model input, yield "
            "({name: x, name: x}, labels or None)."
        )
    if _is_one_hot(labels):
        labels = labels.to(torch.int64).argmax(1)
    if tuple(labels.shape) == (samples, 1):
        labels = labels[:, 0]
    if labels.is_complex() or tuple(labels.shape) != (samples,):
        raise LabelError(
            f"{where}: labels have shape {list(labels.shape)} for {samples} samples; give one index per sample."
        )
    labels = labels.to(torch.int64)
    if bool((labels < UNLABELLED).any()):
        raise LabelError(
            f"{where}: label {int(labels.min())} is negative; give class indices from 0, and {UNLABELLED} for none."
        )
    return labels


def _is_one_hot(labels: Tensor) -> bool:
    if labels.ndim != 2 or labels.shape[1] < 2 or labels.is_complex():
        return False
    return bool(((labels == 0) | (labels == 1)).all() and (labels != 0).sum(1).eq(1).all())


def _tensor(value: object, where: str) -> Tensor:
    """Return `value` on the CPU, sharing its memory where torch allows."""
    if isinstance(value, Tensor):
        if value.is_sparse or value.is_quantized or value.is_meta:
            raise DataError(f"{where} is a sparse, quantized or meta tensor; give a dense one.")
        return value.detach().cpu()
    if isinstance(value, list | tuple | int | float):
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise DataError(f"{where} is a ragged list ({error}); give an array.") from error
    if not isinstance(value, np.ndarray | np.generic):
        raise DataError(f"{where} is a {type(value).__name__}; give a torch tensor or a NumPy array.")
    array = np.asarray(value)
    if array.dtype.byteorder not in "=|":
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise DataError(f"{where} is {array.dtype}, a type that torch does not know; convert it to float32.") from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
