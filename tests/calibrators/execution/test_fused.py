"""Formulas computed chunk by chunk, against autograd of the same formulas written operator by operator."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from calibrators.execution import fused
from calibrators.execution.fused import Ends, FakeQuantize, chunks, mean_square

SHAPE = (3, 5, 4, 2)
BOUNDS = (0, 12)
CLIPS = {"not-clipped": None, "relu": (0.0, float("inf")), "relu6": (0.0, 0.5), "both-ends": (-0.25, 0.4)}


@pytest.fixture(params=[7, 1 << 16], ids=["many-chunks", "one-chunk"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(fused, "CHUNK", request.param)
    size: int = request.param
    return size


def composed(x: Tensor, log_scale: Tensor, clip: tuple[float, float] | None, mask: Tensor | None) -> Tensor:
    """Clip, rounding with a straight-through gradient, drop."""
    clipped = x if clip is None else nn.functional.hardtanh(x, *clip)
    steps = clipped / log_scale.exp()
    rounded = steps + (steps.round() - steps).detach()
    quantized = rounded.clamp(*BOUNDS) * log_scale.exp()
    return quantized if mask is None else torch.where(mask == 1, quantized, clipped)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "dropped"])
def test_clip_quantizer_and_drop_are_one_formula(clip: str, masked: bool, generator: torch.Generator) -> None:
    """Values and gradients, in a layout that is not the default one; with and without values below the grid."""
    bounds = CLIPS[clip]
    x = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
    weights = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    mask = None
    if masked:
        mask = (torch.rand(SHAPE, generator=generator) < 0.5).float().to(memory_format=torch.channels_last)
    log_scale = torch.tensor(0.07, dtype=torch.float64).log().requires_grad_()
    x.requires_grad_()
    expected = composed(x, log_scale, bounds, mask)
    found = FakeQuantize.apply(x, log_scale, Ends(BOUNDS, bounds, bounds is not None and bounds[0] == 0), mask)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), (x, log_scale)) for y in (found, expected))
    for mine, written_out in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, written_out)
        assert bool(mine.any())


def test_only_wanted_gradients_are_computed(generator: torch.Generator) -> None:
    log_scale = torch.tensor(0.07).log()
    for x_learns, scale_learns in itertools.product((False, True), repeat=2):
        x = torch.randn(4, 3, generator=generator).requires_grad_(x_learns)
        scale = log_scale.clone().requires_grad_(scale_learns)
        y = FakeQuantize.apply(x, scale, Ends(BOUNDS, None, nonnegative=False), None)
        assert y.requires_grad == (x_learns or scale_learns)
        if y.requires_grad:
            y.sum().backward()
        assert (x.grad is not None, scale.grad is not None) == (x_learns, scale_learns)


@pytest.mark.usefixtures("chunk")
def test_mean_square_is_that_of_torch(generator: torch.Generator) -> None:
    """Where the layouts of the two differ too, and where the first has gaps in memory."""
    y = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    t = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    with_gaps = torch.randn(3, 5, 4, 4, generator=generator, dtype=torch.float64)[..., ::2]
    for first in (y, y.to(memory_format=torch.channels_last), with_gaps):
        leaf = first.detach().requires_grad_()
        (ours,), (theirs,) = (
            torch.autograd.grad(3 * loss(leaf, t), leaf) for loss in (mean_square, nn.functional.mse_loss)
        )
        torch.testing.assert_close(mean_square(leaf, t), nn.functional.mse_loss(leaf, t))
        torch.testing.assert_close(ours, theirs)


def test_chunks_cover_every_element_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "CHUNK", 4)
    x = torch.arange(10)
    pieces = list(chunks(x, None, x + 10))
    assert [len(piece) for piece, _, _ in pieces] == [4, 4, 2]
    assert torch.equal(torch.cat([piece for piece, _, _ in pieces]), x)
    assert torch.equal(torch.cat([piece for _, _, piece in pieces]), x + 10)
    assert all(absent is None for _, absent, _ in pieces)
