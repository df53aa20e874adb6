"""Hostile checkpoints and .pt2 programs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tests.hostile.base import Base, hostile, hostile_each, reseal

Change = Callable[[str, bytes], bytes]

LAUGHS = 60
"""Tuples in tuples: hashing or printing the outermost takes 2**60 steps."""


class Code:
    """Unpickling it makes a folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def rewritten(source: Path, target: Path, change: Change, extra: Mapping[str, bytes] | None = None) -> Path:
    """A copy of an archive with changed or additional members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            new.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, content in (extra or {}).items():
            new.writestr(f"{root}/{name}", content)
    return target


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


# --- checkpoints


def circle(width: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = {"w": torch.zeros(1)}
    for index in range(width):
        found[f"k{index}"] = found
    return found


def wide(levels: int, width: int) -> dict[str, Any]:
    """Dictionaries that share their entries: few objects, many paths."""
    found: dict[str, Any] = {"w": torch.zeros(1)}
    for _ in range(levels):
        found = {f"k{index}": found for index in range(width)}
    return found


def state(change: Mapping[str, Any]) -> Callable[[Base], Any]:
    def make(base: Base) -> Any:
        return torch.load(base.folder / "net.pt", weights_only=True) | change

    return make


VALUES: dict[str, Callable[[Base], Any]] = {
    "refers to itself": lambda base: circle(),
    "refers to itself a thousand times": lambda base: circle(1000),
    "shares its entries": lambda base: wide(3, 500),
    "a number": lambda base: 3,
    "a list": lambda base: [torch.zeros(1)],
    "a tensor": lambda base: torch.zeros(3),
    "nothing": lambda base: {},
    "no tensors": lambda base: {"a": 1, "b": {"c": "d"}},
    "integers": lambda base: {k: v.to(torch.int8) for k, v in state({})(base).items()},
    "complex": lambda base: {k: v.to(torch.complex64) for k, v in state({})(base).items()},
    "NaN": lambda base: {k: v * float("nan") for k, v in state({})(base).items()},
    "infinite": lambda base: {k: v + float("inf") for k, v in state({})(base).items()},
    "without memory": lambda base: {k: v.to("meta") for k, v in state({})(base).items()},
    "sparse": lambda base: {k: v.to_sparse() for k, v in state({})(base).items()},
    "other shapes": lambda base: {k: v.unsqueeze(0) for k, v in state({})(base).items()},
    "expanded to a TiB": state({"0.weight": torch.zeros(1).expand(1 << 38)}),
    "missing": lambda base: {k: v for k, v in state({})(base).items() if k != "0.weight"},
    "names that are numbers": lambda base: dict(enumerate(state({})(base).values())),
    "names for the terminal": lambda base: {f"\x1b[2J{k}": v for k, v in state({})(base).items()},
    "names of 100 kB": lambda base: {k * 10_000: v for k, v in state({})(base).items()},
    "a name of tuples": lambda base: {((1, 2), (3, 4)): torch.zeros(1)},
    "twenty thousand names": lambda base: {f"layer.{index}.weight": torch.zeros(1) for index in range(20_000)},
    "deep": lambda base: deep(200),
    "quantized": lambda base: {
        k: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)  # noqa: TID251 (as others quantize)
        for k, v in state({})(base).items()
    },
    "strings": lambda base: dict.fromkeys(state({})(base), "x"),
    "half of the values": lambda base: {k: v[: len(v) // 2] for k, v in state({})(base).items()},
    "nested tensor": lambda base: state({"0.weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])})(
        base
    ),
}


def deep(levels: int) -> Any:
    found: Any = {"w": torch.zeros(1)}
    for _ in range(levels):
        found = {"a": found}
    return found


def _value(folder: Path, base: Base, make: Callable[[Base], Any]) -> list[str]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return base.with_checkpoint(saved(folder / "net.pt", make(base)))


hostile_each("checkpoint", VALUES, _value)


def with_pickle(base: Base, path: Path, content: bytes) -> Path:
    """The checkpoint with other content in its data.pkl."""
    return rewritten(base.folder / "net.pt", path, lambda name, old: content if name == "data.pkl" else old)


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def call(module: str, name: str, arguments: bytes) -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + arguments + b"tR"


def integer(value: int) -> bytes:
    content = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def tuples(levels: int) -> bytes:
    """Tuples of twice the tuple before, by the memo."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))


