"""A tokenizer from a GGUF file's metadata: the ids of the pipeline that it was made of."""

import json
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE

from quintet import AutoTokenizer
from quintet.errors import InputError, QuintetError, TokenizerError, UnsupportedModelError
from quintet.sources.smollm2 import fetch_smollm2
from quintet.tokenization import PreTrainedTokenizer, Qwen2Tokenizer
from quintet.tokenization.gguf import KEY, end_ids, read_gguf_tokenizer
from quintet.tokenization.gguf_metadata import gguf_metadata
from quintet.tokenization.partings import PARTINGS, parting_of

PATH = Path("some.gguf")
# Of each parting that differs from the others.
NAMES = ("qwen2", "deepseek-llm", "deepseek-coder", "deepseek-v3", "smollm", "gpt-2", "llama-bpe")
TEXT = [
    "The quick brown fox's 12345 jumps. They'LL say: don't!\r\n\r\n\tdef f(x):\n    return x\n",
    "Ünïcödé naïve café schön Привет мир 你好世界。こんにちは カタカナ 안녕 🙂 ½² ٣ a\u0301e\u0300",
    "  leading, trailing  \n ΑΒγ Ωm K ﬀ ！？ “quoted” ‘it’ 3,141,592 x^2+y_1=[z] #tag @me $5 ",
]
PLACES = ("<|begin|>", "<|end|>", "<|im_end|>")


def trained(name: str, *, first: bool = False, size: int = 420) -> PreTrainedTokenizer:
    """A small tokenizer that parts texts so; its special tokens come last, or first."""
    pipeline = Tokenizer(BPE(ignore_merges=PARTINGS[name].whole))
    PARTINGS[name].apply(pipeline)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(PLACES) if first else [],
        show_progress=False,
    )
    pipeline.train_from_iterator(TEXT * 2, trainer)
    pipeline.add_tokens([AddedToken(text, special=True, normalized=False) for text in PLACES])
    pipeline.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "ø", "  x")])
    return PreTrainedTokenizer(
        tokenizer_object=pipeline,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        add_bos_token=True,
        chat_template="{{ bos_token }}{{ messages[0]['content'] }}",
    )


def read(metadata: dict[str, Any], **options: Any) -> PreTrainedTokenizer:
    return PreTrainedTokenizer._from_files(read_gguf_tokenizer(metadata, PATH), options)


@pytest.fixture(scope="module")
def pairs() -> dict[str, tuple[PreTrainedTokenizer, PreTrainedTokenizer]]:
    """Each tokenizer, and what is read of the metadata that are written of it."""
    made = {name: trained(name, first=name == "smollm") for name in NAMES}
    return {name: (one, read(gguf_metadata(one, len(one) + 7))) for name, one in made.items()}


@pytest.mark.parametrize("name", NAMES)
@given(st.lists(st.one_of(st.text(max_size=30), st.sampled_from([*TEXT, *PLACES, "<think>", "ø"]))))
@example([])
def test_any_text_gets_the_ids_it_was_written_with(
    pairs: dict[str, Any], name: str, texts: list[str]
) -> None:
    wanted, found = pairs[name]
    text = "".join(texts)
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return
    ids = wanted(text)["input_ids"]
    assert found(text)["input_ids"] == ids
    assert found.decode(ids, skip_special_tokens=True) == wanted.decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("name", NAMES)
def test_vocabulary_roles_and_templates_come_back(pairs: dict[str, Any], name: str) -> None:
    wanted, found = pairs[name]
    assert found.get_vocab() == wanted.get_vocab()
    assert found.vocab_size == wanted.vocab_size
    assert found.special_tokens_map == wanted.special_tokens_map
    assert found.chat_template == wanted.chat_template
    kept = {text: token.special for text, token in tokens_of(wanted).items()}
    assert {text: token.special for text, token in tokens_of(found).items()} == kept
    assert parting_of(found.backend_tokenizer) == name


