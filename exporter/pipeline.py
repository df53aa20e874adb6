"""The whole way: a model and data become a bundle with its proof, and a bundle can be proved again.

Must not know: the command line, how pages look.
"""

from __future__ import annotations

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import DataError, InputError, ModelError
from calibrators.execution.losses import is_logits
from calibrators.execution.measure import Batch
from calibrators.graph.aten import batch_of
from calibrators.methods import get_method
from calibrators.mixed_precision.budgets import ACCURACY, parse_budgets
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from exporter.checks import check_settings
from exporter.config import ExportConfig, make_config
from exporter.emission.packing import alternatives, pack, stored_bytes
from exporter.emission.translate import emit_float, needed_opset, save, to_onnx
from exporter.folding.fold_regions import fold
from exporter.frontend.capture import SAME, alike, capture
from exporter.frontend.reference import export_program, load_reference, save_reference
from exporter.inputs.data import Batch as DataBatch
from exporter.inputs.data import Data, check_takes_integers, open_both
from exporter.progress import Progress
from exporter.reporting.bundle import check_out, read_golden, verify_manifest, write_bundle
from exporter.reporting.gates import DEFAULT_GATES, Gate, check_measurable, evaluate, parse, verdict
from exporter.reporting.layer_sections import layer_entries
from exporter.reporting.schema import Report, read_report
from exporter.reporting.sections import (
    emission_entry,
    environment,
    fold_entry,
    method_entries,
    model_entry,
    saturation_entry,
    storage_entry,
    version,
)
from runtime_tests.measure.accuracy import Accuracy
from runtime_tests.measure.latency import latency
from runtime_tests.measure.size import size_by_type
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.lint import lint
from runtime_tests.ort.saturation import saturation
from runtime_tests.ort.sessions import session
from runtime_tests.ort.simplify import simplify
from runtime_tests.parity.compare import FLOAT_OUTPUT_ERROR, parity
from runtime_tests.parity.openvino import check_installed, second_parity
from runtime_tests.reference.execute import KernelPlan, plan, run

__all__ = ["export", "verify"]

GOLDEN_SAMPLES = 4
SQNR_SAMPLES = 128
COMPARED_SAMPLES = 4
REFERENCE = "golden/reference.pt2"
"""The reference program inside a bundle: what `verify` compares the runtime with."""


