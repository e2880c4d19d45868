"""moesim: which expert-offloading policy is fastest on this machine, for this model, and why.

The command line's answers are functions here: `moesim.replay(...)` and so on. They are loaded when
they are first used, so that importing moesim takes no time.
"""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.answers.advise import advise
    from moesim.answers.api import replay
    from moesim.answers.compare import compare
    from moesim.answers.report import report
    from moesim.answers.sweep import sweep
    from moesim.model import load_model
    from moesim.profile import load_profile
    from moesim.traces.importers import load_trace
    from moesim.traces.synthetic import synthesize

__version__ = version("moesim")

_PUBLIC = {
    "advise": "moesim.answers.advise",
    "compare": "moesim.answers.compare",
    "load_model": "moesim.model",
    "load_profile": "moesim.profile",
    "load_trace": "moesim.traces.importers",
    "replay": "moesim.answers.api",
    "report": "moesim.answers.report",
    "sweep": "moesim.answers.sweep",
    "synthesize": "moesim.traces.synthetic",
}
"""Where each public name lives."""

__all__ = [
    "__version__",
    "advise",
    "compare",
    "load_model",
    "load_profile",
    "load_trace",
    "replay",
    "report",
    "sweep",
    "synthesize",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
