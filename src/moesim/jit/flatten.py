"""Functions and all that they call, as the text of one module that needs no other.

Compiled code is cached on disk under a hash of this text, so the text must hold everything that
decides what the code does: functions under names of their own, constants by value, no imports but
NumPy's and `math`'s. Annotations, docstrings and comments are left out: they decide nothing.
"""

import ast
import copy
import linecache
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

LIBRARIES = {np: "numpy", math: "math"}
"""Modules of which compiled code may use what Numba knows."""

RESERVED = "__"
"""How the names of a module begin, so that they are no local variable's."""


class NotCompilableError(Exception):
    """Something that only plain Python can run; the message says what and where."""


class Flat(NamedTuple):
    """The text of a module, and what its functions are called in it."""

    text: str
    names: Mapping[Any, str]
    """From functions to their names."""
    classes: tuple[type, ...]
    """NamedTuple classes that are constructed."""


def flatten(functions: list[Callable[..., Any]], replaced: Mapping[Any, Any] | None = None) -> Flat:
    """Return the module that holds these functions and everything they call.

    Each function is decorated with `@jit`, and NamedTuple classes that are called are made by
    `constructor`; both must be defined before the text, and so must the names to which `replaced`
    maps functions. It may also map them to functions that take their place.

    Raises NotCompilableError for what has no source or is no function, number or text.
    """
    writer = _Writer(replaced or {})
    for function in functions:
        writer.name_of_function(function)
    bodies = []
    while writer.waiting:
        bodies.append(writer.body(writer.waiting.pop(0)))
    # A function must be there before another one is compiled, not before it is defined.
    made = [
        f"{writer.names[cls]} = constructor({cls.__name__!r}, {cls._fields!r})"  # type: ignore[attr-defined]
        for cls in writer.classes
    ]
    lines = [*sorted(writer.imports), *writer.constants, *made, *bodies]
    return Flat("\n".join(lines) + "\n", writer.names, tuple(writer.classes))


