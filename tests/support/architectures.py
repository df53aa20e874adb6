"""Small networks written as the authors of the known ones write them; random weights are drawn by the caller.

Every entry of ARCHITECTURES makes a module and says what one sample of each input looks like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.support.networks import randomize

__all__ = ["ARCHITECTURES", "Architecture", "construct"]


@dataclass(frozen=True)
class Architecture:
    """A recipe for a network and one of its batches, and the expected result of its export.

    shapes: one sample of each input; tokens: vocabulary size where the inputs are integers.
    floats: operators of the runtime's graph that stay in float; none by default.
    exact:  whether the runtime's outputs must equal the reference's in every bit.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ((3, 8, 8),)
    tokens: int = 0
    floats: frozenset[str] = frozenset()
    exact: bool = True


def construct(name: str, batch: int = 8, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the network with random weights and one batch of inputs."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(seed)
    model = randomize(architecture.make(), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    if architecture.tokens:
        return model, tuple(
            torch.randint(architecture.tokens, (batch, *shape), generator=generator) for shape in architecture.shapes
        )
    return model, tuple(torch.randn(batch, *shape, generator=generator) for shape in architecture.shapes)


class Head(nn.Module):
    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean([2, 3]))


def conv_bn(i: int, o: int, k: int = 3, **kw: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, padding=k // 2, bias=False, **kw), nn.BatchNorm2d(o), nn.ReLU(inplace=True))


# --- convolutional networks


class ShuffleUnit(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            conv_bn(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch(x2)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 8)
        self.units = ShuffleUnit(8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(F.max_pool2d(self.stem(x), 3, 2, 1)))


class DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(2 * growth), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(features, 1)), inplace=True))
        return self.conv2(F.relu(self.norm2(x), inplace=True))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * i, 4) for i in range(2))
        self.norm, self.head = nn.BatchNorm2d(16), Head(16)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(F.relu(self.norm(torch.cat(features, 1))))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = conv_bn(3, 8), conv_bn(8, 12), conv_bn(12, 16)
        self.up2, self.dec2 = nn.ConvTranspose2d(16, 12, 2, 2), conv_bn(24, 12)
        self.dec1, self.out = conv_bn(20, 8), nn.Conv2d(8 + 16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.bottom(F.max_pool2d(b, 2))
        d = self.dec2(torch.cat([self.up2(c), b], 1))
        e = self.dec1(torch.cat([F.interpolate(d, scale_factor=2, mode="bilinear", align_corners=False), a], 1))
        return self.out(torch.cat([e, F.interpolate(c, scale_factor=4, mode="nearest")], 1))


class Pyramid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = conv_bn(3, 8, stride=2), conv_bn(8, 12, stride=2)
        self.lateral1, self.lateral2 = nn.Conv2d(8, 8, 1), nn.Conv2d(12, 8, 1)
        self.smooth1, self.smooth2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        c1 = self.c1(x)
        c2 = self.c2(c1)
        p2 = self.lateral2(c2)
        p1 = self.lateral1(c1) + F.interpolate(p2, size=c1.shape[-2:], mode="nearest")
        return {"p1": self.smooth1(p1), "p2": self.smooth2(p2)}


class Detector(nn.Module):
    def __init__(self, classes: int = 4, anchors: int = 2) -> None:
        super().__init__()
        self.classes = classes
        self.c1, self.c2 = conv_bn(3, 8), conv_bn(8, 8, stride=2)
        self.boxes = nn.ModuleList(nn.Conv2d(8, anchors * 4, 3, padding=1) for _ in range(2))
        self.scores = nn.ModuleList(nn.Conv2d(8, anchors * classes, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = [self.c1(x)]
        features.append(self.c2(features[0]))
        boxes, scores = [], []
        for feature, box, score in zip(features, self.boxes, self.scores, strict=True):
            boxes.append(box(feature).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
            scores.append(score(feature).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.classes))
        return torch.cat(boxes, 1), torch.cat(scores, 1)


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(2, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(8, 8, 3, padding=1, groups=8), nn.Conv1d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
            nn.Flatten(), nn.Linear(12, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.table = conv_bn(3, 8), nn.Linear(6, 8)
        self.head = nn.Linear(16, 3)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        pooled = F.adaptive_avg_pool2d(self.image(image), 1).flatten(1)
        return self.head(torch.cat([pooled, F.relu(self.table(table))], 1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduced: int, gate: nn.Module, linear: bool) -> None:
        super().__init__()
        self.pool, self.linear, self.gate = nn.AdaptiveAvgPool2d(1), linear, gate
        self.fc1 = nn.Linear(channels, reduced) if linear else nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Linear(reduced, channels) if linear else nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        if not self.linear:
            return x * self.gate(self.fc2(F.relu(self.fc1(y))))
        n, c = x.shape[:2]
        y = self.gate(self.fc2(F.relu(self.fc1(y.view(n, c))))).view(n, c, 1, 1)
        return x * y.expand_as(x)


class Inverted(nn.Module):
    def __init__(self, activation: Callable[[], nn.Module], gate: Callable[[], nn.Module], linear: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), activation())
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), activation())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm, self.act = nn.BatchNorm2d(16), activation()
        self.se = SqueezeExcite(16, 4, gate(), linear)
        self.project = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.project(self.se(self.act(self.norm(self.depthwise(self.expand(x))))))
        return self.head(x + y)


def activated(*layers: nn.Module) -> nn.Sequential:
    """Return convolutions with the given modules between them."""
    parts: list[nn.Module] = [nn.Conv2d(3, 8, 3, padding=1)]
    for layer in layers:
        parts += [layer, nn.Conv2d(8, 8, 3, padding=1)]
    return nn.Sequential(*parts, Head(8))


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 2, 2)
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))
        self.head = Head(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(self.norm(y))))
        return self.head(x + y.permute(0, 3, 1, 2))


