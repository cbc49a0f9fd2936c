"""Rules of configuration values: an annotated type, and bounds."""

import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from quintet.errors import ConfigError, shown

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Bounds:
    """A closed or half-open range of numbers, and its wording."""

    least: float
    most: float = math.inf
    open_below: bool = False

    def holds(self, value: float) -> bool:
        """Return whether `value` lies in the range."""
        above = value > self.least if self.open_below else value >= self.least
        return above and value <= self.most

    def __str__(self) -> str:
        below = f"{'greater than' if self.open_below else 'at least'} {_number(self.least)}"
        return below if self.most == math.inf else f"{below} and at most {_number(self.most)}"


@dataclass(frozen=True, slots=True)
class MostItems:
    """The maximum length of a list, checked before its items."""

    most: int

    def holds(self, value: object) -> bool:
        """Return whether `value` is short enough, or no list."""
        return not isinstance(value, list | tuple) or len(value) <= self.most

    def __str__(self) -> str:
        return f"of at most {_number(self.most)} items"


Count = Annotated[int, Bounds(1)]
NonNegative = Annotated[int, Bounds(0)]
# A file decides none of these alone: what it can make us build, list or fill stays small enough
# to be built in a second and held in some megabytes before the weights are looked at.
Size = Annotated[int, Bounds(1, 2**24)]
HeadSize = Annotated[int, Bounds(1, 2**16)]
ExpertCount = Annotated[int, Bounds(1, 2**16)]
AnyExperts = Annotated[int, Bounds(0, 2**16)]
Layers = Annotated[int, Bounds(1, 1_000)]
LayerTypes = Annotated[list[str], MostItems(1_000)]
LayerNumbers = Annotated[list[NonNegative], MostItems(1_000)]
MoreLayers = Annotated[int, Bounds(0, 100)]
Labels = Annotated[int, Bounds(1, 1_000_000)]
# Numbers that reach tensors of 64-bit integers, but make none larger.
Length = Annotated[int, Bounds(1, 2**53)]
AnyLength = Annotated[int, Bounds(0, 2**53)]
TokenId = Annotated[int, Bounds(0, 2**53)]
AnyId = Annotated[int, Bounds(-(2**53), 2**53)]
AnyIds = Annotated[list[AnyId], MostItems(1_000)]
EndIds = Annotated[list[TokenId], MostItems(1_000)]
NonNegativeFloat = Annotated[float, Bounds(0)]
Positive = Annotated[float, Bounds(0, open_below=True)]
Fraction = Annotated[float, Bounds(0, 1)]


def known(value: Value | None) -> Value:
    """Return a value that `derive` has filled in, typed as not None."""
    assert value is not None
    return value


def check(owner: str, key: str, value: Any, annotation: Any) -> None:
    """Check one value against its annotation.

    Raises:
        ConfigError: the value is of another type, not finite, or out of its bounds.
    """
    if not _fits(value, annotation):
        raise ConfigError(f"{owner}: {key}={shown(value)} has to be {_describe(annotation)}")


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is bool or annotation is str or annotation is types.NoneType:
        return isinstance(value, annotation)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is Any:
        return True
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        if not all(rule.holds(value) for rule in args[1:] if isinstance(rule, MostItems)):
            return False
        if not _fits(value, args[0]):
            return False
        return all(rule.holds(value) for rule in args[1:] if isinstance(rule, Bounds))
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in args)
    if origin is list:
        return isinstance(value, list | tuple) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(name, args[0]) and _fits(item, args[1]) for name, item in value.items()
        )
    if origin is Callable:
        return callable(value)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in args)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if origin is Sequence:
        return (
            isinstance(value, Sequence)
            and not isinstance(value, str | bytes)
            and all(_fits(item, args[0]) for item in value)
        )
    if annotation is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # Compared, not asked by isfinite, which fails on an integer too long for a float; torch
        # fails on one too long for 64 bits.
        return is_number and abs(value) <= (2**63 if isinstance(value, int) else sys.float_info.max)
    if annotation is None:
        return value is None
    return isinstance(value, annotation)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = " and ".join(str(rule) for rule in args[1:])
        return f"{_describe(args[0])} {rules}"
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in args)
    if origin is list:
        return f"a list of {_describe(args[0])}"
    if origin in (dict, Mapping):
        return "a mapping"
    if origin is Sequence:
        return f"a list of {_describe(args[0])}"
    if origin is Literal:
        return " or ".join(repr(option) for option in args)
    if origin is Callable:
        return "a function"
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
    if annotation is types.NoneType:
        return "null"
    return names.get(annotation, str(annotation))
