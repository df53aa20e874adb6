"""A transformer encoder that classifies texts: token ids and an attention mask in, two logits out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, LENGTH, WIDTH, HEADS, LAYERS = 64, 16, 32, 4, 2
"""Vocabulary (0 is padding), longest text, width, attention heads and layers."""


class Layer(nn.Module):
    """Self-attention and an MLP, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, allowed: Tensor) -> Tensor:
        y = self.norm_1(x)
        shape = (*y.shape[:2], HEADS, WIDTH // HEADS)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)  # [n, heads, tokens, width / heads]
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.mlp(self.norm_2(x))


class TextEncoder(nn.Module):
    """ids and mask [n, 16] int64 (mask: 1 for tokens, 0 for padding) -> logits [n, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) + self.positions
        allowed = (mask > 0)[:, None, None, :]  # every token attends to every token that is not padding
        for layer in self.layers:
            x = layer(x, allowed)
        weights = mask[:, :, None].to(x.dtype)
        return self.head((self.norm(x) * weights).sum(1) / weights.sum(1))


def build() -> nn.Module:
    """Return the network; --checkpoint loads its weights."""
    return TextEncoder()
