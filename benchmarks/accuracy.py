"""Accuracy of methods, bits and networks, measured on the emitted file in onnxruntime.

    python benchmarks/accuracy.py zoo.py:repvgg zoo.py:mobilenetv2 --data zoo.py:calibration --eval zoo.py:evaluation \
        --bits 4/4 3/3 2/4 --method mse 'qdrop(iters=1000)' 'brecq(iters=1000)' --json low_bits.json

Prints a markdown table, one row per network, bits (weights/activations; first and last layer keep 8) and method, then
the geometric mean over the networks. Columns that are empty in all rows are left out.

float, top-1              of the folded float graph, and as mean ± sample standard deviation over the seeds; with labels
top-1 minus float         with the standard error of a difference between two networks on the same samples
agreement                 share of the decisions that are those of the float network
KL                        mean over the samples of KL(float || emitted file) of the softmax over the last axis
KL ratio to `mse`         divided by that of nearest rounding, with a 95 % bootstrap interval paired by sample
KL ratio to no rewrite    the same, divided by that of the method without rewrites: --prepare '' migrate
SQNR                      energy of the float outputs divided by that of the difference
time                      seconds of calibration
per step                  milliseconds of a training step: time of all units, caches included, by steps
differing integers        from the reference, on the first images of seed 0

Methods that only search ranges (`mse` is nearest rounding, always measured) draw nothing at random and run once. What
several seeds say of a sample is averaged.

With --budget every layer has bits of its own; `uniform` as a limit is what the uniform bits of the row take:

    --bits 4/4 --budget 'avg_weight_bits<=uniform' 'bops<=uniform'

With --peers, the tools of peers.py quantize the same float file to 8/8 with the same calibration data; their time is
that of the whole tool. All rows then say what they cost:

to the file               seconds from the folded float network, or its file, to the quantized file, without imports
peak memory               how far resident memory rose meanwhile
latency over float        of the file over the float file, one sample on one thread, timed in the same rounds

Without --eval, the last quarter of the calibration batches is held out and judges, without labels. Choose settings that
way, so that evaluation data only reports.

With --json every finished run is in the file at once, and the scores of every sample in an .npz beside it; --resume
goes on after the runs that are there. The file can be put into docs/results as it is.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
from accuracy_table import NEAREST, both_tables, groups, main_table, markdown, mean_table
from evaluated import Network, Samples
from metered import metered
from runs import Results, Run
from scores import PerSample, Scores

from calibrators import CalibrationResult, PlacementOptions, calibrate
from calibrators.errors import InputError, IntactError
from calibrators.grid.metrics import decibels
from calibrators.methods import Method, RangeMethod, get_method
from calibrators.mixed_precision.budgets import Budget
from calibrators.mixed_precision.ilp import Costs
from calibrators.mixed_precision.mixed import network_costs
from calibrators.reconstruction.policy import Reconstruction
from calibrators.rewrites.prepare import check_preparations
from calibrators.targets import DEFAULT_TARGET
from exporter import emit
from exporter.emission.build_model import emit_float
from exporter.emission.packing import STORAGES, stored_bytes
from exporter.frontend.load import load_model
from exporter.progress import Progress, console_progress
from runtime_tests.proof import parity

PARITY_SAMPLES = 256

UNIFORM = "uniform"
"""The limit of a budget that is what uniform bits take."""

NEXT_OPTION = re.compile(r",(?=\s*\w+\s*=)", re.ASCII)
"""Commas between options; others belong to a value, such as groups=2-3,5-6."""
CALL = re.compile(r"(?P<name>\w+)(?:\((?P<options>[^()]*)\))?", re.ASCII)
FILE = re.compile(r".+\.(json|npz|py:[\w.]+)", re.ASCII)
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
    """Return the method that `name` or `name(key=value, ...)` describes.

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
    """Return the bits that `W/A` gives.

    raises: InputError.
    """
    found = WIDTHS.fullmatch(text.strip())
    if found is None:
        raise InputError(f"bits {text!r} cannot be read; write weights/activations, each 2 to 8, for example 4/4.")
    return Widths(int(found[1]), int(found[2]))


