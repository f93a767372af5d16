"""A uniform sample of a stream whose length is not known beforehand."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Reservoir:
    """At most `capacity` items of all those offered, each subset as likely as any other.

    Every item draws a random key and the largest keys stay (Efraimidis and Spirakis 2006, all weights equal).
    """

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity = capacity
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._items: Tensor | None = None

    def offer(self, count: int, take: Callable[[Tensor], Tensor]) -> None:
        """Offer `count` items; `take` maps indices [K] of those that are kept to the items themselves [K, ...]."""
        keys = torch.cat([self._keys, torch.rand(count, generator=self._generator, dtype=torch.float64)])
        best = keys.topk(min(self.capacity, len(keys))).indices
        old, new = best[best < len(self._keys)], best[best >= len(self._keys)]
        fresh = take(new - len(self._keys))
        self._items = fresh if self._items is None else torch.cat([self._items[old], fresh])
        self._keys = keys[torch.cat([old, new])]

    @property
    def items(self) -> Tensor:
        """The sample [<= capacity, ...]; an error before anything was offered."""
        assert self._items is not None, "nothing was offered"
        return self._items
