"""Oracles for linear blocks that share no code with the product: an impulse probe and a direct convolution in NumPy.

The probe knows a block only as a function: zeros give the bias, unit impulses the kernel, random inputs show that the
block is linear; everything in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Block = Callable[[Array], Array]


def probe(
    block: Block, *, channels: int, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> tuple[Array, Array]:
    """Return the dense kernel [outputs, channels, kh, kw] and bias [outputs] of a block [n, c, h, w] -> [n, o, h', w'].

    An impulse at (r, q) is seen by output (i, j) through cell (r - s i + p, q - s j + p), so one impulse per residue
    modulo the stride shows every cell once.
    """
    size = [4 * (k + s) + 1 for k, s in zip(kernel, stride, strict=True)]
    silence = block(np.zeros((1, channels, *size)))
    centre = [length // 2 for length in silence.shape[2:]]
    bias = silence[0, :, centre[0], centre[1]]
    weight = np.full((len(bias), channels, *kernel), np.nan)
    for residue in itertools.product(range(stride[0]), range(stride[1])):
        at = [s * c + r for s, c, r in zip(stride, centre, residue, strict=True)]
        impulses = np.zeros((channels, channels, *size))
        impulses[np.arange(channels), np.arange(channels), at[0], at[1]] = 1.0
        response = block(impulses) - silence
        for cell in itertools.product(range(kernel[0]), range(kernel[1])):
            shifted = [a - u + p for a, u, p in zip(at, cell, padding, strict=True)]
            if all(value % s == 0 for value, s in zip(shifted, stride, strict=True)):
                i, j = (value // s for value, s in zip(shifted, stride, strict=True))
                weight[:, :, cell[0], cell[1]] = response[:, :, i, j].T
    assert not np.isnan(weight).any()
    return weight, bias


def is_affine(block: Block, shape: Sequence[int], seed: int = 0) -> bool:
    """Return whether block(u + v) - block(0) is the sum of both parts, up to 1e-12 of the largest value (float64)."""
    rng = np.random.default_rng(seed)
    u, v = rng.standard_normal((2, *shape))
    silence = block(np.zeros(shape))
    apart = block(u) + block(v) - 2 * silence
    return bool(np.abs(block(u + v) - silence - apart).max() <= 1e-12 * np.abs(apart).max())


def convolve(x: Array, weight: Array, *, stride: Sequence[int], low: Sequence[int], high: Sequence[int]) -> Array:
    """Convolve [n, c, h, w] directly with [o, c, kh, kw]; `low` and `high` zeros per axis, negative: crop."""
    x = np.pad(x, ((0, 0), (0, 0), *((max(a, 0), max(b, 0)) for a, b in zip(low, high, strict=True))))
    top, left = (max(-a, 0) for a in low)
    bottom, right = (n - max(-b, 0) for n, b in zip(x.shape[2:], high, strict=True))
    x = x[:, :, top:bottom, left:right]
    kh, kw = weight.shape[2:]
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[2:], (kh, kw), stride, strict=True))
    total = np.zeros((len(x), len(weight), rows, columns))
    for u, v in itertools.product(range(kh), range(kw)):
        seen = x[:, :, u : u + stride[0] * rows : stride[0], v : v + stride[1] * columns : stride[1]][
            ..., :rows, :columns
        ]
        total += np.einsum("oc,nchw->nohw", weight[:, :, u, v], seen)
    return total


def dense(weight: Array, groups: int) -> Array:
    """Return a grouped weight [o, c / groups, kh, kw] with zeros between the groups: [o, c, kh, kw]."""
    outputs, columns = weight.shape[0] // groups, weight.shape[1]
    wide = np.zeros((weight.shape[0], columns * groups, *weight.shape[2:]))
    for group in range(groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        wide[rows, group * columns : (group + 1) * columns] = weight[rows]
    return wide


def spread(weight: Array, dilation: Sequence[int]) -> Array:
    """Return the kernel with the zeros of its dilation written out."""
    kh, kw = weight.shape[2:]
    wide = np.zeros((*weight.shape[:2], (kh - 1) * dilation[0] + 1, (kw - 1) * dilation[1] + 1))
    wide[:, :, :: dilation[0], :: dilation[1]] = weight
    return wide
