"""Measure the noise of quantization: at each value, all that came before it included, and what each layer adds.

Must not know: runtimes, files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.walk import walk
from calibrators.grid.metrics import SignalAndNoise
from calibrators.grid.numerics import dequantize, fake_quant
from calibrators.program.freeze import CalibrationResult
from runtime_tests.measure.histograms import Histograms, RunningHistograms

__all__ = ["Noise"]

WEIGHT_SAMPLES = 128
"""A weight counts as so many samples in its histograms."""


class Noise:
    """Running energies of signal and noise, by site and by layer; nothing else is kept."""

    def __init__(self, result: CalibrationResult) -> None:
        self.result, self._placement = result, result.placement
        self._site_of = {node: site.name for node, site in self._placement.activation_of.items()}
        self._energies = {site: SignalAndNoise() for site in self._site_of.values()}
        self._histograms = {
            site.name: RunningHistograms(result.qparams_of(site)) for site in self._placement.activation_of.values()
        }
        self._added = {site.name: SignalAndNoise() for site in self._placement.weight_of.values()}
        self._floats: dict[str, Tensor] = {}

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Run the float graph on a batch, before `see` gets the program's values for it."""
        self._floats = {}
        with torch.no_grad():
            for node, values in walk(self._placement.graph, inputs):
                if node.name in self._site_of:
                    self._floats[self._site_of[node.name]] = values[node]
                if (weight := self._placement.weight_of.get(node.name)) is not None:
                    self._added[weight.name].add(self._rounded(node, values), values[node])

    def see(self, site: str, value: Tensor) -> None:
        """Add the program's value at a site, as runtime_tests.reference.execute.run passes it."""
        exact = self._floats.pop(site, None)
        if exact is not None:
            self._energies[site].add(value, exact)
            self._histograms[site].add(exact, value, len(exact) if exact.ndim else 1)

    @property
    def counts(self) -> tuple[dict[str, Any], ...]:
        """The measurements, for `include`."""
        return self._energies, self._histograms, self._added

    def include(self, counts: tuple[dict[str, Any], ...]) -> None:
        """Add what another process measured on other samples."""
        for ours, theirs in zip(self.counts, counts, strict=True):
            for name, each in theirs.items():
                ours[name].include(each)

    def decibels(self) -> dict[str, float]:
        """Return the ratio of signal to noise by site name, infinite where nothing differs.

        Activations carry all noise that came before them; weights are compared alone.
        """
        energies = dict(self._energies)
        for site in self._placement.sites:
            if site.kind == "weight":
                energies[site.name] = SignalAndNoise()
                energies[site.name].add(self._weight(site.name), self._placement.values(site))
        return {name: energy.decibels for name, energy in energies.items()}

    def histograms(self) -> dict[str, Histograms]:
        """Return the histograms of every site whose values were seen, and of all weights."""
        running = dict(self._histograms)
        for site in self._placement.sites:
            if site.kind == "weight":
                running[site.name] = RunningHistograms(self.result.weights[site.name].qparams)
                running[site.name].add(self._placement.values(site), self._weight(site.name), WEIGHT_SAMPLES)
        return {name: found for name, each in running.items() if (found := each.result()) is not None}

    def added(self) -> dict[str, float]:
        """Return by weight site the noise that the layer adds, over the energy of its output.

        That is the error of its output where only its weights and the values that it reads are rounded.
        """
        return {site: energy.relative for site, energy in self._added.items()}

    def _weight(self, site: str) -> Tensor:
        stored = self.result.weights[site]
        return dequantize(stored.codes, stored.qparams)

    def _rounded(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return the output of a layer for the exact values that it reads, rounded to their grids."""
        weight = self._placement.weight_of[node.name]

        def rounded(operand: fx.Node) -> Any:
            if operand.name == weight.node:
                return self._weight(weight.name)
            site = self._placement.activation_of.get(operand.name)
            if site is None or node.name not in site.users:
                return values[operand]
            return fake_quant(values[operand], self.result.qparams_of(site))

        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), rounded)
        return node.target(*args, **kwargs)  # type: ignore[operator]
