import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.errors import InputError, ModelNotFoundError, TokenizerError
from quintet.tokenization import Qwen2Tokenizer, Qwen2TokenizerFast

same_fixture = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pieces = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_", "it's", " \n", "é", "e\u0301", "12"]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=12))).map("".join)


def test_the_example_of_the_documentation(published: Path) -> None:
    tokenizer = Qwen2Tokenizer(published / "vocab.json", published / "merges.txt")
    assert tokenizer("Hello world")["input_ids"] == [9707, 1879]
    assert tokenizer(" Hello world")["input_ids"] == [21927, 1879]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 151643
    assert tokenizer.bos_token is None


def test_special_tokens_split_as_documented(published: Path) -> None:
    files = (published / "vocab.json", published / "merges.txt")
    split = ["<", "|", "endo", "ft", "ext", "|", ">"]
    assert Qwen2Tokenizer(*files).tokenize("<|endoftext|>") == ["<|endoftext|>"]
    assert Qwen2Tokenizer(*files, split_special_tokens=True).tokenize("<|endoftext|>") == split
    assert Qwen2Tokenizer(*files).tokenize("<|endoftext|>", split_special_tokens=True) == split


def test_published_chat_tokens_are_added_behind_the_vocabulary(published: Path) -> None:
    tokenizer = Qwen2TokenizerFast(
        published / "vocab.json",
        published / "merges.txt",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    assert tokenizer.get_added_vocab() == {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
    }
    assert tokenizer.vocab_size == 151643
    assert len(tokenizer) == 151646


def test_published_vocabulary_encodes_as_transformers_does(published: Path) -> None:
    from transformers import Qwen2TokenizerFast as Theirs

    files = {"vocab": str(published / "vocab.json"), "merges": str(published / "merges.txt")}
    theirs = Theirs(**files)
    ours = Qwen2Tokenizer(files["vocab"], files["merges"])
    for text in [
        "Ünïcödé naïve e\u0301, 你好,世界。Привет! 🙂‍↔️ 12345 0x1F",
        "def f(x):\n\n\treturn x  # it's I'LL we'Re  \r\n   \n x",
        "\u200b\u00a0\ufeff ﷽ ́́  <|endoftext|> \U0001f468‍👩‍👧",
    ]:
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)


@same_fixture
@given(text=texts)
def test_ids_are_those_of_transformers(tokenizer: Qwen2Tokenizer, oracle: Any, text: str) -> None:
    assert tokenizer(text)["input_ids"] == oracle(text)["input_ids"]
    assert tokenizer.tokenize(text) == oracle.tokenize(text)


@same_fixture
@given(text=texts)
def test_split_special_tokens_is_that_of_transformers(
    tokenizer: Qwen2Tokenizer, oracle: Any, text: str
) -> None:
    ours = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert ours == oracle(text, split_special_tokens=True)["input_ids"]
    assert not set(ours) & set(tokenizer.all_special_ids)
    assert tokenizer(text)["input_ids"] == oracle(text, split_special_tokens=False)["input_ids"]


@same_fixture
@given(text=st.text())
def test_text_survives_encoding_in_normal_form(tokenizer: Qwen2Tokenizer, text: str) -> None:
    import unicodedata

    assert tokenizer.decode(tokenizer.encode(text)) == unicodedata.normalize("NFC", text)


def test_both_names_and_all_ways_in_give_one_tokenizer(trained: Path) -> None:
    vocab, merges = trained / "vocab.json", trained / "merges.txt"
    lines = merges.read_text(encoding="utf-8").splitlines()[1:]
    made = [
        Qwen2Tokenizer(str(vocab), str(merges)),
        Qwen2TokenizerFast(vocab, merges),
        Qwen2Tokenizer(vocab=json.loads(vocab.read_text(encoding="utf-8")), merges=lines),
        Qwen2TokenizerFast(tokenizer_file=trained / "tokenizer.json"),
        Qwen2TokenizerFast.from_pretrained(trained),
    ]
    text = "It's the 42 quick foxes<|endoftext|>"
    assert len({tuple(tokenizer.encode(text)) for tokenizer in made}) == 1


def test_errors_says_what_becomes_of_broken_bytes(trained: Path) -> None:
    files = (trained / "vocab.json", trained / "merges.txt")
    half = [Qwen2Tokenizer(*files).convert_tokens_to_ids(letter) for letter in ("a", "ä", "b")]
    assert Qwen2Tokenizer(*files).decode(half) == "a\ufffdb"
    assert Qwen2Tokenizer(*files, errors="ignore").decode(half) == "ab"
    with pytest.raises(TokenizerError, match="errors='strict'"):
        Qwen2Tokenizer(*files, errors="strict").decode(half)
    with pytest.raises(InputError, match="'sloppy'"):
        Qwen2Tokenizer(*files, errors="sloppy")


def test_a_vocabulary_given_twice_or_in_part_is_refused(trained: Path) -> None:
    with pytest.raises(InputError, match="its vocabulary once"):
        Qwen2Tokenizer()
    with pytest.raises(InputError, match="belong together"):
        Qwen2Tokenizer(trained / "vocab.json")
    with pytest.raises(ModelNotFoundError, match=r"gone\.json"):
        Qwen2Tokenizer(trained / "gone.json", trained / "merges.txt")
    with pytest.raises(InputError, match="did you mean 'padding_side'"):
        Qwen2Tokenizer(trained / "vocab.json", trained / "merges.txt", paddin_side="left")


def test_damaged_vocabulary_files_are_named(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{", encoding="utf-8")
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"vocab\.json"):
        Qwen2Tokenizer(tmp_path / "vocab.json", trained / "merges.txt")
    with pytest.raises(TokenizerError, match="merge 1 is 'a b c'"):
        Qwen2Tokenizer(trained / "vocab.json", tmp_path / "merges.txt")


def test_save_vocabulary_writes_the_two_files(
    tokenizer: Qwen2Tokenizer, trained: Path, tmp_path: Path
) -> None:
    paths = [Path(path) for path in tokenizer.save_vocabulary(tmp_path, "small")]
    assert [path.name for path in paths] == ["small-vocab.json", "small-merges.txt"]
    again = Qwen2Tokenizer(*paths)
    assert again.encode("It's the quick fox") == tokenizer.encode("It's the quick fox")
    assert json.loads(paths[0].read_text()) == json.loads((trained / "vocab.json").read_text())
