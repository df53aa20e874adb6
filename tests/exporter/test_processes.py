"""How processes end together."""

from __future__ import annotations

from contextlib import suppress

import pytest

from calibrators.execution.ranks import ProcessLost
from exporter import processes
from exporter.console import INTERRUPTED, exit_code_of


def test_a_lost_process_is_no_error_of_what_it_interrupts() -> None:
    with pytest.raises(ProcessLost), suppress(Exception):
        processes._end()
    assert exit_code_of(ProcessLost()) == INTERRUPTED
