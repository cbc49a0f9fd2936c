import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from quintet.errors import TokenizerError
from quintet.tokenization import IncrementalDecoder, PreTrainedTokenizer, Qwen2Tokenizer

same_fixture = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PIECES = [
    *("▁", "▁the", "▁fox", "ox", "a", "é", "<s>", "", "▁▁", ".", "'s", "n't", "##x", " "),
    *(f"<0x{byte:02X}>" for byte in range(256)),
]


def pieces(decoder: decoders.Decoder | None) -> PreTrainedTokenizer:
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, "a"))
    backend.add_special_tokens([AddedToken("<s>")])
    if decoder is not None:
        backend.decoder = decoder
    return PreTrainedTokenizer(backend)


EURO = [PIECES.index(f"<0x{byte:02X}>") for byte in "€".encode()]
DECODERS = {
    "llama": decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    ),
    "fallback": decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(),
    "wordpiece": decoders.WordPiece(),
    "bpe": decoders.BPEDecoder(),
    "none": None,
}
PIECED = {name: pieces(decoder) for name, decoder in DECODERS.items()}


@same_fixture
@given(
    parts=st.lists(st.lists(st.integers(0, 460), max_size=4)),
    skip=st.booleans(),
    errors=st.sampled_from(["replace", "ignore"]),
)
def test_the_parts_join_to_the_whole(
    tokenizer: Qwen2Tokenizer, parts: list[list[int]], skip: bool, errors: str
) -> None:
    tokenizer.errors = errors
    stream = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    text = "".join(stream.push(part) for part in parts) + stream.flush()
    assert text == tokenizer.decode([i for part in parts for i in part], skip_special_tokens=skip)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("clean", [False, True])
@same_fixture
@given(
    parts=st.lists(
        st.lists(
            st.one_of(st.integers(0, 13), st.integers(0, 269), st.sampled_from(EURO)),
            max_size=4,
        )
    ),
    skip=st.booleans(),
)  # fmt: skip
def test_every_kind_of_pipeline_streams_exactly(
    name: str, clean: bool, parts: list[list[int]], skip: bool
) -> None:
    tokenizer = PIECED[name]
    tokenizer.clean_up_tokenization_spaces = clean
    stream = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    text = "".join(stream.push(part) for part in parts) + stream.flush()
    assert text == tokenizer.decode([i for part in parts for i in part], skip_special_tokens=skip)


@same_fixture
@given(text=st.text())
def test_half_a_character_is_never_shown(tokenizer: Qwen2Tokenizer, text: str) -> None:
    stream = IncrementalDecoder(tokenizer)
    shown = ""
    for index in tokenizer.encode(text):
        shown += stream.push(index)
        assert tokenizer.decode(tokenizer.encode(text)).startswith(shown)


def test_text_arrives_as_soon_as_it_is_certain(tokenizer: Qwen2Tokenizer) -> None:
    stream = IncrementalDecoder(tokenizer)
    smile = tokenizer.encode("😀")
    assert len(smile) > 1
    assert [stream.push(index) for index in smile] == [""] * (len(smile) - 1) + ["😀"]
    llama = IncrementalDecoder(pieces(DECODERS["llama"]))
    assert [llama.push(PIECES.index(piece)) for piece in ("▁the", "▁fox")] == ["the", " fox"]
    assert llama.push(PIECES.index("<0xC3>")) == ""
    assert llama.push(PIECES.index("<0xA9>")) == ""
    assert llama.push(PIECES.index("a")) == "éa"


def test_flush_begins_anew(tokenizer: Qwen2Tokenizer) -> None:
    stream = IncrementalDecoder(tokenizer)
    for _ in range(2):
        assert stream.push(tokenizer.encode("😀")[:1]) == ""
        assert stream.flush() == "\ufffd"


def test_strict_errors_are_raised(tokenizer: Qwen2Tokenizer) -> None:
    tokenizer.errors = "strict"
    stream = IncrementalDecoder(tokenizer)
    with pytest.raises(TokenizerError, match="not UTF-8"):
        stream.push(tokenizer.convert_tokens_to_ids(["ä", "a"]))


def test_streaming_takes_linear_time(tokenizer: Qwen2Tokenizer) -> None:
    def seconds(count: int) -> float:
        stream = IncrementalDecoder(tokenizer)
        start = time.thread_time()
        for index in [64, 65] * (count // 2):
            stream.push(index)
        return time.thread_time() - start

    seconds(2_000)
    assert seconds(80_000) < 40 * max(seconds(8_000), 0.005)
