"""A pipeline stage: its own layers, and the states that enter and leave.

What it does not have stays in its place as a module without parameters, which hands on what it is
given, so that names, indices and caches are those of the whole model.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import finalize

import torch
import torch.distributed as dist
from torch import Tensor, nn

from quintet.errors import InputError
from quintet.parallel.stages import DecoderStack, Stages, decoder_of, heads_of
from quintet.parallel.world import World

# Of states that were handed on and may not have left yet.
UNDERWAY = 8


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class StageLink:
    """Receives states from the stage before, and sends them to the next."""

    group: dist.ProcessGroup
    before: int | None
    behind: int | None
    underway: "deque[tuple[dist.Work, Tensor]]" = field(default_factory=deque, repr=False)

    def __post_init__(self) -> None:
        # What was handed on last would be lost where a program ends before it has left.
        finalize(self, _drain, self.underway)

    def receive(self, like: Tensor) -> Tensor:
        """Receive the previous stage's states, of the shape of `like`."""
        states = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        dist.recv(states, group=self.group, group_src=self.before)
        return states

    def send(self, states: Tensor) -> None:
        """Send states without waiting: the next stage may still be with those before."""
        payload = states.detach().contiguous()
        work = dist.isend(payload, group=self.group, group_dst=self.behind)
        assert work is not None
        self.underway.append((work, payload))
        while self.underway and (
            len(self.underway) > UNDERWAY or self.underway[0][0].is_completed()
        ):
            self.underway.popleft()[0].wait()


@dataclass(slots=True, eq=False)
class Stage:
    """The part of a model that is here.

    Attributes:
        indices: which stages.
        layers: of the main run, by stage.
        link: how states pass, where nobody else passes them.
        active: which of the stages here runs.
        given: whether somebody else passes states: then they are `incoming`, and `outgoing`.
        incoming: (most, C) the states of the tokens that the first layer is given, in the layout
            of the layers, and nothing of meaning behind them; of the first stage, None.
        outgoing: what the last layer made of them, (B, T, C).
        dtype: of states, where parameters are gathered in another than they are held in; None for
            that of the model.
    """

    indices: tuple[int, ...]
    layers: tuple[range, ...]
    link: StageLink
    active: int
    given: bool = False
    incoming: Tensor | None = None
    outgoing: Tensor | None = None
    dtype: torch.dtype | None = None

    @property
    def own(self) -> range:
        """The layers of the main run that run now."""
        return self.layers[self.active]

    @property
    def first(self) -> bool:
        """Whether the embedding's output goes to these layers."""
        return self.active == 0

    @property
    def last(self) -> bool:
        """Whether the norm and the head are behind these layers."""
        return self.active == len(self.layers) - 1

    @contextmanager
    def between(self, incoming: Tensor | None) -> Iterator[None]:
        """Run forwards inside on states that are given, and hand nothing on."""
        self.given, self.incoming = True, incoming
        try:
            yield
        finally:
            self.given, self.incoming, self.outgoing = False, None, None


def take_away(model: nn.Module, names: frozenset[str] | None) -> None:
    """Drop the weights that other processes have; `names` names those here, None for all."""
    if names is None:
        return
    # By modules: what is quantised has other names than when it was given out.
    paths = {name.rpartition(".")[0] for name in names}
    tensors = model.state_dict(keep_vars=True)
    kept_ids = {id(x) for name, x in tensors.items() if name.rpartition(".")[0] in paths}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in kept_ids:
                module._parameters[leaf] = None
        for leaf, buffer in module._buffers.items():
            persistent = leaf not in module._non_persistent_buffers_set
            if buffer is not None and persistent and id(buffer) not in kept_ids:
                module._buffers[leaf] = None


