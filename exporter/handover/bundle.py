"""The folder that is handed over: written whole or not at all, and checkable afterwards.

Everything is written into a staging folder beside DIR (same file system) and renamed at the end, so DIR is never half a
bundle; what a run that was killed has left there, the next run puts in order. manifest.json holds the sha256 of every
other file and no time of day: the same inputs give the same bytes.

Must not know: graphs, torch, how the model or the report came to be.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from calibrators.errors import InputError, argument
from calibrators.temporary import TemporaryFolder, remove_abandoned
from exporter.config import without_effect
from exporter.handover.bom import bill_of_materials, statement
from exporter.handover.readme import render_readme
from exporter.handover.scores import SCORES
from exporter.reporting.html import render_html
from exporter.reporting.junit import render_junit
from exporter.reporting.provenance import sha256_of
from exporter.reporting.schema import Report, dump, dump_json, read_json
from runtime_tests.ort.worker import EXACT
from runtime_tests.parity.golden import GoldenOutput

__all__ = [
    "Arrays",
    "Files",
    "check_bundle",
    "check_out",
    "check_plain",
    "read_golden",
    "verify_manifest",
    "write_bundle",
]

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
# A function that writes the model into a folder, or name -> content or file to copy.
Files: TypeAlias = Callable[[Path], object] | Mapping[str, bytes | Path]

_MANIFEST = "manifest.json"
_GOLDEN = "golden/test_data_set_{}"
_GOLDEN_PAGE = """# Golden inputs and outputs

Each `test_data_set` holds inputs and the outputs that the reference program computes of them, as ONNX tensors
(`TensorProto`) in the order of the model's signature; where sizes are free, there is one for each size that was proved.
Feed a device the inputs and compare its outputs as follows. The inputs of the first set: {origin}.

Integer kernels give the same integers on every processor of the target. Float operators do not: their last bits differ
between libraries and processors, so that rare codes after them are one step off. The tolerance is twice the largest
difference that was measured while as many codes as the proof allows were one step off. A larger difference is an error.

In onnxruntime, set the configuration entries of the session that the proof sets, since others change numbers:

{entries}

| output | how close it has to be |
|---|---|
"""
BILL, STATEMENT = "bom.json", "parity.intoto.json"
FORMAT = 2
"""Version of the bundle. Bundles of version 1, whose manifest calls it "schema", lack `data.golden` and the settings of
the gate on accuracy and of the golden samples."""
OLD = "old"
"""Folder for the replaced bundle in a temporary folder."""

HOLES_FROM, BLOCK = 1 << 30, 512
"""Bytes from which on a file is checked for holes; bytes of a block of the file system, as `stat` counts them."""
_LIBRARIES = ("python", "torch", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy")


def write_bundle(
    out: Path,
    *,
    files: Files,
    report: Report,
    golden: Sequence[tuple[Arrays, Arrays]],
    config: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a bundle to the folder `out` and return its absolute path.

    files:     a function that writes model.onnx and its external data into a given folder, or the files by name.
    golden:    sets of inputs and outputs of the model by name, in the order of its signature.
    overwrite: replace a bundle that is already there; a folder with anything else in it is never replaced.
    raises:    InputError if DIR is taken or cannot be written; DIR then stays untouched, as it does on Ctrl-C.
    """
    content = dump(report)
    with _staging(out, overwrite=overwrite) as folder:
        _put_files(files, folder)
        _write(folder, "report.json", dump_json(content).encode())
        _write(folder, "report.html", render_html(report).encode())
        _write(folder, "junit.xml", render_junit(report).encode())
        _write(folder, "README.md", render_readme(report).encode())
        _put_golden(golden, report, folder)
        digests = {path.name: sha256_of(path) for path in folder.glob("model.*")}
        _write(folder, BILL, dump_json(bill_of_materials(report, digests["model.onnx"])).encode())
        _write(folder, STATEMENT, dump_json(statement(report, digests)).encode())
        _write(folder, _MANIFEST, dump_json(_manifest(folder, content, config)).encode())
    return out.resolve()


