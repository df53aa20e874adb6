"""Hostile calibration data and dumps: .npz and .npy files, and folders of images."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.hostile.base import Base, hostile, hostile_each

GIB = 1 << 30
BLOCK = 1 << 24
GOOD = np.zeros((16, 1, 6, 6), np.float32)


def npy(shape: object = (16, 1, 6, 6), descr: object = "<f4", content: bytes = b"", *, fortran: bool = False) -> bytes:
    """A .npy file whose header says what it is told to."""
    return raw_npy(f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {shape!r}, }}", content)


def raw_npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + content


def good_npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, GOOD)
    return stream.getvalue()


def archive(path: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return path


def deflated(path: Path, name: str, header: bytes, zeros: int) -> Path:
    """An archive with one member, a header and zeros: one block is packed once and repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = [packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)]
    zeros -= zeros % BLOCK
    block = packer.compress(bytes(BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed += [block] * (zeros // BLOCK) + [packer.flush()]
    crc, empty = zlib.crc32(header), bytes(BLOCK)
    for _ in range(zeros // BLOCK):
        crc = zlib.crc32(empty, crc)
    content, size = b"".join(packed), len(header) + zeros
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, crc, len(content), size, len(name), 0)
    entry = b"PK\x01\x02\x14\x00" + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name.encode()
    local = b"PK\x03\x04" + fields + name.encode() + content
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1, 1, len(entry), len(local), 0)
    path.write_bytes(local + entry + end)
    return path


def patched(path: Path, old: bytes, new: bytes) -> Path:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    return path


HEADERS = {
    "promises a TiB": npy((1 << 28, 1, 32, 32)),
    "promises 2 to the 70": npy((1 << 62, 1, 16, 16)),
    "negative length": npy((-1, 1, 6, 6), content=bytes(2304)),
    "two negative sizes": npy((16, -1, -6, 6), content=bytes(2304)),
    "negative rows": npy((16, 1, 6, -6), content=bytes(2304)),
    "endless samples of nothing": npy((10**15, 0)),
    "endless samples without bytes": npy((10**12,), "V0"),
    "endless texts without bytes": npy((10**12, 4), "<U0"),
    "objects": npy((2,), "|O", b"\x80\x04cos\nsystem\n."),
    "objects in a record": npy((2,), [("a", "|O"), ("b", "<f4")], bytes(24)),
    "records": npy((2,), [("a", "<f4"), ("b", "<f4")], bytes(16)),
    "texts": npy((2, 1, 6, 6), "<U1", bytes(288)),
    "dates": npy((16, 1, 6, 6), "<M8[s]", bytes(16 * 36 * 8)),
    "complex": npy((16, 1, 6, 6), "<c8", bytes(16 * 36 * 8)),
    "bytes": npy((16, 1, 6, 6), "|S3", bytes(16 * 36 * 3)),
    "column major TiB": npy((1 << 20, 1 << 20), fortran=True),
    "column major without rows": npy((0, 1 << 40), fortran=True),
    "float shape": npy((16.0, 1, 6, 6), content=bytes(2304)),
    "shape that is no tuple": npy(16, content=bytes(2304)),
    "text for a shape": npy("16", content=bytes(2304)),
    "unknown type": npy((16,), "<q9", bytes(64)),
    "nested type": npy((16,), [("a", [("b", [("c", "<f4")])])], bytes(64)),
    "single number": npy((), content=bytes(4)),
    "code in the header": raw_npy("__import__('os').mkdir('ran')"),
    "deep header": raw_npy("(" * 4000 + ")" * 4000),
    "deep lists in the header": raw_npy("[" * 9000),
    "deep signs in the header": raw_npy("-" * 9000 + "1"),
    "huge number in the header": raw_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "9" * 5000 + ",)}"),
    "long header": raw_npy("{" + " " * 50_000 + "}"),
    "header of 4 GiB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "missing keys": raw_npy("{'descr': '<f4'}"),
    "no magic": b"hello",
    "empty": b"",
    "version 9": b"\x93NUMPY\x09\x00" + good_npy()[8:],
    "cut off": good_npy()[:-7],
    "cut off in the header": good_npy()[:40],
    "NaN": npy(content=np.full((16, 1, 6, 6), np.nan, np.float32).tobytes()),
    "another shape": npy((16, 3, 5, 5), content=bytes(16 * 75 * 4)),
    "no samples": npy((0, 1, 6, 6)),
    "sixty dimensions": npy((1,) * 60, content=bytes(4)),
    "seventy dimensions": npy((1,) * 70, content=bytes(4)),
}


def _npz(folder: Path, base: Base, content: bytes) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {"x.npy": content}))


