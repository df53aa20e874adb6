"""Export a model: calibrate, emit, prove and write the bundle, one step after the other.

Must not know: the command line, how pages look.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from calibrators.allocator import keep_freed_memory
from calibrators.errors import counted
from calibrators.execution.measure import Batch
from calibrators.program.freeze import CalibrationResult
from calibrators.targets import get_target
from calibrators.temporary import TemporaryFolder
from exporter.about import __version__
from exporter.checks import check_settings, checked_data
from exporter.comparing.compare import Export, compare, read_export
from exporter.config import ExportConfig, make_config
from exporter.emission.build_model import check_opset, emit_float, needed_opset, needed_release, save, to_onnx
from exporter.emission.packing import alternatives, pack, small
from exporter.emission.raw_ends import input_grids, read_bytes, with_raw_ends
from exporter.folding.agreement import check_folding
from exporter.folding.fold_regions import fold
from exporter.frontend.axes import resized
from exporter.frontend.calling import input_names, optional_inputs, tensor_names
from exporter.frontend.capture import capture
from exporter.frontend.declared import other_size
from exporter.frontend.load import load_model
from exporter.frontend.reference import export_program, save_reference
from exporter.handover.bundle import check_out, write_bundle
from exporter.handover.golden_set import CHECK, write_golden_set
from exporter.handover.scores import SCORES, write_scores
from exporter.inputs.batches import GraphBatches, check_evaluation, check_metric, class_names, cut, feed
from exporter.inputs.data import Data
from exporter.inputs.golden import GOLDEN_SAMPLES, check_outputs, digest_of, golden_file, golden_inputs, origin_of
from exporter.inputs.metric import Metric, joined, load_metric
from exporter.inputs.open import check_takes_integers, open_both
from exporter.inputs.raw import RawInputs, parse_coded
from exporter.inputs.sanity import calibration_warnings, range_warnings, score_warnings
from exporter.progress import Bar, Progress
from exporter.reporting.gates import needs_baseline
from exporter.reporting.interface import INTERFACE_KEY, images_of, metadata_of, model_of, sizes_of
from exporter.reporting.layer_sections import layer_entries
from exporter.reporting.outcome import Outcome
from exporter.reporting.provenance import provenance, sha256_of
from exporter.reporting.schema import SCHEMA_VERSION, Bits, DataSource, DataSources, Report, Times, Tool, dump
from exporter.reporting.sections import emission_of, storage_of
from exporter.resume import kept_units
from exporter.run_calibrators import calibrated, calibration_notes
from exporter.verify import REFERENCE, gates_of, judge, machine_parts
from runtime_tests.measure.latency import Timings, latency
from runtime_tests.measure.noise import Noise
from runtime_tests.measure.paired import SampleScores
from runtime_tests.measure.size import size_of
from runtime_tests.ort.meant_for import EXACT_ON_KEY
from runtime_tests.ort.saturation import saturation
from runtime_tests.ort.sessions import Model, Source
from runtime_tests.ort.simplifier import Simplifier, simplify
from runtime_tests.ort.versions import RELEASE_KEY
from runtime_tests.proof import Measurements, Proof
from runtime_tests.reference.execute import plan
from runtime_tests.reference.where_exact import exact_on, holds_on
from runtime_tests.runtimes import available_runtimes

__all__ = ["export"]

SQNR_SAMPLES = 128
COMPARED_SAMPLES = 4
STEPS = ("capture", "fold", "calibrate", "emit", "validate")


Golden = list[tuple[dict[str, Any], dict[str, Any]]]
"""Sets of inputs and outputs by name."""


def export(
    model: nn.Module | torch.export.ExportedProgram | str,
    data: Iterable[Any] | str,
    *,
    out: str | Path,
    eval_data: Iterable[Any] | str | None = None,
    checkpoint: Path | None = None,
    checkpoint_key: str | None = None,
    config: ExportConfig | None = None,
    progress: Progress | None = None,
    metric: str | Callable[[Any, Any], float] | None = None,
    source: str = "",
    overwrite: bool = False,
    **settings: Any,
) -> Outcome:
    """Calibrate, emit, prove and write the bundle of `model` to the folder `out`; return what its report.json holds.

    model:           a module, an exported program, or text as `intact export` takes it ("net.py:build", "net.pt2").
    data, eval_data: batches of x, (x, labels) or ({name: x}, labels), an inputs.data.Data, or text as `intact export`
                     takes it. Calibration reads no labels; evaluation uses them if there are any.
    checkpoint:      weights for the module of a factory that `model` names; checkpoint_key says where they are in it.
    metric:     a function of all outputs and labels of the evaluation data, or text such as "metrics.py:mean_iou".
    config, settings: an ExportConfig, or its fields as keywords (method="mse", weight_bits=4, ...).
    raises:          InputError (bad model, data, setting, folder), ExportError (not for this target). Failed gates do
                     not raise: report["verdict"] says "fail".
    """
    keep_freed_memory()
    config = config or make_config(settings)
    measure = load_metric(metric or config.metric)
    if measure is not None and config.metric is None:
        config = config.model_copy(update={"metric": metric if isinstance(metric, str) else measure.name})
    check_settings(config)
    gates = gates_of(config.gates, config.proving_runtimes)
    baseline = read_export(Path(config.baseline)) if config.baseline is not None else None
    given, evaluation = open_both(data, eval_data, config)
    notes: list[str] = []
    if isinstance(model, str):
        source, model = model, load_model(model, checkpoint, key=checkpoint_key, note=notes.append)
    names, optional = input_names(model), optional_inputs(model)
    given, evaluation = given.named(names, optional), evaluation and evaluation.named(names, optional)
    calibration, evaluation = checked_data(given, evaluation, config, gates)
    example = calibration.example()
    raws = RawInputs.of(config.input, tensor_names(model, len(example.inputs), example.form), config)
    calibration, evaluation = raws.as_values(calibration), evaluation and raws.as_values(evaluation)
    out = Path(out)
    check_out(out, overwrite=overwrite)  # last: a second try would meet faults of the input
    torch.manual_seed(config.seed)
    with TemporaryFolder() as folder:
        work = _Export(config, progress or Progress(), source, folder, measure, raws)
        work.warnings += notes
        report, golden = work.run(model, calibration, evaluation)
        if baseline is not None:
            others = [gate for gate in gates if not needs_baseline(gate)]
            so_far = judge(report, others, accuracy_gate=config.accuracy_gate)
            this = Export(str(out), so_far, work.scores, sha256_of(work.folder / "model.onnx"))
            report = replace(report, baseline=compare(baseline, this))
        judged = judge(report, gates, accuracy_gate=config.accuracy_gate)
        if (found := judged.baseline) is not None:
            judged = replace(judged, baseline=replace(found, verdicts=(found.verdicts[0], judged.verdict)))
        report = replace(judged, provenance=provenance(checkpoint, checkpoint_key))
        write_bundle(
            out,
            files=work.move_files,
            report=report,
            golden=golden,
            config=config.model_dump(mode="json"),
            overwrite=overwrite,
        )
    return Outcome(dump(report), out)


class _Export:
    """One export: the steps in order, each a method."""

    def __init__(
        self,
        config: ExportConfig,
        progress: Progress,
        source: str,
        folder: Path,
        metric: Metric | None,
        raws: RawInputs,
    ) -> None:
        self.config, self.progress, self.source, self.folder = config, progress, source, folder
        self.metric, self.raws = metric, raws
        self.target = get_target(config.target)
        self.model, self.float_path = Model(folder / "model.onnx"), folder / "float.onnx"
        self.alternatives: dict[str, Path] = {}  # the model with its weights in other storages
        self.times = dict.fromkeys(STEPS, 0.0)
        self.warnings: list[str] = []
        self.scores: SampleScores | None = None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.times[name] += time.perf_counter() - start

    @contextmanager
    def _step(self, name: str, title: str | None = None) -> Iterator[Bar]:
        """Show a bar, and add the time of the body to the step `name`."""
        with self._timed(name), self.progress.stage(title or name) as bar:
            yield bar

    def run(
        self, model: nn.Module | torch.export.ExportedProgram, calibration: Data, evaluation: Data | None
    ) -> tuple[Report, Golden]:
        """Run all steps; return the report and the golden inputs and outputs. The files stay in the folder."""
        graph = self._captured(model, calibration)
        self.raws = self.raws.renamed(graph.meta["input_names"])
        batches = GraphBatches(graph, calibration)
        held_out = GraphBatches(graph, evaluation, keeps_labels=self.metric is not None) if evaluation else None
        given = golden_file(self.config.golden, graph, self.raws)
        self._check_data(graph, batches, held_out, given)
        coded = parse_coded(self.config.output, graph.meta["output_names"])
        with self._step("fold"):
            folded = fold(graph)
        folded.meta |= {"coded_outputs": coded, "input_grids": input_grids(folded, self.raws)}
        with self._timed("calibrate"), kept_units(folded, batches.data, self.config, self.warnings.append) as kept:
            result = calibrated(folded, batches, self.config, self.progress.stage, kept)
        self.warnings += calibration_notes(result)
        self._check_folding(graph, result, cut(graph, next(iter(batches)), COMPARED_SAMPLES))
        result = with_raw_ends(result, self.raws, coded)
        graph, folded = read_bytes(graph, self.raws), read_bytes(folded, self.raws)
        for each in (batches, held_out, given):
            if each is not None:
                each.graph, each.data = graph, self.raws.as_pixels(each.data)
        golden = golden_inputs(self.config.golden, result, batches, given, self.config.seed)
        simplifier = self._emitted(graph, folded, result)
        noise = Noise(result)
        proof = self._proved(graph, result.program, noise, held_out or batches, golden, evaluated=held_out is not None)
        self.warnings += score_warnings(proof.accuracy) if proof.accuracy is not None else ()
        source = origin_of(self.config.golden, (held_out or batches).data.label)
        origins = _origins(batches, held_out, source, proof.golden[0][0])
        report = self._report(graph, result, proof, noise, simplifier, origins)
        if proof.metric is not None and held_out is not None:
            report = replace(report, metric=proof.metric.result(joined(held_out.given, proof.metric.samples)))
        notes = [*batches.notes, *(held_out.notes if held_out else ())]
        warnings = dict.fromkeys([*graph.meta["notes"], *self.warnings, *notes])
        report = replace(report, warnings=tuple(warnings))
        self._write_for_later(proof, report)
        names = result.program.meta["output_names"]
        return report, [
            (feed(result.program, inputs), {name: y.numpy() for name, y in zip(names, outputs, strict=True)})
            for inputs, outputs in proof.golden
        ]

    def _captured(self, model: nn.Module | torch.export.ExportedProgram, calibration: Data) -> fx.GraphModule:
        example = calibration.example()
        if isinstance(model, nn.Module):
            check_takes_integers(model, example, calibration.label)
            self.warnings += [text] if (text := other_size(model, example.inputs)) else []
        with self._step("capture"):
            free_batch, axes = not self.target.static_shapes, self.config.free_axes
            return capture(model, example.inputs, form=example.form, free_batch=free_batch, axes=axes)

    def _write_for_later(self, proof: Proof, report: Report) -> None:
        """Write what other machines and later exports are compared with: golden codes, and scores by sample."""
        if proof.accuracy is not None:
            self.scores = proof.accuracy.by_sample
            write_scores(self.folder, self.scores)
        values = proof.golden_values(self.target.exact_on)
        assert report.golden is not None and report.emission is not None
        write_golden_set(self.folder, self.model, values, report.golden, report.emission.min_onnxruntime)

    def _check_data(
        self,
        graph: fx.GraphModule,
        batches: GraphBatches,
        held_out: GraphBatches | None,
        golden: GraphBatches | None,
    ) -> None:
        """Refuse data that the model cannot take, warn about data that look wrong, and keep what describes them."""
        sources = [each.data for each in (held_out, batches) if each is not None]
        self.labels = class_names(self.config.labels, sources, graph)
        self.images = images_of(next((x.form for x in sources if x.form), None), self.raws.by_name)
        if (first := next(iter(batches), None)) is not None:
            self.warnings += calibration_warnings(graph, first, batches.data.label)
        if golden is not None:
            check_evaluation(graph, batches.data, golden.data, "--golden")
        if held_out is not None:
            check_evaluation(graph, batches.data, held_out.data)
            pair = (data.example().inputs for data in (batches.data, held_out.data))
            self.warnings += range_warnings(graph.meta["input_names"], *pair)
            if self.metric is not None:
                check_metric(graph, held_out.data, self.metric)

    def move_files(self, target: Path) -> None:
        """Put the model, its external data, the reference program and the golden set of codes into the bundle."""
        for path in [*self.folder.glob("model.onnx*"), *(self.folder / name for name in (CHECK, SCORES, "golden"))]:
            if path.exists():
                shutil.move(path, target / path.name)

    def _check_folding(self, graph: fx.GraphModule, result: CalibrationResult, batch: Batch) -> None:
        """Compare folded network and model, since a proof against the reference program cannot find a wrong fold."""
        if "absorb" not in self.config.prepare:  # which changes outputs a little
            for each in (batch, *resized(batch, graph.meta["other_examples"])):
                check_folding(graph, result.placement.graph, each)

    def _emitted(self, graph: fx.GraphModule, folded: fx.GraphModule, result: CalibrationResult) -> Simplifier:
        with self._step("emit"):
            metadata = {
                "version": __version__,
                "config_sha256": self.config.digest(),
                "target": self.config.target,
                "method": self.config.method,
            }
            emit_float(folded, self.float_path)
            onnx_program = to_onnx(result.program, opset=needed_opset(result), metadata=metadata)
            (self.folder / REFERENCE).parent.mkdir()
            save_reference(export_program(result.program), self.folder / REFERENCE)
            model, simplifier = self._simplified(result, onnx_program)
            self._store(graph, model, result.program)
            return simplifier

    def _store(self, graph: fx.GraphModule, model: ir.Model, program: fx.GraphModule) -> None:
        """Write the model in its storage, with where it holds, and, for comparison, in the other storages."""
        for name, other in alternatives(model, self.config.weight_storage).items():
            self.alternatives[name] = self.folder / f"stored-as-{name}.onnx"
            save(other, self.alternatives[name])
        if self.config.weight_storage != "auto" and (names := small(model, self.config.weight_storage)):
            self.warnings.append(
                f"stored as int8 although weight_storage is {self.config.weight_storage!r}: "
                f"{counted(len(names), 'weight')}, as the nodes that unpack them are larger than what packing saves: "
                f"{', '.join(names)}"
            )
        pack(model, self.config.weight_storage, self.config.min_ort)
        check_opset(model, self.target)
        model.metadata_props[RELEASE_KEY] = str(needed_release(model, self.config.min_ort))
        entries = holds_on(plan(program, self.target), saturation(ir.to_proto(model)), self.target)
        model.metadata_props[EXACT_ON_KEY] = ", ".join(exact_on(entries))
        grids = program.meta.get("output_codes", {})
        described = model_of(self.source, graph, model, self.raws.by_name, grids)
        self.interface = replace(described, images=self.images, labels=self.labels)
        model.metadata_props[INTERFACE_KEY] = metadata_of(self.interface, graph.meta["size_bounds"])
        save(model, self.folder / "model.onnx")

    def _simplified(self, result: CalibrationResult, model: ir.Model) -> tuple[ir.Model, Simplifier]:
        """Return the model after the guarded simplifier, and the simplifier's report."""
        if not self.config.simplify:
            return model, Simplifier(applied=False, why="switched off")
        simpler, report = simplify(ir.to_proto(model), feed(result.program, result.program.meta["example"]))
        return ir.from_proto(simpler) if report.applied else model, report

    def _proved(
        self,
        graph: fx.GraphModule,
        program: fx.GraphModule,
        noise: Noise,
        batches: GraphBatches,
        golden: Batch | None,
        *,
        evaluated: bool,
    ) -> Proof:
        """Compare and measure in one pass over the evaluation data, or over the calibration data if there is none."""
        measured = Measurements(
            parity_samples=self.config.parity_samples,
            golden_samples=GOLDEN_SAMPLES if golden is None else 0,
            noise_samples=SQNR_SAMPLES,
            noise=noise,
            float_model=graph if evaluated else None,
            metric=(self.metric.name, self.metric) if self.metric is not None else None,
        )
        runtimes = available_runtimes(self.config.proving_runtimes)
        with self._step("validate", "compare") as bar:
            proof = Proof(self.model, program, runtimes=runtimes, threads=torch.get_num_threads(), measured=measured)
            if golden is not None:
                proof.add_golden(golden)
                check_outputs(proof.golden[0][1])
            for batch, labels in batches.labelled():
                proof.add(batch, labels)
                bar.advance()
                if proof.is_done:
                    break
            if program.meta["free_axes"]:
                for sized in resized(proof.golden[0][0], program.meta["other_examples"]):
                    proof.add_golden(sized)
            return proof

    def _report(
        self,
        graph: fx.GraphModule,
        result: CalibrationResult,
        proof: Proof,
        noise: Noise,
        simplifier: Simplifier,
        sources: DataSources,
    ) -> Report:
        """Measure the file and compose the report, still without a verdict."""
        program, config, record = result.program, self.config, result.record
        with self._step("validate", "measure"):
            parts = machine_parts(proof, program.meta["example"], config.threads)
            timings, batch = self._timings(program, proof)
            size = size_of(self.folder / "model.onnx", self.float_path)
        return Report(
            schema=SCHEMA_VERSION,
            verdict="fail",
            target=config.target,
            method=config.method,
            bits=Bits(config.weight_bits, config.activation_bits),
            fold=result.placement.graph.meta["fold"],
            accuracy=proof.scores,
            parity=proof.parity,
            proved_on=proof.proved_on,
            size=size,
            latency_ms=timings.summary(batch) if timings else None,
            time_shares=timings.shares("quantized", parts["coverage"].float_nodes) if timings else None,
            storage=storage_of(config.weight_storage, self.alternatives, timings),
            time_s=Times(**self.times),
            gates=(),
            tool=Tool("intact", __version__),
            model=self.interface,
            sizes=sizes_of(program, (inputs for inputs, _ in proof.golden)),
            rules=result.placement.rules,
            layers=layer_entries(result, noise),
            preparation=record.preparation,
            reconstruction=record.reconstruction,
            lapq=record.lapq,
            sensitivity=record.sensitivity,
            limited_weights=record.limited_weights,
            unsigned_weights=record.unsigned_weights,
            settled=record.settled,
            portability=record.portability,
            mixed_precision=record.mixed_precision,
            simplifier=simplifier,
            emission=emission_of(self.model.graph_model),
            golden=proof.golden_outputs(result.placement.target.exact_on),
            config=config.model_dump(mode="json"),
            data=sources,
            **parts,
        )

    def _timings(self, program: fx.GraphModule, proof: Proof) -> tuple[Timings | None, int]:
        """Return the latencies of all files, None if not wanted, and the batch size they were timed with."""
        if not self.config.latency_runs or not proof.golden:
            return None, 0
        sample = feed(program, cut(program, proof.golden[0][0]))
        models: dict[str, Source] = {"float": self.float_path, "quantized": self.model, **self.alternatives}
        timings = latency(
            models, sample, threads=self.config.threads, runs=self.config.latency_runs, profiled="quantized"
        )
        return timings, len(next(iter(sample.values())))


def _origins(batches: GraphBatches, held_out: GraphBatches | None, source: str, golden: Batch) -> DataSources:
    """Describe the data, and the golden inputs, which come from `source`."""
    data, *evaluated = (
        DataSource(each.data.label, each.samples, each.data.digest()) for each in (batches, held_out) if each
    )
    return DataSources(data, next(iter(evaluated), None), DataSource(source, len(golden[0]), digest_of(golden)))
