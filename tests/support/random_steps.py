"""Steps of random networks by the rank of the value that they read: layers, norms, activations, pools, moves, branches.

A step keeps the first axis of a value, the batch, and does not depend on its size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["STEPS", "Step"]

WIDTHS = (4, 6, 8, 12, 16)


class Step(nn.Module):
    """A function of tensors and of its submodules."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, *x: Tensor) -> Tensor:
        return self.function(*x, *self.layers)


Draw = Callable[[Random, tuple[int, ...]], nn.Module]
"""Makes a step for a value of a shape; raises what torch raises if there is none."""

STEPS: dict[int, dict[str, Draw]] = {2: {}, 3: {}, 4: {}, 5: {}}


def step(*ranks: int) -> Callable[[Draw], Draw]:
    """Enter a step into the table."""

    def enter(draw: Draw) -> Draw:
        for rank in ranks:
            STEPS[rank][draw.__name__.strip("_")] = draw
        return draw

    return enter


def plain(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Step(lambda x: function(x))


def any_of(random: Random, *functions: Callable[[Tensor], Tensor]) -> nn.Module:
    return plain(random.choice(functions))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


# --- layers


@step(3, 4, 5)
def convolution(random: Random, shape: tuple[int, ...]) -> nn.Module:
    channels, space = shape[1], len(shape) - 2
    kind = random.choice(["plain", "plain", "depthwise", "grouped", "point"])
    groups = {"depthwise": channels, "grouped": random.choice(divisors(channels))}.get(kind, 1)
    width = groups * random.choice([1, 2]) if groups > 1 else random.choice(WIDTHS)
    kernel = 1 if kind == "point" else random.choice([1, 2, 3, 3, 5])
    modes = ["zeros"] * 4 + ["reflect", "replicate", "circular"]
    mode = random.choice(modes if space < 3 else ["zeros"])
    stride = random.choice([1, 1, 1, 2])
    padding: Any = random.choice([0, kernel // 2, kernel // 2, "same" if stride == 1 else 0])
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
    return layer(
        channels,
        width,
        kernel,
        stride=stride,
        padding=padding,
        dilation=random.choice([1, 1, 1, 2]),
        groups=groups,
        bias=random.random() < 0.7,
        padding_mode=mode,
    )


@step(3, 4, 5)
def conv_norm_act(random: Random, shape: tuple[int, ...]) -> nn.Module:
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 3]
    layer = convolution(random, shape)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return nn.Sequential(layer, norm(layer.out_channels), activation(random, shape))


@step(3, 4, 5)
def transposed(random: Random, shape: tuple[int, ...]) -> nn.Module:
    channels, space = shape[1], len(shape) - 2
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[space - 1]
    stride = random.choice([1, 2, 2])
    groups = random.choice([1, 1, 2, channels])
    width = groups * random.choice([1, 2]) if groups > 1 else random.choice(WIDTHS)
    kernel, padding = random.choice([2, 3, 4]), random.choice([0, 1])
    extra = random.choice([0, stride - 1])
    return layer(channels, width, kernel, stride, padding, output_padding=extra, groups=groups)


@step(2, 3, 4)
def linear(random: Random, shape: tuple[int, ...]) -> nn.Module:
    return nn.Linear(shape[-1], random.choice(WIDTHS), bias=random.random() < 0.8)


@step(2, 3)
def perceptron(random: Random, shape: tuple[int, ...]) -> nn.Module:
    hidden = random.choice(WIDTHS)
    layers = [nn.Linear(shape[-1], hidden), activation(random, (2, hidden)), nn.Linear(hidden, shape[-1])]
    body = nn.Sequential(*layers)
    return Step(lambda x, f: x + f(x), body) if random.random() < 0.5 else body


@step(3, 4)
def recurrence(random: Random, shape: tuple[int, ...]) -> nn.Module:
    kind = random.choice([nn.GRU, nn.LSTM, nn.RNN])
    both, layers = random.random() < 0.4, random.choice([1, 1, 2])
    rnn = kind(shape[-1], random.choice((4, 8)), layers, batch_first=True, bidirectional=both)
    return Step(lambda x, f: f(x.flatten(1, -2))[0], rnn)


@step(2, 3, 4)
def product_with_constant(random: Random, shape: tuple[int, ...]) -> nn.Module:
    matrix = nn.Parameter(torch.randn(shape[-1], random.choice(WIDTHS)) / shape[-1] ** 0.5)
    holder = nn.ParameterList([matrix])
    return Step(lambda x, p: x @ p[0], holder)


# --- attention


@step(3)
def attention(random: Random, shape: tuple[int, ...]) -> nn.Module:
    width = shape[-1]
    heads = random.choice([h for h in divisors(width) if h <= 4])
    if random.random() < 0.4:
        attend = nn.MultiheadAttention(width, heads, batch_first=True)
        return Step(lambda x, f: x + f(x, x, x, need_weights=False)[0], attend)
    if random.random() < 0.3:
        return nn.TransformerEncoderLayer(
            width, heads, 16, 0.0, random.choice(["relu", "gelu"]), batch_first=True, norm_first=random.random() < 0.5
        )
    causal, by_hand = random.random() < 0.3, random.random() < 0.5

    def attend_to(x: Tensor, qkv: nn.Module, out: nn.Module) -> Tensor:
        n, t, c = x.shape
        q, k, v = qkv(x).view(n, t, 3, heads, c // heads).permute(2, 0, 3, 1, 4).unbind(0)
        if by_hand:
            y = ((q @ k.transpose(-2, -1)) * (c // heads) ** -0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return x + out(y.transpose(1, 2).reshape(n, t, c))

    return Step(attend_to, nn.Linear(width, 3 * width), nn.Linear(width, width))


@step(4)
def attention_of_pixels(random: Random, shape: tuple[int, ...]) -> nn.Module:
    channels = shape[1]

    def attend(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module) -> Tensor:
        scores = q(x).flatten(2).mT @ k(x).flatten(2)
        return x + (v(x).flatten(2) @ scores.softmax(-1).mT).view_as(x)

    return Step(attend, nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, 4, 1), nn.Conv2d(channels, channels, 1))


@step(3)
def contraction(random: Random, shape: tuple[int, ...]) -> nn.Module:
    formula = random.choice(["bnc,bmc->bnm", "bnc,bnd->bcd"])
    left, right = nn.Linear(shape[-1], 8), nn.Linear(shape[-1], 8)
    return Step(lambda x, a, b: torch.einsum(formula, a(x), b(x)) / shape[1] ** 0.5, left, right)


# --- norms and activations


@step(2, 3, 4, 5)
def norm(random: Random, shape: tuple[int, ...]) -> nn.Module:
    channels = shape[1]
    batch = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(shape) - 2]
    kinds: list[nn.Module] = [batch(channels), nn.LayerNorm(shape[-1]), nn.RMSNorm(shape[-1])]
    if len(shape) > 2 and math.prod(shape[2:]) > 1:
        instance = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(shape) - 3]
        kinds += [nn.GroupNorm(random.choice(divisors(channels)), channels), instance(channels, affine=True)]
    if len(shape) == 4:
        inner = nn.LayerNorm(channels)
        kinds.append(Step(lambda x, f: f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), inner))
        kinds.append(nn.LocalResponseNorm(3))
    kinds.append(plain(lambda x: F.normalize(x, dim=1)))
    return random.choice(kinds)


ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Mish, nn.Hardtanh, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink),
    *(nn.Hardshrink, nn.Softshrink),
    lambda: nn.Threshold(0.1, 0.0),
    lambda: nn.GELU(approximate="tanh"),
    lambda: plain(lambda x: x * torch.sigmoid(1.702 * x)),
    lambda: plain(lambda x: F.relu(x) ** 2),
    lambda: plain(lambda x: x.clamp(-0.7, 1.3)),
    lambda: plain(lambda x: x.clamp(min=-0.2)),
    lambda: plain(torch.relu),
)


