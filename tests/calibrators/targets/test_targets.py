"""Targets as data: what each promises, and that its other fields follow from it."""

from __future__ import annotations

import pytest

from calibrators.grid.processors import PROCESSORS
from calibrators.targets import get_target, list_targets


@pytest.mark.parametrize(
    ("name", "exact_on", "pair_sum"),
    [
        ("ort-cpu", set(PROCESSORS), 2**15 - 1),
        ("ort-cpu-vnni", {"x86-vnni"}, None),
        ("ort-arm", {"arm64", "x86-vnni"}, None),
        ("ort-web", {"wasm", "x86-vnni"}, None),
    ],
)
def test_limit_of_pairs_follows_from_the_processors(name: str, exact_on: set[str], pair_sum: int | None) -> None:
    target = get_target(name)
    assert set(target.exact_on) == exact_on
    assert target.pair_sum == pair_sum


def test_every_target_can_be_proved_on_the_processor_of_the_reference() -> None:
    """The reference computes x86's formulas, so that files are proved on a machine of that family."""
    assert all("x86-vnni" in target.exact_on for target in list_targets())
