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
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from calibrators.allocator import keep_freed_memory
from calibrators.errors import InputError, first_line, is_text
from exporter.bundle_commands import rebuild, sign
from exporter.comparing.commands import compare, compare_dump
from exporter.console import check_folder_of, print_json, print_table, reported_errors
from exporter.flags import RUNNING, Debug, Json, Memory, Out, Overwrite, Quiet, Sets, Summary, option
from exporter.listing import methods, runtimes, schema, targets
from exporter.processes import joined, launched, silence_all_but_the_first
from exporter.running import Shown, finish, run_dry, run_export, run_for_targets
from exporter.sweeping.commands import SWEEP_HELP, sweep

if TYPE_CHECKING:
    from exporter.config import Setting

__all__ = ["app", "export_command", "main"]

SHARED = ("export", "demo")
"""Commands whose work several processes share."""

EXPORT_HELP = (
    "Export MODEL: fold, calibrate, write integer ONNX and prove it in the runtime.\n\n"
    "Example: [bold]intact export net.py:build --checkpoint net.pt --data images/ --image-size 224 "
    "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --eval test.npz --out build/net "
    "--gate 'accuracy_drop<=0.01'[/bold]\n\n"
    "Several processes share an export: [bold]torchrun --nproc-per-node 4 -m exporter export ...[/bold]"
)


INIT_HELP = (
    "Write a commented configuration with every setting; a terminal asks for what is not given.\n\n"
    "Example: [bold]intact init net.py:build --data images/ --out build/net[/bold], then "
    "[bold]intact export --config intact.toml[/bold]"
)


class _Plain:
    """Shows its flag --help as other flags are shown, without the type of a value."""

    def get_help_option(self, ctx: Any) -> Any:
        flag = super().get_help_option(ctx)  # type: ignore[misc] # of the command or group that it is mixed into
        if flag is not None:
            flag.metavar = ""
        return flag


class _Command(_Plain, TyperCommand):
    """A command."""


class _Commands(_Plain, TyperGroup):
    """The commands. `export` and `init` get flags only when they are called, so that listing them loads no settings."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, rest = super().resolve_command(ctx, args)
        made = {"export": export_command, "init": init_command}
        return name, made[name]() if name in made else command, rest


app = typer.Typer(
    name="intact",
    cls=_Commands,
    no_args_is_help=True,
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


def _show_version(wanted: bool) -> None:
    if wanted:
        from exporter.about import __version__

        print(f"intact {__version__}")
        raise typer.Exit


command = partial(app.command, cls=_Command, no_args_is_help=True)


@app.callback()
def _root(
    ctx: typer.Context,
    _: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", metavar="", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    if launched() > 1 and ctx.invoked_subcommand not in SHARED:
        raise typer.BadParameter(f"torchrun starts {' or '.join(SHARED)}; call {ctx.invoked_subcommand} without it.")


@app.command(name="export", help=EXPORT_HELP)
def _listed() -> None:
    """Hold the place of `export` in the list of commands; _Commands calls the command itself."""


def export(  # noqa: PLR0913 (a command's arguments are its flags)
    overwrite: Overwrite = False,
    config: Annotated[
        Path | None,
        option(
            "All of an export from a file, MODEL, data and DIR too; flags take precedence. `intact init` writes one.",
            metavar="FILE.toml",
            panel=RUNNING,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        option(
            "Write nothing: capture, fold and place the network, tell what is refused, and estimate time and memory.",
            "--dry-run",
            panel=RUNNING,
        ),
    ] = False,
    sets: Sets = None,
    quiet: Quiet = False,
    summary: Summary = None,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Export a model; `flags` are the parts of the job and the settings that were given."""
    with reported_errors(debug=debug), joined() as ranks:
        from exporter.job import load_job

        job, settings, targets = load_job(config, flags, sets or ())
        if ranks.count > 1 and (dry_run or len(targets) > 1):
            raise InputError("torchrun shares one export; leave --dry-run or the other targets out.")
        if len(targets) > 1:
            if dry_run or summary is not None:
                raise InputError("--dry-run and --summary take one --target; leave them or the other targets out.")
            run_for_targets(targets, job, settings, overwrite=overwrite, quiet=quiet, as_json=as_json)
        if dry_run:
            if summary is not None:
                raise InputError("--summary has no verdict to write after --dry-run; leave one of them out.")
            run_dry(job, settings, overwrite=overwrite, quiet=quiet, as_json=as_json)
        run_export(job, settings, ranks, overwrite=overwrite, quiet=quiet, shown=Shown(as_json, summary))