@step(2, 3, 4, 5)
def activation(random: Random, shape: tuple[int, ...]) -> nn.Module:
    if random.random() < 0.1:
        slopes = nn.PReLU(shape[1] if len(shape) > 2 and random.random() < 0.5 else 1)
        slopes.weight.data.uniform_(-0.2, 0.6)
        return slopes
    return random.choice(ACTIVATIONS)()


@step(3, 4)
def softmax(random: Random, shape: tuple[int, ...]) -> nn.Module:
    dim = random.choice(range(1, len(shape)))
    return any_of(random, lambda x: x.softmax(dim) * x, lambda x: F.log_softmax(x, dim))


@step(2, 3, 4)
def gated(random: Random, shape: tuple[int, ...]) -> nn.Module:
    dim = random.choice([d for d in range(1, len(shape)) if shape[d] % 2 == 0])
    return any_of(
        random,
        lambda x: F.glu(x, dim),
        lambda x: (lambda a, b: a * torch.sigmoid(b))(*x.chunk(2, dim)),
        lambda x: (lambda a, b: F.silu(a) * b)(*x.chunk(2, dim)),
    )


# --- pools, reductions, sizes


@step(3, 4, 5)
def pool(random: Random, shape: tuple[int, ...]) -> nn.Module:
    space = len(shape) - 2
    stride, padding, ceil = random.choice([1, 2, 2]), random.choice([0, 1]), random.random() < 0.3
    if random.random() < 0.5:
        layer = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[space - 1]
        return layer(random.choice([2, 3]), stride, padding, ceil_mode=ceil)
    average = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[space - 1]
    return average(
        random.choice([2, 3]), stride, padding, ceil_mode=ceil and space < 3, count_include_pad=random.random() < 0.5
    )


