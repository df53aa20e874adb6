"""Choose which affine regions of the graph become one operator, and say why the others do not.

A region is everything between a root and an exit. It is worth folding if it has a weighted operator or a batch norm
and something to absorb (batch norm, sum, per-channel constant, padding, concatenation), or if it is a chain that gets
cheaper. It may be folded if nobody outside reads its interior and the result needs no more MACs than its parts.

Must not know: how a region is emitted or checked, module names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from calibrators.graph.aten import is_constant, shape_of, where
from calibrators.graph.operators import SUMS, TRANSPOSED, facts
from calibrators.graph.rewrite import call_before
from exporter.folding.affine_map import AffineMap, NotAffine, add
from exporter.folding.clean_graph import varying_axes
from exporter.folding.interpret import (
    BATCH_NORM,
    MERGERS,
    SCALES,
    WEIGHTED,
    Analysis,
    Root,
    absorbers,
    is_computed,
    own_macs,
    terms_of,
    times,
)

__all__ = ["Candidate", "Rejected", "Selection", "refusals", "regroup_sums", "select"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Candidate:
    """A region: `nodes` in graph order, the last one the exit; `map` takes the root to the exit."""

    root: Root
    nodes: tuple[fx.Node, ...]
    map: AffineMap

    @property
    def exit(self) -> fx.Node:
        return self.nodes[-1]

    @property
    def ends_transposed(self) -> bool:
        """Whether the region only scales and shifts the output channels of a transposed convolution, its root.

        That is not affine in its own input (one cell of it feeds several phases), but its rows can be scaled.
        """
        target = self.root.node.target
        is_transposed = target in TRANSPOSED and self.root.spatial == facts(target).spatial
        keeps_cells = is_transposed and self.map.is_pointwise and self.map.is_diagonal
        return keeps_cells and is_constant(self.root.node.args[1])

    @property
    def region(self) -> tuple[fx.Node, tuple[fx.Node, ...]]:
        """The input node and the nodes that are replaced."""
        if self.ends_transposed:
            return self.root.node.args[0], (self.root.node, *self.nodes)  # type: ignore[return-value]
        return self.root.node, self.nodes


@dataclass
class Selection:
    """Accepted regions with what `accept` made of them, and the rejected ones with the reason."""

    accepted: list[tuple[Candidate, Any]] = field(default_factory=list)
    rejected: list[tuple[frozenset[fx.Node], str]] = field(default_factory=list)
    folded: dict[fx.Node, Candidate] = field(default_factory=dict)

    def reason(self, *nodes: object) -> str | None:
        """Return why the smallest rejected region that has all of `nodes` was rejected."""
        holding = [(len(region), reason) for region, reason in self.rejected if region.issuperset(nodes)]
        return min(holding, key=lambda item: item[0])[1] if holding else None


class Rejected(Exception):
    """A region may not be folded; the message says why."""


def select(analysis: Analysis, accept: Callable[[Candidate], Any]) -> Selection:
    """Return disjoint regions, found from the end of the graph backwards, the largest at each exit first.

    accept: makes the replacement of a region; raises Rejected to have a smaller one tried.
    """
    selection = Selection()
    pending = _pending(analysis)
    for exit_ in reversed(analysis.graph.graph.nodes):
        if exit_ in selection.folded:
            continue
        for root in _in_order(analysis, analysis.inherited(exit_)):
            if root.node in pending and root.node.target not in TRANSPOSED:
                continue
            nodes = _between(analysis, root, exit_)
            try:
                candidate = _judge(analysis, root, nodes)
                made = accept(candidate) if candidate is not None else None
            except Rejected as reason:
                selection.rejected.append((frozenset(nodes), str(reason)))
                continue
            if candidate is not None:
                selection.accepted.append((candidate, made))
                selection.folded |= dict.fromkeys(nodes, candidate)
                break
    selection.accepted.reverse()
    return selection


def _pending(analysis: Analysis) -> set[fx.Node]:
    """Return values of weighted operators that only a per-channel operator reads, which belongs to them.

    Without this, a batch norm between two convolutions would go to the second, and the first would keep an output that
    is not normalized.
    """
    absorbing = absorbers(analysis)
    pending: set[fx.Node] = set()
    for node in absorbing:
        is_weighted = node.target in WEIGHTED or node.target in TRANSPOSED
        if not is_weighted and sum(map(is_computed, node.all_input_nodes)) == 1:
            pending |= {each for each in node.all_input_nodes if len(each.users) == 1}
    return pending


def _between(analysis: Analysis, root: Root, exit_: fx.Node) -> tuple[fx.Node, ...]:
    """Return the nodes that lead from the root to the exit, the exit included, the root not, in graph order."""
    found: set[fx.Node] = set()
    waiting = [exit_]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [each for each in node.all_input_nodes if each is not root.node and not is_constant(each)]
    return tuple(sorted(found, key=analysis.position.__getitem__))


def _read_outside(nodes: Collection[fx.Node], interior: Iterable[fx.Node]) -> fx.Node | None:
    """Return an interior node with a reader that is not among `nodes`."""
    inside = set(nodes)
    return next((node for node in interior if any(user not in inside for user in node.users)), None)


def _judge(analysis: Analysis, root: Root, nodes: tuple[fx.Node, ...]) -> Candidate | None:
    """Return the candidate if the region may be folded, None if there is nothing to gain.

    raises: Rejected if it would be worth it and is not allowed.
    """
    linear = analysis.values[nodes[-1]][root]
    before, after = sum(map(own_macs, nodes)), analysis.merged_macs(nodes[-1], linear.map)
    candidate = Candidate(root, nodes, linear.map)
    interior, limit = nodes[:-1], min(before, linear.apart)
    if candidate.ends_transposed:
        after, interior, limit = 0, (*interior, root.node), before
    elif not _is_worth_it(nodes, before, after):
        return None
    read = _read_outside(nodes, interior)
    if read is not None:
        raise Rejected(f"the value of {where(read)} is also used elsewhere, so it has to be computed anyway")
    if after > limit:
        raise Rejected(f"cost guard: one operator would need {after / max(limit, 1):.1f} times the MACs of its parts")
    return candidate


def _is_worth_it(nodes: tuple[fx.Node, ...], before: int, after: int) -> bool:
    weighted = sum(node.target in WEIGHTED for node in nodes)
    norms = sum(node.target is BATCH_NORM for node in nodes)
    absorbs = norms > 0 or any(node.target in MERGERS for node in nodes)
    return len(nodes) > 1 and weighted + norms > 0 and (absorbs or after != before)


def _in_order(analysis: Analysis, roots: Iterable[Root]) -> list[Root]:
    """Sort roots by their place in the graph, those of one node by their dimensions: always the same order."""
    return sorted(roots, key=lambda root: (analysis.position[root.node], root.spatial))


# Sums ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Term:
    """One operand of a flattened sum; the same value may be there twice."""

    factor: float
    operand: Any


@dataclass(frozen=True)
class _RegroupedSum:
    """A sum to be written as (group) + (group) + rest."""

    top: fx.Node
    groups: list[list[_Term]]
    rest: list[_Term]


def regroup_sums(analysis: Analysis) -> bool:
    """Reorder sums so that operands which share a root and fold together stand together; return whether any did.

    x + relu(y) + conv(x) becomes (x + conv(x)) + relu(y): the same sum, whose first part is affine in x.
    """
    graph = analysis.graph.graph
    tops = [node for node in graph.nodes if node.op == "call_function" and node.target in SUMS]
    outer = [top for top in tops if not _is_inner_sum(top)]
    sums = [regrouped for top in outer if (regrouped := _regroup_sum(analysis, top)) is not None]
    newest: dict[fx.Node, fx.Node] = {}
    for regrouped in sums:
        newest[regrouped.top] = _rebuild_sum(regrouped, newest)
    graph.eliminate_dead_code()
    return bool(sums)


def _is_inner_sum(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].target in SUMS and shape_of(users[0]) == shape_of(node)


def _flatten_sum(node: fx.Node, factor: float = 1.0) -> tuple[list[_Term], list[fx.Node]]:
    """Return the operands of nested sums, and the sums themselves."""
    terms: list[_Term] = []
    sums = [node]
    for own, operand in terms_of(node):
        if is_computed(operand) and operand.target in SUMS and _is_inner_sum(operand):
            inner_terms, inner_sums = _flatten_sum(operand, factor * own)
            terms, sums = terms + inner_terms, sums + inner_sums
        else:
            terms.append(_Term(factor * own, operand))
    return terms, sums


def _regroup_sum(analysis: Analysis, top: fx.Node) -> _RegroupedSum | None:
    """Return how to reorder a sum, None if it may stay as it is."""
    terms, sums = _flatten_sum(top)
    computed = [term for term in terms if is_computed(term.operand) and shape_of(term.operand) == shape_of(top)]
    groups: list[list[_Term]] = []
    left = computed
    for root in _in_order(analysis, {root for term in computed for root in analysis.inherited(term.operand)}):
        group = _mergeable(analysis, root, [term for term in left if root in analysis.values[term.operand]], sums)
        if len(group) >= 2:
            groups.append(group)
            left = [term for term in left if term not in group]
    parts = [_content(_flatten_sum(part)[0]) for part in sums]
    if all(_content(group) in parts for group in groups):
        return None
    return _RegroupedSum(top, groups, left + [term for term in terms if term not in computed])


def _content(terms: list[_Term]) -> Counter[tuple[float, Any]]:
    return Counter((term.factor, term.operand) for term in terms)


def _mergeable(analysis: Analysis, root: Root, terms: list[_Term], sums: list[fx.Node]) -> list[_Term]:
    """Return terms whose sum is one operator that needs no more MACs than they do apart, the largest first."""

    def macs(term: _Term) -> int:
        linear = analysis.values[term.operand][root]
        return analysis.merged_macs(term.operand, linear.map) if linear.apart else 0

    group: list[_Term] = []
    total: AffineMap | None = None
    apart = 0
    for term in sorted(terms, key=macs, reverse=True):
        nodes = _between(analysis, root, term.operand) if term.operand is not root.node else ()
        if _read_outside([*nodes, *sums], nodes) is not None:
            continue
        linear = analysis.values[term.operand][root]
        cost = apart + analysis.fewest_macs(term.operand, linear)
        signed = times(linear.map, term.factor)
        try:
            joined = signed if total is None else add(total, signed)
        except NotAffine:
            continue
        if total is None or analysis.merged_macs(term.operand, joined) <= cost:
            group, total, apart = [*group, term], joined, cost
    return group


def _rebuild_sum(regrouped: _RegroupedSum, newest: dict[fx.Node, fx.Node]) -> fx.Node:
    def current(terms: list[_Term]) -> list[_Term]:
        return [_Term(term.factor, newest.get(term.operand, term.operand)) for term in terms]

    totals = [_Term(1.0, _chain(current(group), regrouped.top)) for group in regrouped.groups]
    total = _chain(totals + current(regrouped.rest), regrouped.top)
    regrouped.top.replace_all_uses_with(total)
    return total


def _chain(terms: list[_Term], top: fx.Node) -> fx.Node:
    """Add up terms one after the other, before `top`, those without a factor first."""
    first, *others = sorted(terms, key=lambda term: term.factor != 1.0)
    total: fx.Node = first.operand
    if first.factor != 1.0:
        total = call_before(top, aten.mul.Tensor, total, first.factor)
    for term in others:
        alpha: dict[str, Any] = {} if term.factor == 1.0 else {"alpha": term.factor}
        total = call_before(top, aten.add.Tensor, total, term.operand, **alpha)
    return total


# Reasons -------------------------------------------------------------------------------------------------------------


def refusals(analysis: Analysis, selection: Selection) -> dict[fx.Node, str]:
    """Return why something that looks foldable is left, by the node that is left or could not join the one before it.

    Cases: operators that only look affine; two weighted operators (or a batch norm and a convolution) in a row; sums of
    operands with a common root; batch norms and per-channel scales with nothing to absorb them.
    """
    found = dict(analysis.refused)
    for node in analysis.graph.graph.nodes:
        if node in found or node.op != "call_function":
            continue
        reason = _seam(analysis, selection, node) or _split_sum(analysis, selection, node)
        if reason is not None:
            found[node] = reason
    for node in analysis.graph.graph.nodes:
        explained = any(each in found for each in (node, *node.all_input_nodes, *node.users))
        if node not in selection.folded and not explained and (node.target is BATCH_NORM or _is_vector_scale(node)):
            computed = next(filter(is_computed, node.all_input_nodes))
            nothing = f"no convolution or linear layer next to it: its input comes from {computed.target}"
            found[node] = selection.reason(node) or nothing
    return dict(sorted(found.items(), key=lambda item: analysis.position[item[0]]))


def _seam(analysis: Analysis, selection: Selection, node: fx.Node) -> str | None:
    """Return why a weighted operator or batch norm could not join the affine value that only it reads."""
    source = node.args[0] if node.target in WEIGHTED or node.target is BATCH_NORM else None
    if not isinstance(source, fx.Node) or len(source.users) > 1 or not analysis.inherited(source):
        return None
    if node in selection.folded and selection.folded[node] is selection.folded.get(source):
        return None
    own = [reason for root, reason in analysis.blocked.get(node, []) if root.node is not source]
    return selection.reason(source, node) or (own[-1] if own else None)


def _split_sum(analysis: Analysis, selection: Selection, node: fx.Node) -> str | None:
    """Return why a sum of values with a common root stays a sum."""
    if node in selection.folded or node.target not in SUMS or sum(map(is_computed, node.all_input_nodes)) < 2:
        return None
    own = [reason for _, reason in analysis.blocked.get(node, [])]
    return (selection.reason(node) if analysis.inherited(node) else None) or (own[-1] if own else None)


def _is_vector_scale(node: fx.Node) -> bool:
    constants = list(filter(is_constant, node.all_input_nodes))
    computed = list(filter(is_computed, node.all_input_nodes))
    if node.target not in SCALES or len(constants) != 1 or len(computed) != 1:
        return False
    shape = shape_of(computed[0])
    return len(varying_axes(shape_of(constants[0]), len(shape))) == 1 and shape == shape_of(node)
