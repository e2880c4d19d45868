"""The host program and the fast machine, compiled together; and the hooks of a policy.

The host is compiled once for all policies: it calls hooks by their addresses. So a new policy costs
the compilation of its hooks alone, and both are kept in the user's folder (`jit.store`).
"""

import ctypes
import inspect
import time
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

import moesim.machine as verbs
from moesim.errors import MoesimError
from moesim.host import call_hook, run_steps
from moesim.jit.flatten import NotCompilableError, flatten
from moesim.jit.store import Stored, load, note, place, record_of
from moesim.machine import Machine
from moesim.policies.api import HOOKS
from moesim.sim.compiled_machine import STUCK, Lanes, deadlock, drain, grow
from moesim.state import OK, Host
from moesim.types import IntArray

ENGINE_OPTIONS = '_nrt=False, error_model="numpy"'
"""Nothing is allocated, so nothing is counted; the host divides by nothing that may be 0."""

HOOK_OPTIONS = "boundscheck=True"
"""A policy that reads beyond an array gets an error, not the machine's memory."""

PREAMBLE = """\
import numba
from moesim.jit.structs import call_at, call_back, constructor, inner

jit = inner({options})
entry = numba.njit({options}, nogil=True, cache=True)
"""

OUTSIDE = """
@jit
def call_hook(policy, hook, view, plan):
    call_at(policy[hook + 1], policy[0], view, plan)


@jit
def call_grow(machine, table):
    return call_back(machine.callback, table)
"""


def run_range(machine: Machine, policy: Any, host: Host, first: int, last: int) -> int:
    """Run steps, and after the last one let finish what is still under way."""
    rule = run_steps(machine, policy, host, first, last)
    if rule == OK and last == len(host.steps.phase):
        drain(machine)
    return rule


@cache
def engine_module() -> Stored:
    """Return the module of the host program and the machine."""
    named = ("begin", "submit", "wait", "done", "pause", "cancel", "promote", "route", "predict")
    replaced: dict[Any, Any] = {getattr(verbs, name): getattr(Lanes, name) for name in named}
    replaced |= {call_hook: "call_hook", grow: "call_grow"}
    flat = flatten([run_range], replaced)
    name = flat.names[run_range]
    call = f"@entry\ndef run(machine, policy, host, first, last):\n    return {name}(machine, policy, host, first, last)\n"
    text = PREAMBLE.format(options=ENGINE_OPTIONS) + OUTSIDE + flat.text + call
    return place("engine", text)


@cache
def hooks_module(cls: type) -> Stored:
    """Return the module of a policy's hooks; raise NotCompilableError if it cannot be made."""
    if not hasattr(cls, "_fields"):
        raise NotCompilableError(f"{cls.__name__} is no NamedTuple")
    hooks = {name: inspect.unwrap(getattr(cls, name)) for name in HOOKS if hasattr(cls, name)}
    flat = flatten(list(hooks.values()))
    if flat.classes:
        raise NotCompilableError(f"{cls.__name__} makes a {flat.classes[0].__name__} in a hook")
    calls = [
        f"@entry\ndef {name}(self, view, plan):\n    {flat.names[hook]}(self, view, plan)\n"
        for name, hook in hooks.items()
    ]
    return place(
        f"policy_{cls.__name__}", PREAMBLE.format(options=HOOK_OPTIONS) + flat.text + "".join(calls)
    )
