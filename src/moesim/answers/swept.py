"""What came of a sweep: a row per point, the best ones, and what is worth its memory."""

from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from moesim.answers.grid import Grid, text_of
from moesim.answers.store import Row, Store, imported, kinds_of, table_of
from moesim.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

SPEED, MEMORY = "tokens_per_s", "run.budget_bytes"
"""What is wanted, and what it costs: generated tokens per second, GPU memory for experts."""
SHOWN = ("run.policy", SPEED, "ttft_ms", "tpot_ms", MEMORY, "why", "notices")
"""Results that the summary needs of every point."""


class Swept:
    """The results of a sweep: a row per point, the best one, and what is worth its memory."""

    def __init__(self, grid: Grid, store: Store, digests: Sequence[str], earlier: int) -> None:
        """Take a sweep whose points are all finished, some of them earlier."""
        self.grid, self.store, self.digests, self.earlier = grid, store, digests, earlier
        self.failed: list[Row] = []
        """Rows of the points that cannot run: swept keys, `point` and `error`."""
        self.good: list[Row] = []
        """Of all others swept keys, `point` and `SHOWN`."""
        self.kinds = kinds_of(map(self.noted, self.rows()))

    def noted(self, row: Row) -> Row:
        """Keep what the summary needs of a row, and return it."""
        keys = (*self.grid.keys, "point", *(("error",) if row["error"] else SHOWN))
        (self.failed if row["error"] else self.good).append({key: row[key] for key in keys})
        return row

    def rows(self) -> Iterator[Row]:
        """Return a row per point, in the grid's order: swept keys, `point`, `error`, results.

        Keys and units of results are those of `moesim replay --json`, joined by dots;
        `run.policy` is the policy with its parameters.
        """
        for values, name in zip(self.grid.swept(), self.digests, strict=True):
            if not name:
                continue
            found = self.store.read(name)
            if found is None:
                raise InputError(f"{self.store.path(name)} is gone; the same command restores it")
            row = {**values, "point": name, "error": found.error or None}
            result = found.row or {}
            yield row | {"run.policy" if k == "policy" else k: v for k, v in result.items()}

    def frame(self) -> "pd.DataFrame":
        """Return everything as a table; see `rows`. Raises InputError without pandas."""
        return framed(self.kinds, list(self.rows()))

    def fastest(self) -> Row | None:
        """Return what `good` has of the point with the most tokens per second."""
        return max(self.good, key=lambda row: float(row[SPEED]), default=None)

    def best(self) -> Row | None:
        """Return the row of the point with the most tokens per second; None if all failed."""
        found = self.fastest()
        if found is None:
            return None
        return next(row for row in self.rows() if row["point"] == found["point"])

    def pareto(self) -> "pd.DataFrame":
        """Return the points that no other one beats in tokens/s with as little GPU memory.

        That is the budget for experts. Least memory comes first. Raises InputError without pandas.
        """
        rows = front(self.good)
        return framed(kinds_of(rows), rows)

    def by_policy(self) -> list[Row]:
        """Return the best point of each policy, the fastest first, and how often it is that.

        `share` is its speed over the fastest's. `fastest_in` of `compared_in`: among the points
        that differ in nothing but the policy.
        """
        best: dict[str, Row] = {}
        alike: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
        for row in sorted(self.good, key=lambda row: -float(row[SPEED])):
            best.setdefault(row["run.policy"], row)
            setting = tuple(row[key] for key in self.others)
            alike[setting].setdefault(row["run.policy"], row[SPEED])
        wins: Counter[str] = Counter()
        met: Counter[str] = Counter()
        for speeds in alike.values():
            most = max(speeds.values())
            met.update(list(speeds))
            wins.update([policy for policy, speed in speeds.items() if speed == most])
        most = max((float(row[SPEED]) for row in best.values()), default=1.0)
        return [
            row
            | {
                "share": row[SPEED] / most,
                "fastest_in": wins[policy],
                "compared_in": met[policy],
            }
            for policy, row in best.items()
        ]

    @property
    def data(self) -> dict[str, Any]:
        """Everything that `moesim sweep --json` prints."""
        return {
            "points": len(self.good) + len(self.failed),
            "done_before": self.earlier,
            "axes": axes_of(self.grid),
            "fixed": self.grid.fixed,
            "best": self.best(),
            "policies": self.by_policy(),
            "pareto": {"more": SPEED, "less": MEMORY, "points": front(self.good)},
            "failed": self.failed,
        }

    @property
    def others(self) -> list[str]:
        """Swept keys, without the policy and its parameters."""
        return [key for key in self.grid.keys if key.partition(".")[0] != "policy"]

    def setting(self, row: Row, without: Container[str] = ()) -> str:
        """Return what a point is of all that was swept but its policy, and some keys."""
        keys = (key for key in self.others if key not in without)
        return ", ".join(f"{key} {text_of(row[key])}" for key in keys)

    def __repr__(self) -> str:
        """Return the answer in two lines."""
        best = self.fastest()
        failed = f", {len(self.failed)} failed" if self.failed else ""
        if best is None:
            return f"none of {len(self.failed)} points can run\n{self.failed[0]['error']}"
        return (
            f"{best['run.policy']}: {best[SPEED]:.2f} tokens/s, the fastest of "
            f"{len(self.good) + len(self.failed)} points{failed}\n{self.setting(best)}"
        )

    def _repr_html_(self) -> str:
        """Return the answer and the best point of each policy, for notebooks."""
        first, _, second = repr(self).partition("\n")
        rows = "".join(
            f"<tr><td>{escape(row['run.policy'])}</td><td>{row[SPEED]:.2f}</td>"
            f"<td>{row['fastest_in']} of {row['compared_in']}</td>"
            f"<td>{row[MEMORY] / 2**30:.2f}</td><td>{escape(self.setting(row))}</td></tr>"
            for row in self.by_policy()
        )
        return (
            f"<p><b>{escape(first)}</b><br>{escape(second)}</p><table><tr><th>policy</th>"
            f"<th>tokens/s</th><th>fastest in</th><th>GiB</th><th>at</th></tr>{rows}</table>"
        )


def axes_of(grid: Grid) -> list[dict[str, list[Any]]]:
    """Return the lists of a grid, those that go together in one dictionary."""
    return [
        {key: [value[at] for value in axis.values] for at, key in enumerate(axis.keys)}
        for axis in grid.axes
    ]


def front(rows: Sequence[Row], more: str = SPEED, less: str = MEMORY) -> list[Row]:
    """Return the rows that no other one dominates, by `less` ascending.

    One dominates another if it has at least as much of `more` and at most as much of `less`, and
    is not the same in both.
    """
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row[less], -row[more])):
        if not found or row[more] > found[-1][more] or same(row, found[-1], more, less):
            found.append(row)
    return found


def same(one: Row, other: Row, *keys: str) -> bool:
    """Say whether two rows agree in some keys."""
    return all(one[key] == other[key] for key in keys)


def framed(kinds: dict[str, str], rows: Sequence[Row]) -> "pd.DataFrame":
    """Return rows as a pandas table of such columns; raise InputError without pandas."""
    imported("pandas")
    return table_of(kinds, rows).to_pandas()
