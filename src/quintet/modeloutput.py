"""What a call returns: fields by name, by key, or by place among those that are set."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

__all__ = ["ModelOutput"]


class ModelOutput(OrderedDict[str, Any]):
    """The base of dataclasses that also index like a tuple (`out[0]`) and a dict (`out["logits"]`).

    Fields that are None do not count: they have no place, and are not among the keys. A field that
    is set takes its place again, whenever that happens. Whatever rebuilds containers can rebuild
    it: from a mapping or from pairs given alone (`type(out)(mapping)`), and by
    `torch.utils._pytree`, where every subclass is known.
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
        """Take the fields from a mapping or from pairs, where the first one alone is given."""
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

    def __getitem__(self, key: Any) -> Any:
        """Return a field by name, or by place (an int or a slice)."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        fields = type(self).__dataclass_fields__  # type: ignore[attr-defined]
        if name not in fields:
            return
        if value is None:
            if name in self:
                super().__delitem__(name)
            return
        # While it is made, fields are set in order.
        late = name not in self and len(vars(self)) >= len(fields)
        super().__setitem__(name, value)
        if late:
            names = list(fields)
            for after in names[names.index(name) + 1 :]:
                if after in self:
                    self.move_to_end(after)

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

    def copy(self) -> Self:
        """Return another output of the same fields."""
        return self._of(self.items())

    def __reduce__(self) -> Any:
        return _revived, (type(self), dict(vars(self)), dict(self))

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are set, in order."""
        return tuple(self.values())

    @classmethod
    def _of(cls, pairs: Iterable[tuple[str, Any]]) -> Self:
        """Return an output of these fields, also where one that is required is not set."""
        output = cls.__new__(cls)
        for name in cls.__dataclass_fields__:  # type: ignore[attr-defined]
            setattr(output, name, None)
        output.update(pairs)
        return output


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