def storage(count: int) -> bytes:
    """A persistent storage of so many floats, whose record has 4 x 9 x 4 bytes."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        + integer(count)
        + b"tQ"
    )


def tensor(count: int, offset: int, size: int, stride: int) -> bytes:
    sizes = integer(size) + b"\x85" + integer(stride) + b"\x85"
    return call("torch._utils", "_rebuild_tensor_v2", storage(count) + integer(offset) + sizes + b"\x89}")


def named(value: bytes, name: bytes = b"X\x01\x00\x00\x00w") -> bytes:
    return b"}" + name + value + b"s"


PICKLES: dict[str, bytes] = {
    "code": pickle.dumps(Code(), 2),
    "code in a name": opcodes(named(call("builtins", "eval", b"X\x01\x00\x00\x001"))),
    "tuples as a name": opcodes(b"}", tuples(LAUGHS), b"K\x01s"),
    "tuples as a value": opcodes(named(tuples(LAUGHS))),
    "storage beyond the file": opcodes(named(tensor(1 << 40, 0, 1 << 40, 1))),
    "storage of a little more than the file": opcodes(named(tensor(10_000, 0, 10_000, 1))),
    "view beyond the storage": opcodes(named(tensor(36, 0, 1 << 40, 1))),
    "view before the storage": opcodes(named(tensor(36, -8, 4, 1))),
    "negative stride": opcodes(named(tensor(36, 0, 4, -4))),
    "negative size": opcodes(named(tensor(36, 0, -4, 1))),
    "negative storage": opcodes(named(tensor(-36, 0, 4, 1))),
    "stride that overflows": opcodes(named(tensor(36, 0, 4, 1 << 62))),
    "allocates a storage": opcodes(named(call("torch", "FloatStorage", integer(1 << 40)))),
    "allocates a tensor": opcodes(named(call("torch", "Tensor", integer(1 << 32)))),
    "allocates bytes": opcodes(named(call("builtins", "bytearray", integer(1 << 34)))),
    "allocates a parameter": opcodes(named(call("torch.nn.parameter", "Parameter", integer(1 << 32)))),
    "counts": opcodes(named(call("collections", "Counter", b"X\x03\x00\x00\x00aab"))),
    "stack that is empty": b"\x80\x02sssss.",
    "no end": b"\x80\x02}",
    "memo that is empty": b"\x80\x02h\x05.",
    "a long text that is not there": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b".",
    "protocol 200": b"\x80\xc8}.",
    "text": b"hello",
    "empty": b"",
    "thousand lists": b"\x80\x02" + b"]" * 100_000 + b".",
    "lists in lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


def _pickle(folder: Path, base: Base, content: bytes) -> list[str]:
    return base.with_checkpoint(with_pickle(base, folder / "net.pt", content))


hostile_each("checkpoint", PICKLES, _pickle)
hostile_each(
    "checkpoint",
    {
        f"legacy {name}": PICKLES[name]
        for name in ("code", "tuples as a name", "stack that is empty", "allocates bytes")
    },
    lambda folder, base, content: ((folder / "net.pth").write_bytes(content), base.with_checkpoint(folder / "net.pth"))[
        1
    ],
)


@hostile("checkpoint", "legacy storage beyond the file")
def _legacy(folder: Path, base: Base) -> list[str]:
    path = folder / "net.pt"
    torch.save({"w": torch.zeros(36)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    at = content.rindex(struct.pack("<q", 36))
    path.write_bytes(content[:at] + struct.pack("<q", 1 << 36) + content[at + 8 :])
    return base.with_checkpoint(path)


def _script() -> bytes:
    import warnings

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), stream)
    return stream.getvalue()


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "FIFO": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "link to itself": lambda path: path.symlink_to(path),
}
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut to a half": lambda old: old[: len(old) // 2],
    "cut by 20": lambda old: old[:-20],
    "without its beginning": lambda old: old[100:],
    "empty file": lambda old: b"",
    "zeros": lambda old: bytes(len(old)),
    "other bytes": lambda old: bytes(255 - byte for byte in old),
    "TorchScript": lambda old: _script(),
}


def _archives(kind: str, file: str, command: Callable[[Base, Path], list[str]], unfolding: str) -> None:
    """Add what is no plain file, damaged archives, and one of which the member `unfolding` has 3 GiB."""

    def special(folder: Path, base: Base, make: Callable[[Path], Any]) -> list[str]:
        make(folder / file)
        return command(base, folder / file)

    def damaged(folder: Path, base: Base, change: Callable[[bytes], bytes]) -> list[str]:
        (folder / file).write_bytes(change((base.folder / file).read_bytes()))
        return command(base, folder / file)

    def unfolds(folder: Path, base: Base) -> list[str]:
        with (
            zipfile.ZipFile(base.folder / file) as old,
            zipfile.ZipFile(folder / file, "w", zipfile.ZIP_DEFLATED) as new,
        ):
            for name in old.namelist():
                with new.open(name, "w", force_zip64=True) as stream:
                    stream.write(old.read(name))
                    if name.endswith(unfolding):
                        for _ in range(192):
                            stream.write(bytes(1 << 24))
        return command(base, folder / file)

    hostile_each(kind, SPECIAL, special)
    hostile_each(kind, DAMAGED, damaged)
    hostile(kind, "archive that unfolds")(unfolds)


_archives("checkpoint", "net.pt", Base.with_checkpoint, "data/0")
_archives("pt2", "net.pt2", Base.with_program, "weight_0")


# --- safetensors


def safetensors_file(header: Any, content: bytes = b"", size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + content


def entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


SAFETENSORS = {
    "header of 2 to the 60": safetensors_file({}, size=1 << 60),
    "header of a GiB": safetensors_file({}, size=1 << 30),
    "header that is empty": safetensors_file(b""),
    "header that is deep": safetensors_file(b"[" * 200_000),
    "header that is no text": safetensors_file(b"\xff" * 100),
    "shape of a TiB": safetensors_file({"w": entry([1 << 38], [0, 1 << 40])}),
    "shape that overflows": safetensors_file({"w": entry([1 << 62, 1 << 62], [0, 4])}, bytes(4)),
    "shape that lies": safetensors_file({"w": entry([4, 4], [0, 4])}, bytes(4)),
    "negative shape": safetensors_file({"w": entry([-4], [0, 16])}, bytes(16)),
    "offsets that overlap": safetensors_file({"a": entry([4], [0, 16]), "b": entry([4], [8, 24])}, bytes(24)),
    "offsets the wrong way": safetensors_file({"a": entry([4], [16, 0])}, bytes(16)),
    "offsets beyond the file": safetensors_file({"a": entry([4], [0, 16])}, bytes(4)),
    "unknown type": safetensors_file({"w": entry([4], [0, 16], "F33")}, bytes(16)),
    "type of 4 bits": safetensors_file({"w": entry([8], [0, 4], "F4")}, bytes(4)),
    "type of 8 bits": safetensors_file({"w": entry([8], [0, 8], "F8_E4M3")}, bytes(8)),
    "names for the terminal": safetensors_file({"\x1b[2J": entry([4], [0, 16])}, bytes(16)),
    "name twice": safetensors_file(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "no tensors": safetensors_file({"__metadata__": {"a": "b"}}),
    "metadata that is deep": safetensors_file({"__metadata__": {"a": [[[]]]}}),
    "empty": b"",
    "three bytes": b"abc",
    "pickle": pickle.dumps(Code(), 2),
}


def _safetensors(folder: Path, base: Base, content: bytes) -> list[str]:
    (folder / "net.safetensors").write_bytes(content)
    return base.with_checkpoint(folder / "net.safetensors")


hostile_each("safetensors", SAFETENSORS, _safetensors)


# --- programs


def changed(member: str, change: Callable[[Any], Any]) -> Change:
    """Change the document of a member."""

    def apply(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        document = json.loads(content)
        document = change(document) or document
        return json.dumps(document).encode()

    return apply


def whole(member: str, content: bytes) -> Change:
    """Replace the members whose names begin so."""
    return lambda name, old: content if name.startswith(member) else old


def replaced(old: str, new: str, member: str = "models/model.json") -> Change:
    def apply(name: str, content: bytes) -> bytes:
        if name != member:
            return content
        assert old in content.decode(), old
        return content.decode().replace(old, new).encode()

    return apply


RELU = "torch.ops.aten.relu.default"


def instead_of_relu(target: str, *, reads: bool = True, **arguments: Any) -> Change:
    """Call another operator where the network calls relu, with further numbers or lists of integers by name.

    reads: whether it gets the value that relu reads.
    """

    def change(document: Any) -> None:
        node = next(n for n in document["graph_module"]["graph"]["nodes"] if n["target"] == RELU)
        node["target"], node["inputs"] = f"torch.ops.{target}", node["inputs"] if reads else []
        for name, value in arguments.items():
            kind = {bool: "as_bool", int: "as_int", float: "as_float"}.get(type(value), "as_ints")
            node["inputs"].append({"name": name, "arg": {kind: value}, "kind": 1})

    return changed("models/model.json", change)


def every(key: str, value: Any) -> Change:
    """Set every entry of a name in the model's document."""

    def visit(part: Any) -> None:
        if isinstance(part, dict):
            for name in part:
                if name == key:
                    part[name] = value
                else:
                    visit(part[name])
        elif isinstance(part, list):
            for each in part:
                visit(each)

    return changed("models/model.json", visit)


