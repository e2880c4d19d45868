"""Compile what is written as plain Python, with Numba: the one place that knows it."""

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled_as(other: Callable[..., Any]) -> Callable[[Function], Function]:
    """Let another function take this one's place in compiled code.

    For what is fast one way in Python and another way compiled; both must do the same.
    """

    def mark(function: Function) -> Function:
        function.compiled_as = other  # type: ignore[attr-defined]
        return function

    return mark
