"""Random choices that are the same everywhere: Python keeps the stream of `random.Random(integer).random()` fixed."""

import random
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

Item = TypeVar("Item")


class Dice:
    """Random choices that depend on the key alone, whatever the machine and Python version."""

    def __init__(self, *key: object) -> None:
        digest = sha256("\0".join(map(str, key)).encode()).digest()
        self.random = random.Random(int.from_bytes(digest[:8], "big")).random

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def between(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self.random() * len(items))]

    def sample(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different items, in random order."""
        pool = list(items)
        return [pool.pop(int(self.random() * len(pool))) for _ in range(count)]