def config(change: Callable[[Any], Any]) -> Change:
    return changed(
        "data/weights/model_weights_config.json", lambda document: change(next(iter(document["config"].values())))
    )


def sizes(numbers: list[int], strides: list[int]) -> Change:
    def change(entry: Any) -> None:
        entry["tensor_meta"]["sizes"] = [{"as_int": n} for n in numbers]
        entry["tensor_meta"]["strides"] = [{"as_int": n} for n in strides]

    return config(change)


MALFORMED: dict[str, Change] = {
    "document that is deep": whole("models/model.json", b"[" * 100_000),
    "document that is a list": whole("models/model.json", b"[]"),
    "document that is empty": whole("models/model.json", b"{}"),
    "document of null": whole("models/model.json", b"null"),
    "document of NaN": whole("models/model.json", b"NaN"),
    "document that is no text": whole("models/model.json", b"\xff\xfe"),
    "types that are unknown": every("dtype", 99),
    "weights of a TiB": sizes([1 << 38], [0]),
    "weights beyond their bytes": sizes([1000, 1000], [1000, 1]),
    "config that is a list": whole("data/weights/model_weights_config.json", b"[]"),
    "sample inputs with code": whole("data/sample_inputs", pickle.dumps(Code(), 2)),
    "another archive version": whole("archive_version", b"999999"),
    "another archive format": whole("archive_format", b"zip"),
}
"""For programs of users and of bundles."""

