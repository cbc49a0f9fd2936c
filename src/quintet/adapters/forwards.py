"""Adapted forwards: the module's own plus the active adapters' additions."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from quintet.adapters.adaptation import EXPERT_STACKS, Adaptation
from quintet.adapters.bases import (
    dense,
    is_embedding,
    is_experts,
    is_linear,
    shape_of,
    with_tensors,
)
from quintet.adapters.lowrank import (
    Addition,
    EmbeddingLowRank,
    ExpertStackLowRank,
    LowRank,
    Remembered,
)
from quintet.adapters.stacked import FEW, AdapterShare, StackedLowRank
from quintet.layers.adapted import AdaptedForward, AdapterPlace, Places
from quintet.layers.moe import ExpertStack
from quintet.ops.moe import each_hit_expert, gated
from quintet.parallel.experts import Exchange, OwnExperts

# The use of a module that is one module's alone; a shared one's are the numbers of its layers.
ALL = "all"
# The adapter of a row that has those in use, beside rows that have their own.
IN_USE = "__in_use__"


class Active(NamedTuple):
    """An active adapter and its factor."""

    name: str
    weight: float = 1.0


class InUse(NamedTuple):
    """An active adapter's changes to a module, and their factor."""

    adaptation: Adaptation
    weight: float


def uses_of(module: nn.Module, name: str) -> Mapping[str, Adaptation]:
    """Return an adapter's changes to a module, by use."""
    collection = module._modules.get("adapters")
    own = collection._modules.get(name) if isinstance(collection, nn.ModuleDict) else None
    return {} if own is None else cast("Mapping[str, Adaptation]", own._modules)


def adapted_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that an adapter changes."""
    return [m for m in model.modules() if isinstance(m._modules.get("adapters"), nn.ModuleDict)]


class Forward(AdaptedForward):
    """The forward of an adapted module.

    Args:
        module: whose forward it takes the place of; `module.adapters` holds what they consist of.
        places: where forwards of the model are.
    """

    def __init__(self, module: nn.Module, places: Places) -> None:
        self.module, self.places = module, places
        self.original: Callable[..., Any] | None = vars(module).get("forward")
        self.active: tuple[Active, ...] = ()
        self._remembered: Remembered[Tensor] = Remembered()

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Run the module with the active adapters, or each row with its own."""
        place = self.places.current()
        if place is None or place.rows is None:
            return self.run(self.in_use(self.active, place), *args, **named)
        return self.by_rows(place, *args, **named)

    @abstractmethod
    def run(self, used: Sequence[InUse], *args: Any, **named: Any) -> Any:
        """Run the module with the active adapters."""

    def by_rows(self, place: AdapterPlace, x: Tensor, *others: Tensor) -> Tensor:
        """Run the module with an adapter per row; x is (..., C), or ids (...)."""
        shape = x.shape if is_embedding(self.module) else x.shape[:-1]
        which = place.per_vector(shape, x.device)
        y: Tensor | None = None
        for number, name in enumerate(place.names):
            ours = which == number
            if not bool(ours.any()):
                continue
            used = self.in_use(self.active_in_rows(name), place)
            own: Tensor = self.run(used, x[ours], *(other[ours] for other in others))
            if y is None:
                y = own.new_zeros(*shape, *own.shape[1:])
            y = y.index_put((ours,), own)
        assert y is not None
        return y

    def active_in_rows(self, name: str | None) -> tuple[Active, ...]:
        """Return what rows use that say they have this adapter."""
        return self.active if name == IN_USE else () if name is None else (Active(name),)

    def in_use(
        self, active: Sequence[Active], place: AdapterPlace | None = None
    ) -> tuple[InUse, ...]:
        """Return the changes that apply at the forward's place."""
        found = []
        for one in active:
            uses = uses_of(self.module, one.name)
            own = uses.get(ALL)
            if own is None and uses and place is not None:
                own = uses.get(str(place.layer))
            if own is not None:
                found.append(InUse(own, one.weight))
        return tuple(found)

    def matrix(self) -> Tensor | None:
        """Return the merged matrix, or None if the module is more than a matrix."""
        return None

    def changed(self, used: Sequence[InUse]) -> dict[str, Tensor]:
        """Return the module's tensors after the changes, in float32."""
        changed = {}
        for name in self._names(used):
            given = _instead(used, name)
            weight = dense(self.module, name) if given is None else given.detach().float()
            total = weight
            for one in used:
                if (addition := one.adaptation.addition(name)) is not None:
                    total = total + one.weight * addition.change(weight)
            changed[name] = total
        return changed

    def based(self, used: Sequence[InUse]) -> nn.Module:
        """Return the module with replaced tensors, without additions."""
        instead: dict[str, Tensor] = {}
        for one in used:
            instead |= dict(one.adaptation.instead.items())
        return with_tensors(self.module, instead)

    def call(self, base: nn.Module, *args: Any, **named: Any) -> Any:
        """Run the original forward."""
        if base is self.module and self.original is not None:
            return self.original(*args, **named)
        return type(base).forward(base, *args, **named)

    def _names(self, used: Sequence[InUse]) -> list[str]:
        names = ((*one.adaptation.instead, *one.adaptation.added) for one in used)
        return list(dict.fromkeys(name for found in names for name in found))


