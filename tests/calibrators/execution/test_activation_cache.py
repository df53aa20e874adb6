"""Streamed activations: the same values from RAM, files and codes; what they cost; what a full disk does."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calibrators.execution.activation_cache import Cache, Memory, Recording
from calibrators.grid.spec import QParams, QuantSpec

AMPLE = 1 << 20
"""Bytes that hold every cache of these tests."""

SHAPES = [(5,), (3, 4), (2, 3, 4), (1, 1, 1), (2, 3, 4, 5), ()]

TINY_FILESYSTEM = Path("/dev/shm")  # memory-backed: it refuses at once what it cannot hold, and holds nothing after


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of spilled values in these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(params=[AMPLE, 0], ids=["ram", "spilled"])
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)


def filled(memory: Memory, values: Tensor, qparams: QParams | None = None) -> Cache:
    """A cache of `values`, written in two uneven pieces, the later one first."""
    cache = Cache(memory, len(values), values[:2], qparams)
    cache.write(3, values[3:])
    cache.write(0, values[:3])
    return cache


def mapped_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "activations-" in line]


def test_caches_leave_a_gpu_room_to_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 250)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 150)
    budgets = [Memory(budget, torch.device("cuda")).budget for budget in (1000, 60)]
    assert budgets == [100, 60]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bool], ids=str)
def test_what_was_written_comes_back(memory: Memory, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = (torch.arange(7 * torch.Size(shape).numel()) % 251).reshape(7, *shape).to(dtype)
    cache = filled(memory, values)
    index = torch.tensor([6, 0, 3, 3])
    assert len(cache) == 7
    assert torch.equal(cache.gather(index), values[index]) and cache.gather(index).dtype == dtype
    chunks = list(cache.chunks(3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    assert torch.equal(torch.cat(chunks), values) and chunks[0].dtype == dtype


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "channels-last"])
def test_images_are_kept_channels_last(memory: Memory, contiguous: bool, generator: torch.Generator) -> None:
    values = torch.randn(7, 3, 4, 5, generator=generator)
    given = values if contiguous else values.contiguous(memory_format=torch.channels_last)
    cache = filled(memory, given)
    for found in (cache.gather(torch.arange(7)), next(iter(cache.chunks(7)))):
        assert torch.equal(found, values)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(6,), (4, 3, 2)], ids=str)
@pytest.mark.parametrize(("bits", "zero_point"), [(8, 0), (8, 37), (8, 255), (4, 5), (2, 1)])
def test_values_on_a_grid_are_kept_as_their_codes(
    memory: Memory, shape: tuple[int, ...], bits: int, zero_point: int, generator: torch.Generator
) -> None:
    """Without loss, whatever the scale, in a quarter of the memory."""
    spec = QuantSpec(bits=bits)
    codes = torch.randint(spec.qmax + 1, (400, *shape), generator=generator)
    for scale in torch.rand(20, generator=generator).mul(20).sub(10).exp():  # 5e-5 to 2e4
        values = (codes - zero_point).float() * scale
        cache = filled(memory, values, QParams(scale, torch.tensor(zero_point, dtype=torch.int32), spec))
        found = cache.gather(torch.arange(400))
        assert torch.equal(found, values) and found.dtype == torch.float32
        assert torch.equal(torch.cat(list(cache.chunks(150))), values)
        assert cache.data.dtype == torch.uint8
        assert cache.data.numel() * cache.data.element_size() == values.numel()
        if len(shape) == 3:
            assert found.is_contiguous(memory_format=torch.channels_last)
        cache.free()


def test_reading_codes_or_samples_leaves_the_cache_alone(memory: Memory) -> None:
    values = torch.arange(12.0).reshape(4, 3)
    cache = filled(memory, values)
    cache.gather(torch.arange(4)).zero_()
    assert torch.equal(cache.gather(torch.arange(4)), values)


def test_the_budget_is_what_all_live_caches_take_together() -> None:
    memory = Memory(100)
    first, second = (Cache(memory, 5, torch.zeros(1, 2)) for _ in range(2))  # 40 bytes each
    assert (memory.used, memory.spilled) == (80, 0)
    third = Cache(memory, 5, torch.zeros(1, 2))
    assert (memory.used, memory.spilled) == (80, 40)
    fourth = Cache(memory, 5, torch.zeros(1, 2, dtype=torch.int16))  # exactly the rest
    assert (memory.used, memory.spilled) == (100, 40)
    third.free()  # gives back no RAM, for it took none
    assert (memory.used, memory.spilled) == (100, 40)
    first.free()
    assert memory.used == 60
    first.free()
    assert memory.used == 60 and len(first) == 0
    fifth = Cache(memory, 5, torch.zeros(1, 2))
    assert (memory.used, memory.spilled) == (100, 40)
    for cache in (second, fourth, fifth):
        cache.free()
    assert memory.used == 0


def test_a_cache_of_nothing_takes_nothing() -> None:
    memory = Memory(0)
    cache = Cache(memory, 0, torch.zeros(1, 3, 2, 2))
    assert (len(cache), memory.used, memory.spilled) == (0, 0, 0)
    assert cache.gather(torch.arange(0)).shape == (0, 3, 2, 2)


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="this system does not list its mappings")
def test_a_spilled_file_has_no_name_and_goes_with_its_cache(folder: Path) -> None:
    memory = Memory(0)
    cache = Cache(memory, 1000, torch.zeros(1, 7))
    cache.write(0, torch.ones(1000, 7))
    (made,) = folder.iterdir()
    assert list(made.iterdir()) == []
    assert len(mapped_files()) == 1
    cache.free()
    assert mapped_files() == []
    del cache, memory
    gc.collect()
    assert list(folder.iterdir()) == []


def test_values_outlive_the_folder() -> None:
    """Whoever still holds a cache may drop the memory it came from."""
    memory = Memory(0)
    cache = filled(memory, torch.arange(12.0).reshape(4, 3))
    del memory
    cache.memory = Memory(0)
    gc.collect()
    assert float(cache.gather(torch.arange(4)).sum()) == 66.0


def test_ram_is_left_alone_when_everything_fits(folder: Path) -> None:
    filled(Memory(AMPLE), torch.zeros(4, 3))
    assert list(folder.iterdir()) == []


def test_a_recording_holds_what_comes_sample_by_sample(memory: Memory, generator: torch.Generator) -> None:
    x, table = torch.randint(0, 9, (10, 2, 3, 3), generator=generator) * 0.5, torch.randn(4, 3, generator=generator)
    grid = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), QuantSpec())
    recording = Recording(memory, 10, {"codes", "float"}, {"codes": grid}.get)
    for part in x.split(3):
        values = {"codes": part, "float": part + 0.1, "table": table, "number": torch.tensor(1.0)}
        recording.append(values, len(part))
    assert recording.recorded == 10
    assert recording.caches.keys() == {"codes", "float"}
    assert recording.caches["codes"].data.dtype == torch.uint8
    for name, expected in (("codes", x), ("float", x + 0.1)):
        assert torch.equal(recording.caches[name].gather(torch.arange(10)), expected)


@pytest.mark.skipif(not TINY_FILESYSTEM.is_dir(), reason=f"no {TINY_FILESYSTEM}")
@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve the size of a file")
def test_a_full_disk_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a signal when the first page that does not fit is written; and nothing stays behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(TINY_FILESYSTEM))
    memory = Memory(0)
    with pytest.raises(OSError, match="activations-") as caught:
        memory.allocate(shutil.disk_usage(TINY_FILESYSTEM).total // 1024 + 1, 1024, torch.uint8)
    assert caught.value.errno == errno.ENOSPC and str(caught.value.filename).startswith(str(TINY_FILESYSTEM))
    assert (memory.used, memory.spilled) == (0, 0)
    (left,) = TINY_FILESYSTEM.glob(f"{Path(caught.value.filename).parent.name}*")
    assert list(left.iterdir()) == []
    small = Cache(memory, 2, torch.zeros(1, 3))  # what fits still does
    small.write(0, torch.ones(2, 3))
    assert memory.spilled == 24
    del memory, small, caught  # its traceback holds the memory
    gc.collect()
    assert not left.exists()


def test_a_full_disk_without_reservation(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Where files cannot be given their size, the free space decides."""
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    memory = Memory(0)
    assert torch.equal(filled(memory, torch.ones(4, 3)).gather(torch.tensor([3])), torch.ones(1, 3))
    with pytest.raises(OSError, match="activations-") as caught:
        memory.allocate(shutil.disk_usage(folder).total, 2, torch.uint8)
    assert caught.value.errno == errno.ENOSPC
    assert memory.spilled == 48
    assert [list(made.iterdir()) for made in folder.iterdir()] == [[]]
