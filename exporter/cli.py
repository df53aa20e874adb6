"""The command `intact`: flags to values, errors to one message and an exit code, a report to a verdict.

Exit codes: 0 all gates passed, 1 a gate failed, 2 bad input or usage, 3 not exportable to this target, 70 a fault of
this program, 130 interrupted. Torch is imported only by commands that need it, so help answers at once.

Must not know: how anything is computed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from calibrators.errors import InputError, IntactError, UnknownNameError
from exporter.reporting.number_format import compared

if TYPE_CHECKING:
    from exporter.config import ExportConfig

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
    epilog="Exit codes: 0 all gates passed; 1 a gate failed; 2 bad input or usage; 3 not exportable to this target.",
)

QUANTIZATION, DATA, PROOF, RUNNING = "Quantization", "Data", "Proof and verdict", "Running"

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


@app.command(no_args_is_help=True)
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
        str | None, typer.Option("--eval", metavar="EVAL", help="Held-out data, same forms; labels give the accuracy.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Weights for the factory's module: `.pt`, `.pth` or `.safetensors`."),
    ] = None,
    overwrite: Overwrite = False,
    target: Annotated[str | None, _option(r"Runtime; `intact targets` lists them. \[ort-cpu]", QUANTIZATION)] = None,
    method: Annotated[str | None, _option(r"Method; `intact methods` lists them. \[mse]", QUANTIZATION)] = None,
    weight_bits: Annotated[int | None, _option("Bits of weights, 2 to 8. [8]", QUANTIZATION)] = None,
    activation_bits: Annotated[int | None, _option("Bits of activations, 2 to 8. [8]", QUANTIZATION)] = None,
    first_last_bits: Annotated[int | None, _option("Bits of the first and last layer. [8]", QUANTIZATION)] = None,
    per_tensor_weights: Annotated[
        bool | None, _option("One weight scale per tensor, not per channel.", QUANTIZATION, "--per-tensor-weights")
    ] = None,
    weight_only: Annotated[
        bool | None,
        _option(
            "Linear layers: quantized weights, float inputs, float kernels; convolutions stay as they are.",
            QUANTIZATION,
            "--weight-only",
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        _option(r"Inputs per weight scale of weight-only layers, 16, 32, 64 ... \[a channel]", QUANTIZATION),
    ] = None,
    weight_storage: Annotated[
        str | None,
        _option(
            "Weights in the file: `int8`, or what fits in `int4` or `int2`, which the runtime unpacks while loading "
            r"for the same integer kernels; auto: int4. \[auto]",
            QUANTIZATION,
            metavar="TYPE",
        ),
    ] = None,
    reduce_range: Annotated[
        bool | None, _option("7-bit weights, for CPUs without VNNI.", QUANTIZATION, "--reduce-range")
    ] = None,
    prepare: Annotated[
        str | None,
        _option(
            "Rewrites of the float model that come first: `cle` equalises the ranges of neighbouring layers, `absorb` "
            "moves high biases on. For weights with one scale per tensor.",
            QUANTIZATION,
            metavar="NAME,NAME",
        ),
    ] = None,
    bias_correction: Annotated[
        bool | None, _option("Shift biases by each layer's mean error.", QUANTIZATION, "--bias-correction")
    ] = None,
    include: Annotated[
        list[str] | None,
        _option("Quantize only what this name, module or op glob matches.", QUANTIZATION, metavar="GLOB"),
    ] = None,
    exclude: Annotated[
        list[str] | None, _option("Keep in float what this glob matches.", QUANTIZATION, metavar="GLOB")
    ] = None,
    layer: Annotated[
        list[str] | None,
        _option(
            "What matching layers have, repeatable, the last match wins: `'stages.3.*: weight_bits=4, "
            "activation_bits=4'`. Keys: weight_bits, activation_bits (16: int16 between float kernels), weight_only, "
            "granularity (tensor, channel; block, with block_size, where weight_only), symmetric, method (of its "
            "ranges), float. An own flag, as `--set` is for the whole export and knows no layers.",
            QUANTIZATION,
            metavar="RULE",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        _option(
            "Give every layer bits of its own, the best within this limit, repeatable: `weight_bytes<=0.6M`, "
            "`avg_weight_bits<=3.5`, `bops<=2G` (opens the bits of activations too), `accuracy_drop<=1%`.",
            QUANTIZATION,
            metavar="LIMIT",
        ),
    ] = None,
    sensitivity: Annotated[
        bool | None,
        _option("Measure and draw what bits cost, layer by layer; `--budget` does too.", QUANTIZATION, "--sensitivity"),
    ] = None,
    explain: Annotated[
        bool | None,
        _option("Compute and draw what explains the method's choice; takes longer.", QUANTIZATION, "--explain"),
    ] = None,
    sets: Annotated[
        list[str] | None,
        _option(
            "Any setting of the export or option of the method: `--set q=99.99`.",
            QUANTIZATION,
            "--set",
            metavar="KEY=VALUE",
        ),
    ] = None,
    batch_size: Annotated[int | None, _option("Samples per batch for .npz and folders. [64]", DATA)] = None,
    calibration_batches: Annotated[
        int | None, _option(r"Use only the first N batches. \[all]", DATA, metavar="N")
    ] = None,
    image_size: Annotated[
        str | None, _option("Scale and centre-crop images of a folder, `224` or `224x160`.", DATA, metavar="SIZE")
    ] = None,
    mean: Annotated[
        str | None, _option("Mean per channel of images in 0..1, `0.485,0.456,0.406`.", DATA, metavar="M,M,M")
    ] = None,
    std: Annotated[str | None, _option("Standard deviation per channel.", DATA, metavar="S,S,S")] = None,
    gate: Annotated[
        list[str] | None,
        _option("Condition for exit code 0, repeatable: `accuracy_drop<=0.01`.", PROOF, metavar="EXPR"),
    ] = None,
    openvino: Annotated[
        bool | None, _option("Prove the model in OpenVINO too, kernel by kernel; it has to be installed.", PROOF)
    ] = None,
    parity_samples: Annotated[
        int | None, _option("Samples compared integer by integer. [256]", PROOF, metavar="N")
    ] = None,
    config: Annotated[Path | None, _option("Settings from a file; flags win.", RUNNING, metavar="FILE.toml")] = None,
    seed: Annotated[int | None, _option("Seed of everything random. [0]", RUNNING)] = None,
    device: Annotated[
        str | None, _option(r"Where methods train or search: `cpu`, `cuda`, `cuda:1`. \[cpu]", RUNNING)
    ] = None,
    cache_gib: Annotated[
        float | None,
        _option(
            "Memory for activations that training keeps; the rest goes to temporary files. [4]", RUNNING, metavar="GIB"
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Export MODEL: fold, calibrate, write integer ONNX and prove it in the runtime.

    Example: [bold]intact export net.py:build --checkpoint net.pt --data images/ --image-size 224
    --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225 --eval test.npz --out build/net --gate 'accuracy_drop<=0.01'[/bold]
    """
    flags: dict[str, Any] = {
        "target": target,
        "method": method,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "first_last_bits": first_last_bits,
        "per_tensor_weights": per_tensor_weights,
        "weight_only": weight_only,
        "block_size": block_size,
        "weight_storage": weight_storage,
        "reduce_range": reduce_range,
        "prepare": prepare,
        "bias_correction": bias_correction,
        "budget": budget or None,
        "sensitivity": sensitivity,
        "explain": explain,
        "include": include or None,
        "exclude": exclude or None,
        "layers": layer or None,
        "gates": gate or None,
        "batch_size": batch_size,
        "calibration_batches": calibration_batches,
        "openvino": openvino,
        "parity_samples": parity_samples,
        "seed": seed,
        "device": device,
        "cache_gib": cache_gib,
    }
    with _reported_errors(debug=debug):
        from exporter.config import load_config

        flags |= {"image_size": _size(image_size), "mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
        settings = load_config(config, flags, sets or ())
        report = _export(model, checkpoint, (data, evaluation), (out, overwrite), settings, quiet=quiet)
    _finish(report, out)


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
    """Go the whole way on a small RepVGG-style network and handwritten digits that ship with the package.

    Example: [bold]intact demo --out build/demo[/bold], then open build/demo/report.html.
    """
    with _reported_errors(debug=debug):
        from exporter.config import load_config

        settings = load_config(flags={"method": method})
        source = "exporter.demo.model:"
        data = (f"{source}calibration", f"{source}evaluation")
        report = _export(f"{source}network", None, data, (out, overwrite), settings, quiet=quiet)
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
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # how CI ends a job: to be cleaned up behind, as Ctrl-C
    app()


def _export(
    model: str,
    checkpoint: Path | None,
    sources: tuple[str, str | None],
    destination: tuple[Path, bool],
    settings: ExportConfig,
    *,
    quiet: bool,
) -> Mapping[str, Any]:
    """The report of an export; everything that can be wrong with the input is checked before the work starts."""
    from exporter.checks import check_settings
    from exporter.reporting.bundle import check_out

    out, overwrite = destination
    check_out(out, overwrite=overwrite)
    check_settings(settings)
    from exporter.frontend.load import input_names, load_model
    from exporter.inputs.data import open_both
    from exporter.pipeline import export as run
    from exporter.progress import console_progress

    data, evaluation = open_both(*sources, **settings.data_form())
    network = load_model(model, checkpoint)
    names = input_names(network)
    report: Mapping[str, Any] = run(
        network,
        data.named(names),
        eval_data=evaluation.named(names) if evaluation is not None else None,
        out=out,
        config=settings,
        progress=console_progress(quiet=quiet),
        source=model,
        overwrite=overwrite,
    )
    return report


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
    passed = report["verdict"] == "pass"
    table = Table.grid(padding=(0, 2))
    for name, value in _summary(report):
        table.add_row(f"[bold]{name}[/bold]", value)
    table.add_row("[bold]report[/bold]", str(folder / "report.html"))
    title, colour = ("PASS", "green") if passed else ("FAIL", "red")
    Console().print(Panel(table, title=f"[bold]{title}[/bold]", title_align="left", border_style=colour, expand=False))
    raise typer.Exit(0 if passed else 1)


def _summary(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    accuracy, latency, size = report["accuracy"], report["latency_ms"], report["size"]
    if accuracy is not None:
        yield accuracy["metric"], _accuracy(accuracy)
    yield "parity", _parity(report["parity"]["optimized"])
    if "openvino" in report["parity"]:
        yield "OpenVINO", _second(report["parity"]["openvino"])
    yield "integer MACs", _percent(report["coverage"]["integer_macs"])
    if report["coverage"].get("weight_only_macs"):
        yield "weight-only MACs", _weight_only(report["coverage"])
    shrink = compared(size["float_bytes"], size["bytes"], "smaller", "larger")
    yield "size", f"{size['bytes'] / 1000:,.0f} kB, {shrink} than float"
    if latency is not None:
        speed = compared(latency["float"], latency["quantized"], "faster", "slower")
        yield "latency", f"{latency['quantized']:.2f} ms, {speed} than float"
    for gate in report["gates"]:
        if not gate["passed"]:
            yield "failed gate", f"{gate['name']}: {_number(gate['value'])} against a limit of {_number(gate['limit'])}"


def _weight_only(coverage: Mapping[str, Any]) -> str:
    return f"{_percent(coverage['weight_only_macs'])}, float kernels at accuracy level {coverage['accuracy_level']}"


def _accuracy(accuracy: Mapping[str, Any]) -> str:
    if accuracy["metric"] == "sqnr_db":
        return f"{_number(accuracy['runtime'])} dB over {accuracy['samples']} samples"
    values = f"{_percent(accuracy['float'])} float, {_percent(accuracy['runtime'])} in the runtime"
    return f"{values}, {accuracy['samples']} samples"


def _parity(level: Mapping[str, Any]) -> str:
    """End to end where all is equal, else node by node: what differs there is what a node itself does differently."""
    if not level["mismatched"]:
        return f"0 of {level['values']:,} integers differ"
    text = f"{level['kernel_mismatched']:,} integers differ in integer kernels"
    if level["float_values"]:
        text += f", {level['float_mismatched']:,} of {level['float_values']:,} behind float operators"
    return f"{text} (node by node; largest step {level['forced']['max_lsb']})"


def _second(level: Mapping[str, Any]) -> str:
    differ, most = level["forced"]["mismatched"], level["forced"]["max_lsb"]
    text = (
        f"{differ:,} of {level['values']:,} integers differ kernel by kernel{f', by {most} at most' if differ else ''}"
    )
    alike = f"; as deployed it decides as the reference in {_percent(level['agreement'])} of the samples"
    return text if level["agreement"] is None else text + alike


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.2f} %"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.6g}"


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{flag} {text!r} is not a number or a comma-separated list of three.") from error


def _size(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"--image-size {text!r} is not a size; write 224, or 224x160 for height x width.")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _grid(spec: Any) -> str:
    return f"{'int' if spec.signed else 'uint'}{spec.bits} {'per tensor' if spec.axis is None else 'per channel'}"
