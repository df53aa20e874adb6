"""Components: put in place whole or not at all, once per recipe, with the reason where a registry has none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from calibrators.errors import InputError
from runtime_tests.workers import install
from runtime_tests.workers.install import Component, DebianPackages, NpmPackages, PipPackages, run_tool, runtimes_folder


@dataclass(frozen=True)
class Files(Component):
    """A component of one file; a negative size cannot be had."""

    size: int = 1

    def fetch(self, into: Path, scratch: Path) -> None:
        (into / "file").write_bytes(b"x" * max(self.size, 0))
        if self.size < 0:
            raise InputError("the registry has no such size")


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("INTACT_RUNTIMES", str(tmp_path / "runtimes"))
    return tmp_path / "runtimes"


def test_a_component_is_fetched_once_per_recipe(folder: Path) -> None:
    one = Files("files", size=1)
    assert not one.is_installed
    one.install()
    assert one.is_installed
    (one.folder / "mark").touch()
    one.install()
    assert (one.folder / "mark").exists()
    two = Files("files", size=2)
    assert not two.is_installed
    two.install()
    assert two.is_installed and not one.is_installed
    assert sorted(path.name for path in two.folder.iterdir()) == [".recipe", "file"]
    assert [path.name for path in folder.iterdir()] == ["files"]


def test_a_component_that_cannot_be_had_leaves_what_was_there(folder: Path) -> None:
    one = Files("files")
    one.install()
    with pytest.raises(InputError, match="no such size"):
        Files("files", size=-1).install()
    assert one.is_installed and [path.name for path in folder.iterdir()] == ["files"]


def test_the_folder(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    assert runtimes_folder() == folder
    monkeypatch.delenv("INTACT_RUNTIMES")
    checkout = Path(install.__file__).resolve().parents[2]
    assert runtimes_folder() == checkout / ".runtimes"
    monkeypatch.setattr(
        install, "__file__", str(tmp_path / "site-packages" / "runtime_tests" / "workers" / "install.py")
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert runtimes_folder() == tmp_path / "cache" / "intact" / "runtimes"


def test_a_tool_that_fails_says_why() -> None:
    code = "import sys; print('warning: none', file=sys.stderr); sys.exit('ERROR: no such version')"
    with pytest.raises(InputError, match="pip: thing: ERROR: no such version"):
        run_tool([sys.executable, "-c", code], "pip: thing")


def test_a_tool_that_is_missing_or_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="npm: web: no-such-tool is not installed"):
        run_tool(["no-such-tool"], "npm: web")
    monkeypatch.setattr(install, "TOOL_S", 0.1)
    with pytest.raises(InputError, match=r"took longer than 0\.1 s"):
        run_tool([sys.executable, "-c", "import time; time.sleep(60)"], "slow")


def test_pip_installs_a_wheel_of_another_platform_and_names_one_that_is_missing(tmp_path: Path) -> None:
    """From a folder of wheels, without a registry."""
    wheel = tmp_path / "thing-1.0-cp311-cp311-manylinux_2_28_aarch64.whl"
    _write_wheel(wheel)
    options = {"platforms": ("manylinux_2_28_aarch64",), "python": "3.11"}
    found = PipPackages("things", (str(wheel),), **options)  # type: ignore[arg-type]
    found.install()
    assert (found.folder / "thing.py").is_file()
    with pytest.raises(InputError, match=r"pip: more: ERROR: .*aarch64\.whl is not a supported wheel"):
        PipPackages("more", (str(wheel),), platforms=("win_amd64",), python="3.11").install()


def test_where_debian_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "KEYRING", tmp_path / "keyring.gpg")
    with pytest.raises(InputError, match="comes from Debian's packages, and this system has no"):
        DebianPackages("system", "bookworm", "arm64", ("libc6",)).install()


def test_where_npm_is_comes_into_no_recipe() -> None:
    assert repr(NpmPackages("web", ("a==1",), npm=("/usr/bin/npm",))) == repr(NpmPackages("web", ("a==1",)))


def _write_wheel(path: Path) -> None:
    import zipfile

    info = "thing-1.0.dist-info"
    tag = "cp311-cp311-manylinux_2_28_aarch64"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing.py", "")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "thing.py,,\n")
