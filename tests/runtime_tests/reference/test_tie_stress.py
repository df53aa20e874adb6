"""The formulas of all families of processors against the kernels themselves, as far as this machine has them."""

from __future__ import annotations

import pytest

from calibrators.grid.processors import PROCESSORS
from runtime_tests.ort.sessions import session
from tests.runtime_tests.reference.test_kernels import needs_fma
from tests.support.tie_stress import tie_stress


@needs_fma
def test_every_code_on_this_machine() -> None:
    stress = tie_stress(grids=4)
    found = session(stress.model()).run(list(stress.expected), stress.feeds)
    expected = {name: codes(PROCESSORS["x86-avx2"]) for name, codes in stress.expected.items()}
    different = {n: int((c != expected[n]).sum()) for n, c in zip(expected, found, strict=True)}
    assert {name: count for name, count in different.items() if count} == {}


@pytest.mark.parametrize("family", [name for name in PROCESSORS if name not in ("x86-vnni", "x86-avx2")])
def test_the_grids_tell_the_families_apart(family: str) -> None:
    """A formula of another family would fail the tests above and elsewhere."""
    stress = tie_stress(grids=2)
    here, there = PROCESSORS["x86-avx2"], PROCESSORS[family]
    differ = {name for name, codes in stress.expected.items() if (codes(here) != codes(there)).any()}
    assert {name.split("_")[0] for name in differ} >= {"QLinearAdd"}
