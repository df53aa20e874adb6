"""The command `intact`: flags become settings, an error one message and an exit code, a report a verdict.

Exit codes: 0 all gates passed, 1 a gate failed, 2 bad input or usage, 3 not exportable to this target, 70 an internal
error, 130 interrupted. Only commands that need torch, or the settings of an export, import them: help answers at once.

Must not know: how anything is computed.
"""

from __future__ import annotations

import gc
import inspect
import os
import signal
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from calibrators.allocator import keep_freed_memory
from calibrators.errors import InputError, UnknownNameError
from exporter.console import print_table, reported_errors

if TYPE_CHECKING:
    from exporter.config import ExportConfig, Setting
    from runtime_tests.workers.runtime import Runtime

__all__ = ["app", "export_command", "main"]

EXPORT_HELP = (
    "Export MODEL: fold, calibrate, write integer ONNX and prove it in the runtime.\n\n"
    "Example: [bold]intact export net.py:build --checkpoint net.pt --data images/ --image-size 224 "
    "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --eval test.npz --out build/net "
    "--gate 'accuracy_drop<=0.01'[/bold]"
)


class _Commands(TyperGroup):
    """The commands. `export` gets its flags only when it is called, so that listing it loads no settings."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        return name, export_command() if name == "export" else command, rest


app = typer.Typer(
    name="intact",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Integer-exact export: a trained PyTorch model goes in, an ONNX file that an integer runtime executes comes "
        "out, with the proof that the runtime computes the same integers.\n\n"
        "Start with [bold]intact demo --out build/demo[/bold], then export your own model:\n\n"
        "[bold]intact export net.py:build --data data.py:calibration --eval data.py:test --out build/net[/bold]"
    ),
    epilog="Exit codes: 0 all gates passed; 1 a gate failed; 2 bad input or usage; 3 not exportable to this target; "
    "70 an internal error; 130 interrupted.",
)

RUNNING = "Running"


def _option(help: str, *names: str, metavar: str = "", panel: str | None = None) -> Any:
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


Out = Annotated[Path, _option("Folder for the bundle; it must be empty or not exist yet.", "--out", metavar="DIR")]
Overwrite = Annotated[bool, _option("Replace an earlier bundle in DIR.", "--overwrite")]
Quiet = Annotated[bool, _option("Show no progress.", "--quiet", "-q", panel=RUNNING)]
Debug = Annotated[bool, _option("Show the traceback of an error.", "--debug", panel=RUNNING)]


def _show_version(wanted: bool) -> None:
    if wanted:
        from exporter.about import __version__

        print(f"intact {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", metavar="", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    pass


@app.command(name="export", help=EXPORT_HELP)
def _listed() -> None:
    """Hold the place of `export` in the list of commands; _Commands calls the command itself."""


def export(  # noqa: PLR0913 (a command's arguments are its flags)
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`file.py:factory`, `file.py:factory(width=0.5)`, or `.pt2`.")
    ],
    data: Annotated[
        str, _option("Calibration data: `.npz`, image folder or `file.py:callable`.", "--data", metavar="CALIB")
    ],
    out: Out,
    evaluation: Annotated[
        str | None,
        _option(
            "Held-out data in the same forms as CALIB; with labels, accuracy is measured.", "--eval", metavar="EVAL"
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None, _option("Weights for the factory's module: `.pt`, `.pth` or `.safetensors`.", metavar="FILE")
    ] = None,
    checkpoint_key: Annotated[
        str | None,
        _option(
            "Where the weights are in the checkpoint: `ema`, `state_dict.teacher`; by default what fits best.",
            "--checkpoint-key",
            metavar="KEY",
        ),
    ] = None,
    overwrite: Overwrite = False,
    config: Annotated[
        Path | None, _option("Settings from a file; flags take precedence.", metavar="FILE.toml", panel=RUNNING)
    ] = None,
    sets: Annotated[
        list[str] | None,
        _option(
            "Set any setting of the export or option of the method; repeatable: `--set q=99.99`.",
            "--set",
            metavar="KEY=VALUE",
            panel=RUNNING,
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Export a model; `flags` are the settings that were given."""
    with reported_errors(debug=debug):
        from exporter.config import load_config

        settings = load_config(config, flags, sets or ())
        weights = {"checkpoint": checkpoint, "checkpoint_key": checkpoint_key}
        _export(model, (data, evaluation), settings, out=out, overwrite=overwrite, quiet=quiet, **weights)


@cache
def export_command() -> Any:
    """Return the command `export`, whose `**flags` are replaced by a flag for every setting that has one."""
    from exporter.config import list_settings

    signature = inspect.signature(export, eval_str=True)
    given = {name: p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name != "flags"}
    running = [given.pop(name) for name in ("config", "sets", "quiet", "debug")]
    parameters = [*given.values(), *(_flag(setting) for setting in list_settings() if setting.flag), *running]
    vars(export)["__signature__"] = signature.replace(parameters=parameters)
    export.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    single = typer.Typer(rich_markup_mode="rich", add_completion=False)
    single.command(name="export", help=EXPORT_HELP, no_args_is_help=True)(export)
    return typer.main.get_command(single)


