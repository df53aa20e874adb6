"""The content of what a job is made from: files, folders, and the code that names of callables lead to.

Must not know: sweeps, what the files hold.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from modulefinder import ModuleFinder
from pathlib import Path

from calibrators.errors import InputError, no_file
from exporter.frontend.user_code import SPEC
from exporter.reporting.provenance import sha256_of

__all__ = ["INPUTS", "digest_of_input"]

INPUTS = ("model", "data", "eval", "checkpoint", "labels", "golden", "metric", "baseline")
"""Settings that name files, or callables in files."""


def digest_of_input(name: str, value: str) -> str | None:
    """Return the sha256 of the content that a setting names, None for one that names none.

    A callable stands for the code of its file, and for the modules beside it that the file imports; what this code
    reads is not seen. Of an installed package, the one module counts.

    raises: InputError if there is no such file.
    """
    if name not in INPUTS or (name == "golden" and not value.endswith(".npz")):
        return None
    try:
        return _digest(value)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _digest(text: str) -> str:
    path = Path(text)
    named = SPEC.fullmatch(text)
    if named and not path.exists():
        path = _module(named[1])
        return _joined({each.name: sha256_of(each) for each in _code(path)})
    if path.is_dir():
        files = (each for each in path.rglob("*") if each.is_file())
        return _joined({each.relative_to(path).as_posix(): sha256_of(each) for each in files})
    if not path.is_file():
        raise InputError(no_file(path))
    return sha256_of(path)


def _joined(digests: dict[str, str]) -> str:
    return hashlib.sha256(
        "\n".join(f"{digest} {name}" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()


def _module(source: str) -> Path:
    """Return the file of `file.py` or of `package.module`, which is not imported."""
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise InputError(no_file(path))
        return path
    package, *inner = names = source.split(".")
    if all(map(str.isidentifier, names)):
        here, found = Path(*names), _installed(package)
        if found is not None and not inner:
            return found
        base = found.parent.joinpath(*inner) if found is not None else here
        for path in (base.with_suffix(".py"), base / "__init__.py", here.with_suffix(".py"), here / "__init__.py"):
            if path.is_file():
                return path
    raise InputError(f"no module named {source!r} in a file; for a file, write its path with .py.")


def _installed(package: str) -> Path | None:
    """Return the file of a module at the top of sys.path, None if there is none, as for `sys`."""
    try:
        found = importlib.util.find_spec(package) if package != "__main__" else None  # which is another one in the job
    except ValueError:  # a module that a program made itself
        return None
    return Path(found.origin) if found is not None and found.has_location and found.origin else None


def _code(path: Path) -> Iterator[Path]:
    """Yield a file of code and the files beside it, or in folders beside it, that it imports, directly or not."""
    yield path
    finder = ModuleFinder([str(path.resolve().parent)])
    try:
        finder.run_script(str(path))
    except (SyntaxError, ValueError, OSError, RecursionError):  # the export says so
        return
    for name, module in finder.modules.items():
        file: str | None = getattr(module, "__file__", None)
        if name != "__main__" and file:
            yield Path(file)
