"""One block of the quantized network: weights and biases to be filled in, a quantizer on every site.

Must not know: methods, training, how values are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, fx

from calibrators.execution.blocks import Block, extract
from calibrators.execution.parametric import ParametricOp
from calibrators.execution.quantizers import ActivationQuantizer
from calibrators.graph.aten import add_constant, bind, constant, replace_args
from calibrators.graph.canonical import clip_bounds
from calibrators.graph.elementwise import constant_operand
from calibrators.grid.numerics import fake_quant
from calibrators.grid.spec import Site
from calibrators.placement.place import Placement
from calibrators.program.qdq_program import table_rows

__all__ = ["BlockBoundary", "Simulation", "channels_last", "speed_up"]

aten = torch.ops.aten


class BlockBoundary:
    """The values that cross between blocks: which of them cross as codes, and the site that gives these meaning."""

    def __init__(self, placement: Placement, blocks: tuple[Block, ...]) -> None:
        self.placement = placement
        self.home = {name: block.name for block in blocks for name in block.nodes}

    def site(self, name: str) -> Site | None:
        """Return the site of a value that crosses quantized: all its readers in other blocks read its codes."""
        site = self.placement.activation_of.get(name)
        if site is None or name not in self.home:  # model inputs cross as they are
            return None
        outside = [user for user in self.placement.nodes[name].users if self.home.get(user.name) != self.home[name]]
        return site if all(user.name in site.users for user in outside) else None


def channels_last(x: Tensor) -> Tensor:
    """Return four dimensions in the layout that convolutions like best, others unchanged."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def speed_up(graph: fx.GraphModule, weighted: Iterable[str]) -> list[ParametricOp]:
    """Make a block's own graph cheap to train through; return the modules that replace its weighted operators.

    A clip that only a quantizer reads becomes part of it. Others become hardtanh: the same values, with a gradient that
    is one kernel instead of four.
    """
    nodes = {node.name: node for node in graph.graph.nodes}
    for node in nodes.values():
        bounds = clip_bounds(node)
        if bounds is None:
            continue
        reader, *others = node.users
        if not others and isinstance(_module(graph, reader), ActivationQuantizer):
            reader.args = (node.args[0], bounds)
            graph.graph.erase_node(node)
        elif node.target is aten.clamp.default and all(map(math.isfinite, bounds)):
            node.target, node.args, node.kwargs = aten.hardtanh.default, (node.args[0], *bounds), {}
    operators = []
    for index, name in enumerate(weighted):
        node = nodes[name]
        arguments = bind(node)
        operators.append(ParametricOp(node.target, dense=arguments.get("groups", 1) == 1))
        graph.add_submodule(f"weighted_{index}", operators[-1])
        with graph.graph.inserting_before(node):
            call = graph.graph.call_module(f"weighted_{index}", tuple(arguments.values()))
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    graph.graph.lint()
    graph.recompile()
    return operators


def _module(graph: fx.GraphModule, node: fx.Node) -> torch.nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


