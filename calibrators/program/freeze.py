"""From chosen parameters to integers: codes of weights and biases, and the record of the calibration.

The exporter rounds nothing again: the file holds exactly these integers.

Must not know: how the parameters were chosen, ONNX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.allocator import give_back
from calibrators.errors import InputError, UnknownNameError, counted
from calibrators.grid.limits import Limits, coarsened, within
from calibrators.grid.numerics import code_limits, dequantize, quantize
from calibrators.grid.spec import QParams, QuantizedTensor, QuantSpec, Site
from calibrators.placement.place import Placement
from calibrators.program.qdq_program import build_program
from calibrators.program.settle import settle
from calibrators.record import Record

__all__ = ["CalibrationResult", "code_bias", "freeze", "widen"]

BIAS_CODE_LIMIT = 2**30
"""Largest bias code: half of int32, so that accumulator plus bias stays inside int32."""

LARGEST_INPUT, LARGEST_WEIGHT = 255, 127
"""Largest distances between 8-bit codes and their zero points."""

ROUNDED = 1 + 2.0**-22
"""Upper bound for the loss from rounding a weight scale and its product with an activation scale to float32."""

DEAD_CHANNEL_FLOOR = 2.0**-20
"""Smallest scale of a channel without weights, relative to the largest scale of its tensor."""


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """Everything a method decided.

    activations: parameters by site name (only sites that own their scale).
    weights:     codes and parameters by site name.
    biases:      int32 codes and parameters by site name; scale is exactly f32(input scale * weight scale).
    observed:    what the method saw at each activation site, for reports.
    record:      what the steps of the calibration report, and notes for the user.
    """

    placement: Placement
    activations: Mapping[str, QParams]
    weights: Mapping[str, QuantizedTensor]
    biases: Mapping[str, QuantizedTensor]
    observed: Mapping[str, Any] = field(default_factory=dict)
    record: Record = field(default_factory=Record)

    def __repr__(self) -> str:
        """Return a summary, as the tensors themselves say nothing to a reader."""
        widths = sorted({site.spec.bits for site in self.placement.sites if site.kind == "weight"})
        bits = f" of {', '.join(map(str, widths))} bits" if widths else ""
        return (
            f"CalibrationResult({counted(len(self.weights), 'weight')}{bits}, "
            f"{counted(len(self.activations), 'activation scale')}, target {self.placement.target.name})"
        )

    @cached_property
    def program(self) -> fx.GraphModule:
        """The reference program."""
        return build_program(self.placement, self.qparams_of, self.weights, self.biases)

    def qparams_of(self, site: Site) -> QParams:
        """Return the scale and zero point of the site of an activation or constant, on the site's grid."""
        return self.placement.qparams_of(site, self.activations)


def freeze(
    placement: Placement,
    activations: Mapping[str, QParams],
    weights: Mapping[str, QParams | QuantizedTensor],
    biases: Mapping[str, Tensor] | None = None,
) -> CalibrationResult:
    """Return the integer codes for every weight and bias under the chosen parameters.

    Scales of activations move by units in the last place where processors of the target would round differently.

    weights: by site name, parameters, with which the graph's weight is rounded, or codes, which are kept. Parameters
             are widened as by `widen`; codes only where the bias would leave half of int32, and only the channels
             concerned are rounded again.
    biases:  float values by site name, instead of the graph's.
    raises:  InputError for codes off the grid of their site, UnknownNameError for a bias that the placement lacks.
    """
    activations, settled = settle(placement, {**placement.constants, **activations})
    added = _added_biases(placement, activations, biases or {})
    weight_codes: dict[str, QuantizedTensor] = {}
    bias_codes: dict[str, QuantizedTensor] = {}
    notes: list[str] = []
    for site, weight in _weights(placement):
        coded = _code(weights[site.name], weight, _least_scale(added[site.name], weight, site), site)
        limits = placement.limits_of(site)
        if limits is not None:
            chosen, coded = coded, _limited(coded, weight, limits, keep=isinstance(weights[site.name], QuantizedTensor))
            notes += _limit_notes(chosen, coded, site)
        weight_codes[site.name] = coded
        notes += _notes(weights[site.name], coded, site)
        for bias in added[site.name]:
            bias_codes[bias.site.name] = code_bias(bias.values, bias.x_scale, coded.qparams.scale, bias.site)
        give_back(weight.nbytes)
    record = Record(notes=tuple(notes), settled=settled)
    return CalibrationResult(placement, activations, weight_codes, bias_codes, record=record)


