"""The results of a sweep as JSON, as a Markdown text and as an HTML page, beside the bundles.

Must not know: how results are found, terminals.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import jinja2
from markupsafe import Markup

from exporter.reporting.markdown import escaped, markdown_table
from exporter.reporting.plots import Place, pareto_plot
from exporter.reporting.schema import dump_json
from exporter.reporting.templates import environment
from exporter.sweeping.plan import Sweep
from exporter.sweeping.results import PAGE, Gathered, Quality, Result, failed, main_table, summary

__all__ = ["html_page", "markdown_page", "write_tables"]

NAMES = ("sweep.json", "sweep.md", "sweep.html")


def write_tables(sweep: Sweep, found: Gathered) -> tuple[Path, ...]:
    """Write the table into the folder of the bundles, in every form; return the files."""
    title = str(sweep.out)
    texts = (dump_json(asdict(found)), markdown_page(title, found), html_page(title, found))
    sweep.out.mkdir(parents=True, exist_ok=True)
    paths = tuple(sweep.out / name for name in NAMES)
    for path, text in zip(paths, texts, strict=True):
        aside = path.with_name(f"{path.name}.{os.getpid()}.partial")  # two sweeps may end at once
        try:
            aside.write_text(text, encoding="utf-8")
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
    return paths


def markdown_page(title: str, found: Gathered) -> str:
    """Return the results in GitHub's Markdown."""
    parts = [f"# Sweep {escaped(title)}", "\n".join(f"- {escaped(sentence)}" for sentence in summary(found))]
    sections = [each for each in (main_table(found), failed(found)) if each.rows]
    parts += [f"## {each.title}\n\n{markdown_table(each.columns, each.rows)}" for each in sections]
    return "\n\n".join(parts) + "\n"


def html_page(title: str, found: Gathered) -> str:
    """Return the results as one HTML file without a script; rows link to the reports of the bundles."""
    pages = environment(autoescape=True, undefined=jinja2.StrictUndefined)
    verdicts = {each.state for each in found.results}
    return pages.get_template("sweep.html.j2").render(
        title=title,
        summary=summary(found),
        figures=[*_figures(found)],
        table_of_jobs=main_table(found),
        links=[f"{each.bundle}/{PAGE}" if each.bundle else None for each in found.results],
        failed=failed(found),
        verdict="pass" if verdicts == {"pass"} else "fail",
    )


def _figures(found: Gathered) -> Iterator[tuple[str, Markup]]:
    """Yield title and plot of quality over size and over latency, for each network if only its results compare."""
    quality = found.judged_by
    if quality is None:
        return
    networks = dict.fromkeys(each.network if quality.of_float else "" for each in found.results)
    for network in networks:
        here = [each for each in found.results if not quality.of_float or each.network == network]
        for field, title, scale in (("size_bytes", "size, MB", 1e-6), ("latency_ms", "latency, ms", 1.0)):
            places = [_place(found, each, field, scale, quality) for each in here]
            plot = pareto_plot(
                [each for each in places if each is not None],
                (title, quality.title),
                logarithmic=not quality.higher_is_better,
                salt=f"intact-sweep-{network}-{field}",
            )
            if plot:
                yield f"{quality.name} over {title.partition(',')[0]}{': ' * bool(network)}{network}", plot


def _place(found: Gathered, result: Result, field: str, scale: float, quality: Quality) -> Place | None:
    cost, value = getattr(result, field), quality.value(result)
    if cost is None or value is None:
        return None
    ends = result.latency_interval if field == "latency_ms" and result.latency_interval else (cost, cost)
    return Place(
        str(found.number(result.key)), cost * scale, value * quality.scale, (ends[0] * scale, ends[1] * scale),
        is_front=result.dominated_by is None,
    )  # fmt: skip
