"""Cases of processes that generate texts of their own and exchange experts' tokens."""

import os
import signal
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import quintet
from parallel.cases.generate import models, raised
from quintet.errors import ContextLengthError, InputError, RankFailedError
from quintet.parallel.experts import lockstep_of

Options = dict[str, Any]
# Of each process, of different lengths, one with padding.
PROMPTS = [[[5, 17, 42, 3, 88, 9, 61], [1, 1, 2, 30, 71, 14, 6]], [[8, 8, 23]]]
# How many tokens each asks for: one ends at once.
NEW = [11, 1, 5, 20]


def share(parts: Any) -> int:
    """Return which texts are this process's: those of its tensor-parallel group."""
    return int(parts.world.coordinates["fsdp"])


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