class _LinearForward(Forward):
    def __init__(self, module: nn.Module, places: Places) -> None:
        super().__init__(module, places)
        self._stacked: Remembered[StackedLowRank] = Remembered()

    def run(self, used: Sequence[InUse], x: Tensor) -> Tensor:
        base = self.based(used)
        return self._added(used, base, x, self.call(base, x))

    def by_rows(self, place: AdapterPlace, x: Tensor, *others: Tensor) -> Tensor:
        """Run the module once, and add what each row's adapter adds to it."""
        used = [self.in_use(self.active_in_rows(name), place) for name in place.names]
        if any(len(one.adaptation.instead) for found in used for one in found):
            return super().by_rows(place, x)
        y: Tensor = self.call(self.module, x)
        which = place.per_vector(x.shape[:-1], x.device)
        if which.numel() <= FEW and (stacked := self._all_stacked(used)) is not None:
            return stacked.added(x, y, which)
        for number, found in enumerate(used):
            ours = which == number
            if found and bool(ours.any()):
                y = y.index_put((ours,), self._added(found, self.module, x[ours], y[ours]))
        return y

    def _all_stacked(self, used: Sequence[Sequence[InUse]]) -> StackedLowRank | None:
        """Return the additions of all adapters, or None if one has more, or may learn."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        shares = []
        for number, one in ((n, one) for n, found in enumerate(used) for one in found):
            addition = one.adaptation.addition("weight")
            if not isinstance(addition, LowRank) or one.adaptation.rows is not None:
                return None
            if not addition.is_product or addition.training:
                return None
            shares.append(AdapterShare(number, addition, one.weight))
        if not shares:
            return None
        tensors = [t for one in shares for t in (one.addition.lora_A, one.addition.lora_B)]
        numbers = [n for one in shares for n in (one.number, one.addition.scale * one.weight)]
        return self._stacked.get(tensors, lambda: StackedLowRank.of(shares), numbers)

    def _added(self, used: Sequence[InUse], base: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Add what adapters add to y = x·Wᵀ + b of a module."""
        output = y
        for one in used:
            addition = one.adaptation.addition("weight")
            if isinstance(addition, LowRank):
                bias = base._parameters.get("bias")
                output = output + one.weight * addition.added(
                    x, y, lambda: dense(base, "weight"), bias
                )
            elif addition is not None:
                output = output + one.weight * nn.functional.linear(
                    x, addition.change(dense(base, "weight"))
                )
        output = output.to(y.dtype)
        for one in used:
            if one.adaptation.rows is not None:
                output = one.adaptation.rows.in_logits(x, output)
        return output

    def changed(self, used: Sequence[InUse]) -> dict[str, Tensor]:
        changed = super().changed(used)
        weight, bias = dense(self.based(used), "weight"), _instead(used, "bias")
        for one in used:
            addition = one.adaptation.addition("weight")
            more = addition.bias_change(weight) if isinstance(addition, LowRank) else None
            if more is not None:
                old_bias = self.module._parameters.get("bias") if bias is None else bias
                before = torch.zeros_like(more) if old_bias is None else old_bias.detach().float()
                changed["bias"] = changed.get("bias", before) + one.weight * more
            if one.adaptation.rows is not None:
                changed["weight"] = one.adaptation.rows.in_matrix(changed.get("weight", weight))
        return changed

    def matrix(self) -> Tensor | None:
        place = self.places.current()
        if place is not None and place.rows is not None:
            return None
        used = self.in_use(self.active, place)
        own = self.module._parameters.get("weight")
        if own is None or any("bias" in one.adaptation.instead for one in used):
            return None
        changes = [one.adaptation.addition("weight") for one in used]
        if any(isinstance(a, LowRank) and a.bias is not None for a in changes):
            return None
        if self.module._parameters.get("bias") is not None:
            return None
        tensors = [own, *(p for one in used for p in one.adaptation.parameters())]
        learns = self.module.training or any(t.requires_grad for t in tensors)
        if torch.is_grad_enabled() and learns:
            return None

        def make() -> Tensor:
            with torch.no_grad():
                whole = self.changed(used)
                return whole["weight"].to(own.dtype) if "weight" in whole else own

        return self._remembered.get(tensors, make, [one.weight for one in used])


