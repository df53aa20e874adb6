"""Per-site entries of the report: the range chosen, the range seen, its histogram, and the noise.

Must not know: files, runtimes, how pages look.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, module_path, operator_name
from calibrators.grid.numerics import code_limits, grid_of
from calibrators.grid.spec import QParams, Site
from calibrators.program.freeze import CalibrationResult

__all__ = ["layer_entries"]

HISTOGRAM_BINS = 64


def layer_entries(result: CalibrationResult, noise: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return one entry per weight and activation site, in graph order; noise: decibels by site."""
    nodes = result.placement.nodes
    read = {site.node: site.spec.bits for site in result.placement.sites if site.kind == "activation"}
    entries = []
    for site in result.placement.sites:
        if site.kind == "activation":
            entries.append(_entry(site, nodes[site.node], result.qparams_of(site), noise) | _observed(result, site))
        elif site.kind == "weight":
            weight = result.placement.values(site)
            entry = _entry(site, nodes[site.users[0]], result.weights[site.name].qparams, noise)
            if not site.weight_only:
                entry["input_bits"] = max(read[bind(nodes[user])["input"].name] for user in site.users)
            if site.spec.tap_bits is not None:
                entry |= {"tap_bits": site.spec.tap_bits, **_reach_with_taps(weight, result.weights[site.name].qparams)}
            if site.spec.block_size is not None:
                entry["block_size"] = site.spec.block_size
            entries.append(entry | _weight_range(weight))
    return entries


def _entry(site: Site, node: fx.Node, qparams: QParams, noise: Mapping[str, float]) -> dict[str, Any]:
    scale, zero_point = qparams.scale.double(), qparams.zero_point
    return {
        "site": site.name,
        "module": module_path(node),
        "op": operator_name(node.target),
        "kind": site.kind,
        "bits": site.spec.bits,
        "granularity": site.spec.granularity,
        "symmetric": site.spec.symmetric,
        "scale_min": float(scale.min()),
        "scale_max": float(scale.max()),
        "zero_point": int(zero_point.min()) if zero_point.min() == zero_point.max() else None,
        "lo": float((scale * (site.spec.qmin - zero_point)).min()),
        "hi": float((scale * (site.spec.qmax - zero_point)).max()),
        "sqnr_db": noise.get(site.name),
    }


def _reach_with_taps(weight: Tensor, qparams: QParams) -> dict[str, float]:
    """Ends of what the codes of a weight with wide taps reach."""
    scale, zero_point = (values.double() for values in grid_of(weight, qparams))
    low, high = (scale * (limit - zero_point) for limit in code_limits(weight, qparams))
    return {"lo": float(low.min()), "hi": float(high.max())}


def _observed(result: CalibrationResult, site: Site) -> dict[str, Any]:
    statistic = result.observed.get(result.placement.root(site).name)
    if statistic is None or statistic.count == 0:
        return {}
    extremes = (statistic.lo, statistic.hi)
    counts, _ = np.histogram(statistic.centers(), HISTOGRAM_BINS, range=extremes, weights=statistic.counts)
    return {"observed_lo": statistic.lo, "observed_hi": statistic.hi, "histogram": [int(count) for count in counts]}


def _weight_range(weight: Tensor) -> dict[str, Any]:
    lo, hi = float(weight.min()), float(weight.max())
    counts = torch.histc(weight.float(), bins=HISTOGRAM_BINS, min=lo, max=hi) if hi > lo else torch.zeros(0)
    return {"observed_lo": lo, "observed_hi": hi, "histogram": [int(count) for count in counts]}
