"""The jobs of a sweep, from its TOML file: every combination of the lists in [sweep], each with a key.

Must not know: how jobs are run, what became of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from calibrators.errors import InputError, UnknownNameError, is_text
from calibrators.methods import get_method
from calibrators.settings import shown
from calibrators.targets import get_target
from exporter.about import __version__
from exporter.config import ExportConfig, with_underscores
from exporter.job import KEYS, Job, config_schema, errors_of, make_job, read_toml
from exporter.sweeping.inputs import INPUTS, digest_of_input

__all__ = ["Sweep", "SweepJob", "job_of", "label_of", "read_sweep", "sweep_schema"]

TABLE = "sweep"
MOST_JOBS = 10_000
KEY_DIGITS = 12
LONGEST_SLUG = 60
"""Characters of the name of a bundle before its key."""

OF_THE_SWEEP = frozenset({"out"})
"""Keys that belong to the whole sweep: each job gets a folder of its own in `out`."""
LIBRARIES = ("torch", "onnxruntime")
"""Packages whose versions are part of a key, besides this one."""
WITHOUT_RESULT = frozenset({"cache", "resume"})
"""Settings that change nothing in a bundle."""
EXAMPLE = 'write for example `method = ["mse", "gptq"]` under [sweep]'

Digest = Callable[[str, str], str | None]
"""digest_of_input, which reads each file once."""
Entry = Mapping[str, Any]
"""Settings that belong together: one choice of an axis."""


def label_of(values: Mapping[str, str]) -> str:
    """Return the values that tell a job from the others, for people."""
    return ", ".join(values.values()) or "the only job"


@dataclass(frozen=True, eq=False)
class SweepJob:
    """One export of a sweep.

    key:    digest of all that its bundle depends on: settings, input files, versions.
    values: what tells it from the other jobs, as text by axis.
    """

    key: str
    values: dict[str, str]
    job: Job
    config: ExportConfig

    @property
    def label(self) -> str:
        """The values, for people."""
        return label_of(self.values)

    @property
    def bundle(self) -> Path:
        """Folder of the bundle."""
        return Path(self.job.out or "")

    @property
    def is_finished(self) -> bool:
        """Whether the bundle exists; it is written whole or not at all."""
        return (self.bundle / "manifest.json").is_file()

    @property
    def log(self) -> Path:
        """File of what the job prints."""
        return self.bundle.with_name(f"{self.bundle.name}.log")

    @property
    def error(self) -> Path:
        """File that says why there is no bundle."""
        return self.bundle.with_name(f"{self.bundle.name}.error.json")


@dataclass(frozen=True, eq=False)
class Sweep:
    """The jobs of a file, in the order of its lists; axes: what varies; out: folder of all bundles."""

    file: Path
    out: Path
    axes: tuple[str, ...]
    jobs: tuple[SweepJob, ...]


def read_sweep(file: Path) -> Sweep:
    """Read a sweep: the keys of `intact export --config`, and a table [sweep] with a list for everything that varies.

    An entry of a list is a value of the setting after which the list is named, or a table of settings that belong
    together; then the list may have any name. Its settings replace those above [sweep].

    raises: InputError for unknown keys and values, and for files that do not exist.
    """
    values = read_toml(file)
    with errors_of(str(file)):
        axes = _axes(values.pop(TABLE, None))
        out = _out(values.pop("out", None))
        if isinstance(names := values.get("target"), list):
            raise InputError(f"target = {shown(names)} is a list; write it under [sweep], which makes a job of each.")

        @cache  # jobs share files
        def digest(name: str, value: str) -> str | None:
            _check_outside(out, name, value)
            return digest_of_input(name, value)

        jobs = [_job(values, combination, out, digest) for combination in _combinations(axes)]
        _check_apart(jobs)
    varied = tuple(name for name, entries in axes.items() if len(entries) > 1)
    return Sweep(file, out, varied, tuple(jobs))


def job_of(sweep: Sweep, key: str) -> SweepJob:
    """Return the job with this key.

    raises: InputError if there is none, as after a change of settings, files or versions.
    """
    for each in sweep.jobs:
        if each.key == key:
            return each
    raise InputError(
        f"{sweep.file} has no job {key!r} (any more): keys change with settings, input files and versions; list them "
        f"with `intact sweep {sweep.file} --list`."
    )


def sweep_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of the TOML file of a sweep."""
    schema = config_schema(many_targets=False)
    settings = {name: each for name, each in schema["properties"].items() if name not in OF_THE_SWEEP}
    entry = {"type": "object", "properties": settings, "additionalProperties": False, "minProperties": 1}
    lists = {
        name: {"type": "array", "minItems": 1, "items": each if name == "options" else {"anyOf": [each, entry]}}
        for name, each in settings.items()
    }
    table = {
        "type": "object",
        "description": "A list for everything that varies; the jobs are all combinations.",
        "minProperties": 1,
        "properties": lists,
        "additionalProperties": {"type": "array", "minItems": 1, "items": entry},
    }
    properties = schema["properties"] | {TABLE: table}
    return schema | {"title": "A sweep of intact", "properties": properties, "required": ["out", TABLE]}


def _out(given: object) -> Path:
    """Return the folder for the bundles, which exists or can be made.

    raises: InputError.
    """
    if not isinstance(given, str) or not given or not is_text(given):
        raise InputError(f'out = {shown(given)} names no folder for the bundles; write for example out = "build/x".')
    path = Path(given)
    taken = next(each for each in (path, *path.parents) if each.exists() or each.is_symlink())
    if not taken.is_dir():
        raise InputError(f"out = {shown(given)} cannot be made: {taken} is not a folder; choose another name.")
    return path


