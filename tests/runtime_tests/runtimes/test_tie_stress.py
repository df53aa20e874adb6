"""The formulas of the families of processors against the kernels of each runtime, on grids with many ties."""

from __future__ import annotations

import functools

import pytest

from calibrators.grid.processors import PROCESSORS
from runtime_tests.ort.sessions import Model
from runtime_tests.runtimes import list_runtimes
from runtime_tests.workers.runtime import Artifact
from tests.support.elsewhere import available
from tests.support.tie_stress import TieStress, tie_stress

pytestmark = pytest.mark.runtimes

NAMES = [runtime.name for runtime in list_runtimes() if not (runtime.kernel_rate or runtime.lowers)]


@functools.cache
def stress() -> TieStress:
    return tie_stress(grids=4)


@pytest.mark.parametrize("name", NAMES)
def test_every_code_is_that_of_the_family(name: str) -> None:
    runtime, given = available(name), stress()
    loaded = runtime.open(Artifact(Model(given.model())), (), threads=1)
    outputs, _ = loaded.run([*given.feeds.values()])
    family = PROCESSORS[runtime.family]
    expected = {output: codes(family) for output, codes in given.expected.items()}
    found = dict(zip(loaded.output_names, outputs, strict=True))
    different = {output: int((found[output] != codes).sum()) for output, codes in expected.items()}
    assert {output: count for output, count in different.items() if count} == {}
