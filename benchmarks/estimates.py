"""Measure what methods take, in passes of the float network, and compare with what a dry run expects.

    python benchmarks/estimates.py MODEL DATA [method:option=value ...]
    python benchmarks/estimates.py MODEL DATA --eval EVAL

for example with exporter.demo.model:network, exporter.demo.model:calibration and exporter.demo.model:evaluation.
With --eval it is a whole export with the default method, step by step. Times are those of the CPU, with one thread, so
that other processes hardly matter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from types import SimpleNamespace

import torch

from calibrators.methods import get_method
from exporter import intake
from exporter.config import assignment, make_config
from exporter.dry_run import dry_run, seconds_per_sample
from exporter.intake import Steps, open_order, take_in
from exporter.pipeline import export
from exporter.progress import Progress
from exporter.run_calibrators import calibrated

METHODS = ("minmax", "mse", "gptq", "lapq:max_evals=30", "adaround:iters=30", "qdrop:iters=30", "pdquant:iters=30")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--eval")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.eval is not None:
        whole_export(given.model, given.data, given.eval)
        return
    order = open_order(given.model, given.data, None, None, None, config=make_config({}), metric=None, source="")
    network = take_in(order, Steps(Progress()))
    samples = sum(len(batch[0]) for batch in network.batches)
    once = seconds_per_sample(network)
    print(f"{samples} samples, {1000 * once:.3g} ms each\n{'method':24} {'seconds':>8} {'passes':>8} {'expected':>8}")
    for text in given.methods:
        name, _, rest = text.partition(":")
        config = make_config({"method": name, "options": dict(map(assignment, filter(None, rest.split(","))))})
        start = time.process_time()
        calibrated(network.folded, network.batches, config, Progress().stage)
        seconds = time.process_time() - start
        expected = get_method(name, config.options).effort(samples) / samples
        print(f"{text:24} {seconds:8.2f} {seconds / once / samples:8.1f} {expected:8.1f}", flush=True)


def whole_export(model: str, data: str, evaluation: str) -> None:
    """Print for each step the seconds that a dry run expects, and those that it takes."""
    intake.time = SimpleNamespace(perf_counter=time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        expected = asdict(dry_run(model, data, eval_data=evaluation).time_s)
        took = export(model, data, eval_data=evaluation, out=f"{folder}/out")["time_s"]
    print(f"{'step':12} {'expected':>8} {'took':>8}")
    for name, seconds in took.items():
        print(f"{name:12} {expected[name]:8.2f} {seconds:8.2f}")


if __name__ == "__main__":
    main()
