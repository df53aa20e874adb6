"""The folder as a registry, the command that lists it, and what is said about a runtime that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibrators.errors import InputError, UnknownNameError
from calibrators.grid.processors import FAMILIES
from exporter.checks import check_settings
from exporter.cli import app
from exporter.config import make_config
from exporter.verify import verify
from runtime_tests.runtimes import available_runtimes, get_runtime, list_runtimes
from runtime_tests.workers.emulation import EmulatedX86

RUNTIMES = list_runtimes()


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTACT_RUNTIMES", str(tmp_path / "runtimes"))
    monkeypatch.setattr("shutil.which", lambda name: None)


def test_every_file_is_a_runtime() -> None:
    folder = Path(__file__).parents[3] / "runtime_tests" / "runtimes"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    names = [runtime.name for runtime in RUNTIMES]
    assert {name.partition("==")[0] for name in names} == files
    assert len(set(names)) == len(names)


def test_every_family_of_processors_but_that_with_vnni_has_a_runtime_of_its_own() -> None:
    assert {runtime.processor for runtime in RUNTIMES} - {""} == FAMILIES.keys() - {"x86-vnni"}
    assert all(runtime.family in FAMILIES for runtime in RUNTIMES)


@pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime.name)
def test_every_runtime_is_found_by_its_name(runtime: object) -> None:
    assert get_runtime(runtime.name) == runtime  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("avx", "unknown runtime 'avx'. Did you mean 'avx2'"),
        ("ort==latest", "ort==latest is not a version of onnxruntime"),
        ("ort==1.19", "ort==1.19 is not a version of onnxruntime"),
        ("ort==../../x", "is not a version of onnxruntime"),
        ("arm64==pentium", "unknown ARM processor 'pentium'"),
        ("avx2==1.19.2", "the runtime avx2 has no variants"),
    ],
)
def test_names_that_are_no_runtime(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        get_runtime(name)


@pytest.mark.usefixtures("nothing_installed")
def test_an_absent_runtime_is_named_with_the_reason_before_any_work(tmp_path: Path) -> None:
    for name, reason in (("ort==1.20.1", "ort-1.20.1"), ("web", "node, web"), ("arm64", "qemu, arm64-system")):
        message = (
            f"the runtime {name} is not available: not installed: {reason}.*run `intact runtimes --install {name}`"
        )
        with pytest.raises(InputError, match=message):
            available_runtimes([name])
        with pytest.raises(InputError, match=message):
            check_settings(make_config({"prove_on": [name]}))
        with pytest.raises(InputError, match=message):
            verify(tmp_path, on=[name])
        shown = CliRunner().invoke(app, ["verify", str(tmp_path), "--on", name])
        assert shown.exit_code == InputError.exit_code


def test_a_runtime_is_taken_once() -> None:
    assert [runtime.name for runtime in available_runtimes(["ort", "ort"])] == ["ort"]
    with pytest.raises(UnknownNameError):
        available_runtimes(["nowhere"])


@pytest.mark.usefixtures("nothing_installed")
def test_the_command_lists_what_is_there_and_what_is_not() -> None:
    shown = CliRunner().invoke(app, ["runtimes"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines())) <= 80
    for runtime in RUNTIMES:
        assert runtime.name in shown.stdout
    assert "web is not available: not installed: node, web; run `intact runtimes" in shown.stdout
    assert "ort is not available" not in shown.stdout
    one = CliRunner().invoke(app, ["runtimes", "ort==1.23.2"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert "onnxruntime 1.23.2" in one.stdout and "web" not in one.stdout


@pytest.mark.usefixtures("nothing_installed")
def test_what_cannot_be_installed_is_named_and_the_rest_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime_tests.workers.install.KEYRING", Path("/nowhere.gpg"))
    shown = CliRunner().invoke(app, ["runtimes", "--install", "avx2", "ort"], env={"COLUMNS": "200"})
    assert shown.exit_code == InputError.exit_code
    assert "avx2 cannot be installed here: qemu comes from Debian's packages" in shown.stderr
    assert "installing ort" in shown.stderr


def test_another_architecture_cannot_emulate_x86(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "only Linux on x86-64" in EmulatedX86("avx2", "", processor="x86-avx2").missing()
