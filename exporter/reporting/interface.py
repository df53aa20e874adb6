"""The description of a model for those who feed it: inputs, outputs, sizes, preparation of images, names of classes.

The report, the README of the bundle and the metadata of the file take the same description.

Must not know: how anything is computed, how pages look.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor, fx

from exporter.frontend.free_sizes import Bounds
from exporter.inputs.form import DataForm
from exporter.inputs.raw import RawInput
from runtime_tests.ort.worker import EXACT

__all__ = [
    "INTERFACE_KEY",
    "Codes",
    "Images",
    "Model",
    "Pixels",
    "Port",
    "Sizes",
    "images_of",
    "metadata_of",
    "model_of",
    "sizes_of",
]

INTERFACE_KEY = "intact.interface"
"""Metadata key of the description, in JSON."""

OF_BYTES, OF_CODES = "(byte / 255 - mean) / std", "(code - zero_point) * scale"
"""The meaning of bytes and codes, as formulas."""


@dataclass(frozen=True)
class Pixels:
    """The meaning of bytes to an input, which the file itself computes, each step in float32.

    layout:    order of the axes, "nchw" or "nhwc".
    mean, std: one number, or one per channel.
    """

    layout: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    formula: str


@dataclass(frozen=True)
class Codes:
    """The meaning of the codes of an output."""

    scale: float
    zero_point: int
    formula: str


@dataclass(frozen=True)
class Port:
    """One input or output of the model; a free dimension is given by its name, or None.

    pixels: of an input that takes bytes; codes: of an output that is not dequantized.
    """

    name: str
    shape: tuple[int | str | None, ...]
    dtype: str
    pixels: Pixels | None = None
    codes: Codes | None = None


@dataclass(frozen=True)
class Images:
    """The way from an image file to the input, as the data was read.

    colors:    order of the channels; layout: order of the axes of the input, "nchw" or "nhwc".
    size:      height and width to which images are scaled, so that they just cover it, and cropped at the centre.
    resize:    filter of the scaling, by its name in Pillow.
    mean, std: with which values in 0..1 are normalized; one number, or one per channel.
    in_file:   whether the file itself does so, and takes bytes.
    """

    colors: str
    layout: str
    size: tuple[int, int] | None
    resize: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    in_file: bool


@dataclass(frozen=True)
class Model:
    """The model that was exported.

    images: for data that was a folder of images.
    labels: names of the classes in the order of the scores, where known.
    """

    source: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: int
    dynamic_batch: bool
    notes: tuple[str, ...]
    images: Images | None = None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Sizes:
    """Free axes besides the batch.

    axes:   names of their sizes in the file, by input and axis.
    proved: shapes of the samples of each input with which the file was compared with the reference.
    bounds: of the sizes by name; None in reports of earlier versions.
    """

    axes: dict[str, dict[int, str]]
    proved: tuple[dict[str, tuple[int, ...]], ...]
    bounds: dict[str, Bounds] | None = None


def model_of(
    source: str,
    graph: fx.GraphModule,
    model: ir.Model,
    raws: Mapping[str, RawInput],
    grids: Mapping[str, tuple[float, int]],
) -> Model:
    """Describe a model, without images and labels.

    graph: as captured; model: the file; raws: inputs that are bytes; grids: scale and zero point of coded outputs.
    """
    pixels = {name: Pixels(raw.layout, raw.mean, raw.std, OF_BYTES) for name, raw in raws.items()}
    codes = {name: Codes(*grid, OF_CODES) for name, grid in grids.items()}

    def ports(values: Iterable[ir.Value]) -> tuple[Port, ...]:
        return tuple(
            Port(
                value.name or "",
                tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()),
                value.dtype.name if value.dtype else "?",
                pixels.get(value.name or ""),
                codes.get(value.name or ""),
            )
            for value in values
        )

    return Model(
        source,
        ports(model.graph.inputs),
        ports(model.graph.outputs),
        sum(parameter.numel() for parameter in graph.parameters()),
        graph.meta["dynamic_batch"],
        tuple(graph.meta["notes"]),
    )


def images_of(form: DataForm | None, raws: Mapping[str, RawInput]) -> Images | None:
    """Describe how images were read; None for data of another kind.

    form: of the folder; raws: inputs that are bytes.
    """
    if form is None:
        return None
    layout = next((raw.layout for raw in raws.values()), "nchw")
    resize = None if form.image_size is None else "BILINEAR"
    return Images("RGB", layout, form.image_size, resize, form.mean, form.std, in_file=bool(raws))


def sizes_of(graph: fx.GraphModule, batches: Iterable[Sequence[Tensor]]) -> Sizes | None:
    """Describe the free axes of a graph, proved on batches; None where it has none."""
    if not graph.meta["free_axes"]:
        return None
    names = graph.meta["input_names"]
    proved = ({name: tuple(x.shape[1:]) for name, x in zip(names, batch, strict=True)} for batch in batches)
    return Sizes(graph.meta["free_axes"], tuple(proved), graph.meta["size_bounds"])


def metadata_of(model: Model, bounds: Mapping[str, Bounds]) -> str:
    """Return the description as the metadata of the file hold it, with the options of a session that the proof sets.

    What is None is left out.
    """
    known = dataclasses.asdict(model, dict_factory=_known)
    parts = {name: known[name] for name in ("inputs", "outputs", "images", "labels") if name in known}
    sizes = {name: dataclasses.asdict(each, dict_factory=_known) for name, each in bounds.items()}
    return json.dumps(parts | ({"sizes": sizes} if sizes else {}) | {"session": EXACT}, ensure_ascii=False)


def _known(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in items if value is not None}
