"""The host program and the fast machine, compiled together; and the hooks of a policy.

The host is compiled once for all policies: it calls hooks by their addresses. So a new policy costs
the compilation of its hooks alone. Both are kept in the user's folder (`jit.store`).
"""

import ctypes
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np

import moesim.machine as verbs
from moesim.errors import InputError, PolicyError
from moesim.host import call_hook, run_steps
from moesim.jit.flatten import NotCompilableError, flatten
from moesim.jit.store import Stored, disabled, load, note, place, record_of
from moesim.policies.api import HOOKS
from moesim.policies.registry import Chosen
from moesim.run import Prepared
from moesim.sim.compiled_machine import (
    GROWING,
    HEADS,
    PAUSED_NS,
    PREEMPTIONS,
    STUCK,
    TICKETS,
    Lanes,
    deadlock,
    drain,
    grow,
    logged,
    new_lanes,
    totals,
    totals_now,
)
from moesim.sim.rules import Totals
from moesim.state import OK, Host

PREAMBLE = """\
from moesim.jit.structs import call_at, call_back, constructor, entry, inner

jit = inner({options})
entry = entry({options})
"""

ENGINE = """
@jit
def call_hook(policy, hook, view, plan):
    call_at(policy[hook + 1], policy[0], view, plan)


@jit
def call_grow(machine, table):
    return call_back(machine.callback, table)


{functions}

@entry
def run(machine, policy, host, first, last):
    return {name}(machine, policy, host, first, last)
"""

HOOK = """
@entry
def {hook}(self, view, plan):
    {name}(self, view, plan)
"""

VERBS = ("begin", "submit", "wait", "done", "pause", "cancel", "promote", "route", "predict")

WANTED = ("auto", "simpy", "compiled")
"""What may be asked for."""
ENGINE_S, HOOKS_S = 15, 4
"""About what compiling the host program and a policy's hooks takes, once."""
LAYER_STEPS_PER_S = 2000
"""About what the SimPy machine does at batch 1."""


def run_range(machine: Lanes, policy: Any, host: Host, first: int, last: int) -> int:
    """Run steps; after the last one, let what is still under way finish."""
    rule = run_steps(machine, policy, host, first, last)
    if rule == OK and last == len(host.steps.phase):
        drain(machine)
    return rule


@cache
def engine_module() -> Stored:
    """Return the module of the host program and the machine.

    The host divides by nothing that may be 0, and allocates nothing: no counting of references.
    """
    replaced: dict[Any, Any] = {getattr(verbs, name): getattr(Lanes, name) for name in VERBS}
    flat = flatten([run_range], replaced | {call_hook: "call_hook", grow: "call_grow"})
    options = PREAMBLE.format(options='_nrt=False, error_model="numpy"')
    return place("engine", options + ENGINE.format(functions=flat.text, name=flat.names[run_range]))


@cache
def hooks_module(cls: type, fields: str) -> Stored:
    """Return the module of a policy's hooks; raise NotCompilableError if it cannot be made.

    Indices are checked: a policy that reads beyond an array gets an error, not other memory.
    `fields` says what its instances hold, which decides what is compiled.
    """
    if disabled():
        raise NotCompilableError("NUMBA_DISABLE_JIT is set")
    if not hasattr(cls, "_fields"):
        raise NotCompilableError(f"{cls.__name__} is no NamedTuple")
    hooks = {name: getattr(cls, name) for name in HOOKS if hasattr(cls, name)}
    flat = flatten(list(hooks.values()))
    if flat.classes:
        raise NotCompilableError(f"{cls.__name__} makes a {flat.classes[0].__name__} in a hook")
    calls = [HOOK.format(hook=name, name=flat.names[hook]) for name, hook in hooks.items()]
    options = PREAMBLE.format(options="boundscheck=True")
    return place(f"policy_{cls.__name__}", f"# {fields}\n{options}{flat.text}{''.join(calls)}")


def hooks_of(prepared: Prepared) -> Stored:
    """Return the module of the hooks of a run's policy; see `hooks_module`."""
    return hooks_module(prepared.chosen.cls, held(prepared.policy, prepared.chosen.cls.__name__))