@dataclass
class _Work:
    """What the steps hand on to each other."""

    config: ExportConfig
    progress: Progress
    source: str
    calibration: Data
    evaluation: Data | None
    times: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Count the time inside as that of the step `name`."""
        start = time.perf_counter()
        yield
        self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def step(self, name: str, title: str, total: int | None = None) -> Iterator[Any]:
        """The same with a bar."""
        with self.timed(name), self.progress.stage(title, total) as bar:
            yield bar


def export(
    model: nn.Module | torch.export.ExportedProgram,
    data: Iterable[Any],
    *,
    out: str | Path,
    eval_data: Iterable[Any] | None = None,
    config: ExportConfig | None = None,
    progress: Progress | None = None,
    source: str = "",
    overwrite: bool = False,
    **settings: Any,
) -> Report:
    """Calibrate, emit, prove and write the bundle of `model` to the folder `out`; returns its report.

    data, eval_data: batches of x, (x, labels) or ({name: x}, labels), or an inputs.data.Data. Calibration reads no
                     labels; evaluation uses them where they are.
    config, settings: an ExportConfig, or its fields as keywords (method="mse", weight_bits=4, ...).
    raises:          InputError (bad model, data, setting, folder), ExportError (not for this target). Failed gates do
                     not raise: report["verdict"] says "fail".
    """
    config = config or make_config(settings)
    out = Path(out)
    check_out(out, overwrite=overwrite)
    check_settings(config)
    gates = _gates(config.gates, openvino=config.openvino)
    given, evaluation = open_both(data, eval_data, **config.data_form())
    has_labels = evaluation is not None and evaluation.example().labels is not None
    check_measurable(gates, has_eval=evaluation is not None, has_labels=has_labels)
    calibration = _calibration_data(given, config)
    for opened in (calibration, evaluation):
        if opened is not None:
            opened.example()  # once more: what can be read only once is refused before the work
    work = _Work(config, progress or Progress(), source, calibration, evaluation)
    torch.manual_seed(config.seed)
    with tempfile.TemporaryDirectory(prefix="intact-") as folder:
        bundle = _Export(work, Path(folder)).run(model)
        report = bundle.report
        report["gates"] = evaluate(gates, report)
        report["verdict"] = verdict(report["gates"])
        write_bundle(
            out,
            files=bundle.copy_to,
            report=report,
            golden=bundle.golden,
            config=config.model_dump(mode="json"),
            overwrite=overwrite,
        )
    return report


def _calibration_data(data: Data, config: ExportConfig) -> Data:
    """The calibration data, with labels where the method needs them or a budget can use them."""
    opened = data.take(config.calibration_batches)
    has_labels = opened.example().labels is not None
    if _needs_labels(config) and not has_labels:
        raise DataError(
            f"method {config.method!r} with these options needs labels and {opened.label} has none; yield (x, labels), "
            "or name them 'labels' in the .npz."
        )
    limits_accuracy = ACCURACY in (budget.quantity for budget in parse_budgets(config.budget))
    return opened.with_labels() if has_labels and (limits_accuracy or _needs_labels(config)) else opened


def _needs_labels(config: ExportConfig) -> bool:
    return bool(getattr(get_method(config.method, config.options), "needs_labels", False))


@dataclass
class _Bundle:
    """Everything write_bundle needs."""

    folder: Path
    report: Report
    golden: tuple[dict[str, Any], dict[str, Any]]

    def copy_to(self, target: Path) -> None:
        """Put the model, its external data and the reference program into the bundle."""
        for path in self.folder.glob("model.onnx*"):
            shutil.move(path, target / path.name)
        (target / REFERENCE).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(self.folder / "reference.pt2", target / REFERENCE)


def _check_alike(calibration: DataBatch, evaluation: DataBatch, names: Sequence[str]) -> None:
    """Refuse evaluation data that the model would not take, before any work."""
    for name, x, y in zip(names, calibration.inputs, evaluation.inputs, strict=True):
        if x.dtype != y.dtype or x.shape[1:] != y.shape[1:]:
            texts = [f"{['n', *t.shape[1:]]} {str(t.dtype)[6:]}".replace("'", "") for t in (x, y)]
            raise DataError(f"input {name!r} is {texts[0]} in --data and {texts[1]} in --eval: give both alike.")


def _check_labels(graph: fx.GraphModule, evaluation: DataBatch) -> None:
    """Refuse labels of classes that the model does not have, as far as the first batch shows them."""
    if evaluation.labels is None:
        return
    with torch.no_grad():
        output = graph(*_example(graph))[0]
    highest = int(evaluation.labels.max())
    if is_logits(output) and highest >= output.shape[1]:
        raise DataError(f"labels of --eval hold {highest}, but the model has classes 0..{output.shape[1] - 1}.")


class _Export:
    """One export: the steps in order, each a method."""

    def __init__(self, work: _Work, folder: Path) -> None:
        self.work, self.config, self.folder = work, work.config, folder
        self.model_path, self.float_path = folder / "model.onnx", folder / "float.onnx"
        self.alternatives: dict[str, Path] = {}  # the file with weights stored otherwise
        self.samples = self.evaluated = 0

    def run(self, model: nn.Module | torch.export.ExportedProgram) -> _Bundle:
        graph, folded = self._graph(model)
        result = self._calibrated(folded)
        self._check_forms(graph, result)
        simplifier = self._emitted(folded, result)
        kernels = plan(result.program)
        report = self._proved(graph, result, kernels)
        report["simplifier"] = simplifier
        golden = self._golden(result.program, kernels)
        report["warnings"] = [*dict.fromkeys([*self.work.warnings, *self._data_notes()])]
        return _Bundle(self.folder, report, golden)

    def _graph(self, model: nn.Module | torch.export.ExportedProgram) -> tuple[fx.GraphModule, fx.GraphModule]:
        example = self.work.calibration.example()
        if isinstance(model, nn.Module):
            check_takes_integers(model, example, self.work.calibration.label)
        with self.work.step("capture", "capture"):
            graph = capture(model, example.inputs)
        self.work.warnings += graph.meta["notes"]
        names = graph.meta["input_names"]
        self.work.calibration = self.work.calibration.named(names)
        if self.work.evaluation:
            self.work.evaluation = self.work.evaluation.named(names)
            _check_alike(self.work.calibration.example(), self.work.evaluation.example(), names)
            _check_labels(graph, self.work.evaluation.example())
        with self.work.step("fold", "fold"):
            return graph, fold(graph)

    def _check_forms(self, graph: fx.GraphModule, result: CalibrationResult) -> None:
        """Refuse what no proof against the reference program would find: that it is another network's."""
        if "absorb" in self.config.prepare:  # which changes what stands below the constants
            return
        batch = next(_first(graph, _inputs(graph, self.work.calibration), COMPARED_SAMPLES))
        with torch.no_grad():
            pairs = list(zip(graph(*batch), result.placement.graph(*batch), strict=True))
        for name, (ours, theirs) in zip(graph.meta["output_names"], pairs, strict=True):
            if ours.is_floating_point() and not alike(ours, theirs):
                raise ModelError(
                    f"folding changed output {name!r} of the model by more than {SAME:g} of its largest value, which "
                    "it must not: report this model, please"
                )

    def _calibrated(self, graph: fx.GraphModule) -> CalibrationResult:
        config = self.config
        placement = PlacementOptions(
            weight_bits=config.weight_bits,
            activation_bits=config.activation_bits,
            first_last_bits=config.first_last_bits,
            per_tensor_weights=config.per_tensor_weights,
            weight_only=config.weight_only,
            block_size=config.block_size,
            reduce_range=config.reduce_range,
            wide_taps=config.wide_taps,
            include=config.include,
            exclude=config.exclude,
            layers=config.layers,
        )
        with self.work.timed("calibrate"), _out_of_space(config):
            batches, labels = self._calibration(graph)
            result = calibrate(
                graph,
                batches,
                method=config.method,
                options=config.options,
                target=config.target,
                placement=placement,
                prepare=config.prepare,
                bias_correction=config.bias_correction,
                labels=labels,
                seed=config.seed,
                device=config.device,
                cache_gib=config.cache_gib,
                explain=config.explain,
                sensitivity=config.sensitivity,
                budgets=parse_budgets(config.budget),
                stored=partial(stored_bytes, storage=config.weight_storage),
                stage=self.work.progress.stage,
            )
        self.work.warnings += [*result.placement.notes, *result.record.get("notes", ())]
        if wide := [site for site in result.placement.sites if site.spec.tap_bits]:
            self.work.warnings.append(
                f"kernels of {len(wide)} convolutions keep {wide[0].spec.tap_bits} bits for the one tap per channel "
                f"that was an identity branch, which fewer cannot hold ({wide[0].name}, ...); --set wide_taps=false "
                "gives all taps the same bits"
            )
        return result

    def _calibration(self, graph: fx.GraphModule) -> tuple[Iterable[Batch], Tensor | None]:
        """Calibration batches, and the labels where they are wanted: from one pass, as data may be shuffled."""
        if not self.work.calibration.labelled:
            return _Counted(self, graph), None
        pairs = list(_labelled(graph, self.work.calibration))
        labels = torch.cat([torch.from_numpy(labels) for _, labels in pairs])
        self.samples = len(labels)
        return [batch for batch, _ in pairs], labels

    def _emitted(self, folded: fx.GraphModule, result: CalibrationResult) -> Any:
        with self.work.step("emit", "emit"):
            metadata = {
                "version": version(),
                "config_sha256": self.config.digest(),
                "target": self.config.target,
                "method": self.config.method,
            }
            emit_float(folded, self.float_path)
            exported = export_program(result.program)
            onnx_program = to_onnx(result.program, opset=needed_opset(result), metadata=metadata, exported=exported)
            save_reference(exported, self.folder / "reference.pt2")
            model, simplifier = self._simplified(result, onnx_program)
            self._store(model)
            return simplifier

    def _store(self, model: ir.Model) -> None:
        """Write the model as it is to be stored, and beside it, to be compared, as it could be."""
        for name, other in alternatives(model, self.config.weight_storage).items():
            self.alternatives[name] = self.folder / f"stored-as-{name}.onnx"
            save(other, self.alternatives[name])
        pack(model, self.config.weight_storage)
        save(model, self.model_path)

    def _simplified(self, result: CalibrationResult, model: ir.Model) -> tuple[ir.Model, dict[str, Any]]:
        """The model after the guarded simplifier, another only where it proved that nothing but nodes changed."""
        if not self.config.simplify:
            return model, {"applied": False, "why": "switched off"}
        simpler, report = simplify(ir.to_proto(model), _feed(result.program, _example(result.program)))
        return ir.from_proto(simpler) if report.applied else model, report.to_dict()

    def _proved(self, graph: fx.GraphModule, result: CalibrationResult, kernels: KernelPlan) -> Report:
        program = result.program
        with self.work.step("validate", "compare"):
            levels = self._parity(program)
        accuracy = self._accuracy(graph, program, kernels)
        with self.work.step("validate", "measure"):
            layers = layer_entries(result, _first(program, self._held_out(program), SQNR_SAMPLES))
            findings = lint(self.model_path)
            covered = coverage(self.model_path, sample=_feed(program, _smallest(program, _example(program))))
            timing = self._latency(program)
            saturating = saturation(self.model_path)
            size = size_by_type(self.model_path)
        if saturating.affects_this_cpu:
            self.work.warnings.append("this CPU has no VNNI and can saturate 16-bit sums: use reduce_range")
        model = ir.load(self.model_path)
        report: dict[str, Any] = {
            "schema": 1,
            "verdict": "fail",
            "target": self.config.target,
            "method": self.config.method,
            "bits": {"weight": self.config.weight_bits, "activation": self.config.activation_bits},
            "fold": fold_entry(result.placement.graph.meta["fold"]),
            "accuracy": accuracy,
            "parity": levels,
            "coverage": covered.to_dict(),
            "size": {"float_bytes": size_by_type(self.float_path).file_bytes, **size.to_dict()},
            "latency_ms": timing,
            "storage": storage_entry(self.config.weight_storage, self.alternatives, timing),
            "time_s": {name: self.work.times.get(name, 0.0) for name in _STEPS},
            "gates": [],
            "tool": {"name": "intact", "version": version()},
            "model": model_entry(self.work.source, graph, model),
            "environment": environment(saturating, self.config.threads),
            "rules": [asdict(rule) for rule in result.placement.rules],
            "layers": layers,
            **method_entries(result.record),
            "saturation": saturation_entry(saturating),
            "emission": emission_entry(model),
            "lint": [asdict(finding) for finding in findings],
            "config": self.config.model_dump(mode="json"),
            "data": self._data_entry(),
        }
        return cast(Report, report)

    def _held_out(self, program: fx.GraphModule) -> Iterator[Batch]:
        return _inputs(program, self.work.evaluation or self.work.calibration)

    def _parity(self, program: fx.GraphModule) -> dict[str, Any]:
        def batches() -> Iterator[Batch]:
            return _first(program, self._held_out(program), self.config.parity_samples)

        return _levels(self.model_path, program, batches, openvino=self.config.openvino)

    def _accuracy(self, graph: fx.GraphModule, program: fx.GraphModule, kernels: KernelPlan) -> Any:
        """Float graph, reference program and runtime on the held-out data; the first output counts."""
        if self.work.evaluation is None:
            return None
        accuracy = Accuracy()
        runtime = session(self.model_path, optimized=True, threads=torch.get_num_threads())
        with self.work.step("validate", "evaluate") as bar, torch.no_grad():
            for batch, labels in _labelled(program, self.work.evaluation):
                outputs = runtime.run(None, _feed(program, batch))
                reference = _outputs(kernels, batch)
                accuracy.update(graph(*batch)[0].numpy(), reference[0].numpy(), outputs[0], labels)
                bar.advance()
        if accuracy.samples == 0:
            raise DataError("no evaluation batches: the --eval data is empty; give at least one batch or leave it out")
        self.evaluated = accuracy.samples
        return accuracy.to_dict()

    def _latency(self, program: fx.GraphModule) -> Any:
        if not self.config.latency_runs:
            return None
        feed = _feed(program, _smallest(program, next(self._held_out(program))))
        models = {"float": self.float_path, "quantized": self.model_path, **self.alternatives}
        measured = latency(models, feed, threads=self.config.threads, runs=self.config.latency_runs).to_dict()
        batch = len(next(iter(feed.values())))
        return measured | {"ratio": measured["quantized"] / measured["float"], "batch": batch}

    def _golden(self, program: fx.GraphModule, kernels: KernelPlan) -> tuple[dict[str, Any], dict[str, Any]]:
        batch = next(_first(program, self._held_out(program), GOLDEN_SAMPLES))
        with torch.no_grad():
            outputs = _outputs(kernels, batch)
        names = program.meta["output_names"]
        return _feed(program, batch), {name: y.numpy() for name, y in zip(names, outputs, strict=True)}

    def _data_notes(self) -> list[str]:
        return [*self.work.calibration.notes, *(self.work.evaluation.notes if self.work.evaluation else ())]

    def _data_entry(self) -> Any:
        def entry(data: Data, samples: int) -> dict[str, Any]:
            return {"source": data.label, "samples": samples, "sha256": data.digest()}

        evaluated = self.work.evaluation
        return {
            "calibration": entry(self.work.calibration, self.samples),
            "evaluation": entry(evaluated, self.evaluated) if evaluated else None,
        }


