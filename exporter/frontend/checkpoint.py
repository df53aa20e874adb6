"""Find in a checkpoint the state that fits a module: training scripts nest it beside other entries, under prefixes.

Must not know: files, factories, what becomes of the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["State", "fitting_state", "states"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Keys under which training scripts put the state dict, most specific first."""

DEPTH = 3
"""Nested entries, and parts of a prefix, that are looked at."""


@dataclass(frozen=True)
class State:
    """Tensors by name, found in a checkpoint.

    key: where: the keys of nested entries, then the prefix that the names had, joined by dots; '' for the whole.
    """

    key: str
    tensors: dict[str, Tensor]


def states(content: Any, key: str = "", depth: int = DEPTH, seen: set[int] | None = None) -> Iterator[State]:
    """Yield every mapping with tensors in a checkpoint once, the usual keys first; seen: mappings that were visited."""
    seen = set() if seen is None else seen
    if not isinstance(content, Mapping) or id(content) in seen:
        return
    seen.add(id(content))
    tensors = {str(name): value for name, value in content.items() if _is_tensor(value)}
    if tensors:
        yield State(key, tensors)
    names = [name for name in WRAPPERS if name in content]
    for name in [*names, *(name for name in content if name not in names)] if depth else ():
        yield from states(content[name], f"{key}.{name}".lstrip("."), depth - 1, seen)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor) and not value.is_nested  # a nested tensor has no shape


def fitting_state(found: list[State], expected: Mapping[str, Any]) -> tuple[State, list[State]]:
    """Return the state that shares most names and shapes with `expected`, and the others that fit as well.

    Of equals, the first is taken: the usual keys come before others, the whole before what is left of it by a prefix.
    """
    tried = [part for state in found for part in (state, *_without_prefixes(state))]
    scores = [_fit(part, expected) for part in tried]
    highest = max(scores)
    best = tried[scores.index(highest)]
    equals = [part for part, score in zip(tried, scores, strict=True) if score == highest and part is not best]
    return best, [part for part in equals if not _same(part, best, expected)]


def _without_prefixes(state: State) -> Iterator[State]:
    """Yield what is left under each prefix of the names, such as "module.", shortest prefixes first."""
    inside: dict[str, dict[str, Tensor]] = {}
    for name, x in state.tensors.items():
        parts = name.split(".", DEPTH + 1)
        for depth in range(1, min(len(parts), DEPTH + 1)):
            prefix = ".".join(parts[:depth]) + "."
            inside.setdefault(prefix, {})[name.removeprefix(prefix)] = x
    for prefix in sorted(inside, key=lambda prefix: (prefix.count("."), prefix)):
        yield State(f"{state.key}.{prefix[:-1]}".lstrip("."), inside[prefix])


def _fit(state: State, expected: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of names, and of names with their shapes, that a state shares with the module's."""
    shared = [name for name in state.tensors if name in expected]
    return len(shared), sum(state.tensors[name].shape == getattr(expected[name], "shape", None) for name in shared)


def _same(one: State, other: State, expected: Mapping[str, Any]) -> bool:
    """Return whether two states hold the same tensors for the module."""
    names = [name for name in expected if name in one.tensors]
    return all(name in other.tensors and one.tensors[name] is other.tensors[name] for name in names)