def held(value: Any, name: str) -> str:
    """Say what a policy's field holds, as far as compiled code can use it.

    Raises NotCompilableError for arrays of numbers that behave otherwise when compiled.
    """
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        if value.dtype not in (np.int64, np.float64, np.bool_) or not value.flags.c_contiguous:
            raise NotCompilableError(
                f"{name} is an array of {value.dtype}; arrays of int64, float64 and bool in C "
                "order do"
            )
        return f"{value.dtype}[{value.ndim}]{'' if value.flags.writeable else ' read-only'}"
    if hasattr(value, "_fields"):
        inner = zip(value._fields, value, strict=True)
        return "(" + ", ".join(f"{key}: {held(item, key)}" for key, item in inner) + ")"
    return type(value).__name__


class Machinery(NamedTuple):
    """What a run needs, compiled."""

    run: Callable[..., int]
    hooks: tuple[int, ...]
    """Addresses; 0 for a hook that the policy has not."""
    keeps: Any = None
    """What the code at these addresses belongs to."""


def compile_for(prepared: Prepared) -> Machinery:
    """Compile what a run needs, or find it compiled.

    Raises NotCompilableError for a policy that only plain Python can run.
    """
    from moesim.jit.structs import Block

    host = Block(prepared.host).type
    policy = Block(prepared.policy).type
    machine = Block(lanes_of(prepared, 0, 0, False)).type
    kinds = dict(host.fields)
    hooks, module = compiled_hooks(hooks_of(prepared), (policy, kinds["seen"], kinds["plan"]))
    return Machinery(compiled_engine(machine, host), hooks, module)


@cache
def compiled_engine(machine: Any, host: Any) -> Callable[..., int]:
    """Return the compiled `run_range` for the types of machine and host, which never change."""
    from numba.core.types import Array, int64

    def prepare(module: ModuleType) -> Callable[..., int]:
        run: Any = module.run
        run.compile((machine, Array(int64, 1, "C"), host, int64, int64))
        return cast("Callable[..., int]", run)

    return cast("Callable[..., int]", load(engine_module(), prepare))


@cache
def compiled_hooks(stored: Stored, kinds: tuple[Any, ...]) -> tuple[tuple[int, ...], ModuleType]:
    """Return the addresses of a policy's hooks for the types of policy, view and plan.

    They are good as long as the module is, which is returned, too.
    """

    def prepare(module: ModuleType) -> tuple[tuple[int, ...], ModuleType]:
        return tuple(address(getattr(module, name, None)) for name in HOOKS), module

    def address(hook: Any) -> int:
        if hook is None:
            return 0
        hook.compile(kinds)
        made = hook.overloads[kinds]
        return cast("int", made.library.get_pointer_to_function(made.fndesc.llvm_func_name))

    try:
        return cast("tuple[tuple[int, ...], ModuleType]", load(stored, prepare))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of Numba's own, or whatever it stumbled over
        reason = first_reason(f"{error}" or type(error).__name__)
        note(stored, reason, 0.0)
        raise NotCompilableError(reason) from None


