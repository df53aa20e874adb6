"""Every step of an export is done once, and the work grows with the layers: counted in calls, not in seconds."""

from __future__ import annotations

import cProfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxsim
import pytest
import torch
from torch import fx, nn
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from exporter import export
from exporter.emission import build_model

OURS = tuple(f"/{package}/" for package in ("calibrators", "exporter", "runtime_tests"))
ROOT = str(Path(__file__).parents[2])
DEPTHS = (2, 4, 8)
STEEPER, SLACK = 1.25, 12
"""Factor and further calls by which those from 4 to 8 layers may exceed twice those from 2 to 4; n * n exceeds both."""


def export_chain(depth: int, out: Path) -> None:
    torch.manual_seed(0)
    modules = [each for _ in range(depth) for each in (nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())]
    model, x = nn.Sequential(*modules).eval(), torch.randn(4, 4, 6, 6)
    export(model, [x], out=out, method="minmax", placement="integer", latency_runs=0)


def counted(calls: Counter[str], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any, **keywords: Any) -> Any:
        calls[name] += 1
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


def test_nothing_is_traced_translated_or_simplified_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    counted(calls, monkeypatch, torch.export, "export")
    counted(calls, monkeypatch, FakeTensorProp, "propagate_dont_convert_inputs")
    counted(calls, monkeypatch, build_model, "translate")
    counted(calls, monkeypatch, onnxsim, "simplify")
    export_chain(2, tmp_path / "out")
    both = 2  # the float network and the reference program
    assert calls == {"export": 1, "propagate_dont_convert_inputs": both, "translate": both, "simplify": 1}


def test_calls_grow_with_the_layers(tmp_path: Path) -> None:
    """Of our functions, and of nodes that torch interprets: twice the layers, twice the calls."""
    export_chain(1, tmp_path / "warm")  # fills caches
    found = []
    for depth in DEPTHS:
        profile = cProfile.Profile()
        profile.runcall(export_chain, depth, tmp_path / str(depth))
        found.append(Counter({key(entry.code): entry.callcount for entry in profile.getstats()}))
    few, some, many = found
    assert many[key(fx.Interpreter.run_node.__code__)] > DEPTHS[-1]
    steeper = {
        name: (few[name], some[name], many[name])
        for name in many
        if name and many[name] - some[name] > STEEPER * 2 * max(some[name] - few[name], 0) + SLACK
    }
    assert not steeper


def key(code: Any) -> str:
    """Return where a function of ours, or the interpreter of torch, is defined; empty for others."""
    path = getattr(code, "co_filename", "")
    is_ours = path.startswith(ROOT) and any(part in path for part in OURS)
    return f"{path}:{code.co_firstlineno} {code.co_name}" if is_ours or code == fx.Interpreter.run_node.__code__ else ""
