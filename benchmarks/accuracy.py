"""Accuracy of methods, bits and networks, measured on the emitted file in onnxruntime.

    python benchmarks/accuracy.py zoo.py:repvgg zoo.py:mobilenetv2 --data zoo.py:calibration --eval zoo.py:evaluation \
        --bits 4/4 3/3 2/4 --method mse 'qdrop(iters=1000)' 'brecq(iters=1000)' --json low_bits.json

Prints a markdown table, one row per network, bits (weights/activations; first and last layer keep 8) and method:
top-1 as mean ± sample standard deviation over the seeds; seconds of calibration; milliseconds per training step (time
of all units, caches included, by steps); integers that differ from the reference on the first images of seed 0. Methods
that only search ranges (`mse` is nearest rounding, always measured) draw nothing at random and run once.

With --budget every layer has bits of its own; `uniform` as a limit is what the uniform bits of the row take:

    --bits 4/4 --budget 'avg_weight_bits<=uniform' 'bops<=uniform'

With --json every finished run is in the file at once; --resume goes on behind the runs that are there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from calibrators import CalibrationResult, PlacementOptions, calibrate
from calibrators.errors import InputError, IntactError
from calibrators.methods import Method, RangeMethod, get_method
from calibrators.mixed_precision.budgets import Budget
from calibrators.mixed_precision.ilp import Costs
from calibrators.mixed_precision.mixed import network_costs
from calibrators.reconstruction.policy import Reconstruction
from calibrators.rewrites.prepare import check_preparations
from exporter import capture, emit, fold
from exporter.emission.packing import STORAGES, stored_bytes
from exporter.frontend.load import Model, load_model
from exporter.inputs.data import Batch, Data
from exporter.inputs.open import open_data
from exporter.progress import Progress, console_progress
from runtime_tests.ort.sessions import session
from runtime_tests.proof import parity

PARITY_SAMPLES = 256
NEAREST = "mse"
COLUMNS = (
    "network", "bits", "mean bits", "file", "float", "nearest", "method", "top-1", "seeds", "calibration", "per step",
    "differing integers",
)  # fmt: skip

UNIFORM = "uniform"
"""The limit of a budget that is what uniform bits take."""

NEXT_OPTION = re.compile(r",(?=\s*\w+\s*=)", re.ASCII)
"""Commas between options; others belong to a value, such as groups=2-3,5-6."""
CALL = re.compile(r"(?P<name>\w+)(?:\((?P<options>[^()]*)\))?", re.ASCII)
WIDTHS = re.compile(r"([2-8])/([2-8])", re.ASCII)


# What is asked for ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A method with its options; `text` names it in the table and in the file."""

    text: str
    method: Method

    @property
    def is_random(self) -> bool:
        return not isinstance(self.method, RangeMethod)


@dataclass(frozen=True)
class Widths:
    """Bits of weights and activations."""

    weight: int
    activation: int

    def __str__(self) -> str:
        return f"{self.weight}/{self.activation}"


def candidate(text: str) -> Candidate:
    """The method that `name` or `name(key=value, ...)` describes.

    raises: InputError, UnknownNameError.
    """
    found = CALL.fullmatch(text.strip())
    pairs = [part.partition("=") for part in NEXT_OPTION.split(found["options"] or "") if part.strip()] if found else []
    options = {key.strip(): value.strip() for key, _, value in pairs}
    if found is None or len(options) < len(pairs) or not all(k.isidentifier() and v for k, v in options.items()):
        raise InputError(f"method {text!r} cannot be read; write name or name(key=value, ...), each key once.")
    inside = ", ".join(f"{key}={value}" for key, value in options.items())
    return Candidate(f"{found['name']}({inside})" if inside else found["name"], get_method(found["name"], options))


def widths(text: str) -> Widths:
    """The bits that `W/A` gives.

    raises: InputError.
    """
    found = WIDTHS.fullmatch(text.strip())
    if found is None:
        raise InputError(f"bits {text!r} cannot be read; write weights/activations, each 2 to 8, for example 4/4.")
    return Widths(int(found[1]), int(found[2]))


