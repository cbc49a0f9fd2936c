"""`quintet generate`: the text on standard output, as it is made, and nothing else there."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import quintet.cli.generate as module
from quintet import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from quintet.cli.main import main
from quintet.cli.options import choose
from waiting import PATIENCE


@pytest.fixture(scope="module")
def loaded(chat_model: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(chat_model),
        AutoTokenizer.from_pretrained(chat_model),
    )


def continued(loaded: tuple[Any, Any], prompt: str, new: int, **options: Any) -> str:
    model, tokenizer = loaded
    out = model.generate(
        **tokenizer(prompt, return_tensors="pt"),
        max_new_tokens=new,
        token_healing=True,
        tokenizer=tokenizer,
        **options,
    )
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


# -- what is printed -------------------------------------------------------------------------


def test_the_text_is_on_stdout_and_notes_on_stderr(
    quintet: Any, chat_model: Path, loaded: Any
) -> None:
    result = quintet("generate", "Hello there", "-m", chat_model, "-n", 12)
    assert result.code == 0
    assert result.out == continued(loaded, "Hello there", 12) + "\n"
    described, made, ended, _ = result.err.splitlines()
    assert described.startswith("qwen2, 0.0 M parameters, float32 on cpu, loaded in ")
    assert described.endswith("; greedy, max_new_tokens=12")
    assert made.startswith("12 tokens in ")
    assert ended == "cut at 12 tokens; -n sets more"


def test_quiet_leaves_only_the_text(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "Hello", "-m", chat_model, "-n", 999, "--quiet")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Hello")


def test_without_echo_only_the_continuation(quintet: Any, chat_model: Path, loaded: Any) -> None:
    result = quintet("generate", "Hello", "-m", chat_model, "-n", 12, "--no-echo")
    assert result.out == continued(loaded, "Hello", 12).removeprefix("Hello") + "\n"


@pytest.mark.parametrize("prompt", [[], ["-"]], ids=["no-prompt", "dash"])
def test_a_text_can_be_piped_in(
    quintet: Any, chat_model: Path, loaded: Any, prompt: list[str]
) -> None:
    result = quintet("generate", *prompt, "-m", chat_model, "-n", 5, stdin="naïve\n🙂\n")
    # The last line end is that of `echo`, not of the text.
    assert result.out == continued(loaded, "naïve\n🙂", 5) + "\n"
    result = quintet("generate", *prompt, "-m", chat_model, "-n", 5, stdin="naïve\n\n")
    assert result.out == continued(loaded, "naïve\n", 5) + "\n"


def test_options_of_generate_by_name(quintet: Any, chat_model: Path, loaded: Any) -> None:
    result = quintet("generate", "Hello", "max_new_tokens=5", "temperature=0", "-m", chat_model)
    assert result.out == continued(loaded, "Hello", 5) + "\n"
    refused = quintet("generate", "class", "Stack:", "-m", chat_model)
    assert refused.code == 2
    assert "'Stack:' is a second prompt; put a prompt of several words in quotes" in refused.err


def test_a_model_that_answers_is_not_mistaken_for_one_that_continues(
    quintet: Any, chat_model: Path, plain_model: Path
) -> None:
    said = quintet("generate", "Hello", "-m", chat_model, "-n", 1).err
    assert f'to ask this model: quintet chat {chat_model} "QUESTION"' in said
    assert "1 token in " in said
    assert "quintet chat" not in quintet("generate", "Hello", "-m", plain_model, "-n", 1).err


def test_without_a_model_it_is_the_packaged_one(
    quintet: Any, chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "demo_model", lambda: chat_model)
    assert quintet("generate", "Hello", "-n", 3).out.startswith("Hello")


def test_without_a_length_it_fills_the_context_at_most(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "Hello", "-m", chat_model)
    assert "warning" not in result.err
    assert f"{256 - 2} tokens in" in result.err


# -- how tokens are chosen -------------------------------------------------------------------


def test_a_seed_makes_sampling_repeatable(quintet: Any, chat_model: Path) -> None:
    ask = ["generate", "Hello", "-m", chat_model, "-t", 1, "-n", 20]
    first = quintet(*ask, "--seed", 4)
    assert "; sampling with seed 4, temperature=1.0, max_new_tokens=20\n" in first.err
    assert quintet(*ask, "--seed", 4).out == first.out
    assert quintet(*ask, "--seed", 5).out != first.out


def test_the_seed_that_is_told_repeats_the_text(quintet: Any, chat_model: Path) -> None:
    ask = ["generate", "Hello", "-m", chat_model, "--top-p", 0.9, "-n", 20]
    first = quintet(*ask)
    seed = first.err.partition("with seed ")[2].split(",")[0]
    assert quintet(*ask, "--seed", seed).out == first.out


@pytest.mark.parametrize(
    ("options", "how"),
    [
        ([], "greedy"),
        (["-t", 0], "greedy"),
        (["-t", 0.5], "sampling"),
        (["--top-k", 5], "sampling"),
        (["--min-p", 0.1], "sampling"),
        (["--repetition-penalty", 1.2], "greedy"),
    ],
    ids=str,
)
def test_an_option_of_sampling_samples(
    quintet: Any, chat_model: Path, options: list[Any], how: str
) -> None:
    assert f"; {how}" in quintet("generate", "a", "-m", chat_model, "-n", 2, *options).err


def test_the_checkpoints_own_options_hold(
    quintet: Any, chat_model: Path, loaded: Any, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(chat_model, tmp_path / "model"))
    own = GenerationConfig(do_sample=True, temperature=2.0, max_new_tokens=9)
    own.save_pretrained(root)
    result = quintet("generate", "Hello", "-m", root, "--seed", 3)
    assert "sampling with seed 3, temperature=2.0, max_new_tokens=9\n" in result.err
    expected = continued(
        loaded,
        "Hello",
        9,
        do_sample=True,
        temperature=2.0,
        generator=torch.Generator().manual_seed(3),
    )
    assert result.out == f"{expected}\n"
    greedy = quintet("generate", "Hello", "-m", root, "-t", 0)
    assert greedy.out == continued(loaded, "Hello", 9) + "\n"


def test_the_generator_is_where_the_model_is() -> None:
    _, generator, seed = choose(torch.device("cpu"), 7, {}, [])
    assert (generator.device, generator.initial_seed(), seed) == (torch.device("cpu"), 7, 7)


def test_drafting_is_asked_for_and_told(
    quintet: Any, predicting_model: Path, tmp_path: Path
) -> None:
    ask = ["generate", "Hello there", "-m", predicting_model, "-n", 20]
    plain, drafting = quintet(*ask), quintet(*ask, "--mtp", "--draft", 2)
    assert drafting.out == plain.out
    assert "use_mtp=True, num_assistant_tokens=2" in drafting.err
    found = re.search(r"tokens/s, \d+% of (\d+) drafted tokens taken\n", drafting.err)
    assert found
    assert "drafted" not in plain.err
    model = AutoModelForCausalLM.from_pretrained(predicting_model)
    tokenizer = AutoTokenizer.from_pretrained(predicting_model)
    out = model.generate(
        **tokenizer("Hello there", return_tensors="pt"),
        max_new_tokens=20,
        use_mtp=True,
        num_assistant_tokens=2,
        return_dict_in_generate=True,
    ).speculation
    result = json.loads(quintet(*ask, "--mtp", "--draft", 2, "--json").out)
    assert result["drafted_tokens"] == out.drafted_tokens > 0
    assert result["accepted_tokens"] == out.accepted_tokens
    assert "drafted_tokens" not in json.loads(quintet(*ask, "--json").out)

    lines = tmp_path / "prompts.jsonl"
    lines.write_text('"Hello there"\n"The quick brown fox jumps"\n', encoding="utf-8")
    batch = quintet("generate", "--batch", lines, *ask[2:], "--mtp", "--draft", 2)
    rows = [json.loads(line) for line in batch.out.splitlines()]
    assert rows[0]["drafted_tokens"] == out.drafted_tokens
    assert all(row["accepted_tokens"] <= row["drafted_tokens"] for row in rows)


def test_a_number_of_drafts_without_drafts_is_refused(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "Hello", "-m", chat_model, "--draft", 3)
    assert (result.code, result.out) == (2, "")
    assert "--draft 3 has no effect without --mtp" in result.err


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [["--batch-size", 4], ["--json", "--batch", "-"], ["--json", "--echo"]], ids=str
)
def test_options_that_mean_nothing_beside_others(quintet: Any, options: list[Any]) -> None:
    result = quintet("generate", *options, stdin="Hello\n")
    assert (result.code, result.out) == (2, "")
    assert re.search(r"error: --(batch-size|json|echo) has no effect here: ", result.err)


@pytest.mark.parametrize("stdin", ["", None], ids=["empty-pipe", "terminal"])
@pytest.mark.parametrize("prompt", [[], [""]], ids=["none", "empty"])
def test_an_empty_prompt(quintet: Any, prompt: list[str], stdin: str | None) -> None:
    result = quintet("generate", *prompt, stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert "the prompt is empty; try: quintet generate" in result.err
    assert result.is_one_screen


def test_a_prompt_longer_than_the_context(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "🙂 Hello" * 500, "-m", chat_model)
    assert (result.code, result.out) == (2, "")
    assert "error: the prompt has 2500 tokens and the model's context is 256" in result.err
    assert result.is_one_screen


def test_a_token_the_model_does_not_have(quintet: Any, plain_model: Path) -> None:
    result = quintet("generate", "fibonacci", "-m", plain_model)
    assert result.code == 2
    assert "the model's vocabulary has ids 0 to 261 (is this the model's own" in result.err
    assert result.is_one_screen
    assert result.out == ""


def test_more_than_the_context_holds_is_a_note(quintet: Any, chat_model: Path) -> None:
    result = quintet("generate", "Hello", "-m", chat_model, "-n", 999)
    assert result.code == 0
    warning = "warning: a prompt of 2 and 999 new tokens do not fit the model's context of 256"
    assert warning in result.err
    assert result.is_one_screen


def test_bytes_that_are_no_text(process: Any, chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(b"caf\xe9")
    with file.open() as stdin:
        child = process("generate", "-m", chat_model, stdin=stdin)
        out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (2, "")
    assert err.startswith("error: what is piped in is not UTF-8 text")


def test_a_terminal_that_knows_fewer_characters_gets_the_others(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "café", "-m", str(chat_model), "-n", "3", "-q"])
    assert (ended.value.code, capsys.readouterr().err) == (0, "")
    out.flush()
    assert out.buffer.getvalue().startswith(b"caf?")  # type: ignore[attr-defined]


# -- as a process ----------------------------------------------------------------------------


def test_text_arrives_while_it_is_made_and_ctrl_c_ends_it(
    process: Any, tireless_model: Path
) -> None:
    child = process("generate", "Hello", "-m", tireless_model, "-t", 0, "-n", 29_000)
    assert child.stdout.read(30).startswith("Hello")
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=PATIENCE)
    assert child.returncode == 130
    assert out.endswith("\n")
    assert "Traceback" not in err
    assert "tokens in" not in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs head")
def test_a_reader_that_has_enough_ends_it_silently(process: Any, tireless_model: Path) -> None:
    child = process("generate", "Hello", "-m", tireless_model, "-t", 0, "-n", 29_000, "-q")
    head = subprocess.run(["head", "-c", "5"], stdin=child.stdout, capture_output=True, text=True)
    child.stdout.close()
    assert head.stdout == "Hello"
    assert child.wait(timeout=PATIENCE) in (0, 141)
    assert child.stderr.read() == ""
