"""A model from what the user typed: a factory in a file or module, a .pt2 program, weights from a checkpoint.

Files are data here: nothing found in a checkpoint or a .pt2 file is executed. A factory is the user's own code and is.

Must not know: calibration, targets, ONNX, the command line.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import logging
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from calibrators.errors import InputError, ModelError, UnknownNameError
from exporter.frontend.pt2_archive import clean_archive

__all__ = ["UserCallable", "input_names", "load_callable", "load_model", "read_state_dict", "users_code"]

Model = nn.Module | torch.export.ExportedProgram

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Keys under which training scripts put the state dict, most specific first."""

SHOWN = 3
"""How many names of a longer list a message shows."""


@dataclass(frozen=True)
class UserCallable:
    """A callable of the user's, with what messages need.

    label:  what the user typed.
    folder: put on sys.path while the user's code is imported or called, None for installed packages.
    error:  class of the errors raised for the user's code.
    """

    function: Callable[..., Any]
    label: str
    folder: Path | None
    error: type[InputError]

    def __call__(self) -> Any:
        """Return the value of the function.

        raises: `error` with the exception's type, message and the user's line.
        """
        required = _required_arguments(self.function)
        if required:
            raise self.error(
                f"{self.label} needs arguments ({', '.join(required)}); give a callable without required arguments, "
                f"for example def {self.function.__name__}_for_export(): return {self.function.__name__}(...)."
            )
        with users_code(self.label, "raised", self.folder, self.error):
            return self.function()


def load_model(spec: str, checkpoint: Path | None = None) -> Model:
    """The model that `spec` names, in eval mode, on the CPU, floating parameters in float32.

    spec:       `file.py:factory`, `package.module:factory` (no arguments, returns the nn.Module) or a `.pt2` file.
    checkpoint: `.pt`/`.pth` (read as weights only) or `.safetensors`, loaded into the module that the factory returns.
    raises:     ModelError, UnknownNameError.
    """
    path = Path(spec)
    if path.suffix == ".pt2":
        if checkpoint is not None:
            raise ModelError(f"{spec} carries its own weights; leave --checkpoint out, or give the factory instead.")
        program = _load_program(path)
        _check_finite(spec, [*program.state_dict.items(), *program.constants.items()], strict=False)
        return program
    if ":" not in spec and path.suffix in {".pt", ".pth", ".safetensors", ".bin", ".ckpt"}:
        raise ModelError(
            f"{spec} holds weights, not a network; give MODEL as file.py:factory and this file as --checkpoint."
        )
    if ":" not in spec and path.suffix == ".onnx":
        raise ModelError(
            f"{spec} is an ONNX file; the way starts at the PyTorch network: give file.py:factory or a .pt2 file."
        )
    factory = load_callable(spec, error=ModelError)
    model = factory.function if isinstance(factory.function, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} returned {_article(type(model).__name__)}, not a torch.nn.Module; return the module itself."
        )
    _check_materialised(spec, model)
    model = model.cpu().float().eval()
    if checkpoint is not None:
        _load_weights(model, read_state_dict(checkpoint), checkpoint)
    _check_module(str(checkpoint or spec), model)
    return model


def load_callable(spec: str, *, error: type[InputError]) -> UserCallable:
    """The callable that `spec` names, imported but not called.

    spec:   `file.py:name` or `package.module:name`; a dotted name reaches attributes.
    raises: `error` if the file or module cannot be imported; UnknownNameError with near misses if it has no such name.
    """
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise error(f"{spec!r} names no callable; write file.py:name or package.module:name.{_available(spec, error)}")
    folder = Path(source).resolve().parent if source.endswith(".py") else None
    module = _import_file(Path(source), error) if folder else _import_module(source, error)
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise UnknownNameError(f"callable of {source}", name, _callables(module))
        value = getattr(value, part)
    if not callable(value):
        raise error(
            f"{spec} is {_article(type(value).__name__)}, not a callable. Callables: {_listed(_callables(module))}."
        )
    return UserCallable(value, spec, folder, error)


def input_names(model: Model) -> tuple[str, ...]:
    """Names of the model's inputs in call order; () where its signature does not tell (*args)."""
    if isinstance(model, torch.export.ExportedProgram):
        return tuple(model.graph_signature.user_inputs)
    parameters = list(inspect.signature(model.forward).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a checkpoint, wrappers such as {"state_dict": ...} removed.

    raises: ModelError if the file is missing, damaged, holds objects whose loading would run code, or no state dict.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist{_near_file(path)}")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds {_article(type(content).__name__)}, not a state dict; save model.state_dict().")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(
            f"{path} holds no tensors at its top level (keys: {_listed(map(str, content))}); save model.state_dict()."
        )
    return tensors


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is no readable safetensors file ({error}); copy or save it again.") from error


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (name := _forbidden(error)) is None:
            raise ModelError(f"{path} is damaged or no checkpoint; save it again with torch.save.") from error
        raise ModelError(
            f"{path} holds Python objects beside tensors ({name}): loading them could run code, refused. "
            "Save torch.save(model.state_dict(), path) or a .safetensors file instead."
        ) from error
    except Exception as error:  # damaged files raise many types, all with the same meaning
        raise ModelError(f"{path} is damaged or no checkpoint ({_first_line(error)}); save it again.") from error


