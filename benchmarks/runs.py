"""Runs of the accuracy benchmark and their file: JSON, with the scores of every sample in an .npz beside it.

The JSON is also what `docs/generate.py` shows: title, command, columns and rows, filled in when a benchmark ends.

Must not know: how runs are measured, how rows are made.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scores import PerSample

from calibrators.errors import InputError
from calibrators.methods import list_methods
from runtime_tests.ort.saturation import this_cpu

NOTHING = PerSample(None, None)


@dataclass(frozen=True)
class Run:
    """One network calibrated once, or quantized by another tool.

    float_top1, top1: of the float graph and of the emitted file, None without labels.
    agreement, noise: scores against the float graph (see `scores.Scores`); None in files of earlier versions.
    kl:               mean divergence, nats; None where no output has classes.
    seconds:          of calibration, or of the whole other tool; step_ms: per training step.
    file_seconds:     from the folded float network, or its file, to the quantized file; None without other tools.
    peak_mib:         how far memory rose meanwhile; None where the system does not say.
    latency_ratio:    of the file over the float file, one sample, one thread: median of rounds that time both.
    budget:           limit within which layers have bits of their own; mean_bits: of all weights.
    values:           integers compared with the reference, None where they were not; mismatched: how many differ,
                      kernel_mismatched: by the fault of an integer kernel, float_mismatched: of a float operator.
    tool:             name and version of the other tool.
    """

    network: str
    bits: str
    method: str
    wide_taps: bool
    per_tensor_weights: bool
    seed: int
    float_top1: float | None = None
    top1: float | None = None
    seconds: float = 0.0
    step_ms: float | None = None
    file_seconds: float | None = None
    peak_mib: float | None = None
    latency_ratio: float | None = None
    values: int | None = None
    mismatched: int | None = None
    kernel_mismatched: int | None = None
    float_mismatched: int | None = None
    prepare: str = ""
    budget: str = ""
    file_bytes: int | None = None
    mean_bits: float | None = None
    agreement: float | None = None
    noise: float | None = None
    kl: float | None = None
    tool: str = ""

    @property
    def setting(self) -> tuple[Any, ...]:
        """Everything but the method and the seed."""
        return (self.network, self.bits, self.wide_taps, self.per_tensor_weights, self.prepare, self.budget)

    @property
    def key(self) -> tuple[Any, ...]:
        return (*self.setting, self.method, self.seed)


@dataclass
class Results:
    """Finished runs, in the file as soon as they are here.

    inputs:     what all runs of the file have in common.
    per_sample: scores of every sample, by the key of the run; files of earlier versions have none.
    shown:      title, notes, columns and rows of the file.
    """

    path: Path | None
    inputs: dict[str, str]
    command: str = ""
    runs: dict[tuple[Any, ...], Run] = field(default_factory=dict)
    per_sample: dict[tuple[Any, ...], PerSample] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, inputs: dict[str, str], *, resume: bool, command: str = "") -> Results:
        """Return an empty collection, or what `path` holds.

        raises: InputError when a file would be lost, is none of these, or was measured on other data.
        """
        if resume and path is None:
            raise InputError("--resume goes on with a file; name it with --json.")
        if path is not None and not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} does not exist; make it, or write {path.name} elsewhere.")
        if path is None or not path.exists():
            return cls(path, inputs, command)
        if not resume:
            raise InputError(f"{path} exists; give --resume to go on with it, or another file.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, runs = content["inputs"], [Run(**run) for run in content["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no results of this benchmark ({error}); name another file.") from error
        if found != inputs:
            raise InputError(f"{path} was measured with {found}, asked for is {inputs}; name another file.")
        shown = {key: content[key] for key in ("title", "notes", "columns", "rows") if key in content}
        return cls(path, inputs, command, {run.key: run for run in runs}, _read(_beside(path), runs), shown)

    def add(self, run: Run, per_sample: PerSample) -> None:
        """Keep a run, on disk too."""
        self.runs[run.key], self.per_sample[run.key] = run, per_sample
        if self.path is not None:
            _write(_beside(self.path), [self.per_sample.get(key, NOTHING) for key in self.runs])
            self._save(self.path)

    def show(self, columns: Sequence[dict[str, str]], rows: Sequence[Sequence[Any]]) -> None:
        """Keep the table of all runs, on disk too."""
        self.shown |= {"columns": list(columns), "rows": list(rows)}
        if self.path is not None and self.runs:
            self._save(self.path)

    def _save(self, path: Path) -> None:
        content = {
            "title": self.shown.get("title", f"Accuracy: {path.stem}"),
            "command": self.command,
            "measured": provenance(
                int(self.inputs.get("threads", 1)), [run.tool for run in self.runs.values() if run.tool]
            ),
            "methods": self._methods(),
            "notes": self.shown.get("notes", []),
            "inputs": self.inputs,
            "columns": self.shown.get("columns", []),
            "rows": self.shown.get("rows", []),
            "runs": [asdict(run) for run in self.runs.values()],
        }
        write_table(path, content)

    def _methods(self) -> list[str]:
        """Return the methods of this project that have runs."""
        used = {run.method.partition("(")[0] for run in self.runs.values()}
        return [info.name for info in list_methods() if info.name in used]


def write_table(path: Path, content: dict[str, Any]) -> None:
    """Write a table in the form of docs/results; the file is complete at any time."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def provenance(threads: int | None = None, tools: Iterable[str] = ()) -> dict[str, Any]:
    """Return when and on what something was measured; tools: name and version of each."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "onnxruntime")}
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "cpu": this_cpu().brand,
        **({} if threads is None else {"threads": threads}),
        "versions": versions | dict(tool.split() for tool in tools),
    }


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}.samples.npz")


def _read(path: Path, runs: Sequence[Run]) -> dict[tuple[Any, ...], PerSample]:
    """Return the scores of every sample of the runs that `path` holds any of."""
    if not path.exists():
        print(f"{path} is missing: no figures that compare the samples of the finished runs", file=sys.stderr)
        return {}
    try:
        with np.load(path) as stored:
            return {
                run.key: PerSample(*(stored.get(f"{index}.{name}") for name in ("kl", "gain")))
                for index, run in enumerate(runs)
            }
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); remove it, or name another file.") from error


def _write(path: Path, scores: Iterable[PerSample]) -> None:
    arrays: dict[str, Any] = {
        f"{index}.{name}": values
        for index, each in enumerate(scores)
        for name, values in (("kl", each.kl), ("gain", each.gain))
        if values is not None
    }
    aside = path.with_name(f"{path.stem}.tmp.npz")  # numpy appends .npz to other names
    np.savez_compressed(aside, **arrays)
    os.replace(aside, path)
