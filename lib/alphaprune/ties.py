"""Which channels must be kept or dropped together: union-find over channel ids."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Ties:
    """Ids for channels, and which of them are one and the same.

    An id stands for one output channel of a layer. Two channels that meet in an addition are tied: they are kept
    or dropped together. A class of tied ids is named by one of them, its root.
    """

    def __init__(self):
        self._parent: list[int] = []
        self._table: Tensor | None = None  # of roots, while nothing changes

    def new(self, count: int) -> Tensor:
        """`count` fresh ids, tied to nothing."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        self._table = None
        return torch.arange(first, first + count)

    @property
    def all(self) -> Tensor:
        """Every id."""
        return torch.arange(len(self._parent))

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Tie ids place by place; `a` and `b` have the same number of them."""
        for i, j in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True):
            self._parent[self._root(j)] = self._root(i)
        self._table = None

    def roots(self, ids: Tensor) -> Tensor:
        """The name of each id's class."""
        if self._table is None:
            self._table = torch.tensor([self._root(i) for i in range(len(self._parent))], dtype=torch.long)
        return self._table[ids.flatten()]

    def _root(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i


def atoms(constraints: list[tuple[Tensor, int]]) -> list[Tensor]:
    """Partition classes of channels into the finest sets that every layer sees as a whole.

    Args:
        constraints: for each layer the roots of its channels in order, and into how many equal blocks it divides
            them (groups of a convolution; 1 otherwise). Each block must lose the same share of its channels.

    Returns:
        The sets, each a tensor of roots in the order of their first appearance.
    """
    seen: dict[int, set[tuple[int, int]]] = defaultdict(set)
    for i, (roots, blocks) in enumerate(constraints):
        size = max(len(roots) // blocks, 1)
        for position, root in enumerate(roots.tolist()):
            seen[root].add((i, position // size))
    sets: dict[frozenset[tuple[int, int]], list[int]] = defaultdict(list)
    for root, signature in seen.items():
        sets[frozenset(signature)].append(root)
    return [torch.tensor(s) for s in sets.values()]
