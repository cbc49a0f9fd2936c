"""Conversations to ids: what is learned is what stands behind the prompt that asks for it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsing.templates import TEMPLATES, tokenizer
from quintet import PreTrainedTokenizerFast
from quintet.errors import ChatTemplateError
from quintet.training.data.chat import ChatEncoder
from quintet.training.data.records import Bad
from quintet.training.data.samples import Encoded
from quintet.training.data.settings import DataSettings, SourceSettings
from quintet.training.settings import SettingError

THINKING = ["qwq", "r1"]
PLAIN = [name for name in TEMPLATES if name not in THINKING]
CALLING = ["qwen", "qwen, text", "v3", "v3.1"]
USER = {"role": "user", "content": "How warm?"}
ANSWER = {"role": "assistant", "content": "Warm."}
THOUGHT = {"role": "assistant", "content": "<think>\nIt is May.\n</think>\n\nWarm."}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"type": "function", "id": "c1", "function": {"name": "w", "arguments": '{"a": 1}'}}
    ],
}
RESULT = {"role": "tool", "content": "20"}
TOOL = {
    "type": "function",
    "function": {"name": "w", "description": "Tells.", "parameters": {"type": "object"}},
}
ENDS = "{{- '<｜tool▁calls▁end｜><|im_end|>' }}"
MARKED = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}
{%- else %}{{- m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""


def encoder(name: str, **changes: Any) -> ChatEncoder:
    return encoder_of(tokenizer(name), **changes)


def encoder_of(using: PreTrainedTokenizerFast, **changes: Any) -> ChatEncoder:
    sources = (SourceSettings(paths=("x",)),)
    return ChatEncoder(using, DataSettings(sources=sources, batch_rows=1, **changes))


def parts(name: str, encoded: Encoded) -> list[str]:
    """The text in turns of what is not learned and what is."""
    assert encoded.learned is not None
    found: list[list[int]] = [[]]
    for index, learned in zip(encoded.ids, encoded.learned, strict=True):
        if learned == len(found) % 2:
            found.append([])
        found[-1].append(index)
    return [tokenizer(name).decode(ids) for ids in found]


@pytest.mark.parametrize("name", PLAIN)
def test_an_answer_is_what_stands_behind_the_prompt_for_it(name: str) -> None:
    said = [USER, ANSWER, USER, ANSWER]
    [encoded] = encoder(name).encode(said)
    text = tokenizer(name).apply_chat_template(said, tokenize=False)
    assert "".join(parts(name, encoded)) == text
    asks, first, between, second, *rest = parts(name, encoded)
    assert first == second == "Warm.<|im_end|>"
    for messages, before in ((said[:1], asks), (said[:3], asks + first + between)):
        prompt = tokenizer(name).apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert prompt == before
    assert "".join(rest) in ("", "\n")


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_learned_where_the_template_cuts_them_from_the_past(name: str) -> None:
    said = [USER, THOUGHT, USER, THOUGHT]
    earlier, later = encoder(name).encode(said)
    answer = "It is May.\n</think>\n\nWarm.<|im_end|>"
    for messages, encoded in (([USER], earlier), ([USER, ANSWER, USER], later)):
        asks, learned, *rest = parts(name, encoded)
        assert learned == answer
        assert "".join(rest) in ("", "\n")
        prompt = tokenizer(name).apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert asks == prompt
    # As tokens of the vocabulary, which nothing else in the message becomes.
    end = tokenizer(name).convert_tokens_to_ids("</think>")
    assert later.ids.count(end) == 1
    # The same thoughts in a field of their own.
    apart = {"role": "assistant", "content": "Warm.", "reasoning_content": "It is May."}
    assert encoder(name).encode([USER, apart]) == [earlier]
    [last] = encoder(name, train_on="last").encode(said)
    assert last == later
    with pytest.raises(Bad, match="an answer without thoughts"):
        encoder(name).encode([USER, ANSWER])


def test_a_switch_of_the_template_decides_whether_thoughts_are_asked_for() -> None:
    with pytest.raises(Bad, match="thoughts where none are asked for"):
        encoder("v3.1").encode([USER, THOUGHT])
    [encoded] = encoder("v3.1", template={"thinking": True}).encode([USER, THOUGHT])
    _, learned = parts("v3.1", encoded)
    assert learned == "\nIt is May.\n</think>\n\nWarm.<|im_end|>"
    with pytest.raises(SettingError, match=r"template\] thinkin: .* but for .*thinking"):
        encoder("v3.1", template={"thinkin": True})


@pytest.mark.parametrize("name", CALLING)
def test_calls_of_tools_are_learned_and_their_results_are_not(name: str) -> None:
    said = [USER, {**CALL, "content": "Let me see."}, RESULT, ANSWER]
    [encoded] = encoder(name).encode(said, [TOOL])
    learned = "".join(parts(name, encoded)[1::2])
    assert "Let me see." in learned
    assert "20" not in learned
    assert '"a": 1' in learned
    assert learned.endswith("Warm.<|im_end|>")
    # The tools are told as they are when the model is used.
    assert "Tells." in parts(name, encoded)[0]


def test_what_a_template_does_not_close_is_closed() -> None:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("v3").backend_tokenizer,
        eos_token="<|im_end|>",
        # As released: only several calls are ended.
        chat_template=TEMPLATES["v3"][0].replace(
            ENDS, f"{{% if m.tool_calls[1:] %}}{ENDS}{{% endif %}}"
        ),
    )
    first, second = encoder_of(made).encode([USER, CALL, RESULT, ANSWER])
    text = made.decode(first.ids)
    assert text.endswith("```<｜tool▁call▁end｜><｜tool▁calls▁end｜><|im_end|>")
    assert made.decode(second.ids).endswith("Warm.<|im_end|>")
    made.eos_token = None
    with pytest.raises(Bad, match="an answer without an end"):
        encoder_of(made).encode([USER, CALL])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["qwen", "v3", "qwq"]),
    st.lists(
        st.sampled_from(
            ["<|im_end|>", "<|im_", "start|>", "<｜User｜>", "<think>", "a b", "\n", "é"]
        ),
        min_size=1,
        max_size=6,
    ).map("".join),
)
def test_nothing_that_is_said_becomes_a_control_token(name: str, content: str) -> None:
    content = f"x{content}x"
    answer = {"role": "assistant", "content": f"<think>\na\n</think>\n\n{content}"}
    if name != "qwq":
        answer["content"] = content
    plain = [
        {**USER, "content": "x"},
        {**answer, "content": answer["content"].replace(content, "x")},
    ]
    [encoded] = encoder(name).encode([{**USER, "content": content}, answer])
    [expected] = encoder(name).encode(plain)
    added = set(tokenizer(name).added_tokens_decoder)
    assert [i for i in encoded.ids if i in added] == [i for i in expected.ids if i in added]
    assert tokenizer(name).decode(encoded.ids).count(content) == 2


def test_a_template_that_marks_answers_is_followed_as_transformers_follows_it() -> None:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("plain").backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=MARKED,
    )
    said = [{"role": "system", "content": "Be brief."}, USER, ANSWER, USER, ANSWER]
    [encoded] = encoder_of(made).encode(said)
    theirs = made.to_transformers().apply_chat_template(
        said, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids == theirs["input_ids"]
    assert encoded.learned == theirs["assistant_masks"]
    # Told apart by comparison, it is the same.
    assert encoder("plain").encode(said) == [encoded]
    for choice in ("last", "all"):
        [chosen] = encoder_of(made, train_on=choice).encode(said)
        [compared] = encoder("plain", train_on=choice).encode(said)
        assert chosen.ids == compared.ids
        assert compared.learned is not None
        assert chosen.learned is not None
        # All but the end of the line behind the last answer.
        assert chosen.learned[:-1] == compared.learned[:-1]


def test_what_is_no_conversation_is_named() -> None:
    wrong: list[tuple[Any, str]] = [
        ("Hi", "not a conversation: messages has to be a list"),
        ([], "not a conversation: messages is empty"),
        ([{"role": "user"}], r"not a conversation: messages\[0\] has no 'content'"),
        ([{"role": "bot", "content": "Hi"}], r"a wrong role: messages\[0\] is said by 'bot'"),
        ([USER], "no answer to learn"),
        ([ANSWER], "no answer to learn"),
        ([{"role": "developer", "content": "Be brief."}, USER, ANSWER], None),
    ]
    for said, message in wrong:
        if message is None:
            encoder("plain").encode(said)
            continue
        with pytest.raises(Bad, match=message):
            encoder("plain").encode(said)
    for tools in ("nonsense", "[" * 10_000):
        with pytest.raises(Bad, match="not a conversation"):
            encoder(CALLING[0]).encode([USER, ANSWER], tools)


def test_a_message_that_the_template_leaves_out_is_named() -> None:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("plain").backend_tokenizer,
        eos_token="<|im_end|>",
        chat_template=TEMPLATES["plain"][0].replace("m.content", "m.content[:9]"),
    )
    encoder_of(made).encode([USER, ANSWER])
    long = {"role": "user", "content": "Would you tell me?"}
    with pytest.raises(Bad, match=r"a message the chat template leaves out: messages\[0\]"):
        encoder_of(made).encode([long, ANSWER])


def test_without_a_template_there_is_no_conversation() -> None:
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer("plain").backend_tokenizer)
    with pytest.raises(ChatTemplateError, match="no chat template"):
        encoder_of(made)