class Sequenced(nn.Module):
    """A convolution, then whatever two-dimensional modules, then a head."""

    def __init__(self, *layers: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem, self.layers, self.head = conv_bn(3, 8), nn.Sequential(*layers), Head(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(x)))


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.conv2 = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Conv3d(6, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn(self.conv1(x))), 2)
        return self.fc(F.relu(self.conv2(x)).mean([2, 3, 4]))


# --- transformers


class TokenEncoder(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, width), nn.Parameter(torch.zeros(1, 6, width))
        layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.encoder(x, mask=mask, is_causal=True).mean(1))


class CausalAttention(nn.Module):
    """nanoGPT's attention, with the mask as a buffer."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("bias", torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (z.view(n, t, 2, c // 2).transpose(1, 2) for z in (q, k, v))
        att = (q @ k.transpose(-2, -1)) * (1.0 / (c // 2) ** 0.5)
        att = att.masked_fill(self.bias[:, :, :t, :t] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(n, t, c))


class Gpt(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(20, width), nn.Embedding(6, width)
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(width), CausalAttention(), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.lm_head = nn.Linear(width, 20, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1)))
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return self.lm_head(x[:, -1])


class VisionTransformer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.zeros(1, 5, width))
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(self.norm(x)[:, 0])


class Swin(nn.Module):
    def __init__(self, width: int = 16, window: int = 2) -> None:
        super().__init__()
        self.window, self.heads = window, 2
        self.patch, self.norm1 = nn.Conv2d(3, width, 2, 2), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(2, 4, 4))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        s = self.window
        shifted = torch.roll(self.norm1(x), shifts=(-1, -1), dims=(1, 2))
        y = shifted.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        qkv = self.qkv(y).reshape(-1, s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1) + self.bias.unsqueeze(0)
        y = self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, c)
        x = x + torch.roll(y, shifts=(1, 1), dims=(1, 2))
        return self.head(x.mean((1, 2)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.front, self.rnn, self.head = nn.Linear(4, 8), kind(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(F.relu(self.front(x)))[0][:, -1])


# --- odd graphs


class Odd(nn.Module):
    """A ReLU on the input, a block used twice, unused parameters; returns an inner value twice, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.spare = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(5, 5)
        self.scale = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        inner = F.relu(self.block(F.relu(self.stem(F.relu(x)))))
        return {"result": self.block(inner), "again": inner, "inner": inner, "given": x}


class Arithmetic(nn.Module):
    """Numbers, buffers and broadcasts between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 11))
        self.register_buffer("position", torch.randn(1, 8, 8, 8))
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / 0.25
        y = F.relu(self.a(x)) * 2 + self.position
        y = y + self.b(y).mean((2, 3), keepdim=True)
        y = self.c(torch.cat([x, y], 1))
        return self.head(1 - F.relu(y) / 3)


class Segmenter(nn.Module):
    """Probabilities and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_bn(3, 8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x))
        return logits.softmax(1), logits.argmax(1)


