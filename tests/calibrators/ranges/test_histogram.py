"""The streaming statistic: exact, and a function of the values alone."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calibrators.ranges.histogram import BINS, Statistic
from tests.support.oracle import bin_counts

ANY_FLOAT = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
ORDINARY = st.floats(min_value=-40.0, max_value=40.0, width=32)
SPLITS = st.integers(min_value=0, max_value=2**32 - 1)


def observed(*batches: Tensor) -> Statistic:
    statistic = Statistic()
    for batch in batches:
        statistic.update(batch)
    return statistic


def shuffled_batches(values: list[float], seed: int) -> list[Tensor]:
    """The values in random order, cut at random places; some batches may be empty."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(values))
    cuts = np.sort(rng.integers(0, len(values) + 1, size=rng.integers(0, 5)))
    return [torch.tensor(part) for part in np.split(np.array(values, dtype=np.float32)[order], cuts)]


def assert_same(one: Statistic, other: Statistic) -> None:
    assert (one.lo, one.hi, one.nonfinite, one.exponent) == (other.lo, other.hi, other.nonfinite, other.exponent)
    assert math.copysign(1.0, one.lo) == math.copysign(1.0, other.lo)
    assert torch.equal(one.counts, other.counts)


@pytest.mark.parametrize("floats", [ANY_FLOAT, ORDINARY], ids=["any-float", "ordinary"])
def test_split_and_order_do_not_matter(floats: st.SearchStrategy[float]) -> None:
    @settings(deadline=None, max_examples=60)
    @given(values=st.lists(floats, min_size=1, max_size=40), seed=SPLITS)
    def check(values: list[float], seed: int) -> None:
        assert_same(observed(*shuffled_batches(values, seed)), observed(torch.tensor(values, dtype=torch.float32)))

    check()


@settings(deadline=None, max_examples=60)
@given(values=st.lists(ANY_FLOAT, min_size=1, max_size=40))
def test_counts_are_those_of_the_oracle(values: list[float]) -> None:
    statistic = observed(torch.tensor(values, dtype=torch.float32))
    finite = np.array(values, dtype=np.float32)[np.isfinite(np.array(values, dtype=np.float32))]
    reach, counts = bin_counts(finite, BINS)
    assert statistic.nonfinite == len(values) - len(finite)
    assert statistic.width == reach / BINS
    assert np.array_equal(statistic.counts.numpy(), counts)


@pytest.mark.parametrize("one_sided", [True, False], ids=["one-sided", "two-sided"])
def test_counts_of_many_values(one_sided: bool, generator: torch.Generator) -> None:
    values = torch.randn(300_001, generator=generator) * 3.7
    values = values.relu() if one_sided else values
    _, counts = bin_counts(values.numpy(), BINS)
    statistic = observed(*torch.split(values, 70_000))
    assert np.array_equal(statistic.counts.numpy(), counts)
    assert int(statistic.counts[BINS]) == int((values == 0).sum())
    assert (statistic.lo, statistic.hi) == (float(values.min()), float(values.max()))


def test_counts_pass_two_to_the_24() -> None:
    identical = torch.tensor([0.3]).expand(2**24 + 3)
    statistic = observed(identical, identical)
    assert statistic.count == 2**25 + 6
    assert int(statistic.counts.max()) == 2**25 + 6


def test_memory_does_not_grow_with_batches(generator: torch.Generator) -> None:
    statistic = Statistic()
    before = statistic.counts.untyped_storage().nbytes()
    held = []
    for _ in range(20):
        batch = torch.randn(1000, generator=generator)
        held.append(weakref.ref(batch))
        statistic.update(batch)
    del batch
    gc.collect()
    assert all(reference() is None for reference in held)
    assert statistic.counts.untyped_storage().nbytes() == before
    assert [name for name, value in vars(statistic).items() if not isinstance(value, int | float)] == ["counts"]


def test_moments_of_the_bins_are_within_half_a_bin(generator: torch.Generator) -> None:
    values = torch.randn(50_000, generator=generator) - 0.4
    statistic, exact = observed(values), values.double()
    centers, counts = statistic.centers(), statistic.counts
    half_bins = statistic.count * statistic.width / 2  # every value is at most half a bin from its centre
    reach = max(-statistic.lo, statistic.hi)
    assert abs(float((centers * counts).sum() - exact.sum())) <= half_bins
    assert abs(float((centers.square() * counts).sum() - exact.square().sum())) <= 2 * reach * half_bins


@pytest.mark.parametrize(
    "relaid",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x.to(torch.float64),
        lambda x: x.flatten(),
    ],
    ids=["channels-last", "permuted", "float64", "flat"],
)
def test_layout_and_dtype_do_not_matter(relaid: Callable[[Tensor], Tensor], generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 5, 7, generator=generator)
    assert_same(observed(relaid(x)), observed(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_read_as_float32(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = torch.randn(100, generator=generator).to(dtype)
    assert_same(observed(x), observed(x.float()))


def test_nothing_seen() -> None:
    statistic = observed(torch.zeros(0, 3), torch.tensor([math.nan, math.inf, -math.inf]))
    assert (statistic.count, statistic.nonfinite) == (0, 3)
    assert statistic.lo > statistic.hi


def test_non_finite_values_leave_the_others_alone() -> None:
    statistic = observed(torch.tensor([[1.0, math.nan], [-math.inf, -2.0]]))
    assert (statistic.lo, statistic.hi, statistic.count, statistic.nonfinite) == (-2.0, 1.0, 2, 2)


def test_batches_of_varying_shapes(generator: torch.Generator) -> None:
    x = torch.randn(60, generator=generator)
    assert_same(observed(x[:12].view(3, 4), x[12], x[13:].view(1, 47)), observed(x))


def test_a_value_on_an_edge_belongs_to_the_inner_bin() -> None:
    statistic = observed(torch.tensor([8.0, 4.0, -4.0, 8.0 / BINS]))  # R = 8
    occupied = (torch.nonzero(statistic.counts).flatten() - BINS).tolist()
    assert occupied == [-BINS // 2, 1, BINS // 2, BINS]


def test_update_leaves_its_input_alone() -> None:
    x = torch.tensor([0.3, -1.7])
    observed(x)
    assert x.tolist() == torch.tensor([0.3, -1.7]).tolist()


def test_a_tiny_value_beside_a_huge_one_is_no_zero() -> None:
    tiny, huge = torch.tensor([2.0**-140, -(2.0**-60)]), torch.tensor([2.0**127])
    statistic = observed(tiny, huge)
    assert_same(statistic, observed(huge, tiny))
    assert int(statistic.counts[BINS]) == 0
    assert (int(statistic.counts[BINS - 1]), int(statistic.counts[BINS + 1])) == (1, 1)
