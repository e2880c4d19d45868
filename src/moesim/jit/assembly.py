"""Machine code for the functions that Python calls, and for no others.

Numba optimises and assembles every function by itself, together with all that it calls. For a
program of a hundred functions, of which Python calls one, that is two thirds of the compile time
and is thrown away: the one contains them all. It has no option for that, so this replaces three of
its methods while such a function is compiled, in the versions that are known to allow it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary, JITCPUCodegen
from numba.core.compiler_lock import global_compiler_lock

KNOWN = (0, 61), (0, 68)
"""The first and the last version of Numba that this was tried with."""


@contextmanager
def assembled_only(name: str) -> Iterator[None]:
    """Let Numba assemble, of all that it compiles meanwhile, the function of this name only."""
    if not KNOWN[0] <= numba.version_info.short <= KNOWN[1]:
        yield
        return
    methods = (
        (JITCodeLibrary, "_optimize_final_module"),
        (JITCodeLibrary, "_finalize_final_module"),
        (JITCPUCodegen, "set_env"),
    )
    with global_compiler_lock:
        usual = [getattr(owner, method) for owner, method in methods]
        optimize, finish, set_environment = usual

        def optimize_one(library: Any) -> None:
            if library.name == name:
                optimize(library)

        def finish_one(library: Any) -> None:
            if library.name == name:
                finish(library)
            else:
                library._finalize_dynamic_globals()
                library._finalized = True

        def set_known(codegen: Any, symbol: str, environment: Any) -> None:
            if codegen._engine.is_symbol_defined(symbol):
                set_environment(codegen, symbol, environment)

        try:
            changed = (optimize_one, finish_one, set_known)
            for (owner, method), replacement in zip(methods, changed, strict=True):
                setattr(owner, method, replacement)
            yield
        finally:
            for (owner, method), original in zip(methods, usual, strict=True):
                setattr(owner, method, original)
