"""What all tests share: one thread, no network, no chatter."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch


def pytest_collection_finish() -> None:
    # What was imported and collected stays, and is not looked through again for garbage.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    # Threads cost more than they give on models this small.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model with a chat template; not to be written to."""
    from tiny import build

    return build(tmp_path_factory.mktemp("models") / "chat")


@pytest.fixture(scope="session")
def published() -> Path:
    """The published vocabulary of Qwen2, which is not part of the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "qwen2-tokenizer"
    root = Path(os.environ.get("QUINTET_QWEN2_TOKENIZER", beside))
    if not (root / "vocab.json").is_file():
        pytest.skip(f"no Qwen2 vocabulary at {root}; set QUINTET_QWEN2_TOKENIZER")
    return root


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct, which talks; not part of the repository."""
    from quintet.errors import OfflineError
    from quintet.sources.smollm2 import fetch_smollm2

    try:
        return fetch_smollm2(local_files_only=True)
    except OfflineError as error:
        pytest.skip(f"{error}; `quintet info smollm2` fetches it")
