"""Sizes as people write them."""

import re

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def parse_size(text: str) -> int | None:
    """Return a size such as 8GiB, 24GB or 1000000 in bytes, None for anything else."""
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        return None
    return round(float(match[1]) * UNITS[match[2].upper()])


def size_in_words(size_bytes: int) -> str:
    """Return a size in GiB or, below one, in MiB."""
    if size_bytes >= UNITS["GIB"]:
        return f"{size_bytes / UNITS['GIB']:.2f} GiB"
    return f"{size_bytes / UNITS['MIB']:.2f} MiB"
