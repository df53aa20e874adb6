"""Write the README of a bundle: how to feed, run and check the model, for readers who have nothing else.

Must not know: graphs, torch, how the model was made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import jinja2

from calibrators.grid.processors import FAMILIES
from calibrators.targets import get_target
from exporter.reporting.interface import Images, Port, Sizes
from exporter.reporting.schema import Report
from exporter.reporting.templates import environment
from runtime_tests.ort.worker import EXACT

__all__ = ["render_readme"]

STATUSES = {
    "proved": "proved by running it",
    "follows": "exact",
    "unknown": "unknown",
    "differs": "**computes other integers**",
}
LISTED = 20
"""Classes that the page names."""


def render_readme(report: Report) -> str:
    """Return the page in Markdown."""
    model = report.model
    assert model is not None
    ranges = dict(_ranges(report))
    sizes = model.inputs[0].shape[:1]
    return (
        environment(autoescape=False, undefined=jinja2.StrictUndefined)
        .get_template("bundle.md.j2")
        .render(
            r=report,
            title=_clean(model.source) or "Model",
            meanings={
                "input": [_of_input(port, ranges) for port in model.inputs],
                "output": [_of_output(port) for port in model.outputs],
            },
            raw=next((port.pixels.layout for port in model.inputs if port.pixels), ""),
            sizes=[*_bounds(report.sizes)],
            labels=_listed(model.labels or ()),
            preprocessing=[*_preprocessing(model.images, model.inputs[0])] if model.images else [],
            frame=_frame(model.images, model.inputs[0]) if model.images else None,
            session=EXACT,
            golden=_clean(report.data.golden.source) if report.data and report.data.golden else "",
            batch=next((size for size in sizes if isinstance(size, int)), 1),
            lowered=get_target(report.target).lowered_file,
            processors={name: processor.summary for name, processor in FAMILIES.items()},
            statuses=STATUSES,
        )
    )


def _clean(text: str | None) -> str:
    """Return a name without what Markdown or HTML would take for markup."""
    return re.sub(r"[^\w .:/()=,-]", "", text or "").strip()


def _listed(names: Sequence[str]) -> str:
    some = [f"{index} {_clean(name)}" for index, name in enumerate(names[:LISTED])]
    return ", ".join(some) + (", ... (all are in the metadata)" if len(names) > LISTED else "")


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _of_input(port: Port, ranges: dict[str, str]) -> str:
    """Return what the values of an input are."""
    if port.pixels is None:
        return ranges.get(port.name, "")
    layout = "channels last" if port.pixels.layout == "nhwc" else "channels first"
    normalized = f"{port.pixels.formula} with mean {_numbers(port.pixels.mean)} and std {_numbers(port.pixels.std)}"
    return f"bytes, 0 to 255, {layout}; the file itself computes {normalized} of them"


def _of_output(port: Port) -> str:
    """Return what the values of an output stand for."""
    if port.codes is None:
        return ""
    return f"codes: value = {port.codes.formula} with zero_point {port.codes.zero_point} and scale {port.codes.scale!r}"


def _ranges(report: Report) -> Iterator[tuple[str, str]]:
    """Yield by input name the range of its values in the calibration data."""
    for layer in report.layers or ():
        if layer.kind == "activation" and layer.observed_lo is not None and layer.observed_hi is not None:
            yield layer.site, f"{layer.observed_lo:.3g} to {layer.observed_hi:.3g} in the calibration data"


def _bounds(sizes: Sizes | None) -> Iterator[tuple[str, str]]:
    """Yield the names of free sizes, and what they may be."""
    for name, bounds in (sizes.bounds if sizes is not None and sizes.bounds else {}).items():
        ends = f"at least {bounds.low}" if bounds.high is None else f"{bounds.low} to {bounds.high}"
        yield name, ends + (f", a multiple of {bounds.multiple}" if bounds.multiple else "")


def _preprocessing(images: Images, port: Port) -> Iterator[str]:
    """Yield the steps from an image file to the input, which is `port`."""
    yield (
        f"Decode the image to channels {', '.join(images.colors)}, in this order: grey images get three equal ones, "
        "transparency is dropped, and a rotation in the metadata of the image is not applied."
    )
    if images.size is not None:
        height, width = images.size
        yield (
            f"Resize (Pillow's `{images.resize}`, which averages when it shrinks), keeping the aspect ratio, so that "
            f"the image just covers {height} x {width} (height x width), and crop the centre."
        )
    else:
        size = " x ".join(map(str, _height_and_width(images, port)))
        yield (
            f"Nothing is resized: the images of the folder had the size of the input, {size} (height x width). How "
            "they were made is not recorded; make yours in the same way."
        )
    if images.in_file:
        axes = "batch, height, width, channel" if images.layout == "nhwc" else "batch, channel, height, width"
        yield f"Feed the bytes, uint8, as {axes}. The file normalizes them."
        return
    yield "Divide by 255."
    if images.mean is not None:
        yield f"Subtract the mean of each channel: {_numbers(images.mean)}."
    if images.std is not None:
        yield f"Divide by the standard deviation of each channel: {_numbers(images.std)}."
    yield "Transpose to channel, height, width, as float32."


def _frame(images: Images, port: Port) -> tuple[int, int] | None:
    """Return height and width of the bytes that an input takes; None where it takes none, or has no one size."""
    height, width = images.size or _height_and_width(images, port)
    return (height, width) if images.in_file and isinstance(height, int) and isinstance(width, int) else None


def _height_and_width(images: Images, port: Port) -> Sequence[int | str | None]:
    return port.shape[1:3] if images.layout == "nhwc" else port.shape[2:4]
