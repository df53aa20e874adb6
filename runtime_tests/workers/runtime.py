"""The interface of a runtime that can be asked to run a file, and of a file loaded into it.

Must not know: which runtimes there are, the reference.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from calibrators.errors import InputError
from runtime_tests.ort.saturation import this_cpu
from runtime_tests.ort.sessions import Model
from runtime_tests.workers.install import Component, PipPackages

if TYPE_CHECKING:
    from torch import fx

__all__ = ["EMULATED_SAMPLES", "Array", "Artifact", "Loaded", "PinnedRuntime", "Runtime"]

Array = NDArray[Any]

EMULATED_SAMPLES = 16
"""Samples that a runtime compares where it is slow. MobileNetV2 took onnxruntime-web 15 times as long as a CPU with
VNNI, emulated ARM processors 85 times and emulated x86 processors 150 times as long."""


@dataclass(frozen=True, eq=False)
class Artifact:
    """The files and the program that an export left for a runtime.

    model:   the ONNX file.
    program: the reference program, for runtimes that execute what they made of it; None where it is not known.
    lowered: what the runtime made of the program at the export; None: it makes it again.
    """

    model: Model
    program: fx.GraphModule | None = None
    lowered: Path | None = None


class Loaded(Protocol):
    """A file loaded into a runtime, with some of its values made visible as probes.

    name:        the runtime, as messages show it.
    kernel_rate: share of the codes of an integer kernel that may be one step off; 0: none.
    float_factor: by how much its float operators may differ more than those of float32 do.
    """

    @property
    def name(self) -> str: ...
    @property
    def kernel_rate(self) -> float: ...
    @property
    def float_factor(self) -> float: ...
    @property
    def output_names(self) -> list[str]: ...
    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the model's outputs and the probes.

        raises: ModelError if the runtime cannot run the file.
        """

    def executed(self) -> Mapping[str, int] | None:
        """Count the nodes that run, by operator of onnxruntime; None where the runtime does not tell."""


@dataclass(frozen=True)
class Runtime(ABC):
    """A runtime on a processor.

    summary:    one line for lists.
    processor:  the family of `calibrators.grid.processors` whose kernels it executes; empty: that of this machine.
    variants:   names `NAME==VARIANT` that are installed with the others; `variant` takes more.
    samples:    number of samples compared at most; None: all.
    kernel_rate: share of the codes of an integer kernel that may be one step off; 0: none.
    lowers:     it executes what it makes of a reference program, by `lower`.
    components: what has to be installed for it.
    """

    name: str
    summary: str
    processor: str = ""
    variants: tuple[str, ...] = ()
    samples: int | None = EMULATED_SAMPLES
    kernel_rate: float = 0.0
    lowers: bool = False

    @property
    def family(self) -> str:
        """Return the family of processors whose kernels it executes."""
        return self.processor or this_cpu().family or "unknown"

    @property
    def components(self) -> tuple[Component, ...]:
        """Return what has to be installed for it."""
        return ()

    @property
    @abstractmethod
    def version(self) -> str:
        """Return the version of the runtime; call it only where nothing is missing."""

    @property
    def flags(self) -> tuple[str, ...]:
        """Return what decides how the processor computes: instruction sets, emulator, model of the processor."""
        return this_cpu().flags

    def missing(self) -> str:
        """Return why the runtime is not available here; empty if it is."""
        absent = [component.name for component in self.components if not component.is_installed]
        return f"not installed: {', '.join(absent)}" if absent else ""

    @property
    def how_to_get(self) -> str:
        """Return the end of a sentence on how to make it available."""
        return f"run `intact runtimes --install {self.name}`"

    def install(self) -> None:
        """Install what is missing.

        raises: InputError naming what a registry does not have.
        """
        for component in self.components:
            component.install()

    def variant(self, text: str) -> Runtime:
        """Return the runtime called `NAME==text`.

        raises: InputError if there is none.
        """
        raise InputError(f"the runtime {self.name} has no variants; give it without =={text}.")

    def lower(self, program: fx.GraphModule, path: Path) -> tuple[str, ...]:
        """Write the file that the runtime executes instead of model.onnx; return the operators that fall back.

        raises: ModelError if it cannot be made; InputError if the runtime is not available.
        """
        raise InputError(f"the runtime {self.name} executes model.onnx and lowers no programs.")

    @abstractmethod
    def open(self, artifact: Artifact, probes: Sequence[str], threads: int) -> Loaded:
        """Load a file with probes as further outputs.

        raises: ModelError if the runtime refuses the file.
        """


@dataclass(frozen=True, kw_only=True)
class PinnedRuntime(Runtime):
    """A runtime of one release, which packages of pip bring along."""

    packages: PipPackages
    release: str

    @property
    def components(self) -> tuple[Component, ...]:
        return (self.packages,)

    @property
    def version(self) -> str:
        return self.release
