"""`tokenizer.model` read without SentencePiece, against SentencePiece itself."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.errors import TokenizerError
from quintet.tokenization import load
from quintet.tokenization.sentencepiece import read_sentencepiece
from tiny import TEXT

KINDS: dict[str, dict[str, Any]] = {
    # As the released Zamba2 models and Mistral's: bytes for what is unknown, nothing normalised.
    "mistral": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "user_defined_symbols": ["<|im_start|>"],
    },
    "no-prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "unigram": {"model_type": "unigram", "byte_fallback": True},
}
TEXTS = [
    *TEXT,
    "",
    " ",
    "  two  spaces ",
    "Hello there",
    "naïve café 你好 🙂🙃",
    "1234567890 + x",
    "tab\tand\nline",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sentencepiece")
    for name, options in KINDS.items():
        (root / name).mkdir()
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in TEXT * 4 for line in text.splitlines()),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=9,
            **options,
        )
        (root / name / "tokenizer.model").write_bytes(model.getvalue())
    return {name: root / name for name in KINDS}


def theirs(root: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(root / "tokenizer.model"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_ids_and_text_are_those_of_sentencepiece(
    trained: dict[str, Path], kind: str, text: str
) -> None:
    ours, other = load(trained[kind], add_bos_token=False), theirs(trained[kind])
    ids = other.encode(text)
    assert ours(text)["input_ids"] == ids
    assert ours.decode(ids, skip_special_tokens=True) == other.decode(ids)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁"), max_size=40))
def test_any_text_gets_the_ids_of_sentencepiece(trained: dict[str, Path], text: str) -> None:
    root = trained["mistral"]
    assert load(root, add_bos_token=False)(text)["input_ids"] == theirs(root).encode(text)


def test_roles_and_the_begin_of_a_text(trained: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load(trained["mistral"])
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )
    assert tokenizer("Hello")["input_ids"][0] == 1
    (tmp_path / "tokenizer.model").write_bytes(
        (trained["mistral"] / "tokenizer.model").read_bytes()
    )
    told = {"add_bos_token": False, "add_eos_token": True, "pad_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    ids = load(tmp_path)("Hello")["input_ids"]
    assert ids == [*theirs(tmp_path).encode("Hello"), 2]
    text = "a<|im_start|>b c"
    assert load(tmp_path, add_eos_token=False)(text)["input_ids"] == theirs(tmp_path).encode(text)


def test_it_is_saved_as_a_pipeline(trained: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load(trained["mistral"])
    tokenizer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert all(again(text)["input_ids"] == tokenizer(text)["input_ids"] for text in TEXTS)


def test_damaged_files_are_named(trained: dict[str, Path], tmp_path: Path) -> None:
    raw = (trained["mistral"] / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    for content in (b"", b"\x00", raw[:-3], raw[:100], b"\xff" * 40, b"{}", raw[1:], raw + b"\x0b"):
        path.write_bytes(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a"):
            load(tmp_path)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_a_mutated_file_is_read_or_refused(
    trained: dict[str, Path], tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray((trained["mistral"] / "tokenizer.model").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(raw)
    try:
        read_sentencepiece(path).encode("Hello there")
    except TokenizerError as error:
        assert str(path) in str(error)  # noqa: PT017  (both outcomes are right)
