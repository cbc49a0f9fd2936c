from pathlib import Path
from typing import Any, Literal

import pytest

from quintet.errors import ChatTemplateError, InputError
from quintet.tokenization import BatchEncoding, Qwen2Tokenizer

CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": " the quick fox? "},
    {"role": "assistant", "content": "It's 42. "},
]
WITH_TOOLS = (
    "{%- if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n"
    "{% endfor %}<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{%- if message.content %}{{ message.content | trim }}{% endif %}"
    "{%- for call in message.tool_calls or [] %}\n<tool_call>{{ call.function.name }}:"
    "{{ call.function.arguments | tojson(indent=2) }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_GENERATION = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message.content }}<|im_end|>{% endif %}\n{% endfor %}"
)


def current_weather(place: str, unit: Literal["C", "F"] = "C") -> float:
    """Tell the temperature.

    Args:
        place: where, "city, <country>"
        unit: of the answer
    """
    return 20.0


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]])
def test_text_and_ids_are_those_of_transformers(
    tokenizer: Qwen2Tokenizer, oracle: Any, messages: list[dict[str, str]], prompt: bool
) -> None:
    for tokenize in (False, True):
        options = {"add_generation_prompt": prompt, "tokenize": tokenize}
        ours = tokenizer.apply_chat_template(messages, **options)
        assert ours == oracle.apply_chat_template(messages, **options, return_dict=False)
    mapping = tokenizer.apply_chat_template(messages, return_dict=True)
    assert mapping.data == dict(oracle.apply_chat_template(messages))


def test_the_prompt_of_the_qwen2_page(tokenizer: Qwen2Tokenizer) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tensors_and_batches(tokenizer: Qwen2Tokenizer) -> None:
    one = tokenizer.apply_chat_template(CHAT, return_tensors="pt")
    assert one.shape == (1, len(tokenizer.apply_chat_template(CHAT)))
    both = tokenizer.apply_chat_template(
        [CHAT, CHAT[1:2]], padding=True, return_tensors="pt", return_dict=True
    )
    assert isinstance(both, BatchEncoding)
    assert both["input_ids"].shape == both["attention_mask"].shape
    assert tokenizer.apply_chat_template([CHAT, CHAT[:1]], tokenize=False) == [
        tokenizer.apply_chat_template(chat, tokenize=False) for chat in (CHAT, CHAT[:1])
    ]
    cut = tokenizer.apply_chat_template(CHAT, truncation=True, max_length=5)
    assert cut == tokenizer.apply_chat_template(CHAT)[:5]


@pytest.mark.parametrize("content", ["It's 42. ", "It's", " x\n", "<|im_end|>"])
@pytest.mark.parametrize("template", [None, WITH_TOOLS])
def test_the_final_message_is_left_open_exactly(
    tokenizer: Qwen2Tokenizer, oracle: Any, content: str, template: str | None
) -> None:
    messages = [*CHAT[:2], {"role": "assistant", "content": content}]
    options = {"continue_final_message": True, "tokenize": False, "chat_template": template}
    ours = tokenizer.apply_chat_template(messages, **options)
    assert ours == oracle.apply_chat_template(messages, **options)
    assert ours.endswith(content if template is None else content.strip())
    parts = [*messages[:-1], {"role": "assistant", "content": [{"type": "text", "text": content}]}]
    in_parts = "{{ messages[-1].content[0].text }}<|im_end|>"
    text = tokenizer.apply_chat_template(
        parts, chat_template=in_parts, continue_final_message=True, tokenize=False
    )
    assert text == content


def test_a_message_cannot_be_continued_and_begun(tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(InputError, match="begins a new one"):
        tokenizer.apply_chat_template(CHAT, continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(ChatTemplateError, match="rewrites the 'content'"):
        tokenizer.apply_chat_template(
            CHAT,
            chat_template="{{ messages[-1].content | upper }}",
            continue_final_message=True,
        )
    calls = [{"role": "assistant", "tool_calls": []}]
    with pytest.raises(ChatTemplateError, match="needs text"):
        tokenizer.apply_chat_template(calls, continue_final_message=True)


def test_tools_are_shown_as_transformers_shows_them(tokenizer: Qwen2Tokenizer, oracle: Any) -> None:
    messages = [
        *CHAT[1:2],
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": {"ü": "<&'\">"}}}
            ],
        },
    ]
    options: dict[str, Any] = {"chat_template": WITH_TOOLS, "tokenize": False}
    for tools in ([current_weather], [{"type": "function", "function": {"name": "<é>"}}], None):
        ours = tokenizer.apply_chat_template(messages, tools, **options)
        assert ours == oracle.apply_chat_template(messages, tools, **options)
    assert '"ü": "<&\'\\">"' in ours


def test_tools_without_a_place_in_the_template_are_refused(tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="no place for tools"):
        tokenizer.apply_chat_template(CHAT, tools=[current_weather])
    with pytest.raises(ChatTemplateError, match="no place for documents"):
        tokenizer.apply_chat_template(CHAT, documents=[{"title": "a", "text": "b"}])
    with pytest.raises(ChatTemplateError, match=r"tools\[0\] has to be"):
        tokenizer.apply_chat_template(CHAT, tools=["f"], chat_template=WITH_TOOLS)