_STEPS = ("capture", "fold", "calibrate", "emit", "validate")


class _Counted:
    """Calibration batches as the graph takes them; counts the samples of the longest pass."""

    def __init__(self, export: _Export, graph: fx.GraphModule) -> None:
        self.export, self.graph = export, graph

    def __iter__(self) -> Iterator[Batch]:
        samples = 0
        for batch in _inputs(self.graph, self.export.work.calibration):
            samples += len(batch[0])
            self.export.samples = max(self.export.samples, samples)
            yield batch


@contextmanager
def _out_of_space(config: ExportConfig) -> Iterator[None]:
    """A full disk or a full accelerator inside is an InputError that says what to change."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{error.strerror}: {tempfile.gettempdir()} cannot hold the activations that do not fit into "
            f"{config.cache_gib:g} GiB of memory; free space there, set TMPDIR to another disk, raise --cache-gib, or "
            "use fewer calibration samples."
        ) from error
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"device {config.device!r} has too little memory ({str(error).splitlines()[0]}); use smaller "
            "batches (--set batch=N) or --device cpu."
        ) from error


def _inputs(graph: fx.GraphModule, data: Data) -> Iterator[Batch]:
    return (batch for batch, _ in _labelled(graph, data))


def _labelled(graph: fx.GraphModule, data: Data) -> Iterator[tuple[Batch, Any]]:
    """Batches of a pass; of the size that the graph insists on, where it does (an incomplete rest is dropped)."""
    rest: tuple[Tensor, ...] = ()
    for batch in data:
        values = batch.inputs if batch.labels is None else (*batch.inputs, batch.labels)
        if rest:
            values = tuple(torch.cat(pair) for pair in zip(rest, values, strict=True))
        size = batch_of(graph, len(values[0]))
        for start in range(0, len(values[0]) - size + 1, size):
            part = tuple(x[start : start + size] for x in values)
            inputs, labels = part[: len(batch.inputs)], part[len(batch.inputs) :]
            yield inputs, labels[0].numpy() if labels else None
        rest = tuple(x[len(x) // size * size :] for x in values) if len(values[0]) % size else ()


def _first(graph: fx.GraphModule, batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches until `samples` samples are reached; the last one is cut, except where the graph fixes its size."""
    for batch in batches:
        yield tuple(x[:samples] for x in batch) if graph.meta["dynamic_batch"] else batch
        samples -= len(batch[0])
        if samples <= 0:
            return


