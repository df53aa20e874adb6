"""Tables of embeddings are stored once, in 8 bits, and the file looks up the floats that their codes stand for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.placement.placement_options import PlacementOptions
from exporter import capture, emit, fold
from runtime_tests.proof import validate

ROWS, COLUMNS = 50, 16


class Tokens(nn.Module):
    """An embedding, a layer and an output projection, which may be one tensor with the table."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(ROWS, COLUMNS), nn.Linear(COLUMNS, COLUMNS)
        self.project = nn.Linear(COLUMNS, ROWS, bias=False)
        if tied:
            self.project.weight = self.table.weight

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        found = self.table(tokens)
        return self.project(F.relu(self.layer(found))), found


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.EmbeddingBag(ROWS, COLUMNS, mode="mean"), nn.Linear(COLUMNS, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(self.table(tokens))


def exported(model: nn.Module, path: Path, **options: object) -> tuple[onnx.ModelProto, Tensor]:
    """The file, proved on the tokens that calibrated it and on a batch of another size, and those tokens."""
    tokens = torch.randint(0, ROWS, (8, 6), generator=torch.Generator().manual_seed(0))
    placement = PlacementOptions(**options)
    result = calibrate(fold(capture(model.eval(), tokens)), [tokens], method="minmax", placement=placement)
    emit(result, path)
    validate(path, reference=result, batches=[tokens, tokens[:3]]).raise_for_mismatch()
    return onnx.load(path), tokens


def tables(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    tensors = model.graph.initializer
    return {each.name: tuple(each.dims) for each in tensors if tuple(each.dims) == (ROWS, COLUMNS)}


@pytest.mark.parametrize("per_tensor", [False, True], ids=["row", "tensor"])
@pytest.mark.parametrize(("tied", "names"), [(True, ["project"]), (False, ["project", "table"])], ids=["tied", "own"])
def test_floats_are_those_of_the_codes(tied: bool, names: list[str], per_tensor: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, tokens = exported(Tokens(tied=tied), tmp_path / "model.onnx", per_tensor_weights=per_tensor)
    assert sorted(tables(model)) == [f"{name}.weight_quantized" for name in names]
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    name = f"{names[-1]}.weight"
    assert arrays[f"{name}_quantized"].dtype == np.int8
    rows = arrays[f"{name}_quantized"].astype(np.float32) * arrays[f"{name}_row_scale"]
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    _, found = session.run(None, {session.get_inputs()[0].name: tokens.numpy()})
    np.testing.assert_array_equal(found, rows[tokens.numpy()])


def test_bags_read_a_table_of_codes(tmp_path: Path) -> None:
    model, _ = exported(Bags(), tmp_path / "model.onnx")
    assert list(tables(model)) == ["table.weight_quantized"]


def test_an_excluded_table_stays_float(tmp_path: Path) -> None:
    model, _ = exported(Tokens(tied=False), tmp_path / "model.onnx", exclude=("table",))
    assert sorted(tables(model)) == ["project.weight_quantized", "table.weight"]
