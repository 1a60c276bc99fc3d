"""What is held open, and no more of it than a system allows a process."""

from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """At most ``limit`` values; for another one, that which was used longest ago goes.

    Args:
        limit: values held; 1,024 open files are all that many systems allow a process.
        drop: what is done to a value that goes; without it, it is only forgotten.
    """

    def __init__(self, limit: int, drop: Callable[[Value], object] | None = None) -> None:
        self._limit, self._drop = limit, drop
        self._held: dict[Key, Value] = {}  # the one used last is the last

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        """The value of a key; where it is not held, a new one."""
        if key in self._held:
            value = self._held.pop(key)
        else:
            if len(self._held) >= self._limit:
                self._forget(next(iter(self._held)))
            value = make()
        self._held[key] = value
        return value

    def values(self) -> Iterable[Value]:
        """All values held."""
        return self._held.values()

    def clear(self) -> None:
        """Hold nothing."""
        for key in list(self._held):
            self._forget(key)

    def _forget(self, key: Key) -> None:
        value = self._held.pop(key)
        if self._drop is not None:
            self._drop(value)
