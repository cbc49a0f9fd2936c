"""Commands, help, and what is shown and returned when something goes wrong."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from quintet import AutoModelForCausalLM
from quintet.cli.main import COMMANDS, cli, main
from quintet.errors import InputError
from waiting import PATIENCE


@pytest.fixture
def broken(chat_model: Path, tmp_path: Path) -> Path:
    """A copy of the model, to be damaged."""
    return Path(shutil.copytree(chat_model, tmp_path / "broken"))


def truncate(root: Path) -> None:
    file = root / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_a_shard(root: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root)
    model.save_pretrained(root, max_shard_size="60KB")
    sorted(root.glob("model-*.safetensors"))[-1].unlink()


def lose_the_config(root: Path) -> None:
    (root / "config.json").unlink()


def lose_the_weights(root: Path) -> None:
    (root / "model.safetensors").unlink()


def lose_the_tokenizer(root: Path) -> None:
    for file in root.glob("*token*"):
        file.unlink()


def become_another_family(root: Path) -> None:
    (root / "config.json").write_text('{"model_type": "gpt2"}')


def become_a_llama(root: Path) -> None:
    (root / "config.json").write_text('{"model_type": "llama"}')


def become_wider(root: Path) -> None:
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))


def garble_the_config(root: Path) -> None:
    (root / "config.json").write_text('{"model_type": ')


def garble_the_tokenizer(root: Path) -> None:
    (root / "tokenizer.json").write_text("{}")


def ask_for_the_impossible(root: Path) -> None:
    (root / "generation_config.json").write_text('{"temperature": -1}')


# -- commands --------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(quintet: Any, flag: str) -> None:
    result = quintet(flag)
    assert (result.code, result.err) == (0, "")
    assert all(f"  {name} " in result.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(quintet: Any, name: str) -> None:
    result = quintet(name, "--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith(f"Usage: quintet {name} ")


def test_no_command_is_a_misuse_that_shows_help(quintet: Any) -> None:
    result = quintet()
    assert result.code == 2
    assert "Commands:" in result.out + result.err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["genrate", "x"], "No such command 'genrate'. Did you mean 'generate'?"),
        (["zzz"], "No such command 'zzz'. There are bench, chat, "),
        (["--verson"], "Did you mean '--version'?"),
        (["generate", "--temprature", "1"], "Did you mean '--temperature'?"),
        (["generate", "x", "y"], "put a prompt of several words in quotes"),
        (["generat"], "Did you mean 'generate'?"),
        (["pull", "o/m"], "a model is fetched when it is first used, as by `quintet chat OWNER"),
        (["serv"], "Did you mean 'serve'?"),
        (["owner/model"], "To talk with a model: quintet chat owner/model"),
        (["generate", "x", "--max-new-tokens", "0"], "0 is not in the range"),
        (["generate", "x", "--max-new-tokens", "many"], "'many' is not a valid integer"),
        (["generate", "x", "--seed", "-1"], "-1 is not in the range"),
        (["generate", "x", "--seed", "9" * 30], "is not in the range"),
        (["generate", "x", "--attn-implementation", "fast"], "'eager', 'sdpa'"),
        (["info", "--jsn"], "Did you mean '--json'?"),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_misuse_is_named_with_the_nearest(quintet: Any, arguments: list[str], hint: str) -> None:
    result = quintet(*arguments)
    assert (result.code, result.out) == (2, "")
    assert hint in result.err
    assert result.is_one_screen


# -- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["generate", "x", "-m"], ["chat"], ["info"]], ids=str)
@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        pytest.param("./nowhere", 3, "no directory './nowhere'", id="no-directory"),
        pytest.param("owner/name", 6, "offline mode is set", id="offline"),
        pytest.param("a/b/c", 3, "not a hub id", id="no-id"),
        pytest.param(__file__, 3, "is a file; a model is a directory", id="file"),
    ],
)
def test_no_such_model(
    quintet: Any, command: list[str], name: str, code: int, message: str
) -> None:
    result = quintet(*command, name)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.is_one_screen


@pytest.mark.parametrize("command", [["generate", "x", "-m"], ["chat"]], ids=str)
@pytest.mark.parametrize(
    ("damage", "code", "message"),
    [
        (truncate, 4, "is truncated"),
        (lose_a_shard, 4, ".safetensors"),
        (lose_the_config, 3, "has no config.json"),
        (lose_the_weights, 4, "safetensors"),
        (lose_the_tokenizer, 3, "tokenizer"),
        (become_a_llama, 3, "Its GGUF file is read, though. The nearest that is: Qwen/Qwen2.5-"),
        (become_another_family, 3, "model_type='gpt2' is not supported; there are deepseek_v2, "),
        (become_wider, 4, "shape"),
        (garble_the_config, 4, "config.json is not readable as JSON"),
        (garble_the_tokenizer, 4, "tokenizer.json"),
        (ask_for_the_impossible, 2, "temperature=-1"),
    ],
)
def test_a_broken_checkpoint(
    quintet: Any, broken: Path, command: list[str], damage: Any, code: int, message: str
) -> None:
    damage(broken)
    result = quintet(*command, broken)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.is_one_screen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "nan"], "temperature=nan"),
        (["--temperature", "-1"], "temperature=-1"),
        (["--top-k", "-3"], "top_k=-3"),
        (["--top-p", "2"], "top_p=2"),
        (["--min-p", "-1"], "min_p=-1"),
        (["--repetition-penalty", "0"], "repetition_penalty=0"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--dtype", "bflot16"], "did you mean 'bfloat16'"),
        (["--device", "warp"], "'warp' is not a device"),
        (["--device", "cuda:99"], "'cuda:99' is not a device"),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) else "",
)
def test_a_value_that_cannot_be(
    quintet: Any, chat_model: Path, options: list[str], message: str
) -> None:
    result = quintet("generate", "x", "-m", chat_model, *options)
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert result.is_one_screen


def test_debugging_shows_where_an_error_is_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUINTET_DEBUG", "1")
    with pytest.raises(InputError, match="the prompt is empty"):
        main(["generate", ""])


def test_debugging_shows_the_traceback(process: Any) -> None:
    child = process("generate", "", before="os.environ['QUINTET_DEBUG'] = '1'")
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (1, "")
    assert "Traceback" in err
    assert "InputError: the prompt is empty" in err


def test_a_script_may_be_run_without_a_standard_input(process: Any) -> None:
    child = process("generate", before="sys.stdin = None")
    out, err = child.communicate(timeout=PATIENCE)
    assert (child.returncode, out) == (2, "")
    assert "the prompt is empty" in err


def test_help_for_a_reader_that_leaves(process: Any) -> None:
    child = process("--help")
    head = subprocess.run(["head", "-c", "5"], stdin=child.stdout, capture_output=True, text=True)
    child.stdout.close()
    assert head.stdout == "Usage"
    assert child.wait(timeout=PATIENCE) in (0, 141)


@pytest.mark.parametrize(
    ("word", "command"), [("run", "chat"), ("gen", "generate"), ("list", "ls"), ("show", "info")]
)
def test_words_of_other_programs(quintet: Any, word: str, command: str) -> None:
    assert quintet(word, "--help").out == quintet(command, "--help").out


def commands(command: click.Command, context: click.Context) -> Iterator[click.Command]:
    """Yield a command, or those of a group."""
    if not isinstance(command, click.Group):
        yield command
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        assert inner is not None
        yield from commands(inner, context)


def test_whole_numbers_of_options_have_a_largest() -> None:
    seen = 0
    for command in commands(cli, click.Context(cli)):
        for option in command.params:
            # The library says what `top_k` may be.
            if isinstance(option.type, click.types.IntParamType) and option.name != "top_k":
                seen += 1
                assert isinstance(option.type, click.IntRange), (command.name, option.name)
                assert option.type.max is not None, (command.name, option.name)
    assert seen > 40
