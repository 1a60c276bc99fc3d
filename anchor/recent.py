"""Bounded LRU cache for open files and memory maps."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """LRU cache of at most ``limit`` values; a new value evicts the least recently used one.

    Args:
        limit: most values held. Many systems allow a process only 1,024 open files.
        drop: called with each evicted value; None only forgets it.
    """

    def __init__(self, limit: int, drop: Callable[[Value], object] | None = None) -> None:
        self._limit, self._drop = limit, drop
        self._held: dict[Key, Value] = {}  # least recently used first

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """Return the value of a key; call ``make`` if it is not held."""
        if key in self._held:
            value = self._held.pop(key)
        else:
            if len(self._held) >= self._limit:
                self._forget(next(iter(self._held)))
            value = make()
        self._held[key] = value
        return value

    def values(self) -> Iterable[Value]:
        """Return all held values."""
        return self._held.values()

    def clear(self) -> None:
        """Drop all values."""
        for key in list(self._held):
            self._forget(key)

    def _forget(self, key: Key) -> None:
        value = self._held.pop(key)
        if self._drop is not None:
            self._drop(value)