def first_reason(message: str) -> str:
    """Return the line of Numba's explanation that says most."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(("Failed in", "During", "File", "-"))]
    return (telling or lines or ["unknown"])[0][:200]


def lanes_of(prepared: Prepared, seed: int, jitter: int, record: bool) -> Lanes:
    """Return the idle machine of a run."""
    return new_lanes(
        prepared.setting.costs, prepared.feed, prepared.profile.rates(), prepared.chunk_bytes,
        seed=seed, jitter=jitter, record=record,
    )  # fmt: skip


class CompiledRun:
    """A run on the compiled machine; see `replay.Run`."""

    stride = 128  # Coming back to Python costs a wait for the GIL, where other threads want it.

    def __init__(self, prepared: Prepared, *, seed: int, jitter: int, record: bool) -> None:
        """Compile what is needed; raise InputError for a policy that does not compile."""
        from moesim.jit.structs import Block

        self.prepared = prepared
        try:
            made = compile_for(prepared)
        except NotCompilableError as error:
            raise not_compiled(prepared.chosen, error) from None
        lanes = lanes_of(prepared, seed, jitter, record)
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(self.grow)
        self.lanes = lanes._replace(callback=ctypes.cast(self.callback, ctypes.c_void_p).value or 0)
        self.machine = Block(self.lanes)
        self.host = Block(prepared.host)
        self.policy = Block(prepared.policy)
        self.table = np.array([self.policy.address, *made.hooks], np.int64)
        self.made = made

    def grow(self, table: int) -> int:
        """Double a table; return 0 if there is no memory, since no exception gets through."""
        try:
            grow(self.lanes, table)
        except MemoryError:
            return 0
        name = GROWING[table]
        grown = getattr(self.lanes, name)
        at = self.machine.type.offsets[name]
        self.machine.words[at : at + 1 + grown.ndim] = (grown.ctypes.data, *grown.shape)
        return 1

    def steps(self, first: int, last: int) -> int:
        """Run steps; return the rule broken, or OK."""
        try:
            return self.made.run(self.machine, self.table, self.host, first, last)
        except MemoryError:
            raise
        except Exception as error:
            if self.lanes.state[STUCK]:
                raise deadlock(self.lanes) from None
            raise PolicyError(
                f"policy '{self.prepared.chosen.name}': {type(error).__name__}: {error} "
                "(--machine simpy says where)"
            ) from None

    def heads(self) -> tuple[Totals, ...]:
        """Return the totals at the end of each step."""
        return tuple(map(totals, self.lanes.heads[: self.lanes.state[HEADS]]))

    def drained(self) -> Totals:
        """Return the totals at the end of everything."""
        return totals_now(self.lanes)

    def counts(self) -> tuple[int, int, int]:
        """Return operations, preemptions and paused ns."""
        s = self.lanes.state
        return int(s[TICKETS]), int(s[PREEMPTIONS]), int(s[PAUSED_NS])

    def logged(self) -> tuple[Any, Any]:
        """Return operations and segments as `log.Log` has them."""
        return logged(self.lanes)


class Choice(NamedTuple):
    """The machine of a run, and why it is this one."""

    machine: str
    why: str
    compiles: bool = False
    """Something must be compiled first."""


def choose_machine(wanted: str, prepared: Prepared, layer_steps: int) -> Choice:
    """Return the machine for a run of so many layer steps: `auto`, or a machine by its name.

    `auto` never compiles for a run that takes less time without. Raises InputError for any other
    name, and for `compiled` if it is known that the policy does not compile.
    """
    if wanted not in WANTED:
        raise InputError(f"no machine named {wanted!r}; there are: {', '.join(WANTED)}")
    if wanted == "simpy":
        return Choice("simpy", "asked for")
    chosen = prepared.chosen
    try:
        stored = hooks_of(prepared)
        known = record_of(stored)
        if known is not None and known.error:
            raise NotCompilableError(known.error)
    except NotCompilableError as error:
        if wanted == "compiled":
            raise not_compiled(chosen, error) from None
        return Choice("simpy", f"policy '{chosen.name}' does not compile: {error}")
    missing_s = (0 if known else HOOKS_S) + (0 if record_of(engine_module()) else ENGINE_S)
    if missing_s == 0:
        return Choice("compiled", "was compiled before")
    once = f"compiling first, which takes about {missing_s} s, once"
    simpy_s = layer_steps / LAYER_STEPS_PER_S
    if wanted == "compiled" or simpy_s > missing_s:
        return Choice("compiled", once, compiles=True)
    return Choice(
        "simpy",
        f"compiling would take about {missing_s} s, once, and a run of {layer_steps} layer steps "
        "does not repay that; --machine compiled does it",
    )


def not_compiled(chosen: Chosen, error: NotCompilableError) -> InputError:
    """Return the error of asking for the compiled machine in vain."""
    return InputError(
        f"policy '{chosen.name}' does not compile: {error}; --machine simpy or auto runs it"
    )


def machine_for(prepared: Prepared, wanted: str, say: Callable[[str], None], runs: int = 1) -> str:
    """Return the machine of a run, compiled if it is the compiled one; say which, and why.

    `runs` says how many such runs there will be, which compiling may repay together.
    Raises InputError for `compiled` and a policy that does not compile; `auto` then takes SimPy.
    """
    layer_steps = len(prepared.host.steps.phase) * prepared.setting.layers
    choice = choose_machine(wanted, prepared, layer_steps * runs)
    if wanted == "simpy":
        return "simpy"
    if wanted == "auto" or choice.compiles:
        say(f"machine {choice.machine}: {choice.why}")
    if choice.machine == "compiled":
        try:
            compile_for(prepared)
        except NotCompilableError as error:
            if wanted == "compiled":
                raise not_compiled(prepared.chosen, error) from None
            say(f"machine simpy: policy '{prepared.chosen.name}' does not compile: {error}")
            return "simpy"
    return choice.machine
