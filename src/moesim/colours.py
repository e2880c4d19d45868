"""How policies, and what a machine does, look: the same in every picture, table and report.

Policies differ in colour and, for grey paper and eyes that see fewer colours, in marker and dashes.
The colours of policies are those of Okabe and Ito (2008) without their yellow, which vanishes on
white; those of work are cool and those of waits warm, so that the two can be told apart.
"""

import zlib
from typing import NamedTuple

BLUE, VERMILION, GREEN, ORANGE, SKY, PURPLE, BLACK = PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#000000",
)  # fmt: skip

SYMBOLS = {
    "o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down",
    "P": "cross", "X": "x", "*": "star", "<": "triangle-left", ">": "triangle-right",
    "p": "pentagon", "h": "hexagon",
}  # fmt: skip
"""Markers as matplotlib has them, and their names in plotly."""

SOLID, DASHED, DOTTED = (), (5.0, 2.0), (1.5, 1.5)
VARIANTS = ((6.0, 1.5, 1.5, 1.5), (6.0, 1.5, 1.5, 1.5, 1.5, 1.5), (9.0, 2.0), (3.0, 4.0))
"""Dashes of policies with parameters, and of those that do not ship with moesim."""


class Look(NamedTuple):
    """What a policy is drawn with."""

    colour: str
    """As `#RRGGBB`."""
    marker: str
    """One of `SYMBOLS`."""
    dashes: tuple[float, ...]
    """Lengths drawn and left out, in widths of the line; none of them: a solid line."""

    @property
    def line(self) -> str | tuple[int, tuple[float, ...]]:
        """The line style, for matplotlib."""
        return (0, self.dashes) if self.dashes else "-"

    @property
    def symbol(self) -> str:
        """The marker, for plotly."""
        return SYMBOLS[self.marker]

    def dash(self, width: float = 2) -> str:
        """Return the line style for plotly, of a line so many pixels wide."""
        return ",".join(f"{length * width:g}px" for length in self.dashes) or "solid"


BUILTIN = {
    "dali": Look(VERMILION, "o", SOLID),
    "hybrimoe": Look(BLUE, "s", SOLID),
    "moepic": Look(GREEN, "^", SOLID),
    "lru": Look(ORANGE, "D", SOLID),
    "static": Look(SKY, "v", SOLID),
    "fate": Look(PURPLE, "P", SOLID),
    "oracle": Look(BLACK, "*", SOLID),
    "fiddler": Look(BLUE, "o", DASHED),
    "klotski": Look(VERMILION, "s", DASHED),
    "mixtral-offloading": Look(ORANGE, "^", DASHED),
    "moe-infinity": Look(GREEN, "D", DASHED),
    "all-gpu": Look(SKY, "P", DASHED),
    "pregated": Look(PURPLE, "v", DASHED),
    "on-demand": Look(BLACK, "X", DASHED),
    "ktransformers": Look(GREEN, "o", DOTTED),
    "adapmoe": Look(ORANGE, "s", DOTTED),
    "flexgen": Look(VERMILION, "^", DOTTED),
    "moe-lightning": Look(BLUE, "D", DOTTED),
    "all-cpu": Look(PURPLE, "X", DOTTED),
    "huang": Look(SKY, "*", DOTTED),
    "belady": Look(BLACK, "P", DOTTED),
}
"""No two share marker and dashes, nor colour and marker."""

KINDS = {
    "attention": "#2A6BA8",
    "gate": "#A9CCF5",
    "predict": "#5A45C0",
    "shared": "#4FB07A",
    "expert_gpu": "#0B5A2A",
    "combine": "#BFE08A",
    "head": "#352C55",
    "move": "#6C93DA",
    "resize": "#3F7E6C",
    "expert_cpu": "#F5C518",
    "attention_cpu": "#A88400",
    "demand": "#C9540A",
    "prefetch": "#F4B183",
    "swap": "#9467BD",
    "return": "#E8A0C4",
    "kv_in": "#FBEBB0",
    "dense_in": "#5E1F0C",
    "send": "#B84A7F",
    "kv_out": "#FBEBB0",
    "disk_read": "#D65DB1",
    "pause": "#7A2E5D",
}
"""Operations by kind; copies of experts by cause."""

WAITS = {
    "wait_weights": KINDS["demand"],
    "wait_cpu": KINDS["expert_cpu"],
    "wait_host": KINDS["pause"],
    "wait_kv": KINDS["kv_in"],
    "wait_dense": KINDS["dense_in"],
    "wait_disk": KINDS["disk_read"],
}
"""A wait has the colour of what is waited for."""

OTHER = "#C8C8C8"
"""What is no cause of its own."""


def look_of(policy: str) -> Look:
    """Return how a policy is drawn, the same for the same text everywhere.

    With parameters, as in `dali:cache=lru`, it has the colour of the policy without, and dashes and
    a marker of its own; so has a policy that does not ship with moesim, and a colour by its name.
    """
    name, _, parameters = policy.partition(":")
    if not parameters and name in BUILTIN:
        return BUILTIN[name]
    number = zlib.crc32(policy.encode())
    number, dashes = divmod(number, len(VARIANTS))
    marker = list(SYMBOLS)[number % len(SYMBOLS)]
    return Look(colour_of(name), marker, VARIANTS[dashes])


def colour_of(policy: str) -> str:
    """Return a policy's colour as `#RRGGBB`, whatever its parameters."""
    name = policy.partition(":")[0]
    if name in BUILTIN:
        return BUILTIN[name].colour
    return PALETTE[zlib.crc32(name.encode()) % len(PALETTE)]


def kind_colour(kind: str) -> str:
    """Return the colour of an operation by its kind, of a copy by its cause, or of a wait.

    They are the names of `types.KINDS` and `types.CAUSES` and the keys of `time_ns`; anything else
    is grey.
    """
    return KINDS.get(kind) or WAITS.get(kind, OTHER)