def tokens_of(tokenizer: PreTrainedTokenizer) -> dict[str, AddedToken]:
    return {token.content: token for token in tokenizer.added_tokens_decoder.values()}


def test_a_conversation_begins_once(pairs: dict[str, Any]) -> None:
    _, found = pairs["deepseek-v3"]
    messages = [{"role": "user", "content": "Hi"}]
    ids = found.apply_chat_template(messages, return_dict=False)
    assert ids == found("Hi")["input_ids"]
    assert ids.count(found.bos_token_id) == 1


def written(path: Path, metadata: dict[str, Any], architecture: str = "qwen2") -> Path:
    """Write metadata by the package of llama.cpp."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(metadata[f"{KEY}model"])
    writer.add_tokenizer_pre(metadata[f"{KEY}pre"])
    writer.add_token_list(metadata[f"{KEY}tokens"])
    writer.add_token_types(list(metadata[f"{KEY}token_type"]))
    writer.add_token_merges(metadata[f"{KEY}merges"])
    writer.add_eos_token_id(metadata[f"{KEY}eos_token_id"])
    writer.add_context_length(77)
    writer.add_chat_template(
        [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def test_files_of_llama_cpps_writer_by_all_ways_in(tmp_path: Path) -> None:
    tokenizer = trained("qwen2")
    path = written(tmp_path / "x.gguf", gguf_metadata(tokenizer, len(tokenizer)))
    ids = tokenizer(TEXT[0], add_special_tokens=False)["input_ids"]
    for found in (
        AutoTokenizer.from_pretrained(path),
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf"),
        Qwen2Tokenizer.from_pretrained(str(path)),
        AutoTokenizer.from_pretrained(path, pad_token="<think>", padding_side="left"),
    ):
        assert isinstance(found, Qwen2Tokenizer)
        assert found(TEXT[0])["input_ids"] == ids
        assert found.bos_token is None
        assert found.chat_template == {"default": "plain", "tool_use": "tools"}
        assert found.model_max_length == 77
    assert found.pad_token == "<think>"
    saved = tmp_path / "saved"
    found.save_pretrained(saved)
    again = AutoTokenizer.from_pretrained(saved)
    assert again(TEXT[1])["input_ids"] == found(TEXT[1])["input_ids"]
    assert again.chat_template == found.chat_template
    with pytest.raises(InputError, match="force_download"):
        AutoTokenizer.from_pretrained(path, force_download=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TokenizerError, match=r"x\.gguf"):
        AutoTokenizer.from_pretrained(path)


def test_the_published_vocabulary_of_qwen2(published: Path) -> None:
    tokenizer = Qwen2Tokenizer.from_pretrained(published)
    metadata = gguf_metadata(tokenizer, 151_936)
    found = read(metadata)
    assert metadata[f"{KEY}pre"] == "qwen2"
    for text in (*TEXT, Path(__file__).read_text()):
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_smollm2_parts_digits_and_keeps_its_low_ids() -> None:
    try:
        path = fetch_smollm2(local_files_only=True)
    except OSError as error:
        pytest.skip(str(error))
    found = AutoTokenizer.from_pretrained(path)
    assert found.tokenize("it's 12") == ["it", "'s", "Ġ", "1", "2"]
    assert found("<|im_start|>user<|im_end|>")["input_ids"] == [1, 4093, 2]
    assert (found.bos_token_id, found.eos_token_id, found.vocab_size) == (1, 2, 49152)
    text = "\n".join(TEXT)
    assert found.decode(found(text)["input_ids"]) == text


def metadata_of(**changes: Any) -> dict[str, Any]:
    """Metadata of three letters, a merge and two control tokens, with changes."""
    tokens = ["a", "b", "ab", "<|stop|>", "<|im_end|>", "[PAD5]"]
    usual = {
        "general.architecture": "qwen2",
        f"{KEY}model": "gpt2",
        f"{KEY}pre": "qwen2",
        f"{KEY}tokens": tokens,
        f"{KEY}token_type": array("i", [1, 1, 1, 3, 3, 5]),
        f"{KEY}merges": ["a b"],
        f"{KEY}eos_token_id": 3,
    }
    named = {name if "." in name else KEY + name: value for name, value in changes.items()}
    return {key: value for key, value in {**usual, **named}.items() if value is not None}


def test_what_ends_an_answer_is_more_than_the_files_one_id() -> None:
    assert end_ids(metadata_of(), PATH) == [3, 4]
    assert end_ids(metadata_of(eos_token_id=None), PATH) == [4]
    assert end_ids(metadata_of(eot_token_id=0), PATH) == [3, 0, 4]
    # The text alone does not make a token one that ends.
    assert end_ids(metadata_of(token_type=array("i", [1, 1, 1, 3, 4, 5])), PATH) == [3]
    assert end_ids(metadata_of(eos_token_id=2**32 - 1), PATH) == [4]


def test_ids_with_gaps_and_unused_tokens_stay_where_they_are() -> None:
    kinds = array("i", [3, 1, 5, 1, 5, 4])
    found = read(
        metadata_of(token_type=kinds, tokens=["<|x|>", "a", "u", "b", "v", "<y>"], merges=[])
    )
    assert found("a<y>b<|x|>")["input_ids"] == [1, 5, 3, 0]
    assert found.convert_tokens_to_ids("u") is None


def test_files_without_kinds_and_with_small_numbers() -> None:
    assert read(metadata_of(token_type=None))("ab")["input_ids"] == [2]
    assert read(metadata_of(token_type=array("B", [1, 1, 1, 3, 3, 5])))("ab")["input_ids"] == [2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokens": None}, "tokens has to be a list"),
        ({"tokens": ["a", 1, "b", "c", "d", "e"]}, "tokens has to be a list"),
        ({"tokens": ["a", "a", "ab", "<|stop|>", "<|im_end|>", "x"]}, "a token twice"),
        ({"token_type": array("i", [1, 1, 1])}, "3 numbers, and there are 6 tokens"),
        ({"token_type": array("i", [1, 1, 1, 3, 3, 7])}, "has 7; there are 1 to 6"),
        ({"token_type": array("f", [1, 1, 1, 3, 3, 5])}, "no list of numbers"),
        ({"merges": None}, "merges has to be a list"),
        ({"merges": ["a c"]}, "makes no tokenizer"),
        ({"merges": ["ab"]}, "makes no tokenizer"),
        ({"merges": [1]}, "makes no tokenizer"),
        ({"eos_token_id": 6}, "no id of one of its 6 tokens"),
        ({"eos_token_id": -5}, "no id of one"),
        ({"bos_token_id": 1.5}, "no id of one"),
        ({"add_bos_token": 1}, "true or false"),
        ({"model": "no_vocab"}, "has no tokenizer"),
        ({"tokenizer.chat_template": 3}, "template 'default' has to be a text"),
        ({"add_bos_token": True}, "add_bos_token=True needs a bos_token"),
    ],
)
def test_what_contradicts_itself_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises((TokenizerError, InputError), match=said):
        read(metadata_of(**changes))


def test_partings_that_are_not_known_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"pre='tekken' is not known.*deepseek-llm"):
        read(metadata_of(pre="tekken"))
    with pytest.raises(UnsupportedModelError, match="'bert' is not supported; there are gpt2"):
        read(metadata_of(model="bert"))
    with pytest.raises(UnsupportedModelError, match="of 'llama' with 6 tokens no tokenizer"):
        read(metadata_of(pre="default", **{"general.architecture": "llama"}))


@pytest.mark.parametrize("name", [None, "default"])
def test_old_files_are_read_by_their_architecture_and_size(name: str | None) -> None:
    with pytest.warns(UserWarning, match=r"old file .* taken is 'qwen2'"):
        assert isinstance(read(metadata_of(pre=name)), PreTrainedTokenizer)


def test_sentencepiece_in_a_file_gives_the_ids_of_sentencepiece(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.write_text("\n".join(TEXT * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<x>"],
        minloglevel=2,
    )
    theirs: Any = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    kinds: list[tuple[int, Callable[[int], bool]]] = [
        (2, theirs.is_unknown),
        (3, theirs.is_control),
        (6, theirs.is_byte),
    ]
    count = len(theirs)
    texts = [theirs.id_to_piece(i) for i in range(count)]
    of_kind = [next((kind for kind, is_it in kinds if is_it(i)), 1) for i in range(count)]
    of_kind[texts.index("<x>")] = 4
    found = read(
        {
            f"{KEY}model": "llama",
            f"{KEY}tokens": texts,
            f"{KEY}scores": array("f", [theirs.get_score(i) for i in range(count)]),
            f"{KEY}token_type": array("i", of_kind),
            f"{KEY}bos_token_id": 1,
            f"{KEY}eos_token_id": 2,
            f"{KEY}unknown_token_id": 0,
        }
    )
    for text in (*TEXT, "", " ", "  two", "unseen ☃ \U0001f9ff"):
        assert found(text)["input_ids"] == [1, *theirs.encode(text)], text
    # What the tokenizer.json of such a release says: each text between tokens gets a space.
    release = Tokenizer(found.backend_tokenizer.model)
    release.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    release.add_tokens([*found.added_tokens_decoder.values()])
    for text in ("a<x>b", "<s>the cat</s>\n<s> the", "<x><x>", " <x> a ", "</s>\n"):
        assert found(text)["input_ids"] == [1, *release.encode(text).ids], text


@pytest.mark.parametrize(
    "changes",
    [
        {"scores": None},
        {"scores": array("f", [0.0])},
        {"tokens": ["a", "a", "", "b", "c", "d"], "scores": array("f", [0.0] * 6)},
        {"tokens": ["x" * 5000, "a", "b", "c", "d", "e"], "scores": array("f", [0.0] * 6)},
    ],
)
def test_damaged_sentencepiece_is_named(changes: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match=r"scores|a token twice"):
        read(metadata_of(model="llama", **changes))


def test_what_a_file_cannot_say_is_refused_before_it_is_written(chat_model: Path) -> None:
    other = AutoTokenizer.from_pretrained(chat_model)  # parts texts in a way of its own
    with pytest.raises(UnsupportedModelError, match="no name for"):
        gguf_metadata(other, len(other))
    tokenizer = trained("qwen2")
    with pytest.raises(InputError, match="the model has 10 embeddings"):
        gguf_metadata(tokenizer, 10)
    metadata = gguf_metadata(tokenizer, len(tokenizer), [tokenizer.eos_token_id or 0, 5, 6])
    assert metadata[f"{KEY}eot_token_id"] == 5
    assert json.dumps(metadata[f"{KEY}add_bos_token"]) == "true"


ODD: Any = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=8),
    st.lists(st.integers(-3, 9), max_size=8).map(lambda numbers: array("i", numbers)),
    st.lists(st.floats(width=32), max_size=8).map(lambda numbers: array("f", numbers)),
)
KEYS = (
    *("model", "pre", "tokens", "token_type", "merges", "scores", "bos_token_id", "eos_token_id"),
    *("unknown_token_id", "padding_token_id", "eot_token_id", "add_bos_token", "add_eos_token"),
    *("add_space_prefix", "tokenizer.chat_template", "general.architecture"),
)


@pytest.mark.filterwarnings("ignore:some.gguf is an old file")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(st.dictionaries(st.sampled_from(KEYS), ODD, max_size=4))
def test_metadata_of_any_kind_are_read_or_refused(kind: str, changes: dict[str, Any]) -> None:
    usual = {"model": kind, "scores": array("f", [0.0] * 6)}
    metadata = metadata_of(**{**usual, **changes})
    try:
        tokenizer = read(metadata)
        assert isinstance(tokenizer("ab <|stop|> ü")["input_ids"], list)
        end_ids(metadata, PATH)
    except QuintetError:
        pass
