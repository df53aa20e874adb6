"""The origin of an export besides its data: checkpoint, state of the working tree, installed packages.

Must not know: models, bundles.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Checkpoint", "Git", "Provenance", "packages", "provenance", "sha256_of"]

GIT_SECONDS = 10

_FIELD = re.compile(r"^(\w+): (.*?)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights, its digest, and the place of the weights in it if one was given."""

    path: str
    sha256: str
    key: str | None


@dataclass(frozen=True)
class Git:
    """The commit of the working tree in which the export ran; dirty: whether tracked files differ from it."""

    commit: str
    dirty: bool


@dataclass(frozen=True)
class Provenance:
    """The origin of an export.

    threads:  of torch, which decide the order of sums.
    packages: every installed distribution, as a requirements file lists them.
    """

    checkpoint: Checkpoint | None
    git: Git | None
    threads: int
    packages: tuple[str, ...]


def provenance(checkpoint: Path | None, key: str | None) -> Provenance:
    """Return the origin of an export that runs in the current folder."""
    from torch import get_num_threads  # here, so that digests of files cost no torch

    found = None
    if checkpoint is not None:
        found = Checkpoint(str(checkpoint), sha256_of(checkpoint), key)
    return Provenance(found, _git(), get_num_threads(), packages())


def sha256_of(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _git() -> Git | None:
    """Return the state of the working tree, None outside one or without git."""
    commit = _run_git("rev-parse", "HEAD")
    status = _run_git("status", "--porcelain", "--untracked-files=no")
    return None if commit is None or status is None else Git(commit.strip(), bool(status.strip()))


def _run_git(*arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    quiet: Sequence[str] = ("--no-optional-locks", "-c", "core.fsmonitor=false")  # so that it starts nothing
    try:
        done = subprocess.run(
            [program, *quiet, *arguments], capture_output=True, text=True, timeout=GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


def packages() -> tuple[str, ...]:
    """Return name==version of every distribution, by normalized name, each once."""
    found = {
        re.sub(r"[-_.]+", "-", header["Name"]).lower(): header["Version"]
        for each in importlib.metadata.distributions()
        if {"Name", "Version"} <= (header := _header(each)).keys()
    }
    return tuple(f"{name}=={version}" for name, version in sorted(found.items()))


def _header(distribution: importlib.metadata.Distribution) -> dict[str, str]:
    """Return the single-line fields of a distribution's metadata; the parser of `Distribution.metadata` takes 1 ms."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return dict(_FIELD.findall(text.partition("\n\n")[0]))
