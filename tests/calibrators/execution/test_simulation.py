"""Simulated blocks: chained, with what was calibrated, they are the reference program in every bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.execution.blocks import partition
from calibrators.execution.quantizers import ActivationQuantizer
from calibrators.execution.simulation import BlockBoundary, Simulation
from calibrators.graph.aten import module_path
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.walk import walk
from calibrators.grid.numerics import dequantize
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from calibrators.program.qdq_program import DEQUANTIZE
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import capture
from tests.support.architectures import construct
from tests.support.networks import NETWORKS, build, randomize

STRUCTURES = [*NETWORKS, "shufflenet", "densenet", "unet", "pyramid", "detector", "wave", "two-inputs", "efficientnet",
              "senet", "pools", "paddings", "gpt", "vit", "lstm", "odd", "arithmetic", "slices"]  # fmt: skip
LIMITS = [(1, 1), (3, 16)]
"""`chain` and `largest` of the partition: the finest there is, and the one that methods train."""

CASES = [(name, *bits) for name in ("mixed", "shared", *STRUCTURES) for bits in ((8, 8), (4, 4))] + [("skips", 2, 4)]


class MixedReaders(nn.Module):
    """Values read as codes and as floats, in their own block and in others; two of them are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        a = F.relu(self.a(x))
        b = self.b(a)
        c = self.c(F.relu(b)) + torch.tanh(b)  # b as codes and in float
        pooled = torch.erf(c).mean((2, 3))
        left = self.left(pooled)
        right = self.right(left) * torch.exp(-left)  # a float value of a layer, read as codes as well
        return self.head(right), left, a


class Shared(nn.Module):
    """One convolution called twice; a clip of codes that are also read without it; a pool that shares their scale."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.point, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(self.block(x))
        clipped = self.point(F.hardtanh(y, -0.5, 1.0))
        pooled = self.block(F.max_pool2d(F.relu(y), 3, 1, 1))
        return self.head((clipped + y + pooled).mean((2, 3)))


class Skips(nn.Module):
    """Identity branches whose taps stay wide in the kernels they were folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.first(x) * 0.2)
        return self.last(F.relu(x + self.second(x) * 0.2))


OWN: dict[str, Callable[[], nn.Module]] = {"mixed": MixedReaders, "shared": Shared, "skips": Skips}


@cache
def captured(name: str) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    model: nn.Module
    inputs: tuple[Tensor, ...]
    if name in OWN:
        model, inputs = randomize(OWN[name]()), (torch.randn(8, 3, 7, 6, generator=torch.Generator().manual_seed(1)),)
    elif name in NETWORKS:
        model, x = build(name)
        inputs = (x,)
    else:
        model, inputs = construct(name)
    return fold(capture(model, inputs)), inputs


@cache
def calibrated(name: str, weight_bits: int, activation_bits: int) -> CalibrationResult:
    graph, inputs = captured(name)
    options = PlacementOptions(weight_bits=weight_bits, activation_bits=activation_bits)
    return calibrate(graph, [inputs], method="minmax", placement=options)


def simulated(result: CalibrationResult, chain: int, largest: int) -> tuple[BlockBoundary, list[Simulation]]:
    """The blocks of a partition, with everything that was calibrated."""
    placement = result.placement
    weighted = [user for site in placement.sites if site.kind == "weight" for user in site.users]
    blocks = partition(placement.graph, weighted, chain=chain, largest=largest)
    boundary = BlockBoundary(placement, blocks)
    quantizers = {name: ActivationQuantizer(qparams, nonnegative=False) for name, qparams in result.activations.items()}
    simulations = [Simulation(placement, boundary, block, quantizers).eval() for block in blocks]
    for simulation in simulations:
        for name in simulation.weights:
            simulation.set(name, dequantize(result.weights[name].codes, result.weights[name].qparams))
        for name in simulation.biases:
            simulation.set(name, dequantize(result.biases[name].codes, result.biases[name].qparams))
    return boundary, simulations


