"""Write LiteRT files and run them with LiteRT's reference kernels: a script for an interpreter that has ai-edge-litert.

It answers one line of JSON on standard input with one on standard output, `{"error": ...}` where it cannot. Arrays pass
as .npy files in the folder `argv[1]`.

    {"draft": "draft.json", "file": "model.tflite"} -> {"version": "2.3.0"}
        the form of a draft is that of runtime_tests.tflite.draft; its constants are the arrays of draft.npz
    {"load": "model.tflite", "probes": ["name"]} -> {"version": "2.3.0", "operators": [{"name": ..., "types": [...]}]}
        operators as they run, with the types of their inputs and results; each probe is a tensor of the file
    {"batch": true}: runs it on in_0.npy, in_1.npy, ...; writes outputs and probes to out_0.npy, ... -> {"outputs": 7}

Must not know: the project, which it does not import.
"""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["main"]

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
ALIGNMENT = 16
"""Bytes at a multiple of which the data of a constant begin, as the schema demands."""


class _Tables:
    """Makes tables of the schema by name."""

    def __init__(self) -> None:
        from ai_edge_litert import schema_py_generated

        self.schema: Any = schema_py_generated

    def made(self, kind: str, **fields: Any) -> Any:
        """Return a table with these fields; raise ValueError for one that it lacks."""
        table = getattr(self.schema, f"{kind}T")()
        for name, value in fields.items():
            if not hasattr(table, name):
                raise ValueError(f"{kind} has no field {name}")
            setattr(table, name, value)
        return table

    def code(self, name: str, version: int) -> Any:
        """Return the code of an operator; readers of old files look into the field of one byte."""
        value = getattr(self.schema.BuiltinOperator, name)
        return self.made("OperatorCode", builtinCode=value, deprecatedBuiltinCode=min(value, 127), version=version)

    def tensor(self, each: dict[str, Any], buffer: int) -> Any:
        grid = each["quantization"] and self.made("QuantizationParameters", **each["quantization"])
        kind = getattr(self.schema.TensorType, each["type"])
        return self.made("Tensor", name=each["name"], shape=each["shape"], type=kind, buffer=buffer, quantization=grid)

    def operator(self, each: dict[str, Any], code: int) -> Any:
        found = self.made("Operator", opcodeIndex=code, inputs=each["inputs"], outputs=each["outputs"])
        if each["options"]:
            kind, options = each["options"]
            found.builtinOptionsType = getattr(self.schema.BuiltinOptions, kind)
            found.builtinOptions = self.made(kind, **options)
        return found

    def signature(self, draft: dict[str, Any]) -> Any:
        """Return the names by which a program finds inputs and outputs."""
        ends = {
            end: [
                self.made("TensorMap", name=draft["tensors"][index]["name"], tensorIndex=index) for index in draft[end]
            ]
            for end in ("inputs", "outputs")
        }
        return self.made("SignatureDef", signatureKey="serving_default", subgraphIndex=0, **ends)

    def buffer(self, data: bytes | None) -> Any:
        """Return a buffer whose data are aligned, which those of the schema's own class are not."""
        schema = self.schema
        base: Any = schema.BufferT

        class Buffer(base):  # type: ignore[misc]
            def Pack(self, builder: Any) -> Any:
                vector = None
                if data is not None:
                    builder.StartVector(1, len(data), ALIGNMENT)
                    builder.head -= len(data)
                    builder.Bytes[builder.head : builder.head + len(data)] = data
                    vector = builder.EndVector()
                schema.BufferStart(builder)
                if vector is not None:
                    schema.BufferAddData(builder, vector)
                return schema.BufferEnd(builder)

        return Buffer()


def _written(draft: dict[str, Any], arrays: Any) -> bytes:
    """Return the flatbuffer of a draft; its first buffer is empty, and that of what is computed."""
    import flatbuffers

    tables = _Tables()
    codes: dict[tuple[str, int], int] = {}
    constants = [each["data"] for each in draft["tensors"] if each["data"] is not None]
    places = {name: index for index, name in enumerate(constants, 1)}
    for each in draft["operators"]:
        codes.setdefault((each["op"], each["version"]), len(codes))
    graph = tables.made(
        "SubGraph",
        name="main",
        tensors=[tables.tensor(each, places.get(each["data"], 0)) for each in draft["tensors"]],
        operators=[tables.operator(each, codes[each["op"], each["version"]]) for each in draft["operators"]],
        inputs=draft["inputs"],
        outputs=draft["outputs"],
    )
    model = tables.made(
        "Model",
        version=SCHEMA_VERSION,
        description=draft["description"],
        operatorCodes=[tables.code(*key) for key in codes],
        subgraphs=[graph],
        buffers=[tables.buffer(None), *(tables.buffer(arrays[name].tobytes()) for name in constants)],
        signatureDefs=[tables.signature(draft)],
    )
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


class _File:
    """A file that is loaded, and how it is run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.interpreter: Any = None
        self.probes: list[int] = []

    def load(self, name: str, probes: list[str]) -> list[dict[str, Any]]:
        """Load a file; return its operators."""
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.interpreter = Interpreter(
            model_path=str(self.folder / name),
            experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
            experimental_preserve_all_tensors=True,
        )
        self.interpreter.allocate_tensors()
        tensors = {each["index"]: each for each in self.interpreter.get_tensor_details()}
        indices = {each["name"]: index for index, each in tensors.items()}
        missing = [probe for probe in probes if probe not in indices]
        if missing:
            raise ValueError(f"the file has no value called {missing[0]!r}")
        self.probes = [indices[probe] for probe in probes]

        def types(found: Any) -> list[str]:
            return [tensors[index]["dtype"].__name__ if index in tensors else "" for index in found]

        return [
            {"name": each["op_name"], "types": types([*each["inputs"][:2], *each["outputs"][:1]])}
            for each in self.interpreter._get_ops_details()
        ]

    def run(self) -> int:
        """Run the file on the arrays of the folder, and return the number of outputs and probes."""
        import numpy as np

        inputs, outputs = self.interpreter.get_input_details(), self.interpreter.get_output_details()
        for index, each in enumerate(inputs):
            self.interpreter.set_tensor(each["index"], np.load(self.folder / f"in_{index}.npy", allow_pickle=False))
        self.interpreter.invoke()
        read = [*(each["index"] for each in outputs), *self.probes]
        for index, tensor in enumerate(read):
            np.save(self.folder / f"out_{index}.npy", self.interpreter.get_tensor(tensor))
        return len(read)


def _answer(request: dict[str, Any], file: _File) -> dict[str, Any]:
    release = {"version": version("ai-edge-litert")}
    if "draft" in request:
        import numpy as np

        draft = json.loads((file.folder / request["draft"]).read_text())
        with np.load(file.folder / "draft.npz", allow_pickle=False) as arrays:
            (file.folder / request["file"]).write_bytes(_written(draft, arrays))
        return release
    if "load" in request:
        return {**release, "operators": file.load(request["load"], request["probes"])}
    return {"outputs": file.run()}


def main() -> None:
    """Answer requests until standard input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    file = _File(Path(sys.argv[1]))
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line), file)
        except Exception as error:  # of LiteRT and flatbuffers, whose errors have no common base
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:500]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
