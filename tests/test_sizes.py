"""Sizes are read as people write them."""

import pytest

from moesim.sizes import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0), ("1000000", 10**6), ("24GB", 24 * 10**9), ("8GiB", 8 << 30), ("1.5 mib", 3 << 19),
        (" 2kB ", 2000), ("", None), ("GiB", None), ("-1", None), ("1e9", None), ("4 apples", None),
        ("1,5GiB", None), ("9999999999999", None), ("nan", None),
    ],
)  # fmt: skip
def test_a_size_has_a_unit_or_is_in_bytes(text: str, size: int | None) -> None:
    assert parse_size(text) == size
