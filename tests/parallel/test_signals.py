"""Ctrl-C and SIGTERM end a command in all its processes, as they end it in one."""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from parallel import ending
from parallel.launching import Ended, launch
from quintet.cli.main import main
from quintet.training.settings import written
from tiny import build
from trainings import material, settings
from waiting import PATIENCE, until

ENDED = "ended by {}, as are the other processes\n"


@pytest.fixture(scope="module")
def tireless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for some seconds of text."""
    return build(tmp_path_factory.mktemp("models") / "tireless", context=30_000)


@pytest.mark.parametrize(
    ("number", "words", "sign"),
    [
        (
            signal.SIGINT,
            ("chat", "MODEL", "Hello", "-n", "20000", "min_new_tokens=20000"),
            "in each of",
        ),
        (
            signal.SIGTERM,
            ("generate", "Hello", "-m", "MODEL", "-n", "20000", "min_new_tokens=20000"),
            "in each of",
        ),
    ],
    ids=["chat", "generate"],
)
def test_what_torchrun_is_told_ends_all(
    number: signal.Signals, words: tuple[str, ...], sign: str, tireless: Path, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    command = [str(tireless) if word == "MODEL" else word for word in words]
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (
        said.open("w") as out,
        subprocess.Popen(
            [*start, ending.__file__, str(tmp_path), *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as agent,
    ):
        try:
            until(lambda: agent.poll() is not None or sign in said.read_text())
            agent.send_signal(number)
            agent.wait(PATIENCE)
        finally:
            agent.kill()
    text = said.read_text()
    codes = [(tmp_path / f"{rank}.code").read_text() for rank in (0, 1)]
    assert codes == [str(128 + number)] * 2, text
    assert text.count(ENDED.format(number.name)) == 1, text
    # Torchrun has one of its own.
    assert text.count("Traceback") == text.count("SignalException: "), text
    assert "error: " not in text
    for rank in (0, 1):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"{rank}.pid").read_text()), 0)


def command(*words: str) -> None:
    """Run a command line, as in a process that torchrun starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main([*words])


def ended(
    number: signal.Signals, where: Path, sign: str, *words: str, then: Callable[[str], object] = str
) -> list[Ended]:
    """Return how a command ended whose processes all got a signal when the first said something."""
    said = where / "0.err"
    with ThreadPoolExecutor() as pool:
        running = pool.submit(launch, 2, command, *words, where=where)
        until(lambda: running.done() or (said.exists() and sign in said.read_text()))
        then(said.read_text())
        for rank in (0, 1):
            os.kill(int((where / f"{rank}.pid").read_text()), number)
        return running.result()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_is_saved_and_ended(number: signal.Signals, tmp_path: Path) -> None:
    root = material(tmp_path)
    tables = {"train": {"steps": 100_000}, "report": {"peak_flops": 1e12, "every": 1}}
    config = settings(root, tmp_path / "run", **tables)
    (root / "config.toml").write_text(written(config))
    of_all = ended(number, tmp_path, "loss", "train", str(root / "config.toml"))
    assert [one.code for one in of_all] == [128 + number] * 2, of_all
    assert len([*(tmp_path / "run").glob("step-*")]) == 1
    text = "".join(one.err for one in of_all)
    assert text.count("ending after this step") == 1
    assert "Traceback" not in text, text
    assert "error: " not in text


def test_a_server_and_who_follows_it_end_alike(tireless: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    words = ("serve", str(tireless), "--port", "0", "--log-format", "text")
    of_all = ended(signal.SIGINT, tmp_path, "Ctrl-C ends it", *words, then=_answers)
    assert [one.code for one in of_all] == [130, 130], of_all
    text = "".join(one.err for one in of_all)
    assert "Traceback" not in text, text
    assert "error: " not in text


def _answers(said: str) -> None:
    """Wait until the server answers; it listens before."""
    (address,) = re.findall(r"http://127\.0\.0\.1:\d+(?=/v1)", said)
    with urllib.request.urlopen(f"{address}/health", timeout=PATIENCE) as answer:
        assert answer.status == 200
