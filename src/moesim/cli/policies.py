"""`moesim policies`: what policies there are."""

from typing import Any

import click

from moesim.cli.common import print_json


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the policies, their parameters, defaults and sources."""
    import inspect

    from moesim.policies.registry import load_class, names, parameters_of

    rows: list[dict[str, Any]] = []
    for name in names():
        cls = load_class(name)
        rows.append(
            {
                "name": name,
                "parameters": [
                    {"name": p.name, "legal": p.legal, "default": p.default}
                    for p in parameters_of(cls)
                ],
                "defaults": {p.name: p.default for p in parameters_of(cls)},
                "source": inspect.getdoc(cls) or "",
                "notes": inspect.getdoc(cls.new) or "",  # type: ignore[attr-defined]
            }
        )
    if as_json:
        print_json(rows)
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for row in rows:
        summary = row["source"].partition("\n")[0]
        console.print(f"[bold]{row['name']}[/]  {summary}")
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 4))
        for parameter in row["parameters"]:
            default = parameter["default"]
            shown = str(default).lower() if isinstance(default, bool) else str(default)
            table.add_row(parameter["name"], f"= {shown}", parameter["legal"])
        console.print(table)
        for paragraph in row["notes"].split("\n\n"):
            console.print(Padding(Text(" ".join(paragraph.split())), (0, 0, 0, 4)))
        console.print()
    console.print("Use as: --policy dali:prefetch_size=2,cache=lru   Sources in full: --json")
