"""Conversations to ids, with the assistant's parts marked."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quintet.errors import ChatTemplateError, InputError, shown
from quintet.parsing import format_of, prepare_messages, with_tools
from quintet.tokenization import PreTrainedTokenizer
from quintet.tokenization.messages import plain_messages
from quintet.tokenization.rendered import Rendered
from quintet.tokenization.sanitize import sanitised_row
from quintet.training.data.records import Bad
from quintet.training.data.samples import Encoded
from quintet.training.data.settings import DataSettings
from quintet.training.data.turns import THOUGHT, Message, Turns, Written, apart, check_written
from quintet.training.settings import SettingError

# A template that says itself what the model wrote.
_MARKED = re.compile(r"\{%[-+]?\s*generation\b")
# What every template is given.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
ROLES = ("system", "developer", "user", "assistant", "tool")


class ChatEncoder:
    """Writes conversations down as a tokenizer's chat template does.

    Nothing that is said in one becomes a control token: only the template's own do.

    Args:
        tokenizer: whose template and ids.
        settings: what is learned, and what else the template asks for.

    Raises:
        ChatTemplateError: there is no template.
        SettingError: the template does not ask for something that is set.
    """

    def __init__(self, tokenizer: PreTrainedTokenizer, settings: DataSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._template = tokenizer.get_chat_template()
        used = tokenizer.chat_template_variables(self._template)
        for name in settings.template:
            if name not in used - _GIVEN:
                known = ", ".join(sorted(used - _GIVEN)) or "nothing"
                raise SettingError(
                    f"template.{name}", f": the chat template does not ask for it, but for {known}"
                )
        self._switches: dict[str, Any] = dict(settings.template)
        self._format = format_of(tokenizer)
        tokens = tokenizer.added_tokens_decoder.values()
        self._closings = [token.content for token in tokens if token.special]

    def encode(
        self, messages: object, tools: object = None, *, first: int = 0, once: bool = False
    ) -> list[Encoded]:
        """Return the ids of a conversation, and which of them are learned.

        They are several texts where the template writes an answer otherwise once others follow.

        Args:
            messages: what is said.
            tools: what can be called.
            first: the first message that may be learned.
            once: return the text up to the last answer alone.

        Raises:
            Bad: it is no conversation, or nothing in it can be learned.
        """
        checked, checked_tools, template = self._checked(messages, tools)
        try:
            cut = any(THOUGHT in message for message in checked)
            if _MARKED.search(template) and not cut:
                return [self._by_marks(checked, checked_tools, template, first)]
            texts = self._written(checked, checked_tools, template, first)
            if once:
                texts = texts[-1:]
            return [
                self._ids(checked, checked_tools, template, first, text, place - len(texts))
                for place, text in enumerate(texts)
            ]
        except (ChatTemplateError, InputError) as error:
            raise Bad("refused by the chat template", str(error)) from error

    def _checked(self, messages: object, tools: object) -> tuple[list[Message], Any, str]:
        """Return messages as they are written, the tools, and the template for both.

        Raises:
            Bad: these are no messages, or no tools.
        """
        template = self._template
        try:
            plain = plain_messages(messages, "messages")
            for place, message in enumerate(plain):
                if message["role"] not in ROLES:
                    raise Bad(
                        "a wrong role",
                        f"messages[{place}] is said by {shown(message['role'])}; there are "
                        f"{', '.join(ROLES)}",
                    )
            plain = [apart(message, template) for message in plain]
            plain = prepare_messages(self._tokenizer, plain)
            if tools:
                tools = json.loads(tools) if isinstance(tools, str) else tools
                template = self._tokenizer.get_chat_template(tools=[])
                if "tools" not in self._tokenizer.chat_template_variables(template):
                    if self._format is None:
                        raise Bad(
                            "tools", "the chat template has no place for them, and no form of calls"
                        )
                    template = with_tools(template, self._format)
        except (ChatTemplateError, ValueError, RecursionError) as error:
            raise Bad("not a conversation", str(error)) from error
        return plain, tools or None, template

    def _written(
        self, messages: Sequence[Message], tools: Any, template: str, first: int
    ) -> list[Written]:
        """Return the texts written of a conversation, the whole of it last."""

        def write(those: Sequence[Message], add_generation_prompt: bool) -> str:
            text: str = self._tokenizer.apply_chat_template(
                list(those),
                tools=tools,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **self._switches,
            )
            return text

        calls_end = self._format.end if self._format is not None else ""
        turns = Turns(write, self._closings, self._tokenizer.eos_token, calls_end)
        last = self._settings.train_on == "last"
        *others, whole = turns.written(messages, first, last=last)
        if self._settings.train_on == "all":
            whole = Written(whole.text, ((0, whole.spans[-1][1]),))
        return [*others, whole]

    def _ids(
        self,
        messages: Sequence[Message],
        tools: Any,
        template: str,
        first: int,
        written: Written,
        place: int,
    ) -> Encoded:
        """Return the ids of one of the texts, of which the template alone wrote control tokens."""

        def render(variables: Mapping[str, Any]) -> Rendered:
            texts = self._written(variables["messages"], variables["tools"], template, first)
            return Rendered(texts[place].text, ())

        variables = {"messages": list(messages), "tools": tools, "documents": None}
        row = sanitised_row(self._tokenizer, render, variables, written.text, {})
        spans = iter(written.spans)
        start, end = next(spans)
        learned = []
        for begin, stop in row.offsets:
            while end <= begin and (span := next(spans, None)) is not None:
                start, end = span
            # A token that begins before the answer is not the model's to choose.
            learned.append(int(start <= begin < end and stop > begin))
        return Encoded(row.ids, learned)

    def _by_marks(self, messages: list[Message], tools: Any, template: str, first: int) -> Encoded:
        """Return the ids of a conversation whose template marks the model's text itself."""

        def write(those: list[Message], **options: Any) -> Any:
            return self._tokenizer.apply_chat_template(
                those, tools=tools, chat_template=template, **options, **self._switches
            )

        check_written(messages, write(messages, tokenize=False))
        safe = {"sanitize_control_tokens": True, "return_dict": True}
        whole = write(messages, return_assistant_tokens_mask=True, **safe)
        ids, learned = list(whole["input_ids"]), list(whole["assistant_masks"])
        if self._settings.train_on == "all":
            learned = [1] * len(ids)
        elif self._settings.train_on == "last":
            places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            first = max(first, *places, 0)
        if first:
            before = write(messages[:first], add_generation_prompt=True, **safe)["input_ids"]
            same = next(
                (
                    i
                    for i, (one, other) in enumerate(zip(ids, before, strict=False))
                    if one != other
                ),
                min(len(ids), len(before)),
            )
            learned[:same] = [0] * same
        if not any(learned[1:]):
            raise Bad("no answer to learn", "the chat template marks nothing as the assistant's")
        return Encoded(ids, learned)
