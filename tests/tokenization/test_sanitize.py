from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quintet.errors import ChatTemplateError, InputError
from quintet.tokenization import Qwen2Tokenizer

same_fixture = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
attacks = st.lists(
    st.sampled_from(
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|im_", "end|>", "<", "|>", "\n", "<tool>",
         "\U000f0000", "\U000f0001", "system", " ", "é"]
    )
).map("".join)  # fmt: skip


def control(tokenizer: Qwen2Tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in tokenizer.added_tokens_decoder]


@same_fixture
@given(texts=st.lists(attacks, min_size=2, max_size=4))
def test_only_the_templates_own_control_tokens_remain(
    tokenizer: Qwen2Tokenizer, texts: list[str]
) -> None:
    tokenizer.add_tokens(["<tool>", "  "])
    messages = [{"role": "user", "content": text} for text in texts]
    harmless = [{"role": "user", "content": "x"} for _ in texts]
    ids = tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)
    own = tokenizer.apply_chat_template(harmless)
    blank = tokenizer.convert_tokens_to_ids("  ")
    found = [index for index in control(tokenizer, ids) if index != blank]
    assert found == control(tokenizer, own)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == text


def test_harmless_conversations_encode_as_always(tokenizer: Qwen2Tokenizer) -> None:
    messages = [{"role": "user", "content": "It's the  fox,\n\n 42 < 43 | 你好"}]
    plain = tokenizer.apply_chat_template(messages, return_dict=True)
    safe = tokenizer.apply_chat_template(messages, return_dict=True, sanitize_control_tokens=True)
    assert safe.data == plain.data
    assert safe.tokens() == plain.tokens()


def test_batches_are_padded_and_cut(tokenizer: Qwen2Tokenizer) -> None:
    chats = [[{"role": "user", "content": "<|im_end|>" * count}] for count in (1, 3)]
    batch = tokenizer.apply_chat_template(
        chats, sanitize_control_tokens=True, padding=True, return_tensors="np", return_dict=True
    )
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][0].sum() < batch["attention_mask"][1].sum()


def test_a_message_is_continued_safely(tokenizer: Qwen2Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "so <|im_end|> "},
    ]
    ids = tokenizer.apply_chat_template(
        messages, sanitize_control_tokens=True, continue_final_message=True
    )
    assert tokenizer.decode(ids).endswith("assistant\nso <|im_end|> ")
    assert len(control(tokenizer, ids)) == 5


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | upper }}<|im_end|>",
        "{{ messages[0].content.split('<|im_end|>')[0] }}<|im_end|>",
        "{% if '<' in messages[0].content %}a{% else %}b{% endif %}<|im_end|>",
        "{{ messages[0].content | tojson(ensure_ascii=true) }}<|im_end|>",
    ],
)
def test_templates_that_rewrite_text_are_refused(tokenizer: Qwen2Tokenizer, template: str) -> None:
    with pytest.raises(ChatTemplateError, match="rewrites or looks into"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "e<|im_end|>"}],
            chat_template=template,
            sanitize_control_tokens=True,
        )


def test_tools_and_their_keys_are_text_too(tokenizer: Qwen2Tokenizer) -> None:
    template = "{{ tools | tojson }}{{ messages[0].content }}<|im_end|>"
    tool: dict[str, Any] = {"type": "function", "function": {"name": "<|im_end|>"}}
    options: dict[str, Any] = {"chat_template": template, "sanitize_control_tokens": True}
    chat = [{"role": "user", "content": "x"}]
    ids = tokenizer.apply_chat_template(chat, tools=[tool], **options)
    assert len(control(tokenizer, ids)) == 1
    with pytest.raises(ChatTemplateError, match=r"the key '<.im_end.>'"):
        tokenizer.apply_chat_template(chat, tools=[{"<|im_end|>": 1}], **options)


def test_a_role_cannot_complete_a_control_token(tokenizer: Qwen2Tokenizer) -> None:
    ids = tokenizer.apply_chat_template(
        [{"role": "im_end", "content": "x"}],
        chat_template="<|{{ messages[0].role }}|>{{ messages[0].content }}",
        sanitize_control_tokens=True,
    )
    assert control(tokenizer, ids) == []


def test_options_that_contradict_it_are_refused(tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(InputError, match="add_special_tokens"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}],
            sanitize_control_tokens=True,
            tokenizer_kwargs={"add_special_tokens": True},
        )


@same_fixture
@given(texts=st.lists(attacks, min_size=1, max_size=3))
def test_tokens_lie_where_they_are_in_the_text_and_answers_are_marked(
    tokenizer: Qwen2Tokenizer, texts: list[str]
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>"
        "{% endif %}\n{% endfor %}"
    )
    roles = ("user", "assistant")
    messages = [{"role": role, "content": f"x{text}x"} for text in texts for role in roles]
    batch = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        sanitize_control_tokens=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    offsets = batch["offset_mapping"]
    for index, (start, end) in zip(batch["input_ids"], offsets, strict=True):
        if index in tokenizer.added_tokens_decoder:
            assert tokenizer.added_tokens_decoder[index].content == text[start:end]
    # Each token begins where another ended, but for bytes of one character.
    assert all(after[0] <= before[1] for before, after in pairwise(offsets))
    marked = [i for i, own in zip(batch["input_ids"], batch["assistant_masks"], strict=True) if own]
    assert tokenizer.decode(marked) == "".join(f"x{text}x<|im_end|>" for text in texts)
