"""Rules about files that compute other integers on some of the processors of their target.

Must not know: how a target is chosen, how codes were chosen.
"""

from __future__ import annotations

from runtime_tests.ort.lint.rule import Case, Hits, Rule
from runtime_tests.ort.saturation import layers_at_risk

__all__ = ["PORTABILITY_RULES"]


def _saturating_pairs(case: Case) -> Hits:
    if case.target.pair_sum is None:
        return
    for layer in layers_at_risk(case.model)[0]:
        yield (
            layer.name,
            f"{layer.pairs} of {layer.pairs_total} pairs of weights can exceed 16 bits, so this {layer.op} computes "
            "other integers on x86 CPUs with AVX2 but without VNNI; use coarser scales or UINT8 weights, or lint for "
            "ort-cpu-vnni",
        )


PORTABILITY_RULES = (
    Rule("saturating-pair", "error", "x86 CPUs with AVX2 but without VNNI add two products in 16 bits.",
         _saturating_pairs),
)  # fmt: skip