def _dump_npy(folder: Path, base: Base, content: bytes) -> list[str]:
    (folder / "dump").mkdir()
    (folder / "dump" / f"{_value(base)}.npy").write_bytes(content)
    return ["compare-dump", str(base.folder / "bundle"), "dump"]


def _value(base: Base) -> str:
    import json

    return str(json.loads((base.folder / "bundle/golden/values.json").read_text())["values"][0]["name"])


hostile_each("npz", HEADERS, _npz)
for each in (
    "promises a TiB",
    "promises 2 to the 70",
    "negative length",
    "objects",
    "column major TiB",
    "deep header",
    "header of 4 GiB",
    "huge number in the header",
    "texts",
    "cut off",
    "dates",
    "complex",
):
    hostile_each("dump", {each: HEADERS[each]}, _dump_npy)


@hostile("npz", "member twice")
def _twice(folder: Path, base: Base) -> list[str]:
    archive(folder / "x.npz", {"x.npy": good_npy(), "y.npy": good_npy()})
    return base.with_data(patched(folder / "x.npz", b"y.npy", b"x.npy"))


@hostile("npz", "two names of one array")
def _two_names(folder: Path, base: Base) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {"x.npy": good_npy(), "x": good_npy()}))


@hostile("npz", "path out of the folder")
def _traversal(folder: Path, base: Base) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {"../../x.npy": npy((2, 3), content=bytes(24)), "/etc/x.npy": b""}))


@hostile("npz", "bomb of large rows")
def _rows(folder: Path, base: Base) -> list[str]:
    return base.with_data(deflated(folder / "x.npz", "x.npy", npy((48, 1, 4096, 4096)), 3 * GIB))


@hostile("npz", "bomb of many rows")
def _many(folder: Path, base: Base) -> list[str]:
    return base.with_data(deflated(folder / "x.npz", "x.npy", npy((3 * GIB // 144, 1, 6, 6)), 3 * GIB))


@hostile("npz", "bomb by columns")
def _columns(folder: Path, base: Base) -> list[str]:
    return base.with_data(deflated(folder / "x.npz", "x.npy", npy((3 * GIB // 144, 1, 6, 6), fortran=True), 3 * GIB))


def _method(folder: Path, base: Base, method: int) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {"x.npy": good_npy()}, method))


@hostile("npz", "damaged lzma")
def _lzma(folder: Path, base: Base) -> list[str]:
    path = archive(folder / "x.npz", {"x.npy": good_npy()}, zipfile.ZIP_LZMA)
    content = bytearray(path.read_bytes())
    content[60:200] = bytes(140)
    path.write_bytes(content)
    return base.with_data(path)


@hostile("npz", "lzma with a dictionary of 4 GiB")
def _dictionary(folder: Path, base: Base) -> list[str]:
    path = archive(folder / "x.npz", {"x.npy": good_npy()}, zipfile.ZIP_LZMA)
    content = path.read_bytes()
    at = content.index(b"x.npy") + 5
    path.write_bytes(content[: at + 5] + b"\xff\xff\xff\xff" + content[at + 9 :])
    return base.with_data(path)


@hostile("npz", "damaged deflate")
def _deflate(folder: Path, base: Base) -> list[str]:
    path = archive(folder / "x.npz", {"x.npy": good_npy()}, zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    content[50:70] = b"\xff" * 20
    path.write_bytes(content)
    return base.with_data(path)


@hostile("npz", "damaged bzip2")
def _bzip(folder: Path, base: Base) -> list[str]:
    path = archive(folder / "x.npz", {"x.npy": good_npy()}, zipfile.ZIP_BZIP2)
    content = bytearray(path.read_bytes())
    content[45:70] = b"\xff" * 25
    path.write_bytes(content)
    return base.with_data(path)


@hostile("npz", "encrypted")
def _encrypted(folder: Path, base: Base) -> list[str]:
    path = archive(folder / "x.npz", {"x.npy": good_npy()})
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    return base.with_data(path)


@hostile("npz", "unknown compression")
def _compression(folder: Path, base: Base) -> list[str]:
    path = archive(folder / "x.npz", {"x.npy": good_npy()})
    content = bytearray(path.read_bytes())
    content[8] = content[content.index(b"PK\x01\x02") + 10] = 99
    path.write_bytes(content)
    return base.with_data(path)


@hostile("npz", "members that overlap")
def _overlap(folder: Path, base: Base) -> list[str]:
    content = bytes(20_000_000)
    data = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = data.compress(npy((5_000_000,), content=content)) + data.flush()
    size, crc = len(content) + 64, zlib.crc32(b"")
    header = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 8, 0, 0, crc, len(packed), size, 5, 0)
    local = header + b"x.npy" + packed
    entries = b"".join(
        struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, 20, 0, 8, 0, 0, crc, len(packed), size, 6, 0, 0, 0, 0, 0, 0
        )
        + f"x{i:05}"[:6].encode()
        for i in range(1000)
    )
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 1000, 1000, len(entries), len(local), 0)
    (folder / "x.npz").write_bytes(local + entries + end)
    return base.with_data(folder / "x.npz")


@hostile("npz", "a hundred thousand members")
def _members(folder: Path, base: Base) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {f"a{index}.npy": b"" for index in range(100_000)}))


@hostile("npz", "a name for the terminal")
def _escape(folder: Path, base: Base) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {"\x1b]0;owned\x07\x1b[2J.npy": npy((2, 3), "|O")}))


