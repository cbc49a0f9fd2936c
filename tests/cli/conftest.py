"""Runs the command line: here, or as a process of its own where signals and pipes matter."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoTokenizer, DeepseekV3ForCausalLM
from quintet.cli.main import main
from tiny import build, predicting_config, trained_tokenizer

# Ctrl-C is heard also where the tests themselves were started in the background.
LAUNCH = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
{before}
from quintet.cli.main import main
main()
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def is_one_screen(self) -> bool:
        return len(self.err.splitlines()) <= 15 and "Traceback" not in self.err


Run = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[str]"]


class Terminal(io.StringIO):
    """Standard input at which somebody sits."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def quintet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run(*arguments: object, stdin: str | None = "") -> Result:
        monkeypatch.setattr(sys, "stdin", Terminal() if stdin is None else io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        captured = capsys.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def process() -> Iterator[Start]:
    """Start a command line as a process, after the statement `before`."""
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: object,
        before: str = "",
        environment: dict[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        child = subprocess.Popen(
            [sys.executable, "-c", LAUNCH.format(before=before), *map(str, arguments)],
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "dumb"},
                **(environment or {}),
            },
            text=True,
            **options,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture(scope="session")
def tireless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for some seconds of greedy text."""
    return build(tmp_path_factory.mktemp("models") / "tireless", context=30_000)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template, and with fewer ids than its tokenizer."""
    return build(tmp_path_factory.mktemp("models") / "plain", chat=False, vocab_size=262)


@pytest.fixture(scope="session")
def thinking_model(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template begins the reasoning, which its answers never end."""
    root = Path(shutil.copytree(chat_model, tmp_path_factory.mktemp("models") / "thinking"))
    tokenizer = AutoTokenizer.from_pretrained(root)
    begun = str(tokenizer.chat_template).replace("assistant\n'", "assistant\n<think>\n'")
    tokenizer.chat_template = begun
    tokenizer.save_pretrained(root)
    return root


@pytest.fixture(scope="session")
def predicting_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with a prediction layer, some of whose guesses are right."""
    root, tokenizer = tmp_path_factory.mktemp("models") / "predicting", trained_tokenizer()
    torch.manual_seed(7)
    config = predicting_config(vocab_size=len(tokenizer), context=256)
    model = DeepseekV3ForCausalLM(config)
    model.generation_config = model.generation_config.replace(pad_token_id=0)
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root
