"""Settings as frozen dataclasses, read from TOML and written back; errors name their key.

A field's annotation says what its key may hold: bool, int, float, str, `Literal`,
`tuple[T, ...]`, `Mapping[str, T]`, another such dataclass, and unions of them. Of several
dataclasses in a union, the key `kind` chooses, and without it the first is meant: each has a field
`kind: Literal["its name"]`. A key that is a word of Python is a field with an underscore behind it
(`from_`). Fields that may be None are None by default: TOML has no such value. What a field may
hold beside all that, such as a schedule made in Python, comes from no file and goes into none.

A rule that a type cannot say is held by `__post_init__`, which raises `SettingError`.
"""

import difflib
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from quintet.configuration.numbers import is_finite
from quintet.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    ModelNotFoundError,
    named,
    shown,
)
from quintet.files import read_text

T = TypeVar("T")


class SettingError(ConfigError):
    """A setting breaks a rule.

    Attributes:
        key: which one, with the tables that it lies in.
        message: its value, the rule and the remedy.
        file: the file it comes from, if any.
    """

    def __init__(self, key: str, message: str, file: str = "") -> None:
        self.key, self.message, self.file = key, message, file
        tables, _, name = key.rpartition(".")
        place = f"{file}: " if file else ""
        table = f"[{tables}] " if tables else ""
        super().__init__(f"{place}{table}{name}{message}")

    @classmethod
    def value(cls, key: str, value: object, rule: str) -> "SettingError":
        """Return the error of a key's value that breaks a rule."""
        text = _written(value)
        return cls(key, f" = {text if len(text) <= 160 else f'{text[:159]}…'}: {rule}")

    def within(self, table: str) -> "SettingError":
        """Return the same error for a table that lies in another."""
        return SettingError(f"{table}.{self.key}" if self.key else table, self.message, self.file)


def key_of(field: Field[Any]) -> str:
    """Return the key that a field is read from."""
    return field.name.removesuffix("_")


def parse(text: str, *, file: str = "") -> dict[str, Any]:
    """Parse settings from a text in TOML.

    Raises:
        ConfigError: it is no TOML; the message has line and column.
    """
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(
            f"{file or 'the text'} is no TOML: {error}; a table is [name], a key name = value, "
            "and text stands in quotes"
        ) from error


def read(kind: type[T], path: Path, changes: Sequence[str] = ()) -> T:
    """Return the settings that a file in TOML holds.

    Args:
        kind: the dataclass of the whole file.
        path: where it is.
        changes: what replaces its values: "table.key=value", the value as in TOML; a word that is
            none of its values is text.

    Raises:
        ModelNotFoundError: there is no such file.
        SettingError: a key is unknown, or its value breaks a rule.
        ConfigError: the file cannot be read.
    """
    try:
        values = parse(read_text(path), file=str(path))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"there is no file {shown(str(path))} to read settings from"
        ) from error
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    for change in changes:
        _change(values, change)
    return build(kind, values, file=str(path))