def widen(
    placement: Placement,
    activations: Mapping[str, QParams],
    weights: Mapping[str, QParams],
    biases: Mapping[str, Tensor] | None = None,
    *,
    margin: float = 1.0,
) -> dict[str, QParams]:
    """Raise the scales of weights at which a bias code or a sum of products would leave half of int32.

    A channel without weights gets the smallest scale at which its bias fits, so that rounding does not show there.

    margin: factor by which biases may grow or activation scales shrink before a scale has to be raised again.
    raises: UnknownNameError for a bias that the placement lacks.
    """
    added = _added_biases(placement, activations, biases or {})
    return {
        site.name: _fit(weights[site.name], weight, margin * _least_scale(added[site.name], weight, site))
        for site, weight in _weights(placement)
        if site.name in weights
    }


@dataclass(frozen=True, eq=False)
class _Bias:
    """A bias as it meets its weight: float64 [channels], and the scale of the activation, []."""

    site: Site
    values: Tensor
    x_scale: Tensor


def _weights(placement: Placement) -> Iterator[tuple[Site, Tensor]]:
    """Yield the weight sites and their float values."""
    return ((site, placement.values(site)) for site in placement.sites if site.kind == "weight")


def _added_biases(
    placement: Placement, activations: Mapping[str, QParams], biases: Mapping[str, Tensor]
) -> dict[str, list[_Bias]]:
    """Return the biases added to the products of each weight, by its site name; `biases` replace the graph's."""
    sites = {site.name: site for site in placement.sites if site.kind == "bias"}
    for name in biases:
        if name not in sites:
            raise UnknownNameError("bias", name, sites)
    added: dict[str, list[_Bias]] = {site.name: [] for site in placement.weight_of.values()}
    for name, site in sites.items():
        weight, source = placement.added_to(site)
        values = biases[name] if name in biases else placement.values(site)
        added[weight.name].append(_Bias(site, values.detach().double(), activations[source.name].scale))
    return added


def _least_scale(biases: list[_Bias], weight: Tensor, site: Site) -> Tensor:
    """Return the smallest weight scale at which bias codes stay within BIAS_CODE_LIMIT and their grid, float64.

    Its shape is [] or [channels].

    So do the sums of products, whatever the inputs, if there are enough inputs to exceed it.
    """
    least = torch.zeros((), dtype=torch.float64)
    if biases and weight[0].numel() * LARGEST_INPUT * LARGEST_WEIGHT > BIAS_CODE_LIMIT:
        sums = weight.flatten(1).abs().sum(1, dtype=torch.float64) * LARGEST_INPUT / BIAS_CODE_LIMIT
        least = sums.max() if site.spec.axis is None else sums
    for bias in biases:
        limit = min(BIAS_CODE_LIMIT, bias.site.spec.qmax)
        needed = bias.values.abs() * ROUNDED / (bias.x_scale.double() * limit)
        least = torch.maximum(least, needed.max() if site.spec.axis is None else needed)
    return least


def _fit(qparams: QParams, weight: Tensor, least: Tensor) -> QParams:
    """Return the parameters with no scale below `least`, which alone decides the scale of a channel of zeros."""
    scale = torch.maximum(qparams.scale.double(), least)
    dead = ~_has_weights(weight, qparams.spec)
    alive = torch.where(dead, 0.0, scale).max()
    floor = torch.where(alive > 0, alive, 1.0) * DEAD_CHANNEL_FLOOR
    return replace(qparams, scale=torch.where(dead, torch.maximum(floor, least), scale).to(torch.float32))


