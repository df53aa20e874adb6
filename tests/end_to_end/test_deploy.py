"""The code of docs/deploy.md runs a bundle as it stands, in Python and in C++."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from calibrators.errors import InputError
from exporter import export
from runtime_tests.ort.sessions import session
from runtime_tests.ort.worker import EXACT
from runtime_tests.workers.install import DebianPackages, run_tool
from tests.support.networks import randomize

PAGE = (Path(__file__).parents[2] / "docs/deploy.md").read_text(encoding="utf-8")
HEADERS = DebianPackages("onnxruntime-headers", "trixie", "amd64", ("libonnxruntime-dev",))
LIBRARY = Path(ort.__file__).parent / "capi" / f"libonnxruntime.so.{ort.__version__}"


def snippet(language: str) -> str:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(code)


@pytest.mark.parametrize(("language", "call"), [("python", "add_session_config_entry"), ("cpp", "AddConfigEntry")])
def test_options_are_those_of_the_proof(language: str, call: str) -> None:
    assert dict(re.findall(rf'{call}\("(.*?)", "(.*?)"\)', snippet(language))) == EXACT


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, build/net, and an image for it."""
    place = tmp_path_factory.mktemp("deploy")
    (place / "names.txt").write_text("cat\ndog\nlynx\n")
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 20, 3), np.uint8)
    settings = {"input": "uint8:nhwc", "mean": 0.5, "std": 0.25, "labels": str(place / "names.txt")}
    model = randomize(nn.Sequential(*layers), 0)
    report = export(model, [pixels], out=place / "build/net", method="mse", latency_runs=0, **settings)
    assert report["verdict"] == "pass"
    pixels[0].tofile(place / "image.rgb")
    return place


@pytest.fixture
def best(place: Path) -> int:
    """The class of the image."""
    pixels = np.fromfile(place / "image.rgb", np.uint8).reshape(1, 12, 20, 3)
    scores: np.ndarray = session(place / "build/net/model.onnx").run(None, {"input": pixels})[0]
    return int(scores.argmax())


def test_python(place: Path, best: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    exec(compile(snippet("python"), "deploy.md", "exec"), {})
    assert capsys.readouterr().out == f"{['cat', 'dog', 'lynx'][best]}\n"


@pytest.mark.slow
def test_cpp(place: Path, best: int, tmp_path: Path) -> None:
    """With Debian's headers, which are older, and the library that the wheel brings."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    try:
        HEADERS.install()
    except InputError as error:
        pytest.skip(f"no headers of onnxruntime: {error}")
    source, program, include = tmp_path / "deploy.cpp", tmp_path / "deploy", HEADERS.folder / "usr/include/onnxruntime"
    source.write_text(snippet("cpp"))
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(LIBRARY)
    found = f"-I{include}", f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}"
    run_tool(["g++", "-std=c++17", "-Wall", "-Werror", *found, source, "-lonnxruntime", "-o", program], "g++")
    index, interface = run_tool([program], "deploy", cwd=place).splitlines()
    assert int(index) == best and json.loads(interface)["labels"] == ["cat", "dog", "lynx"]
