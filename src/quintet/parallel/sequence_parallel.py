"""Sequence parallelism: token-wise computation runs on a slice of the tokens.

Between the regions in which each process computes a part of a matrix, residuals and norms are the
same on all of them. There each process takes its slice of the tokens (arXiv:2205.05198, §4.2.2):
tokens are gathered where a region begins, and cut where its parts have been added up. Weights
between regions learn from a slice on each process, and their gradients add up.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.errors import InputError
from quintet.kernels.shared_buffer import SharedBuffer
from quintet.layers.plain import Idle, Summing
from quintet.layers.shared_transformer import SharedTransformer
from quintet.parallel.apply import Entering, Reducing
from quintet.parallel.regions import entered, gathered, reduced, scattered, sliced
from quintet.parallel.shared_buffer import shared_buffer_of
from quintet.parallel.stage import Stage
from quintet.parallel.stages import decoder_of
from quintet.parallel.vocabulary import widths
from quintet.parallel.world import World
from quintet.sharding import Sharding


class TokenSlices:
    """The cut of tokens in sequence parallelism, and the gradients that are partial sums.

    Attributes:
        partial: the parameters that learn from a slice.
    """

    def __init__(self, group: dist.ProcessGroup, index: int, count: int) -> None:
        self.group, self.index, self.count = group, index, count
        self.partial: tuple[str, ...] = ()
        # Of the forward that runs, how many tokens there are, counted over packed rows.
        self._tokens = 0

    def begin(self, tokens: int) -> None:
        """Note the number of tokens of the forward that begins."""
        self._tokens = tokens

    def cut(self, x: Tensor) -> Tensor:
        """Return this process's slice of (B, T, ...)."""
        return sliced(x, self.group, widths=widths(self._tokens, self.count), dim=1)

    def whole(self, x: Tensor) -> Tensor:
        """Return all tokens of slices (B, T/t, ...)."""
        return gathered(x, self.group, widths=widths(self._tokens, self.count), dim=1)

    def entered(self, x: Tensor) -> Tensor:
        """Join slices into all tokens, for a partial use in each process."""
        return entered(x, self.group, widths=widths(self._tokens, self.count), dim=1)

    def left(self, x: Tensor) -> Tensor:
        """Return this process's slice of the sum of all partial results, (B, T, ...)."""
        return scattered(x, self.group, widths=widths(self._tokens, self.count), dim=1)

    @torch.no_grad()
    def add_up(self, gradients: Mapping[str, Tensor]) -> None:
        """Add up gradients, by the names of their parameters, that are parts of a sum: in place."""
        for name in self.partial:
            if name in gradients:
                dist.all_reduce(gradients[name], group=self.group)


def slice_tokens(model: nn.Module, sharding: Sharding, world: World) -> TokenSlices:
    """Let a model that `tp` divides compute norms and residuals for slices where it learns.

    Without gradients it runs as before: a step of one token has no slices. Of a model in stages,
    each gathers what it hands on.

    Raises:
        InputError: there is no tp.
    """
    if "tp" not in world.groups:
        raise InputError("sequence parallelism goes with tp, whose processes share the tokens")
    slices = TokenSlices(world.groups["tp"], *world.place.tp)
    base, stage = decoder_of(model), vars(model).get("stage")
    assert stage is None or isinstance(stage, Stage)
    run = range(base.config.num_hidden_layers) if stage is None else stage.own
    layers = [base.layers[i] for i in run]
    ends_here = stage is None or stage.last
    layers[0].register_forward_pre_hook(_Begin(slices), with_kwargs=True)
    (base.final_norm if ends_here else layers[-1]).register_forward_hook(_Gather(slices))
    regions: dict[int, nn.Module] = {}
    for begins, ends in _regions(model, layers, sharding):
        if id(begins) not in regions:
            regions[id(begins)] = begins
            # What f and g do besides is done in one with them.
            if not _in_place(begins._forward_pre_hooks, Entering, _Enter(slices, parts=True)):
                whole = _Enter(slices, parts=False)
                begins.register_forward_pre_hook(whole, with_kwargs=True, prepend=True)
            if not _in_place(ends._forward_hooks, Reducing, _LeaveParts(slices)):
                ends.register_forward_hook(_Leave(slices))
    inside = {id(p) for region in regions.values() for p in region.parameters()}
    own = [p for layer in layers for p in layer.parameters()]
    own += base.final_norm.parameters() if ends_here else []
    sums = {id(p) for p in own} - inside
    slices.partial = tuple(name for name, p in model.named_parameters() if id(p) in sums)
    return slices


def _in_place(hooks: MutableMapping[int, Any], kind: type[object], hook: object) -> bool:
    """Put a hook in the place of the one of a class, if there is one."""
    found = [number for number, one in hooks.items() if isinstance(one, kind)]
    hooks.update(dict.fromkeys(found, hook))
    return bool(found)


def _regions(
    model: nn.Module, layers: list[nn.Module], sharding: Sharding
) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield the modules that begin and end regions of layers, and see all tokens.

    A block that reads embeddings beside its input is one, as those are whole.
    """
    paths = {id(layer): path for path, layer in model.named_modules()}
    own = {f"{paths[id(layer)]}." for layer in layers}
    blocks = {
        path: module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SharedTransformer)
    }
    for block in blocks.values():
        yield block, block
    for name in sharding.reduces:
        inside = any(name.startswith(f"{path}.") for path in blocks)
        if inside or not any(name.startswith(path) for path in own):
            continue
        ends = model.get_submodule(name)
        is_map = isinstance(ends, nn.Linear)
        yield (model.get_submodule(name.rpartition(".")[0]) if is_map else ends), ends


# Objects, not closures: what they hold can be seen.


@dataclass(frozen=True, slots=True)
class _Begin(Idle):
    """A hook that slices the input of the first layer."""

    slices: TokenSlices

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
        self.slices.begin(args[0].shape[1])
        return (self.slices.cut(args[0]), *args[1:]), kwargs


@dataclass(frozen=True, slots=True)
class _Enter(Idle):
    """A hook that gives a region all tokens.

    Attributes:
        parts: whether each process makes a part of what the region makes, rather than all of it.
    """

    slices: TokenSlices
    parts: bool

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not torch.is_grad_enabled():
            return None
        return _apply_to_all(args, kwargs, self.slices.entered if self.parts else self.slices.whole)


@dataclass(frozen=True, slots=True)
class _Leave(Idle):
    """A hook that slices a region's output, which all processes have."""

    slices: TokenSlices

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.slices.cut(output) if torch.is_grad_enabled() else output


@dataclass(frozen=True, slots=True)
class _LeaveParts(Summing):
    """A hook that sums a region's partial outputs, and leaves a slice."""

    slices: TokenSlices

    def shared_buffer(self) -> SharedBuffer | None:
        """Return the shared buffer of the processes, or None."""
        return shared_buffer_of(self.slices.group)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.slices.left(output)
        return reduced(output, self.slices.group)


@dataclass(frozen=True, slots=True)
class _Gather(Idle):
    """A hook that puts slices together behind the last norm, or layer."""

    slices: TokenSlices

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.slices.whole(output) if torch.is_grad_enabled() else output


def _apply_to_all(
    args: tuple[Any, ...], kwargs: dict[str, Any], apply: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply to all tensors among arguments."""
    named = {n: apply(x) if isinstance(x, Tensor) else x for n, x in kwargs.items()}
    return tuple(apply(x) if isinstance(x, Tensor) else x for x in args), named
