"""Loading: every form of model and checkpoint, every fault one message, and nothing in a file is ever executed."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from calibrators.errors import InputError, ModelError, UnknownNameError
from exporter.frontend import pt2_archive
from exporter.frontend.calling import input_names
from exporter.frontend.load import load_model, read_states
from exporter.frontend.user_code import load_callable

NETWORK = """
    import torch
    from torch import nn
    from parts import width

    def small():
        return nn.Sequential(nn.Conv2d(3, width(), 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()

    def half():
        return small().half()

    def with_width(width, depth=1):
        return nn.Linear(width, depth)

    def broken():
        raise KeyError("no such variant")

    def leaves():
        raise SystemExit(3)

    def tuple_of_modules():
        return (small(), small())

    def nan_weight():
        model = small()
        model[0].weight.data[1, 2, 0, 0] = float("nan")
        return model

    def infinite_variance():
        model = small()
        model[1].running_var[3] = float("inf")
        return model

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))

        def forward(self, query, key=None):
            return query + self.mask

    def lazy():
        return nn.LazyLinear(4)

    instance = nn.Linear(2, 2)
    number = 3
"""


class Payload:
    """Unpickling it makes a file: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "parts.py").write_text("def width():\n    return 4\n")
    path = tmp_path / "nets.py"
    path.write_text(textwrap.dedent(NETWORK))
    yield path
    sys.modules.pop("parts", None)


@pytest.fixture
def small(file: Path) -> nn.Module:
    return load_model(f"{file}:small")