def leave_out(model: nn.Module, stages: Stages, world: World) -> Stage:
    """Drop the other stages' layers, and let states pass from stage to stage.

    That is the last that is done to a model: its weights are in place, and its hooks.
    """
    index, group = world.coordinates["pp"], world.groups["pp"]
    own_stages = stages.of(index)
    around = (None, *stages.processes, None)
    link = StageLink(group, around[own_stages[0]], around[own_stages[-1] + 2])
    stage = Stage(own_stages, stages.layers, link, active=own_stages[-1])
    base = decoder_of(model)
    take_away(model, stages.names[index])
    if not base.embed_tokens.state_dict():
        _replace(base.embed_tokens, _Placeholder(base, stage))
    for i, layer in enumerate(base.layers):
        if any(i in stages.layers[one] for one in own_stages):
            # Where there is one stage alone, its layers are as they were.
            if len(own_stages) > 1:
                vars(layer)["forward"] = _InTurn(stage, i, layer)
        elif i < base.config.num_hidden_layers or not stage.last:
            _replace(layer, _Absent(stage, i))
    if not stage.last:
        _replace(base.final_norm, _Pass())
        for head in heads_of(model).values():
            _replace(head, _Elsewhere(base.config.vocab_size))
    vars(model)["stage"] = stage
    return stage


# Objects, not closures: what they hold can be seen.


@dataclass(frozen=True, slots=True)
class _Placeholder:
    """In place of an embedding: vectors of the right shape, which no layer here reads."""

    base: DecoderStack
    stage: Stage

    def __call__(self, ids: Tensor) -> Tensor:
        shape = (*ids.shape, self.base.config.hidden_size)
        return torch.zeros(shape, dtype=self.stage.dtype or self.base.dtype, device=ids.device)


@dataclass(frozen=True, slots=True)
class _Pass:
    """In place of a norm that is on another stage."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


@dataclass(frozen=True, slots=True, eq=False)
class _Absent:
    """In place of a layer of another stage; states come in before, and go out behind those here."""

    stage: Stage
    index: int

    def __call__(self, hidden_states: Tensor, **others: Any) -> Tensor:
        if self.index == self.stage.own.start - 1:
            return self._enter(hidden_states)
        if self.index == self.stage.own.stop:
            if self.stage.given:
                self.stage.outgoing = hidden_states
            else:
                self._check()
                self.stage.link.send(hidden_states)
        return hidden_states

    def _check(self) -> None:
        if len(self.stage.indices) > 1:
            raise InputError(
                f"the {len(self.stage.indices)} stages of this process run in a training alone; "
                "cut the model into one stage for each process (1F1B or GPipe) to run it by itself"
            )

    def _enter(self, hidden_states: Tensor) -> Tensor:
        if not self.stage.given:
            self._check()
            states = self.stage.link.receive(hidden_states)
            if torch.is_grad_enabled():
                states.requires_grad_().register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
            return states
        incoming = self.stage.incoming
        if incoming is None:
            return hidden_states
        tokens = hidden_states.shape[:2]
        return torch.unflatten(incoming[: tokens.numel()], 0, tokens)


@dataclass(frozen=True, slots=True, eq=False)
class _InTurn:
    """The forward of a layer of one of several stages: it runs where its stage does."""

    stage: Stage
    index: int
    layer: nn.Module

    def __call__(self, hidden_states: Tensor, **others: Any) -> Tensor:
        if self.index in self.stage.own:
            output: Tensor = type(self.layer).forward(self.layer, hidden_states, **others)
            return output
        return _Absent(self.stage, self.index)(hidden_states)


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """In place of a head that is on the last stage: logits with a shape and no data."""

    vocab_size: int

    def __call__(self, hidden_states: Tensor) -> Tensor:
        shape = (*hidden_states.shape[:-1], self.vocab_size)
        return torch.empty(shape, dtype=hidden_states.dtype, device="meta")


def _drain(underway: "deque[tuple[dist.Work, Tensor]]") -> None:
    # Where the next stage is no more, somebody else tells.
    with suppress(RuntimeError):
        while underway:
            underway.popleft()[0].wait()


def _replace(module: nn.Module, forward: Any) -> None:
    """Replace a module's forward; its own hooks refer to the old one."""
    vars(module)["forward"] = forward
    module._forward_hooks.clear()
    module._forward_pre_hooks.clear()


def _refuse_gradient(gradient: Tensor) -> None:
    raise InputError(
        "backward() ends at the border of a stage, and the layers before it would learn nothing; "
        "train stages with quintet.parallel.pipeline, which brings gradients back"
    )
