"""Train the encoder on a synthetic task and write weights and data into a folder: python train.py out/text

A text is labelled 1 if more of its tokens come from the upper half of the vocabulary than from the lower half.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from encoder import LENGTH, TOKENS, TextEncoder
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

STEPS, BATCH = 150, 64


def texts(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, mask [count, 16] and labels [count] of random texts of 5 to 16 tokens."""
    lengths = 5 + torch.randint(LENGTH - 4, (count, 1), generator=generator)
    mask = (torch.arange(LENGTH) < lengths).long()
    ids = (1 + torch.randint(TOKENS - 1, (count, LENGTH), generator=generator)) * mask
    is_high = (ids >= TOKENS // 2).long()
    return ids, mask, (2 * is_high.sum(1) > mask.sum(1)).long()


def main() -> None:
    """Write encoder.safetensors, calib.npz (no labels) and test.npz."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = TextEncoder()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        ids, mask, labels = texts(BATCH, generator)
        optimizer.zero_grad()
        F.cross_entropy(model(ids, mask), labels).backward()
        optimizer.step()
    save_file(model.state_dict(), folder / "encoder.safetensors")
    ids, mask, _ = texts(512, generator)
    np.savez(folder / "calib.npz", ids=ids.numpy(), mask=mask.numpy())  # named like the arguments of forward
    ids, mask, labels = texts(500, generator)
    np.savez(folder / "test.npz", ids=ids.numpy(), mask=mask.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    main()
