"""What the library returns of one replay: numbers by name, tables, a picture, the timeline."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import InputError
from moesim.sim.metrics import by_step, explain, summarize
from moesim.sim.replay import Replayed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class Result:
    """One replay. `data` holds everything that `moesim replay --json` prints."""

    def __init__(self, run: Replayed) -> None:
        """Take a finished run."""
        self.run = run
        self.data: dict[str, Any] = summarize(run)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, of all sequences."""
        return float(self.data["tokens_per_s"])

    @property
    def ttft_ms(self) -> float:
        """Time to the first token: the step that forwards the prompts."""
        return float(self.data["ttft_ms"])

    @property
    def tpot_ms(self) -> float | None:
        """Time per token after the first, the mean over sequences; None if there is none."""
        tpot: float | None = self.data["tpot_ms"]
        return tpot

    @property
    def makespan_ns(self) -> int:
        """From the start to the last token."""
        return int(self.data["makespan_ns"])

    @property
    def hit_rate(self) -> float | None:
        """Share of experts in decode whose weights were there in time; None without decode."""
        rate: float | None = self.data["hit_rate"]
        return rate

    @property
    def why(self) -> str:
        """What the GPU did, or waited for, most of the time."""
        return explain(self.data)

    def frame(self) -> "pd.DataFrame":
        """Return one row per step: phase, tokens, ns from begin to end and by cause, bytes."""
        return frame_of(by_step(self.run))

    def plot(self) -> "Figure":
        """Return a picture of where the time went; notebooks show it, `savefig` writes it.

        Of a run that was recorded it has the lanes in a few layers of a step, too: see
        `plots.lanes`. Raises InputError without matplotlib.
        """
        from moesim.answers.plots import run_figure

        return run_figure(self.run)

    def timeline(self, path: str | Path) -> None:
        """Write a Chrome trace for Perfetto (.json or .json.gz).

        Raises InputError if the run was not recorded: `replay(..., record=True)`.
        """
        from moesim.sim.timeline import write_timeline

        if self.run.log is None:
            raise InputError("a timeline needs a recorded run: replay(..., record=True)")
        write_timeline(self.run, Path(path))

    def __repr__(self) -> str:
        """Return the answer in two lines."""
        tpot = "-" if self.tpot_ms is None else f"{self.tpot_ms:.2f} ms"
        return (
            f"{self.data['policy']}: {self.tokens_per_s:.2f} tokens/s, TTFT {self.ttft_ms:.1f} ms, "
            f"TPOT {tpot}\n{self.why}"
        )

    def _repr_html_(self) -> str:
        """Return the answer and where the time went, for notebooks."""
        first, _, second = repr(self).partition("\n")
        total = self.makespan_ns
        rows = "".join(
            f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{ns / 1e6:.1f}</td>"
            f"<td>{ns / total:.1%}</td></tr>"
            for name, ns in self.data["time_ns"].items()
            if ns
        )
        return (
            f"<p><b>{html.escape(first)}</b><br>{html.escape(second)}</p>"
            f"<table><tr><th>time</th><th>ms</th><th>share</th></tr>{rows}</table>"
        )


def frame_of(rows: list[dict[str, Any]]) -> "pd.DataFrame":
    """Return rows as a table; raise InputError without pandas."""
    try:
        import pandas as pd
    except ImportError:
        raise InputError("tables need pandas: pip install 'moesim[analysis]'") from None
    return pd.DataFrame(rows)
