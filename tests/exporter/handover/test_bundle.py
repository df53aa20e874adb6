"""The bundle: whole or nothing, the same bytes for the same input, and every change noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calibrators import temporary
from calibrators.errors import InputError
from exporter.handover import bundle as bundle_module
from exporter.handover.bundle import check_out, read_golden, verify_manifest, write_bundle
from exporter.reporting.html import render_html
from exporter.reporting.schema import read_report, validate_report
from runtime_tests.parity.golden import GoldenOutput
from tests.exporter.reporting.sample_report import sample_report

CONFIG = {"seed": 3, "method": "mse"}
GOLDEN = (
    {"image": np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2), "mask": np.array([True, False])},
    {"logits": np.array([[0.25, -1.5]], dtype=np.float32)},
)
NAMES = {
    "model.onnx", "model.onnx.data", "report.json", "report.html", "junit.xml", "manifest.json",
    "README.md", "bom.json", "parity.intoto.json", "golden/README.md", "golden/test_data_set_0/input_0.pb",
    "golden/test_data_set_0/input_1.pb", "golden/test_data_set_0/output_0.pb",
}  # fmt: skip


def _model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"the graph")
    (folder / "model.onnx.data").write_bytes(b"the weights" * 100)


PAGE = "<!doctype html>" + 500 * "<p>the page</p>"


@pytest.fixture(autouse=True)
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that costs no time: test_html.py tests the real one."""
    monkeypatch.setattr(bundle_module, "render_html", lambda report: PAGE)


def _report() -> dict[str, Any]:
    """Without layers: the first test draws the real page."""
    return sample_report(3) | {"layers": []}


def _write(out: Path, **changes: Any) -> Path:
    arguments = {"files": _model, "report": _report(), "golden": [GOLDEN], "config": CONFIG} | changes
    return write_bundle(out, **arguments | {"report": validate_report(arguments["report"])})


def _tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_bundle_holds_everything_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "render_html", render_html)
    out = _write(tmp_path / "build")
    assert out == tmp_path / "build"
    assert set(_tree(out)) == NAMES
    assert os.listdir(tmp_path) == ["build"]
    assert read_report(out / "report.json").verdict == "pass"
    assert (out / "report.html").read_text(encoding="utf-8") == render_html(validate_report(_report()))


def test_manifest_digests_equal_an_independent_hash(tmp_path: Path) -> None:
    out = _write(tmp_path / "build")
    manifest = json.loads((out / "manifest.json").read_text())
    expected = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in _tree(out).items()
        if name != "manifest.json"
    }
    assert manifest["files"] == expected
    assert manifest["seed"] == 3
    assert manifest["config"] == CONFIG
    assert manifest["config_sha256"] == hashlib.sha256(b'{"method":"mse","seed":3}').hexdigest()
    assert manifest["libraries"]["onnxruntime"] == "1.31.0"
    assert manifest["data"]["calibration"]["sha256"] == "ab" * 32
    assert verify_manifest(out) == manifest


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    assert _tree(_write(tmp_path / "a")) == _tree(_write(tmp_path / "b"))


