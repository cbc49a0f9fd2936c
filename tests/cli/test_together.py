"""The command line in several processes: the first talks, the others follow in silence."""

import json
import os
import re
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from parallel.launching import Ended, launch
from quintet import demo_model
from quintet.cli.main import main
from quintet.ops import device_memory
from waiting import PATIENCE, until

# In bfloat16 sums of two parts round to other numbers, and soon to another text.
GREEDY = ("-t", "0", "-n", "12", "--dtype", "float32")


def command(*arguments: str) -> None:
    """Run a command line, as in a process that torchrun starts."""
    main([*arguments])


def run(where: Path, *arguments: str, size: int = 2, **options: Any) -> list[Ended]:
    return launch(size, command, *arguments, where=where, **options)


def test_a_text_is_continued_as_by_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, *others = run(tmp_path, "generate", "def f(x):", *GREEDY)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "def f(x):", *GREEDY])
    assert (first.code, ended.value.code) == (0, 0), first.err
    assert first.out == capsys.readouterr().out
    assert "in each of 2 processes (tp 2, ep 2)" in first.err
    assert [(one.code, one.out) for one in others] == [(0, "")]


def test_sizes_are_said_by_options(tmp_path: Path) -> None:
    first, _ = run(tmp_path, "generate", "def f(x):", *GREEDY, "--tp", "2")
    assert first.code == 0, first.err
    assert "in each of 2 processes (tp 2)" in first.err


def test_sizes_are_for_several_processes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["generate", "def f(x):", "--tp", "2"])
    assert ended.value.code == 2
    assert "tp_size=2: there is one process" in capsys.readouterr().err


def test_what_is_wrong_in_all_is_said_once(tmp_path: Path) -> None:
    first, *others = run(tmp_path, "generate", "def f(x):", "--model", "no/such/model")
    assert first.code == 3
    assert first.err.startswith("error: ")
    assert "no/such/model" in first.err
    assert "Traceback" not in first.err
    assert [(one.out, one.err) for one in others] == [("", "")]


@pytest.mark.parametrize(
    ("size", "how"), [(3, "(tp 3)"), (2, "(pp 2)")], ids=["by heads", "by layers"]
)
def test_a_question_is_answered(size: int, how: str, smollm2: Path, tmp_path: Path) -> None:
    """Of its 9 heads each of three processes has three; two have half of the layers each."""
    question = ("What is the capital of France?", "--system", "Answer in one sentence.")
    first, *others = run(tmp_path, "chat", str(smollm2), *question, *GREEDY, size=size)
    assert first.code == 0, first.err
    assert how in first.err
    assert "Paris" in first.out
    assert [(one.code, one.out) for one in others] == [(0, "")] * (size - 1)


def test_a_model_is_served(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    said = tmp_path / "0.err"
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(run, tmp_path, "serve", str(demo_model()), "--port", "0")
        until(lambda: serving.done() or (said.exists() and address(said)))
        answered = _asked(address(said))
        os.kill(int((tmp_path / "0.pid").read_text()), signal.SIGTERM)
        first, *others = serving.result()
    assert answered["choices"][0]["text"]
    assert first.code == 0, first.err
    assert "in each of 2 processes" in first.err
    assert [(one.code, one.out) for one in others] == [(0, "")]


def short_of_memory(*arguments: str) -> None:
    """Run a command line where the second process has little memory."""
    if os.environ["RANK"] == "1":
        device_memory.host_memory = lambda: 2 << 20
    main([*arguments])


def test_a_server_is_refused_where_one_process_has_no_room_for_its_part(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    words = ("serve", str(demo_model()), "--port", "0")
    first, second = launch(2, short_of_memory, *words, where=tmp_path)
    assert first.code == 5, first.err
    assert "each process needs" in first.err
    assert "and the one with the least has 1.05 MB; start more processes" in first.err
    assert second.code


def test_a_server_ends_with_who_follows_it(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    said = tmp_path / "0.err"
    with ThreadPoolExecutor() as pool:
        serving = pool.submit(run, tmp_path, "serve", str(demo_model()), "--port", "0")
        until(lambda: serving.done() or (said.exists() and address(said)))
        pid = int((tmp_path / "1.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(urllib.error.HTTPError) as refused:
            _asked(address(said))
        first, _ = serving.result()
    refused.value.close()
    assert refused.value.code == 503
    assert first.code == 1
    assert f"rank 1 (process {pid} on " in first.err
    assert "Traceback" not in first.err


def address(said: Path) -> str:
    """Return where the server says that it is."""
    return "".join(re.findall(r"http://127\.0\.0\.1:\d+(?=/v1\b|\")", said.read_text())[:1])


def _asked(where: str) -> Any:
    body = json.dumps({"model": "demo", "prompt": "def f(x):", "max_tokens": 8, "temperature": 0})
    request = urllib.request.Request(
        f"{where}/v1/completions",
        data=body.encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)
