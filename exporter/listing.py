"""The commands that list what there is: `intact methods`, `targets`, `runtimes` and `schema`.

Must not know: exports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from calibrators.errors import InputError, UnknownNameError
from exporter.console import print_json, print_table, reported_errors
from exporter.flags import Debug, Json, option

if TYPE_CHECKING:
    from runtime_tests.workers.runtime import Runtime

__all__ = ["methods", "runtimes", "schema", "targets"]


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, to list its options.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the calibration methods, or the options of one with their defaults.

    Example: [bold]intact methods qdrop[/bold], then [bold]intact export ... --method qdrop --set iters=2000[/bold]
    """
    with reported_errors(debug=debug):
        from calibrators.methods import list_methods
        from exporter.config import ExportConfig

        known = {method.name: method for method in list_methods()}
        if name is not None and name not in known:
            raise UnknownNameError("method", name, known)
        if as_json:
            print_json([*known.values()] if name is None else known[name])
            return
        if name is None:
            usual = ExportConfig().method
            rows = [(method.name + " (default)" * (method.name == usual), method.summary) for method in known.values()]
            print_table(("method", "description"), rows, title="Calibration methods")
            Console().print("`intact methods NAME` lists the options of one.")
            return
        Console().print(f"[bold]{name}[/bold]: {escape(known[name].summary)}")
        options = [(option.name, str(option.default), option.doc) for option in known[name].options]
        print_table(("option", "default", "description"), options, empty="This method has no options.")
        if options:
            Console().print(f"Set an option with `intact export ... --method {name} --set OPTION=VALUE`.")


def schema(
    name: Annotated[str, typer.Argument(metavar="config|sweep|report", help="The file that the schema describes.")],
    debug: Debug = False,
) -> None:
    """Print the JSON Schema of the file of an export or a sweep, or of report.json, for editors and other tools.

    Example: [bold]intact schema config > intact.schema.json[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.job import config_schema
        from exporter.reporting.schema import json_schema
        from exporter.sweeping.plan import sweep_schema

        schemas = {"config": config_schema, "sweep": sweep_schema, "report": json_schema}
        if name not in schemas:
            raise UnknownNameError("schema", name, schemas)
        print_json(schemas[name]())


def targets(as_json: Json = False, debug: Debug = False) -> None:
    """List the runtimes to export to.

    Example: [bold]intact export ... --target ort-cpu[/bold]
    """
    with reported_errors(debug=debug):
        from calibrators.targets import list_targets

        if as_json:
            print_json(list_targets())
            return
        rows = [(t.name, f"{_grid(t.activation)}, {_grid(t.weight)}", t.promise, t.summary) for t in list_targets()]
        print_table(("target", "activations, weights", "proof", "description"), rows, title="Targets")


def runtimes(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Runtimes; all by default.")] = None,
    install: Annotated[
        bool,
        option("Install what is missing into `.runtimes`, or the folder that INTACT_RUNTIMES names.", "--install"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the runtimes in which a model can be proved, and which are available here, or install them.

    Example: [bold]intact runtimes --install avx2[/bold], then [bold]intact verify build/net --on avx2[/bold]
    """
    with reported_errors(debug=debug):
        from runtime_tests.runtimes import get_runtime, list_runtimes

        chosen = [get_runtime(name) for name in names] if names else list_runtimes()
        refusals = [reason for each in chosen if (reason := _installed(each))] if install else []
        reasons = {each.name: f"{reason}; {each.how_to_get}" for each in chosen if (reason := each.missing())}
        versions = {each.name: None if each.name in reasons else each.version for each in chosen}
        if as_json:
            facts = (
                (each.name, each.family, versions[each.name], each.summary, reasons.get(each.name)) for each in chosen
            )
            keys = ("name", "processor", "version", "summary", "missing")
            print_json([dict(zip(keys, each, strict=True)) for each in facts])
        else:
            rows = [(each.name, each.family, versions[each.name] or "no", each.summary) for each in chosen]
            print_table(("runtime", "processor", "available", "description"), rows, title="Runtimes")
            for name, reason in reasons.items():
                Console().print(f"{name} is not available: {reason}.", markup=False, highlight=False)
        if refusals:
            raise InputError("\n".join(refusals))


def _installed(runtime: Runtime) -> str:
    """Install a runtime; return why it cannot be installed, empty if it was."""
    Console(stderr=True).print(f"installing {runtime.name}", highlight=False)
    try:
        runtime.install()
    except InputError as error:
        return f"{runtime.name} cannot be installed here: {error}"
    return ""


def _grid(spec: Any) -> str:
    return f"{'int' if spec.signed else 'uint'}{spec.bits} {'per tensor' if spec.axis is None else 'per channel'}"
