"""What tests of the engine share."""

import torch
from torch import Tensor

from quintet.generation.engine import Engine
from quintet.generation.sequence import Sequence

ENDS = {"eos_token_id": 5, "pad_token_id": 0}


def prompt_of(length: int, seed: int) -> Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randint(6, 90, (1, length), generator=dice)


def run(engine: Engine, sequences: list[Sequence]) -> None:
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.finished for sequence in sequences):
        engine.step(sequences)
