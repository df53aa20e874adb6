"""The digest of a graph: the same for graphs that compute the same from the same constants.

Must not know: what graphs are for.
"""

from __future__ import annotations

import hashlib

import torch
from torch import fx

from calibrators.graph.aten import constant

__all__ = ["graph_digest"]


def graph_digest(graph: fx.GraphModule) -> str:
    """Return the sha256 of a graph's code and of every constant that it reads."""
    digest = hashlib.sha256(graph.code.encode())
    for node in graph.graph.find_nodes(op="get_attr"):
        values = constant(graph, node).detach().cpu()
        digest.update(f"{node.target} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
