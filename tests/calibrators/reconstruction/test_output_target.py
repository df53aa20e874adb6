"""The step towards the float output: against least squares, and where there is nothing to learn or only noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from calibrators.errors import DataError
from calibrators.execution.instructions import multiplies_int8
from calibrators.grid.numerics import dequantize
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.reconstruction.moments import Im2col, Moments
from calibrators.reconstruction.output_target import damped_cholesky, toward_float

RIDGE = 1e-9


def moments_of(quantized: Tensor, exact: Tensor) -> Moments:
    """Moments of columns [groups, columns, positions], every other position in the other half."""
    moments = Moments(Im2col(groups=quantized.shape[0]), quantized.shape[1], quantized.device, with_error=True)
    for half in range(2):
        moments.add(half, quantized[:, :, half::2].mT, exact[:, :, half::2].mT)
    moments.finish()
    return moments


def inputs(generator: torch.Generator, groups: int = 1, columns: int = 12, positions: int = 400) -> Tensor:
    mixing = torch.randn(groups, columns, columns, generator=generator)
    return mixing @ torch.randn(groups, columns, positions, generator=generator)


@pytest.mark.parametrize("groups", [1, 3])
def test_equals_least_squares(groups: int, generator: torch.Generator) -> None:
    x = inputs(generator, groups)
    quantized = 0.9 * x + 0.05 * x.roll(1, 1) + 0.1 * torch.randn(x.shape, generator=generator)
    rows = torch.randn(groups, 5, 12, generator=generator)
    target = toward_float(rows, moments_of(quantized, x), RIDGE)
    assert 0.95 < target.strength <= 1
    for group in range(groups):
        wanted = (rows[group].double() @ x[group].double()).numpy()
        best, *_ = np.linalg.lstsq(quantized[group].double().numpy().T, wanted.T, rcond=None)
        expected = rows[group] + target.strength * (torch.from_numpy(best.T).float() - rows[group])
        torch.testing.assert_close(target.rows[group], expected, rtol=1e-3, atol=1e-3)


def test_equal_inputs_leave_the_weights(generator: torch.Generator) -> None:
    x, rows = inputs(generator), torch.randn(1, 5, 12, generator=generator)
    target = toward_float(rows, moments_of(x, x), RIDGE)
    assert (torch.equal(target.rows, rows), target.strength) == (True, 0.0)


def test_noise_is_not_followed(generator: torch.Generator) -> None:
    x = inputs(generator, columns=60, positions=120)
    quantized = x + 3 * torch.randn(x.shape, generator=generator)
    rows = torch.randn(1, 200, 60, generator=generator)
    few = toward_float(rows, moments_of(quantized, x), RIDGE).strength
    many = inputs(generator, columns=60, positions=20000)
    enough = toward_float(rows, moments_of(many + 3 * torch.randn(many.shape, generator=generator), many), RIDGE)
    assert few < 0.5 < 0.9 < enough.strength


def test_an_error_that_the_other_half_does_not_have_is_not_followed(generator: torch.Generator) -> None:
    x = inputs(generator)
    quantized = x.clone()
    quantized[:, :, ::2] *= 0.9
    quantized[:, :, 1::2] *= 1.1
    rows = torch.randn(1, 5, 12, generator=generator)
    assert toward_float(rows, moments_of(quantized, x), RIDGE).strength == 0


def test_one_half_alone_decides_nothing(generator: torch.Generator) -> None:
    x, rows = inputs(generator), torch.randn(1, 5, 12, generator=generator)
    moments = Moments(Im2col(), 12, x.device, with_error=True)
    moments.add(0, 0.9 * x.mT, x.mT)
    moments.finish()
    assert toward_float(rows, moments, RIDGE).strength == 0


@pytest.mark.parametrize("positions", [2, 6])
def test_dead_channels_and_fewer_positions_than_inputs(positions: int, generator: torch.Generator) -> None:
    x = inputs(generator, positions=positions)
    quantized = 0.9 * x
    quantized[:, ::3] = 0
    rows = torch.randn(1, 5, 12, generator=generator)
    target = toward_float(rows, moments_of(quantized, x), 0.01)
    assert target.rows.isfinite().all()
    assert torch.equal(target.rows[:, :, ::3], rows[:, :, ::3])


def test_moments_do_not_depend_on_how_positions_are_cut(generator: torch.Generator) -> None:
    x = inputs(generator, groups=2)
    whole, pieces = (Moments(Im2col(groups=2), 12, x.device, with_error=True) for _ in range(2))
    whole.add(0, 0.9 * x.mT, x.mT)
    for piece in x.split(50, 2):
        pieces.add(0, 0.9 * piece.mT, piece.mT)
    expected = (2 * (0.9 * x.double()) @ (0.9 * x.double()).mT / x.shape[2]).float()
    for found in (whole, pieces):
        found.finish()
        torch.testing.assert_close(found.hessian, expected, rtol=1e-5, atol=1e-5)
        missed = found.missed(torch.eye(12).expand(2, -1, -1), slice(None))
        torch.testing.assert_close(missed, found.hessian / 9, rtol=1e-4, atol=1e-4)


def test_few_rows_get_the_same_step_as_many(generator: torch.Generator) -> None:
    """Errors of the outputs are correlated with the inputs in place of those of the inputs, if they are fewer."""
    x = inputs(generator, groups=2, columns=300, positions=900)
    quantized = 0.9 * x + 0.1 * torch.randn(x.shape, generator=generator)
    weights = torch.randn(2, 7, 300, generator=generator)
    any_rows = moments_of(quantized, x)
    few = Moments(Im2col(groups=2), 300, x.device, with_error=True, weights=weights)
    for half in range(2):
        few.add(half, quantized[:, :, half::2].mT, x[:, :, half::2].mT)
    few.finish()
    torch.testing.assert_close(few.hessian, any_rows.hessian, rtol=1e-4, atol=1e-4)
    assert torch.equal(few.hessian, few.hessian.mT)
    for own in (slice(0, 3), slice(3, 7)):
        rows = weights[:, own]
        found, expected = (toward_float(rows, moments, 0.01, own) for moments in (few, any_rows))
        assert found.strength == pytest.approx(expected.strength, rel=1e-4) and found.strength > 0
        torch.testing.assert_close(found.rows, expected.rows, rtol=1e-3, atol=1e-3)


def test_matrices_that_no_damping_makes_positive() -> None:
    with pytest.raises(DataError, match="not positive"):
        damped_cholesky(torch.full((1, 16, 16), 100.0) - 99 * torch.eye(16), 0.01)


@pytest.mark.parametrize(("bits", "signed", "zero_point"), [(8, False, 3), (8, True, -128), (4, False, 0)])
def test_products_of_codes_are_exact(bits: int, signed: bool, zero_point: int, generator: torch.Generator) -> None:
    spec = QuantSpec(bits=bits, signed=signed)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (5000, 3, 40), generator=generator)  # [positions, taps, channels]
    codes[:, 0] = spec.qmax
    codes[:, 1] = spec.qmin
    grid = QParams(torch.tensor(0.037), torch.tensor(zero_point, dtype=torch.int32), spec)
    x = dequantize(codes.flatten(1)[None], grid)
    moments = Moments(Im2col((3,)), 120, x.device, with_error=False, grid=grid)
    for half in range(2):
        moments.add(half, x[:, half::2])
    moments.finish()
    exact = (codes.double() - zero_point).mT.flatten(1) * float(grid.scale)  # channel by channel, as in weights
    torch.testing.assert_close(moments.hessian[0], (2 * exact.T @ exact / len(codes)).float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("columns", [1, 2, 3, 129])
@pytest.mark.parametrize("positions", [1, 2, 30])
def test_products_of_few_columns_are_exact(columns: int, positions: int, generator: torch.Generator) -> None:
    codes = torch.randint(0, 256, (2 * positions, columns), generator=generator)
    grid = QParams(torch.tensor(0.5), torch.tensor(7, dtype=torch.int32), QuantSpec(bits=8, signed=False))
    x = dequantize(codes[None], grid)
    moments = Moments(Im2col(), columns, x.device, with_error=False, grid=grid)
    for half in range(2):
        moments.add(half, x[:, half::2])
    moments.finish()
    exact = (codes.double() - 7) / 2
    torch.testing.assert_close(moments.hessian[0], (2 * exact.T @ exact / len(codes)).float(), rtol=2e-7, atol=0)


def test_the_device_multiplies_extreme_codes_exactly_if_it_says_so() -> None:
    codes = torch.tensor([-128, 127], dtype=torch.int8).repeat(64)[:, None].expand(128, 32).contiguous()
    if multiplies_int8(codes.device):
        assert torch.equal(torch._int_mm(codes.mT, codes), (codes.long().mT @ codes.long()).int())
