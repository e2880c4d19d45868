"""Policies and causes can be told apart, by colour and without, and always look the same."""

import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from moesim import colours
from moesim.colours import OTHER, Look, colour_of, kind_colour, look_of
from moesim.policies.registry import BUILTIN
from moesim.sim.metrics import TIMES
from moesim.types import CAUSES, COPY_IN, KINDS, FloatArray

VISION = {
    "normal": np.eye(3),
    # Machado, Oliveira and Fernandes (2009), table 1, severity 1.0, of linear RGB
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}
EVERY = [*BUILTIN, "dali:cache=lru", "dali:swap=guarded", "lru:x=1", "my-own", "folder/mine.py"]


def linear(colour: str) -> FloatArray:
    """Return the linear RGB of a colour in sRGB (IEC 61966-2-1)."""
    value = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb: FloatArray) -> FloatArray:
    """Return CIELAB of linear RGB, white being D65."""
    to_xyz = np.array(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def delta_e(one: str, other: str, vision: str) -> float:
    """Return the distance of two colours (CIE 1976) for an eye."""
    first, second = (lab(VISION[vision] @ linear(colour)) for colour in (one, other))
    return float(np.linalg.norm(first - second))


def test_the_distance_is_that_of_known_colours() -> None:
    assert delta_e("#FFFFFF", "#000000", "normal") == pytest.approx(100, abs=0.01)
    red = [53.24, 80.09, 67.20]
    assert lab(linear("#FF0000")) == pytest.approx(np.array(red), abs=0.05)
    assert delta_e("#888888", "#888888", "deuteranopia") == 0


def test_every_policy_that_ships_has_its_own_look() -> None:
    assert set(colours.BUILTIN) == set(BUILTIN)
    looks = [look_of(name) for name in BUILTIN]
    assert len({(look.marker, look.dashes) for look in looks}) == len(looks)  # in grey
    assert len({(look.colour, look.marker) for look in looks}) == len(looks)  # without lines


@pytest.mark.parametrize("vision", VISION)
def test_the_colours_of_policies_are_far_apart(vision: str) -> None:
    for one, other in itertools.combinations(colours.PALETTE, 2):
        assert delta_e(one, other, vision) > 15, (one, other)


def test_parameters_change_the_line_and_not_the_colour() -> None:
    plain, cached = look_of("dali"), look_of("dali:cache=lru")
    assert cached.colour == plain.colour == colour_of("dali:swap=guarded")
    assert cached.dashes != plain.dashes
    assert cached != look_of("dali:swap=guarded")
    assert {look.dashes for look in colours.BUILTIN.values()}.isdisjoint(colours.VARIANTS)


@pytest.mark.parametrize("policy", EVERY)
def test_a_look_is_one_that_both_libraries_can_draw(policy: str) -> None:
    from matplotlib.lines import Line2D
    from plotly.graph_objects import Scatter

    look = look_of(policy)
    assert re.fullmatch("#[0-9A-F]{6}", look.colour)
    line = Line2D([], [], color=look.colour, marker=look.marker, linestyle=look.line)
    assert line.is_dashed() == bool(look.dashes)
    Scatter(marker={"symbol": look.symbol}, line={"dash": look.dash()})


def test_dashes_are_in_pixels_for_plotly() -> None:
    assert Look("#000000", "o", (5.0, 1.5)).dash(2) == "10px,3px"
    assert Look("#000000", "o", ()).dash() == "solid"


def test_a_policy_looks_the_same_in_every_process() -> None:
    code = "import sys\nfrom moesim.colours import look_of\nprint(*map(look_of, sys.argv[1:]))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, *EVERY], check=True, stdout=subprocess.PIPE,
            env={"PYTHONHASHSEED": seed},
        ).stdout.decode().strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert seen == {" ".join(map(str, map(look_of, EVERY)))}


def test_everything_that_takes_time_has_a_colour() -> None:
    kinds = {*KINDS, *CAUSES[1:], *TIMES} - {KINDS[COPY_IN]}
    assert all(kind_colour(kind) != OTHER for kind in kinds)
    assert kind_colour("other work") == OTHER


@pytest.mark.parametrize("vision", VISION)
def test_causes_of_time_differ_wherever_they_may_touch(vision: str) -> None:
    """Small ones are left out of a bar, so that any two of work, or of waits, may be neighbours."""
    for waits in (False, True):
        shown = [kind_colour(cause) for cause in TIMES if cause.startswith("wait_") == waits]
        for one, other in itertools.combinations([*shown, OTHER], 2):
            assert delta_e(one, other, vision) > 15, (one, other)
