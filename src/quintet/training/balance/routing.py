"""The routing of a forward, as balance losses use it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quintet.errors import InputError
from quintet.layers.router import ExpertRouter
from quintet.ops.documents import documents_of
from quintet.parallel.context_parallel import Chunks
from quintet.training.batch import Batch


@dataclass(frozen=True, slots=True)
class RoutedLayer:
    """One router's decisions for N tokens.

    Attributes:
        router: the router itself.
        logits: (N, E), in float32.
    """

    router: ExpertRouter
    logits: Tensor

    def affinities(self) -> Tensor:
        """Return s (N, E), as the family defines it."""
        return self.router.affinities(self.logits)

    def choice(self, scores: Tensor) -> Tensor:
        """Return the experts (N, A) that tokens with affinities (N, E) were sent to."""
        return self.router.choice(scores)


@dataclass(frozen=True, slots=True)
class Routing:
    """The decisions of all routers for N tokens, padding excluded.

    Attributes:
        layers: of each layer with experts that was run.
        texts: (N,) the number of each token's text among all texts of the batch.
        count: how many texts the batch has.
        tokens: how many tokens the batch has, of which other processes may have run some.
        depth: how many layers with experts were run, of which other processes may have run some.
        loads: (L, E) how often each expert is chosen in all parts of the step; None if this is
            the only part.
        chunks: which tokens these are, where processes share rows; None for all.
    """

    layers: tuple[RoutedLayer, ...]
    texts: Tensor
    count: int
    tokens: int
    depth: int
    loads: Tensor | None = None
    chunks: Chunks | None = None

    def summed(self, own: Tensor) -> Tensor:
        """Return the sum over all tokens of the batch, without gradients."""
        return own if self.chunks is None else self.chunks.summed(own)

    def per_layer(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the affinities (N, E) and chosen experts (N, A) of each layer."""
        for layer in self.layers:
            scores = layer.affinities()
            yield scores, layer.choice(scores)


def routing_of(
    model: nn.Module,
    router_logits: Sequence[Tensor],
    batch: Batch,
    loads: Tensor | None = None,
    chunks: Chunks | None = None,
    depth: int | None = None,
) -> Routing:
    """Return the routing of a batch.

    Args:
        model: what was run.
        router_logits: (B·T, E) of each of its layers with experts; those of prediction layers
            come last, or not at all.
        batch: what it was run over.
        loads: see `Routing`.
        chunks: see `Routing`; router logits are of these tokens.
        depth: see `Routing`; as many layers as there are logits of if not given.

    Raises:
        InputError: the model has no experts, or fewer routers than there are logits.
    """
    # Of layers in another process there are neither weights nor logits.
    routers = [
        module
        for module in model.modules()
        if isinstance(module, ExpertRouter) and any(True for _ in module.parameters(recurse=False))
    ]
    if not router_logits or len(router_logits) > len(routers):
        raise InputError(
            f"a {type(model).__name__} has {len(routers)} layers with experts, and there are "
            f"router logits of {len(router_logits)}; losses of unbalanced experts need a model "
            "with experts, and its output with output_router_logits=True"
        )
    numbers, count = texts_of(batch)
    numbers = (numbers if chunks is None else chunks.of(numbers, -1)).flatten()
    places = (numbers >= 0).nonzero().flatten()
    layers = []
    for router, logits in zip(routers, router_logits, strict=False):
        own = logits.flatten(0, -2)
        own = own if len(places) == len(own) else own[places.to(own.device)]
        layers.append(RoutedLayer(router, own.to(torch.float32)))
    texts = numbers[places].to(layers[0].logits.device)
    depth = len(layers) if depth is None else depth
    return Routing(tuple(layers), texts, count, batch.tokens, depth, loads, chunks)


def texts_of(batch: Batch) -> tuple[Tensor, int]:
    """Return the index of each token's text, (B, T) and -1 for padding, and their number.

    Each row is a text, or several of which `seq_idx` tells; they are counted over all rows.
    """
    index = batch.seq_idx
    if index is None:
        index = torch.zeros_like(batch.input_ids)
    texts = documents_of(index)
    number = torch.zeros_like(index) if texts is None else texts.index
    mask = batch.attention_mask
    mask = torch.ones_like(number) if mask is None else mask
    mask = mask.to(torch.bool)
    columns = number.shape[1]
    keys = (
        number
        + columns * torch.arange(len(number), dtype=number.dtype, device=number.device)[:, None]
    )
    found, places = torch.unique(keys[mask], return_inverse=True)
    numbers = torch.full_like(number, -1).masked_scatter(mask, places)
    return numbers, len(found)
