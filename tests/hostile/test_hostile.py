"""Files and texts of strangers: one message and an exit code, without a traceback, in little time and memory.

Every input gets 1 GiB above what the process has after its imports, and four times the bytes that it has on disk.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from calibrators.temporary import remove_abandoned
from tests.hostile import bundles, data, models, onnx_files, texts
from tests.hostile.base import CASES, Base, Hostile, bytes_on_disk, make_base
from tests.hostile.forked import Outcome, Server, measured

LEAST, PER_BYTE = 1 << 30, 4
PROCESSOR_S, CLOCK_S = 10.0, 300.0
"""Seconds of the processor that an input may take; seconds by the clock, of a machine that does other things too."""

LONGEST = 4000
"""Characters of a message, paths included."""

assert all((bundles, data, models, onnx_files, texts)), "they fill CASES"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def base(place: Path) -> Base:
    return make_base(place / "base")


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    with Server(place) as running:
        yield running


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """An empty folder. Some inputs nest folders deeper than shutil can remove."""
    made = place / "case"
    made.mkdir()
    yield made
    subprocess.run(["rm", "-rf", str(made)], check=True)


def test_there_are_as_many_as_promised() -> None:
    names = [str(case) for case in CASES]
    assert len(set(names)) == len(names) >= 300


def check(case: Hostile, found: Outcome, memory: int, folder: Path) -> None:
    assert not found.ended, f"it was ended for taking too much {found.ended}"
    assert found.code in case.codes, found.err
    assert found.seconds <= PROCESSOR_S and found.peak <= memory
    assert "Traceback" not in found.out + found.err
    assert found.code in (0, 1) or found.err.strip(), "it says why"
    assert len(found.err) < LONGEST
    assert all(c.isprintable() or c == "\n" for c in found.out + found.err), "names do not reach the terminal"
    assert not (folder / "ran").exists(), "code of the input was executed"


QUICK = frozenset(
    {
        "npz-endless-samples-of-nothing",
        "npz-FIFO",
        "images-PostScript",
        "checkpoint-tuples-as-a-name",
        "checkpoint-refers-to-itself-a-thousand-times",
        "toml-deep-lists",
        "gate-path-of-dots",
        "set-long-number",
        "onnx-functions-that-double",
        "onnx-data-of-the-system",
    }
)
"""Inputs of the default lane: they need no bundle, and run in children of this process."""


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in QUICK], ids=str)
def test_some_hostile_inputs_are_one_message(case: Hostile, place: Path, folder: Path) -> None:
    arguments = case.make(folder, make_base(place / "small", whole=False))
    memory = LEAST + PER_BYTE * bytes_on_disk(folder)
    check(case, Outcome(**measured(arguments, folder, memory=memory, seconds=CLOCK_S)), memory, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_hostile_input_is_one_message(case: Hostile, base: Base, server: Server, folder: Path) -> None:
    arguments = case.make(folder, base)
    memory = LEAST + PER_BYTE * bytes_on_disk(folder)
    check(case, server.run(arguments, folder, memory=memory, seconds=CLOCK_S), memory, folder)


KILLED = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Moments of a kill, as shares of the time that an export takes."""

OF_LIBRARIES = (".ses", "torchinductor_")
"""Entries that onnxruntime and torch make in the folder for temporary files."""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_nothing_for_long(base: Base, folder: Path) -> None:
    arguments = [*base.with_data(base.data), "--overwrite"]
    temporary = folder / "temporary"
    temporary.mkdir()
    with Server(temporary) as server:
        whole = server.run(arguments, folder, memory=1 << 40, seconds=600.0)
        assert whole.code == 0, whole.err
        ended = [server.run(arguments, folder, memory=1 << 40, seconds=share * whole.clock).ended for share in KILLED]
        assert ended.count("time") > len(KILLED) / 2, "most of them are killed, however fast the machine has become"
        assert server.run(arguments, folder, memory=1 << 40, seconds=600.0).code == 0
        assert server.run(["verify", "out", "--quiet"], folder, memory=1 << 40, seconds=600.0).code == 0
        remove_abandoned(temporary)  # the forked children end without their exit functions, as after a kill
        left = [path.name for path in temporary.iterdir() if not path.name.startswith(OF_LIBRARIES)]
    assert left == []
    assert sorted(path.name for path in folder.iterdir()) == ["out", "temporary"]
