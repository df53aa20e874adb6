"""Fill the generated parts of the documentation: mkdocs hooks, and the tables that they insert.

A page asks for a part with a comment on a line of its own, `<!-- generated: NAME ARGUMENT... -->`. The parts come from
the registries of methods and targets, the settings model, the command's own parser, the gate metrics and the measured
results in `docs/results/*.json`. Methods without a page of their own get one that holds the generated parts alone.

Must not know: how pages look.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import typer  # noqa: E402

from calibrators.grid.processors import PROCESSORS  # noqa: E402
from calibrators.methods import get_method, list_methods, range_method  # noqa: E402
from calibrators.mixed_precision.budgets import QUANTITIES  # noqa: E402
from calibrators.targets import list_targets  # noqa: E402
from exporter import cli  # noqa: E402
from exporter.config import ExportConfig, list_settings  # noqa: E402
from exporter.reporting.gates import DEFAULT_GATES  # noqa: E402
from exporter.reporting.metrics import METRICS  # noqa: E402
from runtime_tests.ort.lint import RULES  # noqa: E402
from runtime_tests.runtimes import list_runtimes  # noqa: E402

MARKER = re.compile(r"^<!-- generated: (.+?) -->$", re.MULTILINE)
ITEM = re.compile(r"^(?P<names>\w+(?:, \w+)*|\w+=\w+)(?::\s+|\s{2,})(?P<text>\S.*)$")
MISSING = "–"


# --- mkdocs hooks


def on_config(config: Any) -> Any:
    """Add the page of every method and of every design decision to the navigation."""
    _extend(config.nav, "methods/index.md", [f"methods/{info.name}.md" for info in list_methods()])
    _extend(config.nav, "adr/index.md", [f"adr/{path.name}" for path in decisions()])
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every method that has none of its own."""
    from mkdocs.structure.files import File

    for info in list_methods():
        name = f"methods/{info.name}.md"
        if files.get_file_from_path(name) is None:
            files.append(File.generated(config, name, content=f"<!-- generated: method {info.name} -->\n"))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page."""
    return fill(markdown)


def _extend(nav: list[Any], section: str, pages: Sequence[str]) -> None:
    """Append pages to the section of the navigation that holds the page `section`."""
    for entry in nav:
        for children in entry.values() if isinstance(entry, dict) else ():
            if isinstance(children, list):
                if section in children:
                    children += [page for page in pages if page not in children]
                _extend(children, section, pages)


# --- parts


def fill(markdown: str) -> str:
    """Return a page with every marker replaced by the part that it names.

    raises: KeyError for a part that does not exist.
    """

    def part(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return PARTS[name](*arguments)

    return MARKER.sub(part, markdown)


def methods() -> str:
    """Return the table of all methods, with links to their pages."""
    rows = [(f"[`{info.name}`]({info.name}.md)", info.summary) for info in list_methods()]
    return table(("method", "description"), rows)


def method(name: str) -> str:
    """Return a method's page: title, summary, options, source and departures, and what was measured with it."""
    (info,) = (known for known in list_methods() if known.name == name)
    rows = [(f"`{o.name}`", o.type, f"`{o.default}`" if o.default != "" else "", o.doc) for o in info.options]
    options = table(("option", "type", "default", "description"), rows) if rows else "The method has no options."
    results = [
        f"- [{entry['title']}](../results.md#{path.stem})" for path, entry in measurements() if name in entry["methods"]
    ]
    example = f"{name}" if not rows else f"{name} --set {info.options[0].name}={info.options[0].default}"
    return "\n\n".join(
        (
            f"# `{name}`",
            info.summary,
            f"```bash\nintact export net.py:build --data calib.npz --out build/net --method {example}\n```",
            "## Options",
            options,
            "## Source",
            source(type(get_method(name))),
            *(["## Measured", "\n".join(results)] if results else []),
        )
    )


def range_methods() -> str:
    """Return the names of the methods that a rule for a layer may name."""
    names = []
    for info in list_methods():
        try:
            range_method(info.name)
        except ValueError:
            continue
        except Exception:  # the registry refuses methods that need the whole network
            continue
        names.append(f"`{info.name}`")
    return ", ".join(names)


def runtimes() -> str:
    """Return the table of all runtimes."""
    rows = [
        (f"`{each.name}`", f"`{each.processor}`" if each.processor else "this machine's", each.summary)
        for each in list_runtimes()
    ]
    return table(("runtime", "processor", "description"), rows)