@hostile("npz", "a name of 60 kB")
def _name(folder: Path, base: Base) -> list[str]:
    return base.with_data(archive(folder / "x.npz", {"n" * 60_000 + ".npy": npy((2, 3), "|O")}))


def _special(folder: Path, base: Base, make: Any) -> list[str]:
    make(folder / "x.npz")
    return base.with_data("x.npz")


SPECIAL = {
    "FIFO": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
    "folder": lambda path: path.mkdir(),
    "sparse file": lambda path: (path.touch(), os.truncate(path, 1 << 42)),
    "empty file": lambda path: path.touch(),
    "cut archive": lambda path: path.write_bytes(archive(path, {"x.npy": good_npy()}).read_bytes()[:-30]),
    "empty archive": lambda path: archive(path, {}),
    "end of an archive alone": lambda path: path.write_bytes(b"PK\x05\x06" + b"\xff" * 18),
}
hostile_each("npz", SPECIAL, _special)
hostile_each(
    "npz",
    {
        "name that is too long": "x" * 5000,
        "name with a new line": "a\nb\x1b[31m.npz",
        "bytes for a name": os.fsdecode(b"\xff\xfe.npz"),
    },
    lambda folder, base, name: base.with_data(name),
)


# --- dumps


@hostile("dump", "bomb")
def _dump_bomb(folder: Path, base: Base) -> list[str]:
    deflated(folder / "dump.npz", f"{_value(base)}.npy", npy((12, 4, 4096, 4096)), 3 * GIB)
    return ["compare-dump", str(base.folder / "bundle"), "dump.npz"]


@hostile("dump", "FIFO in a folder")
def _dump_fifo(folder: Path, base: Base) -> list[str]:
    (folder / "dump").mkdir()
    os.mkfifo(folder / "dump" / f"{_value(base)}.npy")
    return ["compare-dump", str(base.folder / "bundle"), "dump"]


@hostile("dump", "raw FIFO in a folder")
def _dump_raw(folder: Path, base: Base) -> list[str]:
    (folder / "dump").mkdir()
    os.mkfifo(folder / "dump" / f"{_value(base)}.bin")
    return ["compare-dump", str(base.folder / "bundle"), "dump"]


@hostile("dump", "values that are a FIFO")
def _values_fifo(folder: Path, base: Base) -> list[str]:
    bundle = base.bundle(folder)
    (bundle / "golden/values.json").unlink()
    os.mkfifo(bundle / "golden/values.json")
    (folder / "dump").mkdir()
    return ["compare-dump", "bundle", "dump"]


@hostile("dump", "golden codes that unfold")
def _codes_bomb(folder: Path, base: Base) -> list[str]:
    bundle = base.bundle(folder)
    deflated(bundle / "golden/codes.npz", f"{_value(base)}.npy", npy((3 * GIB,), "|u1"), 3 * GIB)
    np.savez(folder / "dump.npz", **{_value(base): GOOD})
    return ["compare-dump", "bundle", "dump.npz"]


def _values(folder: Path, base: Base, value: Mapping[str, Any]) -> list[str]:
    import json

    path = base.bundle(folder) / "golden/values.json"
    content = json.loads(path.read_text())
    content["values"][0] |= value
    path.write_text(json.dumps(content))
    np.savez(folder / "dump.npz", **{content["values"][0]["name"] if "name" not in value else "x": GOOD})
    return ["compare-dump", "bundle", "dump.npz"]


hostile_each(
    "dump",
    {
        "huge shape": {"shape": [1 << 40, 1 << 40]},
        "shape of texts": {"shape": ["a"]},
        "negative shape": {"shape": [-1, -4, 4, 4]},
        "stride 0": {"stride": 0},
        "stride of a text": {"stride": "x"},
        "scale 0": {"scale": 0},
        "scale of a text": {"scale": "x"},
        "zero point beyond int64": {"zero_point": 1 << 80},
        "no layer": {"layer": None},
        "a list for a name": {"name": ["x"]},
        "no shape": {"shape": None},
    },
    _values,
)


# --- images


def image(path: Path, size: tuple[int, int] = (8, 8), **options: Any) -> Path:
    Image.new("L", size).save(path, **options)
    return path


