"""Text as it is made: all of it, in whole characters, while it is made."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import AutoModelForCausalLM, AutoTokenizer, TextStreamer
from quintet.errors import InputError

TEXTS = ["Hello there 🙂🙃, naïve café", "你好,世界。", "a", "🙂"]


class Pieces(io.StringIO):
    """A file that keeps what arrives in each write, and whether it was flushed."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.pending = ""

    def write(self, text: str) -> int:
        self.pending += text
        return super().write(text)

    def flush(self) -> None:
        self.pieces.append(self.pending)
        self.pending = ""


@pytest.fixture(scope="module")
def tokenizer(chat_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_model)


@pytest.fixture(scope="module")
def model(chat_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(chat_model)


def stream(streamer: TextStreamer, prompt: list[int], ids: list[int]) -> None:
    streamer.put(torch.tensor([prompt]))
    for index in ids:
        streamer.put(torch.tensor([index]))
    streamer.end()


@pytest.mark.parametrize("text", TEXTS)
def test_text_arrives_in_whole_characters_each_flushed(tokenizer: Any, text: str) -> None:
    file = Pieces()
    ids = tokenizer.encode(text)
    stream(TextStreamer(tokenizer, file=file), ids[:1], ids[1:])
    assert file.getvalue() == f"{text}\n"
    assert "\ufffd" not in file.getvalue()
    assert len(file.pieces) == len(ids) + 1
    assert not file.pending


@pytest.mark.parametrize("skips", [False, True], ids=["all", "no-special"])
def test_the_text_is_the_decoded_ids(model: Any, tokenizer: Any, skips: bool) -> None:
    file = Pieces()
    streamer = TextStreamer(tokenizer, skip_special_tokens=skips, file=file)
    ids = tokenizer("<|im_start|>Hello", return_tensors="pt")
    # Random weights write bytes that are no text, too.
    out = model.generate(**ids, streamer=streamer, max_new_tokens=100)
    expected = tokenizer.decode(out[0], skip_special_tokens=skips)
    assert file.getvalue() == f"{expected}\n"
    assert ("<|im_start|>" in file.getvalue()) is not skips


def test_the_prompt_can_be_left_out(model: Any, tokenizer: Any) -> None:
    file = Pieces()
    ids = tokenizer("Hello", return_tensors="pt")
    out = model.generate(**ids, streamer=TextStreamer(tokenizer, True, file=file))
    assert file.getvalue() == tokenizer.decode(out[0, ids["input_ids"].shape[1] :]) + "\n"


def test_a_streamer_serves_again_after_its_end(tokenizer: Any) -> None:
    file = Pieces()
    streamer = TextStreamer(tokenizer, skip_prompt=True, file=file)
    ids = tokenizer.encode("café")
    stream(streamer, ids, ids)
    stream(streamer, ids, ids)
    assert file.getvalue() == "café\ncafé\n"


def test_standard_output_is_the_default(tokenizer: Any, capsys: Any) -> None:
    stream(TextStreamer(tokenizer), tokenizer.encode("Hello"), [])
    assert capsys.readouterr().out == "Hello\n"


def test_a_subclass_can_send_text_elsewhere(tokenizer: Any) -> None:
    class Collected(TextStreamer):
        text = ""
        ended = False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.text += text
            self.ended = stream_end

    streamer = Collected(tokenizer)
    stream(streamer, tokenizer.encode("🙂"), tokenizer.encode("🙃"))
    assert (streamer.text, streamer.ended) == ("🙂🙃", True)


def test_an_end_without_a_beginning_writes_nothing(tokenizer: Any) -> None:
    file = Pieces()
    TextStreamer(tokenizer, file=file).end()
    assert file.getvalue() == ""


def test_a_batch_is_refused(model: Any, tokenizer: Any) -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(InputError, match="takes one row, not 2"):
        model.generate(ids, streamer=TextStreamer(tokenizer))
    with pytest.raises(InputError, match="takes one row, not 3"):
        model.generate(
            ids[:1], streamer=TextStreamer(tokenizer), do_sample=True, num_return_sequences=3
        )
