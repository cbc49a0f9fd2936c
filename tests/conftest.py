"""What all tests share: one thread, no network, no chatter."""

import gc
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Threads that wait for others do so asleep: the cores are other tests', and one that turns on the
# spot for a thread that has none costs six times what is computed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import pytest
import torch

if not torch.cuda.device_count():
    # Asked for where Triton is imported first: its kernels run in Python then.
    os.environ["TRITON_INTERPRET"] = "1"
    # Each seed, of which there are two in most tests, is kept for devices that are never there,
    # with the whole stack that it was set from.
    torch.cuda.manual_seed_all = torch.xpu.manual_seed_all = lambda seed: None

from forking import MODELS, Forks
from unlooked import forget_kernels


def _is_open(handle: int) -> None:
    os.fstat(handle)


# No test cuts the power: what is written is there, and a disk is not waited for.
os.fsync = _is_open
# Nothing that is imported from here on is garbage; on again once all is collected.
gc.disable()
TESTS = Path(__file__).parent
# Tests of several processes, each of which takes a core while it waits for the others: never two of
# them at once, and first, since they are the longest together.
CROWDED = ("parallel", "mission", "cli/test_together.py")
# What takes longest goes first, so that no process is left with one of them at the end.
LONG = (
    *("kernels/test_attention.py", "conformance/test_parity.py", "conformance/test_invariants.py"),
    *("generation/speculative/test_decoding.py", "conformance/test_batch_invariance.py"),
    *("generation/test_compiling.py", "kernels/test_stack.py", "triton/test_compiling.py"),
    *("test_hub.py", "test_docs.py"),
)


@cache
def crowded(path: Path) -> bool:
    """Tell whether a file's tests are of several processes."""
    return any(path.is_relative_to(TESTS / name) for name in CROWDED)


def pytest_configure(config: pytest.Config) -> None:
    if config.pluginmanager.hasplugin("hypothesispytest"):
        from hypothesis import HealthCheck, settings

        # How long an example takes says what else the machine does. The same are drawn each time,
        # so that who sees a failure made it; --hypothesis-profile=anew draws others.
        settings.register_profile(
            "anew", deadline=None, suppress_health_check=[HealthCheck.too_slow]
        )
        settings.register_profile("steady", settings.get_profile("anew"), derandomize=True)
        settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (not crowded(item.path), places.get(item.path, len(places))))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        """Files go to processes whole, and those that are crowded to one and the same."""

        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return "crowded" if crowded(config.rootpath / file) else file

    return Scheduling(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_finish() -> None:
    # What was imported and collected stays, and is not looked through again for garbage.
    gc.collect()
    gc.freeze()
    # Models are small and made by the thousand: a fifteenth of all time went into looking.
    gc.set_threshold(10_000)
    gc.enable()


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed() -> None:
    # Threads cost more than they give on models this small.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """What runs programs as processes of their own, where everything is imported already."""
    running = Forks(MODELS)
    yield running
    running.close()


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


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Patches of an environment in which no library was looked for yet."""
    forget_kernels()
    yield monkeypatch
    forget_kernels()
