"""What the value of an option may be, said once by its type: for Python, YAML and the command line alike."""

import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, ParamSpec, TypeVar, get_args, get_type_hints

import psutil
from pydantic import GetCoreSchemaHandler, InstanceOf, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from parallel_decoupling.files import expand_paths


@dataclass(frozen=True, repr=False)
class Rule:
    """What a value must be beyond its type; the text completes "must be"."""

    text: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:  # what the help shows
        return self.text

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if not self.holds(value):
            raise ValueError(self.text)
        return value


PositiveInt = Annotated[int, Rule("1 or more, in 64 bits", lambda value: 1 <= value < 2**63)]
NonNegativeInt = Annotated[int, Rule("0 or more, in 64 bits", lambda value: 0 <= value < 2**63)]
PositiveFloat = Annotated[float, Rule("above 0 and finite", lambda value: 0 < value < math.inf)]
NonNegativeFloat = Annotated[float, Rule("0 or more and finite", lambda value: 0 <= value < math.inf)]
Fraction = Annotated[float, Rule("0 or more and below 1", lambda value: 0 <= value < 1)]
CountOrAll = Annotated[int, Rule("-1 or more", lambda value: value >= -1)]
Seed = Annotated[int, Rule("from 0 to 4294967295", lambda value: 0 <= value < 2**32)]
Port = Annotated[int, Rule("from 0 to 65535", lambda value: 0 <= value <= 65535)]
Dims = Annotated[Sequence[PositiveInt], Rule("different numbers", lambda dims: len(set(dims)) == len(dims))]
Names = Annotated[Sequence[str], Rule("different names", lambda names: len(set(names)) == len(names))]

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_memory(options: str, needed: float) -> None:
    """Raise ``ValueError`` where options need more bytes than are free, before these are allocated."""
    import torch

    if torch.get_default_device().type == "meta":  # nothing is allocated
        return
    free = psutil.virtual_memory().available
    if needed > free:
        problem = f"{options} would need {needed:,.0f} bytes of memory"
        raise ValueError(f"{problem}, of which {free:,.0f} are free: use smaller values.")


def check_values(function: Callable[..., Any], values: Mapping[str, Any], start: str = "") -> None:
    """Raise one ``ValueError`` that names every value which is not of the parameter's declared type.

    ``start`` stands before the names. Types are strict: text is not a number, and True is not 1. What holds
    options of its own, a dataclass, checks them itself.
    """
    problems = []
    for name, validator in _validators(function).items():
        try:
            validator.validate_python(values[name])
        except ValidationError as error:
            reasons = dict.fromkeys(_reason(each["msg"]) for each in error.errors())
            problems.append(f"{start}{name} must be {' or '.join(reasons)}, got {values[name]!r}")
    if problems:
        raise ValueError("; ".join(problems))


def checked(start: str = "") -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Make a function expand paths and check its arguments by ``check_values`` before it runs."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)

        @wraps(function)
        def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                if isinstance(value, str | Path):
                    bound.arguments[name] = expand_paths(value, name)
            check_values(function, bound.arguments, start)
            return function(*bound.args, **bound.kwargs)

        return run

    return decorate


@cache
def _validators(function: Callable[..., Any]) -> dict[str, TypeAdapter[Any]]:
    given = {name: hint for name, hint in function.__annotations__.items() if name != "return"}
    named = SimpleNamespace(__annotations__=given, __globals__=vars(sys.modules[function.__module__]))
    hints = get_type_hints(named, include_extras=True)  # what is returned may be for type checkers alone
    config: Any = {"strict": True, "arbitrary_types_allowed": True}
    return {name: TypeAdapter(_outside(hint), config=config) for name, hint in hints.items()}


def _outside(hint: Any) -> Any:
    """Return a type of which what holds options of its own is an object, or the mapping that makes one."""
    parts = [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]
    if not parts:
        return hint
    one: Any = InstanceOf.__class_getitem__(parts[0])  # type: ignore[type-arg]
    either: Any = one | Mapping[str, Any]
    return either | None if get_args(hint) else either


def _reason(message: str) -> str:
    message = re.sub("^(Value error, |Input should be )", "", message)
    return message.replace("'str' instances are not allowed as a Sequence value", "a list, not one text")