def targets() -> str:
    """Return one section per target: its grids, its opset and its operators."""
    sections = []
    for target in list_targets():
        module = next(m for m in sys.modules.values() if getattr(m, "TARGET", None) is target)
        operators = [
            ("integer kernel, writes codes", target.weighted_to_codes),
            ("integer kernel, may write floats", target.weighted_to_float),
            ("float kernel on quantized weights (weight-only)", target.weight_only),
            ("integer kernel where all inputs and the output are quantized", target.integer_ops),
            ("integer kernel where codes stand around it anyway, else float", target.fused_ops),
            ("moves codes; input and output share one scale", target.same_scale_ops),
            ("moves codes where the file applies it to the codes", target.on_codes_ops),
        ]
        rows = [
            (kind, ", ".join(f"`{name}`" for name in sorted({op.split(".")[0] for op in ops})))
            for kind, ops in operators
        ]
        grids = [
            ("activations", _grid(target.activation)),
            ("activations of 16 bits", f"{_grid(target.wide_activation)}; float kernels"),
            ("weights", _grid(target.weight)),
            ("biases", f"{_grid(target.bias)}; scale: that of the input times that of the weight"),
        ]
        facts = [
            ("runtime", f"{target.runtime} {target.min_version} or newer"),
            ("exact on", "; ".join(PROCESSORS[name].summary for name in target.exact_on)),
            ("ONNX opset", f"{target.opsets[0]}, where a file needs more, up to {target.opsets[1]}"),
            ("batch", "1" if target.static_shapes else "free where the model allows it"),
            ("rules of `intact lint` left out", ", ".join(sorted(target.ignored_rules)) or "none"),
        ]
        sections += [f"## `{target.name}`", target.summary, labelled(inspect.getdoc(module) or "").partition("\n\n")[2]]
        sections += [
            table(("", ""), facts),
            table(("", "grid"), grids),
            "### Operators",
            table(("how it runs", "ATen operators"), rows),
        ]
    return "\n\n".join(sections)


def _grid(spec: Any) -> str:
    kind = f"{'int' if spec.signed else 'uint'}{spec.bits}, {'symmetric' if spec.symmetric else 'asymmetric'}"
    return f"{kind}, one scale per {spec.granularity}, codes {spec.qmin} to {spec.qmax}"


def settings() -> str:
    """Return the table of all settings, as a TOML file, `--set` and Python keywords name them."""
    rows, flags = [], {setting.name: setting.flag for setting in list_settings()}
    for name, field in ExportConfig.model_fields.items():
        default = field.get_default(call_default_factory=True)
        flag = f"`{flags[name]}`" if flags.get(name) else "(file and `--set` only)"
        rows.append((f"`{name}`", flag, f"`{_toml(default)}`", sentence(field.description or "")))
    return table(("setting", "flag", "default", "description"), rows)


def _toml(value: object) -> str:
    if value is None:
        return "none"
    return "[]" if value == () else json.dumps(value)


def commands() -> str:
    """Return one section per command of `intact`: usage, description, flags."""
    root: Any = typer.main.get_command(cli.app)
    sections = []
    for name, command in (root.commands | {"export": cli.export_command()}).items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([*map(_form, arguments), "[OPTIONS]"])
        sections += [f"## intact {name}", f"```\nintact {name} {usage}\n```", markup(command.help or "")]
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in command.params:
            if (text := getattr(parameter, "help", None)) and not getattr(parameter, "hidden", False):
                panel = getattr(parameter, "rich_help_panel", None) or "Input and output"
                panels.setdefault(panel, []).append((_flag(parameter), markup(text)))
        for panel, rows in sorted(panels.items(), key=lambda entry: entry[0] == "Running"):  # which comes last
            sections += [f"**{panel}**", table(("argument" if panel == "Arguments" else "flag", "description"), rows)]
    return "\n\n".join(sections)


def _flag(parameter: Any) -> str:
    """Return an argument or a flag as `intact --help` names it, with the form of its value."""
    if parameter.param_type_name == "argument":
        return f"`{_form(parameter)}`"
    names = ", ".join(f"`{name}`" for name in sorted(parameter.opts, key=len, reverse=True))
    return names if parameter.is_flag else f"{names} `{_form(parameter)}`"


def _form(parameter: Any) -> str:
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", str)
    return str(parameter.metavar or {int: "N", float: "NUMBER"}.get(kind, "NAME"))


def gates() -> str:
    """Return the table of gate metrics."""
    needs = {(False, False): "", (True, False): "`--eval`", (True, True): "`--eval` with labels"}
    rows = [
        (f"`{name}`", metric.help, needs[metric.needs_eval, metric.needs_labels]) for name, metric in METRICS.items()
    ]
    return table(("metric", "value", "needs"), rows)


def default_gates() -> str:
    """Return the gates of every export as a sentence's list."""
    return ", ".join(f"`{gate.expression}`" for gate in DEFAULT_GATES) + "."


def lint_rules() -> str:
    """Return the table of the linter's rules, in the order in which they run."""
    rows = [(f"`{rule.name}`", rule.severity, rule.why) for rule in RULES.values()]
    return table(("rule", "severity", "why"), rows)


