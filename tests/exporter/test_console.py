from __future__ import annotations

import pytest

from exporter.console import print_table


def test_a_table_without_rows_is_its_text_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [])
    assert capsys.readouterr().out == ""
    print_table(("name",), [], empty="None found.")
    assert capsys.readouterr().out == "None found.\n"
