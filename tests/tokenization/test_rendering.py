"""Tool calls, empty contents and messages gone on with, in templates as DeepSeek publishes them."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from quintet.errors import ChatTemplateError
from quintet.tokenization import Qwen2Tokenizer

CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
# Calls only beside a content that is none; a content that is not none, without its calls.
EITHER = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is none %}<A>"
    "{% for call in m['tool_calls'] %}<C>{{ call['function']['name'] }}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "<A>{{ content }}<E>{% endif %}{% endfor %}"
)
# Both, of a content that is not there.
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<C>{{ call.function.name }}{% endfor %}{% endfor %}"
)
ADDED = "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
WRITTEN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
THOUGHT = "{% for m in messages %}<A>{{ m.reasoning_content }}</think>{{ m.content }}{% endfor %}"


def write(tokenizer: Qwen2Tokenizer, template: str, *answer: Any, **options: Any) -> str:
    messages = [{"role": "user", "content": "hi"}, *answer]
    text: str = tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=template, **options
    )
    return text


@pytest.mark.parametrize("template", [EITHER, BOTH])
@pytest.mark.parametrize("content", [None, ""])
def test_tool_calls_are_written(tokenizer: Qwen2Tokenizer, template: str, content: Any) -> None:
    answer = {"role": "assistant", "content": content, "tool_calls": [CALL]}
    assert write(tokenizer, template, answer).endswith("<C>look")
    if template == BOTH:
        del answer["content"]
        assert write(tokenizer, template, answer).endswith("<C>look")


def test_tool_calls_that_would_be_left_out_are_refused(tokenizer: Qwen2Tokenizer) -> None:
    answer = {"role": "assistant", "content": "text", "tool_calls": [CALL]}
    for template in (EITHER, ADDED):
        with pytest.raises(ChatTemplateError, match="leaves out tool calls"):
            write(tokenizer, template, answer)
    assert write(tokenizer, BOTH, answer).endswith("text<C>look")


@pytest.mark.parametrize("template", [EITHER, BOTH, ADDED, WRITTEN])
def test_nothing_is_never_written_as_none(tokenizer: Qwen2Tokenizer, template: str) -> None:
    text = write(tokenizer, template, {"role": "assistant", "content": None, "name": None})
    assert "None" not in text
    assert "hi" in text
    with pytest.raises(ChatTemplateError, match="no 'content'"):
        write(tokenizer, template, {"role": "assistant"})


@pytest.mark.parametrize("content", ["<think>\nabc</think>\nAns", "</think>", "a</think> b ", "x"])
def test_a_message_is_gone_on_with_as_it_is(tokenizer: Qwen2Tokenizer, content: str) -> None:
    answer = {"role": "assistant", "content": content}
    text = write(tokenizer, EITHER, answer, continue_final_message=True)
    assert text == f"<U>hi<A>{content}"


def test_what_is_rewritten_is_gone_on_with_as_it_is(tokenizer: Qwen2Tokenizer) -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "XY"}]}
    shown = "{{ messages[-1].content[0].text | replace('X', 'Z') }}."
    assert write(tokenizer, shown, answer, continue_final_message=True) == "XY"
    with pytest.raises(ChatTemplateError, match="leaves out or rewrites"):
        write(tokenizer, "x{{ messages | length }}", answer, continue_final_message=True)


def test_the_field_to_go_on_with_is_named(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    chat = [{"role": "assistant", "content": "Ans", "reasoning_content": "so that"}]
    options: dict[str, Any] = {"chat_template": THOUGHT, "tokenize": False}
    for field in ("reasoning_content", "content", True):
        ours = tokenizer.apply_chat_template(chat, **options, continue_final_message=field)
        assert ours == oracle.apply_chat_template(chat, **options, continue_final_message=field)
    with pytest.raises(ChatTemplateError, match="continue_final_message='nonsense'"):
        tokenizer.apply_chat_template(chat, **options, continue_final_message="nonsense")
    del chat[0]["reasoning_content"]
    with pytest.raises(ChatTemplateError, match="'reasoning_content', and it has none"):
        tokenizer.apply_chat_template(chat, **options, continue_final_message="reasoning_content")


@pytest.mark.parametrize("role", ["unk_token", "eos_token", "pad_token"])
def test_a_role_that_is_null_has_no_token(trained: Path, tmp_path: Path, role: str) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_bytes((trained / "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "Qwen2Tokenizer", role: None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Qwen2Tokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert role not in ours.special_tokens_map
    ours.save_pretrained(tmp_path / "saved")
    again = Qwen2Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.special_tokens_map == ours.special_tokens_map
    if role == "unk_token":
        assert again.convert_tokens_to_ids("no such token") is None


def test_a_used_tokenizer_is_pickled_as_a_fresh_one(tokenizer: Qwen2Tokenizer) -> None:
    fresh = pickle.dumps(tokenizer)
    chat = [{"role": "user", "content": "the quick fox"}]
    ids = tokenizer.apply_chat_template(chat)
    tokenizer(["the quick fox"] * 3, padding=True, truncation=True, max_length=5)
    tokenizer.decode(ids, skip_special_tokens=True)
    assert pickle.dumps(tokenizer) == fresh
    for again in (pickle.loads(fresh), copy.deepcopy(tokenizer)):
        assert again.apply_chat_template(chat) == ids