def check_out(out: Path, *, overwrite: bool = False) -> None:
    """Check that a bundle can be written to DIR; call this before the work starts.

    raises: InputError if DIR holds something, or if no folder can be made beside it.
    """
    with _os_errors(out):
        place = out.resolve()
        if place == Path.cwd() or os.path.ismount(place):
            what = "the current folder" if place == Path.cwd() else "a mount point"
            raise InputError(
                f"{out} is {what}, which cannot be replaced by a finished bundle; give {argument('out')} a folder "
                "inside it."
            )
        above = place.parent
        while not above.exists():
            above = above.parent
        remove_abandoned(above, _rescue)
        _check_free(place, overwrite=overwrite)
        TemporaryFolder(above).remove()


def _check_free(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file; give {argument('out')} a folder that does not exist yet.")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise InputError(
            f"{out} exists and is not empty; choose another {argument('out')}, or replace the bundle with "
            f"{argument('overwrite', True)}."
        )
    if not (out / _MANIFEST).is_file():
        raise InputError(
            f"{out} is not a bundle (no {_MANIFEST}), so {argument('overwrite', True)} will not replace it; choose "
            f"another {argument('out')}."
        )
    strangers = sorted(set(_walk(out)) - set(_read_manifest(out)["files"]) - {_MANIFEST})
    if strangers:
        raise InputError(
            f"{out} also holds {strangers[0]}, which intact did not write; move it away, then use "
            f"{argument('overwrite', True)}."
        )


@contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    """Turn an error of the operating system, or a loop of links, into an InputError."""
    try:
        out.resolve()
    except RuntimeError as error:  # until Python 3.13, which resolves it and fails in the first use
        raise InputError(
            f"cannot write the bundle {out}: its links lead in a circle; choose another {argument('out')}."
        ) from error
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write the bundle {out}: {reason}. Nothing was left there; free some space, fix the "
                         f"permissions, or choose another {argument('out')}.") from error  # fmt: skip


@contextmanager
def _staging(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a new folder that becomes `out` if the body succeeds and is removed if it fails."""
    with _os_errors(out):
        out = out.resolve()
        if out.parent.exists():
            remove_abandoned(out.parent, _rescue)
        _check_free(out, overwrite=overwrite)
        made = [path for path in (out.parent, *out.parent.parents) if not path.exists()]  # innermost first
        finished = False
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryFolder(out.parent) as stage:
                (stage / "new").mkdir()  # with the rights of the user's umask, which a temporary folder does not have
                yield stage / "new"
                _check_free(out, overwrite=overwrite)  # minutes may have passed
                _swap(stage / "new", out, stage / OLD / out.name)
                finished = True
        finally:
            if not finished:
                _remove_empty(made)


def _rescue(stage: Path) -> None:
    """Put back a bundle that a killed run was about to replace."""
    for old in (stage / OLD).glob("*"):
        if not (stage.parent / old.name).exists():
            old.rename(stage.parent / old.name)


def _swap(new: Path, out: Path, old: Path) -> None:
    """Rename `new` to `out`; what was there goes to `old`, and comes back if the second rename fails."""
    if not out.exists():
        new.rename(out)
        return
    old.parent.mkdir()
    try:
        out.rename(old)
        new.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove the parent folders that this run made, innermost first, unless something else was put there."""
    for folder in folders:
        if not folder.is_dir() or any(folder.iterdir()):
            return
        folder.rmdir()


def _put_files(files: Files, folder: Path) -> None:
    if callable(files):
        files(folder)
    else:
        for name, content in files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, _inside(folder, name))
            else:
                _write(folder, name, content)
    if not (folder / "model.onnx").is_file():
        raise ValueError("`files` must write model.onnx into the folder it is given")