@pytest.mark.parametrize("tensors", [None, "np"])
def test_the_assistants_tokens_are_masked(
    tokenizer: Qwen2Tokenizer, oracle: Any, tensors: str | None
) -> None:
    chat = [*CHAT, {"role": "user", "content": "你好"}, {"role": "assistant", "content": "é 🙂"}]
    options: dict[str, Any] = {
        "chat_template": WITH_GENERATION,
        "return_dict": True,
        "return_assistant_tokens_mask": True,
        "return_tensors": tensors,
    }
    ours = tokenizer.apply_chat_template(chat, **options)
    theirs = oracle.apply_chat_template(chat, **options)
    assert list(ours["input_ids"][0] if tensors else ours["input_ids"]) == list(
        theirs["input_ids"][0] if tensors else theirs["input_ids"]
    )
    mask = ours["assistant_masks"].tolist()[0] if tensors else ours["assistant_masks"]
    theirs_mask = theirs["assistant_masks"].tolist()[0] if tensors else theirs["assistant_masks"]
    assert mask == theirs_mask
    ids = ours["input_ids"].tolist()[0] if tensors else ours["input_ids"]
    kept = [index for index, inside in zip(ids, mask, strict=True) if inside]
    assert tokenizer.decode(kept) == "It's 42. <|im_end|>é 🙂<|im_end|>"
    with pytest.raises(ChatTemplateError, match="generation"):
        tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)


def test_named_templates_are_chosen(tokenizer: Qwen2Tokenizer) -> None:
    tokenizer.chat_template = {"default": "d", "tool_use": "t{{ tools }}", "rag": "r"}
    render = lambda **options: tokenizer.apply_chat_template(CHAT, tokenize=False, **options)  # noqa: E731
    assert render() == "d"
    assert render(chat_template="rag") == "r"
    assert render(tools=[]).startswith("t")
    tokenizer.chat_template = {"rag": "r"}
    with pytest.raises(ChatTemplateError, match="one of rag"):
        render()


def test_a_missing_template_says_what_to_do(trained: Path) -> None:
    bare = Qwen2Tokenizer.from_pretrained(trained)
    with pytest.raises(ChatTemplateError, match=r"tokenizer\.chat_template"):
        bare.apply_chat_template(CHAT)
    assert bare.apply_chat_template(CHAT, chat_template="x", tokenize=False) == "x"


def test_template_variables_are_those_the_template_asks_for(tokenizer: Qwen2Tokenizer) -> None:
    template = "{{ enable_thinking }}{{ eos_token }}{{ messages[0].role }}"
    options: dict[str, Any] = {"chat_template": template, "tokenize": False}
    text = tokenizer.apply_chat_template(CHAT, **options, enable_thinking=False)
    assert text == "False<|endoftext|>system"
    with pytest.raises(InputError, match="did you mean 'enable_thinking'"):
        tokenizer.apply_chat_template(CHAT, **options, enable_thinkin=True)
    with pytest.raises(InputError, match="'messages'"):
        tokenizer.apply_chat_template(CHAT, **options, messages=[])
    with pytest.raises(InputError, match="'raise_exception'"):
        tokenizer.apply_chat_template(
            CHAT, chat_template="{{ raise_exception('x') }}", raise_exception=1
        )


@pytest.mark.parametrize(
    ("conversation", "said"),
    [
        ([], "is empty"),
        ("hi", "has to be a list of messages"),
        ({"role": "user"}, "has to be a list of messages"),
        (["hi"], r"conversation\[0\] has to be a dict"),
        ([CHAT[0], {"content": "x"}], r"conversation\[1\]\['role'\]"),
        ([{"role": "user", "contnt": "x"}], r"no 'content'; its keys are role, contnt"),
        ([{"role": "user", "content": 5}], r"\['content'\] has to be a string or a list"),
        ([{"role": "user", "content": ["x"]}], r"\['content'\]\[0\]"),
        ([CHAT, [{"role": "user"}]], r"conversation\[1\]\[0\]"),
        ([{"role": "user", "content": "x", "n": {"k": object()}}], r"\['n'\]\['k'\] is object"),
        ([{"role": "user", "content": "x", "n": {1: 2}}], "not a string"),
    ],
)
def test_what_is_no_conversation_is_named(
    tokenizer: Qwen2Tokenizer, conversation: Any, said: str
) -> None:
    with pytest.raises(ChatTemplateError, match=said):
        tokenizer.apply_chat_template(conversation)


def test_options_that_need_ids_are_refused_for_text(tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(InputError, match="return_tensors='pt' has no effect"):
        tokenizer.apply_chat_template(CHAT, tokenize=False, return_tensors="pt")
    with pytest.raises(InputError, match="did you mean 'padding_side'"):
        tokenizer.apply_chat_template(CHAT, tokenizer_kwargs={"paddin_side": "left"})


@pytest.mark.parametrize("template", [5, 1.5, True, [], {}, [None]], ids=str)
def test_a_template_that_is_no_text_is_named(template: Any, tokenizer: Qwen2Tokenizer) -> None:
    with pytest.raises(ChatTemplateError, match="chat_template is a"):
        tokenizer.apply_chat_template(CHAT, chat_template=template)


def test_the_callers_messages_stay_as_they_are(tokenizer: Qwen2Tokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    tokenizer.apply_chat_template(
        messages,
        chat_template="{{ messages[0].content[0].text }}",
        continue_final_message=True,
    )
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