class _EmbeddingForward(Forward):
    def run(self, used: Sequence[InUse], ids: Tensor) -> Tensor:
        base = self.based(used)
        y: Tensor = self.call(base, ids)
        output = y
        for one in used:
            addition = one.adaptation.addition("weight")
            if isinstance(addition, EmbeddingLowRank):
                output = output + one.weight * addition.added(ids, y, lambda: dense(base, "weight"))
        output = output.to(y.dtype)
        for one in used:
            if one.adaptation.rows is not None:
                output = one.adaptation.rows.in_vectors(ids, output)
        return output

    def changed(self, used: Sequence[InUse]) -> dict[str, Tensor]:
        changed = super().changed(used)
        for one in used:
            if one.adaptation.rows is not None:
                weight = changed.get("weight")
                weight = dense(self.module, "weight") if weight is None else weight
                changed["weight"] = one.adaptation.rows.in_matrix(weight)
        return changed


class _ExpertsForward(Forward):
    def run(self, used: Sequence[InUse], x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        base = cast("ExpertStack", self.based(used))
        if not any(one.adaptation.added or one.adaptation.experts for one in used):
            return cast("Tensor", self.call(base, x, indices, weights))

        def mapped(name: str, expert: int, x: Tensor) -> Tensor:
            y = output = base.map(name, expert, x)
            for one in used:
                output = _with_expert(one, name, expert, x, output)
            return output.to(y.dtype)

        def run(expert: int, rows: Tensor) -> Tensor:
            inside = gated(mapped("gate_up_proj", expert, rows), base.act_fn)
            return mapped("down_proj", expert, inside)

        # Of several processes, each has some.
        count = (shape_of(base, "down_proj") or (base.num_experts,))[0]

        def own(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            output = each_hit_expert(x, indices, weights, count, run)
            if len(x):
                return output
            # Backward, what learns is not to be missing where it had nothing to do.
            learning = [p for one in used for p in one.adaptation.parameters() if p.requires_grad]
            return output + sum(p.sum().to(output.dtype) * 0 for p in learning)

        if isinstance(self.original, OwnExperts | Exchange):
            return self.original.through(own)(x, indices, weights)
        return each_hit_expert(x, indices, weights, count, run)

    def changed(self, used: Sequence[InUse]) -> dict[str, Tensor]:
        changed = super().changed(used)
        for name, parts in EXPERT_STACKS.items():
            adapted = [
                one for one in used if any(n.endswith(parts) for n in one.adaptation.experts)
            ]
            if not adapted:
                continue
            whole = changed[name] if name in changed else dense(self.module, name)
            whole = whole.clone()
            for one in adapted:
                for expert, matrix in enumerate(whole.unbind(0)):
                    for part, rows in zip(parts, matrix.chunk(len(parts)), strict=True):
                        if (lora := one.adaptation.of_expert(expert, part)) is not None:
                            rows += one.weight * lora.change(rows)
            changed[name] = whole
        return changed


class _OtherForward(Forward):
    """A module that runs with changed matrices."""

    def run(self, used: Sequence[InUse], *args: Any, **named: Any) -> Any:
        base = self.based(used)
        whole: dict[str, Tensor] = {}
        for one in used:
            for name, addition in one.adaptation.added.items():
                own = base.get_parameter(name)
                before = whole.get(name, own)
                change = cast("Addition", addition).change(own.float())
                whole[name] = (before.float() + one.weight * change).to(own.dtype)
        return self.call(with_tensors(base, whole), *args, **named)


def forward_for(module: nn.Module, places: Places) -> Forward:
    """Return the adapted forward for a module."""
    if is_linear(module):
        return _LinearForward(module, places)
    if is_embedding(module):
        return _EmbeddingForward(module, places)
    if is_experts(module):
        return _ExpertsForward(module, places)
    return _OtherForward(module, places)


def _instead(used: Sequence[InUse], name: str) -> Tensor | None:
    found = [one.adaptation.replacement(name) for one in used]
    return next((tensor for tensor in reversed(found) if tensor is not None), None)


def _with_expert(used: InUse, name: str, expert: int, x: Tensor, y: Tensor) -> Tensor:
    """Add an adapter's part to an expert's map of x (n, I), y (n, O)."""
    adaptation, weight = used
    stack = adaptation.addition(name)
    if isinstance(stack, ExpertStackLowRank):
        y = y + weight * stack.delta(expert, x)
    parts = [adaptation.of_expert(expert, part) for part in EXPERT_STACKS[name]]
    if not any(parts):
        return y
    pieces = y.chunk(len(parts), dim=-1)
    return torch.cat(
        [
            piece if lora is None else piece + weight * lora.delta(x)
            for piece, lora in zip(pieces, parts, strict=True)
        ],
        dim=-1,
    )
