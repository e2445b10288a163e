"""Products of one row with small matrices, as loops that a compiler writes out.

A step of a small model multiplies one row by dozens of small matrices. A library is called for
each, and a call takes as long as the product; written as a sum it becomes part of the loops around
it. Large matrices stay with the library, which reads several columns at a time
(:mod:`rxlm.rxt.decode_layout`).

A pass over the graph that ``torch.compile`` is about to turn into C++; float32 only, where a sum
of products has no other precision than the library's.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, Node

SMALL = 300_000
"""Elements up to which a matrix is small: about what a core's own cache holds."""


@functools.cache
def small_products_pass() -> Any:
    """Return :func:`sum_small_products` as inductor wants it, with a name for its cache."""
    # Not at the top: inductor takes a second to import.
    from torch._inductor.custom_graph_pass import CustomGraphPass

    class SmallProducts(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            sum_small_products(graph)

        def uuid(self) -> str:
            return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

    return SmallProducts()


def sum_small_products(graph: Graph) -> None:
    """Replace ``mm`` and ``addmm`` of one row and a small float32 matrix by sums, in place."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        _replace(graph, node, None, *node.args)
    for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
        if not node.kwargs:  # beta and alpha are 1
            _replace(graph, node, *node.args)
    graph.lint()


def _replace(graph: Graph, node: Node, bias: Any, row: Any, matrix: Any) -> None:
    shape, dtype = matrix.meta["val"].shape, matrix.meta["val"].dtype
    if row.meta["val"].shape[0] != 1 or shape.numel() > SMALL or dtype != torch.float32:
        return
    aten = torch.ops.aten

    def insert(function: Any, *arguments: Any) -> Node:
        new = graph.call_function(function, arguments)
        values = (part.meta["val"] if isinstance(part, Node) else part for part in arguments)
        new.meta["val"] = function(*values)
        return new

    with graph.inserting_before(node):
        # [out, in] as the parameter lies in memory: the sum runs along it.
        products = insert(aten.mul.Tensor, insert(aten.permute.default, matrix, [1, 0]), row)
        result = insert(aten.unsqueeze.default, insert(aten.sum.dim_IntList, products, [1]), 0)
        if bias is not None:
            result = insert(aten.add.Tensor, result, bias)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
