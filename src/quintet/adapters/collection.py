"""The adapters on a model, and which are active."""

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import nn

from quintet.adapters.adaptation import Adaptation
from quintet.adapters.config import LoraConfig
from quintet.adapters.forwards import ALL, IN_USE, Active, Forward, adapted_modules, forward_for
from quintet.adapters.merging import Merge
from quintet.adapters.reading import Adaptations
from quintet.errors import InputError, shown
from quintet.layers.adapted import AdapterPlace, Places

# What PEFT calls the adapter of a row that has none.
BASE_ROW = "__base__"
Key = tuple[tuple[str, float], ...]


class Adapters:
    """The adapters on a model.

    Attributes:
        configs: what each is, by name.
        active: those in use, with what their changes are multiplied by.
        enabled: whether any is in use at all.
        places: where forwards of the model are.
        merged: those that are in the model's weights; empty for none.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.active: tuple[Active, ...] = ()
        self.enabled = True
        self.places = Places()
        self.by_layer = False
        # Those in the model's weights, and what these were before.
        self.merged: Merge | None = None
        self.unties = False
        # What a cache is known by: another adapter of the same name is another one.
        self._marks: dict[str, str] = {}

    # -- which there are ---------------------------------------------------------------------

    def check_new(self, name: object) -> str:
        """Check the name of a new adapter.

        Raises:
            InputError: it cannot be one, or is another's.
        """
        if not isinstance(name, str) or not name or "." in name or name == BASE_ROW:
            raise InputError(f"adapter_name={shown(name)} has to be a word without a dot")
        if name in self.configs:
            raise InputError(
                f"there is an adapter {name!r} on this model; give another adapter_name, or "
                f"delete_adapter({name!r}) first"
            )
        return name

    def check_known(self, names: Iterable[object]) -> list[str]:
        """Check that adapters of these names exist.

        Raises:
            InputError: one is not.
        """
        known = []
        for name in names:
            if not isinstance(name, str) or name not in self.configs:
                loaded = ", ".join(map(repr, self.configs)) or "none"
                raise InputError(
                    f"there is no adapter {shown(name)} on this model; it has {loaded}"
                )
            known.append(name)
        return known

    def put(
        self,
        model: nn.Module,
        name: str,
        config: LoraConfig,
        adaptations: Adaptations,
        *,
        trains: bool,
    ) -> None:
        """Add an adapter to a model's modules."""
        for (module, use), adaptation in adaptations.items():
            collection = module._modules.get("adapters")
            if collection is None:
                collection = module.adapters = nn.ModuleDict()
            assert isinstance(collection, nn.ModuleDict)
            if name not in collection:
                collection[name] = nn.ModuleDict()
            adaptation.requires_grad_(trains)
            adaptation.train(module.training)
            cast("nn.ModuleDict", collection[name])[use] = adaptation
            self.by_layer |= use != ALL
        self.configs[name] = config
        self._marks[name] = secrets.token_hex(8)

    def remove(self, model: nn.Module, names: Sequence[str]) -> None:
        """Remove adapters from a model's modules."""
        for module in adapted_modules(model):
            collection = cast("nn.ModuleDict", module.adapters)
            for name in names:
                if name in collection:
                    del collection[name]
            if not len(collection):
                _uninstall(module)
                del module.adapters
        for name in names:
            del self.configs[name], self._marks[name]
        self.active = tuple(one for one in self.active if one.name not in names)
        self.install(model)

    def move(self, model: nn.Module, other: nn.Module) -> None:
        """Take all adapters off the modules of a model, and put them on those of another."""
        for path, module in model.named_modules():
            collection = module._modules.get("adapters")
            if isinstance(collection, nn.ModuleDict):
                _uninstall(module)
                del module.adapters
                other.get_submodule(path).adapters = collection
        self.install(other)

    def keep(self, model: nn.Module, names: Collection[str]) -> None:
        """Remove adapters from a model's modules, unless a tensor of theirs is named."""
        for path, module in list(model.named_modules()):
            collection = module._modules.get("adapters")
            if not isinstance(collection, nn.ModuleDict):
                continue
            for name, uses in cast("Mapping[str, nn.ModuleDict]", dict(collection.items())).items():
                for use in list(uses):
                    own = f"{path}.adapters.{name}.{use}."
                    if not any(tensor.startswith(own) for tensor in names):
                        del uses[use]
                if not len(uses):
                    del collection[name]
            if not len(collection):
                _uninstall(module)
                del module.adapters

    def parts(self, model: nn.Module, name: str) -> dict[tuple[nn.Module, str], Adaptation]:
        """Return an adapter's changes by module and use."""
        return {
            (module, use): cast("Adaptation", adaptation)
            for module in adapted_modules(model)
            if name in (collection := cast("nn.ModuleDict", module.adapters))
            for use, adaptation in cast("nn.ModuleDict", collection[name]).items()
        }

    # -- which are in use --------------------------------------------------------------------

    def use(self, model: nn.Module, active: Sequence[Active]) -> None:
        """Activate adapters.

        Raises:
            InputError: two of them have a tensor in the place of the same one.
        """
        seen: dict[tuple[nn.Module, str, str], str] = {}
        for one in active:
            for (module, use), adaptation in self.parts(model, one.name).items():
                own = [*adaptation.instead, *(["rows"] if adaptation.rows is not None else [])]
                for leaf in own:
                    other = seen.setdefault((module, use, leaf), one.name)
                    if other != one.name:
                        raise InputError(
                            f"adapters {other!r} and {one.name!r} both have the {leaf} of a "
                            f"{type(module).__name__} as their own (modules_to_save, bias or "
                            "tokens); use one of them at a time"
                        )
                    if one.weight != 1:
                        raise InputError(
                            f"adapter {one.name!r} has tensors of its own (modules_to_save, bias "
                            f"or tokens), which no weight of {one.weight} can be given"
                        )
        self.active = tuple(active)
        self.install(model)

    def install(self, model: nn.Module) -> None:
        """Install the adapted forwards, or restore the original ones if none is active."""
        for module in adapted_modules(model):
            forward = vars(module).get("forward")
            if not self.enabled or self.merged is not None:
                _uninstall(module)
            elif not isinstance(forward, Forward):
                forward = forward_for(module, self.places)
                object.__setattr__(module, "forward", forward)
                forward.active = self.active
            else:
                forward.active = self.active

    def key(self, name: str | None = None) -> Key:
        """Return the cache key of the active adapters, or of one."""
        if not self.enabled or name == BASE_ROW:
            return ()
        used = self.active if name is None or name == IN_USE else (Active(name),)
        return tuple((self._marks[one.name], one.weight) for one in used)

    def place(self, names: Sequence[object], device: torch.device, *, copied: bool) -> AdapterPlace:
        """Return the place for rows with one adapter each, possibly with copies.

        Raises:
            InputError: one is not there, or none is enabled.
        """
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise InputError(f"adapter_names={shown(names)} has to be a list, a name for each row")
        if not self.enabled:
            raise InputError("adapter_names: adapters are disabled; call enable_adapters() first")
        self.check_known([name for name in names if name not in (None, BASE_ROW, IN_USE)])
        named = [BASE_ROW if name is None else str(name) for name in names]
        distinct = list(dict.fromkeys(named))
        rows = torch.tensor(
            [distinct.index(name) for name in named], device=device, dtype=torch.long
        )
        own = tuple(None if n == BASE_ROW else n for n in distinct)
        return AdapterPlace(names=own, rows=rows, copied=copied)

    def keys_of(self, place: AdapterPlace | None) -> tuple[Key, ...]:
        """Return the cache key of each row, or one for all."""
        if place is None or place.rows is None:
            return (self.key(),)
        keys = [self.key(BASE_ROW if name is None else name) for name in place.names]
        return tuple(keys[number] for number in place.rows.tolist())


def _uninstall(module: nn.Module) -> None:
    forward = vars(module).get("forward")
    if isinstance(forward, Forward):
        object.__delattr__(module, "forward")
        if forward.original is not None:
            object.__setattr__(module, "forward", forward.original)
