"""Lower exported programs for XNNPACK and run them: a script for an interpreter that has ExecuTorch.

It answers one line of JSON on standard input with one on standard output, `{"error": ...}` where it cannot. Arrays pass
as .npy files in the folder `argv[1]`.

    {"program": "x.pt2", "lowered": "x.pte"} -> {"version": "1.5.1", "integer": {"convolution": 3}, "outside": [...]}
        integer: operators that a delegate runs on codes; outside: operators that no delegate runs
    {"load": ["a.pte", "b.pte"]} -> {"version": "1.5.1"}
    {"batch": true}: runs each on in_0.npy, in_1.npy, ...; writes their outputs to out_0.npy, ... -> {"outputs": 7}

Must not know: the project, which it does not import.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["main"]

WITHOUT_BIAS = {"convolution": (0, 1), "linear": (0, 1), "addmm": (1, 2)}
"""Operands of operators with a bias, which is not quantized in the program."""


def _lower(folder: Path, program: str, lowered: str) -> dict[str, Any]:
    import torch
    import torch.ao.quantization.fx._decomposed
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import (
        get_xnnpack_edge_compile_config,
        get_xnnpack_executorch_backend_config,
    )
    from executorch.exir import to_edge_transform_and_lower

    exported = torch.export.load(folder / program)
    edge = to_edge_transform_and_lower(
        exported, partitioner=[XnnpackPartitioner()], compile_config=get_xnnpack_edge_compile_config()
    )
    module = edge.exported_program().graph_module
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    delegates = [getattr(module, name).original_module.graph_module for name, _ in _delegates(module)]
    outside = [
        _name(node) for node in calls if "aten" in str(node.target) or "quantized_decomposed" in str(node.target)
    ]
    (folder / lowered).write_bytes(edge.to_executorch(get_xnnpack_executorch_backend_config()).buffer)
    return {"integer": Counter(name for each in delegates for name in _on_codes(each)), "outside": outside}


def _delegates(module: Any) -> list[tuple[str, Any]]:
    return [(name, each) for name, each in module.named_children() if hasattr(each, "original_module")]


def _on_codes(module: Any) -> Iterator[str]:
    """Yield the operators of a delegate that read dequantized codes alone and of which a quantizer reads the result."""
    for node in module.graph.nodes:
        if node.op != "call_function" or "quantize" in str(node.target):
            continue
        reader = next(iter(node.users))
        if _name(reader) in ("hardtanh", "relu") and len(reader.users) == 1:
            reader = next(iter(reader.users))
        operands = [node.args[index] for index in WITHOUT_BIAS.get(_name(node), ())] or node.all_input_nodes
        if all("dequantize" in str(x.target) for x in operands) and ".quantize" in str(reader.target):
            yield _name(node)


def _name(node: Any) -> str:
    """Return the name of an operator: "convolution"."""
    return str(getattr(node.target, "__name__", node.target)).removeprefix("aten.").split(".")[0]


class _Programs:
    """Programs that are loaded, and how they are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: list[Any] = []
        self.methods: list[Any] = []

    def load(self, names: list[str]) -> None:
        from executorch.runtime import Runtime

        self.loaded = [Runtime.get().load_program((self.folder / name).read_bytes()) for name in names]
        self.methods = [program.load_method("forward") for program in self.loaded]

    def run(self) -> int:
        """Run all programs on the arrays of the folder, and return the number of their outputs."""
        import numpy as np
        import torch

        count = len(list(self.folder.glob("in_*.npy")))
        arrays = [np.load(self.folder / f"in_{index}.npy", allow_pickle=False) for index in range(count)]
        index = 0
        for method in self.methods:
            for output in method.execute([torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]):
                np.save(self.folder / f"out_{index}.npy", output.contiguous().numpy())
                index += 1
        return index


def _answer(request: dict[str, Any], programs: _Programs) -> dict[str, Any]:
    if "program" in request:
        found = _lower(programs.folder, request["program"], request["lowered"])
        return {"version": version("executorch"), **found}
    if "load" in request:
        programs.load(request["load"])
        return {"version": version("executorch")}
    return {"outputs": programs.run()}


def main() -> None:
    """Answer requests until standard input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    programs = _Programs(Path(sys.argv[1]))
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), programs)
        except Exception as error:  # of torch and ExecuTorch, whose errors have no common base
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
