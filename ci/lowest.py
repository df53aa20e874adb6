"""Print the lowest versions that pyproject.toml promises, as constraints for pip: one `name==version` a line."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROMISED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*>=\s*([0-9.]+)")
"""A requirement with a lower bound: name, version."""


def lowest(pyproject: str) -> list[str]:
    """Return the constraints for the dependencies and the extras of the product, without those of its developers."""
    project = tomllib.loads(pyproject)["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["openvino"], *extras["signing"]]
    found = [PROMISED.match(each) for each in listed]
    return sorted(f"{each[1]}=={each[2]}" for each in found if each is not None)


if __name__ == "__main__":
    print(*lowest((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")), sep="\n")
