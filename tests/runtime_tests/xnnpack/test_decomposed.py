"""Programs in ExecuTorch's form compute the codes of the reference, 128 less, and have the patterns of XNNPACK."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import ModelError
from calibrators.graph.aten import constant
from calibrators.graph.operators import name_of
from calibrators.placement.layer_rules import LayerRule
from calibrators.placement.placement_options import PlacementOptions
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from runtime_tests.reference.execute import plan, run
from runtime_tests.xnnpack.decomposed import decomposed
from tests.support.networks import build

pairs = torch.ops.quantized_decomposed
CHANCE = 2e-3
"""Share of codes that may be one step off: torch multiplies by the reciprocal of the scale and adds up floats."""


class Forms(nn.Module):
    """Paddings, splits, a clip of codes, a concatenation, moves before a quantizer, a sort and a maximum in float."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.a(x))
        left, right = self.b(nn.functional.pad(x, (1, 1, 1, 1))).chunk(2, 1)
        x = x + self.c(torch.cat([right, left], 1)).clamp(-0.2, 0.3)
        x = torch.stack(x.unbind(2)[::2], 2).sort(3)[0]
        found: Tensor = self.head(nn.functional.max_pool2d(x, 2).amax((2, 3)))
        return found


@functools.cache
def made(network: str, target: str = "xnnpack", rule: LayerRule | None = None) -> tuple[fx.GraphModule, Tensor]:
    """Return the program of a network, and an input."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = (Forms().eval(), torch.randn(4, 3, 8, 8)) if network == "forms" else build(network, batch=4)
    graph = fold(capture(model, x[:1], free_batch=False))
    placement = PlacementOptions(layers=() if rule is None else (rule,))
    result = calibrate(graph, list(x.split(1)), method="minmax", target=target, placement=placement)
    return result.program, x[:1]


@pytest.mark.parametrize("network", ["forms", "pooled", "residual"])
def test_codes_are_those_of_the_program(network: str) -> None:
    program, x = made(network)
    literal = plan(program, integer=False)
    codes, outputs = run(literal, (x,))
    with torch.no_grad():
        found = decomposed(program, literal.sites)(x)
    for site, theirs in zip(literal.sites, found[len(outputs) :], strict=True):
        assert theirs.dtype == torch.int8
        steps = (theirs.int() + 128 - codes[site].int()).abs()
        assert int(steps.max()) <= 1 and int(steps.count_nonzero()) <= CHANCE * steps.numel() + 2, site
    for ours, theirs in zip(outputs, found, strict=False):
        assert torch.allclose(ours, theirs, atol=0.05 * float(ours.abs().max()))


@pytest.mark.parametrize("network", ["forms", "pooled"])
def test_every_layer_has_the_pattern_that_the_partitioner_looks_for(network: str) -> None:
    module = decomposed(made(network)[0])
    quantizers = {pairs.quantize_per_tensor.default}
    readable = {pairs.dequantize_per_tensor.default, pairs.dequantize_per_channel.default}
    layers = [node for node in module.graph.nodes if name_of(node.target) in ("conv2d.default", "linear.default")]
    assert layers
    for node in layers:
        (reader,) = node.users
        if reader.target is torch.ops.aten.hardtanh.default:
            (reader,) = reader.users
        assert reader.target in quantizers
        assert all(operand.target in readable for operand in node.args[:2])
    dequantizers = [node for node in module.graph.nodes if node.target in readable]
    assert all(len(node.users) == 1 for node in dequantizers)


def test_fewer_bits_are_a_clip_before_the_quantizer() -> None:
    program, _ = made("residual", rule=LayerRule("*", activation_bits=4))
    clips = [n for n in decomposed(program).graph.nodes if n.target is torch.ops.aten.hardtanh.default]
    layers = [n for n in clips if name_of(n.args[0].target) in ("conv2d.default", "linear.default")]
    assert len(layers) >= 2 and all(len(clip.users) == 1 for clip in clips)


def test_bytes_that_are_codes_become_int8() -> None:
    program, x = made("residual")
    codes, _ = run(plan(program, integer=False), (x,))
    of_bytes = copy.deepcopy(program)
    quantizer = next(node for node in of_bytes.graph.nodes if node.target is QUANTIZE)
    quantizer.replace_all_uses_with(quantizer.args[0])
    of_bytes.graph.erase_node(quantizer)
    with torch.no_grad():
        (expected,), (found,) = decomposed(program)(x), decomposed(of_bytes)(next(iter(codes.values())))
    assert torch.equal(expected, found)


def test_a_concatenation_of_different_scales_is_refused() -> None:
    program, _ = made("pooled", target="ort-cpu")
    with pytest.raises(ModelError, match="joins codes of different scales, which XNNPACK cannot; keep it in float"):
        decomposed(program)


def test_codes_of_16_bits_are_refused() -> None:
    program, _ = made("residual", target="ort-cpu", rule=LayerRule("*", activation_bits=16))
    with pytest.raises(ModelError, match="more than 8 bits"):
        decomposed(program)


class LargeBias(nn.Module):
    """A bias that is large beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.conv.weight.data.mul_(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


@pytest.mark.parametrize("target", ["ort-cpu", "xnnpack"])
def test_biases_have_the_bits_that_a_float_holds(target: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4, 4)
    program = calibrate(capture(LargeBias(), x, free_batch=False), [x], method="minmax", target=target).program
    codes = [constant(program, node.args[0]) for node in program.graph.nodes if node.target is DEQUANTIZE
             and node.args[0].op == "get_attr"]  # fmt: skip
    (bias,) = [each for each in codes if each.dtype == torch.int32]
    assert (int(bias.abs().max()) < 2**21) == (target == "xnnpack")
    if target == "xnnpack":
        decomposed(program)
    else:
        with pytest.raises(ModelError, match="is too large beside its scale"):
            decomposed(program)