class _Writer:
    """Gives every function, constant and class a name that is unique in the module."""

    def __init__(self, replaced: Mapping[Any, Any]) -> None:
        self.replaced = replaced
        self.names: dict[Any, str] = {}
        self.taken: set[str] = set()
        self.waiting: list[Any] = []
        self.imports: set[str] = set()
        self.constants: list[str] = []
        self.constant_names: dict[str, str] = {}
        self.classes: list[type] = []
        self.files: dict[str, dict[int, ast.FunctionDef]] = {}

    def unique(self, wanted: str) -> str:
        """Return a name that no other has, and that no local variable may have: see `body`."""
        wanted = f"{RESERVED}{re.sub(r'[^0-9A-Za-z_]', '_', wanted)}"
        name, count = wanted, 1
        while name in self.taken:
            count += 1
            name = f"{wanted}_{count}"
        self.taken.add(name)
        return name

    def name_of_function(self, function: Any) -> str:
        function = self.replaced.get(function, getattr(function, "compiled_as", function))
        if isinstance(function, str):
            return function
        if function not in self.names:
            module = function.__module__.rpartition(".")[2]
            method = function.__qualname__.replace("<locals>.", "").replace(".", "_")
            self.names[function] = self.unique(f"{module}_{method}")
            self.waiting.append(function)
        return self.names[function]

    def name_of(self, value: Any, name: str, where: str) -> str:
        """Return what a global name is called in the module."""
        value = getattr(value, "py_func", value)  # a function that its author has compiled
        if isinstance(value, types.FunctionType):
            return self.name_of_function(value)
        if isinstance(value, types.ModuleType) and value in LIBRARIES:
            library = LIBRARIES[value]
            self.imports.add(f"import {library} as {RESERVED}{library}")
            return RESERVED + library
        if isinstance(value, type) and hasattr(value, "_fields"):
            if value not in self.classes:
                self.classes.append(value)
                self.names[value] = self.unique(value.__name__)
            return self.names[value]
        if is_constant(value):
            text = literal(value)
            key = f"{name} = {text}"
            if key not in self.constant_names:
                self.constant_names[key] = unique = self.unique(name)
                self.constants.append(f"{unique} = {text}")
            return self.constant_names[key]
        raise NotCompilableError(f"{where} uses {name}, a {type(value).__name__}")

    def definition(self, function: Any, where: str) -> ast.FunctionDef:
        """Return the parsed text of a function, which its file has at its first line."""
        file = function.__code__.co_filename
        if file not in self.files:
            linecache.checkcache(file)  # it may have been edited since it was read last
            try:
                tree = ast.parse("".join(linecache.getlines(file, function.__globals__)))
            except SyntaxError as error:
                raise NotCompilableError(f"{where}: {error}") from None
            self.files[file] = {
                min([node.lineno, *(part.lineno for part in node.decorator_list)]): node
                for node in ast.walk(tree)
                if isinstance(node, ast.FunctionDef)
            }
        found = self.files[file].get(function.__code__.co_firstlineno)
        if found is None or found.name != function.__code__.co_name:
            raise NotCompilableError(f"{where} is no plain function, or has no source")
        return copy.deepcopy(found)

    def body(self, function: Any) -> str:
        """Return a function's text, with the names of the module."""
        where = f"{function.__module__}.{function.__qualname__}"
        definition = self.definition(function, where)
        known = dict(function.__globals__)
        code = function.__code__
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                known[name] = cell.cell_contents
            except ValueError:
                raise NotCompilableError(f"{where} uses {name}, which has no value yet") from None
        local = {*code.co_varnames, *code.co_cellvars}
        for name in local:
            if name.startswith(RESERVED):
                raise NotCompilableError(f"{where} has a variable {name}; such names are reserved")
        definition.decorator_list = []
        self.set_defaults(definition.args, function, where)
        renamed = _Rename(self, known, local, where).visit(definition)
        renamed.name = self.names[function]
        return "@jit\n" + ast.unparse(ast.fix_missing_locations(renamed))

    def set_defaults(self, arguments: ast.arguments, function: Any, where: str) -> None:
        """Write the default values as they were when the function was defined."""

        def written(value: Any) -> ast.expr:
            if not is_constant(value):
                raise NotCompilableError(f"{where} has a {type(value).__name__} as a default")
            return ast.parse(literal(value), mode="eval").body

        given = function.__kwdefaults__ or {}
        arguments.defaults = [written(value) for value in function.__defaults__ or ()]
        arguments.kw_defaults = [
            written(given[kept.arg]) if kept.arg in given else None for kept in arguments.kwonlyargs
        ]


class _Rename(ast.NodeTransformer):
    """Replaces global names, and drops what only readers and type checkers need."""

    def __init__(
        self, writer: _Writer, known: Mapping[str, Any], local: set[str], where: str
    ) -> None:
        self.writer = writer
        self.known = known
        self.local = local
        self.where = where

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.local:
            return node
        if node.id in self.known:
            name = self.writer.name_of(self.known[node.id], node.id, self.where)
            return ast.Name(name, node.ctx)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Follow `module.function`, and leave fields of what is passed around alone."""
        if isinstance(node.value, ast.Name) and node.value.id not in self.local:
            owner = self.known.get(node.value.id)
            if isinstance(owner, types.ModuleType) and owner not in LIBRARIES:
                found = getattr(owner, node.attr, None)
                return ast.Name(self.writer.name_of(found, node.attr, self.where), node.ctx)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        node.body = body or [ast.Pass()]
        return self.inside(node)

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        return self.inside(node)

    def inside(self, node: ast.FunctionDef | ast.Lambda) -> ast.AST:
        """Rename what a function uses; its own arguments hide globals of the same name."""
        given = node.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        arguments += [one for one in (given.vararg, given.kwarg) if one is not None]
        for argument in arguments:
            argument.annotation = None
        outer, self.local = self.local, self.local | {argument.arg for argument in arguments}
        self.generic_visit(node)
        self.local = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.Pass()
        return ast.Assign([self.visit(node.target)], self.visit(node.value))


def is_constant(value: Any) -> bool:
    """Say whether a value can be written down as it is."""
    if isinstance(value, tuple) and type(value) is tuple:
        return all(is_constant(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


def literal(value: Any) -> str:
    """Return a constant as Python writes it."""
    if isinstance(value, tuple):
        return "(" + "".join(f"{literal(item)}, " for item in value) + ")"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