def _flag(setting: Setting) -> inspect.Parameter:
    shown = rf" \[{setting.default}]" if setting.default else ""
    option = _option(f"{setting.help}{shown}", setting.flag, metavar=setting.metavar, panel=setting.panel)
    kind: Any = list[setting.type] if setting.repeatable else setting.type  # type: ignore[name-defined]
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@app.command(no_args_is_help=True)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    on: Annotated[
        list[str] | None,
        _option(
            "Prove it in this runtime too; repeatable: `avx2`, `arm64`, `web`, `ort==1.19.2`; `intact runtimes` lists "
            "them.",
            "--on",
            metavar="RUNTIME",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Repeat the proof of a bundle on this machine: its files, its integers, its outputs.

    Example: [bold]intact verify build/net --on avx2 --on arm64[/bold]
    """
    with reported_errors(debug=debug):
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give the DIR that `intact export --out DIR` wrote.")
        from exporter.progress import console_progress
        from exporter.verify import verify as prove

        _finish(prove(folder, console_progress(quiet=quiet), on or ()), folder, page="export report")


@app.command(no_args_is_help=True)
def lint(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file, from any exporter.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Runtime that the file is meant for.  [default: what its metadata say, else ort-cpu]", metavar="NAME"
        ),
    ] = None,
    min_ort: Annotated[
        str | None,
        typer.Option(
            help="Oldest onnxruntime that has to load the file.  [default: the installed one]", metavar="VERSION"
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Find what the runtime refuses, computes wrongly or runs in float; the exit code is 1 if there is an error.

    Example: [bold]intact lint model.onnx[/bold]
    """
    with reported_errors(debug=debug):
        from calibrators.targets import get_target
        from runtime_tests.ort.lint import lint as findings_of
        from runtime_tests.ort.versions import parse_version

        oldest = None if min_ort is None else parse_version(min_ort)
        meant = None if target is None else get_target(target)
        if not model.is_file():
            raise InputError(f"{model} is not a file; give an ONNX model.")
        findings = findings_of(model, meant, min_ort=oldest)
        rows = [(finding.severity, finding.rule, finding.where, finding.message) for finding in findings]
        print_table(("severity", "rule", "where", "what"), rows, empty="Nothing found.", box=None)
        raise typer.Exit(any(finding.severity == "error" for finding in findings))


@app.command(name="compare-dump", no_args_is_help=True)
def compare_dump(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    dump: Annotated[
        Path,
        typer.Argument(metavar="DUMP", help="`.npz`, or a folder of `.npy`, `.bin` and `.raw` files, one per value."),
    ],
    names: Annotated[
        Path | None,
        _option("CSV table for names of their own: name in the dump, name of the value.", "--names", metavar="FILE"),
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


@app.command()
def demo(
    out: Out,
    method: Annotated[
        str | None,
        typer.Option(
            help="Calibration method; `intact methods` lists them.  [default: that of export]", metavar="NAME"
        ),
    ] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export a small RepVGG-style network that reads handwritten digits; network and data ship with the package.

    Example: [bold]intact demo --out build/demo[/bold], then open build/demo/report.html.
    """
    with reported_errors(debug=debug):
        from exporter.config import make_config

        source = "exporter.demo.model:"
        data = (f"{source}calibration", f"{source}evaluation")
        settings = make_config({} if method is None else {"method": method})
        _export(f"{source}network", data, settings, out=out, overwrite=overwrite, quiet=quiet)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, to list its options.")] = None,
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


@app.command()
def targets(debug: Debug = False) -> None:
    """List the runtimes to export to.

    Example: [bold]intact export ... --target ort-cpu[/bold]
    """
    with reported_errors(debug=debug):
        from calibrators.targets import list_targets

        rows = [
            (t.name, f"{_grid(t.activation)}, {_grid(t.weight)}", ", ".join(t.exact_on), t.summary)
            for t in list_targets()
        ]
        print_table(("target", "activations, weights", "exact on", "description"), rows, title="Targets")


@app.command()
def runtimes(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME", help="Runtimes; all by default.")] = None,
    install: Annotated[
        bool,
        _option("Install what is missing into `.runtimes`, or the folder that INTACT_RUNTIMES names.", "--install"),
    ] = False,
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
        rows = [
            (each.name, each.family, "no" if each.name in reasons else each.version, each.summary) for each in chosen
        ]
        print_table(("runtime", "processor", "available", "description"), rows, title="Runtimes")
        for name, reason in reasons.items():
            Console().print(f"{name} is not available: {reason}.", markup=False, highlight=False)
        if refusals:
            raise InputError("\n".join(refusals))


def main() -> None:
    """Run the command."""
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # CI ends a job with SIGTERM: clean up as on Ctrl-C
    gc.set_threshold(50_000, 20, 20)  # imports make many objects but no garbage; this saves a second at each start
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's flush does not fail
        sys.exit(128 + signal.SIGPIPE)


def _export(
    model: str, sources: tuple[str, str | None], settings: ExportConfig, *, out: Path, quiet: bool, **rest: Any
) -> None:
    """Export, and exit with the verdict; the pipeline checks what it is given before it works."""
    from exporter.pipeline import export as run
    from exporter.progress import console_progress

    data, evaluation = sources
    progress = console_progress(quiet=quiet)
    _finish(run(model, data, eval_data=evaluation, out=out, config=settings, progress=progress, **rest), out)


def _finish(report: Any, folder: Path, *, page: str = "report") -> None:
    """Print the verdict; exit with 1 unless it is pass, even if nobody reads what is printed."""
    from exporter.reporting.terminal import verdict_panel

    with suppress(BrokenPipeError, SystemExit):  # the latter is rich's answer to the former
        Console().print(verdict_panel(report, folder, page=page))
    raise typer.Exit(0 if report["verdict"] == "pass" else 1)


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
