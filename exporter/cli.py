"""The command `intact`: flags to values, errors to one message and an exit code, a report to a verdict.

Exit codes: 0 all gates passed, 1 a gate failed, 2 bad input or usage, 3 not exportable to this target, 70 a fault of
this program, 130 interrupted. Torch is imported only by commands that need it, so help answers at once.

Must not know: how anything is computed.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from calibrators.errors import InputError, IntactError, UnknownNameError
from exporter.config import RUNNING, Setting, list_settings, load_config
from exporter.reporting.terminal import verdict_panel

__all__ = ["app", "main"]

INTERNAL_FAULT = 70
"""EX_SOFTWARE of sysexits.h: never one of the codes that say something about the input."""
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

app = typer.Typer(
    name="intact",
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

Out = Annotated[
    Path, typer.Option("--out", metavar="DIR", help="Folder of the bundle; must not exist yet or be empty.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier bundle in DIR.")]
Method = Annotated[str | None, typer.Option(help=r"Calibration method; `intact methods` lists them. \[mse]")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel=RUNNING)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUNNING)]


def _option(help: str, panel: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        from exporter.about import __version__

        print(f"intact {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def export(  # noqa: PLR0913 (a command's arguments are its flags)
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`file.py:factory`, `package.module:factory` or a `.pt2` file.")
    ],
    data: Annotated[
        str,
        typer.Option("--data", metavar="CALIB", help="Calibration data: `.npz`, image folder or `file.py:callable`."),
    ],
    out: Out,
    evaluation: Annotated[
        str | None,
        typer.Option("--eval", metavar="EVAL", help="Held-out data in the same forms; with labels it gives accuracy."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights for the factory's module: `.pt`, `.pth` or `.safetensors`."),
    ] = None,
    overwrite: Overwrite = False,
    config: Annotated[Path | None, _option("Settings from a file; flags win.", RUNNING, metavar="FILE.toml")] = None,
    sets: Annotated[
        list[str] | None,
        _option(
            "Any setting of the export or option of the method, repeatable: `--set q=99.99`.",
            RUNNING,
            "--set",
            metavar="KEY=VALUE",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Export MODEL: fold, calibrate, write integer ONNX and prove it in the runtime.

    Example: [bold]intact export net.py:build --checkpoint net.pt --data images/ --image-size 224
    --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --eval test.npz --out build/net --gate 'accuracy_drop<=0.01'[/bold]
    """
    with _reported_errors(debug=debug):
        settings = load_config(
            config, {name: None if value == [] else value for name, value in flags.items()}, sets or ()
        )
        from exporter.pipeline import export as run
        from exporter.progress import console_progress

        report = run(
            model,
            data,
            eval_data=evaluation,
            checkpoint=checkpoint,
            out=out,
            config=settings,
            progress=console_progress(quiet=quiet),
            overwrite=overwrite,
        )
    _finish(report, out)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every setting that has one, in place of its `**flags`."""
    signature = inspect.signature(command, eval_str=True)
    given = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [_flag(setting) for setting in list_settings() if setting.flag]
    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*given, *flags)]
    vars(command)["__signature__"] = signature.replace(parameters=parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    return command


def _flag(setting: Setting) -> inspect.Parameter:
    shown = rf" \[{setting.default}]" if setting.default else ""
    option = _option(f"{setting.help}{shown}", setting.panel, setting.flag, metavar=setting.metavar)
    kind: Any = list[setting.type] if setting.repeatable else setting.type  # type: ignore[name-defined]
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


app.command(no_args_is_help=True)(_with_settings(export))


@app.command(no_args_is_help=True)
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Re-run the proof of a bundle on this machine: its files, its integers, its outputs.

    Example: [bold]intact verify build/net[/bold]
    """
    with _reported_errors(debug=debug):
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder; give the DIR that `intact export --out DIR` wrote.")
        from exporter.progress import console_progress
        from exporter.verify import verify as prove

        report = prove(folder, console_progress(quiet=quiet))
    _finish(report, folder)


