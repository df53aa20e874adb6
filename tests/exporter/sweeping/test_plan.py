"""The jobs of a sweep: combinations, texts, keys, and what is refused."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner

from calibrators.errors import InputError
from exporter.cli import app
from exporter.sweeping.plan import job_of, read_sweep, sweep_schema

CODE = """
import helper

def build():
    return helper.network()

def other():
    return helper.network()
"""
HEAD = 'model = "net.py:build"\ndata = "calib.npz"\nout = "out"\n'

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes a sweep into the current folder, beside the files of a network."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(CODE)
    Path("helper.py").write_text("def network(): ...\n")
    Path("unrelated.py").write_text("")
    Path("calib.npz").write_bytes(b"some data")

    def writer(text: str) -> Path:
        Path("sweep.toml").write_text(text)
        return Path("sweep.toml")

    return writer


SWEEP = HEAD + (
    '[sweep]\nmethod = ["minmax", {method = "percentile", options = {q = 99.0}}]\n'
    "bits = [{weight-bits = 8}, {weight-bits = 4, activation-bits = 4}]\n"
)


def test_jobs_are_all_combinations_and_the_last_list_varies_fastest(write: Write) -> None:
    sweep = read_sweep(write(SWEEP))
    assert sweep.axes == ("method", "bits")
    assert [each.label for each in sweep.jobs] == ["minmax, 8", "minmax, 4/4", "percentile, 8", "percentile, 4/4"]
    last = sweep.jobs[-1]
    assert (last.config.weight_bits, last.config.activation_bits, last.config.options) == (4, 4, {"q": 99.0})
    assert last.bundle == Path("out", f"percentile-4-4-{last.key}")
    assert last.config.cache == "out/cache"
    assert job_of(sweep, last.key) is last
    with pytest.raises(InputError, match=r"sweep.toml has no job 'none' .* --list"):
        job_of(sweep, "none")


def keys(file: Path) -> list[str]:
    return [each.key for each in read_sweep(file).jobs]


def test_keys_are_those_of_settings_and_contents(write: Write) -> None:
    file = write(SWEEP)
    before = keys(file)
    assert len(set(before)) == 4
    Path("unrelated.py").write_text("x = 1\n")
    assert keys(file) == before
    for text in ('cache = "elsewhere"\nresume = true\n', "weight_bits = 8\n"):
        assert keys(write(text + SWEEP)) == before
    assert keys(write(SWEEP.replace('"out"', '"moved"'))) == before
    assert keys(write(SWEEP.replace('"minmax", ', ""))) == before[2:]
    changed = [keys(write(SWEEP.replace("99.0", "98.0"))), keys(write("seed = 1\n" + SWEEP))]
    for name, content in (("helper.py", "x = 2\n"), ("net.py", CODE + "\n"), ("calib.npz", "other")):
        Path(name).write_text(content)
        changed.append(keys(write(SWEEP)))
    assert changed[0][:2] == before[:2] and changed[0][2:] != before[2:]
    assert len({key for each in changed[1:] for key in each} - {*before}) == 16


def test_images_count_by_name_and_content(write: Write) -> None:
    folder = Path("images", "a")
    folder.mkdir(parents=True)
    (folder / "1.png").write_bytes(b"1")
    file = write(SWEEP.replace("calib.npz", "images"))
    found = [keys(file)]
    (folder / "1.png").rename(folder / "2.png")
    found.append(keys(file))
    (folder / "2.png").write_bytes(b"2")
    found.append(keys(file))
    assert len({key for each in found for key in each}) == 12


def test_modules_are_found_without_importing_them(write: Write) -> None:
    Path("package").mkdir()
    Path("package", "__init__.py").write_text("raise RuntimeError\n")
    Path("package", "net.py").write_text("")
    file = write(SWEEP.replace("net.py:build", "package.net:build"))
    before = keys(file)
    Path("package", "net.py").write_text("x = 1\n")
    assert not {*before} & {*keys(file)}
    assert len(keys(write(SWEEP.replace("net.py:build", "exporter.demo.model:network")))) == 4


def test_a_module_counts_though_a_package_lies_beside_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path.cwd())
    Path("__init__.py").write_text("")
    file = write(SWEEP.replace("net.py:build", "helper:network"))
    before = keys(file)
    Path("helper.py").write_text("x = 1\n")
    assert not {*before} & {*keys(file)}


def test_texts_tell_entries_apart(write: Write) -> None:
    Path("folder").mkdir()
    Path("folder", "net.py").write_text(CODE)
    table = '[sweep]\nmodel = ["net.py:build", "folder/net.py:other"]\n'
    assert [each.label for each in read_sweep(write(HEAD + table)).jobs] == ["net.py:build", "net.py:other"]
    table = '[sweep]\nmodel = ["net.py:build", "folder/net.py:build"]\n'
    assert [each.label for each in read_sweep(write(HEAD + table)).jobs] == ["net.py:build", "folder/net.py:build"]
    table = "".join(f'[[sweep.model]]\nmodel = "net.py:build"\nbatch_size = {n}\n' for n in (1, 2))
    assert [each.label for each in read_sweep(write(HEAD + table)).jobs] == ["net.py:build/1", "net.py:build/2"]
    table = '[sweep]\nmin_ort = ["none", "1.19"]\nlayers = [[], [{match = "a", weight_bits = 4}]]\n'
    labels = [each.label for each in read_sweep(write(HEAD + table)).jobs]
    assert labels == ["none, none", "none, match=a weight_bits=4", "1.19, none", "1.19, match=a weight_bits=4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, r"there is no table \[sweep\] with what varies; write for example"),
        ("weight_bit = 4\n" + SWEEP, "unknown setting 'weight_bit'. Did you mean 'weight_bits'"),
        (HEAD + "[sweep]\nweight_bit = [4]", r"\[sweep\] unknown setting 'weight_bit'. Did you mean 'weight_bits'"),
        (HEAD + "[sweep]\nbits = [{weight_bit = 4}]", "bits: unknown setting 'weight_bit'. Did you mean"),
        (HEAD + '[sweep]\nmethod = "mse"', r"\[sweep\] method = 'mse' is not a list of values; write for example"),
        (HEAD + "[sweep]\nmethod = []", "is not a list of values"),
        (HEAD + "[sweep]\nbits = [{}, {weight_bits = 4}]", "bits holds an empty table"),
        (HEAD + "weight-bits = 8\nweight_bits = 4\n[sweep]\nseed = [1]", "weight_bits is given twice"),
        (HEAD + "[sweep]\nweight-bits = [8]\nweight_bits = [4]", "weight_bits is given twice"),
        (HEAD + "[sweep]\nweight_bits = [4, 99]", "weight_bits = 99 should be"),
        (HEAD + '[sweep]\nmethod = ["mes"]', "unknown method 'mes'. Did you mean 'mse'"),
        (HEAD + '[sweep]\nmethod = [{method = "mse", options = {q = 1}}]', "unknown mse option .q."),
        (HEAD + '[sweep]\ntarget = ["ort"]', "unknown target 'ort'"),
        ('target = ["ort-cpu"]\n' + SWEEP, "is a list; write it under .sweep., which makes a job of each"),
        (HEAD + "[sweep]\nseed = [1, 1]", r"\[sweep\] seed holds 1 twice"),
        (HEAD + "[sweep]\nseed = [0]\nother = [{seed = 1}]", "sets seed in seed and in other; leave it to one"),
        (HEAD + '[sweep]\nout = ["a"]', "sets out, which is that of all jobs"),
        (HEAD + '[sweep]\nsame = [{seed = 0}, {cache = "x"}]', "makes the same job twice: 0 and x"),
        (HEAD + '[sweep]\nmodel = ["absent.py:build"]', "model: absent.py does not exist"),
        (HEAD + '[sweep]\ndata = ["calibr.npz"]', "data: calibr.npz does not exist; did you mean 'calib.npz'"),
        *(
            (HEAD + f'[sweep]\nmodel = ["{module}:build"]', f"model: no module named '{module}'")
            for module in ("absent.module", "sys", "zipimport", "__main__", "..", "a..b")
        ),
        (HEAD + '[sweep]\nmodel = [""]', "model = '' should be a name that is not empty"),
        (HEAD + '[sweep]\ndata = ["/dev/null"]', "data: /dev/null is not a regular file"),
        (HEAD + '[sweep]\ndata = ["."]', r"out = 'out' lies in data = '\.'; choose a folder outside it"),
        (HEAD.replace('"out"', '"net.py/out"') + "[sweep]\nseed = [1]", "cannot be made: net.py is not a folder"),
        (HEAD.replace('"out"', '"a\\u0000"') + "[sweep]\nseed = [1]", "names no folder for the bundles"),
        (HEAD.replace("out =", "eval =") + "[sweep]\nseed = [1]", "out = None names no folder for the bundles"),
        ('data = "calib.npz"\nout = "o"\n[sweep]\nseed = [1]', "MODEL is missing"),
        (HEAD + f"[sweep]\nseed = {list(range(101))}\nbatch_size = {list(range(1, 101))}", "makes 10,100 jobs"),
    ],
)
def test_what_is_refused(text: str, message: str, write: Write) -> None:
    with pytest.raises(InputError, match=rf"^sweep.toml: .*{message}"):
        read_sweep(write(text))


def test_the_list_is_made_of_commands(write: Write) -> None:
    file = write(SWEEP)
    shown = CliRunner().invoke(app, ["sweep", str(file), "--list"])
    jobs = read_sweep(file).jobs
    rows = [line.split("\t") for line in shown.stdout.splitlines()]
    assert rows == [[j.key, f"intact sweep sweep.toml --run {j.key}", f"open: {j.label}"] for j in jobs]
    jobs[1].error.parent.mkdir()
    jobs[1].error.touch()
    listed = json.loads(CliRunner().invoke(app, ["sweep", str(file), "--list", "--json"]).stdout)
    assert [each["command"] for each in listed] == [row[1] for row in rows]
    assert listed[0]["values"] == {"method": "minmax", "bits": "8"}
    assert [each["state"] for each in listed] == ["open", "failed", "open", "open"]
    refused = CliRunner().invoke(app, ["sweep", str(file), "--list", "--gather"])
    assert refused.exit_code == 2 and "give one of them" in refused.stderr
    refused = CliRunner().invoke(app, ["sweep", str(file), "--jobs", "0"])
    assert refused.exit_code == 2 and refused.stderr == "error: --jobs 0 is not a number from 1 to 1024.\n"


def test_a_row_of_the_list_is_one_line_of_plain_text(write: Write) -> None:
    file = write(HEAD + r"[sweep]" + "\n" + r'model = ["net.py:build(a=1)", "net.py:build(a=\"\u001b[1m\tb\nc\")"]')
    shown = CliRunner().invoke(app, ["sweep", str(file), "--list"]).stdout
    assert [line.count("\t") for line in shown.splitlines()] == [2, 2] and "\x1b" not in shown


def test_the_schema_knows_what_a_sweep_may_hold() -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema", "sweep"]).stdout)
    assert schema == sweep_schema()
    check = jsonschema.Draft202012Validator(schema)
    check.check_schema(schema)
    check.validate(tomllib.loads(SWEEP.replace("-bits", "_bits")))
    for wrong in ("weight_bits = [99]", "bits = [4]", "bits = [{weight_bit = 4}]", "out = ['a']"):
        assert not check.is_valid(tomllib.loads(f"{HEAD}[sweep]\n{wrong}")), wrong
