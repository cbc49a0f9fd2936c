"""The share of one device of a split: its weights and products, by stage."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from quintet.configuration import PreTrainedConfig
from quintet.errors import InputError
from quintet.parallel.stages import stages_of
from quintet.planning.weights import PREDICTION, ROUTED, Weight, on_meta
from quintet.planning.world import Split
from quintet.quantization.formats import FP8Format

Found = TypeVar("Found")
# The layers that have something; before the first, and behind the last.
Place = tuple[int, ...]
_BEFORE, _BEHIND = (-1,), (-2,)


@dataclass(slots=True)
class DeviceShare:
    """A device's part of some layers.

    Attributes:
        nbytes: bytes by kind.
        counts: numbers by kind, as parameters.
        read: bytes that every step reads, each time they are used; routed experts apart.
        products: multiplications of one token, by weights in FP8 and by others.
        routed_read: bytes of routed experts.
        routed_products: multiplications of a token that all experts here would take.
    """

    nbytes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    read: float = 0.0
    products: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})
    routed_read: float = 0.0
    routed_products: dict[bool, float] = field(default_factory=lambda: {False: 0.0, True: 0.0})

    def add(self, other: "DeviceShare", used: float = 1.0) -> None:
        """Add another's part, of whose uses `used` are here."""
        self.nbytes.update(other.nbytes)
        self.counts.update(other.counts)
        self.read += used * other.read
        self.routed_read += used * other.routed_read
        for in_fp8 in (False, True):
            self.products[in_fp8] += used * other.products[in_fp8]
            self.routed_products[in_fp8] += used * other.routed_products[in_fp8]

    @property
    def routed(self) -> int:
        """The numbers of routed experts."""
        return self.counts[ROUTED]

    @property
    def others(self) -> int:
        """The numbers of all else."""
        return sum(self.counts.values()) - self.routed


@dataclass(frozen=True, slots=True)
class StageShare:
    """The share of a device of one stage.

    Attributes:
        layers: which layers of the main run.
        share: of these, of what is before or behind them, and of prediction layers.
        largest: the numbers of the layer with the most of them.
    """

    layers: range
    share: DeviceShare
    largest: int


