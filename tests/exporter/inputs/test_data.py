"""Data: every source gives the same batches, every fault one message with its place."""

from __future__ import annotations

import io
import math
import os
import pickle
import textwrap
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from calibrators.errors import DataError, InputError
from exporter.inputs.data import Data, LabelError
from exporter.inputs.form import DataForm
from exporter.inputs.open import check_takes_integers, open_data

COUNT = 10
RNG = np.random.default_rng(0)
X = RNG.standard_normal((COUNT, 3, 4, 4)).astype(np.float32)
MASK = RNG.integers(0, 2, (COUNT, 4)).astype(np.int64)
Y = np.arange(COUNT) % 4

SOURCE = """
    import numpy as np
    import torch

    X = np.load({x!r})
    Y = np.load({y!r})

    def generator():
        for i in range(0, len(X), 4):
            yield X[i:i + 4], Y[i:i + 4]

    def named():
        return [({{"x": X[:6]}}, Y[:6]), ({{"x": X[6:]}}, Y[6:])]

    def whole():
        return X, Y

    def loader():
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
        return torch.utils.data.DataLoader(dataset, batch_size=3)

    def breaks():
        yield X[:4], Y[:4]
        raise RuntimeError("disk on fire")

    def nothing():
        return []

    def number():
        return 3

    loaded = loader()
    listed = named()
    dataset = loaded.dataset

    def every(step):
        return (X, Y) if step == 1 else None

    once = generator()

    def stale():
        return once
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)
    path = folder / "source.py"
    path.write_text(textwrap.dedent(SOURCE.format(x=str(folder / "x.npy"), y=str(folder / "y.npy"))))
    return path


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def joined(data: Data) -> tuple[list[np.ndarray], np.ndarray | None]:
    batches = list(data)
    inputs = [np.concatenate([b.inputs[i].numpy() for b in batches]) for i in range(len(batches[0].inputs))]
    labels = [b.labels.numpy() for b in batches if b.labels is not None]
    return inputs, np.concatenate(labels) if labels else None


def message(data: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        data()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- sources


@pytest.mark.parametrize(
    "name", ["generator", "named", "whole", "loader", "loaded", "listed", "dataset", "every(step=1)"]
)
def test_every_callable_gives_the_same_data_on_every_pass(file: Path, name: str) -> None:
    data = open_data(f"{file}:{name}", DataForm(batch_size=4))
    for _ in range(2):
        (x,), labels = joined(data)
        assert np.array_equal(x, X)
        assert np.array_equal(labels, Y)
    assert data.digest() == open_data((X, Y)).digest()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(lambda: [X[:4], X[4:]], id="list of arrays"),
        pytest.param(lambda: [(torch.from_numpy(X[:4]),), (torch.from_numpy(X[4:]),)], id="1-tuples"),
        pytest.param(lambda: X, id="array"),
        pytest.param(lambda: torch.from_numpy(X), id="tensor"),
        pytest.param(lambda: {"x": X}, id="dict of arrays"),
        pytest.param(lambda: lambda: iter([X]), id="function"),
        pytest.param(lambda: iter([X]), id="generator"),
        pytest.param(lambda: DataLoader(TensorDataset(torch.from_numpy(X)), batch_size=7), id="DataLoader"),
    ],
)
def test_python_sources(source: Callable[[], object]) -> None:
    (x,), labels = joined(open_data(source(), DataForm(batch_size=3)))
    assert np.array_equal(x, X)
    assert labels is None


def test_a_generator_is_read_once_and_says_so() -> None:
    data = open_data(iter([X]))
    list(data)
    assert "only once" in message(lambda: list(data))


@pytest.mark.parametrize("compressed", [False, True], ids=["stored", "compressed"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4"], ids=["little", "big"])
def test_npz_rows(tmp_path: Path, compressed: bool, order: str, dtype: str) -> None:
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "d.npz", x=np.asarray(X.astype(dtype), order=order), labels=Y)
    data = open_data(str(tmp_path / "d.npz"), DataForm(batch_size=4))
    assert [len(b) for b in data] == [4, 4, 2]
    (x,), labels = joined(data)
    assert np.array_equal(x, X)
    assert np.array_equal(labels, Y)


@pytest.mark.parametrize(
    ("arrays", "names"),
    [
        pytest.param({"mask": MASK, "x": X}, ("x", "mask"), id="by name"),
        pytest.param({"first": X, "second": MASK}, ("x", "mask"), id="by order"),
        pytest.param({"x": X, "mask": MASK}, (), id="unknown names"),
    ],
)
def test_npz_inputs_reach_the_model_in_its_order(
    tmp_path: Path, arrays: dict[str, Any], names: tuple[str, ...]
) -> None:
    data = open_data(npz(tmp_path / "d.npz", **arrays, y=Y)).named(names)
    (x, mask), labels = joined(data)
    assert np.array_equal(x, X)
    assert np.array_equal(mask, MASK)
    assert np.array_equal(labels, Y)


def test_npz_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    rows, row = 512, 32 * 1024
    source = npz(tmp_path / "d.npz", x=np.zeros((rows, row // 4), np.float32))
    tracemalloc.start()
    for _ in open_data(source, DataForm(batch_size=8)):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # one batch, its predecessor still referenced, the chunk just read and zipfile's buffers of the same size
    assert peak < 2 * 8 * row + 8 * (1 << 20) < rows * row


def test_named_inputs_are_ordered_and_optional_ones_may_be_left_out() -> None:
    data = open_data([({"mask": MASK, "x": X}, Y)]).named(("x", "cache", "mask", "extra"), optional=("cache", "extra"))
    assert [tuple(t.shape) for t in data.example().inputs] == [X.shape, MASK.shape]


def test_take_limits_every_pass_and_its_digest() -> None:
    data = open_data([X[:4], X[4:8], X[8:]])
    assert [len(b) for b in data.take(2)] == [4, 4]
    assert data.take(2).digest() == open_data(X[:8]).digest() != data.digest()


# ---- dtypes, labels, digests


@pytest.mark.parametrize(
    ("dtype", "expected", "noted"),
    [
        pytest.param(np.float64, torch.float32, True, id="double"),
        pytest.param(np.float16, torch.float32, True, id="half"),
        pytest.param(np.float32, torch.float32, False, id="single"),
        pytest.param(np.uint8, torch.uint8, False, id="bytes"),
        pytest.param(np.int32, torch.int32, False, id="ints"),
        pytest.param(np.bool_, torch.bool, False, id="bools"),
    ],
)
def test_dtypes(dtype: Any, expected: torch.dtype, noted: bool) -> None:
    data = open_data([np.ones((2, 3), dtype)])
    assert data.example().inputs[0].dtype == expected
    assert bool(data.notes) == noted
    assert all("to float32" in note for note in data.notes)


@pytest.mark.parametrize(
    "labels",
    [Y, Y.astype(np.uint8), Y.astype(np.float32), torch.from_numpy(Y), Y.tolist(), Y[:, None], np.eye(4)[Y]],
    ids=["int", "bytes", "float", "tensor", "list", "column", "one-hot"],
)
def test_labels_become_int64(labels: Any) -> None:
    result = open_data([(X, labels)]).example().labels
    assert result is not None
    assert result.dtype == torch.int64
    assert result.tolist() == Y.tolist()


@pytest.mark.parametrize("name", ["labels", "label", "targets", "target", "y", "Y"])
def test_labels_of_every_usual_name(tmp_path: Path, name: str) -> None:
    for source in ([{"x": X, name: Y}], npz(tmp_path / "d.npz", **{"x": X, name: Y})):
        _, labels = joined(open_data(source).named(("x",)))
        assert np.array_equal(labels, Y)


def test_an_input_of_such_a_name_is_an_input() -> None:
    batch = open_data([{"x": X, "y": MASK}]).named(("x", "y")).example()
    assert [tuple(x.shape) for x in batch.inputs] == [X.shape, MASK.shape]
    assert batch.labels is None


@pytest.mark.parametrize("labels", [MASK - 1, ["a"] * COUNT, {"boxes": MASK}], ids=["masks", "words", "dictionary"])
def test_labels_that_nobody_needs_are_not_looked_at(labels: Any) -> None:
    data = open_data([(X, labels)])
    assert data.without_labels().example().labels is None
    with pytest.raises(LabelError):
        data.example()


def test_inputs_may_be_nested() -> None:
    data = open_data([{"x": X, "past": (MASK, {"b": MASK, "a": Y})}]).named(("x", "past"))
    batch = data.example()
    assert [len(x.shape) for x in batch.inputs] == [4, 2, 1, 2]
    assert batch.form is not None
    assert list(batch.form.unflatten(range(4))) == ["x", "past"]


def test_a_dictionary_is_the_only_input_of_a_model_that_takes_one() -> None:
    batch = open_data([{"pixels": X, "mask": MASK}]).named(("batch",)).example()
    assert batch.form is not None
    assert batch.form.unflatten(batch.inputs) == {"batch": {"mask": batch.inputs[0], "pixels": batch.inputs[1]}}


def test_the_digest_depends_on_everything_but_the_batch_size() -> None:
    changed = X.copy()
    changed[7, 1, 2, 3] = np.nextafter(changed[7, 1, 2, 3], np.float32(9))
    variants = [
        (X, Y),
        (changed, Y),
        (X, (Y + 1) % 4),
        (X, None),
        (X[::-1], Y),
        (X.reshape(COUNT, 4, 3, 4), Y),
        (X[:9], Y[:9]),
    ]
    digests = [open_data(variant, DataForm(batch_size=4)).digest() for variant in variants]
    assert len(set(digests)) == len(variants)
    assert digests[0] == open_data((X, Y), DataForm(batch_size=3)).digest()


def test_the_digest_comes_with_a_pass() -> None:
    passes = 0

    def source() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield X

    data = open_data(source)
    list(data)
    data.digest()
    assert passes == 1


def test_samples_are_counted_by_class_whether_labels_are_used_or_not() -> None:
    labels = np.array([2, 0, 2, 1, 2])
    data = open_data((np.zeros((5, 3), np.float32), labels), DataForm(batch_size=2))
    for each in (data, data.without_labels()):
        assert each.class_counts() == {"0": 1, "1": 1, "2": 3}
    assert data.take(1).class_counts() == {"0": 1, "2": 1}
    named = replace(data, classes=("cat", "dog", "eel", "fox"))
    assert named.class_counts() == {"cat": 1, "dog": 1, "eel": 3, "fox": 0}
    for other in (None, np.zeros((5, 4, 4)), labels + 0.5):
        assert open_data((np.zeros((5, 3), np.float32), other)).without_labels().class_counts() is None


def test_data_that_changes_between_passes_is_noted() -> None:
    rng = np.random.default_rng(0)
    data = open_data(lambda: [rng.standard_normal((2, 3))])
    list(data), list(data)
    assert any("differs from pass to pass" in note for note in data.notes)


# ---- faults


def nan_at(index: int) -> np.ndarray:
    bad = X.copy()
    bad[index, 0, 0, 0] = np.nan
    return bad


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        pytest.param([], ["yielded no batches"], id="no batches"),
        pytest.param([X[:0]], ["batch 0: input 'x'", "empty"], id="empty batch"),
        pytest.param([np.float32(1)], ["single number"], id="scalar"),
        pytest.param([X[:4], X[4:, :, :2]], ["batch 1", "[3, 2, 4]", "[3, 4, 4]"], id="shapes"),
        pytest.param([X, X.astype(np.int32)], ["batch 1", "int32", "float32"], id="dtype changes"),
        pytest.param([np.array(["a", "b"])], ["batch 0: input 'x'", "a type that torch does not know"], id="text"),
        pytest.param([np.array([{}, {}])], ["a type that torch does not know"], id="objects"),
        pytest.param(["ab"], ["is a str"], id="string"),
        pytest.param([X.astype(np.complex64)], ["complex64"], id="complex"),
        pytest.param([X, nan_at(6)], ["batch 1: input 'x'", "NaN", "sample 6"], id="nan"),
        pytest.param([X.astype(np.float64) * 1e300], ["infinite"], id="overflow in float32"),
        pytest.param([(X, Y), (X, None)], ["batch 1 has no labels"], id="labels stop"),
        pytest.param([X, (X, Y)], ["batch 1 has labels"], id="labels start"),
        pytest.param([(X, Y[:5])], ["labels have shape [5] for 10 samples"], id="label count"),
        pytest.param([(X, 2 * np.eye(COUNT))], ["labels have shape [10, 10]"], id="rows"),
        pytest.param([(X, Y - 2)], ["label -2 is negative", "-1 for none"], id="negative"),
        pytest.param([(X, Y * 0 - 1)], ["no sample has a label"], id="unlabelled"),
        pytest.param([(X, Y + 0.5)], ["not integers"], id="fractions"),
        pytest.param([(X, Y, Y)], ["has 3 parts"], id="parts"),
        pytest.param([({"x": X, "mask": MASK[:5]}, Y)], ["different numbers of samples: x 10, mask 5"], id="lengths"),
        pytest.param(
            [({"x": X, "msk": MASK}, Y)], ["unknown model input 'msk'", "Did you mean 'mask'"], id="input name"
        ),
        pytest.param([({"mask": MASK}, Y)], ["input 'x' is missing"], id="input missing"),
        pytest.param([({}, Y)], ["has no input"], id="no inputs"),
        pytest.param([X, (X, MASK)], ["labels have shape [10, 4]"], id="second input as labels"),
        pytest.param([((X, MASK), Y), (X, Y)], ["1 inputs, the first batch has 2"], id="input count"),
    ],
)
def test_a_bad_batch_is_one_message_with_its_place(items: list[object], parts: list[str]) -> None:
    text = message(lambda: list(open_data(items).named(("x", "mask"))))
    assert all(part in text for part in parts), text


def test_labels_can_be_required() -> None:
    assert "batch 0 has no labels" in message(lambda: list(open_data([X]).with_labels()))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        pytest.param("breaks", ["RuntimeError: disk on fire", "source.py:", "in breaks"], id="raises"),
        pytest.param("nothing", ["no batches"], id="nothing"),
        pytest.param("number", ["returned an int", "DataLoader"], id="number"),
    ],
)
def test_a_bad_callable_is_one_message(file: Path, name: str, parts: list[str]) -> None:
    text = message(lambda: list(open_data(f"{file}:{name}")))
    assert all(part in text for part in parts), text


def test_a_callable_must_return_fresh_data(file: Path) -> None:
    data = open_data(f"{file}:stale")
    list(data)
    assert "fresh data every time" in message(lambda: list(data))


@pytest.mark.parametrize(
    ("source", "options", "part"),
    [
        pytest.param("nowhere.npz", {}, "does not exist", id="missing"),
        pytest.param(3, {}, "is not data", id="number"),
        pytest.param([X], {"image_size": 8}, "apply to folders", id="image size without folder"),
    ],
)
def test_a_bad_source_is_one_message(source: object, options: dict[str, Any], part: str) -> None:
    assert part in message(lambda: open_data(source, DataForm(**options)))


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_hostile_npz_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    array = np.empty(1, object)
    array[0] = Payload(proof)
    source = npz(tmp_path / "d.npz", x=array)
    assert "could run code" in message(lambda: list(open_data(source)))
    assert not proof.exists()
    with np.load(source, allow_pickle=True) as loaded:  # the payload is real
        loaded["x"]
    assert proof.exists()
    assert pickle.dumps(array)


@pytest.mark.parametrize(
    ("arrays", "part"),
    [
        pytest.param({"labels": Y}, "has no input", id="only labels"),
        pytest.param({"x": X, "y": Y, "labels": Y}, "both 'labels' and 'y'", id="two labels"),
        pytest.param({"x": X, "y": Y[:3]}, "different numbers of samples: x 10, y 3", id="lengths"),
        pytest.param({"x": np.float32(1)}, "single number", id="scalar"),
        pytest.param({"x": X[:0]}, "no batches", id="empty"),
    ],
)
def test_a_bad_npz_is_one_message(tmp_path: Path, arrays: dict[str, Any], part: str) -> None:
    source = npz(tmp_path / "d.npz", **arrays)
    assert part in message(lambda: list(open_data(source)))


def test_an_npz_whose_header_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (4, 2**40)})
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"1234")
    assert "promises 17,592,186,044,416" in message(lambda: list(open_data(str(tmp_path / "d.npz"))))


def test_a_damaged_npz_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    npz(path, x=X)
    content = bytearray(path.read_bytes())
    content[400] ^= 0xFF  # one bit pattern in the data: the archive's checksum sees it
    path.write_bytes(content)
    assert "not a readable .npz" in message(lambda: list(open_data(str(path))))
    path.write_bytes(content[:300])
    assert "not a readable .npz" in message(lambda: list(open_data(str(path))))


def test_other_files_are_refused_with_advice(file: Path) -> None:
    assert "numpy.savez" in message(lambda: open_data(str(file.parent / "x.npy")))
    assert f"{file}:calibration" in message(lambda: open_data(str(file)))


# ---- images


def picture(path: Path, size: tuple[int, int] = (8, 8), mode: str = "RGB", seed: int = 0) -> np.ndarray:
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode=None).save(path)
    return pixels


def test_a_folder_of_images_is_sorted_and_normalized(tmp_path: Path) -> None:
    pixels = [picture(tmp_path / f"{name}.png", seed=i) for i, name in enumerate("cab")]
    (tmp_path / "notes.txt").write_text("no image")
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 2.0)
    (x,), labels = joined(open_data(str(tmp_path), DataForm(mean=mean, std=std, batch_size=2)))
    expected = [(pixels[i].astype(np.float64) / 255 - mean) / std for i in (1, 2, 0)]
    # three float32 roundings, each at most half a unit in the last place of a value below 4
    assert np.abs(x - np.stack(expected).transpose(0, 3, 1, 2)).max() <= 3 * 2.0**-23
    assert labels is None


def test_subfolders_are_classes_in_sorted_order(tmp_path: Path) -> None:
    for i, name in enumerate(["dog/1.png", "cat/2.png", "cat/1.png"]):
        picture(tmp_path / name, seed=i)
    _, labels = joined(open_data(str(tmp_path)))
    assert labels.tolist() == [0, 0, 1]


def test_grey_and_alpha_images_become_rgb(tmp_path: Path) -> None:
    grey = picture(tmp_path / "a.png", mode="L")
    picture(tmp_path / "b.png", mode="RGBA")
    (x,), _ = joined(open_data(str(tmp_path)))
    assert np.array_equal(x[0], np.repeat(grey[None].astype(np.float32) / np.float32(255), 3, 0))
    assert x.shape == (2, 3, 8, 8)


def test_images_are_scaled_to_cover_and_cropped_in_the_centre(tmp_path: Path) -> None:
    """A flat image with a bright band exactly where the crop must fall."""
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (x,), _ = joined(open_data(str(tmp_path), DataForm(image_size=8)))
    assert x.shape == (1, 3, 8, 8)
    assert (x == 1).all()
    (wide,), _ = joined(open_data(str(tmp_path), DataForm(image_size=(4, 8))))
    assert wide.shape == (1, 3, 4, 8)
    assert wide[0, 0, 0, 0] == 0 < wide[0, 0, 0, 4] == 1


@pytest.mark.parametrize(
    ("prepare", "parts"),
    [
        pytest.param(lambda root: None, ["holds no images"], id="empty"),
        pytest.param(
            lambda root: (root / "b.png").write_bytes(b"nonsense"), ["b.png", "not a readable image"], id="corrupt"
        ),
        pytest.param(lambda root: picture(root / "b.png", (9, 8)), ["9x8", "8x8", "image_size"], id="sizes"),
        pytest.param(lambda root: picture(root / "cat" / "b.png"), ["images and folders"], id="mixed"),
        pytest.param(
            lambda root: Image.fromarray(np.zeros((8, 8), np.int32)).save(root / "b.tif"),
            ["more than 8 bits"],
            id="deep",
        ),
    ],
)
def test_a_bad_folder_is_one_message(tmp_path: Path, prepare: Callable[[Path], object], parts: list[str]) -> None:
    if parts != ["holds no images"]:
        picture(tmp_path / "a.png")
    prepare(tmp_path)
    text = message(lambda: list(open_data(str(tmp_path))))
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        pytest.param({"batch_size": 0}, "batch_size = 0 should be greater than or equal to 1", id="batch"),
        pytest.param({"mean": ()}, "mean = () should be a number, or one per channel", id="mean"),
        pytest.param({"mean": (math.nan,)}, "all finite", id="nan"),
        pytest.param({"std": (0.0,)}, "std = (0.0,) should be a positive number", id="std"),
        pytest.param({"image_size": 0}, "image_size = 0 should be a size: 224", id="size"),
    ],
)
def test_a_bad_form_of_data_is_one_message(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        DataForm(**settings)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_class_folder_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    assert "shift the class numbers" in message(lambda: list(open_data(str(tmp_path))))


# ---- checks that need the model


def test_raw_images_need_a_model_that_takes_them() -> None:
    class Scales(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float() / 255

    raw = open_data([np.zeros((2, 3, 8, 8), np.uint8)]).example()
    check_takes_integers(Scales(), raw, "data")
    assert "uint8" in message(lambda: check_takes_integers(nn.Conv2d(3, 4, 3), raw, "data"))


def test_samples_without_a_label_are_left_out_and_the_user_is_told() -> None:
    labels = np.array([0, -1, 2, -1, 1, 0, 2, -1, 3, 1])
    data = open_data([(X, labels), (X, -np.ones(len(X), np.int64))])
    (batch,) = data
    assert batch.labels is not None and batch.labels.tolist() == [0, 2, 1, 0, 2, 3, 1]
    assert np.array_equal(batch.inputs[0].numpy(), X[labels >= 0]) and batch.given.tolist() == [0, 2, 1, 0, 2, 3, 1]
    assert any("label -1 are left out" in note for note in data.notes)


@pytest.mark.parametrize("setting", ["mean", "std"])
def test_a_mean_or_deviation_of_bytes_is_noted(tmp_path: Path, setting: str) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert open_data(str(tmp_path), DataForm(**{setting: "0.5"})).notes == ()
    (note,) = open_data(str(tmp_path), DataForm(**{setting: "123.7,116.3,103.5"})).notes
    assert f"{setting} holds 123.7" in note and "divide mean and deviation by 255" in note
    with pytest.raises(DataError, match=f"{setting} has 4 numbers, but images of a folder are read with 3"):
        open_data(str(tmp_path), DataForm(**{setting: (0.1, 0.2, 0.3, 0.4)}))
