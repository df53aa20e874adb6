"""Folders of images: threads decode them ahead of the consumer, with the order, bytes and errors of one thread."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibrators.errors import SPELLING, DataError
from exporter.inputs import sources
from exporter.inputs.form import DataForm
from exporter.inputs.sources import from_images

COUNT = 11
SIZED = DataForm(batch_size=4, image_size=6, mean=0.5, std=0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for index in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(root / f"{index:02}.png")
    return root


@pytest.mark.parametrize("batch_size", [1, 4, 11, 64])
@pytest.mark.parametrize("image_size", [None, 6])
def test_images_are_those_that_are_read_one_by_one(folder: Path, batch_size: int, image_size: int | None) -> None:
    form = DataForm(batch_size=batch_size, image_size=image_size)
    batches = [np.asarray(batch) for batch in from_images(folder, form)]
    alone = np.stack([sources._image(path, form) for path in sorted(folder.iterdir())])
    assert [len(batch) for batch in batches] == [len(alone[i : i + batch_size]) for i in range(0, COUNT, batch_size)]
    assert np.concatenate(batches).tobytes() == alone.tobytes()


def test_one_batch_is_read_ahead_and_none_for_an_example(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    image, before = sources._image, {*threading.enumerate()}

    def counted(path: Path, *arguments: object, **more: object) -> object:
        read.append(path.name)
        return image(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "_image", counted)
    batches = from_images(folder, DataForm(batch_size=2))
    next(batches)
    time.sleep(0.1)
    assert sorted(read) == ["00.png", "01.png"]
    next(batches)
    deadline = time.monotonic() + 30
    while len(read) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(read) == [f"{index:02}.png" for index in range(6)]
    del batches
    for thread in {*threading.enumerate()} - before:
        thread.join(timeout=30)
    assert not {*threading.enumerate()} - before


def test_the_first_bad_file_is_named_in_the_words_of_the_caller(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        os.link(path, tmp_path / path.name)
    for name in ("05.png", "07.png"):
        (tmp_path / name).unlink()
    (tmp_path / "07.png").write_bytes(b"no image")
    Image.new("RGB", (500, 400)).save(tmp_path / "05.png")
    before = SPELLING.set(lambda name, value: f"--{name}")
    try:
        batches = from_images(tmp_path, DataForm(batch_size=4))
        next(batches)
        with pytest.raises(DataError, match=r"05.png is 500x400, .*04.png is 9x8 pixels; give --image_size to bring"):
            next(batches)
    finally:
        SPELLING.reset(before)


MEASURED = """
import resource, sys
from pathlib import Path
import torch
from torch import nn
from calibrators import calibrate
from calibrators.allocator import keep_freed_memory
from exporter import capture, fold
from exporter.inputs.batches import GraphBatches
from exporter.inputs.form import DataForm
from exporter.inputs.open import open_data

keep_freed_memory()
torch.set_num_threads(1)
data = open_data(Path(sys.argv[1]), DataForm(image_size=32, batch_size=64))
network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.LazyLinear(4))
first = data.example().inputs
network(*first)
graph = fold(capture(network, first))
calibrate(graph, GraphBatches(graph, data), method="minmax")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_a_large_folder_calibrates_in_the_memory_of_a_small_one(tmp_path: Path) -> None:
    """10 times the images take the memory of their names, and none for their pixels: 12 KiB each, 216 MiB in all."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    peaks = []
    for count in (2_000, 20_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for index in range(count):
            os.link(tmp_path / "0.png", folder / f"{index:05}.png")
        done = subprocess.run([sys.executable, "-c", MEASURED, str(folder)], check=True, capture_output=True, text=True)
        peaks.append(float(done.stdout))
    assert peaks[1] - peaks[0] < 24, peaks
