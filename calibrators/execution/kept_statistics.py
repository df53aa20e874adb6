"""Statistics of activations that outlive the process: other methods and other bits read the same ones.

Must not know: where they are kept, methods.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from calibrators.graph.digest import graph_digest
from calibrators.placement.place import Placement
from calibrators.ranges.histogram import Statistic

__all__ = ["name_of", "restored", "stored"]

COUNTS = "counts"


def name_of(placement: Placement) -> str:
    """Return the name of the statistics of a placement: that of its graph and of the values that are observed."""
    sites = [(site.name, site.node, site.shares, site.joined) for site in placement.sites if site.kind == "activation"]
    return hashlib.sha256(f"{graph_digest(placement.graph)} {sites}".encode()).hexdigest()[:32]


def stored(statistics: Mapping[str, Statistic]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return statistics as tensors and a record that JSON can hold."""
    counts = torch.stack([each.counts for each in statistics.values()]) if statistics else torch.zeros(0)
    ends = {name: (each.lo, each.hi, each.exponent, each.nonfinite) for name, each in statistics.items()}
    return {COUNTS: counts}, ends


def restored(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Statistic]:
    """Return the statistics that `stored` took apart."""
    found = {}
    for (name, ends), counts in zip(record.items(), tensors[COUNTS], strict=True):
        found[name] = Statistic()
        found[name].lo, found[name].hi, found[name].exponent, found[name].nonfinite = ends
        found[name].counts = counts.clone()
    return found
