"""Run what the README of a bundle tells its reader to run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

__all__ = ["run_readme"]


def run_readme(bundle: Path, *more: str) -> str:
    """Run the Python code of the README in the bundle, then the lines `more`; return what they print."""
    (code,) = re.findall(r"```python\n(.*?)```", (bundle / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    script = code + "\n".join(more)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-"], cwd=bundle, input=script, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr}\n{script}"
    return done.stdout
