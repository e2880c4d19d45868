"""Find a policy by name, read its parameters, make it for a run.

Built-in policies are in the table below, others in the entry-point group `moesim.policies`, or in a
Python file given by its path.
"""

import importlib
import importlib.util
import inspect
import typing
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from moesim.errors import InputError
from moesim.policies.api import HOOKS, Policy, Setting

BUILTIN = {
    "adapmoe": "moesim.policies.adapmoe:AdapMoe",
    "all-cpu": "moesim.policies.all_cpu:AllCpu",
    "all-gpu": "moesim.policies.all_gpu:AllGpu",
    "belady": "moesim.policies.belady:Belady",
    "dali": "moesim.policies.dali:Dali",
    "fate": "moesim.policies.fate:Fate",
    "fiddler": "moesim.policies.fiddler:Fiddler",
    "flexgen": "moesim.policies.flexgen:FlexGen",
    "huang": "moesim.policies.huang:Huang",
    "hybrimoe": "moesim.policies.hybrimoe:HybriMoE",
    "klotski": "moesim.policies.klotski:Klotski",
    "ktransformers": "moesim.policies.ktransformers:KTransformers",
    "lru": "moesim.policies.lru:Lru",
    "mixtral-offloading": "moesim.policies.mixtral_offloading:MixtralOffloading",
    "moe-infinity": "moesim.policies.moe_infinity:MoeInfinity",
    "moepic": "moesim.policies.moepic:Moepic",
    "moe-lightning": "moesim.policies.moe_lightning:MoeLightning",
    "on-demand": "moesim.policies.on_demand:OnDemand",
    "oracle": "moesim.policies.oracle:Oracle",
    "pregated": "moesim.policies.pregated:Pregated",
    "static": "moesim.policies.static:Static",
}
GROUP = "moesim.policies"
LEGAL = {int: "whole number >= 0", float: "number >= 0", bool: "true|false", str: "text"}


class Parameter(NamedTuple):
    """One parameter of a policy, as the command line takes it."""

    name: str
    type: Any
    default: Any

    @property
    def legal(self) -> str:
        """What may be written for it."""
        if get_origin(self.type) is Literal:
            return "|".join(map(str, get_args(self.type)))
        return LEGAL.get(self.type, "")


class Chosen(NamedTuple):
    """A policy with its parameters, as in `dali:prefetch_size=2,cache=lru`."""

    name: str
    cls: type
    parameters: dict[str, Any]
    """All of them, defaults included."""

    @property
    def spec(self) -> str:
        """The shortest text that chooses the same."""
        defaults = {p.name: p.default for p in parameters_of(self.cls)}
        given = [
            f"{k}={str(v).lower() if isinstance(v, bool) else v}"
            for k, v in self.parameters.items()
            if v != defaults[k]
        ]
        return self.name + (":" + ",".join(given) if given else "")

    @property
    def hooks(self) -> int:
        """Bit h is set where the policy has hook h."""
        return sum(1 << h for h, hook in enumerate(HOOKS) if hasattr(self.cls, hook))

    def make(self, setting: Setting) -> Policy:
        """Make a fresh policy for one run."""
        policy: Policy = self.cls.new(setting, **self.parameters)  # type: ignore[attr-defined]
        return policy


def names() -> list[str]:
    """Return the names of all installed policies."""
    return sorted({*BUILTIN, *(point.name for point in entry_points(group=GROUP))})


def load_class(name: str) -> type:
    """Return a policy's class; raise InputError if there is none, or if it is not well formed."""
    if name in BUILTIN:
        module, attribute = BUILTIN[name].split(":")
        return check(name, getattr(importlib.import_module(module), attribute))
    if name.endswith(".py"):
        return check(name, load_file(Path(name)))
    for point in entry_points(group=GROUP):
        if point.name == name:
            return check(name, load_point(point))
    raise InputError(
        f"no policy named '{name}'; there are: {', '.join(names())}, or the path of a .py file"
    )


def load_point(point: EntryPoint) -> type:
    """Return the class that an installed package offers."""
    try:
        cls: type = point.load()
    except Exception as error:
        raise InputError(
            f"policy '{point.name}' of {point.value}: {type(error).__name__}: {error}"
        ) from error
    return cls


def load_file(path: Path) -> type:
    """Return the one policy class that a Python file defines."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"policy '{path}': no such file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise InputError(f"policy '{path}': {type(error).__name__}: {error}") from error
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == path.stem and hasattr(value, "dispatch")
    ]
    if len(found) != 1:
        raise InputError(f"policy '{path}': has {len(found)} classes with dispatch; 1 is needed")
    return found[0]


def check(name: str, cls: type) -> type:
    """Return the class if it is a policy: hooks are found by name, so a misspelt one would be lost.

    Raises InputError for a missing `new`, `place` or `dispatch` and for any other public method.
    """
    for needed in ("new", "place", "dispatch"):
        if not callable(getattr(cls, needed, None)):
            raise InputError(f"policy '{name}': {cls.__name__} has no method {needed}")
    fields = getattr(cls, "_fields", ())
    for attribute, value in vars(cls).items():
        if (
            not attribute.startswith("_")
            and attribute not in fields
            and attribute not in (*HOOKS, "new", "place", "plan")
            and (inspect.isfunction(value) or isinstance(value, classmethod | staticmethod))
        ):
            raise InputError(
                f"policy '{name}': {attribute} is no hook; there are: {', '.join(HOOKS)}; other "
                "functions belong outside the class"
            )
    for parameter in parameters_of(cls):
        if parameter.default is inspect.Parameter.empty or parameter.legal == "":
            raise InputError(
                f"policy '{name}': parameter {parameter.name} needs a default and one of the types "
                "int, float, bool, str, or a Literal of texts"
            )
    return cls


def parameters_of(cls: Any) -> list[Parameter]:
    """Return a policy's parameters: those of its constructor after the setting."""
    signature = inspect.signature(cls.new)
    hints = typing.get_type_hints(cls.new)
    return [
        Parameter(name, hints.get(name, str), parameter.default)
        for name, parameter in list(signature.parameters.items())[1:]
    ]


def parse_value(policy: str, parameter: Parameter, text: str) -> Any:
    """Return a parameter's value; raise InputError naming what would be legal."""
    error = InputError(
        f"policy {policy}: {parameter.name}={text!r} is not legal; {parameter.legal} is"
    )
    kind = parameter.type
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise error
        return text.lower() == "true"
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise error
        return text
    try:
        value = kind(text)
    except ValueError:
        raise error from None
    if isinstance(value, int | float) and not 0 <= value < 1 << 31:
        raise error
    return value


def choose(spec: str, overrides: Mapping[str, Any] | None = None) -> Chosen:
    """Return the policy that a text such as `dali:prefetch_size=2,cache=lru` names."""
    name, _, given = spec.partition(":")
    cls = load_class(name)
    known = {parameter.name: parameter for parameter in parameters_of(cls)}
    values = {parameter.name: parameter.default for parameter in known.values()}
    for item in filter(None, given.split(",")):
        key, equals, text = item.partition("=")
        if not equals or key not in known:
            legal = ", ".join(known) or "none"
            raise InputError(f"policy {name}: no parameter {item!r}; there are: {legal}")
        values[key] = parse_value(name, known[key], text)
    return Chosen(name, cls, values | dict(overrides or {}))
