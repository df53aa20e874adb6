"""Inputs as bytes: how settings name them, and data as bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrators.errors import DataError, InputError, UnknownNameError
from exporter.inputs.form import DataForm
from exporter.inputs.open import open_data
from exporter.inputs.raw import RawInput, RawInputs, parse_coded, parse_layouts

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERY = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, 2, 2).contiguous()
"""Every byte in every channel."""


@pytest.mark.parametrize(
    ("texts", "names", "found"),
    [
        (["uint8"], ["x"], {"x": "nchw"}),
        (["uint8:NHWC"], ["x"], {"x": "nhwc"}),
        (["b:uint8", "a:uint8:nhwc"], ["a", "b"], {"b": "nchw", "a": "nhwc"}),
        (["uint8:uint8:nchw"], ["uint8"], {"uint8": "nchw"}),
    ],
)
def test_texts_name_inputs(texts: list[str], names: list[str], found: dict[str, str]) -> None:
    assert parse_layouts(texts, names) == found


@pytest.mark.parametrize("text", ["", "int8", "uint8:chwn", "x:uint8:nhwc:nchw", "nhwc", "uint8:"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"is not \[NAME:\]uint8"):
        parse_layouts([text], ["x"])


def test_an_input_has_to_be_named_among_several() -> None:
    with pytest.raises(
        InputError, match="which of the inputs image, mask it means; write for example image:uint8:nhwc"
    ):
        parse_layouts(["uint8:nhwc"], ["image", "mask"])
    with pytest.raises(UnknownNameError, match="imag"):
        parse_layouts(["imag:uint8"], ["image", "mask"])
    with pytest.raises(InputError, match="'image' has two layouts, nchw and nhwc"):
        parse_layouts(["image:uint8", "image:uint8:nhwc"], ["image", "mask"])


def test_texts_name_outputs() -> None:
    names = ["boxes", "scores"]
    assert parse_coded([], names) == frozenset()
    assert parse_coded(["codes"], names) == {*names}
    assert parse_coded(["scores: codes"], names) == {"scores"}
    with pytest.raises(UnknownNameError, match="score"):
        parse_coded(["score:codes"], names)
    with pytest.raises(InputError, match="write for example codes or boxes:codes"):
        parse_coded(["uint8"], names)


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize(("mean", "std"), [IMAGENET, ((0.0,), (1.0,)), ((0.5,), (0.5,)), ((0.0,), (1 / 255,))])
def test_values_are_those_of_numpy_and_come_back(layout: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    raw = RawInput(layout, mean, std)  # type: ignore[arg-type]
    given = EVERY if layout == "nchw" else EVERY.permute(0, 2, 3, 1).contiguous()
    values = raw.values(given)
    m, s = (np.array(each, np.float32).reshape(-1, 1, 1) for each in (mean, std))
    expected = (EVERY.numpy().astype(np.float32) / np.float32(255) - m) / s
    assert np.array_equal(values.numpy(), expected)
    raw.check(given, "data")
    raw.check(values, "data")
    raw.check(values.half().float(), "data of half precision")
    for again in (values, values.half().float()):
        assert torch.equal(raw.pixels(again), given)


def checked(x: Tensor, **form: object) -> None:
    next(iter(RawInputs.of(["uint8"], ["x"], DataForm(**form)).as_values(open_data([x]))))


def test_what_cannot_be_bytes_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"batch 0: input 'x' cannot be fed as bytes: .* would be .* of 255 .*mean 0 and"
    ):
        checked(torch.randn(2, 3, 4, 4))
    with pytest.raises(DataError, match=r"cannot be fed as bytes: -0\.5 would be -127\.50"):
        checked(torch.full((1, 1, 2, 2), -0.5))
    with pytest.raises(DataError, match="is int64; give uint8"):
        checked(torch.zeros(2, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(DataError, match="only images"):
        checked(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"mean has 3 numbers, but .* has 1 channels"):
        checked(torch.zeros(2, 1, 4, 4), mean="0.1,0.2,0.3")


def test_inputs_are_found_by_their_place_after_renaming() -> None:
    raws = RawInputs.of(["input_1:uint8:nhwc"], ["input_0", "input_1"], DataForm()).renamed(["args_0", "args_1"])
    assert raws.by_name["args_1"].layout == "nhwc" and [*raws.by_name] == ["args_1"]
    table, image = raws.pixels((torch.zeros(2, 5), torch.ones(2, 3, 4, 6)))
    assert table.dtype == torch.float32 and image.shape == (2, 4, 6, 3) and image.eq(255).all()


def test_data_keep_their_digest() -> None:
    """The digest tells what was given, not what was made of it."""
    data = open_data([EVERY])
    raws = RawInputs.of(["uint8:nchw"], ["x"], DataForm(mean="0.5", std="0.5"))
    values = raws.as_values(data)
    assert values.digest() == data.digest() == raws.as_pixels(values).digest()
    assert torch.equal(raws.as_pixels(values).example().inputs[0], EVERY)
    assert values.example().inputs[0].dtype == torch.float32
