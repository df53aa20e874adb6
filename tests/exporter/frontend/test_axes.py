"""Free axes as the command and Python name them."""

from __future__ import annotations

import pytest
import torch

from calibrators.errors import InputError, UnknownNameError
from exporter.config import make_config
from exporter.frontend.axes import FreeAxis, axes_by_input, parse_axes, tiled


def test_axes_in_text() -> None:
    assert parse_axes(["x:2,3"]) == {"x": {2: FreeAxis("x_2"), 3: FreeAxis("x_3")}}
    assert parse_axes(["x:2=height[32..512], 3=width", "x:4[..9]"]) == {
        "x": {2: FreeAxis("height", 32, 512), 3: FreeAxis("width"), 4: FreeAxis("x_4", None, 9)}
    }


@pytest.mark.parametrize("text", ["x", "x:", ":2", "x:height", "x:2;3", "x:-1", "x:0"])
def test_a_text_that_names_no_axis(text: str) -> None:
    with pytest.raises(InputError, match=r"dynamic .* name"):
        parse_axes([text])


def test_axes_in_python() -> None:
    dims = {"x": {0: torch.export.Dim("batch"), 2: torch.export.Dim("height", min=32, max=512), 3: "width"}}
    assert make_config({"dynamic": dims}).dynamic == ("x:2=height[32..512],3=width",)
    hints = {"x": [1], "y": {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC(max=8)}, "z": 3}
    assert make_config({"dynamic": hints}).dynamic == ("x:1", "y:1,2[..8]", "z:3")
    assert make_config({"dynamic": "x:2"}).dynamic == ("x:2",)


def test_axes_that_inputs_lack() -> None:
    inputs = [torch.zeros(4, 3, 8)]
    assert axes_by_input(parse_axes(["x:2"]), ["x"], inputs) == ({2: FreeAxis("x_2")},)
    with pytest.raises(UnknownNameError, match="'y'"):
        axes_by_input(parse_axes(["y:2"]), ["x"], inputs)
    with pytest.raises(InputError, match=r"x:3 names an axis that the input does not have: its shape is \[4, 3, 8\]"):
        axes_by_input(parse_axes(["x:3"]), ["x"], inputs)
    with pytest.raises(InputError, match=r"allows sizes 16 to any, but the data has 8"):
        axes_by_input(parse_axes(["x:2[16..]"]), ["x"], inputs)


def test_inputs_are_cut_and_repeated() -> None:
    x = torch.arange(6).reshape(1, 2, 3)
    assert tiled(x, (2, 5)).tolist() == [[[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]]
    assert tiled(x, (1, 2)).tolist() == [[[0, 1]]]
