"""The longer a row of float operators, the more of its values may lie on the other side of a tie."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporter import capture
from runtime_tests.parity.results import FLOAT_DEPTH, FLOAT_RATE, ONE_ROUNDING, legal_rate
from runtime_tests.reference.execute import FLOAT
from runtime_tests.reference.float_depth import OPERATORS_PER_STEP, float_depths


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 8, num_layers=2, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.gru(x.exp())[0].mT), x.reshape(-1, 4).abs()


def test_rows_of_float_operators() -> None:
    graph = capture(Recurrent().eval(), torch.randn(2, 5, 4))
    recurrent, plain = (float_depths(graph)[node] for node in graph.graph.output_node().all_input_nodes)
    assert recurrent == 1 + 2 * 5 * OPERATORS_PER_STEP + 1
    assert plain == 1


def test_the_limit_grows_with_the_row() -> None:
    assert legal_rate(FLOAT) == legal_rate(FLOAT, depth=FLOAT_DEPTH) == FLOAT_RATE
    assert legal_rate(FLOAT, depth=2 * FLOAT_DEPTH) == 2 * FLOAT_RATE
    assert legal_rate("QLinearConv", depth=1000) == 0.0


def test_a_concat_may_round_once_where_steps_are_allowed() -> None:
    assert legal_rate("QLinearConcat") == 0.0
    assert legal_rate("QLinearConcat", of_kernels=0.08) == ONE_ROUNDING + legal_rate("QLinearConv", of_kernels=0.08)
