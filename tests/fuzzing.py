"""Damage to files: hostile values, and checks that nothing but InputError comes out of it."""

import contextlib
import json
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gidd_jax.errors import InputError

DEEP = 100_000  # nested deeper than Python's recursion goes
HOSTILE = [
    *(None, True, -1, 0, 1, (1 << 31) - 1, 1 << 63, 10**400),
    *(0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "\ud800", "\0", "..", "../escaped", "/escaped", "a/../../escaped"),
    *([], [0], ["x"], {}, {"x": 0}, [[[]]]),
]
NESTED = [b"[" * DEEP, b'{"a":' * DEEP]
BYTES = [b"", b"\0" * 64, b"\xff\xfe\xfd", *NESTED, b"null", b"[]", b"{}", b"3"]


def fuzz(check: Callable[[Any], object], strategy: st.SearchStrategy, count: int = 25) -> None:
    """Run `check` on examples that are the same in every run."""
    settings(max_examples=count, deadline=None, derandomize=True, database=None)(
        given(strategy)(check)
    )()


def only_input_error(read: Callable[[], object]) -> None:
    with contextlib.suppress(InputError):
        read()


@st.composite
def damaged(draw: st.DrawFn, valid: bytes) -> bytes:
    """Bytes in place of a valid file: others, a part of it, some changed, or JSON with one value
    replaced or missing."""
    place = st.integers(0, len(valid) - 1)
    kind = draw(st.sampled_from(["other", "cut", "changed", "json", "json"]))
    if kind == "other":
        return draw(st.sampled_from(BYTES) | st.binary(max_size=64))
    if kind == "cut":
        return valid[: draw(place)]
    if kind == "json":
        try:
            return json.dumps(draw(altered(json.loads(valid)))).encode()
        except ValueError:
            pass
    start, length = draw(place), draw(st.integers(0, 8))
    return valid[:start] + draw(st.binary(max_size=8)) + valid[start + length :]


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """JSON with a hostile value in place of one in it, or without it."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from(HOSTILE))
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    other = value.copy()
    if draw(st.integers(0, 9)) == 0:
        del other[key]
    else:
        other[key] = draw(altered(value[key]))
    return other
