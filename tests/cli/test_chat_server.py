"""`quintet chat http://…` and `quintet generate -m http://…`: a model behind a server."""

import json
import re
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quintet.cli import remote
from quintet.server.registry import Offer
from quintet.serving import Limits
from served import Running, loaded, serving
from server.scripted import Scripted, running
from waiting import PATIENCE, until


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[Running]:
    """A model that talks, under two names."""
    model = loaded(Limits(rows=2, capacity=256), chat_model)
    other = loaded(Limits(rows=2, capacity=256))
    with serving(
        Offer("talks", lambda: model, loaded=model), Offer("x", lambda: other, loaded=other)
    ) as it:
        yield it


@pytest.fixture(scope="module")
def script() -> Iterator[tuple[Scripted, str]]:
    scripted = Scripted()
    with running(scripted.app()) as url:
        yield scripted, url


@pytest.fixture
def said(script: tuple[Scripted, str]) -> Scripted:
    script[0].forget()
    return script[0]


@pytest.fixture
def url(script: tuple[Scripted, str]) -> str:
    return script[1]


@pytest.mark.parametrize("ending", ["", "/v1", "/v1/"])
def test_a_conversation_is_as_with_the_model_in_this_process(
    quintet: Any, server: Running, chat_model: Path, tmp_path: Path, ending: str
) -> None:
    typed = "Hello\nHow are you?\n/regen\n/undo\n/set max_new_tokens=4\nAnd now?\n/save {}\n"
    asked = ["-n", 10, "--system", "Be brief, please."]
    local = quintet("chat", chat_model, *asked, stdin=typed.format(tmp_path / "local.json"))
    there = quintet(
        "chat", server.url + ending, *asked, stdin=typed.format(tmp_path / "there.json")
    )
    assert (there.code, there.out) == (0, local.out)
    kept = [json.loads((tmp_path / name).read_text()) for name in ("local.json", "there.json")]
    assert kept[0]["messages"] == kept[1]["messages"]
    assert kept[1]["model"] == "talks"
    figures = r"10 tokens, [\d.]+ tokens/s, context \d+ of 256\ncut at 10 tokens; -n sets more"
    assert re.search(figures, local.err)
    assert re.search(figures, there.err)
    used = [re.findall(r"context \d+", result.err) for result in (local, there)]
    assert used[0] == used[1]


def test_a_text_is_continued_as_by_the_model_in_this_process(
    quintet: Any, server: Running, chat_model: Path
) -> None:
    local = quintet("generate", "Hello", "-m", chat_model, "-n", 10)
    there = quintet("generate", "Hello", "-m", server.url, "-n", 10)
    assert (there.code, there.out) == (0, local.out)
    result = json.loads(quintet("generate", "Hello", "-m", server.url, "-n", 10, "--json").out)
    assert result["text"] == local.out.removeprefix("Hello").removesuffix("\n")
    assert (result["new_tokens"], result["finish_reason"], result["model"]) == (
        10,
        "length",
        "talks",
    )


def test_models_of_the_server_are_listed_and_taken(quintet: Any, server: Running) -> None:
    result = quintet("chat", server.url, "-n", 3, stdin="/model\n/model x\n/model\nHello\n")
    assert "* talks\n  x\nx answers from here on\n  talks\n* x\n" in result.err
    # It has no template, which its server says.
    assert result.code == 2
    assert "chat template" in result.err
    named = quintet("chat", server.url, "Hello", "model=talks", "max_tokens=3")
    assert (named.code, named.err.count("talks at http")) == (0, 1)
    wrong = quintet("chat", server.url, "Hello", "model=talk")
    assert (wrong.code, "did you mean 'talks'?" in wrong.err) == (2, True)


def test_ctrl_c_frees_the_row_of_the_server(process: Any, tireless_model: Path) -> None:
    model = loaded(Limits(rows=2, capacity=30_000), tireless_model)
    with serving(Offer("tireless", lambda: model, loaded=model)) as server:
        child = process("chat", server.url, "Hello", "max_tokens=29000")
        child.stdout.read(20)
        until(lambda: model.engine.state.running == 1)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=PATIENCE)
        # What there was of it is the answer.
        assert child.returncode == 0
        assert out.endswith("\n")
        assert re.search(r"\d+ tokens, .* tokens/s\n", err)
        until(lambda: not model.engine.state.running)