@step(3, 4, 5)
def adaptive_pool(random: Random, shape: tuple[int, ...]) -> nn.Module:
    space = len(shape) - 2
    average = random.random() < 0.6
    size = random.choice([1, 1, 2, 3]) if average else 1
    names = "AdaptiveAvgPool" if average else "AdaptiveMaxPool"
    layer: nn.Module = getattr(nn, f"{names}{space}d")(size)
    return layer


@step(3, 4, 5)
def to_vector(random: Random, shape: tuple[int, ...]) -> nn.Module:
    axes = tuple(range(2, len(shape)))
    return any_of(
        random,
        lambda x: x.mean(axes),
        lambda x: x.amax(axes),
        lambda x: x.flatten(2).mean(-1),
        lambda x: x.flatten(1),
        lambda x: x.flatten(2).std(-1),
        lambda x: x.flatten(2)[:, :, -1],
        lambda x: torch.cat([x.mean(axes), x.amax(axes)], 1),
    )


@step(3, 4)
def reduction(random: Random, shape: tuple[int, ...]) -> nn.Module:
    dim, keep = random.choice(range(1, len(shape))), random.random() < 0.4
    return any_of(
        random,
        lambda x: x.mean(dim, keepdim=keep),
        lambda x: x.sum(dim, keepdim=keep) / shape[dim],
        lambda x: x.amax(dim, keepdim=keep),
        lambda x: x.amin(dim, keepdim=keep),
        lambda x: x.max(dim, keepdim=keep)[0],
        lambda x: x.logsumexp(dim, keepdim=keep),
        lambda x: x.norm(dim=dim, keepdim=keep),
        lambda x: x.var(dim, keepdim=keep),
        lambda x: x.cumsum(dim) / shape[dim],
    )


@step(4)
def resize(random: Random, shape: tuple[int, ...]) -> nn.Module:
    mode = random.choice(["nearest", "nearest", "bilinear", "bicubic"])
    size = random.choice([tuple(2 * n for n in shape[2:]), tuple(n + 1 for n in shape[2:])])
    if random.random() < 0.5:
        return nn.Upsample(scale_factor=2, mode=mode)
    return plain(lambda x: F.interpolate(x, size=size, mode=mode))


@step(4)
def pixels(random: Random, shape: tuple[int, ...]) -> nn.Module:
    kinds: list[nn.Module] = [plain(lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, 1::2]], 1))]
    if shape[1] % 4 == 0:
        kinds += [nn.PixelShuffle(2), nn.ChannelShuffle(2)]
    if shape[2] % 2 == 0 and shape[3] % 2 == 0:
        kinds.append(nn.PixelUnshuffle(2))
    return random.choice(kinds)


