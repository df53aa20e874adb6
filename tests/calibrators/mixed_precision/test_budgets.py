"""Budgets: what texts mean, and which are refused."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from calibrators.errors import InputError, UnknownNameError
from calibrators.mixed_precision.budgets import QUANTITIES, Budget, Budgets


@pytest.mark.parametrize(
    ("text", "quantity", "limit"),
    [
        ("weight_bytes<=0.6M", "weight_bytes", 0.6e6),
        (" weight_bytes <= 600 k ", "weight_bytes", 600e3),
        ("avg_weight_bits<=3.5", "avg_weight_bits", 3.5),
        ("bops<=2G", "bops", 2e9),
        ("bops<=1.5e9", "bops", 1.5e9),
        ("accuracy_drop<=0.01", "accuracy_drop", 0.01),
        ("accuracy_drop<=1%", "accuracy_drop", 0.01),
    ],
)
def test_a_text_gives_quantity_and_limit(text: str, quantity: str, limit: float) -> None:
    budget = Budget.parse(text)
    assert (budget.quantity, budget.limit) == (quantity, pytest.approx(limit))
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "weight_bytes", "weight_bytes<0.6M", "weight_bytes<=", "weight_bytes<=-1", "weight_bytes<=0",
             "weight_bytes<=1.2.3", "weight_bytes<=1e999", "weight_bytes<=6X", "<=3", "weight_bytes<=nan"],
)  # fmt: skip
def test_other_texts_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="write for example"):
        Budget.parse(text)


def test_unknown_quantities_are_told_their_neighbours() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'weight_bytes'"):
        Budget.parse("weight_byte<=1M")
    assert all(Budget.parse(f"{name}<=1").quantity == name for name in QUANTITIES)


def test_a_quantity_has_one_budget() -> None:
    assert len(TypeAdapter(Budgets).validate_python(["bops<=1G", "avg_weight_bits<=4"])) == 2
    with pytest.raises(InputError, match="two budgets limit bops"):
        TypeAdapter(Budgets).validate_python(["bops<=1G", "bops<=2G"])
