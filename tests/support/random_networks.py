"""Random networks of many kinds of operators: the same network for the same seed, whatever ran before.

A network is a chain of steps. Each step is drawn from a table by the rank of the value that it reads, tried on a batch
of two, and kept if its result is neither empty nor large. Some steps read an earlier value too, some feed further
outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.random_steps import STEPS, Step

__all__ = ["RandomNetwork"]

LARGEST = 4096
"""Elements of a sample that a value may have."""
TOKENS = 24
"""Size of the vocabulary."""
SHARE_OF_JOINS = 0.4
"""Probability that a step reads an earlier value too, where one has the same shape."""


@dataclass(frozen=True)
class Input:
    """One input: the shape of a sample, and the vocabulary if it holds tokens."""

    shape: tuple[int, ...]
    tokens: int = 0

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        if self.tokens:
            return torch.randint(self.tokens, (size, *self.shape), generator=generator)
        return torch.randn(size, *self.shape, generator=generator)


def _first(random: Random) -> tuple[tuple[Input, ...], nn.Module]:
    """Return inputs and what makes one value of them."""
    kind = random.choice(["image", "image", "image", "sequence", "signal", "volume", "vector", "tokens", "bag", "two"])
    if kind == "image":
        side = random.choice([6, 8, 9, 12])
        return (Input((random.choice([1, 3, 4]), side, random.choice([side, side + 2]))),), nn.Identity()
    if kind == "volume":
        return (Input((2, 4, 6, 6)),), nn.Identity()
    if kind in ("sequence", "signal"):
        return (Input((random.choice([5, 8, 12]), random.choice([4, 8, 16]))),), nn.Identity()
    if kind == "vector":
        return (Input((random.choice([8, 12, 16]),)),), nn.Identity()
    if kind == "tokens":
        place = nn.ParameterList([nn.Parameter(torch.randn(1, 7, 8) / 4)])
        return (Input((7,), TOKENS),), Step(lambda x, e, p: e(x) + p[0], nn.Embedding(TOKENS, 8), place)
    if kind == "bag":
        mode = random.choice(["mean", "sum"])
        return (Input((6,), TOKENS),), nn.EmbeddingBag(TOKENS, 8, mode=mode)
    side = random.choice([6, 8])
    join = random.choice([lambda x, y, f: f(x) + y[:, :, None, None], lambda x, y, f: f(x) * y[:, :, None, None]])
    return (Input((3, side, side)), Input((8,))), Step(join, nn.Conv2d(3, 8, 3))


TAILS: Sequence[Callable[[Tensor], Any]] = (
    lambda x: x.flatten(1).topk(3)[0],
    lambda x: F.relu(x).flatten(1).topk(3)[0],
    lambda x: F.relu(x).sort(-1)[0],
    lambda x: x.max(1)[0],
    lambda x: x.softmax(-1),
    lambda x: x.sigmoid(),
    lambda x: x * 2,
    lambda x: x.flatten(1),
    lambda x: F.relu(x),
    lambda x: F.relu(x).flatten(1).sort(-1, descending=True),
    lambda x: x.flatten(1).argmax(1),
    lambda x: torch.cat([x, x], 1).exp().clamp(max=8),
    lambda x: F.relu(x).sum(-1) / x.shape[-1],
)
"""Further outputs that are made of a value."""


JOINS: Sequence[Callable[[Tensor, Tensor], Tensor]] = (
    lambda x, y: x + y,
    lambda x, y: x * torch.sigmoid(y),
    lambda x, y: x - y,
    lambda x, y: torch.maximum(x, y),
    lambda x, y: torch.cat([x, y], 1),
    lambda x, y: torch.cat([F.relu(y), x, y], 1),
    lambda x, y: F.relu(x + y),
    lambda x, y: (x + y) / 2 + y,
    lambda x, y: torch.where(y > 0, x, y),
    lambda x, y: torch.stack([x, y]).mean(0),
)
"""Operators that join a value with an earlier one of its shape."""


class RandomNetwork(nn.Module):
    """A network drawn by a seed; `steps` names its steps, `inputs` its inputs.

    joined: by the number of a step, the number of the earlier step whose result it reads too.
    tails:  by the number of a step, what makes further outputs of its result.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = Random(seed)
        torch.manual_seed(seed)
        self.inputs, self.first = _first(random)
        self.body, self.steps = nn.ModuleList(), list[str]()
        self.joined, self.tails = dict[int, int](), dict[int, Callable[[Tensor], Any]]()
        with torch.no_grad():
            values = [self.first.eval()(*(x.batch(2, torch.Generator().manual_seed(seed)) for x in self.inputs))]
            for _ in range(random.choice([2, 3, 4, 5, 6, 7])):
                values.append(self._grow(random, values))
        if not any(isinstance(each, WEIGHTED) for each in self.modules()):
            self._append("linear", nn.Linear(values[-1].shape[-1], 8))
        _with_statistics(self, seed)
        for _ in range(random.choice([0, 0, 1, 2])):
            self.tails[random.randrange(len(self.body))] = random.choice(TAILS)
        self.eval().requires_grad_(False)

    def _append(self, name: str, made: nn.Module) -> None:
        self.body.append(made)
        self.steps.append(name)

    def _grow(self, random: Random, values: Sequence[Tensor]) -> Tensor:
        """Append the first drawn step that fits, and return its result."""
        value = values[-1]
        alike = [at for at, earlier in enumerate(values[:-1]) if earlier.shape == value.shape and at]
        while True:
            try:
                if alike and random.random() < SHARE_OF_JOINS:
                    name, earlier, made = "join", random.choice(alike), Step(random.choice(JOINS))
                    result = made(value, values[earlier])
                else:
                    name, earlier = random.choice(list(STEPS[value.ndim])), 0
                    made = STEPS[value.ndim][name](random, tuple(value.shape)).eval()
                    result = made(value)
            except (RuntimeError, ValueError, IndexError, ZeroDivisionError, AssertionError):
                continue  # a step that does not fit
            fits = result.ndim in STEPS and 4 <= result[0].numel() <= LARGEST and len(result) == len(value)
            if fits and bool(result.isfinite().all()):
                if earlier:
                    self.joined[len(self.body)] = earlier
                self._append(name, made)
                return result

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values, further = [self.first(x) if y is None else self.first(x, y)], []
        for index, each in enumerate(self.body):
            read = [values[self.joined[index]]] if index in self.joined else []
            values.append(each(values[-1], *read))
            if index in self.tails:
                made = self.tails[index](values[-1])
                further += made if isinstance(made, tuple) else [made]
        return (values[-1], *further) if further else values[-1]


WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _with_statistics(model: nn.Module, seed: int) -> None:
    """Give norms the statistics of a trained network."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.copy_(drawn(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(drawn(module.running_var, 0.3, 1.5))
