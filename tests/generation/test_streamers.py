"""Text as it is made: all of it, in whole characters, while it is made."""

import asyncio
import io
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quintet import (
    AsyncTextIteratorStreamer,
    AutoModelForCausalLM,
    AutoTokenizer,
    TextIteratorStreamer,
    TextStreamer,
)
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


# -- to another thread, or an event loop -------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> threading.Thread:
    def quietly() -> None:
        try:
            work()
        except InputError:
            return

    thread = threading.Thread(target=quietly)
    thread.start()
    return thread


def test_text_is_read_in_another_thread(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("Hello there", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0])
    new = expected[len("Hello there") :]
    for skip, whole in ((False, expected), (True, new)):
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip, timeout=300)
        # One that has come to its end may be used again.
        for _ in range(2):
            thread = in_a_thread(
                lambda s=streamer: model.generate(**inputs, max_new_tokens=12, streamer=s)
            )
            pieces = list(streamer)
            thread.join()
            assert "".join(pieces) == whole
            assert len([piece for piece in pieces if piece]) > 3


def test_a_generation_that_fails_ends_the_stream(model: Any, tokenizer: Any) -> None:
    def failing(ids: torch.Tensor, scores: Any) -> bool:
        raise InputError("no more")

    inputs = tokenizer("Hello there", return_tensors="pt")
    for options in ({"top_k": -1}, {"stopping_criteria": [failing]}):
        streamer = TextIteratorStreamer(tokenizer, timeout=300)
        thread = in_a_thread(
            lambda s=streamer, o=options: model.generate(**inputs, streamer=s, **o)
        )
        assert "".join(streamer).startswith("Hello" if "stopping_criteria" in options else "")
        thread.join()


def test_waiting_has_an_end(tokenizer: Any) -> None:
    streamer = TextIteratorStreamer(tokenizer, timeout=0.01)
    with pytest.raises(queue.Empty):
        next(streamer)


def test_text_is_read_in_an_event_loop(model: Any, tokenizer: Any) -> None:
    inputs = tokenizer("Hello there", return_tensors="pt")
    expected = tokenizer.decode(model.generate(**inputs, max_new_tokens=12)[0])

    async def read() -> list[str]:
        streamer = AsyncTextIteratorStreamer(tokenizer, timeout=300)
        thread = in_a_thread(lambda: model.generate(**inputs, max_new_tokens=12, streamer=streamer))
        pieces = [piece async for piece in streamer]
        thread.join()
        return pieces

    pieces = asyncio.run(read())
    assert "".join(pieces) == expected
    assert len(pieces) > 3


def test_waiting_in_an_event_loop_has_an_end(tokenizer: Any) -> None:
    async def wait() -> None:
        await anext(AsyncTextIteratorStreamer(tokenizer, timeout=0.01))

    with pytest.raises(TimeoutError):
        asyncio.run(wait())


def test_special_tokens_and_spaces_as_asked(tokenizer: Any) -> None:
    special = tokenizer.all_special_ids[0]
    ids = torch.tensor([[special, *tokenizer("Hello there")["input_ids"]]])
    for skip in (False, True):
        streamer = TextIteratorStreamer(
            tokenizer, skip_special_tokens=skip, clean_up_tokenization_spaces=False
        )
        streamer.put(ids)
        streamer.end()
        assert "".join(streamer) == tokenizer.decode(ids[0], skip_special_tokens=skip)
