"""Move scales of activations by a few units in the last place until all processors of the target round alike.

Kernels of sums, products and sigmoids compute in another order on some processors (calibrators.grid.kernel_tables), so
that codes differ where a result lies on a tie. All tuples of codes can be checked, and other scales have other ties.
Scales are settled in the order in which values are computed, each against all kernels whose other scales are settled.

Must not know: how parameters were chosen, ONNX, runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from calibrators.graph.aten import operator_name, shape_of
from calibrators.graph.canonical import clip_bounds
from calibrators.grid.kernel_tables import KERNELS, CodeGrid, arithmetics, differing
from calibrators.grid.processors import FAMILIES
from calibrators.grid.spec import QParams, Site
from calibrators.placement.place import Placement
from calibrators.program.qdq_program import code_bounds
from calibrators.record import MovedScale, Settled, Ties

__all__ = ["moved", "settle"]

LARGEST_MOVE = 2**13
"""Units in the last place by which a scale may move: at most 1e-3 of the scale, 0.25 steps at the end of 8 bits.
Scales with ratios of small integers, on which many sums are ties, need up to 2**12, others none or a few."""

SIZES = [*range(1, 9), *(2**k for k in range(4, LARGEST_MOVE.bit_length()))]
MOVES = [0, *(sign * size for size in SIZES for sign in (1, -1))]
"""Moves to try, in order."""

KERNEL_OF = {"adaptive_avg_pool2d": "mean"}
"""Kernels of operators that have another name."""


@dataclass(frozen=True, eq=False)
class _Kernel:
    """A kernel that processors compute in different orders, and the sites of what it reads and of what it writes.

    count: how many codes of the input it adds up.
    """

    name: str
    inputs: tuple[Site, ...]
    output: Site
    broadcast: bool
    count: int


def settle(placement: Placement, activations: Mapping[str, QParams]) -> tuple[dict[str, QParams], Settled | None]:
    """Return the parameters with scales at which processors round alike, and what was moved and what still differs.

    Scales that an operator fixes stay.
    """
    settled, owned = dict(activations), _by_owner(placement)
    families = [FAMILIES[name] for name in placement.target.rounding_alike]
    if not owned or len(families) < 2:
        return settled, None

    def ties(kernel: _Kernel) -> Ties | None:
        *read, written = (_grid(site, placement.qparams_of(site, settled)) for site in (*kernel.inputs, kernel.output))
        inputs = [replace(grid, count=kernel.count) for grid in read]
        found = differing(kernel.name, inputs, written, families, broadcast=kernel.broadcast)
        return Ties(kernel.output.name, kernel.name, int(found.sum()), found.size) if found.any() else None

    def ties_after(owner: str, move: int) -> list[Ties]:
        """Move a scale and return what still differs of the kernels that it decides."""
        settled[owner] = moved(activations[owner], move)
        return [tie for kernel in owned[owner] if (tie := ties(kernel)) is not None]

    moves: list[MovedScale] = []
    left: list[Ties] = []
    for owner in owned:
        best = _best(partial(ties_after, owner), MOVES if _is_free(placement.by_name[owner]) else MOVES[:1])
        left += ties_after(owner, best)
        moves += [MovedScale(owner, best)] * bool(best)
    kernels = sum(map(len, owned.values()))
    return settled, Settled(placement.target.rounding_alike, kernels, tuple(moves), tuple(left))


def _best(ties_after: Callable[[int], Sequence[Ties]], moves: Sequence[int]) -> int:
    """Return the first move that leaves no ties, else the first of those that leave the fewest."""
    best, fewest = 0, math.inf
    for move in moves:
        count = sum(tie.differing for tie in ties_after(move))
        if count < fewest:
            best, fewest = move, count
        if not count:
            break
    return best


def _is_free(site: Site) -> bool:
    """Return whether the scale may move: unless an operator fixes it."""
    return site.fixed is None or site.kind == "constant"


def _by_owner(placement: Placement) -> dict[str, list[_Kernel]]:
    """Return the kernels by the name of the last site whose scale can remove their ties, in the order of sites."""
    order = {site.name: index for index, site in enumerate(placement.sites)}
    owned: dict[str, list[_Kernel]] = {}
    for kernel in _kernels(placement):
        sites = (*kernel.inputs, kernel.output)
        roots = [placement.root(site) for site in sites]
        free = [root for root in roots if _is_free(root)] or roots
        owned.setdefault(max(free, key=lambda root: order[root.name]).name, []).append(kernel)
    return dict(sorted(owned.items(), key=lambda item: order[item[0]]))


def _kernels(placement: Placement) -> Iterator[_Kernel]:
    """Yield the kernels on codes of 8 bits that processors compute in different orders."""
    families = [FAMILIES[name] for name in placement.target.rounding_alike]
    for node in placement.graph.graph.nodes:
        name = operator_name(node.target).split(".")[0] if node.op == "call_function" else ""
        name = KERNEL_OF.get(name, name)
        if name not in KERNELS or node.target not in placement.target.integer_ops:
            continue
        operands = node.args[: KERNELS[name]]
        sites = [*(_read(placement, operand, node) for operand in operands), _written(placement, node)]
        if any(site is None or site.spec.is_wide for site in sites):
            continue
        *inputs, output = (site for site in sites if site is not None)
        if name == "mean" and math.prod(shape_of(node)[2:]) > 1:  # of parts of the image, which has no kernel
            continue
        shapes = [shape_of(operand) for operand in operands]
        is_broadcast = len({*shapes}) > 1
        if len(arithmetics(name, families, broadcast=is_broadcast)) > 1:
            count = math.prod(shapes[0][2:]) if name == "mean" else 1
            yield _Kernel(name, tuple(inputs), output, is_broadcast, count)


def _read(placement: Placement, operand: object, reader: fx.Node) -> Site | None:
    """Return the site whose codes an operator reads; None for floats."""
    site = placement.activation_of.get(operand.name) if isinstance(operand, fx.Node) else None
    return site if site is not None and reader.name in site.users else None


def _written(placement: Placement, node: fx.Node) -> Site | None:
    """Return the site of the codes that a kernel writes, maybe after a clip that is part of it; None for floats."""
    while node.name not in placement.activation_of and len(node.users) == 1:
        node = next(iter(node.users))
        if clip_bounds(node) is None:
            return None
    return placement.activation_of.get(node.name)


def _grid(site: Site, qparams: QParams) -> CodeGrid:
    """Return the codes of a site in plain numbers."""
    low, high = code_bounds(site, qparams)
    return CodeGrid(float(qparams.scale), int(qparams.zero_point), low, high, torch.iinfo(site.spec.dtype).min)


def moved(qparams: QParams, move: int) -> QParams:
    """Return the parameters with a scale that is `move` float32 numbers larger."""
    scale: Tensor = (qparams.scale.to(torch.float32).view(torch.int32) + move).view(torch.float32)
    return replace(qparams, scale=scale)
