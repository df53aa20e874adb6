"""Sentences on where the file holds: on which processors, and why not on others.

Must not know: how anything was derived, pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibrators.grid.processors import FAMILIES
from runtime_tests.reference.where_exact import IN_FLOAT, Holds

__all__ = ["INEXACT", "not_exact_here", "where_rows"]

INEXACT = "inexact_here"
"""Name of the metric that says whether the file is not exact on this machine."""

X86 = tuple(name for name in FAMILIES if name.startswith("x86-"))


def where_rows(entries: Sequence[Holds], min_onnxruntime: str | None) -> Iterator[tuple[str, str]]:
    """Yield titles and texts: where the file is exact, where it is not, where that is unknown."""
    exact, follows = _of(entries, "follows", "proved"), _of(entries, "follows")
    where = f"{_families(exact)} ({'follows from arithmetic' if follows else 'proved by running it'})" if exact else ""
    scope = IN_FLOAT if any(IN_FLOAT in each.condition for each in entries) else ""
    needs = f"needs onnxruntime {min_onnxruntime} or newer" if min_onnxruntime else ""
    if entries:
        yield "exact on", "; ".join(filter(None, [where or "no processor", scope, needs]))
    for status, title in (("differs", "not exact on"), ("unknown", "unknown on")):
        if found := _of(entries, status):
            yield title, "; ".join(f"{FAMILIES[each.processor].summary}: {each.condition}" for each in found)


def not_exact_here(entries: Sequence[Holds], processor: str | None) -> str | None:
    """Return why the file is not exact on this processor; None if it is, or if that is not known."""
    found = [each for each in _of(entries, "differs") if each.processor == processor]
    return f"this machine is {FAMILIES[found[0].processor].summary}, where {found[0].condition}" if found else None


def _of(entries: Sequence[Holds], *statuses: str) -> list[Holds]:
    return [each for each in entries if each.status in statuses]


def _families(entries: Sequence[Holds]) -> str:
    names = [each.processor for each in entries]
    if set(X86) <= set(names):
        return ", ".join(["x86-64 with and without VNNI", *(FAMILIES[n].summary for n in names if n not in X86)])
    return ", ".join(FAMILIES[name].summary for name in names)
