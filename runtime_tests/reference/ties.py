"""Find the values of a planned program whose kernels round differently on some processors.

Must not know: ONNX, sessions, how parameters were chosen.
"""

from __future__ import annotations

from collections.abc import Iterable

from calibrators.graph.aten import shape_of
from calibrators.grid.kernel_tables import differing
from calibrators.grid.processors import FAMILIES, PROCESSORS
from calibrators.record import Ties
from runtime_tests.reference.kernel_plan import KernelPlan, site_of

__all__ = ["ties_of"]


def ties_of(plan: KernelPlan, processors: Iterable[str] = tuple(PROCESSORS)) -> list[Ties]:
    """Return the values of which processors compute different codes from the same codes, in the order of computation.

    processors: names of families (calibrators.grid.processors).
    """
    families, found = [FAMILIES[name] for name in processors], []
    for quantizer in (node for node in plan.program.graph.nodes if node in plan.kernels):
        kernel = plan.kernels[quantizer]
        if kernel.tied is None:
            continue
        broadcast = len({tuple(shape_of(node)) for node in kernel.inputs}) > 1
        different = differing(*kernel.tied, families, broadcast=broadcast)
        if different.any():
            found.append(Ties(site_of(quantizer), kernel.tied[0], int(different.sum()), different.size))
    return found