class Simulation(torch.nn.Module):
    """A block with an ActivationQuantizer at every site and weights and biases that can be set by site name.

    forward takes block.inputs and returns block.outputs, each quantized where it crosses quantized.
    quantizers: by name of the site that owns the scale; shared by all blocks that need it.
    """

    def __init__(
        self, placement: Placement, boundary: BlockBoundary, block: Block, quantizers: Mapping[str, ActivationQuantizer]
    ) -> None:
        super().__init__()
        self.block, self.placement = block, placement
        self.graph = extract(placement.graph, block)
        self._nodes = {node.name: node for node in self.graph.graph.nodes}
        self.weights: dict[str, str] = {}
        self.biases: dict[str, str] = {}
        self.sites: list[str] = []
        self._attributes: dict[str, str] = {}
        for site in placement.sites:
            if site.kind == "activation":
                self._quantize(site, boundary, quantizers)
            elif site.kind == "constant":
                self._round(site)
            else:
                self._free(site)
        for name in placement.lookups:
            if name in self._nodes:
                self._round_table(self._nodes[name])
        self._weighted = speed_up(self.graph, block.weighted)

    @cached_property
    def quantizers(self) -> dict[str, ActivationQuantizer]:
        """The quantizers in this block, by name of the site that owns the scale, in order of first use."""
        found: dict[str, ActivationQuantizer] = {}
        for name in self.sites:
            root = self.placement.root(self.placement.by_name[name]).name
            found[root] = getattr(self.graph, self._attributes[root])
        return found

    def _quantize(self, site: Site, boundary: BlockBoundary, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        """Insert the site's quantizer after its value, or at the entry of the block if it crosses unquantized."""
        node = self._nodes.get(site.node)
        moved = site.shares is not None and site.clip is None and not site.joined  # these are on the grid already
        if node is None or moved or (node.op == "placeholder" and boundary.site(site.node) is not None):
            return
        readers = [user for user in node.users if user.name in site.users]
        output = self.graph.graph.output_node()
        if node.op != "placeholder" and output in node.users and boundary.site(site.node) is not None:
            readers.append(output)
        if not readers:
            return
        root = self.placement.root(site).name
        attribute = self._attributes.setdefault(root, f"quantizer_{len(self._attributes)}")
        self.graph.add_submodule(attribute, quantizers[root])
        with self.graph.graph.inserting_after(node):
            quantized = self.graph.graph.call_module(attribute, (node,))
        for reader in readers:
            reader.replace_input_with(node, quantized)
        self.sites.append(site.name)

    def _round(self, site: Site) -> None:
        """Replace a constant operand by the values of its codes."""
        for user in (self._nodes[name] for name in site.users if name in self.block.nodes):
            operand = constant_operand(user)
            assert operand is not None
            values = fake_quant(self.placement.values(site), self.placement.constants[site.name])
            with self.graph.graph.inserting_before(user):
                rounded = self.graph.graph.get_attr(add_constant(self.graph, f"{site.name}_rounded", values))
            user.replace_input_with(operand, rounded)

    def _free(self, site: Site) -> None:
        """Replace a weight or bias by a buffer that can be set."""
        users = [self._nodes[user] for user in site.users if user in self.block.weighted]
        if not users:
            return
        names = self.weights if site.kind == "weight" else self.biases
        names[site.name] = f"{site.kind}_{len(names)}"
        self.graph.register_buffer(names[site.name], torch.empty(0))
        for user in users:
            with self.graph.graph.inserting_before(user):
                value = self.graph.graph.get_attr(names[site.name])
            replace_args(user, **{site.kind: value})

    def _round_table(self, node: fx.Node) -> None:
        """Replace the table of an embedding by its rows in 8 bits, also where it shares the codes of a layer."""
        codes, scale = table_rows(constant(self.graph, node.all_input_nodes[0]))
        with self.graph.graph.inserting_before(node):
            table = self.graph.graph.get_attr(add_constant(self.graph, f"{node.name}_rows", codes * scale[:, None]))
        node.replace_input_with(node.all_input_nodes[0], table)

    def reading(self, name: str) -> fx.GraphModule:
        """Return the part of the block that computes the input of one of its weighted operators, with what is set now.

        It takes block.inputs and returns a tensor.
        """
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph.graph, copies)
        target = f"weighted_{self.block.weighted.index(name)}"
        (operator,) = (node for node in self.graph.graph.nodes if node.target == target)
        graph.output(copies[operator.args[0]])
        part = fx.GraphModule(self.graph, graph)
        part.graph.eliminate_dead_code()
        part.recompile()
        return part

    def train_in(self, precision: torch.dtype, gradients: torch.dtype) -> None:
        """Enter training mode; operators that mix all channels compute values and gradients in these precisions."""
        self.train()
        for operator in self._weighted:
            operator.train_in(precision, gradients)

    def set(self, site: str, value: Tensor) -> None:
        """Set the float values that a weight or bias site computes with."""
        names = self.weights if site in self.weights else self.biases
        setattr(self.graph, names[site], value)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.graph(*inputs)
        return outputs