def png(width: int, height: int, rows: bytes | None = None) -> bytes:
    """A PNG whose header says what it is told to."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    data = zlib.compress(rows if rows is not None else bytes(100), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros_png(width: int, height: int) -> bytes:
    data = zlib.compressobj(9)
    packed = b"".join(data.compress(bytes(width + 1)) for _ in range(height)) + data.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(ran) (w) file closefile\nshowpage\n%%EOF\n"


def _file(folder: Path, base: Base, content: bytes) -> list[str]:
    (folder / "images").mkdir()
    (folder / "images/a.png").write_bytes(content)
    return base.with_data("images", "--image-size", "6", "--set", "batch_size=4")


def good_png() -> bytes:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


hostile_each(
    "images",
    {
        "empty": b"",
        "text": b"hello",
        "cut off": good_png()[:50],
        "PostScript": EPS,
        "header of 4 gigapixels": png(1 << 16, 1 << 16),
        "header of 150 megapixels": png(15000, 10000),
        "no pixels": png(0, 0),
        "one row of 60 million": png(60_000_000, 1),
        "one pixel wide": zeros_png(1, 12_000_000),
        "one pixel high": zeros_png(12_000_000, 1),
        "150 megapixels": zeros_png(15000, 10000),
        "wrong checksum": good_png().replace(b"IDAT", b"IDAX"),
        "damaged GIF": b"GIF89a" + b"\xff" * 40,
        "damaged JPEG": b"\xff\xd8\xff\xe0" + bytes(100),
        "damaged TIFF": b"II*\x00\x08\x00\x00\x00\xff\xff" + b"\xff" * 200,
        "TIFF in a circle": b"II*\x00\x08\x00\x00\x00\x00\x00\x08\x00\x00\x00",
        "damaged WebP": b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(40),
        "damaged bitmap": b"BM" + b"\xff" * 80,
        "huge bitmap": b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 1 << 30, 1 << 30, 1, 24, 0, 0, 0, 0, 0, 0),
        "text of pixels": b"P2 99999999 99999999 255 " + b"0 " * 50,
        "FITS": b"SIMPLE  =                    T" + b" " * 5000,
    },
    _file,
)


@hostile("images", "many large ones without a size")
def _large(folder: Path, base: Base) -> list[str]:
    (folder / "images").mkdir()
    (folder / "images/0.png").write_bytes(zeros_png(5000, 5000))
    for index in range(1, 64):
        os.link(folder / "images/0.png", folder / f"images/{index}.png")
    return base.with_data("images")


@hostile("images", "a huge size is asked for")
def _asked(folder: Path, base: Base) -> list[str]:
    (folder / "images").mkdir()
    image(folder / "images/a.png")
    return base.with_data("images", "--image-size", "200000x200000")


@hostile("images", "FIFO")
def _image_fifo(folder: Path, base: Base) -> list[str]:
    (folder / "images").mkdir()
    os.mkfifo(folder / "images/a.png")
    return base.with_data("images")


@hostile("images", "links in a circle")
def _circle(folder: Path, base: Base) -> list[str]:
    (folder / "images/a").mkdir(parents=True)
    (folder / "images/a/a.png").symlink_to("a.png")
    (folder / "images/a/b").symlink_to("..")
    (folder / "images/c").symlink_to("c")
    return base.with_data("images")


@hostile("images", "link to a device")
def _device(folder: Path, base: Base) -> list[str]:
    (folder / "images").mkdir()
    (folder / "images/a.png").symlink_to("/dev/zero")
    return base.with_data("images")


@hostile("images", "link to a text outside")
def _outside(folder: Path, base: Base) -> list[str]:
    (folder / "images").mkdir()
    (folder / "images/a.png").symlink_to("/etc/passwd")
    return base.with_data("images")


@hostile("images", "names that are no text")
def _undecodable(folder: Path, base: Base) -> list[str]:
    (folder / "images").mkdir()
    (folder / "images" / os.fsdecode(b"\xff\xfe.png")).write_bytes(b"no image")
    return base.with_data("images")


@hostile("images", "classes that are no text")
def _classes(folder: Path, base: Base) -> list[str]:
    for name in (b"\xff", b"\xfe\x1b[31m"):
        (folder / "images" / os.fsdecode(name)).mkdir(parents=True)
    return base.with_data("images")


@hostile("images", "folders in folders")
def _deep(folder: Path, base: Base) -> list[str]:
    (folder / "images/class").mkdir(parents=True)
    here = os.open(folder / "images/class", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    return base.with_data("images")


@hostile("images", "no images")
def _none(folder: Path, base: Base) -> list[str]:
    (folder / "images/a").mkdir(parents=True)
    return base.with_data("images")
