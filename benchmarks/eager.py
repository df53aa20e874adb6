"""A QDrop training step as plain eager PyTorch: the baseline of step.py.

Formulas as in Nagel et al. 2020 (AdaRound), Esser et al. 2020 (LSQ) and Wei et al. 2022 (QDrop), one operator after the
other, every gradient by autograd: floor and grid of the weights are computed in every step, the soft rounding twice
(forward and regularizer); each drop draws its own uniform numbers; activations are NCHW; two Adams, one for rounding
and one, with a cosine schedule, for activation scales. Sites and grids are those of the engine's unit.

Must not know: how the engine trains, time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibrators.execution.activation_cache import Cache
from calibrators.execution.simulation import Simulation
from calibrators.grid.numerics import along_axis, code_limits, dequantize
from calibrators.grid.spec import QParams
from calibrators.reconstruction.reconstruct import Run
from calibrators.reconstruction.training import Unit

__all__ = ["EagerUnit", "given"]

UPPER, LOWER = 1.1, -0.1
LAMBDA, BETA = 0.01, 8.0
LR, SCALE_LR = 1e-3, 4e-5
STEPS = 20_000

START = 1e-4
"""Least distance of the first soft rounding from 0 and 1, as in the engine, so that both start at the same point."""


class EagerActivation(nn.Module):
    """Rounds with a straight-through gradient, clamps and dequantizes; elements drawn at random keep their float."""

    def __init__(self, qparams: QParams, keep: float, *, learns: bool) -> None:
        super().__init__()
        spec = qparams.spec
        self.scale = nn.Parameter(qparams.scale.clone(), requires_grad=learns)
        self.zero_point, self.qmin, self.qmax, self.keep = int(qparams.zero_point), spec.qmin, spec.qmax, keep

    def forward(self, x: Tensor, clip: tuple[float, float] | None = None) -> Tensor:
        if clip is not None:
            x = torch.clamp(x, *clip)
        steps = x / self.scale
        rounded = (steps.round() - steps).detach() + steps
        codes = torch.clamp(rounded + self.zero_point, self.qmin, self.qmax)
        quantized = (codes - self.zero_point) * self.scale
        return torch.where(torch.rand_like(x) < self.keep, quantized, x) if self.keep < 1 else quantized


class EagerRounding(nn.Module):
    """Soft weight with one rounding variable per element."""

    def __init__(self, weight: Tensor, qparams: QParams) -> None:
        super().__init__()
        spec = qparams.spec
        self.weight, (self.qmin, self.qmax) = weight.contiguous(), code_limits(weight, qparams)
        self.scale = along_axis(qparams.scale, weight, spec.axis)
        self.zero_point = along_axis(qparams.zero_point, weight, spec.axis)
        rest = (self.weight / self.scale - torch.floor(self.weight / self.scale)).clamp(START, 1 - START)
        self.variable = nn.Parameter(-torch.log((UPPER - LOWER) / (rest - LOWER) - 1))

    def up(self) -> Tensor:
        """Return the soft rounding, from 0 (floor) to 1 (floor + 1), in the shape of the weight."""
        return torch.clamp(torch.sigmoid(self.variable) * (UPPER - LOWER) + LOWER, 0, 1)

    def forward(self) -> Tensor:
        codes = torch.clamp(torch.floor(self.weight / self.scale) + self.up() + self.zero_point, self.qmin, self.qmax)
        return (codes - self.zero_point) * self.scale

    def regularizer(self) -> Tensor:
        """Return the rounding regularizer, which is 0 where the rounding is 0 or 1, summed over the elements."""
        return (1 - (2 * self.up() - 1).abs().pow(BETA)).sum()


class EagerUnit:
    """The unit of a run of the engine, which starts training at the engine's starting point.

    keep: probability that an activation, inside or at the entrance, is the quantized one.
    """

    def __init__(self, unit: Unit, run: Run, *, batch: int, keep: float) -> None:
        device = run.device
        self.batch, self.keep = batch, keep
        self.inputs = [_all(cache, device) for cache in unit.inputs]
        self.float_inputs = [_all(cache, device) for cache in unit.float_inputs]
        self.targets = [_all(cache, device) for cache in unit.targets]
        self.supervised = unit.supervised
        activations = {
            name: EagerActivation(quantizer.qparams, keep, learns=name in unit.scales)
            for name, quantizer in unit.simulation.quantizers.items()
        }
        self.roundings = {name: EagerRounding(*pair) for name, pair in unit.weights.items()}
        self.network = Simulation(run.placement, run.boundary, unit.block, activations).to(device)  # type: ignore[arg-type]
        for name, value in given(unit, run).items():
            self.network.set(name, value)
        scales = [a.scale for a in activations.values() if a.scale.requires_grad]
        self.optimizers = [
            torch.optim.Adam(parameters, lr=lr)
            for parameters, lr in ((self._variables(), LR), (scales, SCALE_LR))
            if parameters
        ]
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizers[-1], T_max=STEPS) if scales else None

    def _variables(self) -> list[nn.Parameter]:
        return [rounding.variable for rounding in self.roundings.values()]

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return the supervised outputs with the current soft weights."""
        for name, rounding in self.roundings.items():
            self.network.set(name, rounding())
        outputs = self.network(*inputs)
        return [outputs[i] for i in self.supervised]

    def step(self) -> None:
        """Take one training step on a random minibatch."""
        index = torch.randint(0, len(self.inputs[0]), (self.batch,), device=self.inputs[0].device)
        pairs = zip(self.inputs, self.float_inputs, strict=True)
        mixed = [_mix(quantized[index], floating[index], self.keep) for quantized, floating in pairs]
        targets = [target[index] for target in self.targets]
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = torch.zeros((), device=mixed[0].device)
        for y, target in zip(self.forward(mixed), targets, strict=True):
            loss = loss + (y - target).abs().pow(2.0).sum(1).mean()
        for rounding in self.roundings.values():
            loss = loss + LAMBDA * rounding.regularizer()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        if self.schedule is not None:
            self.schedule.step()


def given(unit: Unit, run: Run) -> dict[str, Tensor]:
    """Return by site the values that training does not change: biases, and weights that an earlier unit has trained."""
    codes = {name: run.weights[name] for name in unit.simulation.weights if name not in unit.weights}
    weights = {name: dequantize(coded.codes, coded.qparams).to(run.device) for name, coded in codes.items()}
    return {**weights, **unit.biases}


def _mix(quantized: Tensor, floating: Tensor, keep: float) -> Tensor:
    return torch.where(torch.rand_like(quantized) < keep, quantized, floating) if keep < 1 else quantized


def _all(cache: Cache, device: torch.device) -> Tensor:
    """Return all samples of a cache in float32, in PyTorch's default layout."""
    return cache.gather(torch.arange(len(cache))).contiguous().to(device)
