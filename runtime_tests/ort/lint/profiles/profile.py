"""Define a profile: a name and its table of rules.

Must not know: which profiles there are.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime_tests.ort.lint.rule import Rule

__all__ = ["Profile"]


@dataclass(frozen=True)
class Profile:
    """The rules that a runtime or compiler has beyond those about every file.

    summary: one line for lists.
    """

    name: str
    summary: str
    rules: tuple[Rule, ...]
