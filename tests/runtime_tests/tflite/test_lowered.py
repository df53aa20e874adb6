"""Drafts of LiteRT files: operators on codes where the plan has kernels, channels last, and what is refused."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import ModelError
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.placement_options import PlacementOptions
from calibrators.targets import tflite
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.reference.kernel_plan import plan
from runtime_tests.runtimes.tflite import KERNELS
from runtime_tests.tflite.lowered import lowered
from tests.support.networks import build


class Forms(nn.Module):
    """Paddings of both kinds, a depthwise layer, a split, a clip of codes, moves before a quantizer, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8)
        self.c, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.a(x))
        left, right = self.b(nn.functional.pad(x, (1, 1, 1, 1))).chunk(2, 1)
        x = self.c(torch.cat([right, left], 1)).clamp(-0.2, 0.3)
        found: Tensor = self.head(nn.functional.max_pool2d(x, 2).mean((2, 3)))
        return found


class After(nn.Module):
    """An operator after a layer."""

    def __init__(self, operator: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.operator = nn.Conv2d(3, 4, 1), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(self.conv(x))


def chosen() -> nn.Module:
    return After(lambda x: x.argmax(1))


def averaged() -> nn.Module:
    return After(lambda x: nn.functional.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False))


def reflected() -> nn.Module:
    return After(lambda x: nn.functional.pad(x, (1, 1, 1, 1), mode="reflect"))


@functools.cache
def made(network: str, target: str = "tflite", rule: LayerRule | None = None) -> fx.GraphModule:
    """Return the program of a network."""
    networks = {"forms": Forms, "chosen": chosen, "averaged": averaged, "reflected": reflected}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = (networks[network](), torch.randn(2, 3, 8, 8)) if network in networks else build(network, batch=2)
    graph = fold(capture(model.eval(), x[:1], free_batch=False))
    placement = PlacementOptions(layers=() if rule is None else (rule,))
    return calibrate(graph, list(x.split(1)), method="minmax", target=target, placement=placement).program


@pytest.mark.parametrize("network", ["forms", "residual", "pooled"])
def test_kernels_run_on_codes_where_they_are_planned(network: str) -> None:
    program = made(network)
    draft = lowered(program).draft
    types = [each["type"] for each in draft.tensors]
    found = Counter(
        KERNELS[each["op"]]
        for each in draft.operators
        if each["op"] in KERNELS and types[each["inputs"][0]] == types[each["outputs"][0]] == "INT8"
    )
    planned = plan(program, tflite.TARGET, own=True).counts
    assert found == Counter({name: count for name, count in planned.items() if count}) and sum(found.values()) > 3


def test_every_tensor_is_written_once_before_it_is_read() -> None:
    draft = lowered(made("forms")).draft
    known = {*draft.inputs, *(index for index, each in enumerate(draft.tensors) if each["data"] is not None)}
    for each in draft.operators:
        assert known >= set(each["inputs"])
        assert not known & set(each["outputs"])
        known |= set(each["outputs"])
    assert known >= set(draft.outputs)
    assert len({each["name"] for each in draft.tensors}) == len(draft.tensors)


def test_sites_are_tensors_of_int8_with_channels_last() -> None:
    program = made("forms")
    found = lowered(program)
    by_name = {each["name"]: each for each in found.draft.tensors}
    shapes = {}
    for step in plan(program, tflite.TARGET, own=True).steps:
        if step.quantized:
            held = by_name[found.sites[step.site]]
            assert held["type"] == "INT8" and len(held["quantization"]["scale"]) == 1
            shapes[step.site] = held["shape"]
    assert [1, 8, 8, 3] in shapes.values() and [1, 5] in shapes.values()


def test_paddings_are_those_of_the_program() -> None:
    draft = lowered(made("forms")).draft
    layers = {each["op"]: each["options"][1] for each in reversed(draft.operators) if "CONV" in each["op"]}
    assert layers["CONV_2D"]["padding"] == 0 and layers["DEPTHWISE_CONV_2D"]["padding"] == 1
    assert layers["DEPTHWISE_CONV_2D"]["depthMultiplier"] == 1
    assert Counter(each["op"] for each in draft.operators)["PAD"] == 1


def test_limits_of_codes_follow_the_kernel() -> None:
    few = made("residual", rule=LayerRule("*", activation_bits=4))
    operators = Counter(each["op"] for each in lowered(few).draft.operators)
    assert operators["MINIMUM"] > 3 and lowered(made("mlp")).draft.operators[1]["op"] == "FULLY_CONNECTED"


def test_weights_keep_their_codes_and_channels() -> None:
    draft = lowered(made("forms")).draft
    depthwise = next(each for each in draft.operators if each["op"] == "DEPTHWISE_CONV_2D")
    weight, bias = (draft.tensors[index] for index in depthwise["inputs"][1:])
    assert weight["shape"] == [1, 3, 3, 8] and weight["quantization"]["quantizedDimension"] == 3
    assert bias["type"] == "INT32" and len(bias["quantization"]["scale"]) == 8
    (scale,) = draft.tensors[depthwise["inputs"][0]]["quantization"]["scale"]
    products = np.float32(scale) * np.asarray(weight["quantization"]["scale"], np.float32)
    assert np.array_equal(products, np.asarray(bias["quantization"]["scale"], np.float32))


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda: made("chosen"), "argmax has no form in a LiteRT file here"),
        (lambda: made("averaged"), "average pool that leaves out its padding"),
        (lambda: made("reflected"), "padding with something else than zeros"),
        (lambda: made("residual", "ort-cpu", LayerRule("*", activation_bits=16)), "more than 8 bits"),
    ],
    ids=["operator", "average", "padding", "16 bits"],
)
def test_what_has_no_form_is_refused(program: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        lowered(program())  # type: ignore[operator]