def _check_outside(out: Path, name: str, value: str) -> None:
    """Check that a folder that is read does not hold the bundles, which would change all keys.

    raises: InputError.
    """
    folder = Path(value)
    if name in INPUTS and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"out = {shown(str(out))} lies in {name} = {shown(value)}; choose a folder outside it.")


def _axes(table: object) -> dict[str, dict[str, Entry]]:
    """Return the entries of every axis by their texts.

    raises: InputError.
    """
    if not isinstance(table, Mapping) or not table:
        raise InputError(f"there is no table [sweep] with what varies; {EXAMPLE}.")
    axes: dict[str, dict[str, Entry]] = {}
    owners: dict[str, str] = {}
    for name, listed in with_underscores(table).items():
        if not isinstance(listed, list) or not listed:
            raise InputError(f"[sweep] {name} = {shown(listed)} is not a list of values; {EXAMPLE}.")
        entries = [_entry(name, each) for each in listed]
        for key in dict.fromkeys(itertools.chain(*entries)):
            if (other := owners.setdefault(key, name)) != name:
                raise InputError(f"[sweep] sets {key} in {other} and in {name}; leave it to one of them.")
        axes[name] = dict(zip(_texts(name, entries), entries, strict=True))
    if (count := math.prod(map(len, axes.values()))) > MOST_JOBS:
        raise InputError(f"[sweep] makes {count:,} jobs, more than {MOST_JOBS:,}; leave some values out.")
    return axes


def _entry(axis: str, given: object) -> Entry:
    """Return the settings of an entry."""
    if isinstance(given, Mapping) and axis != "options":
        entry = with_underscores(given)
    elif axis in KEYS:
        entry = {axis: None if given == "none" else given}
    else:
        raise InputError(
            f"[sweep] {UnknownNameError('setting', axis, KEYS)} A list with a name of its own holds tables of settings."
        )
    if not entry:
        raise InputError(f"[sweep] {axis} holds an empty table; give each entry at least one setting.")
    if strangers := entry.keys() - KEYS:
        raise InputError(f"[sweep] {axis}: {UnknownNameError('setting', min(strangers), KEYS)}")
    if wrong := entry.keys() & OF_THE_SWEEP:
        raise InputError(f"[sweep] sets {min(wrong)}, which is that of all jobs; write it above [sweep].")
    return entry


def _texts(axis: str, entries: Sequence[Entry]) -> list[str]:
    """Return a text for each entry, the shortest that tells them apart."""
    ways: tuple[Callable[[Entry], str], ...] = (
        lambda entry: _short(_text(entry[axis])) if axis in entry else _all(entry, _short),
        lambda entry: _all(entry, _short),
        lambda entry: _all(entry, str),
    )
    for way in ways:
        texts = [way(entry) for entry in entries]
        if len(set(texts)) == len(texts):
            return texts
    twice = next(text for index, text in enumerate(texts) if text in texts[:index])
    raise InputError(f"[sweep] {axis} holds {twice} twice; leave one of them out.")


def _all(entry: Entry, form: Callable[[str], str]) -> str:
    return "/".join(form(_text(value)) for value in entry.values())


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_text(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ",".join(map(_text, value)) or "none"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


def _short(text: str) -> str:
    """Return a text without the folders of a file: zoo/net.py:build(width=0.5) -> net.py:build(width=0.5)."""
    return re.sub(r"^[^:(]*/(?=[^/:(])", "", text)


def _combinations(axes: Mapping[str, Mapping[str, Entry]]) -> Iterator[dict[str, tuple[str, Entry]]]:
    """Yield text and settings of each axis; the last axis varies fastest."""
    for choice in itertools.product(*(entries.items() for entries in axes.values())):
        yield {name: pair for name, pair, entries in zip(axes, choice, axes.values(), strict=True)}


def _job(
    values: Mapping[str, Any], combination: Mapping[str, tuple[str, Entry]], out: Path, digest: Digest
) -> SweepJob:
    """Return the job of a combination.

    raises: InputError.
    """
    chosen = {key: value for _, entry in combination.values() for key, value in entry.items()}
    job, config = make_job({**values, **chosen})
    job.arguments(writes=False)
    get_target(config.target)
    get_method(config.method, config.options)
    texts = {name: text for name, (text, _) in combination.items()}
    key = _key(job, config, digest)
    slug = re.sub(r"[^\w.=]+", "-", "-".join(texts.values()), flags=re.ASCII).strip("-.")[:LONGEST_SLUG]
    folder = out / f"{slug}-{key}".lstrip("-")
    if config.cache is None:
        config = config.model_copy(update={"cache": str(out / "cache")})
    return SweepJob(key, texts, job.model_copy(update={"out": str(folder)}), config)


def _key(job: Job, config: ExportConfig, digest: Digest) -> str:
    """Return the digest of all settings but where the bundle goes, of the files that they name, and of versions."""
    settings = job.model_dump(mode="json", exclude=set(OF_THE_SWEEP)) | config.model_dump(
        mode="json", exclude=set(WITHOUT_RESULT)
    )
    files = {name: digest(name, value) for name, value in settings.items() if isinstance(value, str)}
    content = json.dumps([settings, files, _versions()], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()[:KEY_DIGITS]


@cache  # reading them takes four times as long as the rest of a job's key
def _versions() -> list[str]:
    return [__version__, *map(metadata.version, LIBRARIES)]


def _check_apart(jobs: Sequence[SweepJob]) -> None:
    seen: dict[str, SweepJob] = {}
    for each in jobs:
        if (other := seen.setdefault(each.key, each)) is not each:
            raise InputError(
                f"[sweep] makes the same job twice: {other.label} and {each.label}; leave one of them out."
            )
