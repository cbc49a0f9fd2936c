"""Conversations, prompts with their completions, and pairs of answers, as samples."""

from collections.abc import Mapping
from typing import Any

from quintet.errors import shown
from quintet.tokenization import PreTrainedTokenizer
from quintet.training.data.chat import ChatEncoder
from quintet.training.data.records import Bad
from quintet.training.data.samples import Encoded, Sample, field_of, hash_of, text_of
from quintet.training.data.settings import DataSettings, FieldNames
from quintet.training.data.text import TextEncoder


class Chats:
    """Samples of conversations.

    Args:
        tokenizer: the model's.
        settings: what is learned of them.
        fields: how the fields of a record are called.

    Raises:
        ChatTemplateError: there is no template.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizer, settings: DataSettings, fields: FieldNames
    ) -> None:
        self._chat, self._fields = ChatEncoder(tokenizer, settings), fields

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Return a conversation: a text, or several where the template takes several.

        Raises:
            Bad: it is none, or nothing in it can be learned.
        """
        messages, tools = field_of(record, self._fields.messages), record.get(self._fields.tools)
        documents = self._chat.encode(messages, tools)
        return Sample(tuple(documents), 0, hash_of([messages, tools]))


class _Answering:
    """Writes an answer behind a prompt: texts as they are, messages by the chat template."""

    def __init__(
        self, tokenizer: PreTrainedTokenizer, settings: DataSettings, fields: FieldNames
    ) -> None:
        self._tokenizer, self._settings, self._fields = tokenizer, settings, fields
        self._text = TextEncoder(tokenizer, settings.end, control_tokens=settings.control_tokens)
        self._chat: ChatEncoder | None = None

    def _answered(self, record: Mapping[str, Any], name: str) -> Encoded:
        """Return the prompt of a record and an answer to it."""
        prompt, answer = field_of(record, self._fields.prompt), field_of(record, name)
        if isinstance(prompt, str) and isinstance(answer, str):
            prompt_ids, answer_ids = self._text.encode(
                [text_of(record, self._fields.prompt), text_of(record, name)]
            )
            prompt_ids = [*self._text.begin, *prompt_ids]
            answer_ids = [*answer_ids, *self._text.end]
            whole = self._settings.train_on == "all"
            return Encoded(
                [*prompt_ids, *answer_ids], [int(whole)] * len(prompt_ids) + [1] * len(answer_ids)
            )
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        if not isinstance(prompt, list) or not isinstance(answer, list):
            raise Bad(
                "neither text nor messages",
                f"{shown(self._fields.prompt)} and {shown(name)} have to be one of these",
            )
        return self._conversation([*prompt, *answer], record, len(prompt))

    def _conversation(self, messages: list[Any], record: Mapping[str, Any], first: int) -> Encoded:
        """Encode a conversation, the first messages of which are not learned."""
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._settings)
        tools = record.get(self._fields.tools)
        [document] = self._chat.encode(messages, tools, first=first, once=True)
        return document


class Completions(_Answering):
    """Samples of prompts and their completions."""

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Return a prompt and its completion.

        Raises:
            Bad: one of them is missing, or nothing can be learned of them.
        """
        fields = self._fields
        document = self._answered(record, fields.completion)
        content = [record[fields.prompt], record[fields.completion], record.get(fields.tools)]
        return Sample((document,), 0, hash_of(content))


class Pairs(_Answering):
    """Samples of a better and a worse answer, with their prompt or their common beginning."""

    def sample(self, record: Mapping[str, Any]) -> Sample:
        """Return two documents, the preferred one first.

        Raises:
            Bad: one of them is missing, they are alike, or nothing can be learned of one.
        """
        fields = self._fields
        better, worse = field_of(record, fields.chosen), field_of(record, fields.rejected)
        if better == worse:
            raise Bad("two answers alike", shown(better))
        if fields.prompt in record:
            documents = (
                self._answered(record, fields.chosen),
                self._answered(record, fields.rejected),
            )
        elif isinstance(better, list) and isinstance(worse, list):
            alike = [one == other for one, other in zip(better, worse, strict=False)]
            first = (*alike, False).index(False)
            documents = (
                self._conversation(better, record, first),
                self._conversation(worse, record, first),
            )
        else:
            documents = self._alone(record, fields.chosen), self._alone(record, fields.rejected)
        content = [record.get(fields.prompt), better, worse, record.get(fields.tools)]
        return Sample(documents, 0, hash_of(content))

    def _alone(self, record: Mapping[str, Any], name: str) -> Encoded:
        [ids] = self._text.encode([text_of(record, name)])
        return Encoded([*self._text.begin, *ids, *self._text.end])
