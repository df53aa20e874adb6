"""Name the values of a file that are compared: the codes of every site, and the floats that integer kernels write.

A product whose result float operators read has no codes of its own. Its floats are exact all the same, and a wrong
one could hide within the tolerance of the codes after those operators.

Must not know: runtimes, what a kernel computes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import fx

from calibrators.graph.aten import bind, is_constant, outputs_of
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from runtime_tests.ort.onnx_operators import PRODUCTS
from runtime_tests.ort.sessions import Model
from runtime_tests.reference.execute import KernelPlan, choice_of, floats_of
from runtime_tests.reference.kernel_plan import site_of
from runtime_tests.reference.ordered import CHOICES

__all__ = ["choices_of", "codes_of", "results_of"]


def codes_of(plan: KernelPlan) -> dict[str, str]:
    """Return the names that the codes of the sites have in the file, by site: their own, or those of outputs."""
    outputs = zip(outputs_of(plan.program), plan.program.meta["output_names"], strict=True)
    given = {site_of(node): name for node, name in reversed([*outputs]) if node.target is QUANTIZE}
    return {site: given.get(site, f"{site}_quantized") for site in plan.sites}


def results_of(model: Model, plan: KernelPlan) -> dict[str, str]:
    """Return the names that the floats of integer kernels have in the file, by `floats_of` the operator's name.

    Products of two activations, whose operands the file may move, are left out; so are outputs of the file.
    """
    graph = model.proto.graph
    outputs = {value.name for value in graph.output}
    readers = defaultdict(list)  # of dequantized weights, in order
    for node in graph.node:
        if node.op_type in PRODUCTS:
            readers[node.input[1]].append(node.output[0])
    found = {}
    for step, weight in _float_products(plan):
        if names := readers[f"{weight}_dequantized"]:
            found[floats_of(step)] = names.pop(0)
    return {key: name for key, name in found.items() if name not in outputs}


def choices_of(model: Model, plan: KernelPlan) -> dict[str, str]:
    """Return the names of the indices that operators of CHOICES write in the file, by `choice_of` the operator's name.

    Both sides have them in one order; where the numbers differ nothing is returned. Outputs of the file may be among
    them.
    """
    graph = model.proto.graph
    found: dict[str, str] = {}
    for kind in dict.fromkeys(CHOICES.values()):
        ours = [node.name for node in plan.program.graph.nodes if CHOICES.get(node.target) == kind]
        theirs = [node.output[-1] for node in graph.node if node.op_type == kind]
        if len(ours) != len(theirs):
            return {}
        found |= {choice_of(name): value for name, value in zip(ours, theirs, strict=True)}
    return found


def _float_products(plan: KernelPlan) -> Iterator[tuple[str, str]]:
    """Yield the name of every operator whose integer kernel writes floats, and the site of its weight."""
    for step in plan.steps:
        if step.is_integer and not step.quantized:
            for operand in bind(step.op).values():
                if isinstance(operand, fx.Node) and operand.target is DEQUANTIZE and is_constant(operand.args[0]):
                    yield step.site, str(bind(operand)["site"])
                    break
