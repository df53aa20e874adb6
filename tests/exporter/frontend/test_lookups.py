"""Ids beyond a table are a fault of the data, told once; parameters that are not finite are one of the model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from calibrators.errors import DataError, ModelError
from exporter import capture, export
from exporter.frontend.lookups import Lookup, lookups_of

ROWS = 20


class Reader(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table, self.head = table, nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(tokens.int()))
        return y


def ids(*bounds: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(*pair, (8, 5), generator=generator) for pair in bounds]


TABLES = {"embedding": nn.Embedding(ROWS, 8), "bag": nn.EmbeddingBag(ROWS, 8, mode="mean")}


@pytest.mark.parametrize("bounds", [[(0, 25)], [(-3, 5)], [(0, ROWS), (18, 25)]], ids=["beyond", "below", "later"])
@pytest.mark.parametrize("table", TABLES)
def test_an_id_beyond_the_table_names_input_id_and_table(
    table: str, bounds: list[tuple[int, int]], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"input 'tokens' holds (-\d|2\d), but the table of .*table.* rows 0 to 19"):
        export(Reader(TABLES[table]), ids(*bounds), out=tmp_path / "out", latency_runs=0)
    assert not (tmp_path / "out").exists()


def test_a_program_is_held_to_its_tables_too() -> None:
    program = torch.export.export(Reader(TABLES["embedding"]).eval(), (ids((0, ROWS))[0],))
    with pytest.raises(DataError, match="input 'tokens' holds"):
        capture(program, ids((0, 25))[0])


def test_casts_and_moves_are_followed_and_computed_ids_are_not() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Embedding(5, 8), nn.Embedding(30, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
            y: Tensor = self.head(self.a(tokens.t().long()).mean(0) + self.b(tokens * 6).mean(1) + x)
            return y

    graph = capture(Two().eval(), (torch.randn(8, 8), ids((0, 5))[0]))
    [found] = lookups_of(graph.graph, graph.graph.find_nodes(op="placeholder"))
    assert (found.input, found.rows) == (1, 5) and isinstance(found, Lookup)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_table_or_parameter_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    model = Reader(nn.Embedding(ROWS, 8))
    model.table.weight.data[3, 2] = value  # type: ignore[union-attr, operator, index]
    with pytest.raises(ModelError, match=r"parameter 'table.weight' of .* holds NaN or infinity"):
        export(model, ids((5, ROWS)), out=tmp_path / "out", latency_runs=0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.scale = nn.Linear(8, 4), nn.Parameter(torch.tensor([1.0, value, 1.0, 1.0]))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(x).abs() * self.scale
            return y

    with pytest.raises(ModelError, match=r"parameter 'scale' of .* holds NaN or infinity"):
        export(Scaled(), [torch.randn(8, 8)], out=tmp_path / "out", latency_runs=0)
