"""Prove a bundle again; also the parts that the first proof shares with this.

Must not know: the command line, how pages look, how the model was made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import fx

from calibrators.allocator import keep_freed_memory
from calibrators.errors import InputError
from calibrators.execution.measure import Batch
from calibrators.grid.metrics import alike
from calibrators.targets import get_target
from exporter.frontend.reference import load_reference
from exporter.handover.bundle import read_golden, verify_manifest
from exporter.inputs.batches import cut, feed
from exporter.progress import Progress, default_progress
from exporter.reporting.cautions import cautions
from exporter.reporting.gates import (
    DEFAULT_GATES,
    Gate,
    accuracy_gates,
    evaluate,
    judges_accuracy,
    parse,
    renamed,
    verdict,
)
from exporter.reporting.outcome import Outcome
from exporter.reporting.schema import Report, dump, read_report
from exporter.reporting.sections import environment, machine_of
from exporter.reporting.standing import standing
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.foreign import check_foreign
from runtime_tests.ort.lint import lint
from runtime_tests.ort.saturation import saturation
from runtime_tests.ort.sessions import Model, run, session
from runtime_tests.parity.golden import within
from runtime_tests.parity.results import FLOAT_OUTPUT_ERROR
from runtime_tests.proof import Proof
from runtime_tests.reference.where_exact import holds_on, with_proofs
from runtime_tests.runtimes import available_runtimes, get_runtime

__all__ = ["REFERENCE", "gates_of", "judge", "machine_parts", "verify"]

REFERENCE = "golden/reference.pt2"
"""The reference program inside a bundle: what `verify` compares the runtime with."""

UNKNOWN_PROCESSOR = (
    "this machine's processor is of no known family, so that the compared samples alone say whether the file is exact "
    "here"
)


def verify(folder: str | Path, progress: Progress | None = None, on: Sequence[str] = ()) -> Outcome:
    """Prove a bundle again on this machine; return its report with this machine's parity, coverage and gates.

    Files are checked against the manifest, then the runtime against the reference program on the golden inputs, every
    quantized value. Accuracy and latency are the exporter's claims (`exported_on`); nothing is written.

    on:     runtimes in which the bundle is proved besides this process's onnxruntime (and OpenVINO, if the export was).
    raises: InputError for a missing, damaged or changed file, or for a runtime that is not available.
    """
    keep_freed_memory()
    folder, progress = Path(folder), progress or default_progress()
    available_runtimes(on)
    with progress.stage("manifest"):
        verify_manifest(folder)
    report = read_report(folder / "report.json")
    config = report.config or {}
    lowered = get_target(report.target).lowered_file
    runtimes = available_runtimes([*on, *(["openvino"] if report.parity.openvino is not None else [])])
    model = Model(folder / "model.onnx")
    check_foreign(model)
    program = load_reference(folder / REFERENCE)
    golden = _golden(folder, model, program)
    batches = [tuple(torch.from_numpy(np.array(array)) for array in inputs.values()) for inputs, _ in golden]
    with progress.stage("compare"):
        deployed = session(model)
        found = [run(deployed, list(expected), inputs) for inputs, expected in golden]
        del deployed  # its memory goes before that of the comparisons comes
        threads = torch.get_num_threads()
        proof = Proof(model, program, runtimes=runtimes, threads=threads, lowered=folder / lowered if lowered else None)
        proof.add_all(batches)
    pairs = [
        [(torch.from_numpy(np.array(a)), torch.from_numpy(b)) for a, b in zip(expected.values(), each, strict=True)]
        for (_, expected), each in zip(golden, found, strict=True)
    ]
    parity = proof.parity
    optimized = replace(
        parity.optimized,
        outputs_identical=parity.optimized.outputs_identical
        and all(alike(a, b, 0.0) for each in pairs for a, b in each),
        violations=parity.optimized.violations + sum(_beyond_tolerance(report, each) for each in pairs),
    )
    with progress.stage("measure"):
        parts = machine_parts(proof, batches[0], config.get("threads", 1))
    exported_on = machine_of(report.environment)
    report = replace(report, parity=replace(parity, optimized=optimized), proved_on=proof.proved_on, **parts)
    report = replace(report, exported_on=exported_on)
    gates = gates_of(config.get("gates", ()), [runtime.name for runtime in runtimes])
    judged = judge(report, gates, accuracy_gate=config.get("accuracy_gate", False))
    return Outcome(dump(judged), folder, page="export report")


def _beyond_tolerance(report: Report, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Return the number of outputs that are further from the golden ones than the bundle states.

    Bundles of earlier versions state nothing; they are held to the tolerance of a single float operator.
    """
    if report.golden is None:
        return sum(not alike(expected, found, FLOAT_OUTPUT_ERROR) for expected, found in pairs)
    if len(report.golden) != len(pairs):
        raise InputError(
            f"the report states the tolerance of {len(report.golden)} golden outputs, but the bundle has {len(pairs)}; "
            "get a fresh copy of it."
        )
    return sum(not within(golden, *pair) for golden, pair in zip(report.golden, pairs, strict=True))


