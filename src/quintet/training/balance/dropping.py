"""DeepSeek-V2's dropping of tokens: no device computes more than its share in training."""

import inspect
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from quintet.errors import InputError, shown
from quintet.layers.router import Choices, ExpertRouter
from quintet.modeling.decoder import DecoderModel
from quintet.modeling.packing import Packing


class TokenDropping:
    """Drops tokens beyond a device's share, in training mode alone (arXiv:2405.04434, §2.2.4).

    Of N tokens that go to A experts each, each of D devices computes N·A/D pairs of a token and an
    expert, times `capacity`, in each layer. Where more are sent to a device, those with the lowest
    affinities add nothing to their tokens and have no gradient. The texts of a share of `exempt`
    are never touched, so that the model knows both; which these are follows from their ids, the
    same in each layer, step and process. Inference is as without it. `close`, or leaving it as a
    context, ends it.

    Args:
        model: whose experts.
        devices: D; devices hold equally many experts, in their order.
        capacity: how many times its share a device computes.
        exempt: the share of texts that nothing is dropped of.

    Raises:
        InputError: the model has no experts, devices cannot share them, or a number breaks its
            rule.
    """

    def __init__(
        self, model: nn.Module, *, devices: int = 8, capacity: float = 1.0, exempt: float = 0.1
    ) -> None:
        routers = [m for m in model.modules() if isinstance(m, ExpertRouter)]
        if not routers:
            raise InputError(f"{type(model).__name__} has no experts to drop tokens of")
        for router in routers:
            if devices < 1 or router.num_experts % devices:
                raise InputError(
                    f"devices={shown(devices)} cannot hold {router.num_experts} experts, equally "
                    f"many each; give a divisor of {router.num_experts}"
                )
        if not capacity > 0:
            raise InputError(f"capacity={shown(capacity)} is a factor of a share; it is above 0")
        if not 0 <= exempt <= 1:
            raise InputError(f"exempt={shown(exempt)} is a share of all texts, from 0 to 1")
        self.devices, self.capacity, self.exempt = devices, capacity, exempt
        self._spared: Tensor | None = None
        decoders = [m for m in model.modules() if isinstance(m, DecoderModel)]
        self._handles = [
            *(m.register_forward_pre_hook(self._read, with_kwargs=True) for m in decoders),
            *(router.register_forward_hook(self._drop) for router in routers),
        ]

    def close(self) -> None:
        """Drop nothing from here on."""
        for handle in self._handles:
            handle.remove()
        self._spared = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _read(self, model: DecoderModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find out which tokens of the forward that begins here are spared, (N,)."""
        if model.training:
            given = inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
            self._spared = self._spare(model, given.pop("packing", {}) | given)

    def _spare(self, model: DecoderModel, given: Mapping[str, Any]) -> Tensor:
        ids = given.get("input_ids")
        if ids is None:
            raise InputError(
                "which texts are exempt from dropping follows from their ids; give input_ids, not "
                "inputs_embeds"
            )
        B, T = ids.shape
        mask = given.get("attention_mask")
        packing: Any = {name: given[name] for name in Packing.__annotations__ if name in given}
        texts = model.texts(
            (B, T),
            packing,
            mask,
            given.get("position_ids"),
            given.get("past_key_values"),
            use_cache=given.get("use_cache"),
        )
        rows = torch.arange(B, dtype=torch.long, device=ids.device)[:, None].expand(B, T)
        numbers = rows if texts is None else rows * T + texts.index
        if texts is None and mask is not None and mask.ndim == 2:
            real = mask[:, -T:].to(torch.bool)
            # A batch of nothing but padding is run as it is.
            if bool(real.any()):
                return chosen_by_content(ids[real], numbers[real], self.exempt)
        return chosen_by_content(ids.flatten(), numbers.flatten(), self.exempt)

    @torch.no_grad()
    def _keep_mask(self, router: ExpertRouter, logits: Tensor, indices: Tensor) -> Tensor:
        spared = self._spared
        if spared is None or len(spared) != len(indices):
            raise InputError(
                "tokens can be dropped in forwards of the whole model, which tell of what texts "
                "they are; a layer was called by itself"
            )
        scores = router.affinities(logits).gather(1, indices)
        devices = indices // (router.num_experts // self.devices)
        spared = spared.to(indices.device)[:, None].expand_as(indices)
        budget = int(self.capacity * indices.numel() / self.devices)
        return ~beyond_budget(scores, devices, spared, self.devices, budget)

    def _drop(
        self,
        router: ExpertRouter,
        args: tuple[Tensor] | tuple[Tensor, Choices],
        output: tuple[Tensor, Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        if not router.training:
            return None
        logits, weights, indices = output
        if len(args) > 1:
            mask = args[1].replay(lambda: self._keep_mask(router, logits, indices))
        else:
            mask = self._keep_mask(router, logits, indices)
        return logits, weights * mask, indices


def beyond_budget(
    scores: Tensor, devices: Tensor, spared: Tensor, count: int, budget: int
) -> Tensor:
    """Return a mask (N, A) of the pairs of token and expert that are dropped.

    Of each device those of the lowest scores go, until it has no more than its budget, or only
    pairs that are spared. Shapes: scores, devices and spared (N, A).
    """
    own = devices.flatten()
    order = scores.flatten().masked_fill(spared.flatten(), torch.inf).argsort(stable=True)
    order = order[own[order].argsort(stable=True)]
    sent = torch.zeros(count, dtype=torch.long, device=own.device)
    sent = sent.index_add(0, own, torch.ones_like(own))
    # The places of a device's pairs among all, by their scores, from the lowest on.
    place = torch.arange(len(own), dtype=torch.long, device=own.device)
    rank = torch.empty_like(own).scatter(0, order, place - (sent.cumsum(0) - sent)[own[order]])
    return (rank < (sent - budget)[own]).view_as(scores) & ~spared


def chosen_by_content(ids: Tensor, texts: Tensor, share: float) -> Tensor:
    """Return a mask (N,) of tokens whose text is in a share that the texts' ids choose.

    Shapes: ids and texts (N,), the tokens of a text beside each other.
    """
    _, number, lengths = torch.unique_consecutive(texts, return_inverse=True, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    places = torch.arange(len(ids), dtype=torch.long, device=ids.device) - starts[number]
    hashed = torch.zeros_like(lengths).index_add(0, number, _mixed(_mixed(places) + ids))
    lot = (_mixed(hashed) >> 32) & (2**24 - 1)
    return (lot < share * 2**24)[number]


def _mixed(x: Tensor) -> Tensor:
    """Hash integers, so that each input bit changes half of the output bits."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
