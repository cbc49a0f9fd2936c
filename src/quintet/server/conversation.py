"""Renders conversations to token ids.

Nothing that a client says becomes a control token: only the template's own do.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quintet.errors import ContextLengthError, InputError, shown
from quintet.parsing import format_of, prepare_messages, with_tools
from quintet.parsing.format import END_THINK, THINK
from quintet.server.questions import Conversation
from quintet.tokenization import PreTrainedTokenizer

# How templates call the switch of what is thought before an answer.
SWITCHES = ("thinking", "enable_thinking")
# Arguments of `apply_chat_template`, which are no variables of templates.
REFUSED = frozenset(
    [
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "padding", "truncation"),
        *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask"),
        *("sanitize_control_tokens", "tokenizer_kwargs"),
        *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"),
        *("mask_token", "additional_special_tokens"),
    ]
)
MOST_KWARGS = 32
# A word, a date, a number: nothing a control token could be made of.
_PLAIN_WORD = re.compile(r"[A-Za-z0-9 _.,:+/-]{0,128}")
# A system prompt of so many tokens is worth keeping for others that begin with it.
LONG_SYSTEM = 128
# So many characters for each token of the context are read at once, to see whether a text fits.
SLICE = 4


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids of a prompt, and where later turns branch.

    Attributes:
        ids: the tokens.
        text: the same, as the template wrote it.
        stable: how many tokens later prompts will begin with, too: where the system prompt ends,
            where the conversation goes on.
        warnings: what was asked for and has no effect with this template.
    """

    ids: tuple[int, ...]
    text: str
    stable: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


def render(tokenizer: PreTrainedTokenizer, conversation: Conversation, context: int) -> Prompt:
    """Render a conversation for a context of this many tokens.

    Raises:
        ChatTemplateError: the template refuses the conversation.
        ContextLengthError: it has more tokens than the context; not all of them are counted.
        InputError: a template argument that is not one, or there is no template.
    """
    if not tokenizer.chat_template:
        raise InputError(
            "the model has no chat template, as those that only continue texts have none; ask "
            "/v1/completions"
        )
    template = tokenizer.get_chat_template(tools=[] if conversation.tools else None)
    used = tokenizer.chat_template_variables(template)
    if conversation.tools and "tools" not in used:
        written = format_of(tokenizer)
        if written is not None:
            template = with_tools(template, written)
    kwargs, warnings = _arguments(template, used, conversation)
    rendered = [_message(one, template) for one in conversation.messages]
    # Before it is written down, for which a template has a budget of its own.
    too_long(tokenizer, "".join(one["content"] or "" for one in rendered), context)
    messages = prepare_messages(tokenizer, rendered)
    tools = [dict(tool) for tool in conversation.tools] or None

    def write(those: list[dict[str, Any]], *, with_prompt: bool, ids: bool) -> Any:
        return tokenizer.apply_chat_template(
            those,
            tools=tools,
            chat_template=template,
            add_generation_prompt=with_prompt and not conversation.continued,
            continue_final_message=with_prompt and conversation.continued,
            tokenize=ids,
            sanitize_control_tokens=ids,
            **kwargs,
        )

    text: str = write(messages, with_prompt=True, ids=False)
    too_long(tokenizer, text, context)
    ids = tuple(write(messages, with_prompt=True, ids=True))
    stable = []
    if beginning := _beginning(messages, tools):
        length = _common(ids, tuple(write(beginning, with_prompt=False, ids=True)))
        stable += [length] if length >= LONG_SYSTEM else []
    if not conversation.continued:
        before: str = write(messages, with_prompt=False, ids=False)
        stable.append(_before(tokenizer, ids, text, before))
    return Prompt(ids, text, tuple(n for n in stable if 0 < n < len(ids)), warnings)


