"""Parsers of texts and files of strangers: any text and any damage gives a value, or the one error that they name."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from rich.console import Console

from calibrators.errors import DataError, InputError, ModelError
from calibrators.mixed_precision.budgets import Budget
from exporter.config import assignment, make_config
from exporter.frontend.axes import parse_axes
from exporter.frontend.load import read_states
from exporter.frontend.pt2_archive import clean_archive
from exporter.handover.bundle import read_golden, verify_manifest
from exporter.inputs.arrays import open_arrays
from exporter.job import load_job
from exporter.reporting.gates import DEFAULT_GATES, parse
from exporter.reporting.schema import read_report
from exporter.reporting.terminal import verdict_panel
from exporter.verify import judge
from runtime_tests.ort.foreign import check_foreign
from runtime_tests.ort.lint import lint
from runtime_tests.ort.sessions import Model
from tests.exporter.reporting.sample_report import sample_report

quickly = settings(deadline=None, max_examples=30)

HOSTILE_TEXTS = st.sampled_from(["[/red]", "\x1b[2J", "\ud800"])
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([0, -1, 10**400, 2**63, 1e308, float("nan"), float("inf")])
)
SCALARS = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["[/red]", "\x1b[2J", "\ud800"])
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
OPERATORS = st.sampled_from(["<=", ">=", "==", "<", ">", "=", ":", "..", "[", "]", ",", "%", "kB", "1e999", "9" * 5000])
NAMES = st.sampled_from(["accuracy_drop", "size", "latency", "parity.", "weight_bits", "match", "seed", "x", "*", "2"])
TEXTS = st.one_of(st.text(), st.lists(st.one_of(OPERATORS, NAMES, st.text(max_size=4)), max_size=6).map("".join))


@quickly
@given(TEXTS)
def test_any_text_is_a_gate_or_refused(text: str) -> None:
    with suppress(InputError):
        gate = parse(text)
        assert parse(gate.expression) == replace(gate, old_name="")


@quickly
@given(TEXTS)
@pytest.mark.parametrize(
    "parser",
    [
        assignment,
        lambda text: parse_axes([text]),
        Budget.parse,
        lambda text: make_config({"layers": [text]}),
        lambda text: make_config({"min_ort": text, "device": text}),
    ],
    ids=["set", "axes", "budget", "rule", "release"],
)
def test_any_text_of_a_flag_is_a_value_or_refused(parser: Callable[[str], object], text: str) -> None:
    with suppress(InputError):
        parser(text)


@quickly
@given(st.dictionaries(st.one_of(NAMES, st.sampled_from(["options", "layers", "gates", "threads", "mean"])), DOCUMENTS))
def test_any_settings_are_a_configuration_or_refused(values: dict[str, Any]) -> None:
    with suppress(InputError):
        make_config(values)


@quickly
@given(st.one_of(TEXTS, st.binary().map(lambda content: content.decode("latin-1"))))
def test_any_file_is_a_configuration_or_refused(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.toml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with suppress(InputError):
            load_job(path)


# --- documents of a bundle


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every place in a document: its container and key."""
    found, waiting = [], [document]
    while waiting:
        part = waiting.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            found.append((part, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    return found


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_report_is_judged_and_shown_or_refused(data: st.DataObject) -> None:
    report = json.loads(json.dumps(sample_report(2)))
    for _ in range(data.draw(st.integers(1, 3))):
        container, key = data.draw(st.sampled_from(places(report)))
        container[key] = data.draw(DOCUMENTS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "report.json"
        path.write_text(json.dumps(report))
        try:
            found = judge(read_report(path), DEFAULT_GATES, accuracy_gate=True)
        except InputError:
            return
    stream = io.StringIO()
    Console(file=stream, width=100).print(verdict_panel(found, Path("folder")))
    shown = stream.getvalue()
    assert all(c.isprintable() or c == "\n" for c in shown)


@quickly
@given(DOCUMENTS, st.booleans())
def test_any_manifest_is_refused(document: Any, wrapped: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        content = {"schema": 1, "files": document} if wrapped else document
        (Path(folder) / "manifest.json").write_text(json.dumps(content))
        with suppress(InputError):
            verify_manifest(Path(folder))


# --- damaged files


def archive() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.zeros((8, 3), np.float32), y=np.arange(8))
    return stream.getvalue()


def checkpoint() -> bytes:
    stream = io.BytesIO()
    torch.save({"state_dict": {"w": torch.zeros(3), "n": torch.zeros((), dtype=torch.int64)}, "epoch": 3}, stream)
    return stream.getvalue()


def program() -> bytes:
    stream = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), stream)
    return stream.getvalue()


def model() -> bytes:
    value = helper.make_tensor_value_info
    weight = numpy_helper.from_array(np.float32([1, 2]), "w")
    nodes = [helper.make_node("Add", ["x", "w"], ["s"]), helper.make_node("Relu", ["s"], ["y"])]
    graph = helper.make_graph(nodes, "g", [value("x", 1, [1, 2])], [value("y", 1, [1, 2])], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10).SerializeToString()


def _arrays(path: Path) -> None:
    with open_arrays(path) as arrays:
        for rows in arrays.values():
            rows.all()


def _golden(path: Path) -> None:
    folder = path.parent / "golden/test_data_set_0"
    folder.mkdir(parents=True)
    for kind in ("input", "output"):
        (folder / f"{kind}_0.pb").write_bytes(path.read_bytes())
    read_golden(path.parent)


FILES: dict[str, tuple[bytes, str, Callable[[Path], object], type[Exception]]] = {
    "npz": (archive(), "f.npz", _arrays, DataError),
    "checkpoint": (checkpoint(), "f.pt", read_states, ModelError),
    "safetensors": (safetensors.torch.save({"w": torch.zeros(3)}), "f.safetensors", read_states, ModelError),
    "program": (program(), "f.pt2", clean_archive, ModelError),
    "model": (model(), "f.onnx", lambda path: check_foreign(Model(path)), ModelError),
    "linted": (model(), "f.onnx", lambda path: lint(path), InputError),
    "golden": (numpy_helper.from_array(np.zeros(3, np.float32), "x").SerializeToString(), "f.pb", _golden, InputError),
}
"""A good file, its name, what reads it, and what that raises."""


@pytest.mark.parametrize("kind", FILES)
@quickly
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused(kind: str, data: st.DataObject) -> None:
    content, name, read, error = FILES[kind]
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) // 2, len(damaged) - 9]))]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(damaged)
        with suppress(error):
            read(Path(folder) / name)
