"""What several commands share: settings, JSON, and sizes as people write them."""

import re
from typing import Any

import click

UNITS = {
    "": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip


def setting_pairs(settings: tuple[str, ...]) -> dict[str, str]:
    """Return `--set key=value` options as a dictionary; raise InputError for one without `=`."""
    from moesim.errors import InputError

    for setting in settings:
        if "=" not in setting:
            raise InputError(f"--set {setting}: write key=value, as link.h2d.bytes_per_s=55e9")
    return dict(setting.split("=", 1) for setting in settings)


def print_json(value: Any) -> None:
    """Print a value as JSON, the same bytes for the same value."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def size_bytes(text: str) -> int:
    """Return a size such as 8GiB, 24GB or 1000000 in bytes; raise InputError for anything else."""
    from moesim.errors import InputError

    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS:
        raise InputError(f"--budget {text}: write a size of 0 or more, as 8GiB, 24GB or 1000000")
    return round(float(match[1]) * UNITS[match[2].upper()])