def _change(values: dict[str, Any], change: str) -> None:
    """Put one value in the place of another."""
    name, equals, text = change.partition("=")
    *tables, key = keys = [part.strip() for part in name.split(".")]
    if not equals or not all(keys):
        raise ConfigError(
            f"the setting {shown(change)} has to be table.key=value, such as train.steps=1000"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for table in tables:
        inner = values.setdefault(table, {})
        if not isinstance(inner, dict):
            raise ConfigError(
                f"the setting {shown(change)}: {table} is the value {_written(inner)}, not a table"
            )
        values = inner
    values[key] = value


def build(kind: type[T], values: Mapping[str, Any], *, file: str = "") -> T:
    """Return the settings that a mapping of keys to plain values means.

    Raises:
        SettingError: a key is unknown, or its value breaks a rule.
    """
    try:
        return cast("T", _dataclass(kind, values))
    except SettingError as refused:
        if refused.file or not file:
            raise
        raise SettingError(refused.key, refused.message, file) from refused.__cause__


def _dataclass(kind: type[Any], values: Mapping[str, Any]) -> Any:
    known = {key_of(field): field for field in fields(kind)}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise SettingError(key, f": there is no such key{hint}. There are: {', '.join(known)}")
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for key, field in known.items():
        if key in values:
            try:
                given[field.name] = _value(hints[field.name], values[key])
            except _UnfitError as unfit:
                raise SettingError.value(key, values[key], f"has to be {unfit}") from None
            except SettingError as refused:
                raise refused.within(key) from refused.__cause__
        elif field.default is MISSING and field.default_factory is MISSING:
            raise SettingError(key, f": is missing; it has to be {_described(hints[field.name])}")
    try:
        return kind(**given)
    except SettingError:
        raise
    except (ConfigError, InputError) as error:
        raise SettingError("", f": {error}") from error


class _UnfitError(Exception):
    """A value is of another kind than its key holds; the text names the kind."""


def _value(kind: Any, value: Any) -> Any:
    """Return a value as a field of a kind holds it."""
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _value(_chosen(kind, args, value), value)
    if not _fits(kind, value):
        raise _UnfitError(_described(kind))
    if is_dataclass(kind):
        return _dataclass(cast("type[Any]", kind), value)
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is ... else args
        if len(kinds) != len(value):
            raise _UnfitError(_described(kind))
        items = zip(kinds, value, strict=True)
        return tuple(
            _item(item_kind, number, item) for number, (item_kind, item) in enumerate(items)
        )
    if origin is Mapping:
        return {key: _item(args[1], key, item) for key, item in value.items()}
    if origin is Literal:
        return value
    return kind(value)


def _item(kind: Any, place: int | str, item: Any) -> Any:
    """Convert a value of a list or mapping; errors name its place."""
    try:
        return _value(kind, item)
    except _UnfitError as unfit:
        raise SettingError.value(str(place), item, f"has to be {unfit}") from None
    except SettingError as refused:
        raise refused.within(str(place)) from refused.__cause__


def _chosen(kind: Any, kinds: Sequence[Any], value: Any) -> Any:
    """Return the one of several kinds that a value is of."""
    tables = [option for option in kinds if is_dataclass(option)]
    if isinstance(value, Mapping) and len(tables) > 1:
        by_name = {name: option for option in tables for name in _names(option)}
        name = value.get("kind")
        if name is None:
            return tables[0]
        if isinstance(name, str) and name in by_name:
            return by_name[name]
        raise SettingError.value("kind", name, f"has to be one of {_quoted(by_name)}")
    exact = [option for option in kinds if _fits(option, value, exactly=True)]
    fitting = exact or [option for option in kinds if _fits(option, value)]
    if not fitting:
        raise _UnfitError(_described(kind))
    return fitting[0]


def _names(kind: Any) -> tuple[str, ...]:
    return get_args(get_type_hints(kind).get("kind"))


def _fits(kind: Any, value: Any, *, exactly: bool = False) -> bool:
    origin = get_origin(kind)
    if is_dataclass(kind) or origin is Mapping:
        return isinstance(value, Mapping)
    if origin is tuple:
        return isinstance(value, list | tuple)
    if origin is Literal:
        return any(value == literal and type(value) is type(literal) for literal in get_args(kind))
    if kind is int and not exactly:
        # 2e9 is a float to TOML, and a number of tokens to who writes it.
        return type(value) is int or (type(value) is float and value.is_integer())
    if kind is float and not exactly:
        return type(value) is float or (type(value) is int and is_finite(value))
    return type(value) is kind


def _described(kind: Any) -> str:
    """Return the kinds of value that a key may hold, in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        known = [arg for arg in args if arg is not type(None) and _from_files(arg)]
        return " or ".join(dict.fromkeys(map(_described, known)))
    if origin is Literal:
        return f"one of {_quoted(args)}" if len(args) > 1 else _quoted(args)
    if origin is tuple:
        if args[-1] is not ...:
            return f"a list of {len(args)}: {', '.join(map(_described, args))}"
        return f"a list of which each is {_described(args[0])}"
    if is_dataclass(kind):
        return f"a table with the keys {', '.join(key_of(field) for field in fields(kind))}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}
    return words.get(kind, "a table")


def _from_files(kind: Any) -> bool:
    return (
        get_origin(kind) is not None or kind in (bool, int, float, str, Any) or is_dataclass(kind)
    )


def _quoted(names: Any) -> str:
    return ", ".join(_written(name) for name in names)


def plain(value: Any) -> Any:
    """Return settings as the mappings, lists and values that TOML and JSON hold.

    Raises:
        SettingError: one of them was made in Python, and no file can hold it.
    """
    if is_dataclass(value) and not isinstance(value, type):
        value = {key_of(field): getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(key, item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(str(number), item) for number, item in enumerate(value)]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise SettingError(
            "", f" is a {named(value)}, which no file can hold; write it as a file would have it"
        )
    return value


def _plain(key: str, value: Any) -> Any:
    try:
        return plain(value)
    except SettingError as error:
        raise error.within(key) from None


def written(value: Any) -> str:
    """Write settings as TOML: each table under its name, nested ones in a line."""
    table_of = plain(value)
    lines = [
        f"{_key(key)} = {_written(item)}" for key, item in table_of.items() if not _is_table(item)
    ]
    for name, table in table_of.items():
        if _is_table(table):
            lines += ["", f"[{_key(name)}]"]
            lines += [f"{_key(key)} = {_written(item)}" for key, item in table.items()]
    return "\n".join([*lines, ""]).lstrip("\n")


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _key(key: str) -> str:
    return (
        key if key and all(c.isascii() and (c.isalnum() or c in "-_") for c in key) else _text(key)
    )


def _text(text: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c, c if c.isprintable() else _escape(c)) for c in text) + '"'


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _written(value: Any) -> str:
    """Write a value as TOML does."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {_written(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)
