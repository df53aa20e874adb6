"""The command: arguments, messages, exit codes. The work itself is replaced; whole exports are tested elsewhere."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from calibrators.errors import ExportError, InputError, argument
from calibrators.placement.layer_rules import LayerRule
from exporter.checks import check_settings
from exporter.cli import app
from exporter.config import ExportConfig
from exporter.console import INTERNAL_FAULT, INTERRUPTED
from exporter.handover.bundle import check_out
from exporter.inputs.open import open_both
from exporter.job import as_flag
from exporter.progress import Progress, console_progress, default_progress
from exporter.reporting.schema import validate_report
from exporter.reporting.terminal import summary_rows
from tests.exporter.reporting.sample_report import sample_report

ARGUMENTS = ["torch.nn:Identity", "--data", "exporter.demo.model:calibration"]

Call = dict[str, Any]


def report(verdict: str = "pass") -> dict[str, Any]:
    found = sample_report(3)
    for key in ("limited_weights", "unsigned_weights", "settled", "portability", "warnings"):
        del found[key]
    found["parity"]["optimized"] |= {"mismatched": 9, "float_mismatched": 7, "float_values": 4000}
    found["accuracy"] |= {"samples": 500, "float": 0.975, "reference": 0.97, "runtime": 0.97}
    found["coverage"]["integer_macs"] = 0.998
    found["size"] |= {"float_bytes": 40960, "bytes": 10240}
    found["latency_ms"] |= {"float": 3.0, "quantized": 1.0, "ratio": 1 / 3, "ratio_interval": [0.3, 0.35]}
    passed = verdict == "pass"
    gate = {
        "name": "accuracy_drop",
        "limit": 0.001,
        "value": 0.005,
        "passed": passed,
        "expression": "accuracy_drop<=0.001",
    }
    return found | {"verdict": verdict, "gates": [gate]}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Any]:
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})

    return invoke


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Stands for exporter.pipeline; records what the command asks of it."""
    calls: list[Call] = []
    module = types.ModuleType("exporter.pipeline")

    def export(model: str, data: str, **rest: Any) -> dict[str, Any]:
        calls.append({"model": model, "data": data, **rest})
        return report()

    def verify(folder: Path, progress: Progress, on: Sequence[str]) -> dict[str, Any]:
        calls.append({"folder": folder, "on": on})
        return report()

    module.export = export  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporter.pipeline", module)
    verifying = types.ModuleType("exporter.verify")
    verifying.verify = verify  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporter.verify", verifying)
    return calls