def _smallest(graph: fx.GraphModule, batch: Batch) -> Batch:
    """One sample, or the batch itself where its size is fixed."""
    return next(_first(graph, [batch], 1))


def _example(graph: fx.GraphModule) -> Batch:
    example: Batch = graph.meta["example"]
    return example


def _feed(graph: fx.GraphModule, batch: Batch) -> dict[str, Any]:
    return {name: x.numpy() for name, x in zip(graph.meta["input_names"], batch, strict=True)}


def _levels(
    path: Path, program: fx.GraphModule, batches: Callable[[], Iterable[Batch]], *, openvino: bool
) -> dict[str, Any]:
    """The "parity" part of report.json."""
    threads = torch.get_num_threads()
    levels: dict[str, Any] = {
        "unoptimized": parity(path, program, batches(), optimized=False, threads=threads).to_dict(),
        "optimized": parity(path, program, batches(), optimized=True, threads=threads).to_dict(),
    }
    if openvino:
        levels["openvino"] = second_parity(path, program, batches(), threads=threads).to_dict()
    return levels


def _gates(expressions: Iterable[str], *, openvino: bool) -> list[Gate]:
    """Those of every export, of a second runtime where it is asked for, and the user's."""
    second = [parse("parity.openvino.violations==0")] if openvino else []
    return [*DEFAULT_GATES, *second, *map(parse, expressions)]


