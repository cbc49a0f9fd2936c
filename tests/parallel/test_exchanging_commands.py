"""Commands in processes with texts of their own: one talks, or each is a server of its own."""

import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch

from parallel.launching import free_port, launch
from quintet import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM
from quintet.cli.main import main
from tiny import predicting_config, trained_tokenizer
from waiting import PATIENCE, until

PROMPTS = ["Hello there", "The quick brown fox jumps over"]
SIZES = ("--tp", "1", "--ep", "2")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 with its tokenizer, whose text never ends."""
    root = tmp_path_factory.mktemp("models") / "mixture"
    tokenizer = trained_tokenizer()
    torch.manual_seed(3)
    model = DeepseekV3ForCausalLM(predicting_config(vocab_size=len(tokenizer), context=256))
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def wanted(path: Path, new: int) -> list[str]:
    """Return what one process makes of each prompt."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(path),
        AutoTokenizer.from_pretrained(path),
    )
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=new, do_sample=False)
        found.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def ports() -> int:
    """Return a port that is free, as is the next one."""
    while True:
        port = free_port()
        with closing(socket.socket()) as sock:
            if sock.connect_ex(("127.0.0.1", port + 1)):
                return port


def command(*words: str) -> None:
    """Run a command line, as in a process that torchrun starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main([*words])


def ask(address: str, prompt: str, new: int) -> str:
    body = {"model": "it", "prompt": prompt, "max_tokens": new, "temperature": 0}
    asked = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
        return str(json.load(answer)["choices"][0]["text"])


def test_each_group_answers_at_a_port_of_its_own(mixture: Path, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    port = ports()
    words = ("serve", f"it={mixture}", "--port", str(port), "--log-format", "text", *SIZES)
    said = [tmp_path / f"{rank}.err" for rank in (0, 1)]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(launch, 2, command, *words, where=tmp_path)
        until(
            lambda: (
                running.done()
                or all(one.exists() and "Ctrl-C ends it" in one.read_text() for one in said)
            )
        )
        texts = [one.read_text() for one in said]
        found = [re.findall(r"http://127\.0\.0\.1:\d+(?=/v1)", text) for text in texts]
        assert found == [[f"http://127.0.0.1:{port + rank}"] for rank in (0, 1)], texts
        asked = [
            pool.submit(ask, address, prompt, 8 + 12 * rank)
            for rank, ((address,), prompt) in enumerate(zip(found, PROMPTS, strict=True))
        ]
        answers = [one.result() for one in asked]
        # Each also while the other one has nothing to do.
        for rank, (address,) in enumerate(found):
            assert ask(address, PROMPTS[rank], 8 + 12 * rank) == answers[rank]
        with pytest.raises(urllib.error.HTTPError, match="409"):
            urllib.request.urlopen(
                urllib.request.Request(f"{found[0][0]}/v1/models/it/unload", b""), timeout=PATIENCE
            )
        for rank in (1, 0):
            os.kill(int((tmp_path / f"{rank}.pid").read_text()), signal.SIGTERM)
        of_all = running.result()
    assert [one.code for one in of_all] == [0, 0], of_all
    assert answers == [wanted(mixture, 8)[0], wanted(mixture, 20)[1]]
    text = "".join(one.err for one in of_all)
    assert "Traceback" not in text, text
    assert "error: " not in text


@pytest.mark.parametrize("command_name", ["generate", "chat"])
def test_the_first_talks_and_the_other_lends_its_experts(
    command_name: str, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["-n", "12", "min_new_tokens=12", "-t", "0"]
    words = {
        "generate": ["generate", "Hello there", "-m", str(mixture), *more],
        "chat": ["chat", str(mixture), "Hello there", *more],
    }[command_name]
    first, other = launch(2, command, *words, *SIZES, where=tmp_path)
    assert (first.code, other.code) == (0, 0), (first, other)
    assert (other.out, other.err) == ("", "")
    assert "in each of 2 processes (ep 2)" in first.err
    with pytest.raises(SystemExit):
        main(words)
    assert first.out == capsys.readouterr().out != ""
