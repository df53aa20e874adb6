"""Digests of tensors, and of a graph: the same for graphs that compute the same from the same constants.

Must not know: what graphs are for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from calibrators.graph.aten import constant

__all__ = ["digest_of", "graph_digest"]


def graph_digest(graph: fx.GraphModule) -> str:
    """Return the sha256 of a graph's code and of every constant that it reads."""
    constants = graph.graph.find_nodes(op="get_attr")
    return digest_of(graph.code, ((str(node.target), constant(graph, node)) for node in constants))


def digest_of(text: str, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the sha256 of a text and of tensors with their names, types and shapes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in tensors:
        values = tensor.detach().cpu()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
