"""The part of the report about single sites: chosen and observed range, noise and histograms.

Must not know: files, runtimes, how pages look.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from calibrators.graph.aten import bind, module_path, operator_name
from calibrators.grid.numerics import code_limits, grid_of
from calibrators.grid.spec import QParams, Site
from calibrators.program.freeze import CalibrationResult
from runtime_tests.measure.noise import Noise

__all__ = ["LayerEntry", "layer_entries"]


@dataclass(frozen=True)
class LayerEntry:
    """One weight or activation site.

    lo, hi:      the chosen range; observed_lo, observed_hi: the values that calibration saw.
    zero_point:  None where channels have different ones.
    sqnr_db:     signal over quantization noise.
    clipped, floats, codes: as runtime_tests.measure.histograms.Histograms says.
    tap_bits:    bits of the taps of a folded identity branch.
    input_bits:  bits of the value that a layer reads, at its weight; the widest where several layers share the weight,
                 None where that value is float.
    values:      number of a weight's values.
    noise_added: at a weight, the noise that its layer adds, by rounding its weights and the values that it reads, over
                 the energy of its output.
    """

    site: str
    module: str
    op: str
    kind: Literal["activation", "weight"]
    bits: int
    granularity: Literal["tensor", "channel", "block"]
    symmetric: bool
    scale_min: float
    scale_max: float
    zero_point: int | None
    lo: float
    hi: float
    sqnr_db: float | None
    input_bits: int | None = None
    tap_bits: int | None = None
    block_size: int | None = None
    values: int | None = None
    noise_added: float | None = None
    observed_lo: float | None = None
    observed_hi: float | None = None
    clipped: float | None = None
    floats: tuple[int, ...] | None = None
    codes: tuple[int, ...] | None = None


def layer_entries(result: CalibrationResult, noise: Noise) -> tuple[LayerEntry, ...]:
    """Return one entry per weight and activation site, in graph order."""
    decibels, histograms, added = noise.decibels(), noise.histograms(), noise.added()
    read = {site.node: site.spec.bits for site in result.placement.sites if site.kind == "activation"}
    entries = []
    for site in result.placement.sites:
        if site.kind == "activation":
            found = {**_grid(result.qparams_of(site), site), **_observed(result, site)}
        elif site.kind == "weight":
            weight, qparams = result.placement.values(site), result.weights[site.name].qparams
            observed = {"observed_lo": float(weight.min()), "observed_hi": float(weight.max())}
            found = {**_grid(qparams, site), **observed, "values": weight.numel(), "noise_added": added.get(site.name)}
            if not site.weight_only:
                nodes = result.placement.nodes
                found["input_bits"] = max(read[bind(nodes[user])["input"].name] for user in site.users)
            if site.spec.tap_bits is not None:
                found |= _reach_with_taps(weight, qparams)
        else:
            continue
        node = result.placement.nodes[site.node if site.kind == "activation" else site.users[0]]
        entries.append(
            LayerEntry(
                site=site.name,
                module=module_path(node),
                op=operator_name(node.target),
                kind=site.kind,
                bits=site.spec.bits,
                granularity=site.spec.granularity,
                symmetric=site.spec.symmetric,
                sqnr_db=decibels.get(site.name),
                tap_bits=site.spec.tap_bits,
                block_size=site.spec.block_size,
                **(vars(histograms[site.name]) if site.name in histograms else {}),
                **found,
            )
        )
    return tuple(entries)


def _grid(qparams: QParams, site: Site) -> dict[str, Any]:
    scale, zero_point = qparams.scale.double(), qparams.zero_point
    return {
        "scale_min": float(scale.min()),
        "scale_max": float(scale.max()),
        "zero_point": int(zero_point.min()) if zero_point.min() == zero_point.max() else None,
        "lo": float((scale * (site.spec.qmin - zero_point)).min()),
        "hi": float((scale * (site.spec.qmax - zero_point)).max()),
    }


def _reach_with_taps(weight: Tensor, qparams: QParams) -> dict[str, float]:
    """Return the lowest and highest value that the codes of a weight with wide taps can represent."""
    scale, zero_point = (values.double() for values in grid_of(weight, qparams))
    low, high = (scale * (limit - zero_point) for limit in code_limits(weight, qparams))
    return {"lo": float(low.min()), "hi": float(high.max())}


def _observed(result: CalibrationResult, site: Site) -> dict[str, Any]:
    statistic = result.observed.get(result.placement.root(site).name)
    if statistic is None or statistic.count == 0:
        return {}
    return {"observed_lo": statistic.lo, "observed_hi": statistic.hi}
