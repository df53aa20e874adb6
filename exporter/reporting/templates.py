"""The environment of the templates: the page of the report, and the README of the bundle.

Must not know: what the templates say.
"""

from __future__ import annotations

import jinja2

__all__ = ["environment"]


def environment(*, autoescape: bool, undefined: type[jinja2.Undefined]) -> jinja2.Environment:
    """Return the environment in which the package's templates are read.

    autoescape: for HTML; undefined: what stands for a value that is missing.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader("exporter"),
        autoescape=autoescape,
        undefined=undefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