def preparations(text: str) -> list[str]:
    """Return the rewrites of the float graph that `NAME,NAME` names.

    raises: UnknownNameError.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    check_preparations(names)
    return names


# One run -------------------------------------------------------------------------------------------------------------


Outcome = tuple[Run, PerSample]


@dataclass(frozen=True)
class Settings:
    """How every run is done."""

    wide_taps: bool
    per_tensor_weights: bool
    prepare: str
    bias_correction: bool
    budget: tuple[str, ...]
    storage: str
    device: str
    target: str
    costs_too: bool

    def placement(self, bits: Widths) -> PlacementOptions:
        """Return where quantizers stand for these bits."""
        return PlacementOptions(
            weight_bits=bits.weight,
            activation_bits=bits.activation,
            wide_taps=self.wide_taps,
            per_tensor_weights=self.per_tensor_weights,
        )

    def budgets(self, network: Network, bits: Widths) -> list[Budget]:
        """Return the budgets as they are for these bits of this network."""
        if not self.budget:
            return []
        batches, how = network.samples.batches, preparations(self.prepare)
        result = calibrate(
            network.graph, batches, method="minmax", target=self.target, placement=self.placement(bits), prepare=how
        )
        uniform = self.costs(result)
        pairs = (text.split("<=") for text in self.budget)
        return [
            Budget(quantity, uniform.of(quantity, {})) if limit == UNIFORM else Budget.parse(f"{quantity}<={limit}")
            for quantity, limit in pairs
        ]

    def run(self, network: Network, bits: str, method: str, seed: int) -> Run:
        """Return a run that was not measured yet."""
        return Run(
            network=network.spec,
            bits=bits,
            method=method,
            wide_taps=self.wide_taps,
            per_tensor_weights=self.per_tensor_weights,
            prepare=self.prepare,
            budget=", ".join(self.budget),
            seed=seed,
        )

    def costs(self, result: CalibrationResult) -> Costs:
        """Return what the bits of a calibrated network cost."""
        return network_costs(result.placement, partial(stored_bytes, storage=self.storage))


def measure(network: Network, bits: Widths, chosen: Candidate, seed: int, how: Settings, progress: Progress) -> Outcome:
    """Calibrate, emit, evaluate; compare integers for seed 0."""
    graph, samples = network.graph, network.samples
    needs_labels = bool(getattr(chosen.method, "needs_labels", False))
    budgets = how.budgets(network, bits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with metered() as spent:
            start = time.perf_counter()
            result = calibrate(
                graph,
                samples.batches,
                method=chosen.method,
                target=how.target,
                placement=how.placement(bits),
                budgets=budgets,
                stored=partial(stored_bytes, storage=how.storage),
                prepare=preparations(how.prepare),
                bias_correction=how.bias_correction,
                labels=samples.labels if needs_labels else None,
                seed=seed,
                device=how.device,
                stage=progress.stage,
            )
            seconds = time.perf_counter() - start
            emit(result, path, weight_storage=how.storage)
        scores = network.scores(path)
        costs = costs_of(network, path, spent.seconds, spent.peak_mib) if how.costs_too else {}
        compared = compare(path, result, samples) if seed == 0 else {}
        size = path.stat().st_size
    run = scored(
        how.run(network, str(bits), chosen.text, seed),
        scores,
        file_bytes=size,
        mean_bits=how.costs(result).of("avg_weight_bits", {}),
        seconds=seconds,
        step_ms=step_ms(result, chosen.method),
        **costs,
        **compared,
    )
    return run, scores.per_sample


def measure_peer(network: Network, name: str, how: Settings) -> Outcome:
    """Quantize the float file with another tool and evaluate.

    raises: peers.PeerError.
    """
    with tempfile.TemporaryDirectory() as folder:
        float_file, path = Path(folder) / "float.onnx", Path(folder) / "model.onnx"
        emit_float(network.graph, float_file)
        made = peers.make(name, float_file, network.samples.batches, path)
        scores, size = network.scores(path), path.stat().st_size
        costs = costs_of(network, path, made.seconds, made.peak_mib)
    empty = how.run(network, peers.BITS, name, 0)
    return scored(empty, scores, file_bytes=size, seconds=made.seconds, tool=made.tool, **costs), scores.per_sample


def costs_of(network: Network, path: Path, seconds: float, peak_mib: float | None) -> dict[str, float | None]:
    """Return what making a file took, and its latency over that of the float file."""
    return {"file_seconds": seconds, "peak_mib": peak_mib, "latency_ratio": network.latency_ratio(path)}


def scored(run: Run, scores: Scores, **figures: Any) -> Run:
    """Return a run with its scores and other figures."""
    kl = None if scores.per_sample.kl is None else float(scores.per_sample.kl.mean(dtype="float64"))
    same = {name: getattr(scores, name) for name in ("float_top1", "top1", "agreement", "noise")}
    return replace(run, kl=kl, **same, **figures)


def compare(path: Path, result: CalibrationResult, samples: Samples) -> dict[str, int]:
    """Compare the file's integers with the reference's, all optimisations on."""
    report = parity(path, result.program, samples.held_out(PARITY_SAMPLES), optimized=True)
    return {name: getattr(report, name) for name in ("values", "mismatched", "kernel_mismatched", "float_mismatched")}


def step_ms(result: CalibrationResult, method: Method) -> float | None:
    """Return the milliseconds that a training step took, None where nothing was trained."""
    if not isinstance(method, Reconstruction):
        return None
    assert result.record.reconstruction is not None
    units = result.record.reconstruction.units
    return 1e3 * sum(unit.seconds or 0.0 for unit in units) / sum(unit.steps or 0 for unit in units)


# All runs ------------------------------------------------------------------------------------------------------------


def benchmark(arguments: argparse.Namespace) -> None:
    """Measure all rows; everything that was typed is checked before the first of them."""
    candidates = list({chosen.text: chosen for chosen in map(candidate, (NEAREST, *arguments.method))}.values())
    bits = list(dict.fromkeys(map(widths, arguments.bits)))
    if arguments.seeds < 1:
        raise InputError(f"--seeds is {arguments.seeds}; at least one run is needed.")
    hows = [
        Settings(
            arguments.wide_taps,
            arguments.per_tensor_weights,
            ",".join(preparations(names)),
            arguments.bias_correction,
            tuple(arguments.budget),
            arguments.weight_storage,
            arguments.device,
            arguments.target,
            bool(arguments.peers),
        )
        for names in arguments.prepare
    ]
    if arguments.peers:
        check_peers(bits, hows[-1])
    threads = str(torch.get_num_threads())
    inputs = {"data": arguments.data, "eval": arguments.eval, "device": arguments.device, "threads": threads}
    if arguments.target != DEFAULT_TARGET:
        inputs["target"] = arguments.target
    if arguments.bias_correction:
        inputs["bias_correction"] = True
    results = Results.open(arguments.json, inputs, resume=arguments.resume, command=command(sys.argv[1:]))
    models = {spec: load_model(spec) for spec in arguments.models}
    samples = Samples.of(arguments.data, arguments.eval)
    progress = console_progress(quiet=arguments.quiet)
    wanted: dict[tuple[Any, ...], Callable[[], Outcome]] = {}
    for network in [Network(spec, model, samples) for spec, model in models.items()]:
        for width, how, chosen in itertools.product(bits, hows, candidates):
            for seed in range(arguments.seeds if chosen.is_random else 1):
                key = how.run(network, str(width), chosen.text, seed).key
                wanted[key] = partial(measure, network, width, chosen, seed, how, progress)
        for name, how in itertools.product(arguments.peers, hows):
            wanted[how.run(network, peers.BITS, name, 0).key] = partial(measure_peer, network, name, how)
    try:
        fill(results, wanted)
    finally:
        show(results, wanted)


def check_peers(bits: Sequence[Widths], how: Settings) -> None:
    """Check that rows of other tools can be compared with those of this project.

    raises: InputError.
    """
    if peers.BITS not in map(str, bits):
        raise InputError(f"--peers quantize to {peers.BITS}; name these --bits too, for something to compare with.")
    if how.prepare or how.bias_correction or how.budget or how.per_tensor_weights or not how.wide_taps:
        raise InputError(
            "--peers know none of --prepare, --bias-correction, --budget, --per-tensor-weights, --no-wide-taps; "
            "leave them out."
        )


def fill(results: Results, wanted: dict[tuple[Any, ...], Callable[[], Outcome]]) -> None:
    """Measure the runs that are missing, and report a tool that fails in one line."""
    for key, run in wanted.items():
        network, bits, *_, method, seed = key
        if key in results.runs:
            continue
        print(f"{network} {bits} {method} seed {seed}", file=sys.stderr, flush=True)
        try:
            outcome = run()
        except peers.PeerError as error:
            print(f"  {error}; left out", file=sys.stderr, flush=True)
            continue
        results.add(*outcome)
        print(f"  {brief(outcome[0])}", file=sys.stderr, flush=True)


def brief(run: Run) -> str:
    """Return the scores of a run in one line, for who waits for the table."""
    parts = [
        None if run.top1 is None else f"top-1 {run.top1:.2%}",
        None if run.kl is None else f"KL {run.kl:.3g}",
        f"SQNR {decibels(1.0, run.noise or 0.0):.1f} dB",
        f"{run.seconds:.1f} s",
    ]
    return ", ".join(filter(None, parts))


def show(results: Results, wanted: Container[tuple[Any, ...]]) -> None:
    """Print the tables of the wanted runs, and keep those of all runs in the file."""
    if rows := groups(results, lambda run: run.key in wanted):
        print(markdown(*main_table(rows)), flush=True)
        means = mean_table(rows)
        if means[1]:
            print(f"\n{markdown(*means)}", flush=True)
    results.show(*both_tables(groups(results)))


def command(arguments: Sequence[str]) -> str:
    """Return the command as documentation shows it, without the folders of files."""
    short = [Path(text).name if FILE.fullmatch(text) else text for text in arguments]
    return shlex.join(["python", "benchmarks/accuracy.py", *short])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="file.py:factory")
    parser.add_argument("--data", required=True, help="file.py:callable of calibration batches")
    parser.add_argument(
        "--eval", help="file.py:callable of batches, with labels for top-1; held out of --data if absent"
    )
    parser.add_argument("--bits", nargs="+", default=["4/4"], help="weights/activations")
    parser.add_argument("--method", nargs="+", default=[NEAREST], help="name or name(key=value, ...)")
    parser.add_argument("--peers", nargs="+", default=[], choices=[*peers.PEERS], help="other tools, on 8/8")
    parser.add_argument("--seeds", type=int, default=3, help="runs of a method that draws at random")
    parser.add_argument(
        "--no-wide-taps", dest="wide_taps", action="store_false", help="all taps of a kernel have the same bits"
    )
    parser.add_argument("--per-tensor-weights", action="store_true", help="one scale per weight tensor")
    parser.add_argument(
        "--prepare", nargs="+", default=[""], help="rewrites of the float graph that come first: '' cle,absorb migrate"
    )
    parser.add_argument("--bias-correction", action="store_true", help="shift biases by the mean error of each layer")
    parser.add_argument("--budget", nargs="+", default=[], help="bits of its own for every layer: bops<=uniform")
    parser.add_argument("--weight-storage", default="auto", choices=[*STORAGES], help="weights of few bits in the file")
    parser.add_argument(
        "--target", default=DEFAULT_TARGET, help="runtime; ort-cpu-vnni sets no limit to pairs of weights"
    )
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what is finished is still printed
    main()