def preparations(text: str) -> list[str]:
    """The rewrites of the float graph that `NAME,NAME` names.

    raises: UnknownNameError.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    check_preparations(names)
    return names


# One network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Samples:
    """Calibration and evaluation data, and where the work is shown.

    batches, labels: calibration inputs, and int64 [samples] or None; read once, for all runs.
    """

    evaluation: Data
    batches: list[tuple[Tensor, ...]]
    labels: Tensor | None

    @classmethod
    def of(cls, data: str, evaluation: str) -> Samples:
        """The data that two specifications name.

        raises: DataError.
        """
        held_out = open_data(evaluation).with_labels()
        held_out.example()
        batches = list(open_data(data))
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return cls(held_out, [batch.inputs for batch in batches], torch.cat(labels) if labels else None)

    def held_out(self, samples: int) -> Iterator[tuple[Tensor, ...]]:
        """Inputs of the first `samples` evaluation samples."""
        for batch in self.evaluation:
            yield tuple(x[:samples] for x in batch.inputs)
            samples -= len(batch)
            if samples <= 0:
                return


@dataclass(frozen=True, eq=False)
class Network:
    """A model and its folded graph, made when first needed."""

    spec: str
    model: Model
    samples: Samples

    @cached_property
    def graph(self) -> fx.GraphModule:
        graph = capture(self.model, self.samples.batches[0])
        if not graph.meta["dynamic_batch"]:
            raise InputError(f"{self.spec} fixes its batch size; this benchmark needs networks that take any.")
        return fold(graph)

    @cached_property
    def float_top1(self) -> float:
        """Accuracy of the folded float graph."""
        with torch.no_grad():
            return top1((self.graph(*batch.inputs)[0].numpy(), batch) for batch in self.samples.evaluation)

    def runtime_top1(self, path: Path) -> float:
        """Accuracy of the file at `path` in onnxruntime, all optimisations on."""
        runtime = session(path, optimized=True, threads=torch.get_num_threads())
        names = [info.name for info in runtime.get_inputs()]

        def outputs(batch: Batch) -> Any:
            return runtime.run(None, {name: x.numpy() for name, x in zip(names, batch.inputs, strict=True)})[0]

        return top1((outputs(batch), batch) for batch in self.samples.evaluation)


def top1(answers: Iterator[tuple[Any, Batch]]) -> float:
    """Share of the samples whose largest output, [n, classes], is that of the label."""
    hits = samples = 0
    for outputs, batch in answers:
        assert batch.labels is not None
        hits += int(np.sum(outputs.argmax(1) == batch.labels.numpy()))
        samples += len(batch)
    return hits / samples


# One run -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One network calibrated once.

    float_top1, top1: of the float graph and of the emitted file; seconds: of calibration; step_ms: per training step.
    budget:           limit within which layers have bits of their own; mean_bits: of all weights.
    values:           integers compared with the reference, None where they were not; mismatched: how many differ,
                      kernel_mismatched: by the fault of an integer kernel, float_mismatched: of a float operator.
    """

    network: str
    bits: str
    method: str
    wide_taps: bool
    per_tensor_weights: bool
    seed: int
    float_top1: float
    top1: float
    seconds: float
    step_ms: float | None = None
    values: int | None = None
    mismatched: int | None = None
    kernel_mismatched: int | None = None
    float_mismatched: int | None = None
    prepare: str = ""
    budget: str = ""
    file_bytes: int | None = None
    mean_bits: float | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        how = (self.wide_taps, self.per_tensor_weights, self.prepare, self.budget)
        return (self.network, self.bits, self.method, *how, self.seed)


@dataclass(frozen=True)
class Settings:
    """How every run is done."""

    wide_taps: bool
    per_tensor_weights: bool
    prepare: str
    budget: tuple[str, ...]
    storage: str
    device: str

    def placement(self, bits: Widths) -> PlacementOptions:
        """Where quantizers stand for these bits."""
        return PlacementOptions(
            weight_bits=bits.weight,
            activation_bits=bits.activation,
            wide_taps=self.wide_taps,
            per_tensor_weights=self.per_tensor_weights,
        )

    def budgets(self, network: Network, bits: Widths) -> list[Budget]:
        """The budgets as they are for these bits of this network."""
        if not self.budget:
            return []
        batches, how = network.samples.batches, preparations(self.prepare)
        result = calibrate(network.graph, batches, method="minmax", placement=self.placement(bits), prepare=how)
        uniform = self.costs(result)
        pairs = (text.split("<=") for text in self.budget)
        return [
            Budget(quantity, uniform.of(quantity, {})) if limit == UNIFORM else Budget.parse(f"{quantity}<={limit}")
            for quantity, limit in pairs
        ]

    def costs(self, result: CalibrationResult) -> Costs:
        """What the bits of a calibrated network cost."""
        return network_costs(result.placement, partial(stored_bytes, storage=self.storage))


