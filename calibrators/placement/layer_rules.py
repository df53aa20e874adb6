"""Rules that say how layers are quantized: a glob and what it sets. They stand in one list, and later ones win.

Must not know: graphs, torch, how rules are written in files and flags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from calibrators.errors import InputError, UnknownNameError

__all__ = ["DEFAULT_BLOCK", "LEAST_BLOCK", "WIDE", "AppliedRule", "LayerRule", "MatchedRule", "RuleList"]

NARROWEST, WIDEST = 2, 8
WIDE = 16
"""Bits of activations for layers that 8 do not suffice for; integer kernels have none of them."""
GRANULARITIES = ("tensor", "channel", "block")
LEAST_BLOCK, DEFAULT_BLOCK = 16, 32
"""Inputs of a layer under one weight scale, a power of two: what kernels for quantized weights take."""


@dataclass(frozen=True)
class LayerRule:
    """What a glob sets for the operators that it matches; None leaves a setting as earlier rules have it.

    match:           glob on the module path or one of its parents, the operator, or the node name.
    weight_bits:     bits of the weight, 2 to 8.
    activation_bits: bits of the value that the layer reads, 2 to 8, or 16: what writes or reads it is float then.
    weight_only:     linear layers: the weight is quantized and what the layer reads is not; float kernels compute it.
    granularity:     one weight scale per "channel", per "tensor", or, where weights only are quantized, per "block".
    block_size:      inputs of a channel that make a block, a power of two from 16 on; 32 where none is given.
    method:          range method for the weight and for the value that the layer reads, whatever finds other ranges.
    symmetric:       the weight's zero point is 0; False gives grids below 8 bits a zero point, and one more level.
    float:           the operators stay in float; False takes that back.
    raises:          InputError naming the rule, where it sets nothing, contradicts itself, or sets what cannot be.
    """

    match: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_only: bool | None = None
    granularity: Literal["tensor", "channel", "block"] | None = None
    block_size: int | None = None
    method: str | None = None
    symmetric: bool | None = None
    float: bool | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match.strip():
            raise InputError(f"a layer rule matches {self.match!r}; give a glob such as 'stages.0.*'.")
        for name, value in self.settings.items():
            if remedy := _remedy(name, value):
                raise InputError(f"layer rule {self.match!r}: {name} is {value!r}; {remedy}.")
        if reason := self._contradiction():
            raise InputError(f"layer rule {self.match!r}: {reason}.")

    @property
    def settings(self) -> dict[str, Any]:
        """What the rule sets, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "match"}
        return {name: value for name, value in values.items() if value is not None}

    def _contradiction(self) -> str:
        others = [name for name in self.settings if name != "float"]
        if not self.settings:
            return f"it sets nothing; give at least one of {', '.join(SETTINGS)}"
        if self.float and others:
            return f"float = true and {others[0]} exclude each other; leave one out"
        if self.symmetric is False and self.weight_bits == WIDEST:
            return f"weights of {WIDEST} bits have no zero point; leave symmetric out or give fewer bits"
        return self._contradiction_of_weight_only()

    def _contradiction_of_weight_only(self) -> str:
        if self.weight_only and self.activation_bits is not None:
            return "weight_only = true leaves what the layer reads in float; leave activation_bits out"
        if self.weight_only is False and self.granularity == "block":
            return "integer kernels have no scales per block; leave granularity out or set weight_only = true"
        if self.block_size is not None and self.granularity != "block":
            return "block_size belongs to granularity = 'block'; give both"
        return ""


SETTINGS = tuple(field.name for field in fields(LayerRule) if field.name != "match")


def _remedy(name: str, value: object) -> str:
    """What to give instead of `value`; empty if it may stay."""
    if name in ("weight_bits", "activation_bits"):
        is_width = type(value) is int and NARROWEST <= value <= WIDEST
        wide = (WIDE,) if name == "activation_bits" else ()
        widths = f"a whole number from {NARROWEST} to {WIDEST}{f', or {WIDE}' if wide else ''}"
        return "" if is_width or (type(value) is int and value in wide) else f"give {widths}"
    if name == "granularity":
        return "" if value in GRANULARITIES else f"give {', '.join(GRANULARITIES[:-1])} or {GRANULARITIES[-1]}"
    if name == "block_size":
        is_size = type(value) is int and value >= LEAST_BLOCK and value & (value - 1) == 0
        return "" if is_size else f"give a power of two from {LEAST_BLOCK} on"
    if name == "method":
        return "" if isinstance(value, str) and value else "give the name of a range method, such as 'minmax'"
    return "" if isinstance(value, bool) else "give true or false"


@dataclass(frozen=True, eq=False)
class MatchedRule:
    """A rule and the names of the nodes that it matches; `flag` is where the user wrote it, '' for an implied one."""

    rule: LayerRule
    nodes: frozenset[str]
    flag: str = ""

    @classmethod
    def by_glob(cls, rule: LayerRule, labels: Mapping[str, Collection[str]], flag: str) -> MatchedRule:
        """The rule with the nodes one of whose labels its glob matches.

        raises: UnknownNameError where there are none.
        """
        nodes = [node for node, names in labels.items() if any(fnmatchcase(label, rule.match) for label in names)]
        if not nodes:
            known = {label for names in labels.values() for label in names}
            raise UnknownNameError(f"--{flag} pattern", rule.match, known)
        return cls(rule, frozenset(nodes), flag)


@dataclass(frozen=True)
class RuleList:
    """Matched rules in order; the last one that sets a setting of a node decides it."""

    rules: Sequence[MatchedRule]

    def decider(self, setting: str, node: str) -> MatchedRule | None:
        """The rule that decides a setting of a node; None where no rule sets it."""
        for matched in reversed(self.rules):
            if node in matched.nodes and getattr(matched.rule, setting) is not None:
                return matched
        return None

    def value(self, setting: str, node: str) -> Any:
        """What is set for a node; None where no rule sets it."""
        decider = self.decider(setting, node)
        return None if decider is None else getattr(decider.rule, setting)


@dataclass(frozen=True)
class AppliedRule:
    """A rule, for reports: the layers of which it decides at least one setting. What later rules took over is not."""

    match: str
    settings: Mapping[str, Any]
    layers: tuple[str, ...]