class PlannedModel:
    """A model that plans are made of: its weights, and sums over them for each split.

    Args:
        config: the model's.
        weights: all that it holds.
        redundant: how many copies of routed experts there are in each layer besides.
    """

    def __init__(
        self, config: PreTrainedConfig, weights: Sequence[Weight], redundant: int = 0
    ) -> None:
        self.config, self.weights, self.redundant = config, weights, redundant
        values = vars(config)
        routed = next((w for w in weights if w.kind == ROUTED), None)
        self.experts: int = routed.shape[0] if routed else 0
        self.active: int = (values.get("num_experts_per_tok") or 0) if routed else 0
        self.routed_layers = {layer for w in weights if w.kind == ROUTED for layer in w.layers}
        self._layers: dict[int, list[Weight]] = {}
        for weight in weights:
            for layer in weight.layers:
                self._layers.setdefault(layer, []).append(weight)
        # Layers are alike, and what is found for one of their weights holds for all.
        firsts: dict[Hashable, Weight] = {}
        self._alike = {
            w.name: firsts.setdefault((w.shape, w.cuts, w.format, w.dtype, w.kind, w.uses), w)
            for w in weights
        }
        self._known: dict[tuple[Hashable, ...], Any] = {}

    def of_layer(self, layer: int) -> Sequence[Weight]:
        """Return a layer's weights, those that it shares with others included."""
        return self._layers.get(layer, ())

    @property
    def parameters(self) -> int:
        """The number of parameters, counting one copy of redundant experts."""
        return sum(w.count for w in self.weights if not w.name.endswith(".inv_freq"))

    @property
    def form(self) -> str:
        """In which format most of its numbers are held, or in which dtype."""
        counts: Counter[str] = Counter()
        for weight in self.weights:
            plain = str(weight.dtype).removeprefix("torch.")
            counts[weight.format.name if weight.format else plain] += weight.count
        return counts.most_common(1)[0][0]

    @property
    def products(self) -> float:
        """The multiplications of one token and its logits by weights."""
        products = (self._chosen(w) * w.count * w.uses for w in self.weights if _multiplies(w))
        return float(sum(products))

    def _chosen(self, weight: Weight) -> float:
        return self.active / self.experts if weight.kind == ROUTED else 1.0

    def hit(self, tokens: float) -> float:
        """Return the share of the experts that this many tokens are sent to, if evenly."""
        if not self.experts:
            return 0.0
        return float(1 - (1 - min(self.active / self.experts, 1.0)) ** tokens)

    def stages(self, split: Split) -> Sequence[StageShare]:
        """Return the shares of the devices of each stage.

        Raises:
            InputError: some matrix, or the layers, cannot be shared so.
        """
        key = ("stages", split.tp, split.ep, split.pp)
        return self.remembered(key, lambda: self._staged(split))

    def widest(self, split: Split) -> int:
        """Return the most numbers that one token has as the input and output of a layer's map."""

        def found() -> int:
            own = (self.part(w, split) for w in self.weights if w.layers and len(w.shape) == 2)
            return max(map(sum, own), default=0)

        return self.remembered(("widest", split.tp, split.ep), found)

    def part(self, weight: Weight, split: Split) -> tuple[int, ...]:
        """Return the shape of a device's part of a weight, redundant experts included.

        Raises:
            InputError: devices cannot share it so.
        """
        first = self._alike[weight.name]
        key = ("part", first.name, split.tp, split.ep)
        return self.remembered(key, lambda: self._with_copies(first, split).local(split.counts))

    def remembered(self, key: tuple[Hashable, ...], make: Callable[[], Found]) -> Found:
        """Return the value of a key, computed at the first request."""
        if key not in self._known:
            self._known[key] = make()
        found: Found = self._known[key]
        return found

    def _staged(self, split: Split) -> Sequence[StageShare]:
        count = self.config.num_hidden_layers
        if split.pp > count:
            raise InputError(f"num_hidden_layers={count} are fewer than pp={split.pp} stages")
        shares = self._local(split)
        if split.pp == 1:
            return [self._stage(range(count), shares, before=True, last=True)]
        plain = self.remembered(("plain",), lambda: on_meta(self.config, torch.bfloat16))
        cut = self.remembered(("runs", split.pp), lambda: stages_of(plain, split.pp))
        embedding = next(w.name for w in self.weights if _place(w) == _BEFORE)
        return [
            self._stage(run, shares, before=embedding in names, last=run is cut.layers[-1])
            for run, names in zip(cut.layers, cut.names, strict=True)
        ]

    def _stage(
        self, layers: range, shares: Mapping[Place, DeviceShare], *, before: bool, last: bool
    ) -> StageShare:
        share, experts_of_layer = DeviceShare(), dict.fromkeys(layers, 0)
        for place, part in shares.items():
            own = [layer for layer in place if layer in experts_of_layer]
            if own:
                # What several layers have is on every stage with one of them.
                share.add(part, len(own) / len(place))
                for layer in own:
                    experts_of_layer[layer] += sum(part.counts.values())
        if before:
            # Of a tied embedding it is the last stage that multiplies by it.
            share.add(shares[_BEFORE], 1.0 if last else 0.0)
        if last:
            share.add(shares[_BEHIND])
        return StageShare(layers, share, max(experts_of_layer.values()))

    def _local(self, split: Split) -> dict[Place, DeviceShare]:
        return self.remembered(("shares", split.tp, split.ep), lambda: self._summed(split))

    def _summed(self, split: Split) -> dict[Place, DeviceShare]:
        found: dict[Place, DeviceShare] = {_BEFORE: DeviceShare(), _BEHIND: DeviceShare()}
        sizes: dict[str, tuple[int, int]] = {}
        for weight in self.weights:
            first = self._alike[weight.name]
            if first.name not in sizes:
                shape = self.part(first, split)
                sizes[first.name] = math.prod(shape), first.nbytes(shape)
            numbers, nbytes = sizes[first.name]
            share = found.setdefault(_place(weight), DeviceShare())
            share.nbytes[weight.kind] += nbytes
            share.counts[weight.kind] += numbers
            in_fp8 = isinstance(weight.format, FP8Format)
            products = numbers * weight.uses if _multiplies(weight) else 0.0
            if weight.kind == ROUTED:
                share.routed_read += nbytes * weight.uses
                share.routed_products[in_fp8] += products
            else:
                share.read += nbytes * weight.uses
                share.products[in_fp8] += products
        return found

    def _with_copies(self, weight: Weight, split: Split) -> Weight:
        """Return a weight with the redundant experts, which there are where experts are shared."""
        if not self.redundant or ".experts." not in weight.name or split.ep == 1:
            return weight
        return weight.resized(weight.shape[0] + self.redundant)


def _place(weight: Weight) -> Place:
    if weight.kind == PREDICTION:
        return _BEHIND
    if weight.layers:
        return weight.layers
    return _BEFORE if "embed_tokens" in weight.name else _BEHIND


def _multiplies(weight: Weight) -> bool:
    """Return whether tokens are multiplied with it as with a matrix."""
    return len(weight.shape) > 1 and weight.uses > 0
