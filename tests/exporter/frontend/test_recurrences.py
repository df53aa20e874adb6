"""Recurrent layers are traced by shapes: their length stays free, and no step is traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from exporter import capture, export
from exporter.emission.build_model import emit_float
from exporter.frontend.axes import FreeAxis
from exporter.frontend.recurrences import RECURRENCES, recurrences_by_shape
from tests.support.networks import randomize

FLOAT = 1e-5
"""Float32 sums of ten terms over forty steps in another order."""

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "gru": (nn.GRU, {"bidirectional": True}),
    "lstm": (nn.LSTM, {"num_layers": 2, "bias": False}),
    "tanh": (nn.RNN, {"num_layers": 2, "bidirectional": True}),
    "relu": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
}


class Reader(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        layer, options = KINDS[kind]
        self.front, self.rnn = nn.Linear(4, 8), layer(8, 6, batch_first=True, **options)
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.rnn(self.front(x))
        return self.head(y), state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_computes_any_length(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomize(Reader(kind))
    graph = capture(model, torch.randn(2, 7, 4), axes={"x": {1: FreeAxis("length")}})
    assert sum(node.target in RECURRENCES for node in graph.graph.nodes) == 1
    emit_float(graph, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for shape in ((1, 40, 4), (3, 5, 4)):
        x = torch.randn(shape)
        for expected, found in zip(model(x), session.run(None, {"x": x.numpy()}), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=FLOAT, atol=FLOAT)


def test_a_network_with_a_free_length_is_proved(tmp_path: Path) -> None:
    data = [torch.randn(8, 9, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    report = export(randomize(Reader("tanh")), data, out=tmp_path / "out", dynamic="x:1=length", latency_runs=0)
    assert report["verdict"] == "pass", report["gates"]
    assert {tuple(each["x"]) for each in report["sizes"]["proved"]} == {(9, 4), (14, 4), (4, 4)}


def test_torch_is_left_as_it_was_and_real_tensors_are_computed() -> None:
    before = [dict(operator.py_kernels) for operator in RECURRENCES]
    layer, x = nn.GRU(4, 3), torch.randn(5, 2, 4)
    with pytest.raises(ZeroDivisionError), recurrences_by_shape():
        assert bool(layer(x)[0].any())
        raise ZeroDivisionError
    assert [dict(operator.py_kernels) for operator in RECURRENCES] == before