PROGRAMS: dict[str, Change] = {
    "operator of another library": replaced(RELU, "torch.ops.inductor._reinterpret_tensor.default"),
    "operator that trusts": replaced(RELU, "torch.ops.aten._sparse_coo_tensor_unsafe.default"),
    "operator that reads files": replaced(RELU, "torch.ops.aten.from_file.default"),
    "function of Python": replaced(RELU, "os.system"),
    "builtin": replaced(RELU, "builtins.eval"),
    "no operator": replaced(RELU, "torch.ops.aten.no_such.default"),
    "operator with other arguments": replaced(RELU, "torch.ops.aten.conv2d.default"),
    "full of a TiB": instead_of_relu("aten.full.default", reads=False, size=[1 << 38], fill_value=1.0),
    "full of 4 GiB": instead_of_relu("aten.full.default", reads=False, size=[1 << 30], fill_value=1.0),
    "zeros of 4 GiB": instead_of_relu("aten.zeros.default", reads=False, size=[1 << 30]),
    "range of 2 to the 40": instead_of_relu("aten.arange.default", reads=False, end=1 << 40),
    "eye": instead_of_relu("aten.eye.default", reads=False, n=1 << 16),
    "expanded": instead_of_relu("aten.repeat.default", repeats=[1 << 12, 1 << 12, 1, 1]),
    "repeated": instead_of_relu("aten.repeat.default", repeats=[1, 1 << 20, 16, 1]),
    "padded": instead_of_relu("aten.constant_pad_nd.default", pad=[1 << 15, 1 << 15, 1 << 14, 1 << 14]),
    "new values": instead_of_relu("aten.new_full.default", size=[1 << 30], fill_value=1.0),
    "enlarged": instead_of_relu("aten.upsample_nearest2d.default", output_size=[1 << 14, 1 << 14]),
    "an axis that is not there": instead_of_relu("aten.unsqueeze.default", dim=1 << 40),
    "random": instead_of_relu("aten.rand_like.default"),
    "view beyond the value": instead_of_relu("aten.as_strided.default", size=[1 << 30], stride=[1]),
    "view before the value": instead_of_relu("aten.as_strided.default", size=[4], stride=[1], storage_offset=-64),
    "negative kernel": instead_of_relu("aten.max_pool2d.default", kernel_size=[-1, -1]),
    "zero stride": instead_of_relu("aten.max_pool2d.default", kernel_size=[2, 2], stride=[0, 0]),
    "guards": changed("models/model.json", lambda d: d.update(guards_code=["__import__('os').mkdir('ran')"])),
    "expression": replaced('"expr_str": "', "\"expr_str\": \"__import__('os').mkdir('ran') or "),
    "names that are code": replaced('"name": "relu"', '"name": "relu; import os"'),
    "schema of another version": every("schema_version", {"major": 999, "minor": 0}),
    "devices that are unknown": every("device", {"type": "elsewhere", "index": None}),
    "nodes that are missing": changed("models/model.json", lambda d: d["graph_module"]["graph"].update(nodes=[])),
    "outputs that are missing": changed("models/model.json", lambda d: d["graph_module"]["graph"].update(outputs=[])),
    "inputs that are missing": changed("models/model.json", lambda d: d["graph_module"]["graph"].update(inputs=[])),
    "nodes in the wrong order": changed("models/model.json", lambda d: d["graph_module"]["graph"]["nodes"].reverse()),
    "constants of huge numbers": every("as_int", 1 << 70),
    "weights with negative sizes": sizes([-4, 1, 3, 3], [9, 9, 3, 1]),
    "weights with negative strides": sizes([4, 1, 3, 3], [-9, 9, 3, 1]),
    "weights without sizes": config(lambda entry: entry["tensor_meta"].pop("sizes")),
    "weights from elsewhere": config(lambda entry: entry.update(path_name="../../models/model.json")),
    "weights that are pickled": config(lambda entry: entry.update(use_pickle=True)),
}


