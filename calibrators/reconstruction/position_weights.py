"""How much the error of an output position counts: what a norm divides by the size of a position is worth less there.

The outputs of transformers have positions, for example the first token, that are a hundred times larger than others.
Sums of squares see little else, but a norm over the channels follows, which makes all positions equally large: an error
counts relative to what the norm divides by. On the trained sentence encoder of benchmarks/minilm.py, least squares
without these weights lose up to 3 dB against nearest rounding.

Must not know: methods, how activations are computed and cached, rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from calibrators.graph.aten import bind, shape_of
from calibrators.graph.operators import NORMS, SUMS, facts, name_of

__all__ = ["norm_after", "position_weights"]

IN_PLACE = ("Reshape", "Identity")
"""ONNX operators that leave values in their order."""


def norm_after(layer: fx.Node) -> fx.Node | None:
    """Return the first norm over the channels that reads the output of a linear layer, alone or in sums.

    None if there is none, or the layer is not linear.

    Sums may have other readers besides the norm, as the residual stream has.
    """
    channels, value = shape_of(layer)[-1], layer
    if facts(layer.target).kind != "linear":
        return None
    while shape_of(value)[-1:] == (channels,):
        for user in value.users:
            if user.target in NORMS and tuple(bind(user)["normalized_shape"]) == (channels,):
                return user
        if len(value.users) != 1:
            return None
        (value,) = value.users
        if value.target not in SUMS and facts(value.target).onnx not in IN_PLACE:
            return None
    return None


def position_weights(norm: fx.Node, x: Tensor) -> Tensor:
    """Return the factor of each position by which a norm scales it, [positions].

    x: input of the norm in the float network, [..., channels].
    """
    centred = x - x.mean(-1, keepdim=True) if name_of(norm.target) == "layer_norm.default" else x
    return centred.square().mean(-1).flatten().add_(bind(norm)["eps"] or torch.finfo(x.dtype).eps).rsqrt_()
