"""Write the README of a bundle: how to feed, run and check the model, for readers who have nothing else.

Must not know: graphs, torch, how the model was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from calibrators.grid.processors import PROCESSORS
from exporter.reporting.schema import Report
from runtime_tests.ort.worker import EXACT

__all__ = ["render_readme"]

STATUSES = {
    "proved": "proved by running it",
    "follows": "exact",
    "unknown": "unknown",
    "differs": "**computes other integers**",
}
TYPES = {"float": "float32", "double": "float64", "bool": "bool_"}


def render_readme(report: Report) -> str:
    """Return the page in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("exporter"),
        autoescape=False,  # Markdown, not HTML; names are cleaned below
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    model = report.model
    assert model is not None
    return environment.get_template("bundle.md.j2").render(
        r=report,
        title=_clean(model.source) or "Model",
        ranges=dict(_ranges(report)),
        preprocessing=list(_preprocessing(report.config or {})),
        session=EXACT,
        variables=[re.sub(r"\W", "_", value.name) for value in model.inputs],
        shapes=[tuple(size if isinstance(size, int) else 1 for size in value.shape) for value in model.inputs],
        types=[TYPES.get(value.dtype.lower(), value.dtype.lower()) for value in model.inputs],
        processors={name: processor.summary for name, processor in PROCESSORS.items()},
        statuses=STATUSES,
    )


def _clean(text: str | None) -> str:
    """Return a name without what Markdown or HTML would take for markup."""
    return re.sub(r"[^\w .:/()=,-]", "", text or "").strip()


def _ranges(report: Report) -> Iterator[tuple[str, str]]:
    """Yield by input name the range of its values in the calibration data."""
    for layer in report.layers or ():
        if layer.kind == "activation" and layer.observed_lo is not None and layer.observed_hi is not None:
            yield layer.site, f"{layer.observed_lo:.3g} to {layer.observed_hi:.3g}"


def _preprocessing(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the steps from an image file to an input; nothing where the data was no folder of images."""
    size, mean, std = (config.get(key) for key in ("image_size", "mean", "std"))
    if size is None and mean is None and std is None:
        return
    yield "Decode the image; channels are red, green, blue, or one channel of grey."
    if size is not None:
        height, width = size
        yield (
            "Resize bilinearly (Pillow's `BILINEAR`), keeping the aspect ratio, so that the image just covers "
            f"{height} x {width} (height x width), and crop the centre."
        )
    yield "Divide by 255."
    if mean is not None:
        yield f"Subtract the mean of each channel: {', '.join(f'{value:g}' for value in mean)}."
    if std is not None:
        yield f"Divide by the standard deviation of each channel: {', '.join(f'{value:g}' for value in std)}."
    yield "Transpose to channel, height, width, as float32."