@step(3, 4)
def pad(random: Random, shape: tuple[int, ...]) -> nn.Module:
    mode = random.choice(["constant", "constant", "reflect", "replicate"])
    widths = [random.choice([0, 1]) for _ in range(2 * (len(shape) - 2))]
    if mode == "constant":
        value = random.choice([0.0, 0.0, 0.37])
        return plain(lambda x: F.pad(x, widths, value=value))
    return plain(lambda x: F.pad(x, widths, mode=mode))


# --- views and moves


@step(4)
def image_as_sequence(random: Random, shape: tuple[int, ...]) -> nn.Module:
    return any_of(
        random,
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.flatten(2).swapaxes(1, 2).contiguous(),
        lambda x: x.flatten(2),
        lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, x.shape[1]),
        lambda x: x.reshape(len(x), shape[1], -1).mT,
        lambda x: x.movedim(1, -1).flatten(1, 2),
        lambda x: x.flatten(2, 3).unflatten(1, (-1, 1)).squeeze(2),
    )


@step(3)
def sequence_as_image(random: Random, shape: tuple[int, ...]) -> nn.Module:
    return any_of(
        random,
        lambda x: x.unsqueeze(1),
        lambda x: x.unsqueeze(-1),
        lambda x: x.transpose(1, 2).unsqueeze(2),
        lambda x: x.view(x.shape[0], shape[1], 2, -1),
        lambda x: x[:, None],
    )


@step(2)
def vector_as_sequence(random: Random, shape: tuple[int, ...]) -> nn.Module:
    size = random.choice(divisors(shape[1]))
    return any_of(
        random,
        lambda x: x.view(-1, size, shape[1] // size),
        lambda x: x.unflatten(1, (size, -1)),
        lambda x: x.unsqueeze(1),
        lambda x: torch.stack([x, x.flip(1)], 1),
    )


@step(2)
def vector_as_image(random: Random, shape: tuple[int, ...]) -> nn.Module:
    if random.random() < 0.5:
        return plain(lambda x: x[:, :, None, None])
    return Step(lambda x, f: f(x).view(-1, 4, 4, 4), nn.Linear(shape[1], 64))


@step(5)
def volume_as_image(random: Random, shape: tuple[int, ...]) -> nn.Module:
    return any_of(
        random, lambda x: x.mean(2), lambda x: x.flatten(1, 2), lambda x: x[:, :, 0], lambda x: x.amax(-1), lambda x: x
    )


@step(4)
def image_as_volume(random: Random, shape: tuple[int, ...]) -> nn.Module:
    return any_of(random, lambda x: x.unsqueeze(2), lambda x: x.unflatten(1, (2, -1)).transpose(1, 2))


@step(2, 3, 4)
def move(random: Random, shape: tuple[int, ...]) -> nn.Module:
    dim = random.choice(range(1, len(shape)))
    cut = random.choice(range(1, max(2, shape[dim])))
    last = len(shape) - 1
    return any_of(
        random,
        lambda x: x.roll(cut, dim),
        lambda x: x.roll((1, -1), (1, last)),
        lambda x: x.flip(dim),
        lambda x: torch.cat(x.split(cut, dim)[::-1], dim),
        lambda x: torch.cat(x.chunk(2, dim)[::-1], dim),
        lambda x: torch.cat([x, x], dim),
        lambda x: torch.cat(x.tensor_split(2, dim)[::-1], dim),
        lambda x: x.narrow(dim, 0, cut),
        lambda x: x.index_select(dim, torch.arange(shape[dim] - 1, -1, -1)),
        lambda x: x.swapaxes(1, last),
        lambda x: torch.stack(x.unbind(dim), dim),
        lambda x: x.repeat_interleave(2, dim),
        lambda x: x.unsqueeze(dim).squeeze(dim),
        lambda x: x.repeat(*[2 if n == dim else 1 for n in range(len(shape))]),
    )


# --- arithmetic


@step(2, 3, 4)
def arithmetic(random: Random, shape: tuple[int, ...]) -> nn.Module:
    number = random.choice([0.5, 2.0, -1.5, 3])
    return any_of(
        random,
        lambda x: x + number,
        lambda x: x * number,
        lambda x: number - x,
        lambda x: x / number,
        lambda x: 1 / (x.abs() + 1),
        lambda x: x.abs().sqrt(),
        lambda x: x.exp().clamp(max=4),
        lambda x: x.sin() + x.cos(),
        lambda x: torch.where(x > 0, x, x * 0.1),
        lambda x: x.masked_fill(x < -1, -1.0),
        lambda x: x.pow(2),
        lambda x: (x * x + 1).log(),
        lambda x: x - x.mean(-1, keepdim=True),
        lambda x: torch.maximum(x, x.flip(1)),
        lambda x: torch.minimum(x, -x),
        lambda x: x.erf(),
        lambda x: torch.lerp(x, x.flip(1), 0.3),
        lambda x: torch.addcmul(x, x, x, value=0.5),
        lambda x: x + torch.arange(shape[-1], dtype=torch.float32) / shape[-1],
        lambda x: x * torch.linspace(0, 1, shape[-1]),
        lambda x: x.neg().relu() - x.relu(),
    )


@step(2, 3, 4)
def constants(random: Random, shape: tuple[int, ...]) -> nn.Module:
    own = random.choice([shape[1:], (shape[-1],), (shape[1], *[1] * (len(shape) - 2)), (1,)])
    holder = nn.ParameterList([nn.Parameter(torch.randn(own)), nn.Parameter(torch.rand(own) + 0.5)])
    function = random.choice(
        [
            lambda x, p: x * p[1] + p[0],
            lambda x, p: x + p[0],
            lambda x, p: (x - p[0]) / p[1],
            lambda x, p: torch.maximum(x, p[0]),
            lambda x, p: p[1] * (x - p[0]),
        ]
    )
    return Step(function, holder)


# --- branches


def same_shape(random: Random, shape: tuple[int, ...]) -> nn.Module:
    """Return a layer that keeps the shape."""
    if len(shape) == 2 or (len(shape) == 3 and random.random() < 0.5):
        return nn.Linear(shape[-1], shape[-1])
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(shape) - 3]
    return layer(shape[1], shape[1], random.choice([1, 3]), padding="same", groups=random.choice([1, shape[1]]))


