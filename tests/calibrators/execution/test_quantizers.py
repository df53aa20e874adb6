"""Quantizers that learn, against autograd of the formulas as the papers write them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from calibrators.execution.quantizers import STRETCH, ActivationQuantizer, Masks, Rounding
from calibrators.grid.numerics import along_axis, fake_quant, quantize
from calibrators.grid.spec import QParams, QuantSpec

CPU = torch.device("cpu")
KEPT_ALIVE = 1e-4
"""Steps that a soft weight may start away from a weight that lies on a code, so that its variable has a gradient."""

FLOAT32 = 1e-6
"""Relative error of a few float32 operations in a row."""

FIVE_SIGMA = 5.0


def qparams(scale: float, zero_point: int, spec: QuantSpec, dtype: torch.dtype = torch.float64) -> QParams:
    return QParams(torch.tensor(scale, dtype=dtype), torch.tensor(zero_point, dtype=torch.int32), spec)


# --- activations: the straight-through estimator

GRIDS = [(8, 0), (8, 128), (8, 255), (4, 0), (4, 6), (2, 0), (2, 1), (2, 3)]
"""Bits and zero points of unsigned grids."""


def straight_through(x: Tensor, log_scale: Tensor, spec: QuantSpec, zero_point: int) -> Tensor:
    """scale * (clamp(round(x / scale) + zero_point) - zero_point), rounding of gradient 1 (Esser et al. 2020)."""
    scale = log_scale.exp()
    steps = x / scale
    rounded = steps + (steps.round() - steps).detach()
    return scale * ((rounded + zero_point).clamp(spec.qmin, spec.qmax) - zero_point)


def gradients(y: Tensor, weights: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((y * weights).sum(), of)


def spread(spec: QuantSpec, zero_point: int, scale: float, generator: torch.Generator) -> Tensor:
    """Values over the grid and beyond both of its ends, none within 1e-3 steps of where a code changes."""
    steps = torch.rand(6, 5, 4, 3, generator=generator, dtype=torch.float64) * (1.6 * (spec.qmax + 1)) - 0.3 * spec.qmax
    steps -= zero_point
    return torch.where((steps - steps.floor() - 0.5).abs() < 1e-3, steps + 0.01, steps) * scale


@pytest.mark.parametrize(("bits", "zero_point"), GRIDS)
def test_gradients_are_those_of_straight_through_rounding(
    bits: int, zero_point: int, generator: torch.Generator
) -> None:
    spec = QuantSpec(bits)
    x = spread(spec, zero_point, 0.05, generator).requires_grad_()
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantizer = ActivationQuantizer(qparams(0.05, zero_point, spec), nonnegative=False)
    quantizer.learn(None, scale=True)
    expected = straight_through(x, quantizer.log_scale, spec, zero_point)
    found = quantizer(x)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        gradients(found, weights, x, quantizer.log_scale),
        gradients(expected, weights, x, quantizer.log_scale),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("x", "to_x", "to_scale"),
    [
        pytest.param(0.3, 1.0, 0.0, id="on-a-code"),
        pytest.param(0.33, 1.0, 3 - 3.3, id="above-its-code"),
        pytest.param(-0.17, 1.0, -2 + 1.7, id="below-its-code"),
        pytest.param(5.0, 0.0, 10.0, id="above-the-grid"),
        pytest.param(-5.0, 0.0, -5.0, id="below-the-grid"),
        pytest.param(1.04, 1.0, 10 - 10.4, id="rounded-to-the-last-code"),
        pytest.param(1.06, 0.0, 10.0, id="clipped-to-the-last-code"),
    ],
)
def test_gradient_of_the_scale_is_that_of_lsq(x: float, to_x: float, to_scale: float) -> None:
    """round(v) - v inside the grid, its end outside; times the scale, because the logarithm is learned."""
    value = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    quantizer = ActivationQuantizer(qparams(0.1, 5, QuantSpec(4)), nonnegative=False)
    quantizer.learn(None, scale=True)
    found = gradients(quantizer(value), torch.ones(1), value, quantizer.log_scale)
    assert [float(grad) for grad in found] == [pytest.approx(to_x), pytest.approx(0.1 * to_scale)]


@pytest.mark.parametrize("zero_point", [0, 3])
def test_values_that_are_never_negative_need_no_lower_end(zero_point: int, generator: torch.Generator) -> None:
    """The short form gives the same gradients; with another zero point there may be values below the grid."""
    x = spread(QuantSpec(4), 0, 0.1, generator).abs()
    if zero_point:
        x -= 1.0
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = []
    for nonnegative in (False, True):
        quantizer = ActivationQuantizer(qparams(0.1, zero_point, QuantSpec(4)), nonnegative=nonnegative)
        quantizer.learn(None, scale=True)
        value = x.clone().requires_grad_()
        found.append(gradients(quantizer(value), weights, value, quantizer.log_scale))
    for plain, short in zip(*found, strict=True):
        torch.testing.assert_close(plain, short)


def test_dropped_elements_stay_as_they_are(generator: torch.Generator) -> None:
    spec, masks = QuantSpec(4), Masks(0.5, generator, CPU)
    x = spread(spec, 5, 0.05, generator).requires_grad_()
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantizer = ActivationQuantizer(qparams(0.05, 5, spec), nonnegative=False)
    quantizer.learn(masks, scale=True)
    masks.like(x)  # draws the pool, so that the generator says only where a mask starts
    state = generator.get_state()
    found = quantizer(x)
    generator.set_state(state)
    mask = masks.like(x)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    expected = torch.where(mask == 1, straight_through(x, quantizer.log_scale, spec, 5), x)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[mask == 0], x[mask == 0])
    for ours, theirs in zip(
        gradients(found, weights, x, quantizer.log_scale),
        gradients(expected, weights, x, quantizer.log_scale),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["plain", "channels-last"]
)
def test_layout_changes_nothing(memory_format: torch.memory_format, generator: torch.Generator) -> None:
    x = spread(QuantSpec(4), 5, 0.05, generator)
    weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    quantizer = ActivationQuantizer(qparams(0.05, 5, QuantSpec(4)), nonnegative=False)
    quantizer.learn(None, scale=True)
    found = []
    for value, each in ((x, weights), (x.to(memory_format=memory_format), weights.contiguous())):
        leaf = value.clone().requires_grad_()
        y = quantizer(leaf)
        assert y.stride() == leaf.stride()
        found.append(gradients(y, each, leaf, quantizer.log_scale))
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_exact_until_it_learns_and_after(generator: torch.Generator) -> None:
    """Float32, as deployed: fake_quant to the last bit; the learned scale is kept, zero point and grid stay."""
    x = torch.randn(1000, generator=generator)
    given = qparams(0.07, 5, QuantSpec(4), torch.float32)
    quantizer = ActivationQuantizer(given, nonnegative=False).eval()
    assert torch.equal(quantizer(x), fake_quant(x, given))
    quantizer.learn(None, scale=True)
    torch.testing.assert_close(quantizer(x), fake_quant(x, given), rtol=0, atol=FLOAT32 * 16 * 0.07)
    with torch.no_grad():
        quantizer.log_scale.add_(math.log(2.0))
    quantizer.harden()
    learned = quantizer.qparams
    assert float(learned.scale) == pytest.approx(0.14) and learned.scale.dtype == torch.float32
    assert torch.equal(learned.zero_point, given.zero_point) and learned.spec == given.spec
    assert torch.equal(quantizer(x), fake_quant(x, learned)) and not quantizer.log_scale.requires_grad
    quantizer.reset(given)
    assert torch.equal(quantizer(x), fake_quant(x, given)) and float(quantizer.log_scale.exp()) == pytest.approx(0.07)


def test_a_scale_that_does_not_learn_stays_to_the_bit(generator: torch.Generator) -> None:
    """exp(log(scale)) is another number."""
    for scale in torch.rand(50, generator=generator):
        quantizer = ActivationQuantizer(QParams(scale, torch.tensor(0), QuantSpec(8)), nonnegative=True)
        quantizer.learn(None, scale=False)
        assert not quantizer(torch.ones(3)).requires_grad
        quantizer.harden()
        assert torch.equal(quantizer.qparams.scale, scale)


def test_bypassed_values_pass(generator: torch.Generator) -> None:
    x = torch.randn(5, generator=generator)
    quantizer = ActivationQuantizer(qparams(0.1, 0, QuantSpec(2)), nonnegative=False)
    quantizer.learn(None, scale=False, bypass=True)
    assert quantizer(x) is x
    quantizer.harden()
    assert torch.equal(quantizer(x), fake_quant(x, quantizer.qparams))


# --- masks

LAYOUTS = {
    "vector": torch.empty(30_000),
    "matrix": torch.empty(300, 100).T,
    "image": torch.empty(10, 30, 10, 10),
    "channels-last": torch.empty(10, 30, 10, 10).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.0])
@pytest.mark.parametrize("name", LAYOUTS)
def test_masks_keep_the_share_they_should(name: str, keep: float, generator: torch.Generator) -> None:
    """In the layout of the tensor; each mask anew, and no two elements of it alike."""
    x, masks = LAYOUTS[name], Masks(keep, generator, CPU)
    drawn = torch.stack([masks.like(x).clone() for _ in range(10)])
    first = masks.like(x)
    assert first.shape == x.shape and first.stride() == x.stride() and first.dtype == torch.float32
    assert set(drawn.unique().tolist()) <= {0.0, 1.0}
    sigma = math.sqrt(keep * (1 - keep))
    assert abs(float(drawn.mean()) - keep) <= FIVE_SIGMA * sigma / math.sqrt(2 * x.numel())  # out of a pool of twice x
    if not keep:
        return
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(drawn))
    flat = drawn[0].flatten() - keep
    for lag in (1, 10, 100):
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) <= FIVE_SIGMA * sigma**2 / math.sqrt(len(flat) - lag)


def test_masks_repeat_with_their_generator() -> None:
    """And the pool grows with what it must cover."""
    first, second = (Masks(0.5, torch.Generator().manual_seed(7), CPU) for _ in range(2))
    for size in (10, 50_000, 3, 200_000):
        mask = first.like(torch.empty(size))
        assert torch.equal(mask, second.like(torch.empty(size)))
        assert len(mask) == size
    assert not torch.equal(mask, Masks(0.5, torch.Generator().manual_seed(8), CPU).like(torch.empty(size)))


def test_keeping_everything_is_no_randomness(generator: torch.Generator) -> None:
    x = torch.randn(4, 3, 5, 5, generator=generator)
    masks = Masks(1.0, generator, CPU)
    assert bool((masks.like(x) == 1).all())
    found = []
    for each in (None, masks, masks):
        quantizer = ActivationQuantizer(qparams(0.1, 3, QuantSpec(4), torch.float32), nonnegative=False)
        quantizer.learn(each, scale=True)
        found.append(quantizer(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(lambda x: x[:, 0], id="class-token"),
        pytest.param(lambda x: x[0, 0].expand(500, 384), id="expanded"),
    ],
)
def test_parts_and_repetitions_of_other_values_can_be_dropped(
    part: Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    """Every element on its own, although their memory has gaps or is shared."""
    x = part(torch.randn(32, 197, 384, generator=generator))
    quantizer = ActivationQuantizer(qparams(0.1, 8, QuantSpec(4), torch.float32), nonnegative=False)
    quantizer.learn(Masks(0.5, generator, CPU), scale=True)
    share = (quantizer(x) != x).float().mean(0)
    assert bool((share - 0.5).abs().le(FIVE_SIGMA * 0.5 / math.sqrt(len(x))).all())


# --- the rounding of weights

PER_CHANNEL = [QuantSpec(bits, signed=True, axis=0) for bits in (2, 3, 4, 7)]
SPECS = [
    *PER_CHANNEL,
    QuantSpec(8, signed=True, symmetric=True, axis=0, narrow=True),
    dataclasses.replace(PER_CHANNEL[2], axis=None),
]
SHAPES = [(6, 5, 3, 3), (6, 1, 3, 3), (6, 7), (6, 4, 3), (6, 5, 1, 1)]


def weights_and_grids(spec: QuantSpec, generator: torch.Generator) -> tuple[list[Tensor], list[QParams]]:
    """Weights of several shapes, on grids that hold most of them, and of which the first holds some codes exactly."""
    weights, grids = [], []
    for shape in SHAPES:
        size = () if spec.axis is None else shape[:1]
        scale = torch.rand(size, generator=generator) + 0.5
        levels = torch.tensor(spec.qmax - spec.qmin + 1)
        zero_point = torch.randint(spec.qmin, spec.qmax + 1, size, generator=generator, dtype=torch.int32)
        grid = QParams(scale, zero_point * (not spec.symmetric), spec)
        steps = (torch.rand(shape, generator=generator) * 1.4 - 0.2) * levels + spec.qmin
        steps.flatten()[::7].round_()
        weights.append((steps - along_axis(grid.zero_point, steps, spec.axis)) * _scale(grid, steps))
        grids.append(grid)
    return weights, grids


def _scale(grid: QParams, weight: Tensor) -> Tensor:
    return along_axis(grid.scale, weight, grid.spec.axis)


def positions(weight: Tensor, grid: QParams) -> Tensor:
    """Return the weights in steps of their grid, with its zero point, float32."""
    return weight / _scale(grid, weight) + along_axis(grid.zero_point, weight, grid.spec.axis)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_training_starts_at_the_float_weights(spec: QuantSpec, generator: torch.Generator) -> None:
    """Inside the grid; at its ends outside."""
    weights, grids = weights_and_grids(spec, generator)
    rounding = Rounding(weights, grids)
    rounding.soften()
    for weight, grid, soft in zip(weights, grids, rounding.weights, strict=True):
        assert soft.shape == weight.shape and soft.requires_grad and soft.is_leaf
        if weight.ndim == 4:
            assert soft.is_contiguous(memory_format=torch.channels_last)
        at = positions(weight, grid)
        assert bool((at < spec.qmin).any()) and bool((at > spec.qmax).any())
        expected = at.clamp(spec.qmin, spec.qmax)
        tolerance = KEPT_ALIVE + FLOAT32 * (spec.qmax - spec.qmin + expected.abs().max())
        torch.testing.assert_close(positions(soft.detach(), grid), expected, rtol=0, atol=float(tolerance))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_before_training_the_codes_are_the_nearest(spec: QuantSpec, generator: torch.Generator) -> None:
    weights, grids = weights_and_grids(spec, generator)
    for weight, grid, coded in zip(weights, grids, Rounding(weights, grids).codes(), strict=True):
        assert coded.codes.dtype == torch.int8 and coded.codes.is_contiguous()
        assert coded.qparams.spec == spec and torch.equal(coded.qparams.scale, grid.scale)
        at = positions(weight, grid)
        is_tie = (at - at.floor() - 0.5).abs() < 1e-5
        assert torch.equal(coded.codes[~is_tie], quantize(weight, grid)[~is_tie])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_the_two_next_to_the_weight(spec: QuantSpec, generator: torch.Generator) -> None:
    """Whatever was learned: the one below or above, as the sign says, and on the grid; both occur."""
    weights, grids = weights_and_grids(spec, generator)
    rounding = Rounding(weights, grids)
    start = rounding.variable.detach().clone()
    with torch.no_grad():
        rounding.variable.copy_(torch.randn(rounding.variable.shape, generator=generator) * 3)
    up = [coded.codes for coded in rounding.codes()]
    with torch.no_grad():
        rounding.variable.neg_()
    down = [coded.codes for coded in rounding.codes()]
    for weight, grid, first, second in zip(weights, grids, up, down, strict=True):
        at = weight / _scale(grid, weight)
        below = at.floor() + along_axis(grid.zero_point, weight, spec.axis)
        ends = torch.stack([below, below + 1]).clamp(spec.qmin, spec.qmax)
        for codes in (first, second):
            assert bool(((codes == ends[0]) | (codes == ends[1])).all())
        inside = (below >= spec.qmin) & (below < spec.qmax)
        assert torch.equal(first != second, inside) and bool(inside.any()) and bool((~inside).any())
    assert not torch.equal(start, rounding.variable)


def written_out(rounding: Rounding, variable: Tensor, strength: float, beta: float) -> tuple[Tensor, Tensor]:
    """The soft weights, flat, and the regularizer: equations 22 to 24 of Nagel et al. 2020 in float64."""
    h = (torch.sigmoid(variable) * STRETCH - (STRETCH - 1) / 2).clamp(0, 1)
    soft = rounding.offset.double() + rounding.step.double() * h
    return soft, strength * ((1 - (2 * h - 1).abs() ** beta) * rounding.free).sum()


@pytest.mark.parametrize(("strength", "beta"), [(0.0, 20.0), (0.3, 20.0), (0.3, 7.5), (2.0, 2.0)])
def test_gradient_of_the_rounding(strength: float, beta: float, generator: torch.Generator) -> None:
    """That of the weights' loss through h, and that of the regularizer; none where h is clipped or nothing is free."""
    weights, grids = weights_and_grids(PER_CHANNEL[1], generator)
    rounding = Rounding(weights, grids)
    with torch.no_grad():
        rounding.variable[rounding.free] = torch.randn(int(rounding.free.sum()), generator=generator) * 2
    factors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    for _ in range(2):  # gradients do not add up over the steps
        rounding.soften()
        sum((soft * factor).sum() for soft, factor in zip(rounding.weights, factors, strict=True)).backward()  # type: ignore[union-attr]
        rounding.backward(strength, torch.tensor(beta))
    variable = rounding.variable.detach().double().requires_grad_()
    soft, regularizer = written_out(rounding, variable, strength, beta)
    flat = torch.cat([(f.permute(0, 2, 3, 1) if f.ndim == 4 else f).reshape(-1) for f in factors])
    (expected,) = torch.autograd.grad((soft * flat).sum() + regularizer, variable)
    assert rounding.variable.grad is not None
    torch.testing.assert_close(rounding.variable.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert not rounding.variable.grad[~rounding.free].any()
    assert bool((rounding.variable.grad[rounding.free & (rounding.variable.abs() < 2)] != 0).all())


def test_a_weight_on_a_code_can_still_leave_it() -> None:
    """Its variable starts just inside, where the stretched sigmoid has a slope."""
    grid = QParams(torch.ones(2), torch.zeros(2, dtype=torch.int32), PER_CHANNEL[2])
    rounding = Rounding([torch.tensor([[-3.0, 0.0, 2.0], [5.0, -8.0, 1.0]])], [grid])
    rounding.soften()
    rounding.weights[0].sum().backward()
    rounding.backward(0.0, torch.tensor(2.0))
    assert rounding.variable.grad is not None and bool((rounding.variable.grad > 0).all())


def test_training_moves_the_soft_weights_downhill(generator: torch.Generator) -> None:
    """With an optimizer as the training loop uses it: the weights' loss falls, then every element decides."""
    weights, grids = weights_and_grids(PER_CHANNEL[1], generator)
    rounding = Rounding(weights, grids)
    rounding.soften()
    targets = [soft.detach() + 0.3 * torch.randn(soft.shape, generator=generator) for soft in rounding.weights]
    optimizer = torch.optim.Adam([rounding.variable], lr=0.05)
    losses = []
    for step in range(200):
        rounding.soften()
        loss = sum(
            nn.functional.mse_loss(w, t, reduction="sum") for w, t in zip(rounding.weights, targets, strict=True)
        )
        loss.backward()  # type: ignore[union-attr]
        rounding.backward(0.0 if step < 50 else 3.0, torch.tensor(2.0))
        optimizer.step()
        losses.append(float(loss.detach()))  # type: ignore[union-attr]
    assert losses[49] < 0.9 * losses[0]
    rounding.soften()
    assert rounding.undecided() < 0.02


def test_undecided_is_the_share_of_free_elements_between_the_codes() -> None:
    grid = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32), PER_CHANNEL[0])  # codes -2 to 1
    rounding = Rounding([torch.tensor([[-1.5, -0.5, 0.5, 0.25, 7.0, -9.0]])], [grid])
    assert rounding.free.tolist() == [True] * 4 + [False] * 2
    rounding.soften()
    assert rounding.undecided() == 1.0
    for value, share in ((9.0, 0.75), (-9.0, 0.75), (2.3, 1.0)):
        with torch.no_grad():
            rounding.variable[0] = value
        rounding.soften()
        assert rounding.undecided() == share
    with torch.no_grad():
        rounding.variable.fill_(9.0)
    rounding.soften()
    assert rounding.undecided() == 0.0


def test_nothing_free_is_nothing_undecided() -> None:
    grid = QParams(torch.ones(1), torch.zeros(1, dtype=torch.int32), PER_CHANNEL[0])
    rounding = Rounding([torch.tensor([[7.0, -9.0]])], [grid])
    rounding.soften()
    assert rounding.undecided() == 0.0
    assert rounding.codes()[0].codes.tolist() == [[1, -2]]
