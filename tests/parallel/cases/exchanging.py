"""Cases of processes that generate texts of their own and exchange experts' tokens."""

import itertools
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import quintet
from parallel.cases.generate import models, raised
from parallel.cases.tensor import world
from quintet.errors import (
    DisagreementError,
    EngineStoppedError,
    InputError,
    NonFiniteError,
    RankFailedError,
)
from quintet.parallel.lockstep import Lockstep
from quintet.serving import Engine, Limits, accompany, follow
from waiting import until

Options = dict[str, Any]
# Of each process, of different lengths, one with padding.
PROMPTS = [[[5, 17, 42, 3, 88, 9, 61], [1, 1, 2, 30, 71, 14, 6]], [[8, 8, 23]]]
TEXTS = [[5, 17, 42, 3, 88], [71, 14, 6], [9, 61, 2, 5, 17, 42, 3, 88]]
# How many tokens each asks for: one ends at once.
NEW = [11, 1, 5, 20]


def share(parts: Any) -> int:
    """Return which texts are this process's: those of its tensor-parallel group."""
    index, count = parts.world.share
    assert count == parts.world.degrees.fsdp
    return int(index)


def made(model: Any, number: int, options: Options) -> list[list[int]]:
    ids = torch.tensor(PROMPTS[number % 2]) + number
    out = model.generate(
        ids,
        attention_mask=(ids != 1 + number).long(),
        generator=torch.Generator().manual_seed(7 + number),
        **{"max_new_tokens": NEW[number], **options},
    )
    return out.tolist()  # type: ignore[no-any-return]


def texts(name: str, degrees: dict[str, int], each: list[Options], changes: Options) -> None:
    """Compare what each process makes of its own with what one process makes of it."""
    whole, parts = models(name, degrees, changes)
    number = share(parts)
    for turn, options in enumerate(each):
        # Who has the long text and who ends at once changes.
        own = (number + turn) % (2 if parts.world.degrees.fsdp == 2 else 4)
        assert made(parts, own, options) == made(whole, own, options), options


def apart(name: str, degrees: dict[str, int], changes: Options) -> None:
    """Each goes its own way, at other blocks than the other."""
    whole, parts = models(name, degrees, changes)
    number = share(parts)
    ways: list[Options] = [
        {"use_mtp": True, "num_assistant_tokens": 3},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True},
    ]
    for turn in range(3):
        options = {"max_new_tokens": 24, **ways[(number + turn) % 3]}
        assert made(parts, number, options) == made(whole, number, options), options


def script(source: Path, target: Path, fails: bool) -> None:
    """Load, generate from a prompt of each process, and save, as anybody writes it."""
    torch.set_num_threads(1)
    sizes = quintet.DistributedConfig(tp_size=1, ep_size=2)
    parts = quintet.AutoModelForCausalLM.from_pretrained(source, distributed_config=sizes)
    number = share(parts)
    if fails and number == 1:
        raise ValueError("no such number")
    print(made(parts, number, {"do_sample": True}))
    parts.save_pretrained(target)