def too_long(tokenizer: PreTrainedTokenizer, text: str, context: int) -> None:
    """Refuse a text that exceeds the context, without tokenising all of it.

    Raises:
        ContextLengthError: it is.
    """
    size = SLICE * context
    if len(text) <= size:
        return
    count = 0
    for start in range(0, len(text), size):
        part = text[start : start + size]
        # Where it is cut, one token may have become two.
        count += max(len(tokenizer.encode(part, add_special_tokens=False, verbose=False)) - 1, 0)
        if count > context:
            raise ContextLengthError(
                f"the model's context is {context} tokens and the prompt has more than {count} "
                f"({len(text)} characters); shorten it"
            )


# -- within ----------------------------------------------------------------------------------------


def _arguments(
    template: str, used: frozenset[str], conversation: Conversation
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the template's arguments, and those it ignores."""
    kwargs, warnings = {}, []
    if len(conversation.template_kwargs) > MOST_KWARGS:
        raise InputError(
            f"chat_template_kwargs has {len(conversation.template_kwargs)} names; at most "
            f"{MOST_KWARGS} are taken"
        )
    for name, value in conversation.template_kwargs.items():
        if name in REFUSED:
            raise InputError(
                f"chat_template_kwargs cannot set {shown(name)}: it is no variable of the "
                "template; there is a field of the request for it, or none"
            )
        if not isinstance(value, bool | int | float | None) and not (
            isinstance(value, str) and _PLAIN_WORD.fullmatch(value)
        ):
            raise InputError(
                f"chat_template_kwargs[{shown(name)}] is {shown(value)}; it has to be a number, "
                "true, false or a word of plain letters, as templates switch by them"
            )
        if name in used:
            kwargs[name] = value
        else:
            warnings.append(f"chat_template_kwargs.{_word(name)} is not asked for by the template")
    if conversation.thinking is not None:
        switch = next((name for name in SWITCHES if name in used), None)
        if switch is not None:
            kwargs.setdefault(switch, conversation.thinking)
        elif not conversation.thinking and THINK in template:
            warnings.append("reasoning cannot be switched off: the template has no switch for it")
        elif conversation.thinking and THINK not in template and END_THINK not in template:
            warnings.append("reasoning cannot be switched on: the template knows none")
    return kwargs, tuple(warnings)


def _word(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "?", name[:64])


def _message(message: Mapping[str, Any], template: str) -> dict[str, Any]:
    """Convert a message for the template."""
    one = {**message, "content": message.get("content")}
    content = one["content"]
    thinks = THINK in template or END_THINK in template
    if one["role"] == "assistant" and isinstance(content, str) and thinks:
        # Templates cut thoughts off by looking into what was said; here they are cut off before.
        thought, end, rest = content.rpartition(END_THINK)
        if end:
            one["content"] = rest.lstrip("\n")
            thought = thought.rpartition(THINK)[2].strip("\n")
            if thought and "reasoning_content" in template:
                one.setdefault("reasoning_content", thought)
    if one.get("reasoning_content") is not None and "reasoning_content" not in template:
        del one["reasoning_content"]
    return one


def _beginning(messages: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """Return a shared beginning of a conversation (system prompt and tools), or [].

    It has the system prompt and the tools, which others begin with, too.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    length = sum(len(one["content"] or "") for one in system) + len(json.dumps(tools or []))
    return [*system, {"role": "user", "content": ""}] if length >= LONG_SYSTEM else []


def _common(ids: tuple[int, ...], others: tuple[int, ...]) -> int:
    """Return the length of the common prefix of two texts."""
    length = 0
    for one, other in zip(ids, others, strict=False):
        if one != other:
            break
        length += 1
    return length


def _before(tokenizer: PreTrainedTokenizer, ids: tuple[int, ...], text: str, before: str) -> int:
    """Return the number of tokens before the generation prompt; 0 if unknown."""
    if text == before:
        # Nothing asks: behind the result of a tool, some models go on at once.
        return len(ids) - 1
    if not text.startswith(before):
        return 0
    asking = tokenizer.encode(text[len(before) :], add_special_tokens=False)
    length = len(ids) - len(asking)
    return length if ids[length:] == tuple(asking) else 0
