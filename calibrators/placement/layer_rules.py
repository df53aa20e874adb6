"""Rules that say how layers are quantized: a glob and settings. They form one list, and later ones win.

Must not know: graphs, torch, how rules are written in files and flags.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_serializer, model_validator

from calibrators.errors import InputError, UnknownNameError, argument
from calibrators.settings import Settings, expected

__all__ = [
    "DEFAULT_BLOCK",
    "WIDE",
    "AppliedRule",
    "BlockSize",
    "LayerRule",
    "MatchedRule",
    "Portable",
    "RuleList",
    "Width",
]

NARROWEST, WIDEST = 2, 8
WIDE = 16
"""Bits of activations for layers for which 8 do not suffice; integer kernels do not read them."""
LEAST_BLOCK, DEFAULT_BLOCK = 16, 32
"""Smallest block, in inputs per weight scale; kernels for quantized weights take powers of two from this on."""


def _power_of_two(size: int) -> int:
    if size & (size - 1):
        raise ValueError
    return size


Width = Annotated[int, Field(ge=NARROWEST, le=WIDEST), expected(f"a whole number from {NARROWEST} to {WIDEST}")]
BlockSize = Annotated[
    int, Field(ge=LEAST_BLOCK), AfterValidator(_power_of_two), expected(f"a power of two from {LEAST_BLOCK} on")
]
ActivationWidth = Annotated[
    Annotated[int, Field(ge=NARROWEST, le=WIDEST)] | Literal[16],
    expected(f"a whole number from {NARROWEST} to {WIDEST}, or {WIDE}"),
]
Flag = Annotated[bool, expected("true or false")]
Portable = Literal["scales", "uint8"]


class LayerRule(Settings):
    """A glob and the settings of the operators that it matches; None leaves a setting as earlier rules have it.

    match:           glob on the module path or one of its parents, the operator, or the node name.
    weight_bits:     bits of the weight, 2 to 8.
    activation_bits: bits of the value that the layer reads, 2 to 8, or 16, for which its writers and readers are float.
    weight_only:     for linear layers: quantize the weight but not the value that the layer reads; kernels are float.
    granularity:     one weight scale per "channel", per "tensor", or, in weight-only layers, per "block".
    block_size:      inputs of a channel per block, a power of two from 16 on; 32 by default.
    method:          range method for the weight and for the value that the layer reads.
    portable:        form of weights whose pairs of products may exceed 16 bits, so that the layer is exact on every
                     processor of the target: coarser "scales", or "uint8" codes, twice as slow on CPUs with VNNI.
    symmetric:       whether the weight's zero point is 0; otherwise grids below 8 bits have one, and one more level.
    float:           whether the operators stay in float; False revokes an earlier True.
    raises:          InputError naming the rule, if it sets nothing, contradicts itself, or has a value out of range.
    """

    model_config = ConfigDict(strict=True)
    noun: ClassVar[str] = "setting of layers"

    match: Annotated[str, Field(pattern=r"\S"), expected("a glob such as 'stages.0.*'")]
    weight_bits: Width | None = None
    activation_bits: ActivationWidth | None = None
    weight_only: Flag | None = None
    granularity: Annotated[Literal["tensor", "channel", "block"] | None, expected("tensor, channel or block")] = None
    block_size: BlockSize | None = None
    method: Annotated[str, Field(min_length=1), expected("the name of a range method, such as 'minmax'")] | None = None
    portable: Annotated[Portable | None, expected("scales or uint8")] = None
    symmetric: Flag | None = None
    float: Flag | None = None

    def __init__(self, match: str, **settings: Any) -> None:
        try:
            super().__init__(match=match, **settings)
        except InputError as error:
            raise InputError(f"the rule for layers {match!r}: {error}") from error

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the rule by name."""
        return {name: value for name, value in self if name != "match" and value is not None}

    @model_serializer(mode="plain")
    def _given(self) -> dict[str, Any]:
        return {"match": self.match, **self.settings}

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        names = [name for name, _ in self if name != "match"]
        others = [name for name in self.settings if name != "float"]
        wide = self.symmetric is False and self.weight_bits == WIDEST
        contradictions = (
            (not self.settings, f"it sets nothing; give at least one of {', '.join(names)}"),
            (self.float and others, f"float = true and {''.join(others[:1])} exclude each other; leave one out"),
            (wide, f"weights of {WIDEST} bits have no zero point; leave symmetric out or give fewer weight_bits"),
            (
                self.weight_only and self.activation_bits is not None,
                "weight_only = true keeps the value that the layer reads in float; leave activation_bits out",
            ),
            (
                self.weight_only and self.portable is not None,
                "weight_only = true computes in float on every processor; leave portable out",
            ),
            (
                self.weight_only is False and self.granularity == "block",
                "integer kernels have no scales per block; leave granularity out or set weight_only = true",
            ),
            (
                self.block_size is not None and self.granularity != "block",
                "block_size needs granularity = 'block'; give both",
            ),
        )
        for applies, reason in contradictions:
            if applies:
                raise ValueError(reason)
        return self


@dataclass(frozen=True, eq=False)
class MatchedRule:
    """A rule and the names of the nodes that it matches; `flag` is the argument that gave it, '' for an implied one."""

    rule: LayerRule
    nodes: frozenset[str]
    flag: str = ""

    @classmethod
    def by_glob(cls, rule: LayerRule, labels: Mapping[str, Collection[str]], flag: str) -> MatchedRule:
        """Return the rule with the nodes that have a label which its glob matches.

        raises: UnknownNameError if there are none.
        """
        nodes = [node for node, names in labels.items() if any(fnmatchcase(label, rule.match) for label in names)]
        if not nodes:
            known = {label for names in labels.values() for label in names}
            raise UnknownNameError(f"{argument(flag)} pattern", rule.match, known)
        return cls(rule, frozenset(nodes), flag)


@dataclass(frozen=True)
class RuleList:
    """Matched rules in order; the last one that sets a setting of a node decides it."""

    rules: Sequence[MatchedRule]

    def decider(self, setting: str, node: str) -> MatchedRule | None:
        """Return the rule that decides a setting of a node; None where no rule sets it."""
        for matched in reversed(self.rules):
            if node in matched.nodes and getattr(matched.rule, setting) is not None:
                return matched
        return None

    def value(self, setting: str, node: str) -> Any:
        """Return the value set for a node; None where no rule sets it."""
        decider = self.decider(setting, node)
        return None if decider is None else getattr(decider.rule, setting)


@dataclass(frozen=True)
class AppliedRule:
    """A rule as reports show it, with the layers for which it decides at least one setting that no later rule sets."""

    match: str
    settings: Mapping[str, Any]
    layers: tuple[str, ...]