def budgets() -> str:
    """Return the table of quantities that a budget can limit."""
    return table(("quantity", "meaning"), [(f"`{name}`", text) for name, text in QUANTITIES.items()])


def adr_index() -> str:
    """Return the list of design decisions."""
    return "\n".join(f"- [{title(path)}]({path.name})" for path in decisions())


def results(name: str) -> str:
    """Return a measured table with its command and provenance."""
    entry = json.loads((DOCS / "results" / f"{name}.json").read_text(encoding="utf-8"))
    formats = [column.get("format", "{}") for column in entry["columns"]]
    rows = [[cell(value, text) for value, text in zip(row, formats, strict=True)] for row in entry["rows"]]
    measured = entry["measured"]
    versions = ", ".join(f"{library} {version}" for library, version in measured["versions"].items())
    threads = f"; {measured['threads']} thread{'s' if measured['threads'] > 1 else ''}" if "threads" in measured else ""
    return "\n\n".join(
        (
            f"### {entry['title']} {{#{name}}}",
            *entry["notes"],
            table([column["title"] for column in entry["columns"]], rows),
            f"Measured {measured['date']}; CPU: {measured['cpu']}{threads}; {versions}. Data: "
            f"[`{name}.json`](results/{name}.json). Command:",
            f"```bash\n{entry['command']}\n```",
        )
    )


def cell(value: Any, form: str) -> str:
    """Return one value of a measured table as text.

    value: a number, text, None, {mean, spread, seeds}, {value, note}, {value, error} or {value, low, high}.
    form:  the column's format of numbers, such as "{:.2f} %".
    """
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        return form.format(value)
    if "note" in value:
        return f"{form.format(value['value'])} {value['note']}"
    number, unit = form.partition("}")[0] + "}", form.partition("}")[2]
    if "low" in value:
        return f"{number.format(value['value'])} [{number.format(value['low'])}, {number.format(value['high'])}]{unit}"
    if "error" in value:
        return f"{number.format(value['value'])} ± {number.replace('+', '').format(value['error'])}{unit}"
    return f"{number.format(value['mean'])} ± {number.format(value['spread'])}{unit} ({value['seeds']} seeds)"


PARTS: dict[str, Callable[..., str]] = {
    "adr-index": adr_index,
    "budgets": budgets,
    "commands": commands,
    "default-gates": default_gates,
    "gates": gates,
    "lint-rules": lint_rules,
    "method": method,
    "methods": methods,
    "range-methods": range_methods,
    "results": results,
    "settings": settings,
    "runtimes": runtimes,
    "targets": targets,
}


# --- sources and text


def decisions() -> list[Path]:
    """Return the pages of the design decisions, in order."""
    return sorted((DOCS / "adr").glob("[0-9]*.md"))


def measurements() -> list[tuple[Path, dict[str, Any]]]:
    """Return the committed measurements, by file."""
    paths = sorted((DOCS / "results").glob("*.json"))
    return [(path, json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def title(page: Path) -> str:
    """Return the title of a page."""
    return page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; line breaks and bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_escaped(text) for text in line)} |" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def source(method: type) -> str:
    """Return the docstring of a method's module, followed by those of its bases until one names a source."""
    texts: list[str] = []
    for base in method.__mro__:
        for owner in (sys.modules[base.__module__], base):
            text = inspect.getdoc(owner) or ""
            if owner is method or base is object or (texts and "source:" not in text):
                continue
            texts.append(labelled(text))
            if "source:" in text:
                return "\n\n".join(texts)
    return "\n\n".join(texts)


def labelled(docstring: str) -> str:
    """Return a docstring as paragraphs with labelled `source:` and `Departs:` lines, without `Must not know`."""
    text = re.sub(r"\n?Must not know:.*?(?=\n\n|\Z)", "", docstring, flags=re.DOTALL)
    text = re.sub(r"^source:", "\n**Source:**", text, flags=re.MULTILINE)
    text = re.sub(r"^Departs:", "\n**Departures:**", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", listed(text)).replace("|", "\\|").strip()


def listed(docstring: str) -> str:
    """Return a docstring whose lines `name: text`, with their indented continuations, are a Markdown list."""
    lines: list[str] = []
    in_item = False
    for line in docstring.splitlines():
        found = ITEM.match(line)
        if found:
            names = ", ".join(f"**{name}**" for name in found["names"].split(", "))
            lines += [] if in_item else [""]
            lines.append(f"- {names}: {found['text']}")
        elif in_item and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
        in_item = bool(found) or (in_item and line.startswith("  "))
    return "\n".join(lines)


def markup(text: str) -> str:
    """Return help text with the terminal's markup as Markdown."""
    text = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", lambda found: " ".join(found[0].split()), text)
    return text.replace("\\[", "[").replace("[mse]", "\\[mse]")


def sentence(text: str) -> str:
    """Return `text` with a capital first letter."""
    return text[:1].upper() + text[1:]
