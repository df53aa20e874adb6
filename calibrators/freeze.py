"""From chosen parameters to integers: codes of weights and biases, and the record of the calibration.

The exporter re-rounds nothing: what is here is what the file holds.

Must not know: how the parameters were chosen, ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph import bind, constant
from calibrators.numerics import quantize
from calibrators.place import Placement
from calibrators.program import build_program
from calibrators.spec import QParams, Site

__all__ = ["CalibrationResult", "Coded", "code_bias", "freeze"]

BIAS_CODE_LIMIT = 2**30
"""Largest bias code: half of int32, so that accumulator plus bias stays inside int32."""

DEAD_CHANNEL_FLOOR = 2.0**-20
"""Smallest scale of a channel without weights, relative to the largest scale of its tensor."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Integer codes with the parameters that give them meaning."""

    codes: Tensor
    qparams: QParams


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """Everything a method decided.

    activations: parameters by site name (only sites that own their scale).
    weights:     codes and parameters by site name.
    biases:      int32 codes and parameters by site name; scale is exactly f32(input scale * weight scale).
    observed:    what the method saw at each activation site, for reports.
    record:      method, options, seed and notes for the user.
    """

    placement: Placement
    activations: Mapping[str, QParams]
    weights: Mapping[str, Coded]
    biases: Mapping[str, Coded]
    observed: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def program(self) -> fx.GraphModule:
        """The reference program."""
        return build_program(self.placement, self.qparams_of, self.weights, self.biases)

    def qparams_of(self, site: Site) -> QParams:
        """Scale and zero point of an activation site, its own or shared, on the site's grid."""
        return replace(self.activations[self.placement.root(site).name], spec=site.spec)


def freeze(
    placement: Placement,
    activations: Mapping[str, QParams],
    weights: Mapping[str, QParams],
) -> CalibrationResult:
    """Integer codes for every weight and bias under the chosen parameters.

    weights: parameters by site name; a scale is widened where the bias would leave half of int32, or where the channel
             holds no weights at all.
    """
    nodes = {node.name: node for node in placement.graph.graph.nodes}
    bias_of = {site.users[0]: site for site in placement.sites if site.kind == "bias"}
    weight_codes: dict[str, Coded] = {}
    bias_codes: dict[str, Coded] = {}
    notes: list[str] = []
    for site in placement.sites:
        if site.kind != "weight":
            continue
        weight = constant(placement.graph, nodes[site.node])
        consumers = []
        for user in site.users:
            source = placement.activation_of[bind(nodes[user])["input"].name]
            bias_site = bias_of.get(user)
            bias = constant(placement.graph, nodes[bias_site.node]).double() if bias_site else None
            consumers.append((activations[placement.root(source).name].scale, bias_site, bias))
        qparams = weights[site.name]
        scale = _wide_enough(weight, qparams, [(x_scale, bias) for x_scale, _, bias in consumers if bias is not None])
        if not torch.equal(scale, qparams.scale):
            notes.append(f"{site.name}: scale widened in {int((scale != qparams.scale).sum())} channels for the bias")
            qparams = replace(qparams, scale=scale)
        weight_codes[site.name] = Coded(quantize(weight, qparams), qparams)
        for x_scale, bias_site, bias in consumers:
            if bias_site is not None and bias is not None:
                bias_codes[bias_site.name] = code_bias(bias, x_scale, scale, bias_site)
    return CalibrationResult(placement, dict(activations), weight_codes, bias_codes, record={"notes": tuple(notes)})


def _wide_enough(weight: Tensor, qparams: QParams, biases: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The weight scale, raised where a channel is empty or its bias code would exceed BIAS_CODE_LIMIT."""
    scale, axis = qparams.scale.double(), qparams.spec.axis
    channels = weight.detach().abs().flatten(1).amax(1) if axis == 0 else weight.detach().abs().amax()
    dead = channels == 0
    if bool(dead.any()):
        alive = scale[~dead] if scale.ndim and bool((~dead).any()) else torch.ones(1, dtype=torch.float64)
        scale = torch.where(dead, alive.max() * DEAD_CHANNEL_FLOOR, scale)
    for x_scale, bias in biases:
        least = bias.abs() / (x_scale.double() * BIAS_CODE_LIMIT)
        scale = torch.maximum(scale, least if scale.ndim else least.max())
    return scale.to(torch.float32)


def code_bias(bias: Tensor, x_scale: Tensor, weight_scale: Tensor, site: Site) -> Coded:
    """Codes of a bias at scale f32(x_scale * weight_scale), the only scale integer kernels accept."""
    scale = (x_scale * weight_scale).expand(bias.shape).contiguous()
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), site.spec)
    codes = torch.round(bias / scale.double()).clamp(site.spec.qmin, site.spec.qmax).to(torch.int32)
    return Coded(codes, qparams)
