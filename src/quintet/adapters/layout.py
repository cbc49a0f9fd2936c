"""The module paths of a model that adapters may name."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from quintet.adapters.forwards import ALL

_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Spot:
    """A module under one of its paths.

    Attributes:
        path: as files have it.
        module: the module.
        use: what it is used as there: by one layer of several that share it, or by all.
    """

    path: str
    module: nn.Module
    use: str


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """The modules of a model by path.

    Attributes:
        spots: each path, and what is there.
        prefix: what the paths of a model with a head begin with, where this one has none.
        tied: the head's path and the embedding's, where they share their weight.
        heads: the paths of heads.
    """

    spots: Mapping[str, Spot]
    prefix: str
    tied: tuple[str, str] | None
    heads: frozenset[str]

    def find(self, path: str) -> Spot | None:
        """Return the spot at a file's path."""
        found = self.spots.get(path)
        if found is None and self.prefix and path.startswith(self.prefix):
            found = self.spots.get(path.removeprefix(self.prefix))
        return found

    def named(self, path: str) -> str:
        """Return the name in files for a path of this model."""
        return self.prefix + path

    def __iter__(self) -> Iterator[Spot]:
        return iter(self.spots.values())


def layout_of(
    model: nn.Module,
    *,
    layers: int,
    prefix: str = "",
    tied: tuple[str, str] | None = None,
    heads: Iterable[str] = (),
) -> ModuleLayout:
    """Collect the module paths of a model, without its adapters.

    Args:
        model: the model.
        layers: how many layers it has; those behind them are prediction layers, which nothing
            but this library has.
        prefix: what paths of its files begin with and its own do not.
        tied: the head and the embedding, where they share their weight.
        heads: the paths of heads.
    """
    paths: dict[str, nn.Module] = {}
    uses: dict[nn.Module, set[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not path or ".adapters." in f".{path}.":
            continue
        layer = _LAYER.match(f"{path}.")
        if layer and int(layer[1]) >= layers:
            continue
        paths[path] = module
        uses.setdefault(module, set()).add(layer[1] if layer else ALL)
    spots = {}
    for path, module in paths.items():
        layer = _LAYER.match(f"{path}.")
        shared = len(uses[module]) > 1 and layer is not None
        spots[path] = Spot(path, module, layer[1] if shared and layer else ALL)
    return ModuleLayout(spots, prefix, tied, frozenset(heads))
