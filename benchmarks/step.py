"""Time one reconstruction step: the engine against the same QDrop step in plain eager PyTorch (eager.py).

    python benchmarks/step.py zoo.py:mobilenetv2 --data zoo.py:calibration [--units 0 3 8] [--steps 20] [--bits 4/4]

The engine runs its own loop over the whole network; after each of its steps the baseline takes one on the same unit,
and the two are timed in turn: medians, at 1 and at 2 threads. Both act on the same minibatch size, sites and grids; the
rounding regularizer is on in all steps. The engine trains biases too, the baseline does not.

`same forward` compares what both compute before the first step when nothing is dropped: relative root mean square
difference of the unit's outputs for one minibatch, in float64, where no sum ends on the other side of a rounding tie
because its terms were added in another order.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from accuracy import Widths, widths
from eager import EagerUnit, given
from torch import Tensor, nn

from calibrators import PlacementOptions, calibrate
from calibrators.errors import InputError, IntactError
from calibrators.execution.quantizers import ActivationQuantizer, Rounding
from calibrators.execution.simulation import Simulation
from calibrators.grid.spec import QParams
from calibrators.methods.qdrop import QDrop
from calibrators.reconstruction.reconstruct import Run
from calibrators.reconstruction.training import Unit
from exporter import capture, fold
from exporter.frontend.load import load_model
from exporter.inputs.open import open_data

BATCH, KEEP = 32, 0.5
WARM = 3
"""Warm-up rounds at every number of threads."""

TOLERANCE = 1e-9
"""Legal relative difference of the two forward passes in float64: far below one changed code among the millions of a
minibatch, far above rounding errors."""

QUIET = 1.5
"""Load average of the machine before the benchmark above which times are provisional."""


@dataclass
class Times:
    """Milliseconds per step by number of threads, and the difference of the forward passes."""

    name: str
    layers: int
    difference: float
    ours: dict[int, list[float]] = field(default_factory=dict)
    eager: dict[int, list[float]] = field(default_factory=dict)


class Enough(Exception):
    """The last requested unit is done."""


class Race:
    """Follows the engine's loop as its progress bar, and takes the steps of the baseline in between.

    group: steps per time measurement: one on a CPU, several on a device that works asynchronously.
    """

    def __init__(self, units: Sequence[int], rounds: int, threads: Sequence[int], device: torch.device) -> None:
        self.units, self.threads, self.device = units, threads, device
        self.group = 1 if device.type == "cpu" else max(1, rounds // 4)
        self.rounds = max(1, rounds // self.group)
        self.finished: list[Times] = []
        self.seen = 0
        self.eager: EagerUnit | None = None
        self.round = self.pending = 0
        self.start = 0.0

    @property
    def iters(self) -> int:
        """Number of steps that the engine has to take per unit."""
        return self.group * (WARM + self.rounds) * len(self.threads)

    def begin(self, unit: Unit, run: Run) -> None:
        """Prepare the baseline of `unit`, which the engine is about to train.

        raises: InputError for a unit number that does not exist; Enough if all units are done.
        """
        for number in self.units:
            if not 0 <= number < len(run.blocks):
                raise InputError(f"there is no unit {number}; the network has {len(run.blocks)} units, counted from 0.")
        if self.units and self.seen > max(self.units):
            raise Enough
        number, self.seen = self.seen, self.seen + 1
        self.eager, self.round, self.pending = None, 0, 0
        if not self.units or number in self.units:
            difference = forward_difference(unit, run)
            self.finished.append(Times(unit.block.name, len(unit.weights), difference))
            self.eager = EagerUnit(unit, run, batch=min(BATCH, len(unit.inputs[0])), keep=KEEP)
            print(f"unit {number} {unit.block.name}", file=sys.stderr, flush=True)
        torch.set_num_threads(self.threads[0])
        self.start = self._now()

    def advance(self, steps: int = 1) -> None:
        """Record that the engine took `steps`; let the baseline take as many and time both."""
        self.pending += steps
        if self.eager is None or self.pending < self.group:
            return
        middle = self._now()
        for _ in range(self.pending):
            self.eager.step()
        end = self._now()
        number, place = divmod(self.round, WARM + self.rounds)
        if place >= WARM:
            times, threads = self.finished[-1], self.threads[number]
            times.ours.setdefault(threads, []).append(1e3 * (middle - self.start) / self.pending)
            times.eager.setdefault(threads, []).append(1e3 * (end - middle) / self.pending)
        self.round, self.pending = self.round + 1, 0
        if self.round % (WARM + self.rounds) == 0:
            torch.set_num_threads(self.threads[(number + 1) % len(self.threads)])
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Race | Silent]:
        """Open a stage of the engine's progress: the race for training, a silent bar for anything else."""
        yield self if name == "reconstruct" else Silent()


class Silent:
    """A progress bar that shows nothing."""

    def advance(self, steps: int = 1) -> None:
        pass