def one_fails(name: str, degrees: dict[str, int], victim: int) -> None:
    """What fails in one process, before, within or behind its forwards, ends all."""
    whole, parts = models(name, degrees)
    number = share(parts)
    prompt = torch.tensor(PROMPTS[number])

    def broken(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 8:
            raise KeyError("of the caller's")
        return scores

    class Breaks(torch.nn.Module):
        """A part of a layer that fails when it is called a few times."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 4:
                raise OverflowError("in a layer")
            return x

    layer = parts.model.layers[1]
    norm = layer.post_attention_layernorm
    fails: list[tuple[Options, type[Exception], str]] = [
        ({"temperature": -1.0, "do_sample": True}, InputError, "temperature"),
        ({"logits_processor": [broken]}, KeyError, "of the caller's"),
        ({}, OverflowError, "in a layer"),
    ]
    if parts.world.degrees.tp > 1:
        # What a process does not agree on with those that have its text ends it, and so all.
        fails.pop()
    for options, kind, says in fails:
        # The others have much to do, or nothing any more.
        for new in (30, 1):
            mine = number == victim
            if mine and kind is OverflowError:
                layer.post_attention_layernorm = torch.nn.Sequential(norm, Breaks())
            asked = {"max_new_tokens": 30, **options} if mine else {"max_new_tokens": new}
            said = raised(
                lambda asked=asked: parts.generate(prompt, **asked),
                *((kind, RankFailedError) if mine else (RankFailedError,)),
            )
            layer.post_attention_layernorm = norm
            assert says in said, said
            if not mine:
                first = victim * parts.world.degrees.tp
                assert said.startswith(f"rank {first} raised {kind.__name__}: "), said
    # All go on.
    assert made(parts, number, {}) == made(whole, number, {})


def an_expert_fails(name: str, degrees: dict[str, int]) -> None:
    """What fails where an expert runs is raised there, and ends all."""
    whole, parts = models(name, degrees)
    number = share(parts)
    prompt = torch.tensor(PROMPTS[number])
    stack = type(parts.model.layers[1].mlp.experts)
    sound = stack.forward
    for new in ((12, 12), (12, 1)):
        # The one whose experts fail has a text of its own, or has nothing any more.
        calls = itertools.count(1)

        def fails(*args: Tensor, calls: Iterator[int] = calls) -> Tensor:
            if next(calls) > parts.config.num_hidden_layers:
                raise OverflowError("in an expert")
            return sound(*args)

        if number:
            stack.forward = fails
        kind = OverflowError if number else RankFailedError
        said = raised(partial(parts.generate, prompt, max_new_tokens=new[number]), kind)
        assert said == ("" if number else "rank 1 raised OverflowError: ") + "in an expert"
        stack.forward = sound
    assert made(parts, number, {}) == made(whole, number, {})


def one_is_interrupted(name: str, degrees: dict[str, int]) -> None:
    """Ctrl-C in one process ends all, and all go on."""
    whole, parts = models(name, degrees)
    number = share(parts)

    def stop(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] == 9 and number == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return scores

    for new in (40, 1):
        with pytest.raises(KeyboardInterrupt):
            parts.generate(
                torch.tensor(PROMPTS[number]),
                logits_processor=[stop],
                max_new_tokens=40 if number == 1 else new,
            )
    assert made(parts, number, {}) == made(whole, number, {})


def some_have_nothing(name: str, degrees: dict[str, int]) -> None:
    """A process without a text answers for its experts; so it does once in a row of calls."""
    whole, parts = models(name, degrees)
    for turn in range(3):
        if share(parts) == turn % 2:
            accompany(parts)
        else:
            assert made(parts, turn, {}) == made(whole, turn, {})
    with pytest.raises(InputError, match="an ep_size that is more than tp_size"):
        accompany(whole)


def refusals(name: str, degrees: dict[str, int]) -> None:
    """What cannot be is refused in all, before anything runs."""
    whole, parts = models(name, degrees)
    prompt = torch.tensor(PROMPTS[share(parts)])
    for model, options, says in (
        (parts, {"compile": True}, "compile cannot be used where several processes"),
        (parts, {"assistant_model": parts}, "assistant_model exchanges experts' tokens"),
        (whole, {"assistant_model": parts}, "assistant_model exchanges experts' tokens"),
    ):
        assert says in raised(lambda m=model, o=options: m.generate(prompt, **o), InputError)
    # An assistant that each has whole drafts for its own text.
    options = {"assistant_model": whole, "max_new_tokens": 9}
    assert made(parts, share(parts), options) == made(whole, share(parts), {"max_new_tokens": 9})


def learning_apart(name: str, degrees: dict[str, int]) -> str:
    """Forwards that record gradients, and are not the same in all, end in all."""
    _, parts = models(name, degrees)
    ids = torch.tensor(PROMPTS[0])
    if share(parts):
        # This process is at the first block again while the other is at the second.
        parts.model.layers[1].mlp.experts.forward = parts.model.layers[0].mlp.experts.forward
    return raised(lambda: parts(ids), DisagreementError)


@dataclass
class Noted:
    """A block of one expert, which notes its number when it runs."""

    number: int
    order: list[int]
    own: int = 1

    def run_sent(self, rows: Tensor, counts: Tensor) -> Tensor:
        self.order.append(self.number)
        assert rows.shape == (int(counts.sum()), 3)
        assert rows.dtype == torch.bfloat16
        return rows


@torch.no_grad()
def turns() -> list[int]:
    """Return in which order blocks run that two processes come to at different times."""
    here = world(fsdp=2, ep=2)
    order: list[int] = []
    lockstep = Lockstep(here.groups["ep"], here.device)
    lockstep.blocks += [Noted(number, order) for number in (1, 2, 3)]
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    for number in ((1,), (2, 3))[here.share[0]]:
        meeting = lockstep.at(number, torch.ones(2, 1, dtype=torch.long), x)
        lockstep.pass_on(meeting, x, lockstep.blocks[number - 1])
    lockstep.leave()
    return order


# -- engines ---------------------------------------------------------------------------------


def answers(engine: Engine, number: int, options: Options) -> list[list[int]]:
    """Ask several things at once, each with tokens of its own to make."""
    asked = [[*text, number + 2] for text in TEXTS]
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(
            pool.map(
                lambda text: [
                    token
                    for one in engine.answer(text[1], max_new_tokens=4 + 5 * text[0], **options)
                    for token in one.ids
                ],
                enumerate(asked),
            )
        )


def served(name: str, degrees: dict[str, int], options: Options, changes: Options) -> None:
    """Engines answer what each is asked, together, while others rest, and when they are closed."""
    whole, parts = models(name, degrees, changes)
    number, limits = share(parts), Limits(rows=2, capacity=48)
    if parts.world.place.tp[0]:
        return follow(parts)
    with Engine(whole, limits=limits) as engine:
        wanted = answers(engine, number, options)
    leaders = parts.world.groups["fsdp"]
    with Engine(parts, limits=limits) as engine:
        assert answers(engine, number, options) == wanted
        for turn in range(2):
            dist.barrier(leaders)
            if number == turn:
                assert answers(engine, number, options) == wanted
        dist.barrier(leaders)
        if number == 0:
            # The other is closed meanwhile, and its experts are there all the same.
            assert answers(engine, number, options) == wanted


def engine_fails(name: str, degrees: dict[str, int]) -> None:
    """An engine that has failed for good ends all; one step that has failed does not."""
    whole, parts = models(name, degrees)
    number, text = share(parts), TEXTS[1]
    leaders = parts.world.groups["fsdp"]
    stack = type(parts.model.layers[1].mlp.experts)
    sound = stack.forward
    made = whole.generate(torch.tensor([text]), max_new_tokens=6)[0].tolist()

    def fails(*args: Any) -> Tensor:
        raise OverflowError("of the test's")

    with suppress(EngineStoppedError), Engine(parts, limits=Limits(rows=2, capacity=48)) as engine:

        def ask() -> list[int]:
            return [token for one in engine.answer(text, max_new_tokens=6) for token in one.ids]

        if number:
            stack.forward = fails
        dist.barrier(leaders)
        if not number:
            # What an expert elsewhere made of this text is nothing.
            assert "NaN" in raised(ask, NonFiniteError)
        dist.barrier(leaders)
        stack.forward = sound
        dist.barrier(leaders)
        assert text + ask() == made
        dist.barrier(leaders)
        if number:
            parts.model.norm.forward = fails
            raised(ask, OverflowError)
            assert "3 forwards in a row failed" in raised(ask, EngineStoppedError)
            raise engine.stopped
        until(lambda: not engine.healthy)
        assert isinstance(engine.stopped.__cause__, RankFailedError)
        assert "rank 1 raised EngineStoppedError: 3 forwards" in str(engine.stopped)
