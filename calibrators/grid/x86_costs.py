"""Costs of operators in onnxruntime on x86-64 with VNNI, one row per operator: ATen names, or kinds of convolution.

Measured by benchmarks/costs.py with onnxruntime 1.32 on an Intel Xeon with AVX512-VNNI, one thread, November 2026; the
comments give the median relative error of the fit, float and integer. A new integer form joins with one row. An
operator without a row costs the same in both forms, so that it decides nothing. The rows "silu" and "hard sigmoid"
are of operators that canonical graphs spell in several steps, and that are one in float.

Must not know: graphs, how a placement is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from calibrators.grid.costs import Cost, Costs

__all__ = ["X86_COSTS"]

X86_COSTS: Final[Mapping[str, Costs]] = {
    "layout": Costs(float=Cost(node=1660, element=0.143), integer=Cost(node=1110, element=0.0907)),  # 23%, 17%
    "dense": Costs(
        float=Cost(node=5110, mac=0.0111, gathered=0.0922),
        integer=Cost(node=4910, element=0.129, mac=0.00291, run=1.97),
    ),  # 8%, 20%
    "quantize": Costs(integer=Cost(node=1880, element=0.271)),  # 6%
    "dequantize": Costs(integer=Cost(node=1640, element=0.169)),  # 9%
    "pointwise": Costs(
        float=Cost(node=6310, mac=0.011, run=3.49), integer=Cost(node=5460, element=0.0549, mac=0.00293, run=4.64)
    ),  # 10%, 7%
    "uneven depthwise": Costs(
        float=Cost(node=317, element=0.573, mac=0.00419), integer=Cost(node=546, element=3.1)
    ),  # 0%, 1%
    "depthwise": Costs(
        float=Cost(node=1410, element=0.046, mac=0.0295), integer=Cost(node=13700, element=0.113, mac=0.0228)
    ),  # 6%, 5%
    "grouped": Costs(
        float=Cost(node=317, gathered=0.516, run=0.755), integer=Cost(node=11600, element=0.269, mac=0.00164, run=4.83)
    ),  # 4%, 1%
    "linear": Costs(
        float=Cost(node=3500, mac=0.0133), integer=Cost(node=6080, element=0.0238, mac=0.00347)
    ),  # 17%, 28%
    "add.Tensor": Costs(float=Cost(node=1950, element=0.263), integer=Cost(node=2360, element=0.207)),  # 17%, 9%
    "mul.Tensor": Costs(float=Cost(node=1110, element=0.266), integer=Cost(node=2750, element=0.342)),  # 11%, 10%
    "sigmoid.default": Costs(float=Cost(node=1530, element=0.428), integer=Cost(node=1750, element=0.361)),  # 3%, 11%
    "leaky_relu.default": Costs(
        float=Cost(node=1040, element=0.301), integer=Cost(node=1810, element=0.351)
    ),  # 9%, 11%
    "silu": Costs(float=Cost(node=1740, element=0.351)),  # 11%
    "maximum.default": Costs(float=Cost(node=2260, element=0.399), integer=Cost(node=1520, element=0.0698)),  # 9%, 14%
    "hard sigmoid": Costs(float=Cost(node=1720, element=0.324)),  # 5%
    "relu.default": Costs(float=Cost(node=1590, element=0.142), integer=Cost(node=787, element=0.128)),  # 12%, 13%
    "max_pool2d.default": Costs(
        float=Cost(node=2520, element=0.0496), integer=Cost(node=1620, element=0.151)
    ),  # 22%, 11%
    "max pool of planes": Costs(integer=Cost(node=470, element=5.35)),  # 27%
    "avg_pool2d.default": Costs(float=Cost(node=923, element=0.0799), integer=Cost(node=317, element=3.81)),  # 8%, 26%
    "adaptive_avg_pool2d.default": Costs(
        float=Cost(node=3160, element=0.0657), integer=Cost(node=1550, element=0.0858)
    ),  # 22%, 18%
    "cat.default": Costs(float=Cost(node=1710, element=0.168), integer=Cost(node=2340, element=0.344)),  # 15%, 11%
}