def _load_program(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise ModelError(f"{path} does not exist{_near_file(path)}")
    archive = clean_archive(path)
    loader = logging.getLogger("torch.export")
    level = loader.level
    loader.setLevel(logging.CRITICAL)  # its own message for a bad file is a traceback
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(archive)
    except Exception as error:  # a file of another torch raises whatever its reader meets first
        raise ModelError(
            f"{path} cannot be read by torch {torch.__version__} ({type(error).__name__}: {_first_line(error)}); "
            "export it again with this version."
        ) from error
    finally:
        loader.setLevel(level)


def _load_weights(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = model.state_dict()
    state = _without_prefix(state, expected)
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        raise ModelError(_mismatch(path, missing, unexpected, len(expected)))
    shapes = [
        f"{name} is {list(state[name].shape)} in the checkpoint and {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in state and isinstance(value, Tensor) and state[name].shape != value.shape
    ]
    if shapes:
        raise ModelError(
            f"{path} does not fit the model: {_listed(shapes, '; ')}. Does the factory build the same variant?"
        )
    codes = [name for name, value in expected.items() if name in state and _is_float(value) > _is_float(state[name])]
    if codes:
        raise ModelError(
            f"{path} holds {str(state[codes[0]].dtype)[6:]} for {_listed(codes, ', ')}, where the model has floats: a "
            "quantized checkpoint cannot be loaded into a float model; give the float weights."
        )
    model.load_state_dict(state, strict=False)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _without_prefix(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """`state` without the prefix that wrappers put before every name ("module.", "_orig_mod.", "model.")."""
    known = set(expected)
    while not known & set(state):
        prefixes = {name.partition(".")[0] + "." for name in state}
        prefix = prefixes.pop()
        if prefixes or any(name == prefix[:-1] for name in state):
            break
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _mismatch(path: Path, missing: list[str], unexpected: list[str], total: int) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's {total} tensors are missing ({_listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unknown to the model ({_listed(unexpected)})")
    guesses = ((name, get_close_matches(name, missing, n=1, cutoff=0.5)) for name in unexpected)
    guess = next((f" Did you mean {near[0]!r} instead of {name!r}?" for name, near in guesses if near), "")
    return f"{path} does not fit the model: {' and '.join(parts)}.{guess} Does the factory build the same variant?"


def _check_materialised(label: str, model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value) or value.is_meta:
            raise ModelError(
                f"{label}: {name} has no values yet (a lazy or meta tensor); run the model once in the factory."
            )


def _check_module(label: str, model: nn.Module) -> None:
    _check_finite(label, model.named_parameters(), strict=True)
    for prefix, module in model.named_modules():
        buffers = ((f"{prefix}.{name}".lstrip("."), value) for name, value in module.named_buffers(recurse=False))
        _check_finite(label, buffers, strict=isinstance(module, _NormBase))


def _check_finite(label: str, tensors: Iterable[tuple[str, Any]], *, strict: bool) -> None:
    """strict: infinities are wrong too; elsewhere they are legal constants (attention masks)."""
    for name, value in tensors:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        bad = ~value.isfinite() if strict else value.isnan()
        if bad.any():
            raise ModelError(
                f"{label}: {name} holds {int(bad.sum())} of {value.numel()} values that are NaN or infinite; "
                "train or save the model again."
            )


def _import_file(path: Path, error: type[InputError]) -> ModuleType:
    """The module in `path`, imported under a name made from its place and content."""
    if not path.is_file():
        raise error(f"{path} does not exist{_near_file(path)}")
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
        sys.path.append(here)  # as `python -m` has it; an installed command does not
    with users_code(name, "cannot be imported:", None, error):
        try:
            found = importlib.util.find_spec(name)
        except (ModuleNotFoundError, ValueError) as cause:
            raise error(f"no module named {name!r} ({cause}); for a file write its path with .py.") from cause
        if found is None:
            raise error(f"no module named {name!r}; for a file write its path with .py.")
        return importlib.import_module(name)


@contextmanager
def users_code(label: str, verb: str, folder: Path | None, error: type[InputError]) -> Iterator[None]:
    """Exceptions inside become `error` with the user's own line; `folder` leads sys.path meanwhile."""
    entry = [] if folder is None else [str(folder)]
    sys.path[:0] = entry
    try:
        yield
    except InputError:
        raise
    except (Exception, SystemExit) as cause:
        raise error(f"{label} {verb} {type(cause).__name__}: {_first_line(cause)}{_users_line(cause)}") from cause
    finally:
        for path in entry:
            sys.path.remove(path)


def _users_line(error: BaseException) -> str:
    """` (at file.py:12 in build)`: the deepest frame that is in no library, '' if there is none."""
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
    except (ValueError, TypeError):  # builtins without a signature: calling them tells
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _callables(module: ModuleType) -> list[str]:
    """Public callables that the module itself defines."""
    own = (
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__
    )
    return sorted(name for name in own if not name.startswith("_"))


def _available(spec: str, error: type[InputError]) -> str:
    """` In it: a, b.` for a file that was named without a callable."""
    path = Path(spec.rstrip(":"))
    if path.suffix != ".py" or not path.is_file():
        return ""
    return f" In {path.name}: {_listed(_callables(_import_file(path, error)), shown=10)}."


def _near_file(path: Path) -> str:
    """The end of `... does not exist`: a guess from the files beside it."""
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}."
    near = get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=1)
    return f"; did you mean {str(folder / near[0])!r}?" if near else "."


def _forbidden(error: Exception) -> str | None:
    """The name of the object that weights-only loading refused, None if the file failed for another reason."""
    words = str(error).split()
    return next((name for word, name in pairwise(words) if word == "GLOBAL"), None)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _listed(names: Iterable[str], separator: str = ", ", shown: int = SHOWN) -> str:
    names = list(names)
    rest = f"{separator}and {len(names) - shown} more" if len(names) > shown else ""
    return (separator.join(names[:shown]) or "none") + rest


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
