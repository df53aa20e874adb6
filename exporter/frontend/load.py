"""Load the model that the user names: a factory in a file or module, a .pt2 program, weights from a checkpoint.

Nothing found in a checkpoint or a .pt2 file is executed. A factory is the user's own code, and is executed.

Must not know: calibration, targets, ONNX, the command line.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from calibrators.errors import ModelError, first_line, near_file
from exporter.frontend.capture import quiet
from exporter.frontend.pt2_archive import clean_archive
from exporter.frontend.user_code import article, listed, load_callable

__all__ = ["load_model", "read_state_dict"]

Model = nn.Module | torch.export.ExportedProgram

NUMPY_SUFFIXES = (".npz", ".npy")

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
"""Keys under which training scripts put the state dict, most specific first."""


def load_model(spec: str, checkpoint: Path | None = None) -> Model:
    """Return the model that `spec` names, in eval mode, on the CPU, with floating parameters in float32.

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
            f"{spec} is an ONNX file; an export starts from the PyTorch network: give file.py:factory or a .pt2 file."
        )
    factory = load_callable(spec, error=ModelError)
    model = factory.function if isinstance(factory.function, nn.Module) else factory()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{spec} returned {article(type(model).__name__)}, not a torch.nn.Module; return the module itself."
        )
    _check_materialized(spec, model)
    model = model.cpu().float().eval()
    if checkpoint is not None:
        _load_weights(model, read_state_dict(checkpoint), checkpoint)
    _check_module(str(checkpoint or spec), model)
    return model


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, without wrappers such as {"state_dict": ...}.

    raises: ModelError if the file is missing or damaged, has no state dict, or has objects whose loading runs code.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {path} does not exist{near_file(path)}")
    if path.suffix in NUMPY_SUFFIXES:
        raise ModelError(f"{path} holds NumPy arrays, not a checkpoint; save the module's state_dict with torch.save.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds {article(type(content).__name__)}, not a state dict; save model.state_dict().")
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(
            f"{path} holds no tensors at its top level (keys: {listed(map(str, content))}); save model.state_dict()."
        )
    return tensors


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}); copy or save it again.") from error


def _read_pickle(path: Path) -> Any:
    try:
        with quiet():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (name := _forbidden(error)) is None:
            raise ModelError(f"{path} is damaged or not a checkpoint; save it again with torch.save.") from error
        raise ModelError(
            f"{path} holds Python objects beside tensors ({name}), which is refused because loading them could run "
            "code; use torch.save(model.state_dict(), path), or save a .safetensors file."
        ) from error
    except Exception as error:  # damaged files raise many types of exception
        raise ModelError(f"{path} is damaged or not a checkpoint; save it again with torch.save.") from error


def _load_program(path: Path) -> torch.export.ExportedProgram:
    if not path.is_file():
        raise ModelError(f"{path} does not exist{near_file(path)}")
    archive = clean_archive(path)
    try:
        with quiet():  # its message for a bad file is a traceback
            return torch.export.load(archive)
    except Exception as error:  # a file of another torch version raises many types of exception
        raise ModelError(
            f"{path} cannot be read by torch {torch.__version__} ({type(error).__name__}: {first_line(error)}); "
            "export it again with this version."
        ) from error


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
            f"{path} does not fit the model: {listed(shapes, '; ')}. Does the factory build the same variant?"
        )
    codes = [name for name, value in expected.items() if name in state and _is_float(value) > _is_float(state[name])]
    if codes:
        raise ModelError(
            f"{path} holds {str(state[codes[0]].dtype)[6:]} for {listed(codes, ', ')}, where the model has floats: a "
            "quantized checkpoint cannot be loaded into a float model; give the float weights."
        )
    model.load_state_dict(state, strict=False)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _without_prefix(state: dict[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Remove the prefix that wrappers put before every name ("module.", "_orig_mod.", "model.")."""
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
        parts.append(f"{len(missing)} of the model's {total} tensors are missing ({listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unknown to the model ({listed(unexpected)})")
    guesses = ((name, get_close_matches(name, missing, n=1, cutoff=0.5)) for name in unexpected)
    guess = next((f" Did you mean {near[0]!r} instead of {name!r}?" for name, near in guesses if near), "")
    return f"{path} does not fit the model: {' and '.join(parts)}.{guess} Does the factory build the same variant?"


def _check_materialized(label: str, model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(value) or value.is_meta:
            raise ModelError(
                f"{label}: {name} has no values yet (it is a lazy or meta tensor); run the model once in the factory."
            )


def _check_module(label: str, model: nn.Module) -> None:
    _check_finite(label, model.named_parameters(), strict=True)
    for prefix, module in model.named_modules():
        buffers = ((f"{prefix}.{name}".lstrip("."), value) for name, value in module.named_buffers(recurse=False))
        _check_finite(label, buffers, strict=isinstance(module, _NormBase))


def _check_finite(label: str, tensors: Iterable[tuple[str, Any]], *, strict: bool) -> None:
    """Refuse NaN and, if `strict`, infinities, which elsewhere are legal constants (attention masks)."""
    for name, value in tensors:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            continue
        bad = ~value.isfinite() if strict else value.isnan()
        if bad.any():
            raise ModelError(
                f"{label}: {name} holds {int(bad.sum())} of {value.numel()} values that are NaN or infinite; "
                "train or save the model again."
            )


def _forbidden(error: Exception) -> str | None:
    """Return the name of the object that weights-only loading refused, None if the file failed for another reason."""
    words = str(error).split()
    return next((name for word, name in pairwise(words) if word == "GLOBAL"), None)