def test_artifact_digest_ignores_measured_times_and_sees_the_model(tmp_path: Path) -> None:
    report = _report()
    report["time_s"]["calibrate"] += 1.0
    digests = [
        verify_manifest(_write(tmp_path / name, **changes))["artifact_sha256"]
        for name, changes in {
            "a": {},
            "slower": {"report": report},
            "other": {"files": {"model.onnx": b"x"}},
            "golden": {"golden": [(GOLDEN[0], {"logits": GOLDEN[1]["logits"] + 1})]},
        }.items()
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_files_may_be_contents_or_paths(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"weights")
    out = _write(tmp_path / "build", files={"model.onnx": b"graph", "model.onnx.data": tmp_path / "elsewhere"})
    assert (out / "model.onnx").read_bytes() == b"graph"
    assert (out / "model.onnx.data").read_bytes() == b"weights"


def test_golden_is_the_onnx_test_data_layout(tmp_path: Path) -> None:
    out = _write(tmp_path / "build")
    tensor = onnx.load_tensor(out / "golden/test_data_set_0/input_1.pb")
    assert tensor.name == "mask"
    assert numpy_helper.to_array(tensor).dtype == np.bool_
    ((inputs, outputs),) = read_golden(out)
    for arrays, expected in ((inputs, GOLDEN[0]), (outputs, GOLDEN[1])):
        assert list(arrays) == list(expected)
        for name, array in expected.items():
            assert arrays[name].dtype == array.dtype
            np.testing.assert_array_equal(arrays[name], array)


def test_golden_keeps_the_order_of_more_than_ten_inputs(tmp_path: Path) -> None:
    inputs = {f"x{index}": np.float32([index]) for index in range(12)}
    assert list(read_golden(_write(tmp_path / "build", golden=[(inputs, GOLDEN[1])]))[0][0]) == list(inputs)


TEXTS = numpy_helper.from_array(np.array(["a"], object), "y").SerializeToString()


@pytest.mark.parametrize("content", [b"\xff\xff\xff", None, TEXTS], ids=["corrupt", "missing", "texts"])
def test_broken_golden_is_one_message(tmp_path: Path, content: bytes | None) -> None:
    path = _write(tmp_path / "build") / "golden/test_data_set_0/output_0.pb"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(InputError, match=r"golden output|not an ONNX tensor"):
        read_golden(tmp_path / "build")


def test_result_has_the_rights_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    out = _write(tmp_path / "build")
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_missing_parents_are_made_and_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert set(_tree(_write(tmp_path / "a" / "b" / "c"))) == NAMES
    assert set(_tree(_write(tmp_path / "empty"))) == NAMES


def test_an_existing_bundle_is_only_replaced_on_demand(tmp_path: Path) -> None:
    out = _write(tmp_path / "build")
    before = _tree(out)
    with pytest.raises(InputError, match="overwrite=True"):
        _write(out, files={"model.onnx": b"new"})
    assert _tree(out) == before
    _write(out, files={"model.onnx": b"new"}, overwrite=True)
    assert set(_tree(out)) == NAMES - {"model.onnx.data"}
    assert os.listdir(tmp_path) == ["build"]


@pytest.mark.parametrize("kind", ["file", "not-a-bundle", "bundle-and-more", "symlink-inside"])
def test_overwrite_never_removes_what_the_tool_did_not_write(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "home"
    if kind == "file":
        out.write_text("thesis")
    elif kind == "not-a-bundle":
        out.mkdir()
        (out / "thesis.tex").write_text("thesis")
    else:
        _write(out)
        (out / "thesis.tex").symlink_to("/") if kind == "symlink-inside" else (out / "thesis.tex").write_text("thesis")
    before = os.listdir(out) if out.is_dir() else out.read_text()
    for attempt in (lambda: check_out(out, overwrite=True), lambda: _write(out, overwrite=True)):
        with pytest.raises(InputError, match="home"):
            attempt()
    assert (os.listdir(out) if out.is_dir() else out.read_text()) == before


def test_a_link_to_a_folder_keeps_being_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "build").symlink_to(tmp_path / "disk")
    _write(tmp_path / "build")
    assert (tmp_path / "build").is_symlink()
    assert set(_tree(tmp_path / "disk")) == NAMES


def _full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def _half(action: Callable[..., None]) -> Callable[[Path], None]:
    def files(folder: Path) -> None:
        _model(folder)
        action()

    return files


@pytest.fixture(params=["new", "new-parents", "overwrite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, bool]]:
    """A folder to write to, and whether to overwrite; afterwards everything must be as before."""
    out = tmp_path / "a" / "b" / "build" if request.param == "new-parents" else tmp_path / "build"
    if request.param == "overwrite":
        _write(out)
    before = _tree(tmp_path), sorted(p for p in tmp_path.rglob("*"))
    yield out, request.param == "overwrite"
    assert (_tree(tmp_path), sorted(p for p in tmp_path.rglob("*"))) == before


KILLED_AT = ["files", "render_html", "_put_golden", "_manifest", "_swap", "second rename", "after the renames"]


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("moment", KILLED_AT)
def test_the_next_run_puts_in_order_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, overwrite: bool
) -> None:
    out = tmp_path / "build"
    before = _tree(_write(out)) if overwrite else {}
    if (pid := os.fork()) == 0:
        try:
            if moment == "second rename":
                monkeypatch.setattr(Path, "rename", _rename_and_die)
            elif moment == "after the renames":
                monkeypatch.setattr(temporary.shutil, "rmtree", _die)
            elif moment != "files":
                monkeypatch.setattr(bundle_module, moment, _die)
            _write(out, overwrite=overwrite, files=_half(_die) if moment == "files" else {"model.onnx": b"new"})
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir() if path != out], "the kill leaves something"
    finished = moment == "after the renames" or (moment == "second rename" and not overwrite)
    check_out(out, overwrite=overwrite or finished)
    assert [path.name for path in tmp_path.iterdir()] == ["build"] * (overwrite or finished)
    if overwrite and not finished:
        assert _tree(out) == before
        verify_manifest(out)
    if finished:
        assert (out / "model.onnx").read_bytes() == b"new"


def _rename_and_die(self: Path, target: Path) -> None:
    os.rename(self, target)
    _die()


STEPS = ["render_html", "render_junit", "_put_golden", "_manifest", "_swap"]


@pytest.mark.parametrize("step", ["files", *STEPS])
@pytest.mark.parametrize(
    ("action", "error"), [(_full_disk, InputError), (_interrupt, KeyboardInterrupt)], ids=["full-disk", "ctrl-c"]
)
def test_a_stop_half_way_leaves_nothing(
    place: tuple[Path, bool],
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    action: Callable[..., None],
    error: type[BaseException],
) -> None:
    out, overwrite = place
    if step != "files":
        monkeypatch.setattr(bundle_module, step, action)
    with pytest.raises(error) as raised:
        _write(out, overwrite=overwrite, files=_half(action) if step == "files" else _model)
    if error is InputError:
        assert "No space left" in str(raised.value) and str(out) in str(raised.value)


@pytest.mark.parametrize(
    ("action", "error"), [(_full_disk, InputError), (_interrupt, KeyboardInterrupt)], ids=["os-error", "ctrl-c"]
)
def test_a_stop_between_the_two_renames_brings_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[..., None], error: type[BaseException]
) -> None:
    out = _write(tmp_path / "build")
    before = _tree(out)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: action() if self.name == "new" else rename(self, to))
    with pytest.raises(error):
        _write(out, overwrite=True, files={"model.onnx": b"new"})
    assert _tree(out) == before
    assert os.listdir(tmp_path) == ["build"]


