"""Export one network for several targets: model and data are opened once, and each target gets a bundle.

It is captured, folded and calibrated once where targets allow it (calibrators.execution.shared).

What a target cannot have is a row of the table with the reason, and does not keep the others from their bundles.

Must not know: the command line.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from calibrators.allocator import keep_freed_memory
from calibrators.errors import ExportError, InputError, IntactError, argument
from calibrators.targets import get_target
from exporter.checks import check_settings
from exporter.config import ExportConfig
from exporter.handover.bundle import check_out
from exporter.intake import for_targets, open_order
from exporter.pipeline import carry_out
from exporter.progress import Progress, default_progress
from exporter.reporting.metrics import METRICS, value_at
from exporter.reporting.number_format import DASH, decibel, percent, points, significant, size
from exporter.reporting.outcome import Outcome
from exporter.resume import check_apart

__all__ = ["COLUMNS", "TABLE", "Cost", "export_for", "row_of"]

TABLE = "targets.json"
"""File beside the bundles that holds the table."""

COLUMNS = ("target", "verdict", "accuracy\ndrop", "SQNR", "size", "integer\nMACs", "latency", "proof")


@dataclass(frozen=True)
class Cost:
    """The cost of a target; None where it was not measured.

    accuracy_drop: of the metric, with labels; sqnr_db: of the outputs against the float network's, lowest of all.
    size_bytes:    of model.onnx; integer_macs: share of multiply-accumulates that onnxruntime runs on integers.
    latency_ms:    of onnxruntime on this machine, for targets that are run there.
    proof:         what is proved (Target.promise), or the runtime that was not available.
    refused:       why there is no bundle.
    """

    target: str
    verdict: str
    accuracy_drop: float | None = None
    sqnr_db: float | None = None
    size_bytes: int | None = None
    integer_macs: float | None = None
    latency_ms: float | None = None
    proof: str = ""
    refused: str | None = None


def export_for(  # noqa: PLR0913 (the arguments of an export)
    targets: Sequence[str],
    model: nn.Module | ExportedProgram | str,
    data: Iterable[Any] | str,
    *,
    out: str | Path,
    config: ExportConfig,
    eval_data: Iterable[Any] | str | None = None,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    metric: str | Callable[[Any, Any], float] | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> tuple[Cost, ...]:
    """Write a bundle `out/TARGET` for each target and the table of what each costs; return the table.

    config:    its target is replaced; the other arguments are those of exporter.export.
    overwrite: replace the bundles and the table of an earlier run for some of these targets.
    raises:    InputError for what no export takes, before any work; what the first target is refused for if every one
               is; KeyboardInterrupt that says which bundles are finished.
    """
    if not targets or len(set(targets)) < len(targets):
        raise InputError(f"targets {', '.join(targets) or 'are missing'}; give each of one or more targets once.")
    keep_freed_memory()
    out, progress = Path(out), progress or default_progress()
    configs = [config.model_copy(update={"target": name}) for name in targets]
    for each in configs:
        check_settings(each)  # of all targets, before anything is opened
    opened = open_order(
        model, data, eval_data, checkpoint, checkpoint_key, config=configs[0], metric=metric, source=""
    )  # fmt: skip
    orders = for_targets(opened, configs)
    check_apart(out, config)
    _check_folder(out, targets, overwrite=overwrite)
    costs, errors = [], list[IntactError]()
    for order in orders:
        name = order.config.target
        try:
            with progress.stage(name):
                costs.append(_cost(name, carry_out(order, out / name, progress, overwrite=overwrite)))
        except KeyboardInterrupt as interrupt:
            finished = ", ".join(cost.target for cost in costs if cost.refused is None)
            if not finished:
                raise
            kept = f"; for {name} {interrupt}" if str(interrupt) else ""
            raise KeyboardInterrupt(f"{out} holds the bundles of {finished} alone{kept}") from interrupt
        except (ExportError, InputError) as error:
            errors.append(error)
            costs.append(Cost(name, "refused", proof=get_target(name).promise, refused=str(error)))
    if len(errors) == len(orders):
        raise errors[0]
    for cost in costs:
        if cost.refused is not None:  # a bundle of an earlier run is not that of the table
            shutil.rmtree(out / cost.target, ignore_errors=True)
    (out / TABLE).write_text(json.dumps([*map(asdict, costs)], indent=2) + "\n", encoding="utf-8")
    return tuple(costs)


def _check_folder(out: Path, targets: Sequence[str], *, overwrite: bool) -> None:
    """Check that DIR is free, or holds nothing but bundles and the table of an earlier run for these targets.

    raises: InputError.
    """
    if not (overwrite and out.is_dir()):
        check_out(out)
        return
    for name in targets:
        check_out(out / name, overwrite=True)
    if strangers := sorted({path.name for path in out.iterdir()} - {TABLE, *targets}):
        raise InputError(
            f"{out} also holds {strangers[0]}, which is no bundle of these targets; move it away, or choose another "
            f"{argument('out')}."
        )


def _cost(name: str, report: Outcome) -> Cost:
    target, latency = get_target(name), report.get("latency_ms")
    ran = {each["runtime"] for each in report["proved_on"]}
    return Cost(
        name,
        report["verdict"],
        accuracy_drop=METRICS["accuracy_drop"].value(report),
        sqnr_db=value_at(report, "accuracy.sqnr_db"),
        size_bytes=report["size"]["bytes"],
        integer_macs=report["coverage"]["integer_macs"] if target.proof != "qdq" else None,
        latency_ms=latency["quantized"] if latency and target.runtime == "onnxruntime" else None,
        proof=f"not proved in {target.proved_in}" if {target.proved_in} - ran - {""} else target.promise,
    )


def row_of(cost: Cost) -> tuple[str, ...]:
    """Return the cells of COLUMNS; a target that is refused has nothing to prove."""
    return (
        cost.target,
        cost.verdict,
        points(cost.accuracy_drop),
        decibel(cost.sqnr_db),
        size(cost.size_bytes),
        percent(cost.integer_macs),
        DASH if cost.latency_ms is None else f"{significant(cost.latency_ms, 3)} ms",
        DASH if cost.refused else cost.proof,
    )
