"""Train the demo network and write its weights: `python -m exporter.demo.train`, about a minute on one core.

Must not know: quantization, export.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.demo.model import WEIGHTS, DigitNet, digits

__all__ = ["accuracy", "train"]

EPOCHS = 30
BATCH = 64
PEAK_RATE = 0.1
WEIGHT_DECAY = 5e-4
SHIFT = 1
"""Training images are moved by up to this many pixels in each direction."""


def train(seed: int = 0, epochs: int = EPOCHS) -> DigitNet:
    """Return the trained network in eval mode; the same seed gives the same weights on the same machine."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # torch's initializers have no generator argument
        model = DigitNet()
    (images, labels), _ = digits()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)[: steps * BATCH].reshape(steps, BATCH)
        for rows in order:
            optimizer.zero_grad()
            logits = model(_shifted(x[rows], generator))
            loss = F.cross_entropy(logits, y[rows], label_smoothing=0.1)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Return the share of the held-out images that `model` classifies correctly."""
    _, (images, labels) = digits()
    with torch.no_grad():
        hits = model(torch.from_numpy(images)).argmax(1) == torch.from_numpy(labels)
    return float(hits.double().mean())


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by its own random number of pixels."""
    offsets = torch.randint(0, 2 * SHIFT + 1, (len(x), 2), generator=generator)
    padded = F.pad(x, (SHIFT,) * 4)
    height, width = x.shape[-2:]
    return torch.stack(
        [image[:, dy : dy + height, dx : dx + width] for image, (dy, dx) in zip(padded, offsets.tolist(), strict=True)]
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo network.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file to write")
    out: Path = parser.parse_args().out
    torch.set_num_threads(1)
    model = train()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, out)
    print(f"{out}: held-out accuracy {accuracy(model):.4f}")


if __name__ == "__main__":
    _main()
