"""A transformer over tokens, UNTRAINED: weights and texts are drawn at random with a fixed seed.

    python benchmarks/accuracy.py benchmarks/text_encoder.py:encoder --data benchmarks/text_encoder.py:calibration \
        --eval benchmarks/text_encoder.py:evaluation --bits 8/8 4/8 --method mse gptq

Its texts have no labels, so there is no top-1: KL, SQNR and agreement say how well its function is kept. A network of
random weights has no outliers of trained ones; its figures rank no methods for those.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from tests.support.architectures import TokenEncoder
from tests.support.networks import randomize

WIDTH, TOKENS, LENGTH, BATCH = 128, 20, 6, 64


def encoder() -> nn.Module:
    """Return one layer of attention and its MLP, untrained: tokens [n, 6] to logits [n, 5]."""
    torch.manual_seed(0)
    return randomize(TokenEncoder(WIDTH)).eval()


def calibration() -> Iterator[Tensor]:
    """Yield 256 texts, int64 [n, 6], without labels."""
    return texts(256, seed=1)


def evaluation() -> Iterator[Tensor]:
    """Yield 1,024 other texts."""
    return texts(1024, seed=2)


def texts(count: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count // BATCH):
        yield torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)
