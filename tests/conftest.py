"""What all tests share: one thread, no network, no chatter."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    # Threads cost more than they give on models this small.
    torch.set_num_threads(1)
    torch.manual_seed(0)
