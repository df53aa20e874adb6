"""Values of programs: those of networks pass, those that a small file asks for out of nothing do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from calibrators.errors import ModelError
from exporter.frontend.capture import capture


class Asking(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "full":
            return x + torch.full((1 << 30,), 1.0)[:3]
        if self.how == "repeat":
            return x + x.repeat(1, 1 << 28)[:, :3]
        if self.how == "pad":
            return nn.functional.pad(x, (0, 1 << 28))[:, :3]
        return x.repeat(1, 1 << 10)[:, :3]


def program(how: str) -> torch.export.ExportedProgram:
    with torch.device("meta"):  # no memory is taken to make the file
        return torch.export.export(Asking(how), (torch.zeros(2, 3),))


@pytest.mark.parametrize("how", ["full", "repeat", "pad"])
def test_values_out_of_nothing_are_refused(how: str) -> None:
    with pytest.raises(ModelError, match=r"makes [\d.]+ GiB of .*file\.py:factory"):
        capture(program(how), torch.zeros(2, 3))


def test_values_of_networks_pass() -> None:
    exported = torch.export.export(Asking("little"), (torch.zeros(2, 3),))
    assert capture(exported, torch.zeros(2, 3)).meta["example"][0].shape == (2, 3)
