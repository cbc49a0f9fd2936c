"""Chat templates: conversations to text or ids."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quintet.errors import ChatTemplateError, InputError
from quintet.tokenization.batch import BatchEncoding, as_tensor
from quintet.tokenization.encoding import Encoder
from quintet.tokenization.messages import (
    Message,
    plain,
    plain_messages,
    plain_tools,
)
from quintet.tokenization.options import EncodeOptions, check_names
from quintet.tokenization.rendered import Rendered
from quintet.tokenization.rendering import render_chat
from quintet.tokenization.rows import TokenizedRow
from quintet.tokenization.sanitize import sanitised_row
from quintet.tokenization.templates import ChatTemplates

Tools = Sequence[Mapping[str, Any] | Callable[..., Any]]
# The arguments of `apply_chat_template` a template sees; they cannot be given a second time.
_OWN_NAMES = frozenset(["messages", "tools", "documents", "add_generation_prompt"])


class Chat(Encoder):
    """The chat-template methods of a tokenizer."""

    _templates: ChatTemplates

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The template, several by name, or None."""
        return self._templates.source

    @chat_template.setter
    def chat_template(self, template: str | Mapping[str, str] | None) -> None:
        self._templates = ChatTemplates(template)

    def get_chat_template(
        self, chat_template: str | None = None, tools: Tools | None = None
    ) -> str:
        """Return the template that `apply_chat_template` uses.

        Raises:
            ChatTemplateError: there is none.
        """
        return self._templates.choose(chat_template, has_tools=tools is not None)

    def chat_template_variables(self, chat_template: str) -> frozenset[str]:
        """Return the variables that a chat template reads.

        Raises:
            ChatTemplateError: it is not a template.
        """
        return self._templates.compiled(chat_template).variables

    def apply_chat_template(
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        tools: Tools | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool | None = None,
        return_assistant_tokens_mask: bool = False,
        sanitize_control_tokens: bool = False,
        tokenizer_kwargs: EncodeOptions | None = None,
        **template_kwargs: Any,
    ) -> Any:
        """Render one or several conversations with the chat template.

        Args:
            conversation: messages, `{"role": ..., "content": ...}`.
            tools: JSON schemas, or typed and documented Python functions.
            documents: dicts with "title" and "text".
            chat_template: a template, or the name of one of several.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: end inside of the last message, for the model to go on: of its
                content, or of the field that is named, such as "reasoning_content". What the
                template would cut from a finished message stays.
            tokenize: return ids; otherwise text.
            padding: as in `tokenizer(...)`.
            truncation: as in `tokenizer(...)`.
            max_length: as in `tokenizer(...)`.
            return_tensors: as in `tokenizer(...)`.
            return_dict: return a `BatchEncoding`; otherwise, and by default, its `input_ids`.
            return_assistant_tokens_mask: add the column `assistant_masks`, 1 for tokens inside
                of `{% generation %}`.
            sanitize_control_tokens: read control tokens that are written in messages, tools or
                documents as ordinary text; only the template's own become control tokens.
            tokenizer_kwargs: further options of `tokenizer(...)`.
            template_kwargs: what else the template asks for, by name.

        Raises:
            ChatTemplateError: the template is missing, fails, or refuses the conversation.
            InputError: options that contradict each other.
        """
        if continue_final_message and (add_generation_prompt or return_assistant_tokens_mask):
            raise InputError(
                "continue_final_message continues the last message; it does not go with "
                "add_generation_prompt (which begins a new one) or return_assistant_tokens_mask"
            )
        template = self.get_chat_template(chat_template, tools)
        shared = self._variables(template, tools, documents, template_kwargs)
        batched, conversations = _conversations(conversation)
        source = self._templates.compiled(template)
        if return_assistant_tokens_mask and not source.has_generation:
            raise ChatTemplateError(
                "return_assistant_tokens_mask needs a chat template that encloses the model's "
                "own words in {% generation %}…{% endgeneration %}; this one does not"
            )
        continued = _continued_field(continue_final_message, template)

        def render(variables: Mapping[str, Any]) -> Rendered:
            return render_chat(source, variables, continued)

        prompt = {"add_generation_prompt": add_generation_prompt}
        chats = [{**shared, **prompt, "messages": messages} for messages in conversations]
        texts = [render(variables) for variables in chats]

        options: EncodeOptions = {"add_special_tokens": False, **(tokenizer_kwargs or {})}
        check_names("tokenizer_kwargs", options, EncodeOptions.__annotations__)
        options |= {"padding": padding, "truncation": truncation}
        options |= {"max_length": max_length, "return_tensors": return_tensors}
        if not tokenize:
            _refuse_without_ids(
                padding=padding,
                truncation=truncation,
                max_length=max_length,
                return_tensors=return_tensors,
                return_dict=return_dict,
                return_assistant_tokens_mask=return_assistant_tokens_mask,
                sanitize_control_tokens=sanitize_control_tokens,
                tokenizer_kwargs=tokenizer_kwargs,
            )
            return [one.text for one in texts] if batched else texts[0].text
        if return_assistant_tokens_mask and not return_dict:
            raise InputError("return_assistant_tokens_mask=True needs return_dict=True")
        if sanitize_control_tokens:
            rows = [
                sanitised_row(self, render, variables, text.text, options)
                for variables, text in zip(chats, texts, strict=True)
            ]
            batch = self._finish(rows, batched, options)
        else:
            plain_texts = [one.text for one in texts]
            batch = self(plain_texts if batched else plain_texts[0], **options)
        if return_assistant_tokens_mask:
            self._add_mask(batch, texts, batched, return_tensors)
        return batch if return_dict else batch[self.model_input_names[0]]

    def _variables(
        self,
        template: str,
        tools: Tools | None,
        documents: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Check the variables of a call against the template."""
        used = self._templates.compiled(template).variables
        for name in template_kwargs:
            if name not in used or name in _OWN_NAMES:
                near = difflib.get_close_matches(name, sorted(used), n=1)
                hint = f"did you mean {near[0]!r}?" if near else "it would have no effect"
                raise InputError(
                    f"apply_chat_template has no argument {name!r} and the chat template does "
                    f"not ask for it; {hint}"
                )
        for name, value in (("tools", tools), ("documents", documents)):
            if value is not None and name not in used:
                raise ChatTemplateError(
                    f"this chat template has no place for {name}, so they would be left out; "
                    "pass a chat_template that shows them"
                )
        return {
            **self.special_tokens_map,
            **{name: plain(value, name) for name, value in template_kwargs.items()},
            "tools": None if tools is None else plain_tools(tools),
            "documents": None if documents is None else plain(documents, "documents"),
        }

    def _add_mask(
        self,
        batch: BatchEncoding,
        texts: Sequence[Rendered],
        batched: bool,
        return_tensors: str | None,
    ) -> None:
        rows = batch.encodings or []
        masks = [_mask(row, text) for row, text in zip(rows, texts, strict=True)]
        column = masks if batched or return_tensors else masks[0]
        if return_tensors:
            column = as_tensor("assistant_masks", column, return_tensors)
        batch["assistant_masks"] = column


def _mask(row: TokenizedRow, rendered: Rendered) -> list[int]:
    """Return 1 for each token that overlaps generated text."""
    spans = iter(rendered.generated)
    start, end = next(spans, (0, 0))
    mask = []
    for first, last in row.offsets:
        while end <= first and (span := next(spans, None)) is not None:
            start, end = span
        mask.append(int(first < end and last > start))
    return mask


def _conversations(conversation: Any) -> tuple[bool, list[list[dict[str, Any]]]]:
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        return False, [plain_messages(conversation, "conversation")]
    if conversation and not isinstance(conversation[0], Mapping | str):
        numbered = enumerate(conversation)
        return True, [plain_messages(one, f"conversation[{index}]") for index, one in numbered]
    return False, [plain_messages(conversation, "conversation")]


def _continued_field(field: bool | str, template: str) -> str:
    """Return the field to continue, or ""."""
    if not isinstance(field, str):
        return "content" if field else ""
    if not field or field not in template:
        raise ChatTemplateError(
            f"continue_final_message={field!r} has to be True or a field of messages that the "
            "chat template writes, and it has no such field"
        )
    return field


def _refuse_without_ids(**options: Any) -> None:
    given = [f"{name}={value!r}" for name, value in options.items() if value]
    if given:
        raise InputError(f"tokenize=False returns text, so {', '.join(given)} has no effect")