def _put_golden(sets: Sequence[tuple[Arrays, Arrays]], report: Report, folder: Path) -> None:
    """Write inputs and outputs in the ONNX test-data layout, each output with its tolerance, and a page about them."""
    texts = {output.name: _tolerance(output) for output in report.golden or ()}
    origin = report.data.golden.source if report.data and report.data.golden else "samples of the data"
    page = "\n".join(f"| `{name}` | {text} |" for name, text in texts.items())
    entries = "\n".join(f"- `{name}`: `{value}`" for name, value in EXACT.items())
    _write(folder, "golden/README.md", f"{_GOLDEN_PAGE.format(entries=entries, origin=origin)}{page}\n".encode())
    for number, golden in enumerate(sets):
        for kind, arrays in zip(("input", "output"), golden, strict=True):
            for index, (name, array) in enumerate(arrays.items()):
                tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
                if kind == "output":
                    tensor.doc_string = texts.get(name, "")
                path = f"{_GOLDEN.format(number)}/{kind}_{index}.pb"
                _write(folder, path, tensor.SerializeToString(deterministic=True))


def _tolerance(output: GoldenOutput) -> str:
    """Return how closely another runtime has to reproduce an output."""
    if not output.tolerance:
        return "bit-identical: integer kernels alone compute it"
    share = ""
    if output.largest:
        share = f", {output.tolerance / output.largest:.2g} of its largest value {output.largest:.3g}"
    return f"absolute tolerance {output.tolerance:g}{share}: float operators compute part of it"


def read_golden(bundle: Path) -> list[tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]]]]:
    """Return inputs and outputs of each golden set by name, in the order of the model's signature.

    raises: InputError if a file is missing or is no ONNX tensor.
    """
    folders = itertools.takewhile(Path.exists, (bundle / _GOLDEN.format(number) for number in itertools.count(1)))
    sets = [bundle / _GOLDEN.format(0), *folders]
    return [(_read_arrays(folder, "input"), _read_arrays(folder, "output")) for folder in sets]


