"""Measure the noise that quantization adds to each value: the program's values against those of the float graph.

Must not know: runtimes, files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calibrators.graph.walk import walk
from calibrators.grid.metrics import SignalAndNoise
from calibrators.grid.numerics import dequantize
from calibrators.program.freeze import CalibrationResult
from runtime_tests.measure.histograms import Histograms, RunningHistograms

__all__ = ["Noise"]

WEIGHT_SAMPLES = 128
"""A weight counts as so many samples in its histograms."""


class Noise:
    """Running energy of the signal and of the noise at every site; nothing else is kept from batch to batch."""

    def __init__(self, result: CalibrationResult) -> None:
        self.result = result
        self._site_of = {node: site.name for node, site in result.placement.activation_of.items()}
        self._energies = {site: SignalAndNoise() for site in self._site_of.values()}
        self._histograms = {
            site.name: RunningHistograms(result.qparams_of(site)) for site in result.placement.activation_of.values()
        }
        self._floats: dict[str, Tensor] = {}

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Run the float graph on a batch, before `see` gets the program's values for it."""
        with torch.no_grad():
            steps = walk(self.result.placement.graph, inputs)
            self._floats = {
                self._site_of[node.name]: values[node] for node, values in steps if node.name in self._site_of
            }

    def see(self, site: str, value: Tensor) -> None:
        """Add the program's value at a site, as runtime_tests.reference.execute.run passes it."""
        exact = self._floats.pop(site, None)
        if exact is not None:
            self._energies[site].add(value, exact)
            self._histograms[site].add(exact, value, len(exact) if exact.ndim else 1)

    def decibels(self) -> dict[str, float]:
        """Return the ratio of signal to noise by site name, infinite where nothing differs.

        Activations carry all noise that came before them; weights are compared alone.
        """
        energies = dict(self._energies)
        for site in self.result.placement.sites:
            if site.kind == "weight":
                stored = self.result.weights[site.name]
                energies[site.name] = SignalAndNoise()
                energies[site.name].add(dequantize(stored.codes, stored.qparams), self.result.placement.values(site))
        return {name: energy.decibels for name, energy in energies.items()}

    def histograms(self) -> dict[str, Histograms]:
        """Return the histograms of every site whose values were seen, and of all weights."""
        running = dict(self._histograms)
        for site in self.result.placement.sites:
            if site.kind == "weight":
                stored, exact = self.result.weights[site.name], self.result.placement.values(site)
                running[site.name] = RunningHistograms(stored.qparams)
                running[site.name].add(exact, dequantize(stored.codes, stored.qparams), WEIGHT_SAMPLES)
        return {name: found for name, each in running.items() if (found := each.result()) is not None}