def values_of(simulations: Sequence[Simulation], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Model inputs and everything that crosses between blocks, by fx name."""
    placeholders = [node.name for node in simulations[0].placement.graph.graph.nodes if node.op == "placeholder"]
    values = dict(zip(placeholders, inputs, strict=True))
    with torch.no_grad():
        for simulation in simulations:
            made = simulation(*(values[name] for name in simulation.block.inputs))
            values |= dict(zip(simulation.block.outputs, made, strict=True))
    return values


@dataclass(frozen=True, eq=False)
class Reference:
    """The outputs of the program, its float values by fx name, and dequantized ones by site name."""

    outputs: Sequence[Tensor]
    floats: dict[str, Tensor]
    dequantized: dict[str, Tensor]


def reference(result: CalibrationResult, inputs: Sequence[Tensor]) -> Reference:
    floats: dict[str, Tensor] = {}
    dequantized: dict[str, Tensor] = {}

    outputs: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for node, values in walk(result.program, inputs):
            if node.op == "output":
                outputs = values[node]
            elif node.target is DEQUANTIZE:
                dequantized[str(node.args[-1])] = values[node]
            else:
                floats[node.name] = values[node]
    return Reference(outputs, floats, dequantized)


def returned(result: CalibrationResult) -> list[str]:
    """fx names of the graph's outputs."""
    return [node.name for node in result.placement.graph.graph.output_node().args[0]]  # type: ignore[union-attr, misc]


@pytest.mark.parametrize(("name", "weight_bits", "activation_bits"), CASES)
def test_chained_blocks_are_the_program(name: str, weight_bits: int, activation_bits: int) -> None:
    result = calibrated(name, weight_bits, activation_bits)
    inputs = captured(name)[1]
    assert sum(site.spec.tap_bits == 8 for site in result.placement.sites) == (2 if name == "skips" else 0)
    expected = reference(result, inputs)
    for limits in LIMITS:
        boundary, simulations = simulated(result, *limits)
        values = values_of(simulations, inputs)
        for output, found in zip(expected.outputs, returned(result), strict=True):
            assert torch.equal(values[found], output), found
        for simulation in simulations:
            for crossing in simulation.block.outputs:
                site = boundary.site(crossing)
                wanted = expected.dequantized[site.name] if site else expected.floats[crossing]
                assert torch.equal(values[crossing], wanted), crossing


def node_of(result: CalibrationResult, path: str) -> str:
    """fx name of the last call that a module made."""
    return [n.name for n in result.placement.graph.graph.nodes if n.op == "call_function" and module_path(n) == path][
        -1
    ]


def test_a_value_crosses_as_codes_where_everyone_outside_reads_them() -> None:
    result = calibrated("mixed", 8, 8)
    boundary, simulations = simulated(result, chain=1, largest=1)
    crossing = {name for simulation in simulations for name in simulation.block.outputs}
    convolution, left, right = (node_of(result, path) for path in ("b", "left", "right"))
    assert {convolution, left} < crossing
    assert boundary.site(convolution) is result.placement.activation_of[convolution]
    assert boundary.site(left) is None  # an exponential reads it in float
    assert left in result.placement.activation_of  # and a layer reads its codes
    assert right not in result.placement.activation_of and boundary.site(right) is None
    assert boundary.site("x") is None  # model inputs cross as they are


def test_blocks_that_need_a_quantizer_share_it() -> None:
    result = calibrated("shared", 8, 8)
    _, simulations = simulated(result, chain=1, largest=1)
    held = [simulation.quantizers for simulation in simulations]
    assert {name for quantizers in held for name in quantizers} == set(result.activations)
    for name in result.activations:
        assert len({id(quantizers[name]) for quantizers in held if name in quantizers}) == 1
    weights = [name for simulation in simulations for name in simulation.weights]
    assert Counter(weights)["block.weight"] == 3 and len(set(weights)) == 4
    biases = [name for simulation in simulations for name in simulation.biases]
    assert len(biases) == len(set(biases)) == 6


def test_what_is_set_is_what_computes() -> None:
    """Every weight and bias of every block matters, and gets its gradient."""
    result = calibrated("residual", 8, 8)
    _, simulations = simulated(result, *LIMITS[1])
    values = values_of(simulations, captured("residual")[1])
    learned = set()
    for simulation in simulations:
        inputs = [values[name] for name in simulation.block.inputs]
        leaves = {}
        for kind, names in ((result.weights, simulation.weights), (result.biases, simulation.biases)):
            for name in names:
                leaves[name] = dequantize(kind[name].codes, kind[name].qparams).requires_grad_()
                simulation.set(name, leaves[name])
        for quantizer in simulation.quantizers.values():
            quantizer.learn(None, scale=True)
        simulation.train()
        sum(output.square().sum() for output in simulation(*inputs)).backward()  # type: ignore[union-attr]
        assert leaves and all(leaf.grad is not None and bool(leaf.grad.any()) for leaf in leaves.values())
        for name, quantizer in simulation.quantizers.items():
            assert quantizer.log_scale.grad is not None and bool(quantizer.log_scale.grad)
            learned.add(name)
    assert learned == set(result.activations)


@pytest.mark.parametrize("name", ["mixed", "shared", "pooled", "transformer"])
def test_what_an_operator_reads_can_be_had_without_running_it(name: str) -> None:
    result = calibrated(name, 4, 4)
    inputs = captured(name)[1]
    for limits in LIMITS:
        _, simulations = simulated(result, *limits)
        values = values_of(simulations, inputs)
        for simulation in simulations:
            given = [values[x] for x in simulation.block.inputs]
            for index, layer in enumerate(simulation.block.weighted):
                seen: list[Tensor] = []
                operator = getattr(simulation.graph, f"weighted_{index}")
                hook = operator.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                with torch.no_grad():
                    simulation(*given)
                    part = simulation.reading(layer)
                    read = part(*given)
                hook.remove()
                assert torch.equal(read, seen[0])
                assert f"weighted_{index}" not in {node.target for node in part.graph.nodes}


def test_a_clip_that_only_a_quantizer_reads_is_part_of_it() -> None:
    """In `shared` the clip of codes that are also read without it stays an operator."""
    result = calibrated("residual", 8, 8)
    _, simulations = simulated(result, *LIMITS[1])
    targets = [node.target for simulation in simulations for node in simulation.graph.graph.nodes]
    clips = [node for node in result.placement.graph.graph.nodes if clip_bounds(node) is not None]
    assert clips and not {node.target for node in clips} & set(targets)