def _golden(folder: Path, model: Model, program: fx.GraphModule) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the golden inputs and outputs, and give those of the program the names that they have in the file.

    The reference program keeps the order of its outputs, not their names.
    """
    sets, graph = read_golden(folder), model.proto.graph
    free = list(program.meta["free_axes"].get(name, {}) for name in program.meta["input_names"])
    for inputs, expected in sets:
        for kind, arrays, values in (("input", inputs, graph.input), ("output", expected, graph.output)):
            names = [value.name for value in values]
            if [*arrays] != names or len(names) != len(program.meta[f"{kind}_names"]):
                raise InputError(
                    f"the golden {kind}s of {folder} are not those of its model and reference program; get a fresh "
                    "copy of the bundle."
                )
            program.meta[f"{kind}_names"] = names
            for array, value in zip(arrays.values(), values, strict=True):
                if array.dtype != helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type):
                    raise InputError(
                        f"the golden {kind} {value.name!r} of {folder} is {array.dtype}, which its model does not "
                        f"{'take' if kind == 'input' else 'give'}; get a fresh copy of the bundle."
                    )
        for (name, array), example, axes in zip(inputs.items(), program.meta["example"], free, strict=True):
            sizes = zip(array.shape, example.shape, strict=False)
            same = all(a == b for axis, (a, b) in enumerate(sizes) if axis and axis not in axes)
            if array.dtype != example.numpy().dtype or array.ndim != example.ndim or not same:
                raise InputError(
                    f"the golden input {name!r} of {folder} is {array.dtype} {list(array.shape)}, which its model does "
                    "not take; get a fresh copy of it."
                )
    return sets


def machine_parts(proof: Proof, batch: Batch, threads: int) -> dict[str, Any]:
    """Return the parts of the report on how this machine runs a proved file, measured with a sample of `batch`."""
    model, program, found = proof.model, proof.program, saturation(proof.model)
    return {
        "coverage": coverage(model, sample=feed(program, cut(program, batch))),
        "lint": tuple(lint(model, proof.target, load=True)),
        "environment": environment(threads),
        "saturation": found,
        "holds": with_proofs(
            holds_on(proof.kernels, found, proof.target), _outcomes(proof, exact=True), _outcomes(proof, exact=False)
        ),
    }


def _outcomes(proof: Proof, *, exact: bool) -> dict[str, str]:
    """Return by family of processors the runtimes in which the file is proved, or in which it differs.

    Runtimes whose kernels may be a step off say nothing about those of onnxruntime, nor does QDQ taken literally.
    """
    if not proof.kernels.integer:
        return {}
    ran = [each for each in proof.proved_on if each.refused is None and not get_runtime(each.runtime).kernel_rate]
    found = [each for each in ran if exact == each.is_proved]
    return {
        family: ", ".join(
            f"{each.runtime.partition('==')[0]} {each.version}" for each in found if each.processor == family
        )
        for family in {each.processor for each in found}
    }


def gates_of(expressions: Iterable[str], runtimes: Collection[str]) -> list[Gate]:
    """Return the gates of every export, those of further runtimes that were asked for, and the user's."""
    further = ["parity.openvino.violations==0"] if "openvino" in runtimes else []
    if set(runtimes) - {"openvino"}:
        further.append("unproved_runtimes==0")
    return [*DEFAULT_GATES, *map(parse, [*further, *expressions])]


def judge(report: Report, gates: Sequence[Gate], *, accuracy_gate: bool) -> Report:
    """Return the report with gate results and verdict, and warnings on its numbers, its gates and its processor.

    accuracy_gate: whether accuracy has the gates of every export where none of `gates` is on it.
    """
    content = dump(report)
    if accuracy_gate and not any(map(judges_accuracy, gates)):
        gates = [*gates, *accuracy_gates(content)]
    results = evaluate(gates, content)
    is_known = report.environment is None or report.environment.processor is not None
    warnings = dict.fromkeys(
        [*cautions(report), *(report.warnings or ()), *renamed(gates), *([] if is_known else [UNKNOWN_PROCESSOR])]
    )
    return replace(
        report,
        gates=results,
        verdict=verdict(results),
        accuracy_standing=standing(report.accuracy, gated=any(map(judges_accuracy, gates))),
        warnings=tuple(warnings),
    )
