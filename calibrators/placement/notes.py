"""Notes for the user on a placement: settings that could not be kept, and layers that stay in float.

Must not know: how placement decides, methods, ONNX.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import fx

from calibrators.errors import argument, counted
from calibrators.graph.aten import layer_name, operator_name
from calibrators.graph.operators import WEIGHTED
from calibrators.grid.spec import Site
from calibrators.grid.target import Target
from calibrators.placement.fastest import LeftInFloat
from calibrators.placement.layer_rules import WIDE, RuleList
from calibrators.placement.sites import rescales

__all__ = ["notes_on_floats", "notes_on_rules", "notes_on_weight_only"]


def notes_on_floats(graph: fx.GraphModule, left: LeftInFloat | None) -> Iterator[str]:
    """Yield one sentence on the layers that are left in float, if there are any."""
    if left is None:
        return
    layers = [node for node in graph.graph.nodes if node.name in left.nodes and node.target in WEIGHTED]
    yield (
        f"{counted(len(layers), 'layer')} left in float, which is faster ({left.ms:.2f} instead of "
        f"{left.integer_ms:.2f} ms a sample, as predicted for x86-64 with VNNI); {argument('placement', 'integer')} "
        "quantizes them"
    )


def notes_on_rules(rules: RuleList, sites: Iterable[Site], weighted: Sequence[fx.Node]) -> Iterator[str]:
    """Yield one sentence for every layer that lacks what a rule of the user asks for."""
    specs = {(site.kind, user): site.spec for site in sites for user in site.users}

    def missed(setting: str, node: fx.Node, found: int) -> bool:
        decider = rules.decider(setting, node.name)
        asked = decider is not None and (decider.flag == "layers" or found == WIDE)
        return asked and found > rules.value(setting, node.name)

    for node in weighted:
        name, weight, read = layer_name(node), specs["weight", node.name], specs.get(("activation", node.name))
        if missed("weight_bits", node, weight.bits) and not rescales(node):
            yield f"{name}: its weight keeps {weight.bits} bits, because another layer shares the weight"
        if read is not None and missed("activation_bits", node, read.bits):
            yield f"{name}: its input keeps {read.bits} bits, because another layer shares the value or its scale"
        if weight.symmetric and rules.value("symmetric", node.name) is False:
            yield f"{name}: its weight stays symmetric, because only weights below {weight.bits} bits have a zero point"


def notes_on_weight_only(
    rules: RuleList, target: Target, weighted: Sequence[fx.Node], weight_only: Collection[fx.Node]
) -> Iterator[str]:
    """Yield one sentence for every layer that is not weight-only despite a rule, or whose rule has no effect."""
    for node in weighted:
        if node in weight_only:
            decider = rules.decider("activation_bits", node.name)
            if decider is not None and decider.flag == "layers":
                yield f"{layer_name(node)}: activation_bits has no effect, because the layer is weight_only"
        elif rules.value("weight_only", node.name):
            if node.target in target.weight_only:
                yield f"{layer_name(node)}: not weight_only, because another layer shares its weight"
            else:
                yield f"{layer_name(node)}: not weight_only, because {operator_name(node.target)} has no such kernel"
    others = {operator_name(node.target) for node in weighted if node.target not in target.weight_only}
    everywhere = any(matched.rule.weight_only and not matched.flag for matched in rules.rules)
    if everywhere and others:
        yield f"weight_only does not apply to {', '.join(sorted(others))}, for which there is no such kernel"
