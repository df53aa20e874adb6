"""Scores that are nearly equal may be ordered otherwise by a runtime; what follows is compared at its own indices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import ModelError
from calibrators.placement.place import PlacementOptions
from exporter import capture, emit, fold
from runtime_tests.ort.sessions import Model
from runtime_tests.parity.elsewhere import Elsewhere
from runtime_tests.parity.results import ParityError
from runtime_tests.proof import validate
from runtime_tests.reference.execute import choice_of, gap_of, plan, run
from runtime_tests.workers.runtime import Artifact, Loaded
from tests.support.networks import randomize


class Detector(nn.Module):
    """Takes the boxes of the best scores, the best class of each, and their order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.score, self.box = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = F.relu(self.a(x))
        scores = F.softplus(self.score(y).flatten(2))
        best, classes = scores.max(1)
        top, index = best.topk(5)
        boxes = self.box(y).flatten(2).gather(2, index[:, None].expand(-1, 4, -1))
        return top, index, boxes, classes, boxes.argsort(-1), scores.argmin(1, keepdim=True)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    few = PlacementOptions(activation_bits=3)  # so that many scores are equal
    result = calibrate(fold(capture(randomize(Detector()).eval(), x)), [x], method="minmax", placement=few)
    path = tmp_path_factory.mktemp("choices") / "m.onnx"
    emit(result, path)
    return path, result, x


def test_every_choice_is_compared(detector: tuple[Path, object, Tensor]) -> None:
    path, result, x = detector
    found = validate(path, reference=result, batches=[x])  # type: ignore[arg-type]
    found.raise_for_mismatch()
    chosen = [node for node in found.optimized.nodes if node.reason == "chooses by floats"]
    assert [node.values for node in chosen] == [8 * 5, 8 * 4 * 5, 8 * 36, 8 * 36]
    assert all(node.legal and not node.mismatched for node in chosen)


class Best(nn.Module):
    """The mean of the best scores."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.a(x).flatten(2).topk(3)[0].mean(2))
        return found


def test_a_lowered_program_is_probed_at_its_codes_alone(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8)
    result = calibrate(fold(capture(randomize(Best()).eval(), x)), [x], method="minmax")
    emit(result, path := tmp_path / "m.onnx")
    asked = list[str]()

    def opened(artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        asked.extend(probes)
        raise ModelError("that is enough")

    model = Model.of(path)
    for lowers in (False, True):
        asked.clear()
        runtime: Any = SimpleNamespace(name="another", kernel_rate=0.0, lowers=lowers, open=opened)
        Elsewhere(runtime, Artifact(model), plan(result.program), {}, samples=1)
        assert asked and all(name.endswith("_quantized") for name in asked) == lowers


def test_forced_indices_are_followed_and_judged_by_their_scores(detector: tuple[Path, object, Tensor]) -> None:
    _, result, x = detector
    kernels = plan(result.program)  # type: ignore[attr-defined]
    (topk,) = [node.name for node in result.program.graph.nodes if "topk" in str(node.target)]  # type: ignore[attr-defined]
    codes, outputs = run(kernels, (x,))
    key = choice_of(topk)
    assert torch.equal(codes[key], outputs[1])
    reversed_ = codes[key].flip(1)
    forced, moved = run(kernels, (x,), {key: reversed_})
    assert torch.equal(moved[1], reversed_) and torch.equal(moved[0], outputs[0].flip(1))
    assert torch.equal(moved[2], outputs[2].flip(2))
    gaps = forced[gap_of(key)]
    torch.testing.assert_close(
        gaps.float(), (outputs[0].flip(1) - outputs[0]).abs() / outputs[0].max(), rtol=0.1, atol=1e-6
    )


def test_another_score_is_a_failure(detector: tuple[Path, object, Tensor], tmp_path: Path) -> None:
    """A file that takes the smallest scores where the largest are meant has other indices with other scores."""
    path, result, x = detector
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "TopK" and any(a.name == "largest" and a.i == 0 for a in node.attribute) is False:
            node.attribute.append(onnx.helper.make_attribute("largest", 0))
            break
    else:
        pytest.fail("no TopK")
    for node in model.graph.node:
        names = [attribute.name for attribute in node.attribute]
        while names.count("largest") > 1:
            del node.attribute[names.index("largest")]
            names = [attribute.name for attribute in node.attribute]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ParityError):
        validate(tmp_path / "m.onnx", reference=result, batches=[x]).raise_for_mismatch()  # type: ignore[arg-type]


def test_near_ties_may_be_ordered_otherwise(
    detector: tuple[Path, object, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's softplus differs in its last bits from the runtime's; here by enough to swap near neighbours."""
    from runtime_tests.reference import execute

    path, result, x = detector
    call = execute.call

    def perturbed(node, values):  # type: ignore[no-untyped-def]
        found = call(node, values)
        if "softplus" not in str(node.target):
            return found
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
        return found * (1 + 2e-5 * noise)

    monkeypatch.setattr(execute, "call", perturbed)
    found = validate(path, reference=result, batches=[x]).optimized  # type: ignore[arg-type]
    chosen = [node for node in found.nodes if node.reason == "chooses by floats"]
    assert all(node.legal for node in chosen)
    indices = {output.name: output for output in found.outputs}
    assert not indices["output_1"].identical  # equal scores came in another order
    assert not found.violations, indices


class Suppressed(nn.Module):
    """Greedy suppression of boxes, written with sort, masks and topk."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.score, self.box = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.a(x))
        scores, order = self.score(y).flatten(1).sigmoid().sort(descending=True)
        place, size = self.box(y).flatten(2).mT.gather(1, order[..., None].expand(-1, -1, 4)).split(2, -1)
        low, high = place - size.exp() / 2, place + size.exp() / 2
        both = (
            (torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None]))
            .clamp(min=0)
            .prod(-1)
        )
        area = (high - low).prod(-1)
        overlap = both / (area[:, :, None] + area[:, None] - both)
        hidden = (overlap > 0.5).float().triu(1).amax(1)  # by a better box
        top, index = (scores * (1 - hidden)).topk(4)
        return top, torch.cat([low, high], -1).gather(1, index[..., None].expand(-1, -1, 4))


@pytest.mark.parametrize("bits", [3, 8])
def test_suppression_by_hand_is_proved(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    few = PlacementOptions(activation_bits=bits)
    result = calibrate(fold(capture(randomize(Suppressed()).eval(), x)), [x], method="minmax", placement=few)
    emit(result, tmp_path / "m.onnx")
    found = validate(tmp_path / "m.onnx", reference=result, batches=[x])
    found.raise_for_mismatch()
    assert sum(node.reason == "chooses by floats" for node in found.optimized.nodes) == 2