def measure(network: Network, bits: Widths, chosen: Candidate, seed: int, how: Settings, progress: Progress) -> Run:
    """Calibrate, emit, evaluate; compare integers for seed 0."""
    graph, samples = network.graph, network.samples
    needs_labels = bool(getattr(chosen.method, "needs_labels", False))
    budgets = how.budgets(network, bits)
    start = time.perf_counter()
    result = calibrate(
        graph,
        samples.batches,
        method=chosen.method,
        placement=how.placement(bits),
        budgets=budgets,
        stored=partial(stored_bytes, storage=how.storage),
        prepare=preparations(how.prepare),
        labels=samples.labels if needs_labels else None,
        seed=seed,
        device=how.device,
        stage=progress.stage,
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        emit(result, path, weight_storage=how.storage)
        reached = network.runtime_top1(path)
        compared = compare(path, result, samples) if seed == 0 else {}
        size = path.stat().st_size
    return Run(
        network=network.spec,
        bits=str(bits),
        method=chosen.text,
        wide_taps=how.wide_taps,
        per_tensor_weights=how.per_tensor_weights,
        prepare=how.prepare,
        budget=", ".join(how.budget),
        file_bytes=size,
        mean_bits=how.costs(result).of("avg_weight_bits", {}),
        seed=seed,
        float_top1=network.float_top1,
        top1=reached,
        seconds=seconds,
        step_ms=step_ms(result, chosen.method),
        **compared,
    )


def compare(path: Path, result: CalibrationResult, samples: Samples) -> dict[str, int]:
    """The file's integers against the reference's, all optimisations on."""
    report = parity(path, result.program, samples.held_out(PARITY_SAMPLES), optimized=True)
    return {name: getattr(report, name) for name in ("values", "mismatched", "kernel_mismatched", "float_mismatched")}


def step_ms(result: CalibrationResult, method: Method) -> float | None:
    """Milliseconds that a training step took, None where nothing was trained."""
    if not isinstance(method, Reconstruction):
        return None
    assert result.record.reconstruction is not None
    units = result.record.reconstruction.units
    return 1e3 * sum(unit.seconds or 0.0 for unit in units) / sum(unit.steps or 0 for unit in units)


# All runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    """Finished runs, in the file as soon as they are here.

    inputs: what all runs of the file have in common.
    """

    path: Path | None
    inputs: dict[str, str]
    runs: dict[tuple[Any, ...], Run] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, inputs: dict[str, str], *, resume: bool) -> Results:
        """An empty collection, or what `path` holds.

        raises: InputError when a file would be lost, is none of these, or was measured on other data.
        """
        if resume and path is None:
            raise InputError("--resume goes on with a file; name it with --json.")
        if path is not None and not path.parent.is_dir():
            raise InputError(f"the folder {path.parent} does not exist; make it, or write {path.name} elsewhere.")
        if path is None or not path.exists():
            return cls(path, inputs)
        if not resume:
            raise InputError(f"{path} exists; give --resume to go on with it, or another file.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, runs = content["inputs"], [Run(**run) for run in content["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} holds no results of this benchmark ({error}); name another file.") from error
        if found != inputs:
            raise InputError(f"{path} was measured with {found}, asked for is {inputs}; name another file.")
        return cls(path, inputs, {run.key: run for run in runs})

    def add(self, run: Run) -> None:
        """Keep a run, on disk too."""
        self.runs[run.key] = run
        if self.path is None:
            return
        content = {"inputs": self.inputs, "environment": environment(), "runs": [asdict(r) for r in self.runs.values()]}
        aside = self.path.with_name(f"{self.path.name}.tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self.path)


def environment() -> dict[str, str]:
    """Versions of what computes."""
    return {name: importlib.metadata.version(name) for name in ("torch", "onnxruntime")}


def row(runs: Sequence[Run], nearest: float) -> str:
    """The line of one network, bits and method."""
    first, reached = runs[0], [run.top1 for run in runs]
    spread = f" ± {100 * statistics.stdev(reached):.2f}" if len(runs) > 1 else ""
    told = ["uniform taps" * (not first.wide_taps), "per tensor" * first.per_tensor_weights]
    cells = [
        first.network.split(":")[-1],
        ", ".join(filter(None, [first.bits, *told, first.prepare, first.budget])),
        "" if first.mean_bits is None else f"{first.mean_bits:.2f}",
        "" if first.file_bytes is None else f"{first.file_bytes / 1e3:,.0f} kB",
        f"{first.float_top1:.2%}",
        f"{nearest:.2%}",
        first.method,
        f"{100 * statistics.fmean(reached):.2f}{spread} %",
        f"{len(runs)}",
        f"{statistics.fmean(run.seconds for run in runs):.1f} s",
        "" if first.step_ms is None else f"{statistics.fmean(run.step_ms or 0.0 for run in runs):.1f} ms",
        differing(first),
    ]
    return "| " + " | ".join(cells) + " |"


def differing(run: Run) -> str:
    """How many integers differ, and whose fault it is where any do."""
    if run.values is None or run.mismatched is None:
        return ""
    parts = f" ({run.kernel_mismatched:,} in kernels, {run.float_mismatched:,} after float operators, node by node)"
    return f"{run.mismatched:,} of {run.values:,}{parts if run.mismatched else ''}"


def benchmark(arguments: argparse.Namespace) -> None:
    """All rows; everything that was typed is checked before the first of them."""
    candidates = {chosen.text: chosen for chosen in map(candidate, (NEAREST, *arguments.method))}
    bits = list(dict.fromkeys(map(widths, arguments.bits)))
    if arguments.seeds < 1:
        raise InputError(f"--seeds is {arguments.seeds}; at least one run is needed.")
    prepare = ",".join(preparations(arguments.prepare))
    threads = str(torch.get_num_threads())
    inputs = {"data": arguments.data, "eval": arguments.eval, "device": arguments.device, "threads": threads}
    results = Results.open(arguments.json, inputs, resume=arguments.resume)
    models = {spec: load_model(spec) for spec in arguments.models}
    samples = Samples.of(arguments.data, arguments.eval)
    networks = [Network(spec, model, samples) for spec, model in models.items()]
    how = Settings(
        arguments.wide_taps,
        arguments.per_tensor_weights,
        prepare,
        tuple(arguments.budget),
        arguments.weight_storage,
        arguments.device,
    )
    progress = console_progress(quiet=arguments.quiet)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for network, width, chosen in itertools.product(networks, bits, candidates.values()):

        def key(method: str, seed: int, spec: str = network.spec, width: Widths = width) -> tuple[Any, ...]:
            return (
                spec,
                str(width),
                method,
                how.wide_taps,
                how.per_tensor_weights,
                how.prepare,
                ", ".join(how.budget),
                seed,
            )

        keys = [key(chosen.text, seed) for seed in range(arguments.seeds if chosen.is_random else 1)]
        for seed, wanted in enumerate(keys):
            if wanted not in results.runs:
                print(f"{network.spec} {width} {chosen.text} seed {seed}", file=sys.stderr, flush=True)
                results.add(measure(network, width, chosen, seed, how, progress))
        nearest = results.runs[key(NEAREST, 0)]
        print(row([results.runs[done] for done in keys], nearest.top1), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="file.py:factory")
    parser.add_argument("--data", required=True, help="file.py:callable of calibration batches")
    parser.add_argument("--eval", required=True, help="file.py:callable of labelled batches")
    parser.add_argument("--bits", nargs="+", default=["4/4"], help="weights/activations")
    parser.add_argument("--method", nargs="+", default=[NEAREST], help="name or name(key=value, ...)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a method that draws at random")
    parser.add_argument(
        "--no-wide-taps", dest="wide_taps", action="store_false", help="all taps of a kernel have the same bits"
    )
    parser.add_argument("--per-tensor-weights", action="store_true", help="one scale per weight tensor")
    parser.add_argument("--prepare", default="", help="rewrites of the float graph that come first: cle,absorb")
    parser.add_argument("--budget", nargs="+", default=[], help="bits of its own for every layer: bops<=uniform")
    parser.add_argument("--weight-storage", default="auto", choices=[*STORAGES], help="weights of few bits in the file")
    parser.add_argument("--device", default="cpu", help="where methods that train do so")
    parser.add_argument("--json", type=Path, help="file of all runs")
    parser.add_argument("--resume", action="store_true", help="keep the runs that the file holds")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    try:
        benchmark(parser.parse_args())
    except IntactError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