def _outputs(kernels: KernelPlan, batch: Batch) -> tuple[Tensor, ...]:
    return run(kernels, batch)[1]


# --- verify ----------------------------------------------------------------------------------------------------------


def verify(folder: str | Path, progress: Progress | None = None) -> Report:
    """Prove a bundle again on this machine; returns its report with this machine's parity, coverage and gates.

    Files are checked against the manifest, then the runtime against the reference program on the golden inputs, every
    quantized value. Accuracy and latency keep the numbers of the export; nothing is written.

    raises: InputError for a missing, damaged or changed file, or where OpenVINO was asked for and is not installed.
    """
    folder, progress = Path(folder), progress or Progress()
    with progress.stage("manifest"):
        verify_manifest(folder)
    report = read_report(folder / "report.json")
    openvino = "openvino" in report["parity"]
    if openvino:
        check_installed()
    program = load_reference(folder / REFERENCE)
    inputs, expected = read_golden(folder)
    for kind, arrays in (("input", inputs), ("output", expected)):
        if [*arrays] != [*program.meta[f"{kind}_names"]]:
            raise InputError(
                f"the golden {kind}s of {folder} are not those of its reference program; take it from its source again."
            )
    batch = tuple(torch.from_numpy(np.array(inputs[name])) for name in program.meta["input_names"])
    model_path = folder / "model.onnx"
    with progress.stage("compare"):
        levels = _levels(model_path, program, lambda: [batch], openvino=openvino)
        found = session(model_path).run(list(expected), inputs)
    with progress.stage("measure"):
        saturating = saturation(model_path)
        findings = lint(model_path)
        covered = coverage(model_path, sample=_feed(program, _smallest(program, batch)))
    pairs = [
        (torch.from_numpy(np.array(a)), torch.from_numpy(b)) for a, b in zip(expected.values(), found, strict=True)
    ]
    levels["optimized"]["outputs_identical"] &= all(alike(a, b, 0.0) for a, b in pairs)
    levels["optimized"]["violations"] += sum(not alike(a, b, FLOAT_OUTPUT_ERROR) for a, b in pairs)
    changes: dict[str, Any] = {
        "parity": levels,
        "coverage": covered.to_dict(),
        "lint": [asdict(finding) for finding in findings],
        "environment": environment(saturating, report["config"]["threads"]),
        "saturation": saturation_entry(saturating),
    }
    report = cast(Report, {**report, **changes})
    gates = _gates(report["config"]["gates"], openvino=openvino)
    report["gates"] = evaluate(gates, report)
    report["verdict"] = verdict(report["gates"])
    return report