def test_the_key_is_read_where_servers_read_theirs(
    quintet: Any, tmp_path: Path, said: Scripted, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    said.key = "sesame"
    refused = quintet("chat", url, "Hi")
    assert (refused.code, refused.out) == (1, "")
    assert "set QUINTET_API_KEY or --api-key-file" in refused.err
    path = tmp_path / "keys"
    path.write_text("# mine\nsesame\n", encoding="ascii")
    assert quintet("chat", url, "Hi", "--api-key-file", path).out == "Hello\n"
    for name in ("OPENAI_API_KEY", "QUINTET_API_KEY"):
        monkeypatch.setenv(name, "sesame")
        assert quintet("chat", url, "Hi").out == "Hello\n"
        monkeypatch.delenv(name)
    unused = quintet("chat", "smollm2", "Hi", "--api-key-file", path)
    assert (unused.code, "is no address of one" in unused.err) == (2, True)


def test_settings_are_fields_of_requests(quintet: Any, said: Scripted, url: str) -> None:
    asked = ["chat", url, "-t", 0.5, "--stop", "END", "top_p=0.9", "seed=3"]
    typed = "Hi\n/set top_p=None max_new_tokens=7 do_sample=False\nHi\n/set\n"
    result = quintet(*asked, stdin=typed)
    assert result.code == 0
    first, second = said.asked
    assert (first["temperature"], first["stop"], first["top_p"], first["seed"]) == (
        0.5,
        ["END"],
        0.9,
        3,
    )
    assert "top_p" not in second
    assert (second["temperature"], second["max_tokens"]) == (0, 7)
    assert "temperature=0, stop=['END'], seed=3, max_tokens=7, reasoning=fold" in result.err


def test_thoughts_are_told_apart_and_not_read_again(
    quintet: Any, said: Scripted, url: str, tmp_path: Path
) -> None:
    said.answers = [[{"reasoning_content": "Hm. "}, {"reasoning": "Ah."}, "42"], ["43"]]
    path = tmp_path / "talk.json"
    result = quintet("chat", url, "--reasoning", "show", stdin=f"Well?\nSure?\n/save {path}\n")
    assert result.out == "Hm. Ah.\n\n42\n43\n"
    assert said.asked[1]["messages"][1] == {"role": "assistant", "content": "42"}
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert messages[1] == {"role": "assistant", "content": "42", "reasoning_content": "Hm. Ah."}


@pytest.mark.parametrize(
    ("answer", "code", "shown"),
    [
        ((503, {"error": {"message": "busy"}}, {"Retry-After": "5"}), 1, "busy; try again in 5 s"),
        ((400, {"error": {"message": "too long"}}, {}), 2, "the server refuses: too long"),
        ((500, ["?"], {}), 1, "status 500: it gives no reason"),
        ((307, {}, {"Location": "http://127.0.0.1:9/"}), 1, "answers with status 307"),
        (["Half", {"error": {"message": "it broke"}}], 1, "the server failed: it broke"),
    ],
)
def test_errors_of_the_server_are_told(
    quintet: Any, said: Scripted, url: str, answer: Any, code: int, shown: str
) -> None:
    said.answers = [answer]
    result = quintet("chat", url, "Hi")
    assert (result.code, shown in result.err) == (code, True), result.err
    assert result.is_one_screen


def test_a_server_that_lists_no_models_is_told_which(
    quintet: Any, said: Scripted, url: str
) -> None:
    said.lists = False
    assert quintet("chat", url, "Hi").code == 2
    result = quintet("chat", url, "Hi", "model=mine")
    assert (result.code, result.out) == (0, "Hello\n")
    assert said.asked[-1]["model"] == "mine"
    assert "1 token\n" in result.err


def test_chunks_of_any_shape_end_nothing(quintet: Any, said: Scripted, url: str) -> None:
    half = {"content": "\ud800"}
    said.answers = [[{"content": None}, {"content": ["x"]}, {"tool_calls": []}, half, "Hello"]]
    result = quintet("chat", url, "Hi")
    assert (result.code, result.out) == (0, "['x']?Hello\n")


def test_what_has_no_effect_there_is_told_once(quintet: Any, said: Scripted, url: str) -> None:
    said.warnings = "service_tier has no effect here"
    result = quintet("chat", url, stdin="Hi\nAnd now?\n/set service_tier=null\nAgain?\n")
    assert result.code == 0
    assert result.err.count("the server says: service_tier has no effect here") == 1
    result = quintet("generate", "Hi", "-m", url)
    assert "the server says: service_tier has no effect here" in result.err
    assert "service_tier" not in quintet("chat", url, "Hi", "-q").err


def test_an_answer_that_is_no_stream_is_told(quintet: Any, said: Scripted, url: str) -> None:
    """As of a server that does not know what was asked for."""
    said.answers = [(200, {"choices": []}, {})]
    result = quintet("chat", url, "Hi")
    assert result.code == 1
    assert "answers with 'application/json' where a stream was asked for" in result.err


def test_who_says_nothing_is_not_waited_for(quintet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LISTED", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = quintet("chat", f"http://127.0.0.1:{silent.getsockname()[1]}", "Hi")
    assert result.code == 1
    assert "has not said within 0.05 s which models it has" in result.err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version"), "WRONG_VERSION_NUMBER"),
        (OSError(111, "Connect call failed ('127.0.0.1', 9)"), "Connection refused"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_why_nobody_answers_is_told_in_words(error: OSError, said: str) -> None:
    assert said in remote._why(error)


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--quantize", "int8"], "--quantize is for a model in this process"),
        (["--mtp"], "--mtp is for a model in this process"),
        (["tempratur=1"], "a server has no option 'tempratur'; did you mean 'temperature'?"),
        (["do_sample=True"], "set a temperature above 0"),
    ],
)
def test_what_a_server_cannot_be_told_is_refused_by_name(
    quintet: Any, url: str, words: list[str], shown: str
) -> None:
    result = quintet("chat", url, "Hi", *words)
    assert (result.code, result.out) == (2, "")
    assert shown in result.err


def test_no_server_there_is_told(quintet: Any) -> None:
    for command in (
        ["chat", "http://127.0.0.1:9", "Hi"],
        ["generate", "Hi", "-m", "http://127.0.0.1:9"],
    ):
        result = quintet(*command)
        assert (result.code, result.out) == (1, "")
        assert "no server answers at 'http://127.0.0.1:9': Connection refused" in result.err
    strange = quintet("chat", "http://", "Hi")
    assert (strange.code, "is no address of a server" in strange.err) == (2, True)
