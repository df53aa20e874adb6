"""Hostile texts: configuration files, gates, rules for layers, and other values of flags."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.hostile.base import Base, hostile_each

LONG = "9" * 5000

TOMLS: dict[str, Any] = {
    "deep lists": "x = " + "[" * 10_000 + "]" * 10_000,
    "deep tables": "x = " + "{a = " * 10_000 + "1" + "}" * 10_000,
    "dotted key of 100 000 parts": ".".join("a" * 100_000) + " = 1",
    "nested headers": "[" + ".".join("a" * 50_000) + "]",
    "long number": f"seed = {LONG}",
    "number beyond 64 bits": "seed = 18446744073709551616",
    "hexadecimal beyond everything": f"seed = 0x{'f' * 100_000}",
    "not a number": "cache_gib = nan",
    "infinite": "cache_gib = inf",
    "beyond floats": "cache_gib = 1e999",
    "a date": "seed = 2020-01-01",
    "options that are no table": "options = 3",
    "options that are a list": "options = [1]",
    "nested option": "[options]\nbins = {a = 1}",
    "option of a list": "[options]\nbins = [1, 2]",
    "layers that are a table": "[layers]\nmatch = '*'",
    "layers that are numbers": "layers = [1, 2]",
    "layers in layers": "layers = [[[]]]",
    "rule without match": "[[layers]]\nweight_bits = 4",
    "rule that matches a number": "[[layers]]\nmatch = 4\nweight_bits = 4",
    "rule of huge bits": f"[[layers]]\nmatch = '*'\nweight_bits = {'9' * 4000}",
    "key twice": "seed = 1\nseed = 2",
    "unknown keys": "".join(f"k{index} = 1\n" for index in range(1000)),
    "key with an escape": '"\\u001b[31mseed" = 1',
    "bytes that are no text": b"\xff\xfe\x00",
    "zeros": bytes(1000),
    "unfinished": "seed = [",
    "gates of numbers": "gates = [1, 2]",
    "gates as a table": "gates = {a = 1}",
    "budget of everything": f"budget = ['bops<={LONG}']",
    "forty megabytes": "x = [" + "1," * 20_000_000 + "]",
    "threads": "threads = 1000000000",
    "negative threads": "threads = -1",
    "batch size beyond everything": f"batch_size = {'9' * 4000}",
    "samples": "parity_samples = -1",
}


def _toml(folder: Path, base: Base, text: str | bytes) -> list[str]:
    (folder / "c.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [*base.with_data(base.data), "--config", "c.toml"]


hostile_each("toml", TOMLS, _toml)


def _special(folder: Path, base: Base, make: Any) -> list[str]:
    make(folder / "c.toml")
    return [*base.with_data(base.data), "--config", "c.toml"]


hostile_each(
    "toml",
    {"FIFO": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": lambda path: path.mkdir()},
    _special,
)


def _flag(folder: Path, base: Base, arguments: list[str]) -> list[str]:
    return [*base.with_data(base.data), *arguments]


GATES = {
    "nothing": "",
    "no number": "accuracy_drop<=",
    "no operator": "accuracy_drop",
    "infinite": "agreement>=inf",
    "not a number": "agreement>=nan",
    "beyond floats": "agreement>=1e999",
    "long number": f"agreement>={LONG}",
    "long number with a unit": f"agreement>={LONG}%",
    "wrong unit": "agreement>=3kB",
    "unknown metric": "agrement>=0.5",
    "long metric": f"{'a' * 100_000}>=1",
    "dots": f"{'.' * 50_000}>=1",
    "path of dots": f"{'a.' * 50_000}b>=1",
    "spaces": " " * 100_000,
    "metric then spaces": "agreement" + " " * 100_000 + "!",
    "two operators": "agreement<=<=1",
    "code": "__import__('os').mkdir('ran')>=1",
    "escape": "\x1b[31magreement>=1",
    "surrogates": os.fsdecode(b"\xff>=1"),
    "other digits": "agreement>=\u0664\u0664x",
    "exponent of exponents": "agreement>=1e5e5%",
}
hostile_each("gate", {name: ["--gate", text] for name, text in GATES.items()}, _flag)

RULES = {
    "nothing": "",
    "glob alone": "*",
    "no glob": ": weight_bits=4",
    "no value": "*: weight_bits=",
    "value twice": "*: weight_bits=4, weight_bits=4",
    "deep list": "*: weight_bits=" + "[" * 10_000,
    "long number": f"*: weight_bits={LONG}",
    "unknown setting": "*: weigth_bits=4",
    "code": "*: method=__import__('os')",
    "bits out of range": "*: weight_bits=99",
    "negative bits": "*: activation_bits=-4",
    "glob of stars": "*a" * 20_000 + ": weight_bits=4",
    "glob that is open": "[[[[[!]: weight_bits=4",
    "glob of 100 000": "x" * 100_000 + ": weight_bits=4",
    "surrogates": os.fsdecode(b"\xff: weight_bits=4"),
    "a table": "*: weight_bits={a = 1}",
}
hostile_each("rule", {name: ["--layer", text] for name, text in RULES.items()}, _flag)

SETS = {
    "nothing": "",
    "no key": "=4",
    "key with a dot": "a.b=4",
    "unknown": "no_such_option=4",
    "long number": f"seed={LONG}",
    "beyond 64 bits": "seed=99999999999999999999",
    "negative seed": "seed=-1",
    "deep list": "seed=" + "[" * 10_000 + "]" * 10_000,
    "deep table": "seed=" + "{a=" * 10_000,
    "text for a number": "weight_bits=four",
    "infinite": "cache_gib=inf",
    "none": "weight_bits=none",
    "options themselves": "options=3",
    "several lines": "seed=1\nweight_bits=2\n[options]\nx=1",
    "threads": "threads=1000000000",
    "device": f"device=cuda:{LONG}",
    "release": f"min_ort=1.{LONG}",
    "layers": "layers=[[[1]]]",
    "dynamic": "dynamic=[1]",
    "image size": f"image_size={LONG}x{LONG}",
}
hostile_each("set", {name: ["--set", text] for name, text in SETS.items()}, _flag)

FLAGS = {
    "axes": ["--dynamic", f"x:{LONG}"],
    "axis beyond all": ["--dynamic", "x:99999999999999999999"],
    "bounds": ["--dynamic", f"input:2[{LONG}..{LONG}]"],
    "bounds the wrong way": ["--dynamic", "input:2[9..3]"],
    "budget": ["--budget", f"weight_bytes<={LONG}"],
    "budget of nothing": ["--budget", "weight_bytes<=0"],
    "budget that is infinite": ["--budget", "bops<=inf"],
    "release": ["--min-ort", f"{LONG}.{LONG}"],
    "runtime": ["--prove-on", f"ort=={LONG}"],
    "runtime with a path": ["--prove-on", "ort==../../etc"],
    "mean": ["--mean", "1e999"],
    "method": ["--method", "../../etc/passwd"],
    "target": ["--target", "__import__"],
    "metric": ["--metric", "/etc/passwd:x"],
    "checkpoint key": ["--checkpoint-key", "a" * 100_000, "--checkpoint", "net.pt"],
    "device": ["--device", f"cuda:{LONG}"],
    "out": ["--out", "x" * 5000],
    "out in a circle": ["--out", "/proc/self/fd/99/out"],
    "out without rights": ["--out", "/proc/out"],
}
hostile_each("flag", FLAGS, _flag)

MODELS = {
    "arguments that are deep": "net.py:build(" + "(" * 5000 + ")" * 5000 + ")",
    "arguments that are code": "net.py:build(__import__('os').mkdir('ran'))",
    "long number": f"net.py:build({LONG})",
    "dunder": "net.py:__builtins__.exec",
    "device": "/dev/zero:build",
    "device as a file": "/dev/stdin.py:build",
    "surrogates": os.fsdecode(b"\xff.py:build"),
    "escape": "\x1b[31m.py:build",
    "long": "n" * 5000 + ".py:build",
    "long module": "a." * 5000 + "b:build",
    "relative module": "..:build",
}


def _model(folder: Path, base: Base, text: str) -> list[str]:
    (folder / "net.py").write_bytes((base.folder / "net.py").read_bytes())
    return [*base.export, text, "--data", base.data]


hostile_each("model", MODELS, _model)