def test_a_real_refusal_of_the_operating_system_leaves_nothing(place: tuple[Path, bool]) -> None:
    out, overwrite = place
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # report.html is larger
    try:
        with pytest.raises(InputError, match="cannot write the bundle"):
            _write(out, overwrite=overwrite)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("early", [True, False], ids=["check", "write"])
@pytest.mark.parametrize("parent", ["file", "proc", "read-only"])
def test_an_unwritable_parent_is_one_message(tmp_path: Path, parent: str, early: bool) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "read-only").mkdir(mode=0o555)
    if parent == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    out = Path("/proc/build") if parent == "proc" else tmp_path / parent / "build"
    with pytest.raises(InputError, match=r"cannot write the bundle .*build"):
        check_out(out) if early else _write(out)


@pytest.mark.parametrize("early", [True, False], ids=["check", "write"])
def test_links_in_a_circle_are_one_message(tmp_path: Path, early: bool) -> None:
    (tmp_path / "build").symlink_to("build")
    with pytest.raises(InputError, match=r"cannot write the bundle .*build"):
        check_out(tmp_path / "build") if early else _write(tmp_path / "build")


def test_check_out_leaves_no_trace(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "build")
    assert os.listdir(tmp_path) == []
    _write(tmp_path / "build")
    check_out(tmp_path / "build", overwrite=True)
    with pytest.raises(InputError, match="overwrite=True"):
        check_out(tmp_path / "build")


def test_an_invalid_report_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="verdict"):
        _write(tmp_path / "build", report=sample_report() | {"verdict": "perhaps"})
    with pytest.raises(ValueError, match=r"model\.onnx"):
        _write(tmp_path / "build", files={"graph.onnx": b""})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", sorted(NAMES - {"manifest.json"}))
@pytest.mark.parametrize("change", ["one-bit", "longer", "missing", "link"])
def test_every_changed_file_is_named(tmp_path: Path, name: str, change: str) -> None:
    path = _write(tmp_path / "build") / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if change == "one-bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif change == "longer":
        path.write_bytes(content + b"\n")
    elif change == "link":
        (tmp_path / "same").write_bytes(content)
        path.symlink_to(tmp_path / "same")
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        verify_manifest(tmp_path / "build")


def test_an_extra_file_is_named(tmp_path: Path) -> None:
    out = _write(tmp_path / "build")
    (out / "golden" / "more.pb").write_bytes(b"")
    with pytest.raises(InputError, match=r"golden/more\.pb"):
        verify_manifest(out)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "golden/../../secret", "a/./b", "", ".", "a\\b", "a\0b", "a//b"], ids=repr
)
def test_names_that_lead_out_of_the_bundle_are_refused(tmp_path: Path, name: str) -> None:
    out = _write(tmp_path / "build")
    (tmp_path / "secret").write_bytes(b"x")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="leads out of the bundle"):
        verify_manifest(out)
    with pytest.raises(InputError, match="leads out of the bundle"):
        _write(tmp_path / "other", files={"model.onnx": b"", name: b""})
    assert sorted(os.listdir(tmp_path)) == ["build", "secret"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"a": 1}}',
        '{"files": {}, "format": 3}',
        '{"files": {}, "schema": 0}',
        "\udc80",
    ],
    ids=repr,
)
def test_a_broken_manifest_is_one_message(tmp_path: Path, content: str) -> None:
    out = _write(tmp_path / "build")
    (out / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"manifest"):
        verify_manifest(out)


def test_a_manifest_nested_too_deeply_is_one_message(tmp_path: Path) -> None:
    (_write(tmp_path / "build") / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"cannot read .*recursion"):
        verify_manifest(tmp_path / "build")


def test_a_folder_that_is_no_bundle_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a readable bundle"):
        verify_manifest(tmp_path / "nowhere")


def test_the_folder_of_several_targets_names_its_bundles(tmp_path: Path) -> None:
    for name in ("tensorrt", "ort-cpu"):
        _write(tmp_path / name)
    with pytest.raises(InputError, match=r"holds some; give one of them: .*/ort-cpu, .*/tensorrt\."):
        verify_manifest(tmp_path)


def test_an_output_of_zeros_has_a_tolerance() -> None:
    output = GoldenOutput("y", tolerance=0.1, measured=0.05, largest=0.0)
    assert bundle_module._tolerance(output) == "absolute tolerance 0.1: float operators compute part of it"