@cache
def export_command() -> Any:
    """Return the command `export`, whose `**flags` are replaced by a flag for every setting that has one."""
    last = ("config", "dry_run", "sets", "quiet", "summary", "as_json", "debug")
    return _with_settings(export, "export", EXPORT_HELP, last)


@app.command(name="init", help=INIT_HELP)
def _listed_too() -> None:
    """Hold the place of `init` in the list of commands."""


def init(
    file: Annotated[
        Path | None, option("The file to write.  [default: intact.toml]", "--file", metavar="FILE.toml")
    ] = None,
    overwrite: Annotated[bool, option("Replace FILE.toml.", "--overwrite")] = False,
    sets: Sets = None,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Write a configuration; `flags` are what it sets."""
    with reported_errors(debug=debug):
        from calibrators.methods import get_method
        from calibrators.targets import get_target
        from exporter.job import load_job
        from exporter.starter import starter

        path = file or Path("intact.toml")
        check_folder_of(path)
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists; give another --file, or --overwrite.")
        if flags["model"] is None and sys.stdin.isatty():
            flags |= _asked()
        job, config, targets = load_job(None, flags, sets or ())
        get_method(config.method, config.options)  # which refuses options that it does not have
        for name in targets:
            get_target(name)
        try:
            text = starter(job, config, targets).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"a TOML file holds text, but an argument is not: {first_line(error)}.") from error
        path.write_bytes(text)
        Console().print(f"Wrote {path}. Edit it, then run `intact export --config {path}`.", markup=False)


def _asked() -> dict[str, Any]:
    """Ask for the parts of an export; an empty answer leaves a part open."""
    from exporter.config import list_settings
    from exporter.job import Job

    answers = {each.name: typer.prompt(f"{each.name}: {each.help}", default="") for each in list_settings(Job)}
    return {name: answer or None for name, answer in answers.items()}


@cache
def init_command() -> Any:
    """Return the command `init`, with the flags of `export`."""
    return _with_settings(init, "init", INIT_HELP, ("sets", "debug"), needs_arguments=False)


def _with_settings(
    function: Callable[..., None], name: str, help: str, last: Sequence[str], *, needs_arguments: bool = True
) -> Any:
    """Return a command with the function's flags, those in `last` last, and one for every setting of an export."""
    from exporter.config import list_settings
    from exporter.job import Job

    signature = inspect.signature(function, eval_str=True)
    given = {name: p.replace(kind=p.KEYWORD_ONLY) for name, p in signature.parameters.items() if name != "flags"}
    running = [given.pop(name) for name in last]
    settings = [_flag(setting) for setting in list_settings() if setting.flag]
    parameters = [*map(_flag, list_settings(Job)), *given.values(), *settings, *running]
    vars(function)["__signature__"] = signature.replace(parameters=parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters} | {"return": None}
    single = typer.Typer(rich_markup_mode="rich", add_completion=False)
    single.command(name=name, cls=_Command, help=help, no_args_is_help=needs_arguments)(function)
    return typer.main.get_command(single)


def _flag(setting: Setting) -> inspect.Parameter:
    shown = rf" \[{setting.default}]" if setting.default else ""
    is_on = setting.default == "True"  # and its flag switches it off
    text, panel = f"Switch off: {setting.help}" if is_on else f"{setting.help}{shown}", setting.panel or None
    given = (
        option(text, f" /{setting.flag}" if is_on else setting.flag, metavar=setting.metavar, panel=panel)
        if setting.flag
        else typer.Argument(metavar=setting.metavar, help=text, show_default=False)
    )
    is_list = setting.repeatable or setting.name == "target"  # a bundle for each
    kind: Any = list[setting.type] if is_list else setting.type  # type: ignore[name-defined]
    annotation = Annotated[kind | None, given]
    return inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


@command()
def verify(  # noqa: PLR0913 (a command's arguments are its flags)
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle that `intact export` wrote.")],
    on: Annotated[
        list[str] | None,
        option(
            "Prove it in this runtime too; repeatable: `avx2`, `arm64`, `web`, `ort==1.19.2`; `intact runtimes` lists "
            "them.",
            "--on",
            metavar="RUNTIME",
        ),
    ] = None,
    signature: Annotated[
        Path | None,
        option("Check this signature of the bundle first; needs --public-key.", "--signature", metavar="FILE"),
    ] = None,
    public_key: Annotated[Path | None, option("Key of the signer, PEM.", "--public-key", metavar="FILE")] = None,
    memory: Memory = None,
    quiet: Quiet = False,
    summary: Summary = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Repeat the proof of a bundle on this machine: its files, its integers, its outputs.

    Example: [bold]intact verify build/net --on avx2 --on arm64[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.handover.bundle import check_bundle

        check_bundle(folder)
        from exporter.handover.signature import check_signature
        from exporter.memory import limited_memory
        from exporter.progress import console_progress
        from exporter.verify import verify as prove

        if summary is not None:
            check_folder_of(summary)
        if (signature is None) != (public_key is None):
            raise InputError("--signature and --public-key belong together; give both.")
        if signature is not None and public_key is not None:
            check_signature(folder, public_key, signature)
            Console(stderr=True).print(
                f"{signature} is a valid signature by {public_key}.", markup=False, soft_wrap=True
            )
        with limited_memory(folder, memory):
            report = prove(folder, console_progress(quiet=quiet), on or ())
        finish(report, folder, Shown(as_json, summary, page="export report"))


command()(rebuild)
command()(sign)


@command()
def lint(  # noqa: PLR0913 (the flags of a command)
    model: Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="An ONNX file, from any exporter.")],
    target: Annotated[
        str | None,
        typer.Option(
            help="Runtime or compiler that the file is meant for: a target, or tidl, esp-dl, st-edge-ai, nxp-neutron, "
            "vitis-ai.  [default: what its metadata say, else ort-cpu]",
            metavar="NAME",
        ),
    ] = None,
    min_ort: Annotated[
        str | None,
        typer.Option(
            help="Oldest onnxruntime that has to load the file.  [default: the installed one]", metavar="VERSION"
        ),
    ] = None,
    memory: Memory = None,
    as_json: Json = False,
    as_sarif: Annotated[bool, option("Print SARIF 2.1.0 on stdout.", "--sarif")] = False,
    debug: Debug = False,
) -> None:
    """Find what the runtime refuses, computes wrongly or runs in float; the exit code is 1 if there is an error.

    Example: [bold]intact lint model.onnx[/bold]
    """
    with reported_errors(debug=debug):
        from exporter.memory import limited_memory
        from exporter.reporting.sarif import sarif
        from runtime_tests.ort.lint import checked_rules
        from runtime_tests.ort.lint import lint as findings_of
        from runtime_tests.ort.meant_for import target_of
        from runtime_tests.ort.versions import parse_version

        oldest = None if min_ort is None else parse_version(min_ort)
        if not model.is_file():
            raise InputError(f"{model} is not a file; give an ONNX model.")
        if not is_text(str(model)):
            raise InputError(f"the name of {model} is no text in UTF-8, which ONNX needs; rename the file.")
        if as_sarif and as_json:
            raise InputError("--json and --sarif print two forms of the same findings; leave one of them out.")
        with limited_memory(model, memory):
            findings = findings_of(model, target, min_ort=oldest)
        if as_sarif:
            print_json(sarif(findings, checked_rules(model, target), model))
        elif as_json:
            print_json(findings)
        else:
            rows = [(finding.severity, finding.rule, finding.where, finding.message) for finding in findings]
            nothing = "" if rows else f"Nothing found for {target or target_of(model).name}."
            print_table(("severity", "rule", "where", "what"), rows, empty=nothing, box=None)
        raise typer.Exit(any(finding.severity == "error" for finding in findings))


command(name="compare-dump")(compare_dump)
command()(compare)
command(help=SWEEP_HELP)(sweep)


@command(no_args_is_help=False)
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
    with reported_errors(debug=debug), joined() as ranks:
        from exporter.config import make_config
        from exporter.job import Job

        source = "exporter.demo.model:"
        parts = {"model": "network", "data": "calibration", "eval": "evaluation"}
        job = Job(out=str(out), **{name: f"{source}{part}" for name, part in parts.items()})
        settings = make_config({} if method is None else {"method": method})
        run_export(job, settings, ranks, overwrite=overwrite, quiet=quiet, shown=Shown())


for listing in (methods, schema, targets, runtimes):
    command(no_args_is_help=listing is schema)(listing)


def main() -> None:
    """Run the command."""
    keep_freed_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # CI ends a job with SIGTERM: clean up as on Ctrl-C
    silence_all_but_the_first()
    warnings.filterwarnings("ignore", "Image size .* could be decompression bomb")  # larger ones are refused by name
    gc.set_threshold(50_000, 20, 20)  # imports make many objects but no garbage; this saves a second at each start
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's flush does not fail
        sys.exit(128 + signal.SIGPIPE)
