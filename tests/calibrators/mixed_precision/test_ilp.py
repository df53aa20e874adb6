"""The integer program against all choices there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest

from calibrators.mixed_precision.ilp import Costs, Layer, Losses, allocate, monotone

STORED = {2: 0.25, 4: 0.5, 8: 1.0}


def problem(seed: int, *, activations: bool) -> tuple[Losses, Costs]:
    """Six layers with three options each, two more with given bits; two layers read one activation."""
    rng = random.Random(seed)
    weights = [f"w{i}" for i in range(8)]
    layers = [Layer(f"l{i}", rng.randint(10, 99), f"w{i}", f"a{i // 2}") for i in range(8)]
    sizes = {name: rng.randint(10, 999) for name in weights}
    widths = dict.fromkeys([*weights, "a0", "a1", "a2", "a3"], 8)
    open_scales = [*weights[:4], "a0", "a1"] if activations else weights[:6]
    losses = {}
    for name in open_scales:
        drawn = sorted((rng.random() for _ in range(2)), reverse=True)
        losses[name] = {2: drawn[0], 4: drawn[1], 8: 0.0}
    return losses, Costs(layers, sizes, {}, widths, lambda size, bits, taps: math.ceil(size * STORED[bits]))


def best_of_all(losses: Losses, costs: Costs, limits: Mapping[str, float]) -> float | None:
    found = None
    for bits in itertools.product(*losses.values()):
        widths = dict(zip(losses, bits, strict=True))
        if all(costs.of(quantity, widths) <= limit for quantity, limit in limits.items()):
            loss = sum(losses[name][b] for name, b in widths.items())
            found = loss if found is None else min(found, loss)
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.1, 0.35, 0.7])
@pytest.mark.parametrize("quantities", [("avg_weight_bits",), ("weight_bytes",), ("bops",), ("bops", "weight_bytes")])
def test_it_equals_brute_force(seed: int, share: float, quantities: tuple[str, ...]) -> None:
    losses, costs = problem(seed, activations="bops" in quantities)
    coarse, fine = ({name: end(options) for name, options in losses.items()} for end in (min, max))
    limits = {}
    for quantity in quantities:
        low, high = costs.of(quantity, coarse), costs.of(quantity, fine)
        limits[quantity] = low + share * (high - low)
    widths = allocate(losses, costs, limits)
    assert widths is not None
    assert all(costs.of(quantity, widths) <= limit * (1 + 1e-9) for quantity, limit in limits.items())
    reached = sum(losses[name][bits] for name, bits in widths.items())
    assert reached == pytest.approx(best_of_all(losses, costs, limits), abs=1e-6)


def test_where_nothing_fits_there_is_no_choice() -> None:
    losses, costs = problem(0, activations=False)
    least = costs.of("avg_weight_bits", {name: min(options) for name, options in losses.items()})
    assert allocate(losses, costs, {"avg_weight_bits": least * 0.99}) is None
    assert allocate(losses, costs, {"avg_weight_bits": least}) is not None


def test_among_equal_losses_the_finest_grid_is_taken() -> None:
    _, costs = problem(0, activations=False)
    losses = {name: {2: 1.0, 4: 0.0, 8: 0.0} for name in ("w0", "w1")}
    assert allocate(losses, costs, {"avg_weight_bits": 8.0}) == {"w0": 8, "w1": 8}


def test_the_finest_grid_of_as_many_bytes_is_taken() -> None:
    sizes = {"v": 100, "w": 60}
    losses = {name: {2: 2e-7, 3: 1e-9, 4: 0.5e-9, 5: 0.4e-9, 8: 0.3e-9} for name in sizes} | {"x": {2: 1.0, 8: 0.0}}
    costs = Costs([], sizes | {"x": 10}, {}, {}, lambda size, bits, taps: size * (1 if bits > 4 else 0) + size)
    limits = {"weight_bytes": 180.0 + 60.0}
    assert allocate(losses, costs, limits) == {"v": 4, "w": 8, "x": 8}


def test_the_mean_of_equal_bits_is_these_bits() -> None:
    rng = random.Random(0)
    for count in range(2, 40):
        sizes = {f"w{i}": rng.randint(10, 99_999) for i in range(count)}
        losses = {name: {2: 1.0, 3: 0.0} for name in sizes}
        costs = Costs([], sizes, {}, {}, lambda size, bits, taps: size)
        assert costs.of("avg_weight_bits", dict.fromkeys(sizes, 3)) == 3
        assert allocate(losses, costs, {"avg_weight_bits": 3.0}) == dict.fromkeys(sizes, 3)


def test_costs_follow_their_definitions() -> None:
    costs = Costs(
        [Layer("l", 100, "w", "a"), Layer("m", 10, "v", "a")], {"w": 30, "v": 10}, {"v": (2, 7)},
        {"w": 8, "v": 8, "a": 4}, lambda size, bits, taps: size * bits // 8 + taps,
    )  # fmt: skip
    assert costs.of("avg_weight_bits", {"w": 4}) == (30 * 4 + 10 * 8) / 40
    assert costs.of("weight_bytes", {"w": 4}) == 15 + 10
    assert costs.of("avg_weight_bits", {"v": 4}) == (30 * 8 + 8 * 4 + 2 * 7) / 40
    assert costs.of("avg_weight_bits", {"v": 7}) == (30 * 8 + 10 * 7) / 40
    assert costs.of("weight_bytes", {"v": 4}) == 30 + 5 + 2
    assert costs.of("bops", {"w": 4, "a": 2}) == 100 * 4 * 2 + 10 * 8 * 2


def test_more_bits_never_cost_more_loss() -> None:
    assert monotone({2: 0.5, 3: -0.1, 4: 0.2, 8: 0.0}) == {2: 0.5, 3: 0.2, 4: 0.2, 8: 0.0}
    assert monotone({2: -1.0, 8: 0.0}) == {2: 0.0, 8: 0.0}
