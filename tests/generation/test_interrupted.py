"""An interrupt in the middle of a generation leaves model and cache as they can be gone on with."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.families import Family, each
from quintet.errors import InputError

NEW = 8
BASE: dict[str, Any] = {"eos_token_id": None, "pad_token_id": 0}


def prompt(B: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(2, 90, (B, 4)).repeat(1, 2)


class Keeping:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value[:, None] if value.ndim == 1 else value)

    def end(self) -> None:
        self.ended = True

    def text(self) -> Tensor:
        return torch.cat(self.got, dim=1)


def at_call(count: int) -> Callable[..., None]:
    """A hook, or a processor, that interrupts its n-th call."""
    calls = 0

    def interrupt(*given: Any, **named: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            raise KeyboardInterrupt

    return interrupt


@each
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_the_model_generates_as_before(family: Family, options: dict[str, Any]) -> None:
    model = family.model_of()

    def run(**more: Any) -> Tensor:
        seeds = [torch.Generator().manual_seed(row) for row in range(2)]
        made: Tensor = model.generate(
            prompt(2), max_new_tokens=NEW, generator=seeds, **BASE, **options, **more
        )
        return made

    plain = run()
    for count in (1, 4):
        hook = model.model.layers[1].register_forward_hook(at_call(count))
        with pytest.raises(KeyboardInterrupt):
            run()
        hook.remove()
        assert torch.equal(run(), plain)


@each
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
@pytest.mark.parametrize("where", ["layer", "head"])
def test_the_cache_is_gone_on_with(
    family: Family, B: int, drafts: dict[str, Any], where: str
) -> None:
    """Interrupted within a forward, or between it and the choice of tokens."""
    model = family.model_of()
    plain = model.generate(prompt(B), max_new_tokens=NEW, **BASE)
    for count in (2, 3):
        streamer, cache = Keeping(), model.new_cache()
        inside = model.model.layers[1] if where == "layer" else model.get_output_embeddings()
        hook = inside.register_forward_hook(at_call(count))
        with pytest.raises(KeyboardInterrupt):
            model.generate(
                prompt(B),
                past_key_values=cache,
                streamer=streamer,
                max_new_tokens=NEW,
                **BASE,
                **drafts,
            )
        hook.remove()
        assert streamer.ended
        text = streamer.text()
        assert torch.equal(text, plain[:, : text.shape[1]])
        if B > 1 and drafts:
            continue  # Rows may be ahead of what was streamed; what the cache holds is told below.
        room = plain.shape[1] - text.shape[1]
        told = ""
        try:
            made = model.generate(text, past_key_values=cache, max_new_tokens=room, **BASE)
            assert torch.equal(made, plain)
        except InputError as error:
            told = str(error)
        # A step that was run and not chosen from holds the whole text, and states cannot go back
        # within a forward: both are told, and nothing is wrong in silence.
        assert not told or "past_key_values holds" in told or "failed halfway" in told


@each
def test_no_draft_stays_in_the_cache(family: Family) -> None:
    model = family.model_of()
    plain = model.generate(prompt(2), max_new_tokens=NEW, **BASE)
    for count in (2, 3, 4):
        cache, interrupt = model.new_cache(), at_call(count)

        def processor(ids: Tensor, scores: Tensor, stop: Any = interrupt) -> Tensor:
            stop()
            return scores

        with pytest.raises(KeyboardInterrupt):
            model.generate(
                prompt(2),
                past_key_values=cache,
                logits_processor=[processor],
                prompt_lookup_num_tokens=3,
                max_new_tokens=NEW,
                **BASE,
            )
        # What it holds is the beginning of the text: gone on with from more of it, it fits.
        held = cache.lengths(2, torch.device("cpu"))
        assert bool((held < plain.shape[1]).all())
        last = int(held.max()) + 1
        made = model.generate(
            plain[:, :last],
            past_key_values=cache,
            max_new_tokens=plain.shape[1] - last or 1,
            **BASE,
        )
        assert torch.equal(made[:, : plain.shape[1]], plain)
