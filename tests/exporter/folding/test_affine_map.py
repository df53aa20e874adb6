"""The algebra of affine maps against direct NumPy convolutions, border ring and interior alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from exporter.folding.affine_map import (
    AffineMap,
    NotAffine,
    add,
    average,
    correlate,
    crop,
    identity,
    pad,
    scale,
    shift,
    stack,
)
from tests.support.probe import convolve, dense, spread

ROUNDING = 1e-12
"""float64 sums of a few hundred products of order 1: 1e-16 each, with room for cancellation."""
SIZE = (13, 10)


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _evaluate(f: AffineMap, x: np.ndarray) -> np.ndarray:
    """The map by its geometry, in NumPy."""
    shape = f.geometry()
    weight = spread(dense(f.kernel().numpy(), f.groups), shape.dilation)
    y = convolve(x, weight, stride=f.stride, low=shape.low, high=shape.high)
    return y + f.bias_or_zero().numpy()[None, :, None, None]


def _conv(x, weight, groups=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
    wide = spread(dense(weight.numpy(), groups), dilation)
    return convolve(x, wide, stride=stride, low=padding, high=padding)


def _input(channels: int) -> np.ndarray:
    return _random(2, channels, *SIZE, seed=99).numpy()


def _padded(f: AffineMap, weight, groups=1, stride=(1, 1), padding=(0, 0), dilation=(1, 1)) -> AffineMap:
    return correlate(pad(f, padding, padding), weight, stride, dilation, groups)


CASES = {
    "3x3": ((4, 4, 3, 3), 1, (1, 1), (1, 1), (1, 1)),
    "stride-2": ((6, 4, 3, 3), 1, (2, 2), (1, 1), (1, 1)),
    "uneven-stride": ((6, 4, 3, 2), 1, (1, 2), (1, 0), (1, 1)),
    "dilated": ((4, 4, 3, 3), 1, (1, 1), (2, 2), (2, 2)),
    "dilated-stride": ((4, 4, 3, 3), 1, (2, 1), (3, 1), (3, 1)),
    "depthwise": ((4, 1, 5, 5), 4, (1, 1), (2, 2), (1, 1)),
    "multiplier": ((8, 1, 3, 3), 4, (1, 1), (1, 1), (1, 1)),
    "groups": ((6, 2, 3, 3), 2, (1, 1), (1, 1), (1, 1)),
    "even-kernel": ((4, 4, 2, 4), 1, (1, 1), (0, 1), (1, 1)),
    "asymmetric": ((4, 4, 1, 5), 1, (1, 1), (0, 2), (1, 1)),
}


@pytest.mark.parametrize(("shape", "groups", "stride", "padding", "dilation"), CASES.values(), ids=CASES.keys())
def test_convolution_is_reproduced(shape, groups, stride, padding, dilation):
    weight = _random(*shape)
    f = _padded(identity(4, 2), weight, groups, stride, padding, dilation)
    x = _input(4)
    expected = _conv(x, weight, groups, stride, padding, dilation)
    assert np.abs(_evaluate(f, x) - expected).max() <= ROUNDING * np.abs(expected).max()
    assert f.groups == groups
    assert f.macs_per_cell() == weight.numel()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("3x3", "1x1"),
        ("stride-2", "1x1"),
        ("dilated-stride", "valid"),
        ("depthwise", "valid"),
        ("groups", "grouped"),
        ("multiplier", "grouped"),
        ("even-kernel", "strided"),
    ],
)
def test_a_chain_without_inner_padding_is_exact(first, second):
    shape, groups, stride, padding, dilation = CASES[first]
    channels = shape[0]
    follow = {
        "1x1": ((5, channels, 1, 1), 1, (1, 1), (1, 1)),
        "valid": ((5, channels, 3, 2), 1, (1, 1), (1, 1)),
        "grouped": ((channels, channels // 2, 2, 2), 2, (1, 1), (1, 2)),
        "strided": ((5, channels, 2, 2), 1, (2, 2), (1, 1)),
    }[second]
    weight, bias, outer = _random(*shape), _random(channels, seed=1), _random(*follow[0], seed=2)
    f = shift(_padded(identity(4, 2), weight, groups, stride, padding, dilation), bias)
    g = correlate(f, outer, follow[2], follow[3], follow[1])
    x = _input(4)
    middle = _conv(x, weight, groups, stride, padding, dilation) + bias.numpy()[None, :, None, None]
    expected = _conv(middle, outer, follow[1], follow[2], (0, 0), follow[3])
    got = _evaluate(g, x)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= ROUNDING * np.abs(expected).max()


def test_sum_uses_the_common_groups_and_all_offsets():
    depthwise, grouped = _random(4, 1, 3, 3), _random(4, 2, 1, 1, seed=1)
    f = add(_padded(identity(4, 2), depthwise, 4, padding=(1, 1)), _padded(identity(4, 2), grouped, 2))
    x = _input(4)
    expected = _conv(x, depthwise, 4, padding=(1, 1)) + _conv(x, grouped, 2)
    assert f.groups == 2
    assert np.abs(_evaluate(f, x) - expected).max() <= ROUNDING * np.abs(expected).max()


def test_dilated_beside_dense_becomes_dense_and_alone_stays_dilated():
    weight = _random(4, 1, 3, 3)
    dilated = _padded(identity(4, 2), weight, 4, padding=(2, 2), dilation=(2, 2))
    assert dilated.geometry().dilation == (2, 2)
    assert dilated.geometry().kernel == (3, 3)
    both = add(dilated, identity(4, 2))
    assert both.geometry().dilation == (2, 2)
    wider = add(dilated, _padded(identity(4, 2), weight, 4, padding=(1, 1)))
    assert wider.geometry().dilation == (1, 1)
    assert wider.geometry().kernel == (5, 5)


def test_scale_shift_average_crop_and_stack():
    x, factor, value = _input(4), _random(4, seed=3), _random(4, seed=4)
    wide = factor.numpy()[None, :, None, None]
    f = shift(scale(identity(4, 2), factor), value)
    expected = x * wide + value.numpy()[None, :, None, None]
    assert np.abs(_evaluate(f, x) - expected).max() <= ROUNDING * np.abs(expected).max()
    cropped = crop(identity(4, 2), (1, 0), (2, 3), (2, 1))
    assert np.array_equal(_evaluate(cropped, x), x[:, :, 1:-2:2, :-3])
    mean = average(identity(4, 2), (3, 3), (1, 1), 9)
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3)).mean((-2, -1))
    assert np.abs(_evaluate(mean, x) - windows).max() <= ROUNDING
    both = stack([f, identity(4, 2)])
    assert both.groups == 1
    assert np.abs(_evaluate(both, x) - np.concatenate([expected, x], 1)).max() <= ROUNDING * np.abs(expected).max()


def test_linear_maps_have_no_axes():
    first, second, bias = _random(6, 4), _random(5, 6, seed=1), _random(6, seed=2)
    f = correlate(shift(correlate(identity(4, 0), first, (), (), 1), bias), second, (), (), 1)
    x = _random(3, 4, seed=3).numpy()
    expected = (x @ first.numpy().T + bias.numpy()) @ second.numpy().T
    got = x @ f.kernel().numpy().T + f.bias_or_zero().numpy()
    assert np.abs(got - expected).max() <= ROUNDING * np.abs(expected).max()
    assert torch.equal(identity(3, 0).kernel(), torch.eye(3, dtype=torch.float64))


def test_identity_has_one_group_per_channel_and_zero_weights_do_not_change_groups():
    assert identity(4, 2).is_diagonal
    assert _padded(identity(4, 2), torch.zeros(4, 4, 1, 1)).groups == 1


# The border rule ---------------------------------------------------------------------------------------------------


def _refuses(f: AffineMap, low=(1, 1), high=(1, 1), value=0.0) -> str:
    with pytest.raises(NotAffine) as caught:
        pad(f, low, high, value)
    return str(caught.value)


def test_border_rule_refuses_what_differs_on_the_ring():
    three = _padded(identity(4, 2), _random(4, 4, 3, 3), padding=(1, 1))
    assert "wider than one cell" in _refuses(three)
    valid = _padded(identity(4, 2), _random(4, 4, 3, 3))
    assert "wider than one cell" in _refuses(valid)
    assert "wider than one cell" in _refuses(valid, high=(0, 0))
    assert "wider than one cell" in _refuses(valid, low=(0, 0))
    biased = shift(identity(4, 2), torch.ones(4, dtype=torch.float64))
    assert "its bias" in _refuses(biased)
    assert "its bias" in _refuses(identity(4, 2), value=0.5)


@pytest.mark.parametrize(
    ("first", "padding", "low", "high"),
    [
        ((4, 4, 1, 1), (0, 0), (1, 2), (3, 0)),
        ((4, 4, 3, 1), (1, 0), (0, 2), (0, 2)),
        ((4, 4, 3, 3), (2, 2), (1, 1), (1, 1)),
    ],
    ids=["pointwise", "other-axis", "full-padding"],
)
def test_border_rule_lets_pass_what_is_exact(first, padding, low, high):
    weight, outer = _random(*first), _random(4, 4, 3, 3, seed=1)
    f = correlate(pad(_padded(identity(4, 2), weight, padding=padding), low, high), outer, (1, 1), (1, 1), 1)
    x = _input(4)
    middle = _conv(x, weight, padding=padding)
    expected = convolve(middle, outer.numpy(), stride=(1, 1), low=low, high=high)
    assert np.abs(_evaluate(f, x) - expected).max() <= ROUNDING * np.abs(expected).max()


def test_padding_with_the_bias_itself_is_exact():
    f = pad(shift(identity(4, 2), torch.full((4,), 0.5, dtype=torch.float64)), (1, 1), (1, 1), 0.5)
    x = _input(4)
    expected = np.pad(x + 0.5, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
    assert np.abs(_evaluate(f, x) - expected).max() <= ROUNDING


def test_a_cancelled_bias_is_no_bias():
    value = _random(4)
    assert shift(shift(identity(4, 2), value), -value).bias is None
    assert shift(identity(4, 2), value).bias is not None


@pytest.mark.parametrize("other", ["stride", "size", "channels"])
def test_sums_that_fit_only_sometimes_are_refused(other):
    f = _padded(identity(4, 2), _random(4, 4, 3, 3), stride=(2, 2), padding=(1, 1))
    g = {
        "stride": identity(4, 2),
        "size": _padded(identity(4, 2), _random(4, 4, 2, 2), stride=(2, 2)),
        "channels": _padded(identity(4, 2), _random(5, 4, 1, 1), stride=(2, 2)),
    }[other]
    with pytest.raises(NotAffine):
        add(f, g)
    if other != "channels":
        with pytest.raises(NotAffine):
            stack([f, g])


def test_matrices_are_computed_once_however_often_a_map_is_used():
    calls = []
    f = identity(2, 2)

    def build(memo):
        calls.append(1)
        return f.build(memo)

    counted = AffineMap(2, 2, 2, f.stride, f.extra, f.offsets, None, build)
    doubled = counted
    for _ in range(12):
        doubled = add(doubled, doubled)
    assert float(doubled.kernel()[0, 0, 0, 0]) == 2.0**12
    assert len(calls) == 1
