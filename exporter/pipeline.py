"""Export a model: calibrate, emit, prove and write the bundle, one step after the other.

Must not know: the command line, how pages look.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from calibrators.allocator import keep_freed_memory
from calibrators.calibration import advice
from calibrators.errors import ExportError, ModelError, counted
from calibrators.execution.measure import Batch
from calibrators.execution.ranks import ALONE, Ranks
from calibrators.ladder_record import CostlyLayers
from calibrators.program.freeze import CalibrationResult
from calibrators.targets import get_target
from calibrators.temporary import TemporaryFolder
from exporter.about import __version__
from exporter.comparing.compare import Export, compare
from exporter.config import ExportConfig, make_config, takes_settings
from exporter.emission.build_model import (
    check_opset,
    emit_float,
    needed_opset,
    needed_release,
    save,
    to_onnx,
    with_data_apart,
    without_data_apart,
)
from exporter.emission.packing import alternatives, pack, small
from exporter.emission.raw_ends import read_bytes, with_raw_ends
from exporter.folding.agreement import check_folding
from exporter.frontend.axes import resized
from exporter.frontend.free_sizes import Bounds
from exporter.frontend.reference import export_program, save_reference
from exporter.handover.bundle import check_out, write_bundle
from exporter.handover.golden_set import CHECK, write_golden_set
from exporter.handover.scores import SCORES, write_scores
from exporter.inputs.batches import GraphBatches, cut, feed
from exporter.inputs.golden import GOLDEN_SAMPLES, check_outputs, digest_of, golden_inputs, origin_of
from exporter.inputs.metric import joined
from exporter.inputs.sanity import score_warnings
from exporter.intake import Network, Order, Steps, open_order, take_in
from exporter.processes import SAME_DATA, SAME_MACHINES, check_same
from exporter.progress import Progress, default_progress
from exporter.reporting.gates import goal_of, leaves_room, needs_baseline
from exporter.reporting.interface import INTERFACE_KEY, metadata_of, model_of, sizes_of
from exporter.reporting.interface import Model as Interface
from exporter.reporting.layer_sections import layer_entries
from exporter.reporting.outcome import Outcome
from exporter.reporting.provenance import provenance, sha256_of
from exporter.reporting.schema import SCHEMA_VERSION, Bits, DataSource, DataSources, Report, Times, Tool, dump
from exporter.reporting.sections import emission_of, storage_of
from exporter.resume import check_apart, kept_units
from exporter.run_calibrators import calibrated, calibration_notes
from exporter.verify import REFERENCE, judge, machine_parts
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
from runtime_tests.runtimes import available_runtimes, get_runtime

__all__ = ["Work", "carry_out", "export"]

SQNR_SAMPLES = 128
COMPARED_SAMPLES = 4


Golden = list[tuple[dict[str, Any], dict[str, Any]]]
"""Sets of inputs and outputs by name."""


@takes_settings
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
    ranks: Ranks = ALONE,
    **settings: Any,
) -> Outcome:
    """Calibrate, emit, prove and write the bundle of `model` to the folder `out`; return what its report.json holds.

    model:           a module, an exported program, or text as `intact export` takes it ("net.py:build", "net.pt2").
    data, eval_data: batches of x, (x, labels) or ({name: x}, labels), an inputs.data.Data, or text as `intact export`
                     takes it. Calibration reads no labels; evaluation uses them if there are any.
    checkpoint:      weights for the module of a factory that `model` names; checkpoint_key says where they are in it.
    metric:     a function of all outputs and labels of the evaluation data, or text such as "metrics.py:mean_iou".
    ranks:           the processes that all call this with the same arguments and share the work; the first writes, and
                     all return the same.
    config, settings: an ExportConfig, or its fields as keywords (method="mse", weight_bits=4, ...).
    raises:          InputError (bad model, data, setting, folder), ExportError (not for this target). Failed gates do
                     not raise: report["verdict"] says "fail".
    """
    keep_freed_memory()
    config, out = config or make_config(settings), Path(out)
    order = open_order(
        model, data, eval_data, checkpoint, checkpoint_key, config=config, metric=metric, source=source,
        ranks=ranks,
    )  # fmt: skip
    check_apart(out, order.config)
    check_out(out, overwrite=overwrite)  # last: a second try would meet faults of the input
    return carry_out(order, out, progress or default_progress(), overwrite=overwrite)


def carry_out(order: Order, out: Path, progress: Progress, *, overwrite: bool = False) -> Outcome:
    """Export what was opened and checked, and write its bundle; see `export`."""
    config, gates, baseline, ranks = order.config, order.gates, order.baseline, order.ranks
    torch.manual_seed(config.seed)
    with TemporaryFolder() as folder:
        work = Work(order, progress, folder)
        done = work.run()
        if done is None:
            return Outcome(ranks.shared(dict[str, Any]()), out)
        report, golden = done
        if baseline is not None:
            others = [gate for gate in gates if not needs_baseline(gate)]
            so_far = judge(report, others, accuracy_gate=config.accuracy_gate)
            this = Export(str(out), so_far, work.scores, sha256_of(work.folder / "model.onnx"))
            report = replace(report, baseline=compare(baseline, this))
        judged = judge(report, gates, accuracy_gate=config.accuracy_gate)
        if not all(map(leaves_room, judged.gates)):
            judged = replace(judged, costly_layers=work.costly_layers())
        if (found := judged.baseline) is not None:
            judged = replace(judged, baseline=replace(found, verdicts=(found.verdicts[0], judged.verdict)))
        report = replace(judged, provenance=provenance(order.checkpoint, order.checkpoint_key))
        write_bundle(
            out,
            files=work.move_files,
            report=report,
            golden=golden,
            config=config.model_dump(mode="json"),
            overwrite=overwrite,
        )
    return Outcome(ranks.shared(dump(report)), out)


class Work:
    """One export: the steps in order, each a method. The files stay in the folder."""

    def __init__(self, order: Order, progress: Progress, folder: Path) -> None:
        self.order, self.config, self.folder = order, order.config, folder
        self.steps = Steps(progress)
        self.target = get_target(self.config.target)
        self.model, self.float_path = Model(folder / "model.onnx"), folder / "float.onnx"
        self.lowered = folder / name if (name := self.target.lowered_file) else None
        self.alternatives: dict[str, Path] = {}  # the model with its weights in other storages
        self.warnings = [*order.warnings, *order.notes]
        self.scores: SampleScores | None = None
        self.goal = goal_of(order.gates, accuracy_gate=self.config.accuracy_gate)

    def run(self) -> tuple[Report, Golden] | None:
        """Run all steps; return the report and the golden inputs and outputs, None unless this is the first process."""
        network = take_in(self.order, self.steps)
        self.warnings += network.warnings
        batches, held_out = network.batches, network.held_out
        keeping = kept_units(network.folded, batches.data, self.config, self.warnings.append)
        with self.steps.timed("calibrate"), keeping as kept:
            result = calibrated(
                network.folded,
                batches,
                self.config,
                self.steps.progress.stage,
                kept,
                self.goal,
                network.shared,
                self.order.ranks,
            )
        self.calibrated = result, GraphBatches(network.graph, batches.data)
        self.warnings += calibration_notes(result)
        graph, result, golden, simplifier = self.emitted(network, result)
        check_same(self.order.ranks, "the calibration data", batches.data.digest, SAME_DATA)
        check_same(self.order.ranks, "model.onnx", lambda: sha256_of(self.folder / "model.onnx"), SAME_MACHINES)
        noise = Noise(result)
        proof = self._proved(graph, result.program, noise, held_out or batches, golden, evaluated=held_out is not None)
        if held_out is not None:
            check_same(self.order.ranks, "the evaluation data", held_out.data.digest, SAME_DATA)
        if not self.order.ranks.is_first:
            return None
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

    def costly_layers(self) -> CostlyLayers | None:
        """Return what the layers cost the prediction, and what helps."""
        return advice(*self.calibrated, goal=self.goal, seed=self.config.seed, stage=self.steps.progress.stage)

    def _write_for_later(self, proof: Proof, report: Report) -> None:
        """Write what other machines and later exports are compared with: golden codes, and scores by sample."""
        if proof.accuracy is not None:
            self.scores = proof.accuracy.by_sample
            write_scores(self.folder, self.scores)
        values = proof.golden_values(self.target.rounding_alike)
        assert report.golden is not None and report.emission is not None
        write_golden_set(self.folder, self.model, values, report.golden, report.emission.min_onnxruntime)

    def move_files(self, target: Path) -> None:
        """Put the model, its external data, the reference program and the golden set of codes into the bundle."""
        lowered = [] if self.lowered is None else [self.lowered]
        for path in [
            *self.folder.glob("model.onnx*"),
            *lowered,
            *(self.folder / name for name in (CHECK, SCORES, "golden")),
        ]:
            if path.exists():
                shutil.move(path, target / path.name)

    def emitted(
        self, network: Network, result: CalibrationResult
    ) -> tuple[fx.GraphModule, CalibrationResult, Batch | None, Simplifier]:
        """Write the file and the reference program; return the graph and the result with the ends that the file has.

        Also returns the golden inputs, None for the first samples, and the report of the simplifier.
        """
        self._check_folding(network, result)
        raws = network.raws
        result = with_raw_ends(result, raws, network.coded)
        graph, folded = read_bytes(network.graph, raws), read_bytes(network.folded, raws)
        for each in network.data:
            each.graph, each.data = graph, raws.as_pixels(each.data)
        golden = golden_inputs(self.config.golden, result, network.batches, network.golden, self.config.seed)
        with self.steps.shown("emit"):
            metadata = {
                "version": __version__,
                "config_sha256": self.config.digest(),
                "target": self.config.target,
                "method": self.config.method,
            }
            emit_float(folded, self.float_path)
            exported = export_program(result.program)
            (self.folder / REFERENCE).parent.mkdir()
            save_reference(exported, self.folder / REFERENCE)
            onnx_program = to_onnx(result.program, opset=needed_opset(result), metadata=metadata, exported=exported)
            model, simplifier = self._simplified(result, onnx_program)
            self.interface = self._described(network, graph, model, result.program)
            self._store(model, result.program, graph.meta["size_bounds"])
            if self.lowered is not None:
                self._lower(result.program, self.lowered)
        return graph, result, golden, simplifier

    def _lower(self, program: fx.GraphModule, path: Path) -> None:
        """Write the file that the target's runtime executes, and note what it runs elsewhere.

        raises: ExportError if the program has no such form.
        """
        runtime = get_runtime(self.target.proved_in)
        try:
            outside = runtime.lower(program, path)
        except ModelError as error:
            raise ExportError(f"{path.name} for target {self.target.name!r} cannot be made: {error}") from error
        if outside:
            self.warnings.append(
                f"outside {runtime.name}'s integer kernels, {path.name} runs {counted(len(outside), 'operator')}: "
                f"{', '.join(dict.fromkeys(outside))}"
            )

    def _check_folding(self, network: Network, result: CalibrationResult) -> None:
        """Compare folded network and model, since a proof against the reference program cannot find a wrong fold."""
        if "absorb" not in self.config.prepare:  # which changes outputs a little
            graph = network.graph
            batch = cut(graph, next(iter(network.batches)), COMPARED_SAMPLES)
            for each in (batch, *resized(batch, graph.meta["other_examples"])):
                check_folding(graph, result.placement.graph, each)

    def _described(
        self, network: Network, graph: fx.GraphModule, model: ir.Model, program: fx.GraphModule
    ) -> Interface:
        """Describe the model for those who feed it."""
        grids = program.meta.get("output_codes", {})
        described = model_of(self.order.source, graph, model, network.raws.by_name, grids)
        return replace(described, images=network.images, labels=network.labels)

    def _store(self, model: ir.Model, program: fx.GraphModule, bounds: Mapping[str, Bounds]) -> None:
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
        model.metadata_props[INTERFACE_KEY] = metadata_of(self.interface, bounds)
        save(model, self.folder / "model.onnx")

    def _simplified(self, result: CalibrationResult, model: ir.Model) -> tuple[ir.Model, Simplifier]:
        """Return the model after the guarded simplifier, and the simplifier's report."""
        if not self.config.simplify:
            return model, Simplifier(applied=False, why="switched off")
        with TemporaryFolder() as folder:
            sample = feed(result.program, result.program.meta["example"])
            simpler, report = simplify(with_data_apart(model, folder), sample, folder)
            return without_data_apart(simpler, model) if report.applied else model, report

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
            reference_samples=math.inf if (count := self.config.reference_samples) == "all" else count,
            golden_samples=GOLDEN_SAMPLES if golden is None else 0,
            noise_samples=SQNR_SAMPLES,
            noise=noise,
            float_model=graph if evaluated else None,
            metric=(self.order.metric.name, self.order.metric) if self.order.metric is not None else None,
        )
        runtimes = available_runtimes(self.config.proving_runtimes)
        with self.steps.shown("validate", "compare") as bar:
            proof = Proof(
                self.model,
                program,
                runtimes=runtimes,
                threads=torch.get_num_threads(),
                measured=measured,
                ranks=self.order.ranks,
                lowered=self.lowered,
            )
            if golden is not None and self.order.ranks.is_first:
                proof.add_golden(golden)
                check_outputs(proof.golden[0][1])
            for batch, labels in batches.labelled():
                proof.add(batch, labels)
                bar.advance()
                if proof.is_done:
                    break
            proof.gather()
            if self.order.ranks.is_first and program.meta["free_axes"]:
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
        with self.steps.shown("validate", "measure"):
            parts = machine_parts(proof, program.meta["example"], config.threads)
            timings, batch = self._timings(program, proof)
            size = size_of(self.folder / "model.onnx", self.float_path, self.lowered)
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
            time_s=Times(**self.steps.times),
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
            ladder=record.ladder,
            simplifier=simplifier,
            emission=emission_of(self.model.graph_model),
            golden=proof.golden_outputs(result.placement.target.rounding_alike),
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
        DataSource(each.data.label, each.samples, each.data.digest(), each.data.class_counts())
        for each in (batches, held_out)
        if each
    )
    return DataSources(data, next(iter(evaluated), None), DataSource(source, len(golden[0]), digest_of(golden)))
