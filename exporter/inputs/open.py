"""Open data, given as text or as a Python object; nothing is read before the first pass.

Must not know: models, methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from calibrators.errors import DataError, argument, first_line
from exporter.frontend.calling import call_of
from exporter.frontend.capture import evaluating
from exporter.frontend.user_code import UserCallable, article, load_callable, load_object, users_code
from exporter.inputs.data import Batch, Data, Raw
from exporter.inputs.form import DataForm
from exporter.inputs.sanity import scale_warning, split_warning
from exporter.inputs.sources import CHANNELS, class_folders, from_arrays, from_images, from_npz

__all__ = ["check_takes_integers", "open_both", "open_data"]

PLAIN = DataForm()


def open_data(source: object, form: DataForm = PLAIN) -> Data:
    """Return the data of `source`; nothing is read before the first pass.

    source: a `.npz` file (an array per model input, labels in `labels` or `y`); a folder of images, or of one folder
            of images per class; `file.py:name` or `package.module:name`, as load_callable reads it; in Python also what
            such a name may stand for: a callable, arrays, a dataset, or any iterable of batches. Batches are x,
            (x, labels), ({name: x}, labels), {name: x, "labels": labels} or ((x1, x2), labels).
    form:   the batch size, for sources without batches, and how to read images, for folders.
    raises: DataError, UnknownNameError.
    """
    if isinstance(source, Data):
        return source
    if isinstance(source, Path) or (isinstance(source, str) and (":" not in source or Path(source).exists())):
        return _open_path(Path(source), form)
    if form.is_for_images:
        raise DataError(
            "image size, mean and std apply to folders of images only; this data is used as it is. Omit them."
        )
    if isinstance(source, str):
        named = load_object(source, error=DataError)
        if isinstance(named, Iterable | Dataset):
            return replace(open_data(named, form), label=source)
        function = load_callable(source, error=DataError)
        return Data(source, lambda: _guarded(function, form.batch_size))
    label, batch = f"data ({type(source).__name__})", form.batch_size
    if isinstance(source, Dataset) and not isinstance(source, Iterable):
        return Data(label, lambda: iter(DataLoader(source, batch)))
    if callable(source) and not isinstance(source, Iterable):
        return Data(label, lambda: _items(source(), label, batch))
    if isinstance(source, Iterator):
        return Data(label, _one_shot(source, label))
    if isinstance(source, Iterable):
        return Data(label, lambda: _items(source, label, batch))
    raise DataError(f"{label} is not data; give a path, file.py:callable, a callable or an iterable of batches.")


def open_both(calibration: object, evaluation: object | None, form: DataForm) -> tuple[Data, Data | None]:
    """Return the calibration and evaluation data; settings of images are an error if neither is a folder of images.

    raises: DataError, UnknownNameError.
    """
    sources = [source for source in (calibration, evaluation) if source is not None]
    folders = [isinstance(source, (str, Path)) and Path(source).is_dir() for source in sources]
    plain = DataForm(batch_size=form.batch_size) if any(folders) else form
    opened = [
        open_data(source, form if is_folder else plain) for source, is_folder in zip(sources, folders, strict=True)
    ]
    return opened[0], opened[1] if evaluation is not None else None


def check_takes_integers(model: nn.Module, batch: Batch, where: str) -> None:
    """Check that the model runs on the uint8 inputs of `batch`, if it has any.

    raises: DataError if raw images go to a model that expects preprocessed floats.
    """
    if not any(x.dtype == torch.uint8 for x in batch.inputs):
        return
    try:
        with evaluating(model), torch.no_grad():
            call_of(model, batch.form)(*(x[:1] for x in batch.inputs))
    except Exception as error:  # of the user's own code
        raise DataError(
            f"{where} is uint8 and the model does not take that ({type(error).__name__}: {first_line(error)}); "
            "preprocess it as in training: usually float32 in 0..1, normalized, channels first; or give "
            f"{argument('input', 'uint8')}, "
            f"with {argument('mean')} and {argument('std')}, for a file that normalizes bytes itself."
        ) from error


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _is_pair_of_arrays(value: object) -> bool:
    """Return whether this is (x, labels) or ({name: x}, labels), all samples at once; a list of two is two batches."""
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and (_is_array(value[0]) or isinstance(value[0], Mapping))
        and (_is_array(value[1]) or value[1] is None)
    )


def _guarded(function: UserCallable, batch: int) -> Raw:
    """Yield the items that the user's callable returns; its exceptions become DataErrors with the user's line."""
    end = object()
    items = _items(function(), function.label, batch)
    while True:
        with users_code(function.label, "raised", function.folder, DataError):
            item = next(items, end)
        if item is end:
            return
        yield item


def _items(result: object, label: str, batch: int) -> Raw:
    """Return the items of a source: arrays are cut into batches, iterables pass through."""
    if _is_array(result) or _is_pair_of_arrays(result) or isinstance(result, Mapping):
        return from_arrays(result, label, batch)
    if isinstance(result, Iterable) and not isinstance(result, str | bytes):
        return iter(result)
    raise DataError(
        f"{label} returned {article(type(result).__name__)}; return arrays, or batches such as those of a DataLoader."
    )


def _one_shot(source: Iterator[object], label: str) -> Callable[[], Raw]:
    """Return the function that starts a pass; a second call raises a DataError."""
    left = [source]

    def start() -> Raw:
        if not left:
            raise DataError(
                f"{label} can be read only once, but a second pass is needed; give a list, a DataLoader, or the "
                "function that makes the generator instead of the generator."
            )
        return left.pop()

    return start


def _open_path(path: Path, form: DataForm) -> Data:
    if path.is_dir():
        for name, numbers in (("mean", form.mean), ("std", form.std)):
            if numbers is not None and len(numbers) not in (1, CHANNELS):
                raise DataError(
                    f"{argument(name)} has {len(numbers)} numbers, but images of a folder are read with {CHANNELS} "
                    "channels; give one for each, or one for all."
                )
        names = class_folders(path)
        data = Data(str(path), lambda: from_images(path, form), classes=tuple(names), form=form)
        return data.noted(split_warning(str(path), names)).noted(scale_warning(form))
    if form.is_for_images:
        raise DataError(f"image size, mean and std apply to folders of images only; {path} is not one. Omit them.")
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a .npz file, a folder of images or file.py:callable.")
    if path.suffix != ".npz":
        is_code = path.suffix == ".py"
        advice = f"name its callable: {path}:calibration" if is_code else "save arrays with numpy.savez"
        raise DataError(f"{path} is not a .npz file or a folder of images; {advice}.")
    return Data(str(path), lambda: from_npz(path, form.batch_size), by_position=True)
