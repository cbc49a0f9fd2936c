"""Layers on several processes: which has which.

A stage is a run of layers. The first also has the embedding, the last the norm and the head; a
weight that several use, such as a tied embedding or Zamba2's blocks, is on each that uses it.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Protocol, cast

import torch
from torch import nn

from quintet.errors import InputError
from quintet.layers.moe import ExpertBlock, ExpertStack
from quintet.layers.router import ExpertRouter
from quintet.layers.shared_transformer import SharedTransformer
from quintet.parallel.world import World

_USE = re.compile(r"\.adapters\.[^.]+\.(\d+)\.")


class _Config(Protocol):
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int


class DecoderStack(Protocol):
    """Interface of a model without its head."""

    config: _Config
    embed_tokens: nn.Embedding
    layers: nn.ModuleList

    @property
    def final_norm(self) -> nn.Module:
        """The norm behind the last layer."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of states."""
        ...


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of a part of a model.

    Attributes:
        numbers: the weights it holds.
        products: those that each token is multiplied by.
    """

    numbers: int
    products: int

    def __add__(self, other: "LayerCost") -> "LayerCost":
        return LayerCost(self.numbers + other.numbers, self.products + other.products)


def cost_of(module: nn.Module) -> LayerCost:
    """Count the weights of a part, and those a token passes: of experts, the ones it is sent to.

    Adapters are not counted, so that layers are given out alike with them and without.
    """
    named = module.named_modules()
    numbers = sum(_numel(one) for path, one in named if ".adapters." not in f".{path}.")
    idle = 0
    for block in module.modules():
        if isinstance(block, ExpertBlock) and isinstance(block.gate, ExpertRouter):
            stacked = sum(_numel(one) for one in block.modules() if isinstance(one, ExpertStack))
            idle += stacked - stacked * block.gate.active // block.gate.num_experts
    looked_up = isinstance(module, nn.Embedding)
    return LayerCost(numbers, 0 if looked_up else numbers - idle)


def split(
    layers: Sequence[LayerCost], count: int, before: LayerCost, after: LayerCost
) -> list[range]:
    """Give `count` stages runs of layers, so that none takes much more memory or time than others.

    What is least is the largest share that a stage has, of all weights or of all products,
    whichever is larger; the first has also what comes before the layers, the last what is behind.

    Raises:
        InputError: there are more stages than layers.
    """
    size = len(layers)
    if count > size:
        raise InputError(
            f"pp={count} stages of {size} layers: each has at least one; use pp <= {size}"
        )
    total = sum(layers, before + after)
    sums = [LayerCost(0, 0)]
    for one in layers:
        sums.append(sums[-1] + one)

    def share(start: int, end: int, stage: int) -> float:
        numbers = sums[end].numbers - sums[start].numbers
        products = sums[end].products - sums[start].products
        for at_end, more in ((stage == 0, before), (stage == count - 1, after)):
            numbers += more.numbers if at_end else 0
            products += more.products if at_end else 0
        return max(numbers / max(total.numbers, 1), products / max(total.products, 1))

    # The least largest share of layers up to an end, and where its last stage starts.
    least = [[(share(0, end, 0), 0) for end in range(size + 1)]]
    for stage in range(1, count):
        row = []
        for end in range(size + 1):
            starts = range(stage, end)
            found = [(max(least[-1][s][0], share(s, end, stage)), s) for s in starts]
            row.append(min(found, default=(float("inf"), 0)))
        least.append(row)
    ends = [size]
    for stage in range(count - 1, 0, -1):
        ends.append(least[stage][ends[-1]][1])
    return [range(start, end) for start, end in pairwise([0, *reversed(ends)])]


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that each process holds.

    Attributes:
        layers: of the main run, by stage.
        processes: who has each stage.
        names: of tensors, by process; those that several have are in several.
    """

    layers: tuple[range, ...]
    processes: tuple[int, ...]
    names: tuple[frozenset[str], ...]

    def of(self, process: int) -> tuple[int, ...]:
        """Return the stages that a process has."""
        return tuple(stage for stage, owner in enumerate(self.processes) if owner == process)

    def shared(self) -> dict[str, tuple[int, ...]]:
        """Return the processes of each tensor that several have."""
        found: dict[str, tuple[int, ...]] = {}
        for name in sorted(frozenset().union(*self.names)):
            holders = tuple(i for i, names in enumerate(self.names) if name in names)
            if len(holders) > 1:
                found[name] = holders
        return found


