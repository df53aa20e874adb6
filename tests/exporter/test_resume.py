"""Exports that are interrupted while they train, and continue with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from calibrators.errors import InputError
from calibrators.execution import task
from calibrators.execution.task import silent
from exporter import resume
from exporter.config import make_config
from exporter.intake import Steps, open_order, take_in
from exporter.pipeline import export
from exporter.progress import Progress
from exporter.resume import Store
from exporter.run_calibrators import calibrated
from tests.support.networks import build

SETTINGS: dict[str, Any] = {
    "method": "qdrop", "options": {"iters": 15, "batch": 8}, "weight_bits": 4, "activation_bits": 4,
    "latency_runs": 0, "parity_samples": 8, "simplify": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTACT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(out: Path, **changes: Any) -> Any:
    model, _ = build("residual")
    data = [build("residual", seed=seed)[1] for seed in range(2)]
    return export(model, data, out=out, **SETTINGS | changes)


def interrupted(after: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Make training stop as by Ctrl-C after some units; return a function that undoes this."""
    save, left = Store.save, [after]

    def stopping(self: Store, *given: Any) -> None:
        save(self, *given)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "save", stopping)
    return lambda: monkeypatch.setattr(Store, "save", save)


def test_an_interrupted_export_continues_with_the_same_bytes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    assert not cache.exists()
    undo = interrupted(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="continue after 2 finished units"):
        run(tmp_path / "part", resume=True)
    undo()
    assert not (tmp_path / "part").exists()
    (folder,) = (cache / "unfinished").iterdir()
    (folder / "x.partial").write_bytes(b"what a killed run leaves")
    other = run(tmp_path / "other", resume=True, seed=1)
    assert not any("taken over" in text for text in other["warnings"]), "another seed is another export"
    report = run(tmp_path / "part", resume=True)
    assert "2 units of an interrupted export were taken over" in report["warnings"]
    assert (tmp_path / "part/model.onnx").read_bytes() == (tmp_path / "whole/model.onnx").read_bytes()
    assert not any((cache / "unfinished").iterdir()), "nothing is kept of a finished export"


def test_damaged_units_are_trained_again_and_old_exports_make_room(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Store(cache, "a" * 64, "use another")
    kept.save("unit", {"x": torch.arange(3)}, {"name": "unit"})
    found = kept.load("unit")
    assert found is not None and torch.equal(found[0]["x"], torch.arange(3)) and found[1] == {"name": "unit"}
    shutil.rmtree(kept.folder)
    kept.save("unit", {"x": torch.arange(3)}, {})  # another export removed the folder: training goes on
    kept.folder.mkdir()
    (kept.folder / "unit.safetensors").write_bytes(b"\x08")
    assert kept.load("unit") is None and kept.load("absent") is None
    kept.save("unit", {"x": torch.arange(3)}, {"name": "unit"})
    whole = (kept.folder / "unit.safetensors").read_bytes()
    (kept.folder / "unit.safetensors").write_bytes(whole[:-1] + b"\x01")
    assert kept.load("unit") is None, "a flipped bit would give other numbers"
    other = {"record": "{}", "sha256": ""}
    safetensors.torch.save_file({"y": torch.arange(3)}, kept.folder / "unit.safetensors", metadata=other)
    assert kept.load("unit") is None, "another program's file"
    (cache / "dangling").symlink_to("nowhere")
    os.utime(kept.folder, (0, 0))
    monkeypatch.setattr(resume, "LARGEST", 0)
    assert Store(cache, "b" * 64, "").folder.exists() and not kept.folder.exists()
    with pytest.raises(InputError, match=r"cannot write to /proc/none/c.*; use another"):
        Store(Path("/proc/none"), "c" * 64, "use another")


def test_exports_that_share_a_cache_may_remove_what_others_list(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = [Store(cache, letter * 64, "").folder for letter in "ab"]
    shutil.rmtree(listed[1])
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    assert Store(cache, "a" * 64, "").folder.is_dir()


def test_what_is_kept_lies_beside_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    for inside in (out, out / "deep" / "er"):
        with pytest.raises(InputError, match="is inside the bundle"):
            resume.check_apart(out, make_config({"cache": str(inside)}))
    (tmp_path / "circle").symlink_to("circle")
    resume.check_apart(out, make_config({"cache": str(tmp_path / "circle" / "deep")}))
    monkeypatch.setenv("INTACT_CACHE", str(out / "kept"))
    resume.check_apart(out, make_config({"cache": str(tmp_path)}))
    with pytest.raises(InputError, match=r"INTACT_CACHE .* is inside the bundle"):
        run(out, resume=True)
    assert not out.exists()


def test_statistics_are_shared_by_methods_and_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("residual")
    data = [x, build("residual", seed=1)[1]]

    def run(out: str, cache: str | None, **changes: Any) -> bytes:
        order = open_order(model, data, None, None, None, config=make_config({"cache": cache, **changes}), metric=None,
                           source="")  # fmt: skip
        network = take_in(order, Steps(Progress()))
        result = calibrated(network.folded, network.batches, order.config, silent)
        assert network.batches.samples == sum(map(len, data))
        return safetensors.torch.save(result.program.state_dict())

    run("first", str(tmp_path), method="minmax")
    (folder,) = (tmp_path / "intact-statistics").iterdir()
    assert len([*folder.iterdir()]) == 1
    few = {"method": "mse", "weight_bits": 4, "activation_bits": 4}
    plain = run("plain", None, **few)
    with monkeypatch.context() as patch:
        patch.setattr(task, "observe", lambda *_: pytest.fail("the data were observed again"))
        assert run("cached", str(tmp_path), **few) == plain
    data[1] = data[1] + 0.5
    assert run("other", str(tmp_path), **few) == run("other", None, **few) != plain, "other data"
    assert len([*(tmp_path / "intact-statistics").iterdir()]) == 2


NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()))).eval()

def data():
    return [torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
"""


def test_ten_kills_cost_at_most_a_unit_each(tmp_path: Path) -> None:
    """The process is killed without warning at ten moments of its work."""
    (tmp_path / "net.py").write_text(NETWORK)
    command = [sys.executable, "-m", "exporter", "export", "net.py:build", "--data", "net.py:data", "--quiet"]
    command += ["--method", "qdrop", "--set", "iters=400", "--set", "latency_runs=0"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}

    def start(out: str, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, "--out", out, *more], cwd=tmp_path, env=environment)

    begun = time.monotonic()
    assert start("whole").wait() == 0
    usual = time.monotonic() - begun
    for kill in range(10):
        process = start("out", "--resume")
        time.sleep(usual * (0.3 + 0.06 * kill))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "out").exists():
            break
    else:
        assert start("out", "--resume").wait() == 0
    assert (tmp_path / "out/model.onnx").read_bytes() == (tmp_path / "whole/model.onnx").read_bytes()
