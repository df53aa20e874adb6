"""Repeat an export from its own record, and compare the files.

Must not know: how anything is exported, the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from calibrators.errors import InputError, no_file
from calibrators.temporary import TemporaryFolder
from exporter.comparing.compare import value_changes
from exporter.config import ExportConfig, make_config, without_effect
from exporter.handover.bundle import repeatable, verify_manifest
from exporter.job import Job
from exporter.progress import Progress
from exporter.reporting.provenance import Provenance, packages, sha256_of
from exporter.reporting.schema import Report, read_report

__all__ = ["Rebuilt", "rebuild"]


@dataclass(frozen=True)
class Rebuilt:
    """The outcome of a repetition.

    compared: files whose bytes an export repeats; differing: those of them that differ.
    changed:  packages whose versions are not those of the export: before, now.
    data:     data whose values are not those of the export, by "calibration" and "evaluation": sha256 before, now.
    """

    compared: tuple[str, ...]
    differing: tuple[str, ...]
    changed: dict[str, tuple[str | None, str | None]]
    data: dict[str, tuple[str | None, str | None]]


def rebuild(bundle: Path, out: Path | None = None, progress: Progress | None = None) -> Rebuilt:
    """Export again what a bundle says it was exported from, and compare the files.

    The same model file, checkpoint and data have to be where they were; torch uses as many threads as then.

    out:    where to put the new bundle; if None it is not kept.
    raises: InputError for a bundle that does not say what it was made from, or whose checkpoint is another one now.
    """
    from exporter.pipeline import export

    before = verify_manifest(bundle)
    report = read_report(bundle / "report.json")
    job, origin = _origin(bundle, report)
    threads = torch.get_num_threads()
    with TemporaryFolder() as folder:
        target = out or folder / "again"
        try:
            torch.set_num_threads(origin.threads)
            job = job.model_copy(update={"out": str(target)})
            export(**job.arguments(), config=_settings(report), progress=progress)
        finally:
            torch.set_num_threads(threads)
        files = [repeatable(manifest) for manifest in (before, verify_manifest(target))]
        again = read_report(target / "report.json")
    names = tuple(sorted({*files[0], *files[1]}))
    versions = (dict(each.split("==", 1) for each in listed) for listed in (origin.packages, packages()))
    return Rebuilt(
        compared=names,
        differing=tuple(name for name in names if files[0].get(name) != files[1].get(name)),
        changed=_changes(*versions),
        data=_changes(*(_digests(each) for each in (report, again))),
    )


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Return the values that differ, by name and in its order."""
    changed = sorted(value_changes(before, now), key=lambda each: each.name)
    return {each.name: (each.before, each.after) for each in changed}


def _digests(report: Report) -> dict[str, str]:
    """Return the sha256 of the data of an export."""
    sources = {name: getattr(report.data, name, None) for name in ("calibration", "evaluation")}
    return {name: source.sha256 for name, source in sources.items() if source is not None}


def _origin(bundle: Path, report: Report) -> tuple[Job, Provenance]:
    """Return the job that a bundle was exported by.

    raises: InputError if it does not say, or if the checkpoint is not there or another one now.
    """
    model, data, origin = report.model, report.data, report.provenance
    if model is None or not model.source or data is None or origin is None:
        raise InputError(
            f"{bundle} does not say what it was made from: it was exported from Python objects, or by an earlier "
            "version; repeat the export as it was run."
        )
    checkpoint = origin.checkpoint
    if checkpoint is not None:
        path = Path(checkpoint.path)
        if not path.is_file():
            raise InputError(f"checkpoint {no_file(path)}")
        if sha256_of(path) != checkpoint.sha256:
            raise InputError(f"checkpoint {path} is not the one that {bundle} was exported from: its sha256 differs.")
    job = Job(
        model=model.source,
        data=data.calibration.source,
        eval=data.evaluation.source if data.evaluation else None,
        checkpoint=checkpoint.path if checkpoint else None,
        checkpoint_key=checkpoint.key if checkpoint else None,
    )
    return job, origin


def _settings(report: Report) -> ExportConfig:
    """Return the settings, without what only judges and measures."""
    names = without_effect(report.method) - {"golden"}  # which decides files
    usual = {name: ExportConfig.model_fields[name].default for name in names}
    unjudged = {"accuracy_gate": False} if "accuracy_gate" in names else {}
    return make_config((report.config or {}) | usual | unjudged | {"latency_runs": 0})
