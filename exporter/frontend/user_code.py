"""Callables of the user, imported from a file or a module, whose exceptions become one message with the user's line.

Must not know: models, data, the command line.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from calibrators.errors import InputError, UnknownNameError, first_line, no_file

__all__ = ["SPEC", "UserCallable", "article", "listed", "load_callable", "load_object", "users_code"]

SPEC = re.compile(r"(.+?):([A-Za-z_][\w.]*)(\(.*\))?", re.DOTALL)
"""`file.py:name` or `package.module:name`, with arguments or without."""


@dataclass(frozen=True)
class UserCallable:
    """A callable of the user's, with what messages need.

    label:  the text that names it.
    folder: put on sys.path while the user's code is imported or called; None for installed packages.
    error:  class of the errors raised for the user's code.
    """

    function: Callable[..., Any]
    label: str
    folder: Path | None
    error: type[InputError]

    def __call__(self) -> Any:
        """Call the function.

        raises: `error` with the exception's type, message and the user's line.
        """
        if required := _required_arguments(self.function):
            raise self.error(
                f"{self.label} needs arguments ({', '.join(required)}); give them as literals, as in "
                f"{self.label.partition('(')[0]}({required[0]}=1), or give a callable without required arguments."
            )
        with users_code(self.label, "raised", self.folder, self.error):
            return self.function()


def load_callable(spec: str, *, error: type[InputError]) -> UserCallable:
    """Import the callable that `spec` names, without calling it.

    spec:   `file.py:name`, `package.module:name`, or either with literal arguments: `file.py:name(width=0.5)`; a dotted
            name reaches attributes.
    raises: `error` if the file or module cannot be imported or the arguments are no literals; UnknownNameError with
            near misses if it has no such name.
    """
    value = load_object(spec, error=error)
    if not callable(value):
        known = _callables(_import(_parts(spec, error)[0], error))
        raise error(f"{spec} is {article(type(value).__name__)}, not a callable. Callables: {listed(known)}.")
    return UserCallable(value, spec, _folder(_parts(spec, error)[0]), error)


def load_object(spec: str, *, error: type[InputError]) -> Any:
    """Import what `spec` names, in the form that `load_callable` takes; with arguments, a call that waits for none.

    raises: as load_callable.
    """
    source, name, arguments = _parts(spec, error)
    module = _import(source, error)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise UnknownNameError(f"callable of {source}", name, _callables(module))
        value = getattr(value, part)
    if arguments is None:
        return value
    if not callable(value):
        raise error(f"{source}:{name} is {article(type(value).__name__)} and takes no arguments; leave them out.")
    return _with_arguments(value, arguments, spec, error)


def _parts(spec: str, error: type[InputError]) -> tuple[str, str, str | None]:
    """Return the file or module, the name, and the text of the arguments with its brackets, None without any."""
    match = SPEC.fullmatch(spec)
    if match is None:
        raise error(
            f"{spec!r} does not name a callable; write file.py:name or package.module:name.{_available(spec, error)}"
        )
    source, name, arguments = match.groups()
    return source, name, arguments


def _with_arguments(
    function: Callable[..., Any], arguments: str, spec: str, error: type[InputError]
) -> Callable[..., Any]:
    try:
        call = ast.parse(f"f{arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError("not one pair of brackets")
        positional = [ast.literal_eval(value) for value in call.args]
        if any(each.arg is None for each in call.keywords):
            raise ValueError("** unpacks")
        named = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as cause:
        raise error(
            f"the arguments of {spec!r} are not literals ({first_line(cause)}); write numbers, texts in quotes, True, "
            "None, or lists of them, as in file.py:build(width=0.5)."
        ) from cause
    return partial(function, *positional, **named)


def _import(source: str, error: type[InputError]) -> ModuleType:
    return _import_file(Path(source), error) if _folder(source) else _import_module(source, error)


def _folder(source: str) -> Path | None:
    """Return the folder of a file, None for a module."""
    return Path(source).resolve().parent if source.endswith(".py") else None


@contextmanager
def users_code(label: str, verb: str, folder: Path | None, error: type[InputError]) -> Iterator[None]:
    """Turn exceptions in the body into `error` with the user's own line; meanwhile `folder` is first on sys.path."""
    entry = [] if folder is None else [str(folder)]
    sys.path[:0] = entry
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as cause:
        raise error(f"{label} {verb} {type(cause).__name__}: {first_line(cause)}{_users_line(cause)}") from cause
    finally:
        for path in entry:
            sys.path.remove(path)


def listed(names: Iterable[str], separator: str = ", ", shown: int = 3) -> str:
    """Return the first `shown` names and the number of the others."""
    names = list(names)
    rest = f"{separator}and {len(names) - shown} more" if len(names) > shown else ""
    return (separator.join(names[:shown]) or "none") + rest


def article(noun: str) -> str:
    """Return a noun with its article."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _import_file(path: Path, error: type[InputError]) -> ModuleType:
    """Import a file under a name made from its place and content."""
    if not path.is_file():
        raise error(no_file(path))
    digest = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:16]
    name = f"intact_user_{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up while it is imported
    try:
        with users_code(str(path), "cannot be imported:", path.resolve().parent, error):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str, error: type[InputError]) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # as `python -m` does; an installed command does not
    with users_code(name, "cannot be imported:", None, error):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as cause:
            if not f"{name}.".startswith(f"{cause.name}."):
                raise  # a module that the user's own imports
            raise error(f"no module named {cause.name!r}; for a file, write its path with .py.") from cause


def _users_line(error: BaseException) -> str:
    """Return ` (at file.py:12 in build)` for the deepest frame that is in no library, '' if there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" (at {error.filename}:{error.lineno})"
    here = str(Path(__file__).parents[1])  # this package
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in frame.filename and not frame.filename.startswith(("<frozen", here))
    ]
    return f" (at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name})" if frames else ""


def _required_arguments(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # builtins without a signature: calling them will tell
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _callables(module: ModuleType) -> list[str]:
    """Return the public callables that the module itself defines."""
    return sorted(
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and not name.startswith("_")
    )


def _available(spec: str, error: type[InputError]) -> str:
    """Return ` In file.py: a, b.` for a file that was named without a callable."""
    path = Path(spec.rstrip(":"))
    if path.suffix != ".py" or not path.is_file():
        return ""
    return f" In {path.name}: {listed(_callables(_import_file(path, error)), shown=10)}."
