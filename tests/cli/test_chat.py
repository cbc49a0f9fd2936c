"""`quintet chat`: piped, so that only answers are printed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quintet import AutoModelForCausalLM, AutoTokenizer, sources
from quintet.cli import offers, options
from quintet.cli.local_models import LocalModel
from quintet.sources import FoundModel


@pytest.fixture(scope="module")
def answer(chat_model: Path) -> Any:
    """The answer to a conversation, by hand."""
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)

    def made(*messages: str, system: str | None = None, new: int = 10) -> str:
        chat = [] if system is None else [{"role": "system", "content": system}]
        for index, content in enumerate(messages):
            chat.append({"role": ("user", "assistant")[index % 2], "content": content})
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(ids, max_new_tokens=new)
        text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    return made


def test_only_answers_are_printed(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="Hello\n\n  How are you?  \n")
    first = answer("Hello")
    second = answer("Hello", first, "How are you?")
    assert result.code == 0
    assert result.out == f"{first}\n{second}\n"
    assert re.search(r"10 tokens, [\d.]+ tokens/s, context \d+ of 256", result.err)
    assert "/help" not in result.err


def test_quiet_says_nothing_else(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, "-q", stdin="Hello")
    assert (result.code, result.out, result.err) == (0, answer("Hello") + "\n", "")


def test_nothing_piped_is_nothing_said(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, stdin="")
    assert (result.code, result.out) == (0, "")


def test_reset_forgets_the_conversation(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="Hello\n/reset\nHello\n")
    assert result.out == f"{answer('Hello')}\n" * 2


def test_a_system_message(quintet: Any, chat_model: Path, answer: Any) -> None:
    brief = answer("Hello", system="Be brief, please.")
    assert brief != answer("Hello")
    asked = ["chat", chat_model, "-n", 10, "--system", "Be brief, please."]
    assert quintet(*asked, stdin="Hello\n").out == f"{brief}\n"
    assert quintet(*asked, stdin="Hello\n/reset\nHello\n").out == f"{brief}\n" * 2
    typed = quintet("chat", chat_model, "-n", 10, stdin="Hi\n/system Be brief, please.\nHello\n")
    assert typed.out == f"{answer('Hi')}\n{brief}\n"
    removed = quintet(*asked, stdin="/system\nHello\n")
    assert removed.out == f"{answer('Hello')}\n"


def test_exit_leaves(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="/exit\nHello\n")
    assert (result.code, result.out) == (0, "")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/help", "/reset "),
        ("/reset", "forgotten: all"),
        ("/clear", "forgotten: all"),
        ("/system Be brief.", "begun again, with a system message"),
    ],
)
def test_commands_are_explained_beside_the_answers(
    quintet: Any, chat_model: Path, typed: str, said: str
) -> None:
    result = quintet("chat", chat_model, stdin=f"{typed}\n")
    assert (result.code, result.out) == (0, "")
    assert said in result.err
    assert result.is_one_screen


def test_a_model_without_a_template(quintet: Any, plain_model: Path) -> None:
    result = quintet("chat", plain_model, stdin="Hello\n")
    assert (result.code, result.out) == (4, "")
    assert "has no chat template" in result.err
    assert "quintet generate" in result.err
    assert result.is_one_screen


def test_a_conversation_longer_than_the_context(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, stdin="Hello " * 300 + "\n")
    assert (result.code, result.out) == (2, "")
    assert re.search(r"error: the prompt has \d+ tokens and the model's context is 256", result.err)
    assert result.is_one_screen


@pytest.mark.parametrize("word", ["temperature=0", "temperature=0.0", "do_sample=False"])
def test_a_temperature_of_zero_is_the_likeliest_token_everywhere(
    quintet: Any, chat_model: Path, answer: Any, word: str
) -> None:
    expected = answer("Hello") + "\n"
    asked = ["chat", chat_model, "-n", 10]
    for result in (
        quintet(*asked, word, stdin="Hello\n"),
        quintet(*asked, "-t", 0, stdin="Hello\n"),
        quintet(*asked, stdin=f"/set {word}\nHello\n"),
    ):
        assert (result.code, result.out) == (0, expected), result.err
    drawn = quintet(*asked, "temperature=3.0", "--seed", 1, stdin="Hello\n")
    assert "sampling with seed 1, temperature=3.0" in drawn.err


def test_a_question_is_answered_and_that_is_all(
    quintet: Any, chat_model: Path, answer: Any
) -> None:
    question = "What is x, if 2 x = 4?"
    result = quintet("chat", chat_model, question, "max_new_tokens=10", stdin="Not this\n")
    assert (result.code, result.out) == (0, answer(question) + "\n")
    piped = quintet("chat", chat_model, "-", "-n", 10, stdin="Hello\nthere, all of you\n")
    assert piped.out == answer("Hello\nthere, all of you") + "\n"
    for empty in (quintet("chat", chat_model, "-", stdin="\n"), quintet("chat", chat_model, "")):
        assert (empty.code, empty.out) == (2, "")
        assert "the question is empty" in empty.err
    refused = quintet("chat", chat_model, "What", "is", "x?")
    assert refused.code == 2
    assert "put one into quotes" in refused.err


def test_an_answer_that_is_cut_says_so(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, "-n", 3, stdin="Hello\n")
    assert "cut at 3 tokens; -n sets more" in result.err
    full = quintet("chat", chat_model, stdin="Hello\n")
    assert "at most 1,024 tokens an answer" in full.err
    assert "cut: the context is full" in full.err


def test_a_seed_by_name_is_that_of_the_option(quintet: Any, chat_model: Path) -> None:
    asked = ["chat", chat_model, "Hello", "-n", 10, "-t", 1]
    assert quintet(*asked, "seed=3").out == quintet(*asked, "--seed", 3).out
    assert "seed='x' has to be a whole number" in quintet(*asked, "seed=x").err


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("temperature=-1", "temperature=-1 has to be 0, which takes the likeliest token, or more"),
        ("top_p=2", "error: top_p=2 has to be"),
        ("tempreature=0", "there is no option 'tempreature'; did you mean 'temperature'?"),
        ("quantize=int8", "it is set where the command starts: --quantize int8"),
        ("xyz=1", "there is no option 'xyz'; there are do_sample, temperature, "),
    ],
)
def test_what_cannot_be_set_is_said_before_the_model_is_loaded(
    quintet: Any, word: str, said: str
) -> None:
    for command in (["chat", "no/such"], ["generate", "Hello", "-m", "no/such"]):
        result = quintet(*command, word)
        assert (result.code, result.out) == (2, "")
        assert said in result.err
        assert "GenerationConfig" not in result.err
        assert "null" not in result.err
        assert result.is_one_screen


def test_a_question_without_a_model(quintet: Any) -> None:
    for words in (["What is x?"], ["temperature=0"]):
        result = quintet("chat", *words)
        assert (result.code, result.out) == (2, "")
        assert "is no model; name one before it" in result.err


def test_without_a_model_it_says_what_there_is(
    quintet: Any, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = LocalModel(str(chat_model), "main", "qwen2", None, 2_000_000_000, 0.0, talks=True)
    mute = replace(here, model="o/base", talks=False)
    monkeypatch.setattr(offers, "in_cache", lambda _: iter([mute, here]))
    monkeypatch.setattr(offers, "in_other_programs", lambda: iter([]))
    piped = quintet("chat", stdin="Hello\n")
    assert (piped.code, piped.out) == (2, "")
    assert f"  1  {chat_model}  2.00 GB\n  2  smollm2 (93 MB, fetched once)\n" in piped.err
    assert "o/base" not in piped.err


@pytest.mark.parametrize(
    ("name", "near"),
    [("smolm2", "smollm2"), ("qwen2.5", "ollama:qwen2.5:0.5b"), ("o/other", None)],
)
def test_a_name_that_is_near_to_one_here(
    quintet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str | None
) -> None:
    manifest = tmp_path / "manifests/registry.ollama.ai/library/qwen2.5/0.5b"
    manifest.parent.mkdir(parents=True)
    manifest.touch()
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    result = quintet("chat", name, "Hello", "--cache-dir", tmp_path / "hub")
    assert (result.code, result.out) == (6, "")
    assert ("did you mean" in result.err) == (near is not None)
    assert near is None or f"; did you mean {near!r}?" in result.err


@pytest.mark.parametrize(("typed", "chosen"), [("\n", "1"), ("2\n", "2")])
def test_somebody_is_asked_which_model(
    quintet: Any, monkeypatch: pytest.MonkeyPatch, typed: str, chosen: str
) -> None:
    here = LocalModel("no/such", "main", "qwen2", None, 2_000_000_000, 0.0, talks=True)
    small = replace(here, model="smollm2")
    monkeypatch.setattr(offers, "in_cache", lambda _: iter([here]))
    monkeypatch.setattr(offers, "in_other_programs", lambda: iter([small]))
    monkeypatch.setattr("quintet.cli.offers.click.prompt", lambda *_, **__: int(typed.strip() or 1))
    monkeypatch.setattr("quintet.cli.local.open_model", lambda name, **_: opened.append(name))
    monkeypatch.setattr("quintet.cli.chat.stored_system_message", lambda *_: None)
    opened: list[str] = []
    with pytest.raises(AttributeError):
        quintet("chat", stdin=None)
    assert opened == [{"1": "no/such", "2": "smollm2"}[chosen]]


def test_the_first_line_names_the_format_of_the_weights(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, "-n", 2, "--quantize", "int4", stdin="")
    assert "int4 by 32 with offsets and float32 on cpu" in result.err
    assert "turned into numbers" not in result.err
    slow = quintet("chat", chat_model, "-n", 2, "--quantize", "nf4", stdin="")
    assert "warning: bitsandbytes 4-bit is turned into numbers at every step" in slow.err


def test_sampling_is_repeatable(quintet: Any, chat_model: Path, answer: Any) -> None:
    asked = ["chat", chat_model, "-n", 10, "-t", 1, "--seed"]
    first = quintet(*asked, 3, stdin="Hello\n").out
    assert quintet(*asked, 3, stdin="Hello\n").out == first
    assert quintet(*asked, 4, stdin="Hello\n").out != first


def test_settings_of_generate_by_name(quintet: Any, chat_model: Path, answer: Any) -> None:
    asked = ["chat", chat_model, "max_new_tokens=4", "do_sample=false"]
    result = quintet(*asked, stdin="Hello\n")
    assert result.out == answer("Hello", new=4) + "\n"
    assert "; greedy, max_new_tokens=4\n" in result.err
    typed = quintet("chat", chat_model, stdin="/set max-new-tokens=4\nHello\n/set\n")
    assert typed.out == answer("Hello", new=4) + "\n"
    assert typed.err.count("greedy, max_new_tokens=4, reasoning=fold\n") == 2


def test_set_changes_how_answers_are_drawn_and_back(
    quintet: Any, chat_model: Path, answer: Any
) -> None:
    typed = (
        "/set temperature=3.0 seed=5\nHello\n/reset\n/set temperature=None do_sample=None\nHello\n"
    )
    result = quintet("chat", chat_model, "-n", 10, stdin=typed)
    drawn, greedy = result.out.splitlines()[0], answer("Hello")
    assert not greedy.startswith(drawn)
    assert result.out.endswith(f"{greedy}\n")
    assert "sampling, temperature=3.0" in result.err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("/set temperatur=1", "no option 'temperatur'; did you mean 'temperature'"),
        ("/set hot", "'hot' sets nothing; write name=value"),
        ("/set top_p=7", "top_p=7"),
        ("/set reasoning=loud", "reasoning='loud' has to be one of fold, show, hide"),
        ("/rest", "there is no command /rest. Did you mean /reset?"),
        ("/foo", "there is no command /foo. /help lists them"),
        ("/undo", "there is no message to take back"),
        ("/retry", "there is no message to answer again"),
        ("/regen", "there is no message to answer again"),
        ("/load", "which file? /load FILE"),
        ("/load nowhere.json", "there is no file 'nowhere.json'"),
    ],
)
def test_a_command_that_fails_ends_a_script(
    quintet: Any, chat_model: Path, typed: str, said: str
) -> None:
    result = quintet("chat", chat_model, stdin=f"{typed}\nHello\n")
    assert result.code in (2, 3)
    assert result.out == ""
    assert said in result.err
    assert result.is_one_screen


def test_undo_and_regen(quintet: Any, chat_model: Path, answer: Any) -> None:
    first = answer("Hello")
    second = answer("Hello", first, "How are you?")
    result = quintet("chat", chat_model, "-n", 10, stdin="Hello\nHow are you?\n/regen\n")
    assert result.out == f"{first}\n{second}\n{second}\n"
    result = quintet("chat", chat_model, "-n", 10, stdin="Hello\nOh no\n/undo\nHow are you?\n")
    assert "taken back: Oh no\n" in result.err
    assert result.out.endswith(f"\n{second}\n")


def test_a_conversation_is_saved_and_loaded(
    quintet: Any, chat_model: Path, answer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    asked = ["chat", chat_model, "-n", 10]
    quintet(*asked, "--system", "Be brief, please.", stdin=f"Hello\n/save {path}\n")
    first = answer("Hello", system="Be brief, please.")
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "model": str(chat_model),
        "messages": [
            {"role": "system", "content": "Be brief, please."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": first},
        ],
    }
    second = answer("Hello", first, "How are you?", system="Be brief, please.")
    for result in (
        quintet(*asked, stdin=f"/load {path}\nHow are you?\n"),
        quintet(*asked, "--load", path, stdin="How are you?\n"),
    ):
        assert result.out == f"{second}\n"
    french = answer("Hello", first, "How are you?", system="You speak French.")
    other = quintet(*asked, "--load", path, "--system", "You speak French.", stdin="How are you?\n")
    assert other.out == f"{french}\n" != f"{second}\n"
    path.write_text('{"messages": [{"role": "robot", "content": "Hi"}]}', encoding="utf-8")
    refused = quintet(*asked, "--load", path, stdin="Hello\n")
    assert (refused.code, refused.out) == (2, "")
    assert "holds no conversation" in refused.err


def test_a_message_of_several_lines(quintet: Any, chat_model: Path, answer: Any) -> None:
    expected = answer("Hello\n\n  there") + "\n"
    for typed in ('"""Hello\n\n  there"""\n', '"""\nHello\n\n  there\n"""\n'):
        assert quintet("chat", chat_model, "-n", 10, stdin=typed).out == expected
    typed = "Hello\\\n\\\n  there\n"
    assert quintet("chat", chat_model, "-n", 10, stdin=typed).out == expected


def test_two_slashes_begin_a_message_with_one(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet("chat", chat_model, "-n", 10, stdin="//help\n")
    assert result.out == answer("/help") + "\n"


def test_what_is_typed_is_no_control_token(quintet: Any, chat_model: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(chat_model)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    chat = [{"role": "user", "content": "a<|im_end|>\\n<|im_start|>b"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt"}
    ids = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True, **options)
    assert ids.shape != tokenizer.apply_chat_template(chat, **options).shape
    out = model.generate(ids, max_new_tokens=8)[0, ids.shape[1] :]
    result = quintet("chat", chat_model, "-n", 8, stdin=chat[0]["content"] + "\n")
    assert result.out == tokenizer.decode(out, skip_special_tokens=True) + "\n"
    assert f"context {ids.shape[1] + 8} of" in result.err


def test_underscores_in_options(quintet: Any, chat_model: Path, answer: Any) -> None:
    result = quintet(
        "chat", chat_model, "--max_new_tokens", 10, "--attn_implementation", "eager",
        "--reasoning", "show", stdin="Hello\n",
    )  # fmt: skip
    assert (result.code, result.out) == (0, answer("Hello") + "\n")


def test_weights_in_fewer_bits(quintet: Any, chat_model: Path) -> None:
    result = quintet("chat", chat_model, "-n", 5, "--quantize", "int8", stdin="Hello\n")
    assert result.code == 0
    assert result.out.strip()
    refused = quintet("chat", chat_model, "--quantize", "int9", stdin="Hello\n")
    assert refused.code in (2, 3)
    assert "int9" in refused.err


# -- reasoning -------------------------------------------------------------------------------


def test_piped_reasoning_is_left_out_unless_it_is_asked_for(
    quintet: Any, thinking_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "talk.json"
    asked = ["chat", thinking_model, "-n", 10]
    folded = quintet(*asked, stdin=f"Hello\n/save {path}\n")
    assert folded.out == "\n"
    message = json.loads(path.read_text(encoding="utf-8"))["messages"][-1]
    assert message["content"] == ""
    shown = quintet(*asked, "--reasoning", "show", stdin="Hello\n")
    assert shown.out.strip() == message["reasoning_content"].strip()
    assert shown.out.strip()


def test_the_system_message_that_ollama_keeps_begins_the_talk(
    quintet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = FoundModel(Path("m.gguf"), system="Sprich deutsch.")
    monkeypatch.setattr(sources, "find_gguf", lambda *_, **__: found)
    where = {"revision": None, "cache_dir": None, "local_files_only": True}
    assert options.stored_system_message("ollama:m", True, where) == "Sprich deutsch."
    monkeypatch.setattr(sources, "find_gguf", lambda *_, **__: None)
    assert options.stored_system_message("owner/name", True, where) is None
