"""LangChain's chains, and the loop with which an interface such as gradio's shows a text grow."""

from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import transformers

import quintet
from conformance.families import Family, each
from outside import pair, saved, tokenizer, tool

langchain = tool("langchain_huggingface")
pytestmark = pytest.mark.filterwarnings("ignore")
OPTIONS = {"max_new_tokens": 5, "do_sample": False}


def said(pipe: Any) -> list[Any]:
    chain = langchain.HuggingFacePipeline(pipeline=pipe)
    chat = langchain.ChatHuggingFace(llm=chain)
    return [
        chain.invoke("Hello there"),
        chain.batch(["a", "b"]),
        "".join(chain.stream("Hello there")),
        (chain | str.strip).invoke("def f"),
        chat.invoke([("system", "Be brief."), ("user", "Hi")]).content,
    ]


@each
def test_langchain(family: Family, tmp_path: Path) -> None:
    where = str(saved(family, tmp_path))
    wanted = said(transformers.pipeline("text-generation", model=where, **OPTIONS))
    model = quintet.AutoModelForCausalLM.from_pretrained(where)
    ours = quintet.AutoTokenizer.from_pretrained(where)
    assert said(quintet.pipeline("text-generation", model=where, **OPTIONS)) == wanted
    for its in (ours, ours.to_transformers()):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=its, **OPTIONS)
        assert said(pipe) == wanted


def grown(message: Any, history: list[Any], model: Any, its: Any, kind: Any) -> Iterator[str]:
    """What people hand to `gradio.ChatInterface`: an answer that grows."""
    chat = [*history, {"role": "user", "content": message}]
    batch = its.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    streamer = kind(its, skip_prompt=True, skip_special_tokens=True, timeout=60)
    options = {**batch, "streamer": streamer, "max_new_tokens": 8, "do_sample": False}
    thread = Thread(target=model.generate, kwargs=options)
    thread.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text
    thread.join()


@each
def test_a_chat_that_grows(family: Family) -> None:
    ours, theirs = pair(family)
    own = tokenizer()
    its = own.to_transformers()
    history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    kind = transformers.TextIteratorStreamer
    wanted = [*grown("Hello", history, theirs, its, kind)][-1]
    for tokens in (own, its):
        for streamer in (kind, quintet.TextIteratorStreamer):
            made = [*grown("Hello", history, ours, tokens, streamer)]
            assert made[-1] == wanted
            assert len(made) > 1