def _read_arrays(folder: Path, kind: str) -> dict[str, npt.NDArray[Any]]:
    paths = sorted(folder.glob(f"{kind}_*.pb"), key=lambda path: (len(path.name), path.name))  # 10 after 9
    if not paths:
        raise InputError(f"{folder} holds no golden {kind}; the bundle is incomplete: export the model again.")
    arrays = {}
    for path in paths:
        try:
            tensor = onnx.TensorProto.FromString(path.read_bytes())
            if tensor.data_location != onnx.TensorProto.DEFAULT or not tensor.HasField("raw_data"):
                raise ValueError("it holds no raw values")
            if min(tensor.dims, default=0) < 0:
                raise ValueError("it has a negative size")
            arrays[tensor.name] = numpy_helper.to_array(tensor)
            if arrays[tensor.name].dtype.kind not in "biuf":
                raise ValueError("torch knows no such values")
        except (OSError, DecodeError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
            raise InputError(f"{path} is not an ONNX tensor: {error}; export the model again.") from error
    return arrays


def _manifest(folder: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of manifest.json; `artifact_sha256` covers what a rebuild reproduces: model and golden set."""
    files = {name: _entry(folder / name) for name in sorted(_walk(folder))}
    environment, hidden = report.get("environment", {}), without_effect(config.get("method"))
    return {
        "format": FORMAT,
        "tool": report.get("tool"),
        "libraries": {name: environment[name] for name in _LIBRARIES if name in environment},
        "target": report["target"],
        "method": report["method"],
        "min_onnxruntime": report.get("emission", {}).get("min_onnxruntime"),
        "seed": config.get("seed"),
        "config": dict(config),
        "config_sha256": _digest({key: value for key, value in config.items() if key not in hidden}),
        "data": report.get("data", {}),
        **{name: report.get("model", {}).get(name, []) for name in ("inputs", "outputs")},
        "sizes": report.get("sizes"),
        "holds": report.get("holds", []),
        "artifact_sha256": _digest(repeatable({"files": files})),
        "files": files,
    }


def repeatable(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the sha256 of the files of a bundle whose bytes an export repeats: all but what was measured."""
    measured = ("report.json", "report.html", "junit.xml", "README.md", SCORES, BILL, STATEMENT)
    return {name: entry["sha256"] for name, entry in manifest["files"].items() if name not in measured}


def _digest(value: object) -> str:
    """Return the sha256 of a JSON value, whatever the order of its keys."""
    canonical = json.dumps(json.loads(dump_json(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_bundle(folder: Path) -> None:
    """Raise InputError unless this is a folder."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that `intact export --out DIR` wrote.")


def verify_manifest(bundle: Path) -> dict[str, Any]:
    """Return the manifest after checking that every file it lists is there, unchanged, and that there is no other file.

    raises: InputError naming the first file that is missing, changed, extra or not contained in the folder.
    """
    manifest = _read_manifest(bundle)
    here, listed = set(_walk(bundle)) - {_MANIFEST}, manifest["files"]
    for name, entry in sorted(listed.items()):
        if name not in here:
            raise InputError(f"{bundle} is not intact: {name} is missing; get a fresh copy of the bundle.")
        path = _inside(bundle, name)
        _refuse_holes(path)
        if entry.get("bytes") != path.stat().st_size or entry.get("sha256") != _entry(path)["sha256"]:
            raise InputError(
                f"{bundle} is not intact: {name} was changed after the export; get a fresh copy of the bundle."
            )
    if here - set(listed):
        raise InputError(f"{bundle} is not intact: {min(here - set(listed))} is not in its {_MANIFEST}; remove it.")
    return manifest


def _refuse_holes(path: Path) -> None:
    """Refuse a file of which the disk holds but a part: it would take hours to read."""
    status = path.stat()
    if status.st_size > HOLES_FROM and 4 * BLOCK * status.st_blocks < status.st_size:
        raise InputError(f"{path} has {status.st_size:,} bytes, most of which are holes; do not use this bundle.")


def _read_manifest(bundle: Path) -> dict[str, Any]:
    """Read the manifest and check its form and its file names, but not the files."""
    path = bundle / _MANIFEST
    if not path.is_file():
        if inner := sorted(each.parent.as_posix() for each in bundle.glob(f"*/{_MANIFEST}")):
            raise InputError(f"{bundle} is no bundle, but holds some; give one of them: {', '.join(inner)}.")
        raise InputError(
            f"{bundle} is not a readable bundle (no {_MANIFEST}); give the folder that `intact export` wrote."
        )
    manifest: dict[str, Any] = read_json(path)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise InputError(f"{path} is not a manifest of intact: it lists no files; give a folder that it exported.")
    if (found := manifest.get("format", manifest.get("schema"))) not in range(1, FORMAT + 1):
        raise InputError(
            f"{bundle} has bundle format {found!r}, and this version of intact reads 1 to {FORMAT}; use the version "
            "that wrote it, or a newer one."
        )
    for name in files:
        _inside(bundle, name)
    return manifest


def _inside(folder: Path, name: str) -> Path:
    """Return the path of a file in the bundle.

    raises: InputError if the name leads out of the folder.
    """
    pure = PurePosixPath(name)
    odd = not pure.parts or pure.is_absolute() or ".." in pure.parts or str(pure) != name or not name.isprintable()
    if odd or "\\" in name:
        raise InputError(
            f"the file name {name!r} leads out of the bundle {folder}, or is no plain name; do not use this bundle."
        )
    return folder / pure


def check_plain(bundle: Path) -> None:
    """Check that a folder holds plain files and folders alone; nothing is opened.

    raises: InputError.
    """
    for _ in _walk(bundle):
        pass


def _walk(folder: Path) -> Iterator[str]:
    """Yield the POSIX name of every file in the folder and its sub-folders, relative to the folder.

    raises: InputError at a symbolic link or anything else that is neither file nor folder.
    """
    for root, folders, names in os.walk(folder, onerror=_raise):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise InputError(f"{path} is not a plain file or folder, and a bundle holds nothing else; remove it.")
            if not path.is_dir():
                yield path.relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error


def _write(folder: Path, name: str, content: bytes) -> None:
    path = _inside(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
