"""Programs and libraries in a folder of the project, from the registries that pip, npm and apt are set up to use.

Nothing is installed into the system and no root rights are needed. Versions are pinned, except of Debian's packages,
which a release fixes. A component is put in place whole or not at all, with its recipe in it: the same recipe is not
fetched again, another one replaces it.

Must not know: what the components are for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calibrators.errors import InputError, first_line
from calibrators.temporary import TemporaryFolder

__all__ = ["Component", "DebianPackages", "NpmPackages", "PipPackages", "run_tool", "runtimes_folder"]

FOLDER = "INTACT_RUNTIMES"
"""Environment variable that names the folder of all components."""

RECIPE = ".recipe"
TOOL_S = 900.0
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def runtimes_folder() -> Path:
    """Return the folder of all components: that of INTACT_RUNTIMES, else `.runtimes` of the checkout or of the user."""
    if given := os.environ.get(FOLDER):
        return Path(given).expanduser().resolve()
    above = Path(__file__).resolve().parents[2]
    if (above / "pyproject.toml").is_file():
        return above / ".runtimes"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "intact" / "runtimes"


@dataclass(frozen=True)
class Component(ABC):
    """Something that is installed into a folder of its own; its fields are its recipe."""

    name: str

    @property
    def folder(self) -> Path:
        """Return where it is installed."""
        return runtimes_folder() / self.name

    @property
    def is_installed(self) -> bool:
        """Return whether it is installed by this recipe."""
        recipe = self.folder / RECIPE
        return recipe.is_file() and recipe.read_text(encoding="utf-8") == repr(self)

    def install(self) -> None:
        """Install it unless it is there.

        raises: InputError if a tool is missing or its registry does not have what is asked for.
        """
        if self.is_installed:
            return
        runtimes_folder().mkdir(parents=True, exist_ok=True)
        with TemporaryFolder(runtimes_folder()) as stage:
            new = stage / "new"
            new.mkdir()
            self.fetch(new, stage)
            (new / RECIPE).write_text(repr(self), encoding="utf-8")
            shutil.rmtree(self.folder, ignore_errors=True)
            new.rename(self.folder)

    @abstractmethod
    def fetch(self, into: Path, scratch: Path) -> None:
        """Put everything into the folder `into`."""


@dataclass(frozen=True)
class PipPackages(Component):
    """Wheels, without what they require.

    platforms: tags of another platform than this; python: the version that runs them ("3.11").
    """

    requirements: tuple[str, ...]
    platforms: tuple[str, ...] = ()
    python: str = "{}.{}".format(*sys.version_info)

    def fetch(self, into: Path, scratch: Path) -> None:
        other = [f"--platform={platform}" for platform in self.platforms]
        other += [f"--python-version={self.python}", "--implementation=cp"]
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps")
        run_tool([*pip, "--only-binary=:all:", *other, "--target", into, *self.requirements], f"pip: {self.name}")


@dataclass(frozen=True)
class NpmPackages(Component):
    """Packages for node, without their scripts."""

    requirements: tuple[str, ...]
    npm: tuple[str, ...] = field(default=("npm",), repr=False)

    def fetch(self, into: Path, scratch: Path) -> None:
        options = ("install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--prefix")
        run_tool([*self.npm, *options, into, *self.requirements], f"npm: {self.name}")


@dataclass(frozen=True)
class DebianPackages(Component):
    """Packages of a Debian release, unpacked into a folder. Apt keeps its lists there too, apart from the system's.

    with_dependencies: also everything that the packages depend on.
    """

    suite: str
    architecture: str
    packages: tuple[str, ...]
    with_dependencies: bool = False

    def fetch(self, into: Path, scratch: Path) -> None:
        environment = self._own_apt(scratch)
        run_tool(["apt-get", "-qq", "update"], f"apt: {self.suite}", environment)
        archives = scratch / "cache" / "archives"
        command = ["install", "--yes", "--download-only"] if self.with_dependencies else ["download"]
        what = f"apt: {', '.join(self.packages)} of {self.suite}"
        run_tool(["apt-get", "-qq", *command, *self.packages], what, environment, cwd=archives)
        for archive in sorted(archives.glob("*.deb")):
            run_tool(["dpkg-deb", "-x", archive, into], f"dpkg-deb: {archive.name}")

    def _own_apt(self, scratch: Path) -> dict[str, str]:
        """Write the configuration of an apt of its own; return the environment that selects it."""
        if not KEYRING.is_file():
            raise InputError(f"{self.name} comes from Debian's packages, and this system has no {KEYRING}.")
        for part in ("lists/partial", "cache/archives/partial"):
            (scratch / part).mkdir(parents=True)
        (scratch / "status").touch()
        (scratch / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_archive(scratch)} {self.suite} main\n")
        settings = {
            "APT::Architecture": self.architecture,
            "APT::Architectures": self.architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::State": scratch,
            "Dir::State::Lists": scratch / "lists",
            "Dir::State::status": scratch / "status",
            "Dir::Cache": scratch / "cache",
            "Dir::Etc::sourcelist": scratch / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
        }
        config = scratch / "apt.conf"
        config.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
        return {"APT_CONFIG": str(config)}


def _archive(scratch: Path) -> str:
    """Return the address of the Debian archive that this system uses, whether it has fetched lists or not."""
    lists = f"Dir::State::Lists={scratch / 'lists'}"  # the system's own are locked by root
    found: list[str] = re.findall(
        r"'(\S+)/dists/\S+'", run_tool(["apt-get", "-o", lists, "--print-uris", "update"], "apt")
    )
    archives = [address for address in found if not address.endswith("-security")]
    if not archives:
        raise InputError("apt has no Debian archive here; add one to /etc/apt/sources.list.d.")
    return archives[0]


def run_tool(
    command: Sequence[str | Path], what: str, variables: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Run a tool without a shell and return what it printed.

    raises: InputError if there is no such tool, if it fails or takes longer than TOOL_S.
    """
    try:
        done = subprocess.run(
            [str(part) for part in command], env={**os.environ, **(variables or {})}, cwd=cwd, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", timeout=TOOL_S, check=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise InputError(f"{what}: {command[0]} is not installed here.") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{what}: {command[0]} took longer than {TOOL_S:g} s.") from error
    except subprocess.CalledProcessError as error:
        found = [
            line
            for line in error.stderr.splitlines()
            if line.lower().startswith(("e:", "error", "npm err", "npm error"))
        ]
        reason = "; ".join(found[:2]) or first_line(Exception(error.stderr))
        raise InputError(f"{what}: {reason[:300]}") from error
    return done.stdout