def owners(
    count: int, runs_each: int = 1, *, folded: bool = False, backwards: bool = False
) -> tuple[int, ...]:
    """Return the process, one of `count`, of each stage; see `stages_of`."""
    if backwards:
        return tuple(reversed(owners(count, runs_each, folded=folded)))
    turns = (divmod(stage, count) for stage in range(count * runs_each))
    return tuple(count - 1 - i if folded and turn % 2 else i for turn, i in turns)


def stages_of(
    model: nn.Module,
    count: int,
    runs_each: int = 1,
    *,
    folded: bool = False,
    backwards: bool = False,
) -> Stages:
    """Divide a whole model, which may be without memory, among processes.

    Args:
        model: the whole.
        count: how many processes.
        runs_each: how many stages each has, one after the other and then from the first again.
        folded: whether they are given out back and forth instead: the first process has the first
            stage and the last.
        backwards: whether the first process has the last stage. It is the one that chooses tokens,
            and finds their logits.

    Raises:
        InputError: there are more stages than layers, or its head is none of a language model.
    """
    path, base = _base(model)
    main = base.config.num_hidden_layers
    heads = heads_of(model)
    if count > 1 and heads.keys() - {"lm_head"}:
        raise InputError(
            f"pp={count}: {type(model).__name__} has the head {', '.join(heads)}, and stages are "
            "of models that predict tokens; use tp or fsdp"
        )
    costs = [cost_of(layer) for layer in base.layers]
    head_cost = sum(map(cost_of, heads.values()), LayerCost(0, 0))
    size = count * runs_each
    runs = split(costs[:main], size, cost_of(base.embed_tokens), sum(costs[main:], head_cost))
    processes = owners(count, runs_each, folded=folded, backwards=backwards)

    def holders(name: str) -> Iterator[int]:
        own = name.removeprefix(path)
        if own.startswith("embed_tokens."):
            yield 0
            for stage, run in enumerate(runs):
                if any(_looks_back(base.layers[i]) for i in run):
                    yield stage
            if len(base.layers) > main:
                yield size - 1
        elif own.startswith("layers."):
            # What an adapter does to a shared block in one layer is that layer's.
            use = _USE.search(own)
            index = int(use[1] if use else own.split(".")[1])
            yield next((stage for stage, run in enumerate(runs) if index in run), size - 1)
        else:
            yield size - 1

    tensors = model.state_dict(keep_vars=True)
    places: dict[int, set[int]] = {}
    for name, tensor in tensors.items():
        ranks = places.setdefault(id(tensor), set())
        ranks.update(processes[stage] for stage in holders(name))
    names = tuple(
        frozenset(name for name, tensor in tensors.items() if process in places[id(tensor)])
        for process in range(count)
    )
    return Stages(tuple(runs), processes, names)


def stages_to_run(model: nn.Module, world: World | None) -> Stages | None:
    """Return the stages of a model that is to be run, one for each process; None without `pp`.

    Raises:
        InputError: there are more processes than layers, or its head is none of a language model.
    """
    if world is None or world.degrees.pp == 1:
        return None
    return stages_of(model, world.degrees.pp, backwards=True)


def names_of_process(stages: Stages | None, world: World | None) -> frozenset[str] | None:
    """Return the names of the tensors that this process has any of; None for all."""
    if stages is None or world is None:
        return None
    return stages.names[world.coordinates["pp"]]


def _base(model: nn.Module) -> tuple[str, DecoderStack]:
    """Return a model without its head, and how names of that begin."""
    for name, child in model.named_children():
        if "layers" in child._modules:
            return f"{name}.", cast("DecoderStack", child)
    return "", cast("DecoderStack", model)


def decoder_of(model: nn.Module) -> DecoderStack:
    """Return a model without its head."""
    return _base(model)[1]


def heads_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's modules besides its base model, by name."""
    if not _base(model)[0]:
        return {}
    return {name: child for name, child in model.named_children() if "layers" not in child._modules}


def _looks_back(layer: nn.Module) -> bool:
    """Return whether a layer reads the embeddings of the tokens beside its input."""
    return any(isinstance(module, SharedTransformer) for module in layer.modules())


def _numel(module: nn.Module) -> int:
    # Quantised weights are buffers.
    tensors = chain(module.parameters(recurse=False), module.buffers(recurse=False))
    return sum(tensor.numel() for tensor in tensors)
