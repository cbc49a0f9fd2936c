"""Whatever is wrong with the files of a tokenizer, it is said by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from quintet.errors import ModelNotFoundError, QuintetError, TokenizerError
from quintet.tokenization import PreTrainedTokenizer, Qwen2Tokenizer, guard, load

LONG = "x" * 30_000
WRONG: tuple[Any, ...] = (
    *(True, 0, -1, 2**63, 10**400, float("inf"), float("nan"), "", "\ud800", "x", [], {}),
    *([None], [1], [[]], {"content": 3}, {"content": "\ud800"}, {"a": None}, [{}], [{"name": []}]),
    *(LONG, [LONG], {"content": LONG}, {"5": {"content": LONG}}, {LONG: "a"}),
)
SETTINGS = (
    *("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens"),
    *("extra_special_tokens", "padding_side", "truncation_side", "model_max_length"),
    *("model_input_names", "clean_up_tokenization_spaces", "split_special_tokens", "errors"),
    *("chat_template", "added_tokens_decoder", "tokenizer_class", "add_prefix_space", "other"),
)


def use(root: Path) -> None:
    tokenizer = load(root)
    tokenizer.decode(tokenizer.encode("the quick fox"))
    tokenizer.save_pretrained(root / "saved")


@pytest.fixture
def directory(trained: Path, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    return tmp_path


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_wrong_value_is_refused_or_read(directory: Path, key: str, name: str) -> None:
    for value in WRONG:
        (directory / name).write_text(json.dumps({key: value}))
        try:
            use(directory)
        except QuintetError as error:
            said = str(error).encode()
            assert len(said) < 20_000


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token", {"special": True}),
        ("errors", 5),
        ("model_max_length", float("inf")),
        ("model_max_length", "many"),
        ("chat_template", False),
        ("padding_side", ["left"]),
        ("additional_special_tokens", [["<a>"]]),
        ("additional_special_tokens", "<a>"),
        ("added_tokens_decoder", {"1e999": {"content": "a"}}),
        ("added_tokens_decoder", {"-1": {"content": "a"}}),
        ("eos_token", "\ud800"),
        ("of another program", "\udcff"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(directory: Path, key: str, value: Any) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(TokenizerError):
        load(directory)


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt"),
        "tokenizer.model",
    ],
)
def test_a_directory_in_the_place_of_a_file_is_named(
    directory: Path, trained: Path, name: str
) -> None:
    for other in ("vocab.json", "merges.txt"):
        (directory / other).write_bytes((trained / other).read_bytes())
    if name in ("vocab.json", "merges.txt", "tokenizer.model"):
        for other in ("tokenizer.json", *(["vocab.json"] if name == "tokenizer.model" else [])):
            (directory / other).unlink()
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()
    with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
        load(directory)


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "\ud800", "none"])
@pytest.mark.parametrize(
    "read",
    [
        lambda path: PreTrainedTokenizer(tokenizer_file=path),
        lambda path: Qwen2Tokenizer(path, path),
    ],
)
def test_a_path_that_cannot_be_is_not_found(path: str, read: Callable[[str], Any]) -> None:
    with pytest.raises(ModelNotFoundError):
        read(path)


def test_a_panic_of_the_library_is_an_error() -> None:
    class PanicException(BaseException):
        pass

    with (
        pytest.raises(TokenizerError, match=r"it ended \(PanicException: no entry\)"),
        guard.guarded("it ended"),
    ):
        raise PanicException("no entry")
    with pytest.raises(KeyboardInterrupt), guard.guarded("it ended"):
        raise KeyboardInterrupt


def test_a_vocabulary_with_wrong_ids_is_refused(trained: Path, tmp_path: Path) -> None:
    merges = trained / "merges.txt"
    for wrong in ({"a": -1}, {"a": "b"}, {"a": 10**30}, {"a": 10**9}, {"a": None}, [1], "a"):
        (tmp_path / "vocab.json").write_text(json.dumps(wrong))
        with pytest.raises(TokenizerError):
            Qwen2Tokenizer(tmp_path / "vocab.json", merges)
    (tmp_path / "merges.txt").write_text("")
    (tmp_path / "vocab.json").write_text('{"a": 1000000000}')
    with pytest.raises(TokenizerError, match="has the id 1000000000"):
        Qwen2Tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    assert Tokenizer.from_file(str(trained / "tokenizer.json"))
