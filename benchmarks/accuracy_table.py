"""Tables of the accuracy benchmark: one row per network, bits and method, and geometric means over networks.

Cells are those of `docs/results/*.json`; the page and the terminal show them alike.

Must not know: how runs are measured.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from runs import Results, Run
from scores import Array, standard_error

from calibrators.errors import InputError
from calibrators.grid.metrics import decibels
from calibrators.intervals import ratio

sys.path.append(str(Path(__file__).resolve().parents[1] / "docs"))

from generate import cell, table

NEAREST = "mse"


@dataclass(frozen=True, eq=False)
class Group:
    """The runs of one row, which differ in their seed, and those of nearest rounding to compare them with."""

    results: Results
    runs: Sequence[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @cached_property
    def bits(self) -> str:
        run = self.first
        told = ["uniform taps" * (not run.wide_taps), "per tensor" * run.per_tensor_weights, run.prepare, run.budget]
        return ", ".join(filter(None, [run.bits, *told]))

    @cached_property
    def divergences(self) -> tuple[Array, Array] | None:
        """KL of every sample of the method and of nearest rounding, [n] each, mean over seeds; None if not comparable.

        raises: InputError if they were measured on different samples.
        """
        return None if self.first.method == NEAREST else self._paired([replace(self.first, method=NEAREST, seed=0)])

    @cached_property
    def unprepared(self) -> tuple[Array, Array] | None:
        """The same of the method with and without rewrites of the float graph; None where nothing was rewritten."""
        return self._paired([replace(run, prepare="") for run in self.runs]) if self.first.prepare else None

    def _paired(self, others: Sequence[Run]) -> tuple[Array, Array] | None:
        found, known = (
            mean_over(getattr(self.results.per_sample.get(run.key), "kl", None) for run in runs)
            for runs in (self.runs, others)
        )
        if found is None or known is None or not known.any():
            return None
        if found.shape != known.shape:
            raise InputError(f"{self.first.network} was measured on different samples; start a new file.")
        return found, known


def mean_over(values: Iterable[Array | None]) -> Array | None:
    """Return the mean of arrays, None if any or all are missing."""
    present = list(values)
    known = [each for each in present if each is not None]
    return np.stack(known).mean(axis=0, dtype=np.float64) if known and len(known) == len(present) else None


# Cells ---------------------------------------------------------------------------------------------------------------


def _mean(attribute: str, factor: float = 1.0) -> Callable[[Group], float | None]:
    """Return a cell: the mean of a figure over the seeds."""

    def value(group: Group) -> float | None:
        values = [getattr(run, attribute) for run in group.runs]
        return None if None in values else factor * statistics.fmean(values)

    return value


def _first(attribute: str, factor: float = 1.0) -> Callable[[Group], float | None]:
    """Return a cell: the figure of the first run."""

    def value(group: Group) -> float | None:
        found = getattr(group.first, attribute)
        return None if found is None else factor * found

    return value


def _top1(group: Group) -> Any:
    """Return mean and sample standard deviation over the seeds."""
    values = [100 * run.top1 for run in group.runs if run.top1 is not None]
    if len(values) < 2:
        return values[0] if values else None
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values), "seeds": len(values)}


def _change(group: Group) -> Any:
    """Return top-1 minus that of the float network, with its standard error paired by sample, in points."""
    known = group.results.per_sample
    gain = mean_over(known[run.key].gain for run in group.runs if run.key in known)
    return None if gain is None else {"value": 100 * float(gain.mean()), "error": 100 * standard_error(gain)}


def _ratio(group: Group) -> Any:
    return asdict(ratio([group.divergences])) if group.divergences else None


def _unprepared(group: Group) -> Any:
    return asdict(ratio([group.unprepared])) if group.unprepared else None


def _sqnr(group: Group) -> Any:
    noise = _mean("noise")(group)
    return noise if noise is None else decibels(1.0, noise) if noise else "exact"


def _differing(group: Group) -> str | None:
    """Return how many integers differ, and whose fault it is where any do."""
    run = group.first
    if run.values is None or run.mismatched is None:
        return None
    parts = f" ({run.kernel_mismatched:,} in kernels, {run.float_mismatched:,} after float operators, node by node)"
    return f"{run.mismatched:,} of {run.values:,}{parts if run.mismatched else ''}"


RATIO = {"title": f"KL ratio to `{NEAREST}`", "format": "{:.3f}"}

COLUMNS: tuple[tuple[str, str, Callable[[Group], Any]], ...] = (
    ("network", "{}", lambda group: group.first.network.split(":")[-1]),
    ("bits", "{}", lambda group: group.bits),
    ("method", "{}", lambda group: f"`{group.first.method}`"),
    ("float", "{:.2f} %", _first("float_top1", 100)),
    ("top-1", "{:.2f} %", _top1),
    ("top-1 minus float, points", "{:+.2f}", _change),
    ("agreement", "{:.2f} %", _mean("agreement", 100)),
    ("KL, nats", "{:#.3g}", _mean("kl")),
    (RATIO["title"], RATIO["format"], _ratio),
    ("KL ratio to no rewrite", RATIO["format"], _unprepared),
    ("SQNR", "{:.1f} dB", _sqnr),
    ("mean bits", "{:.2f}", _first("mean_bits")),
    ("file", "{:,.0f} kB", _first("file_bytes", 1e-3)),
    ("time", "{:.1f} s", _mean("seconds")),
    ("per step", "{:.1f} ms", _mean("step_ms")),
    ("to the file", "{:.1f} s", _mean("file_seconds")),
    ("peak memory", "{:,.0f} MiB", _mean("peak_mib")),
    ("latency over float", "{:.2f}", _mean("latency_ratio")),
    ("differing integers", "{}", _differing),
)


# Tables --------------------------------------------------------------------------------------------------------------


Columns = list[dict[str, str]]
Rows = list[list[Any]]


def groups(results: Results, wanted: Callable[[Run], bool] = lambda run: True) -> list[Group]:
    """Return the rows that there are runs for, networks and bits together in the order of their first runs."""
    runs = [run for run in results.runs.values() if wanted(run)]
    networks, settings = (
        {key: rank for rank, key in reversed([*enumerate(map(of, runs))])} for of in (_network, _bits)
    )
    runs.sort(key=lambda run: (networks[_network(run)], settings[_bits(run)]))
    rows: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        rows.setdefault(run.key[:-1], []).append(run)
    return [Group(results, same) for same in rows.values()]


def _network(run: Run) -> str:
    return run.network


def _bits(run: Run) -> tuple[Any, ...]:
    return run.setting[1:]


def main_table(rows: Sequence[Group]) -> tuple[Columns, Rows]:
    """Return columns and cells, without the columns that are empty in all rows."""
    cells = [[make(group) for _, _, make in COLUMNS] for group in rows]
    kept = [index for index in range(len(COLUMNS)) if any(row[index] is not None for row in cells)]
    columns = [{"title": COLUMNS[index][0], "format": COLUMNS[index][1]} for index in kept]
    return columns, [[row[index] for index in kept] for row in cells]


def mean_table(rows: Sequence[Group]) -> tuple[Columns, Rows]:
    """Return the geometric mean over networks of the ratios of divergence, per bits and method."""
    columns = [{"title": "bits"}, {"title": "method"}, {"title": "networks"}]
    pairs: dict[tuple[str, str], list[tuple[Array, Array]]] = {}
    for group in rows:
        if group.divergences:
            pairs.setdefault((group.bits, f"`{group.first.method}`"), []).append(group.divergences)
    cells = [[bits, method, len(each), asdict(ratio(each))] for (bits, method), each in pairs.items()]
    return [*columns, RATIO], cells


def both_tables(rows: Sequence[Group]) -> tuple[Columns, Rows]:
    """Return the main table, with the geometric means over several networks as its last rows."""
    columns, cells = main_table(rows)
    titles = [column["title"] for column in columns]
    for bits, method, networks, value in mean_table(rows)[1]:
        if networks > 1:
            known = {
                "network": f"geometric mean of {networks}",
                "bits": bits,
                "method": method,
                RATIO["title"]: value,
            }
            cells.append([known.get(title) for title in titles])
    return columns, cells


def markdown(columns: Columns, rows: Rows) -> str:
    """Return a table as the documentation shows it."""
    formats = [column.get("format", "{}") for column in columns]
    lines = ([cell(value, form) for value, form in zip(row, formats, strict=True)] for row in rows)
    return str(table([column["title"] for column in columns], lines))