@app.command(no_args_is_help=True)
def lint(
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file, whoever wrote it.")],
    target: Annotated[str, typer.Option(help="The runtime it is meant for.")] = "ort-cpu",
    debug: Debug = False,
) -> None:
    """Look for what the runtime refuses, computes wrongly or runs in float. Ends with 1 where there is an error.

    Example: [bold]intact lint model.onnx[/bold]
    """
    with _reported_errors(debug=debug):
        from calibrators.targets import get_target
        from runtime_tests.ort.lint import lint as findings_of

        get_target(target)
        if not model.is_file():
            raise InputError(f"{model} is no file; give an ONNX model.")
        findings = findings_of(model)
        table = Table("severity", "rule", "where", "what", box=None)
        for finding in findings:
            table.add_row(finding.severity, finding.rule, escape(finding.where), escape(finding.message))
        Console().print(table if findings else "Nothing found.")
    raise typer.Exit(any(finding.severity == "error" for finding in findings))


@app.command()
def demo(
    out: Out, method: Method = None, overwrite: Overwrite = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """Run the export end to end on a small RepVGG-style network and handwritten digits that ship with the package.

    Example: [bold]intact demo --out build/demo[/bold], then open build/demo/report.html.
    """
    with _reported_errors(debug=debug):
        settings = load_config(flags={"method": method})
        from exporter.pipeline import export as run
        from exporter.progress import console_progress

        report = run(
            "exporter.demo.model:network",
            "exporter.demo.model:calibration",
            eval_data="exporter.demo.model:evaluation",
            out=out,
            config=settings,
            progress=console_progress(quiet=quiet),
            overwrite=overwrite,
        )
    _finish(report, out)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, to list its options.")] = None,
    debug: Debug = False,
) -> None:
    """List the calibration methods, or the options of one with their defaults.

    Example: [bold]intact methods qdrop[/bold], then [bold]intact export ... --method qdrop --set iters=2000[/bold]
    """
    with _reported_errors(debug=debug):
        from calibrators.methods import list_methods

        known = {method.name: method for method in list_methods()}
        if name is not None and name not in known:
            raise UnknownNameError("method", name, known)
        if name is None:
            table = Table("method", "what it is", title="Calibration methods", title_justify="left")
            for method in known.values():
                table.add_row(f"[bold]{method.name}[/bold]", escape(method.summary))
            closing = "`intact methods NAME` lists the options of one."
        else:
            Console().print(f"[bold]{name}[/bold]: {escape(known[name].summary)}")
            table = Table("option", "default", "what it is")
            for option in known[name].options:
                table.add_row(f"[bold]{option.name}[/bold]", str(option.default), escape(option.doc))
            closing = f"Set them with `intact export ... --method {name} --set OPTION=VALUE`."
        Console().print(*([table, closing] if table.rows else ["It has no options."]), sep="\n")


@app.command()
def targets(debug: Debug = False) -> None:
    """List the runtimes to export to.

    Example: [bold]intact export ... --target ort-cpu[/bold]
    """
    with _reported_errors(debug=debug):
        from calibrators.targets import list_targets

        table = Table("target", "activations", "weights", "opset", "what it is", title="Targets", title_justify="left")
        for target in list_targets():
            grids = (_grid(target.activation), _grid(target.weight))
            table.add_row(f"[bold]{target.name}[/bold]", *grids, str(target.opset), target.summary)
        Console().print(table)


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # CI ends jobs with SIGTERM: clean up as after Ctrl-C
    app()


@contextmanager
def _reported_errors(*, debug: bool) -> Iterator[None]:
    """Exceptions inside become one message on stderr and the exit code they stand for."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written.", "")
        raise typer.Exit(INTERRUPTED) from None
    except IntactError as error:
        if debug:
            raise
        _complain(str(error))
        raise typer.Exit(error.exit_code) from error
    except OSError as error:
        if debug:
            raise
        place = f" ({error.filename})" if error.filename else ""
        _complain(f"{error.strerror or error}{place}; nothing was written: free space, or check rights and paths.")
        raise typer.Exit(InputError.exit_code) from error
    except Exception as error:
        if debug:
            raise
        first = next(iter(str(error).splitlines()), "")
        _complain(f"internal error: {type(error).__name__}: {first}; run again with --debug and report it.", "")
        raise typer.Exit(INTERNAL_FAULT) from error


def _complain(message: str, prefix: str = "error: ") -> None:
    Console(stderr=True).print(Text.assemble((prefix, "bold red"), message), soft_wrap=True)


def _finish(report: Mapping[str, Any], folder: Path) -> None:
    """Print the verdict; exit 1 unless it is pass."""
    Console().print(verdict_panel(report, folder))
    raise typer.Exit(0 if report["verdict"] == "pass" else 1)


def _grid(spec: Any) -> str:
    return f"{'int' if spec.signed else 'uint'}{spec.bits} {'per tensor' if spec.axis is None else 'per channel'}"