class Half(nn.Module):
    """A network in half precision that takes and returns float32."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_bn(3, 8), Head(8)).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.half()).float()


class Slices(nn.Module):
    """Space to depth by slices, uneven split, spatial pyramid pooling, unbind: the parts of the YOLO family."""

    def __init__(self) -> None:
        super().__init__()
        self.focus, self.middle, self.last = conv_bn(12, 12), conv_bn(4, 4), conv_bn(32, 8)
        self.pool, self.head = nn.MaxPool2d(5, 1, 2), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        parts = list(self.focus(x).split((8, 4), 1))
        parts.append(self.middle(parts[-1]))
        x = torch.cat(parts, 1)
        left, right = self.last(torch.cat([x, self.pool(x)], 1)).unflatten(1, (2, 4)).unbind(1)
        return self.head(torch.cat([right, left], 1))


def weight_normed() -> nn.Module:
    conv = parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    return Sequenced(conv, nn.ReLU(), nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1)))


ATTENTION = frozenset({"MatMul", "FusedMatMul", "Softmax"})
TOKENS = ATTENTION | {"Add", "Concat", "Gelu", "LayerNormalization", "SkipLayerNormalization", "ReduceMean"}

ARCHITECTURES: dict[str, Architecture] = {
    "shufflenet": Architecture(ShuffleNet),
    "densenet": Architecture(DenseNet),
    "unet": Architecture(UNet, floats=frozenset({"Resize", "Concat"})),
    "pyramid": Architecture(Pyramid),
    "detector": Architecture(Detector, floats=frozenset({"Concat"})),
    "wave": Architecture(Wave, ((2, 32),)),
    "two-inputs": Architecture(TwoInputs, ((3, 6, 6), (6,))),
    "mobilenetv3": Architecture(
        partial(Inverted, nn.Hardswish, nn.Hardsigmoid, False),
        floats=frozenset({"HardSigmoid", "HardSwish", "Mul", "Add", "GlobalAveragePool"}),
        exact=False,
    ),
    "efficientnet": Architecture(partial(Inverted, nn.SiLU, nn.Sigmoid, False)),
    "senet": Architecture(partial(Inverted, nn.ReLU, nn.Sigmoid, True)),
    "elementwise": Architecture(
        lambda: activated(
            nn.PReLU(8), nn.LeakyReLU(0.1), nn.ELU(), nn.GroupNorm(2, 8), nn.Hardtanh(-1, 2), nn.InstanceNorm2d(8)
        ),
        floats=frozenset({"PRelu", "Elu", "InstanceNormalization", "Mul", "Add"}),
        exact=False,
    ),
    "pools": Architecture(
        lambda: Sequenced(
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            conv_bn(8, 8),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            conv_bn(8, 8),
            nn.AvgPool2d(2, 1, 1),
            nn.AdaptiveAvgPool2d(2),
            nn.Conv2d(8, 8, 1),
            nn.AdaptiveMaxPool2d(1),
        ),
        ((3, 12, 12),),
    ),
    "paddings": Architecture(
        lambda: Sequenced(
            nn.Conv2d(8, 8, 3, padding="same"),
            nn.ReLU(),
            nn.Conv2d(8, 8, 4, padding="same"),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
            nn.ReLU(),
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(8, 8, 3, padding="valid"),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=2),
        ),
        floats=frozenset({"Pad"}),
    ),
    "convnext": Architecture(
        ConvNeXt,
        ((3, 12, 12),),
        floats=frozenset({"LayerNormalization", "Gelu", "Add", "GlobalAveragePool"}),
        exact=False,
    ),
    "volume": Architecture(
        Volume, ((1, 6, 6, 6),), floats=frozenset({"Conv", "FusedConv", "Relu", "MaxPool", "ReduceMean"}), exact=False
    ),
    "encoder": Architecture(TokenEncoder, ((6,),), tokens=20, floats=TOKENS | {"Mul"}, exact=False),
    "gpt": Architecture(Gpt, ((6,),), tokens=20, floats=TOKENS | {"Mul", "Where"}, exact=False),
    "vit": Architecture(VisionTransformer, floats=TOKENS, exact=False),
    "swin": Architecture(Swin, floats=TOKENS, exact=False),
    "lstm": Architecture(partial(Recurrent, nn.LSTM), ((5, 4),), floats=frozenset({"LSTM", "Relu"}), exact=False),
    "odd": Architecture(Odd),
    "arithmetic": Architecture(
        Arithmetic, floats=frozenset({"Add", "Sub", "Mul", "Div", "Concat", "GlobalAveragePool"}), exact=False
    ),
    "segmenter": Architecture(Segmenter, floats=frozenset({"Softmax"}), exact=False),
    "half": Architecture(Half),
    "slices": Architecture(Slices),
    "weight-norm": Architecture(weight_normed),
}
