"""Dividing records into two sets, so that nothing of one is known from the other."""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterable


class Splitter:
    """Records that share a key, directly or through others, stay together.

    `add` each record with its keys, in order, then `divide`.
    """

    def __init__(self) -> None:
        self._parents: list[int] = []  # of each record: itself, or an earlier one that it stays with
        self._first: dict[Hashable, int] = {}  # the first record with a key

    def add(self, keys: Iterable[Hashable]) -> None:
        """Take in one more record."""
        number = len(self._parents)
        self._parents.append(number)
        for key in keys:
            self._parents[self._root(number)] = self._root(self._first.setdefault(key, number))

    def divide(self, share: float, seed: int) -> list[bool]:
        """For each record, whether it is in the first set: groups by lot, as near to `share` as they fit."""
        groups = defaultdict(list)
        for number in range(len(self._parents)):
            groups[self._root(number)].append(number)
        drawn = list(groups.values())
        random.Random(seed).shuffle(drawn)
        first, left = [False] * len(self._parents), share * len(self._parents)
        for group in drawn:
            if abs(left - len(group)) < abs(left):
                left -= len(group)
                for number in group:
                    first[number] = True
        return first

    def _root(self, number: int) -> int:
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number