def save_program(path: Path) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    torch.export.save(torch.export.export(model, (torch.randn(2, 3, 6, 6),), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_program(tmp_path_factory.mktemp("program") / "net.pt2")


def rewrite(
    source: Path, target: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None
) -> Path:
    """A copy of an archive with changed or additional members (aligned or not does not matter to the check)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, content in (extra or {}).items():
            new.writestr(f"{root}/{name}", content)
    return target


def test_a_factory_in_a_file_gives_an_eval_module_and_leaves_the_import_path_alone(file: Path) -> None:
    before = list(sys.path)
    model = load_model(f"{file}:small")
    assert isinstance(model, nn.Sequential)
    assert not any(module.training for module in model.modules())
    assert sys.path == before


def test_a_factory_in_a_package_and_an_instance_load() -> None:
    assert isinstance(load_model("torch.nn:Identity"), nn.Identity)


@pytest.mark.parametrize("arguments", ["(5)", "(width=5)", "(5, depth = 1)", "( 5 , )"])
def test_a_factory_takes_literal_arguments(file: Path, arguments: str) -> None:
    assert load_model(f"{file}:with_width{arguments}").in_features == 5  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ("(width)", "are not literals"),
        ("(__import__('os'))", "are not literals"),
        ("(**{})", "are not literals"),
        ("(1)(2)", "are not literals"),
        ("(1", "does not name a callable"),
        ("(5, widht=3)", "unexpected keyword argument 'widht'"),
        ("(depth=2)", "needs arguments (width)"),
    ],
)
def test_bad_arguments_of_a_factory_are_one_message(file: Path, arguments: str, part: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(f"{file}:with_width{arguments}")
    assert part in str(caught.value)


def test_a_module_instance_needs_no_factory(file: Path) -> None:
    assert isinstance(load_model(f"{file}:instance"), nn.Linear)


def test_half_precision_weights_become_float32(file: Path) -> None:
    assert load_model(f"{file}:half")[0].weight.dtype == torch.float32


def test_an_infinite_buffer_outside_a_normalization_is_a_legal_mask(file: Path) -> None:
    model = load_model(f"{file}:Masked")
    assert math.isinf(model.mask[0, 1])
    assert input_names(model) == ("query", "key")


def test_files_of_one_name_do_not_shadow_each_other(tmp_path: Path) -> None:
    for width in (2, 3):
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "net.py").write_text(
            f"from torch import nn\ndef f():\n    return nn.Linear({width}, 1)\n"
        )
    widths = [load_model(f"{tmp_path / str(width) / 'net.py'}:f").in_features for width in (2, 3, 2)]
    assert widths == [2, 3, 2]


@pytest.mark.parametrize(
    ("name", "error", "parts"),
    [
        pytest.param("smal", UnknownNameError, ["Did you mean 'small'", "Known:"], id="misspelt"),
        pytest.param("with_width", ModelError, ["needs arguments (width)"], id="needs arguments"),
        pytest.param("broken", ModelError, ["KeyError", "no such variant", "nets.py:", "in broken"], id="raises"),
        pytest.param("leaves", ModelError, ["SystemExit: 3", "nets.py:"], id="exits"),
        pytest.param("tuple_of_modules", ModelError, ["returned a tuple", "torch.nn.Module"], id="no module"),
        pytest.param("number", ModelError, ["is an int", "not a callable", "broken"], id="not name a callable"),
        pytest.param("nan_weight", ModelError, ["0.weight holds 1 of 108", "NaN"], id="nan weight"),
        pytest.param("infinite_variance", ModelError, ["1.running_var holds 1 of 4"], id="infinite variance"),
        pytest.param("lazy", ModelError, ["weight has no values yet"], id="lazy"),
        pytest.param("", ModelError, ["does not name a callable", "In nets.py:", "broken"], id="no name"),
    ],
)
def test_a_bad_factory_is_one_message(file: Path, name: str, error: type[InputError], parts: list[str]) -> None:
    with pytest.raises(error) as caught:
        load_model(f"{file}:{name}")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        pytest.param("def f(:\n", ["SyntaxError", "bad.py:1"], id="syntax"),
        pytest.param("x = 1\nimport no_such_package_here\n", ["ModuleNotFoundError", "bad.py:2"], id="import"),
    ],
)
def test_a_file_that_cannot_be_imported_names_the_line(tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "bad.py").write_text(content)
    for _ in range(2):  # a failed import leaves nothing behind that would hide the second failure
        with pytest.raises(ModelError) as caught:
            load_model(f"{tmp_path / 'bad.py'}:f")
        assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        pytest.param("no_such_package.sub:f", "no module named", id="package"),
        pytest.param("nowhere/net.py:f", "does not exist: there is no folder nowhere", id="folder"),
        pytest.param("weights.pth", "as checkpoint", id="weights as model"),
        pytest.param("net.onnx", "starts from the PyTorch network", id="onnx as model"),
        pytest.param("nowhere.pt2", "does not exist", id="pt2"),
        pytest.param("justaname", "does not name a callable", id="bare name"),
    ],
)
def test_a_bad_model_argument_is_one_message(spec: str, part: str) -> None:
    with pytest.raises(ModelError, match=part):
        load_model(spec)


def test_a_missing_file_suggests_its_neighbour(file: Path) -> None:
    with pytest.raises(ModelError, match=r"did you mean '.*nets\.py'"):
        load_model(f"{file.parent / 'net.py'}:small")


def test_the_error_class_is_the_callers(file: Path) -> None:
    class Other(InputError):
        pass

    with pytest.raises(Other, match="KeyError"):
        load_callable(f"{file}:broken", error=Other)()


# ---- checkpoints


def shifted(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own state with every float moved: loading it must change the model."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda state: state, id="plain"),
        pytest.param(lambda state: {"state_dict": state, "epoch": 3}, id="state_dict"),
        pytest.param(lambda state: {"model": state, "optimizer": {"lr": 0.1}}, id="model"),
        pytest.param(lambda state: {"model": {"state_dict": state}}, id="nested"),
        pytest.param(lambda state: {f"module.{name}": value for name, value in state.items()}, id="data parallel"),
        pytest.param(lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()}, id="compiled"),
        pytest.param(lambda state: {k: v for k, v in state.items() if "num_batches" not in k}, id="without counters"),
        pytest.param(lambda state: {"state_dict": state, "best_acc1": torch.tensor(71.0)}, id="beside a tensor"),
        pytest.param(lambda state: {"mine": state, "optimizer": {"state": {0: {"m": torch.ones(3)}}}}, id="any key"),
        pytest.param(
            lambda state: {f"model.{k}": v for k, v in state.items()} | {"criterion.weight": torch.ones(3)},
            id="beside other modules",
        ),
        pytest.param(
            lambda state: {"state_dict": {f"net._orig_mod.{k}": v for k, v in state.items()}, "epoch": 3}, id="deep"
        ),
    ],
)
def test_common_wrappers_load(file: Path, small: nn.Module, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    state = shifted(small)
    torch.save(wrap(state), tmp_path / "net.pt")
    loaded = load_model(f"{file}:small", tmp_path / "net.pt").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state if "num_batches" not in name)


def test_of_several_states_the_usual_one_is_taken_and_another_by_its_key(
    file: Path, small: nn.Module, tmp_path: Path
) -> None:
    usual, teacher = shifted(small), small.state_dict()
    content = {"ema": {f"module.{name}": x for name, x in teacher.items()}, "model": usual}
    torch.save(content, tmp_path / "net.pt")
    notes: list[str] = []
    taken = load_model(f"{file}:small", tmp_path / "net.pt", note=notes.append).state_dict()  # type: ignore[union-attr]
    assert torch.equal(taken["0.weight"], usual["0.weight"])
    assert notes == [f"{tmp_path / 'net.pt'} holds several states that fit; 'model' was taken, others are 'ema.module'"]
    for key in ("ema", "ema.module"):
        chosen = load_model(f"{file}:small", tmp_path / "net.pt", key=key).state_dict()  # type: ignore[union-attr]
        assert torch.equal(chosen["0.weight"], teacher["0.weight"])
    with pytest.raises(UnknownNameError, match="unknown key"):
        load_model(f"{file}:small", tmp_path / "net.pt", key="emma")


def test_safetensors_load(file: Path, small: nn.Module, tmp_path: Path) -> None:
    state = shifted(small)
    safetensors.torch.save_file(state, tmp_path / "net.safetensors")
    assert torch.equal(load_model(f"{file}:small", tmp_path / "net.safetensors")[0].weight, state["0.weight"])


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("0.weight", "0.wieght"): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(
            renamed,
            [
                "1 of the model's 7 tensors are missing (0.weight)",
                "unknown to the model (0.wieght)",
                "Did you mean '0.weight'",
            ],
            id="misspelt",
        ),
        pytest.param(
            lambda state: state | {"0.weight": torch.zeros(8, 3, 3, 3)},
            ["0.weight is [8, 3, 3, 3] in the checkpoint and [4, 3, 3, 3] in the model"],
            id="shape",
        ),
        pytest.param(
            lambda state: state | {"0.weight": torch.ones_like(state["0.weight"], dtype=torch.int8)},
            ["int8 for 0.weight", "give the float weights"],
            id="codes",
        ),
        pytest.param(lambda state: {}, ["no tensors", "keys: none"], id="empty"),
        pytest.param(lambda state: {"epoch": 3}, ["no tensors", "epoch"], id="no tensors"),
        pytest.param(lambda state: [1, 2], ["holds a list"], id="list"),
        pytest.param(
            lambda state: state | {"0.bias": torch.full((4,), math.inf)}, ["0.bias holds 4 of 4"], id="infinite bias"
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_why(
    file: Path, small: nn.Module, tmp_path: Path, change: Callable[[Any], Any], parts: list[str]
) -> None:
    torch.save(change(small.state_dict()), tmp_path / "net.pt")
    with pytest.raises(ModelError) as caught:
        load_model(f"{file}:small", tmp_path / "net.pt")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_folder_is_no_checkpoint(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a folder, not a file"):
        load_model(f"{file}:small", tmp_path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"garbage of some length", b"\x80\x02garbage", b"PK\x03\x04garbage"],
    ids=["empty", "text", "pickle", "zip"],
)
def test_a_damaged_checkpoint_is_one_message(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged or not a checkpoint; save|not a readable safetensors"):
        read_states(path)


def test_arrays_of_numpy_are_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "net.npz", weight=np.zeros(3))
    with pytest.raises(ModelError, match=r"net\.npz holds NumPy arrays, not a checkpoint; save"):
        read_states(tmp_path / "net.npz")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_truncated_checkpoint_is_one_message(small: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"net{suffix}"
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(small.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ModelError, match=r"save it again"):
        read_states(path)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_hostile_checkpoint_does_not_run(tmp_path: Path, legacy: bool) -> None:
    proof = tmp_path / "ran"
    torch.save({"weight": Payload(proof)}, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ModelError, match="refused because loading them could run code"):
        read_states(tmp_path / "net.pt")
    assert not proof.exists()


def test_a_plain_pickle_does_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    (tmp_path / "net.pth").write_bytes(pickle.dumps(Payload(proof)))
    with pytest.raises(ModelError):
        read_states(tmp_path / "net.pth")
    assert not proof.exists()


def test_a_whole_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(ModelError, match=r"use torch.save\(model.state_dict\(\), path\)"):
        read_states(tmp_path / "net.pt")


# ---- programs


def test_a_program_loads(program: Path) -> None:
    loaded = load_model(str(program))
    assert isinstance(loaded, torch.export.ExportedProgram)
    assert input_names(loaded) == ("input",)


def test_a_program_takes_no_checkpoint(program: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="its own weights"):
        load_model(str(program), tmp_path / "net.pt")


def hostile_pickle(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(path), buffer)
    return buffer.getvalue()


def replaced(member: str, old: str, new: str) -> Callable[[str, bytes], bytes]:
    def change(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    return change


def hostile(kind: str, source: Path, target: Path, proof: Path) -> Path:
    code = f"__import__('os').mkdir({str(proof)!r})"
    quoted = json.dumps(code)[1:-1]
    symbol = "Symbol('s31', positive=True, integer=True)"
    model = "models/model.json"
    if kind == "sample inputs":
        return rewrite(source, target, lambda n, c: hostile_pickle(proof) if n == "data/sample_inputs/model.pt" else c)
    if kind == "pickled weight":
        config = "data/weights/model_weights_config.json"
        return rewrite(source, target, replaced(config, '"use_pickle": false', '"use_pickle": true'))
    if kind == "expression":
        content = zipfile.ZipFile(source).read(f"{source.stem}/{model}").decode()
        symbol = content.partition('"expr_str": "')[2].partition('"')[0]
        return rewrite(source, target, replaced(model, symbol, quoted))
    if kind == "operator":
        return rewrite(
            source, target, replaced(model, "torch.ops.aten.relu.default", "torch.hub.load_state_dict_from_url")
        )
    if kind == "name":
        return rewrite(source, target, replaced(model, '"name": "relu"', f'"name": "relu; {quoted}"'))
    extra = {
        "compiled code": "data/aotinductor/model/model.so",
        "pickled object": "data/constants/custom_obj_0",
    }[kind]
    return rewrite(source, target, lambda name, content: content, {extra: pickle.dumps(Payload(proof))})


@pytest.mark.parametrize(
    "kind", ["sample inputs", "pickled weight", "expression", "operator", "name", "compiled code", "pickled object"]
)
def test_a_hostile_program_is_refused_before_torch_reads_it(program: Path, tmp_path: Path, kind: str) -> None:
    proof = tmp_path / "ran"
    path = hostile(kind, program, tmp_path / "hostile.pt2", proof)
    with pytest.raises(
        ModelError, match=r"refused because it could run code when loaded; give the network as file\.py:factory"
    ):
        load_model(str(path))
    assert not proof.exists()


@pytest.mark.parametrize(
    "operator",
    ["aten._sparse_coo_tensor_unsafe.default", "inductor._reinterpret_tensor.default", "aten.from_file.default",
     "aten.set_.source_Storage", "aten.resize_.default", "aten.mkldnn_linear.default", "fsdp.copy_.default",
     "aten.col2im.nonsense", "aten.conv2d_backward.default"],
)  # fmt: skip
def test_operators_that_trust_their_arguments_are_refused(program: Path, tmp_path: Path, operator: str) -> None:
    change = replaced("models/model.json", "aten.relu.default", operator)
    with pytest.raises(ModelError, match=f"a call of 'torch.ops.{operator}'"):
        load_model(str(rewrite(program, tmp_path / "hostile.pt2", change)))


@pytest.mark.parametrize(
    "operator",
    ["conv2d.default", "relu_.default", "scaled_dot_product_attention.default", "lstm.input", "topk.default",
     "sort.stable", "_unsafe_index.Tensor", "_to_copy.default", "upsample_bicubic2d.vec", "einsum.default",
     "_upsample_bilinear2d_aa.default", "embedding_bag.padding_idx", "index_put_.default", "fft_rfft.default",
     "batch_norm.default", "_native_batch_norm_legit_no_training.default", "grid_sampler.default", "unbind.int",
     "_assert_tensor_metadata.default", "masked_fill_.Scalar", "lift_fresh_copy.default", "copy_.default"],
)  # fmt: skip
def test_operators_of_networks_are_known(operator: str) -> None:
    assert pt2_archive._is_checked(f"torch.ops.aten.{operator}")


def test_an_archive_that_unfolds_is_refused(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info.filename))
        target.writestr("archive/data/weights/weight_99", b"\0" * 10_000_000)
    with pytest.raises(ModelError, match="its members promise"):
        load_model(str(path))


def test_weights_that_the_file_does_not_hold_are_refused(program: Path, tmp_path: Path) -> None:
    def expand(name: str, content: bytes) -> bytes:
        if name != "data/weights/model_weights_config.json":
            return content
        document = json.loads(content)
        meta = next(iter(document["config"].values()))["tensor_meta"]
        meta["sizes"], meta["strides"] = [{"as_int": 1 << 40}], [{"as_int": 0}]
        return json.dumps(document).encode()

    with pytest.raises(ModelError, match="weights have"):
        load_model(str(rewrite(program, tmp_path / "net.pt2", expand)))


@pytest.mark.parametrize("kind", ["sample inputs", "expression"])
def test_the_hostile_programs_are_real(program: Path, tmp_path: Path, kind: str) -> None:
    """Without the check torch runs them: the test above tests something."""
    proof = tmp_path / "ran"
    path = hostile(kind, program, tmp_path / "hostile.pt2", proof)
    with pytest.raises(Exception), pytest.MonkeyPatch.context() as patch:  # noqa: B017 (whatever the reader meets first)
        patch.setattr("exporter.frontend.load.clean_archive", lambda path: path)
        load_model(str(path))
    assert proof.exists()


@pytest.mark.parametrize("content", [b"", b"not a zip"], ids=["empty", "text"])
def test_a_damaged_program_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "net.pt2").write_bytes(content)
    with pytest.raises(ModelError, match=r"not a readable \.pt2 archive"):
        load_model(str(tmp_path / "net.pt2"))


def test_a_truncated_program_is_one_message(program: Path, tmp_path: Path) -> None:
    content = program.read_bytes()
    for length in (len(content) - 20, len(content) // 2, 100):
        (tmp_path / "net.pt2").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"write it( again)? with torch\.export\.save"):
            load_model(str(tmp_path / "net.pt2"))


def test_a_second_archive_behind_the_first_is_not_what_gets_loaded(program: Path, tmp_path: Path) -> None:
    """A file that two zip readers may read differently loads as what was checked."""
    proof = tmp_path / "ran"
    bad = hostile("sample inputs", program, tmp_path / "bad.pt2", proof)
    (tmp_path / "both.pt2").write_bytes(bad.read_bytes() + program.read_bytes())
    assert isinstance(load_model(str(tmp_path / "both.pt2")), torch.export.ExportedProgram)
    assert not proof.exists()


def test_another_archive_is_no_program(small: nn.Module, tmp_path: Path) -> None:
    torch.save(small.state_dict(), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match="holds no exported program"):
        load_model(str(tmp_path / "net.pt2"))


def test_a_program_with_nan_weights_names_the_parameter(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight.data[0, 0] = math.nan
    torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match="weight holds 1 of 4 values"):
        load_model(str(tmp_path / "net.pt2"))
