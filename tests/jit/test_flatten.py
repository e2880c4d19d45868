"""A module's text holds all that its functions use, under names of their own."""

import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim.jit import compiled_as
from moesim.jit.flatten import NotCompilableError, flatten

FACTOR = 3
SHAPE = (2, (1.5, float("inf")))
TABLE = np.zeros(3)


def twice(x: int, by: int = FACTOR) -> int:
    """Return x times something."""
    y: int = x * by
    return y


def outer(x: int) -> float:
    # A comment that decides nothing.
    return twice(x) + twice(x, by=1) + FACTOR + SHAPE[1][0] + math.floor(math.sqrt(4.0))


def uses_a_table(x: int) -> float:
    return float(TABLE[x])


def loaded(text: str) -> dict[str, Any]:
    """Run a module's text as plain Python."""
    space: dict[str, Any] = {"jit": lambda function: function}
    exec(text, space)
    return space


def test_it_does_what_the_functions_do() -> None:
    flat = flatten([outer])
    assert loaded(flat.text)[flat.names[outer]](5) == outer(5)
    assert "comment" not in flat.text
    assert "Return x" not in flat.text


def test_constants_are_held_by_value() -> None:
    """So that another value is another text, and other machine code."""
    before = flatten([outer]).text
    assert "FACTOR = 3" in before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "FACTOR", 4)
        assert flatten([outer]).text != before


def test_equal_names_of_different_modules_are_kept_apart(tmp_path: Path) -> None:
    made = []
    for i, name in enumerate(("one", "two")):
        (tmp_path / f"{name}.py").write_text(f"N = {i + 1}\ndef f(x):\n    return x * N\n")
        module = ModuleType("same")
        module.__file__ = str(tmp_path / f"{name}.py")
        exec(compile((tmp_path / f"{name}.py").read_text(), module.__file__, "exec"), vars(module))
        made.append(module)

    def both(x: int) -> Any:
        return made_one.f(x) * 10 + made_two.f(x)

    made_one, made_two = made
    flat = flatten([both])
    assert loaded(flat.text)[flat.names[both]](1) == 12


def test_another_function_may_stand_in() -> None:
    def slow(x: int) -> int:
        return x + 1

    @compiled_as(slow)
    def fast(x: int) -> int:
        raise AssertionError

    def calls(x: int) -> int:
        return fast(x)

    flat = flatten([calls])
    assert loaded(flat.text)[flat.names[calls]](1) == 2
    flat = flatten([calls], {fast: "given"})
    space: dict[str, Any] = {"jit": lambda function: function, "given": lambda x: x + 5}
    exec(flat.text, space)
    assert space[flat.names[calls]](1) == 6


def test_what_cannot_be_written_down_is_refused_by_name() -> None:
    with pytest.raises(NotCompilableError, match=r"uses_a_table uses TABLE, a ndarray"):
        flatten([uses_a_table])
    space: dict[str, Any] = {}
    exec("def nowhere(x): return x", space)
    space["nowhere"].__module__ = "m"
    with pytest.raises(NotCompilableError, match=r"m\.nowhere is no plain function"):
        flatten([space["nowhere"]])


def test_locals_and_arguments_hide_what_has_their_name() -> None:
    def inner(FACTOR: int) -> int:  # noqa: N803
        FACTOR_2 = FACTOR + 1  # noqa: N806
        twofold: Any = lambda SHAPE: SHAPE * 2  # noqa: E731, N803
        return FACTOR_2 + int(twofold(FACTOR))

    def calls(x: int) -> int:
        entry = twice(x)
        numpy = 7
        return inner(entry) + FACTOR + numpy + int(np.abs(-x))

    flat = flatten([calls])
    assert loaded(flat.text)[flat.names[calls]](1) == calls(1)


def test_defaults_are_what_they_were() -> None:
    step = 1

    def moves(x: int, by: int = step, *rest: int, often: int = 2) -> int:
        return x + by * often

    step = 5
    flat = flatten([moves])
    assert loaded(flat.text)[flat.names[moves]](1) == moves(1) == 3

    def listed(x: int, items: list[int] = []) -> int:  # noqa: B006
        return x

    with pytest.raises(NotCompilableError, match="has a list as a default"):
        flatten([listed])


def test_a_file_that_was_edited_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "edited.py"
    texts = []
    for n in (1, 22):
        path.write_text(f"def f(x):\n    return x + {n}\n")
        module = ModuleType("edited")
        exec(compile(path.read_text(), str(path), "exec"), vars(module))
        texts.append(flatten([module.f]).text)
    assert "x + 1" in texts[0]
    assert "x + 22" in texts[1]


def test_functions_of_one_factory_are_kept_apart() -> None:
    def factory(n: int) -> Any:
        def add(x: int) -> int:
            return x + n

        return add

    one, two = factory(1), factory(2)

    def both(x: int) -> Any:
        return one(x) * 10 + two(x)

    flat = flatten([both])
    assert loaded(flat.text)[flat.names[both]](0) == 12
