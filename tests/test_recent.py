"""Invariants: never more values than allowed; what was used longest ago goes first, and is closed; what is held is not
made again.
"""

from hypothesis import given
from hypothesis import strategies as st

from anchor.recent import Recent


@given(st.lists(st.integers(0, 6), max_size=40), st.integers(1, 4))
def test_the_values_used_last_are_held_and_the_others_closed(keys: list[int], limit: int) -> None:
    open_now: list[int] = []

    def make(key: int) -> int:
        open_now.append(key)
        return key

    recent: Recent[int, int] = Recent(limit, open_now.remove)
    for number, key in enumerate(keys):
        assert recent.get(key, lambda key=key: make(key)) == key
        last = list(dict.fromkeys(reversed(keys[: number + 1])))[:limit]
        assert sorted(open_now) == sorted(recent.values()) == sorted(last)
        assert len(recent) == len(last)
    recent.clear()
    assert not open_now