@step(2, 3, 4, 5)
def residual(random: Random, shape: tuple[int, ...]) -> nn.Module:
    body = nn.Sequential(same_shape(random, shape), activation(random, shape), same_shape(random, shape))
    act = activation(random, shape)
    return Step(lambda x, f, g: g(x + f(x)), body, act if random.random() < 0.5 else nn.Identity())


@step(3, 4)
def branches(random: Random, shape: tuple[int, ...]) -> nn.Module:
    left, right = same_shape(random, shape), same_shape(random, shape)
    act = activation(random, shape)
    function = random.choice(
        [
            lambda x, f, g, h: torch.cat([f(x), h(g(x)), x], 1),
            lambda x, f, g, h: f(x) + g(x),
            lambda x, f, g, h: h(f(x) + g(x) + x),
            lambda x, f, g, h: f(x) * torch.sigmoid(g(x)),
            lambda x, f, g, h: torch.stack([h(f(x)), g(x)]).sum(0),
            lambda x, f, g, h: h(f(x)) - g(x),
            lambda x, f, g, h: f(h(f(x))),  # one layer twice
            lambda x, f, g, h: h(f(x)) + f(x).tanh(),  # an equal call twice
            lambda x, f, g, h: torch.cat([h(f(x)), h(f(x))], 1),
        ]
    )
    return Step(function, left, right, act)


@step(4)
def squeeze_excite(random: Random, shape: tuple[int, ...]) -> nn.Module:
    channels = shape[1]
    gate = random.choice([nn.Sigmoid, nn.Hardsigmoid])()
    if random.random() < 0.5:
        body = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 4, 1), activation(random, shape[:2]), nn.Conv2d(4, channels, 1)
        )
        return Step(lambda x, f, g: x * g(f(x)), body, gate)
    body = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))
    return Step(lambda x, f, g: x * g(f(x.mean((2, 3))))[:, :, None, None], body, gate)
