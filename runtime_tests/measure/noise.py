"""How much noise quantization adds to each value: the program's values against those of the float graph.

Must not know: runtimes, files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.execution.measure import Watcher
from calibrators.grid.numerics import dequantize
from calibrators.program.freeze import CalibrationResult

__all__ = ["Noise"]


class Noise:
    """Running energy of the signal and of the noise at every site; nothing else is kept from batch to batch."""

    def __init__(self, result: CalibrationResult) -> None:
        self.result = result
        self._site_of = {node: site.name for node, site in result.placement.activation_of.items()}
        self._energies = dict.fromkeys(self._site_of.values(), (0.0, 0.0))
        self._floats: dict[str, Tensor] = {}

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Run the float graph on a batch, whose values `see` is going to be shown."""
        self._floats = {}

        def keep(node: fx.Node, value: Any) -> None:
            if node.name in self._site_of:
                self._floats[self._site_of[node.name]] = value

        with torch.no_grad():
            Watcher(self.result.placement.graph, keep).run(*inputs)

    def see(self, site: str, value: Tensor) -> None:
        """Count the program's value at a site: what runtime_tests.reference.execute.run shows."""
        exact = self._floats.pop(site, None)
        if exact is not None:
            signal, noise = self._energies[site]
            signal += float(exact.square().sum(dtype=torch.float64))
            self._energies[site] = signal, noise + float((value - exact).square().sum(dtype=torch.float64))

    def decibels(self) -> dict[str, float]:
        """Return the ratio of signal to noise by site name, infinite where nothing differs.

        Activations carry all noise that came before them; weights are compared alone.
        """
        energies = dict(self._energies)
        for site in self.result.placement.sites:
            if site.kind == "weight":
                weight, stored = self.result.placement.values(site), self.result.weights[site.name]
                error = dequantize(stored.codes, stored.qparams) - weight
                energies[site.name] = (float(weight.square().sum()), float(error.square().sum()))
        return {name: _decibel(*energy) for name, energy in energies.items()}


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