def _program(folder: Path, base: Base, change: Change) -> list[str]:
    return base.with_program(rewritten(base.folder / "net.pt2", folder / "net.pt2", change))


hostile_each("pt2", MALFORMED | PROGRAMS, _program)


@hostile("pt2", "loop without end")
def _loop(folder: Path, base: Base) -> list[str]:
    class Endless(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            from torch._higher_order_ops.while_loop import while_loop

            return while_loop(lambda i, y: i < 2**62, lambda i, y: (i + 1, y * 1.0), (torch.tensor(0), x))[1]

    program = torch.export.export(Endless(), (torch.zeros(2, 1, 6, 6),))
    torch.export.save(program, folder / "net.pt2")
    return base.with_program(folder / "net.pt2")


def _extra(folder: Path, base: Base, extra: Mapping[str, bytes]) -> list[str]:
    return base.with_program(rewritten(base.folder / "net.pt2", folder / "net.pt2", lambda n, c: c, extra))


hostile_each(
    "pt2",
    {
        "compiled code": {"data/aotinductor/model/model.so": b"\x7fELF"},
        "pickled object": {"data/constants/custom_obj_0": pickle.dumps(Code(), 2)},
        "member out of the folder": {"../../evil": b"x"},
        "another model": {"models/other.json": b"[" * 10_000},
    },
    _extra,
)


# --- the reference program of a bundle


def _reference(folder: Path, base: Base, change: Change) -> list[str]:
    bundle = base.bundle(folder)
    rewritten(base.folder / "bundle/golden/reference.pt2", bundle / "golden/reference.pt2", change)
    reseal(bundle)
    return ["verify", "bundle", "--quiet"]


def _first(target: str) -> Callable[[Any], Any]:
    return lambda document: next(n for n in document["graph_module"]["graph"]["nodes"] if target in n["target"])


def at(target: str, change: Callable[[Any], Any]) -> Change:
    return changed("models/model.json", lambda document: change(_first(target)(document)))


def _argument(node: Any, name: str, value: Any) -> None:
    next(each for each in node["inputs"] if each["name"] == name)["arg"] = value


def _saved_bytes(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


REFERENCES: dict[str, Change] = {
    "foreign operator": at(
        "quantize", lambda node: node.update(target="torch.ops.inductor._reinterpret_tensor.default")
    ),
    "another operator of ours": at(
        "intact.quantize", lambda node: node.update(target="torch.ops.intact.dequantize.default")
    ),
    "quantizer without a site": at("intact.quantize", lambda node: _argument(node, "site", {"as_string": ""})),
    "site for the terminal": at("intact.quantize", lambda node: _argument(node, "site", {"as_string": "\x1b[2J"})),
    "bounds the wrong way": at("intact.quantize", lambda node: _argument(node, "qmin", {"as_int": 255})),
    "input of 4 GiB": at(
        "conv2d",
        lambda node: node.update(
            target="torch.ops.aten.full.default",
            inputs=[
                {"name": "size", "arg": {"as_ints": [1 << 30]}, "kind": 1},
                {"name": "fill_value", "arg": {"as_float": 1.0}, "kind": 1},
            ],
        ),
    ),
    "repeated": at(
        "conv2d",
        lambda node: node.update(
            target="torch.ops.aten.repeat.default",
            inputs=[node["inputs"][0], {"name": "repeats", "arg": {"as_ints": [1, 1 << 20, 16, 1]}, "kind": 1}],
        ),
    ),
    "convolution with negative padding": at(
        "conv2d", lambda node: node["inputs"].append({"name": "padding", "arg": {"as_ints": [-1, -1]}, "kind": 1})
    ),
    "convolution with huge padding": at(
        "conv2d", lambda node: node["inputs"].append({"name": "padding", "arg": {"as_ints": [20000, 20000]}, "kind": 1})
    ),
    "convolution of other groups": at(
        "conv2d", lambda node: node["inputs"].append({"name": "groups", "arg": {"as_int": 3}, "kind": 1})
    ),
    "convolution with stride 0": at(
        "conv2d", lambda node: node["inputs"].append({"name": "stride", "arg": {"as_ints": [0, 0]}, "kind": 1})
    ),
    "no quantizers": changed(
        "models/model.json",
        lambda d: d["graph_module"]["graph"].update(
            nodes=[n for n in d["graph_module"]["graph"]["nodes"] if "intact" not in n["target"]]
        ),
    ),
    "sample inputs that are missing": whole("data/sample_inputs", pickle.dumps(((), {}), 2)),
    "sample inputs of numbers": whole("data/sample_inputs", _saved_bytes(((1, 2), {}))),
    "sample inputs of another shape": whole("data/sample_inputs", _saved_bytes(((torch.zeros(2, 7),), {}))),
    "sample inputs of a TiB": whole("data/sample_inputs", _saved_bytes(((torch.zeros(1).expand(1 << 38),), {}))),
}


hostile_each("reference", MALFORMED | REFERENCES, _reference, codes={1, 2, 3})


@hostile("reference", "another program", codes={1, 2, 3})
def _other(folder: Path, base: Base) -> list[str]:
    bundle = base.bundle(folder)
    (bundle / "golden/reference.pt2").write_bytes((base.folder / "net.pt2").read_bytes())
    reseal(bundle)
    return ["verify", "bundle", "--quiet"]
