"""Load the model that the user names: a factory in a file or module, a .pt2 program, weights from a checkpoint.

Nothing found in a checkpoint or a .pt2 file is executed. A factory is the user's own code, and is executed.

Must not know: calibration, targets, ONNX, the command line.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
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

from calibrators.errors import ModelError, UnknownNameError, argument, first_line, no_file
from exporter.frontend.capture import quiet
from exporter.frontend.checkpoint import State, fitting_state, states
from exporter.frontend.pt2_archive import clean_archive
from exporter.frontend.untrusted import check_checkpoint
from exporter.frontend.user_code import article, listed, load_callable

__all__ = ["load_model", "read_states"]

Model = nn.Module | torch.export.ExportedProgram

GUESSED = 100
"""Unknown names of a checkpoint for which a known one is guessed."""

NUMPY_SUFFIXES = (".npz", ".npy")


def load_model(
    spec: str, checkpoint: Path | None = None, *, key: str | None = None, note: Callable[[str], object] = str
) -> Model:
    """Return the model that `spec` names, in eval mode, on the CPU, with floating parameters in float32.

    spec:       `file.py:factory`, `package.module:factory` (no arguments, returns the nn.Module) or a `.pt2` file.
    checkpoint: `.pt`/`.pth` (read as weights only) or `.safetensors`, loaded into the module that the factory returns.
    key:        where the state is in the checkpoint (State.key); by default what fits the module best is taken.
    note:       is called with what the user should know about the choice.
    raises:     ModelError, UnknownNameError.
    """
    path = Path(spec)
    if path.suffix == ".pt2":
        if checkpoint is not None:
            raise ModelError(
                f"{spec} carries its own weights; leave {argument('checkpoint')} out, or give the factory instead."
            )
        program = _load_program(path)
        _check_finite(spec, [*program.state_dict.items(), *program.constants.items()], strict=False)
        return program
    if ":" not in spec and path.suffix in {".pt", ".pth", ".safetensors", ".bin", ".ckpt"}:
        raise ModelError(
            f"{spec} holds weights, not a network; give MODEL as file.py:factory and this file as "
            f"{argument('checkpoint')}."
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
        state, others = _chosen(read_states(checkpoint), model.state_dict(), key, checkpoint)
        if others:
            known = ", ".join(repr(other.key) for other in others)
            note(f"{checkpoint} holds several states that fit; {state.key!r} was taken, others are {known}")
        _load_weights(model, state.tensors, checkpoint)
    _check_module(str(checkpoint or spec), model)
    return model


def read_states(path: Path) -> list[State]:
    """Return the states in a checkpoint: mappings with tensors, nested or not.

    raises: ModelError if the file is missing or damaged, has no tensors, or has objects whose loading runs code.
    """
    if not path.is_file():
        raise ModelError(f"checkpoint {no_file(path)}")
    if path.suffix in NUMPY_SUFFIXES:
        raise ModelError(f"{path} holds NumPy arrays, not a checkpoint; save the module's state_dict with torch.save.")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, Mapping):
        raise ModelError(f"{path} holds {article(type(content).__name__)}, not a state dict; save model.state_dict().")
    found = list(states(content))
    if not found:
        raise ModelError(f"{path} holds no tensors (keys: {listed(map(str, content))}); save model.state_dict().")
    return found


def _chosen(found: list[State], expected: Mapping[str, Any], key: str | None, path: Path) -> tuple[State, list[State]]:
    """Return the state that fits, or that `key` names, and others that fit as well if none was named."""
    if key is None:
        return fitting_state(found, expected)
    inside = [state for state in found if state.key == key or state.key.startswith(f"{key}.")]
    if inside:
        return fitting_state(inside, expected)[0], []
    parts = [State(key, part) for state in found if (part := _below(state, key))]
    if not parts:
        raise UnknownNameError(f"key of {path}", key, {state.key for state in found if state.key})
    return fitting_state(parts, expected)[0], []


def _below(state: State, key: str) -> dict[str, Tensor]:
    """Return the tensors whose names, after the key of their state, begin with `key`."""
    prefix = f"{key}.".removeprefix(f"{state.key}." if state.key else "")
    return {name.removeprefix(prefix): x for name, x in state.tensors.items() if name.startswith(prefix)}


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is not a readable safetensors file ({error}); copy or save it again.") from error


def _read_pickle(path: Path) -> Any:
    check_checkpoint(path)
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
        raise ModelError(no_file(path))
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
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        raise ModelError(_mismatch(path, missing, unexpected, len(expected)))
    odd = [name for name in expected if name in state and not _is_plain(state[name])]
    if odd:
        raise ModelError(f"{path} holds sparse or meta tensors for {listed(odd, ', ')}; save dense tensors.")
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


def _is_plain(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_meta


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _mismatch(path: Path, missing: list[str], unexpected: list[str], total: int) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} of the model's {total} tensors are missing ({listed(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} are unknown to the model ({listed(unexpected)})")
    guesses = ((name, get_close_matches(name, missing, n=1, cutoff=0.5)) for name in unexpected[:GUESSED])
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
