"""The scripts of ci/ run as the GitHub Action, the GitLab template and the Dockerfile call them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / "ci"
LIMIT_S = 1200


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCH_INDEX": "", "PYTHON": sys.executable, **variables}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="requirements are pinned for Python 3.11")
def test_a_fresh_environment_exports_and_judges(tmp_path: Path) -> None:
    """Installation with pinned hashes into an empty environment, an export that passes, and one whose gate fails."""
    installed = run("sh", str(CI / "install.sh"), "venv", str(ROOT), cwd=tmp_path)
    assert installed.returncode == 0 and installed.stdout.startswith("intact "), installed.stdout + installed.stderr
    path = f"{tmp_path}/venv/bin{os.pathsep}{os.environ['PATH']}"
    export = ("sh", str(CI / "export.sh"), str(ROOT / "examples/ci_job/intact.toml"))
    passed = run(*export, "build/good", cwd=tmp_path, PATH=path)
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert (tmp_path / "build/good.md").read_text().startswith("## PASS: good")
    assert json.loads((tmp_path / "build/good/report.json").read_text())["verdict"] == "pass"
    variables = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "page.md")}
    failed = run(*export, "build/bad", "--gate", "size_ratio<0.01", cwd=tmp_path, PATH=path, **variables)
    assert failed.returncode == 1 and "::error title=intact::" in failed.stdout
    assert (tmp_path / "page.md").read_text().startswith("## FAIL: bad")
    missing = run(*export[:2], "none.toml", "build/none", cwd=tmp_path, PATH=path)
    assert missing.returncode == 2 and "none.toml" in missing.stderr


@pytest.mark.parametrize("name", ["action.yml", "gitlab.yml", "Dockerfile"])
def test_every_form_calls_the_scripts(name: str) -> None:
    text = (CI / name).read_text(encoding="utf-8")
    called = {match for match in re.findall(r"([a-z]+)\.sh", text)}
    assert called == {"install", "export"}
    assert all((CI / f"{script}.sh").is_file() for script in called)


def test_requirements_are_pinned_by_hash_and_cover_the_project() -> None:
    lines = [line for line in (CI / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", project, re.DOTALL | re.MULTILINE)
    assert block is not None
    wanted = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r'"([\w.-]+)', block[1])}
    assert wanted and wanted <= pinned


def test_every_promised_version_is_a_constraint_of_the_lowest_lane() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    done = subprocess.run([sys.executable, str(ROOT / "ci/lowest.py")], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["openvino"], *extras["signing"]]
    assert len(lines) == len(listed) and "onnx==1.20" in lines
    for line in lines:
        name, _, version = line.partition("==")
        assert any(re.fullmatch(rf"{re.escape(name)}>={re.escape(version)}(,<.*)?", each) for each in listed), line
