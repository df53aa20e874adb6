"""Measure integer forms that the export does not write yet: recurrences and the products of attention.

    python benchmarks/candidate_forms.py

For each form it prints the least time of many runs in onnxruntime on one thread, and the operators that run.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

STEPS, RUNS = 50, 60
SIZES = [(64, 128), (128, 256), (512, 512)]
"""Inputs and hidden units of the recurrences, at batch 1."""
HEADS = [(3, 197, 64), (6, 197, 64), (3, 50, 64)]
"""Heads, tokens and channels of a head."""
STEP = np.float32(0.004)
"""Scale of the weights."""

CELL = """
    {product}
    pz, pr, pn = Split <axis=1, num_outputs=3> (p)
    gz, gr, gn = Split <axis=1, num_outputs=3> (g)
    az = Add (pz, gz)
    z = Sigmoid (az)
    ar = Add (pr, gr)
    r = Sigmoid (ar)
    rg = Mul (r, gn)
    an = Add (pn, rg)
    n = Tanh (an)
    d = Sub (h, n)
    zd = Mul (z, d)
    next = Add (n, zd)
    out = Identity (next)
"""
FLOAT_PRODUCT = "g = Gemm <transB=1> (h, R, b)"
INTEGER_PRODUCT = """
    hq = QuantizeLinear (h, sh, zh)
    hd = DequantizeLinear (hq, sh, zh)
    Rd = DequantizeLinear <axis=0> (R, sr, zr)
    bd = DequantizeLinear <axis=0> (b, sb, zb)
    g = Gemm <transB=1> (hd, Rd, bd)
"""


def parsed(body: str, inputs: dict[str, Array], constants: dict[str, Array]) -> onnx.ModelProto:
    """Return a model of the nodes in `body`, in ONNX's text form, with the output y."""
    typed = ", ".join(f"float[{', '.join(map(str, x.shape))}] {name}" for name, x in inputs.items())
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 20]> m ({typed}) => (float y) {{{body}}}')
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    return model


def measured(model: onnx.ModelProto, inputs: dict[str, Array]) -> tuple[float, dict[str, int]]:
    """Return the least time of a run in ms, and how often each operator runs, those of a loop's body once."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.optimized_model_filepath = str(Path(folder) / "model.onnx")
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        session.run(None, inputs)
        times.append(time.perf_counter() - start)
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.name == "body"]
    names = Counter(node.op_type for part in (graph, *bodies) for node in part.node)
    return min(times) * 1e3, dict(names)


def scan(product: str, projections: Array, constants: dict[str, Array], hidden: int) -> onnx.ModelProto:
    """Return a GRU cell in a Scan that reads the projected inputs."""
    model = parsed("y = Identity (x)", {"x": projections}, constants | {"h0": np.zeros((1, hidden), np.float32)})
    body = onnx.parser.parse_graph(
        f"cell (float[1, {hidden}] h, float[1, {3 * hidden}] p) => (float[1, {hidden}] next, float[1, {hidden}] out) "
        f"{{{CELL.format(product=product)}}}"
    )
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("Scan", ["h0", "x"], ["last", "y"], body=body, num_scan_inputs=1))
    return model


def recurrences(inputs: int, hidden: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, 1, inputs)).astype(np.float32)
    projected = rng.standard_normal((STEPS, 1, 3 * hidden)).astype(np.float32)
    codes = {
        "W": rng.integers(-60, 60, (1, 3 * hidden, inputs)).astype(np.int8),
        "R": rng.integers(-60, 60, (1, 3 * hidden, hidden)).astype(np.int8),
    }
    floats = {name: value * STEP for name, value in codes.items()}
    gru = f"y, last = GRU <hidden_size={hidden}, linear_before_reset=1> (x, {{W}}, {{R}})"
    expanded = "".join(f"{name}f = DequantizeLinear ({name}, s) " for name in codes)
    identity = {"W": np.eye(3 * hidden, dtype=np.float32)[None], "R": floats["R"]}
    sh, zeros = np.float32(1 / 127.5), np.zeros(3 * hidden)
    quantized = {"sh": np.array(sh), "zh": np.array(128, np.uint8), "R": codes["R"][0], "b": zeros.astype(np.int32)}
    quantized |= {"sr": np.full(3 * hidden, STEP), "zr": zeros.astype(np.int8), "zb": zeros.astype(np.int32)}
    quantized |= {"sb": quantized["sr"] * sh}
    plain = {"R": floats["R"][0], "b": zeros.astype(np.float32)}
    forms = {
        "GRU": (parsed(gru.format(W="W", R="R"), {"x": x}, floats), x),
        "GRU, int8 weights": (
            parsed(expanded + gru.format(W="Wf", R="Rf"), {"x": x}, codes | {"s": np.array(STEP)}),
            x,
        ),
        "GRU, projected inputs, W = 1": (parsed(gru.format(W="W", R="R"), {"x": projected}, identity), projected),
        "Scan, float": (scan(FLOAT_PRODUCT, projected, plain, hidden), projected),
        "Scan, QDQ": (scan(INTEGER_PRODUCT, projected, quantized, hidden), projected),
    }
    for name, (model, feed) in forms.items():
        ms, names = measured(model, {"x": feed})
        print(f"{inputs} -> {hidden}  {name:30} {ms:7.3f} ms  {names}", flush=True)


def attention(heads: int, tokens: int, channels: int) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        "q k^T": ((tokens, channels), (channels, tokens)),
        "p v": ((tokens, tokens), (tokens, channels)),
    }
    pairs = "".join(
        f"{name}q = QuantizeLinear ({name}, s, z) {name}d = DequantizeLinear ({name}q, s, z) " for name in "ac"
    )
    after = " yq = QuantizeLinear (m, s, z) y = DequantizeLinear (yq, s, z)"
    constants = {"s": np.array(0.04, np.float32), "z": np.array(128, np.uint8)}
    for product, (left, right) in shapes.items():
        feed = {
            n: rng.standard_normal((1, heads, *s)).astype(np.float32) for n, s in zip("ac", (left, right), strict=True)
        }
        forms = {
            "float": parsed("y = MatMul (a, c)", feed, {}),
            "codes to floats": parsed(f"{pairs} y = MatMul (ad, cd)", feed, constants),
            "codes to codes": parsed(f"{pairs} m = MatMul (ad, cd){after}", feed, constants),
        }
        for name, model in forms.items():
            ms, names = measured(model, feed)
            print(f"{heads} x {tokens} x {channels}  {product:6} {name:16} {ms:7.3f} ms  {names}", flush=True)


if __name__ == "__main__":
    for size in SIZES:
        recurrences(*size)
    for head in HEADS:
        attention(*head)
