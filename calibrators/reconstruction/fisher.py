"""Weigh each element of a value by its effect on the prediction: the diagonal of the empirical Fisher information.

source: Li et al. 2021 (BRECQ), section 3.2, eq. 10: the Hessian of the task loss at a unit's output is approximated by
the squared gradient. Departs: no labels; the gradient is that of the log likelihood of a class drawn from the model's
own prediction (of a random projection, where an output is not logits), so that it does not vanish where the model is
right; the squares are averaged over samples, times one factor per sample, so that one backward pass serves all units
and memory does not grow with the data.

Must not know: methods, units, training.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from calibrators.execution.losses import is_logits
from calibrators.execution.measure import Batch
from calibrators.graph.walk import walk

__all__ = ["Importance", "importances"]


@dataclass(frozen=True, eq=False)
class Importance:
    """Weights of squared errors, 1 on average.

    elements: [...], shaped as one sample of the value; samples: [samples]. The weight of an element is their product.
    """

    elements: Tensor
    samples: Tensor


def importances(
    graph: fx.GraphModule, names: Collection[str], batches: Iterable[Batch], generator: torch.Generator
) -> dict[str, Importance]:
    """Return the importance of every element of the values called `names` (fx names of float values with samples)."""
    if not names:
        return {}
    elements: dict[str, Tensor] = {}
    samples: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.enable_grad():
        for batch in batches:
            marked: dict[str, Tensor] = {}
            outputs: tuple[Tensor, ...] = ()
            for node, alive in walk(graph, batch):
                if node.op == "output":
                    outputs = alive[node]
                elif node.name in samples:
                    marked[node.name] = alive[node] if alive[node].requires_grad else alive[node].requires_grad_()
            score = torch.stack([_score(y, generator) for y in outputs if y.is_floating_point()]).sum()
            gradients = torch.autograd.grad(score, list(marked.values()), allow_unused=True)
            for (name, value), gradient in zip(marked.items(), gradients, strict=True):
                square = (torch.zeros_like(value) if gradient is None else gradient).square()
                elements[name] = elements.get(name, torch.zeros(())) + square.sum(0)
                samples[name].append(square.reshape(len(square), -1).mean(1))
    return {name: Importance(_normal(elements[name]), _normal(torch.cat(samples[name]))) for name in elements}


def _score(output: Tensor, generator: torch.Generator) -> Tensor:
    """Return the value to differentiate: the log likelihood of drawn classes, or a random projection if not logits."""
    if is_logits(output):
        chosen = torch.multinomial(output.detach().softmax(1), 1, generator=generator)
        return output.log_softmax(1).gather(1, chosen).sum()
    signs = torch.randint(0, 2, output.shape, generator=generator).mul(2).sub(1)
    return (output * signs).sum()


def _normal(weights: Tensor) -> Tensor:
    """Return the weights scaled to a mean of 1."""
    mean = weights.mean()
    return weights / mean if float(mean) > 0 else torch.ones_like(weights)