@pytest.fixture
def failing(pipeline: list[Call], monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes the export raise."""

    def arrange(error: BaseException) -> None:
        def export(*_: Any, **__: Any) -> dict[str, Any]:
            raise error

        monkeypatch.setattr(sys.modules["exporter.pipeline"], "export", export)

    return arrange


@pytest.mark.parametrize(
    "asked",
    [
        [
            (["--help"], ["torch", "onnx", "numpy", "pydantic"]),
            (["--version"], ["torch", "onnx", "numpy", "pydantic"]),
            (["export", "--help"], ["torch", "onnx"]),
            (["methods"], ["torch", "onnx"]),
            (["methods", "qdrop"], ["torch", "onnx"]),
            (["targets"], ["torch", "onnx"]),
        ],
        [(["runtimes"], ["torch", "exporter.config"])],
    ],
    ids=["help and lists", "runtimes"],
)
def test_help_and_lists_answer_without_heavy_imports(asked: list[tuple[list[str], list[str]]]) -> None:
    """One process asks for all of a list: first the commands that import least."""
    code = (
        "import sys; from typer.testing import CliRunner; from exporter.cli import app\n"
        f"for command, kept_out in {asked!r}:\n"
        "    exit_code, imported = CliRunner().invoke(app, command).exit_code, {*kept_out} & sys.modules.keys()\n"
        "    assert exit_code == 0 and not imported, (command, exit_code, imported)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["export", "verify", "methods", "targets", "runtimes", "demo"])
def test_every_command_teaches_by_example(run: Callable[..., Any], command: str) -> None:
    result = run(command, "--help")
    assert "bool" not in result.output.lower()
    assert result.exit_code == 0
    assert f"Example: intact {'export' if command == 'targets' else command}" in result.output


@pytest.mark.parametrize(
    "field",
    ["target", "method", "weight_bits", "activation_bits", "first_last_bits", "batch_size", "calibration_batches",
     "parity_samples", "seed", "device", "cache_gib"],
)  # fmt: skip
def test_help_tells_the_default_of_the_setting(run: Callable[..., Any], field: str) -> None:
    value = getattr(ExportConfig(), field)
    shown = "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    (line,) = [line for line in run("export", "--help").output.splitlines() if f"--{field.replace('_', '-')} " in line]
    assert f"[{shown}]" in line


def test_version_alone_is_enough(run: Callable[..., Any]) -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("intact ")


def test_targets_are_listed(run: Callable[..., Any]) -> None:
    result = run("targets")
    assert result.exit_code == 0
    assert "ort-cpu" in result.output
    assert "uint8 per tensor" in result.output


def test_lists_are_printed_as_json_too(run: Callable[..., Any]) -> None:
    methods, targets, runtimes = (json.loads(run(name, "--json").stdout) for name in ("methods", "targets", "runtimes"))
    assert {"qdrop", "gptq"} <= {each["name"] for each in methods}
    options = json.loads(run("methods", "qdrop", "--json").stdout)["options"]
    assert {"name": "batch", "type": "int", "default": 32, "doc": "samples per step"} in options
    (target,) = [each for each in targets if each["name"] == "ort-cpu"]
    assert target["activation"]["bits"] == 8 and "x86-vnni" in target["exact_on"]
    assert all((each["version"] is None) == (each["missing"] is not None) for each in runtimes)


def test_the_help_of_export_is_whole_at_80_columns() -> None:
    result = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "80", "NO_COLOR": "1"})
    assert result.exit_code == 0 and "--gate" in result.output and "…" not in result.output


@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_narrow_terminal_cuts_no_table(columns: str) -> None:
    result = CliRunner().invoke(app, ["targets"], env={"COLUMNS": columns, "NO_COLOR": "1"})
    assert result.exit_code == 0 and "ort-cpu" in result.output
    assert "\N{HORIZONTAL ELLIPSIS}" not in result.output


@pytest.mark.parametrize(("name", "near"), [("weight_bit", "weight_bits"), ("act_ordre", "act_order"), ("zebra", None)])
def test_a_misspelt_setting_is_looked_for_among_settings_and_options(name: str, near: str | None) -> None:
    with pytest.raises(InputError, match=f"unknown setting or gptq option '{name}'") as caught:
        check_settings(ExportConfig(method="gptq", options={name: 4}))
    assert ("Did you mean" in str(caught.value)) == (near is not None)
    assert near is None or f"mean '{near}'" in str(caught.value)


def test_faults_of_the_input_come_before_a_folder_that_is_taken(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    arguments = ["--data", "exporter.demo.model:calibration", "--out", str(tmp_path / "out")]
    assert "exists and is not empty" in run("export", "exporter.demo.model:network", *arguments).stderr
    for model, more, said in (
        ("exporter.demo.model:netwrok", (), "netwrok"),
        ("exporter.demo.model:network", ("--set", "weight_bit=4"), "weight_bit"),
        ("exporter.demo.model:network", ("--eval", "nowhere.npz"), "nowhere.npz"),
    ):
        result = run("export", model, *arguments, *more)
        assert result.exit_code == 2 and said in result.stderr and "not empty" not in result.stderr


def test_methods_are_listed_by_a_line_each(run: Callable[..., Any]) -> None:
    from calibrators.methods import list_methods

    result = run("methods")
    assert result.exit_code == 0, result.output
    for method in list_methods():
        assert sum(method.name in line and method.summary in line for line in result.output.splitlines()) == 1, method
    assert "`intact methods NAME`" in result.output


def test_a_method_is_listed_with_its_options_and_defaults(run: Callable[..., Any]) -> None:
    from calibrators.methods import list_methods

    for method in list_methods():
        result = run("methods", method.name)
        assert result.exit_code == 0, result.output
        assert method.summary in result.output
        for option in method.options:
            (line,) = [line for line in result.output.splitlines() if f" {option.name} " in line[:24]]
            assert str(option.default) in line and option.doc in line
    result = run("methods", "qdropp")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: unknown method 'qdropp'. Did you mean 'qdrop'")


def test_flags_reach_the_pipeline(run: Callable[..., Any], pipeline: list[Call], tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("seed = 5\nweight_bits = 4\n")
    result = run(
        "export", *ARGUMENTS, "--eval", "exporter.demo.model:evaluation", "--out", str(tmp_path / "out"), "--config",
        str(tmp_path / "a.toml"), "--weight-bits", "6", "--set", "activation_bits=7", "--per-tensor-weights",
        "--exclude", "a.*", "--exclude", "b", "--layer", "a.*: weight_bits=4", "--layer", "b: float=true",
        "--gate", "accuracy_drop<=0.01", "--quiet", "--explain",
        "--cache-gib", "0.5", "--device", "cpu", "--reference-samples", "all",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (call,) = pipeline
    config = call["config"]
    assert (config.seed, config.weight_bits, config.activation_bits, config.per_tensor_weights) == (5, 6, 7, True)
    assert (config.exclude, config.gates) == (("a.*", "b"), ("accuracy_drop<=0.01",))
    assert config.layers == (LayerRule("a.*", weight_bits=4), LayerRule("b", float=True))
    assert (config.device, config.cache_gib, config.explain) == ("cpu", 0.5, True)
    assert config.reference_samples == "all"
    assert (call["model"], call["data"]) == ("torch.nn:Identity", "exporter.demo.model:calibration")
    assert call["eval_data"] == "exporter.demo.model:evaluation"
    assert call["out"] == tmp_path / "out"


def test_image_flags_reach_the_folder_only(run: Callable[..., Any], pipeline: list[Call], tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "images" / "a.png")
    data = str(tmp_path / "images")
    flags = ["--image-size", "4x8", "--mean", "0.5,0.5,0.5", "--std", "0.5"]
    result = run("export", "torch.nn:Identity", "--data", data, "--out", str(tmp_path / "out"), *flags)
    assert result.exit_code == 0, result.output
    opened, _ = open_both(data, ARGUMENTS[2], pipeline[0]["config"])
    x = opened.example().inputs[0]
    assert tuple(x.shape) == (1, 3, 4, 8)
    assert x[0, :, 0, 0].tolist() == [1.0, -1.0, -1.0]


def test_image_flags_without_a_folder_are_refused(run: Callable[..., Any], tmp_path: Path) -> None:
    refused = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"), "--image-size", "4x8")
    assert refused.exit_code == 2
    assert "apply to folders of images" in refused.stderr


def test_the_demo_uses_what_ships_with_the_package(
    run: Callable[..., Any], pipeline: list[Call], tmp_path: Path
) -> None:
    result = run("demo", "--out", str(tmp_path / "out"), "--method", "minmax")
    assert result.exit_code == 0, result.output
    assert pipeline[0]["config"].method == "minmax"
    assert pipeline[0]["data"] == "exporter.demo.model:calibration"


def test_the_verdict_panel_tells_the_whole_story(run: Callable[..., Any], pipeline: list[Call], tmp_path: Path) -> None:
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"))
    for part in ("PASS", "97.50 % float, 97.00 %", "7 of 4,000", "99.80 %", "4.00x", "3.00x", "report.html"):
        assert part in result.stdout, result.stdout


@pytest.mark.parametrize(
    ("accuracy", "words"), [({"reference_samples": 512}, "2000 samples (the reference on the first 512)"),
                            ({"reference_samples": 2000}, "in the runtime, 2000 samples")],
    ids=["some", "all"],
)  # fmt: skip
def test_the_panel_says_on_how_many_samples_the_reference_ran(accuracy: dict[str, Any], words: str) -> None:
    found = sample_report(3)
    found["accuracy"] |= accuracy
    assert words in dict(summary_rows(validate_report(found)))["top1"]


@pytest.mark.parametrize(
    ("stopped", "words"),
    [("interval", "in 200 runs, "), ("runs", "in 200 runs (the limit), "), ("time", "in 200 runs (the limit of 20 s)")],
)
def test_the_panel_says_which_limit_ended_the_timing(stopped: str, words: str) -> None:
    found = sample_report(3)
    found["latency_ms"] |= {"stopped": stopped}
    assert words in dict(summary_rows(validate_report(found)))["latency"]


def test_the_verdict_panel_tells_what_portability_took(
    run: Callable[..., Any], pipeline: list[Call], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    levers = {key: sample_report(3)[key] for key in ("limited_weights", "unsigned_weights", "settled", "portability")}
    monkeypatch.setattr(sys.modules["exporter.pipeline"], "export", lambda *_, **__: report("pass") | levers)
    shown = " ".join(run("export", *ARGUMENTS, "--out", str(tmp_path / "out")).stdout.replace("│", " ").split())
    assert "57 of 64 channels 1.26 times coarser on average; 1 uint8 weight; 1 scale moved off ties" in shown
    assert "1 of 7 sums, products and sigmoids differ at ties" in shown
    assert "SQNR on calibration data 27.3 dB, 27.4 dB without these limits" in shown


def test_a_failed_gate_exits_1_and_is_named(
    run: Callable[..., Any], pipeline: list[Call], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys.modules["exporter.pipeline"], "export", lambda *_, **__: report("fail"))
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "accuracy_drop<=0.001: it is 0.5 points, the limit is 0.1 points" in result.stdout


def test_verify_runs_and_needs_a_folder(run: Callable[..., Any], pipeline: list[Call], tmp_path: Path) -> None:
    assert run("verify", str(tmp_path)).exit_code == 0
    assert run("verify", str(tmp_path), "--on", "avx2", "--on", "web").exit_code == 0
    assert pipeline == [{"folder": tmp_path, "on": ()}, {"folder": tmp_path, "on": ["avx2", "web"]}]
    missing = run("verify", str(tmp_path / "nowhere"))
    assert missing.exit_code == 2
    assert "is not a folder" in missing.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        pytest.param(["--method", "msee"], "Did you mean 'mse'", id="method"),
        pytest.param(["--target", "ort-gpu"], "Did you mean 'ort-cpu'", id="target"),
        pytest.param(["--set", "no_such_option=1"], "no_such_option", id="method option"),
        pytest.param(["--weight-bits", "9"], "weight_bits = 9", id="bits"),
        pytest.param(["--device", "gpu"], "device = 'gpu' should be cpu, cuda or cuda:N", id="device"),
        pytest.param(["--device", "cuda:²"], "should be cpu, cuda or cuda:N", id="device index"),
        pytest.param(["--reference-samples", "few"], "should be all, or a number of samples", id="samples"),
        pytest.param(["--cache-gib", "0"], "cache_gib = 0.0 should be greater than 0", id="cache"),
        pytest.param(["--cache-gib", "nan"], "cache_gib", id="no number"),
        pytest.param(["--gate", "acuracy_drop<=1"], "Did you mean 'accuracy_drop'", id="gate metric"),
        pytest.param(["--gate", "accuracy_drop"], "is not METRIC OP NUMBER", id="gate form"),
        pytest.param(["--eval", "nowhere.npz"], "nowhere.npz does not exist", id="eval"),
        pytest.param(["--config", "nowhere.toml"], "nowhere.toml does not exist", id="config"),
        pytest.param(["--mean", "a,b"], "mean = 'a,b' should be a number, or one per", id="mean"),
        pytest.param(["--image-size", "big"], "image_size = 'big' should be a size: 224", id="image size"),
        pytest.param(["--checkpoint", "nowhere.pt"], "nowhere.pt does not exist", id="checkpoint"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_leaves_nothing(
    run: Callable[..., Any], tmp_path: Path, arguments: list[str], part: str
) -> None:
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert part in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_uint8_weights_are_refused_where_they_change_nothing() -> None:
    for settings in ({"portable": "uint8"}, {"layers": ({"match": "head", "portable": "uint8"},)}):
        with pytest.raises(InputError, match=r"limits no pairs of weights.*give target='ort-cpu'"):
            check_settings(ExportConfig.model_validate({"target": "ort-cpu-vnni", **settings}))
        check_settings(ExportConfig.model_validate(settings))


@pytest.mark.parametrize(
    ("devices", "device", "part"),
    [(0, "cuda", "finds no CUDA device"), (1, "cuda:1", "finds 1 CUDA device;"), (2, "cuda:2", "2 CUDA devices;")],
    ids=["none", "one", "two"],
)
def test_a_device_that_is_not_there_is_known_before_any_work(
    monkeypatch: pytest.MonkeyPatch, devices: int, device: str, part: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: devices)
    with pytest.raises(InputError, match=f"device '{device}' is not available: .*{part}"):
        check_settings(ExportConfig(device=device))
    check_settings(ExportConfig(device="cpu" if not devices else f"cuda:{devices - 1}"))


def test_a_missing_device_exits_2_and_leaves_nothing(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("exporter.intake.load_model", lambda *_: pytest.fail("the model was loaded"))
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"), "--device", "cuda")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: device 'cuda' is not available: torch ")
    assert result.stderr.endswith("; use --device cpu.\n") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [["export"], ["export", "net.py:f"], ["nonsense"], ["export", *ARGUMENTS, "--out", "o", "--wrong", "1"]],
)
def test_usage_errors_exit_2(run: Callable[..., Any], arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2


def test_a_taken_folder_is_refused_before_any_work(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    monkeypatch.setattr("exporter.intake.capture", lambda *_, **__: pytest.fail("the work began"))
    for extra in ([], ["--overwrite"]):  # a folder that is no bundle is not overwritten either
        result = run("export", *ARGUMENTS, "--out", str(tmp_path), *extra)
        assert result.exit_code == 2, result.output
    assert (tmp_path / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        pytest.param(InputError("what, where, next."), 2, "error: what, where, next.\n", id="input"),
        pytest.param(ExportError("topk at head."), 3, "error: topk at head.\n", id="export"),
        pytest.param(KeyboardInterrupt(), INTERRUPTED, "interrupted; nothing was written.\n", id="ctrl-c"),
        pytest.param(
            KeyError("x"),
            INTERNAL_FAULT,
            "internal error: KeyError: 'x'; run again with --debug and report the traceback.\n",
            id="bug",
        ),
    ],
)
def test_errors_become_one_line_and_their_exit_code(
    run: Callable[..., Any],
    failing: Callable[[BaseException], None],
    tmp_path: Path,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    failing(error)
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"), "--quiet")
    assert result.exit_code == code
    assert result.stderr == text
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_error_itself(
    run: Callable[..., Any], failing: Callable[[BaseException], None], tmp_path: Path
) -> None:
    failing(ExportError("seen"))
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "out"), "--debug")
    assert result.exit_code == ExportError.exit_code
    assert "Traceback" in result.stderr
    assert result.stderr.endswith("error: seen\n")


def test_a_folder_with_any_name_gets_its_verdict(run: Callable[..., Any], pipeline: list[Call], tmp_path: Path) -> None:
    result = run("export", *ARGUMENTS, "--out", str(tmp_path / "x[/red]\udcffy"))
    assert result.exit_code == 0
    assert r"x[/red]\xffy" in result.stdout.replace("\n", "")


@pytest.mark.parametrize("error", [BrokenPipeError(), SystemExit(1)], ids=["pipe", "rich"])
def test_a_verdict_that_nobody_reads_keeps_its_exit_code(
    run: Callable[..., Any],
    pipeline: list[Call],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: BaseException,
) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Console, "print", closed)
    assert run("export", *ARGUMENTS, "--out", str(tmp_path / "out")).exit_code == 0


@pytest.mark.parametrize("arguments", [["methods"], ["--help"]])
def test_a_reader_that_goes_away_is_no_fault(arguments: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "exporter", *arguments], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert result.returncode in (1, 128 + signal.SIGPIPE)
    assert result.stderr == b""


# ---- progress


def test_progress_on_a_file_is_plain_lines_at_a_modest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = console_progress(stream)
    with progress.stage("calibrate", total=40) as bar:
        for _ in range(40):
            now += 0.25
            bar.advance()
    with progress.stage("emit"):
        pass
    assert stream.getvalue().splitlines() == [
        "calibrate: 20/40 (5.0 s, 5.0 s left)",
        "calibrate: 40/40 (10.0 s)",
        "calibrate: 40/40 done (10.0 s)",
        "emit: done (0.0 s)",
    ]


def test_lines_of_long_work_become_rare(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with console_progress(stream).stage("reconstruct", total=28_800) as bar:
        for _ in range(28_800):
            now += 0.125
            bar.advance()
    lines = stream.getvalue().splitlines()
    assert 60 < len(lines) < 120, "an hour"
    assert lines[0] == "reconstruct: 40/28800 (5.0 s, 59 min 55 s left)"
    assert lines[-1] == "reconstruct: 28800/28800 done (60 min 00 s)"


def test_steps_that_are_taken_over_count_neither_as_work_nor_as_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr("exporter.progress.time.monotonic", lambda: clock)
    stream = io.StringIO()
    with console_progress(stream).stage("reconstruct", total=100) as bar:
        bar.skip(80)
        clock = 6.0
        bar.advance(5)
    assert stream.getvalue().splitlines()[0] == "reconstruct: 5/20 (6.0 s, 18.0 s left)"
    terminal = Terminal()
    with console_progress(terminal).stage("reconstruct", total=100) as bar:
        bar.skip(80)
        bar.advance(20)
    assert "20/20" in terminal.getvalue()


@pytest.mark.parametrize("widgets", [False, True])
def test_a_notebook_shows_progress_without_being_asked(
    widgets: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with default_progress().stage("calibrate"):
        pass
    assert capsys.readouterr() == ("", ""), "a script is not told"
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("exporter.progress.find_spec", lambda name: widgets)
    if widgets:
        assert type(default_progress()) is type(console_progress(Terminal()))
        return
    with default_progress().stage("calibrate", 3) as bar:
        bar.advance(3)
    assert capsys.readouterr().out == "calibrate: 3/3 done (0.0 s)\n"


def test_python_completes_every_setting_of_an_export() -> None:
    from exporter.dry_run import dry_run
    from exporter.pipeline import export

    for function in (export, dry_run):
        parameters = inspect.signature(function).parameters
        assert {"model", "data", "eval_data", *ExportConfig.model_fields} <= parameters.keys()
        assert parameters["weight_bits"].default == 8
    whole, dry = (inspect.signature(function).parameters for function in (export, dry_run))
    assert whole.keys() - dry.keys() == {"ranks"} and not dry.keys() - whole.keys()
    assert {name for name in dry if str(dry[name]) != str(whole[name])} == {"out"}, "a dry run needs no folder"


def test_a_shell_completes_commands_and_flags() -> None:
    def completed(words: str) -> str:
        environment = {**os.environ, "_INTACT_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        command = [sys.executable, "-c", "from exporter.cli import app; app(prog_name='intact')"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert completed("intact comp").split() == ["compare-dump", "compare"]
    assert completed("intact export --weight-b").split() == ["--weight-bits"]


def test_messages_name_arguments_as_the_caller_gives_them(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = run("export", *ARGUMENTS, "--out", str(tmp_path))
    assert "choose another --out, or replace the bundle with --overwrite" in result.stderr
    with pytest.raises(InputError, match="choose another out, or replace the bundle with overwrite=True"):
        check_out(tmp_path)
    assert argument("min_ort", "1.19") == "min_ort='1.19'"
    flags = as_flag("gates"), as_flag("eval_data"), as_flag("min_ort", "1.19"), as_flag("wide_taps", False)
    assert flags == ("--gate", "--eval", "--min-ort 1.19", "--set wide_taps=false")
    assert as_flag("options", {"batch": 8}) == "--set batch=8"
    assert as_flag("layers", ["a.*: weight_bits=4", "b"]) == "--layer 'a.*: weight_bits=4' --layer b"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stages_inside_a_stage_share_its_display() -> None:
    stream = Terminal()
    progress = console_progress(stream)
    for _ in range(2):
        with progress.stage("search", total=4) as outer:
            outer.advance(1)
            with progress.stage("statistics") as inner:
                inner.advance(3)
            outer.advance(3)
    assert "3/3" in stream.getvalue() and "4/4" in stream.getvalue()


def test_an_interrupted_stage_gives_the_display_back() -> None:
    progress = console_progress(Terminal())
    with pytest.raises(KeyboardInterrupt), progress.stage("search", total=4), progress.stage("inner"):
        raise KeyboardInterrupt
    with progress.stage("again", total=1) as bar:
        bar.advance()


def test_bars_say_how_much_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    with console_progress(stream).stage("reconstruct", total=1000) as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.advance()
    assert " left" in stream.getvalue()
    open_end = Terminal()
    with console_progress(open_end).stage("calibrate") as bar:
        for _ in range(3):
            time.sleep(0.02)
            bar.advance()
    assert " left" not in open_end.getvalue()


def test_progress_on_a_terminal_is_bars_and_quiet_is_silence() -> None:
    stream = Terminal()
    for quiet in (False, True):
        with console_progress(stream, quiet=quiet).stage("fold", total=2) as bar:
            bar.advance(2)
        if not quiet:
            assert "2/2" in stream.getvalue()
            length = len(stream.getvalue())
    assert len(stream.getvalue()) == length
