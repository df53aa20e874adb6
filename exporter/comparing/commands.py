"""The commands that compare: `intact compare` and `intact compare-dump`.

Must not know: how differences are found.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from calibrators.errors import InputError
from exporter.console import check_folder_of, print_json, print_table, reported_errors
from exporter.flags import Debug, Json, option

if TYPE_CHECKING:
    from exporter.reporting.difference import Difference

__all__ = ["compare", "compare_dump"]


def compare(  # noqa: PLR0913 (a command's arguments are its flags)
    old: Annotated[Path, typer.Argument(metavar="OLD", help="The earlier bundle.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The later bundle.")],
    gate: Annotated[
        list[str] | None,
        option(
            "Condition for exit code 0; repeatable: `baseline_size<=1.05`, `baseline_drop<=0.5pp`.",
            "--gate",
            metavar="EXPR",
        ),
    ] = None,
    markdown: Annotated[
        Path | None, option("Write the comparison as Markdown too.", "--markdown", metavar="FILE")
    ] = None,
    html: Annotated[Path | None, option("Write it as a page too.", "--html", metavar="FILE")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two exports: accuracy by sample, size, latency, layers, settings, origins.

    Accuracy is compared sample by sample where both were evaluated on the same data. The exit code is 1 if a --gate
    fails.

    Example: [bold]intact compare build/main build/branch --gate 'baseline_drop<=0.5pp'[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.comparing.compare import compare as differences
        from exporter.comparing.compare import read_export
        from exporter.comparing.pages import html_page, markdown_page
        from exporter.reporting.gates import check_measurable, evaluate, needs_baseline, parse

        for path in (markdown, html):
            if path is not None:
                check_folder_of(path)
        gates = [parse(expression) for expression in gate or ()]
        for each in gates:
            if not needs_baseline(each):
                raise InputError(
                    f"gate {each.expression!r} is not on a difference; the gates of a comparison begin with baseline_, "
                    "for example baseline_size<=1.05."
                )
        found = differences(read_export(old), read_export(new))
        labelled = found.drop is not None
        check_measurable(
            gates,
            has_eval=found.error is not None or labelled,
            has_labels=labelled,
            has_baseline=True,
            why=found.unpaired
            or "The exports have no scores by sample of this kind; export both with --eval and labels.",
        )
        for path, render in ((markdown, markdown_page), (html, html_page)):
            if path is not None:
                path.write_text(render(found), encoding="utf-8")
        results = evaluate(gates, {"baseline": asdict(found)})
        if as_json:
            print_json({"difference": found, "gates": results})
        else:
            _print(found)
        for result in (result for result in results if not result.passed):
            value = "not measured" if result.value is None else f"{result.value:.6g}"
            Console(stderr=as_json).print(f"[red]failed gate[/red] {escape(result.expression)}: it is {value}")
        raise typer.Exit(not all(result.passed for result in results))


def compare_dump(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    dump: Annotated[
        Path,
        typer.Argument(metavar="DUMP", help="`.npz`, or a folder of `.npy`, `.bin` and `.raw` files, one per value."),
    ],
    names: Annotated[
        Path | None,
        option("CSV table for names of their own: name in the dump, name of the value.", "--names", metavar="FILE"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare tensors dumped from a device with the golden codes, in code steps per layer; exit code 1 if they differ.

    Feed the device the golden inputs. The first layer that differs is where the device computes otherwise: all later
    ones inherit it.

    Example: [bold]intact compare-dump build/net board.npz[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.handover.dump import compare_dump as compare
        from exporter.reporting.number_format import percent, significant

        layers, strangers, absent = compare(folder, dump, names)
        rows = [
            (
                each.layer,
                each.kernel,
                "0" if not each.differing else percent(each.differing / each.compared),
                str(each.largest),
                significant(each.mean, 2) if each.differing else "",
                each.read_as,
            )
            for each in layers
        ]
        print_table(("layer", "kernel", "differ", "largest step", "mean step", "read as"), rows, box=None)
        console = Console(soft_wrap=True, highlight=False)
        if strangers:
            console.print(f"These tensors belong to no value: {', '.join(strangers[:3])}", markup=False)
        if absent:
            console.print(f"Not in the dump: {len(absent)} of {len(absent) + len(layers)} values.")
        first = next((each for each in layers if each.differing and each.exact), None)
        if first is None:
            console.print("Everything in the dump agrees.")
        else:
            console.print(f"The first layer that differs is {first.layer} ({first.name}).", markup=False)
        raise typer.Exit(first is not None)


def _print(found: Difference) -> None:
    from exporter.reporting.difference_tables import sections, summary

    for sentence in summary(found):
        Console().print(Text(sentence))
    for section in sections(found):
        Console().print()
        print_table(section.columns, section.rows, title=section.title, box=None)
        if section.more:
            Console().print(f"{section.more} more: --json lists all.")
