"""Whatever number of processes calibrates, the integers are the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from calibrators import calibrate
from calibrators.errors import DataError, InputError
from calibrators.execution.ranks import ALONE, COUNTS, SHARDS, Ranks, TreeSum, shards_of
from calibrators.graph.digest import digest_of
from calibrators.program.freeze import CalibrationResult
from exporter import capture, fold
from tests.support.networks import build
from tests.support.ranks import together


@pytest.mark.parametrize("count", COUNTS)
def test_sums_of_floats_do_not_depend_on_who_adds_them(count: int, generator: torch.Generator) -> None:
    shards = torch.randn(SHARDS, 1000, generator=generator) * 10.0 ** torch.arange(SHARDS)[:, None]
    expected = ((shards[0] + shards[1]) + (shards[2] + shards[3])) + ((shards[4] + shards[5]) + (shards[6] + shards[7]))

    def work(ranks: Ranks) -> list[float]:
        tree = TreeSum()
        for shard in ranks.shards:
            tree.add(shards[shard].clone())
        found = tree.result()
        assert found is not None
        return ranks.total(found).tolist()

    assert together(count, work) == [expected.tolist()] * count
    assert not torch.equal(shards.sum(0), expected)  # or the order would not matter here


@pytest.mark.parametrize("count", COUNTS)
def test_shards_without_samples_change_no_sum(count: int) -> None:
    shards = {5: torch.tensor([0.1]), 7: torch.tensor([0.2])}

    def work(ranks: Ranks) -> list[float]:
        tree = TreeSum()
        for shard in ranks.shards:
            tree.add(shards[shard].clone() if shard in shards else None)  # which may be overwritten
        found = tree.result()
        return ranks.total(torch.zeros(1) if found is None else found).tolist()

    assert together(count, work) == [(shards[5] + shards[7]).tolist()] * count


def test_every_unit_stands_in_one_shard() -> None:
    for units in (0, 1, 3, 8, 21):
        shards = shards_of(range(units))
        assert len(shards) == SHARDS
        assert [unit for shard in shards for unit in shard] == list(range(units))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("count", [1, 2, 4])
def test_items_are_shared_and_come_back_in_order(count: int) -> None:
    def work(ranks: Ranks) -> tuple[list[int | None], list[int]]:
        done: list[int] = []

        def of(item: int) -> int | None:
            done.append(item)
            return None if item == 3 else item * item

        return list(ranks.spread(of, range(7))), done

    found = together(count, work)
    assert all(results == [0, 1, 4, None, 16, 25, 36] for results, _ in found)
    assert sorted(item for _, done in found for item in done) == list(range(7))


def result(graph: Any, batches: Any, ranks: Ranks, **settings: Any) -> CalibrationResult:
    return calibrate(copy.deepcopy(graph), batches, ranks=ranks, **settings)


def digest(found: CalibrationResult) -> str:
    parts = [
        (name, tensor)
        for stored in (found.weights, found.biases)
        for name, each in stored.items()
        for tensor in (each.codes, each.qparams.scale, each.qparams.zero_point)
    ]
    parts += [(name, each.scale) for name, each in found.activations.items()]
    return str(digest_of("", parts))


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "minmax": ("residual", {"method": "minmax"}),
    "percentile": ("pooled", {"method": "percentile", "bias_correction": True}),
    "gptq": ("residual", {"method": "gptq", "options": {"positions": 200}}),
    "gptq-w4": ("transformer", {"method": "gptq"}),
    "gptq-quantized": ("pooled", {"method": "gptq", "options": {"output_target": "quantized"}}),
}


@pytest.mark.parametrize("name", CASES)
def test_integers_are_the_same_for_any_number_of_processes(name: str) -> None:
    network, settings = CASES[name]
    model, x = build(network, batch=200)
    graph, batches = fold(capture(model, x[:2])), x.split(48)  # four forward passes of 64: some shards are empty

    def work(ranks: Ranks) -> tuple[str, Any]:
        found = result(graph, batches, ranks, **settings)
        return digest(found), found.record.portability

    alone = together(1, work)
    for count in COUNTS[1:]:
        assert together(count, work) == alone * count


def test_data_that_one_process_alone_finds_broken_are_refused() -> None:
    model, x = build("residual", batch=24)
    graph = fold(capture(model, x[:2]))
    x[20] = torch.nan  # in the second process
    with pytest.raises(DataError, match="NaN or infinite"):
        together(2, lambda ranks: digest(result(graph, x.split(8), ranks, method="minmax")))


def test_methods_that_train_are_refused() -> None:
    model, x = build("residual", batch=8)
    graph = fold(capture(model, x[:2]))
    with pytest.raises(InputError, match=r"'brecq' cannot be shared by 2 processes; .*gptq"):
        result(graph, [x], Ranks(0, 2), method="brecq")


def test_one_process_has_all_of_the_work() -> None:
    assert ALONE.shards == range(SHARDS) and ALONE.is_first and ALONE.takes(7)
