"""Train one unit: rounding, activation scales and biases follow the gradient of a loss.

Must not know: which methods there are, the order of units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from calibrators.errors import DataError
from calibrators.execution.activation_cache import Cache
from calibrators.execution.blocks import Block
from calibrators.execution.fused import mean_square
from calibrators.execution.quantizers import Masks, Rounding, generator_on
from calibrators.execution.simulation import Simulation
from calibrators.grid.numerics import along_axis
from calibrators.grid.spec import QParams
from calibrators.reconstruction.cuda_graphs import Recorded

__all__ = ["Learned", "Loss", "RelativeError", "ScaleOnlyLoss", "Settings", "Sum", "Unit", "train"]

CHECK_EVERY = 100
"""Steps between two checks that the loss is still finite."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A block to be trained, with its data.

    simulation:   the block with quantizers.
    inputs:       block.inputs in the network quantized so far, all samples.
    float_inputs: the same in the float network.
    targets:      outputs of the float network, one per entry of `supervised`, the indices of outputs that have samples.
    energy:       mean square of each target.
    scales:       sites whose activation scale may be trained here.
    weights:      float weights and their grids by site; biases: float biases by site.
    reference:    the method's loss with nearest rounding.
    device:       holds weights, biases and the simulation, which are trained there; caches are in memory.
    """

    block: Block
    simulation: Simulation
    inputs: tuple[Cache, ...]
    float_inputs: tuple[Cache, ...]
    targets: tuple[Cache, ...]
    supervised: tuple[int, ...]
    energy: tuple[float, ...]
    scales: tuple[str, ...]
    weights: Mapping[str, tuple[Tensor, QParams]]
    biases: Mapping[str, Tensor]
    reference: float
    device: torch.device


class Loss(Protocol):
    """The loss that a unit is trained on."""

    def reads(self, index: Tensor) -> Sequence[Tensor]:
        """Return what the loss needs of the samples `index` [n] besides outputs and targets, on any device."""

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        """Return the loss [] of a minibatch: outputs and targets [n, ...] and what it `reads`, on one device."""


@dataclass(frozen=True)
class RelativeError:
    """Mean |error| ** power in units of the root mean square of the targets, averaged over the outputs.

    Departs: published losses sum over channels; dividing by the energy makes one learning rate and one strength of the
    regularizer serve every network.
    """

    energy: tuple[float, ...]
    power: int = 2

    def reads(self, index: Tensor) -> Sequence[Tensor]:
        return ()

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor] = ()) -> Tensor:
        mean = torch.nn.functional.l1_loss if self.power == 1 else mean_square
        triples = zip(outputs, targets, self.energy, strict=True)
        return torch.stack([mean(y, t) / e ** (self.power / 2) for y, t, e in triples]).mean()


@dataclass(frozen=True)
class Sum:
    """The sum of two losses."""

    first: RelativeError
    second: Loss

    def reads(self, index: Tensor) -> Sequence[Tensor]:
        return self.second.reads(index)

    def __call__(self, outputs: Sequence[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        return self.first(outputs, targets) + self.second(outputs, targets, read)


class ScaleOnlyLoss(Sum):
    """The sum of two losses, of which only activation scales follow the second."""


@dataclass(frozen=True)
class Settings:
    """Settings of the training of a unit.

    lr, scale_lr, bias_lr, gain_lr: learning rates of rounding variables, logarithms of activation scales, biases (in
        units of the mean bias) and logarithms of weight scales; 0 keeps them fixed.
    strength: of the rounding regularizer, in units of the reference loss per weight.
    warmup:   share of the steps before the regularizer acts.
    keep, input_keep: probability that an activation inside, or an input, is the quantized one.
    precision: of operators with weights during training; deployed units are always evaluated in float32.
    gradients: precision of the gradients of these operators where `precision` is float32.
    """

    iters: int
    batch: int
    lr: float
    scale_lr: float
    bias_lr: float
    gain_lr: float
    strength: float
    warmup: float
    keep: float
    input_keep: float
    precision: torch.dtype
    gradients: torch.dtype


@dataclass(frozen=True, eq=False)
class Learned:
    """Results of training: rounding, gains (factors of the weight scales, [channels] or []) and biases."""

    rounding: Rounding | None
    gains: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]


def train(
    unit: Unit, loss: Loss, settings: Settings, generator: torch.Generator, advance: Callable[[int], None]
) -> Learned:
    """Train the unit; its quantizers stay in training mode.

    raises: DataError if the loss is no longer finite.
    """
    trainer = _Trainer(unit, loss, settings, generator)
    # not an attribute of the trainer, as a reference cycle would outlive the unit
    descend = Recorded(trainer.descend, unit.device, [trainer.drawing])
    for step in range(settings.iters):
        value = descend(*trainer.minibatch(step))
        if (step % CHECK_EVERY == 0 or step == settings.iters - 1) and not math.isfinite(float(value)):
            raise DataError(
                f"training diverged: the loss of unit {unit.block.name} became {float(value)} in step {step}; "
                "lower the learning rates (lr, scale_lr, bias_lr) or check the calibration data"
            )
        advance(1)
    return Learned(
        trainer.rounding,
        {name: gain.detach().exp() for name, gain in trainer.gains.items()},
        {name: bias.detach().cpu().double() for name, bias in trainer.biases.items()} if settings.bias_lr else {},
    )


class _Trainer:
    """The variables, the optimizer and the step of a training run."""

    def __init__(self, unit: Unit, loss: Loss, settings: Settings, generator: torch.Generator) -> None:
        self.unit, self.loss, self.settings, self.device = unit, loss, settings, unit.device
        self.drawing = generator_on(unit.device, generator)
        masks = partial(Masks, generator=self.drawing, device=unit.device)
        self.masks = masks(settings.keep) if 0 < settings.keep < 1 else None
        self.input_masks = masks(settings.input_keep) if settings.input_keep < 1 else None
        pairs = zip(unit.inputs, unit.float_inputs, strict=True)
        self.mixed = [settings.input_keep < 1 and q is not f and q.dtype.is_floating_point for q, f in pairs]
        unit.simulation.train_in(settings.precision, settings.gradients)
        self.minibatches = _minibatches(len(unit.inputs[0]), settings.batch, generator)
        self.groups: list[dict[str, Any]] = []
        self.rates: list[tuple[float, bool]] = []  # initial learning rate of every group, and whether it fades
        self.rounding = self._rounding()
        self.gains = self._gains()
        self.biases = self._biases()
        self.scales = self._scales()
        adam = partial(torch.optim.Adam, fused=True, capturable=unit.device.type != "cpu")
        self.optimizer = adam(self.groups) if self.groups else None
        free = float(self.rounding.free.sum()) if self.rounding else 0.0
        self.strength = settings.strength * unit.reference / max(free, 1.0)
        self.warm = int(settings.warmup * settings.iters)

    def _add(self, parameters: list[Tensor], lr: float, *, fades: bool = True) -> None:
        if parameters and lr:
            self.groups.append({"params": parameters, "lr": lr})
            self.rates.append((lr, fades))

    def _rounding(self) -> Rounding | None:
        if not self.unit.weights or not self.settings.lr:
            return None
        values, grids = zip(*self.unit.weights.values(), strict=True)
        rounding = Rounding(values, grids)
        for name, leaf in zip(self.unit.weights, rounding.weights, strict=True):
            self.unit.simulation.set(name, leaf)
        self._add([rounding.variable], self.settings.lr, fades=False)
        return rounding

    def _gains(self) -> dict[str, Tensor]:
        if not self.settings.gain_lr:
            return {}
        gains = {name: torch.zeros_like(grid.scale).requires_grad_() for name, (_, grid) in self.unit.weights.items()}
        self._add([*gains.values()], self.settings.gain_lr)
        return gains

    def _biases(self) -> dict[str, Tensor]:
        biases = {
            name: bias.clone().requires_grad_(bool(self.settings.bias_lr)) for name, bias in self.unit.biases.items()
        }
        for name, bias in biases.items():
            self.unit.simulation.set(name, bias)
        if biases:
            size = float(torch.cat([bias.detach().abs().flatten() for bias in biases.values()]).mean())
            typical = fmean(math.sqrt(energy) for energy in self.unit.energy)  # where the network has no biases
            self._add([*biases.values()], self.settings.bias_lr * (size or typical))
        return biases

    def _scales(self) -> list[Tensor]:
        quantizers = self.unit.simulation.quantizers
        for name, quantizer in quantizers.items():
            trained = name in self.unit.scales and bool(self.settings.scale_lr) and self.settings.keep > 0
            quantizer.learn(self.masks, scale=trained, bypass=self.settings.keep == 0)
        scales: list[Tensor] = [q.log_scale for q in quantizers.values() if q.log_scale.requires_grad]
        self._add(scales, self.settings.scale_lr)
        return scales

    def minibatch(self, step: int) -> tuple[Any, ...]:
        """Return the arguments of `descend` in a step."""
        unit = self.unit
        index = next(self.minibatches)
        floats = [cache.gather(index) for cache, mixed in zip(unit.float_inputs, self.mixed, strict=True) if mixed]
        progress = (step - self.warm) / max(1, self.settings.iters - self.warm)
        return (
            progress >= 0,
            [self._schedule(step, progress)],
            [cache.gather(index) for cache in unit.inputs],
            floats,
            [cache.gather(index) for cache in unit.targets],
            self.loss.reads(index),
        )

    def _schedule(self, step: int, progress: float) -> Tensor:
        """Return beta of the rounding regularizer and the learning rates of the groups in a step."""
        beta = 20 - 18 * max(progress, 0.0)
        fade = 0.5 * (1 + math.cos(math.pi * step / self.settings.iters))
        rates = [lr * (fade if fades else 1.0) for lr, fades in self.rates]
        # a GPU's optimizer reads float32
        return torch.tensor([beta, *rates], dtype=torch.float64 if self.device.type == "cpu" else torch.float32)

    def descend(self, regular: Hashable, /, *groups: Sequence[Tensor]) -> Tensor:
        """Take one step and return the loss before it, []; `regular`: whether the regularizer acts."""
        (schedule,), quantized, floats, targets, read = groups
        beta, *rates = schedule.unbind()
        for parameter in (*self.gains.values(), *self.biases.values(), *self.scales):
            parameter.grad = None
        if self.rounding is not None:
            self.rounding.soften()
            self._apply_gains()
        outputs = self.unit.simulation(*self._mix(quantized, floats))
        value = self._backward([outputs[i] for i in self.unit.supervised], targets, read)
        if self.optimizer is not None:
            if self.rounding is not None:
                self.rounding.backward(self.strength if regular else 0.0, beta)
            for group, lr in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
            self.optimizer.step()
        return value

    def _backward(self, outputs: list[Tensor], targets: Sequence[Tensor], read: Sequence[Tensor]) -> Tensor:
        """Compute the gradients and return the loss, detached."""
        loss = self.loss
        value = loss.first(outputs, targets) if isinstance(loss, ScaleOnlyLoss) else loss(outputs, targets, read)
        if self.optimizer is None:
            return value.detach()
        if isinstance(loss, ScaleOnlyLoss) and self.scales:
            besides = loss.second(outputs, targets, read)
            gradients = torch.autograd.grad(besides, self.scales, retain_graph=True, materialize_grads=True)
            for scale, gradient in zip(self.scales, gradients, strict=True):
                scale.grad = gradient.clone()
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def _apply_gains(self) -> None:
        assert self.rounding is not None
        if self.gains:
            for (name, (_, grid)), leaf in zip(self.unit.weights.items(), self.rounding.weights, strict=True):
                factor = along_axis(self.gains[name].exp(), leaf, grid.spec.axis, grid.spec.block_size)
                self.unit.simulation.set(name, leaf * factor)

    def _mix(self, quantized: Sequence[Tensor], floats: Sequence[Tensor]) -> list[Tensor]:
        if self.input_masks is None:
            return list(quantized)
        rest, like = iter(floats), self.input_masks.like
        pairs = zip(quantized, self.mixed, strict=True)
        return [torch.lerp(next(rest), x, like(x)) if mixed else x for x, mixed in pairs]


def _minibatches(samples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield minibatches of samples drawn without replacement, epoch after epoch; incomplete ones are dropped."""
    size = min(size, samples)
    while True:
        order = torch.randperm(samples, generator=generator)
        for start in range(0, samples - size + 1, size):
            yield order[start : start + size]