@torch.no_grad()
def forward_difference(unit: Unit, run: Run) -> float:
    """Return the relative difference of engine and baseline outputs before training, without drop, in float64."""
    exact = in_float64(unit, run)
    index = torch.arange(min(BATCH, len(unit.inputs[0])))
    inputs = [cache.gather(index).to(run.device).double() for cache in unit.inputs]
    if exact.weights:
        rounding = Rounding(*zip(*exact.weights.values(), strict=True))
        rounding.soften()
        for name, weight in zip(exact.weights, rounding.weights, strict=True):
            exact.simulation.set(name, weight)
    for quantizer in exact.simulation.quantizers.values():
        quantizer.learn(None, scale=False)
    eager = EagerUnit(exact, run, batch=len(index), keep=1.0)
    eager.network.double()
    for name, value in given(exact, run).items():
        exact.simulation.set(name, value.double())
        eager.network.set(name, value.double())
    ours = [exact.simulation(*inputs)[i] for i in unit.supervised]
    theirs = eager.forward([x.contiguous() for x in inputs])
    return max(relative(y, other) for y, other in zip(ours, theirs, strict=True))


def in_float64(unit: Unit, run: Run) -> Unit:
    """Return the unit with quantizers, weights and biases in float64; its caches stay as they are."""

    def double(grid: QParams) -> QParams:
        return replace(grid, scale=grid.scale.double())

    quantizers = {
        name: ActivationQuantizer(double(q.qparams), nonnegative=q.nonnegative)
        for name, q in unit.simulation.quantizers.items()
    }
    return replace(
        unit,
        simulation=Simulation(run.placement, run.boundary, unit.block, quantizers).to(run.device).double(),
        weights={name: (weight.double(), double(grid)) for name, (weight, grid) in unit.weights.items()},
        biases={name: bias.double() for name, bias in unit.biases.items()},
    )


def relative(y: Tensor, other: Tensor) -> float:
    return float((y - other).norm() / other.norm().clamp(min=1e-30))


def watched(race: Race) -> QDrop:
    """Return the method, which announces every unit to the race; learning rates are those of its default preset."""

    class Watched(QDrop):
        def prepare(self, unit: Unit, run: Run) -> Unit:
            unit = super().prepare(unit, run)
            race.begin(unit, run)
            return unit

    default = QDrop().settings()
    return Watched(
        iters=race.iters,
        batch=BATCH,
        lr=default.lr,
        scale_lr=default.scale_lr,
        bias_lr=default.bias_lr,
        warmup=0.0,
        keep=KEEP,
    )


def table(units: Sequence[Times], threads: Sequence[int]) -> str:
    """Return the table of medians and ratios, with a row for the sum over the units."""
    sides = [f"{side}{n}" for n in threads for side in ("engine x", "eager x", "ratio x")]
    lines = [f"| unit | layers | same forward | {' | '.join(sides)} |", f"|{'---|' * (3 + len(sides))}"]
    sums = dict.fromkeys([(side, n) for n in threads for side in ("ours", "eager")], 0.0)
    for unit in units:
        cells = [unit.name, f"{unit.layers}", f"{unit.difference:.0e}"]
        for n in threads:
            ours, eager = statistics.median(unit.ours[n]), statistics.median(unit.eager[n])
            sums["ours", n] += ours
            sums["eager", n] += eager
            cells += pair(ours, eager)
        lines.append(f"| {' | '.join(cells)} |")
    total = [cell for n in threads for cell in pair(sums["ours", n], sums["eager", n])]
    layers, worst = sum(unit.layers for unit in units), max(unit.difference for unit in units)
    return "\n".join([*lines, f"| all {len(units)} | {layers} | {worst:.0e} | {' | '.join(total)} |"])


def pair(ours: float, eager: float) -> list[str]:
    return [f"{ours:.2f} ms", f"{eager:.2f} ms", f"{eager / ours:.2f}"]


def benchmark(arguments: argparse.Namespace) -> None:
    """Run the benchmark on one network and print its table."""
    load = os.getloadavg()[0]
    if arguments.steps < 1 or min(arguments.threads) < 1:
        raise InputError("--steps and --threads must be at least 1.")
    bits: Widths = widths(arguments.bits)
    model = load_model(arguments.model)
    assert isinstance(model, nn.Module)
    batches = [batch.inputs for batch in open_data(arguments.data)]
    graph = fold(capture(model, batches[0]))
    threads = list(dict.fromkeys(arguments.threads)) if arguments.device == "cpu" else [torch.get_num_threads()]
    race = Race(arguments.units, arguments.steps, threads, torch.device(arguments.device))
    options = PlacementOptions(weight_bits=bits.weight, activation_bits=bits.activation)
    torch.manual_seed(0)
    with suppress(Enough):
        calibrate(graph, batches, method=watched(race), placement=options, device=arguments.device, stage=race.stage)
    print(table(race.finished, threads))
    print(f"\nload before {load:.1f}{': the machine was busy, times are provisional' if load > QUIET else ''}")
    if any(not times.difference < TOLERANCE for times in race.finished):
        raise SystemExit(
            f"error: the forward passes differ by more than {TOLERANCE:g}, so the steps are not comparable."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file.py:factory")
    parser.add_argument("--data", required=True, help="file.py:callable of calibration batches")
    parser.add_argument("--units", nargs="*", type=int, default=[], help="numbers of units, from 0; all if left out")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bits", default="4/4", help="weights/activations")
    parser.add_argument("--device", default="cpu")
    try:
        benchmark(parser.parse_args())
    except IntactError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error


if __name__ == "__main__":
    main()
