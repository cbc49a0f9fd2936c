"""The figures of a machine with a GPU, tried on a small model without one."""

import time

import torch

from benchmarks.gpu import BATCHES, DEPTHS, measured
from support import small_config


def test_every_case_is_measured_while_there_is_time() -> None:
    config = small_config(max_position_embeddings=512)
    soon = time.monotonic() + 1e6
    rows = list(measured("small", config, torch.device("cpu"), 64, soon))
    assert len(rows) == 1 + len(DEPTHS) * len(BATCHES)
    prompt, *steps = rows
    assert (prompt.tokens, prompt.read) == (64, 0)
    assert [row.tokens for row in steps] == [*BATCHES, *BATCHES]
    # What is read is the weights and the rows of the cache.
    first, last = steps[0].read, steps[-1].read
    row = 2 * 3 * 2 * 2 * 16
    assert last - first == row * (DEPTHS[1] * 32 - DEPTHS[0]) // 64
    late = list(measured("small", config, torch.device("cpu"), 64, 0.0))
    assert [row.case for row in late] == [prompt.case]
