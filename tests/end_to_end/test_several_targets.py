"""One export for several targets: what is shared, a bundle for each, the table, and what is refused."""

from __future__ import annotations

import json
import shutil
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calibrators.errors import InputError, UnknownNameError
from calibrators.ranges.range_method import RangeMethod
from exporter import export, intake, several
from exporter.cli import app
from exporter.config import make_config
from exporter.handover.bundle import repeatable, verify_manifest
from exporter.progress import Bar, Progress
from exporter.several import TABLE, Cost, export_for, row_of
from tests.support.networks import build

NAMES = ("ort-cpu", "tensorrt", "ort-qnn", "openvino")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, list[str]]:
    """Return the folder, the table, and the steps of capturing, folding and calibrating that were taken."""
    model, x = build("mlp")
    out, steps = tmp_path_factory.mktemp("several") / "out", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((intake, "capture"), (intake, "fold"), (RangeMethod, "fit")):
            step = getattr(owner, name)
            patch.setattr(owner, name, lambda *a, step=step, name=name, **more: steps.append(name) or step(*a, **more))
        config = make_config({"method": "minmax", "latency_runs": 0})
        return out, export_for(NAMES, model, [x], eval_data=[x], out=out, config=config), steps


def test_each_target_gets_a_bundle_and_a_row(exported: tuple[Path, Any, list[str]]) -> None:
    out, costs, _ = exported
    assert [(cost.target, cost.verdict) for cost in costs] == [(name, "pass") for name in NAMES]
    for cost in costs:
        report = json.loads((out / cost.target / "report.json").read_text())
        assert (report["target"], report["size"]["bytes"]) == (cost.target, cost.size_bytes)
    assert costs[0].integer_macs == 1.0 and costs[1].integer_macs is None
    table = json.loads((out / TABLE).read_text())
    assert [each["target"] for each in table] == [*NAMES] and table[1]["proof"] == "not proved on the device"
    assert row_of(costs[0])[:2] == ("ort-cpu", "pass")


@pytest.mark.parametrize("columns", ["80", "120"])
def test_the_table_breaks_no_word_in_80_columns(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = (
        Cost("ort-cpu-vnni", "pass", -0.0012, 49.7, 13_300, 0.9987, 10.1234, "exact on every processor"),
        Cost("openvino", "refused", proof="exact", refused="it needs an opset that the target does not read"),
    )
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("exporter.several.export_for", lambda *_, **__: costs)
    arguments = ["export", "net.py:f", "--data", "d.npz", "--out", "o", "--target", "ort-cpu", "--target", "openvino"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 1
    assert max(map(len, shown.stdout.splitlines())) <= int(columns)
    words = "ort-cpu-vnni pass −0.12 points 49.7 dB 13.3 kB 99.87 % 10.1 ms processor openvino refused accuracy latency"
    assert {*words.split()} <= {*shown.stdout.split()}
    assert shown.stdout.endswith("openvino is refused: it needs an opset that the target does not read\n")


def test_steps_are_taken_once_where_targets_allow_it(exported: tuple[Path, Any, list[str]]) -> None:
    ort_cpu, tensorrt, ort_qnn, openvino = ["capture", "fold", "fit"], ["fit"], ["capture", "fold", "fit"], list[str]()
    assert exported[2] == [*ort_cpu, *tensorrt, *ort_qnn, *openvino]  # ort-qnn has a fixed batch


@pytest.mark.parametrize("name", NAMES[1:])
def test_files_are_those_of_an_export_for_one_target(
    name: str, exported: tuple[Path, Any, list[str]], tmp_path: Path
) -> None:
    model, x = build("mlp")
    alone = tmp_path / "one"
    export(model, [x], eval_data=[x], target=name, method="minmax", latency_runs=0, out=alone)
    files = repeatable(verify_manifest(alone))
    assert "model.onnx" in files and files == repeatable(verify_manifest(exported[0] / name))


def test_what_no_target_takes_is_refused_before_any_work(tmp_path: Path) -> None:
    model, x = build("mlp")
    with pytest.raises(UnknownNameError, match="unknown target 'ort-gpu'"):
        export_for(("ort-cpu", "ort-gpu"), model, [x], out=tmp_path / "out", config=make_config({}))
    with pytest.raises(InputError, match="target 'ort-qnn' has activations of 8 bits only"):
        settings = make_config({"activation_bits": 4})
        export_for(("ort-cpu", "ort-qnn"), model, [x], out=tmp_path / "out", config=settings)
    for names in ((), ("ort-cpu", "ort-cpu")):
        with pytest.raises(InputError, match="give each of one or more targets once"):
            export_for(names, model, [x], out=tmp_path / "out", config=make_config({}))
    assert not (tmp_path / "out").exists()


def test_a_second_run_replaces_the_first(
    exported: tuple[Path, Any, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = build("mlp")
    settings = make_config({"method": "minmax", "latency_runs": 0})
    stages = list[str]()

    class Recorder(Progress):
        def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Bar]:
            stages.append(name)
            return super().stage(name, total)

    again = partial(export_for, model=model, data=[x], config=settings, overwrite=True, progress=Recorder())
    out = shutil.copytree(exported[0], tmp_path / "out")
    with pytest.raises(InputError, match="also holds openvino, which is no bundle of these targets"):
        again(NAMES[:2], out=out)
    with pytest.raises(InputError, match=r"also holds README\.md"):
        again(NAMES[:2], out=out / "tensorrt")
    real = several.carry_out

    def refused(order: Any, *more: Any, **given: Any) -> Any:
        if order.config.target != "ort-cpu":
            raise InputError("a budget that this target cannot keep")
        return real(order, *more, **given)

    monkeypatch.setattr(several, "carry_out", refused)
    assert [cost.verdict for cost in again(NAMES, out=out)] == ["pass", *["refused"] * 3]
    assert sorted(path.name for path in out.iterdir()) == ["ort-cpu", TABLE], "no stale bundles"
    assert [name for name in stages if name in NAMES] == [*NAMES], "each target is a stage around its own"

    def stopped(order: Any, *more: Any, **given: Any) -> Any:
        if order.config.target != "ort-cpu":
            raise KeyboardInterrupt("2 units are kept")
        return real(order, *more, **given)

    monkeypatch.setattr(several, "carry_out", stopped)
    with pytest.raises(KeyboardInterrupt, match="holds the bundles of ort-cpu alone; for tensorrt 2 units are kept"):
        again(NAMES, out=out)
    with pytest.raises(KeyboardInterrupt, match=r"^2 units are kept"):
        again(NAMES[1:], out=tmp_path / "new")


def test_flags_that_take_one_target() -> None:
    shown = CliRunner().invoke(
        app, ["export", "m.py:f", "--data", "d.npz", "--dry-run", "--target", "ort-cpu", "--target", "ort-arm"]
    )
    assert shown.exit_code == 2 and "take one --target" in shown.stderr


def test_the_table_says_where_nothing_was_proved(exported: tuple[Path, Any, list[str]]) -> None:
    out, costs, _ = exported
    ran = {each["runtime"] for each in json.loads((out / "ort-qnn" / "report.json").read_text())["proved_on"]}
    assert costs[0].proof == "exact on every processor"
    assert costs[2].proof == ("at most one step off in qnn" if "qnn" in ran else "not proved in qnn")
