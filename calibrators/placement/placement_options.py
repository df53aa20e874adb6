"""Settings of placement: bits and granularity of all layers, and rules for single ones.

Must not know: graphs, torch.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from calibrators.placement.layer_rules import BlockSize, LayerRule, Portable, Width
from calibrators.settings import Settings, setting

__all__ = ["PlacementOptions"]

LAYER_RULE = (
    "Settings of matching layers; repeatable, the last match wins: `'stages.3.*: weight_bits=4, activation_bits=4'`. "
    "Keys: weight_bits, activation_bits (16: int16 between float kernels), weight_only, granularity (tensor, channel; "
    "block, with block_size, if weight_only), portable (scales, uint8), symmetric, method (a range method), float."
)


class PlacementOptions(Settings):
    """Which operators are quantized, and how finely.

    weight_bits:     below the widest grid (8, or 7 with reduce_range) weights are asymmetric, because a symmetric grid
                     would lose one of its few levels.
    activation_bits: bits of the values that operators with weights read, and of all that share a scale with them.
                     Values that only sums, products, pools and outputs read keep the bits of the target: the result of
                     a residual branch does, the sum that the next convolution reads does not.
    first_last_bits: bits of weight and input activation of the first and the last weighted operator; None: no
                     exception. It is the first rule of all, so any of `layers` takes precedence.
    weight_only:     linear layers have quantized weights, float inputs and float biases.
    reduce_range:    |code - zero_point| <= 63, so that uint8 x int8 kernels that add pairs of products in 16 bits do
                     not saturate.
    portable:        form of weights whose pairs of products may exceed 16 bits, so that layers are exact on every
                     processor of the target: coarser "scales", or "uint8" codes, which cost no accuracy but are twice
                     as slow on CPUs with VNNI.
    wide_taps:       where the bits cannot hold an identity branch together with the weights of the kernel into which it
                     was folded, its codes keep 8 bits (7 with reduce_range; calibrators.placement.identity_taps).
    placement:       whether layers stay in float that the runtime computes faster so ("fastest"), as the target's costs
                     predict it (calibrators.placement.fastest), or all become integers that can ("integer").
    include, exclude: globs on module path, operator or node name.
    layers:          rules for single layers, in order; they win over all of the above.
    """

    weight_bits: Width = setting(8, "Bits of weights, 2 to 8.")
    activation_bits: Width = setting(8, "Bits of the activations that layers with weights read, 2 to 8; others have 8.")
    first_last_bits: Width | None = setting(
        8, "Bits of the first and the last layer; `--set first_last_bits=none` treats them like all others."
    )
    per_tensor_weights: bool = setting(False, "One weight scale per tensor instead of per channel.")
    weight_only: bool = setting(
        False, "Quantize only the weights of linear layers, whose inputs stay in float; convolutions stay as they are."
    )
    block_size: BlockSize | None = setting(
        None, "Inputs per weight scale of weight-only layers: 16, 32, 64, ...", metavar="N", shown="per channel"
    )
    reduce_range: bool = setting(False, "7-bit weights everywhere, an alternative to the pair limit of ort-cpu.")
    portable: Portable = setting(
        "scales",
        "Form of 8-bit weights that is exact without VNNI: coarser `scales`, or `uint8`, with no loss of accuracy but "
        "twice as slow with VNNI.",
        metavar="FORM",
        flag=None,
    )
    wide_taps: bool = setting(
        True, "Keep 8 bits for identity branches that fewer bits cannot hold together with the kernel.", flag=None
    )
    placement: Literal["fastest", "integer"] = setting(
        "fastest",
        "Layers to quantize: all but those that the runtime computes much faster in float, by a table of measured "
        "costs (`fastest`), or every one that has an integer kernel (`integer`).",
        metavar="WHICH",
    )
    include: tuple[str, ...] = setting(
        (), "Quantize only operators whose name, module or type matches this glob; repeatable.", metavar="GLOB"
    )
    exclude: tuple[str, ...] = setting((), "Keep matching operators in float; repeatable.", metavar="GLOB")
    layers: tuple[LayerRule, ...] = setting((), LAYER_RULE, flag="layer", metavar="RULE")

    @model_validator(mode="after")
    def _patterns_are_unambiguous(self) -> Self:
        if both := sorted({*self.include} & {*self.exclude}):
            raise ValueError(f"pattern {both[0]!r} is in include and in exclude; remove one of them")
        return self

    @model_validator(mode="after")
    def _blocks_are_of_weight_only_layers(self) -> Self:
        if self.block_size is not None and not self.weight_only:
            raise ValueError(
                f"block_size is {self.block_size} without weight_only, but integer kernels have no scales per block; "
                "set weight_only, or give a rule for layers weight_only, granularity = 'block' and block_size"
            )
        return self
