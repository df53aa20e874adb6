"""Temporary folders: gone with their owner, and, after a kill, with the next run; nobody else's is touched."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from calibrators.temporary import TemporaryFolder, remove_abandoned


def killed(work: Callable[[], object]) -> None:
    """Do the work in a process that is killed at its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL


def test_a_folder_goes_with_its_owner(tmp_path: Path) -> None:
    with TemporaryFolder(tmp_path) as folder:
        (folder / "file").touch()
    other = TemporaryFolder(tmp_path)
    del other
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    kept: list[TemporaryFolder] = []

    def work() -> None:
        kept.append(TemporaryFolder(tmp_path))
        (kept[0].path / "file").touch()

    killed(work)
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    with TemporaryFolder(tmp_path) as folder:
        assert list(tmp_path.iterdir()) == [folder]


def test_a_living_run_keeps_its_folder(tmp_path: Path) -> None:
    with TemporaryFolder(tmp_path) as folder:
        (folder / "file").touch()
        killed(lambda: remove_abandoned(tmp_path))
        with TemporaryFolder(tmp_path):
            assert (folder / "file").exists()


@pytest.mark.parametrize(
    "name", [".intact-abc", "intact-abcdefgh.tmp", ".intact-abcdefgh.tmp.old", ".intact-a cdefgh.tmp"]
)
def test_folders_of_other_names_stay(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    remove_abandoned(tmp_path)
    assert (tmp_path / name).is_dir()


def test_links_and_files_stay(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/file").touch()
    (tmp_path / ".intact-abcdefgh.tmp").symlink_to("home")
    (tmp_path / ".intact-01234567.tmp").touch()
    remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"home", ".intact-abcdefgh.tmp", ".intact-01234567.tmp"}
    assert (tmp_path / "home/file").exists()