def _has_weights(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return which scales belong to weights that are not all zero, in the shape of the scales."""
    if spec.axis is None:
        return weight.any()
    if spec.block_size is None:
        return weight.flatten(1).any(1)
    return torch.stack([part.any(1) for part in torch.split(weight, spec.block_size, 1)], 1)


def _code(chosen: QParams | QuantizedTensor, weight: Tensor, least: Tensor, site: Site) -> QuantizedTensor:
    """Return the codes of a weight with no scale below `least`."""
    if isinstance(chosen, QParams):
        qparams = _fit(chosen, weight, least)
        return QuantizedTensor(quantize(weight, qparams), qparams)
    _check_codes(chosen, weight, site)
    scale = torch.maximum(chosen.qparams.scale.double(), least).to(torch.float32)
    if torch.equal(scale, chosen.qparams.scale):
        return chosen
    qparams = replace(chosen.qparams, scale=scale)  # the round trip changes no code where the scale stays
    return QuantizedTensor(quantize(dequantize(chosen.codes, chosen.qparams), qparams), qparams)


def _limited(coded: QuantizedTensor, weight: Tensor, limits: Limits, *, keep: bool) -> QuantizedTensor:
    """Return the codes of a weight within the limits of pairs; with `keep` single codes give way, not the scale."""
    if keep:
        return replace(coded, codes=within(coded.codes, weight, coded.qparams, limits))
    qparams = coarsened(weight, coded.qparams, limits)
    return QuantizedTensor(quantize(weight, qparams), qparams)


def _notes(chosen: QParams | QuantizedTensor, coded: QuantizedTensor, site: Site) -> list[str]:
    """Return notes for the user about a weight whose scale is not the chosen one."""
    scale = (chosen.qparams if isinstance(chosen, QuantizedTensor) else chosen).scale
    changed = int((coded.qparams.scale != scale).sum())
    if not changed:
        return []
    note = f"{site.name}: {changed} of {scale.numel()} scales changed, because a channel has no weights or a large bias"
    if isinstance(chosen, QuantizedTensor):
        note += f"; this also changed {int((coded.codes != chosen.codes).sum())} codes of the method"
    return [note]


def _limit_notes(chosen: QuantizedTensor, coded: QuantizedTensor, site: Site) -> list[str]:
    """Return notes for the user about codes of a method that the target's limits changed."""
    changed = int((chosen.codes != coded.codes).sum()) if chosen.qparams is coded.qparams else 0
    return [f"{site.name}: {changed} codes of the method changed, because pairs of them exceed 16 bits"] * bool(changed)


def _check_codes(coded: QuantizedTensor, weight: Tensor, site: Site) -> None:
    """Raise InputError for codes or zero points off the grid of their site."""
    spec, codes, zero_point = site.spec, coded.codes, coded.qparams.zero_point
    ends = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    fits = codes.shape == weight.shape and codes.dtype == spec.dtype
    limits = code_limits(codes, replace(coded.qparams, spec=spec))
    if not fits or not _within(codes, *limits) or not _within(zero_point, *ends):
        raise InputError(
            f"the codes of weight {site.name!r} are {codes.dtype} {list(codes.shape)}, {codes.min()} to {codes.max()}, "
            f"with zero points {zero_point.min()} to {zero_point.max()}; its grid holds {spec.dtype} "
            f"{list(weight.shape)}, {spec.qmin} to {spec.qmax}, with zero points {ends[0]} to {ends[1]}"
        )


def _within(integers: Tensor, lowest: int | Tensor, highest: int | Tensor) -> bool:
    return bool((integers >= lowest).all() and (integers <= highest).all())


def code_bias(bias: Tensor, x_scale: Tensor, weight_scale: Tensor, site: Site) -> QuantizedTensor:
    """Return the codes of a bias at scale f32(x_scale * weight_scale), the only scale integer kernels accept."""
    scale = (x_scale * weight_scale).expand(bias.shape).contiguous()
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), site.spec)
    codes = torch.round(bias / scale.double()).clamp(site.spec.qmin, site.spec.qmax).to(torch.int32)
    return QuantizedTensor(codes, qparams)
