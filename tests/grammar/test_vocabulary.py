"""Every kind of tokenizer: what it reads as a text is what a grammar takes for that text."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quintet import AutoTokenizer, PreTrainedTokenizerFast, demo_model, grammar
from quintet.errors import InputError, TokenizerError
from quintet.grammar import Grammars
from quintet.tokenization import load
from tiny import TEXT, trained_tokenizer

TEXTS = ['{"a": [1, "é🙂"]}', "  two  spaces\tand\n\nlines", "你好", "x" * 40, "1234567890"]
PIECES: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["<|im|>"]},
    "unigram": {"model_type": "unigram", "add_dummy_prefix": False},
}


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pieces")
    for name, options in PIECES.items():
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for text in TEXT * 4 for line in text.splitlines()),
            model_writer=model,
            vocab_size=400,
            hard_vocab_limit=False,
            minloglevel=9,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            **options,
        )
        (root / name).mkdir()
        (root / name / "tokenizer.model").write_bytes(model.getvalue())
    return root


@pytest.fixture(params=["demo", "trained", *PIECES])
def tokenizer(request: pytest.FixtureRequest, pieces: Path) -> Any:
    if request.param == "demo":
        return AutoTokenizer.from_pretrained(demo_model())
    return trained_tokenizer() if request.param == "trained" else load(pieces / request.param)


def allowed(processor: Any, ids: list[int], V: int) -> set[int]:
    row = ~processor(torch.tensor([ids]), torch.zeros(1, V))[0].isneginf()
    return set(row.nonzero()[:, 0].tolist())


def test_a_text_is_the_tokens_that_it_is_read_as(tokenizer: Any) -> None:
    grammars, end = Grammars(tokenizer), tokenizer.eos_token_id
    for text in TEXTS:
        processor = grammars.compile(grammar.choice([text]))
        ids = tokenizer.encode(text, add_special_tokens=False)
        for length in range(len(ids)):
            assert ids[length] in allowed(processor, [0, *ids[:length]], len(tokenizer))
        assert allowed(processor, [0, *ids], len(tokenizer)) == {end}


def test_no_text_is_made_of_tokens_that_are_none(tokenizer: Any) -> None:
    processor = Grammars(tokenizer).compile(grammar.regex("(?s:.)*"))
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids} - {tokenizer.eos_token_id}
    assert not added & allowed(processor, [0], len(tokenizer))


def test_a_token_may_be_named() -> None:
    tokenizer = trained_tokenizer()
    mark = tokenizer.convert_tokens_to_ids("<|im_start|>")
    processor = Grammars(tokenizer).compile(grammar.lark('start: <|im_start|> "a"'))
    assert allowed(processor, [0], len(tokenizer)) == {mark}


def test_tokens_without_bytes_are_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="tokens are bytes or pieces"):
        Grammars(PreTrainedTokenizerFast(words, eos_token="<end>"))


def test_a_text_has_to_have_an_end() -> None:
    pipeline = json.loads(trained_tokenizer().backend_tokenizer.to_str())
    endless = PreTrainedTokenizerFast(Tokenizer.from_str(json.dumps(pipeline)))
    with pytest.raises(InputError, match="eos_token_id"):
        Grammars(endless)
    assert Grammars(endless, eos_token_id=3).vocabulary.ends == (3,)


def test_what_a_tokenizer_would_read_otherwise_is_written_as_it_is() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    for value in ("\U0002f800", "e\u0301", "\u212b"):
        processor = grammar.compile(grammar.json_schema({"const": value}), tokenizer)
        ids = [0]
        for _ in range(40):
            scores = processor(torch.tensor([ids]), torch.zeros(1, len(tokenizer)))[0]
            ids.append(int(scores.argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert json.loads(tokenizer.decode(ids[1:-1])) == value
