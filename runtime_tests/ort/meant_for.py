"""Read what the metadata of a file say about the runtimes that it is meant for.

Must not know: what a target says.
"""

from __future__ import annotations

from calibrators.grid.target import Target
from calibrators.targets import DEFAULT_TARGET, get_target
from runtime_tests.ort.sessions import Model, Source

__all__ = ["EXACT_ON_KEY", "TARGET_KEY", "target_of"]

TARGET_KEY = "intact.target"
"""Metadata key of the name of the target."""

EXACT_ON_KEY = "intact.exact_on"
"""Metadata key of the processors on which exactness of the integer kernels follows from the file."""


def target_of(model: Source) -> Target:
    """Return the target that the metadata of a file name, the default target if they name none.

    raises: UnknownNameError for a target that this installation lacks, ModelError for a file that is no ONNX model.
    """
    metadata = {entry.key: entry.value for entry in Model.of(model).proto.metadata_props}
    return get_target(metadata.get(TARGET_KEY, DEFAULT_TARGET))
