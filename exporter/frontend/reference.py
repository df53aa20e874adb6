"""Write and read the reference program of a bundle, with which the bundle is proved again on another machine.

Must not know: ONNX, runtimes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import fx

from calibrators.errors import ModelError
from exporter.frontend.calling import user_inputs
from exporter.frontend.capture import capture, quiet
from exporter.frontend.load import load_model
from exporter.frontend.recurrences import recurrences_by_shape

__all__ = ["export_program", "load_reference", "save_reference"]


def export_program(program: fx.GraphModule) -> torch.export.ExportedProgram:
    """Return a flat graph as an ExportedProgram with the same inputs and the same free axes."""
    free, batch = program.meta.get("free_axes", {}), torch.export.Dim("batch", min=1, max=2**20)
    example: tuple[torch.Tensor, ...] = program.meta["example"]
    first: dict[int, Any] = {0: batch} if program.meta["dynamic_batch"] else {}
    shapes = tuple(
        first | dict.fromkeys(free.get(name, {}), torch.export.Dim.DYNAMIC) if x.ndim else None
        for name, x in zip(program.meta["input_names"], example, strict=True)
    )
    with quiet(), torch.no_grad(), recurrences_by_shape():
        return torch.export.export(program, example, dynamic_shapes=shapes if first or free else None, strict=False)


def save_reference(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Write an exported reference program as .pt2: the same program gives the same bytes on any machine.

    The metadata of its nodes is removed in place.
    """
    with quiet(), torch.no_grad():
        for node in exported.graph.nodes:
            for key in ("stack_trace", "from_node", "nn_module_stack", "custom"):
                node.meta.pop(key, None)
        exported._guards_code = []  # shape checks as Python source, which loading refuses to run
        content = io.BytesIO()  # torch's own writer ends the process when the disk is full
        torch.export.save(exported, content)
    path.write_bytes(content.getvalue())


def load_reference(path: Path) -> fx.GraphModule:
    """Return the program that `save_reference` wrote.

    raises: ModelError if the file is missing or damaged.
    """
    program = load_model(str(path))
    if not isinstance(program, torch.export.ExportedProgram):
        raise ModelError(f"{path} holds no reference program; export the model again")
    example = program.example_inputs[0] if program.example_inputs else ()
    if len(example) != len(user_inputs(program)) or not all(isinstance(x, torch.Tensor) for x in example):
        raise ModelError(f"{path} holds no inputs of its program; export the model again")
    return capture(program, tuple(example))
