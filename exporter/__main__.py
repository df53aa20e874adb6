"""`python -m exporter` is the command `intact`."""

from __future__ import annotations

from exporter.cli import main

main()
