"""One HTML file of many results: the answer first, then tables, pictures and timelines.

The file needs nothing else: plotly's script is in it, and its policy forbids the browser to load
anything. Without scripts, texts and tables are there. The same results give the same bytes.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moesim import __version__
from moesim.answers import interactive
from moesim.answers.documents import Document, points_of, read_document, understood
from moesim.answers.result import Result
from moesim.answers.sections import Section, sections_of
from moesim.answers.swept import Swept
from moesim.errors import InputError
from moesim.sim import metrics
from moesim.sim.timeline import timeline
from moesim.types import OUTCOMES

if TYPE_CHECKING:
    from moesim.answers.advise import Advice
    from moesim.answers.compare import Comparison

    Reported = Result | Comparison | Swept | Advice | Path | str


def report(
    results: "Reported | Sequence[Reported]", path: Path | str, title: str | None = None
) -> Path:
    """Write an HTML file about results: `moesim report`.

    Results are what `replay`, `compare`, `sweep` and `advise` return, and paths of what moesim's
    commands have written. A recorded replay is drawn as a timeline, too. Returns the path.

    Raises InputError for what is no result of moesim's, and without plotly and jinja2.
    """
    given = cast("Sequence[Reported]", results if isinstance(results, list | tuple) else [results])
    documents = [document for one in given for document in documents_of(one)]
    target = Path(path)
    write_whole(page(documents, title), target)
    return target


def documents_of(result: "Reported") -> list[Document]:
    """Return what is to be said of a result: its numbers and, of a recorded run, its timeline."""
    if isinstance(result, str | Path):
        return [read_document(Path(result))]
    name = type(result).__name__.lower()
    if isinstance(result, Swept):
        return [Document(name, points_of(result.rows(), name))]
    data = getattr(result, "data", None)
    if data is None:
        raise InputError(f"{result!r:.80} is no result; give a path, or what moesim returns")
    found = [Document(name, understood(data, name))]
    if isinstance(result, Result) and result.run.log is not None:
        events = understood(timeline(result.run), "the timeline")
        found.append(Document(f"of {result.data['policy']}", events))
    return found


def write_whole(text: str, path: Path) -> None:
    """Write a file, which appears whole or not."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        unfinished.replace(path)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def page(documents: Sequence[Document], title: str | None = None) -> str:
    """Return the HTML of a report; raise InputError if there is nothing to report on."""
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise InputError("reports need plotly and jinja2: pip install 'moesim[analysis]'") from None
    if not documents:
        raise InputError("a report needs results")
    sections = sections_of(documents)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = lambda plot: Markup(interactive.figure_json(plot))
    template = environment.from_string(
        files("moesim.answers").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    html: str = template.render(
        title=title or title_of(sections),
        version=__version__,
        sections=sections,
        plotly_js=Markup(get_plotlyjs()) if any(section.plots for section in sections) else "",
        definitions=definitions(),
        identity=[table for section in sections for table in section.identity],
    )
    return html


def title_of(sections: Iterable[Section]) -> str:
    """Return what the page is about, if it is about one model on one machine."""
    about = {section.about for section in sections if section.about is not None}
    if len(about) != 1:
        return "Expert offloading: results of moesim"
    model, hardware = about.pop()
    return f"Expert offloading of {model} on {hardware}"


def definitions() -> list[str]:
    """Return what the numbers mean, in the words of the module that defines them."""
    said = " ".join((metrics.__doc__ or "").split())
    said = said.replace("`types.OUTCOMES`", ", ".join(OUTCOMES)).replace("`", "")
    own = [line for line in re.split(r"(?<=\.) (?=[A-Z_a-z]+)", said)[1:] if line]
    waits = "; ".join(
        f"{name.replace('_', ' ')}: {what}" for name, what in metrics.WAITS_IN_WORDS.items()
    )
    return [
        *own,
        "tokens/s: generated tokens of all sequences over the makespan.",
        f"What the GPU waits for when it computes nothing is {waits}.",
        "Budget: GPU memory for experts, staging included.",
    ]
