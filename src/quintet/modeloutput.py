"""Outputs of calls: fields by name, by key, or by index among those that are set."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree


class ModelOutput(OrderedDict[str, Any]):
    """The base of dataclasses that also index like a tuple (`out[0]`) and a dict (`out["logits"]`).

    Fields that are None do not count: they have no place, and are not among the keys. A field that
    is set takes its place again, whenever that happens. Whatever rebuilds containers can rebuild
    it: from a mapping or from pairs given alone (`type(out)(mapping)`), and by
    `torch.utils._pytree`, where every subclass is known.

    A field that costs much may be made when somebody first reads it, in whichever way (`defer`). To
    name it or to count the fields is not to read it.
    """

    # What is set is held twice: as attributes, which are what a dataclass has, and as the items of
    # a real dict, which C code (DataParallel's gather, tracing) reads without asking the class.

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        pytree.register_pytree_node(
            cls,
            _flatten,
            lambda values, names: cls._of(zip(names, values, strict=True)),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_flatten_with_keys,
        )

    def __init__(self, *args: Any, **fields: Any) -> None:
        raise TypeError(
            f"{type(self).__name__} has no fields; a subclass of ModelOutput has to be a dataclass"
        )

    def __post_init__(self) -> None:
        """Take the fields from a mapping or pairs, if only the first one is given."""
        first, *others = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        given = getattr(self, first)
        if isinstance(given, torch.Tensor) or given is None or any(name in self for name in others):
            return
        if isinstance(given, Iterator):
            given = list(given)
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        if isinstance(pairs, Sequence) and all(map(_is_pair, pairs)):
            setattr(self, first, None)
            self.update(pairs)

    def defer(self, name: str, make: Callable[[], Any]) -> None:
        """Set a `deferrable` field to the result of `make`, computed when it is first read."""
        late = self._is_late(name)
        super().__setitem__(name, _Deferred(make))
        vars(self).pop(name, None)
        # What tells that all fields were set goes by how many attributes there are.
        vars(self)[f"_{name}_was_deferred"] = True
        if late:
            self._take_place(name)

    def __getitem__(self, key: Any) -> Any:
        """Return a field by name, or by place (an int or a slice)."""
        if isinstance(key, str):
            value = super().__getitem__(key)
            return self._evaluate(key, value) if type(value) is _Deferred else value
        names = list(self)[key]
        return self[names] if isinstance(names, str) else tuple(self[name] for name in names)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        fields = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        if name not in fields:
            return
        if value is None:
            if name in self:
                super().__delitem__(name)
            return
        late = self._is_late(name)
        super().__setitem__(name, value)
        if late:
            self._take_place(name)

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)
        if name not in type(self).__dataclass_fields__:  # type: ignore[attr-defined]
            super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        object.__setattr__(self, name, None)

    def __delattr__(self, name: str) -> None:
        if name in self:
            del self[name]
        else:
            object.__delattr__(self, name)

    def pop(self, name: str, *default: Any) -> Any:
        """Set a field to None and return its value, or the default if that was None."""
        if name not in self and default:
            return default[0]
        value = self[name]
        del self[name]
        return value

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        """Set the last field, or the first one, to None and return its name and value."""
        name = next(reversed(self) if last else iter(self))
        return name, self.pop(name)

    def clear(self) -> None:
        """Set every field to None."""
        for name in list(self):
            del self[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field by name, or the default where it is not set."""
        if name not in self:
            return default
        return self[name]

    def values(self) -> Any:
        """Return the fields that are set, in order."""
        self._make_all()
        return super().values()

    def items(self) -> Any:
        """Return the names and values of the fields that are set, in order."""
        self._make_all()
        return super().items()

    def __eq__(self, other: object) -> bool:
        self._make_all()
        if isinstance(other, ModelOutput):
            other._make_all()
        return super().__eq__(other)

    def copy(self) -> Self:
        """Return another output of the same fields."""
        return self._of(self.items())

    def __reduce__(self) -> Any:
        self._make_all()
        return _revived, (type(self), dict(vars(self)), dict(self))

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, in order."""
        return tuple(self.values())

    def _is_late(self, name: str) -> bool:
        # While an output is made, fields are set in order.
        fields = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        return name not in self and len(vars(self)) >= len(fields)

    def _take_place(self, name: str) -> None:
        names = list(type(self).__dataclass_fields__)  # type: ignore[attr-defined]
        for after in names[names.index(name) + 1 :]:
            if after in self:
                self.move_to_end(after)

    def _evaluate(self, name: str, deferred: "_Deferred") -> Any:
        value = deferred.make()
        setattr(self, name, value)
        return value

    def _make_all(self) -> None:
        for name, value in list(super().items()):
            if type(value) is _Deferred:
                self._evaluate(name, value)

    @classmethod
    def _of(cls, pairs: Iterable[tuple[str, Any]]) -> Self:
        """Build an output from fields, without requiring any."""
        output = cls.__new__(cls)
        for name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            setattr(output, name, None)
        output.update(pairs)
        return output


@dataclass(frozen=True, slots=True)
class _Deferred:
    make: Callable[[], Any]


class _DeferrableField:
    """A field that defaults to None and may be computed on first read.

    One that is set is an attribute of the output itself, which Python finds without asking here.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, output: ModelOutput | None, owner: type | None = None) -> Any:
        return None if output is None else output.get(self.name)


def deferrable() -> Any:
    """Return the default of a field for `defer`: None."""
    return _DeferrableField()


def _revived(cls: type[ModelOutput], attributes: dict[str, Any], items: dict[str, Any]) -> Any:
    output = cls._of(items.items())
    vars(output).update(attributes)
    return output


def _is_pair(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and isinstance(value[0], str)


def _flatten(output: ModelOutput) -> tuple[list[Any], list[str]]:
    return list(output.values()), list(output)


def _flatten_with_keys(output: ModelOutput) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), value) for name, value in output.items()], list(output)
